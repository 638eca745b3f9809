//! The answers to requests, before they are encoded.
use std::path::PathBuf;

use protobuf::well_known_types::any::Any;

use super::process::{Deleted, Streams};
use crate::worker::phase::Exit;
use crate::worker::pod;

/// The answer to a request.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::worker) enum Reply {
    Empty,
    /// Of Create and Start; no pid where the process does not exist yet.
    Pid(Option<u32>),
    Deleted(Deleted),
    /// To the command `delete`.
    DeletedForCommand(Deleted),
    State(Box<StateOf>),
    /// Pids, each with the id of an exec.
    Pids(Vec<(u32, Option<String>)>),
    Exit(Exit),
    Connect {
        task_pid: Option<u32>,
    },
    Stats(Any),
    /// Of a call of the sandbox service.
    Pod(PodReply),
}

/// The answers of the sandbox service that have a content.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::worker) enum PodReply {
    Started {
        pid: u32,
        /// Unix time.
        since_nanos: i64,
        /// Its runtime specification.
        spec: serde_json::Value,
    },
    Platform,
    Status(Box<pod::Status>),
    Metrics {
        id: String,
        /// Unix time.
        at_nanos: i64,
        metrics: Any,
    },
}

/// The answer to State.
#[derive(Debug, Clone, PartialEq)]
pub(in crate::worker) struct StateOf {
    /// The container's id, or the exec's.
    pub(in crate::worker) id: String,
    /// Empty for init.
    pub(in crate::worker) exec: String,
    pub(in crate::worker) bundle: PathBuf,
    pub(in crate::worker) pid: Option<u32>,
    pub(in crate::worker) status: Status,
    pub(in crate::worker) stdio: Streams,
    pub(in crate::worker) exit: Option<Exit>,
}

/// The statuses that containerd knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::worker) enum Status {
    Created,
    Running,
    Paused,
    Stopped,
}
