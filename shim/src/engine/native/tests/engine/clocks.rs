//! Containers in time namespaces.
use std::fs;

use serde_json::{Value, json};

use crate::stage::Stage;
use crate::users;

crate::cases![
    clocks_of_a_new_namespace_are_later,
    an_added_process_has_the_containers_clocks,
    a_time_namespace_is_joined_by_path,
    clocks_are_later_in_a_user_namespace_too,
    the_hosts_clocks_stay,
    hooks_of_the_host_run_in_its_namespaces,
];

const DAYS: u64 = 40;
const OFFSET: u64 = DAYS * 86_400;

fn delay(config: &mut Value) {
    config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "time" }));
    config["linux"]["timeOffsets"] = json!({ "boottime": { "secs": OFFSET, "nanosecs": 5 }, "monotonic": { "secs": 7 } });
}

const SHOW: &str = "cut -d. -f1 /proc/uptime; cat /proc/self/timens_offsets; readlink /proc/self/ns/time";

fn uptime() -> u64 {
    let text = fs::read_to_string("/proc/uptime").expect("a file");
    text.split('.').next().expect("a number").parse().expect("a number")
}

fn assert_is_later(output: &str) {
    let mut lines = output.lines();
    let shown: u64 = lines.next().and_then(|line| line.parse().ok()).unwrap_or_else(|| panic!("{output}"));
    assert!(shown.abs_diff(uptime() + OFFSET) < 60, "{output}");
    let offsets: Vec<Vec<&str>> = lines.by_ref().take(2).map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(offsets, [vec!["monotonic", "7", "0"], vec!["boottime", &OFFSET.to_string(), "5"]]);
    let host = fs::read_link("/proc/self/ns/time").expect("a link");
    assert!(lines.next().is_some_and(|line| line.starts_with("time:") && *line != *host.to_string_lossy()), "{output}");
}

fn clocks_of_a_new_namespace_are_later() {
    let stage = Stage::new();
    assert_is_later(&stage.shell(SHOW, delay));
}

fn an_added_process_has_the_containers_clocks() {
    let stage = Stage::new();
    let mut config = stage.config(&["sleep", "1000"]);
    delay(&mut config);
    let _init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    assert_is_later(&stage.exec_shell("c", SHOW, |_| {}));
}

fn a_time_namespace_is_joined_by_path() {
    for is_mapped in [false, true] {
        let stage = Stage::new();
        let mut first = stage.config(&["sleep", "1000"]);
        first["linux"]["cgroupsPath"] = json!(format!("{}/first", stage.cgroup));
        delay(&mut first);
        let pod = stage.create("first", &first).unwrap_or_else(|error| panic!("create: {error}"));
        let mut second = stage.config(&["sh", "-c", SHOW]);
        if is_mapped {
            users::map(&stage, &mut second);
        }
        let joined = json!({ "type": "time", "path": format!("/proc/{}/ns/time", pod.pid) });
        second["linux"]["namespaces"].as_array_mut().expect("an array").push(joined);
        let (status, output) = stage.run(&second);
        assert_eq!(status, 0, "{output}");
        assert_is_later(&output);
        pod.kill();
        pod.end();
    }
}

fn clocks_are_later_in_a_user_namespace_too() {
    let stage = Stage::new();
    let mut config = stage.config(&["sleep", "1000"]);
    users::map(&stage, &mut config);
    delay(&mut config);
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    assert_is_later(&stage.exec_shell("c", SHOW, |_| {}));
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    config["process"]["args"] = json!(["sh", "-c", SHOW]);
    assert_is_later(&stage.run(&config).1);
}

/// One container's clocks are not the next one's.
fn the_hosts_clocks_stay() {
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    delay(&mut config);
    assert_eq!(stage.run(&config).0, 0);
    let shown: u64 = stage.shell("cut -d. -f1 /proc/uptime", |_| {}).trim().parse().expect("a number");
    assert!(shown.abs_diff(uptime()) < 60, "{shown}");
}

/// The performer joins those of the container, so that init is born in them, and returns.
fn hooks_of_the_host_run_in_its_namespaces() {
    let stage = Stage::new();
    let mut first = stage.config(&["sleep", "1000"]);
    first["linux"]["cgroupsPath"] = json!(format!("{}/first", stage.cgroup));
    let pod = stage.create("first", &first).expect("created");
    let show = "for kind in mnt pid net ipc uts cgroup user time; do readlink /proc/self/ns/$kind; done";
    let seen = stage.folder.join("seen");
    let mut second = stage.config(&["true"]);
    delay(&mut second);
    for (kind, file) in [("pid", "pid"), ("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
        let namespaces = second["linux"]["namespaces"].as_array_mut().expect("an array");
        let namespace = namespaces.iter_mut().find(|namespace| namespace["type"] == kind).expect("listed");
        namespace["path"] = json!(format!("/proc/{}/ns/{file}", pod.pid));
    }
    second["hooks"] =
        json!({ "createRuntime": [{ "path": "/bin/sh", "args": ["sh", "-c", format!("{{ {show}; }} > {}", seen.display())] }] });
    assert_eq!(stage.run(&second).0, 0);
    assert_eq!(fs::read_to_string(&seen).expect("a file"), stage.on_host(show));
    pod.kill();
    pod.end();
}
