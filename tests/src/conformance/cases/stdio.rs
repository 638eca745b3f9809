//! Every kind of stdio: all bytes arrive, also when a peer is slow, late or gone.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api;
use tokio::task::JoinSet;

use super::{Streams, sleeper, text, unread};
use crate::bundle::{Container, leave};
use crate::clauses;
use crate::conformance::Case;
use crate::eventually::{SOON, a_second, eventually, eventually_true, within};
use crate::proc;
use crate::programs;
use crate::stand::Stand;
use crate::stdio::{Pace, Reader, Writer};
use crate::times::{repeated, times};
use crate::ttrpc::refusal;
use crate::workloads;

pub(super) fn cases() -> Vec<Case> {
    clauses![stdio:
        "S1" => stdout_and_stderr_are_kept_apart_and_end, a_container_without_stdio_runs;
        "S2" => stdin_arrives_and_ends_with_close_io, a_megabyte_of_stdin_arrives;
        "S3" => every_byte_before_the_end_arrives;
        "S4" => a_shim_waits_for_a_slow_reader_in_bounded_memory;
        "S5" => a_late_reader_gets_everything, fifos_that_no_client_opens_block_nothing;
        "S6" => a_reader_that_disconnects_breaks_no_pipe;
        "S7" => close_io_is_harmless_at_any_time;
        "S8" => a_grandchild_that_holds_the_output_delays_no_wait, an_output_that_a_grandchild_holds_ends_with_delete_and_leaves_nothing;
        "S9" => a_file_gets_both_streams;
        "S10" => a_full_disk_does_not_stop_a_container_for_good;
        "S11" => a_logger_gets_everything_and_knows_the_container, a_logger_that_is_slow_gets_everything;
        "S12" => a_logger_that_crashes_early_blocks_nothing, a_logger_that_crashes_later_stops_no_container, a_logger_that_is_never_ready_can_be_ended;
        "S13" => an_unknown_scheme_is_refused;
        "S18" => output_written_by_a_descendant_while_delete_waits_arrives, a_reader_that_pauses_gets_everything_of_a_deleted_exec;
        "S19" => a_delete_that_waits_for_output_delays_no_other_call;
    ]
}

async fn stdout_and_stderr_are_kept_apart_and_end(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = streams.output(stand.bundle("c1", &["sh", "-c", "echo out; echo err >&2; exit 3"])).run().await?;
    ensure!(container.finish().await? == 3);
    let (out, err) = (streams.out.to_end().await?, streams.err.to_end().await?);
    ensure!(out == "out\n" && err == "err\n", "{out:?}, {err:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn a_container_without_stdio_runs(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sh", "-c", "echo out; echo err >&2; read line; exit 3"]).run().await?;
    ensure!(container.finish().await? == 3);
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn stdin_arrives_and_ends_with_close_io(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = streams.all(stand.bundle("c1", &["cat"])).run().await?;
    let mut stdin = streams.writer().await?;
    stdin.write_all(b"first\n")?;
    streams.out.until("first").await?;
    stdin.write_all(b"second\n")?;
    drop(stdin);
    container.task.close_stdin("c1", "").await?;
    ensure!(container.finish().await? == 0);
    ensure!(streams.out.to_end().await? == "first\nsecond\n");
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn a_megabyte_of_stdin_arrives(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = streams.all(stand.bundle("c1", &["wc", "-c"])).run().await?;
    let mut stdin = streams.writer().await?;
    stdin.write_all(&vec![b'x'; (1 << 20) + 1])?;
    drop(stdin);
    container.task.close_stdin("c1", "").await?;
    ensure!(container.finish().await? == 0);
    let received = streams.out.to_end().await?;
    ensure!(received.trim() == "1048577", "{received:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// The last bytes are not cut, for any number of bytes and a slow reader.
async fn every_byte_before_the_end_arrives(stand: Stand) -> Result<()> {
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    let sizes = [1, 1 << 12]
        .into_iter()
        .chain([16].into_iter().chain(20..=20 + times().ilog2()).flat_map(|bits| [(1 << bits) - 1, 1 << bits, (1 << bits) + 1]));
    for size in sizes {
        tokio::try_join!(
            writes_and_ends(&anchor, size, false, false),
            writes_and_ends(&anchor, size, false, true),
            writes_and_ends(&anchor, size, true, false),
            writes_and_ends(&anchor, size, true, true),
        )?;
    }
    anchor.shut_down().await.map(drop)
}

async fn writes_and_ends(anchor: &Container, size: u64, terminal: bool, with_stdin: bool) -> Result<()> {
    let stand = anchor.stand();
    let id = format!("c{size}-{terminal}-{with_stdin}");
    let streams = Streams::at_pace(stand, &id, Pace::Slow { chunk: 20_000.max(size as usize / 100), pause: Duration::from_millis(1) })?;
    let script = format!("head -c {size} /dev/zero; exit 3");
    let bundle = stand.bundle(&id, &["sh", "-c", &script]).group("pod");
    let bundle = if with_stdin { streams.all(bundle) } else { streams.output(bundle) };
    let bundle = if terminal { bundle.terminal() } else { bundle };
    let container = bundle.run_in(&anchor.task).await?;
    ensure!(container.finish().await? == 3);
    streams.out.to_end_within(SOON * 3).await?;
    ensure!(streams.out.count() == size, "{id}: {} of {size} bytes", streams.out.count());
    Ok(())
}

/// A hundred megabytes, without a reader until the writer blocks.
async fn a_shim_waits_for_a_slow_reader_in_bounded_memory(stand: Stand) -> Result<()> {
    let total = 100_000_000 * u64::from(times());
    let [_, stdout, stderr] = unread(&stand, "io")?;
    // open, but not read, so that shims that wait for a reader continue
    let held = fs::File::options().read(true).write(true).open(&stdout)?;
    let err = Reader::open(&stderr, Pace::Count)?;
    let bundle = stand.bundle("c1", &["sh", "-c", &format!("head -c {total} /dev/zero; exit 3")]);
    let container = bundle.stdio("", &text(&stdout), &text(&stderr)).run().await?;
    let peak = |pid: i32| anyhow::Ok(proc::status_field(pid, "VmHWM")?.trim_end_matches(" kB").parse::<u64>()?);
    let shim = container.shim_pid()?;
    let before = peak(shim)?;
    eventually("the writer is stopped by back-pressure", SOON, async || {
        let children = proc::children(container.pid.cast_signed());
        let writer = children.first().map(|child| child.pid).context("no child yet")?;
        let place = fs::read_to_string(format!("/proc/{writer}/wchan"))?;
        ensure!(place.contains("pipe_write"), "{place}");
        Ok(())
    })
    .await?;
    let reader = Reader::open(&stdout, Pace::Count)?;
    drop(held);
    ensure!(container.task.wait_within("c1", "", SOON * 3 * times()).await? == 3);
    ensure!(container.finish().await? == 3);
    reader.to_end_within(SOON * 3).await?;
    ensure!(reader.count() == total, "the writer has written {total} bytes, and {} have come", reader.count());
    let after = peak(shim).unwrap_or(before);
    ensure!(after < before + 20_000, "the shim grew from {before} to {after} KiB");
    drop(err);
    leave(&container.task, shim, "c1").await
}

async fn a_late_reader_gets_everything(stand: Stand) -> Result<()> {
    let [_, stdout, stderr] = unread(&stand, "io")?;
    let bundle = stand.bundle("c1", &["sh", "-c", "echo early; echo late >&2"]).stdio("", &text(&stdout), &text(&stderr));
    let container = within("run without a reader", SOON, bundle.run()).await??;
    ensure!(container.task.wait("c1", "").await? == 0);
    let (out, err) = (Reader::open(&stdout, Pace::Keep)?, Reader::open(&stderr, Pace::Keep)?);
    out.until("early").await?;
    err.until("late").await?;
    ensure!(container.finish().await? == 0);
    out.to_end().await?;
    err.to_end().await?;
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn fifos_that_no_client_opens_block_nothing(stand: Stand) -> Result<()> {
    let [stdin, stdout, stderr] = unread(&stand, "io")?;
    let bundle = stand.bundle("c1", &["sleep", "1000"]).stdio(&text(&stdin), &text(&stdout), &text(&stderr));
    let container = within("run without a peer", SOON, bundle.run()).await??;
    let [stdin, stdout, stderr] = unread(&stand, "exec")?;
    let exec = container.bundle.exec_request("e", &["true"]);
    let exec = api::ExecProcessRequest { stdin: text(&stdin), stdout: text(&stdout), stderr: text(&stderr), ..exec };
    container.task.exec(&exec).await?;
    within("start of an exec without a peer", SOON, container.task.start("c1", "e")).await??;
    ensure!(container.task.wait("c1", "e").await? == 0);
    container.task.delete("c1", "e").await?;
    container.shut_down().await.map(drop)
}

async fn a_reader_that_disconnects_breaks_no_pipe(stand: Stand) -> Result<()> {
    let mut streams = Streams::new(&stand, "io")?;
    let script = "trap 'exit 9' PIPE; echo one; read go; echo two || exit 8; read go; echo three || exit 7; exit 3";
    let container = streams.all(stand.bundle("c1", &["sh", "-c", script])).run().await?;
    streams.out.until("one").await?;
    let mut stdin = streams.writer().await?;
    streams.out.leave();
    stdin.write_all(b"go\n")?;
    stdin.write_all(b"go\n")?;
    ensure!(container.task.wait("c1", "").await? == 3, "a write failed");
    let again = Reader::open(&streams.stdout, Pace::Keep)?;
    again.until("three").await.context("what was written without a reader")?;
    ensure!(container.finish().await? == 3);
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn close_io_is_harmless_at_any_time(stand: Stand) -> Result<()> {
    let streams = Streams::new(&stand, "io")?;
    let container = streams.all(stand.bundle("c1", &["cat"])).create().await?;
    let stdin = Writer::open_early(&streams.stdin)?;
    let close = async |exec: &str| within("CloseIO", SOON, container.task.close_stdin("c1", exec)).await?.map_err(anyhow::Error::from);
    close("").await.context("before the start")?;
    close("").await.context("a second time")?;
    container.start().await?;
    drop(stdin);
    ensure!(container.task.wait("c1", "").await? == 0, "cat did not get the end of its stdin");
    close("").await.context("after the end")?;
    ensure!(container.finish().await? == 0);
    leave(&container.task, container.shim_pid()?, "c1").await?;
    // of an exec whose start has failed
    let container = sleeper(&stand, "c2").await?;
    let streams = Streams::new(&stand, "exec")?;
    container.task.exec(&streams.exec(container.bundle.exec_request("e", &["/no/such/program"]))).await?;
    drop(refusal(container.task.start("c2", "e").await)?);
    within("CloseIO after a start that failed", SOON, container.task.close_stdin("c2", "e")).await??;
    container.task.delete("c2", "e").await?;
    container.shut_down().await.map(drop)
}

async fn a_grandchild_that_holds_the_output_delays_no_wait(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let streams = Streams::new(&stand, "io")?;
    container.task.exec(&streams.exec(container.bundle.exec_request("e", &["sh", "-c", "sleep 1000 & echo hello; exit 2"]))).await?;
    container.task.start("c1", "e").await?;
    let begin = Instant::now();
    ensure!(container.task.wait("c1", "e").await? == 2);
    ensure!(begin.elapsed() < a_second() * 2, "Wait took {:?}", begin.elapsed());
    streams.out.until("hello").await?;
    container.task.delete("c1", "e").await?;
    container.shut_down().await.map(drop)
}

async fn an_output_that_a_grandchild_holds_ends_with_delete_and_leaves_nothing(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let shim = container.shim_pid()?;
    let mut files = None;
    for round in 0..repeated(2) {
        let (mut all, mut deletes) = (Vec::new(), JoinSet::new());
        for number in 0..15 {
            let exec = format!("e{round}-{number}");
            all.push(ended(&container, &exec, "sleep 1000 & echo hello", Pace::Keep).await?);
            let task = container.task.another().await?;
            deletes.spawn(async move { task.delete_within("c1", &exec, Duration::from_secs(30)).await });
        }
        while let Some(deleted) = deletes.join_next().await {
            deleted??;
        }
        for streams in all {
            let received = streams.out.to_end().await.context("the end of output that a grandchild holds, after Delete")?;
            ensure!(received == "hello\n", "{received:?}");
        }
        // The connections of this round close a moment later.
        let first = *files.get_or_insert(proc::fewest_open_files(shim).await?);
        eventually("its descriptors are closed", SOON, async || {
            let files = proc::fewest_open_files(shim).await?;
            ensure!(files <= first + 2, "{files}, {first} after the first round");
            Ok(())
        })
        .await?;
    }
    container.shut_down().await.map(drop)
}

/// Runs an exec to its end and leaves it undeleted.
async fn ended(container: &Container, exec: &str, script: &str, pace: Pace) -> Result<Streams> {
    let streams = Streams::at_pace(container.stand(), exec, pace)?;
    container.task.exec(&streams.exec(container.bundle.exec_request(exec, &["sh", "-c", script]))).await?;
    container.task.start(&container.id, exec).await?;
    ensure!(container.task.wait(&container.id, exec).await? == 0);
    Ok(streams)
}

/// A client reads until the end, at the latest until Delete is answered.
async fn output_written_by_a_descendant_while_delete_waits_arrives(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    for (exec, late) in [("child", "(sleep 1; echo late) &"), ("session", "setsid sh -c '(sleep 1; echo late) &';")] {
        let streams = ended(&container, exec, &format!("{late} echo now"), Pace::Keep).await?;
        container.task.delete_within("c1", exec, Duration::from_secs(30)).await?;
        let received = streams.out.to_end().await?;
        ensure!(received == "now\nlate\n", "{exec}: {received:?}");
    }
    container.shut_down().await.map(drop)
}

async fn a_reader_that_pauses_gets_everything_of_a_deleted_exec(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let streams = ended(&container, "e", "seq 20000", Pace::Pausing(Duration::from_secs(1))).await?;
    container.task.delete_within("c1", "e", Duration::from_secs(30)).await?;
    streams.out.to_end().await?;
    ensure!(streams.out.count() == 108_894, "{} of 108894 bytes", streams.out.count());
    container.shut_down().await.map(drop)
}

async fn a_delete_that_waits_for_output_delays_no_other_call(stand: Stand) -> Result<()> {
    let container = sleeper(&stand, "c1").await?;
    let _streams = ended(&container, "held", "sleep 1000 & echo hello", Pace::Keep).await?;
    let task = container.task.another().await?;
    let deleting = tokio::spawn(async move { task.delete_within("c1", "held", Duration::from_secs(30)).await });
    container.exec("other", &["true"]).await?;
    ensure!(container.task.wait("c1", "other").await? == 0);
    for exec in ["", "held", "other"] {
        within("State", a_second() * 2, container.task.state("c1", exec)).await??;
    }
    within("Delete of another", a_second() * 2, container.task.delete("c1", "other")).await??;
    ensure!(!deleting.is_finished(), "Delete has not waited for the last writer");
    deleting.await??;
    container.shut_down().await.map(drop)
}

async fn a_file_gets_both_streams(stand: Stand) -> Result<()> {
    let log = stand.folder().join("a.log");
    let uri = format!("file://{}", log.display());
    let container = stand.bundle("c1", &["sh", "-c", "echo out; sleep 0.1; echo err >&2; exit 3"]).stdio("", &uri, &uri).run().await?;
    ensure!(container.finish().await? == 3);
    eventually("both lines", SOON, async || {
        let written = fs::read_to_string(&log)?;
        ensure!(written == "out\nerr\n", "{written:?}");
        Ok(())
    })
    .await?;
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn a_full_disk_does_not_stop_a_container_for_good(stand: Stand) -> Result<()> {
    workloads::full_disk(&stand).await
}

async fn a_logger_gets_everything_and_knows_the_container(stand: Stand) -> Result<()> {
    let folder = stand.folder().join("logs");
    fs::create_dir_all(&folder)?;
    let uri = format!("binary://{}?folder={}", stand.program("log-sink").display(), folder.display());
    let script = "head -c 1048577 /dev/zero; echo oops >&2; exit 3";
    let container = stand.bundle("c1", &["sh", "-c", script]).stdio("", &uri, &uri).run().await?;
    ensure!(container.finish().await? == 3);
    eventually_true("the logger is done", SOON, || folder.join("done").exists()).await?;
    let length = fs::metadata(folder.join("stdout"))?.len();
    ensure!(length == 1_048_577, "{length} bytes");
    ensure!(fs::read_to_string(folder.join("stderr"))? == "oops\n");
    let environment = fs::read_to_string(folder.join("environment"))?;
    ensure!(environment.contains("CONTAINER_ID=c1\n"), "{environment}");
    ensure!(environment.contains(&format!("CONTAINER_NAMESPACE={}\n", stand.namespace())), "{environment}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// A program for `binary://` that is a script.
fn logger(stand: &Stand, name: &str, script: &str) -> Result<String> {
    let path = programs::script(stand.folder(), name, &format!("#!/bin/sh\n{script}\n"))?;
    Ok(format!("binary://{}", text(&path)))
}

async fn a_logger_that_is_slow_gets_everything(stand: Stand) -> Result<()> {
    let out = stand.folder().join("out");
    let script = format!("trap '' TERM; sleep 0.5; exec 5>&-; sleep 0.5; cat <&3 > {0}.part; mv {0}.part {0}", text(&out));
    let uri = logger(&stand, "slow", &script)?;
    let container = stand.bundle("c1", &["sh", "-c", "seq 1 50000; exit 3"]).stdio("", &uri, &uri).run().await?;
    ensure!(container.finish().await? == 3);
    eventually("the logger has everything", SOON, async || {
        let seen = fs::read_to_string(&out)?;
        ensure!(seen.lines().count() == 50_000 && seen.ends_with("50000\n"), "{} bytes", seen.len());
        Ok(())
    })
    .await?;
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn a_logger_that_crashes_early_blocks_nothing(stand: Stand) -> Result<()> {
    let uri = format!("binary://{}?dies=ready", stand.program("log-sink").display());
    let bundle = stand.bundle("c1", &["sh", "-c", "exit 3"]).stdio("", &uri, &uri);
    let task = bundle.shim().await?;
    let shim = bundle.shim_pid()?;
    // an exit closes the ready pipe just as readiness does, so a shim cannot tell them apart
    match within("Create", SOON * 2, task.create(&bundle.request())).await? {
        Ok(_) => {
            task.start("c1", "").await?;
            ensure!(task.wait("c1", "").await? == 3);
            ensure!(task.delete("c1", "").await?.exit_status == 3);
        }
        Err(error) => ensure!(error.code().is_some(), "{error}"),
    }
    leave(&task, shim, "c1").await
}

async fn a_logger_that_crashes_later_stops_no_container(stand: Stand) -> Result<()> {
    let uri = format!("binary://{}?dies=later&folder={}", stand.program("log-sink").display(), stand.folder().display());
    // more than the pipe holds: without its logger, the container must not block
    let container = stand.bundle("c1", &["sh", "-c", "head -c 1048577 /dev/zero; exit 3"]).stdio("", &uri, &uri).run().await?;
    let status = container.task.wait_within("c1", "", SOON).await?;
    // a process that gets SIGPIPE exits by it
    ensure!([3, 141].contains(&status), "{status}");
    ensure!(container.finish().await? == status);
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// Create waits for a logger that will never be ready: containerd gives up, and runs `delete`.
async fn a_logger_that_is_never_ready_can_be_ended(stand: Stand) -> Result<()> {
    let mark = stand.folder().join("mark");
    let uri = logger(&stand, "never", &format!("echo > {}; exec sleep 1000", text(&mark)))?;
    let bundle = stand.bundle("c1", &["true"]).stdio("", &uri, &uri);
    let task = bundle.shim().await?;
    let shim = bundle.shim_pid()?;
    let (other, request) = (task.another().await?, bundle.request());
    let create = tokio::spawn(async move { other.create(&request).await });
    eventually("the logger runs", SOON, async || Ok(fs::metadata(Path::new(&mark))?)).await?;
    ensure!(bundle.delete_command().await?.exit_status == 137);
    let answer = within("the answer to Create", SOON * 2, create).await??;
    ensure!(answer.is_err(), "{answer:?}");
    let _it_may_have_left = task.shutdown("c1").await;
    eventually_true("the shim has exited", SOON, || !proc::is_alive(shim)).await
}

async fn an_unknown_scheme_is_refused(stand: Stand) -> Result<()> {
    let bundle = stand.bundle("c1", &["true"]).stdio("", "carrier-pigeon:///x", "carrier-pigeon:///x");
    let task = bundle.shim().await?;
    let (_, message) = refusal(task.create(&bundle.request()).await)?;
    ensure!(message.contains("carrier-pigeon"), "{message}");
    leave(&task, bundle.shim_pid()?, "c1").await
}
