//! Scenarios that run while workers crash: each is a short container lifecycle, and every answer is recorded.

use std::fs;
use std::future::Future;
use std::pin::Pin;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use shim_tests::builds;
use shim_tests::container::Stdio;
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::messages::{CheckpointOptions, RESOURCES, any, any_json};
use shim_tests::proc;
use shim_tests::runner::needs_criu;
use shim_tests::spec::Spec;
use shim_tests::suite::{Runtime, Suite};

use crate::run::Run;
use crate::tally::Tally;

/// A scenario in progress.
pub(crate) type Drive<'a> = Pin<Box<dyn Future<Output = Result<()>> + 'a>>;

/// A scenario.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) body: for<'a> fn(&'a Run) -> Drive<'a>,
    /// Whether the scenario itself starts the crashes: [`Run::arm`].
    pub(crate) late: bool,
    /// How many workers there are without crashes.
    pub(crate) generations: usize,
    /// The events that the daemon must publish, in this order: topic, process, the name of its pid, and its exit status unless 0.
    pub(crate) events: &'static str,
    /// The runtime calls, in this order.
    pub(crate) calls: &'static str,
}

impl Scenario {
    /// Whether it holds or fails a call of the OCI runtime, or is about what no other engine does.
    pub(crate) fn needs_runtime(&self) -> bool {
        ["short", "failing create", "failing start"].contains(&self.name)
    }
}

/// All of them, for campaigns.
pub(crate) const ALL: [&Scenario; 12] =
    [&LIFE, &SHORT, &PAUSE, &SIGNALS, &TERMINAL, &FILE, &LOGGER, &FAILING_CREATE, &FAILING_START, &KILL_ALL, &SHARED_PIDS, &POD];

/// Create, start, exec, stdin, stdout, kill, wait, delete.
pub(crate) const LIFE: Scenario = Scenario {
    name: "life",
    body: |run| Box::pin(life(run)),
    late: false,
    generations: 1,
    events: "create ID/init, start ID/init, exec-added e/none, exec-started e/e, exit e/e 4, exit ID/init 3, delete ID/init 3",
    calls: "create, start, exec, delete",
};

async fn life(run: &Run) -> Result<()> {
    let script = "trap 'seq 3001 6000; exit 3' TERM; seq 1 3000; sleep 1000 & wait";
    let container = run.create(run.container(&["sh", "-c", script]).stdio(Stdio::OUTPUT), "init").await?;
    run.start(&container, "init").await?;
    container.io.out().until("\n3000\n").await?;
    run.state(&container).await?;
    let exec = run.add(container.exec("e", &["sh", "-c", "seq 1 1000; cat; exit 4"]).stdio(Stdio::ALL)).await?;
    run.start(&exec, "e").await?;
    run.pids(&container).await?;
    let mut stdin = exec.io.stdin().await?;
    stdin.write_all(b"the end\n")?;
    drop(stdin);
    run.done("close stdin of e", exec.close_stdin().await)?;
    run.finish(&exec, "e").await?;
    is_complete(&exec.io.out().to_end().await?, &format!("{}the end\n", lines(1, 1000)))?;
    run.held("after the exec").await?;
    let (client, id) = (run.cx.client().clone(), container.id.clone());
    let parked = tokio::spawn(async move { client.wait(&id, "").await });
    run.done("kill", container.kill(15).await)?;
    let parked = parked.await??;
    run.note(format!("parked wait: {}", parked.exit_status));
    run.finish(&container, "init").await?;
    is_complete(&container.io.out().to_end().await?, &lines(1, 6000))?;
    is_complete(&container.io.err().to_end().await?, "")
}

/// Processes that exit before the runtime reports that they were started.
pub(crate) const SHORT: Scenario = Scenario {
    name: "short",
    body: |run| Box::pin(short(run)),
    late: false,
    generations: 1,
    events: "create ID/init, exec-added e/none, exec-started e/e, exit e/e 4, start ID/init, exit ID/init 3, delete ID/init 3",
    calls: "create, exec, start, delete",
};

async fn short(run: &Run) -> Result<()> {
    let script = "seq 1 1000; exit 3";
    let container = run.create(run.container(&["sh", "-c", script]).stdio(Stdio::OUTPUT), "init").await?;
    run.begin()?;
    let exec = run.add(container.exec("e", &["sh", "-c", "seq 1 1000; exit 4"]).stdio(Stdio::OUTPUT)).await?;
    held_after(run, "exec", run.start(&exec, "e"), async || exec.io.out().until("\n1000\n").await.map(drop)).await?;
    run.finish(&exec, "e").await?;
    is_complete(&exec.io.out().to_end().await?, &lines(1, 1000))?;
    let pid = container.pid.cast_signed();
    let is_over = async || eventually_true("the keeper has reaped it", SOON, || proc::Process::read(pid).is_err()).await;
    held_after(run, "start", run.start(&container, "init"), is_over).await?;
    run.held("after the start").await?;
    run.finish(&container, "init").await?;
    is_complete(&container.io.out().to_end().await?, &lines(1, 1000))
}

/// Makes a call that the runtime completes only after `until`.
async fn held_after(run: &Run, verb: &str, call: impl Future<Output = Result<()>>, until: impl AsyncFnOnce() -> Result<()>) -> Result<()> {
    run.gate.hold_after(verb)?;
    let release = async {
        run.gate.held(verb).await?;
        until().await?;
        run.gate.release(verb)
    };
    let (called, released) = tokio::join!(call, release);
    called.and(released)
}

/// Pause, resume, kill while paused.
pub(crate) const PAUSE: Scenario = Scenario {
    name: "pause",
    body: |run| Box::pin(pause(run)),
    late: false,
    generations: 1,
    events: "create ID/init, start ID/init, paused ID/none, resumed ID/none, paused ID/none, exit ID/init 137, \
             delete ID/init 137",
    calls: "create, start, pause, resume, pause, delete",
};

async fn pause(run: &Run) -> Result<()> {
    let container = run.create(run.container(&["sleep", "1000"]), "init").await?;
    run.start(&container, "init").await?;
    run.begin()?;
    run.done("pause", run.cx.client().pause(&container.id).await)?;
    run.state(&container).await?;
    run.refused("exec while paused", container.exec("e", &["true"]).add().await)?;
    run.done("resume", run.cx.client().resume(&container.id).await)?;
    run.state(&container).await?;
    run.held("after the resume").await?;
    run.done("pause", run.cx.client().pause(&container.id).await)?;
    run.done("kill", container.kill(9).await)?;
    run.finish(&container, "init").await
}

/// Signals for one exec and not for another, while clients wait for both.
pub(crate) const SIGNALS: Scenario = Scenario {
    name: "signals",
    body: |run| Box::pin(signals(run)),
    late: false,
    generations: 1,
    events: "create ID/init, start ID/init, exec-added e/none, exec-started e/e, exec-added f/none, exec-started f/f, exit e/e 4, \
             exit f/f 137, exit ID/init 137, delete ID/init 137",
    calls: "create, start, exec, exec, delete",
};

async fn signals(run: &Run) -> Result<()> {
    let container = run.create(run.container(&["sleep", "1000"]), "init").await?;
    run.start(&container, "init").await?;
    run.begin()?;
    // what is left of an exec that ends by itself must not hold its output, for which a Delete would wait
    let script = "trap 'seq 1 1000; exit 4' TERM; echo up; sleep 1000 >&- 2>&- & wait";
    let mut waits = Vec::new();
    for name in ["e", "f"] {
        let exec = run.add(container.exec(name, &["sh", "-c", script]).stdio(Stdio::OUTPUT)).await?;
        let (client, id) = (run.cx.client().clone(), container.id.clone());
        let wait = tokio::spawn(async move { client.wait(&id, name).await });
        run.start(&exec, name).await?;
        exec.io.out().until("up\n").await?;
        waits.push((name, exec, wait));
    }
    for ((name, exec, wait), (signal, output)) in waits.into_iter().zip([(15, lines(1, 1000)), (9, String::new())]) {
        run.done(&format!("kill {name}"), exec.kill(signal).await)?;
        run.note(format!("parked wait of {name}: {}", wait.await??.exit_status));
        run.refused(&format!("kill {name}, which has ended"), exec.kill(signal).await)?;
        run.finish(&exec, name).await?;
        is_complete(&exec.io.out().to_end().await?, &format!("up\n{output}"))?;
        run.refused(&format!("state of {name}, which is gone"), exec.state().await)?;
    }
    run.held("after the execs").await?;
    run.done("kill", container.kill(9).await)?;
    run.finish(&container, "init").await
}

/// Terminals of init and of an exec.
pub(crate) const TERMINAL: Scenario = Scenario {
    name: "terminal",
    body: |run| Box::pin(terminal(run)),
    late: false,
    generations: 1,
    events: "create ID/init, start ID/init, exec-added e/none, exec-started e/e, exit e/e 4, exit ID/init 3, delete ID/init 3",
    calls: "create, start, exec, delete",
};

async fn terminal(run: &Run) -> Result<()> {
    let builder = run.container(&["sh", "-c", "seq 1 500; read go; exit 3"]).terminal().stdio(Stdio::ALL);
    let container = run.create(builder, "init").await?;
    run.start(&container, "init").await?;
    container.io.out().until("\n500\r\n").await?;
    let script = "seq 1 500; read go; stty size; seq 501 1000; exit 4";
    let exec = run.add(container.exec("e", &["sh", "-c", script]).terminal().stdio(Stdio::ALL)).await?;
    run.done("resize e before it is there", exec.resize(120, 50).await)?;
    run.start(&exec, "e").await?;
    exec.io.out().until("\n500\r\n").await?;
    run.done("resize e", exec.resize(100, 40).await)?;
    exec.io.stdin().await?.write_all(b"go\n")?;
    run.finish(&exec, "e").await?;
    let expected = format!("{}go\n40 100\n{}", lines(1, 500), lines(501, 1000));
    is_complete(&exec.io.out().to_end().await?, &expected.replace('\n', "\r\n"))?;
    run.held("after the exec").await?;
    container.io.stdin().await?.write_all(b"go\n")?;
    run.finish(&container, "init").await?;
    is_complete(&container.io.out().to_end().await?, &format!("{}go\n", lines(1, 500)).replace('\n', "\r\n"))
}

/// Output into files.
pub(crate) const FILE: Scenario = Scenario {
    name: "file",
    body: |run| Box::pin(file(run)),
    late: false,
    generations: 1,
    events: "create ID/init, start ID/init, exec-added e/none, exec-started e/e, exit e/e 4, exit ID/init 3, delete ID/init 3",
    calls: "create, start, exec, delete",
};

async fn file(run: &Run) -> Result<()> {
    let path = |name: &str| run.cx.folder().join(format!("{}-{name}.log", run.id));
    let script = "trap 'seq 20001 40000; exit 3' TERM; seq 1 20000; sleep 1000 & wait";
    let stdio = Stdio::uri(format!("file://{}", path("init").display()));
    let container = run.create(run.container(&["sh", "-c", script]).stdio(stdio), "init").await?;
    run.start(&container, "init").await?;
    let stdio = Stdio::uri(format!("file://{}", path("e").display()));
    let exec = run.add(container.exec("e", &["sh", "-c", "seq 1 20000; exit 4"]).stdio(stdio)).await?;
    run.start(&exec, "e").await?;
    run.finish(&exec, "e").await?;
    // the bytes must be in the file when the exit is published
    is_complete(&fs::read_to_string(path("e"))?, &lines(1, 20000))?;
    // a signal before the trap is set would be lost
    let is_written = || fs::read_to_string(path("init")).is_ok_and(|text| text.ends_with("\n20000\n"));
    eventually_true("what init writes is in its file", SOON, is_written).await?;
    run.held("after the exec").await?;
    run.done("kill", container.kill(15).await)?;
    run.finish(&container, "init").await?;
    is_complete(&fs::read_to_string(path("init"))?, &lines(1, 40000))?;
    fs::remove_file(path("init"))?;
    fs::remove_file(path("e"))?;
    Ok(())
}

/// A runtime that fails at create.
pub(crate) const FAILING_CREATE: Scenario = Scenario {
    name: "failing create",
    body: |run| Box::pin(failing_create(run)),
    late: false,
    generations: 1,
    events: "",
    // the worker cleans up, and so does the command that the daemon runs after every failure; each asks first whose container it is
    calls: "create, state, delete, state, delete",
};

async fn failing_create(run: &Run) -> Result<()> {
    run.gate.fail("create", Some("no such luck"))?;
    let created = run.container(&["true"]).stdio(Stdio::OUTPUT).create().await;
    run.refused("create", created.map(drop))
}

/// A runtime that fails at start, and an exec of a program that does not exist.
pub(crate) const FAILING_START: Scenario = Scenario {
    name: "failing start",
    body: |run| Box::pin(failing_start(run)),
    late: false,
    generations: 1,
    events: "create ID/init, start ID/init, exec-added e/none, exit ID/init 137, delete ID/init 137",
    calls: "create, start, start, exec, delete",
};

async fn failing_start(run: &Run) -> Result<()> {
    let container = run.create(run.container(&["sleep", "1000"]), "init").await?;
    run.begin()?;
    run.gate.fail("start", Some("no such luck"))?;
    run.refused("start", container.start().await)?;
    run.state(&container).await?;
    run.gate.fail("start", None)?;
    run.start(&container, "init").await?;
    let exec = run.add(container.exec("e", &["/bin/not-there"]).stdio(Stdio::OUTPUT)).await?;
    run.refused("start e", exec.start().await)?;
    run.state(&exec).await?;
    run.done("delete e", exec.delete().await.map(drop))?;
    run.held("after the exec").await?;
    run.done("kill", container.kill(9).await)?;
    run.finish(&container, "init").await
}

/// Output to a logger.
pub(crate) const LOGGER: Scenario = Scenario {
    name: "logger",
    body: |run| Box::pin(logger(run)),
    late: false,
    generations: 1,
    events: "create ID/init, start ID/init, exit ID/init 3, delete ID/init 3",
    calls: "create, start, delete",
};

async fn logger(run: &Run) -> Result<()> {
    let folder = run.cx.folder().join(format!("{}-logs", run.id));
    fs::create_dir_all(&folder)?;
    let uri = format!("binary://{}?folder={}", run.cx.program("log-sink").display(), folder.display());
    let builder = run.container(&["sh", "-c", "seq 1 20000; exit 3"]).stdio(Stdio::uri(&uri));
    let container = run.create(builder, "init").await?;
    run.start(&container, "init").await?;
    run.finish(&container, "init").await?;
    eventually_true("the logger is done", SOON, || folder.join("done").exists()).await?;
    is_complete(&fs::read_to_string(folder.join("stdout"))?, &lines(1, 20000))?;
    is_complete(&fs::read_to_string(folder.join("stderr"))?, "")?;
    Ok(fs::remove_dir_all(folder)?)
}

/// New limits, statistics, and a signal for every process, which the runtime sends.
pub(crate) const KILL_ALL: Scenario = Scenario {
    name: "kill all",
    body: |run| Box::pin(kill_all(run)),
    late: false,
    generations: 1,
    events: "create ID/init, start ID/init, exit ID/init 3, delete ID/init 3",
    calls: "create, start, update, kill, delete",
};

async fn kill_all(run: &Run) -> Result<()> {
    const LIMIT: u64 = 64 << 20;
    let script = "trap 'exit 3' TERM; echo up; sleep 1000 & wait";
    let builder = run.container(&["sh", "-c", script]).spec(|spec| spec.memory_limit(LIMIT)).stdio(Stdio::OUTPUT);
    let container = run.create(builder, "init").await?;
    run.start(&container, "init").await?;
    container.io.out().until("up").await?;
    run.begin()?;
    let resources = any_json(RESOURCES, &json!({ "memory": { "limit": 2 * LIMIT } }));
    run.done("update", run.cx.client().update(&container.id, resources).await)?;
    run.done("metrics", run.cx.client().metrics(&container.id).await.map(drop))?;
    run.held("after the update").await?;
    run.done("kill all", container.kill_all(15).await)?;
    run.refused("kill what has ended", {
        container.wait().await?;
        container.kill(15).await
    })?;
    run.finish(&container, "init").await
}

/// A container in the host's pid namespace, whose processes only the shim kills when init exits.
pub(crate) const SHARED_PIDS: Scenario = Scenario {
    name: "shared pids",
    body: |run| Box::pin(shared_pids(run)),
    late: false,
    generations: 1,
    events: "create ID/init, start ID/init, exec-added e/none, exec-started e/e, exit e/e 137, exit ID/init 3, delete ID/init 3",
    calls: "create, start, exec, delete",
};

async fn shared_pids(run: &Run) -> Result<()> {
    let script = "sleep 1000 & read go; exit 3";
    let builder = run.container(&["sh", "-c", script]).spec(Spec::host_pids).stdio(Stdio::ALL);
    let container = run.create(builder, "init").await?;
    run.start(&container, "init").await?;
    run.begin()?;
    let exec = run.add(container.exec("e", &["sh", "-c", "sleep 1000 & sleep 1000"])).await?;
    run.start(&exec, "e").await?;
    container.io.stdin().await?.write_all(b"go\n")?;
    run.finish(&container, "init").await
}

/// A checkpoint that ends the container.
pub(crate) const CHECKPOINT: Scenario = Scenario {
    name: "checkpoint",
    body: |run| Box::pin(checkpoint(run)),
    late: false,
    generations: 1,
    events: "create ID/init, start ID/init, exit ID/init 137, checkpointed ID/none, delete ID/init 137",
    calls: "create, start, checkpoint, delete",
};

fn needs_checkpoints(run: &Run) -> Result<()> {
    // Those of other suites come without.
    let suite = if run.cx.runtime() == Runtime::Native { Suite::Forky } else { run.cx.suite() };
    needs_criu(&suite.program("criu"))
}

async fn checkpoint(run: &Run) -> Result<()> {
    needs_checkpoints(run)?;
    let container = run.create(run.container(&["sleep", "1000"]), "init").await?;
    run.start(&container, "init").await?;
    proc::executes(container.pid, "sleep").await?;
    run.begin()?;
    let options = any(&CheckpointOptions { exit: true, ..CheckpointOptions::default() });
    run.done("checkpoint", run.cx.client().checkpoint(&container.id, options).await.map(drop))?;
    run.finish(&container, "init").await
}

/// A container that is restored from a checkpoint.
pub(crate) const RESTORE: Scenario = Scenario {
    name: "restore",
    body: |run| Box::pin(restore(run)),
    late: true,
    generations: 1,
    events: "create ID/saved, start ID/saved, exit ID/saved 137, checkpointed ID/none, delete ID/saved 137, create ID/none, \
             start ID/init, exit ID/init 137, delete ID/init 137",
    calls: "create, start, checkpoint, delete, restore, delete",
};

async fn restore(run: &Run) -> Result<()> {
    needs_checkpoints(run)?;
    let container = run.create(run.container(&["sleep", "1000"]), "saved").await?;
    run.start(&container, "saved").await?;
    proc::executes(container.pid, "sleep").await?;
    let options = any(&CheckpointOptions { exit: true, ..CheckpointOptions::default() });
    // unreferenced content is collected at any time
    let leased = run.cx.client().with_lease(&run.id).await?;
    let descriptors = leased.checkpoint(&container.id, options).await?;
    let image = descriptors.into_iter().find(|found| found.media_type.contains("criu")).context("no checkpoint in the store")?;
    run.finish(&container, "saved").await?;
    container.remove().await?;
    run.cx.leaves_nothing().await?;
    run.arm()?;
    let restored = run.create(run.container(&["sleep", "1000"]).restore(image), "missing").await?;
    run.start(&restored, "init").await?;
    run.held("after the restore").await?;
    run.done("kill", restored.kill(9).await)?;
    run.finish(&restored, "init").await
}

/// Three containers in one shim, the first of which is deleted first.
pub(crate) const POD: Scenario = Scenario {
    name: "pod",
    body: |run| Box::pin(pod(run)),
    late: false,
    generations: 1,
    events: "create ID/init, start ID/init, create ID-b/b, create ID-c/c, start ID-c/c, exit ID-c/c 3, delete ID-c/c 3, \
             exit ID/init 137, delete ID/init 137, exit ID-b/b 137, delete ID-b/b 137",
    calls: "create, start, create, create, start, delete, delete, delete",
};

async fn pod(run: &Run) -> Result<()> {
    let member = |spec: Spec| spec.annotation("io.kubernetes.cri.sandbox-id", &run.id);
    let first = run.create(run.container(&["sleep", "1000"]).spec(member), "init").await?;
    run.start(&first, "init").await?;
    let second = run.create(run.member("b", &["sleep", "1000"]).spec(member), "b").await?;
    run.begin()?;
    let script = "seq 1 1000; exit 3";
    let third = run.create(run.member("c", &["sh", "-c", script]).stdio(Stdio::OUTPUT).spec(member), "c").await?;
    run.start(&third, "c").await?;
    run.finish(&third, "c").await?;
    is_complete(&third.io.out().to_end().await?, &lines(1, 1000))?;
    run.held("after the third").await?;
    run.done("kill init", first.kill(9).await)?;
    run.finish(&first, "init").await?;
    run.held("after the first").await?;
    // created, never started
    run.done("delete b", second.delete().await.map(drop))
}

/// The command that containerd runs when it believes a shim dead, while a client waits for init and another for an exec.
pub(crate) const COMMAND: Scenario = Scenario {
    name: "command",
    body: |run| Box::pin(command(run)),
    late: false,
    generations: 1,
    events: "create ID/init, start ID/init, create ID-b/b, start ID-b/b, exec-added e/none, exec-started e/e, exit e/e 137, \
             exit ID-b/b 137, delete ID-b/b 137, exit ID/init 137, delete ID/init 137",
    calls: "create, start, create, start, exec, delete, delete",
};

async fn command(run: &Run) -> Result<()> {
    let member = |spec: Spec| spec.annotation("io.kubernetes.cri.sandbox-id", &run.id);
    // the other container and the shim stay
    let first = run.create(run.container(&["sleep", "1000"]).spec(member), "init").await?;
    run.start(&first, "init").await?;
    let second = run.create(run.member("b", &["sleep", "1000"]).spec(member), "b").await?;
    run.start(&second, "b").await?;
    let exec = run.add(second.exec("e", &["sleep", "1000"])).await?;
    run.start(&exec, "e").await?;
    let waits = ["", "e"].map(|exec| {
        let (client, id) = (run.cx.client().clone(), second.id.clone());
        tokio::spawn(async move { client.wait(&id, exec).await })
    });
    // one that comes after the command finds nothing
    run.waits_arrive(2).await?;
    run.begin()?;
    let deleted = run.cx.delete_command(&second).await?;
    run.note(format!("the command reports {} of {}", deleted.exit_status, run.named(deleted.pid)));
    for wait in waits {
        run.note(format!("parked wait: {:?}", wait.await?.map(|answer| answer.exit_status).map_err(|error| error.code())));
    }
    run.refused("state of b, which is gone", second.state().await)?;
    // the daemon then deletes it with the published exit status
    let deleted = second.delete().await?;
    run.note(format!("delete b: {} of {}", deleted.exit_status, run.named(deleted.pid)));
    run.held("after the command").await?;
    run.state(&first).await?;
    run.done("kill init", first.kill(9).await)?;
    run.finish(&first, "init").await
}

/// The worker hibernates, and is started again by a request, and by an exit; for a shim with a short idle time.
pub(crate) const REST: Scenario = Scenario {
    name: "rest",
    body: |run| Box::pin(rest(run)),
    late: false,
    generations: 3,
    events: "create ID/init, start ID/init, exec-added e/none, exec-started e/e, exit e/e 4, exit ID/init 3, delete ID/init 3",
    calls: "create, start, exec, delete",
};

async fn rest(run: &Run) -> Result<()> {
    let container = run.create(run.container(&["sh", "-c", "seq 1 1000; read go; exit 3"]).stdio(Stdio::ALL), "init").await?;
    run.start(&container, "init").await?;
    container.io.out().until("\n1000\n").await?;
    let (client, id) = (run.cx.client().clone(), container.id.clone());
    let parked = tokio::spawn(async move { client.wait_for_ever(&id, "").await });
    run.begin()?;
    builds::hibernates(&run.cx, &container.id).await?;
    let exec = run.add(container.exec("e", &["sh", "-c", "exit 4"])).await?;
    run.start(&exec, "e").await?;
    run.finish(&exec, "e").await?;
    builds::hibernates(&run.cx, &container.id).await?;
    run.held("at rest").await?;
    container.io.stdin().await?.write_all(b"go\n")?;
    run.note(format!("parked wait: {}", parked.await??.into_inner().exit_status));
    run.finish(&container, "init").await?;
    is_complete(&container.io.out().to_end().await?, &lines(1, 1000))
}

/// Another build takes over, worker and keeper, while a client waits and a process reads.
pub(crate) const UPGRADE: Scenario = Scenario {
    name: "upgrade",
    body: |run| Box::pin(upgrade(run)),
    late: false,
    generations: 3,
    events: "create ID/init, start ID/init, exec-added e/none, exec-started e/e, exit e/e 4, exit ID/init 3, delete ID/init 3",
    calls: "create, start, exec, delete",
};

async fn upgrade(run: &Run) -> Result<()> {
    let script = "trap 'seq 3001 6000; exit 3' TERM; seq 1 3000; sleep 1000 & wait";
    let container = run.create(run.container(&["sh", "-c", script]).stdio(Stdio::OUTPUT), "init").await?;
    run.start(&container, "init").await?;
    container.io.out().until("\n3000\n").await?;
    let exec = run.add(container.exec("e", &["sh", "-c", "seq 1 1000; cat; exit 4"]).stdio(Stdio::ALL)).await?;
    run.start(&exec, "e").await?;
    let (client, id) = (run.cx.client().clone(), container.id.clone());
    let parked = tokio::spawn(async move { client.wait(&id, "").await });
    let program = run.cx.folder().join("another-build");
    if !program.exists() {
        let shim = run.cx.shim().binary.as_ref().context("X_SHIM must name our own shim")?;
        builds::make(shim, &program, "build=another")?;
    }
    run.begin()?;
    // a crash may roll the upgrade back
    builds::upgrade(&run.cx, &program, &["--all"]).await?;
    run.state(&container).await?;
    run.pids(&container).await?;
    let mut stdin = exec.io.stdin().await?;
    stdin.write_all(b"the end\n")?;
    drop(stdin);
    run.done("close stdin of e", exec.close_stdin().await)?;
    run.finish(&exec, "e").await?;
    is_complete(&exec.io.out().to_end().await?, &format!("{}the end\n", lines(1, 1000)))?;
    run.done("kill", container.kill(15).await)?;
    run.note(format!("parked wait: {}", parked.await??.exit_status));
    run.finish(&container, "init").await?;
    is_complete(&container.io.out().to_end().await?, &lines(1, 6000))
}

/// Waits until init is the user's program: a runtime that is about to execute it has descriptors that criu cannot save.
fn lines(first: u32, last: u32) -> String {
    (first..=last).map(|number| format!("{number}\n")).collect()
}

/// Checks that no line is missing or repeated.
fn is_complete(text: &str, expected: &str) -> Result<()> {
    Tally::add(|tally| &tally.bytes, text.len() as u64);
    let same = text.bytes().zip(expected.bytes()).take_while(|(a, b)| a == b).count();
    let rest = |text: &str| String::from_utf8_lossy(&text.as_bytes()[same..text.len().min(same + 60)]).into_owned();
    ensure!(text == expected, "{} bytes of {}: after {same} {:?} instead of {:?}", text.len(), expected.len(), rest(text), rest(expected));
    Ok(())
}
