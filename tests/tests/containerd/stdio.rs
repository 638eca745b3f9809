//! Every kind of stdio: all bytes arrive, also when a peer is slow, late or gone.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::Status as Phase;
use shim_tests::container::{Stdio, code_of};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true, within};
use shim_tests::messages::{GenericOptions, any};
use shim_tests::programs;
use shim_tests::rootfs;
use shim_tests::runner::skip;
use shim_tests::spec::Spec;
use shim_tests::stdio::{Pace, Writer};
use shim_tests::suite;

/// Fifos without a reader yet.
const UNREAD: Stdio = Stdio::Fifos { stdin: false, pace: None };

pub(crate) async fn a_container_without_stdio_runs(cx: Context) -> Result<()> {
    let script = "echo out; echo err >&2; read line; exit 3";
    ensure!(cx.container(&["sh", "-c", script]).run().await? == 3);
    Ok(())
}

pub(crate) async fn stdout_and_stderr_are_kept_apart(cx: Context) -> Result<()> {
    let container = cx.container(&["sh", "-c", "echo out; echo err >&2"]).stdio(Stdio::OUTPUT).start().await?;
    ensure!(container.finish().await? == 0);
    ensure!(container.io.out().to_end().await? == "out\n");
    ensure!(container.io.err().to_end().await? == "err\n");
    Ok(())
}

pub(crate) async fn stdin_reaches_the_container_and_ends_with_close_io(cx: Context) -> Result<()> {
    let container = cx.container(&["cat"]).stdio(Stdio::ALL).start().await?;
    let mut stdin = container.io.stdin().await?;
    stdin.write_all(b"first\n")?;
    container.io.out().until("first").await?;
    stdin.write_all(b"second\n")?;
    drop(stdin);
    container.close_stdin().await?;
    ensure!(container.finish().await? == 0);
    ensure!(container.io.out().to_end().await? == "first\nsecond\n");
    Ok(())
}

pub(crate) async fn a_megabyte_of_stdin_arrives(cx: Context) -> Result<()> {
    let container = cx.container(&["wc", "-c"]).stdio(Stdio::ALL).start().await?;
    let mut stdin = container.io.stdin().await?;
    stdin.write_all(&vec![b'x'; (1 << 20) + 1])?;
    drop(stdin);
    container.close_stdin().await?;
    ensure!(container.finish().await? == 0);
    let text = container.io.out().to_end().await?;
    ensure!(text.trim() == "1048577", "{text:?}");
    Ok(())
}

pub(crate) async fn close_io_is_harmless_before_start_twice_and_after_exit(cx: Context) -> Result<()> {
    let container = cx.container(&["cat"]).stdio(Stdio::ALL).create().await?;
    let stdin = Writer::open_early(container.io.paths()[0].as_ref())?;
    container.close_stdin().await?;
    container.close_stdin().await?;
    container.start().await?;
    drop(stdin);
    ensure!(container.wait().await? == 0);
    container.close_stdin().await?;
    ensure!(container.delete().await?.exit_status == 0);
    Ok(())
}

pub(crate) async fn a_terminal_has_the_requested_size(cx: Context) -> Result<()> {
    let script = "read go; stty size; read go; stty size; exit 3";
    let container = cx.container(&["sh", "-c", script]).terminal().stdio(Stdio::ALL).create().await?;
    container.resize(100, 30).await?;
    container.start().await?;
    let mut stdin = container.io.stdin().await?;
    stdin.write_all(b"go\n")?;
    container.io.out().until("30 100").await?;
    container.resize(111, 42).await?;
    stdin.write_all(b"go\n")?;
    container.io.out().until("42 111").await?;
    ensure!(container.wait().await? == 3);
    // after the exit it may be refused, but it must answer and break nothing
    let _either = container.resize(80, 24).await;
    ensure!(container.delete().await?.exit_status == 3);
    container.io.out().to_end().await?;
    Ok(())
}

pub(crate) async fn a_terminals_last_output_is_not_cut(cx: Context) -> Result<()> {
    let script = "i=0; while [ $i -lt 5000 ]; do echo line $i; i=$((i+1)); done";
    let container = cx.container(&["sh", "-c", script]).terminal().stdio(Stdio::OUTPUT).start().await?;
    ensure!(container.finish().await? == 0);
    let text = container.io.out().to_end().await?;
    let lines: Vec<_> = text.lines().collect();
    ensure!(lines.len() == 5000 && lines[4999] == "line 4999", "{} lines, last {:?}", lines.len(), lines.last());
    Ok(())
}

pub(crate) async fn a_slow_reader_gets_every_byte_around_a_megabyte(cx: Context) -> Result<()> {
    let slow = Pace::Slow { chunk: 16 << 10, pause: Duration::from_millis(2) };
    for size in [(1 << 20) - 1, 1 << 20, (1 << 20) + 1] {
        let stdio = Stdio::Fifos { stdin: false, pace: Some(slow) };
        let command = ["head", "-c", &size.to_string(), "/dev/zero"];
        let container = cx.container(&command).stdio(stdio).start().await?;
        ensure!(container.wait().await? == 0);
        eventually(format!("{size} bytes"), SOON, async || {
            let count = container.io.out().count();
            ensure!(count == size, "{count}");
            Ok(())
        })
        .await?;
        container.delete().await?;
        container.io.out().to_end().await?;
        ensure!(container.io.out().count() == size);
    }
    Ok(())
}

pub(crate) async fn a_late_reader_gets_everything(cx: Context) -> Result<()> {
    let mut container = cx.container(&["sh", "-c", "echo early; echo late >&2"]).stdio(UNREAD).create().await?;
    within("start without a reader", SOON, container.start()).await??;
    within("wait without a reader", SOON, container.wait()).await??;
    container.io_mut().read(Pace::Keep)?;
    ensure!(container.io.out().until("early").await? == "early\n");
    ensure!(container.io.err().until("late").await? == "late\n");
    container.delete().await?;
    container.io.out().to_end().await?;
    Ok(())
}

pub(crate) async fn fifos_that_no_client_ever_opens_block_nothing(cx: Context) -> Result<()> {
    let stdio = Stdio::Fifos { stdin: true, pace: None };
    let container = cx.container(&["sleep", "1000"]).stdio(stdio.clone()).create().await?;
    container.start().await?;
    let exec = container.exec("e", &["true"]).stdio(stdio).start().await?;
    exec.wait().await?;
    exec.delete().await?;
    container.kill(9).await?;
    container.wait().await?;
    container.delete().await?;
    Ok(())
}

pub(crate) async fn a_reader_that_disconnects_breaks_no_pipe(cx: Context) -> Result<()> {
    let script = "trap 'exit 9' PIPE; echo one; read go; echo two || exit 8; read go; echo three || exit 7; exit 3";
    let mut container = cx.container(&["sh", "-c", script]).stdio(Stdio::ALL).start().await?;
    container.io.out().until("one").await?;
    let mut stdin = container.io.stdin().await?;
    container.io_mut().stdout.as_mut().expect("it is read").leave();
    stdin.write_all(b"go\n")?;
    stdin.write_all(b"go\n")?;
    ensure!(container.wait().await? == 3);
    container.io_mut().read(Pace::Keep)?;
    container.io.out().until("three").await?;
    container.delete().await?;
    Ok(())
}

pub(crate) async fn a_grandchild_that_holds_the_pipe_delays_no_wait(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let exec = container.exec("e", &["sh", "-c", "sleep 1000 & echo done"]).stdio(Stdio::OUTPUT).start().await?;
    let begin = Instant::now();
    ensure!(exec.wait().await? == 0);
    ensure!(begin.elapsed() < Duration::from_secs(2), "wait took {:?}", begin.elapsed());
    exec.io.out().until("done").await?;
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn a_file_gets_both_streams(cx: Context) -> Result<()> {
    let log = cx.folder().join("a.log");
    let container = cx.container(&["sh", "-c", "echo out; sleep 0.1; echo err >&2; exit 3"]);
    ensure!(container.stdio(Stdio::uri(format!("file://{}", log.display()))).run().await? == 3);
    eventually("both lines", SOON, async || {
        let text = fs::read_to_string(&log)?;
        ensure!(text == "out\nerr\n", "{text:?}");
        Ok(())
    })
    .await
}

pub(crate) async fn a_container_does_not_get_its_log_file_itself(cx: Context) -> Result<()> {
    if !cx.shim().is_ours() {
        return skip("this tests our shim's pipe");
    }
    let log = cx.folder().join("a.log");
    fs::write(&log, "before\n")?;
    let script = "chmod 777 /proc/self/fd/1; echo x > /dev/stdout; echo y; exit 0";
    let container = cx.container(&["sh", "-c", script]).stdio(Stdio::uri(format!("file://{}", log.display())));
    container.run().await?;
    let text = fs::read_to_string(&log)?;
    ensure!(text.starts_with("before\n") && text.ends_with("y\n"), "{text:?}");
    Ok(())
}

pub(crate) async fn a_logger_gets_everything_and_knows_the_container(cx: Context) -> Result<()> {
    let folder = cx.folder().join("logs");
    fs::create_dir_all(&folder)?;
    let uri = format!("binary://{}?folder={}", cx.program("log-sink").display(), folder.display());
    let script = "head -c 1048577 /dev/zero; echo oops >&2; exit 3";
    let container = cx.container(&["sh", "-c", script]).stdio(Stdio::uri(&uri)).create().await?;
    ensure!(container.run().await? == 3);
    eventually_true("the logger is done", SOON, || folder.join("done").exists()).await?;
    ensure!(fs::metadata(folder.join("stdout"))?.len() == 1_048_577);
    ensure!(fs::read_to_string(folder.join("stderr"))? == "oops\n");
    let environment = fs::read_to_string(folder.join("environment"))?;
    ensure!(environment.contains(&format!("CONTAINER_ID={}\n", container.id)), "{environment}");
    ensure!(environment.contains(&format!("CONTAINER_NAMESPACE={}\n", cx.client().namespace())), "{environment}");
    Ok(())
}

pub(crate) async fn a_logger_that_crashes_before_it_is_ready_blocks_nothing(cx: Context) -> Result<()> {
    let uri = format!("binary://{}?dies=ready", cx.program("log-sink").display());
    // an exit closes the ready pipe just as readiness does, so a shim cannot tell them apart
    if let Ok(container) = cx.container(&["sh", "-c", "exit 3"]).stdio(Stdio::uri(&uri)).create().await {
        ensure!(container.run().await? == 3);
    }
    cx.leaves_nothing().await
}

pub(crate) async fn a_logger_that_crashes_later_does_not_stop_the_container(cx: Context) -> Result<()> {
    let uri = format!("binary://{}?dies=later&folder={}", cx.program("log-sink").display(), cx.folder().display());
    // more than the pipe holds: without its logger, the container must not block
    let container = cx.container(&["sh", "-c", "head -c 1048577 /dev/zero; exit 3"]).stdio(Stdio::uri(&uri));
    ensure!(container.run().await? == 3);
    Ok(())
}

pub(crate) async fn a_logger_of_the_second_kind_is_ready_with_a_byte_and_not_without(cx: Context) -> Result<()> {
    if !cx.shim().is_ours() {
        return skip("stock shims know no loggers of that kind yet");
    }
    let folder = cx.folder().join("logs");
    fs::create_dir_all(&folder)?;
    let uri = format!("binary-v2://{}?folder={}", cx.program("log-sink").display(), folder.display());
    let container = cx.container(&["sh", "-c", "echo out; exit 3"]).stdio(Stdio::uri(format!("{uri}&ready=byte")));
    ensure!(container.run().await? == 3);
    eventually_true("the logger is done", SOON, || folder.join("done").exists()).await?;
    ensure!(fs::read_to_string(folder.join("stdout"))? == "out\n");
    let Err(error) = cx.container(&["true"]).stdio(Stdio::uri(&uri)).create().await else { anyhow::bail!("it was taken for ready") };
    ensure!(format!("{error:#}").contains("log-sink"), "{error:#}");
    cx.leaves_nothing().await
}

/// With a list of allowed loggers, as on hosts with untrusted images.
async fn with_listed_loggers(cx: &Context) -> Result<Context> {
    if !cx.shim().is_ours() {
        return skip("the stock shim runs any logger");
    }
    let listed = cx.folder().join("listed");
    programs::copy(&cx.program("log-sink"), &listed)?;
    cx.with_own_shim(cx.shim(), &[("X_SHIM_LOGGERS", &listed.display().to_string())]).await
}

/// The URI of a logger that writes into `folder`: `listed`, or one that is not.
fn logger_of(cx: &Context, outer: &Context, name: &str, folder: &Path) -> Result<String> {
    fs::create_dir_all(folder)?;
    let program = if name == "listed" { outer.folder().join(name) } else { cx.program("log-sink") };
    Ok(format!("binary://{}?folder={}", program.display(), folder.display()))
}

pub(crate) async fn a_logger_that_is_not_listed_never_runs(outer: Context) -> Result<()> {
    let cx = with_listed_loggers(&outer).await?;
    for (name, runs) in [("listed", true), ("other", false)] {
        let folder = cx.folder().join(name);
        let uri = Stdio::uri(logger_of(&cx, &outer, name, &folder)?);
        let created = cx.container(&["sh", "-c", "echo out; exit 3"]).stdio(uri.clone()).create().await;
        let running = cx.container(&["sleep", "1000"]).start().await?;
        let exec = running.exec("e", &["sh", "-c", "echo out; exit 4"]).stdio(uri);
        if runs {
            ensure!(created?.run().await? == 3);
            eventually_true("the logger is done", SOON, || folder.join("done").exists()).await?;
            ensure!(exec.run().await? == 4);
        } else {
            let message = format!("{:#}", created.err().context("it was accepted")?);
            ensure!(message.contains("is not allowed; allowed are"), "{message}");
            ensure!(exec.run().await.is_err(), "it was accepted for an exec");
            ensure!(fs::read_dir(&folder)?.count() == 0, "it has run");
        }
        running.destroy().await?;
    }
    cx.leaves_nothing().await
}

/// containerd restarts a container whose labels request it, with the logger that they name; labels come from images.
pub(crate) async fn a_logger_that_a_label_names_never_runs_unless_it_is_listed(outer: Context) -> Result<()> {
    if suite::manager().is_some() {
        return skip("it reads what containerd's restart monitor logs");
    }
    let cx = with_listed_loggers(&outer).await?;
    let mut labelled = Vec::new();
    for name in ["listed", "other"] {
        let folder = cx.folder().join(name);
        let uri = logger_of(&cx, &outer, name, &folder)?;
        let root = rootfs::shared()?.display().to_string();
        let spec = |spec: Spec| spec.with(|spec| spec["root"]["path"] = root.into());
        cx.container(&["sh", "-c", "echo out; sleep 1000"]).id(name).spec(spec).rootfs(Vec::new()).metadata().await?;
        cx.client().label(name, &[("containerd.io/restart.status", "running"), ("containerd.io/restart.loguri", &uri)]).await?;
        labelled.push(folder);
    }
    let [listed, other] = &labelled[..] else { anyhow::bail!("two were made") };
    eventually("the listed one runs", SOON, async || {
        ensure!(cx.client().state("listed", "").await?.status() == Phase::Running && listed.join("stdout").exists());
        Ok(())
    })
    .await?;
    let tried =
        || cx.daemon().log().lines().filter(|line| line.contains("apply change") && line.contains("is not allowed; allowed are")).count();
    eventually_true("the other one was tried more than once", SOON, || tried() > 1).await?;
    ensure!(fs::read_dir(other)?.count() == 0, "it has run");
    // it would be restarted for ever
    for name in ["listed", "other"] {
        cx.client().label(name, &[]).await?;
    }
    cx.client().kill("listed", "", 9, false).await?;
    cx.client().wait("listed", "").await?;
    cx.client().delete("listed").await?;
    for name in ["listed", "other"] {
        cx.client().delete_container(name).await?;
    }
    cx.leaves_nothing().await
}

pub(crate) async fn output_spills_without_a_reader_if_configured(cx: Context) -> Result<()> {
    if !cx.shim().is_ours() {
        return skip("the option is this shim's own");
    }
    let options = GenericOptions { config_body: b"SpillBytes = 4000000".to_vec(), ..GenericOptions::default() };
    // far more than pipe and fifo hold, and less than they and the file do
    let script = "i=0; while [ $i -lt 300000 ]; do echo $i; i=$((i+1)); done; exit 3";
    let container = cx.container(&["sh", "-c", script]).options(Some(any(&options))).stdio(UNREAD);
    let mut container = container.start().await?;
    ensure!(container.wait().await? == 3);
    container.io_mut().read(Pace::Keep)?;
    container.io.out().until("\n299999\n").await?;
    container.delete().await?;
    let text = container.io.out().to_end().await?;
    ensure!(text.lines().enumerate().all(|(number, line)| line == number.to_string()) && text.lines().count() == 300_000);
    Ok(())
}

pub(crate) async fn an_unknown_scheme_is_refused(cx: Context) -> Result<()> {
    code_of(cx.container(&["true"]).stdio(Stdio::uri("carrier-pigeon:///tmp/x")).create().await)?;
    Ok(())
}

pub(crate) async fn a_slow_reader_is_waited_for_and_nothing_is_buffered(cx: Context) -> Result<()> {
    let container = cx.container(&["sh", "-c", "head -c 100000000 /dev/zero; exit 3"]).stdio(UNREAD);
    let mut container = container.start().await?;
    let shim = cx.shim_pid(&container.id)?;
    let begin = peak_kib(shim)?;
    // when the writer has stopped, the pipe, the fifo and the shim's buffer are full
    eventually("the writer is stopped by back-pressure", SOON, async || {
        let wchan = fs::read_to_string(format!("/proc/{}/wchan", first_child(&container)?))?;
        ensure!(wchan.contains("pipe_write"), "{wchan:?}");
        Ok(())
    })
    .await?;
    let peak = peak_kib(shim)?;
    ensure!(peak < begin + 20_000, "the shim grew from {begin} to {peak} KiB");
    container.io_mut().read(Pace::Count)?;
    ensure!(container.wait().await? == 3);
    container.delete().await?;
    container.io.out().to_end().await?;
    ensure!(container.io.out().count() == 100_000_000, "{}", container.io.out().count());
    Ok(())
}

fn first_child(container: &shim_tests::container::Container) -> Result<i32> {
    let children = shim_tests::proc::children(container.pid.cast_signed());
    children.first().map(|child| child.pid).ok_or_else(|| anyhow::anyhow!("no child yet"))
}

fn peak_kib(pid: i32) -> Result<u64> {
    let text = shim_tests::proc::status_field(pid, "VmHWM")?;
    Ok(text.trim_end_matches(" kB").parse()?)
}
