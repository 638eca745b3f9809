//! Inits that divide their cgroup, or leave it.
use serde_json::{Value, json};

use crate::bundle;
use crate::stage::Stage;

crate::cases![
    an_added_process_is_in_inits_cgroup_where_the_containers_is_divided,
    an_added_process_stays_in_the_containers_cgroup_wherever_init_has_moved,
    a_container_whose_cgroup_init_has_removed_takes_no_process,
];

fn add_cgroups(config: &mut Value, has_namespace: bool) {
    config["mounts"].as_array_mut().expect("an array").push(bundle::mount("/sys/fs/cgroup", "cgroup", "cgroup", &["rw"]));
    if has_namespace {
        config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "cgroup" }));
    }
}

/// As systemd does in a container: a cgroup whose controllers are enabled for those below it takes no process.
fn an_added_process_is_in_inits_cgroup_where_the_containers_is_divided() {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if !controllers.split_whitespace().any(|controller| controller == "memory") {
        return eprintln!("skipped: needs cgroup v2 with the controller memory");
    }
    for (has_namespace, is_mapped) in [(true, false), (true, true), (false, false)] {
        let stage = Stage::on_v2();
        let own = if has_namespace { String::new() } else { format!("{}/c", stage.cgroup) };
        let script = format!(
            "cd /sys/fs/cgroup{own} && mkdir -p other deep/inner && echo 0 > deep/inner/cgroup.procs && echo +memory > cgroup.subtree_control && \
             echo > /tmp/divided; exec sleep 1000"
        );
        let mut config = stage.config(&["sh", "-c", &script]);
        add_cgroups(&mut config, has_namespace);
        if is_mapped {
            crate::users::map(&stage, &mut config);
        }
        let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
        stage.start("c");
        scratch::eventually("it is divided", || stage.root().join("tmp/divided").exists());
        for _ in 0..2 {
            assert_eq!(stage.exec_shell("c", "cat /proc/self/cgroup", |_| {}), format!("0::{own}/deep/inner\n"), "{is_mapped}");
        }
        assert_eq!(stage.count("c"), 1);
        init.kill();
        init.end();
        stage.delete("c").expect("deleted, with the cgroups below");
        assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
    }
}

/// A container that sees the host's cgroups, and may write to them.
fn has_moved(stage: &Stage, then: &str) -> Value {
    let script = format!(
        "mkdir /sys/fs/cgroup{0}/other && echo 0 > /sys/fs/cgroup{0}/other/cgroup.procs && {then} echo > /tmp/moved; exec sleep 1000",
        stage.cgroup
    );
    let mut config = stage.config(&["sh", "-c", &script]);
    add_cgroups(&mut config, false);
    config
}

fn an_added_process_stays_in_the_containers_cgroup_wherever_init_has_moved() {
    let stage = Stage::on_v2();
    let init = stage.create("c", &has_moved(&stage, "")).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    scratch::eventually("it has moved", || stage.root().join("tmp/moved").exists());
    let cgroups = stage.exec_shell("c", "grep ^0: /proc/1/cgroup /proc/self/cgroup | cut -d: -f2-", |_| {});
    assert_eq!(cgroups, format!("0::{0}/other\n0::{0}/c\n", stage.cgroup));
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    stage.on_host(&format!("rmdir /sys/fs/cgroup{}/other", stage.cgroup));
}

/// Where init is now may be anything on the host.
fn a_container_whose_cgroup_init_has_removed_takes_no_process() {
    let stage = Stage::on_v2();
    let remove = format!("rmdir /sys/fs/cgroup{}/c &&", stage.cgroup);
    let init = stage.create("c", &has_moved(&stage, &remove)).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    scratch::eventually("it has moved", || stage.root().join("tmp/moved").exists());
    let error = stage.exec("c", &bundle::process(&["true"])).err().expect("refused");
    assert!(error.contains(&format!("{}/c: no such file or directory", stage.cgroup)), "{error}");
    let others = stage.on_host(&format!("cat /sys/fs/cgroup{}/other/cgroup.procs", stage.cgroup));
    assert_eq!(others.lines().count(), 1, "{others}");
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    stage.on_host(&format!("rmdir /sys/fs/cgroup{}/other", stage.cgroup));
}
