//! Processes that are added to a container.
use std::fs;

use serde_json::{Value, json};

use crate::stage::{Process, Stage};
use crate::{bundle, users};

crate::cases![
    an_added_process_is_where_init_is,
    each_added_process_shares_a_time_namespace_with_its_descendants_alone,
    an_added_process_has_what_it_asks_for,
    only_three_descriptors_are_open,
    the_containers_filter_holds,
    the_containers_settings_hold,
    a_terminal_is_the_controlling_one,
    a_missing_program_fails_the_exec_in_the_words_that_clients_match,
    a_process_can_be_added_before_the_start,
    an_exited_container_takes_no_process,
    an_exec_passes_the_limit_of_processes,
    a_second_exec_leaves_nothing_behind,
];

fn running<'a>(stage: &'a Stage, change: impl FnOnce(&mut Value)) -> Process<'a> {
    let mut config = stage.config(&["sleep", "1000"]);
    change(&mut config);
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    init
}

fn an_added_process_is_where_init_is() {
    let stage = Stage::new();
    let _init = running(&stage, |config| {
        config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "cgroup" }));
    });
    let script = "for kind in mnt pid net ipc uts cgroup; do \
        test $(readlink /proc/self/ns/$kind) = $(readlink /proc/1/ns/$kind) || echo $kind; done; cmp /proc/1/cgroup /proc/self/cgroup; readlink /proc/self/root";
    assert_eq!(stage.exec_shell("c", script, |_| {}), "/\n");
}

/// By which they are found.
fn each_added_process_shares_a_time_namespace_with_its_descendants_alone() {
    for is_mapped in [false, true] {
        let stage = Stage::new();
        let _init = running(&stage, |config| {
            if is_mapped {
                users::map(&stage, config);
            }
        });
        let show = "readlink /proc/self/ns/time; readlink /proc/self/ns/time_for_children; (setsid readlink /proc/self/ns/time)";
        let shown = [stage.exec_shell("c", show, |_| {}), stage.exec_shell("c", show, |_| {})];
        let namespaces: Vec<Vec<&str>> = shown.iter().map(|text| text.lines().take(3).collect()).collect();
        let (first, second) = (namespaces[0][0], namespaces[1][0]);
        assert!(namespaces[0].iter().all(|own| *own == first) && namespaces[1].iter().all(|own| *own == second), "{shown:?}");
        let host = fs::read_link("/proc/self/ns/time").expect("a link").display().to_string();
        assert!(first != host && second != host, "{shown:?} {host}");
        let inits = stage.exec_shell("c", "readlink /proc/1/ns/time || :", |_| {});
        assert!(is_mapped && inits.is_empty() || inits.trim() == host, "{inits}");
    }
}

fn an_added_process_has_what_it_asks_for() {
    let stage = Stage::new();
    let _init = running(&stage, |_| {});
    let script = "id -u; id -G; pwd; echo $A; ulimit -n; grep -E '^(CapEff|NoNewPrivs)' /proc/self/status";
    let output = stage.exec_shell("c", script, |process| {
        process["user"] = json!({ "uid": 1000, "gid": 1000, "additionalGids": [7] });
        process["cwd"] = json!("/tmp");
        process["env"] = json!(["PATH=/bin", "A=1", "A=2"]);
        process["noNewPrivileges"] = json!(false);
        process["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 20, "hard": 30 }]);
    });
    assert_eq!(output, "1000\n1000 7\n/tmp\n2\n20\nCapEff:\t0000000000000000\nNoNewPrivs:\t0\n");
}

fn only_three_descriptors_are_open() {
    let stage = Stage::new();
    stage.leak();
    let _init = running(&stage, |_| {});
    stage.leak();
    assert_eq!(stage.exec_shell("c", "exec ls /proc/self/fd", |_| {}), "0\n1\n2\n3\n");
}

fn the_containers_filter_holds() {
    let stage = Stage::new();
    let _init = running(&stage, |config| config["linux"]["seccomp"] = bundle::filter());
    let output = stage.exec_shell("c", "grep Seccomp: /proc/self/status; mkdir /tmp/x; true", |_| {});
    assert!(output.starts_with("Seccomp:\t2\n") && output.contains("File too large"), "{output}");
}

fn the_containers_settings_hold() {
    let stage = Stage::new();
    let _init = running(&stage, |config| {
        config["process"]["oomScoreAdj"] = json!(77);
        config["process"]["user"]["umask"] = json!(0o27);
    });
    let output = stage.exec_shell("c", "cat /proc/self/oom_score_adj; umask; grep CapBnd /proc/self/status", |process| {
        process["oomScoreAdj"] = json!(5);
        process["capabilities"] = json!(null);
    });
    assert_eq!(output, "77\n0027\nCapBnd:\t00000000a80425fb\n");
}

fn a_terminal_is_the_controlling_one() {
    let stage = Stage::new();
    let _init = running(&stage, |_| {});
    let mut process = bundle::process(&["sh", "-c", "stty size; tty; echo to-tty > /dev/tty"]);
    process["terminal"] = json!(true);
    process["consoleSize"] = json!({ "height": 11, "width": 22 });
    let added = stage.exec("c", &process).unwrap_or_else(|error| panic!("exec: {error}"));
    let (status, _) = added.end();
    let output = added.terminal();
    assert_eq!(status, 0, "{output}");
    assert!(output.contains("11 22") && output.contains("/dev/pts/0") && output.contains("to-tty"), "{output}");
}

fn a_missing_program_fails_the_exec_in_the_words_that_clients_match() {
    let stage = Stage::new();
    let _init = running(&stage, |_| {});
    for (program, words) in [
        ("missing", "exec: \"missing\": executable file not found in $PATH"),
        ("/missing", "exec: \"/missing\": stat /missing: no such file or directory"),
        ("/etc/passwd", "exec: \"/etc/passwd\": permission denied"),
    ] {
        assert_eq!(stage.exec("c", &bundle::process(&[program])).err().expect("refused"), words);
    }
    let mut process = bundle::process(&["true"]);
    process["cwd"] = json!("/not-there");
    let error = stage.exec("c", &process).err().expect("refused");
    assert!(error.contains("/not-there") && error.ends_with("no such file or directory"), "{error}");
}

fn a_process_can_be_added_before_the_start() {
    let stage = Stage::new();
    let init = stage.create("c", &stage.config(&["true"])).expect("created");
    assert_eq!(stage.exec_shell("c", "echo early", |_| {}), "early\n");
    stage.start("c");
    assert_eq!(init.end().0, 0);
}

fn an_exited_container_takes_no_process() {
    let stage = Stage::new();
    let init = running(&stage, |_| {});
    init.kill();
    init.exited();
    // A zombie until it is waited for: its handle can still be opened.
    assert_eq!(stage.exec("c", &bundle::process(&["true"])).err().expect("refused"), "container not running");
    init.end();
}

fn an_exec_passes_the_limit_of_processes() {
    let stage = Stage::new();
    let _init = running(&stage, |config| config["linux"]["resources"]["pids"] = json!({ "limit": 1 }));
    assert_eq!(stage.exec_shell("c", "exec echo alone", |_| {}), "alone\n");
}

fn a_second_exec_leaves_nothing_behind() {
    let stage = Stage::new();
    let init = running(&stage, |_| {});
    for _ in 0..20 {
        stage.exec_shell("c", "true", |_| {});
        assert!(stage.exec("c", &bundle::process(&["missing"])).is_err());
    }
    assert_eq!(stage.limit("pids", "cgroup.procs").lines().count(), 1);
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}
