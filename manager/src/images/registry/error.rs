//! Why a registry did not do what it was asked.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use hyper::StatusCode;
use tonic::Code;

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
    /// No host may be asked for that.
    #[error("{op} {what}: no host of the configuration has the capability for it")]
    NoHost { op: &'static str, what: String },
    /// No host did it. What each answered, in the order in which they were tried.
    #[error("{op} {what}: {}", shown(attempts))]
    Failed { op: &'static str, what: String, attempts: Vec<Attempt> },
    /// The source of a push cannot be read.
    #[error("read what is pushed")]
    Source(#[source] Box<crate::error::Error>),
}

/// What became of a request to one host.
#[derive(Debug)]
pub(crate) struct Attempt {
    /// With its port.
    pub(crate) host: String,
    /// How often it was asked.
    pub(crate) times: u32,
    /// Why it failed the last time.
    pub(crate) why: Why,
}

/// Why a request to one host failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Why {
    /// Its status, and what it says.
    #[error("{}{}", shown_status(*status), if message.is_empty() { String::new() } else { format!(" ({message})") })]
    Status { status: StatusCode, message: String, retry_after: Option<Duration> },
    /// It could not be reached, and will not be soon.
    #[error("{0}")]
    Unreachable(String),
    /// It could not be reached, or the connection broke.
    #[error("{0}")]
    Broken(String),
    /// It answered something that is none of the protocol's answers.
    #[error("{0}")]
    Protocol(String),
    /// There is no credential that it accepts.
    #[error("{0}")]
    Unauthorized(String),
    /// What is pushed cannot be read.
    #[error("read what is pushed")]
    Source(#[source] crate::error::Error),
}

impl RegistryError {
    /// The status that a client of the daemon receives.
    pub(crate) fn code(&self) -> Code {
        let Self::Failed { attempts, .. } = self else {
            return match self {
                Self::Reference { .. } => Code::InvalidArgument,
                Self::Config { .. } => Code::FailedPrecondition,
                Self::NoHost { .. } => Code::NotFound,
                Self::Source(error) => error.code(),
                Self::Failed { .. } => Code::Unavailable,
            };
        };
        let all = |code: Code| !attempts.is_empty() && attempts.iter().all(|attempt| attempt.why.code() == code);
        [Code::NotFound, Code::Unauthenticated, Code::PermissionDenied, Code::FailedPrecondition]
            .into_iter()
            .find(|code| all(*code))
            .unwrap_or(Code::Unavailable)
    }
}

impl Why {
    /// Whether the same request may succeed later.
    pub(super) fn is_passing(&self) -> bool {
        match self {
            Self::Status { status, .. } => match status.as_u16() {
                408 | 425 | 429 => true,
                501 | 505 => false,
                code => code >= 500,
            },
            Self::Broken(_) => true,
            Self::Unreachable(_) | Self::Protocol(_) | Self::Unauthorized(_) | Self::Source(_) => false,
        }
    }

    /// For how long the host asks to wait.
    pub(super) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    /// The status, if it is that.
    pub(super) fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Status { status, .. } => Some(*status),
            _ => None,
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Status { status, .. } => match *status {
                StatusCode::NOT_FOUND => Code::NotFound,
                StatusCode::UNAUTHORIZED => Code::Unauthenticated,
                StatusCode::FORBIDDEN => Code::PermissionDenied,
                _ => Code::Unavailable,
            },
            Self::Unauthorized(_) => Code::Unauthenticated,
            // asked again, it would answer the same
            Self::Protocol(_) => Code::FailedPrecondition,
            Self::Unreachable(_) | Self::Broken(_) | Self::Source(_) => Code::Unavailable,
        }
    }
}

impl fmt::Display for Attempt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.host, self.why)?;
        if self.times > 1 { write!(f, " ({} times)", self.times) } else { Ok(()) }
    }
}

fn shown(attempts: &[Attempt]) -> String {
    attempts.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

fn shown_status(status: StatusCode) -> String {
    match status.canonical_reason() {
        Some(reason) => format!("{} {}", status.as_u16(), reason.to_lowercase()),
        None => status.as_u16().to_string(),
    }
}
