//! Clients that run out of patience, and ask again: nothing is done twice, nothing is refused that was done.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use containerd_shim_protos::api;
use protobuf::Message as _;
use shim_tests::bundle::leave;
use shim_tests::eventually::{SOON, a_second, eventually, eventually_true, within};
use shim_tests::stand::Stand;
use shim_tests::suite::Shim;
use shim_tests::task::V2;
use shim_tests::ttrpc::{CallError, Code, Frame, Wire, refusal};
use shim_tests::{isolation, proc};

pub(crate) async fn a_delete_that_was_given_up_is_answered_to_whoever_asks_again(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime())?;
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).runtime(&gate.binary()).run().await?;
    ensure!(container.task.wait("c1", "").await? == 3);
    gate.hold("delete")?;
    // with a deadline of its own, of which the shim is told
    let mut wire = Wire::connect(container.task.socket()).await?;
    let delete = api::DeleteRequest { id: "c1".to_owned(), ..Default::default() }.write_to_bytes()?;
    wire.send(&Frame::request_of_bytes(1, V2, "Delete", delete, Some(Duration::from_millis(200))).encode()).await?;
    gate.held("delete").await?;
    drop(wire);
    let second = container.task.delete_within("c1", "", Duration::from_millis(300)).await;
    ensure!(second == Err(CallError::Silent), "{second:?}");
    // what else is asked is answered
    container.task.state_within("c1", "", a_second()).await?;
    let task = container.task.clone();
    let third = tokio::spawn(async move { task.delete("c1", "").await });
    gate.release("delete")?;
    let deleted = within("the third Delete", SOON, third).await???;
    ensure!(deleted.exit_status == 3 && deleted.pid == container.pid, "{deleted:?}");
    // and one that comes when it is long done
    ensure!(container.task.delete("c1", "").await? == deleted);
    ensure!(gate.count("delete") == 1, "{:?}", gate.calls());
    let told = stand.containerd().events().of_until("c1", "delete").await?;
    ensure!(told == ["create", "start", "exit", "delete"], "{told:?}");
    leave(&container.task, container.shim_pid()?, "c1").await
}

pub(crate) async fn a_root_file_system_in_use_fails_delete_until_it_is_free(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).run().await?;
    ensure!(container.task.wait("c1", "").await? == 3);
    let rootfs = container.bundle.folder.join("rootfs");
    let mut holder = Command::new("/bin/sleep").arg("1000").current_dir(&rootfs).stdin(Stdio::null()).spawn()?;
    isolation::keep(holder.id());
    let mut answers = Vec::new();
    for _ in 0..2 {
        answers.push(container.task.delete("c1", "").await);
    }
    let state = container.task.state("c1", "").await;
    holder.kill()?;
    holder.wait()?;
    isolation::forget(holder.id());
    for answer in answers {
        let (code, message) = refusal(answer)?;
        ensure!(code == Code::FailedPrecondition && message.contains("rootfs"), "{code:?} {message}");
    }
    ensure!(state?.exit_status == 3, "it is still known");
    ensure!(container.task.delete("c1", "").await?.exit_status == 3);
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&rootfs.display().to_string()), "it is mounted");
    leave(&container.task, container.shim_pid()?, "c1").await
}

pub(crate) async fn delete_ends_a_create_that_is_under_way(stand: Stand) -> Result<()> {
    for after in [false, true] {
        let gate = stand.gate(&stand.runtime())?;
        let bundle = stand.bundle(if after { "c2" } else { "c1" }, &["sleep", "1000"]).runtime(&gate.binary());
        let task = bundle.shim().await?;
        if after {
            gate.hold_after("create")?
        } else {
            gate.hold("create")?
        }
        let create = task.connection().begin(V2, "Create", bundle.request().write_to_bytes()?).await?;
        gate.held("create").await?;
        let begin = Instant::now();
        ensure!(bundle.delete_command().await?.exit_status == 137);
        ensure!(begin.elapsed() < Duration::from_secs(5), "it took {:?}", begin.elapsed());
        let shim = bundle.shim_pid()?;
        // no answer: it left first
        if let Ok(frame) = within("the answer to Create", SOON, create).await? {
            drop(refusal(frame.answer())?);
        }
        eventually_true("the shim has left", SOON, || !proc::is_alive(shim)).await?;
        gate.release("create")?;
        eventually("nothing is left", SOON, async || {
            let left = stand.leftovers();
            ensure!(left.is_empty(), "after: {after}: {left:#?}");
            Ok(())
        })
        .await?;
    }
    Ok(())
}

/// The runtime takes its time over Start: the container can be looked at, killed and waited for meanwhile.
pub(crate) async fn a_start_that_takes_long_holds_up_nothing_else(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime())?;
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
    let told = stand.containerd().events().of_until("c1", "delete").await?;
    ensure!(told == ["create", "start", "exit", "delete"], "{told:?}");
    leave(task, container.shim_pid()?, "c1").await
}

/// What its client has given up before anybody could begin it is not done.
pub(crate) async fn a_request_whose_time_is_over_is_not_carried_out(stand: Stand) -> Result<()> {
    let program = stand.folder().join(stand.shim().binary_name());
    fs::copy(stand.binary(), &program)?;
    let stand = stand.with_shim(&Shim { binary: Some(program.clone()), ..stand.shim().clone() })?;
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let worker = container.worker_pid().await?;
    fs::set_permissions(&program, Permissions::from_mode(0o600))?;
    proc::kill_hard(worker);
    eventually_true("the worker is dead", SOON, || !proc::is_alive(worker)).await?;
    let mut wire = Wire::connect(container.task.socket()).await?;
    let kill = api::KillRequest { id: "c1".to_owned(), signal: 9, ..Default::default() }.write_to_bytes()?;
    let patience = Duration::from_millis(300);
    let begin = Instant::now();
    wire.send(&Frame::request_of_bytes(1, V2, "Kill", kill, Some(patience)).encode()).await?;
    tokio::time::sleep(patience * 2).await; // the client's time runs out
    fs::set_permissions(&program, Permissions::from_mode(0o755))?;
    let (code, message) = refusal(wire.answer(1).await?)?;
    ensure!(code == Code::DeadlineExceeded && begin.elapsed() > patience, "{code:?} {message}");
    let state = container.task.state("c1", "").await?;
    ensure!(state.status.value() == 2 && proc::is_alive(container.pid.cast_signed()), "{state:?}");
    container.shut_down().await?;
    stand.leaves_nothing().await
}
