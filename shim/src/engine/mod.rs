//! Engines: the programs that make containers.
//!
//! Owns the interface between the worker and an engine. An engine builds the command of each verb and interprets its exit;
//! the keeper runs it. The engine that made a container is recorded with it and used for every later verb.
//!
//! ```text
//!  worker ── verb ──▶ Engine ── Spawn ──▶ (keeper runs it) ── Exited ──▶ Engine::interpret ── Ok | EngineError ──▶ worker
//! ```
//!
//! **Invariant:** nothing but the engine's own program is searched for here. Building a verb twice gives the same, so a verb can be replayed.
use std::path::Path;

use crate::handover::{Exited, Spawn};
use crate::options::CriuOptions;

mod choice;
mod command;
mod complaint;

pub(crate) use choice::EngineNotFound;
pub(crate) use command::CommandEngine;

/// Makes, changes and removes containers.
///
/// Every verb gives the process that performs it. Its exit goes to [`Engine::interpret`].
pub(crate) trait Engine {
    /// Makes a container: its init exists afterwards, stopped before the user's program, its pid in the pid file.
    fn create(&self, at: &Container<'_>, create: &Create<'_>) -> Spawn;
    /// Lets init run the user's program.
    fn start(&self, at: &Container<'_>) -> Spawn;
    /// Starts another process in a container; its pid is in the pid file afterwards.
    fn exec(&self, at: &Container<'_>, exec: &Exec<'_>) -> Spawn;
    /// Removes the engine's state of a container, and its cgroups. With `force` its processes are killed first.
    fn delete(&self, at: &Container<'_>, force: bool) -> Spawn;
    /// Signals init, or with `all` every process of the container.
    fn kill(&self, at: &Container<'_>, signal: i32, all: bool) -> Spawn;
    /// Freezes every process of the container.
    fn pause(&self, at: &Container<'_>) -> Spawn;
    /// Thaws every process of the container.
    fn resume(&self, at: &Container<'_>) -> Spawn;
    /// Changes limits. `resources` is a file with a `LinuxResources` of the runtime specification as JSON.
    fn update(&self, at: &Container<'_>, resources: &Path) -> Spawn;
    /// Writes the container's state into files.
    fn checkpoint(&self, at: &Container<'_>, checkpoint: &Checkpoint<'_>) -> Spawn;
    /// Makes a container from such files: it runs afterwards, its init's pid in the pid file.
    fn restore(&self, at: &Container<'_>, restore: &Restore<'_>) -> Spawn;
    /// Lists the processes of the container on its output: see [`Engine::interpret_pids`].
    fn pids(&self, at: &Container<'_>) -> Spawn;
    /// Prints the engine's features as JSON.
    fn features(&self) -> Spawn;

    /// The error of a verb whose program could not be started because the engine is missing.
    fn blocking_explain(&self, verb: Verb) -> Option<EngineError>;
    /// Whether a verb succeeded, or why not.
    fn interpret(&self, verb: Verb, exited: &Exited) -> Result<(), EngineError>;
    /// The process ids that [`Engine::pids`] found.
    fn interpret_pids(&self, exited: &Exited) -> Result<Vec<u32>, EngineError>;
}

/// The container that a verb is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Container<'a> {
    pub(crate) id: &'a str,
    /// Its bundle: the working directory of the engine, and of hooks if the engine does not change it. Must exist.
    pub(crate) bundle: &'a Path,
}

/// What [`Engine::create`] needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Create<'a> {
    pub(crate) pid_file: &'a Path,
    /// The socket for the terminal. With a terminal, the streams of `stdio_key` are not used.
    pub(crate) console_socket: Option<&'a Path>,
    /// The key of the process's streams if it has no terminal.
    pub(crate) stdio_key: &'a str,
}

/// What [`Engine::exec`] needs.
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

/// What [`Engine::checkpoint`] needs.
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

/// What [`Engine::restore`] needs.
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
            Self::Features => "features",
        }
    }
}

/// Why a verb failed. `message` is the engine's own, whole.
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
    /// Anything else.
    #[error("OCI runtime {} failed: {message}", verb.name())]
    Failed { verb: Verb, message: String },
}
