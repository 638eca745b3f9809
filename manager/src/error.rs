//! Why a request fails, and the status that its client receives.

use std::error::Error as _;
use std::io;
use std::path::{Path, PathBuf};

use tonic::{Code, Status};

/// A failure, by what the client can do about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// It does not exist.
    #[error("{0}: not found")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}: already exists")]
    AlreadyExists(String),
    /// The request is invalid.
    #[error("{0}: invalid argument")]
    Invalid(String),
    /// It is valid, but not in the current state.
    #[error("{0}: failed precondition")]
    Precondition(String),
    /// A bound is met.
    #[error("{0}")]
    Exhausted(String),
    /// This daemon does not implement that.
    #[error("{0}: not implemented")]
    Unimplemented(String),
    /// A shim cannot be reached or does not answer in time; a retry may succeed.
    #[error("{0}")]
    Unavailable(String),
    /// Another process has taken over, and the client can repeat the request there.
    #[error("another x-manager process has taken over; retry")]
    Retired,
    /// The shim's own error.
    #[error("{message}")]
    Shim {
        /// A gRPC status code.
        code: i32,
        /// The shim's message.
        message: String,
    },
    /// A shim's program failed.
    #[error("{0}")]
    Launch(String),
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

/// The result of a request.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The only place where an error becomes a code.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NotFound,
            Self::AlreadyExists(_) => Code::AlreadyExists,
            Self::Invalid(_) => Code::InvalidArgument,
            Self::Precondition(_) => Code::FailedPrecondition,
            Self::Exhausted(_) => Code::ResourceExhausted,
            Self::Unimplemented(_) => Code::Unimplemented,
            Self::Unavailable(_) | Self::Retired => Code::Unavailable,
            Self::Shim { code, .. } => Code::from(*code),
            Self::Launch(_) => Code::Unknown,
            Self::Damaged { .. } => Code::DataLoss,
            Self::Store { source, .. } | Self::StoreFile { source, .. } if is_full(source) => Code::ResourceExhausted,
            Self::Io { source, .. } if matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                Code::ResourceExhausted
            }
            Self::Store { .. } | Self::StoreFile { .. } | Self::Record(_) | Self::Io { .. } => Code::Internal,
        }
    }

    /// The error and its sources, joined by ": ".
    pub(crate) fn chain(&self) -> String {
        let mut sentence = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            sentence = format!("{sentence}: {error}");
            cause = error.source();
        }
        sentence
    }

    /// Whether the shim, or this daemon, does not know what was asked for.
    pub(crate) fn is_not_found(&self) -> bool {
        self.code() == Code::NotFound
    }
}

fn is_full(error: &rusqlite::Error) -> bool {
    error.sqlite_error_code() == Some(rusqlite::ErrorCode::DiskFull)
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
