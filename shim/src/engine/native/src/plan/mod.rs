//! Plans: what a container's making and entering consist of, with everything resolved.
//!
//! Owns the types; those of mounts and processes are `mount`'s and `process`'s. A plan is data: it depends on the specification and on facts about the host that are handed in, on nothing else, and making it
//! twice gives the same. It goes as CBOR from the process that makes it to the one that performs it, which may be of another build.
//!
//! ```text
//!  config.json ── spec::parse ──▶ Spec ─┐
//!                                       ├── plan::create ──▶ Create ── CBOR ──▶ perform::create
//!  Host::read ───────────────────▶ Host ┘        │
//!                                                └──▶ Container ── plan::exec(process) ──▶ Exec ── CBOR ──▶ perform::exec
//! ```
//!
//! **Invariant:** nothing in this module reads a file or makes a system call, but for the cache of compiled filters, if a request has one: what comes from
//! there is what would be compiled.
use minicbor::{Decode, Encode};

mod block_io;
mod cgroup;
mod criu;
mod device_program;
mod devices;
mod gvariant;
mod hooks;
mod identity;
mod labels;
mod limits_v1;
mod limits_v2;
mod make;
mod mount;
mod mounts;
mod net_devices;
mod options;
mod pod;
mod process;
mod root;
mod scheduling;
mod sysctl;
mod unit;
mod users;

pub use cgroup::parent;
pub use criu::{CgroupMode, Checkpoint, Criu, Imaged, check_restore, checkpoint, restore};
pub use gvariant::Value;
pub use hooks::{Hook, Hooks, State};
#[cfg(test)]
pub(crate) use identity::number as capability_number;
pub use make::{Request, create, exec, update};
pub use mount::{Attributes, Device, MappedIds, Mount, Source};
pub(crate) use options::{IDMAP, RDONLY};
pub use pod::{Pod, pod};
pub use process::{Agent, Capabilities, Filter, Process, Rlimit, Terminal};
pub use root::{Classic, RootMount, check_root_mounts, relative_layers};
pub use scheduling::{Affinity, MemoryPolicy, Range, Scheduler, Scheduling};
pub(crate) use scheduling::{MAX_NODES, MAX_PROCESSORS};
pub(crate) use unit::ANNOTATION;
pub use unit::{Bandwidth, Property, Unit, settle};
pub use users::{IdRange, Mappings};

/// In place of a half of `cpu.max`: what it is now.
pub(crate) const KEEP: &str = "keep";

/// The version of the plans' meaning. A performer refuses any other.
pub const VERSION: u16 = 1;

/// The making of a container, up to the moment before its program is executed.
#[derive(Debug, Clone, PartialEq, Encode, Decode)]
pub struct Create {
    #[n(0)]
    pub version: u16,
    #[n(1)]
    pub namespaces: Vec<Namespace>,
    #[n(2)]
    pub cgroup: Cgroup,
    /// Absolute path of the root file system on the host.
    #[n(3)]
    pub root: String,
    #[n(4)]
    pub root_readonly: bool,
    /// `MS_*` flags for the host's mounts in the new namespace.
    #[n(5)]
    pub propagation: u64,
    /// In order: the source of one may lie in an earlier one.
    #[n(6)]
    pub mounts: Vec<Mount>,
    /// Empty where the container brings a `/dev` of its own.
    #[n(7)]
    pub devices: Vec<Device>,
    /// Links to make: target, path.
    #[n(8)]
    pub links: Vec<(String, String)>,
    #[n(9)]
    pub masked: Vec<String>,
    #[n(10)]
    pub readonly: Vec<String>,
    #[n(11)]
    pub hostname: Option<String>,
    #[n(12)]
    pub domainname: Option<String>,
    /// Paths below `/proc/sys`, with values.
    #[n(13)]
    pub sysctls: Vec<(String, String)>,
    #[n(14)]
    pub process: Process,
    /// Whether a terminal is bound on `/dev/console` and the like: `/dev` is the container's own.
    #[n(15)]
    pub own_dev: bool,
    #[n(16)]
    pub hooks: Hooks,
    /// SELinux's label of new file systems. The mounts have it already, where a file system takes it when it is made.
    #[n(17)]
    pub mount_label: Option<String>,
    /// Network devices of the host to move into the container: the name that it has, the name that it gets.
    #[n(18)]
    pub net_devices: Vec<(String, String)>,
    /// Of the container's user namespace: to be written to a new one, or those that one to join must have.
    #[n(24)]
    pub mappings: Mappings,
    /// Lines of `timens_offsets` for a new time namespace.
    #[n(25)]
    pub clocks: Vec<String>,
    /// `MS_*` flags for the root, once it is the root: before, they would concern the host's mounts.
    #[n(26)]
    pub root_propagation: Option<u64>,
    #[n(27)]
    pub entry: Entry,
    /// What the root is, each mounted on the one before; what the host has there without.
    #[n(28)]
    pub root_mounts: Vec<Mount>,
    /// The unit of systemd's to start before the plan is performed. Not a performer's matter: it is not encoded.
    #[cbor(skip)]
    pub unit: Option<Unit>,
}

/// How the root becomes the root.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Entry {
    /// pivot_root(2): nothing of the host stays in the mount namespace.
    #[default]
    #[n(0)]
    Pivot,
    /// Moved over the host's root: where that is an initramfs, which cannot be exchanged.
    #[n(1)]
    Move,
    /// chroot(2) alone, and nothing is mounted: the mount namespace is the runtime's.
    #[n(2)]
    Chroot,
}

/// Another process for a container.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Exec {
    #[n(0)]
    pub version: u16,
    /// Namespaces of init to join, as `CLONE_NEW*`.
    #[n(1)]
    pub namespaces: u64,
    #[n(2)]
    pub cgroup: Cgroup,
    #[n(3)]
    pub process: Process,
    /// Of the container, for an agent that decides about system calls.
    #[n(4)]
    pub state: State,
    /// The root to change to, on the host: the container has no mount namespace.
    #[n(8)]
    pub chroot: Option<String>,
}

/// What later plans need to know of a container: to be kept with it.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Container {
    #[n(0)]
    pub version: u16,
    #[n(1)]
    pub namespaces: u64,
    /// Without limits.
    #[n(2)]
    pub cgroup: Cgroup,
    #[n(3)]
    pub filter: Option<Filter>,
    #[n(4)]
    pub capabilities: Option<Capabilities>,
    #[n(5)]
    pub umask: u32,
    #[n(6)]
    pub oom_score_adj: Option<i32>,
    #[n(7)]
    pub keyring: Option<String>,
    /// Those that are still to be run.
    #[n(8)]
    pub hooks: Hooks,
    /// For processes that have none of their own.
    #[n(9)]
    pub selinux_label: Option<String>,
    /// For processes that ask for nothing of it.
    #[n(10)]
    pub scheduling: Scheduling,
    /// Of its user namespace, if they are known.
    #[n(16)]
    pub mappings: Mappings,
    /// The root on the host of one without a mount namespace.
    #[n(17)]
    pub chroot: Option<String>,
    /// The name of its unit, if systemd has made its cgroup.
    #[n(18)]
    pub unit: Option<String>,
}

/// A namespace of the container.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Namespace {
    #[n(0)]
    pub kind: Kind,
    /// The one to join; a new one without.
    #[n(1)]
    pub path: Option<String>,
}

/// Kinds of namespaces.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Kind {
    #[n(0)]
    Mount,
    #[n(1)]
    Pid,
    #[n(2)]
    Network,
    #[n(3)]
    Ipc,
    #[n(4)]
    Uts,
    #[n(5)]
    Cgroup,
    #[n(6)]
    User,
    #[n(7)]
    Time,
}

/// The folders of a container's cgroup: one for each hierarchy.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Cgroup {
    #[n(0)]
    pub folders: Vec<Folder>,
    /// The process with which systemd was given the cgroup: the only one that may be there already. systemd's own folder is not made then, it must be there.
    #[n(1)]
    pub placeholder: Option<u32>,
}

/// A folder of a cgroup.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Folder {
    /// The folder that exists: the hierarchy's mount point.
    #[n(0)]
    pub mount: String,
    /// The path below it.
    #[n(1)]
    pub path: String,
    #[n(2)]
    pub hierarchy: Hierarchy,
    /// The controllers that v1 has in this hierarchy.
    #[n(6)]
    pub of: Vec<String>,
    /// Files to write once the container's mounts are made: its own making is not to run into its limits.
    #[n(3)]
    pub limits: Vec<Write>,
    /// Controllers of cgroup v2 to enable on the way.
    #[n(4)]
    pub controllers: Vec<String>,
    /// The program of cgroup v2 that is asked about devices.
    #[cbor(n(5), with = "minicbor::bytes")]
    pub devices: Option<Vec<u8>>,
    /// Whom the folder belongs to, if processes of the container are to divide it.
    #[n(12)]
    pub owner: Option<u32>,
}

/// Kinds of hierarchies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
#[cbor(index_only)]
pub enum Hierarchy {
    /// cgroup v1.
    #[n(0)]
    V1,
    /// cgroup v1's cpuset: a new folder takes no process before it has processors and memory nodes.
    #[n(1)]
    Cpuset,
    /// cgroup v2.
    #[n(2)]
    Unified,
}

/// Content for a file.
#[derive(Debug, Clone, Default, PartialEq, Eq, Encode, Decode)]
pub struct Write {
    #[n(0)]
    pub file: String,
    #[n(1)]
    pub value: String,
    /// A kernel without the file has nothing to limit.
    #[n(2)]
    pub optional: bool,
    /// Not written where the folder has this file.
    #[n(3)]
    pub unless: Option<String>,
    /// The file has a line for each device, of which this changes one. Written to undo that, where the file had no line of the device.
    #[n(4)]
    pub reset: Option<String>,
}

impl Kind {
    /// `CLONE_NEW*`.
    #[must_use]
    pub fn flag(self) -> u64 {
        let flag = match self {
            Self::Mount => libc::CLONE_NEWNS,
            Self::Pid => libc::CLONE_NEWPID,
            Self::Network => libc::CLONE_NEWNET,
            Self::Ipc => libc::CLONE_NEWIPC,
            Self::Uts => libc::CLONE_NEWUTS,
            Self::Cgroup => libc::CLONE_NEWCGROUP,
            Self::User => libc::CLONE_NEWUSER,
            Self::Time => libc::CLONE_NEWTIME,
        };
        flag as u64
    }
}

impl Create {
    /// Whether the container has a new namespace of a kind.
    #[must_use]
    pub fn makes(&self, kind: Kind) -> bool {
        self.namespaces.iter().any(|namespace| namespace.kind == kind && namespace.path.is_none())
    }

    /// Whether the container has a namespace of a kind that is not the runtime's: a new one, or a joined one.
    #[must_use]
    pub fn has(&self, kind: Kind) -> bool {
        self.namespaces.iter().any(|namespace| namespace.kind == kind)
    }

    /// What is to be kept for later plans.
    #[must_use]
    pub fn container(&self) -> Container {
        Container {
            version: VERSION,
            namespaces: self.namespaces.iter().fold(0, |flags, namespace| flags | namespace.kind.flag()),
            cgroup: Cgroup {
                folders: self.cgroup.folders.iter().map(|folder| Folder { limits: Vec::new(), devices: None, ..folder.clone() }).collect(),
                placeholder: None,
            },
            filter: self.process.filter.clone(),
            capabilities: self.process.capabilities,
            umask: self.process.umask,
            oom_score_adj: self.process.oom_score_adj,
            keyring: self.process.keyring.clone(),
            selinux_label: self.process.selinux_label.clone(),
            scheduling: self.process.scheduling.clone(),
            hooks: Hooks {
                poststart: self.hooks.poststart.clone(),
                poststop: self.hooks.poststop.clone(),
                state: self.hooks.state.clone(),
                ..Hooks::default()
            },
            mappings: self.mappings.clone(),
            chroot: (self.entry == Entry::Chroot).then(|| self.root.clone()),
            unit: self.unit.as_ref().map(|unit| unit.name.clone()),
        }
    }
}

impl Cgroup {
    /// Whether a hierarchy of a kind is among the folders.
    #[must_use]
    pub fn unified(&self) -> Option<&Folder> {
        self.folders.iter().find(|folder| folder.hierarchy == Hierarchy::Unified)
    }

    /// The folder in the hierarchy by which systemd tracks processes: its own of v1, else v2.
    #[must_use]
    pub fn of_systemd(&self) -> Option<&Folder> {
        self.folders.iter().find(|folder| folder.of == [unit::NAMED]).or_else(|| self.unified())
    }
}

impl Folder {
    /// Its absolute path.
    #[must_use]
    pub fn absolute(&self) -> std::path::PathBuf {
        std::path::Path::new(&self.mount).join(self.path.trim_start_matches('/'))
    }
}
