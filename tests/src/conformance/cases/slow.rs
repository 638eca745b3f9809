//! OCI runtimes that are slow, fail or print a lot, and clients that give up.

use std::fs;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use containerd_shim_protos::api;
use protobuf::Message as _;
use tokio::task::JoinSet;

use crate::bundle::{Container, leave};
use crate::clauses;
use crate::conformance::Case;
use crate::eventually::{SOON, a_second, eventually, eventually_true, within};
use crate::gate::Gate;
use crate::stand::Stand;
use crate::task::Task;
use crate::times::{repeated, times};
use crate::ttrpc::{CallError, Code, Frame, Wire};
use crate::{isolation, proc};

pub(super) fn cases() -> Vec<Case> {
    clauses![slow:
        "H1" => a_slow_create_delays_no_sibling;
        "H2" => a_slow_start_delays_no_other_call;
        "H3" => a_delete_that_timed_out_can_be_repeated;
        "H4" => a_repeated_create_makes_one_container;
        "H5" => a_create_whose_client_disconnects_is_completed_or_undone;
        "H6" => a_root_file_system_in_use_fails_delete_until_it_is_free;
        "H7" => a_runtime_that_prints_a_megabyte_blocks_nothing;
        "H8" => a_slow_kill_delays_no_exit;
        "H9" => a_start_whose_client_disconnects_is_completed_or_undone;
        "H10" => a_delete_whose_client_disconnects_is_completed_or_undone;
        "H11" => hundreds_of_execs_delay_no_state;
        "H12" => a_kill_that_hangs_times_out_alone;
    ]
}

/// containerd gives State two seconds when it starts.
async fn a_slow_create_delays_no_sibling(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime_program()?)?;
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    gate.hold("create")?;
    let slow = stand.bundle("slow", &["sh", "-c", "exit 3"]).group("pod").runtime(&gate.binary());
    let task = anchor.task.another().await?;
    let create = tokio::spawn(async move { slow.create_in(&task).await });
    gate.held("create").await?;
    let (task, limit) = (anchor.task.another().await?, Duration::from_secs(2));
    let (begin, duration) = (Instant::now(), Duration::from_millis(500) * times());
    let asked = async {
        loop {
            let state = task.state_within("anchor", "", limit).await?;
            let pids = task.pids_within("anchor", limit).await?;
            task.connect_within("anchor", limit).await?;
            if begin.elapsed() > duration {
                return anyhow::Ok((state.pid, pids));
            }
        }
    };
    let asked = asked.await;
    gate.release("create")?;
    let slow = within("the slow Create", SOON, create).await???;
    slow.start().await?;
    ensure!(slow.finish().await? == 3);
    anchor.shut_down().await?;
    let (pid, pids) = asked?;
    ensure!(pid == anchor.pid && pids.contains(&anchor.pid));
    Ok(())
}

/// The OCI runtime is slow to start: State, Kill and Wait of the container work meanwhile.
async fn a_slow_start_delays_no_other_call(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime_program()?)?;
    let container = stand.bundle("c1", &["sleep", "1000"]).runtime(&gate.binary()).create().await?;
    gate.hold_after("start")?;
    let task = container.task.clone();
    let start = tokio::spawn(async move { task.start("c1", "").await });
    gate.held("start").await?;
    let (task, second) = (&container.task, a_second());
    task.state_within("c1", "", second).await?;
    ensure!(task.pids_within("c1", second).await?.contains(&container.pid));
    within("stats", second, task.stats("c1")).await??;
    within("update", second, task.update("c1", &serde_json::json!({}))).await??;
    let waiting = task.begin_wait("c1", "").await?;
    within("kill", second, task.kill("c1", "", 9)).await??;
    let pid = container.pid.cast_signed();
    eventually_true("it is dead", SOON, || !proc::is_alive(pid)).await?;
    ensure!(!start.is_finished());
    gate.release("start")?;
    // it had been started when it was killed
    within("start", SOON, start).await???;
    ensure!(waiting.status(SOON).await? == 137);
    task.delete("c1", "").await?;
    let published = stand.containerd().events().of_until("c1", "delete").await?;
    ensure!(published == ["create", "start", "exit", "delete"], "{published:?}");
    leave(task, container.shim_pid()?, "c1").await
}

/// The first Delete's client disconnects, the second one times out, a third one gets the answer.
async fn a_delete_that_timed_out_can_be_repeated(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime_program()?)?;
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).runtime(&gate.binary()).run().await?;
    ensure!(container.task.wait("c1", "").await? == 3);
    gate.hold("delete")?;
    // with a deadline that the request carries
    let mut wire = Wire::connect(container.task.socket()).await?;
    let delete = api::DeleteRequest { id: "c1".to_owned(), ..Default::default() }.write_to_bytes()?;
    wire.send(&Frame::request_of_bytes(1, container.task.service_name(), "Delete", delete, Some(Duration::from_millis(200))).encode())
        .await?;
    gate.held("delete").await?;
    drop(wire);
    let second = container.task.delete_within("c1", "", Duration::from_millis(300)).await;
    let task = container.task.clone();
    let third = tokio::spawn(async move { task.delete("c1", "").await });
    gate.release("delete")?;
    let deleted = within("the third Delete", SOON, third).await??;
    ensure!(second == Err(CallError::Silent) || second.is_err(), "{second:?}");
    let deleted = deleted?;
    ensure!(deleted.exit_status == 3 && deleted.pid == container.pid, "{deleted}");
    let published = stand.containerd().events().of_until("c1", "delete").await?;
    ensure!(published == ["create", "start", "exit", "delete"], "{published:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// The daemon crashes in the middle of Create and repeats it after its restart.
async fn a_repeated_create_makes_one_container(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime_program()?)?;
    let bundle = stand.bundle("c1", &["sleep", "1000"]).runtime(&gate.binary());
    let task = bundle.shim().await?;
    gate.hold("create")?;
    let first = task.connection().begin(task.service_name(), "Create", bundle.request().write_to_bytes()?).await?;
    gate.held("create").await?;
    let socket = task.socket().to_owned();
    drop((first, task));
    let task = Task::connect(&socket).await?;
    let second = tokio::spawn({
        let (task, request) = (task.clone(), bundle.request());
        async move { task.create(&request).await }
    });
    gate.release("create")?;
    let second = within("a second Create", SOON, second).await??;
    // one of the two Creates has succeeded, or both were undone and it can be created
    let pid = match second {
        Ok(pid) => pid,
        Err(_) => match eventually("the first one is there", SOON, async || Ok(task.state("c1", "").await?)).await {
            Ok(state) => state.pid,
            Err(_) => task.create(&bundle.request()).await?,
        },
    };
    let started = task.start("c1", "").await;
    ensure!(started == Ok(pid), "not the one that was made, {pid}, is started: {started:?}");
    task.kill("c1", "", 9).await?;
    ensure!(task.wait("c1", "").await? == 137);
    task.delete("c1", "").await?;
    leave(&task, bundle.shim_pid()?, "c1").await
}

/// Afterwards it exists, or its id is free.
async fn a_create_whose_client_disconnects_is_completed_or_undone(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime_program()?)?;
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    let task = &anchor.task;
    for (id, hold) in MOMENTS {
        let bundle = stand.bundle(id, &["sleep", "1000"]).group("pod").runtime(&gate.binary());
        bundle.write()?;
        hold(&gate, "create")?;
        leave_during(&gate, "create", task, "Create", bundle.request().write_to_bytes()?).await?;
        eventually("it is there, or can be made", SOON, async || {
            if task.state(id, "").await.is_err() {
                task.create(&bundle.request()).await?;
            }
            Ok(())
        })
        .await
        .with_context(|| format!("the client left {id} it was done"))?;
        task.start(id, "").await?;
        task.kill(id, "", 9).await?;
        ensure!(task.wait(id, "").await? == 137);
        task.delete(id, "").await?;
    }
    anchor.shut_down().await.map(drop)
}

/// The container runs, or can be started.
async fn a_start_whose_client_disconnects_is_completed_or_undone(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime_program()?)?;
    for (id, hold) in MOMENTS {
        let container = stand.bundle(id, &["sleep", "1000"]).runtime(&gate.binary()).create().await?;
        let task = &container.task;
        let request = api::StartRequest { id: id.to_owned(), ..Default::default() };
        hold(&gate, "start")?;
        leave_during(&gate, "start", task, "Start", request.write_to_bytes()?).await?;
        eventually("it runs, or can be started", SOON, async || {
            if task.state(id, "").await?.status.enum_value() != Ok(api::Status::RUNNING) {
                task.start(id, "").await?;
            }
            Ok(())
        })
        .await
        .with_context(|| format!("the client left {id} it was done"))?;
        task.kill(id, "", 9).await?;
        ensure!(task.wait(id, "").await? == 137);
        task.delete(id, "").await?;
        let published = stand.containerd().events().of_until(id, "delete").await?;
        ensure!(published == ["create", "start", "exit", "delete"], "{published:?}");
        leave(task, container.shim_pid()?, id).await?;
    }
    Ok(())
}

/// The task is gone, or can be deleted.
async fn a_delete_whose_client_disconnects_is_completed_or_undone(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime_program()?)?;
    for (id, hold) in MOMENTS {
        let container = stand.bundle(id, &["sh", "-c", "exit 3"]).runtime(&gate.binary()).run().await?;
        let task = &container.task;
        ensure!(task.wait(id, "").await? == 3);
        let request = api::DeleteRequest { id: id.to_owned(), ..Default::default() };
        hold(&gate, "delete")?;
        leave_during(&gate, "delete", task, "Delete", request.write_to_bytes()?).await?;
        eventually("it is gone, or can be deleted", SOON, async || match task.delete(id, "").await {
            Ok(deleted) if deleted.exit_status != 3 => Err(anyhow!("{deleted}")),
            Err(error) if error.code() != Some(Code::NotFound) => Err(error.into()),
            _ => Ok(()),
        })
        .await
        .with_context(|| format!("the client left {id} it was done"))?;
        let published = stand.containerd().events().of_until(id, "delete").await?;
        ensure!(published == ["create", "start", "exit", "delete"], "{published:?}");
        leave(task, container.shim_pid()?, id).await?;
    }
    Ok(())
}

type Hold = fn(&Gate, &str) -> Result<()>;

/// When the client disconnects: before the OCI runtime has started, and when it has just exited.
const MOMENTS: [(&str, Hold); 2] = [("before", Gate::hold), ("after", Gate::hold_after)];

/// Calls a method, closes the connection while the OCI runtime is held at `verb`, and then releases it.
async fn leave_during(gate: &Gate, verb: &str, task: &Task, method: &str, request: Vec<u8>) -> Result<()> {
    let leaver = task.another().await?;
    let call = leaver.connection().begin(leaver.service_name(), method, request).await?;
    let runtime = gate.held(verb).await?;
    drop((call, leaver));
    // a shim that kills its runtime because of that does so immediately
    let _carried_on = eventually_true("the runtime is ended", AT_ONCE, || !proc::is_alive(runtime)).await;
    gate.release(verb)
}

async fn a_root_file_system_in_use_fails_delete_until_it_is_free(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).run().await?;
    ensure!(container.task.wait("c1", "").await? == 3);
    let rootfs = container.bundle.folder.join("rootfs");
    let mut holder = Command::new("/bin/sleep").arg("1000").current_dir(&rootfs).stdin(Stdio::null()).spawn()?;
    isolation::keep(holder.id());
    let first = container.task.delete("c1", "").await;
    let state = container.task.state("c1", "").await;
    holder.kill()?;
    holder.wait()?;
    isolation::forget(holder.id());
    if first.is_err() {
        ensure!(state?.exit_status == 3, "it is not known any more");
        ensure!(container.task.delete("c1", "").await?.exit_status == 3);
    }
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&rootfs.display().to_string()), "it is mounted");
    leave(&container.task, container.shim_pid()?, "c1").await
}

async fn a_runtime_that_prints_a_megabyte_blocks_nothing(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime_program()?)?;
    for verb in ["create", "start", "exec", "kill", "delete"] {
        gate.flood(verb, 1 << 20)?;
    }
    let container = within("run", SOON, stand.bundle("c1", &["sleep", "1000"]).runtime(&gate.binary()).run()).await??;
    ensure!(within("exec", SOON, container.run("e", &["sh", "-c", "exit 4"])).await?? == 4);
    ensure!(within("the end", SOON, container.shut_down()).await?? == 137);
    Ok(())
}

/// A Kill with `all` with a slow OCI runtime, while dozens of processes exit.
async fn a_slow_kill_delays_no_exit(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime_program()?)?;
    let container =
        stand.bundle("c1", &["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.1; done"]).runtime(&gate.binary()).run().await?;
    gate.hold("kill")?;
    let request = api::KillRequest { id: "c1".into(), signal: 15, all: true, ..Default::default() };
    let task = container.task.another().await?;
    let kill = tokio::spawn(async move { task.call::<api::Empty>("Kill", &request, SOON * 3).await });
    let held = gate.held("kill").await;
    let total = repeated(100);
    for number in 0..total {
        ensure!(within("an exec", SOON, container.run(&format!("e{number}"), &["true"])).await?? == 0);
    }
    let exits = || stand.containerd().events().of("c1").iter().filter(|event| event.starts_with("exit")).count();
    eventually("every exit is published", SOON, async || {
        ensure!(exits() == total, "{}", exits());
        Ok(())
    })
    .await?;
    gate.release("kill")?;
    kill.await??;
    // a shim that needs no runtime for a signal is not affected
    drop(held);
    let status = container.finish().await?;
    ensure!([7, 143].contains(&status), "{status}");
    stand.containerd().events().of_until("c1", "delete").await?;
    ensure!(exits() == total + 1, "{}", exits());
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// All probes of a node at once, round after round, while a client calls State.
async fn hundreds_of_execs_delay_no_state(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let (at_once, rounds) = (repeated(100).min(500), 2.max(repeated(1)));
    let (task, over) = (container.task.another().await?, Arc::new(AtomicBool::new(false)));
    let watchdog = tokio::spawn({
        let over = Arc::clone(&over);
        async move {
            let (mut asked, mut longest) = (0_u32, Duration::ZERO);
            while !over.load(Ordering::Relaxed) {
                let begin = Instant::now();
                task.state_within("c1", "", a_second() * 2)
                    .await
                    .with_context(|| format!("State, after {asked} that took {longest:?} at most"))?;
                (asked, longest) = (asked + 1, longest.max(begin.elapsed()));
                tokio::time::sleep(Duration::from_millis(10)).await; // the polling interval
            }
            anyhow::Ok(asked)
        }
    });
    let storm = storm(&container, at_once, rounds).await;
    over.store(true, Ordering::Relaxed);
    let asked = watchdog.await??;
    storm?;
    ensure!(asked > 10, "State was answered {asked} times only");
    ensure!(container.destroy().await? == 137);
    stand.containerd().events().of_until("c1", "delete").await?;
    let exits = stand.containerd().events().of("c1").iter().filter(|event| event.starts_with("exit")).count();
    ensure!(exits == at_once * rounds + 1, "{exits}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// That many execs concurrently, repeated as soon as the last one has exited.
async fn storm(container: &Container, at_once: usize, rounds: usize) -> Result<()> {
    for round in 0..rounds {
        let mut execs = JoinSet::new();
        for number in 0..at_once {
            let (task, request) =
                (container.task.clone(), container.bundle.exec_request(&format!("e{round}-{number}"), &["sh", "-c", "exit 4"]));
            execs.spawn(async move {
                let exec = request.exec_id.as_str();
                task.exec(&request).await?;
                // the execs have to wait for each other
                task.call::<api::StartResponse>("Start", &start("c1", exec), SOON * 12).await?;
                let status = task.wait("c1", exec).await?;
                task.delete("c1", exec).await?;
                anyhow::Ok(status)
            });
        }
        while let Some(status) = execs.join_next().await {
            let status = status??;
            ensure!(status == 4, "{status}");
        }
    }
    Ok(())
}

fn start(id: &str, exec: &str) -> api::StartRequest {
    api::StartRequest { id: id.to_owned(), exec_id: exec.to_owned(), ..Default::default() }
}

/// The OCI runtime never returns from a signal, as with a process in an uninterruptible sleep.
async fn a_kill_that_hangs_times_out_alone(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime_program()?)?;
    let anchor = stand.bundle("anchor", &["sleep", "1000"]).group("pod").run().await?;
    let stuck = stand.bundle("stuck", &["sh", "-c", "trap '' TERM; sleep 1000"]).group("pod").runtime(&gate.binary());
    let stuck = stuck.run_in(&anchor.task).await?;
    // until then the process is the OCI runtime's, which may handle the signal
    let is_itself =
        |container: &Container| proc::Process::read(container.pid.cast_signed()).is_ok_and(|init| init.command.ends_with("sleep 1000"));
    eventually_true("both run their programs", SOON, || is_itself(&stuck) && is_itself(&anchor)).await?;
    gate.hold("kill")?;
    let mut kills = Vec::new();
    for all in [false, true] {
        let request = api::KillRequest { id: "stuck".into(), signal: 15, all, ..Default::default() };
        let task = anchor.task.another().await?;
        kills.push(tokio::spawn(async move { task.call::<api::Empty>("Kill", &request, Duration::from_secs(1)).await }));
    }
    let (task, limit) = (anchor.task.another().await?, Duration::from_secs(2));
    let looked_at = async {
        for id in ["stuck", "anchor"] {
            task.state_within(id, "", limit).await.with_context(|| format!("State of {id}"))?;
        }
        anyhow::Ok(())
    };
    let asked = async {
        looked_at.await?;
        task.connect_within("stuck", limit).await.context("Connect of the one that hangs")?;
        task.pids_within("anchor", limit).await.context("Pids of the other")?;
        ensure!(anchor.run("e", &["sh", "-c", "exit 4"]).await? == 4, "an exec of the other");
        within("Kill of the other", limit, task.kill("anchor", "", 15)).await?.context("Kill of the other")
    };
    let asked = asked.await;
    for kill in kills {
        match kill.await? {
            // a shim that needs no runtime for a signal has sent it
            Ok(_) | Err(CallError::Silent) => {}
            Err(error) => return Err(error.into()),
        }
    }
    gate.release("kill")?;
    asked?;
    ensure!(stuck.destroy().await? == 137);
    let status = anchor.destroy().await?;
    ensure!([137, 143].contains(&status), "{status}");
    leave(&anchor.task, anchor.shim_pid()?, "anchor").await
}

/// Longer than a shim needs to notice a closed connection.
const AT_ONCE: Duration = Duration::from_millis(100);
