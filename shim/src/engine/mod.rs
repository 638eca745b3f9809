//! Engines: what makes containers.
//!
//! Owns the choice between them, what a verb takes, and how it fails. The engine that made a container is recorded with it and used for every
//! later verb.
//!
//! ```text
//!                ┌─ NativeEngine ── plan ──▶ (a fork of the keeper performs it) ── report ─┐
//!  worker ─ verb ┤                                                                         ├─▶ Ok | EngineError
//!                └─ CommandEngine ─ Spawn ─▶ (the keeper runs an OCI runtime) ──── exit ───┘
//! ```
//!
//! [`NativeEngine`] is the shim's own and the default. [`CommandEngine`] builds the command of each verb for crun, runc or any other OCI runtime, and
//! interprets its exit. There is no trait: one is driven by commands and their exits, the other by plans and by the kernel.
//!
//! **Invariant:** nothing but the engine's own program is searched for here. Building a verb twice gives the same, so a verb can be replayed.
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::options::CriuOptions;

mod choice;
mod command;
mod complaint;
mod criu;
mod native_engine;

pub(crate) use choice::EngineNotFound;
pub(crate) use command::CommandEngine;
pub(crate) use criu::{CriuRequest, blocking_plan_criu};
pub(crate) use native_engine::{NativeEngine, encode, refused, reported_pid, reported_pid_of_holder};

/// The name by which the option BinaryName names the native engine. No other is used then.
pub(crate) const NATIVE: &str = "native";

/// The engine of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Engine {
    #[serde(rename = "native")]
    Native(NativeEngine),
    /// The only one that records of version 1 have.
    #[serde(untagged)]
    Command(CommandEngine),
}

impl Engine {
    /// What shows that a container of this id exists: the state of the OCI runtime, or a cgroup with processes.
    pub(crate) fn blocking_find(&self, id: &str) -> Option<PathBuf> {
        match self {
            Self::Native(native) if native.blocking_has_processes() => native.blocking_cgroup_folder(),
            Self::Native(_) => None,
            Self::Command(command) => Some(command.state_of(id)).filter(|state| state.symlink_metadata().is_ok()),
        }
    }

    /// What of it a journal holds: enough to clean up.
    pub(crate) fn for_cleanup(&self) -> Self {
        match self {
            Self::Native(native) => Self::Native(native.for_cleanup()),
            Self::Command(command) => Self::Command(command.clone()),
        }
    }
}

/// The container that a verb is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Container<'a> {
    pub(crate) id: &'a str,
    /// Its bundle: the working directory of the engine, and of hooks if the engine does not change it. Must exist.
    pub(crate) bundle: &'a Path,
}

/// The arguments of [`CommandEngine::create`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Create<'a> {
    pub(crate) pid_file: &'a Path,
    /// The socket for the terminal. With a terminal, the streams of `stdio_key` are not used.
    pub(crate) console_socket: Option<&'a Path>,
    /// The key of the process's streams if it has no terminal.
    pub(crate) stdio_key: &'a str,
}

/// The arguments of [`CommandEngine::exec`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exec<'a> {
    /// A file with the `Process` of the runtime specification as JSON.
    pub(crate) process_file: &'a Path,
    pub(crate) pid_file: &'a Path,
    /// As for [`Create`].
    pub(crate) console_socket: Option<&'a Path>,
    /// As for [`Create`]; `container/exec`.
    pub(crate) stdio_key: &'a str,
}

/// The arguments of [`CommandEngine::checkpoint`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Checkpoint<'a> {
    /// The folder for the checkpoint.
    pub(crate) image_path: &'a Path,
    /// The folder for criu's own files, `dump.log` among them.
    pub(crate) work_path: &'a Path,
    /// Whether the container exits after it.
    pub(crate) exit: bool,
    pub(crate) options: &'a CriuOptions,
}

/// The arguments of [`CommandEngine::restore`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Restore<'a> {
    /// The folder of the checkpoint.
    pub(crate) image_path: &'a Path,
    /// The folder for criu's own files, `restore.log` among them.
    pub(crate) work_path: &'a Path,
    pub(crate) pid_file: &'a Path,
    /// As for [`Create`].
    pub(crate) console_socket: Option<&'a Path>,
    /// As for [`Create`].
    pub(crate) stdio_key: &'a str,
    pub(crate) options: &'a CriuOptions,
}

/// The verbs of an engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verb {
    Create,
    Start,
    Exec,
    Delete,
    Kill,
    Pause,
    Resume,
    Update,
    Checkpoint,
    Restore,
    Pids,
    State,
    Features,
}

impl Verb {
    /// The verb as the stock shim names it in its errors, which operators and programs search for.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Start => "start",
            Self::Exec => "exec",
            Self::Delete => "delete",
            Self::Kill => "kill",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Update => "update",
            Self::Checkpoint => "checkpoint",
            Self::Restore => "restore",
            Self::Pids => "ps",
            Self::State => "state",
            Self::Features => "features",
        }
    }
}

/// Why a verb failed. `message` is the engine's own, whole; after the native engine it is what it tried on what.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EngineError {
    /// The engine does not have the container: it was never created, or is deleted.
    #[error("OCI runtime {} failed: {message}", verb.name())]
    NoContainer { verb: Verb, message: String },
    /// A container of this id exists: another daemon's, or one that was never removed.
    #[error("OCI runtime {} failed: {message}", verb.name())]
    Exists { verb: Verb, message: String },
    /// The runtime's program was moved or removed, and no program of its name is in PATH.
    #[error("OCI runtime {} failed: {message}", verb.name())]
    Gone { verb: Verb, message: String },
    /// The container's init has exited, or was never started.
    #[error("OCI runtime {} failed: {message}", verb.name())]
    NotRunning { verb: Verb, message: String },
    /// The engine has no such verb.
    #[error("OCI runtime {} failed: {message}", verb.name())]
    Unsupported { verb: Verb, message: String },
    /// The native engine cannot mount the root file system. The text is that of a mount on the host.
    #[error("{message}")]
    Rootfs { message: String },
    /// Anything else.
    #[error("OCI runtime {} failed: {message}", verb.name())]
    Failed { verb: Verb, message: String },
}
