//! Plans: what a container's making and entering consist of, with everything resolved.
//!
//! Owns the types. A plan is data: it depends on the specification and on facts about the host that are handed in, on nothing else, and making it
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
mod hooks;
mod identity;
mod labels;
mod limits_v1;
mod limits_v2;
mod make;
mod mounts;
mod net_devices;
mod options;
mod root;
mod scheduling;
mod sysctl;
mod users;

pub use criu::{CgroupMode, Checkpoint, Criu, Restore, check_restore, checkpoint, restore};
pub use hooks::{Hook, Hooks, State};
#[cfg(test)]
pub(crate) use identity::number as capability_number;
pub use make::{Request, create, exec, update};
pub(crate) use options::{IDMAP, RDONLY};
pub use root::{Classic, RootMount, can_mount_root};
pub use scheduling::{Affinity, MemoryPolicy, Range, Scheduler, Scheduling};
pub(crate) use scheduling::{MAX_NODES, MAX_PROCESSORS};
pub use users::{IdRange, Mappings};

/// In place of a half of `cpu.max`: what it is now.
pub(crate) const KEEP: &str = "keep";

/// The version of the plans' meaning. A performer refuses any other.
pub const VERSION: u16 = 1;

/// The making of a container, up to the moment before its program is executed.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
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

/// A mount.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Mount {
    /// Absolute path in the container.
    #[n(0)]
    pub target: String,
    #[n(1)]
    pub source: Source,
    /// `MOUNT_ATTR_*` of this mount. A bind without any keeps those of its source.
    #[n(2)]
    pub attributes: Attributes,
    /// The same for it and every mount below it.
    #[n(3)]
    pub recursive: Attributes,
    /// Calls with `MS_*` flags, in order.
    #[n(4)]
    pub propagation: Vec<u64>,
    /// Of the attributes to clear, those that were not asked for: they stay where the kernel has locked them.
    #[n(5)]
    pub lenient: u64,
    /// A bind shows other owners than its source has.
    #[n(6)]
    pub ids: Option<MappedIds>,
}

/// How a bind shows owners.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct MappedIds {
    /// So do the mounts below it.
    #[n(0)]
    pub recursive: bool,
    /// An owner on disk is `inside`, one that is shown `outside`. None: the mappings of the container's user namespace.
    #[n(1)]
    pub mappings: Mappings,
}

/// Attributes to set and to clear.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct Attributes {
    #[n(0)]
    pub set: u64,
    #[n(1)]
    pub clear: u64,
}

impl Attributes {
    /// Whether nothing changes.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.set == 0 && self.clear == 0
    }
}

/// What is mounted.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub enum Source {
    /// A new file system.
    #[n(0)]
    New {
        #[n(0)]
        kind: String,
        /// In order, as fsconfig(2) takes them; flags have no value.
        #[n(1)]
        parameters: Vec<(String, Option<String>)>,
        /// The target must be a folder whose path has no symbolic link: procfs and sysfs.
        #[n(2)]
        strict: bool,
        /// A tmpfs without `mode` gets that of the folder it covers.
        #[n(3)]
        keep_mode: bool,
        /// Made read-only only after every mount and device: they are made in it.
        #[n(4)]
        late_readonly: bool,
        /// Filled with what it covers.
        #[n(5)]
        copy_up: bool,
    },
    /// A file or folder of the host.
    #[n(1)]
    Bind {
        #[n(0)]
        path: String,
        #[n(1)]
        recursive: bool,
        /// It must be a procfs, from its root: the target is `/proc`.
        #[n(2)]
        procfs: bool,
    },
    /// A symbolic link beside the mounts.
    #[n(2)]
    Link {
        #[n(0)]
        to: String,
    },
    /// What is mounted at the target already.
    #[n(3)]
    Existing {
        /// For the file system; none: its mount alone is changed.
        #[n(0)]
        parameters: Option<Vec<(String, Option<String>)>>,
    },
    /// A file system by mount(2): of a root alone.
    #[n(4)]
    Classic(#[n(0)] Classic),
}

/// A device node, or a fifo.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Device {
    #[n(0)]
    pub path: String,
    /// As mknod(2) takes it: type and permissions.
    #[n(1)]
    pub mode: u32,
    #[n(2)]
    pub major: u32,
    #[n(3)]
    pub minor: u32,
    #[n(4)]
    pub uid: u32,
    #[n(5)]
    pub gid: u32,
}

/// A process to execute.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Process {
    #[n(0)]
    pub args: Vec<String>,
    /// `NAME=value`, each name once. HOME is added by the performer if it is missing or empty.
    #[n(1)]
    pub env: Vec<String>,
    #[n(2)]
    pub cwd: String,
    #[n(3)]
    pub uid: u32,
    #[n(4)]
    pub gid: u32,
    #[n(5)]
    pub groups: Vec<u32>,
    #[n(6)]
    pub umask: u32,
    /// Without, nothing is changed.
    #[n(7)]
    pub capabilities: Option<Capabilities>,
    #[n(8)]
    pub no_new_privileges: bool,
    #[n(9)]
    pub rlimits: Vec<Rlimit>,
    #[n(10)]
    pub filter: Option<Filter>,
    #[n(11)]
    pub terminal: Option<Terminal>,
    #[n(12)]
    pub oom_score_adj: Option<i32>,
    /// The session keyring to join.
    #[n(13)]
    pub keyring: Option<String>,
    #[n(14)]
    pub apparmor_profile: Option<String>,
    #[n(15)]
    pub selinux_label: Option<String>,
    #[n(16)]
    pub scheduling: Scheduling,
}

/// Sets of capabilities: bit n is capability n.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Encode, Decode)]
pub struct Capabilities {
    #[n(0)]
    pub bounding: u64,
    #[n(1)]
    pub effective: u64,
    #[n(2)]
    pub permitted: u64,
    #[n(3)]
    pub inheritable: u64,
    #[n(4)]
    pub ambient: u64,
}

/// A limit of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Rlimit {
    /// `RLIMIT_*`.
    #[n(0)]
    pub resource: u32,
    #[n(1)]
    pub soft: u64,
    #[n(2)]
    pub hard: u64,
}

/// A filter of system calls.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Filter {
    /// Instructions of 8 bytes, as the kernel takes them.
    #[cbor(n(0), with = "minicbor::bytes")]
    pub program: Vec<u8>,
    /// `SECCOMP_FILTER_FLAG_*`.
    #[n(1)]
    pub flags: u64,
    /// Who decides about calls that the program hands on.
    #[n(2)]
    pub agent: Option<Agent>,
}

/// A process of the host that decides about system calls.
#[derive(Debug, Clone, PartialEq, Eq, Encode, Decode)]
pub struct Agent {
    /// Its unix socket, which receives the filter's descriptor.
    #[n(0)]
    pub path: String,
    /// For the agent, as it is.
    #[n(1)]
    pub metadata: String,
}

/// A terminal. No size leaves the kernel's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Encode, Decode)]
pub struct Terminal {
    /// Rows and columns.
    #[n(0)]
    pub size: Option<(u16, u16)>,
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
        }
    }
}

impl std::fmt::Display for Rlimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "set the limit of resource {} to {}:{}", self.resource, self.soft, self.hard)
    }
}

impl Cgroup {
    /// Whether a hierarchy of a kind is among the folders.
    #[must_use]
    pub fn unified(&self) -> Option<&Folder> {
        self.folders.iter().find(|folder| folder.hierarchy == Hierarchy::Unified)
    }
}

impl Folder {
    /// Its absolute path.
    #[must_use]
    pub fn absolute(&self) -> std::path::PathBuf {
        std::path::Path::new(&self.mount).join(self.path.trim_start_matches('/'))
    }
}
