//! Containers on cgroup v2. Its controllers may be v1's on this machine; what needs them is shown in unit tests of the plan.
use serde_json::json;

use crate::bundle;
use crate::differences::{compare_limits, compare_scripts, is_installed};
use crate::stage::Stage;

crate::cases![
    the_cgroup_is_joined_and_removed,
    only_listed_devices_can_be_used,
    all_devices_can_be_used_but_those_that_are_forbidden,
    a_view_of_the_cgroups_begins_at_the_container,
    a_limit_without_its_controller_is_refused,
    every_process_is_killed_and_the_cgroup_removed,
    devices_can_be_used_as_with_runc,
    devices_can_be_used_as_with_crun,
    limits_are_as_runcs,
    limits_are_as_cruns,
    the_host_keeps_the_options_of_its_cgroups,
];

fn the_cgroup_is_joined_and_removed() {
    let stage = Stage::on_v2();
    let init = stage.create("c", &stage.config(&["sleep", "1000"])).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    let own = stage.exec_shell("c", "grep ^0: /proc/self/cgroup; grep ^0: /proc/1/cgroup", |_| {});
    assert_eq!(own, format!("0::{0}/c\n0::{0}/c\n", stage.cgroup));
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

/// Devices that need no privilege. Which of them can be opened: for reading, for writing.
const TRY: &str = "mknod /tmp/fuse c 10 229; mknod /tmp/zero c 1 5; mknod /tmp/loop b 7 200; \
    for device in fuse zero loop; do for way in '<' '>'; do eval \"true $way /tmp/$device\" 2>&1 | grep -q 'not permitted' && echo no $device $way; done; done; true";

fn only_listed_devices_can_be_used() {
    let stage = Stage::on_v2();
    assert_eq!(stage.shell(TRY, |_| {}), "no fuse <\nno fuse >\nno loop <\nno loop >\n");
    let stage = Stage::on_v2();
    let some = stage.shell(TRY, |config| {
        config["linux"]["resources"]["devices"] = json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw" },
            { "allow": true, "type": "b", "major": 7, "access": "r" },
        ]);
    });
    assert_eq!(some, "no loop >\n");
}

fn all_devices_can_be_used_but_those_that_are_forbidden() {
    let stage = Stage::on_v2();
    let some = stage.shell(TRY, |config| {
        config["linux"]["resources"]["devices"] = json!([
            { "allow": true, "access": "rwm" },
            { "allow": false, "type": "b", "major": 7, "minor": 200, "access": "w" },
        ]);
    });
    assert_eq!(some, "no loop >\n");
}

fn a_view_of_the_cgroups_begins_at_the_container() {
    let stage = Stage::on_v2();
    let output = stage.shell("cat /sys/fs/cgroup/cgroup.procs | head -1; grep ^0: /proc/self/cgroup; touch /sys/fs/cgroup/x", |config| {
        config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "cgroup" }));
        config["mounts"].as_array_mut().expect("an array").push(bundle::mount("/sys/fs/cgroup", "cgroup", "cgroup", &["ro", "nosuid"]));
        config["process"]["args"][2] = json!(format!("{}; true", config["process"]["args"][2].as_str().expect("a script")));
    });
    assert!(output.starts_with("1\n0::/\n") && output.contains("Read-only"), "{output}");
}

fn a_limit_without_its_controller_is_refused() {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    if (read("/sys/fs/cgroup/unified/cgroup.controllers") + &read("/sys/fs/cgroup/cgroup.controllers")).contains("memory") {
        return eprintln!("skipped: the memory controller is v2's here");
    }
    let stage = Stage::on_v2();
    let mut config = stage.config(&["true"]);
    config["linux"]["resources"]["memory"] = json!({ "limit": 1 << 30 });
    let error = stage.create("c", &config).err().expect("refused");
    assert!(error.contains("memory.max needs the cgroup controller memory"), "{error}");
}

fn every_process_is_killed_and_the_cgroup_removed() {
    let stage = Stage::on_v2();
    let mut config = stage.config(&["sh", "-c", "sleep 1000 & sleep 1000 & exec sleep 1000"]);
    // The host's pid namespace: no kernel takes the others with init.
    config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "pid");
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    stage.exec_shell("c", "true", |_| {});
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

/// On whatever cgroups this host has.
fn compare_devices(runtime: &str) {
    let stage = Stage::new();
    for rules in [
        json!([{ "allow": false, "access": "rwm" }]),
        json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw" },
            { "allow": true, "type": "b", "major": 7, "access": "r" },
        ]),
        json!([{ "allow": true, "access": "rwm" }, { "allow": false, "type": "c", "major": 10, "minor": 229, "access": "w" }]),
        json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "b", "major": 7, "minor": 200, "access": "rwm" },
            { "allow": false, "type": "b", "major": 7, "minor": 200, "access": "w" },
        ]),
    ] {
        let script = format!("{TRY}; rm -f /tmp/fuse /tmp/zero /tmp/loop");
        compare_scripts(&stage, runtime, &script, |config| config["linux"]["resources"]["devices"] = rules);
    }
}

fn devices_can_be_used_as_with_runc() {
    compare_devices("runc");
}

fn devices_can_be_used_as_with_crun() {
    compare_devices("crun");
}

fn compare_all_limits(runtime: &str) {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if !["cpu", "cpuset", "memory", "pids"].iter().all(|name| controllers.split_whitespace().any(|controller| controller == *name)) {
        return eprintln!("skipped: needs cgroup v2 with its controllers");
    }
    if !is_installed(runtime) {
        return;
    }
    let resources = |memory: serde_json::Value, cpu: serde_json::Value| {
        json!({
            "devices": [{ "allow": false, "access": "rwm" }], "memory": memory, "cpu": cpu, "pids": { "limit": 17 },
            "unified": { "memory.high": "60000000", "pids.max": "19" },
        })
    };
    let files = [
        "memory.max",
        "memory.swap.max",
        "memory.low",
        "memory.high",
        "memory.oom.group",
        "cpu.weight",
        "cpu.idle",
        "cpu.max",
        "cpu.max.burst",
        "cpuset.cpus",
        "cpuset.mems",
        "pids.max",
        "cgroup.controllers",
        "cgroup.type",
        "cgroup.max.depth",
    ]
    .map(|file| ("", file));
    for resources in [
        // Where the curves of shares and weights meet: that of runc 1.1 and crun 1.8 is a line.
        resources(
            json!({ "limit": 64 << 20, "swap": 96 << 20, "reservation": 32 << 20 }),
            json!({ "shares": 262_144, "quota": 50_000, "cpus": "0", "mems": "0" }),
        ),
        resources(json!({ "limit": 64 << 20, "swap": 64 << 20 }), json!({ "shares": 2, "quota": 50_000, "period": 200_000 })),
        resources(json!({ "limit": -1 }), json!({ "quota": -1 })),
        resources(json!({}), json!({ "period": 50_000 })),
    ] {
        compare_limits(&Stage::new(), runtime, |limits| *limits = resources, &files);
    }
}

fn limits_are_as_runcs() {
    compare_all_limits("runc");
}

fn limits_are_as_cruns() {
    compare_all_limits("crun");
}

/// A mount of them outside of a cgroup namespace sets the options of all.
fn the_host_keeps_the_options_of_its_cgroups() {
    let stage = Stage::on_v2();
    let show = "grep -h ' - cgroup2 ' /proc/self/mountinfo | sed 's/.* - //' | sort -u";
    let before = stage.on_host(show);
    for has_namespace in [false, true] {
        let output = stage.shell(show, |config| {
            config["mounts"].as_array_mut().expect("an array").push(bundle::mount("/sys/fs/cgroup", "cgroup", "cgroup", &["rw", "nosuid"]));
            if has_namespace {
                config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "cgroup" }));
            }
        });
        assert_eq!((stage.on_host(show), output.lines().count()), (before.clone(), 1), "{output}");
    }
    // It has been shown only where there are some.
    if !before.contains("nsdelegate") {
        eprintln!("skipped: cgroup v2 is mounted without options here");
    }
}
