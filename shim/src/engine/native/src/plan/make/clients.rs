//! The configurations that dockerd and containerd's CRI plugin make: each must be accepted.
use serde_json::{Value, json};

use super::tests::{host, planned_for};
use crate::Host;
use crate::host::MountedHierarchy;

/// A host with cgroup v2 alone.
pub(super) fn host_v2() -> Host {
    let unified = MountedHierarchy {
        mount: "/sys/fs/cgroup".to_owned(),
        root: "/".to_owned(),
        own: "/system.slice/daemon".to_owned(),
        available: ["cpu", "cpuset", "hugetlb", "io", "memory", "pids", "rdma"].map(str::to_owned).to_vec(),
        ..MountedHierarchy::default()
    };
    Host { hierarchies: vec![unified], ..host() }
}

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

const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];

const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

/// Every kind of rule that the default profiles of both have.
fn filter() -> Value {
    let one = |name: &str, value: u64, op: &str| json!({ "names": [name], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 0, "value": value, "op": op }] });
    json!({
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 1,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            { "names": ["accept", "accept4", "arch_prctl", "bind", "execve", "exit_group", "futex_time64", "ipc", "mmap", "read", "sendmsg", "socketcall", "waitpid", "write", "modify_ldt"],
              "action": "SCMP_ACT_ALLOW" },
            { "names": ["process_vm_readv", "process_vm_writev", "ptrace"], "action": "SCMP_ACT_ALLOW" },
            one("socket", 40, "SCMP_CMP_NE"),
            one("personality", 0, "SCMP_CMP_EQ"),
            one("personality", 8, "SCMP_CMP_EQ"),
            one("personality", 131_072, "SCMP_CMP_EQ"),
            one("personality", 131_080, "SCMP_CMP_EQ"),
            one("personality", 4_294_967_295, "SCMP_CMP_EQ"),
            { "names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": [{ "index": 0, "value": 2_114_060_288, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ" }] },
            { "names": ["clone3"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38 },
            { "names": ["chroot"], "action": "SCMP_ACT_ALLOW" },
        ],
    })
}

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Docker {
    V20,
    V26,
    V28,
}

/// `docker run` with nothing but an image.
fn docker(version: Docker, v2: bool) -> Value {
    let id = "4cf1";
    let data = "/var/lib/docker/containers/4cf1";
    let mut namespaces = json!([{ "type": "mount" }, { "type": "network" }, { "type": "uts" }, { "type": "pid" }, { "type": "ipc" }]);
    if v2 {
        namespaces.as_array_mut().expect("an array").push(json!({ "type": "cgroup" }));
    }
    let device = |major: u32, minor: u32| json!({ "allow": true, "type": "c", "major": major, "minor": minor, "access": "rwm" });
    let mut devices = vec![json!({ "allow": false, "access": "rwm" })];
    devices.extend([(1, 5), (1, 3), (1, 9), (1, 8), (5, 0), (5, 1)].map(|(major, minor)| device(major, minor)));
    devices.push(json!({ "allow": false, "type": "c", "major": 10, "minor": 229, "access": "rwm" }));
    let mut capabilities = json!({ "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES });
    if version == Docker::V20 {
        capabilities["inheritable"] = json!(CAPABILITIES);
    }
    let mut config = json!({
        "ociVersion": match version { Docker::V20 => "1.0.2-dev", Docker::V26 => "1.1.0", Docker::V28 => "1.2.0" },
        "process": {
            "consoleSize": { "height": 0, "width": 0 },
            "user": { "uid": 0, "gid": 0, "additionalGids": [0, 1, 10] },
            "args": ["sh"],
            "env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME=4cf1"],
            "cwd": "/", "capabilities": capabilities, "oomScoreAdj": 0,
        },
        "root": { "path": "/var/lib/docker/overlay2/4cf1/merged" },
        "hostname": "4cf1",
        "mounts": [
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["ro", "nosuid", "noexec", "nodev"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=67108864"]),
            mount("/etc/resolv.conf", "bind", &format!("{data}/resolv.conf"), &["rbind", "rprivate"]),
            mount("/etc/hostname", "bind", &format!("{data}/hostname"), &["rbind", "rprivate"]),
            mount("/etc/hosts", "bind", &format!("{data}/hosts"), &["rbind", "rprivate"]),
        ],
        "linux": {
            "sysctl": { "net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647" },
            "resources": {
                "devices": devices, "memory": { "disableOOMKiller": false }, "cpu": { "shares": 0 }, "pids": { "limit": 0 }, "blockIO": { "weight": 0 },
            },
            "cgroupsPath": format!("/docker/{id}"),
            "namespaces": namespaces, "seccomp": filter(), "maskedPaths": MASKED, "readonlyPaths": READ_ONLY,
        },
    });
    config["linux"]["resources"]["pids"] = json!(null);
    if version < Docker::V28 {
        let hook = json!({ "path": "/proc/612/exe", "args": ["libnetwork-setkey", "-exec-root=/var/run/docker", id, "b1f4"] });
        config["hooks"] = json!({ "prestart": [hook] });
    }
    if version > Docker::V20 {
        config["process"]["rlimits"] = json!([]);
    }
    config
}

/// The options of `docker run` that become resources and the like.
fn docker_with_limits(version: Docker, v2: bool) -> Value {
    let mut config = docker(version, v2);
    let resources = &mut config["linux"]["resources"];
    let rate = json!([{ "major": 8, "minor": 0, "rate": 1_048_576 }]);
    resources["memory"] =
        json!({ "limit": 64 << 20, "swap": 128 << 20, "reservation": 32 << 20, "disableOOMKiller": true, "kernel": 32 << 20 });
    // 20.10 discards these itself where the host has them not; a client of an older API sends -1 for none.
    resources["memory"]["swappiness"] = json!(if version == Docker::V20 { u64::MAX } else { 60 });
    resources["cpu"] = json!({ "shares": 512, "quota": 150_000, "period": 100_000, "cpus": "0-1", "mems": "0" });
    if !v2 {
        resources["cpu"]["realtimePeriod"] = json!(1_000_000);
        resources["cpu"]["realtimeRuntime"] = json!(1000);
    }
    resources["pids"] = json!({ "limit": 100 });
    resources["blockIO"] = json!({
        "weight": 300, "weightDevice": [{ "major": 8, "minor": 0, "weight": 200 }],
        "throttleReadBpsDevice": rate, "throttleWriteBpsDevice": rate, "throttleReadIOPSDevice": rate, "throttleWriteIOPSDevice": rate,
    });
    config["process"]["rlimits"] = json!([{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }]);
    config["process"]["noNewPrivileges"] = json!(true);
    config["process"]["terminal"] = json!(true);
    config["process"]["consoleSize"] = json!({ "height": 24, "width": 80 });
    config["root"]["readonly"] = json!(true);
    config["mounts"].as_array_mut().expect("an array").extend([
        mount("/sbin/docker-init", "bind", "/usr/bin/docker-init", &["bind", "ro"]),
        mount("/data", "bind", "/var/lib/docker/volumes/v/_data", &["rbind", "ro", "rprivate"]),
    ]);
    config["annotations"] = json!({ "a": "b" });
    config
}

/// A pod's container.
fn cri(v2: bool) -> Value {
    let mut namespaces = json!([
        { "type": "pid" }, { "type": "ipc", "path": "/proc/900/ns/ipc" }, { "type": "uts", "path": "/proc/900/ns/uts" }, { "type": "mount" },
        { "type": "network", "path": "/var/run/netns/cni-1" },
    ]);
    let pod = "/var/lib/kubelet/pods/7d8e";
    let mut resources = json!({
        "devices": [{ "allow": false, "access": "rwm" }],
        "memory": { "limit": 134_217_728, "swap": 134_217_728 },
        "cpu": { "shares": 102, "quota": 20_000, "period": 100_000 },
        "hugepageLimits": [{ "pageSize": "2MB", "limit": 0 }, { "pageSize": "1GB", "limit": 0 }],
    });
    if v2 {
        namespaces.as_array_mut().expect("an array").push(json!({ "type": "cgroup" }));
        resources["unified"] = json!({ "memory.oom.group": "1", "memory.high": "120000000", "memory.swap.max": "0" });
    } else {
        resources["unified"] = json!({});
    }
    json!({
        "ociVersion": "1.2.1",
        "process": {
            "user": { "uid": 65_532, "gid": 65_532, "additionalGids": [2000, 65_532] },
            "args": ["/app"], "env": ["PATH=/bin", "HOSTNAME=web", "KUBERNETES_PORT=tcp://10.0.0.1:443"], "cwd": "/",
            "capabilities": { "bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES },
            "noNewPrivileges": true, "oomScoreAdj": 985, "apparmorProfile": "", "selinuxLabel": "",
        },
        "root": { "path": "rootfs", "readonly": true },
        "mounts": [
            mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
            mount("/etc/hosts", "bind", &format!("{pod}/etc-hosts"), &["rbind", "rprivate", "rw"]),
            mount("/dev/termination-log", "bind", &format!("{pod}/containers/web/1"), &["rbind", "rprivate", "rw"]),
            mount("/etc/hostname", "bind", "/var/lib/containerd/sandboxes/1/hostname", &["rbind", "rprivate", "ro"]),
            mount("/dev/shm", "bind", "/run/containerd/sandboxes/1/shm", &["rbind", "rprivate", "rw"]),
            mount("/var/run/secrets/kubernetes.io/serviceaccount", "bind", &format!("{pod}/volumes/token"), &["rbind", "rprivate", "ro"]),
        ],
        "annotations": { "io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": "1" },
        "linux": {
            "resources": resources, "cgroupsPath": "/kubepods/burstable/pod7d8e/1f", "namespaces": namespaces, "seccomp": filter(),
            "maskedPaths": MASKED, "readonlyPaths": READ_ONLY,
        },
    })
}

/// The pause container of a pod.
fn sandbox(v2: bool) -> Value {
    let mut config = cri(v2);
    config["process"]["args"] = json!(["/pause"]);
    config["process"]["user"] = json!({ "uid": 65_535, "gid": 65_535 });
    config["process"]["oomScoreAdj"] = json!(-998);
    config["hostname"] = json!("web");
    config["linux"]["namespaces"] = json!([{ "type": "pid" }, { "type": "ipc" }, { "type": "uts" }, { "type": "mount" }, { "type": "network", "path": "/var/run/netns/cni-1" }]);
    config["linux"]["sysctl"] = json!({ "net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647" });
    config["linux"]["resources"] = json!({ "devices": [{ "allow": false, "access": "rwm" }], "cpu": { "shares": 2 }, "memory": {} });
    config
}

/// `privileged: true`.
fn privileged(v2: bool) -> Value {
    let mut config = cri(v2);
    config["linux"]["seccomp"] = json!(null);
    config["linux"]["maskedPaths"] = json!(null);
    config["linux"]["readonlyPaths"] = json!([]);
    config["linux"]["resources"]["devices"] = json!([{ "allow": true, "access": "rwm" }]);
    config["linux"]["devices"] =
        json!([{ "path": "/dev/sda", "type": "b", "major": 8, "minor": 0, "fileMode": 0o60_660, "uid": 0, "gid": 6 }]);
    config["process"]["noNewPrivileges"] = json!(false);
    config["mounts"][4]["options"] = json!(["nosuid", "noexec", "nodev", "rw"]);
    config
}

#[test]
#[cfg(target_arch = "x86_64")]
fn what_dockerd_makes_is_accepted() {
    for version in [Docker::V20, Docker::V26, Docker::V28] {
        for (v2, host) in [(false, host()), (true, host_v2())] {
            for (name, config) in [("plain", docker(version, v2)), ("limits", docker_with_limits(version, v2))] {
                planned_for(&config, &host).unwrap_or_else(|error| panic!("{version:?} v2={v2} {name}: {error}"));
            }
        }
    }
}

#[test]
#[cfg(target_arch = "x86_64")]
fn what_containerds_cri_makes_is_accepted() {
    for (v2, host) in [(false, host()), (true, host_v2())] {
        for (name, config) in [("container", cri(v2)), ("sandbox", sandbox(v2)), ("privileged", privileged(v2))] {
            planned_for(&config, &host).unwrap_or_else(|error| panic!("v2={v2} {name}: {error}"));
        }
    }
}

/// Nothing is written for what asks for nothing, as in every configuration of dockerd's.
#[test]
fn empty_objects_ask_for_nothing() {
    for (v2, host) in [(false, host()), (true, host_v2())] {
        let mut config = sandbox(v2);
        config["linux"]["seccomp"] = json!(null);
        config["linux"]["resources"] = json!({});
        let base = planned_for(&config, &host).expect("accepted");
        config["linux"]["resources"] = json!({
            "memory": {}, "cpu": { "shares": 0, "quota": 0, "period": 0, "realtimePeriod": 0, "realtimeRuntime": 0, "cpus": "", "mems": "" },
            "pids": {}, "blockIO": { "weight": 0, "leafWeight": 0, "weightDevice": [], "throttleReadBpsDevice": null }, "hugepageLimits": [],
            "network": { "classID": 0, "priorities": [] }, "rdma": { "mlx": {} }, "unified": {}, "devices": [],
        });
        assert_eq!(planned_for(&config, &host).expect("accepted"), base);
        config["linux"]["resources"] =
            json!({ "memory": null, "pids": { "limit": null }, "blockIO": {}, "network": {}, "rdma": {}, "unified": null });
        assert_eq!(planned_for(&config, &host).expect("accepted"), base);
    }
}
