//! OCI runtime specs, written from the specification rather than by a daemon, so that every runtime takes them.

use serde_json::{Value, json};

/// Capabilities of an ordinary container.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// An OCI runtime spec under construction.
#[derive(Debug, Clone)]
pub struct Spec(pub Value);

impl Spec {
    /// A busybox container with private pid, ipc, uts and mount namespaces and the host's network.
    pub fn new(args: &[&str], cgroups_path: &str) -> Self {
        Self(json!({
            "ociVersion": "1.0.2",
            "process": process(args),
            "root": { "path": "rootfs" },
            "hostname": "x-tests",
            "mounts": [
                mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
                mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
                mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
                mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
                mount("/tmp", "tmpfs", "tmpfs", &["nosuid", "nodev", "mode=1777"]),
            ],
            "annotations": {},
            "linux": {
                "cgroupsPath": cgroups_path,
                "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
                "namespaces": [{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }],
                "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list"],
                "readonlyPaths": ["/proc/bus", "/proc/sys", "/proc/sysrq-trigger"],
            },
        }))
    }

    /// Changes the spec in place, for fields without a method of their own.
    #[must_use]
    pub fn with(mut self, change: impl FnOnce(&mut Value)) -> Self {
        change(&mut self.0);
        self
    }

    /// Whether init has a terminal.
    #[must_use]
    pub fn terminal(self, terminal: bool) -> Self {
        self.with(|spec| spec["process"]["terminal"] = json!(terminal))
    }

    /// Uses the host's pid namespace.
    #[must_use]
    pub fn host_pids(self) -> Self {
        self.with(|spec| namespaces(spec).retain(|namespace| namespace["type"] != "pid"))
    }

    /// Joins the pid namespace of another process.
    #[must_use]
    pub fn join_pids(self, pid: u32) -> Self {
        self.host_pids().with(|spec| namespaces(spec).push(json!({ "type": "pid", "path": format!("/proc/{pid}/ns/pid") })))
    }

    /// Joins the namespace of that kind of another process.
    #[must_use]
    pub fn join(self, kind: &str, pid: u32) -> Self {
        let file = if kind == "network" { "net" } else { kind };
        self.with(|spec| {
            namespaces(spec).retain(|namespace| namespace["type"] != *kind);
            namespaces(spec).push(json!({ "type": kind, "path": format!("/proc/{pid}/ns/{file}") }));
            if kind == "uts" {
                spec.as_object_mut().expect("made by Spec::new").remove("hostname");
            }
        })
    }

    /// A user namespace that maps root to `first`, and a network namespace, without which sysfs can't be mounted there.
    #[must_use]
    pub fn user_namespace(self, first: u32) -> Self {
        self.with(|spec| {
            namespaces(spec).extend([json!({ "type": "user" }), json!({ "type": "network" })]);
            let map = json!([{ "containerID": 0, "hostID": first, "size": 65536 }]);
            spec["linux"]["uidMappings"] = map.clone();
            spec["linux"]["gidMappings"] = map;
        })
    }

    /// Limits memory, without swap.
    #[must_use]
    pub fn memory_limit(self, bytes: u64) -> Self {
        self.with(|spec| spec["linux"]["resources"]["memory"] = json!({ "limit": bytes }))
    }

    /// Adds an annotation.
    #[must_use]
    pub fn annotation(self, key: &str, value: &str) -> Self {
        self.with(|spec| spec["annotations"][key] = json!(value))
    }

    /// Adds an environment variable.
    #[must_use]
    pub fn env(self, entry: &str) -> Self {
        self.with(|spec| spec["process"]["env"].as_array_mut().expect("made above").push(json!(entry)))
    }

    /// Adds a hook of the given kind.
    #[must_use]
    pub fn hook(self, kind: &str, path: &str, args: &[&str]) -> Self {
        self.with(|spec| spec["hooks"][kind] = json!([{ "path": path, "args": args }]))
    }
}

fn namespaces(spec: &mut Value) -> &mut Vec<Value> {
    spec["linux"]["namespaces"].as_array_mut().expect("made by Spec::new")
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

/// A process of the spec: for init, and for exec.
pub fn process(args: &[&str]) -> Value {
    json!({
        "terminal": false,
        "user": { "uid": 0, "gid": 0 },
        "args": args,
        "env": ["PATH=/bin", "TERM=xterm", "HOME=/root"],
        "cwd": "/",
        "noNewPrivileges": true,
        "capabilities": { "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES },
    })
}
