//! Why a command fails: what failed, on what, and what an operator can do.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tonic::{Code, Status};

/// A failure of a command.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// There is no daemon.
    #[error("cannot connect to {}", address.display())]
    NoDaemon {
        /// Its socket.
        address: PathBuf,
        /// The transport's or the kernel's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The daemon refuses a call, or failed.
    #[error("{doing}: {}", .status.message())]
    Call {
        /// What was tried.
        doing: String,
        /// The daemon's answer.
        status: Status,
    },
    /// The daemon did not get an answer of a registry, or does not answer itself.
    #[error("{doing}: {}", .status.message())]
    Registry {
        /// What was tried.
        doing: String,
        /// The daemon's answer.
        status: Status,
    },
    /// The daemon does not answer.
    #[error("{doing}: no answer within {limit:?}")]
    Late {
        /// What was tried.
        doing: String,
        /// For how long.
        limit: Duration,
    },
    /// A file.
    #[error("{op} {}", path.display())]
    Io {
        /// What was tried.
        op: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's error.
        source: io::Error,
    },
    /// Something that the daemon has sent, or a file, cannot be understood.
    #[error("cannot read {what}")]
    Unreadable {
        /// Which.
        what: String,
        /// What is wrong with it.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The container does not exist.
    #[error("there is no container {id} in namespace {namespace}")]
    NoContainer {
        /// As it was given.
        id: String,
        /// Where it was looked for.
        namespace: String,
    },
    /// The command makes no sense now; the sentence says what to do.
    #[error("{0}")]
    Refused(String),
}

/// The result of a step.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A sentence for the operator, made by the place that knows what to do.
    pub(crate) fn refused(sentence: impl Into<String>) -> Self {
        Self::Refused(sentence.into())
    }

    /// Something that cannot be read.
    pub(crate) fn unreadable(what: impl Into<String>, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Unreadable { what: what.into(), source: source.into() }
    }

    /// The daemon's code, of a call that it refused.
    pub(crate) fn code(&self) -> Option<Code> {
        match self {
            Self::Call { status, .. } | Self::Registry { status, .. } => Some(status.code()),
            Self::NoContainer { .. } => Some(Code::NotFound),
            Self::NoDaemon { .. } | Self::Late { .. } | Self::Io { .. } | Self::Unreadable { .. } | Self::Refused(_) => None,
        }
    }

    /// Whether the connection failed, or the daemon is being replaced: the call may have been carried out.
    pub(crate) fn is_lost(&self) -> bool {
        match self {
            // a daemon's own answer has no source
            Self::Call { status, .. } | Self::Registry { status, .. } => {
                matches!(status.code(), Code::Unavailable | Code::Cancelled) || std::error::Error::source(status).is_some()
            }
            Self::NoDaemon { .. }
            | Self::Late { .. }
            | Self::Io { .. }
            | Self::Unreadable { .. }
            | Self::NoContainer { .. }
            | Self::Refused(_) => false,
        }
    }

    /// This error and its sources.
    pub(crate) fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut next = std::error::Error::source(self);
        while let Some(source) = next {
            let source_text = source.to_string();
            // transports repeat their sources
            if !text.ends_with(&source_text) {
                text.push_str(": ");
                text.push_str(&source_text);
            }
            next = source.source();
        }
        text
    }

    /// The shells' status for a program that is not there (127) or cannot be executed (126), as Docker has it too. Only the text of an OCI runtime says that.
    pub(crate) fn status_of_program(&self) -> Option<u8> {
        let Self::Call { status, .. } = self else { return None };
        let text = status.message().to_lowercase();
        if !["exec: \"", "executable "].iter().any(|start| text.contains(start)) {
            return None;
        }
        if text.contains("not found") || text.contains("no such file or directory") {
            Some(NOT_FOUND)
        } else {
            ["permission denied", "is a directory", "exec format error"].iter().any(|why| text.contains(why)).then_some(NOT_EXECUTABLE)
        }
    }

    /// What to do about it, where that is known.
    pub(crate) fn hint(&self) -> Option<String> {
        match self {
            Self::NoDaemon { .. } if !nix::unistd::geteuid().is_root() => {
                Some("run as root, or as a member of the group that may use the socket".to_owned())
            }
            Self::NoDaemon { .. } => Some("is the daemon running? --address names the socket of another one".to_owned()),
            Self::NoContainer { .. } => Some("`xctl ps --all` lists containers; --namespace chooses another namespace".to_owned()),
            Self::Call { status, .. } => match status.code() {
                Code::Unimplemented => Some("this daemon does not serve that; --address names the socket of another one".to_owned()),
                Code::Unavailable => Some("the daemon or the shim may be restarting; try again".to_owned()),
                Code::PermissionDenied => Some("run as root".to_owned()),
                _ => None,
            },
            Self::Registry { .. } => Some(
                "check the registry's name and the way to it from the daemon's host; --plain-http and --hosts-dir say how a registry is spoken to"
                    .to_owned(),
            ),
            Self::Io { source, .. } if source.kind() == io::ErrorKind::PermissionDenied => Some("run as root".to_owned()),
            Self::Late { .. } => Some("the daemon's log may say why".to_owned()),
            Self::Io { .. } | Self::Unreadable { .. } | Self::Refused(_) => None,
        }
    }
}

const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

/// Adds what was tried, and on what.
pub(crate) trait IoContext<T> {
    /// To an error of the kernel.
    fn on(self, op: &'static str, path: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<io::Error>> IoContext<T> for std::result::Result<T, E> {
    fn on(self, op: &'static str, path: impl AsRef<Path>) -> Result<T> {
        self.map_err(|source| Error::Io { op, path: path.as_ref().to_owned(), source: source.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_daemons_own_answer_is_not_a_lost_connection() {
        let call = |status| Error::Call { doing: "start".to_owned(), status };
        assert!(!call(Status::unknown("it failed")).is_lost());
        assert!(call(Status::unavailable("retry")).is_lost());
        assert!(call(Status::from_error(Box::new(io::Error::other("reset")))).is_lost());
    }

    #[test]
    fn a_program_that_cannot_be_executed_has_the_status_that_shells_have() {
        let status = |text: &str| Error::Call { doing: "start x".to_owned(), status: Status::unknown(text) }.status_of_program();
        assert_eq!(status("runc create failed: exec: \"no\": executable file not found in $PATH"), Some(127));
        assert_eq!(status("exec: \"/no\": stat /no: no such file or directory"), Some(127));
        assert_eq!(status("executable file `no` not found in $PATH: No such file or directory"), Some(127));
        assert_eq!(status("exec: \"/etc\": is a directory"), Some(126));
        assert_eq!(status("exec: \"/no-x\": permission denied"), Some(126));
        assert_eq!(status("open /x/config.json: no such file or directory"), None);
        assert_eq!(status("mount \"/x\": permission denied"), None);
    }

    #[test]
    fn a_source_is_told_once() {
        let gone = io::Error::new(io::ErrorKind::NotFound, "no such file");
        let error = Error::Io { op: "open", path: "/x".into(), source: gone };
        assert_eq!(error.chain(), "open /x: no such file");
        let error = Error::unreadable("the answer of x", "x");
        assert_eq!(error.chain(), "cannot read the answer of x");
    }
}
