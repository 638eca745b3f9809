//! The OCI spec of a container: containerd's own defaults, the image's configuration, and what the command line changes. Pure.
//!
//! No seccomp profile is set, as by `ctr run`.

use std::path::{Path, PathBuf};

use oci_spec::OciSpecError;
use oci_spec::image::Config;
use oci_spec::runtime::{
    Capabilities, Capability, Linux, LinuxBuilder, LinuxCapabilitiesBuilder, LinuxCpuBuilder, LinuxDeviceCgroupBuilder, LinuxMemoryBuilder,
    LinuxNamespace, LinuxNamespaceBuilder, LinuxNamespaceType, LinuxResourcesBuilder, Mount, MountBuilder, PosixRlimitBuilder,
    PosixRlimitType, Process, ProcessBuilder, RootBuilder, Spec, SpecBuilder, UserBuilder,
};

use crate::error::{Error, Result};
use crate::parse::{Tmpfs, Volume};
use crate::users::User;

/// What a spec is made from.
#[derive(Debug, Clone)]
pub(crate) struct Wish {
    /// The root file system: a folder of the host, or `rootfs` in the bundle, where the daemon mounts a snapshot.
    pub(crate) root: PathBuf,
    /// The process.
    pub(crate) process: ProcessWish,
    /// Folders of the host.
    pub(crate) volumes: Vec<Volume>,
    /// More file systems in memory.
    pub(crate) tmpfs: Vec<Tmpfs>,
    /// On the host's network, with its names of hosts; else on one with nothing but a loopback device.
    pub(crate) is_on_host_network: bool,
    /// Another host name than the host's.
    pub(crate) hostname: Option<String>,
    /// The most memory, in bytes.
    pub(crate) memory_bytes: Option<i64>,
    /// The most processor time, in microseconds of each 100,000.
    pub(crate) cpu_quota: Option<i64>,
    /// The path of the cgroup.
    pub(crate) cgroup: String,
    /// The init of the host that is to be the container's first process, and reap the others.
    pub(crate) init: Option<PathBuf>,
    /// Whether the root file system may not be written to.
    pub(crate) is_read_only: bool,
}

/// What a process is made from.
#[derive(Debug, Clone)]
pub(crate) struct ProcessWish {
    /// The program and its arguments.
    pub(crate) args: Vec<String>,
    /// `NAME=VALUE`.
    pub(crate) environment: Vec<String>,
    /// Who.
    pub(crate) user: User,
    /// Where, absolute.
    pub(crate) folder: PathBuf,
    /// Whether it has a terminal.
    pub(crate) is_terminal: bool,
}

/// The program and its arguments: those of the command line, after the entry point of the image. None when neither says any.
pub(crate) fn args(image: Option<&Config>, entrypoint: Option<&str>, command: &[String]) -> Option<Vec<String>> {
    let of_image = |part: fn(&Config) -> &Option<Vec<String>>| image.and_then(|config| part(config).clone()).unwrap_or_default();
    let (mut args, default) = match entrypoint {
        // as docker does: the image's command belonged to the image's entry point
        Some(entrypoint) => (vec![entrypoint.to_owned()], Vec::new()),
        None => (of_image(Config::entrypoint), of_image(Config::cmd)),
    };
    args.extend(if command.is_empty() { default } else { command.to_vec() });
    (!args.is_empty()).then_some(args)
}

/// The variables of a process: later ones replace earlier ones of the same name, and a name alone removes one.
pub(crate) fn environment(image: &[String], is_terminal: bool, given: &[String]) -> Vec<String> {
    let defaults = if image.iter().any(|entry| entry.starts_with("PATH=")) { None } else { Some(PATH) };
    let terminal = is_terminal.then_some("TERM=xterm");
    let mut all: Vec<String> = Vec::new();
    for entry in defaults.into_iter().chain(terminal).chain(image.iter().map(String::as_str)).chain(given.iter().map(String::as_str)) {
        let name = entry.split_once('=').map_or(entry, |(name, _)| name);
        let is_same = |other: &String| other.split_once('=').is_some_and(|(other, _)| other == name);
        match (all.iter().position(is_same), entry.contains('=')) {
            (Some(place), true) => entry.clone_into(&mut all[place]),
            (None, true) => all.push(entry.to_owned()),
            (Some(place), false) => drop(all.remove(place)),
            (None, false) => {}
        }
    }
    all
}

/// The process of a spec, for init and for exec.
pub(crate) fn process(wish: &ProcessWish) -> Result<Process> {
    build_process(wish).map_err(|error| Error::unreadable("the options of the process", error))
}

fn build_process(wish: &ProcessWish) -> Result<Process, OciSpecError> {
    let capabilities: Capabilities = CAPABILITIES.into_iter().collect();
    let sets = LinuxCapabilitiesBuilder::default().bounding(capabilities.clone()).permitted(capabilities.clone()).effective(capabilities);
    // those that are not set are otherwise the crate's defaults
    let sets = sets.inheritable(Capabilities::new()).ambient(Capabilities::new()).build()?;
    let files = PosixRlimitBuilder::default().typ(PosixRlimitType::RlimitNofile).hard(1024_u64).soft(1024_u64).build()?;
    let user = UserBuilder::default().uid(wish.user.uid).gid(wish.user.gid);
    let user = if wish.user.more_gids.is_empty() { user } else { user.additional_gids(wish.user.more_gids.clone()) };
    ProcessBuilder::default()
        .terminal(wish.is_terminal)
        .user(user.build()?)
        .args(wish.args.clone())
        .env(wish.environment.clone())
        .cwd(wish.folder.clone())
        .capabilities(sets)
        .rlimits(vec![files])
        .no_new_privileges(true)
        .build()
}

/// The whole spec.
pub(crate) fn spec(wish: &Wish) -> Result<Spec> {
    build(wish).map_err(|error| Error::unreadable("the options of the container", error))
}

fn build(wish: &Wish) -> Result<Spec, OciSpecError> {
    let mut process = wish.process.clone();
    let mut mounts = default_mounts()?;
    if let Some(init) = &wish.init {
        mounts.push(bind(init, Path::new(INIT), true)?);
        process.args.splice(0..0, [INIT.to_owned(), "--".to_owned()]);
    }
    if wish.is_on_host_network {
        for file in ["/etc/hosts", "/etc/resolv.conf"] {
            if Path::new(file).exists() {
                mounts.push(bind(Path::new(file), Path::new(file), true)?);
            }
        }
    }
    for tmpfs in &wish.tmpfs {
        // what is at the place before, as an engine would make it
        mounts.retain(|mount| *mount.destination() != tmpfs.target);
        let options = ["nosuid", "nodev", "noexec"].map(str::to_owned).into_iter().chain(tmpfs.options.iter().cloned()).collect::<Vec<_>>();
        mounts.push(mount(&tmpfs.target, "tmpfs", Path::new("tmpfs"), options)?);
    }
    for volume in &wish.volumes {
        mounts.retain(|mount| *mount.destination() != volume.target);
        mounts.push(bind(&volume.source, &volume.target, volume.is_read_only)?);
    }
    let root = RootBuilder::default().path(wish.root.clone()).readonly(wish.is_read_only).build()?;
    let mut spec =
        SpecBuilder::default().version("1.1.0").root(root).mounts(mounts).process(build_process(&process)?).linux(linux(wish)?).build()?;
    // the crate's default is a name; containerd's is none, for the host's
    spec.set_hostname(wish.hostname.clone());
    Ok(spec)
}

fn linux(wish: &Wish) -> Result<Linux, OciSpecError> {
    // engines allow the devices of every container themselves
    let devices = vec![LinuxDeviceCgroupBuilder::default().allow(false).access("rwm").build()?];
    let mut resources = LinuxResourcesBuilder::default().devices(devices);
    if let Some(bytes) = wish.memory_bytes {
        resources = resources.memory(LinuxMemoryBuilder::default().limit(bytes).build()?);
    }
    if let Some(quota) = wish.cpu_quota {
        resources = resources.cpu(LinuxCpuBuilder::default().quota(quota).period(100_000_u64).build()?);
    }
    let mut kinds = vec![LinuxNamespaceType::Pid, LinuxNamespaceType::Ipc, LinuxNamespaceType::Uts, LinuxNamespaceType::Mount];
    if !wish.is_on_host_network {
        kinds.push(LinuxNamespaceType::Network);
    }
    let namespace = |kind| LinuxNamespaceBuilder::default().typ(kind).build();
    let namespaces = kinds.into_iter().map(namespace).collect::<Result<Vec<LinuxNamespace>, _>>()?;
    LinuxBuilder::default()
        .cgroups_path(wish.cgroup.clone())
        .resources(resources.build()?)
        .namespaces(namespaces)
        .masked_paths(MASKED.map(str::to_owned).to_vec())
        .readonly_paths(READ_ONLY.map(str::to_owned).to_vec())
        .build()
}

fn default_mounts() -> Result<Vec<Mount>, OciSpecError> {
    let make = |(target, kind, source, options): (&str, &str, &str, &str)| {
        mount(Path::new(target), kind, Path::new(source), options.split(',').map(str::to_owned).collect())
    };
    MOUNTS.into_iter().map(make).collect()
}

fn mount(target: &Path, kind: &str, source: &Path, options: Vec<String>) -> Result<Mount, OciSpecError> {
    MountBuilder::default().destination(target).typ(kind).source(source).options(options).build()
}

fn bind(source: &Path, target: &Path, is_read_only: bool) -> Result<Mount, OciSpecError> {
    let mode = if is_read_only { "ro" } else { "rw" };
    mount(target, "bind", source, vec!["rbind".to_owned(), mode.to_owned()])
}

/// Where an init of the host is in the container: on a tmpfs, so that nothing is made in the root file system.
const INIT: &str = "/dev/init";
const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const CAPABILITIES: [Capability; 14] = [
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fsetid,
    Capability::Fowner,
    Capability::Mknod,
    Capability::NetRaw,
    Capability::Setgid,
    Capability::Setuid,
    Capability::Setfcap,
    Capability::Setpcap,
    Capability::NetBindService,
    Capability::SysChroot,
    Capability::Kill,
    Capability::AuditWrite,
];
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/scsi",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
/// Target, type, source, options.
const MOUNTS: [(&str, &str, &str, &str); 7] = [
    ("/proc", "proc", "proc", "nosuid,noexec,nodev"),
    ("/dev", "tmpfs", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
    ("/dev/pts", "devpts", "devpts", "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620,gid=5"),
    ("/dev/shm", "tmpfs", "shm", "nosuid,noexec,nodev,mode=1777,size=65536k"),
    ("/dev/mqueue", "mqueue", "mqueue", "nosuid,noexec,nodev"),
    ("/sys", "sysfs", "sysfs", "nosuid,noexec,nodev,ro"),
    ("/run", "tmpfs", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
];

#[cfg(test)]
mod tests {
    use oci_spec::image::ConfigBuilder;

    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn the_command_line_goes_before_the_image() {
        let config = ConfigBuilder::default().entrypoint(words("/entry -x")).cmd(words("serve")).build().expect("a configuration");
        assert_eq!(args(Some(&config), None, &[]), Some(words("/entry -x serve")));
        assert_eq!(args(Some(&config), None, &words("a b")), Some(words("/entry -x a b")));
        assert_eq!(args(Some(&config), Some("sh"), &[]), Some(words("sh")));
        assert_eq!(args(Some(&config), Some("sh"), &words("-c x")), Some(words("sh -c x")));
        assert_eq!(args(None, None, &words("a")), Some(words("a")));
        assert_eq!(args(None, None, &[]), None);
    }

    #[test]
    fn variables_replace_and_remove_each_other() {
        assert_eq!(environment(&[], false, &[]), [PATH]);
        assert_eq!(environment(&words("PATH=/bin A=1 B=2"), true, &words("A=3 C=4 B")), words("TERM=xterm PATH=/bin A=3 C=4"));
        assert_eq!(environment(&[], false, &words("PATH=/x NONE")), ["PATH=/x"]);
    }

    #[test]
    fn a_spec_has_the_wishes_and_the_defaults() {
        let process = ProcessWish {
            args: words("sleep 1"),
            environment: words("A=1"),
            user: User { uid: 1, gid: 2, more_gids: vec![3] },
            folder: "/work".into(),
            is_terminal: true,
        };
        let volume = |target: &str| Volume { source: "/srv".into(), target: target.into(), is_read_only: true };
        let wish = Wish {
            root: "/srv/root".into(),
            process,
            volumes: vec![volume("/data"), volume("/run")],
            tmpfs: vec![Tmpfs { target: "/tmp".into(), options: words("size=1m") }],
            is_on_host_network: false,
            hostname: None,
            memory_bytes: Some(1 << 20),
            cpu_quota: Some(150_000),
            cgroup: "/default/c".to_owned(),
            init: Some("/usr/bin/tini-static".into()),
            is_read_only: false,
        };
        let json = serde_json::to_value(spec(&wish).expect("a spec")).expect("JSON");
        assert_eq!(json["process"]["args"], serde_json::json!(["/dev/init", "--", "sleep", "1"]));
        assert_eq!(json["process"]["user"], serde_json::json!({ "uid": 1, "gid": 2, "additionalGids": [3] }));
        assert_eq!(json["process"]["capabilities"]["effective"].as_array().map(Vec::len), Some(14));
        assert!(json.get("hostname").is_none() && json["root"]["readonly"] == false, "{json}");
        assert_eq!(json["linux"]["resources"]["memory"]["limit"], 1 << 20);
        assert_eq!(json["linux"]["namespaces"].as_array().map(Vec::len), Some(5));
        let targets: Vec<_> = json["mounts"].as_array().expect("mounts").iter().map(|mount| mount["destination"].clone()).collect();
        assert_eq!(targets.iter().filter(|target| *target == "/run").count(), 1, "the volume takes the place of the tmpfs: {targets:?}");
        let host = Wish { is_on_host_network: true, init: None, ..wish };
        let json = serde_json::to_value(spec(&host).expect("a spec")).expect("JSON");
        assert!(!json["linux"]["namespaces"].to_string().contains("network"));
    }
}
