//! Containers whose cgroups systemd makes (the option SystemdCgroup), with the shim's own engine and a real systemd. Run by `tests/tools/systemd-check`, which makes that
//! systemd pid 1 of namespaces of its own; elsewhere every case is skipped.
//!
//! `X_SHIM` names a shim built with the feature `fault-injection`.

#[path = "systemd/crashes.rs"]
mod crashes;
#[path = "systemd/pods.rs"]
mod pods;
#[path = "systemd/scopes.rs"]
mod scopes;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use shim_tests::bundle::Bundle;
use shim_tests::direct::{self, Case};
use shim_tests::direct_cases;
use shim_tests::eventually::{SOON, eventually};
use shim_tests::isolation;
use shim_tests::runner::skip;
use shim_tests::stand::Stand;

fn main() -> ExitCode {
    let programs = Path::new(env!("CARGO_BIN_EXE_gated-runtime")).parent().expect("a file is in a folder");
    let mut cases = Vec::new();
    cases.extend(direct_cases![scopes:
        a_container_runs_in_a_scope_and_nothing_of_it_is_left,
        its_processes_are_frozen_and_killed,
        limits_are_systemds_too_and_survive_a_reload,
        a_container_that_an_update_has_left_frozen_is_thawed_by_its_replay,
        annotations_are_properties_of_the_scope,
        what_is_no_property_is_refused_and_leaves_nothing,
        a_live_unit_of_the_name_is_left_alone,
        a_container_can_be_in_a_slice,
        a_container_outlives_an_upgrade_of_its_shim,
        a_scope_that_is_gone_is_no_reason_to_keep_a_container,
    ]);
    cases.extend(direct_cases![pods:
        a_slice_that_a_pod_has_made_ends_with_it_and_with_its_killed_keeper,
        a_slice_that_was_there_before_a_pod_stays,
    ]);
    // Alone: the reload of another would have systemd write the list of devices again.
    cases.extend(direct_cases![scopes: devices_stay_as_they_were_asked_for].map(Case::alone));
    cases.extend(
        direct_cases![crashes:
            a_failed_creation_leaves_nothing,
            a_worker_that_is_killed_at_any_message_of_a_creation_is_not_noticed,
            a_live_unit_of_the_name_is_left_alone_whenever_workers_are_killed,
            a_creation_that_kills_every_worker_leaves_nothing,
            a_shim_that_is_killed_during_a_creation_leaves_nothing,
        ]
        .map(|case| case.within(Duration::from_secs(240))),
    );
    direct::main(&cases, programs)
}

/// A container of the shim's own engine in a scope of a slice that is the test's.
fn scoped(stand: &Stand, id: &str, args: &[&str]) -> Result<Bundle> {
    if !isolation::under_systemd() {
        return skip("systemd is not this run's init: tests/tools/systemd-check makes it that");
    }
    Ok(stand.bundle(id, args).runtime(Path::new("native")).systemd_cgroup(&format!("{}:x:{id}", slice(stand))))
}

fn slice(stand: &Stand) -> String {
    format!("xtests-{}.slice", stand.namespace())
}

fn scope(id: &str) -> String {
    format!("x-{id}.scope")
}

/// A property of a unit.
fn show(unit: &str, property: &str) -> Result<String> {
    let output = Command::new("systemctl").args(["show", "--property", property, "--value", unit]).stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "systemctl show {unit}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn systemctl(arguments: &[&str]) -> Result<()> {
    let output = Command::new("systemctl").args(arguments).stdin(Stdio::null()).output()?;
    ensure!(output.status.success(), "systemctl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// The folders of a unit, in every hierarchy.
fn folders(unit: &str) -> Vec<PathBuf> {
    let output = Command::new("find").args(["/sys/fs/cgroup", "-type", "d", "-name", unit]).output().expect("find can be started");
    String::from_utf8_lossy(&output.stdout).lines().map(PathBuf::from).collect()
}

/// The path of a process's cgroup, in systemd's hierarchy.
fn cgroup_of(pid: u32) -> Result<String> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let find = |prefix: &str| text.lines().filter_map(|line| line.split_once(':')).find_map(|(_, rest)| rest.strip_prefix(prefix));
    let own = if Path::new("/sys/fs/cgroup/systemd").is_dir() { "name=systemd:" } else { ":" };
    find(own).map(str::to_owned).with_context(|| text.clone())
}

/// Waits until there is neither unit nor folder of the name.
async fn nothing_is_left_of(unit: &str) -> Result<()> {
    eventually(format!("nothing is left of {unit}"), SOON, async || {
        let (state, folders) = (show(unit, "ActiveState")?, folders(unit));
        let loaded = show(unit, "LoadState")?;
        // There is every slice, by its name alone.
        let is_known = loaded != "not-found" && !unit.ends_with(".slice");
        ensure!(state == "inactive" && !is_known && folders.is_empty(), "{state}, {loaded}, {folders:?}");
        Ok(())
    })
    .await
}
