//! What users of OCI runtimes have reported as wrong: each case is right here.
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, chown};

use serde_json::{Value, json};

use crate::bundle;
use crate::stage::Stage;

crate::cases![
    arguments_that_are_too_long_end_with_255_and_say_so,
    home_is_kept_as_it_is_and_passwd_is_not_written,
    ids_beyond_those_of_the_kernel_are_refused,
    nothing_of_the_hosts_cgroups_can_be_written,
    execs_go_on_however_often_a_container_is_frozen,
    cgroups_that_were_made_below_are_removed,
    nested_cgroups_that_are_frozen_hinder_no_deletion,
    init_and_execs_run_on_every_processor,
    a_program_is_looked_up_with_the_users_rights_alone,
    many_containers_share_a_root_without_their_mount_targets,
    a_small_memory_limit_leaves_a_container_or_nothing,
    a_thousand_mounts_stay_in_the_container,
    many_masks_take_one_file_system_a_container,
];

fn arguments_that_are_too_long_end_with_255_and_say_so() {
    let stage = Stage::new();
    let too_many: Vec<String> = (0..400).map(|number| format!("V{number}={}", "x".repeat(100_000))).collect();
    // A string alone may have 128 KiB.
    let too_long = vec![format!("V={}", "x".repeat(128 << 10))];
    for env in [too_many, too_long] {
        let mut config = stage.config(&["/bin/true"]);
        config["process"]["env"] = json!(env);
        let (status, output) = stage.run(&config);
        assert_eq!((status, output.as_str()), (255, "exec /bin/true: argument list too long\n"));
    }
}

fn home_is_kept_as_it_is_and_passwd_is_not_written() {
    let stage = Stage::new();
    let passwd = stage.root().join("etc/passwd");
    let before = fs::read(&passwd).expect("a file");
    let home = "/tmp\nevil:x:0:0::/:/bin/sh";
    let output = stage.shell("echo \"$HOME\"", |config| config["process"]["env"] = json!(["PATH=/bin", format!("HOME={home}")]));
    assert_eq!(output, format!("{home}\n"));
    assert_eq!(fs::read(&passwd).expect("a file"), before);
}

fn ids_beyond_those_of_the_kernel_are_refused() {
    let stage = Stage::new();
    for (uid, is_taken) in [
        (json!(1), true),
        (json!(1_u64 << 31), true),
        (json!(u32::MAX), false),
        (json!(1_u64 << 32), false),
        (json!(-1), false),
        (json!("1:1"), false),
    ] {
        let mut config = stage.config(&["id", "-u"]);
        config["process"]["user"]["uid"] = uid.clone();
        match stage.create("c", &config) {
            Ok(init) => {
                stage.start("c");
                assert!(is_taken && init.end() == (0, format!("{uid}\n")), "{uid}");
                stage.delete("c").expect("deleted");
            }
            Err(error) => assert!(!is_taken && error.contains("uid"), "{uid}: {error}"),
        }
    }
}

/// Through the container's view of the cgroups, or a mount of its own.
fn nothing_of_the_hosts_cgroups_can_be_written() {
    let stage = Stage::new();
    let script = "for file in $(find /sys/fs/cgroup -name cgroup.procs -o -name release_agent -o -name notify_on_release -o -name tasks); do \
                  (echo 1 > $file) 2> /dev/null && echo wrote $file; done; mkdir /tmp/m; \
                  for kind in 'cgroup -o memory' 'cgroup -o rdma' cgroup2; do mount -t $kind none /tmp/m 2> /dev/null && echo mounted $kind; done; \
                  unshare -C true 2> /dev/null && echo unshared; true";
    for has_namespace in [false, true] {
        let output = stage.shell(script, |config| {
            let mounts = config["mounts"].as_array_mut().expect("a list");
            mounts.push(bundle::mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]));
            if has_namespace {
                config["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({ "type": "cgroup" }));
            }
        });
        assert_eq!(output, "", "{has_namespace}");
        fs::remove_dir(stage.root().join("tmp/m")).expect("removed");
    }
}

fn execs_go_on_however_often_a_container_is_frozen() {
    let stage = Stage::new();
    let _init = stage.create("c", &stage.config(&["sleep", "1000"])).expect("created");
    stage.start("c");
    for round in 0..50 {
        let added = stage.exec("c", &bundle::process(&["sh", "-c", "for i in 1 2 3 4 5; do true & done; wait; echo done"]));
        let added = added.unwrap_or_else(|error| panic!("{round}: {error}"));
        stage.freeze("c", true).unwrap_or_else(|error| panic!("{round}: {error}"));
        stage.freeze("c", false).expect("thawed");
        assert_eq!(added.end(), (0, "done\n".to_owned()), "{round}");
    }
    assert_eq!(stage.limit("freezer", "freezer.state"), "THAWED");
    stage.delete("c").expect("deleted");
}

fn cgroups_that_were_made_below_are_removed() {
    let stage = Stage::new();
    let init = stage.create("c", &stage.config(&["sleep", "1000"])).expect("created");
    stage.start("c");
    for folder in stage.cgroups() {
        fs::create_dir_all(folder.join("a/b/c")).expect("cgroups below");
    }
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

fn nested_cgroups_that_are_frozen_hinder_no_deletion() {
    let stage = Stage::new();
    let mut config = stage.config(&["sh", "-c", "sleep 1000 & sleep 1000 & exec sleep 1000"]);
    config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "pid");
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    scratch::eventually("it runs", || stage.count("c") == 3);
    let freezer = stage.cgroups().into_iter().find(|folder| folder.join("freezer.state").exists()).expect("a freezer");
    let nested = freezer.join("a/b");
    fs::create_dir_all(&nested).expect("cgroups below");
    let pids = fs::read_to_string(freezer.join("cgroup.procs")).expect("a list");
    // The first is init's.
    fs::write(nested.join("cgroup.procs"), pids.lines().last().expect("three")).expect("moved");
    fs::write(nested.join("freezer.state"), "FROZEN").expect("frozen");
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

fn init_and_execs_run_on_every_processor() {
    let stage = Stage::new();
    let show = "grep Cpus_allowed_list /proc/self/status";
    let all = stage.on_host(show);
    if !all.contains(['-', ',']) {
        eprintln!("skipped: needs two processors");
        return;
    }
    // The shell's parent is the keeper.
    stage.on_host("taskset -p 1 $PPID");
    assert_ne!(stage.on_host(show), all);
    let init = stage.create("c", &stage.config(&["sh", "-c", &format!("{show}; echo > /shown; exec sleep 1000")])).expect("created");
    stage.start("c");
    assert_eq!(stage.exec_shell("c", show, |_| {}), all);
    scratch::eventually("init has shown its own", || stage.root().join("shown").exists());
    init.kill();
    assert_eq!(init.end().1, all);
    stage.delete("c").expect("deleted");
}

/// Root without CAP_DAC_OVERRIDE may not enter a user's private folder; the user may.
fn a_program_is_looked_up_with_the_users_rights_alone() {
    let stage = Stage::new();
    let folder = stage.root().join("private");
    fs::create_dir(&folder).expect("a folder");
    fs::copy(stage.root().join("bin/busybox"), folder.join("busybox")).expect("a copy");
    chown(&folder, Some(1000), Some(1000)).expect("owned");
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).expect("private");
    let config = |uid: u32| {
        let mut config = stage.config(&["/private/busybox", "id", "-u"]);
        config["process"]["user"] = json!({ "uid": uid, "gid": uid });
        config["process"]["cwd"] = json!("/private");
        config["process"]["capabilities"] = json!({});
        config
    };
    assert_eq!(stage.run(&config(1000)), (0, "1000\n".to_owned()));
    for uid in [0, 1001] {
        let error = stage.create("c", &config(uid)).err().expect("refused");
        assert!(error.ends_with(": permission denied"), "{uid}: {error}");
    }
}

fn many_containers_share_a_root_without_their_mount_targets() {
    let stage = Stage::new();
    for name in ["dev", "proc", "sys", "run"] {
        fs::remove_dir(stage.root().join(name)).expect("removed");
    }
    // A link that leads to nothing yet.
    fs::create_dir(stage.root().join("var")).expect("a folder");
    std::os::unix::fs::symlink("../later/run", stage.root().join("var/run")).expect("a link");
    let config = |number: usize| {
        let mut config = stage.config(&["sleep", "1000"]);
        let path = config["linux"]["cgroupsPath"].as_str().expect("a path").trim_end_matches('c').to_owned();
        config["linux"]["cgroupsPath"] = json!(format!("{path}{number}"));
        config["mounts"].as_array_mut().expect("a list").push(bundle::mount("/var/run/data", "tmpfs", "tmpfs", &[]));
        config
    };
    let ids: Vec<String> = (0..50).map(|number| number.to_string()).collect();
    for (number, id) in ids.iter().enumerate() {
        stage.create(id, &config(number)).unwrap_or_else(|error| panic!("{id}: {error}"));
        stage.start(id);
    }
    assert!(stage.root().join("later/run/data").is_dir());
    for id in &ids {
        assert_eq!(stage.exec_shell(id, "ls /var/run", |_| {}), "data\n");
        stage.delete(id).expect("deleted");
    }
}

/// What makes a container is not limited, but its program's first steps are.
fn a_small_memory_limit_leaves_a_container_or_nothing() {
    let stage = Stage::new();
    for kib in [256, 512, 1024, 2048, 4096, 8192] {
        let mut config = stage.config(&["sleep", "1000"]);
        config["linux"]["resources"]["memory"] = json!({ "limit": kib << 10 });
        match stage.create("c", &config) {
            Ok(init) => {
                stage.start("c");
                init.kill();
                assert_eq!(init.end().0, 128 + 9, "{kib} KiB");
                stage.delete("c").expect("deleted");
            }
            Err(error) => assert!(error.to_lowercase().contains("memory"), "{kib} KiB: {error}"),
        }
        assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new(), "{kib} KiB");
    }
}

fn a_thousand_mounts_stay_in_the_container() {
    let stage = Stage::new();
    let source = stage.folder.join("source");
    fs::write(&source, "x").expect("a file");
    let before = stage.on_host("cat /proc/self/mountinfo");
    let output = stage.shell("grep -c /many/ /proc/self/mountinfo", |config| {
        let mounts = config["mounts"].as_array_mut().expect("a list");
        let many = (0..1000).map(
            |number| json!({ "destination": format!("/many/{number}"), "type": "bind", "source": source, "options": ["rbind", "ro"] }),
        );
        mounts.extend(many.collect::<Vec<Value>>());
    });
    assert_eq!(output, "1000\n");
    assert_eq!(stage.on_host("cat /proc/self/mountinfo"), before);
}

/// Each file system is one of the kernel's superblocks, and each mount a line that every reader of the host's table would see.
fn many_masks_take_one_file_system_a_container() {
    let stage = Stage::new();
    let folders: Vec<String> = (0..250).map(|number| format!("/masked/{number}")).collect();
    let files: Vec<String> = (0..250).map(|number| format!("/masked/file-{number}")).collect();
    for folder in &folders {
        fs::create_dir_all(stage.root().join(&folder[1..]).join("secret")).expect("a folder");
    }
    for file in &files {
        fs::write(stage.root().join(&file[1..]), "secret").expect("a file");
    }
    let before = stage.on_host("cat /proc/self/mountinfo");
    let show = "cat /masked/file-*; ls /masked/[0-9]*/*; grep ' /masked/' /proc/self/mountinfo | cut -d' ' -f3 | sort | uniq -c";
    let mut devices = std::collections::BTreeSet::new();
    for number in 0..5 {
        let mut config = stage.config(&["sleep", "1000"]);
        config["linux"]["maskedPaths"] = json!([folders.as_slice(), files.as_slice()].concat());
        let path = config["linux"]["cgroupsPath"].as_str().expect("a path").trim_end_matches('c').to_owned();
        config["linux"]["cgroupsPath"] = json!(format!("{path}{number}"));
        let id = number.to_string();
        stage.create(&id, &config).unwrap_or_else(|error| panic!("{id}: {error}"));
        let output = stage.exec_shell(&id, &format!("{{ {show}; }} 2>&1"), |_| {});
        let counts: Vec<Vec<&str>> =
            output.lines().filter(|line| !line.contains("No such file")).map(|line| line.split_whitespace().collect()).collect();
        // The folders' own, and that of the null device.
        assert_eq!(counts.len(), 2, "{output}");
        assert!(counts.iter().all(|count| count[0] == "250"), "{output}");
        devices.extend(counts.iter().map(|count| count[1].to_owned()));
    }
    assert_eq!(stage.on_host("cat /proc/self/mountinfo"), before);
    // Each container has a `/dev` of its own too.
    assert_eq!(devices.len(), 10, "{devices:?}");
    for number in 0..5 {
        stage.delete(&number.to_string()).expect("deleted");
    }
}
