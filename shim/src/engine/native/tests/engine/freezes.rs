//! Containers that are frozen while other things happen to them.
use serde_json::json;

use crate::bundle;
use crate::stage::{Stage, repeated};

crate::cases![execs_and_freezes_at_the_same_time_hinder_each_other_in_nothing, what_cannot_be_frozen_is_thawed_again];

/// A process that joins while the cgroup freezes, and an init that forks all the time.
fn execs_and_freezes_at_the_same_time_hinder_each_other_in_nothing() {
    for stage in [Stage::new(), Stage::on_v2()] {
        let init = stage.create("c", &stage.config(&["sh", "-c", "while :; do true & true & wait; done"])).expect("created");
        stage.start("c");
        let freezes = stage.freeze_beside("c");
        for round in 0..repeated(30) {
            let added = stage.exec("c", &bundle::process(&["sh", "-c", "for i in 1 2 3; do true & done; wait; echo done"]));
            let added = added.unwrap_or_else(|error| panic!("{round}: {error}"));
            assert_eq!(added.end(), (0, "done\n".to_owned()), "{round}");
        }
        let said = freezes.end();
        let (count, errors) = said.split_once('\n').expect("a number and errors");
        assert!(count.parse::<u64>().is_ok_and(|count| count > 5) && errors.is_empty(), "{said}");
        init.kill();
        init.end();
        stage.delete("c").expect("deleted");
    }
}

/// A process that waits in the kernel for what does not come cannot be frozen. What could be is not left so.
fn what_cannot_be_frozen_is_thawed_again() {
    // On v2 it is waited for ten seconds.
    let on_v2 = (repeated(1) > 1).then(|| (Stage::on_v2(), "/sys/fs/cgroup", "cgroup.freeze", "0"));
    let on_v1 = (Stage::new(), "/sys/fs/cgroup/freezer", "freezer.state", "THAWED");
    for (stage, hierarchy, file, thawed) in std::iter::once(on_v1).chain(on_v2) {
        let mut config = stage.config(&["sleep", "1000"]);
        config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "pid");
        let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
        stage.start("c");
        let cgroup = format!("{hierarchy}{}/c", stage.cgroup);
        let stuck = stage.wait_for_page(&cgroup);
        // Not in the call by which it joins the cgroup.
        scratch::eventually("it waits in the kernel for the page", || {
            let is_asleep = stage.on_host(&format!("grep State: /proc/{}/status", stuck.pid)).contains("disk sleep");
            is_asleep && stage.on_host(&format!("cat /proc/{}/syscall", stuck.pid)).starts_with(&format!("{} ", libc::SYS_process_vm_readv))
        });
        let error = stage.freeze("c", true).expect_err("one process cannot be frozen");
        assert!(error.to_lowercase().contains("busy"), "{error}");
        assert_eq!(stage.on_host(&format!("cat {cgroup}/{file}")).trim(), thawed);
        assert_eq!(stage.exec_shell("c", "echo runs", |process| process["cwd"] = json!("/")), "runs\n");
        init.kill();
        init.end();
        stage.delete("c").expect("deleted, with the process that could not be frozen");
        assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
    }
}
