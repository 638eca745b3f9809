//! What containerd runs this binary for: `start`, `delete` and `-info`.
//!
//! Owns the contract on command line, environment, standard input and output. A `start` ends in microseconds after the keeper
//! was made; nothing here lives on.
//!
//! ```text
//!  containerd ── start ──▶ group, address ──▶ a keeper answers there: reserve a place ─┬─▶ address on stdout
//!                                        └──▶ nobody: bind both sockets, exec a keeper ┘
//!  containerd ── delete ─▶ journal ──▶ keeper ──▶ manual cleanup (docs/bootstrap.md: the order of truth)
//! ```
//!
//! **Invariant:** nothing but the answer is written to stdout, and nothing at all to stderr by a `start` that succeeds: containerd
//! reads both as one.
use std::io;
use std::path::PathBuf;

use crate::{control, run_dir};

mod delete;
pub(crate) mod dialect;
mod group;
mod helper;
mod info;
mod manual_cleanup;
mod placement;
mod socket;
mod start;
pub(crate) mod wait;

pub(crate) use delete::delete;
pub(crate) use info::info;
pub(crate) use start::start;

/// Why a command for containerd failed. containerd shows the sentence to its client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{op} {}", path.display())]
    Io { op: &'static str, path: PathBuf, source: io::Error },
    #[error("read standard input")]
    Stdin { source: io::Error },
    #[error("write the answer to standard output")]
    Stdout { source: io::Error },
    #[error("{what} is longer than {limit_bytes} bytes")]
    TooLong { what: String, limit_bytes: u64 },
    #[error("{} is not the configuration of a container", path.display())]
    Config { path: PathBuf, source: serde_json::Error },
    #[error("the path {} is not text in UTF-8", path.display())]
    NotText { path: PathBuf },
    #[error("{} stayed locked: another start or delete of this shim hangs", path.display())]
    Locked { path: PathBuf },
    #[error("{} is in use by a process that is not a shim of ours", path.display())]
    Foreign { path: PathBuf },
    #[error("container {id} exists already, in the shim with pid {keeper}; remove it first: containerd-shim-x-v2 -namespace {namespace} -id {id} -bundle {} delete", bundle.display())]
    AlreadyExists { id: String, namespace: String, bundle: PathBuf, keeper: u32 },
    #[error("the shim of group {group} takes no container: {why}")]
    NotTaken { group: String, why: String },
    #[error("the shim of group {group} is leaving and does not get done")]
    StillLeaving { group: String },
    #[error("process {pid} of container {id} is still there though it was killed")]
    StillAlive { id: String, pid: u32 },
    #[error("join the cgroup {group}, which the option ShimCgroup names")]
    ShimCgroup { group: String, source: io::Error },
    #[error("no hierarchy has the cgroup {group}, which the option ShimCgroup names")]
    NoShimCgroup { group: String },
    #[error("separate the cores, as the variable SCHED_CORE asks")]
    CoreScheduling { source: io::Error },
    #[error("the options on standard input are no message")]
    Options { source: protobuf::Error },
    #[error(transparent)]
    RuntimeOptions(#[from] crate::options::OptionsError),
    #[error(transparent)]
    Engine(#[from] crate::engine::EngineNotFound),
    #[error(transparent)]
    Mount(#[from] crate::rootfs::MountError),
    #[error(transparent)]
    RunDir(#[from] run_dir::Error),
    #[error(transparent)]
    Control(#[from] control::Error),
}
