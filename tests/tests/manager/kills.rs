//! SIGKILL at random instants of a daemon under load: acknowledged calls survive, and no exit is lost or published twice.
//!
//! Known deviations of stock shims after a daemon's crash are allowed: clauses H3, H9 and H10 of docs/protocol.md.

use std::cell::Cell;
use std::process::Command;
use std::rc::Rc;
use std::time::{Duration, Instant};
use std::{env, fs};

use anyhow::{Context as _, Result, bail, ensure};
use containerd_client::types::v1::Status as Phase;
use shim_tests::container::{Container, Stdio};
use shim_tests::context::Context;
use shim_tests::dice::Dice;
use shim_tests::events::{Event, Events};
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::{proc, suite};
use tokio::task::{JoinSet, LocalSet};
use tonic::{Code, Status};

use crate::pod::Pod;

/// `X_KILLS` crashes, 25 without it.
fn kills() -> u64 {
    number("X_KILLS").unwrap_or(25)
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok().and_then(|text| text.parse().ok())
}

/// Two seconds for each, and a minute.
pub(crate) fn deadline() -> Duration {
    Duration::from_secs(60 + 2 * kills())
}

pub(crate) async fn random_kills_of_the_daemon_lose_nothing(cx: Context) -> Result<()> {
    let seed = number("X_SEED").unwrap_or(1);
    let stock = "io.containerd.runc.v2".to_owned();
    // stock shims deviate when a connection breaks: they are for long runs
    let stock = number("X_KILLS").map(|_kills| stock);
    let runtimes: Vec<_> = [cx.shim().runtime_type.clone()].into_iter().chain(stock).collect();
    for runtime in &runtimes {
        let cx = cx.with_own_daemon().await?;
        campaign(&cx, runtime, kills() / runtimes.len() as u64, seed, false).await.with_context(|| format!("{runtime}, X_SEED={seed}"))?;
        eventually("nothing is left behind", SOON, async || cx.leaves_nothing().await).await?;
    }
    Ok(())
}

/// Each container is in a sandbox of its own, and workers of their shims are killed too. Without `X_KILLS`, there are half as many crashes.
pub(crate) async fn random_kills_of_the_daemon_and_of_workers_lose_no_sandbox(cx: Context) -> Result<()> {
    let seed = number("X_SEED").unwrap_or(1);
    let cx = cx.with_own_daemon().await?;
    let runtime = cx.shim().runtime_type.clone();
    let crashes = number("X_KILLS").unwrap_or(kills() / 2);
    campaign(&cx, &runtime, crashes, seed, true).await.with_context(|| format!("X_SEED={seed}"))?;
    eventually("nothing is left behind", SOON, async || cx.leaves_nothing().await).await
}

async fn campaign(cx: &Context, runtime: &str, crashes: u64, seed: u64, has_sandboxes: bool) -> Result<()> {
    let events = cx.events().await?;
    let pod = Pod::new(cx, "steady-pod");
    let mut steady = cx.container(&["sleep", "1000"]).id("steady").runtime_type(runtime);
    let mut holder = None;
    if has_sandboxes {
        holder = Some(pod.run().await?.pid);
        steady = steady.sandbox(&pod.id);
    }
    let steady = steady.start().await?;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let tally = Rc::new(Tally::default());
    let local = LocalSet::new();
    local
        .run_until(async {
            let mut lanes = JoinSet::new();
            for lane in 0..LANES {
                let (cx, runtime, events, tally) = (cx.clone(), runtime.to_owned(), events.clone(), Rc::clone(&tally));
                let lane = Lane { cx, runtime, events, tally, number: lane, has_sandboxes };
                lanes.spawn_local(lane.run(stopped.clone()));
            }
            let mut dice = Dice::new(seed);
            for _crash in 0..crashes {
                tokio::time::sleep(Duration::from_millis(dice.below(400))).await;
                if has_sandboxes {
                    kill_a_worker(cx, &mut dice);
                }
                tally.crashes.set(tally.crashes.get() + 1);
                cx.daemon().kill()?;
                store_is_sound(cx).await?;
                cx.revive_daemon().await?;
                events.resubscribe(cx.client()).await?;
                tally.revivals.set(tally.revivals.get() + 1);
                let state = steady.state().await?;
                ensure!(state.status() == Phase::Running && state.pid == steady.pid, "{state:?}");
                if let Some(holder) = holder {
                    let status = pod.status().await?;
                    ensure!(status.state == "SANDBOX_READY" && status.pid == holder, "{status:?}");
                }
                if let Some(ended) = lanes.try_join_next() {
                    ended??;
                    bail!("a lane ended early");
                }
            }
            stop.send_replace(true);
            let mut rounds = 0;
            while let Some(lane) = lanes.join_next().await {
                rounds += lane??;
            }
            ensure!(rounds > 0, "no lane has finished a round");
            let Tally { crashes, received, missed, .. } = &*tally;
            eprintln!(
                "{} {runtime}: seed {seed}, {} crashes, a sound store after each, {rounds} containers; of {} exits {} were received once, and over {} the subscriber's \
                 daemon died",
                cx.suite(),
                crashes.get(),
                received.get() + missed.get(),
                received.get(),
                missed.get()
            );
            Ok(())
        })
        .await?;
    ensure!(steady.destroy().await? == 137);
    if has_sandboxes {
        pod.remove().await?;
    }
    Ok(())
}

/// The shim starts another one.
fn kill_a_worker(cx: &Context, dice: &mut Dice) {
    let is_worker = |child: &proc::Process| child.command.split(' ').any(|word| word == "worker");
    let workers: Vec<_> = cx.shims().iter().flat_map(|shim| proc::children(shim.pid)).filter(is_worker).collect();
    if !workers.is_empty() {
        proc::kill_hard(workers[dice.below(workers.len() as u64) as usize].pid);
    }
}

/// Checks that `x-manager check` accepts the store of a killed daemon.
pub(crate) async fn store_is_sound(cx: &Context) -> Result<()> {
    let manager = suite::manager().context("x-manager is under test")?;
    let root = cx.daemon().folder().join("root");
    let output = tokio::task::spawn_blocking(move || Command::new(manager).arg("--root").arg(root).arg("check").output()).await??;
    ensure!(output.status.success(), "check: {} {}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Counters of the run so far.
#[derive(Default)]
struct Tally {
    /// Of the daemon.
    crashes: Cell<u64>,
    /// How often the client has subscribed again after a crash.
    revivals: Cell<u64>,
    /// Exits that the subscriber received.
    received: Cell<u64>,
    /// Exits that no subscriber received, because it lost its connection meanwhile.
    missed: Cell<u64>,
}

impl Tally {
    /// How many crashes there were, if a subscription is in place.
    fn quiet(&self) -> Option<u64> {
        (self.crashes == self.revivals).then_some(self.crashes.get())
    }
}

/// A client that runs one container after the other and checks what the daemon acknowledges.
struct Lane {
    cx: Context,
    runtime: String,
    events: Events,
    tally: Rc<Tally>,
    number: u64,
    /// Whether each container is in a sandbox of its own.
    has_sandboxes: bool,
}

impl Lane {
    async fn run(self, stop: tokio::sync::watch::Receiver<bool>) -> Result<u64> {
        let mut rounds = 0;
        while !*stop.borrow() {
            let id = format!("l{}r{rounds}", self.number);
            let pod = Pod::new(&self.cx, &format!("{id}-pod"));
            if self.has_sandboxes {
                run_pod(&pod).await.with_context(|| pod.id.clone())?;
            }
            self.round(&id, u32::try_from(rounds % 90)?, &pod).await.with_context(|| format!("container {id}"))?;
            if self.has_sandboxes {
                end_pod(&pod).await.with_context(|| pod.id.clone())?;
            }
            rounds += 1;
        }
        Ok(rounds)
    }

    async fn round(&self, id: &str, status: u32, pod: &Pod<'_>) -> Result<()> {
        let client = self.cx.client();
        let script = format!("read go; exit {status}");
        let build = || {
            let container = self.cx.container(&["sh", "-c", &script]).id(id).runtime_type(&self.runtime).stdio(Stdio::ALL);
            if self.has_sandboxes { container.sandbox(&pod.id) } else { container }
        };
        // metadata is created once, with or without an answer
        again(async || unless(build().metadata().await.map(drop).map_err(as_status), Code::AlreadyExists)).await?;
        // an unacknowledged task may exist or not; if it exists it must be whole
        let mut silences = 0;
        let container = loop {
            match build().create_task().await {
                Ok(container) => break Some(container),
                Err(error) => {
                    let status = as_status(error);
                    if status.code() == Code::AlreadyExists {
                        let state = again(async || client.state(id, "").await).await;
                        match state.map(|state| state.status()) {
                            Ok(Phase::Created) => break None,
                            Ok(Phase::Unknown) if !self.is_ours() => silences += 1,
                            _ => silences = 0,
                        }
                        if silences == 3 {
                            self.end_stock_shim(id);
                        }
                    } else if !is_a_crash(&status) {
                        bail!("create: {status:?}");
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        };
        self.acknowledged(id, "created").await?;
        let container = match container {
            Some(container) => container,
            // its fifos are those of the attempt that got no answer; the container is ended as it is
            None => {
                self.delete(id, None).await?;
                return Ok(again(async || unless(client.delete_container(id).await, Code::NotFound)).await?);
            }
        };
        if !self.start(id, "").await? {
            let (init, cgroup) = (container.pid.cast_signed(), self.cx.cgroup_path(id));
            // if it has failed already, the pid may have been reused
            if fs::read_to_string(format!("/proc/{init}/cgroup")).is_ok_and(|cgroups| cgroups.lines().any(|line| line.ends_with(&cgroup))) {
                proc::kill_hard(init);
            }
            self.delete(id, None).await?;
            return Ok(again(async || unless(client.delete_container(id).await, Code::NotFound)).await?);
        }
        if let Err(error) = self.exec(&container, status + 100).await {
            return Err(error.context(format!("exec; init: {:?}; published: {:?}", container.state().await, self.events.of(id))));
        }
        let quiet = self.tally.quiet();
        container.io.stdin().await?.write_all(b"go\n")?;
        let waited = again(async || client.wait(id, "").await).await.context("wait")?;
        ensure!(waited.exit_status == status, "wait: {waited:?}");
        self.acknowledged(id, "ended").await?;
        self.delete(id, Some(status)).await?;
        again(async || unless(client.delete_container(id).await, Code::NotFound)).await.context("delete container")?;
        self.is_published_once(id, "", status, container.pid, quiet).await
    }

    /// Runs an exec. One whose start was interrupted is deleted: the stock shim cannot start it again.
    async fn exec(&self, container: &Container, status: u32) -> Result<()> {
        let (client, id) = (self.cx.client(), &container.id);
        for number in 0.. {
            let name = format!("e{number}");
            let build = || container.exec(&name, &["sh", "-c", &format!("exit {status}")]);
            again(async || unless(build().add().await.map(drop).map_err(as_status), Code::AlreadyExists)).await?;
            let quiet = self.tally.quiet();
            let started = self.start(id, &name).await?;
            if started {
                let waited = again(async || client.wait(id, &name).await).await?;
                ensure!(waited.exit_status == status, "{waited:?}");
            }
            // an interrupted start may still be in progress
            let delete = async || Ok(again(async || unless(client.delete_exec(id, &name).await.map(drop), Code::NotFound)).await?);
            if started {
                delete().await?
            } else {
                eventually(format!("{name} is deleted"), SOON, delete).await?
            }
            if started {
                return self.is_published_once(id, &name, status, 0, quiet).await;
            }
        }
        Ok(())
    }

    /// Checks that no process has two published exits, and that the exit of `pid`, if known, has the right status. An unacknowledged creation
    /// may have exited under the same id. The exit must be published unless the daemon has crashed more often than `quiet` says.
    async fn is_published_once(&self, id: &str, exec: &str, status: u32, pid: u32, quiet: Option<u64>) -> Result<()> {
        let is_it = |exit: &Event| exit.status == status && (pid == 0 || exit.pid == pid);
        let received = || self.events.exits(id, exec).iter().any(is_it);
        let has_died = || quiet.is_none() || quiet != self.tally.quiet();
        eventually_true(format!("the exit of {id}/{exec} is published"), SOON, || received() || has_died()).await?;
        let counter = if received() { &self.tally.received } else { &self.tally.missed };
        counter.set(counter.get() + 1);
        let exits = self.events.exits(id, exec);
        let of_one_pid = |pid: u32| exits.iter().filter(|exit| exit.pid == pid).count();
        ensure!(exits.iter().all(|exit| of_one_pid(exit.pid) == 1), "published twice: {exits:?}");
        let right = |exit: &Event| exit.status == status || (pid != 0 && exit.pid != pid);
        ensure!(exits.iter().all(right), "not {status}: {exits:?}");
        Ok(())
    }

    /// A stock shim whose Create was interrupted may wait for ever for output of its runtime, which the killed runtime's child holds, and answers no
    /// calls meanwhile: the test has to kill it.
    fn end_stock_shim(&self, id: &str) {
        let namespace = self.cx.client().namespace();
        for shim in proc::all().into_values().filter(|process| process.command.contains("containerd-shim-runc-v2")) {
            if [namespace, id].iter().all(|word| shim.command.split(' ').any(|argument| argument == *word)) {
                proc::kill_hard(shim.pid);
            }
        }
    }

    /// Starts a process. False if an attempt was interrupted under a stock shim, which kills `runc start` when the daemon's connection closes: then init
    /// waits for ever, fails with status 1, or runs while its shim reports it as created. An exec may not have started.
    async fn start(&self, id: &str, exec: &str) -> Result<bool> {
        let client = self.cx.client();
        loop {
            match client.start(id, exec).await {
                Err(status) if is_a_crash(&status) && exec.is_empty() && !self.is_ours() => return Ok(false),
                Err(status) if is_a_crash(&status) => {}
                answer => return answer.map(|_pid| true).with_context(|| format!("start {exec:?}")),
            }
            let begun = eventually("it has started", Duration::from_secs(2), async || {
                let state = again(async || client.state(id, exec).await).await?;
                // a stock shim does not answer while it starts a process
                ensure!(![Phase::Created, Phase::Unknown].contains(&state.status()), "{state:?}");
                Ok(())
            });
            match begun.await {
                Ok(()) => return Ok(true),
                Err(error) if error.chain().any(|cause| cause.is::<Status>()) => return Err(error),
                Err(_still_created) if exec.is_empty() => {}
                Err(_still_created) => return Ok(false),
            }
        }
    }

    /// Deletes the task, which must report `status` unless that is unknown; the task may be gone only if an earlier attempt got no answer.
    /// The stock shim kills `crun delete` when the daemon's connection closes, and can then never delete: the test has to kill the shim.
    async fn delete(&self, id: &str, status: Option<u32>) -> Result<()> {
        let (client, begin) = (self.cx.client(), Instant::now());
        let mut is_cut_off = false;
        loop {
            match client.delete(id).await {
                Ok(deleted) => {
                    ensure!(status.is_none_or(|status| status == deleted.exit_status), "delete: {deleted:?}");
                    return Ok(());
                }
                Err(status) if is_a_crash(&status) => is_cut_off = true,
                Err(answer) if (is_cut_off || status.is_none()) && answer.code() == Code::NotFound => return Ok(()),
                Err(status) if is_cut_off && !self.is_ours() && status.message().contains("cannot open directory") => {
                    self.end_stock_shim(id)
                }
                // the exit after the kill may not be processed yet
                Err(answer) if status.is_none() && !self.is_ours() && is_running(&answer) && begin.elapsed() < SOON => {}
                Err(status) => bail!("delete: {status:?}"),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    fn is_ours(&self) -> bool {
        self.runtime == self.cx.shim().runtime_type
    }

    /// Checks that acknowledged changes exist.
    async fn acknowledged(&self, id: &str, what: &str) -> Result<()> {
        let client = self.cx.client();
        let state = again(async || client.state(id, "").await).await.with_context(|| format!("{what}, but not found"))?;
        let expected = if what == "ended" { Phase::Stopped } else { Phase::Created };
        ensure!(state.status() == expected, "{what}: {state:?}");
        Ok(())
    }
}

/// Makes a sandbox, and checks that it is there after each answer.
async fn run_pod(pod: &Pod<'_>) -> Result<()> {
    again(async || unless(pod.store(pod.record()).await.map(drop), Code::AlreadyExists)).await.context("record")?;
    again(async || unless(pod.create().await, Code::AlreadyExists)).await.context("create")?;
    let created = again(async || pod.status().await).await?;
    ensure!(!created.state.is_empty(), "created, but {created:?}");
    // one that was cut off may have had its effect
    let started = again(async || pod.start().await).await;
    let ready = again(async || pod.status().await).await?;
    ensure!(ready.state == "SANDBOX_READY", "start: {started:?}, then {ready:?}");
    Ok(())
}

/// Removes a sandbox, and checks that it is gone after each answer.
async fn end_pod(pod: &Pod<'_>) -> Result<()> {
    again(async || pod.stop().await).await.context("stop")?;
    let stopped = again(async || pod.status().await).await?;
    ensure!(stopped.state == "SANDBOX_NOTREADY", "stopped, but {stopped:?}");
    again(async || unless(pod.shut_down().await, Code::NotFound)).await.context("shutdown")?;
    again(async || unless(pod.forget().await, Code::NotFound)).await.context("delete")?;
    let found = again(async || pod.get().await).await;
    ensure!(found.as_ref().is_err_and(|status| status.code() == Code::NotFound), "deleted, but {found:?}");
    Ok(())
}

/// Repeats a call until it gets an answer not caused by the daemon's crash.
async fn again<T>(mut call: impl AsyncFnMut() -> Result<T, Status>) -> Result<T, Status> {
    loop {
        match call().await {
            Err(status) if is_a_crash(&status) => tokio::time::sleep(PAUSE).await,
            answer => return answer,
        }
    }
}

fn unless(answer: Result<(), Status>, code: Code) -> Result<(), Status> {
    answer.or_else(|status| if status.code() == code { Ok(()) } else { Err(status) })
}

/// Whether a stock shim refuses to delete because it takes the process for alive.
fn is_running(status: &Status) -> bool {
    ["running", "stopped"].iter().any(|word| status.message().contains(word))
}

pub(crate) fn is_a_crash(status: &Status) -> bool {
    // tonic reports Unknown for a connection that breaks in the middle of an answer
    let is_of_the_connection =
        status.code() == Code::Unknown && ["transport", "h2", "broken", "connection"].iter().any(|word| status.message().contains(word));
    matches!(status.code(), Code::Unavailable | Code::Cancelled) || is_of_the_connection
}

fn as_status(error: anyhow::Error) -> Status {
    match error.downcast::<Status>() {
        Ok(status) => status,
        Err(error) => Status::internal(format!("{error:#}")),
    }
}

const LANES: u64 = 3;
const PAUSE: Duration = Duration::from_millis(10);
