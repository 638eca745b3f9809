//! Why a request fails, and the status that its client receives.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::Duration;

use tokio::task::JoinError;
use tonic::{Code, Status};

use crate::images::registry::RegistryError;
use crate::layers::LayerError;

/// A failure, by what its caller can do about it. Where a client alone is to act, the sentence is its own.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// It does not exist.
    #[error("{0}: not found")]
    NotFound(Object),
    /// The id is taken.
    #[error("{0}: already exists")]
    AlreadyExists(Object),
    /// The same, in other words.
    #[error("{0}")]
    Exists(String),
    /// The process has ended, and cannot be killed.
    #[error("process of {0} already finished: not found")]
    Finished(Object),
    /// The request is invalid.
    #[error("{0}: invalid argument")]
    Invalid(String),
    /// It is valid, but not in the current state.
    #[error("{0}: failed precondition")]
    Precondition(String),
    /// Another process uses that, perhaps for a moment only.
    #[error("{} is already in use by another {by}", path.display())]
    InUse {
        /// A folder or a socket.
        path: PathBuf,
        /// What kind of process.
        by: &'static str,
    },
    /// A bound is met.
    #[error("{0}")]
    Exhausted(String),
    /// An offset is not where it must be.
    #[error("{0}")]
    OutOfRange(String),
    /// A reference has another writer.
    #[error("ref {reference} locked for {age:?} (since {since}): unavailable")]
    Held {
        /// With its namespace.
        reference: String,
        /// For how long it has been written.
        age: Duration,
        /// From when on.
        since: String,
    },
    /// A collection that a client has waited for.
    #[error("garbage collection failed: {0}")]
    Collection(String),
    /// What was acknowledged is not there any more.
    #[error("{0}")]
    DataLoss(String),
    /// This daemon does not implement that.
    #[error("{0}: not implemented")]
    Unimplemented(String),
    /// Another process has taken over, and the client can repeat the request there.
    #[error("another x-manager process has taken over; retry")]
    Retired,
    /// A stream of events ends with this process.
    #[error("this x-manager process is exiting; subscribe again")]
    Unsubscribed,
    /// A process did not take over.
    #[error("{0}")]
    Upgrade(String),
    /// An operator's command finds no daemon.
    #[error("cannot reach x-manager at {}: {why}; is it running?", address.display())]
    NoDaemon {
        /// Of the daemon.
        address: PathBuf,
        /// The kernel's error.
        why: io::Error,
    },
    /// The daemon does not answer an operator's command, and may have carried it out.
    #[error("x-manager did not answer: {0}")]
    Silent(String),
    /// Work on another thread, or in a task of its own, has panicked.
    #[error("{what} ended without a result")]
    Panicked {
        /// Which work.
        what: &'static str,
        /// The executor's error.
        source: JoinError,
    },

    /// It is not known yet whether a task or a sandbox has a shim.
    #[error("the shim of {object} {why}")]
    Unsettled {
        /// Which.
        object: Object,
        /// The rest of the sentence.
        why: String,
    },
    /// Another process has locked a bundle.
    #[error("bundle {} is locked by another program", .0.display())]
    Locked(PathBuf),
    /// A shim's socket refuses connections or is gone: it is dead.
    #[error("connect to shim at {}", path.display())]
    ShimDead {
        /// Its socket.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A shim could not be reached, and may be running.
    #[error("connect to shim at {}", path.display())]
    ShimUnreachable {
        /// Its socket.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A shim reports an address that is no path of a socket.
    #[error("the shim reports the address {0:?}, which is not the path of a socket")]
    ShimAddress(String),
    /// A shim is dead.
    #[error("the shim has ended")]
    ShimEnded,
    /// A shim does not answer in time.
    #[error("the shim did not answer {method} within {limit:?}")]
    ShimLate {
        /// What it was asked.
        method: &'static str,
        /// For how long.
        limit: Duration,
    },
    /// A connection ended before the answer came.
    #[error("the connection to the shim ended during {method}, which it may have carried out")]
    ShimInterrupted {
        /// What it was asked.
        method: &'static str,
    },
    /// A shim's answer cannot be read.
    #[error("{method} of the shim")]
    ShimAnswer {
        /// What it was asked.
        method: &'static str,
        /// What is wrong with the answer.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A shim has a task, and cannot delete it: whatever it did not find, it is not the task.
    #[error("the shim of task {task} cannot delete it")]
    Undeletable {
        /// Its id.
        task: String,
        /// The shim's error.
        source: Box<Error>,
    },
    /// Another process' own error: a shim's, or the daemon's to an operator's command.
    #[error("{message}")]
    Remote {
        /// Its status code.
        code: Code,
        /// Its message.
        message: String,
    },
    /// A program cannot be executed.
    #[error("run {}", program.display())]
    ProgramUnusable {
        /// Which.
        program: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// A program failed.
    #[error("{}: {status}: {output}", program.display())]
    ProgramFailed {
        /// Which.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it printed.
        output: String,
    },
    /// A shim's program succeeded, with an answer that cannot be read.
    #[error("{} {action}: its answer cannot be read: {why}", program.display())]
    ProgramAnswer {
        /// Which.
        program: PathBuf,
        /// What it was run for.
        action: &'static str,
        /// The answer, or what is wrong with it.
        why: String,
    },
    /// A program did not end in time, and was killed.
    #[error("{} did not end within {limit:?}", program.display())]
    ProgramLate {
        /// Which.
        program: PathBuf,
        /// For how long it may run.
        limit: Duration,
    },
    /// It is not known whether an image may be pulled.
    #[error("image {image} is not pulled: an image verifier gives no answer")]
    Unverified {
        /// Its name.
        image: String,
        /// Why.
        source: Box<Error>,
    },
    /// The socket for shims' events cannot be served.
    #[error("serve events of shims")]
    Serve(#[source] containerd_shim_protos::ttrpc::Error),

    /// A layer cannot be applied or created.
    #[error(transparent)]
    Layer(#[from] LayerError),
    /// A registry did not do what it was asked.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The metadata store fails.
    #[error("metadata store: {op}")]
    Store {
        /// What was tried.
        op: &'static str,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// A file of the metadata store cannot be used.
    #[error("metadata store {}: {op}", path.display())]
    StoreFile {
        /// What was tried.
        op: &'static str,
        /// Which file.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// A file of the metadata store is damaged.
    #[error("metadata store {} is damaged; stop x-manager, put a copy that `x-manager backup` has made in its place, and remove {name}-wal and {name}-shm", path.display(), name = path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// SQLite's error.
        source: rusqlite::Error,
    },
    /// A record of the store cannot be read.
    #[error("metadata store: {0} cannot be read")]
    Record(String),
    /// A thread of the store has ended.
    #[error("the metadata store has stopped")]
    StoreStopped,
    /// A file or socket.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
}

/// What a request is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Object {
    /// By its id.
    Task(String),
    /// A process of a task.
    Process { exec: String, task: String },
    /// By its id, with the namespace in which there is none.
    Container { id: String, namespace: Option<String> },
    /// By its id.
    Sandbox(String),
    /// By its name.
    SandboxController(String),
    /// By its name.
    Namespace(String),
    /// By its id.
    Lease(String),
    /// By its key; one that is there.
    Snapshot(String),
    /// By its key; one that is not there.
    NoSnapshot(String),
    /// By the name under which a new snapshot asks for it.
    ParentSnapshot(String),
    /// By the name that a new snapshot is to have in the end.
    TargetSnapshot(String),
    /// One that a call names in its metadata.
    NoLease,
    /// By its digest.
    Content(String),
    /// By its digest, where there is none.
    ContentDigest(String),
    /// By its reference.
    Ingest(String),
    /// By its reference, when its status is asked for.
    IngestStatus(String),
    /// By its name; mounts that are made for a client.
    Mount(String),
    /// By its name.
    Image(String),
    /// One that leads to something else.
    ImageTarget { name: String, has: String, wanted: String },
    /// A part of the daemon.
    Plugin { kind: String, id: String },
    /// A stream of a client, by its id.
    Stream(String),
    /// A service of the API.
    Service(String),
}

impl fmt::Display for Object {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let short = |text: &str| text.chars().take(SHOWN).collect::<String>();
        match self {
            Self::Task(id) => write!(f, "task {}", short(id)),
            Self::Process { exec, task } => write!(f, "process {exec} of task {}", short(task)),
            Self::Container { id, namespace: None } => write!(f, "container {id:?}"),
            Self::Container { id, namespace: Some(namespace) } => write!(f, "container {id:?} in namespace {namespace:?}"),
            Self::Sandbox(id) => write!(f, "sandbox {:?}", short(id)),
            Self::SandboxController(name) => write!(f, "sandbox controller {:?}", short(name)),
            Self::Namespace(name) => write!(f, "namespace {name:?}"),
            Self::Lease(id) => write!(f, "lease {id:?}"),
            Self::Snapshot(key) => write!(f, "snapshot {key:?}"),
            Self::NoSnapshot(key) => write!(f, "snapshot {key} does not exist"),
            Self::ParentSnapshot(key) => write!(f, "parent snapshot {key} does not exist"),
            Self::TargetSnapshot(key) => write!(f, "target snapshot {key:?}"),
            Self::NoLease => f.write_str("lease does not exist"),
            Self::Content(digest) => write!(f, "content {digest}"),
            Self::ContentDigest(digest) => write!(f, "content digest {digest}"),
            Self::Ingest(reference) => write!(f, "reference {}", short(reference)),
            Self::IngestStatus(reference) => {
                write!(f, "could not get status for ref {:?}: reference {}", short(reference), short(reference))
            }
            Self::ImageTarget { name, has, wanted } => {
                write!(f, "image {:?} has target {has}, not {}", short(name), short(wanted))
            }
            Self::Mount(name) => write!(f, "mount {:?}", short(name)),
            Self::Image(name) => write!(f, "image {:?}", short(name)),
            Self::Plugin { kind, id } => write!(f, "plugin {kind:?} {id:?}"),
            Self::Stream(id) => write!(f, "stream {:?}", short(id)),
            Self::Service(name) => write!(f, "service {:?}", short(name)),
        }
    }
}

/// The result of a request.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The only place where an error becomes a code.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NotFound(_) | Self::Finished(_) => Code::NotFound,
            Self::AlreadyExists(_) | Self::Exists(_) => Code::AlreadyExists,
            Self::Invalid(_) => Code::InvalidArgument,
            Self::Precondition(_) | Self::InUse { .. } => Code::FailedPrecondition,
            Self::Exhausted(_) => Code::ResourceExhausted,
            Self::OutOfRange(_) => Code::OutOfRange,
            Self::Unimplemented(_) => Code::Unimplemented,
            Self::Retired
            | Self::Held { .. }
            | Self::Unsubscribed
            | Self::Upgrade(_)
            | Self::NoDaemon { .. }
            | Self::Silent(_)
            | Self::Unsettled { .. }
            | Self::Locked(_)
            | Self::ShimDead { .. }
            | Self::ShimUnreachable { .. }
            | Self::ShimEnded
            | Self::ShimLate { .. }
            | Self::ShimInterrupted { .. }
            | Self::ProgramLate { .. }
            | Self::Layer(LayerError::Busy)
            | Self::StoreStopped => Code::Unavailable,
            Self::Remote { code, .. } => *code,
            Self::Registry(error) => error.code(),
            Self::ShimAddress(_)
            | Self::ShimAnswer { .. }
            | Self::Undeletable { .. }
            | Self::ProgramFailed { .. }
            | Self::ProgramAnswer { .. }
            | Self::Unverified { .. }
            | Self::Serve(_) => Code::Unknown,
            Self::Damaged { .. } | Self::DataLoss(_) => Code::DataLoss,
            Self::Store { .. } | Self::StoreFile { .. } | Self::Io { .. } | Self::Layer(_) if self.is_full() => Code::ResourceExhausted,
            Self::Layer(LayerError::Tar(_) | LayerError::Refused { .. }) => Code::InvalidArgument,
            Self::Store { .. }
            | Self::StoreFile { .. }
            | Self::Record(_)
            | Self::Io { .. }
            | Self::Layer(LayerError::File { .. })
            | Self::ProgramUnusable { .. }
            | Self::Collection(_)
            | Self::Panicked { .. } => Code::Internal,
        }
    }

    /// Whether a disk, or the store, has no room.
    pub(crate) fn is_full(&self) -> bool {
        match self {
            Self::Store { source, .. } | Self::StoreFile { source, .. } => {
                source.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull)
            }
            Self::Io { source, .. } => matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded),
            Self::Layer(error) => {
                error.io().is_some_and(|source| matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded))
            }
            _ => false,
        }
    }

    /// The error and its sources, joined by ": ".
    pub(crate) fn chain(&self) -> String {
        chain(self)
    }
}

/// An error of any kind and its sources, joined by ": ".
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut sentence = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        sentence = format!("{sentence}: {error}");
        cause = error.source();
    }
    sentence
}

impl From<Error> for Status {
    fn from(error: Error) -> Self {
        let mut sentence = error.chain();
        if sentence.len() > SENTENCE_BYTES {
            let mut end = SENTENCE_BYTES;
            while !sentence.is_char_boundary(end) {
                end -= 1;
            }
            sentence.truncate(end);
            sentence.push('…');
        }
        Status::new(error.code(), sentence)
    }
}

/// Names the operation and the file of an I/O error.
pub(crate) trait IoContext<T> {
    /// Adds both.
    fn on(self, op: &'static str, path: &Path) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn on(self, op: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| Error::Io { op, path: path.to_owned(), source })
    }
}

impl<T> IoContext<T> for nix::Result<T> {
    fn on(self, op: &'static str, path: &Path) -> Result<T> {
        self.map_err(io::Error::from).on(op, path)
    }
}

/// A longer sentence would not fit the headers in which clients expect it.
const SENTENCE_BYTES: usize = 3000;
/// Characters of a name that is no identifier.
const SHOWN: usize = 100;
