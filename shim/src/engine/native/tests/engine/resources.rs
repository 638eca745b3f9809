//! Limits beyond memory, processors and processes.
use std::fs;

use serde_json::{Value, json};

use crate::differences::{compare_limits, is_installed};
use crate::stage::Stage;

crate::cases![
    devices_are_slowed_down,
    a_change_that_is_refused_leaves_the_lines_of_devices_as_they_were,
    weights_are_written_where_a_scheduler_has_them,
    a_real_time_budget_is_there_before_the_process_joins,
    a_limit_without_its_controller_is_refused,
    limits_are_as_runcs,
    limits_are_as_cruns,
];

/// The numbers of a disk of this machine: partitions have no limits.
fn disk() -> Option<(u64, u64)> {
    let disks = fs::read_dir("/sys/block").ok()?.flatten();
    let numbers = disks.filter_map(|disk| fs::read_to_string(disk.path().join("dev")).ok());
    numbers
        .filter_map(|numbers| numbers.trim().split_once(':').and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?))))
        .max()
}

fn rate(disk: (u64, u64), rate: u64) -> Value {
    json!([{ "major": disk.0, "minor": disk.1, "rate": rate }])
}

/// A disk, where this machine has one and limits for it.
fn limited_disk() -> Option<(u64, u64)> {
    let disk = disk().filter(|_| fs::exists("/sys/fs/cgroup/blkio/blkio.throttle.read_bps_device").unwrap_or(false));
    if disk.is_none() {
        eprintln!("skipped: needs a disk and the controller blkio");
    }
    disk
}

fn devices_are_slowed_down() {
    let Some(disk) = limited_disk() else { return };
    let stage = Stage::new();
    let mut config = stage.config(&["sleep", "1000"]);
    config["linux"]["resources"]["blockIO"] = json!({
        "weight": 0, "throttleReadBpsDevice": rate(disk, 1 << 20), "throttleWriteBpsDevice": rate(disk, 2 << 20),
        "throttleReadIOPSDevice": rate(disk, 100), "throttleWriteIOPSDevice": rate(disk, 200),
    });
    let _init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    for (file, rate) in [("read_bps", 1 << 20), ("write_bps", 2 << 20), ("read_iops", 100), ("write_iops", 200)] {
        assert_eq!(stage.limit("blkio", &format!("blkio.throttle.{file}_device")), format!("{}:{} {rate}", disk.0, disk.1));
    }
    stage
        .update("c", &json!({ "blockIO": { "throttleReadBpsDevice": rate(disk, 0), "throttleReadIOPSDevice": rate(disk, 7) } }))
        .expect("changed");
    assert_eq!(stage.limit("blkio", "blkio.throttle.read_bps_device"), "");
    assert_eq!(stage.limit("blkio", "blkio.throttle.read_iops_device"), format!("{}:{} 7", disk.0, disk.1));
    stage.delete("c").expect("deleted");
}

fn a_change_that_is_refused_leaves_the_lines_of_devices_as_they_were() {
    let Some(disk) = limited_disk() else { return };
    let stage = Stage::new();
    let mut config = stage.config(&["sleep", "1000"]);
    config["linux"]["resources"]["blockIO"] = json!({ "throttleReadBpsDevice": rate(disk, 1 << 20) });
    let _init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    let change = json!({
        "blockIO": {
            "throttleReadBpsDevice": rate(disk, 2 << 20), "throttleWriteBpsDevice": rate(disk, 2 << 20),
            "throttleWriteIOPSDevice": [{ "major": 4095, "minor": 1, "rate": 1 }],
        },
    });
    let error = stage.update("c", &change).expect_err("refused");
    assert!(error.contains("4095:1 1") && error.contains("write_iops_device"), "{error}");
    assert_eq!(stage.limit("blkio", "blkio.throttle.read_bps_device"), format!("{}:{} {}", disk.0, disk.1, 1 << 20));
    assert_eq!(stage.limit("blkio", "blkio.throttle.write_bps_device"), "");
    stage.delete("c").expect("deleted");
}

fn weights_are_written_where_a_scheduler_has_them() {
    let stage = Stage::new();
    let mut config = stage.config(&["sleep", "1000"]);
    config["linux"]["resources"]["blockIO"] = json!({ "weight": 300 });
    match stage.create("c", &config) {
        Ok(_init) => {
            let has = |file: &str| stage.cgroups().iter().any(|folder| folder.join(file).exists());
            let file = if has("blkio.weight") { "blkio.weight" } else { "blkio.bfq.weight" };
            assert_eq!(stage.limit("blkio", file), "300");
            stage.delete("c").expect("deleted");
        }
        // No scheduler here has weights: then it is not left out in silence.
        Err(error) => assert!(error.contains("blkio.bfq.weight") || error.contains("controller blkio"), "{error}"),
    }
}

fn a_real_time_budget_is_there_before_the_process_joins() {
    let stage = Stage::new();
    let parent = format!("/sys/fs/cgroup/cpu{}", stage.cgroup);
    if !fs::exists("/sys/fs/cgroup/cpu/cpu.rt_runtime_us").unwrap_or(false) {
        return eprintln!("skipped: this kernel has no real-time budgets");
    }
    fs::create_dir(&parent).expect("a cgroup");
    fs::write(format!("{parent}/cpu.rt_runtime_us"), "10000").expect("a budget");
    // The keeper is real-time while it makes the container, so a cgroup without a budget would not take the child.
    stage.set_real_time(true);
    let mut config = stage.config(&["sleep", "1000"]);
    let error = stage.create("c", &config).err();
    assert!(error.as_ref().is_some_and(|error| error.contains("join cgroup")), "{error:?}");
    config["linux"]["resources"]["cpu"] = json!({ "realtimePeriod": 900_000, "realtimeRuntime": 5000 });
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.set_real_time(false);
    assert_eq!(stage.limit("cpu", "cpu.rt_period_us"), "900000");
    assert_eq!(stage.limit("cpu", "cpu.rt_runtime_us"), "5000");
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
}

fn a_limit_without_its_controller_is_refused() {
    let stage = Stage::new();
    for (controller, resources) in [
        ("net_cls", json!({ "network": { "classID": 1 } })),
        ("net_prio", json!({ "network": { "priorities": [{ "name": "lo", "priority": 1 }] } })),
        ("rdma", json!({ "rdma": { "mlx": { "hcaHandles": 1 } } })),
        ("", json!({ "unified": { "memory.high": "1" } })),
    ] {
        if fs::exists(format!("/sys/fs/cgroup/{controller}/tasks")).unwrap_or(false) {
            continue;
        }
        let mut config = stage.config(&["true"]);
        config["linux"]["resources"] = resources;
        let error = stage.create("c", &config).err().expect("refused");
        let words = if controller.is_empty() { "linux.resources.unified: needs cgroup v2 alone" } else { controller };
        assert!(error.contains(words), "{error}");
    }
}

/// What all three write for the same resources.
fn compare_all_limits(runtime: &str) {
    let Some(disk) = limited_disk().filter(|_| is_installed(runtime)) else { return };
    let resources = |limits: &mut Value| {
        limits["blockIO"] = json!({
            "throttleReadBpsDevice": rate(disk, 1 << 20), "throttleWriteBpsDevice": rate(disk, 2 << 20),
            "throttleReadIOPSDevice": rate(disk, 100), "throttleWriteIOPSDevice": rate(disk, 0),
        });
        limits["memory"] = json!({ "limit": 64 << 20, "swappiness": 7, "disableOOMKiller": true });
        limits["cpu"] = json!({ "shares": 512, "quota": 50_000, "realtimePeriod": 900_000 });
        limits["unified"] = json!({});
    };
    let files = [
        ("blkio", "blkio.throttle.read_bps_device"),
        ("blkio", "blkio.throttle.write_bps_device"),
        ("blkio", "blkio.throttle.read_iops_device"),
        ("blkio", "blkio.throttle.write_iops_device"),
        ("memory", "memory.limit_in_bytes"),
        ("memory", "memory.swappiness"),
        ("memory", "memory.oom_control"),
        ("cpu", "cpu.shares"),
        ("cpu", "cpu.cfs_quota_us"),
        ("cpu", "cpu.cfs_period_us"),
        ("cpu", "cpu.rt_period_us"),
    ];
    compare_limits(&Stage::new(), runtime, resources, &files);
}

fn limits_are_as_runcs() {
    compare_all_limits("runc");
}

fn limits_are_as_cruns() {
    compare_all_limits("crun");
}
