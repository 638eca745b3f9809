//! Create, start, exit, delete.

use anyhow::{Result, ensure};
use containerd_client::types::v1::Status as Phase;
use shim_tests::container::Stdio;
use shim_tests::context::Context;

pub(crate) async fn the_exit_code_is_the_same_in_wait_state_delete_and_event(cx: Context) -> Result<()> {
    let events = cx.events().await?;
    for status in [0, 3, 255] {
        let container = cx.container(&["sh", "-c", &format!("exit {status}")]).start().await?;
        ensure!(container.wait().await? == status);
        let state = container.phase(Phase::Stopped).await?;
        ensure!(state.exit_status == status, "{state:?}");
        ensure!(state.pid == container.pid, "{state:?}");
        let deleted = container.delete().await?;
        ensure!(deleted.exit_status == status && deleted.pid == container.pid, "{deleted:?}");
        events.of_until(&container.id, "delete").await?;
        let exits = events.exits(&container.id, "");
        ensure!(exits.len() == 1 && exits[0].status == status && exits[0].pid == container.pid, "{exits:?}");
    }
    Ok(())
}

pub(crate) async fn events_come_in_order_and_once(cx: Context) -> Result<()> {
    let events = cx.events().await?;
    let container = cx.container(&["echo", "hello"]).stdio(Stdio::OUTPUT).start().await?;
    ensure!(container.finish().await? == 0);
    ensure!(container.io.out().to_end().await? == "hello\n");
    let told = events.of_until(&container.id, "delete").await?;
    ensure!(told == ["create", "start", "exit", "delete"], "{told:?}");
    Ok(())
}
