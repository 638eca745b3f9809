//! What a container's init has, and has not.
use std::fs;

use serde_json::json;

use crate::bundle;
use crate::stage::Stage;

crate::cases![
    init_waits_until_it_is_started,
    the_exit_status_is_the_programs,
    a_killed_init_has_the_signals_status,
    a_waiting_init_ends_by_the_signals_that_end_runcs,
    only_three_descriptors_are_open,
    every_namespace_is_new,
    namespaces_are_joined_by_path,
    every_cgroup_is_joined_and_removed,
    a_cgroup_namespace_begins_at_the_container,
    limits_are_written,
    a_limit_that_the_kernel_refuses_fails_the_creation,
    a_cgroup_with_processes_is_refused,
    only_listed_devices_can_be_used,
    paths_are_masked_and_read_only,
    the_root_is_read_only_on_request,
    binds_have_the_attributes_that_were_asked_for,
    a_read_only_tmpfs_is_filled_first,
    users_have_their_ids_groups_umask_and_home,
    the_working_directory_is_made,
    limits_of_the_process_are_exact,
    settings_of_the_namespaces_are_written,
    settings_of_the_runtimes_network_are_not_changed,
    a_filter_holds_for_init,
    a_filter_may_forbid_what_the_engine_has_other_ways_for,
    a_terminal_is_the_controlling_one,
    a_missing_program_fails_the_creation_in_the_words_that_clients_match,
    a_program_that_cannot_be_executed_ends_with_255,
    the_host_keeps_its_mounts,
    capabilities_are_those_of_the_configuration,
    devices_are_made_with_their_owners,
    every_process_is_killed_on_deletion,
    a_performer_that_is_killed_leaves_no_half_container,
    a_frozen_container_does_nothing_until_it_is_thawed,
    limits_are_changed_or_none_is,
];

fn init_waits_until_it_is_started() {
    let stage = Stage::new();
    let init = stage.create("c", &stage.config(&["echo", "ran"])).expect("created");
    assert_eq!(fs::read_to_string(stage.folder.join("output-1")).expect("a file"), "");
    stage.start("c");
    assert_eq!(init.end(), (0, "ran\n".to_owned()));
}

fn the_exit_status_is_the_programs() {
    let stage = Stage::new();
    assert_eq!(stage.run(&stage.config(&["sh", "-c", "exit 7"])).0, 7);
}

fn a_killed_init_has_the_signals_status() {
    let stage = Stage::new();
    let init = stage.create("c", &stage.config(&["sleep", "1000"])).expect("created");
    init.kill();
    assert_eq!(init.end().0, 128 + 9);
    stage.delete("c").expect("deleted");
}

/// Without a pid namespace of its own the kernel ends it; and the program has no handler of the engine's.
fn a_waiting_init_ends_by_the_signals_that_end_runcs() {
    let stage = Stage::new();
    let sleeper = |has_pids: bool| {
        let mut config = stage.config(&["sleep", "1000"]);
        if !has_pids {
            config["linux"]["namespaces"].as_array_mut().expect("a list").retain(|namespace| namespace["type"] != "pid");
        }
        stage.create("c", &config).expect("created")
    };
    for (name, number) in [("HUP", 1), ("INT", 2), ("QUIT", 3), ("TERM", 15)] {
        for (has_pids, status) in [(true, 2), (false, 128 + number)] {
            let init = sleeper(has_pids);
            stage.on_host(&format!("kill -{name} {}", init.pid));
            assert_eq!(init.end().0, status, "{name}, {has_pids}");
            stage.delete("c").expect("deleted");
        }
    }
    let init = sleeper(true);
    stage.on_host(&format!("kill -USR1 {}", init.pid));
    stage.start("c");
    init.executes("sleep");
    stage.on_host(&format!("kill -TERM {}", init.pid));
    init.kill();
    assert_eq!(init.end().0, 128 + 9);
    stage.delete("c").expect("deleted");
}

fn only_three_descriptors_are_open() {
    let stage = Stage::new();
    stage.leak();
    stage.leak();
    // The program's own is the one on the folder.
    let output = stage.shell("exec ls /proc/self/fd", |_| {});
    assert_eq!(output, "0\n1\n2\n3\n");
}

fn every_namespace_is_new() {
    let stage = Stage::new();
    let output = stage.shell("for kind in mnt pid net ipc uts cgroup; do readlink /proc/self/ns/$kind; done", |_| {});
    for (line, kind) in output.lines().zip(["mnt", "pid", "net", "ipc", "uts", "cgroup"]) {
        let host = fs::read_link(format!("/proc/self/ns/{kind}")).expect("a link");
        assert_eq!(line == host.to_string_lossy(), kind == "cgroup", "{line}");
    }
    assert!(stage.shell("ifconfig lo", |_| {}).contains("UP LOOPBACK"));
    assert_eq!(stage.shell("hostname; echo $$", |_| {}), "x-engine\n1\n");
}

fn namespaces_are_joined_by_path() {
    let stage = Stage::new();
    let mut first = stage.config(&["sleep", "1000"]);
    first["linux"]["cgroupsPath"] = json!(format!("{}/first", stage.cgroup));
    let pod = stage.create("first", &first).expect("created");
    stage.start("first");
    let mut second = stage.config(&["sh", "-c", "for kind in pid net ipc uts; do readlink /proc/self/ns/$kind; done; echo $$; hostname"]);
    let joined = [("pid", "pid"), ("network", "net"), ("ipc", "ipc"), ("uts", "uts")];
    let namespaces: Vec<_> =
        joined.iter().map(|(kind, file)| json!({ "type": kind, "path": format!("/proc/{}/ns/{file}", pod.pid) })).collect();
    second["linux"]["namespaces"] = json!(namespaces);
    second["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "mount" }));
    let (status, output) = stage.run(&second);
    assert_eq!(status, 0, "{output}");
    let theirs = stage.exec_shell("first", "for kind in pid net ipc uts; do readlink /proc/self/ns/$kind; done", |_| {});
    assert!(output.starts_with(&theirs), "{output} {theirs}");
    assert!(output.ends_with("x-engine\n") && !output.contains("\n1\n"), "{output}");
    pod.kill();
    pod.end();
    stage.delete("first").expect("deleted");
}

fn every_cgroup_is_joined_and_removed() {
    let stage = Stage::new();
    let output = stage.shell("cat /proc/self/cgroup", |_| {});
    let joined = output.lines().filter(|line| line.ends_with(&format!(":{}/c", stage.cgroup))).count();
    let mounted = fs::read_to_string("/proc/self/mounts").expect("mounts").lines().filter(|line| line.contains(" /sys/fs/cgroup/")).count();
    assert_eq!(joined, mounted, "{output}");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

fn a_cgroup_namespace_begins_at_the_container() {
    let stage = Stage::new();
    let output = stage.shell("cat /proc/self/cgroup; ls /sys/fs/cgroup; cat /sys/fs/cgroup/pids/cgroup.procs", |config| {
        config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "cgroup" }));
        let mounts = config["mounts"].as_array_mut().expect("an array");
        mounts.push(bundle::mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "ro"]));
    });
    assert!(output.contains("memory:/\n") && output.contains("0::/\n") && !output.contains(&stage.cgroup), "{output}");
    assert!(output.contains("\nunified\n") && output.contains("\nmemory\n"), "{output}");
    assert!(output.ends_with("1\n2\n") || output.contains("\n1\n"), "{output}");
}

fn limits_are_written() {
    let stage = Stage::new();
    let mut config = stage.config(&["sleep", "1000"]);
    config["linux"]["resources"]["memory"] = json!({ "limit": 64 << 20, "reservation": 32 << 20, "swappiness": 0, "swap": -1 });
    config["linux"]["resources"]["cpu"] = json!({ "shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0", "mems": "0" });
    config["linux"]["resources"]["pids"] = json!({ "limit": 17 });
    // This kernel may have no swap accounting.
    if !std::path::Path::new("/sys/fs/cgroup/memory/memory.memsw.limit_in_bytes").exists() {
        config["linux"]["resources"]["memory"]["swap"] = json!(null);
    }
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    assert_eq!(stage.limit("memory", "memory.limit_in_bytes"), (64 << 20).to_string());
    assert_eq!(stage.limit("memory", "memory.soft_limit_in_bytes"), (32 << 20).to_string());
    assert_eq!(stage.limit("memory", "memory.swappiness"), "0");
    assert_eq!(stage.limit("cpu", "cpu.shares"), "512");
    assert_eq!(stage.limit("cpu", "cpu.cfs_quota_us"), "50000");
    assert_eq!(stage.limit("cpuset", "cpuset.cpus"), "0");
    assert_eq!(stage.limit("pids", "pids.max"), "17");
    assert!(stage.limit("devices", "devices.list").contains("c 136:* rwm"));
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
}

fn a_limit_that_the_kernel_refuses_fails_the_creation() {
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    config["linux"]["resources"]["cpu"] = json!({ "cpus": "4096" });
    let error = stage.create("c", &config).err().expect("refused");
    assert!(error.contains("cpuset.cpus"), "{error}");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

fn a_cgroup_with_processes_is_refused() {
    let stage = Stage::new();
    let init = stage.create("c", &stage.config(&["sleep", "1000"])).expect("created");
    let error = stage.create("other", &stage.config(&["true"])).err().expect("refused");
    assert!(error.contains("has processes already"), "{error}");
    assert!(!stage.cgroups().is_empty());
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
}

fn only_listed_devices_can_be_used() {
    let stage = Stage::new();
    // Its driver needs no privilege to be opened.
    let script = "mknod /tmp/fuse c 10 229; (true < /tmp/fuse); mknod /tmp/zero c 1 5 && head -c 1 /tmp/zero > /dev/null && echo fine";
    let output = stage.shell(script, |_| {});
    assert!(output.contains("peration not permitted") && output.ends_with("fine\n"), "{output}");
    let allowed = stage.shell("(true < /tmp/fuse); echo $?", |config| {
        config["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    });
    assert!(!allowed.contains("not permitted"), "{allowed}");
}

fn paths_are_masked_and_read_only() {
    let stage = Stage::new();
    let script = "cat /proc/keys | wc -c; ls -A /sys/firmware | wc -l; touch /sys/firmware/x; echo 1 > /proc/sys/kernel/shmmni; echo done";
    let output = stage.shell(script, |_| {});
    assert!(output.starts_with("0\n0\n") && output.matches("Read-only file system").count() == 2, "{output}");
    let devices = "for mask in /proc/acpi /sys/firmware; do stat -c %d $mask; done | sort -u | wc -l";
    if std::path::Path::new("/proc/acpi").exists() && std::path::Path::new("/sys/firmware").exists() {
        assert_eq!(stage.shell(devices, |_| {}), "1\n");
    }
}

fn the_root_is_read_only_on_request() {
    let stage = Stage::new();
    let script = "touch /x; touch /run/x && echo written";
    let output = stage.shell(script, |config| config["root"]["readonly"] = json!(true));
    assert!(output.contains("Read-only file system") && output.ends_with("written\n"), "{output}");
}

fn binds_have_the_attributes_that_were_asked_for() {
    let stage = Stage::new();
    fs::create_dir_all(stage.folder.join("data/inner")).expect("a folder");
    fs::write(stage.folder.join("file"), "content").expect("a file");
    let data = stage.folder.join("data").display().to_string();
    let output =
        stage.shell("grep -E ' /(data|plain|rro|new/file) ' /proc/self/mountinfo; cat /new/file; touch /data/x /plain/x; true", |config| {
            let mounts = config["mounts"].as_array_mut().expect("an array");
            mounts.push(bundle::mount("/data", "bind", &data, &["rbind", "ro", "nosuid", "rprivate"]));
            mounts.push(bundle::mount("/plain", "bind", &data, &["bind"]));
            mounts.push(bundle::mount("/rro", "none", &data, &["rbind", "rro"]));
            // Relative to the bundle; the target is made.
            mounts.push(bundle::mount("/new/file", "bind", "file", &["bind", "ro"]));
        });
    let line = |target: &str| output.lines().find(|line| line.contains(&format!(" {target} "))).unwrap_or_else(|| panic!("{output}"));
    assert!(line("/data").contains(" ro,nosuid,") && line("/plain").contains(" rw,"), "{output}");
    assert!(line("/rro").contains(" ro,") && line("/new/file").contains(" ro,"), "{output}");
    assert!(output.contains("content") && output.contains("touch: /data/x: Read-only"), "{output}");
}

fn a_read_only_tmpfs_is_filled_first() {
    let stage = Stage::new();
    let data = stage.folder.display().to_string();
    let output = stage.shell("ls /mnt/outer; touch /mnt/outer/x; stat -c %a /mnt/sticky", |config| {
        let mounts = config["mounts"].as_array_mut().expect("an array");
        mounts.push(bundle::mount("/mnt/outer", "tmpfs", "tmpfs", &["ro", "nosuid"]));
        mounts.push(bundle::mount("/mnt/outer/inner", "bind", &data, &["bind", "ro"]));
        mounts.push(bundle::mount("/mnt/sticky", "tmpfs", "tmpfs", &["mode=1750"]));
    });
    assert!(output.starts_with("inner\n") && output.contains("Read-only file system") && output.ends_with("1750\n"), "{output}");
}

fn users_have_their_ids_groups_umask_and_home() {
    let stage = Stage::new();
    let output = stage.shell("id; umask; echo $HOME; stat -c %u /proc/self/fd/1 -L", |config| {
        config["process"]["user"] = json!({ "uid": 1000, "gid": 1001, "additionalGids": [5, 6], "umask": 0o77 });
    });
    assert_eq!(output, "uid=1000(user) gid=1001 groups=5,6\n0077\n/tmp\n1000\n");
    let output = stage.shell("umask; echo $HOME; id -G", |config| config["process"]["user"]["uid"] = json!(4321));
    assert_eq!(output, "0022\n/\n0\n");
}

fn the_working_directory_is_made() {
    let stage = Stage::new();
    let output = stage.shell("pwd; stat -c %a:%u .", |config| {
        config["process"]["cwd"] = json!("/made/for/me");
        config["process"]["user"]["uid"] = json!(1000);
    });
    assert_eq!(output, "/made/for/me\n755:0\n");
}

fn limits_of_the_process_are_exact() {
    let stage = Stage::new();
    let output = stage.shell("ulimit -n; ulimit -Hn; ulimit -c; grep ^Max.stack /proc/self/limits", |config| {
        config["process"]["rlimits"] = json!([
            { "type": "RLIMIT_NOFILE", "soft": 7, "hard": 9 },
            { "type": "RLIMIT_CORE", "soft": 0, "hard": 0 },
            { "type": "RLIMIT_STACK", "soft": 8 << 20, "hard": u64::MAX },
        ]);
    });
    assert!(output.starts_with("7\n9\n0\n") && output.contains("8388608              unlimited"), "{output}");
}

fn settings_of_the_namespaces_are_written() {
    let stage = Stage::new();
    let script =
        "cat /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/kernel/shmmni /proc/sys/kernel/domainname /proc/self/oom_score_adj";
    let output = stage.shell(script, |config| {
        config["linux"]["sysctl"] = json!({ "net.ipv4.ip_unprivileged_port_start": "7", "kernel.shmmni": "77" });
        config["domainname"] = json!("example.org");
        config["process"]["oomScoreAdj"] = json!(123);
    });
    assert_eq!(output, "7\n77\nexample.org\n123\n");
}

fn a_filter_holds_for_init() {
    let stage = Stage::new();
    for no_new_privileges in [true, false] {
        let output = stage.shell("grep Seccomp: /proc/self/status; mkdir /tmp/x; rmdir /tmp/x", |config| {
            config["linux"]["seccomp"] = bundle::filter();
            config["process"]["noNewPrivileges"] = json!(no_new_privileges);
            config["process"]["args"][2] = json!("grep Seccomp: /proc/self/status; mkdir /tmp/x; true");
        });
        assert!(output.starts_with("Seccomp:\t2\n") && output.contains("File too large"), "{output}");
    }
}

fn a_terminal_is_the_controlling_one() {
    let stage = Stage::new();
    let mut config =
        stage.config(&["sh", "-c", "stty size; tty; echo to-tty > /dev/tty; echo to-console > /dev/console; ls -l /dev/console"]);
    config["process"]["terminal"] = json!(true);
    config["process"]["consoleSize"] = json!({ "height": 33, "width": 101 });
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    let (status, _) = init.end();
    let output = init.terminal();
    assert_eq!(status, 0, "{output}");
    for expected in ["33 101", "/dev/pts/0", "to-tty", "to-console", "136,   0"] {
        assert!(output.contains(expected), "{output}");
    }
    stage.delete("c").expect("deleted");
}

fn a_missing_program_fails_the_creation_in_the_words_that_clients_match() {
    let stage = Stage::new();
    fs::write(stage.root().join("no-x"), "").expect("a file");
    for (program, words) in [
        ("missing", "exec: \"missing\": executable file not found in $PATH"),
        ("/missing", "exec: \"/missing\": stat /missing: no such file or directory"),
        ("/etc", "exec: \"/etc\": is a directory"),
        ("/no-x", "exec: \"/no-x\": permission denied"),
        ("/no-x/below", "exec: \"/no-x/below\": stat /no-x/below: not a directory"),
        ("", "exec: \"\": executable file not found in $PATH"),
    ] {
        let error = stage.create("c", &stage.config(&[program])).err().expect("refused");
        assert_eq!(error, words);
    }
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

fn a_program_that_cannot_be_executed_ends_with_255() {
    let stage = Stage::new();
    fs::write(stage.root().join("nonsense"), "\x7fELFnot").expect("a file");
    fs::set_permissions(stage.root().join("nonsense"), std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("permissions");
    let (status, output) = stage.run(&stage.config(&["/nonsense"]));
    assert_eq!((status, output.as_str()), (255, "exec /nonsense: exec format error\n"));
}

fn the_host_keeps_its_mounts() {
    let stage = Stage::new();
    let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let before = mounts();
    stage.run(&stage.config(&["true"]));
    assert!(stage.create("c", &stage.config(&["missing"])).is_err());
    assert_eq!(mounts(), before);
}

fn capabilities_are_those_of_the_configuration() {
    let stage = Stage::new();
    let output = stage.shell("grep ^Cap /proc/self/status", |config| {
        let all = json!(["CAP_CHOWN", "CAP_NET_RAW", "CAP_BPF"]);
        config["process"]["user"]["uid"] = json!(1000);
        config["process"]["capabilities"] =
            json!({ "bounding": all, "effective": ["CAP_CHOWN", "CAP_NET_RAW"], "permitted": all, "inheritable": all, "ambient": ["CAP_NET_RAW"] });
    });
    let expected = "CapInh:\t0000008000002001\nCapPrm:\t0000000000002000\nCapEff:\t0000000000002000\nCapBnd:\t0000008000002001\nCapAmb:\t0000000000002000\n";
    assert_eq!(output, expected);
}

fn devices_are_made_with_their_owners() {
    let stage = Stage::new();
    let output =
        stage.shell("stat -c '%n %t:%T %a %u:%g' /dev/null /dev/own /dev/deep/er; readlink /dev/ptmx; readlink /dev/stdout", |config| {
            config["linux"]["devices"] = json!([
                { "path": "/dev/own", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 8 },
                { "path": "/dev/deep/er", "type": "b", "major": 7, "minor": 300 },
            ]);
        });
    assert_eq!(output, "/dev/null 1:3 666 0:0\n/dev/own 1:5 640 7:8\n/dev/deep/er 7:12c 666 0:0\npts/ptmx\n/proc/self/fd/1\n");
}

fn every_process_is_killed_on_deletion() {
    let stage = Stage::new();
    let mut config = stage.config(&["sh", "-c", "sleep 1000 & sleep 1000 & exec sleep 1000"]);
    // The host's pid namespace: no kernel takes the others with init.
    config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "pid");
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

/// At moments from its beginning to its end: each is a run of its own.
fn a_performer_that_is_killed_leaves_no_half_container() {
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    // The host's pid namespace: nothing ends with init by itself.
    config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "pid");
    let mounts = || fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let before = mounts();
    let (mut early, mut late) = (0, 0);
    for round in 0..400 {
        let was_late = stage.create_killed(&config, round * 50).unwrap_or_else(|error| panic!("round {round}: {error}"));
        if was_late {
            late += 1
        } else {
            early += 1
        }
        assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new(), "round {round}");
        if late > 20 {
            break;
        }
    }
    assert!(early > 5, "{early} early, {late} late");
    assert_eq!(mounts(), before);
    assert_eq!(stage.run(&config).0, 0);
}

fn settings_of_the_runtimes_network_are_not_changed() {
    let stage = Stage::new();
    let mut config = stage.config(&["true"]);
    config["linux"]["sysctl"] = json!({ "net.ipv4.ip_unprivileged_port_start": "1024" });
    // The keeper is 1 in its pid namespace.
    config["linux"]["namespaces"][4]["path"] = json!("/proc/1/ns/net");
    let error = stage.create("c", &config).err().expect("refused");
    assert!(error.contains("would change the settings of the host"), "{error}");
    assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
}

/// It forks all the time; what it has written does not change between two looks of the frozen, and does again.
fn a_frozen_container_does_nothing_until_it_is_thawed() {
    for stage in [Stage::new(), Stage::on_v2()] {
        let init = stage.create("c", &stage.config(&["sh", "-c", "while :; do echo $(true) x >> /count; done"])).expect("created");
        stage.start("c");
        let length = || fs::metadata(stage.root().join("count")).map_or(0, |about| about.len());
        let wait_past = |past: u64| {
            for _attempt in 0..1_000_000 {
                if length() > past {
                    return;
                }
                std::thread::yield_now();
            }
            panic!("still {past}");
        };
        wait_past(0);
        for _ in 0..20 {
            stage.freeze("c", true).expect("frozen");
            let before = length();
            assert!(stage.count("c") >= 1);
            assert_eq!(length(), before);
            stage.freeze("c", false).expect("thawed");
            wait_past(before);
        }
        // A frozen one is deleted too.
        stage.freeze("c", true).expect("frozen");
        stage.delete("c").expect("deleted");
        init.end();
        assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new());
    }
}

fn limits_are_changed_or_none_is() {
    let stage = Stage::new();
    let mut config = stage.config(&["sleep", "1000"]);
    config["linux"]["resources"]["memory"] = json!({ "limit": 64 << 20 });
    config["linux"]["resources"]["cpu"] = json!({ "quota": 50_000, "period": 100_000, "burst": 10_000, "shares": 512 });
    let _init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    let devices = stage.limit("devices", "devices.list");
    // The quota falls below the burst, so the burst has to fall first, though it comes second.
    stage
        .update("c", &json!({ "memory": { "limit": 32 << 20 }, "cpu": { "quota": 5_000, "burst": 1_000 }, "pids": { "limit": 9 } }))
        .expect("changed");
    let is = |controller: &str, file: &str, value: u64| assert_eq!(stage.limit(controller, file), value.to_string(), "{file}");
    is("memory", "memory.limit_in_bytes", 32 << 20);
    is("cpu", "cpu.cfs_quota_us", 5_000);
    is("cpu", "cpu.cfs_period_us", 100_000);
    is("cpu", "cpu.cfs_burst_us", 1_000);
    is("cpu", "cpu.shares", 512);
    is("pids", "pids.max", 9);
    // The last is refused: the first are as before.
    let error = stage
        .update("c", &json!({ "memory": { "limit": 16 << 20 }, "pids": { "limit": 3 }, "cpu": { "cpus": "4096" } }))
        .expect_err("refused");
    assert!(error.contains("cpuset.cpus"), "{error}");
    is("memory", "memory.limit_in_bytes", 32 << 20);
    is("pids", "pids.max", 9);
    assert_eq!(stage.limit("devices", "devices.list"), devices);
}

/// A profile from before these calls, and one without sockets.
fn a_filter_may_forbid_what_the_engine_has_other_ways_for() {
    for no_new_privileges in [true, false] {
        for errno in [1, 38] {
            let stage = Stage::new();
            let change = |config: &mut serde_json::Value| {
                config["process"]["noNewPrivileges"] = json!(no_new_privileges);
                config["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{
                    "names": ["faccessat2", "sendto", "sendmsg", "recvfrom", "recvmsg", "openat2", "close_range", "pidfd_open", "prlimit64", "clone3"],
                    "action": "SCMP_ACT_ERRNO", "errnoRet": errno,
                }] });
            };
            assert_eq!(stage.shell("echo ran", change), "ran\n");
            let mut config = stage.config(&["sleep", "1000"]);
            change(&mut config);
            let _init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
            assert_eq!(stage.exec_shell("c", "echo ran", |process| process["noNewPrivileges"] = json!(no_new_privileges)), "ran\n");
        }
    }
}
