//! Names of containers and of the processes that are added to them.
//!
//! **Invariant:** a value of these types is a valid name: safe as a part of a path and of a process key.
use std::borrow::Borrow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// The longest name, in bytes. Source: containerd, `identifiers.Validate`.
const MAX_BYTES: usize = 76;

/// Text that is not a valid name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum InvalidId {
    #[error("{what} must not be empty")]
    Empty { what: &'static str },
    #[error("{what} of {length} characters is longer than {MAX_BYTES}")]
    TooLong { what: &'static str, length: usize },
    #[error("{what} {id:?} must be letters and digits, joined by single dots, dashes or underscores")]
    Characters { what: &'static str, id: String },
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub(crate) struct $name(Arc<str>);

        impl $name {
            /// Takes `text` as a name, by containerd's own rule for identifiers.
            pub(crate) fn new(text: &str) -> Result<Self, InvalidId> {
                validate($what, text).map(|()| Self(text.into()))
            }

            pub(crate) fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;

            fn try_from(text: String) -> Result<Self, InvalidId> {
                Self::new(&text)
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.as_str().to_owned()
            }
        }
    };
}

name! {
    /// Name of a container within its namespace.
    ContainerId, "container id"
}
name! {
    /// Name of an exec within its container.
    ExecId, "exec id"
}

/// The key of a process: a container's init, or an exec. The keeper uses its text: `ID` or `ID/EXEC`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ProcessKey {
    pub(crate) container: ContainerId,
    pub(crate) exec: Option<ExecId>,
}

impl ProcessKey {
    pub(crate) fn init(container: &ContainerId) -> Self {
        Self { container: container.clone(), exec: None }
    }

    pub(crate) fn exec(container: &ContainerId, exec: &ExecId) -> Self {
        Self { container: container.clone(), exec: Some(exec.clone()) }
    }

    /// Parses the text of a key.
    pub(crate) fn parse(text: &str) -> Result<Self, InvalidId> {
        match text.split_once('/') {
            None => Ok(Self { container: ContainerId::new(text)?, exec: None }),
            Some((container, exec)) => Ok(Self { container: ContainerId::new(container)?, exec: Some(ExecId::new(exec)?) }),
        }
    }
}

impl fmt::Display for ProcessKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.exec {
            None => write!(f, "{}", self.container),
            Some(exec) => write!(f, "{}/{exec}", self.container),
        }
    }
}

fn validate(what: &'static str, text: &str) -> Result<(), InvalidId> {
    if text.is_empty() {
        return Err(InvalidId::Empty { what });
    }
    if text.len() > MAX_BYTES {
        return Err(InvalidId::TooLong { what, length: text.len() });
    }
    let part_is_valid = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_alphanumeric());
    if text.split(['.', '_', '-']).all(part_is_valid) {
        return Ok(());
    }
    Err(InvalidId::Characters { what, id: text.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_containerd_and_docker_are_valid() {
        for id in ["c1", "a", "my-container_1.x", &"a".repeat(76), "0123abcdef"] {
            assert!(ContainerId::new(id).is_ok(), "{id}");
        }
    }

    #[test]
    fn names_that_could_leave_a_folder_are_refused() {
        for id in ["", ".", "..", "a/b", "a\0b", "-a", "a-", "a--b", "ä", "a b", &"a".repeat(300)] {
            assert!(ContainerId::new(id).is_err(), "{id}");
        }
    }

    #[test]
    fn a_key_reads_back_as_it_was_written() {
        for text in ["c1", "c1/probe"] {
            assert_eq!(ProcessKey::parse(text).expect("a valid key").to_string(), text);
        }
        assert!(ProcessKey::parse("c1/").is_err());
        assert!(ProcessKey::parse("c1/a/b").is_err());
    }
}
