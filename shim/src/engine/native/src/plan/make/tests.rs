//! Plans of whole configurations, and the configuration that has every field.
use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::host::MountedHierarchy;
use crate::plan::{Hierarchy, Source};
use crate::spec;

mod mounts;
mod namespaces;
mod process;
mod resources;

pub(super) fn host() -> Host {
    let hierarchy = |controllers: &[&str], name: &str| MountedHierarchy {
        controllers: controllers.iter().map(|controller| (*controller).to_owned()).collect(),
        mount: format!("/sys/fs/cgroup/{name}"),
        root: "/".to_owned(),
        own: "/daemon".to_owned(),
        of_init: String::new(),
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
