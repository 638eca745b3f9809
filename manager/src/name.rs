//! Names that clients give: of namespaces, containers, leases, and labels.

use std::collections::HashMap;
use std::fmt;

use crate::error::{Error, Result};

/// A namespace. Every other object belongs to one.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Namespace(String);

impl Namespace {
    /// Takes a namespace's name.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        identifier("namespace", name).map(|()| Self(name.to_owned()))
    }

    /// As text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Refuses what is no identifier: at most 76 characters, letters and digits with single `.`, `_` and `-` between them.
///
/// Being so, it is a safe file name too.
pub(crate) fn identifier(what: &str, id: &str) -> Result<()> {
    if id.is_empty() {
        return Err(Error::Invalid(format!("{what}: identifier must not be empty")));
    }
    if id.len() > MAX_IDENTIFIER_BYTES {
        let shown: String = id.chars().take(MAX_IDENTIFIER_BYTES).collect();
        return Err(Error::Invalid(format!("{what}: identifier {shown:?}… is longer than {MAX_IDENTIFIER_BYTES} characters")));
    }
    let parts_are_plain = id.split(['.', '_', '-']).all(|part| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric()));
    if parts_are_plain {
        Ok(())
    } else {
        Err(Error::Invalid(format!("{what}: identifier {id:?} must be letters and digits, with single '.', '_' or '-' between them")))
    }
}

/// Refuses labels that are too long or have no key, as containerd does, and too much of them: each event of an update repeats them all.
pub(crate) fn labels(labels: &HashMap<String, String>) -> Result<()> {
    let all: usize = labels.iter().map(|(key, value)| key.len() + value.len()).sum();
    if all > MAX_LABELS_BYTES {
        return Err(Error::Invalid(format!("labels of {all} bytes; the maximum is {MAX_LABELS_BYTES}")));
    }
    for (key, value) in labels {
        if key.is_empty() {
            return Err(Error::Invalid("label keys must not be empty".to_owned()));
        }
        let length = key.len() + value.len();
        if length > MAX_LABEL_BYTES {
            let shown: String = key.chars().take(10).collect();
            return Err(Error::Invalid(format!(
                "label key and value length ({length} bytes) greater than maximum size ({MAX_LABEL_BYTES} bytes), key: {shown}"
            )));
        }
    }
    Ok(())
}

const MAX_IDENTIFIER_BYTES: usize = 76;
const MAX_LABEL_BYTES: usize = 4096;
/// Of all labels of an object.
const MAX_LABELS_BYTES: usize = 256 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_are_what_containerd_takes() {
        for good in ["a", "A9", "a.b", "a-b_c.d", "moby", "k8s.io", &"x".repeat(76)] {
            assert!(identifier("id", good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "a..b", "-a", "a-", "a b", "ä", "a\n", "a--b", &"x".repeat(77)] {
            assert!(identifier("id", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_label_of_4096_bytes_is_the_longest() {
        let of = |length: usize| HashMap::from([("key".to_owned(), "v".repeat(length - 3))]);
        assert!(labels(&of(4096)).is_ok());
        assert!(labels(&of(4097)).is_err());
        assert!(labels(&HashMap::from([(String::new(), "v".to_owned())])).is_err());
    }
}
