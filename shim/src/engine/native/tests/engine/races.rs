//! Operations that meet the end of a process, of a cgroup, or each other.
use std::fs;

use serde_json::json;

use crate::bundle;
use crate::stage::{Stage, repeated};

crate::cases![
    an_exec_beside_the_exit_of_init_is_made_or_refused_and_leaves_nothing,
    short_programs_hang_no_start,
    containers_that_share_a_root_are_made_at_the_same_time,
    what_is_read_of_a_cgroup_that_vanishes_is_nothing,
];

fn an_exec_beside_the_exit_of_init_is_made_or_refused_and_leaves_nothing() {
    let (mut made, mut refused) = (0, 0);
    for has_pids in [true, false] {
        let stage = Stage::new();
        let mut config = stage.config(&["sleep", "1000"]);
        if !has_pids {
            config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "pid");
        }
        for round in 0..repeated(40) {
            let init = stage.create("c", &config).unwrap_or_else(|error| panic!("{round}: create: {error}"));
            stage.start("c");
            let killer = stage.kill_beside(init.pid, round % 40 * 150);
            match stage.exec("c", &bundle::process(&["sleep", "1000"])) {
                Ok(added) => {
                    made += 1;
                    killer.end();
                    // The kernel takes it with init, or the deletion does.
                    if has_pids {
                        assert_eq!(added.end().0, 137, "{round}");
                    }
                }
                Err(error) => {
                    refused += 1;
                    assert_eq!(error, "container not running", "{round}");
                    killer.end();
                }
            }
            assert_eq!(init.end().0, 137, "{round}");
            stage.delete("c").unwrap_or_else(|error| panic!("{round}: delete: {error}"));
            assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new(), "{round}");
        }
    }
    assert!(made > 5 && refused > 5, "{made} made, {refused} refused");
}

fn short_programs_hang_no_start() {
    let stage = Stage::new();
    for round in 0..repeated(100) {
        let mut config = stage.config(&["true"]);
        // Hooks that follow a start find that the program has ended.
        if round % 10 == 0 {
            config["hooks"]["poststart"] = json!([{ "path": "/bin/true" }]);
        }
        assert_eq!(stage.run(&config).0, 0, "{round}");
    }
}

/// Each makes the folders that all of them mount on, and a file below a link that leads to nothing yet.
fn containers_that_share_a_root_are_made_at_the_same_time() {
    for _ in 0..repeated(1) {
        let shared = Stage::new();
        for name in ["dev", "proc", "sys", "run"] {
            fs::remove_dir(shared.root().join(name)).expect("removed");
        }
        fs::create_dir(shared.root().join("var")).expect("a folder");
        std::os::unix::fs::symlink("../later/run", shared.root().join("var/run")).expect("a link");
        let root = shared.root();
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let stage = Stage::new();
                    fs::write(stage.folder.join("source"), "content").expect("a file");
                    for round in 0..5 {
                        let output = stage.shell("cat /var/run/file /deep/er/file", |config| {
                            config["root"]["path"] = json!(root);
                            let mounts = config["mounts"].as_array_mut().expect("an array");
                            mounts.push(bundle::mount("/var/run/file", "bind", "source", &["bind"]));
                            mounts.push(bundle::mount("/deep/er/file", "bind", "source", &["bind"]));
                            mounts.push(bundle::mount(&format!("/new-{round}/in"), "tmpfs", "tmpfs", &[]));
                        });
                        assert_eq!(output, "contentcontent", "{round}");
                    }
                });
            }
        });
    }
}

/// While it is made and removed all the time: a file that is open, but whose cgroup is gone, gives ENODEV.
fn what_is_read_of_a_cgroup_that_vanishes_is_nothing() {
    for stage in [Stage::new(), Stage::on_v2()] {
        let config = stage.config(&["true"]);
        let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
        // It keeps the paths.
        let look = stage.look_beside("c");
        stage.start("c");
        init.end();
        stage.delete("c").expect("deleted");
        for round in 0..repeated(40) {
            assert_eq!(stage.run(&config).0, 0, "{round}");
        }
        look.end();
    }
}
