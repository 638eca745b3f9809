//! The commands that containerd runs: `start`, `delete` and `-info`.
//!
//! Owns the contract on command line, environment, standard input and output. A `start` exits microseconds after it has started the keeper;
//! nothing here stays.
//!
//! ```text
//!  containerd ── start ──▶ group, address ──▶ a keeper answers there: reserve a place ─┬─▶ address on stdout
//!                                        └──▶ no keeper: bind both sockets, exec one ──┘
//!  containerd ── delete ─▶ journal ──▶ keeper ──▶ manual cleanup (docs/bootstrap.md: the order of truth)
//! ```
//!
//! **Invariant:** stdout gets nothing but the answer, and stderr gets nothing from a `start` that succeeds: containerd
//! reads both as one.
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::{control, run_dir};

mod delete;
mod delete_pod;
pub(crate) mod dialect;
mod group;
mod helper;
mod info;
mod input;
mod manual_cleanup;
mod native_cleanup;
mod placement;
mod socket;
mod start;
pub(crate) mod wait;

pub(crate) use delete::delete;
pub(crate) use info::info;
pub(crate) use start::{is_of_pod, start};

/// Why a command for containerd failed. containerd shows the sentence to its client.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("{op} {}", path.display())]
    Io { op: &'static str, path: PathBuf, source: io::Error },
    #[error("read standard input")]
    Stdin { source: io::Error },
    #[error("standard input was not closed within {} s: the client of this command has stopped, or keeps it open", within.as_secs())]
    OpenStdin { within: Duration },
    #[error("write the answer to standard output")]
    Stdout { source: io::Error },
    #[error("{what} is longer than {limit_bytes} bytes")]
    TooLong { what: String, limit_bytes: u64 },
    #[error("{} is not a valid container configuration", path.display())]
    Config { path: PathBuf, source: serde_json::Error },
    #[error("the path {} is not valid UTF-8", path.display())]
    NotText { path: PathBuf },
    #[error("{} stayed locked: another start or delete of this shim hangs", path.display())]
    Locked { path: PathBuf },
    #[error("{} is already in use by a process that is not an x shim", path.display())]
    Foreign { path: PathBuf },
    #[error("container {id} exists already, in the shim with pid {keeper}; remove it first: containerd-shim-x-v2 -namespace {namespace} -id {id} -bundle {} delete", bundle.display())]
    AlreadyExists { id: String, namespace: String, bundle: PathBuf, keeper: u32 },
    #[error("sandbox {id} exists already, in the shim with pid {keeper}; remove it first: containerd-shim-x-v2 -namespace {namespace} -id {id} -bundle {} delete", bundle.display())]
    PodExists { id: String, namespace: String, bundle: PathBuf, keeper: u32 },
    #[error("process {pid} of container {id} has not exited after SIGKILL; it may be in an uninterruptible sleep")]
    StillAlive { id: String, pid: u32 },
    #[error("join the cgroup {group}, which the option ShimCgroup names")]
    ShimCgroup { group: String, source: io::Error },
    #[error("no hierarchy has the cgroup {group}, which the option ShimCgroup names")]
    NoShimCgroup { group: String },
    #[error("enable core scheduling, which the variable SCHED_CORE requests")]
    CoreScheduling { source: io::Error },
    #[error("the options on standard input cannot be decoded")]
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
