//! What a plan says of a process.
use minicbor::{Decode, Encode};

use super::Scheduling;

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

impl std::fmt::Display for Rlimit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "set the limit of resource {} to {}:{}", self.resource, self.soft, self.hard)
    }
}
