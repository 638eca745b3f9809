//! What this engine can do, as the runtime specification's `features` has it.
//!
//! **Invariant:** what is claimed is what a plan takes: every entry is tried on a planner, so that neither can change without the other. The kernel is asked
//! where it decides.
use std::path::Path;

use serde_json::{Map, Value, json};

use crate::plan::{self, Create, Mount, Request, Source};
use crate::{Host, spec, sys};

/// The features as JSON, for a host. Those that the specification wants independent of it (security modules, versions of cgroups) are the engine's.
#[must_use]
pub fn features(host: &Host) -> Value {
    let mut features = json!({
        "ociVersionMin": OLDEST_VERSION,
        "ociVersionMax": NEWEST_VERSION,
        "hooks": taken(&HOOKS, |config, hook| config["hooks"] = json!({ hook: [{ "path": "/h" }] })),
        "mountOptions": mount_options(),
        "linux": linux(host),
        // By the name that clients look for, which is runc's.
        "annotations": { "org.opencontainers.runc.checkpoint.enabled": "true" },
        // They become properties of a unit. Any other makes the engine do nothing: hooks and agents receive them. A file of options for criu
        // (`org.criu.config`) could name programs to execute on the host, so it is not read.
        "potentiallyUnsafeConfigAnnotations": [plan::ANNOTATION],
    });
    if !is_taken(|config| config["ociVersion"] = json!(NEWEST_VERSION)) {
        features["ociVersionMax"] = json!(OLDEST_VERSION);
    }
    features
}

fn linux(host: &Host) -> Value {
    let capabilities: Vec<&str> = CAPABILITIES.into_iter().take(host.last_capability as usize + 1).collect();
    let namespaces = taken(&NAMESPACES, |config, kind| {
        if kind == "mount" {
            return;
        }
        config["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": kind }]);
        if kind == "user" {
            (config["linux"]["uidMappings"], config["linux"]["gidMappings"]) = (mappings(), mappings());
        }
    });
    let idmap = is_taken(|config| {
        config["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": "user" }]);
        (config["linux"]["uidMappings"], config["linux"]["gidMappings"]) = (mappings(), mappings());
        let bind = json!({
            "destination": "/b", "source": "/b", "options": ["bind", "idmap"], "uidMappings": mappings(), "gidMappings": mappings(),
        });
        config["mounts"] = json!([bind]);
    });
    json!({
        "namespaces": namespaces,
        "capabilities": capabilities,
        "cgroup": {
            "v1": is_taken_on(&Host::example_v1(), |_| {}),
            "v2": is_taken_on(&Host::example_v2(), |_| {}),
            "systemd": is_taken_as_unit(),
            "systemdUser": false,
            "rdma": is_taken_on(&Host::example_v2(), |config| config["linux"]["resources"] = json!({ "rdma": { "mlx": { "hcaHandles": 1 } } })),
        },
        "seccomp": seccomp(),
        "apparmor": { "enabled": is_taken(|config| config["process"]["apparmorProfile"] = json!("p")) },
        "selinux": { "enabled": is_taken(|config| config["process"]["selinuxLabel"] = json!("l")) },
        "intelRdt": { "enabled": is_taken(|config| config["linux"]["intelRdt"] = json!({ "closID": "c" })) },
        "memoryPolicy": {
            "modes": taken(&MEMORY_MODES, |config, mode| {
                let nodes = if matches!(mode, "MPOL_DEFAULT" | "MPOL_LOCAL") { "" } else { "0" };
                config["linux"]["memoryPolicy"] = json!({ "mode": mode, "nodes": nodes });
            }),
            "flags": taken(&MEMORY_FLAGS, |config, flag| {
                config["linux"]["memoryPolicy"] = json!({ "mode": "MPOL_BIND", "nodes": "0", "flags": [flag] });
            }),
        },
        "mountExtensions": { "idmap": { "enabled": idmap } },
        "netDevices": {
            "enabled": is_taken(|config| {
                config["linux"]["namespaces"] = json!([{ "type": "mount" }, { "type": "network" }]);
                config["linux"]["netDevices"] = json!({ "eth1": {} });
            }),
        },
    })
}

fn mappings() -> Value {
    json!([{ "containerID": 0, "hostID": 1000, "size": 1000 }])
}

fn mount_options() -> Vec<&'static str> {
    // Of a new file system any word is taken: one that is handed to the kernel may be no option of it.
    let is_handed_on = |mount: &Mount, word: &str| match &mount.source {
        Source::New { parameters, .. } => parameters.iter().any(|(key, _)| key == word),
        _ => false,
    };
    let is_option = |word: &str| {
        let tmpfs = json!([{ "destination": "/t", "type": "tmpfs", "source": "t", "options": [word] }]);
        let bind = |config: &mut Value| config["mounts"] = json!([{ "destination": "/b", "source": "/b", "options": ["bind", word] }]);
        let mapped_bind = |config: &mut Value| {
            bind(config);
            (config["mounts"][0]["uidMappings"], config["mounts"][0]["gidMappings"]) = (mappings(), mappings());
        };
        is_taken(bind)
            || is_taken(mapped_bind)
            || planned_on(&Host::example_v1(), |config| config["mounts"] = tmpfs)
                .is_some_and(|plan| !plan.mounts.iter().any(|mount| is_handed_on(mount, word)))
    };
    MOUNT_OPTIONS.into_iter().filter(|word| is_option(word)).collect()
}

fn seccomp() -> Value {
    let rule = |action: &str, op: &str, arch: &str| {
        json!({
            "defaultAction": "SCMP_ACT_TRAP", "architectures": [arch], "listenerPath": "/agent",
            "syscalls": [{ "names": ["mkdirat"], "action": action, "args": [{ "index": 0, "value": 1, "op": op }] }],
        })
    };
    let profile = |config: &mut Value, profile: Value| config["linux"]["seccomp"] = profile;
    let native = "SCMP_ARCH_NATIVE";
    let known = taken(&FILTER_FLAGS.map(|(name, _)| name), |config, flag| {
        profile(config, rule("SCMP_ACT_NOTIFY", "SCMP_CMP_EQ", native));
        config["linux"]["seccomp"]["flags"] = json!([flag]);
    });
    let supported: Vec<&str> =
        FILTER_FLAGS.iter().filter(|(name, flag)| known.contains(name) && sys::has_filter_flag(*flag)).map(|(name, _)| *name).collect();
    json!({
        "enabled": is_taken(|config| profile(config, json!({ "defaultAction": "SCMP_ACT_ALLOW" }))),
        "actions": taken(&ACTIONS, |config, action| profile(config, rule(action, "SCMP_CMP_EQ", native))),
        "operators": taken(&OPERATORS, |config, op| profile(config, rule("SCMP_ACT_ALLOW", op, native))),
        "archs": taken(&ARCHITECTURES, |config, arch| profile(config, rule("SCMP_ACT_ALLOW", "SCMP_CMP_EQ", arch))),
        "knownFlags": known,
        "supportedFlags": supported,
    })
}

/// Those of some names with which a configuration is taken.
fn taken<'a>(names: &[&'a str], change: impl Fn(&mut Value, &str)) -> Vec<&'a str> {
    names.iter().copied().filter(|name| is_taken(|config| change(config, name))).collect()
}

fn is_taken(change: impl FnOnce(&mut Value)) -> bool {
    is_taken_on(&Host::example_v1(), change)
}

fn is_taken_on(host: &Host, change: impl FnOnce(&mut Value)) -> bool {
    planned_on(host, change).is_some()
}

fn is_taken_as_unit() -> bool {
    let change = |config: &mut Value| config["linux"]["cgroupsPath"] = json!("system.slice:x:c");
    let request = Request { systemd_cgroup: true, ..Request::new("c", Path::new("/b")) };
    [Host::example_v1(), Host::example_v2()].iter().all(|host| planned_as(&request, host, change).is_some_and(|plan| plan.unit.is_some()))
}

fn planned_on(host: &Host, change: impl FnOnce(&mut Value)) -> Option<Create> {
    planned_as(&Request::new("c", Path::new("/b")), host, change)
}

fn planned_as(request: &Request<'_>, host: &Host, change: impl FnOnce(&mut Value)) -> Option<Create> {
    let mut config = json!({
        "ociVersion": OLDEST_VERSION, "root": { "path": "r" }, "process": { "cwd": "/", "args": ["a"], "user": {} },
        "linux": { "namespaces": [{ "type": "mount" }] }, "mounts": Value::Array(Vec::new()), "hooks": Value::Object(Map::new()),
    });
    change(&mut config);
    spec::parse(config.to_string().as_bytes()).and_then(|spec| plan::create(&spec, request, host)).ok()
}

const OLDEST_VERSION: &str = "1.0.0";
const NEWEST_VERSION: &str = "1.3.0";

const HOOKS: [&str; 6] = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];

const NAMESPACES: [&str; 8] = ["cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts"];

/// Every word that the specification or another runtime knows.
const MOUNT_OPTIONS: [&str; 64] = [
    "acl",
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "iversion",
    "lazytime",
    "loud",
    "mand",
    "noacl",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nolazytime",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "nosymfollow",
    "private",
    "ratime",
    "rbind",
    "rdev",
    "rdiratime",
    "relatime",
    "remount",
    "rexec",
    "ridmap",
    "rnoatime",
    "rnodev",
    "rnodiratime",
    "rnoexec",
    "rnorelatime",
    "rnostrictatime",
    "rnosuid",
    "rnosymfollow",
    "ro",
    "rprivate",
    "rrelatime",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "rstrictatime",
    "rsuid",
    "rsymfollow",
    "runbindable",
    "rw",
    "shared",
    "silent",
    "slave",
    "strictatime",
    "suid",
    "symfollow",
    "sync",
    "tmpcopyup",
    "unbindable",
];

const ACTIONS: [&str; 9] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_TRACE",
    "SCMP_ACT_TRAP",
];

const OPERATORS: [&str; 7] =
    ["SCMP_CMP_EQ", "SCMP_CMP_GE", "SCMP_CMP_GT", "SCMP_CMP_LE", "SCMP_CMP_LT", "SCMP_CMP_MASKED_EQ", "SCMP_CMP_NE"];

const ARCHITECTURES: [&str; 19] = [
    "SCMP_ARCH_AARCH64",
    "SCMP_ARCH_ARM",
    "SCMP_ARCH_LOONGARCH64",
    "SCMP_ARCH_MIPS",
    "SCMP_ARCH_MIPS64",
    "SCMP_ARCH_MIPS64N32",
    "SCMP_ARCH_MIPSEL",
    "SCMP_ARCH_MIPSEL64",
    "SCMP_ARCH_MIPSEL64N32",
    "SCMP_ARCH_PARISC",
    "SCMP_ARCH_PARISC64",
    "SCMP_ARCH_PPC",
    "SCMP_ARCH_PPC64",
    "SCMP_ARCH_PPC64LE",
    "SCMP_ARCH_RISCV64",
    "SCMP_ARCH_S390X",
    "SCMP_ARCH_X32",
    "SCMP_ARCH_X86",
    "SCMP_ARCH_X86_64",
];

/// With what asks the kernel for it.
const FILTER_FLAGS: [(&str, libc::c_ulong); 4] = [
    ("SECCOMP_FILTER_FLAG_LOG", libc::SECCOMP_FILTER_FLAG_LOG),
    ("SECCOMP_FILTER_FLAG_SPEC_ALLOW", libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW),
    ("SECCOMP_FILTER_FLAG_TSYNC", libc::SECCOMP_FILTER_FLAG_TSYNC),
    // It means nothing without a listener.
    ("SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV", 1 << 5 | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER),
];

const MEMORY_MODES: [&str; 7] =
    ["MPOL_BIND", "MPOL_DEFAULT", "MPOL_INTERLEAVE", "MPOL_LOCAL", "MPOL_PREFERRED", "MPOL_PREFERRED_MANY", "MPOL_WEIGHTED_INTERLEAVE"];

const MEMORY_FLAGS: [&str; 3] = ["MPOL_F_NUMA_BALANCING", "MPOL_F_RELATIVE_NODES", "MPOL_F_STATIC_NODES"];

/// By their numbers.
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn has(list: &Value, name: &str) -> bool {
        list.as_array().expect("a list").iter().any(|entry| entry == name)
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn what_is_claimed_is_what_is_taken() {
        let features = features(&Host { last_capability: 40, ..Host::default() });
        let _typed: oci_spec::runtime::Features = serde_json::from_value(features.clone()).expect("of the specification's types");
        assert_eq!(features["hooks"].as_array().map(Vec::len), Some(6));
        let linux = &features["linux"];
        assert_eq!(linux["capabilities"].as_array().map(Vec::len), Some(41));
        assert_eq!(features["mountOptions"], json!(MOUNT_OPTIONS.to_vec()));
        assert_eq!(linux["namespaces"], json!(NAMESPACES));
        assert_eq!(linux["mountExtensions"]["idmap"]["enabled"], json!(true));
        assert_eq!(linux["cgroup"]["v1"], json!(true));
        assert_eq!((&linux["cgroup"]["v2"], &linux["cgroup"]["rdma"]), (&json!(true), &json!(true)));
        assert_eq!((&linux["cgroup"]["systemd"], &linux["cgroup"]["systemdUser"]), (&json!(true), &json!(false)));
        assert_eq!(features["potentiallyUnsafeConfigAnnotations"], json!(["org.systemd.property."]));
        assert!(has(&linux["seccomp"]["actions"], "SCMP_ACT_NOTIFY") && has(&linux["seccomp"]["operators"], "SCMP_CMP_MASKED_EQ"));
        let architectures = ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM", "SCMP_ARCH_X32", "SCMP_ARCH_X86", "SCMP_ARCH_X86_64"];
        assert_eq!(linux["seccomp"]["archs"], json!(architectures));
        assert_eq!(linux["seccomp"]["knownFlags"].as_array().map(Vec::len), Some(4));
        assert!(has(&linux["seccomp"]["supportedFlags"], "SECCOMP_FILTER_FLAG_LOG"));
        assert_eq!((&linux["apparmor"]["enabled"], &linux["selinux"]["enabled"]), (&json!(true), &json!(true)));
        assert_eq!(linux["intelRdt"]["enabled"], json!(false));
        assert_eq!(linux["memoryPolicy"]["modes"].as_array().map(Vec::len), Some(7));
    }

    #[test]
    fn an_older_kernel_has_fewer_capabilities() {
        let features = features(&Host { last_capability: 37, ..Host::default() });
        assert!(has(&features["linux"]["capabilities"], "CAP_AUDIT_READ") && !has(&features["linux"]["capabilities"], "CAP_BPF"));
    }

    #[test]
    fn names_of_capabilities_are_at_their_numbers() {
        for (number, name) in CAPABILITIES.into_iter().enumerate() {
            let capability = serde_json::from_value(json!(name)).expect("a capability");
            assert_eq!(plan::capability_number(capability), number as u32, "{name}");
        }
    }
}
