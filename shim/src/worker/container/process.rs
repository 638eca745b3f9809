//! A process of a container: its init, or an exec. A part of the container's record.
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::worker::phase::{Exit, Phase};

/// A container's init, or an exec.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct Process {
    pub(crate) phase: Phase,
    /// Its pid, from the moment it exists; kept after its exit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pid: Option<u32>,
    pub(crate) stdio: Streams,
    /// The terminal's size, if the client has set one: rows and columns.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) size: Option<(u16, u16)>,
    /// The client will write no more to stdin.
    #[serde(default)]
    pub(crate) stdin_closed: bool,
    /// When its start failed, in Unix nanoseconds; it may be started again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) failed_at_nanos: Option<i64>,
    /// Files to be removed with it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) files: Vec<PathBuf>,
}

/// The streams of a process, as the client wrote them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Streams {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

impl Streams {
    /// Whether the keeper holds none for the process.
    pub(crate) fn are_none(&self) -> bool {
        !self.terminal && [&self.stdin, &self.stdout, &self.stderr].iter().all(|uri| uri.is_empty())
    }

    pub(crate) fn go_into_files(&self) -> bool {
        [&self.stdout, &self.stderr].iter().any(|uri| uri.starts_with("file://"))
    }
}

impl Process {
    pub(crate) fn new(stdio: Streams) -> Self {
        Self { phase: Phase::Created, pid: None, stdio, size: None, stdin_closed: false, failed_at_nanos: None, files: Vec::new() }
    }

    /// Since when it is spent: its exit was published, or its start has failed. In Unix nanoseconds.
    pub(crate) fn spent_at(&self) -> Option<i64> {
        match self.phase {
            Phase::Exited(exit) => Some(exit.at_nanos),
            Phase::Created => self.failed_at_nanos,
            Phase::Starting { .. } | Phase::Running | Phase::Paused | Phase::Dying { .. } => None,
        }
    }

    /// Removes its files.
    pub(crate) fn blocking_remove_files(&mut self) {
        for path in self.files.drain(..) {
            match std::fs::remove_file(&path) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    log::debug!(path:% = path.display(), error:%; "cannot remove a file")
                }
                _ => {}
            }
        }
    }

    /// Its exit, once published.
    pub(crate) fn exit(&self) -> Option<Exit> {
        self.phase.exit()
    }
}

/// The answer to a Delete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::worker) struct Deleted {
    /// Absent for one that never existed.
    pub(in crate::worker) pid: Option<u32>,
    /// Absent for one that never ran.
    pub(in crate::worker) exit: Option<Exit>,
}

impl Deleted {
    /// As a process is now.
    pub(super) fn of(process: &Process) -> Self {
        Self { pid: process.pid, exit: process.exit() }
    }
}
