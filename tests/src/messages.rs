//! The messages that travel inside an `Any` between client and shim, and that the gRPC bindings do not hold.

use prost::{Message, Name};
use prost_types::Any;

/// Options of a runtime of the runc family.
#[derive(Clone, PartialEq, Message)]
pub struct Options {
    /// Do not pivot the root.
    #[prost(bool, tag = "1")]
    pub no_pivot_root: bool,
    /// No new session keyring.
    #[prost(bool, tag = "2")]
    pub no_new_keyring: bool,
    /// Cgroup of the shim itself.
    #[prost(string, tag = "3")]
    pub shim_cgroup: String,
    /// Owner of the stdio pipes.
    #[prost(uint32, tag = "4")]
    pub io_uid: u32,
    /// Group of the stdio pipes.
    #[prost(uint32, tag = "5")]
    pub io_gid: u32,
    /// The OCI runtime.
    #[prost(string, tag = "6")]
    pub binary_name: String,
    /// The runtime's state folder.
    #[prost(string, tag = "7")]
    pub root: String,
    /// Cgroups by systemd.
    #[prost(bool, tag = "9")]
    pub systemd_cgroup: bool,
    /// Where a checkpoint is written.
    #[prost(string, tag = "10")]
    pub criu_image_path: String,
    /// Where criu keeps its logs.
    #[prost(string, tag = "11")]
    pub criu_work_path: String,
}

impl Name for Options {
    const PACKAGE: &'static str = "containerd.runc.v1";
    const NAME: &'static str = "Options";
}

/// Options of one checkpoint.
#[derive(Clone, PartialEq, Message)]
pub struct CheckpointOptions {
    /// End the container afterwards.
    #[prost(bool, tag = "1")]
    pub exit: bool,
    /// Where the image is written.
    #[prost(string, tag = "8")]
    pub image_path: String,
    /// Where criu keeps its logs.
    #[prost(string, tag = "9")]
    pub work_path: String,
}

impl Name for CheckpointOptions {
    const PACKAGE: &'static str = "containerd.runc.v1";
    const NAME: &'static str = "CheckpointOptions";
}

/// What `Pids` reports about an exec.
#[derive(Clone, PartialEq, Message)]
pub struct ProcessDetails {
    /// The id of the exec.
    #[prost(string, tag = "1")]
    pub exec_id: String,
}

impl Name for ProcessDetails {
    const PACKAGE: &'static str = "containerd.runc.v1";
    const NAME: &'static str = "ProcessDetails";
}

/// Options that CRI sends to a runtime type that it does not know.
#[derive(Clone, PartialEq, Message)]
pub struct GenericOptions {
    /// The name of the type of the options.
    #[prost(string, tag = "1")]
    pub type_url: String,
    /// The path of a configuration file.
    #[prost(string, tag = "2")]
    pub config_path: String,
    /// The configuration itself.
    #[prost(bytes = "vec", tag = "3")]
    pub config_body: Vec<u8>,
}

impl Name for GenericOptions {
    const PACKAGE: &'static str = "runtimeoptions.v1";
    const NAME: &'static str = "Options";
}

/// The part of the cgroup v1 metrics that the tests look at.
#[derive(Clone, PartialEq, Message)]
pub struct MetricsV1 {
    /// Number of tasks.
    #[prost(message, optional, tag = "2")]
    pub pids: Option<PidsStat>,
    /// Processor time.
    #[prost(message, optional, tag = "3")]
    pub cpu: Option<CpuStat>,
    /// Memory.
    #[prost(message, optional, tag = "4")]
    pub memory: Option<MemoryStatV1>,
}

/// Number of tasks.
#[derive(Clone, PartialEq, Message)]
pub struct PidsStat {
    /// Now.
    #[prost(uint64, tag = "1")]
    pub current: u64,
    /// At most.
    #[prost(uint64, tag = "2")]
    pub limit: u64,
}

/// Processor time.
#[derive(Clone, PartialEq, Message)]
pub struct CpuStat {
    /// Used so far.
    #[prost(message, optional, tag = "1")]
    pub usage: Option<CpuUsage>,
}

/// Processor time used.
#[derive(Clone, PartialEq, Message)]
pub struct CpuUsage {
    /// Nanoseconds.
    #[prost(uint64, tag = "1")]
    pub total: u64,
}

/// Memory, of a v1 cgroup.
#[derive(Clone, PartialEq, Message)]
pub struct MemoryStatV1 {
    /// All of it.
    #[prost(message, optional, tag = "33")]
    pub usage: Option<MemoryEntry>,
}

/// One counter of memory.
#[derive(Clone, PartialEq, Message)]
pub struct MemoryEntry {
    /// Bytes at most.
    #[prost(uint64, tag = "1")]
    pub limit: u64,
    /// Bytes now.
    #[prost(uint64, tag = "2")]
    pub usage: u64,
}

/// The type of cgroup v1 metrics.
pub const METRICS_V1: &str = "io.containerd.cgroups.v1.Metrics";
/// The type of cgroup v2 metrics.
pub const METRICS_V2: &str = "io.containerd.cgroups.v2.Metrics";
/// The type of an OCI runtime spec, which travels as JSON.
pub const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// The type of an OCI process, which travels as JSON.
pub const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// The type of OCI resources, which travel as JSON.
pub const RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";

/// Packs `message` the way containerd's Go code names types.
pub fn any<M: Message + Name>(message: &M) -> Any {
    Any { type_url: M::full_name(), value: message.encode_to_vec() }
}

/// Packs JSON under `type_url`.
pub fn any_json(type_url: &str, value: &serde_json::Value) -> Any {
    Any { type_url: type_url.to_owned(), value: value.to_string().into_bytes() }
}
