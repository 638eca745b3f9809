//! Containers on cgroup v2. Its controllers may be v1's on this machine; what needs them is shown in unit tests of the plan.
use serde_json::json;

use crate::bundle;
use crate::stage::Stage;

crate::cases![
    the_cgroup_is_joined_and_removed,
    only_listed_devices_can_be_used,
    all_devices_can_be_used_but_those_that_are_forbidden,
    a_view_of_the_cgroups_begins_at_the_container,
    a_limit_without_its_controller_is_refused,
    every_process_is_killed_and_the_cgroup_removed,
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

/// Which of some devices can be opened: for reading, for writing.
const TRY: &str = "mknod /tmp/mem c 1 1; mknod /tmp/zero c 1 5; mknod /tmp/loop b 7 200; \
    for device in mem zero loop; do for way in '<' '>'; do eval \"true $way /tmp/$device\" 2>&1 | grep -q 'not permitted' && echo no $device $way; done; done; true";

fn only_listed_devices_can_be_used() {
    let stage = Stage::on_v2();
    assert_eq!(stage.shell(TRY, |_| {}), "no mem <\nno mem >\nno loop <\nno loop >\n");
    let stage = Stage::on_v2();
    let some = stage.shell(TRY, |config| {
        config["linux"]["resources"]["devices"] = json!([
            { "allow": false, "access": "rwm" },
            { "allow": true, "type": "c", "major": 1, "minor": 1, "access": "rw" },
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
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/unified/cgroup.controllers").unwrap_or_default();
    if controllers.contains("memory") {
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
