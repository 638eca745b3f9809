//! Corners of a configuration's fields, on this engine, runc and crun.
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;

use serde_json::{Value, json};

use crate::bundle;
use crate::differences::{Other, compare_scripts, is_installed};
use crate::stage::Stage;

crate::cases![
    targets_are_made_as_with_runc,
    targets_are_made_as_with_crun,
    words_of_mounts_mean_what_they_mean_to_runc,
    devices_are_made_as_with_runc,
    devices_are_made_as_with_crun,
    masks_and_read_only_paths_are_as_with_runc,
    settings_are_written_as_with_runc,
    settings_are_written_as_with_crun,
    programs_are_found_as_with_runc,
    programs_are_found_as_with_crun,
    a_relative_cgroup_is_where_runc_has_it,
    a_process_without_limits_has_those_that_runc_gives_it,
    a_process_without_limits_has_those_that_crun_gives_it,
    what_configurations_leave_out_is_as_with_runc,
    what_configurations_leave_out_is_as_with_crun,
    what_runc_refuses_is_refused,
];

fn add_mounts(config: &mut Value, mounts: Vec<Value>) {
    config["mounts"].as_array_mut().expect("an array").extend(mounts);
}

/// A source of every type; targets that are missing, below missing folders, behind links that lead nowhere (which crun refuses), and there already.
fn compare_targets(runtime: &str) {
    if !is_installed(runtime) {
        return;
    }
    let has_links = runtime != "crun";
    let stage = Stage::new();
    let data = stage.folder.join("data");
    fs::create_dir_all(data.join("folder/inner")).expect("a folder");
    fs::write(data.join("file"), "content").expect("a file");
    let _socket = UnixListener::bind(data.join("socket")).expect("a socket");
    nix::unistd::mkfifo(&data.join("fifo"), nix::sys::stat::Mode::from_bits_truncate(0o640)).expect("a fifo");
    let of = |name: &str| data.join(name).display().to_string();
    let script = "exec 2>&1; cd /targets; for f in folder file socket fifo device deep deep/er link link/inside there; do stat -c '%n %F %a %u:%g' $f; done; \
        stat -c '%n %F %a' /dangling /dangling/inside; readlink /targets/link /dangling-link; umount /targets/* 2> /dev/null; cat /targets/link/inside /dangling-link; ls /; true";
    let prepare = || {
        // Each runtime gets an untouched root.
        let root = stage.root();
        let _ = fs::remove_dir_all(root.join("targets"));
        let _ = fs::remove_dir_all(root.join("dangling"));
        let _ = fs::remove_file(root.join("dangling-link"));
        fs::create_dir_all(root.join("targets/there")).expect("a folder");
        fs::set_permissions(root.join("targets/there"), fs::Permissions::from_mode(0o711)).expect("changed");
        std::os::unix::fs::symlink("../dangling", root.join("targets/link")).expect("a link");
        std::os::unix::fs::symlink("/dangling/too", root.join("dangling-link")).expect("a link");
    };
    let change = |config: &mut Value| {
        let bind = |target: &str, source: &str| bundle::mount(target, "bind", source, &["rbind"]);
        add_mounts(
            config,
            vec![
                bind("/targets/folder", &of("folder")),
                bind("/targets/file", &of("file")),
                bind("/targets/socket", &of("socket")),
                bind("/targets/fifo", &of("fifo")),
                bind("/targets/device", "/dev/zero"),
                bind("/targets/deep/er", &of("file")),
                bind("/targets/there", &of("folder")),
            ],
        );
        if has_links {
            add_mounts(config, vec![bind("/targets/link/inside", &of("file")), bind("/dangling-link", &of("file"))]);
        }
    };
    let mut config = stage.config(&["sh", "-c", script]);
    change(&mut config);
    prepare();
    let (_, ours) = stage.run(&config);
    prepare();
    let other = Other { runtime, stage: &stage };
    assert_eq!(ours, other.output(&["run", "other"]));
    // What was made outside the mounts, seen from the host.
    assert_eq!(stage.root().join("dangling/too").is_file() && stage.root().join("dangling/inside").is_file(), has_links);
}

fn targets_are_made_as_with_runc() {
    compare_targets("runc");
}

fn targets_are_made_as_with_crun() {
    compare_targets("crun");
}

/// Of words that contradict each other the last one counts; words of propagation are set one by one; a folder's own mode is a tmpfs's.
fn words_of_mounts_mean_what_they_mean_to_runc() {
    let stage = Stage::new();
    for (name, mode) in [("sticky", 0o1777), ("private", 0o700)] {
        fs::create_dir_all(stage.root().join(name)).expect("a folder");
        fs::set_permissions(stage.root().join(name), fs::Permissions::from_mode(mode)).expect("changed");
    }
    let data = stage.folder.join("data");
    fs::create_dir_all(&data).expect("a folder");
    let data = data.display().to_string();
    let script = "grep -E ' /(words|sticky|private)' /proc/self/mountinfo | cut -d' ' -f4-7 | sort; stat -c '%n %a' /sticky /private; \
        grep -E ' /(sticky|private)' /proc/self/mountinfo | sed 's/.* - //; s/,mode=[0-7]*//' | sort";
    compare_scripts(&stage, "runc", script, |config| {
        let words: &[&[&str]] = &[
            &["bind", "ro", "rw"],
            &["bind", "rw", "ro"],
            &["bind", "nosuid", "suid", "nodev", "dev", "noexec", "exec"],
            &["bind", "noatime", "relatime"],
            &["bind", "strictatime", "noatime"],
            &["bind", "noatime", "nostrictatime"],
            &["bind", "noatime", "atime"],
            &["bind", "noatime", "nodiratime"],
            &["rbind", "slave"],
            &["bind", "rslave", "ro"],
            &["bind", "dirsync", "sync"],
            &["rbind", "private", "shared"],
            &["rbind", "shared", "slave"],
        ];
        add_mounts(
            config,
            words.iter().enumerate().map(|(number, words)| bundle::mount(&format!("/words/{number}"), "bind", &data, words)).collect(),
        );
        add_mounts(
            config,
            vec![bundle::mount("/sticky", "tmpfs", "one", &[]), bundle::mount("/private", "tmpfs", "two", &["nosuid", "size=4k"])],
        );
    });
}

/// Of every type; one in a default one's place; the multiplexer of terminals, which is the container's own; parents that are missing.
fn compare_devices(runtime: &str) {
    let stage = Stage::new();
    let script = "exec 2>&1; for f in null zero own unbuffered block fifo deep deep/er ptmx fd stdin; do stat -c '%n %F %t:%T %a %u:%g' /dev/$f; done; for f in ptmx fd stdin; do readlink /dev/$f; done";
    compare_scripts(&stage, runtime, script, |config| {
        config["linux"]["devices"] = json!([
            { "path": "/dev/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 8 },
            { "path": "/dev/own", "type": "c", "major": 1, "minor": 5 },
            { "path": "/dev/unbuffered", "type": "u", "major": 1, "minor": 7, "fileMode": 0o600 },
            { "path": "/dev/block", "type": "b", "major": 7, "minor": 9, "fileMode": 0o660, "gid": 6 },
            { "path": "/dev/fifo", "type": "p", "fileMode": 0o622 },
            { "path": "/dev/deep/er", "type": "c", "major": 1, "minor": 8, "fileMode": 0o444 },
            { "path": "/dev/ptmx", "type": "c", "major": 5, "minor": 2 },
        ]);
    });
}

fn devices_are_made_as_with_runc() {
    compare_devices("runc");
}

fn devices_are_made_as_with_crun() {
    compare_devices("crun");
}

/// Twice the same, missing ones, files and folders, links; a read-only path on a mount that has attributes of its own and another mount below it.
fn masks_and_read_only_paths_are_as_with_runc() {
    let stage = Stage::new();
    let data = stage.folder.join("data");
    fs::create_dir_all(data.join("inner")).expect("a folder");
    fs::create_dir_all(stage.root().join("secret/inner")).expect("a folder");
    fs::write(stage.root().join("secret-file"), "secret").expect("a file");
    std::os::unix::fs::symlink("secret-file", stage.root().join("to-secret")).expect("a link");
    let script = "exec 2>&1; ls /secret; cat /secret-file /to-secret; stat -c %t:%T /secret-file; touch /secret/x; echo x > /secret-file; \
        grep -E ' /(secret-file|volume|proc/(sys|bus))' /proc/self/mountinfo | cut -d' ' -f4-6 | sort; touch /volume/x; touch /volume/inner/x; ls /volume/inner; true";
    compare_scripts(&stage, "runc", script, |config| {
        config["linux"]["maskedPaths"] = json!(["/secret", "/secret-file", "/secret", "/not/there", "/to-secret"]);
        config["linux"]["readonlyPaths"] = json!(["/proc/sys", "/volume", "/proc/bus", "/not/there"]);
        add_mounts(
            config,
            vec![
                bundle::mount("/volume", "bind", &data.display().to_string(), &["bind", "nosuid", "nodev", "noexec"]),
                bundle::mount("/volume/inner", "tmpfs", "tmpfs", &["nosuid"]),
            ],
        );
    });
}

/// With both separators, of every namespace; and names of the host and its domain.
fn compare_settings(runtime: &str) {
    let stage = Stage::new();
    let script = "cd /proc/sys; cat net/ipv4/ip_forward net/ipv4/conf/lo/rp_filter kernel/msgmax kernel/sem kernel/shm_rmid_forced fs/mqueue/msg_max; hostname";
    compare_scripts(&stage, runtime, script, |config| {
        config["linux"]["sysctl"] = json!({
            "net.ipv4.ip_forward": "1", "net/ipv4/conf/lo/rp_filter": "2", "kernel.msgmax": "8000", "kernel.sem": "100 200 30 40",
            "kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "20",
        });
        config["hostname"] = json!("x".repeat(64));
    });
}

fn settings_are_written_as_with_runc() {
    compare_settings("runc");
}

fn settings_are_written_as_with_crun() {
    compare_settings("crun");
}

/// By a path from the working directory, and by folders of PATH that are missing, or files, or have what cannot be executed.
fn compare_programs(runtime: &str) {
    if !is_installed(runtime) {
        return;
    }
    let stage = Stage::new();
    fs::create_dir_all(stage.root().join("first")).expect("a folder");
    fs::create_dir_all(stage.root().join("second/env")).expect("a folder");
    fs::write(stage.root().join("first/env"), "").expect("a file");
    for (args, path, cwd) in [
        (json!(["bin/env"]), "PATH=/nowhere", "/"),
        (json!(["./env"]), "PATH=/nowhere", "/bin"),
        (json!(["../bin/env"]), "PATH=/nowhere", "/etc"),
        (json!(["env"]), "PATH=/nowhere:/etc/passwd:/first:/second:/bin", "/"),
    ] {
        let mut config = stage.config(&[]);
        config["process"]["args"] = args.clone();
        config["process"]["cwd"] = json!(cwd);
        config["process"]["env"] = json!([path, "A=1", "B=2=3", "C=", "HOME=/h", "D=ü", "E=line\nline"]);
        let (status, ours) = stage.run(&config);
        assert_eq!(status, 0, "{args}: {ours}");
        let other = Other { runtime, stage: &stage };
        let lines = |text: &str| -> std::collections::BTreeSet<String> { text.lines().map(str::to_owned).collect() };
        assert_eq!(lines(&ours), lines(&other.output(&["run", "other"])), "{args}");
    }
}

fn programs_are_found_as_with_runc() {
    compare_programs("runc");
}

fn programs_are_found_as_with_crun() {
    compare_programs("crun");
}

/// Absent, or relative: the id, or the path, beginning at the runtime's own cgroup. In each hierarchy.
fn a_relative_cgroup_is_where_runc_has_it() {
    if !is_installed("runc") {
        return;
    }
    for path in [Value::Null, json!("x-engine-relative"), json!("x-engine-relative/../x-engine-other")] {
        let stage = Stage::new();
        let mut config = stage.config(&["cat", "/proc/self/cgroup"]);
        config["linux"]["cgroupsPath"] = path.clone();
        let init = stage.create("other", &config).unwrap_or_else(|error| panic!("create: {error}"));
        stage.start("other");
        let (_, ours) = init.end();
        stage.delete("other").expect("deleted");
        let other = Other { runtime: "runc", stage: &stage };
        let theirs = other.output(&["run", "other"]);
        assert!(ours.contains(if path.is_null() { "/other" } else { "/x-engine-" }), "{ours}");
        assert_eq!(ours, theirs, "{path}");
    }
}

/// Its own, not the container's: those of the runtime.
fn compare_inherited_limits(runtime: &str) {
    if !is_installed(runtime) {
        return;
    }
    let stage = Stage::new();
    let config = stage.config(&["sleep", "1000"]);
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    let script = "grep -v 'pending signals' /proc/self/limits";
    let ours = stage.exec_shell("c", script, |process| process["rlimits"] = json!([]));
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    let other = Other { runtime, stage: &stage };
    other.detach();
    let mut process = bundle::process(&["sh", "-c", script]);
    process["rlimits"] = json!([]);
    let file = stage.folder.join("process.json");
    fs::write(&file, process.to_string()).expect("a file");
    assert_eq!(ours, other.output(&["exec", "--process", &file.display().to_string(), "other"]));
}

fn a_process_without_limits_has_those_that_runc_gives_it() {
    compare_inherited_limits("runc");
}

fn a_process_without_limits_has_those_that_crun_gives_it() {
    compare_inherited_limits("crun");
}

/// As little as a configuration can say.
fn compare_omissions(runtime: &str) {
    let stage = Stage::new();
    let script = "id; umask; pwd; env | sort; cat /proc/self/oom_score_adj; grep -E '^(NoNewPrivs|Seccomp:)' /proc/self/status; ls /dev | grep -v core; \
        grep -E ' /(proc|dev)' /proc/self/mountinfo | cut -d' ' -f4-6";
    compare_scripts(&stage, runtime, script, |config| {
        let (args, path) = (config["process"]["args"].clone(), config["linux"]["cgroupsPath"].clone());
        let capabilities = config["process"]["capabilities"].clone();
        *config = json!({
            "ociVersion": "1.0.2-dev",
            "process": { "args": args, "cwd": "/", "user": { "uid": 0, "gid": 0 }, "env": ["PATH=/bin"], "capabilities": capabilities },
            "root": { "path": "rootfs" },
            "mounts": [bundle::mount("/proc", "proc", "proc", &[])],
            "linux": { "cgroupsPath": path, "namespaces": [{ "type": "mount" }, { "type": "pid" }] },
        });
    });
}

fn what_configurations_leave_out_is_as_with_runc() {
    compare_omissions("runc");
}

fn what_configurations_leave_out_is_as_with_crun() {
    compare_omissions("crun");
}

/// Each is refused here by its field too.
fn what_runc_refuses_is_refused() {
    if !is_installed("runc") {
        return;
    }
    type Change = fn(&mut Value);
    let stage = Stage::new();
    let changes: &[(&str, Change)] = &[
        ("hostname", |config| {
            config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "uts")
        }),
        ("linux.namespaces", |config| config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "pid" }))),
        ("linux.sysctl", |config| config["linux"]["sysctl"] = json!({ "kernel.panic": "1" })),
        ("linux.sysctl", |config| config["linux"]["sysctl"] = json!({ "kernel.hostname": "x" })),
        ("linux.rootfsPropagation", |config| config["linux"]["rootfsPropagation"] = json!("nonsense")),
        ("process.args", |config| config["process"]["args"] = json!([])),
        ("process.cwd", |config| config["process"]["cwd"] = json!("relative")),
        ("process.rlimits", |config| config["process"]["rlimits"] = json!([{ "type": "RLIMIT_NONSENSE", "soft": 1, "hard": 1 }])),
        ("linux.seccomp", |config| config["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_NONSENSE" })),
        ("linux.seccomp", |config| config["linux"]["seccomp"] = json!({ "defaultAction": "SCMP_ACT_ALLOW", "flags": ["NONSENSE"] })),
        ("linux.devices", |config| config["linux"]["devices"] = json!([{ "path": "/dev/x", "type": "z", "major": 1, "minor": 1 }])),
        ("linux.resources.memory", |config| config["linux"]["resources"]["memory"] = json!({ "limit": 64 << 20, "swap": 32 << 20 })),
        ("linux.resources.memory.swappiness", |config| config["linux"]["resources"]["memory"] = json!({ "swappiness": 101 })),
        ("mounts", |config| add_mounts(config, vec![bundle::mount("/proc/self", "tmpfs", "x", &[])])),
        ("mounts", |config| add_mounts(config, vec![bundle::mount("/proc", "tmpfs", "x", &[])])),
    ];
    for (field, change) in changes {
        let mut config = stage.config(&["true"]);
        change(&mut config);
        let error = stage.create("c", &config).err().unwrap_or_else(|| panic!("{field}: not refused"));
        assert!(error.contains(field), "{field}: {error}");
        let other = Other { runtime: "runc", stage: &stage };
        let made = other.command().args(["run", "other"]).status().expect("the runtime");
        assert!(!made.success(), "{field}: runc takes it");
        assert_eq!(stage.cgroups(), Vec::<std::path::PathBuf>::new(), "{field}");
    }
}
