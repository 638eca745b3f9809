//! Upgrades and downgrades under containers in every state.

use std::cell::Cell;
use std::fs;
use std::path::Path;
use std::rc::Rc;

use anyhow::{Context as _, Result, ensure};
use containerd_client::types::v1::Status as Phase;
use shim_tests::builds::{self, Upgraded};
use shim_tests::container::{Container, Stdio};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::gate::Gate;
use shim_tests::proc;
use shim_tests::spec::Spec;
use tokio::task::{JoinHandle, LocalSet};

use crate::{build, on_build};

pub(crate) async fn upgrades_and_downgrades_keep_every_container_and_call(cx: Context) -> Result<()> {
    let local = LocalSet::new();
    local.run_until(everything(cx)).await
}

/// The binary is replaced while a shim of the previous one runs: `start` answers with that shim's address, and it takes another container.
pub(crate) async fn a_new_binary_starts_a_container_in_the_shim_of_an_old_one(outer: Context) -> Result<()> {
    let cx = on_build(&outer, "build=old").await?;
    let member = |spec: Spec| spec.annotation("io.kubernetes.cri.sandbox-id", "pod");
    let pod = cx.container(&["sleep", "1000"]).id("pod").spec(member).start().await?;
    let (keeper, address) = (cx.shim_pid("pod")?, fs::read_to_string(pod.bundle().join("address"))?);
    // at the path in which the daemon looks
    let program = build(&outer, "first", "build=new oldest=2 newest=3")?;
    let second = cx.container(&["sh", "-c", "read go; exit 3"]).spec(member).stdio(Stdio::ALL).start().await?;
    ensure!(fs::read_to_string(second.bundle().join("address"))? == address, "start answers another address");
    let one_old_shim = async || {
        let shims = builds::ps(&cx, &program).await?;
        ensure!(shims.len() == 1 && shims[0]["keeper"]["pid"] == keeper, "{shims:#?}");
        ensure!(shims[0]["keeper"]["build"].as_str().is_some_and(|build| build.contains("old")), "{shims:#?}");
        anyhow::Ok(())
    };
    one_old_shim().await?;
    ensure!(second.exec("e", &["sh", "-c", "exit 4"]).run().await? == 4);
    // a restarted daemon finds both
    cx.crash_daemon().await?;
    ensure!(pod.state().await?.pid == pod.pid && second.state().await?.pid == second.pid);
    second.io.stdin().await?.write_all(b"go\n")?;
    ensure!(second.finish().await? == 3);
    let third = cx.container(&["sh", "-c", "exit 5"]).spec(member).create().await?;
    one_old_shim().await?;
    ensure!(third.run().await? == 5);
    ensure!(pod.destroy().await? == 137);
    cx.leaves_nothing().await
}

/// The containers and calls in progress while shims are upgraded.
struct Scene {
    cx: Context,
    gate: Gate,
    /// Writes numbers, in batches, until the test stops it.
    writer: Container,
    terminal: Container,
    paused: Container,
    /// A container in which execs are started all the time.
    busy: Rc<Container>,
    keepers: Vec<i32>,
    waits: Vec<JoinHandle<Result<u32>>>,
    /// Lines written to the terminal so far.
    lines: Cell<u32>,
    /// How many descriptors the keeper of the paused container had after its first upgrade.
    descriptors: Cell<usize>,
}

async fn everything(outer: Context) -> Result<()> {
    let cx = on_build(&outer, "build=old").await?;
    let events = cx.events().await?;
    let gate = cx.gate()?;
    let script = "trap 'echo end; exit 7' TERM; a=1; while :; do seq $a $((a+99)); a=$((a+100)); usleep 1000; done";
    let writer = cx.container(&["sh", "-c", script]).stdio(Stdio::OUTPUT).start().await?;
    let script = "stty -echo; echo ready; while read line; do echo \"got $line\"; done; exit 5";
    let terminal = cx.container(&["sh", "-c", script]).terminal().stdio(Stdio::ALL).start().await?;
    terminal.io.out().until("ready").await?;
    let paused = cx.container(&["sleep", "1000"]).start().await?;
    cx.client().pause(&paused.id).await?;
    let busy = Rc::new(cx.container(&["sleep", "1000"]).start().await?);
    let mut keepers = Vec::new();
    let mut waits = Vec::new();
    for container in [&writer, &terminal, &paused, &*busy] {
        keepers.push(cx.shim_pid(&container.id)?);
        for _ in 0..3 {
            let (client, id) = (cx.client().clone(), container.id.clone());
            waits.push(tokio::task::spawn_local(async move { Ok(client.wait_for_ever(&id, "").await?.into_inner().exit_status) }));
        }
    }
    let scene = Scene {
        cx: cx.clone(),
        gate,
        writer,
        terminal,
        paused,
        busy: Rc::clone(&busy),
        keepers,
        waits,
        lines: Cell::new(0),
        descriptors: Cell::new(0),
    };

    let stop = Rc::new(Cell::new(false));
    let execs = tokio::task::spawn_local(exec_until(Rc::clone(&busy), Rc::clone(&stop)));
    scene.holds("old").await?;
    scene.step("new", "build=new newest=2").await?.is_done()?;
    scene.holds("new").await?;
    scene.step("old", "build=old").await?.is_done()?;
    scene.holds("old").await?;
    scene.step("new", "build=next oldest=1 newest=3").await?.is_done()?;
    scene.holds("next").await?;
    let broken = scene.step("broken", "build=broken at=fit do=crash").await?;
    ensure!(broken.status == 1 && broken.report["summary"]["rolled-back"] == 5, "{broken:#?}");
    scene.holds("next").await?;
    scene.step("new", "build=newest").await?.is_done()?;
    scene.holds("newest").await?;
    stop.set(true);
    let execs = execs.await??;
    ensure!(execs > 5, "{execs} execs in all");

    let Scene { writer, terminal, paused, waits, lines, .. } = scene;
    writer.kill(15).await?;
    ensure!(writer.finish().await? == 7);
    is_numbered(&writer.io.out().to_end().await?)?;
    terminal.io.stdin().await?.write_all(&[4])?;
    ensure!(terminal.finish().await? == 5);
    let text = terminal.io.out().to_end().await?;
    let expected: String = (1..=lines.get()).map(|number| format!("got {number}\r\n")).collect();
    ensure!(text == format!("ready\r\n{expected}"), "{text:?}");
    cx.client().resume(&paused.id).await?;
    for container in [&paused, &*busy] {
        ensure!(container.destroy().await? == 137);
    }
    let mut statuses = Vec::new();
    for wait in waits {
        statuses.push(wait.await??);
    }
    ensure!(statuses == [7, 7, 7, 5, 5, 5, 137, 137, 137, 137, 137, 137], "{statuses:?}");
    let history = cx.history(&events, &writer.id).await?;
    ensure!(history == ["create", "start", "exit", "delete"], "{history:?}");
    let history = cx.history(&events, &paused.id).await?;
    ensure!(history == ["create", "start", "paused", "resumed", "exit", "delete"], "{history:?}");
    let history = cx.history(&events, &busy.id).await?;
    for (topic, count) in [("exec-added", execs), ("exec-started", execs), ("exit(", execs), ("exit", execs + 1)] {
        let found = history.iter().filter(|event| event.starts_with(topic)).count();
        ensure!(found == count, "{found} of {count} {topic}: {history:?}");
    }
    let log = cx.daemon().log();
    let lost: Vec<_> = log.lines().filter(|line| line.contains(&format!("msg=\"shim disconnected\" id={} ", writer.id))).collect();
    // once, when it was deleted
    ensure!(lost.len() <= 1, "a connection was lost: {lost:#?}");
    cx.leaves_nothing().await
}

impl Scene {
    /// Upgrades all shims to another build, with a Create in progress.
    async fn step(&self, name: &str, words: &str) -> Result<Upgraded> {
        let program = build(&self.cx, name, words)?;
        let before = self.gate.count("create");
        self.gate.hold("create")?;
        let builder = self.cx.container(&["sh", "-c", "exit 3"]).runtime_binary(&self.gate.binary());
        let create = tokio::task::spawn_local(builder.create());
        self.gate.held("create").await?;
        let upgraded = builds::upgrade(&self.cx, &program, &["--all"]).await;
        self.gate.release("create")?;
        let container = create.await?.context("a create over which the shim was upgraded")?;
        ensure!(self.gate.count("create") == before + 1, "{:?}", self.gate.calls());
        ensure!(container.run().await? == 3);
        let upgraded = upgraded?;
        eprintln!("{} {name}: {}", self.cx.suite(), upgraded.report["summary"]);
        Ok(upgraded)
    }

    /// Checks what must hold for every build.
    async fn holds(&self, name: &str) -> Result<()> {
        let shims = builds::ps(&self.cx, Path::new(self.cx.shim().binary.as_ref().context("ours")?)).await?;
        for (container, keeper) in [&self.writer, &self.terminal, &self.paused, &*self.busy].into_iter().zip(&self.keepers) {
            ensure!(self.cx.shim_pid(&container.id)? == *keeper, "another keeper");
            let shim = shims.iter().find(|shim| shim["group"] == *container.id).context("ps does not show a shim")?;
            ensure!(shim["keeper"]["build"] == name && shim["worker"]["build"] == name, "{shim:#}");
            let state = container.state().await?;
            let phase = if container.id == self.paused.id { Phase::Paused } else { Phase::Running };
            ensure!(state.pid == container.pid && state.status() == phase, "{state:?}");
        }
        let line = self.lines.get() + 1;
        self.lines.set(line);
        self.terminal.io.stdin().await?.write_all(format!("{line}\n").as_bytes())?;
        self.terminal.io.out().until(&format!("got {line}\r\n")).await?;
        self.terminal.resize(80, 24 + line).await?;
        let before = self.writer.io.out().count();
        eventually_true("numbers come", SOON, || self.writer.io.out().count() > before + 1000).await?;
        if name != "old" && self.descriptors.get() == 0 {
            self.descriptors.set(proc::fewest_open_files(self.keepers[2]).await?);
        }
        if self.descriptors.get() > 0 {
            eventually("as many descriptors as after the first upgrade", SOON, async || {
                let open = proc::open_files(self.keepers[2])?;
                ensure!(open.len() == self.descriptors.get(), "{open:#?}, there were {}", self.descriptors.get());
                Ok(())
            })
            .await?;
        }
        ensure!(self.waits.iter().all(|wait| !wait.is_finished()), "a wait has ended");
        Ok(())
    }
}

/// Runs one exec after the other; returns their number.
async fn exec_until(container: Rc<Container>, stop: Rc<Cell<bool>>) -> Result<usize> {
    let mut count = 0;
    while !stop.get() {
        count += 1;
        let exec = container.exec(&format!("e{count}"), &["sh", "-c", "echo hello; exit 4"]).stdio(Stdio::OUTPUT);
        let exec = exec.add().await.with_context(|| format!("add e{count}"))?;
        let status = exec.run().await.with_context(|| format!("run e{count}"))?;
        ensure!(status == 4 && exec.io.out().to_end().await? == "hello\n", "e{count}: {status}");
    }
    Ok(count)
}

/// Checks that no number is missing or repeated.
fn is_numbered(text: &str) -> Result<()> {
    let mut expected = 0u64;
    for line in text.lines().filter(|line| *line != "end") {
        expected += 1;
        ensure!(line == expected.to_string(), "{line:?} instead of {expected}");
    }
    ensure!(expected > 1000 && text.ends_with("end\n"), "{expected} numbers");
    Ok(())
}
