//! The messages of the Container Runtime Interface, with the fields that the tests set or read; the pod's own configuration
//! is in [`crate::pod_config`]. Names are the interface's own; numbers are those of
//! runtime.v1.

use std::collections::HashMap;

use prost::Message;

use crate::pod_config::{Namespaces, PodConfig};

/// The full names of the methods.
pub(super) mod method {
    pub(crate) const IMAGE_STATUS: &str = "/runtime.v1.ImageService/ImageStatus";
    pub(crate) const RUN_POD: &str = "/runtime.v1.RuntimeService/RunPodSandbox";
    pub(crate) const STOP_POD: &str = "/runtime.v1.RuntimeService/StopPodSandbox";
    pub(crate) const REMOVE_POD: &str = "/runtime.v1.RuntimeService/RemovePodSandbox";
    pub(crate) const POD_STATUS: &str = "/runtime.v1.RuntimeService/PodSandboxStatus";
    pub(crate) const LIST_PODS: &str = "/runtime.v1.RuntimeService/ListPodSandbox";
    pub(crate) const POD_STATS: &str = "/runtime.v1.RuntimeService/PodSandboxStats";
    pub(crate) const CREATE: &str = "/runtime.v1.RuntimeService/CreateContainer";
    pub(crate) const START: &str = "/runtime.v1.RuntimeService/StartContainer";
    pub(crate) const STOP: &str = "/runtime.v1.RuntimeService/StopContainer";
    pub(crate) const REMOVE: &str = "/runtime.v1.RuntimeService/RemoveContainer";
    pub(crate) const STATUS: &str = "/runtime.v1.RuntimeService/ContainerStatus";
    pub(crate) const EXEC: &str = "/runtime.v1.RuntimeService/ExecSync";
    pub(crate) const STATS: &str = "/runtime.v1.RuntimeService/ContainerStats";
}

/// The state of a container that runs.
pub const RUNNING: i32 = 1;
/// The state of a container that has ended.
pub const EXITED: i32 = 2;
/// The state of a pod whose sandbox runs.
pub const READY: i32 = 0;
/// The state of a pod whose sandbox does not run.
pub const NOT_READY: i32 = 1;

#[derive(Clone, PartialEq, Message)]
pub(super) struct Nothing {}

#[derive(Clone, PartialEq, Message)]
pub(super) struct RunPodRequest {
    #[prost(message, optional, tag = "1")]
    pub(super) config: Option<PodConfig>,
    #[prost(string, tag = "2")]
    pub(super) runtime_handler: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodId {
    #[prost(string, tag = "1")]
    pub(super) id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodNetwork {
    #[prost(string, tag = "1")]
    pub(super) ip: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodStatus {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(int32, tag = "3")]
    pub(super) state: i32,
    #[prost(int64, tag = "4")]
    pub(super) created_at: i64,
    #[prost(message, optional, tag = "5")]
    pub(super) network: Option<PodNetwork>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodStatusResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) status: Option<PodStatus>,
    #[prost(map = "string, string", tag = "2")]
    pub(super) info: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodStatusRequest {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(bool, tag = "2")]
    pub(super) verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodItem {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(int32, tag = "3")]
    pub(super) state: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodList {
    #[prost(message, repeated, tag = "1")]
    pub(super) items: Vec<PodItem>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ContainerId {
    #[prost(string, tag = "1")]
    pub(super) id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ContainerMetadata {
    #[prost(string, tag = "1")]
    pub(super) name: String,
    #[prost(uint32, tag = "2")]
    pub(super) attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ImageSpec {
    #[prost(string, tag = "1")]
    pub(super) image: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Resources {
    #[prost(int64, tag = "4")]
    pub(super) memory_limit_in_bytes: i64,
    #[prost(int64, tag = "10")]
    pub(super) memory_swap_limit_in_bytes: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ContainerSecurity {
    #[prost(message, optional, tag = "3")]
    pub(super) namespace_options: Option<Namespaces>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct LinuxContainer {
    #[prost(message, optional, tag = "1")]
    pub(super) resources: Option<Resources>,
    #[prost(message, optional, tag = "2")]
    pub(super) security_context: Option<ContainerSecurity>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ContainerConfig {
    #[prost(message, optional, tag = "1")]
    pub(super) metadata: Option<ContainerMetadata>,
    #[prost(message, optional, tag = "2")]
    pub(super) image: Option<ImageSpec>,
    #[prost(string, repeated, tag = "3")]
    pub(super) command: Vec<String>,
    #[prost(string, tag = "11")]
    pub(super) log_path: String,
    #[prost(message, optional, tag = "15")]
    pub(super) linux: Option<LinuxContainer>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct CreateRequest {
    #[prost(string, tag = "1")]
    pub(super) pod: String,
    #[prost(message, optional, tag = "2")]
    pub(super) config: Option<ContainerConfig>,
    #[prost(message, optional, tag = "3")]
    pub(super) sandbox_config: Option<PodConfig>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StopRequest {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(int64, tag = "2")]
    pub(super) timeout: i64,
}

/// The container status that the kubelet gets.
#[derive(Clone, PartialEq, Message)]
pub struct ContainerStatus {
    /// [`RUNNING`], [`EXITED`] …
    #[prost(int32, tag = "3")]
    pub state: i32,
    /// Nanoseconds since 1970.
    #[prost(int64, tag = "5")]
    pub started_at: i64,
    /// Nanoseconds since 1970.
    #[prost(int64, tag = "6")]
    pub finished_at: i64,
    /// The exit code.
    #[prost(int32, tag = "7")]
    pub exit_code: i32,
    /// One word: `Completed`, `Error`, `OOMKilled`.
    #[prost(string, tag = "10")]
    pub reason: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) status: Option<ContainerStatus>,
    #[prost(map = "string, string", tag = "2")]
    pub(super) info: HashMap<String, String>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StatusRequest {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(bool, tag = "2")]
    pub(super) verbose: bool,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ExecRequest {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, repeated, tag = "2")]
    pub(super) command: Vec<String>,
    #[prost(int64, tag = "3")]
    pub(super) timeout: i64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ExecResponse {
    #[prost(bytes = "vec", tag = "1")]
    pub(super) stdout: Vec<u8>,
    #[prost(int32, tag = "3")]
    pub(super) exit_code: i32,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Number {
    #[prost(uint64, tag = "1")]
    pub(super) value: u64,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct CpuUsage {
    #[prost(message, optional, tag = "2")]
    pub(super) usage_core_nano_seconds: Option<Number>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct MemoryUsage {
    #[prost(message, optional, tag = "2")]
    pub(super) working_set_bytes: Option<Number>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ContainerStats {
    #[prost(message, optional, tag = "2")]
    pub(super) cpu: Option<CpuUsage>,
    #[prost(message, optional, tag = "3")]
    pub(super) memory: Option<MemoryUsage>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct StatsResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) stats: Option<ContainerStats>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct LinuxPodStats {
    #[prost(message, optional, tag = "1")]
    pub(super) cpu: Option<CpuUsage>,
    #[prost(message, optional, tag = "2")]
    pub(super) memory: Option<MemoryUsage>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodStats {
    #[prost(message, optional, tag = "2")]
    pub(super) linux: Option<LinuxPodStats>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct PodStatsResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) stats: Option<PodStats>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ImageStatusRequest {
    #[prost(message, optional, tag = "1")]
    pub(super) image: Option<ImageSpec>,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct Image {
    #[prost(string, tag = "1")]
    pub(super) id: String,
}

#[derive(Clone, PartialEq, Message)]
pub(super) struct ImageStatusResponse {
    #[prost(message, optional, tag = "1")]
    pub(super) image: Option<Image>,
}
