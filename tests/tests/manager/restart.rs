//! Starts of the daemon: on existing shims and stores, and when it refuses to start.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::{Process, Status as Phase};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shim_tests::bundle::read_address;
use shim_tests::container::{Stdio, code_of};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::{proc, programs, stdio, suite};
use tonic::Code;

/// The same with the shim that comes with this suite, which drops an event after some attempts.
pub(crate) async fn an_exit_while_the_daemon_was_down_is_published_once(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    for runtime in [cx.shim().runtime_type.clone(), "io.containerd.runc.v2".to_owned()] {
        let container = cx.container(&["sh", "-c", "read go; exit 3"]).runtime_type(&runtime).stdio(Stdio::ALL).start().await?;
        let exec = container.exec("e", &["sh", "-c", "read go; exit 5"]).stdio(Stdio::ALL).start().await?;
        let (mut stdin, mut exec_stdin) = (container.io.stdin().await?, exec.io.stdin().await?);
        let events = cx.events().await?;
        // the shim is the parent of its containers' processes
        let shim = proc::stat(container.pid.cast_signed())?.field(4).parse()?;
        cx.daemon().kill()?;
        exec_stdin.write_all(b"go\n")?;
        // the exec exits before the container ends it
        tokio::time::timeout(SOON, exec.io.out().to_end()).await??;
        stdin.write_all(b"go\n")?;
        let pid = container.pid.cast_signed();
        eventually_true("it has exited", SOON, || !proc::is_alive(pid)).await?;
        // an exit that a shim publishes before the test subscribes again is lost
        proc::signal(shim, Signal::SIGSTOP)?;
        cx.revive_daemon().await?;
        events.resubscribe(cx.client()).await?;
        proc::signal(shim, Signal::SIGCONT)?;
        // the shim publishes it, or the daemon in its place
        let is_published = |exec: &'static str| !events.exits(&container.id, exec).is_empty();
        eventually_true("the exits are published", Duration::from_secs(30), || is_published("") && is_published("e"))
            .await
            .with_context(|| runtime.clone())?;
        ensure!(exec.wait().await? == 5 && container.wait().await? == 3);
        tokio::time::sleep(Duration::from_secs(7)).await; // longer than the daemon gives a shim to publish it by itself
        events.catch_up(cx.client()).await?;
        for (name, status) in [("", 3), ("e", 5)] {
            let exits = events.exits(&container.id, name);
            ensure!(exits.len() == 1 && exits[0].status == status, "{runtime}: {exits:?}");
        }
        exec.delete().await?;
        ensure!(container.delete().await?.exit_status == 3);
    }
    cx.leaves_nothing().await
}

pub(crate) async fn a_start_with_too_few_descriptors_ends_no_container(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let mut containers = Vec::new();
    for _container in 0..8 {
        containers.push(cx.container(&["sleep", "1000"]).start().await?);
    }
    cx.daemon().kill()?;
    let folder = cx.daemon().folder();
    let log = cx.folder().join("poor.log");
    let mut poor = Command::new("sh");
    poor.args(["-c", "ulimit -n 24; exec \"$0\" \"$@\""]).arg(suite::manager().context("x-manager is under test")?);
    poor.arg("--root").arg(folder.join("root")).arg("--state").arg(folder.join("state")).arg("--address").arg(folder.join("c.sock"));
    let mut poor = poor.stderr(fs::File::create(&log)?).spawn()?;
    shim_tests::isolation::keep(poor.id());
    let message = eventually("the daemon cannot reach all shims", SOON, async || {
        let text = fs::read_to_string(&log)?;
        ensure!(text.contains("Too many open files"), "{text}");
        Ok(())
    })
    .await;
    poor.kill()?;
    poor.wait()?;
    message?;
    cx.revive_daemon().await?;
    for container in &containers {
        let state = container.phase(Phase::Running).await?;
        ensure!(state.pid == container.pid, "{state:?}");
    }
    for container in containers {
        ensure!(container.destroy().await? == 137);
    }
    cx.leaves_nothing().await
}

pub(crate) async fn a_task_whose_shim_is_unreachable_reports_the_reason(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let sibling = cx.container(&["sleep", "1000"]).start().await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let file = container.bundle().join("bootstrap.json");
    cx.daemon().kill()?;
    let address = fs::read_to_string(&file)?;
    let mut strange: serde_json::Value = serde_json::from_str(&address)?;
    strange["version"] = 9.into();
    fs::write(&file, strange.to_string())?;
    cx.revive_daemon().await?;
    let listed = tokio::time::timeout(Duration::from_secs(5), cx.client().list()).await.context("it delays the others")??;
    let phase = |id: &str| listed.iter().find(|task| task.id == id).map(Process::status);
    ensure!(phase(&sibling.id) == Some(Phase::Running) && phase(&container.id) == Some(Phase::Unknown), "{listed:?}");
    let status = container.delete().await.expect_err("that version is unknown");
    ensure!(status.code() == Code::Unavailable && status.message().contains("uses version 9"), "{status:?}");
    ensure!(proc::is_alive(container.pid.cast_signed()));
    fs::write(&file, address)?;
    eventually("it is reached", Duration::from_secs(30), async || {
        let state = container.state().await?;
        ensure!(state.status() == Phase::Running && state.pid == container.pid, "{state:?}");
        Ok(())
    })
    .await?;
    ensure!(container.destroy().await? == 137 && sibling.destroy().await? == 137);
    cx.leaves_nothing().await
}

pub(crate) async fn a_task_whose_shim_is_given_up_by_an_operator_reports_its_exit(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let events = cx.events().await?;
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let bundle = container.bundle();
    cx.daemon().kill()?;
    fs::write(bundle.join("bootstrap.json"), "{\"version\":9,\"address\":\"unix:///s\",\"protocol\":\"ttrpc\"}")?;
    cx.revive_daemon().await?;
    events.resubscribe(cx.client()).await?;
    ensure!(container.delete().await.is_err());
    // as docs/manager.md has it
    fs::write(bundle.join("bootstrap.json"), "{\"version\":2,\"address\":\"/gone\",\"protocol\":\"ttrpc\"}")?;
    eventually("it is cleaned up", Duration::from_secs(60), async || {
        let state = container.state().await?;
        ensure!(state.status() == Phase::Stopped && state.exit_status == 137, "{state:?}");
        Ok(())
    })
    .await?;
    ensure!(!proc::is_alive(container.pid.cast_signed()));
    ensure!(events.exits(&container.id, "").len() == 1, "{:?}", events.exits(&container.id, ""));
    ensure!(container.delete().await?.exit_status == 137);
    cx.leaves_nothing().await
}

/// The `delete` of containerd's shims up to 1.7 fails where their `start` alone was run: it misses a file that Create writes.
pub(crate) async fn a_creation_that_was_cut_off_before_its_shim_made_anything_leaves_nothing(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (program, namespace) = (cx.suite().program("containerd-shim-runc-v2"), cx.client().namespace());
    cx.daemon().kill()?;
    let half_made = |id: &str| -> Result<_> {
        let bundle = cx.daemon().bundle(namespace, id);
        fs::create_dir_all(bundle.join("rootfs"))?;
        fs::write(bundle.join("config.json"), "{}")?;
        fs::write(bundle.join("shim-binary-path"), program.as_os_str().as_encoded_bytes())?;
        Ok(bundle)
    };
    let (unstarted, idle, killed) = (half_made("unstarted")?, half_made("idle")?, half_made("killed")?);
    // its shim was killed while `start`, which writes this, had not answered
    fs::write(killed.join("address"), format!("unix://{}", cx.folder().join("no.sock").display()))?;
    stdio::fifo(&idle.join("log"))?;
    // the shim waits for a reader
    let _reader = fs::File::options().read(true).write(true).open(idle.join("log"))?;
    let mut start = Command::new(&program);
    start.args(["-namespace", namespace, "-address"]).arg(cx.daemon().address()).args(["-publish-binary", "/bin/true", "-id", "idle"]);
    let started = start.arg("start").current_dir(&idle).output()?;
    read_address(&started.stdout).with_context(|| format!("{started:?}"))?;
    // newer ones answer in JSON, which has the version
    fs::write(idle.join(if started.stdout.starts_with(b"{") { "bootstrap.json" } else { "address" }), started.stdout.trim_ascii())?;
    cx.revive_daemon().await?;
    eventually_true("their ids are free", SOON, || !unstarted.exists() && !idle.exists() && !killed.exists()).await?;
    for id in ["unstarted", "idle", "killed"] {
        ensure!(cx.container(&["sh", "-c", "exit 3"]).id(id).runtime_type("io.containerd.runc.v2").run().await? == 3);
    }
    cx.leaves_nothing().await
}

pub(crate) async fn a_crashed_shims_container_is_not_reported_exited_until_delete_succeeds(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let events = cx.events().await?;
    let (attempts, may) = (cx.folder().join("attempts"), cx.folder().join("may"));
    let shim = cx.shim().binary.clone().context("X_SHIM must name our own shim")?;
    let text = format!(
        "#!/bin/sh\ncase \"$*\" in *delete*) if [ ! -e {may} ]; then echo >> {attempts}; echo no such luck >&2; exit 1; fi ;; esac\nexec {shim} \"$@\"\n",
        may = may.display(),
        attempts = attempts.display(),
        shim = shim.display()
    );
    let program = programs::script(cx.folder(), &cx.shim().binary_name(), &text)?;
    let container = cx.container(&["sleep", "1000"]).runtime_type(&program.to_string_lossy()).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    proc::kill_hard(keeper);
    let tries = || fs::read_to_string(&attempts).map_or(0, |lines| lines.lines().count());
    eventually_true("it is tried again", SOON, || tries() >= 2).await?;
    let listed = cx.client().list().await?;
    ensure!(listed.iter().any(|task| task.id == container.id && task.status() == Phase::Unknown), "{listed:?}");
    ensure!(proc::is_alive(container.pid.cast_signed()) && container.bundle().exists());
    ensure!(events.exits(&container.id, "").is_empty(), "{:?}", events.exits(&container.id, ""));
    let (refused, taken) = tokio::join!(container.delete(), cx.container(&["true"]).id(&container.id).create_task());
    let refused = refused.expect_err("it is not known how it ended");
    ensure!(refused.code() == Code::Unavailable && refused.message().contains("no such luck"), "{refused:?}");
    ensure!(code_of(taken)? == Code::Unavailable);
    fs::write(&may, "")?;
    eventually("it is cleaned up", Duration::from_secs(60), async || {
        let listed = cx.client().list().await?;
        ensure!(listed.iter().any(|task| task.id == container.id && task.status() == Phase::Stopped), "{listed:?}");
        Ok(())
    })
    .await?;
    ensure!(!proc::is_alive(container.pid.cast_signed()));
    ensure!(container.delete().await?.exit_status == 137);
    ensure!(events.exits(&container.id, "").len() == 1, "{:?}", events.exits(&container.id, ""));
    cx.leaves_nothing().await
}

pub(crate) async fn start_and_delete_of_a_dead_shims_container_do_not_overlap(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    for round in 0..8_u64 {
        let id = format!("again{round}");
        let old = cx.container(&["sleep", "1000"]).id(&id).start().await?;
        proc::kill_hard(cx.shim_pid(&old.id)?);
        old.phase(Phase::Stopped).await?;
        let deletions = async {
            tokio::time::sleep(Duration::from_micros(round * 150)).await; // somewhere in the creation
            tokio::join!(old.delete(), old.delete())
        };
        let (made, deleted) = tokio::join!(cx.container(&["sleep", "1000"]).id(&id).create_task(), deletions);
        let first_is_right = deleted.0.as_ref().is_ok_and(|answer| answer.exit_status == 137);
        ensure!(!first_is_right || deleted.1.is_err(), "both have deleted it: {deleted:?}");
        match made {
            Ok(made) => {
                // only a deletion of the new one may have removed it
                match made.state().await {
                    Ok(state) => ensure!(state.status() == Phase::Created, "{state:?}"),
                    Err(status) => ensure!(status.code() == Code::NotFound && (deleted.0.is_ok() || deleted.1.is_ok()), "{status:?}"),
                }
            }
            Err(error) => ensure!(code_of::<()>(Err(error))? == Code::AlreadyExists),
        }
        let _it_may_be_gone = cx.client().delete(&id).await;
    }
    cx.leaves_nothing().await
}

pub(crate) async fn an_unresponsive_shim_delays_no_other_call(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let silent = cx.container(&["sleep", "1000"]).start().await?;
    let other = cx.container(&["sleep", "1000"]).start().await?;
    let keeper = Pid::from_raw(cx.shim_pid(&silent.id)?);
    kill(keeper, Signal::SIGSTOP)?;
    cx.daemon().kill()?;
    let begin = Instant::now();
    cx.revive_daemon().await?;
    ensure!(other.state().await?.status() == Phase::Running);
    ensure!(begin.elapsed() < Duration::from_secs(2), "the other task was known after {:?}", begin.elapsed());
    let begin = Instant::now();
    let listed = cx.client().list().await?;
    let status_of = |id: &str| listed.iter().find(|task| task.id == id).map(containerd_client::types::v1::Process::status);
    ensure!(status_of(&other.id) == Some(Phase::Running) && status_of(&silent.id) == Some(Phase::Unknown), "{listed:?}");
    ensure!(begin.elapsed() < Duration::from_secs(5), "listing took {:?}", begin.elapsed());
    kill(keeper, Signal::SIGCONT)?;
    eventually("the silent shim's container keeps running", SOON, async || {
        let state = silent.state().await?;
        ensure!(state.status() == Phase::Running && state.pid == silent.pid, "{state:?}");
        Ok(())
    })
    .await?;
    for container in [silent, other] {
        ensure!(container.destroy().await? == 137);
    }
    cx.leaves_nothing().await
}

pub(crate) async fn the_exit_of_a_dead_shims_task_is_kept_until_it_is_deleted(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let events = cx.events().await?;
    let collected = cx.container(&["sh", "-c", "exit 3"]).start().await?;
    let replaced = cx.container(&["sh", "-c", "exit 4"]).start().await?;
    ensure!(collected.wait().await? == 3 && replaced.wait().await? == 4);
    let running = cx.container(&["sleep", "1000"]).start().await?;
    let waiting = {
        let (client, id) = (cx.client().clone(), running.id.clone());
        tokio::spawn(async move { client.wait(&id, "").await })
    };
    for container in [&collected, &replaced, &running] {
        proc::kill_hard(cx.shim_pid(&container.id)?);
    }
    ensure!(waiting.await??.exit_status == 137, "a pending wait is answered");
    for daemon_dies in [false, true] {
        if daemon_dies {
            cx.crash_daemon().await?;
        }
        for (container, status) in [(&collected, 3), (&replaced, 4), (&running, 137)] {
            let state = container.phase(Phase::Stopped).await?;
            ensure!(state.exit_status == status, "{state:?}");
            ensure!(container.wait().await? == status);
        }
    }
    ensure!(events.exits(&collected.id, "").len() == 1, "{:?}", events.exits(&collected.id, ""));
    ensure!(collected.delete().await?.exit_status == 3);
    ensure!(code_of(collected.delete().await)? == Code::NotFound);
    ensure!(running.delete().await?.exit_status == 137);
    let again = cx.container(&["sh", "-c", "exit 4"]).id(&replaced.id).create_task().await?;
    ensure!(again.pid != replaced.pid && again.run().await? == 4);
    cx.leaves_nothing().await
}

/// Starts another daemon and returns its output and exit status.
fn start(root: &Path, state: &Path, address: &Path) -> Result<Output> {
    let manager = suite::manager().context("x-manager is under test")?;
    let mut command = Command::new("timeout");
    command.arg("10").arg(manager).arg("--root").arg(root).arg("--state").arg(state).arg("--address").arg(address);
    Ok(command.output()?)
}

fn refused(output: &Output, why: &str) -> Result<()> {
    let message = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(1) && message.contains(why), "{output:?}");
    Ok(())
}

pub(crate) async fn sockets_are_for_root_and_one_daemon(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let daemon = cx.daemon();
    for path in [daemon.address(), daemon.folder().join("c.sock.ttrpc")] {
        let mode = fs::metadata(&path)?.permissions().mode() & 0o777;
        ensure!(mode == 0o660, "{}: {mode:o}", path.display());
    }
    let folder = cx.folder();
    refused(&start(&folder.join("root"), &folder.join("state"), &daemon.address())?, "is already in use by another process")?;
    refused(
        &start(&daemon.folder().join("root"), &folder.join("state"), &folder.join("other.sock"))?,
        "is already in use by another x-manager",
    )?;
    cx.client().version().await?;
    Ok(())
}

pub(crate) async fn a_store_of_a_newer_version_is_refused(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    cx.daemon().stop()?;
    let store = cx.daemon().folder().join("root/meta.db");
    let mut bytes = fs::read(&store)?;
    // the offset of the application's version (user_version) in SQLite's file format
    bytes[60..64].copy_from_slice(&99_u32.to_be_bytes());
    fs::write(&store, &bytes)?;
    let folder = cx.daemon().folder();
    refused(&start(&folder.join("root"), &folder.join("state"), &folder.join("c.sock"))?, "is of version 99, from a newer x-manager")?;
    ensure!(fs::read(&store)? == bytes, "the store was changed");
    Ok(())
}

pub(crate) async fn a_full_disk_refuses_and_loses_nothing(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    cx.daemon().stop()?;
    let root = cx.daemon().folder().join("root");
    fs::rename(&root, cx.folder().join("root"))?;
    fs::create_dir(&root)?;
    nix::mount::mount(Some("tmpfs"), &root, Some("tmpfs"), nix::mount::MsFlags::empty(), Some("size=8m"))?;
    cx.revive_daemon().await?;
    let result = full(&cx, &root).await;
    cx.daemon().stop()?;
    nix::mount::umount(&root)?;
    result
}

async fn full(cx: &Context, root: &Path) -> Result<()> {
    let running = cx.container(&["sh", "-c", "read go; exit 3"]).stdio(Stdio::ALL).start().await?;
    let mut stdin = running.io.stdin().await?;
    let exec = running.exec("e", &["sh", "-c", "exit 5"]).start().await?;
    ensure!(exec.wait().await? == 5);
    let ballast = root.join("ballast");
    fs::write(&ballast, vec![0; 4 << 20])?;
    let mut kept = Vec::new();
    let refusal = loop {
        let id = format!("kept{}", kept.len());
        match cx.container(&["sh", "-c", &format!("exit 1; {}", "x".repeat(20_000))]).id(&id).metadata().await {
            Ok(_) => kept.push(id),
            Err(error) => break error,
        }
        ensure!(kept.len() < 500, "the disk does not fill up");
    };
    ensure!(code_of::<()>(Err(refusal))? == Code::ResourceExhausted);
    // the remaining containers are deleted too
    while fs::write(&ballast, vec![0; fs::metadata(&ballast).map_or(0, |about| usize::try_from(about.len()).unwrap_or(0)) + 1024]).is_ok() {
    }
    // running tasks are published and deleted all the same
    ensure!(exec.delete().await?.exit_status == 5);
    stdin.write_all(b"go\n")?;
    ensure!(running.wait().await? == 3);
    fs::remove_file(&ballast)?;
    cx.crash_daemon().await?;
    for id in &kept {
        cx.client().delete_container(id).await.with_context(|| format!("{id} was acknowledged"))?;
    }
    ensure!(running.delete().await?.exit_status == 3);
    ensure!(cx.container(&["sh", "-c", "exit 6"]).run().await? == 6, "it keeps running");
    eventually("nothing is left behind", SOON, async || cx.leaves_nothing().await).await
}
