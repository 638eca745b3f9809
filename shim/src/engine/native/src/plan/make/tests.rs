use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::host::MountedHierarchy;
use crate::plan::{Hierarchy, Source};
use crate::spec;

pub(super) fn host() -> Host {
    let hierarchy = |controllers: &[&str], name: &str| MountedHierarchy {
        controllers: controllers.iter().map(|controller| (*controller).to_owned()).collect(),
        mount: format!("/sys/fs/cgroup/{name}"),
        root: "/".to_owned(),
        own: "/daemon".to_owned(),
        available: Vec::new(),
    };
    Host {
        hierarchies: vec![
            hierarchy(&["cpu", "cpuacct"], "cpu,cpuacct"),
            hierarchy(&["cpuset"], "cpuset"),
            hierarchy(&["memory"], "memory"),
            hierarchy(&["devices"], "devices"),
            hierarchy(&["pids"], "pids"),
            hierarchy(&["hugetlb"], "hugetlb"),
            hierarchy(&["blkio"], "blkio"),
            hierarchy(&["net_cls", "net_prio"], "net_cls,net_prio"),
            hierarchy(&["rdma"], "rdma"),
            hierarchy(&["name=systemd"], "systemd"),
            hierarchy(&[], "unified"),
        ],
        last_capability: 40,
        has_kcore: true,
        has_apparmor: true,
        has_selinux: true,
    }
}

/// A configuration that has every field which the engine plans, none with the value that it would have without the field.
pub(super) fn full() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "annotations": { "a": "b" },
        "hooks": {"prestart": [{ "path": "/h", "args": ["h"], "env": ["A=1"], "timeout": 1 }], "createRuntime": [{ "path": "/h", "args": ["h"], "env": ["A=1"], "timeout": 1 }], "createContainer": [{ "path": "/h", "args": ["h"], "env": ["A=1"], "timeout": 1 }], "startContainer": [{ "path": "/h", "args": ["h"], "env": ["A=1"], "timeout": 1 }], "poststart": [{ "path": "/h", "args": ["h"], "env": ["A=1"], "timeout": 1 }], "poststop": [{ "path": "/h", "args": ["h"], "env": ["A=1"], "timeout": 1 }]},
        "hostname": "h",
        "domainname": "d",
        "root": { "path": "r", "readonly": true },
        "process": full_process(),
        "mounts": [
            { "destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid"] },
            { "destination": "/data", "source": "/data", "options": ["rbind", "ro", "rprivate", "rnoexec", "ridmap"],
              "uidMappings": [{ "containerID": 4, "hostID": 5, "size": 6 }], "gidMappings": [{ "containerID": 4, "hostID": 5, "size": 6 }] },
        ],
        "linux": full_linux(),
    })
}

fn full_resources() -> Value {
    json!({
        "devices": [{ "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw" }],
        "memory": { "limit": 4096, "reservation": 4096, "swap": 8192, "swappiness": 7, "disableOOMKiller": true },
        "cpu": { "shares": 7, "quota": 7, "period": 7, "burst": 7, "cpus": "0", "mems": "0", "idle": 1, "realtimePeriod": 7, "realtimeRuntime": 7 },
        "pids": { "limit": 7 },
        "hugepageLimits": [{ "pageSize": "2MB", "limit": 7 }],
        "blockIO": {
            "weight": 7, "leafWeight": 7, "weightDevice": [{ "major": 7, "minor": 7, "weight": 7, "leafWeight": 7 }],
            "throttleReadBpsDevice": full_rate(), "throttleWriteBpsDevice": full_rate(), "throttleReadIOPSDevice": full_rate(), "throttleWriteIOPSDevice": full_rate(),
        },
        "network": { "classID": 7, "priorities": [{ "name": "lo", "priority": 7 }] },
        "rdma": { "mlx": { "hcaHandles": 7, "hcaObjects": 7 } },
    })
}

fn full_linux() -> Value {
    json!({
        "namespaces": [{ "type": "mount" }, { "type": "pid", "path": "/proc/1/ns/pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" }, { "type": "user" }, { "type": "time" }],
        "uidMappings": [{ "containerID": 0, "hostID": 1000, "size": 65536 }],
        "gidMappings": [{ "containerID": 0, "hostID": 1000, "size": 65536 }],
        "timeOffsets": { "monotonic": { "secs": 7, "nanosecs": 8 } },
        "devices": [{ "path": "/dev/x", "type": "b", "major": 7, "minor": 8, "fileMode": 0o600, "uid": 3, "gid": 4 }],
        "cgroupsPath": "/a/b",
        "rootfsPropagation": "rprivate",
        "personality": { "domain": "LINUX32" },
        "memoryPolicy": { "mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"] },
        "netDevices": { "eth9": { "name": "net0" } },
        "mountLabel": "system_u:object_r:container_file_t:s0:c1,c2",
        "maskedPaths": ["/proc/keys"],
        "readonlyPaths": ["/proc/sys"],
        "sysctl": { "net.ipv4.ip_forward": "1" },
        "resources": full_resources(),
        "seccomp": full_filter(),
    })
}

fn full_filter() -> Value {
    json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 7, "architectures": ["SCMP_ARCH_X86"], "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "listenerPath": "/agent", "listenerMetadata": "m",
        "syscalls": [{ "names": ["kill"], "action": "SCMP_ACT_TRACE", "errnoRet": 8, "args": [
            { "index": 1, "value": 3, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ" },
        ] }, { "names": ["chown"], "action": "SCMP_ACT_NOTIFY" }],
    })
}

fn full_rate() -> Value {
    json!([{ "major": 7, "minor": 7, "rate": 7 }])
}

pub(super) fn full_process() -> Value {
    json!({
        "terminal": true, "consoleSize": { "height": 7, "width": 8 }, "user": { "uid": 1, "gid": 2, "umask": 7, "additionalGids": [3] },
        "args": ["a"], "env": ["A=1"], "cwd": "/c",
        "capabilities": { "bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"], "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"] },
        "rlimits": [{ "type": "RLIMIT_NOFILE", "soft": 1, "hard": 2 }], "noNewPrivileges": true, "oomScoreAdj": 7,
        "scheduler": { "policy": "SCHED_RR", "nice": 7, "priority": 7, "flags": ["SCHED_FLAG_KEEP_PARAMS"], "runtime": 0, "deadline": 0, "period": 0 },
        "ioPriority": { "class": "IOPRIO_CLASS_RT", "priority": 6 }, "execCPUAffinity": { "initial": "0", "final": "1" },
        "apparmorProfile": "p", "selinuxLabel": "system_u:system_r:container_t:s0:c1,c2",
    })
}

fn request() -> Request<'static> {
    Request::new("id", Path::new("/bundle"))
}

fn planned(config: &Value) -> Result<Create, Refused> {
    planned_for(config, &host())
}

pub(super) fn planned_for(config: &Value, host: &Host) -> Result<Create, Refused> {
    let spec = spec::parse(config.to_string().as_bytes())?;
    create(&spec, &request(), host)
}

/// The places of a field in a configuration, as JSON pointers.
fn places(value: &Value, field: &str) -> Vec<String> {
    let (name, rest) = field.split_once('.').unwrap_or((field, ""));
    let (name, is_array) = name.strip_suffix("[]").map_or((name, false), |name| (name, true));
    let Some(map) = value.as_object() else { return Vec::new() };
    let mut found: Vec<(String, &Value)> =
        map.iter().filter(|(key, _)| name == "*" || *key == name).map(|(key, value)| (format!("/{key}"), value)).collect();
    if is_array {
        let elements = |(path, value): (String, &'_ Value)| -> Vec<(String, Value)> {
            value.as_array().into_iter().flatten().enumerate().map(|(index, value)| (format!("{path}/{index}"), value.clone())).collect()
        };
        let found = found.drain(..).flat_map(elements);
        return found.flat_map(|(path, value)| below(&path, &value, rest)).collect();
    }
    found.into_iter().flat_map(|(path, value)| below(&path, value, rest)).collect()
}

fn below(path: &str, value: &Value, rest: &str) -> Vec<String> {
    if rest.is_empty() { vec![path.to_owned()] } else { places(value, rest).into_iter().map(|inner| format!("{path}{inner}")).collect() }
}

/// Another value of the same type.
pub(super) fn changed(field: &str, value: &Value) -> Value {
    let other = match (field.rsplit('.').next().unwrap_or_default(), value) {
        ("type", Value::String(kind)) if kind == "b" => "c",
        ("type", Value::String(kind)) if kind == "c" => "b",
        ("type", Value::String(kind)) if kind == "proc" => "tmpfs",
        ("type", Value::String(kind)) if kind == "RLIMIT_NOFILE" => "RLIMIT_CORE",
        ("type", Value::String(kind)) if kind == "pid" => "cgroup",
        ("access", _) => "r",
        ("pageSize", _) => "1GB",
        ("rootfsPropagation", _) => "slave",
        ("sysctl.*" | "*", _) => "2",
        ("env[]", _) => "B=1",
        ("action" | "defaultAction", _) => "SCMP_ACT_LOG",
        ("architectures[]", _) => "SCMP_ARCH_ARM",
        ("flags[]", _) if field.starts_with("process.") => "SCHED_FLAG_RECLAIM",
        ("flags[]", _) if field.starts_with("linux.memoryPolicy") => "MPOL_F_RELATIVE_NODES",
        ("flags[]", _) => "SECCOMP_FILTER_FLAG_SPEC_ALLOW",
        ("names[]", _) => "read",
        ("op", _) => "SCMP_CMP_NE",
        ("cpus" | "mems", _) => "1",
        (field, Value::String(_)) if field.ends_with("[]") && value.as_str().is_some_and(|text| text.starts_with("CAP_")) => "CAP_CHOWN",
        ("options[]", Value::String(word)) => match word.as_str() {
            "rbind" => "bind",
            "rprivate" => "rslave",
            "ridmap" => "idmap",
            "rnoexec" => "rnodev",
            _ => "nodev",
        },
        ("policy", _) => "SCHED_FIFO",
        ("class", _) => "IOPRIO_CLASS_IDLE",
        ("initial" | "final", _) => "2",
        ("domain", _) => "LINUX",
        ("mode", _) => "MPOL_INTERLEAVE",
        ("nodes", _) => "1",
        ("ociVersion", _) => "1.0.0",
        (_, Value::String(text)) => return json!(format!("{text}x")),
        (_, Value::Bool(flag)) => return json!(!flag),
        ("valueTwo", Value::Number(_)) => return json!(2),
        (_, Value::Number(number)) => return json!(number.as_u64().unwrap_or(0) + 1),
        (_, other) => return other.clone(),
    };
    json!(other)
}

/// Every field that the list calls planned makes a difference, each at each of its places: nothing is accepted and then ignored.
#[test]
#[cfg(target_arch = "x86_64")]
fn no_accepted_field_is_ignored() {
    let base = planned(&full()).expect("accepted");
    // Of cgroup v2 alone: see its own test.
    let is_v2 = |field: &str| field == "linux.resources.unified.*";
    let fields =
        spec::FIELDS.iter().filter(|(field, how)| *how == spec::Use::Planned && !is_v2(field)).map(|(field, _)| (*field).to_owned());
    let of_process = spec::PROCESS_FIELDS.iter().filter(|(_, how)| *how == spec::Use::Planned).map(|(field, _)| format!("process.{field}"));
    for field in fields.chain(of_process) {
        let places = places(&full(), &field);
        assert!(!places.is_empty(), "{field} is not in the configuration of this test");
        for place in places {
            let mut config = full();
            let value = config.pointer_mut(&place).expect("found above");
            let next = changed(&field, value);
            assert_ne!(&next, value, "{field}");
            *value = next;
            match planned(&config) {
                // A new value may be refused: then it was looked at.
                Err(_) => {}
                Ok(plan) => assert!(plan != base, "{field} is ignored"),
            }
        }
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn plans_are_the_same_each_time_and_survive_their_encoding() {
    let plan = planned(&full()).expect("accepted");
    for _ in 0..20 {
        assert_eq!(planned(&full()).expect("accepted"), plan);
    }
    let bytes = minicbor::to_vec(&plan).expect("encoded");
    assert_eq!(minicbor::decode::<Create>(&bytes).expect("decoded"), plan);
    for end in 0..bytes.len() {
        assert!(minicbor::decode::<Create>(&bytes[..end]).is_err());
    }
    let container = plan.container();
    let bytes = minicbor::to_vec(&container).expect("encoded");
    assert_eq!(minicbor::decode::<Container>(&bytes).expect("decoded"), container);
}

#[test]
fn limits_go_to_the_folders_of_their_controllers() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let plan = planned(&config).expect("accepted");
    let folder = |name: &str| plan.cgroup.folders.iter().find(|folder| folder.mount.ends_with(name)).expect("a folder");
    assert_eq!(folder("memory").absolute(), Path::new("/sys/fs/cgroup/memory/a/b"));
    assert_eq!(folder("unified").hierarchy, Hierarchy::Unified);
    assert_eq!(folder("cpuset").hierarchy, Hierarchy::Cpuset);
    assert_eq!(folder("cpuset").limits.len(), 2);
    assert_eq!(folder("memory").limits[0].value, "4096");
    assert_eq!(folder("systemd").limits, []);
    assert!(plan.container().cgroup.folders.iter().all(|folder| folder.limits.is_empty()));
}

#[test]
fn a_limit_without_its_controller_is_refused() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let spec = spec::parse(config.to_string().as_bytes()).expect("parsed");
    let mut host = host();
    host.hierarchies.retain(|hierarchy| hierarchy.controllers != ["pids"]);
    let request = request();
    let error = create(&spec, &request, &host).expect_err("refused");
    assert!(error.to_string().contains("pids.max needs the cgroup controller pids"), "{error}");
}

#[test]
fn what_no_engine_would_take_is_refused_by_its_field() {
    for (change, words) in [
        (json!({ "ociVersion": "2.0.0" }), "ociVersion"),
        (json!({ "root": null }), "root: missing"),
        (json!({ "mounts": [{ "destination": "/", "type": "tmpfs" }] }), "mounts[0].destination"),
        (json!({ "mounts": [{ "destination": "/a/../..", "type": "tmpfs" }] }), "mounts[0].destination"),
        (json!({ "mounts": [{ "destination": "/proc", "type": "tmpfs" }] }), "inside procfs"),
        (json!({ "mounts": [{ "destination": "/proc/self", "type": "bind", "source": "/x" }] }), "inside procfs"),
        (json!({ "mounts": [{ "destination": "/x", "type": "bind", "source": "/x", "options": ["size=1"] }] }), "mounts[0].options"),
        (json!({ "mounts": [{ "destination": "/x", "type": "ramfs", "options": ["tmpcopyup"] }] }), "mounts[0].options tmpcopyup"),
        (
            json!({ "mounts": [{ "destination": "/x", "type": "none", "options": ["bind", "remount", "size=1"] }] }),
            "mounts[0].options: size",
        ),
        (json!({ "mounts": [{ "destination": "/proc/self", "type": "none", "options": ["bind", "remount"] }] }), "inside procfs"),
        (json!({ "mounts": [{ "destination": "/x", "type": "tmpfs", "options": ["idmap"] }] }), "mounts[0].uidMappings: only a bind"),
        (
            json!({ "mounts": [{ "destination": "/x", "type": "bind", "options": ["remount", "idmap"] }] }),
            "mounts[0].uidMappings: only a bind",
        ),
        (
            json!({ "mounts": [{ "destination": "/x", "type": "bind", "source": "/x", "uidMappings": [{ "size": 1 }] }] }),
            "mounts[0].gidMappings: missing",
        ),
        (json!({ "mounts": [{ "destination": "/x", "source": "/x" }] }), "mounts[0].type: missing"),
        (json!({ "mounts": [{ "destination": "/x", "type": "a\0b", "source": "/x" }] }), "mounts[0].type: contains"),
    ] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        for (key, value) in change.as_object().expect("an object") {
            config[key] = value.clone();
        }
        let error = planned(&config).expect_err("refused").to_string();
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn only_files_that_may_be_covered_are_in_procfs() {
    let covered = |target: &str| {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["mounts"] = json!([{ "destination": target, "type": "bind", "source": "/x" }]);
        planned(&config).is_ok()
    };
    let allowed = [
        "cpuinfo",
        "diskstats",
        "meminfo",
        "stat",
        "swaps",
        "uptime",
        "loadavg",
        "slabinfo",
        "sys/kernel/ns_last_pid",
        "sys/crypto/fips_enabled",
    ];
    for name in allowed {
        assert!(covered(&format!("/proc/{name}")), "{name}");
        assert!(covered(&format!("proc/./x/../{name}/")), "{name}");
        assert!(!covered(&format!("/proc/{name}/x")) && !covered(&format!("/proc/{name}x")), "{name}");
    }
    for name in ["net/dev", "self", "1", "sys", "sys/kernel", "sys/kernel/core_pattern", "kcore", "self/attr/exec", "sysrq-trigger"] {
        assert!(!covered(&format!("/proc/{name}")), "{name}");
    }
    // A procfs, if it is one.
    assert!(covered("/proc"));
}

#[test]
fn a_long_list_of_layers_is_given_layer_by_layer() {
    let long = "x".repeat(200);
    let parameters = |options: Value| {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["linux"]["mountLabel"] = Value::Null;
        config["mounts"] = json!([{ "destination": "/x", "type": "overlay", "source": "overlay", "options": options }]);
        match planned(&config).expect("accepted").mounts.remove(0).source {
            Source::New { parameters, .. } => parameters.into_iter().filter_map(|(key, value)| Some((key, value?))).collect::<Vec<_>>(),
            other => panic!("{other:?}"),
        }
    };
    let owned =
        |pairs: &[(&str, &str)]| -> Vec<(String, String)> { pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect() };
    assert_eq!(parameters(json!(["lowerdir=/a:/b"])), owned(&[("source", "overlay"), ("lowerdir", "/a:/b")]));
    let list = format!("lowerdir=/a\\:b:/{long}::/c:/{long}");
    assert_eq!(
        parameters(json!([list, "upperdir=/u", "workdir=/w"])),
        owned(&[
            ("source", "overlay"),
            ("lowerdir+", "/a:b"),
            ("lowerdir+", &format!("/{long}")),
            ("datadir+", "/c"),
            ("lowerdir+", &format!("/{long}")),
            ("upperdir", "/u"),
            ("workdir", "/w"),
        ])
    );
}

#[test]
fn a_remount_changes_the_mount_or_its_file_system_too() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    config["mounts"] = json!([
        { "destination": "/a", "type": "none", "options": ["bind", "remount", "ro"] },
        { "destination": "/b", "type": "tmpfs", "options": ["remount", "nosuid", "size=1m"] },
    ]);
    let mounts = planned(&config).expect("accepted").mounts;
    assert_eq!(mounts[0].source, Source::Existing { parameters: None });
    assert_eq!((mounts[0].attributes.set, mounts[0].attributes.clear), (0x1, 0x20_000e));
    let parameters = vec![("rw".to_owned(), None), ("size".to_owned(), Some("1m".to_owned()))];
    assert_eq!(mounts[1].source, Source::Existing { parameters: Some(parameters) });
}

#[test]
fn the_roots_propagation_is_set_when_it_is_the_root() {
    let host = libc::MS_SLAVE | libc::MS_REC;
    for (word, of_host, of_root) in [
        ("", host, None),
        ("private", libc::MS_PRIVATE, None),
        ("shared", host, Some(libc::MS_SHARED)),
        ("rshared", host, Some(libc::MS_SHARED | libc::MS_REC)),
        ("unbindable", host, Some(libc::MS_UNBINDABLE)),
    ] {
        assert_eq!(propagation(Some(word)).expect("known"), (of_host, of_root));
    }
    assert!(propagation(Some("x")).is_err());
}

#[test]
fn without_a_mount_namespace_nothing_can_be_mounted() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "mount");
    for (pointer, nothing, error) in [
        ("/linux/maskedPaths", json!([]), "linux.maskedPaths: needs a mount namespace"),
        ("/linux/readonlyPaths", json!(null), "linux.readonlyPaths: needs a mount namespace"),
        ("/mounts", json!([]), "the native engine does not implement mounts without a mount namespace"),
        ("/root/readonly", json!(false), "the native engine does not implement root.readonly without a mount namespace"),
        ("/linux/rootfsPropagation", json!(""), "the native engine does not implement linux.rootfsPropagation without a mount namespace"),
    ] {
        assert_eq!(planned(&config).expect_err("refused").to_string(), error);
        *config.pointer_mut(pointer).expect("present") = nothing;
    }
    let plan = planned(&config).expect("accepted");
    assert_eq!((plan.entry, plan.own_dev), (Entry::Chroot, false));
    assert_eq!(plan.container().chroot.as_deref(), Some("/bundle/r"));
}

#[test]
fn a_private_root_needs_pivot_root() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let spec = |config: &Value| spec::parse(config.to_string().as_bytes()).expect("parsed");
    let request = Request { no_pivot_root: true, ..request() };
    let error = create(&spec(&config), &request, &host()).expect_err("refused").to_string();
    assert!(error.starts_with("linux.rootfsPropagation: rprivate is not safe"), "{error}");
    config["linux"]["rootfsPropagation"] = json!("rslave");
    assert_eq!(create(&spec(&config), &request, &host()).expect("accepted").entry, Entry::Move);
}

#[test]
fn a_root_is_mounted_in_the_container_unless_the_host_needs_it() {
    use super::super::{RootMount, check_root_mounts};
    let words = |words: &[&str]| -> Vec<String> { words.iter().map(|word| (*word).to_owned()).collect() };
    let overlay = words(&["lowerdir=/a:/b", "upperdir=/u", "workdir=/w", "index=off", "volatile"]);
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let parsed = |config: &Value| spec::parse(config.to_string().as_bytes()).expect("parsed");
    let refusal =
        |config: &Value, mounts: &[RootMount<'_>]| check_root_mounts(&parsed(config), mounts).err().map(|error| error.to_string());
    let mounts = [RootMount { kind: "overlay", source: "overlay", options: &overlay }];
    // Hooks.
    for name in ["prestart", "createRuntime", "createContainer"] {
        let mut one = config.clone();
        one["hooks"] = json!({ name: [{ "path": "/h" }] });
        assert_eq!(refusal(&one, &mounts), Some(format!("hooks.{name}: needs a root that is mounted on the host")));
    }
    config["hooks"] =
        json!({ "prestart": [], "poststart": [{ "path": "/h" }], "startContainer": [{ "path": "/h" }], "poststop": [{ "path": "/h" }] });
    assert_eq!(refusal(&config, &mounts), None);
    let request = Request { root_mounts: &mounts, ..request() };
    let plan = create(&parsed(&config), &request, &host()).expect("accepted");
    assert_eq!(plan.root_mounts.len(), 1);
    let bytes = minicbor::to_vec(&plan).expect("encoded");
    assert_eq!(minicbor::decode::<Create>(&bytes).expect("decoded"), plan);
    // Without a mount namespace of its own the mounts would be elsewhere.
    let mut joined = config.clone();
    joined["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/mnt");
    assert!(refusal(&joined, &mounts).is_some());
    assert!(create(&parsed(&joined), &request, &host()).is_err());
    assert_eq!(refusal(&joined, &[]), None);
}

#[test]
fn only_mounts_that_the_kernel_alone_understands_are_made_in_the_container() {
    use super::super::{RootMount, check_root_mounts};
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    config["hooks"] = Value::Null;
    config["linux"]["namespaces"] = json!([{ "type": "mount" }]);
    let is_taken = |config: &Value, kind: &str, source: &str, options: &[&str]| {
        let options: Vec<String> = options.iter().map(|word| (*word).to_owned()).collect();
        let spec = spec::parse(config.to_string().as_bytes()).expect("parsed");
        check_root_mounts(&spec, &[RootMount { kind, source, options: &options }]).is_ok()
    };
    let long = format!("upperdir=/{}", "x".repeat(4096));
    for (kind, source, options) in [
        ("overlay", "overlay", &["lowerdir=/a", "uidmap=0:1:2"][..]),
        ("overlay", "overlay", &["lowerdir=/a", &long]),
        ("overlay", "overlay", &["lowerdir=/a,b", "sync"]),
        ("overlay", "overlay", &["lowerdir=/a", "rslave"]),
        ("overlay", "overlay", &["lowerdir=/a", "nodev,noexec"]),
        ("ext4", "/image", &["loop"]),
        ("ext4", "/image", &["X-containerd.mkfs.size=1"]),
        ("format/overlay", "overlay", &["lowerdir={{ mount 0 }}"]),
        ("fuse.program", "x", &[]),
        ("", "x", &[]),
        ("bind", "relative", &["rbind"]),
        ("bind", "/x", &["rbind", "size=1"]),
        ("none", "/x", &["remount", "bind"]),
    ] {
        assert!(!is_taken(&config, kind, source, options), "{kind} {options:?}");
    }
    // Attributes that its root could change.
    let mut mapped = config.clone();
    mapped["linux"]["namespaces"].as_array_mut().expect("a list").push(json!({ "type": "user" }));
    for (options, is_taken_mapped) in [
        (&["rbind", "rw"][..], true),
        (&["rbind"], true),
        (&["rbind", "ro"], false),
        (&["rbind", "nosuid"], false),
        (&["rbind", "dev"], false),
    ] {
        assert!(is_taken(&config, "bind", "/x", options));
        assert_eq!(is_taken(&mapped, "bind", "/x", options), is_taken_mapped, "{options:?}");
    }
    mapped["linux"]["namespaces"][1]["path"] = json!("/proc/1/ns/user");
    assert!(!is_taken(&mapped, "bind", "/x", &["rbind", "ro"]));
}

#[test]
fn how_a_root_is_mounted_depends_on_the_values_of_its_options() {
    use super::super::{Classic, RootMount};
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    config["hooks"] = Value::Null;
    config["linux"]["namespaces"] = json!([{ "type": "mount" }]);
    let spec = spec::parse(config.to_string().as_bytes()).expect("parsed");
    let source = |options: &[&str]| {
        let options: Vec<String> = options.iter().map(|word| (*word).to_owned()).collect();
        super::super::root::plan(&spec, &[RootMount { kind: "overlay", source: "o", options: &options }]).expect("planned").remove(0).source
    };
    let classic = |data: &str, base: Option<&str>| {
        Source::Classic(Classic { kind: "overlay".into(), source: "o".into(), data: data.into(), base: base.map(str::to_owned) })
    };
    assert!(matches!(source(&["lowerdir=/a:/b", "ro"]), Source::New { parameters, .. } if parameters[2].0 == "lowerdir"));
    let long = format!("lowerdir=/a:/{}", "x".repeat(300));
    assert_eq!(source(&[&long, "ro", "volatile"]), classic(&format!("{long},volatile"), None));
    // mount(2) reads them as fstab has them.
    for word in ["context=\"a:b:c1,c2\"", "upperdir=/a\\,b", "upperdir=/a\\:b"] {
        assert_eq!(source(&["lowerdir=/a", word]), classic(&format!("lowerdir=/a,{word}"), None));
    }
    // Relative to a folder that they share, or else folder by folder.
    let layers = |base: &str, name: &str| (0..60).map(|number| format!("{base}{number}{name}")).collect::<Vec<_>>().join(":");
    let base = format!("/{}/", "y".repeat(80));
    let lower = format!("lowerdir={}", layers(&base, "/fs"));
    assert_eq!(source(&[&lower, "index=off"]), classic(&format!("lowerdir={},index=off", layers("", "/fs")), Some(&base)));
    let lower = format!("lowerdir={}", layers("/", &"z".repeat(80)));
    assert!(matches!(source(&[&lower]), Source::New { parameters, .. } if parameters[1].0 == "lowerdir+" && parameters.len() == 61));
}

#[test]
fn owners_of_a_bind_can_be_mapped() {
    let map = json!([{ "containerID": 1, "hostID": 2, "size": 3 }]);
    let range = || vec![super::super::IdRange { inside: 1, outside: 2, count: 3 }];
    let given = super::super::Mappings { uids: range(), gids: range() };
    let mapped =
        |recursive: bool, mappings: &super::super::Mappings| Some(super::super::MappedIds { recursive, mappings: mappings.clone() });
    let none = super::super::Mappings::default();
    for (options, map, expected) in [
        (json!(["bind"]), &Value::Null, None),
        (json!(["bind", "idmap"]), &Value::Null, mapped(false, &none)),
        (json!(["rbind", "ridmap"]), &Value::Null, mapped(true, &none)),
        (json!(["rbind"]), &map, mapped(false, &given)),
        (json!(["rbind", "idmap", "ridmap"]), &map, mapped(true, &given)),
    ] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["mounts"] = json!([{ "destination": "/x", "source": "/x", "options": options, "uidMappings": map, "gidMappings": map }]);
        assert_eq!(planned(&config).expect("accepted").mounts[0].ids, expected);
        // Without a user namespace there are no other mappings.
        config["linux"]["namespaces"].as_array_mut().expect("an array").retain(|namespace| namespace["type"] != "user");
        config["linux"]["uidMappings"] = Value::Null;
        config["linux"]["gidMappings"] = Value::Null;
        match planned(&config) {
            Ok(plan) => assert_eq!(plan.mounts[0].ids, expected),
            Err(error) => assert!(map.is_null() && error.to_string().starts_with("mounts[0].uidMappings: missing"), "{error}"),
        }
    }
}

#[test]
fn ids_and_clocks_need_their_namespaces() {
    let user = json!({ "type": "user" });
    let joined = json!({ "type": "user", "path": "/proc/1/ns/user" });
    let map = |inside: u32, size: u32| json!([{ "containerID": inside, "hostID": 1000, "size": size }]);
    let none = Value::Null;
    for (namespace, uids, gids, refused) in [
        (&none, map(0, 9), map(0, 9), "linux.uidMappings: needs a user namespace"),
        (&user, none.clone(), none.clone(), "linux.uidMappings: missing for a new user namespace"),
        (&user, map(0, 9), none.clone(), "linux.gidMappings: missing beside uidMappings"),
        (&joined, none.clone(), map(0, 9), "linux.uidMappings: missing beside gidMappings"),
        (&user, map(1, 9), map(0, 9), "linux.uidMappings: id 0 is not mapped"),
        (&user, map(0, 9), map(1, 9), "linux.gidMappings: id 0 is not mapped"),
        (&user, map(0, 0), map(0, 9), "linux.uidMappings[0]: size 0"),
        (&user, map(0, u32::MAX), map(0, 9), "linux.uidMappings[0]: size"),
        (&user, map(0, 1), map(0, 9), "process.user.uid: 1 is not mapped"),
        (&joined, map(0, 9), map(0, 2), "process.user.gid: 2 is not mapped"),
        (&user, map(0, 9), map(0, 3), "process.user.additionalGids: 3 is not mapped"),
        (&joined, none.clone(), none.clone(), ""),
        (&joined, map(0, 9), map(0, 9), ""),
        (&user, map(0, 9), map(0, 9), ""),
    ] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["linux"]["uidMappings"] = uids;
        config["linux"]["gidMappings"] = gids;
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("an array");
        namespaces.retain(|namespace| namespace["type"] != "user");
        if !namespace.is_null() {
            namespaces.push(namespace.clone());
        }
        match planned(&config) {
            Ok(plan) => {
                assert_eq!(refused, "");
                assert_eq!(plan.container().namespaces & Kind::User.flag(), Kind::User.flag());
            }
            Err(error) => assert!(!refused.is_empty() && error.to_string().contains(refused), "{error}"),
        }
    }
    for (time, offsets, refused) in [
        (json!({ "type": "time", "path": "/proc/1/ns/time" }), json!({ "monotonic": { "secs": 1 } }), "needs a new time namespace"),
        (json!({ "type": "cgroup" }), json!({ "monotonic": { "secs": 1 } }), "needs a new time namespace"),
        (json!({ "type": "time" }), json!({ "realtime": { "secs": 1 } }), "linux.timeOffsets.realtime: is not a clock"),
    ] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["linux"]["timeOffsets"] = offsets;
        let namespaces = config["linux"]["namespaces"].as_array_mut().expect("an array");
        namespaces.retain(|namespace| namespace["type"] != "time");
        namespaces.push(time);
        let error = planned(&config).expect_err("refused").to_string();
        assert!(error.contains(refused), "{error}");
    }
}

#[test]
fn a_cgroup_that_can_be_divided_is_its_users() {
    let unified =
        MountedHierarchy { mount: "/sys/fs/cgroup".to_owned(), root: "/".to_owned(), own: "/d".to_owned(), ..MountedHierarchy::default() };
    let host = Host { hierarchies: vec![unified], ..host() };
    for (option, with_namespace, owner) in [("rw", true, Some(1001)), ("ro", true, None), ("rw", false, None)] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["linux"]["resources"] = Value::Null;
        config["mounts"] = json!([{ "destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [option] }]);
        if with_namespace {
            config["linux"]["namespaces"].as_array_mut().expect("an array").push(json!({ "type": "cgroup" }));
        }
        let spec = spec::parse(config.to_string().as_bytes()).expect("parsed");
        let request = request();
        let plan = create(&spec, &request, &host).expect("accepted");
        assert_eq!(plan.cgroup.folders[0].owner, owner);
    }
}

#[test]
fn binds_keep_their_sources_attributes_unless_some_are_given() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    config["mounts"] = json!([
        { "destination": "/plain", "source": "/x", "options": ["rbind", "rprivate"] },
        { "destination": "/ro", "source": "/x", "options": ["bind", "ro"] },
        { "destination": "/times", "source": "/x", "options": ["bind", "noatime"] },
        { "destination": "relative/../to", "type": "none", "source": "y", "options": ["bind", "rw"] },
    ]);
    let plan = planned(&config).expect("accepted");
    assert!(plan.mounts[0].attributes.is_empty());
    // As a remount does: what is not given is cleared, but for access times.
    assert_eq!((plan.mounts[1].attributes.set, plan.mounts[1].attributes.clear), (0x1, 0x20_000e));
    assert_eq!((plan.mounts[2].attributes.set, plan.mounts[2].attributes.clear), (0x10, 0x20_00ff & !0x10 & !0x80 | 0x70 | 0x80));
    assert_eq!(plan.mounts[3].target, "/to");
    assert_eq!(plan.mounts[3].source, Source::Bind { path: "/bundle/y".to_owned(), recursive: false, procfs: false });
}

#[test]
fn cgroup_v2_has_one_folder_with_its_own_files() {
    let host = super::clients::host_v2();
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    config["linux"]["cgroupsPath"] = Value::Null;
    config["linux"]["resources"]["memory"] = json!({ "limit": 4096, "reservation": 2048, "swap": 8192 });
    config["linux"]["resources"]["cpu"] = json!({ "shares": 1024, "quota": 50_000, "cpus": "0" });
    config["linux"]["resources"]["network"] = Value::Null;
    config["linux"]["resources"]["blockIO"] = json!({ "weight": 10, "throttleReadBpsDevice": full_rate() });
    config["linux"]["resources"]["unified"] = json!({ "memory.high": "2", "cpu.uclamp.min": "1\n3" });
    let made = |config: &Value| {
        let spec = spec::parse(config.to_string().as_bytes()).expect("parsed");
        create(&spec, &request(), &host)
    };
    let plan = made(&config).expect("accepted");
    let [folder] = &plan.cgroup.folders[..] else { panic!("{:?}", plan.cgroup) };
    // Beside the daemon's: its own has processes.
    assert_eq!(folder.absolute(), Path::new("/sys/fs/cgroup/system.slice/id"));
    assert_eq!(folder.controllers, ["cpu", "cpuset", "hugetlb", "io", "memory", "pids", "rdma"]);
    assert!(folder.devices.is_some());
    let files: Vec<(&str, &str)> = folder.limits.iter().map(|write| (write.file.as_str(), write.value.as_str())).collect();
    let expected = [
        ("memory.swap.max", "4096"),
        ("memory.max", "4096"),
        ("memory.low", "2048"),
        ("cpu.weight", "100"),
        ("cpu.max", "50000 keep"),
        ("cpuset.cpus", "0"),
        ("pids.max", "7"),
        ("hugetlb.2MB.max", "7"),
        ("hugetlb.2MB.rsvd.max", "7"),
        ("io.bfq.weight", "10"),
        ("io.weight", "1"),
        ("io.max", "7:7 rbps=7"),
        ("rdma.max", "mlx hca_handle=7 hca_object=7"),
        ("cpu.uclamp.min", "1"),
        ("cpu.uclamp.min", "3"),
        ("memory.high", "2"),
    ];
    assert_eq!(files, expected);
    // As with runc.
    config["linux"]["resources"]["memory"]["swappiness"] = json!(1);
    config["linux"]["resources"]["memory"]["disableOOMKiller"] = json!(true);
    assert_eq!(made(&config).expect("accepted"), plan);
    for (place, value, field) in [
        ("cpu", json!({ "realtimeRuntime": 1 }), "linux.resources.cpu.realtimeRuntime"),
        ("network", json!({ "classID": 1 }), "linux.resources.network"),
        ("network", json!({ "priorities": [{ "name": "lo", "priority": 0 }] }), "linux.resources.network"),
        ("blockIO", json!({ "leafWeight": 10 }), "linux.resources.blockIO.leafWeight"),
    ] {
        let mut config = config.clone();
        config["linux"]["resources"][place] = value;
        let error = made(&config).expect_err("refused").to_string();
        assert!(error.contains(field) && error.contains("on cgroup v2"), "{error}");
    }
}

/// What `mountLabel` is for, and what has labels of its own.
#[test]
fn new_file_systems_are_labelled() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let new = |kind: &str| json!({ "destination": format!("/{kind}"), "type": kind, "source": kind });
    let kinds = ["proc", "sysfs", "mqueue", "tmpfs", "devpts"];
    config["mounts"] = json!(kinds.map(new));
    let bind = json!({ "destination": "/b", "type": "bind", "source": "/b", "options": ["bind"] });
    config["mounts"].as_array_mut().expect("an array").extend([bind, new("cgroup")]);
    let plan = planned(&config).expect("accepted");
    let label = config["linux"]["mountLabel"].as_str();
    let mut labelled = Vec::new();
    for mount in &plan.mounts {
        if let Source::New { parameters, .. } = &mount.source
            && parameters.iter().any(|(key, value)| key == "context" && value.as_deref() == label)
        {
            labelled.push(mount.target.as_str());
        }
    }
    assert_eq!(labelled, ["/tmpfs", "/devpts", "/cgroup"]);
    assert_eq!(plan.mount_label.as_deref(), label);
}

#[test]
fn what_needs_an_inactive_security_module_is_refused() {
    let host = Host { has_apparmor: false, has_selinux: false, ..host() };
    for (place, words) in [
        ("/process/apparmorProfile", "process.apparmorProfile: unable to apply apparmor profile: AppArmor is not enabled"),
        ("/process/selinuxLabel", "process.selinuxLabel: selinux label is specified in config, but selinux is disabled"),
        ("/linux/mountLabel", "linux.mountLabel: selinux label is specified in config, but selinux is disabled"),
    ] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        for other in ["/process/apparmorProfile", "/process/selinuxLabel", "/linux/mountLabel"] {
            // Empty is nothing.
            *config.pointer_mut(other).expect("a field") = if other == place { json!("a") } else { json!("") };
        }
        let error = planned_for(&config, &host).expect_err("refused").to_string();
        assert!(error.contains(words), "{error}");
        *config.pointer_mut(place).expect("a field") = json!("");
        let plan = planned_for(&config, &host).expect("accepted");
        assert_eq!((plan.process.apparmor_profile, plan.process.selinux_label, plan.mount_label), (None, None, None));
    }
}

/// A profile comes from the process alone; a label is the container's if the process has none.
#[test]
fn an_added_process_has_its_own_profile_and_perhaps_the_containers_label() {
    let mut config = full();
    config["linux"]["seccomp"] = Value::Null;
    let container = planned(&config).expect("accepted").container();
    let added = |change: Value| {
        let mut process = full_process();
        for (key, value) in change.as_object().expect("an object") {
            process[key] = value.clone();
        }
        exec(&spec::parse_process(process.to_string().as_bytes()).expect("parsed"), &container, &host()).expect("accepted").process
    };
    let none = added(json!({ "apparmorProfile": "", "selinuxLabel": "" }));
    assert_eq!((none.apparmor_profile, none.selinux_label), (None, container.selinux_label.clone()));
    let own = added(json!({ "apparmorProfile": "q", "selinuxLabel": "l" }));
    assert_eq!((own.apparmor_profile.as_deref(), own.selinux_label.as_deref()), (Some("q"), Some("l")));
}

#[test]
fn names_of_files_cannot_lead_elsewhere() {
    for (field, value) in [
        ("hugepageLimits", json!([{ "pageSize": "../x", "limit": 1 }])),
        ("hugepageLimits", json!([{ "pageSize": "MB", "limit": 1 }])),
        ("unified", json!({ "memory.high": "1" })),
        ("rdma", json!({ "a hca_handle=max\n": { "hcaHandles": 1 } })),
        ("network", json!({ "priorities": [{ "name": "lo 1\n", "priority": 0 }] })),
    ] {
        let mut config = full();
        config["linux"]["seccomp"] = Value::Null;
        config["linux"]["resources"][field] = value;
        assert!(planned(&config).expect_err("refused").to_string().contains(&format!("linux.resources.{field}")));
    }
}

/// Numbers that look random, the same each time.
fn random(state: &mut u64, end: usize) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) as usize % end
}

/// Every value of a tree, as JSON pointers.
pub(super) fn everywhere(value: &Value, path: &str, found: &mut Vec<String>) {
    found.push(path.to_owned());
    match value {
        Value::Object(map) => {
            map.iter().for_each(|(key, value)| everywhere(value, &format!("{path}/{}", key.replace('~', "~0").replace('/', "~1")), found))
        }
        Value::Array(list) => list.iter().enumerate().for_each(|(index, value)| everywhere(value, &format!("{path}/{index}"), found)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn no_configuration_makes_a_planner_panic() {
    let odd = [
        json!(null),
        json!(""),
        json!("/"),
        json!("/../.."),
        json!("a\0b"),
        json!("ä/ö"),
        json!("="),
        json!(0),
        json!(-1),
        json!(u64::MAX),
        json!(i64::MIN),
        json!(1.5),
        json!(true),
        json!([]),
        json!({}),
        json!([null]),
        json!({ "": {} }),
    ];
    let mut state = 1;
    let mut accepted = 0;
    for _ in 0..700 {
        let mut config = full();
        for _ in 0..=random(&mut state, 3) {
            let mut places = Vec::new();
            everywhere(&config, "", &mut places);
            let place = &places[1 + random(&mut state, places.len() - 1)];
            *config.pointer_mut(place).expect("found above") = odd[random(&mut state, odd.len())].clone();
            if config.as_object().is_none_or(serde_json::Map::is_empty) {
                break;
            }
        }
        accepted += usize::from(planned(&config).is_ok());
        // On hosts with v1 and v2, with what survives its encoding.
        crate::fuzz::config(config.to_string().as_bytes());
    }
    assert!(accepted > 15, "only {accepted} were accepted");
}

#[test]
#[cfg(target_arch = "x86_64")]
fn no_bytes_make_a_performer_panic() {
    let bytes = minicbor::to_vec(planned(&full()).expect("accepted")).expect("encoded");
    let mut state = 1;
    for _ in 0..2_000 {
        let mut bytes = bytes.clone();
        for _ in 0..=random(&mut state, 4) {
            let at = random(&mut state, bytes.len());
            bytes[at] = random(&mut state, 256) as u8;
        }
        // A length that lies allocates nothing.
        let _ = minicbor::decode::<Create>(&bytes);
    }
}
