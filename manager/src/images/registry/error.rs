//! Why a registry did not do what it was asked.

use std::fmt;
use std::path::PathBuf;

use hyper::StatusCode;
use tonic::Code;

use crate::content::Digest;

/// The result of a request to a registry.
pub(crate) type Result<T, E = RegistryError> = std::result::Result<T, E>;

/// A failure, by what can be done about it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RegistryError {
    /// Not a reference of an image.
    #[error("{name:?} is no reference: {why}")]
    Reference { name: String, why: &'static str },
    /// A file of the configuration cannot be used.
    #[error("{}{}: {why}", path.display(), line.map(|line| format!(":{line}")).unwrap_or_default())]
    Config { path: PathBuf, line: Option<usize>, why: String },
    /// No host did it. What each answered, in the order in which they were tried.
    #[error("{op} {what}: {}", shown(attempts))]
    Failed { op: &'static str, what: String, attempts: Vec<Attempt> },
    /// A body is not that of its descriptor.
    #[error("{from} sent {got} instead of {digest}")]
    Digest { from: String, digest: Digest, got: Digest },
    /// The source of a push cannot be read.
    #[error("read what is pushed")]
    Source(#[source] Box<crate::error::Error>),
    /// Not written yet.
    #[error("not implemented")]
    Unfinished,
}

/// What became of a request to one host.
#[derive(Debug)]
pub(crate) struct Attempt {
    /// With its port.
    pub(crate) host: String,
    /// Why it failed.
    pub(crate) why: Why,
}

/// Why a request to one host failed.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Why {
    /// Its status, and what it says.
    #[error("{status}{}", if message.is_empty() { String::new() } else { format!(" ({message})") })]
    Status { status: StatusCode, message: String },
    /// It could not be reached, or the connection broke.
    #[error("{0}")]
    Connection(String),
    /// It answered something that is none of the protocol's answers.
    #[error("{0}")]
    Protocol(String),
}

impl RegistryError {
    /// The status that a client of the daemon receives.
    pub(crate) fn code(&self) -> Code {
        let all = |expected: &dyn Fn(&Why) -> bool| match self {
            Self::Failed { attempts, .. } => !attempts.is_empty() && attempts.iter().all(|attempt| expected(&attempt.why)),
            _ => false,
        };
        match self {
            Self::Reference { .. } => Code::InvalidArgument,
            Self::Config { .. } => Code::FailedPrecondition,
            Self::Failed { .. } if self.is_not_found() => Code::NotFound,
            Self::Failed { .. } if all(&|why| matches!(why, Why::Status { status, .. } if *status == StatusCode::UNAUTHORIZED)) => {
                Code::Unauthenticated
            }
            Self::Failed { .. } if all(&|why| matches!(why, Why::Status { status, .. } if *status == StatusCode::FORBIDDEN)) => {
                Code::PermissionDenied
            }
            Self::Failed { .. } => Code::Unavailable,
            Self::Digest { .. } => Code::DataLoss,
            Self::Source(error) => error.code(),
            Self::Unfinished => Code::Unimplemented,
        }
    }

    /// Whether a host has reported that it does not have it, and none did anything else.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Self::Failed { attempts, .. } if !attempts.is_empty() && attempts.iter().all(|attempt| attempt.is(StatusCode::NOT_FOUND)))
    }
}

impl Attempt {
    fn is(&self, expected: StatusCode) -> bool {
        matches!(self.why, Why::Status { status, .. } if status == expected)
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.host, self.why)
    }
}

fn shown(attempts: &[Attempt]) -> String {
    attempts.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
