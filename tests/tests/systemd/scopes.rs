//! The life of a container in a scope.
use std::fs;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use shim_tests::eventually::{SOON, eventually, eventually_true};
use shim_tests::proc;
use shim_tests::runner::skip;
use shim_tests::stand::Stand;
use shim_tests::ttrpc::{Code, refusal};
use shim_tests::{builds, bundle, cgroups};

use super::{cgroup_of, folders, nothing_is_left_of, scope, scoped, show, slice, systemctl};

pub(crate) async fn a_container_runs_in_a_scope_and_nothing_of_it_is_left(stand: Stand) -> Result<()> {
    let container = scoped(&stand, "life", &["sleep", "1000"])?.run().await?;
    let unit = scope("life");
    let path = format!("/xtests.slice/{}/{unit}", slice(&stand));
    ensure!(cgroup_of(container.pid)? == path, "{}", cgroup_of(container.pid)?);
    for (property, expected) in [
        ("ControlGroup", path.as_str()),
        ("ActiveState", "active"),
        ("Slice", &slice(&stand)),
        ("Delegate", "yes"),
        ("Description", "container life"),
        ("Transient", "yes"),
        ("DefaultDependencies", "no"),
    ] {
        ensure!(show(&unit, property)? == expected, "{property}: {}", show(&unit, property)?);
    }
    for accounting in ["MemoryAccounting", "CPUAccounting", "TasksAccounting"] {
        ensure!(show(&unit, accounting)? == "yes", "{accounting}");
    }
    // Every hierarchy has it, and init is alone there: the placeholder has gone.
    let folders = folders(&unit);
    ensure!(!folders.is_empty());
    for folder in &folders {
        let processes = fs::read_to_string(folder.join("cgroup.procs"))?;
        ensure!(processes.trim() == container.pid.to_string(), "{}: {processes:?}", folder.display());
    }
    let exec = container.exec("e1", &["sleep", "1000"]).await?;
    ensure!(cgroup_of(exec)? == path, "{}", cgroup_of(exec)?);
    let pids = container.task.pids("life").await?;
    ensure!(pids.contains(&exec) && pids.contains(&container.pid), "{pids:?}");
    ensure!(!container.task.stats("life").await?.stats.value.is_empty());
    systemctl(&["daemon-reload"])?;
    ensure!(cgroup_of(container.pid)? == path && show(&unit, "ActiveState")? == "active");
    ensure!(container.shut_down().await? == 137);
    nothing_is_left_of(&unit).await
}

pub(crate) async fn its_processes_are_frozen_and_killed(stand: Stand) -> Result<()> {
    let container = scoped(&stand, "freeze", &["sleep", "1000"])?.run().await?;
    container.task.pause("freeze").await?;
    systemctl(&["daemon-reload"])?;
    let folder = cgroups::of(container.pid, "freezer")?;
    let is_frozen = || match fs::read_to_string(folder.join("freezer.state")) {
        Ok(state) => state.trim() == "FROZEN",
        Err(_) => fs::read_to_string(folder.join("cgroup.events")).is_ok_and(|events| events.lines().any(|line| line == "frozen 1")),
    };
    ensure!(is_frozen(), "it is not frozen");
    let state = container.task.state("freeze", "").await?;
    ensure!(state.status.value() == 4, "{state}");
    container.task.resume("freeze").await?;
    ensure!(!is_frozen(), "it is frozen");
    ensure!(container.run("e1", &["true"]).await? == 0);
    // The host's pid namespace: what outlives init is killed with it.
    let shared = scoped(&stand, "shared", &["sh", "-c", "sleep 1000 & sleep 1000 & wait"])?
        .spec(shim_tests::spec::Spec::host_pids)
        .run_in(&container.task)
        .await?;
    eventually("it has children", SOON, async || {
        ensure!(proc::children(shared.pid.cast_signed()).len() == 2);
        Ok(())
    })
    .await?;
    shared.destroy().await?;
    nothing_is_left_of(&scope("shared")).await?;
    container.shut_down().await?;
    nothing_is_left_of(&scope("freeze")).await
}

pub(crate) async fn limits_are_systemds_too_and_survive_a_reload(stand: Stand) -> Result<()> {
    for controller in ["memory", "cpu", "pids"] {
        if let Some(reason) = cgroups::lacks(controller) {
            return skip(reason);
        }
    }
    let is_v2 = std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists();
    let limited = |memory: u64, shares: u64, quota: u64, pids: u64| json!({ "memory": { "limit": memory }, "cpu": { "shares": shares, "quota": quota, "period": 100_000 }, "pids": { "limit": pids } });
    let change = limited(64 << 20, 512, 20_001, 100);
    let container = scoped(&stand, "limits", &["sleep", "1000"])?
        .spec(|spec| {
            spec.with(|spec| {
                for name in ["memory", "cpu", "pids"] {
                    spec["linux"]["resources"][name] = change[name].clone();
                }
            })
        })
        .run()
        .await?;
    let unit = scope("limits");
    let read = |controller: &str, file: &str| -> Result<String> {
        Ok(fs::read_to_string(cgroups::of(container.pid, controller)?.join(file)).with_context(|| file.to_owned())?.trim().to_owned())
    };
    let agree = |when: &str, memory: u64, shares: u64, weight: u64, quota: u64, pids: u64| -> Result<()> {
        let show = |name: &str, expected: String| {
            let found = show(&unit, name)?;
            ensure!(found == expected, "{when}: {name} is {found}, not {expected}");
            anyhow::Ok(())
        };
        let file = |controller: &str, name: &str, expected: String| {
            let found = read(controller, name)?;
            ensure!(found == expected, "{when}: {name} has {found}, not {expected}");
            anyhow::Ok(())
        };
        show("TasksMax", pids.to_string())?;
        file("pids", "pids.max", pids.to_string())?;
        show("CPUQuotaPerSecUSec", format!("{}ms", quota / 100))?;
        if is_v2 {
            show("MemoryMax", memory.to_string())?;
            file("memory", "memory.max", memory.to_string())?;
            show("CPUWeight", weight.to_string())?;
            file("cpu", "cpu.weight", weight.to_string())?;
            file("cpu", "cpu.max", format!("{quota} 100000"))
        } else {
            show("MemoryLimit", memory.to_string())?;
            file("memory", "memory.limit_in_bytes", memory.to_string())?;
            show("CPUShares", shares.to_string())?;
            file("cpu", "cpu.shares", shares.to_string())?;
            file("cpu", "cpu.cfs_quota_us", quota.to_string())
        }
    };
    // 20.001 % are 21 % to systemd.
    agree("created", 64 << 20, 512, 59, 21_000, 100)?;
    systemctl(&["daemon-reload"])?;
    agree("reloaded", 64 << 20, 512, 59, 21_000, 100)?;
    container.task.update("limits", &limited(32 << 20, 2048, 50_000, 50)).await?;
    agree("updated", 32 << 20, 2048, 174, 50_000, 50)?;
    // Another property: systemd writes all of its files again.
    systemctl(&["set-property", "--runtime", &unit, "Description=x", "MemoryAccounting=yes"])?;
    systemctl(&["daemon-reload"])?;
    agree("written again", 32 << 20, 2048, 174, 50_000, 50)?;
    // A part keeps the rest.
    container.task.update("limits", &json!({ "pids": { "limit": 60 } })).await?;
    agree("updated in part", 32 << 20, 2048, 174, 50_000, 60)?;
    container.task.update("limits", &json!({ "cpu": { "quota": 10_000 } })).await?;
    agree("of a quota its period stays", 32 << 20, 2048, 174, 10_000, 60)?;
    // What the kernel refuses is taken back, from systemd too.
    let (_, message) = refusal(container.task.update("limits", &json!({ "pids": { "limit": 70 }, "cpu": { "cpus": "4000" } })).await)?;
    ensure!(message.contains("cpuset.cpus"), "{message}");
    agree("refused", 32 << 20, 2048, 174, 10_000, 60)?;
    container.shut_down().await?;
    nothing_is_left_of(&unit).await
}

/// On v1 systemd has one list of devices with the engine, on v2 a program of its own.
pub(crate) async fn devices_stay_as_they_were_asked_for(stand: Stand) -> Result<()> {
    let rules = json!([{ "allow": false, "access": "rwm" }, { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw" }, { "allow": true, "type": "c", "major": 7, "access": "r" }]);
    let container = scoped(&stand, "devices", &["sleep", "1000"])?
        .spec(|spec| spec.with(|spec| spec["linux"]["resources"]["devices"] = rules))
        .run()
        .await?;
    let mut made = 0;
    let mut check = async |when: &str| -> Result<()> {
        // /dev/null, /dev/zero and a terminal; and the system's console, which nothing allows.
        made += 1;
        let script = "head -c 4 /dev/zero > /dev/null && dd if=/dev/ptmx count=0 && { test -e /dev/other || mknod /dev/other c 5 1; } && ! dd if=/dev/other count=0";
        let status = container.run(&format!("e{made}"), &["sh", "-c", script]).await?;
        ensure!(status == 0, "{when}: status {status}");
        let Ok(folder) = cgroups::of(container.pid, "devices") else { return Ok(()) };
        let Ok(list) = fs::read_to_string(folder.join("devices.list")) else { return Ok(()) };
        for line in ["c 10:229 rw", "c 7:* r", "c 1:3 rwm", "c 136:* rwm", "c *:* m"] {
            ensure!(list.lines().any(|other| other == line), "{when}: {line} is not in {list:?}");
        }
        ensure!(!list.contains("a *:*"), "{when}: {list:?}");
        Ok(())
    };
    check("created").await?;
    if let Ok(folder) = cgroups::of(container.pid, "devices")
        && folder.join("devices.allow").exists()
    {
        // As a hook does.
        fs::write(folder.join("devices.allow"), "c 1:4 r")?;
        container.task.update("devices", &json!({ "cpu": { "shares": 300 } })).await?;
        let list = fs::read_to_string(folder.join("devices.list"))?;
        ensure!(list.contains("c 1:4 r"), "an update has taken a device away: {list:?}");
        fs::write(folder.join("devices.deny"), "c 1:4 r")?;
    }
    systemctl(&["daemon-reload"])?;
    systemctl(&["set-property", "--runtime", &scope("devices"), "CPUAccounting=yes"])?;
    check("written again").await?;
    container.shut_down().await?;
    nothing_is_left_of(&scope("devices")).await
}

/// As a worker leaves it that is killed while systemd writes its list of devices.
pub(crate) async fn a_container_that_an_update_has_left_frozen_is_thawed_by_its_replay(stand: Stand) -> Result<()> {
    let container = scoped(&stand, "left", &["sleep", "1000"])?.run().await?;
    let state = cgroups::of(container.pid, "freezer")?.join("freezer.state");
    let lists = cgroups::of(container.pid, "devices").is_ok_and(|folder| folder.join("devices.list").exists());
    let update = json!({ "cpu": { "shares": 300 } });
    if state.exists() && lists {
        fs::write(&state, "FROZEN")?;
        container.task.update("left", &update).await?;
        ensure!(fs::read_to_string(&state)?.trim() == "THAWED", "it is still frozen");
        container.task.pause("left").await?;
        container.task.update("left", &update).await?;
        ensure!(fs::read_to_string(&state)?.trim() == "FROZEN", "a paused container was thawed");
        container.task.resume("left").await?;
    }
    container.shut_down().await.map(drop)
}

pub(crate) async fn annotations_are_properties_of_the_scope(stand: Stand) -> Result<()> {
    let container = scoped(&stand, "annotated", &["sleep", "1000"])?
        .spec(|spec| {
            spec.annotation("org.systemd.property.TimeoutStopUSec", "uint64 7000000")
                .annotation("org.systemd.property.CollectMode", "'inactive-or-failed'")
                .annotation("org.systemd.property.After", "['a.service', 'b.service']")
        })
        .run()
        .await?;
    let unit = scope("annotated");
    ensure!(show(&unit, "TimeoutStopUSec")? == "7s", "{}", show(&unit, "TimeoutStopUSec")?);
    ensure!(show(&unit, "CollectMode")? == "inactive-or-failed");
    ensure!(show(&unit, "After")?.contains("a.service"));
    container.shut_down().await?;
    nothing_is_left_of(&unit).await
}

pub(crate) async fn what_is_no_property_is_refused_and_leaves_nothing(stand: Stand) -> Result<()> {
    let anchor = scoped(&stand, "anchor-unfit", &["sleep", "1000"])?.run().await?;
    for (key, value, words) in [
        ("org.systemd.property.TimeoutStopUSec", "hello", "annotations.org.systemd.property.TimeoutStopUSec"),
        ("org.systemd.property.PIDs", "[uint32 1]", "PIDs is the engine's to choose"),
        // systemd's own words.
        ("org.systemd.property.NoSuchThing", "uint64 1", "NoSuchThing"),
    ] {
        let refused = scoped(&stand, "unfit", &["sleep", "1000"])?.spec(|spec| spec.annotation(key, value));
        refused.write()?;
        let (_, message) = refusal(anchor.task.create(&refused.request()).await)?;
        ensure!(message.contains(words), "{key}: {message}");
        nothing_is_left_of(&scope("unfit")).await?;
    }
    let path = scoped(&stand, "unfit", &["sleep", "1000"])?.systemd_cgroup("/a/b");
    path.write()?;
    let (_, message) = refusal(anchor.task.create(&path.request()).await)?;
    ensure!(message.contains("SLICE:PREFIX:NAME"), "{message}");
    anchor.shut_down().await.map(drop)
}

pub(crate) async fn a_live_unit_of_the_name_is_left_alone(stand: Stand) -> Result<()> {
    let unit = scope("taken");
    let refused = scoped(&stand, "taken", &["sleep", "1000"])?;
    let mut other = Command::new("systemd-run").args(["--scope", "--quiet", &format!("--unit={unit}"), "sleep", "1000"]).spawn()?;
    eventually_true("the other unit is active", SOON, || show(&unit, "ActiveState").is_ok_and(|state| state == "active")).await?;
    let anchor = scoped(&stand, "anchor-live", &["sleep", "1000"])?.run().await?;
    refused.write()?;
    let answer = refusal(anchor.task.create(&refused.request()).await);
    // The command `delete` of containerd follows a failed Create.
    let deleted = refused.delete_command().await;
    let is_left = show(&unit, "ActiveState")? == "active" && proc::is_alive(other.id().cast_signed());
    other.kill()?;
    other.wait()?;
    let (code, message) = answer?;
    ensure!(code == Code::AlreadyExists && message.contains(&unit), "{code:?} {message}");
    ensure!(is_left, "the other unit was stopped");
    deleted?;
    anchor.shut_down().await.map(drop)
}

/// systemd starts a slice without a process.
pub(crate) async fn a_container_can_be_in_a_slice(stand: Stand) -> Result<()> {
    let unit = format!("xtests-{}-inner.slice", stand.namespace());
    let container = scoped(&stand, "inner", &["sleep", "1000"])?.systemd_cgroup(&format!("{}:x:{unit}", slice(&stand))).run().await?;
    let path = format!("/xtests.slice/{}/{unit}", slice(&stand));
    ensure!(cgroup_of(container.pid)? == path, "{}", cgroup_of(container.pid)?);
    ensure!(show(&unit, "ActiveState")? == "active");
    container.shut_down().await?;
    nothing_is_left_of(&unit).await
}

pub(crate) async fn a_container_outlives_an_upgrade_of_its_shim(stand: Stand) -> Result<()> {
    let container = scoped(&stand, "upgraded", &["sleep", "1000"])?.run().await?;
    let worker = container.worker_pid().await?;
    let next = builds::make(stand.binary(), &stand.folder().join("next"), "build=2")?;
    let mut command = tokio::process::Command::new(next);
    command.args(["upgrade", "--namespace", stand.namespace(), "upgraded"]);
    let output = bundle::run(command, &[]).await?;
    ensure!(output.status.success(), "{output:?}");
    eventually_true("another worker", SOON, || !proc::is_alive(worker)).await?;
    if cgroups::lacks("pids").is_none() {
        container.task.update("upgraded", &json!({ "pids": { "limit": 77 } })).await?;
        ensure!(show(&scope("upgraded"), "TasksMax")? == "77");
    }
    container.shut_down().await?;
    nothing_is_left_of(&scope("upgraded")).await
}

/// An operator has stopped it, or systemd was reinstalled.
pub(crate) async fn a_scope_that_is_gone_is_no_reason_to_keep_a_container(stand: Stand) -> Result<()> {
    let container = scoped(&stand, "gone", &["sh", "-c", "trap 'exit 7' TERM; sleep 1000 & wait"])?.run().await?;
    let has_set_its_trap = || proc::children(container.pid.cast_signed()).len() == 1;
    eventually_true("it has a child", SOON, has_set_its_trap).await?;
    systemctl(&["stop", &scope("gone")])?;
    ensure!(container.task.wait("gone", "").await? == 7);
    container.shut_down().await?;
    nothing_is_left_of(&scope("gone")).await
}
