//! Clients that time out and repeat a call: nothing is done twice, and a completed call is not refused.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use containerd_shim_protos::api;
use protobuf::Message as _;
use shim_tests::bundle::leave;
use shim_tests::eventually::{SOON, a_second, eventually, eventually_true};
use shim_tests::proc;
use shim_tests::programs;
use shim_tests::stand::Stand;
use shim_tests::suite::Shim;
use shim_tests::task::V2;
use shim_tests::ttrpc::{Code, Frame, Wire, refusal};

pub(crate) async fn concurrent_deletes_of_one_container_return_the_same_answer(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime())?;
    let container = stand.bundle("c1", &["sh", "-c", "exit 3"]).runtime(&gate.binary()).run().await?;
    ensure!(container.task.wait("c1", "").await? == 3);
    gate.hold("delete")?;
    let (one, other) = (container.task.clone(), container.task.another().await?);
    let one = tokio::spawn(async move { one.delete("c1", "").await });
    gate.held("delete").await?;
    let other = tokio::spawn(async move { other.delete("c1", "").await });
    // other calls are answered
    container.task.state_within("c1", "", a_second()).await?;
    gate.release("delete")?;
    let (one, other) = (one.await??, other.await??);
    // and a late one, long after the deletion
    let late = container.task.delete("c1", "").await?;
    ensure!(one == other && one == late && one.exit_status == 3, "{one}, {other}, {late}");
    ensure!(gate.count("delete") == 1, "{:?}", gate.calls());
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// As with the stock shim: see docs/limits.md.
pub(crate) async fn the_delete_of_a_deleted_exec_finds_nothing(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    ensure!(container.run("e", &["sh", "-c", "exit 3"]).await? == 3);
    for _ in 0..2 {
        ensure!(refusal(container.task.delete("c1", "e").await)?.0 == Code::NotFound);
        ensure!(refusal(container.task.state("c1", "e").await)?.0 == Code::NotFound);
    }
    container.shut_down().await.map(drop)
}

pub(crate) async fn delete_names_the_root_file_system_that_is_in_use(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["true"]).run().await?;
    container.task.wait("c1", "").await?;
    let rootfs = container.bundle.folder.join("rootfs");
    // other processes can exec it, and this one too
    let holder = fs::File::open(rootfs.join("bin"))?;
    for _ in 0..2 {
        let (code, message) = refusal(container.task.delete("c1", "").await)?;
        ensure!(code == Code::FailedPrecondition && message.contains("rootfs"), "{code:?} {message}");
    }
    drop(holder);
    // a child of another test may hold it for a moment more
    eventually("it is deleted", SOON, async || Ok(container.task.delete("c1", "").await?)).await?;
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// A call that the client gave up before the shim began it is not performed.
pub(crate) async fn a_request_whose_deadline_has_passed_is_not_carried_out(stand: Stand) -> Result<()> {
    let program = stand.folder().join(stand.shim().binary_name());
    programs::copy(stand.binary(), &program)?;
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
