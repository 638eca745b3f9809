//! What a plan says of mounts and device nodes.
use minicbor::{Decode, Encode};

use super::{Classic, Mappings};

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
