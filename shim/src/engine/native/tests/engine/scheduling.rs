//! How processes are scheduled, and where.
use std::fs;

use serde_json::{Value, json};

use crate::bundle;
use crate::differences::{Other, is_installed};
use crate::stage::Stage;
use crate::users;

crate::cases![
    init_has_its_scheduler_priority_personality_and_memory,
    an_added_process_has_its_own_or_inits,
    processes_of_a_user_namespace_are_scheduled_too,
    added_processes_have_the_processors_that_they_ask_for,
    a_scheduler_that_the_kernel_refuses_fails_the_creation,
    a_filter_may_forbid_scheduling,
    processes_are_scheduled_as_with_crun,
];

/// Niceness, priority, policy; class of I/O; personality, processors, policy of memory.
const FACTS: &str = "exec 2>&1; cut -d' ' -f19,40,41 /proc/$$/stat; ionice -p $$; cat /proc/self/personality; uname -m; \
    grep Cpus_allowed_list /proc/self/status; head -n 1 /proc/self/numa_maps | cut -d' ' -f2";

/// Of `/proc/PID/stat`.
const SCHED_BATCH: u32 = 3;

fn ask(config: &mut Value) {
    config["process"]["scheduler"] = json!({ "policy": "SCHED_BATCH", "nice": -3, "flags": ["SCHED_FLAG_RESET_ON_FORK"] });
    config["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_BE", "priority": 6 });
    config["linux"]["personality"] = json!({ "domain": "LINUX32" });
    config["linux"]["memoryPolicy"] = json!({ "mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"] });
}

fn processors() -> String {
    let status = fs::read_to_string("/sys/devices/system/cpu/online").expect("processors");
    status.trim().to_owned()
}

fn init_has_its_scheduler_priority_personality_and_memory() {
    let stage = Stage::new();
    let script = "cut -d' ' -f19,40,41 /proc/1/stat; ionice -p 1; cat /proc/1/personality; head -n 1 /proc/1/numa_maps | cut -d' ' -f2; \
        cut -d' ' -f19,40,41 /proc/self/stat; true";
    let output = stage.shell(script, ask);
    // The flag is for its children: they are not above others.
    assert_eq!(output, format!("-3 0 {SCHED_BATCH}\nbest-effort: prio 6\n00000008\nbind=static:0\n0 0 {SCHED_BATCH}\n"));
}

fn an_added_process_has_its_own_or_inits() {
    let stage = Stage::new();
    let mut config = stage.config(&["sleep", "1000"]);
    ask(&mut config);
    config["process"]["scheduler"] = json!({ "policy": "SCHED_OTHER", "nice": 3 });
    let _init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    let facts = |change: &dyn Fn(&mut Value)| {
        stage.exec_shell("c", "cut -d' ' -f19 /proc/$$/stat; ionice -p $$; cat /proc/self/personality", change)
    };
    assert_eq!(facts(&|_| {}), "3\nbest-effort: prio 6\n00000008\n");
    let own = facts(&|process| {
        process["scheduler"] = json!({ "policy": "SCHED_OTHER", "nice": -5 });
        process["ioPriority"] = json!({ "class": "IOPRIO_CLASS_IDLE", "priority": 0 });
    });
    assert_eq!(own, "-5\nidle\n00000008\n");
}

/// Root of it has no privileges for these niceness and priority.
fn processes_of_a_user_namespace_are_scheduled_too() {
    let stage = Stage::new();
    let change = |config: &mut Value| {
        users::map(&stage, config);
        ask(config);
        config["process"]["ioPriority"] = json!({ "class": "IOPRIO_CLASS_RT", "priority": 6 });
        config["process"]["execCPUAffinity"] = json!({ "initial": "0" });
    };
    let output = stage.shell(FACTS, change);
    assert!(output.starts_with(&format!("-3 0 {SCHED_BATCH}\nrealtime: prio 6\n00000008\ni686\n")), "{output}");
    let mut config = stage.config(&["sleep", "1000"]);
    change(&mut config);
    let _init = stage.create("added-to", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("added-to");
    let facts = stage.exec_shell("added-to", FACTS, |process| {
        process["scheduler"] = json!({ "policy": "SCHED_OTHER", "nice": -5 });
        process["user"] = json!({ "uid": 1000, "gid": 1000 });
    });
    assert_eq!(facts, "-5 0 0\nrealtime: prio 6\n00000008\ni686\nCpus_allowed_list:\t0\nbind=static:0\n");
}

fn added_processes_have_the_processors_that_they_ask_for() {
    if processors() == "0" {
        return eprintln!("skipped: needs two processors");
    }
    let stage = Stage::new();
    let mut config = stage.config(&["sh", "-c", "grep Cpus_allowed_list /proc/self/status; exec sleep 1000"]);
    config["process"]["execCPUAffinity"] = json!({ "initial": "0" });
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    let list = |change: &dyn Fn(&mut Value)| {
        let output = stage.exec_shell("c", "grep Cpus_allowed_list /proc/self/status", change);
        output.trim().rsplit('\t').next().unwrap_or_default().to_owned()
    };
    assert_eq!(list(&|_| {}), "0");
    assert_eq!(list(&|process| process["execCPUAffinity"] = json!({ "initial": "1" })), "1");
    assert_eq!(list(&|process| process["execCPUAffinity"] = json!({ "initial": "0", "final": "1" })), "1");
    assert_eq!(list(&|process| process["execCPUAffinity"] = json!({ "final": "0-1" })), "0-1");
    let mut process = bundle::process(&["true"]);
    process["execCPUAffinity"] = json!({ "final": "4000" });
    let error = stage.exec("c", &process).err().expect("refused");
    assert_eq!(error, "allow processors [(4000, 4000)]: invalid argument");
    init.kill();
    // Init's own are all.
    assert!(init.end().1.contains(&processors()));
}

fn a_scheduler_that_the_kernel_refuses_fails_the_creation() {
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    // No real-time budget is given to the cgroup.
    config["process"]["scheduler"] = json!({ "policy": "SCHED_FIFO", "priority": 100 });
    let error = stage.create("c", &config).err().expect("refused");
    assert!(error.starts_with("error setting scheduler") && error.ends_with("invalid argument"), "{error}");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

fn a_filter_may_forbid_scheduling() {
    let stage = Stage::new();
    for no_new_privileges in [false, true] {
        let output = stage.shell("cut -d' ' -f19 /proc/$$/stat; cat /proc/self/personality", |config| {
            ask(config);
            config["process"]["noNewPrivileges"] = json!(no_new_privileges);
            config["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{
                "names": ["sched_setattr", "ioprio_set", "personality", "set_mempolicy", "sched_setaffinity"], "action": "SCMP_ACT_KILL_PROCESS",
            }] });
        });
        assert_eq!(output, "-3\n00000008\n");
    }
}

/// Of these fields runc 1.1 has none, crun 1.8 the personality.
fn processes_are_scheduled_as_with_crun() {
    if !is_installed("crun") {
        return;
    }
    let stage = Stage::new();
    let mut config = stage.config(&["sh", "-c", FACTS]);
    config["linux"]["personality"] = json!({ "domain": "LINUX32" });
    let (status, ours) = stage.run(&config);
    assert_eq!(status, 0, "{ours}");
    let other = Other { runtime: "crun", stage: &stage };
    assert_eq!(ours, other.output(&["run", "other"]));
}
