//! Pods in slices: one that systemd was asked to start ends with the pod, one that was there stays.
use anyhow::{Result, ensure};
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::isolation;
use shim_tests::proc;
use shim_tests::runner::skip;
use shim_tests::sandbox::Sandbox;
use shim_tests::stand::Stand;

use super::{nothing_is_left_of, scope, show, systemctl};

/// A pod in a slice of its own, below the test's, with a container in it.
async fn pod_in(stand: &Stand, id: &str, slice: &str) -> Result<Sandbox> {
    let mut sandbox = Sandbox::shim_of(stand.bundle(id, &[]).runtime("native".as_ref())).await?;
    slice.clone_into(&mut sandbox.config.linux.get_or_insert_default().cgroup_parent);
    sandbox.create().await?;
    let holder = sandbox.start().await?;
    ensure!(show(slice, "ActiveState")? == "active", "{slice}: {}", show(slice, "ActiveState")?);
    let member = format!("{id}c");
    let bundle = sandbox.member(&member, holder, &["sleep", "1000"]).runtime("native".as_ref());
    bundle.systemd_cgroup(&format!("{slice}:x:{member}")).run_in(&sandbox.task).await?;
    ensure!(show(&scope(&member), "ActiveState")? == "active");
    Ok(sandbox)
}

pub(crate) async fn a_slice_that_a_pod_has_made_ends_with_it_and_with_its_killed_keeper(stand: Stand) -> Result<()> {
    if !isolation::under_systemd() {
        return skip("systemd is not this run's init: tests/tools/systemd-check makes it that");
    }
    for is_killed in [false, true] {
        let id = format!("made{}", u8::from(is_killed));
        let slice = format!("xpods-{}_{id}.slice", stand.namespace());
        let sandbox = pod_in(&stand, &id, &slice).await?;
        let keeper = sandbox.bundle.shim_pid()?;
        if is_killed {
            proc::kill_hard(keeper);
            eventually_true("the keeper is dead", SOON, || !proc::is_alive(keeper)).await?;
        } else {
            sandbox.end().await?;
        }
        sandbox.bundle.delete_command().await?;
        nothing_is_left_of(&scope(&format!("{id}c"))).await?;
        has_ended(&slice).await?;
    }
    Ok(())
}

/// Waits until a slice has ended. On v1 its folders stay in hierarchies that are not systemd's, where containers have made them with those of their scopes.
async fn has_ended(slice: &str) -> Result<()> {
    eventually(format!("{slice} has ended"), SOON, async || {
        let state = show(slice, "ActiveState")?;
        ensure!(state == "inactive", "{state}");
        Ok(())
    })
    .await
}

pub(crate) async fn a_slice_that_was_there_before_a_pod_stays(stand: Stand) -> Result<()> {
    if !isolation::under_systemd() {
        return skip("systemd is not this run's init: tests/tools/systemd-check makes it that");
    }
    let slice = format!("xpods-{}_kept.slice", stand.namespace());
    systemctl(&["start", &slice])?;
    for is_killed in [false, true] {
        let sandbox = pod_in(&stand, &format!("kept{}", u8::from(is_killed)), &slice).await?;
        let keeper = sandbox.bundle.shim_pid()?;
        if is_killed {
            proc::kill_hard(keeper);
            eventually_true("the keeper is dead", SOON, || !proc::is_alive(keeper)).await?;
        } else {
            sandbox.end().await?;
        }
        sandbox.bundle.delete_command().await?;
        ensure!(show(&slice, "ActiveState")? == "active", "it was stopped");
    }
    systemctl(&["stop", &slice])?;
    has_ended(&slice).await
}
