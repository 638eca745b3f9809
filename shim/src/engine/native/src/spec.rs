//! The configuration of a container, with every field accounted for.
//!
//! Owns the list of the fields that this engine implements. The text is parsed twice: as a tree of JSON, whose every field must be in the list,
//! and into the types of the runtime specification, which skip what they do not know.
//!
//! **Invariant:** a field that is not in the list is refused by its path; nothing is ignored in silence.
pub use oci_spec::runtime::Spec;
use oci_spec::runtime::{LinuxResources, Process};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::Refused;

/// What happens with a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Use {
    /// The plan depends on it.
    Planned,
    /// It changes nothing for a runtime; the reason is beside it.
    Inert,
    /// Accepted only where it asks for nothing: null, `""`, `[]`, `{}`, false or 0.
    Empty,
}

use Use::{Empty, Inert, Planned};

/// Every known field. `[]` is any element of an array, `*` any key of an object.
pub(crate) const FIELDS: &[(&str, Use)] = &[
    ("ociVersion", Planned),
    // Hooks receive them.
    ("annotations.*", Planned),
    ("hostname", Planned),
    ("domainname", Planned),
    ("root.path", Planned),
    ("root.readonly", Planned),
    ("mounts[].destination", Planned),
    ("mounts[].type", Planned),
    ("mounts[].source", Planned),
    ("mounts[].options[]", Planned),
    ("mounts[].uidMappings[].containerID", Planned),
    ("mounts[].uidMappings[].hostID", Planned),
    ("mounts[].uidMappings[].size", Planned),
    ("mounts[].gidMappings[].containerID", Planned),
    ("mounts[].gidMappings[].hostID", Planned),
    ("mounts[].gidMappings[].size", Planned),
    ("hooks.prestart[].path", Planned),
    ("hooks.prestart[].args[]", Planned),
    ("hooks.prestart[].env[]", Planned),
    ("hooks.prestart[].timeout", Planned),
    ("hooks.createRuntime[].path", Planned),
    ("hooks.createRuntime[].args[]", Planned),
    ("hooks.createRuntime[].env[]", Planned),
    ("hooks.createRuntime[].timeout", Planned),
    ("hooks.createContainer[].path", Planned),
    ("hooks.createContainer[].args[]", Planned),
    ("hooks.createContainer[].env[]", Planned),
    ("hooks.createContainer[].timeout", Planned),
    ("hooks.startContainer[].path", Planned),
    ("hooks.startContainer[].args[]", Planned),
    ("hooks.startContainer[].env[]", Planned),
    ("hooks.startContainer[].timeout", Planned),
    ("hooks.poststart[].path", Planned),
    ("hooks.poststart[].args[]", Planned),
    ("hooks.poststart[].env[]", Planned),
    ("hooks.poststart[].timeout", Planned),
    ("hooks.poststop[].path", Planned),
    ("hooks.poststop[].args[]", Planned),
    ("hooks.poststop[].env[]", Planned),
    ("hooks.poststop[].timeout", Planned),
    ("linux.namespaces[].type", Planned),
    ("linux.namespaces[].path", Planned),
    ("linux.uidMappings[].containerID", Planned),
    ("linux.uidMappings[].hostID", Planned),
    ("linux.uidMappings[].size", Planned),
    ("linux.gidMappings[].containerID", Planned),
    ("linux.gidMappings[].hostID", Planned),
    ("linux.gidMappings[].size", Planned),
    ("linux.timeOffsets.*.secs", Planned),
    ("linux.timeOffsets.*.nanosecs", Planned),
    ("linux.devices[].path", Planned),
    ("linux.devices[].type", Planned),
    ("linux.devices[].major", Planned),
    ("linux.devices[].minor", Planned),
    ("linux.devices[].fileMode", Planned),
    ("linux.devices[].uid", Planned),
    ("linux.devices[].gid", Planned),
    ("linux.netDevices.*.name", Planned),
    ("linux.cgroupsPath", Planned),
    ("linux.rootfsPropagation", Planned),
    ("linux.maskedPaths[]", Planned),
    ("linux.readonlyPaths[]", Planned),
    ("linux.mountLabel", Planned),
    ("linux.sysctl.*", Planned),
    ("linux.intelRdt", Empty),
    ("linux.memoryPolicy.mode", Planned),
    ("linux.memoryPolicy.nodes", Planned),
    ("linux.memoryPolicy.flags[]", Planned),
    ("linux.personality.domain", Planned),
    // None is defined.
    ("linux.personality.flags", Empty),
    ("linux.resources.devices[].allow", Planned),
    ("linux.resources.devices[].type", Planned),
    ("linux.resources.devices[].major", Planned),
    ("linux.resources.devices[].minor", Planned),
    ("linux.resources.devices[].access", Planned),
    ("linux.resources.memory.limit", Planned),
    ("linux.resources.memory.reservation", Planned),
    ("linux.resources.memory.swap", Planned),
    ("linux.resources.memory.swappiness", Planned),
    ("linux.resources.memory.disableOOMKiller", Planned),
    // The kernel has no such limits any more; every runtime ignores them.
    ("linux.resources.memory.kernel", Inert),
    ("linux.resources.memory.kernelTCP", Inert),
    ("linux.resources.memory.useHierarchy", Empty),
    ("linux.resources.memory.checkBeforeUpdate", Empty),
    ("linux.resources.cpu.shares", Planned),
    ("linux.resources.cpu.quota", Planned),
    ("linux.resources.cpu.period", Planned),
    ("linux.resources.cpu.burst", Planned),
    ("linux.resources.cpu.cpus", Planned),
    ("linux.resources.cpu.mems", Planned),
    ("linux.resources.cpu.idle", Planned),
    ("linux.resources.cpu.realtimePeriod", Planned),
    ("linux.resources.cpu.realtimeRuntime", Planned),
    ("linux.resources.pids.limit", Planned),
    ("linux.resources.blockIO.weight", Planned),
    ("linux.resources.blockIO.leafWeight", Planned),
    ("linux.resources.blockIO.weightDevice[].major", Planned),
    ("linux.resources.blockIO.weightDevice[].minor", Planned),
    ("linux.resources.blockIO.weightDevice[].weight", Planned),
    ("linux.resources.blockIO.weightDevice[].leafWeight", Planned),
    ("linux.resources.blockIO.throttleReadBpsDevice[].major", Planned),
    ("linux.resources.blockIO.throttleReadBpsDevice[].minor", Planned),
    ("linux.resources.blockIO.throttleReadBpsDevice[].rate", Planned),
    ("linux.resources.blockIO.throttleWriteBpsDevice[].major", Planned),
    ("linux.resources.blockIO.throttleWriteBpsDevice[].minor", Planned),
    ("linux.resources.blockIO.throttleWriteBpsDevice[].rate", Planned),
    ("linux.resources.blockIO.throttleReadIOPSDevice[].major", Planned),
    ("linux.resources.blockIO.throttleReadIOPSDevice[].minor", Planned),
    ("linux.resources.blockIO.throttleReadIOPSDevice[].rate", Planned),
    ("linux.resources.blockIO.throttleWriteIOPSDevice[].major", Planned),
    ("linux.resources.blockIO.throttleWriteIOPSDevice[].minor", Planned),
    ("linux.resources.blockIO.throttleWriteIOPSDevice[].rate", Planned),
    ("linux.resources.hugepageLimits[].pageSize", Planned),
    ("linux.resources.hugepageLimits[].limit", Planned),
    ("linux.resources.network.classID", Planned),
    ("linux.resources.network.priorities[].name", Planned),
    ("linux.resources.network.priorities[].priority", Planned),
    ("linux.resources.rdma.*.hcaHandles", Planned),
    ("linux.resources.rdma.*.hcaObjects", Planned),
    ("linux.resources.unified.*", Planned),
    ("linux.seccomp.defaultAction", Planned),
    ("linux.seccomp.defaultErrnoRet", Planned),
    ("linux.seccomp.architectures[]", Planned),
    ("linux.seccomp.flags[]", Planned),
    ("linux.seccomp.listenerPath", Planned),
    ("linux.seccomp.listenerMetadata", Planned),
    ("linux.seccomp.syscalls[].names[]", Planned),
    ("linux.seccomp.syscalls[].action", Planned),
    ("linux.seccomp.syscalls[].errnoRet", Planned),
    ("linux.seccomp.syscalls[].args[].index", Planned),
    ("linux.seccomp.syscalls[].args[].value", Planned),
    ("linux.seccomp.syscalls[].args[].valueTwo", Planned),
    ("linux.seccomp.syscalls[].args[].op", Planned),
];

/// The fields of a process: of a container's init below `process`, and of one that is added to a container.
pub(crate) const PROCESS_FIELDS: &[(&str, Use)] = &[
    ("terminal", Planned),
    ("consoleSize.height", Planned),
    ("consoleSize.width", Planned),
    ("user.uid", Planned),
    ("user.gid", Planned),
    ("user.umask", Planned),
    ("user.additionalGids[]", Planned),
    ("user.username", Empty),
    ("args[]", Planned),
    // For Windows.
    ("commandLine", Empty),
    ("env[]", Planned),
    ("cwd", Planned),
    ("capabilities.bounding[]", Planned),
    ("capabilities.effective[]", Planned),
    ("capabilities.permitted[]", Planned),
    ("capabilities.inheritable[]", Planned),
    ("capabilities.ambient[]", Planned),
    ("rlimits[].type", Planned),
    ("rlimits[].soft", Planned),
    ("rlimits[].hard", Planned),
    ("noNewPrivileges", Planned),
    ("oomScoreAdj", Planned),
    ("apparmorProfile", Planned),
    ("selinuxLabel", Planned),
    ("scheduler.policy", Planned),
    ("scheduler.nice", Planned),
    ("scheduler.priority", Planned),
    ("scheduler.flags[]", Planned),
    ("scheduler.runtime", Planned),
    ("scheduler.deadline", Planned),
    ("scheduler.period", Planned),
    ("ioPriority.class", Planned),
    ("ioPriority.priority", Planned),
    ("execCPUAffinity.initial", Planned),
    ("execCPUAffinity.final", Planned),
];

/// Parses a `config.json`.
pub fn parse(json: &[u8]) -> Result<Spec, Refused> {
    let tree = tree(json)?;
    check(&tree, "", "", &|pattern| of_spec(pattern))?;
    typed(tree, "")
}

/// Parses the process that is to be added to a container.
pub fn parse_process(json: &[u8]) -> Result<Process, Refused> {
    let tree = tree(json)?;
    check(&tree, "", "", &|pattern| among(PROCESS_FIELDS, pattern))?;
    typed(tree, "process")
}

/// Parses the resources to which a container's are to be changed.
pub fn parse_resources(json: &[u8]) -> Result<LinuxResources, Refused> {
    let tree = tree(json)?;
    check(&tree, "", "", &|pattern| match pattern {
        "" => Known::Above,
        pattern => among(FIELDS, &format!("linux.resources.{pattern}")),
    })?;
    typed(tree, "linux.resources")
}

/// Parses a tree, which is at `path` of a configuration, into its type.
fn typed<T: DeserializeOwned>(tree: Value, path: &str) -> Result<T, Refused> {
    match T::deserialize(&tree) {
        Ok(typed) => Ok(typed),
        Err(source) => match culprit::<T>(tree, &source.to_string()) {
            Some(field) => Err(Refused::invalid(format!("{path}{}{field}", if path.is_empty() { "" } else { "." }), source.to_string())),
            None => Err(Refused::Json { source }),
        },
    }
}

/// The field for which a tree has not the wanted type, as far as that can be told: without it, there is not the same error. The parser's own texts name
/// values alone.
fn culprit<T: DeserializeOwned>(mut tree: Value, error: &str) -> Option<String> {
    let (mut place, mut field) = (String::new(), String::new());
    loop {
        let children: Vec<(String, String)> = match tree.pointer(&place)? {
            Value::Object(map) => map.keys().map(|key| (key.replace('~', "~0").replace('/', "~1"), join(&field, key))).collect(),
            Value::Array(list) if list.len() <= MAX_SEARCHED => {
                (0..list.len()).map(|index| (index.to_string(), format!("{field}[{index}]"))).collect()
            }
            Value::Array(_) | Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => Vec::new(),
        };
        let mut is_culprit = |key: &str| {
            let Some(removed) = remove(&mut tree, &place, key) else { return false };
            let is_same = T::deserialize(&tree).is_err_and(|other| other.to_string() == error);
            put_back(&mut tree, &place, key, removed);
            !is_same
        };
        match children.into_iter().find(|(key, _)| is_culprit(key)) {
            Some((key, name)) => (place, field) = (format!("{place}/{key}"), name),
            None => return Some(field).filter(|field| !field.is_empty()),
        }
    }
}

fn remove(tree: &mut Value, place: &str, key: &str) -> Option<Value> {
    match tree.pointer_mut(place)? {
        Value::Object(map) => map.remove(&key.replace("~1", "/").replace("~0", "~")),
        Value::Array(list) => key.parse().ok().map(|index: usize| list.remove(index)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => None,
    }
}

fn put_back(tree: &mut Value, place: &str, key: &str, value: Value) {
    match tree.pointer_mut(place) {
        Some(Value::Object(map)) => drop(map.insert(key.replace("~1", "/").replace("~0", "~"), value)),
        Some(Value::Array(list)) => list.insert(key.parse().unwrap_or(0), value),
        _ => {}
    }
}

/// Of an array, so that a refusal takes no time that anyone notices.
const MAX_SEARCHED: usize = 64;

/// Without what is null, which is as good as absent in every field.
fn tree(json: &[u8]) -> Result<Value, Refused> {
    let mut tree = serde_json::from_slice(json).map_err(|source| Refused::Json { source })?;
    prune(&mut tree);
    for process in ["", "/process"] {
        if let Some(process) = tree.pointer_mut(process).and_then(Value::as_object_mut) {
            settle(process)?;
        }
    }
    Ok(tree)
}

/// Where the types and the specification differ in what a process has.
fn settle(process: &mut serde_json::Map<String, Value>) -> Result<(), Refused> {
    // The types would take the class BE instead.
    if process.get("ioPriority").and_then(Value::as_object).is_some_and(|priority| !priority.contains_key("class")) {
        return Err(Refused::invalid("process.ioPriority.class", "missing"));
    }
    let flags = process.get_mut("scheduler").and_then(|scheduler| scheduler.get_mut("flags")).and_then(Value::as_array_mut);
    for flag in flags.into_iter().flatten() {
        match flag.as_str() {
            Some("SCHED_FLAG_RESET_ON_FORK") => *flag = "SCHED_RESET_ON_FORK".into(),
            Some("SCHED_FLAG_DL_OVERRUN") => *flag = "SCHED_FLAG_D_L_OVERRUN".into(),
            Some(_) | None => {}
        }
    }
    // The types take no empty list of processors.
    if let Some(affinity) = process.get_mut("execCPUAffinity").and_then(Value::as_object_mut) {
        affinity.retain(|_, list| list.as_str() != Some(""));
    }
    Ok(())
}

fn prune(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|_, value| !value.is_null());
            map.values_mut().for_each(prune);
            // Its type has no way to say that there is no limit.
            if map.get("pids").and_then(Value::as_object).is_some_and(serde_json::Map::is_empty) {
                map.remove("pids");
            }
        }
        Value::Array(list) => list.iter_mut().for_each(prune),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

/// What the list knows of a pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Known {
    No,
    /// Fields below it are.
    Above,
    Field(Use),
}

fn of_spec(pattern: &str) -> Known {
    match pattern.strip_prefix("process") {
        Some("") => Known::Above,
        Some(rest) if rest.starts_with('.') => among(PROCESS_FIELDS, &rest[1..]),
        _ => among(FIELDS, pattern),
    }
}

fn among(fields: &[(&str, Use)], pattern: &str) -> Known {
    if let Some((_, how)) = fields.iter().find(|(field, _)| *field == pattern) {
        return Known::Field(*how);
    }
    let is_above = |field: &str| pattern.is_empty() || field.strip_prefix(pattern).is_some_and(|rest| rest.starts_with(['.', '[']));
    if fields.iter().any(|(field, _)| is_above(field)) { Known::Above } else { Known::No }
}

/// `pattern` is `path` with any element and any key in place of the real ones.
fn check(value: &Value, path: &str, pattern: &str, known: &dyn Fn(&str) -> Known) -> Result<(), Refused> {
    let refuse = || Err(Refused::Unsupported { field: path.to_owned() });
    match (known(pattern), value) {
        (_, Value::Null) | (Known::Field(Inert), _) => Ok(()),
        (Known::Field(Empty), value) if asks_for_nothing(value) => Ok(()),
        (Known::Field(Planned), Value::Bool(_) | Value::Number(_) | Value::String(_)) => Ok(()),
        (Known::Above, Value::Object(map)) => map.iter().try_for_each(|(key, value)| {
            let (own, any) = (join(pattern, key), join(pattern, "*"));
            let pattern = if known(&own) == Known::No && known(&any) != Known::No { any } else { own };
            check(value, &join(path, key), &pattern, known)
        }),
        (Known::Above, Value::Array(list)) if known(&format!("{pattern}[]")) != Known::No => {
            let mut elements = list.iter().enumerate();
            elements.try_for_each(|(index, value)| check(value, &format!("{path}[{index}]"), &format!("{pattern}[]"), known))
        }
        (Known::No | Known::Above | Known::Field(_), _) => refuse(),
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

fn asks_for_nothing(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Bool(true) => false,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.values().all(asks_for_nothing),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refused(spec: &Value) -> String {
        parse(spec.to_string().as_bytes()).expect_err("a refusal").to_string()
    }

    #[test]
    fn an_unknown_field_is_refused_by_its_path() {
        for (spec, field) in [
            (json!({ "linux": { "intelRdt": { "closID": "x" } } }), "linux.intelRdt"),
            (json!({ "linux": { "new": true } }), "linux.new"),
            (json!({ "new": {} }), "new"),
            (json!({ "mounts": [{ "destination": "/a" }, { "destination": "/b", "new": 1 }] }), "mounts[1].new"),
            (json!({ "process": { "new": 1 } }), "process.new"),
            (json!({ "processes": [] }), "processes"),
            (json!({ "hooks": { "prestart": [{ "path": "/x", "new": 1 }] } }), "hooks.prestart[0].new"),
            (json!({ "process": { "scheduler": { "new": "SCHED_RR" } } }), "process.scheduler.new"),
            (json!({ "linux": { "personality": { "domain": "LINUX", "flags": ["x"] } } }), "linux.personality.flags"),
        ] {
            assert_eq!(refused(&spec), format!("the native engine does not implement {field}"));
        }
    }

    #[test]
    fn what_asks_for_nothing_is_accepted() {
        let spec = json!({
            "ociVersion": "1.2.0", "root": { "path": "r" }, "hooks": { "prestart": [] }, "annotations": { "a.b": "c" },
            "process": { "apparmorProfile": "", "cwd": "/", "user": { "uid": 0, "gid": 0 } }, "unknown": null,
            "linux": { "resources": { "blockIO": { "weight": 0 }, "hugepageLimits": [] }, "intelRdt": null, "sysctl": { "net.ipv4.ip_forward": "1" } },
        });
        parse(spec.to_string().as_bytes()).expect("accepted");
    }

    #[test]
    fn resources_have_the_same_fields_alone() {
        let resources = json!({ "memory": { "limit": 1 }, "unified": null, "devices": [] });
        parse_resources(resources.to_string().as_bytes()).expect("accepted");
        let resources = json!({ "memory": { "limit": 1, "new": 2 } });
        assert!(matches!(parse_resources(resources.to_string().as_bytes()), Err(Refused::Unsupported { field }) if field == "memory.new"));
    }

    #[test]
    fn a_process_has_the_same_fields_alone() {
        let process = json!({ "cwd": "/", "args": ["a"], "user": { "uid": 0, "gid": 0 } });
        parse_process(process.to_string().as_bytes()).expect("accepted");
        let process = json!({ "cwd": "/", "execCPUAffinity": { "new": "0" } });
        assert!(
            matches!(parse_process(process.to_string().as_bytes()), Err(Refused::Unsupported { field }) if field == "execCPUAffinity.new")
        );
    }

    #[test]
    fn the_specifications_names_are_known_where_the_types_have_others() {
        const FLAGS: [&str; 7] =
            ["RESET_ON_FORK", "RECLAIM", "DL_OVERRUN", "KEEP_POLICY", "KEEP_PARAMS", "UTIL_CLAMP_MIN", "UTIL_CLAMP_MAX"];
        let flags = FLAGS.map(|flag| format!("SCHED_FLAG_{flag}"));
        let process = json!({ "cwd": "/", "user": {}, "scheduler": { "policy": "SCHED_OTHER", "flags": flags }, "execCPUAffinity": { "initial": "" } });
        let parsed = parse_process(process.to_string().as_bytes()).expect("accepted");
        assert_eq!(parsed.scheduler().as_ref().and_then(|scheduler| scheduler.flags().as_ref()).map(Vec::len), Some(FLAGS.len()));
        let process = json!({ "cwd": "/", "user": {}, "ioPriority": { "priority": 1 } });
        assert!(parse_process(process.to_string().as_bytes()).expect_err("refused").to_string().contains("process.ioPriority.class"));
    }
}
