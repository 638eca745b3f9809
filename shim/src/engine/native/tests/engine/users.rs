//! Containers in user namespaces.
use std::fs;
use std::os::unix::fs::MetadataExt;

use serde_json::{Value, json};

use crate::bundle;
use crate::stage::{Process, Stage};

crate::cases![
    ids_are_mapped,
    every_new_namespace_belongs_to_the_user_namespace,
    an_added_process_is_in_the_user_namespace,
    a_user_namespace_is_joined_by_path,
    other_mappings_than_those_of_a_joined_namespace_are_refused,
    a_namespace_of_the_host_is_joined_beside_a_new_user_namespace,
    an_id_that_a_joined_namespace_does_not_have_is_refused,
    the_default_devices_can_be_used,
    a_device_that_the_host_does_not_have_is_refused,
    sources_below_private_folders_are_mounted,
    a_source_can_lie_in_an_earlier_mount,
    many_sources_take_few_descriptors,
    a_missing_source_fails_the_creation,
    attributes_that_the_host_has_locked_stay,
    streams_belong_to_the_user,
    a_terminal_is_the_controlling_one,
    settings_of_the_namespaces_are_written,
    limits_of_the_process_are_exact,
    paths_are_masked_and_read_only,
    cgroups_are_joined_and_shown,
    cgroups_are_shown_without_a_namespace_of_its_own,
    a_cgroup_of_its_own_can_be_divided,
    a_joining_process_cannot_be_traced,
    nothing_of_the_host_can_be_changed,
    a_leader_that_is_killed_leaves_no_half_container,
];

/// The first id of the container's on the host.
pub(crate) const FIRST: u32 = 100_000;

/// Gives a configuration a user namespace, and the root to its root.
pub(crate) fn map(stage: &Stage, config: &mut Value) {
    config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "user" }));
    for field in ["uidMappings", "gidMappings"] {
        config["linux"][field] = json!([{ "containerID": 0, "hostID": FIRST, "size": 65_536 }]);
    }
    own(&stage.root());
}

fn own(folder: &std::path::Path) {
    std::os::unix::fs::lchown(folder, Some(FIRST), Some(FIRST)).expect("owned");
    if folder.symlink_metadata().expect("there").is_dir() {
        fs::read_dir(folder).expect("a folder").for_each(|entry| own(&entry.expect("an entry").path()));
    }
}

fn running<'a>(stage: &'a Stage, change: impl FnOnce(&mut Value)) -> Process<'a> {
    let mut config = stage.config(&["sleep", "1000"]);
    map(stage, &mut config);
    change(&mut config);
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    init
}

fn mapped_shell(stage: &Stage, script: &str, change: impl FnOnce(&mut Value)) -> String {
    stage.shell(script, |config| {
        map(stage, config);
        change(config);
    })
}

fn add_mount(config: &mut Value, destination: &str, kind: &str, source: &str, options: &[&str]) {
    config["mounts"].as_array_mut().expect("an array").push(bundle::mount(destination, kind, source, options));
}

fn words(text: &str) -> Vec<Vec<&str>> {
    text.lines().map(|line| line.split_whitespace().collect()).collect()
}

fn ids_are_mapped() {
    let stage = Stage::new();
    let output = mapped_shell(&stage, "cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups; id; touch /tmp/made", |config| {
        config["process"]["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [5] });
        fs::set_permissions(stage.root().join("tmp"), std::os::unix::fs::PermissionsExt::from_mode(0o1777)).expect("changed");
    });
    assert_eq!(words(&output), words("0 100000 65536\n0 100000 65536\nallow\nuid=1000(user) gid=1001 groups=5\n"));
    let made = fs::metadata(stage.root().join("tmp/made")).expect("made");
    assert_eq!((made.uid(), made.gid()), (FIRST + 1000, FIRST + 1001));
}

fn every_new_namespace_belongs_to_the_user_namespace() {
    let stage = Stage::new();
    let script = "hostname changed && mount -t tmpfs t /tmp && ifconfig lo down && mount -t proc p /tmp && mount -t mqueue m /tmp && \
        mount -t sysfs s /tmp && echo owned; id; grep CapEff /proc/self/status";
    let output = mapped_shell(&stage, script, |config| {
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_SYS_ADMIN", "CAP_NET_ADMIN"]);
        }
        // A procfs shows what is masked.
        config["linux"]["maskedPaths"] = json!([]);
        config["linux"]["readonlyPaths"] = json!([]);
        config["mounts"][5]["options"] = json!(["nosuid", "noexec", "nodev"]);
    });
    assert_eq!(output, "owned\nuid=0(root) gid=0(root)\nCapEff:\t0000000000201000\n");
}

const NAMESPACES: &str = "for kind in mnt pid net ipc uts cgroup user; do readlink /proc/self/ns/$kind; done";

fn an_added_process_is_in_the_user_namespace() {
    let stage = Stage::new();
    let _init = running(&stage, |config| config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "cgroup" })));
    let script = "for kind in mnt pid net ipc uts cgroup user; do \
        test $(readlink /proc/self/ns/$kind) = $(readlink /proc/1/ns/$kind) || echo $kind; done; cmp /proc/1/cgroup /proc/self/cgroup; \
        cat /proc/self/uid_map; id; ulimit -n; readlink /proc/self/root";
    let output = stage.exec_shell("c", script, |process| {
        process["user"] = json!({ "uid": 1000, "gid": 1000, "additionalGids": [7] });
        process["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "soft": 20, "hard": 30 }]);
        // Namespaces of init can be read by processes that may trace it.
        for set in ["bounding", "effective", "permitted", "inheritable", "ambient"] {
            process["capabilities"][set] = json!(["CAP_SYS_PTRACE", "CAP_DAC_OVERRIDE"]);
        }
    });
    assert_eq!(words(&output), words("0 100000 65536\nuid=1000(user) gid=1000(user) groups=7\n20\n/\n"), "{output}");
    let mut process = bundle::process(&["true"]);
    process["user"]["uid"] = json!(70_000);
    let error = stage.exec("c", &process).err().expect("refused");
    assert!(error.contains("process.user.uid: 70000 is not mapped"), "{error}");
    assert_eq!(
        stage.exec("c", &bundle::process(&["missing"])).err().expect("refused"),
        "exec: \"missing\": executable file not found in $PATH"
    );
}

/// As containers of a pod do: one has new namespaces, another joins some and has a pid namespace of its own.
fn a_user_namespace_is_joined_by_path() {
    for (with_mappings, with_new_pids) in [(true, true), (false, true), (true, false)] {
        let stage = Stage::new();
        let pod = running(&stage, |config| config["linux"]["cgroupsPath"] = json!(format!("{}/first", stage.cgroup)));
        let mut config = stage.config(&["sh", "-c", &format!("{NAMESPACES}; id -u; echo $$; cat /proc/self/uid_map")]);
        let joined = [("user", "user"), ("network", "net"), ("ipc", "ipc"), ("uts", "uts")];
        let mut namespaces: Vec<_> =
            joined.iter().map(|(kind, file)| json!({ "type": kind, "path": format!("/proc/{}/ns/{file}", pod.pid) })).collect();
        namespaces.push(json!({ "type": "mount" }));
        namespaces.push(if with_new_pids {
            json!({ "type": "pid" })
        } else {
            json!({ "type": "pid", "path": format!("/proc/{}/ns/pid", pod.pid) })
        });
        config["linux"]["namespaces"] = json!(namespaces);
        if with_mappings {
            for field in ["uidMappings", "gidMappings"] {
                config["linux"][field] = json!([{ "containerID": 0, "hostID": FIRST, "size": 65_536 }]);
            }
        }
        let theirs = stage.exec_shell("c", NAMESPACES, |_| {});
        let second = stage.create("second", &config).unwrap_or_else(|error| panic!("create: {error}"));
        stage.start("second");
        let (status, output) = second.end();
        assert_eq!(status, 0, "{output}");
        let shared = |text: &str, kind: &str| text.lines().find(|line| line.starts_with(kind)).map(str::to_owned);
        for kind in ["net:", "ipc:", "uts:", "user:"] {
            assert_eq!(shared(&output, kind), shared(&theirs, kind));
        }
        assert_ne!(shared(&output, "mnt:"), shared(&theirs, "mnt:"));
        assert_eq!(shared(&output, "pid:") == shared(&theirs, "pid:"), !with_new_pids);
        assert_eq!(output.contains("\n0\n1\n"), with_new_pids, "{output}");
        assert!(output.ends_with("100000      65536\n"), "{output}");
        stage.delete("second").expect("deleted");
        pod.kill();
        pod.end();
    }
}

fn other_mappings_than_those_of_a_joined_namespace_are_refused() {
    let stage = Stage::new();
    let pod = running(&stage, |config| config["linux"]["cgroupsPath"] = json!(format!("{}/first", stage.cgroup)));
    let mut config = stage.config(&["true"]);
    config["linux"]["namespaces"]
        .as_array_mut()
        .expect("an array")
        .push(json!({ "type": "user", "path": format!("/proc/{}/ns/user", pod.pid) }));
    for field in ["uidMappings", "gidMappings"] {
        config["linux"][field] = json!([{ "containerID": 0, "hostID": FIRST, "size": 65_537 }]);
    }
    let error = stage.create("second", &config).err().expect("refused");
    assert!(error.contains("linux.uidMappings"), "{error}");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
    pod.kill();
    pod.end();
}

/// Root of the container could not join it: it belongs to the host.
fn a_namespace_of_the_host_is_joined_beside_a_new_user_namespace() {
    let stage = Stage::new();
    let host = fs::read_link("/proc/self/ns/net").expect("a link");
    let output = mapped_shell(&stage, "readlink /proc/self/ns/net; readlink /proc/self/ns/ipc; ifconfig lo down; id -u", |config| {
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("an array");
        namespaces.retain(|namespace| namespace["type"] != "network" && namespace["type"] != "ipc");
        namespaces.push(json!({ "type": "network", "path": "/proc/self/ns/net" }));
        namespaces.push(json!({ "type": "ipc", "path": "/proc/self/ns/ipc" }));
        // These belong to the namespaces' owner.
        config["mounts"].as_array_mut().expect("an array").retain(|mount| mount["type"] != "sysfs" && mount["type"] != "mqueue");
        add_mount(config, "/sys", "bind", "/sys", &["rbind", "ro"]);
        for set in ["bounding", "effective", "permitted"] {
            config["process"]["capabilities"][set] = json!(["CAP_NET_ADMIN"]);
        }
    });
    assert!(output.starts_with(&format!("{}\n", host.display())), "{output}");
    assert!(output.contains("Operation not permitted") && output.ends_with("\n0\n"), "{output}");
}

fn an_id_that_a_joined_namespace_does_not_have_is_refused() {
    let stage = Stage::new();
    let pod = running(&stage, |config| config["linux"]["cgroupsPath"] = json!(format!("{}/first", stage.cgroup)));
    let mut config = stage.config(&["true"]);
    config["linux"]["namespaces"]
        .as_array_mut()
        .expect("an array")
        .push(json!({ "type": "user", "path": format!("/proc/{}/ns/user", pod.pid) }));
    config["process"]["user"]["uid"] = json!(70_000);
    let error = stage.create("second", &config).err().expect("refused");
    assert!(error.contains("become user 70000:0: invalid argument"), "{error}");
    pod.kill();
    pod.end();
}

fn the_default_devices_can_be_used() {
    let stage = Stage::new();
    let script = "for node in null zero full random urandom; do head -c 0 /dev/$node && stat -c '%n %F %t:%T %a %u:%g' /dev/$node; done; \
        head -c 3 /dev/zero | wc -c; echo x > /dev/null && echo written; echo x > /dev/full || echo is full; readlink /dev/fd";
    let output = mapped_shell(&stage, script, |_| {});
    for (node, numbers) in [("null", "1:3"), ("zero", "1:5"), ("full", "1:7"), ("random", "1:8"), ("urandom", "1:9")] {
        // The host's nodes: their owner has no id here.
        assert!(output.contains(&format!("/dev/{node} character special file {numbers} 666 65534:65534\n")), "{output}");
    }
    assert!(output.contains("3\nwritten\n") && output.ends_with("is full\n/proc/self/fd\n"), "{output}");
}

fn a_device_that_the_host_does_not_have_is_refused() {
    for (path, minor, errno) in [("/dev/not-there", 3, "no such file or directory"), ("/dev/zero", 3, "no such device")] {
        let stage = Stage::new();
        let mut config = stage.config(&["true"]);
        map(&stage, &mut config);
        config["linux"]["devices"] = json!([{ "path": path, "type": "c", "major": 1, "minor": minor }]);
        let error = stage.create("c", &config).err().expect("refused");
        assert_eq!(error, format!("make device {path}: {errno}"));
    }
}

fn sources_below_private_folders_are_mounted() {
    let stage = Stage::new();
    let private = stage.folder.join("private");
    fs::create_dir_all(private.join("volume")).expect("a folder");
    fs::write(private.join("volume/file"), "content").expect("a file");
    fs::set_permissions(&private, std::os::unix::fs::PermissionsExt::from_mode(0o700)).expect("changed");
    std::os::unix::fs::chown(&private, Some(1), Some(1)).expect("owned");
    let output = mapped_shell(&stage, "cat /volume/file /file; touch /volume/x 2>&1 | grep -o 'Read-only'", |config| {
        add_mount(config, "/volume", "bind", "private/volume", &["rbind", "ro"]);
        add_mount(config, "/file", "bind", "private/volume/file", &["bind"]);
    });
    assert_eq!(output, "contentcontentRead-only\n");
    // The root may lie in one too.
    fs::rename(stage.root(), private.join("rootfs")).expect("renamed");
    let mut config = stage.config(&["cat", "/etc/group"]);
    config["root"]["path"] = json!("private/rootfs");
    fs::create_dir(stage.root()).expect("a folder");
    map(&stage, &mut config);
    let (status, output) = stage.run(&config);
    assert_eq!((status, output.lines().next()), (0, Some("root:x:0:")), "{output}");
}

fn a_source_can_lie_in_an_earlier_mount() {
    let stage = Stage::new();
    fs::create_dir_all(stage.folder.join("data/inner")).expect("a folder");
    fs::write(stage.folder.join("data/inner/file"), "content").expect("a file");
    let inside = stage.root().join("first/inner").display().to_string();
    let output = mapped_shell(&stage, "cat /second/file", |config| {
        add_mount(config, "/first", "bind", "data", &["rbind"]);
        add_mount(config, "/second", "bind", &inside, &["rbind"]);
    });
    assert_eq!(output, "content");
}

fn many_sources_take_few_descriptors() {
    let stage = Stage::new();
    fs::write(stage.folder.join("file"), "").expect("a file");
    let source = stage.folder.join("file").display().to_string();
    let output = mapped_shell(&stage, "grep -c ' /many/' /proc/self/mountinfo", |config| {
        for number in 0..1100 {
            add_mount(config, &format!("/many/{number}"), "bind", &source, &["bind", "ro"]);
        }
    });
    assert_eq!(output, "1100\n");
}

fn a_missing_source_fails_the_creation() {
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    map(&stage, &mut config);
    add_mount(&mut config, "/x", "bind", "/not-there", &["rbind"]);
    assert_eq!(stage.create("c", &config).err().expect("refused"), "mount /not-there on /x: no such file or directory");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

fn attributes_that_the_host_has_locked_stay() {
    let stage = Stage::new();
    let locked = stage.folder.join("locked");
    fs::create_dir_all(&locked).expect("a folder");
    let source = locked.display().to_string();
    stage.on_host(&format!("mount -t tmpfs -o nosuid,nodev,noexec,noatime locked {source}"));
    let output = mapped_shell(&stage, "grep ' /bind' /proc/self/mountinfo | cut -d' ' -f5,6", |config| {
        add_mount(config, "/bind/1", "bind", &source, &["rbind", "ro"]);
        add_mount(config, "/bind/2", "bind", &source, &["bind"]);
        add_mount(config, "/bind/3", "bind", &source, &["bind", "rw", "nosuid"]);
        add_mount(config, "/bind/4", "bind", &source, &["bind", "noatime"]);
    });
    let attributes: Vec<&str> = output.lines().map(|line| line.split_once(' ').expect("two words").1).collect();
    let writable = "rw,nosuid,nodev,noexec,noatime";
    assert_eq!(attributes, ["ro,nosuid,nodev,noexec,noatime", writable, writable, writable]);
    // Words that contradict what is locked.
    for word in ["suid", "dev", "exec", "relatime", "strictatime", "nodiratime"] {
        let mut config = stage.config(&["true"]);
        map(&stage, &mut config);
        add_mount(&mut config, "/x", "bind", &source, &["bind", word]);
        let error = stage.create("c", &config).err().expect("refused");
        assert_eq!(error, format!("mount {source} on /x: operation not permitted"), "{word}");
    }
}

fn streams_belong_to_the_user() {
    let stage = Stage::new();
    let null = fs::metadata("/dev/null").expect("a device").uid();
    let output = mapped_shell(&stage, "echo again > /dev/stdout; stat -L -c %u /proc/self/fd/1", |config| {
        config["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    });
    assert_eq!(output, "again\n1000\n");
    assert_eq!(fs::metadata(stage.folder.join("output-1")).expect("a file").uid(), FIRST + 1000);
    // The host's null device, which is its standard input, stays the host's.
    assert_eq!(fs::metadata("/dev/null").expect("a device").uid(), null);
}

fn a_terminal_is_the_controlling_one() {
    let stage = Stage::new();
    let mut config =
        stage.config(&["sh", "-c", "stty size; tty; echo to-tty > /dev/tty; echo to-console > /dev/console; stat -c %u /dev/pts/0"]);
    map(&stage, &mut config);
    config["process"]["terminal"] = json!(true);
    config["process"]["consoleSize"] = json!({ "height": 33, "width": 101 });
    config["process"]["user"] = json!({ "uid": 1000, "gid": 1000 });
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    let mut process = bundle::process(&["sh", "-c", "tty; echo to-tty > /dev/tty"]);
    process["terminal"] = json!(true);
    let added = stage.exec("c", &process).unwrap_or_else(|error| panic!("exec: {error}"));
    assert_eq!(added.end().0, 0);
    let output = added.terminal();
    assert!(output.contains("/dev/pts/1") && output.contains("to-tty"), "{output}");
    stage.start("c");
    init.end();
    let output = init.terminal();
    for expected in ["33 101", "/dev/pts/0", "to-tty", "to-console", "1000"] {
        assert!(output.contains(expected), "{output}");
    }
}

fn settings_of_the_namespaces_are_written() {
    let stage = Stage::new();
    let script = "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmni /proc/sys/user/max_ipc_namespaces /proc/self/oom_score_adj; hostname";
    let output = mapped_shell(&stage, script, |config| {
        config["linux"]["sysctl"] =
            json!({ "net.ipv4.ip_unprivileged_port_start": "7", "kernel.shmmni": "77", "user.max_ipc_namespaces": "3" });
        config["process"]["oomScoreAdj"] = json!(5);
    });
    assert_eq!(output, "7\n77\n3\n5\nx-engine\n");
}

fn limits_of_the_process_are_exact() {
    let stage = Stage::new();
    let output = mapped_shell(&stage, "ulimit -n; ulimit -Hn; ulimit -c", |config| {
        config["process"]["rlimits"] =
            json!([{ "type": "RLIMIT_NOFILE", "soft": 7, "hard": 9 }, { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 }]);
    });
    assert_eq!(output, "7\n9\n0\n");
}

fn paths_are_masked_and_read_only() {
    let stage = Stage::new();
    let script =
        "cat /proc/keys | wc -c; ls -A /sys/firmware | wc -l; touch /sys/firmware/x; echo 1 > /proc/sys/kernel/shmmni; touch /x; echo done";
    let output = mapped_shell(&stage, script, |config| config["root"]["readonly"] = json!(true));
    assert!(output.starts_with("0\n0\n") && output.matches("Read-only file system").count() == 3, "{output}");
}

fn cgroups_are_joined_and_shown() {
    let stage = Stage::new();
    let output = mapped_shell(&stage, "cat /proc/self/cgroup; cat /sys/fs/cgroup/pids/cgroup.procs | head -1", |config| {
        config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "cgroup" }));
        add_mount(config, "/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]);
    });
    let (cgroups, processes) = output.trim_end().rsplit_once('\n').expect("lines");
    assert!(cgroups.lines().filter(|line| line.ends_with(":/")).count() >= 5 && !output.contains(&stage.cgroup), "{output}");
    assert_eq!(processes, "1");
}

fn cgroups_are_shown_without_a_namespace_of_its_own() {
    for stage in [Stage::new(), Stage::on_v2()] {
        let own = stage.cgroup.clone();
        let show = format!(
            "cat /sys/fs/cgroup/pids/cgroup.procs /sys/fs/cgroup{own}/c/cgroup.procs 2>/dev/null | head -1; touch /sys/fs/cgroup/x 2>&1"
        );
        let output = mapped_shell(&stage, &format!("{show}; true"), |config| {
            add_mount(config, "/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]);
        });
        assert!(output.starts_with("1\n") && !output.ends_with("\n0\n"), "{output}");
    }
}

fn a_cgroup_of_its_own_can_be_divided() {
    let script = "mkdir /sys/fs/cgroup/inner && echo 0 > /sys/fs/cgroup/inner/cgroup.procs && cat /proc/self/cgroup | grep ^0:; rmdir /sys/fs/cgroup/x";
    for (options, uid, is_divided) in [(&["rw"][..], 0, true), (&["rw"], 1000, true), (&["ro"], 0, false)] {
        let stage = Stage::on_v2();
        let mut config = stage.config(&["sh", "-c", script]);
        map(&stage, &mut config);
        config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "cgroup" }));
        config["process"]["user"]["uid"] = json!(uid);
        add_mount(&mut config, "/sys/fs/cgroup", "cgroup", "cgroup", options);
        let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
        stage.start("c");
        let (_, output) = init.end();
        assert_eq!(output.contains("0::/inner\n"), is_divided, "{output}");
        stage.delete("c").expect("deleted");
    }
}

/// As in a container without, but its root may trace everything in its user namespace.
fn a_joining_process_cannot_be_traced() {
    let stage = Stage::new();
    let script = "while :; do for p in /proc/[0-9]*; do case $(readlink $p/exe) in */busybox|'') ;; *) echo $p $(readlink $p/exe);; esac; \
        for fd in $p/fd/[3-9]*; do case $(readlink $fd) in ''|/|/proc*|pipe*|/bin*) ;; *) echo $fd $(readlink $fd);; esac; done; done; done > /tmp/seen";
    let mut config = stage.config(&["sh", "-c", script]);
    map(&stage, &mut config);
    config["process"]["capabilities"] = json!({ "bounding": ["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"], "effective": ["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"], "permitted": ["CAP_SYS_PTRACE", "CAP_SYS_ADMIN", "CAP_DAC_OVERRIDE"] });
    let init = stage.create("c", &config).expect("created");
    stage.start("c");
    for _ in 0..50 {
        stage.exec_shell("c", "true", |_| {});
    }
    init.kill();
    init.end();
    assert_eq!(fs::read_to_string(stage.root().join("tmp/seen")).expect("a file"), "");
}

/// What root of the host could: it is another user there.
fn nothing_of_the_host_can_be_changed() {
    let stage = Stage::new();
    let secret = stage.folder.join("secret");
    fs::write(&secret, "content").expect("a file");
    fs::set_permissions(&secret, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("changed");
    let script = "cat /secret; echo x > /secret; chown 0 /secret; chmod 777 /secret; mknod /tmp/mem c 1 1; mount -o remount,rw /locked; touch /locked/x; umount /locked/; echo 1 > /proc/sys/kernel/panic; true";
    let locked = stage.folder.join("locked").display().to_string();
    stage.on_host(&format!("mkdir {locked}; mount -t tmpfs -o ro locked {locked}"));
    let output = mapped_shell(&stage, script, |config| {
        add_mount(config, "/secret", "bind", "secret", &["bind"]);
        add_mount(config, "/locked", "bind", &locked, &["bind"]);
        config["process"]["capabilities"] = json!(null);
        config["linux"]["readonlyPaths"] = json!([]);
    });
    let refused = output.lines().filter(|line| line.contains("ermission denied") || line.contains("not permitted")).count();
    assert!(refused >= 5 && output.contains("Read-only file system") && !output.contains("content"), "{output}");
    assert_eq!(fs::read_to_string(&secret).expect("a file"), "content");
    assert_eq!(fs::metadata(&secret).expect("a file").uid(), 0);
}

fn a_leader_that_is_killed_leaves_no_half_container() {
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    map(&stage, &mut config);
    for after in (0..6_000).step_by(150) {
        stage.create_killed(&config, after).expect("cleaned up");
        assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new(), "after {after} µs");
    }
    assert_eq!(stage.run(&config).0, 0);
}
