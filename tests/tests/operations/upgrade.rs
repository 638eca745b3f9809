//! One process takes over from another, or does not.

use std::path::{Path, PathBuf};
use std::process::Stdio as Io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::CreateTaskRequest;
use containerd_client::types::v1::Status as Phase;
use shim_tests::client::Client;
use shim_tests::container::{Container, Stdio, code_of};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::operator::{Own, ctr, ctr_run, output_text, printed, upgrade, upgraded};
use shim_tests::proc;
use shim_tests::programs::script;
use tokio::process::Command;
use tokio::task::LocalSet;
use tonic::Code;

/// Exits with 3 when it reads a line.
const ON_COMMAND: [&str; 3] = ["sh", "-c", "echo up; read go; exit 3"];

async fn is_the_same(container: &Container) -> Result<()> {
    let state = container.state().await?;
    ensure!(state.status() == Phase::Running && state.pid == container.pid, "{state:?}");
    Ok(())
}

pub(crate) async fn a_stock_client_that_waits_does_not_notice_an_upgrade(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let mut waiting = Command::from(ctr_run(&cx, "waited", &[])?);
    let mut waiting =
        waiting.args(["/bin/sh", "-c", "echo up; read go; echo done; exit 7"]).stdin(Io::piped()).stdout(Io::piped()).spawn()?;
    eventually("it runs", SOON, async || {
        ensure!(cx.client().state("waited", "").await?.status() == Phase::Running);
        Ok(())
    })
    .await?;
    // its client begins to wait before it starts the task
    upgraded(cx.daemon()).await?;
    ensure!(waiting.try_wait()?.is_none(), "it has exited");
    drop(waiting.stdin.take());
    let output = tokio::time::timeout(SOON, waiting.wait_with_output()).await??;
    ensure!(output.status.code() == Some(7) && output_text(&output) == "up\ndone\n", "{output:?}\n{}", cx.daemon().log());
    printed(ctr(&cx).args(["containers", "delete", "waited"]))?;
    Ok(())
}

pub(crate) async fn a_process_that_still_answers_a_client_holds_no_shims(cx: Context) -> Result<()> {
    let mut own = Own::new(&cx.folder().join("own"), "")?;
    let client = own.start().await?;
    let connect = async |name: &str| tokio::net::UnixStream::connect(own.folder().join(name)).await;
    // an unfinished request keeps the old process for a while
    let (mut sender, connection) = h2::client::handshake(connect("x.sock").await?).await?;
    tokio::spawn(connection);
    sender = sender.ready().await?;
    let request = http::Request::post("http://x/containerd.services.version.v1.Version/Version");
    let request = request.header("content-type", "application/grpc").header("te", "trailers").body(())?;
    let (_answer, _body) = sender.send_request(request, false)?;
    let mut shim = connect("x.sock.ttrpc").await?;
    // it was accepted, since a later one is answered
    drop(connect("x.sock.ttrpc").await?);
    client.version().await?;
    printed(&mut own.command(&["upgrade"])?)?;
    let begin = Instant::now();
    let end = tokio::time::timeout(Duration::from_secs(7), tokio::io::AsyncReadExt::read(&mut shim, &mut [0])).await;
    ensure!(matches!(end, Ok(Ok(0))), "{end:?} after {:?}", begin.elapsed());
    ensure!(own.pid().is_some_and(|pid| proc::is_alive(pid.cast_signed())), "it had no reason to stay");
    Ok(())
}

pub(crate) async fn no_run_of_a_stock_client_fails_over_upgrades(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let (enough, runs) = (AtomicBool::new(false), [AtomicUsize::new(0), AtomicUsize::new(0)]);
    let runner = async |number: usize| {
        while !enough.load(Ordering::Relaxed) {
            let count = runs[number].load(Ordering::Relaxed);
            let id = format!("run-{number}-{count}");
            let mut command = Command::from(ctr_run(&cx, &id, &["--rm"])?);
            let output = command.args(["/bin/sh", "-c", &format!("exit {}", count % 100)]).output().await?;
            ensure!(output.status.code() == i32::try_from(count % 100).ok(), "{id}: {}: {}", output.status, output_text(&output));
            runs[number].fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    let upgrades = async {
        for _upgrade in 0..4 {
            // a client retries once per call, so no call may meet two upgrades
            let before: Vec<_> = runs.iter().map(|count| count.load(Ordering::Relaxed)).collect();
            upgraded(cx.daemon()).await?;
            eventually("both clients continue", SOON, async || {
                ensure!(runs.iter().zip(&before).all(|(count, before)| count.load(Ordering::Relaxed) >= before + 2));
                Ok(())
            })
            .await?;
        }
        enough.store(true, Ordering::Relaxed);
        Ok(())
    };
    let all: Result<_> = tokio::try_join!(runner(0), runner(1), upgrades);
    all.with_context(|| cx.daemon().log())?;
    cx.leaves_nothing().await
}

pub(crate) async fn no_connection_is_refused_over_upgrades(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let container = cx.container(&ON_COMMAND).stdio(Stdio::ALL).start().await?;
    let (enough, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let asker = async || {
        while !enough.load(Ordering::Relaxed) {
            let client = Client::connect(&cx.daemon().address(), cx.client().namespace()).await?;
            // its first call is answered, by the old or the new process
            let state = client.state(&container.id, "").await?;
            ensure!(state.pid == container.pid, "{state:?}");
            asked.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    };
    let upgrades = async {
        let mut longest = Duration::ZERO;
        for _upgrade in 0..15 {
            let begin = Instant::now();
            upgraded(cx.daemon()).await?;
            longest = longest.max(begin.elapsed());
        }
        enough.store(true, Ordering::Relaxed);
        eprintln!("the slowest of 15 upgrades, to the end of the old process: {longest:?}");
        Ok(())
    };
    let all: Result<_> = tokio::try_join!(asker(), asker(), asker(), upgrades);
    all.with_context(|| cx.daemon().log())?;
    ensure!(asked.load(Ordering::Relaxed) > 50, "{asked:?}");
    cx.client().reconnected().await?;
    is_the_same(&container).await?;
    container.destroy().await?;
    cx.leaves_nothing().await
}

pub(crate) async fn an_exit_during_an_upgrade_is_published(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    for round in 0..6 {
        let container = cx.container(&ON_COMMAND).id(&format!("c{round}")).stdio(Stdio::ALL).start().await?;
        container.io.out().until("up").await?;
        let events = cx.events().await?;
        let mut stdin = container.io.stdin().await?;
        let end = async {
            // from before the new process is started until after the old one is gone
            tokio::time::sleep(Duration::from_millis(round * 8)).await;
            stdin.write_all(b"go\n")
        };
        let (upgraded, ended) = tokio::join!(upgraded(cx.daemon()), end);
        upgraded?;
        ended?;
        cx.client().reconnected().await?;
        let state = container.phase(Phase::Stopped).await?;
        ensure!(state.exit_status == 3, "{state:?}");
        ensure!(container.wait().await? == 3);
        ensure!(container.delete().await?.exit_status == 3);
        ensure!(events.exits(&container.id, "").len() <= 1, "{:?}", events.all());
    }
    cx.leaves_nothing().await
}

pub(crate) async fn an_upgrade_does_not_wait_for_a_slow_creation(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let gate = cx.gate()?;
    gate.hold("create")?;
    let local = LocalSet::new();
    local
        .run_until(async {
            let slow = cx.container(&ON_COMMAND).id("slow").stdio(Stdio::ALL).runtime_binary(&gate.binary());
            let slow = tokio::task::spawn_local(slow.create());
            gate.held("create").await?;
            let output = Command::from(upgrade(cx.daemon())?).output().await?;
            ensure!(output.status.success(), "{}", output_text(&output));
            ensure!(!slow.is_finished() && gate.held("create").await.is_ok(), "it waited");
            // other calls are served by the new process, which leaves the container to the old one
            let client = Client::connect(&cx.daemon().address(), cx.client().namespace()).await?;
            printed(ctr(&cx).args(["namespaces", "create", "meanwhile"]))?;
            let listed = client.list().await?;
            ensure!(listed.iter().all(|task| task.status() == Phase::Unknown), "{listed:?}");
            let again = CreateTaskRequest { container_id: "slow".to_owned(), ..CreateTaskRequest::default() };
            let second = client.create_task(again);
            gate.release("create")?;
            let (slow, second) = tokio::join!(slow, second);
            let slow = slow??;
            let code = code_of(second)?;
            ensure!(code == Code::AlreadyExists, "the second one: {code:?}");
            let pid = output_text(&output).split(' ').nth(1).and_then(|pid| pid.parse().ok()).context("a pid")?;
            cx.daemon().is_succeeded_by(pid).await?;
            cx.client().reconnected().await?;
            ensure!(gate.count("create") == 1, "{:?}", gate.calls());
            slow.start().await?;
            is_the_same(&slow).await?;
            slow.io.stdin().await?.write_all(b"go\n")?;
            ensure!(slow.finish().await? == 3);
            Ok::<_, anyhow::Error>(())
        })
        .await?;
    printed(ctr(&cx).args(["namespaces", "remove", "meanwhile"]))?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_creation_that_fails_after_an_upgrade_leaves_nothing(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let gate = cx.gate()?;
    gate.hold("create")?;
    let local = LocalSet::new();
    local
        .run_until(async {
            let slow = cx.container(&ON_COMMAND).id("slow").stdio(Stdio::ALL).runtime_binary(&gate.binary());
            let slow = tokio::task::spawn_local(slow.create());
            gate.held("create").await?;
            let pid = printed(&mut upgrade(cx.daemon())?)?.split(' ').nth(1).and_then(|pid| pid.parse().ok()).context("a pid")?;
            gate.fail("create", Some("no such luck"))?;
            gate.release("create")?;
            let error = slow.await?.err().context("it was created")?;
            ensure!(format!("{error:#}").contains("no such luck"), "{error:#}");
            cx.daemon().is_succeeded_by(pid).await
        })
        .await?;
    cx.client().reconnected().await?;
    eventually("it is forgotten", SOON, async || {
        let listed = cx.client().list().await?;
        ensure!(listed.is_empty(), "{listed:?}");
        Ok(())
    })
    .await?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_creation_whose_process_crashes_after_an_upgrade_can_be_repeated(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let old = cx.daemon().pid().context("a daemon")?.cast_signed();
    let gate = cx.gate()?;
    gate.hold("create")?;
    let local = LocalSet::new();
    local
        .run_until(async {
            // its metadata is to stay when it fails
            let build = || cx.container(&ON_COMMAND).id("slow").stdio(Stdio::ALL).runtime_binary(&gate.binary());
            let slow = tokio::task::spawn_local(build().metadata().await?.create_task());
            gate.held("create").await?;
            printed(&mut upgrade(cx.daemon())?)?;
            let client = Client::connect(&cx.daemon().address(), cx.client().namespace()).await?;
            ensure!(client.list().await?.iter().all(|task| task.status() == Phase::Unknown), "the old process is still busy with it");
            proc::kill_hard(old);
            ensure!(slow.await?.is_err(), "the call was answered");
            gate.release("create")?;
            cx.client().reconnected().await?;
            // it may have been created: then the client owns it
            eventually("it is there", Duration::from_secs(30), async || {
                let created = build().create_task().await.map(|container| container.pid);
                let state = client.state("slow", "").await.with_context(|| format!("{created:?}"))?;
                ensure!(state.status() == Phase::Created, "{created:?} {state:?}");
                Ok(())
            })
            .await?;
            ensure!(client.list().await?.len() == 1);
            client.delete("slow").await?;
            let _the_attempt_has_removed_it = client.delete_container("slow").await;
            Ok::<_, anyhow::Error>(())
        })
        .await?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_deletion_that_an_upgrade_overtakes_is_answered(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let gate = cx.gate()?;
    let container = cx.container(&["sh", "-c", "exit 3"]).runtime_binary(&gate.binary()).start().await?;
    ensure!(container.wait().await? == 3);
    gate.hold("delete")?;
    // this client repeats nothing
    let delete = tokio::spawn({
        let (client, id) = (cx.client().clone(), container.id.clone());
        async move { client.delete(&id).await }
    });
    gate.held("delete").await?;
    let output = Command::from(upgrade(cx.daemon())?).output().await?;
    ensure!(output.status.success(), "{}", output_text(&output));
    gate.release("delete")?;
    let deleted = delete.await?;
    ensure!(deleted.as_ref().is_ok_and(|deleted| deleted.exit_status == 3), "{deleted:?}\n{}", cx.daemon().log());
    let pid = output_text(&output).split(' ').nth(1).and_then(|pid| pid.parse().ok()).context("a pid")?;
    cx.daemon().is_succeeded_by(pid).await?;
    cx.client().reconnected().await?;
    ensure!(cx.client().list().await?.is_empty());
    cx.leaves_nothing().await
}

/// Checks that the same process serves, including changes.
async fn goes_on(cx: &Context, container: &Container) -> Result<()> {
    let pid = cx.daemon().pid().context("a daemon")?;
    ensure!(proc::is_alive(pid.cast_signed()), "the daemon has ended\n{}", cx.daemon().log());
    is_the_same(container).await?;
    ensure!(container.exec("e", &["true"]).run().await? == 0);
    let successors = proc::children(pid.cast_signed());
    ensure!(successors.is_empty(), "left: {successors:?}");
    Ok(())
}

async fn fails(cx: &Context, container: &Container, binary: &Path, reason: &str) -> Result<()> {
    let output = Command::from(upgrade(cx.daemon())?).arg("--binary").arg(binary).output().await?;
    ensure!(!output.status.success() && output_text(&output).contains(reason), "{}: {:?}", binary.display(), output_text(&output));
    ensure!(cx.daemon().log().contains(reason), "{}", cx.daemon().log());
    goes_on(cx, container).await.with_context(|| format!("after {}", binary.display()))
}

pub(crate) async fn a_failed_successor_changes_nothing(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let container = cx.container(&ON_COMMAND).stdio(Stdio::ALL).start().await?;
    let real = shim_tests::operator::binary()?.display().to_string();
    let folder = cx.folder();
    let (plain, left) = (folder.join("plain"), folder.join("left"));
    std::fs::write(&plain, "no program")?;
    let cases: [(PathBuf, &str); 7] = [
        (folder.join("missing"), "No such file or directory"),
        (plain, "Permission denied"),
        (script(folder, "fails", "#!/bin/sh\nexit 3\n")?, "it exited without a message (exit status: 3)"),
        (script(folder, "crashes", "#!/bin/sh\nkill -SEGV $$\n")?, "it exited without a message (signal: 11"),
        (script(folder, "talks", "#!/bin/sh\necho hello >&0\nsleep 100\n")?, "it sent the unexpected message "),
        (
            script(folder, "moves", &format!("#!/bin/sh\nexec {real} \"$@\" --address /run/elsewhere.sock\n"))?,
            "does not serve at /run/elsewhere.sock",
        ),
        (script(folder, "hangs", &format!("#!/bin/sh\nsleep 100 & echo $! > {}; wait\n", left.display()))?, "it sent nothing for 10s"),
    ];
    for (binary, reason) in &cases {
        fails(&cx, &container, binary, reason).await?;
    }
    let left = std::fs::read_to_string(left)?.trim().parse()?;
    eventually_true("the children of a hanging program are killed with it", SOON, || !proc::is_alive(left)).await?;
    container.destroy().await?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_successor_that_crashes_at_any_step_changes_nothing(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let container = cx.container(&ON_COMMAND).stdio(Stdio::ALL).start().await?;
    let mut words = String::from("#!/bin/sh\nread greeting <&0\n");
    for (step, word) in ["prepared", "prepared to migrate", "ready"].into_iter().enumerate() {
        let text = match word {
            "ready" => format!("{words}echo prepared >&0; read yours <&0; echo ready >&0; read serve <&0; exit 4\n"),
            word => format!("{words}echo {word} >&0; read yours <&0; exit 4\n"),
        };
        let program = script(cx.folder(), &format!("step{step}"), &text)?;
        fails(&cx, &container, &program, "it exited without a message (exit status: 4)").await?;
    }
    words.push_str("echo prepared >&0; read yours <&0; echo serving >&0; sleep 100\n");
    fails(&cx, &container, &script(cx.folder(), "hurries", &words)?, "it sent the unexpected message ").await?;
    upgraded(cx.daemon()).await?;
    cx.client().reconnected().await?;
    container.destroy().await?;
    ensure!(!cx.daemon().folder().join("root/meta.before-upgrade").exists(), "a copy is left");
    cx.leaves_nothing().await
}

pub(crate) async fn a_hangup_signal_is_an_upgrade(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let container = cx.container(&ON_COMMAND).stdio(Stdio::ALL).start().await?;
    let old = cx.daemon().pid().context("a daemon")?.cast_signed();
    proc::signal(old, nix::sys::signal::Signal::SIGHUP)?;
    let taken = "another process has taken over";
    eventually_true("another process has taken over", SOON, || cx.daemon().log().contains(taken)).await?;
    let log = cx.daemon().log();
    let pid = log.split(taken).nth(1).and_then(|rest| rest.split("pid=").nth(1)?.split_whitespace().next()?.parse().ok());
    cx.daemon().is_succeeded_by(pid.context("a pid")?).await?;
    cx.client().reconnected().await?;
    is_the_same(&container).await?;
    container.destroy().await?;
    cx.leaves_nothing().await
}

pub(crate) async fn an_event_stream_ends_with_an_error_after_its_events(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let mut stream = cx.client().subscribe().await?;
    for number in 0..100 {
        cx.client().publish(&format!("/test/n{number}"), prost_types::Any::default()).await?;
    }
    upgraded(cx.daemon()).await?;
    let mut received = 0;
    let last = loop {
        match tokio::time::timeout(SOON, stream.message()).await? {
            Ok(Some(envelope)) if envelope.topic.starts_with("/test/") => received += 1,
            Ok(Some(_)) => {}
            last => break last,
        }
    };
    ensure!(received == 100, "{received}");
    ensure!(last.as_ref().is_err_and(|status| status.code() == Code::Unavailable), "{last:?}");
    cx.client().reconnected().await?;
    cx.leaves_nothing().await
}

pub(crate) async fn a_client_that_subscribes_again_after_an_upgrade_has_missed_nothing(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let client = cx.client().clone();
    let topics = async |stream: &mut tonic::Streaming<containerd_client::types::Envelope>, count: usize| {
        let mut topics = Vec::new();
        while topics.len() < count {
            let envelope = tokio::time::timeout(SOON, stream.message()).await??.context("more events")?;
            if envelope.topic.starts_with("/test/") {
                topics.push(envelope.topic);
            }
        }
        anyhow::Ok(topics)
    };
    let mut stream = client.subscribe().await?;
    for round in 0..3 {
        let name = |what: &str| format!("/test/{what}{round}");
        client.publish(&name("before"), prost_types::Any::default()).await?;
        upgraded(cx.daemon()).await?;
        // another client, while the first has not yet noticed
        let other = cx.daemon().client(client.namespace()).await?;
        other.publish(&name("between"), prost_types::Any::default()).await?;
        ensure!(topics(&mut stream, 1).await? == [name("before")]);
        let last = tokio::time::timeout(SOON, stream.message()).await?;
        ensure!(last.as_ref().is_err_and(|status| status.code() == Code::Unavailable), "{last:?}");
        stream = eventually("it subscribes again", SOON, async || Ok(client.subscribe().await?)).await?;
        other.publish(&name("after"), prost_types::Any::default()).await?;
        ensure!(topics(&mut stream, 2).await? == [name("between"), name("after")]);
    }
    cx.leaves_nothing().await
}

pub(crate) async fn upgrades_may_follow_each_other_at_once(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    for _upgrade in 0..8 {
        // each process has a client that does not disconnect by itself
        let silent = cx.daemon().client(cx.client().namespace()).await?;
        let _events = silent.subscribe().await?;
        let output = Command::from(upgrade(cx.daemon())?).output().await?;
        ensure!(output.status.success(), "{}\n{}", output_text(&output), cx.daemon().log());
        let pid = output_text(&output).split(' ').nth(1).and_then(|pid| pid.parse().ok()).context("a pid")?;
        let next = Command::from(upgrade(cx.daemon())?).output().await?;
        ensure!(next.status.success(), "{}\n{}", output_text(&next), cx.daemon().log());
        let last = output_text(&next).split(' ').nth(1).and_then(|pid| pid.parse().ok()).context("a pid")?;
        ensure!(pid != last);
        cx.daemon().is_succeeded_by(last).await?;
        eventually_true("the process in the middle has exited", SOON, || !proc::is_alive(pid)).await?;
    }
    cx.client().reconnected().await?;
    cx.leaves_nothing().await
}

pub(crate) async fn the_daemon_stops_while_a_successor_hangs(cx: Context) -> Result<()> {
    let cx = cx.with_own_daemon().await?;
    let hangs = script(cx.folder(), "hangs", "#!/bin/sh\nexec sleep 100\n")?;
    let mut upgrading = Command::from(upgrade(cx.daemon())?).arg("--binary").arg(hangs).stderr(Io::piped()).spawn()?;
    let pid = cx.daemon().pid().context("a daemon")?.cast_signed();
    eventually_true("the new process is there", SOON, || !proc::children(pid).is_empty()).await?;
    let successor = proc::children(pid)[0].pid;
    cx.daemon().stop()?;
    ensure!(!proc::is_alive(successor), "the successor still runs");
    ensure!(!upgrading.wait().await?.success());
    cx.revive_daemon().await?;
    cx.leaves_nothing().await
}
