//! The same bundle on this engine, runc and crun.
use std::collections::BTreeSet;
use std::fs;
use std::process::{Command, Stdio};

use serde_json::{Value, json};

use crate::bundle;
use crate::stage::{self, Stage};

crate::cases![
    init_looks_as_with_runc,
    init_looks_as_with_crun,
    cgroups_look_as_with_runc,
    a_cgroup_namespace_looks_as_with_runc,
    a_read_only_root_and_another_user_look_as_with_runc,
    the_hosts_namespaces_look_as_with_runc,
    a_privileged_container_looks_as_with_runc,
    binds_look_as_with_runc,
    other_mounts_look_as_with_runc,
    other_mounts_look_as_with_crun,
    a_bound_procfs_looks_as_with_runc,
    an_added_process_looks_as_with_runc,
    an_added_process_looks_as_with_crun,
    a_user_namespace_looks_as_with_runc,
    a_user_namespace_looks_as_with_crun,
    an_added_process_in_a_user_namespace_looks_as_with_runc,
    an_added_process_in_a_user_namespace_looks_as_with_crun,
    filters_are_as_runcs,
    filters_are_as_cruns,
    features_are_runcs_but_for_what_is_refused,
];

/// What is compared. Options of cgroup v2 are left out, which a mount of runc 1.1's takes from the host's too, and its source: here it is the host's. What names a moment (pids, memory) is left out, and ids of mounts and devices.
const FACTS: &str = "exec 2>&1; \
    echo [mounts]; cut -d' ' -f4- /proc/self/mountinfo | sed 's/ cgroup2 cgroup2 / cgroup2 cgroup /; s/,nsdelegate//; s/,memory_recursiveprot//' | sort -k2; \
    echo [cgroup]; cat /proc/self/cgroup; \
    echo [status]; grep -E '^(Umask|Uid|Gid|Groups|Sig[IBC]|Cap|NoNewPrivs|Seccomp:|Cpus_allowed_list|Mems_allowed_list|THP)' /proc/self/status; \
    echo [limits]; cat /proc/self/limits; \
    echo [others]; echo OOM score adjustment $(cat /proc/self/oom_score_adj); cat /proc/self/uid_map /proc/self/gid_map /proc/self/setgroups /proc/self/personality /proc/self/timerslack_ns /proc/self/coredump_filter; \
    echo [dev]; cd /dev; for f in * pts/* shm/*; do stat -c '%n %F %t:%T %a %u:%g' $f; done; \
    echo [root]; for f in / /proc /sys /run /dev/shm; do stat -c '%n %a %u:%g' $f; done; \
    echo [session]; set -- $(cut -d' ' -f5-8 /proc/self/stat); test $1 = $$ && echo leads group; test $2 = $$ && echo leads session; echo $3 $4; \
    echo [env]; env | sort; cd /; pwd; hostname; \
    echo [masks]; cat /proc/keys /proc/timer_list; ls -A /sys/firmware /proc/acpi; \
    echo [descriptors]; exec ls /proc/self/fd";

/// Where a difference is known, and why.
fn is_expected(line: &str, other: &str) -> bool {
    // Masked folders share one file system, whose options show what limits it.
    let is_mask = line.contains(" /proc/acpi ") || line.contains(" /sys/firmware ");
    // crun makes the link without a /proc/kcore to lead to.
    let is_core = line.contains("core ") && other == "crun";
    // crun binds the host's null device and remounts with other attributes, and leaves sysfs itself writable.
    let is_cruns = other == "crun" && (line.starts_with('/') || line.contains(" /proc/") || line.contains(" /sys "));
    // Both leave ignored what they were started with ignored; crun before 1.20 starts no session for added processes, and gives them the score
    // adjustment that it has itself.
    let is_started = line.starts_with("SigIgn:") || (other == "crun" && (line.starts_with("leads ") || line.starts_with("OOM ")));
    // runc allows tunnels, crun the system's console.
    let is_device = other == "crun" && (line == "c 10:200 rwm" || line == "c 5:1 rwm");
    // Later versions of runc show the unified hierarchy of a hybrid host too.
    let is_unified = line.contains(" /sys/fs/cgroup/unified ");
    // runc 1.1 makes the ipc namespace before it has a group of the user namespace.
    let is_mqueue = other == "runc" && line.starts_with("mqueue directory") && line.ends_with(":65534");
    let is_our_mqueue = other == "runc" && line == "mqueue directory 0:0 1777 0:0";
    // Go raises its own limit of open files to the hard one, and runc 1.1 hands it on where the configuration names none.
    let is_raised = other == "runc" && line.starts_with("Max open files");
    is_mqueue || is_our_mqueue || is_raised || is_mask || is_core || is_cruns || is_started || is_device || is_unified
}

fn compare(ours: &str, theirs: &str, other: &str) {
    let lines =
        |text: &str| -> BTreeSet<String> { text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect() };
    let (ours, theirs) = (lines(ours), lines(theirs));
    let only = |these: &BTreeSet<String>, those: &BTreeSet<String>, sign: &str| -> Vec<String> {
        these.difference(those).filter(|line| !is_expected(line, other)).map(|line| format!("{sign} {line}")).collect()
    };
    let differences = [only(&ours, &theirs, "native:"), only(&theirs, &ours, &format!("{other}:"))].concat();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
}

/// A container of another runtime, removed with the value.
pub(crate) struct Other<'a> {
    pub(crate) runtime: &'a str,
    pub(crate) stage: &'a Stage,
}

impl Other<'_> {
    pub(crate) fn command(&self) -> Command {
        let mut command = Command::new(self.runtime);
        command.arg("--root").arg(self.stage.folder.join("state")).current_dir(&self.stage.folder);
        // Not the null device: both would give the host's to the container's user.
        command.stdin(self.empty_file()).stdout(self.empty_file()).stderr(self.empty_file());
        command
    }

    fn empty_file(&self) -> fs::File {
        let path = self.stage.folder.join("empty");
        fs::File::options().create(true).truncate(true).read(true).write(true).open(path).expect("a file")
    }

    pub(crate) fn output(&self, arguments: &[&str]) -> String {
        let output = self.command().args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).output().expect("the runtime");
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
    }
}

impl Other<'_> {
    /// Runs the container `other`, and returns while it runs.
    pub(crate) fn detach(&self) {
        // A file: the container keeps it.
        let log = self.stage.folder.join("log");
        let file = || fs::File::create(&log).expect("a file");
        let made = self.command().args(["run", "--detach", "other"]).stdout(file()).stderr(file()).status().expect("the runtime");
        assert!(made.success(), "{}", fs::read_to_string(&log).unwrap_or_default());
    }
}

impl Drop for Other<'_> {
    fn drop(&mut self) {
        let _ = self.command().args(["delete", "--force", "other"]).status();
    }
}

/// Skips with a reason where a runtime is not installed.
pub(crate) fn is_installed(runtime: &str) -> bool {
    let is_there = Command::new(runtime).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    if !is_there {
        eprintln!("skipped: no {runtime}");
    }
    is_there
}

fn config(stage: &Stage, script: &str) -> Value {
    let mut config = stage.config(&["sh", "-c", script]);
    config["process"]["env"] = json!(["PATH=/bin", "A=1", "HOME=/root"]);
    config["process"]["oomScoreAdj"] = json!(5);
    config
}

/// Compares the whole output of a script.
pub(crate) fn compare_scripts(stage: &Stage, runtime: &str, script: &str, change: impl FnOnce(&mut Value)) {
    if !is_installed(runtime) {
        return;
    }
    let mut config = config(stage, script);
    change(&mut config);
    let (_, ours) = stage.run(&config);
    let other = Other { runtime, stage };
    assert_eq!(ours, other.output(&["run", "other"]), "{script}");
}

/// Compares what our engine and another write for the same resources. `files`: each with its controller, which has no part in cgroup v2.
pub(crate) fn compare_limits(stage: &Stage, runtime: &str, resources: impl FnOnce(&mut Value), files: &[(&str, &str)]) {
    let mut config = stage.config(&["sleep", "1000"]);
    resources(&mut config["linux"]["resources"]);
    let facts = || -> Vec<String> { files.iter().map(|(controller, file)| format!("{file}: {}", stage.limit(controller, file))).collect() };
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    let ours = facts();
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");
    let other = Other { runtime, stage };
    other.detach();
    assert_eq!(ours, facts());
}

fn compare_inits(runtime: &str, change: impl FnOnce(&Stage, &mut Value)) {
    if !is_installed(runtime) {
        return;
    }
    let stage = Stage::new();
    let mut config = config(&stage, FACTS);
    change(&stage, &mut config);
    let (status, ours) = stage.run(&config);
    assert_eq!(status, 0, "{ours}");
    let other = Other { runtime, stage: &stage };
    compare(&ours, &other.output(&["run", "other"]), runtime);
}

fn init_looks_as_with_runc() {
    compare_inits("runc", |_, _| {});
}

fn init_looks_as_with_crun() {
    compare_inits("crun", |_, _| {});
}

fn add_mount(config: &mut Value, destination: &str, kind: &str, source: &str, options: &[&str]) {
    config["mounts"].as_array_mut().expect("an array").push(bundle::mount(destination, kind, source, options));
}

/// As Docker mounts them.
fn cgroups_look_as_with_runc() {
    compare_inits("runc", |_, config| add_mount(config, "/sys/fs/cgroup", "cgroup", "cgroup", &["ro", "nosuid", "noexec", "nodev"]));
}

fn a_cgroup_namespace_looks_as_with_runc() {
    compare_inits("runc", |_, config| {
        add_mount(config, "/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]);
        config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "cgroup" }));
    });
}

fn a_read_only_root_and_another_user_look_as_with_runc() {
    compare_inits("runc", |stage, config| {
        fs::create_dir_all(stage.root().join("work")).expect("a folder");
        config["root"]["readonly"] = json!(true);
        config["process"]["user"] = json!({ "uid": 1000, "gid": 1000, "additionalGids": [5, 7], "umask": 0o27 });
        config["process"]["cwd"] = json!("/work");
        config["process"]["noNewPrivileges"] = json!(false);
        config["process"]["capabilities"]["inheritable"] = json!(["CAP_KILL"]);
        config["process"]["capabilities"]["ambient"] = json!(["CAP_KILL"]);
        add_mount(config, "/tmp", "tmpfs", "tmpfs", &["ro", "nosuid", "size=1m", "mode=1777"]);
    });
}

fn the_hosts_namespaces_look_as_with_runc() {
    compare_inits("runc", |_, config| {
        config["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": "pid" }]);
        config["hostname"] = json!(null);
        // A sysfs needs a network namespace of its own.
        add_mount(config, "/data", "bind", "/sys", &["rbind", "ro", "rprivate"]);
    });
}

fn a_privileged_container_looks_as_with_runc() {
    compare_inits("runc", |_, config| {
        // What differs each time stays masked.
        config["linux"]["maskedPaths"] = json!(["/proc/keys", "/proc/timer_list"]);
        config["linux"]["readonlyPaths"] = json!(null);
        config["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
        config["linux"]["devices"] =
            json!([{ "path": "/dev/loop9", "type": "b", "major": 7, "minor": 9, "fileMode": 0o660, "uid": 0, "gid": 6 }]);
        config["process"]["noNewPrivileges"] = json!(false);
        add_mount(config, "/sys/fs/cgroup", "cgroup", "cgroup", &["rw", "nosuid", "noexec", "nodev", "relatime"]);
    });
}

fn binds_look_as_with_runc() {
    compare_inits("runc", |stage, config| {
        let data = stage.folder.join("data");
        fs::create_dir_all(&data).expect("a folder");
        fs::write(data.join("file"), "").expect("a file");
        for (number, options) in [
            &["rbind", "rprivate"][..],
            &["bind"],
            &["rbind", "ro"],
            &["rbind", "nosuid", "nodev", "noexec", "rslave"],
            &["bind", "noatime"],
            &["bind", "ro", "nodiratime"],
            &["bind", "strictatime", "rw"],
            &["rbind", "shared"],
            &["bind", "rshared", "ro"],
            &["bind", "unbindable"],
        ]
        .iter()
        .enumerate()
        {
            add_mount(config, &format!("/bind/{number}"), "bind", &data.display().to_string(), options);
        }
        add_mount(config, "/etc/hosts", "bind", &data.join("file").display().to_string(), &["rbind", "rprivate", "rw"]);
        add_mount(config, "/sys-again", "bind", "/sys", &["rbind", "ro", "nosuid"]);
        add_mount(config, "/dev/shm/inner", "tmpfs", "inner", &["mode=1700", "size=4k", "noatime", "sync"]);
    });
}

/// With roots that are moved.
pub(crate) fn compare_moved(runtime: &str) {
    if !is_installed(runtime) {
        return;
    }
    let stage = Stage::new();
    stage.no_pivot_root.set(true);
    let config = config(&stage, FACTS);
    let (status, ours) = stage.run(&config);
    assert_eq!(status, 0, "{ours}");
    let other = Other { runtime, stage: &stage };
    compare(&ours, &other.output(&["run", "--no-pivot", "other"]), runtime);
}

fn add_other_mounts(stage: &Stage, config: &mut Value) {
    for folder in ["lower", "upper", "data"] {
        fs::create_dir_all(stage.folder.join(folder)).expect("a folder");
    }
    let of = |folder: &str| stage.folder.join(folder).display().to_string();
    // Without one to write to, whose state the next mount would show.
    let layers = format!("lowerdir={}:{}", of("lower"), of("upper"));
    add_mount(config, "/overlay", "overlay", "overlay", &[&layers, "nosuid"]);
    add_mount(config, "/ramfs", "ramfs", "some", &["nodev", "noatime"]);
    add_mount(config, "/etc", "tmpfs", "tmpfs", &["tmpcopyup", "nosuid", "size=1m"]);
    add_mount(config, "/data", "bind", &of("data"), &["rbind", "nosuid"]);
}

fn other_mounts_look_as_with_runc() {
    compare_inits("runc", add_other_mounts);
}

fn other_mounts_look_as_with_crun() {
    compare_inits("crun", add_other_mounts);
}

fn a_bound_procfs_looks_as_with_runc() {
    compare_inits("runc", |_, config| {
        config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "pid");
        config["mounts"][0] = bundle::mount("/proc", "bind", "/proc", &["rbind", "nosuid", "noexec", "nodev"]);
    });
}

fn compare_execs(runtime: &str, change_config: impl FnOnce(&Stage, &mut Value)) {
    if !is_installed(runtime) {
        return;
    }
    let stage = Stage::new();
    let mut config = config(&stage, "exec sleep 1000");
    change_config(&stage, &mut config);
    let init = stage.create("c", &config).unwrap_or_else(|error| panic!("create: {error}"));
    stage.start("c");
    let change = |process: &mut Value| {
        process["user"] = json!({ "uid": 1000, "gid": 1000, "additionalGids": [3] });
        process["oomScoreAdj"] = json!(5);
        process["rlimits"] = config["process"]["rlimits"].clone();
    };
    let ours = stage.exec_shell("c", FACTS, change);
    let our_devices = devices(&stage).unwrap_or_default();
    init.kill();
    init.end();
    stage.delete("c").expect("deleted");

    let other = Other { runtime, stage: &stage };
    other.detach();
    compare(&our_devices, &devices(&stage).unwrap_or_default(), runtime);
    let mut process = bundle::process(&["sh", "-c", FACTS]);
    change(&mut process);
    let file = stage.folder.join("process.json");
    fs::write(&file, process.to_string()).expect("a file");
    compare(&ours, &other.output(&["exec", "--process", &file.display().to_string(), "other"]), runtime);
}

/// What the cgroup allows, where that can be read: not on v2.
fn devices(stage: &Stage) -> Option<String> {
    (!stage::is_v2_alone()).then(|| stage.limit("devices", "devices.list"))
}

fn an_added_process_looks_as_with_runc() {
    compare_execs("runc", |_, _| {});
}

fn an_added_process_looks_as_with_crun() {
    compare_execs("crun", |_, _| {});
}

/// Without limits, which runc may not change in another user namespace where it has no CAP_SYS_RESOURCE.
fn map(stage: &Stage, config: &mut Value) {
    crate::users::map(stage, config);
    config["process"]["rlimits"] = json!([]);
}

fn a_user_namespace_looks_as_with_runc() {
    compare_inits("runc", map);
}

fn a_user_namespace_looks_as_with_crun() {
    compare_inits("crun", map);
}

fn an_added_process_in_a_user_namespace_looks_as_with_runc() {
    compare_execs("runc", map);
}

fn an_added_process_in_a_user_namespace_looks_as_with_crun() {
    compare_execs("crun", map);
}

/// Calls whose results show which rule of a filter applied: each by an applet of busybox.
const PROBES: &str = "exec 2>&1; mkdir /tmp/x; rmdir /tmp/x; ln -s a /tmp/l; rm /tmp/l; chmod 700 /tmp; chown 1:1 /tmp; hostname x; \
    mknod /tmp/f p; rm -f /tmp/f; setpriv --dump; renice 5 $$; chroot / true; sync; kill -0 1; sleep 0; date -s 0; mount -t tmpfs t /tmp; echo done";

fn compare_filters(runtime: &str) {
    if !is_installed(runtime) {
        return;
    }
    let stage = Stage::new();
    for default in ["SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO"] {
        let mut config = config(&stage, PROBES);
        let forbidden = ["mkdir", "mkdirat", "symlink", "symlinkat", "sethostname", "setpriority", "mount", "chmod", "fchmodat"];
        config["linux"]["seccomp"] = if default == "SCMP_ACT_ALLOW" {
            json!({ "defaultAction": default, "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"], "syscalls": [
                { "names": forbidden, "action": "SCMP_ACT_ERRNO", "errnoRet": 27 },
                { "names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28, "args": [{ "index": 1, "value": 0, "op": "SCMP_CMP_EQ" }] },
            ] })
        } else {
            let allowed: Vec<&str> =
                syscalls::x86_64::Sysno::iter().map(|call| call.name()).filter(|name| !forbidden.contains(name)).collect();
            json!({ "defaultAction": default, "defaultErrnoRet": 29, "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [
                { "names": allowed, "action": "SCMP_ACT_ALLOW" },
            ] })
        };
        let (_, ours) = stage.run(&config);
        let other = Other { runtime, stage: &stage };
        assert_eq!(ours, other.output(&["run", "other"]), "{default}");
    }
}

fn filters_are_as_runcs() {
    compare_filters("runc");
}

fn filters_are_as_cruns() {
    compare_filters("crun");
}

fn features_are_runcs_but_for_what_is_refused() {
    if !is_installed("runc") {
        return;
    }
    let stage = Stage::new();
    let other = Other { runtime: "runc", stage: &stage };
    let theirs: Value = serde_json::from_str(&other.output(&["features"])).expect("JSON");
    let ours = x_engine::features(&x_engine::Host::read().expect("a host"));
    let set = |features: &Value, place: &str| -> BTreeSet<String> {
        let list = features.pointer(place).and_then(Value::as_array).unwrap_or_else(|| panic!("{place}"));
        list.iter().map(|entry| entry.as_str().expect("text").to_owned()).collect()
    };
    for place in ["/hooks", "/linux/capabilities", "/linux/seccomp/actions", "/linux/seccomp/operators"] {
        assert_eq!(set(&ours, place), set(&theirs, place), "{place}");
    }
    for (place, refused) in [
        ("/linux/namespaces", vec![]),
        ("/mountOptions", vec![]),
        (
            "/linux/seccomp/archs",
            vec!["MIPS", "MIPS64", "MIPS64N32", "MIPSEL", "MIPSEL64", "MIPSEL64N32", "PPC", "PPC64", "PPC64LE", "RISCV64", "S390", "S390X"],
        ),
    ] {
        // What is implemented later is a difference no more.
        let missing: Vec<String> = set(&theirs, place).difference(&set(&ours, place)).cloned().collect();
        let is_known = |name: &String| refused.contains(&name.trim_start_matches("SCMP_ARCH_"));
        assert!(missing.iter().all(is_known), "{place}: {missing:?}");
    }
}
