//! Why a request fails.
//!
//! **Invariant:** this is the only place where an error becomes a code of the wire.
use std::io;
use std::path::PathBuf;

use super::id::{ContainerId, InvalidId, ProcessKey};
use super::phase::{Refused, Request};
use super::spec::SpecError;
use crate::chain::chain;
use crate::engine::{EngineError, EngineNotFound, Verb};
use crate::options::OptionsError;
use crate::rootfs::MountError;
use crate::stdio_uri::{LoggerRefused, StdioError};

/// A request that fails.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("container {:?} not found", excerpt(.id))]
    NoContainer { id: String },
    #[error("process {:?} of container {id} not found", excerpt(.exec))]
    NoProcess { id: ContainerId, exec: String },
    #[error("container {id} already exists")]
    Exists { id: ContainerId },
    /// `found` is the state of its OCI runtime, or its cgroup.
    #[error(
        "container {id} already exists: {found} is in use by it; another daemon may run it, else remove it with the runtime's `delete`, or end its processes"
    )]
    Taken { id: ContainerId, found: String },
    /// It exists, and this version cannot read its record.
    #[error("container {:?}: this worker cannot read its record, another version may; upgrade the shim, or remove the container with `containerd-shim-x-v2 delete`", excerpt(.id))]
    SetAside { id: String },
    #[error("process {key} already exists")]
    ProcessExists { key: ProcessKey },
    #[error("process {key}")]
    Refused { key: ProcessKey, source: Refused },
    #[error("process {key}: process already finished")]
    Finished { key: ProcessKey },
    #[error("process {key}: process not started")]
    NotStarted { key: ProcessKey },
    /// Its record would not fit into a message between worker and keeper.
    #[error("container {id}: record of {bytes} bytes exceeds the limit of {limit}; use shorter paths, fewer mounts or fewer options")]
    TooMuch { id: ContainerId, bytes: usize, limit: usize },
    #[error("container {id} is being deleted")]
    Deleting { id: ContainerId },
    #[error("sandbox {:?} not found", excerpt(.id))]
    NoPod { id: String },
    #[error("sandbox {id} already exists")]
    PodExists { id: ContainerId },
    #[error("sandbox {id}: cannot {request} while {phase}")]
    PodRefused { id: ContainerId, request: &'static str, phase: &'static str },
    #[error("sandbox {id}: {field}: {}", bounded(.why, REASON_CHARS))]
    PodConfig { id: String, field: String, why: String },
    /// The keeper is of an earlier build.
    #[error("sandbox {:?}: the keeper of an earlier build cannot run pods; upgrade the shim with its keeper", excerpt(.id))]
    NoPods { id: String },
    #[error("container {id} of sandbox {pod}: {field}: {why}")]
    NotOfPod { id: ContainerId, pod: ContainerId, field: &'static str, why: &'static str },
    #[error("sandbox {id}: {failure}")]
    PodNotMade { id: ContainerId, failure: String },
    #[error("another checkpoint of container {id} is under way")]
    Saving { id: ContainerId },
    #[error(transparent)]
    Id(#[from] InvalidId),
    #[error("signal {number}: not between 0 and 64")]
    Signal { number: u32 },
    #[error("payload of {method}")]
    Payload { method: &'static str, source: protobuf::Error },
    #[error("request")]
    Envelope { source: protobuf::Error },
    #[error("payload of {method}")]
    Json { method: &'static str, source: serde_json::Error },
    #[error("{what} is not a valid value: {:?}", excerpt(.value))]
    Value { what: &'static str, value: String },
    #[error(
        "{field} of {method} is not supported: no OCI runtime takes it; make `parent` in the folder of the checkpoint a link to its parent"
    )]
    Parent { method: &'static str, field: &'static str },
    #[error("method {}/{} is not implemented", excerpt(.service), excerpt(.method))]
    NoMethod { service: String, method: String },
    #[error("{method} was not begun before the client's timeout")]
    Expired { method: String },
    #[error(transparent)]
    Spec(#[from] SpecError),
    #[error(transparent)]
    Options(#[from] OptionsError),
    #[error(transparent)]
    Stdio(#[from] StdioError),
    #[error(transparent)]
    LoggerRefused(#[from] LoggerRefused),
    #[error("logger {}: ended before it was ready (status {status})", path.display())]
    LoggerEnded { path: PathBuf, status: u32 },
    #[error("logger {}: closed its ready pipe without reporting readiness", path.display())]
    LoggerSilent { path: PathBuf },
    #[error(transparent)]
    NoEngine(#[from] EngineNotFound),
    #[error(transparent)]
    Engine(#[from] EngineError),
    #[error(transparent)]
    Rootfs(#[from] MountError),
    #[error("{op} {}", path.display())]
    Io { op: &'static str, path: PathBuf, source: io::Error },
    /// An operation of the keeper.
    #[error("{what}")]
    Keeper { what: String, source: io::Error },
    #[error("{doing}: unexpected answer of the keeper")]
    Outcome { doing: &'static str },
    #[error("{waiting_for} took longer than {seconds} s")]
    TimedOut { waiting_for: String, seconds: u64 },
    #[error("the OCI runtime has started a process and reported no pid: read {}", path.display())]
    NoPid { path: PathBuf, source: io::Error },
    #[error("no terminal arrived from the engine of {key}")]
    NoTerminal { key: ProcessKey },
    #[error("OCI runtime {} failed: its performer was killed before it could report (status {status})", verb.name())]
    NoReport { verb: Verb, status: u32 },
    /// The plan was not begun.
    #[error("OCI runtime {} failed: {what}", verb.name())]
    NotPerformed { verb: Verb, what: String, source: io::Error },
}

/// The codes of the wire that this shim uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Code {
    Unknown,
    InvalidArgument,
    DeadlineExceeded,
    Unavailable,
    NotFound,
    AlreadyExists,
    ResourceExhausted,
    FailedPrecondition,
    Unimplemented,
    Internal,
}

impl Error {
    /// The code that clients act on. No `_` arm: a new variant must choose.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NoContainer { .. } | Self::NoProcess { .. } | Self::Finished { .. } | Self::NoPod { .. } => Code::NotFound,
            Self::Exists { .. } | Self::PodExists { .. } | Self::Taken { .. } | Self::ProcessExists { .. } => Code::AlreadyExists,
            // containerd and its clients take "not found" for "already dead".
            Self::Refused { source: Refused { request: Request::Kill, .. }, .. } => Code::NotFound,
            Self::Refused { .. } | Self::NotStarted { .. } | Self::Deleting { .. } | Self::Saving { .. } | Self::PodRefused { .. } => {
                Code::FailedPrecondition
            }
            Self::Id(_)
            | Self::Signal { .. }
            | Self::Payload { .. }
            | Self::Envelope { .. }
            | Self::Json { .. }
            | Self::Value { .. }
            | Self::PodConfig { .. }
            | Self::NotOfPod { .. }
            | Self::Options(_)
            | Self::Stdio(_)
            | Self::LoggerRefused(_)
            | Self::NoEngine(_) => Code::InvalidArgument,
            // An incomplete bundle is the client's mistake; an unreadable disk is the host's fault.
            Self::Spec(SpecError::Missing { source, .. } | SpecError::NoRootfs { source, .. }) => match source.kind() {
                io::ErrorKind::NotFound => Code::FailedPrecondition,
                _ => Code::Internal,
            },
            Self::Spec(SpecError::TooLong { .. } | SpecError::Malformed { .. } | SpecError::Version { .. } | SpecError::NoRoot { .. }) => {
                Code::InvalidArgument
            }
            Self::TooMuch { .. } => Code::ResourceExhausted,
            Self::NoMethod { .. } | Self::Parent { .. } | Self::NoPods { .. } => Code::Unimplemented,
            Self::Expired { .. } | Self::TimedOut { .. } => Code::DeadlineExceeded,
            Self::SetAside { .. } | Self::Engine(EngineError::Gone { .. }) => Code::Unavailable,
            Self::Engine(EngineError::NoContainer { .. }) => Code::NotFound,
            Self::Engine(EngineError::Exists { .. }) => Code::AlreadyExists,
            Self::Engine(EngineError::NotRunning { .. }) => Code::FailedPrecondition,
            Self::Engine(EngineError::Unsupported { .. }) => Code::Unimplemented,
            // The stock shim answers `Unknown` to every failure of the runtime, and clients match the text.
            Self::Engine(EngineError::Failed { .. }) => Code::Unknown,
            Self::LoggerEnded { .. } | Self::LoggerSilent { .. } => Code::FailedPrecondition,
            // As for a mount in use: the client may try again.
            Self::Rootfs(MountError::Busy { .. }) => Code::FailedPrecondition,
            // Something missing on the host is never `NotFound`: clients take that for the end of the container.
            Self::Rootfs(_)
            | Self::Engine(EngineError::Rootfs { .. })
            | Self::Io { .. }
            | Self::Keeper { .. }
            | Self::Outcome { .. }
            | Self::NoPid { .. }
            | Self::NoReport { .. }
            | Self::NotPerformed { .. }
            | Self::PodNotMade { .. }
            | Self::NoTerminal { .. } => Code::Internal,
        }
    }

    /// The text for the client: this error and its sources, joined once by ": ".
    pub(crate) fn chain(&self) -> String {
        chain(self)
    }
}

/// The part of a client's text that an error quotes: it may be megabytes.
fn excerpt(text: &str) -> String {
    bounded(text, EXCERPT_CHARS)
}

fn bounded(text: &str, chars: usize) -> String {
    match text.char_indices().nth(chars) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Longer than any valid name.
const EXCERPT_CHARS: usize = 100;
/// Longer than any reason that quotes a valid path.
const REASON_CHARS: usize = 500;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::Verb;
    use crate::worker::phase::Phase;

    fn key() -> ProcessKey {
        ProcessKey::parse("c1").expect("a valid key")
    }

    fn refused(request: Request) -> Error {
        Error::Refused { key: key(), source: Refused { request, phase: Phase::Running } }
    }

    #[test]
    fn errors_have_the_codes_that_clients_act_on() {
        let io = |kind: io::ErrorKind| Error::Io { op: "open", path: "/x".into(), source: kind.into() };
        let missing = |kind: io::ErrorKind| Error::Spec(SpecError::Missing { path: "/x".into(), source: kind.into() });
        let engine = |make: fn(Verb, String) -> EngineError| Error::Engine(make(Verb::Start, "no".into()));
        for (error, code) in [
            (Error::NoContainer { id: "c1".into() }, Code::NotFound),
            (Error::ProcessExists { key: key() }, Code::AlreadyExists),
            (refused(Request::Delete), Code::FailedPrecondition),
            // A process that cannot be killed is dead.
            (refused(Request::Kill), Code::NotFound),
            (Error::Signal { number: 99 }, Code::InvalidArgument),
            (Error::Expired { method: "Create".into() }, Code::DeadlineExceeded),
            (Error::NoMethod { service: "s".into(), method: "m".into() }, Code::Unimplemented),
            (io(io::ErrorKind::NotFound), Code::Internal),
            (Error::Keeper { what: "execute /x".into(), source: io::ErrorKind::NotFound.into() }, Code::Internal),
            (Error::SetAside { id: "c1".into() }, Code::Unavailable),
            (missing(io::ErrorKind::NotFound), Code::FailedPrecondition),
            (missing(io::ErrorKind::PermissionDenied), Code::Internal),
            (Error::Spec(SpecError::NoRoot { path: "/x".into() }), Code::InvalidArgument),
            (io(io::ErrorKind::StorageFull), Code::Internal),
            (Error::Rootfs(MountError::Busy { path: "/x".into() }), Code::FailedPrecondition),
            (engine(|verb, message| EngineError::Failed { verb, message }), Code::Unknown),
            (engine(|verb, message| EngineError::NoContainer { verb, message }), Code::NotFound),
            (engine(|verb, message| EngineError::Exists { verb, message }), Code::AlreadyExists),
            (engine(|verb, message| EngineError::Gone { verb, message }), Code::Unavailable),
        ] {
            assert_eq!(error.code(), code, "{error}");
        }
    }

    #[test]
    fn a_client_sees_an_error_with_its_sources() {
        assert_eq!(refused(Request::Delete).chain(), "process c1: cannot delete while running");
        let error = Error::Keeper { what: "send signal 9 to c1".into(), source: io::Error::from_raw_os_error(1) };
        assert_eq!(error.chain(), "send signal 9 to c1: Operation not permitted (os error 1)");
    }
}
