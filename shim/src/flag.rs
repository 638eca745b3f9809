//! Flags of command lines, written as Go writes them: `-id c1`, `-id=c1`, `--id c1`.

/// An invalid flag.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FlagError {
    #[error("unknown flag {flag}")]
    Unknown { flag: String },
    #[error("flag -{name} needs a value")]
    MissingValue { name: &'static str },
    #[error("flag -{name} must be true or false, not {value:?}")]
    NotTruth { name: &'static str, value: String },
    #[error("flag -{name} {why}: {value:?}")]
    BadValue { name: &'static str, value: String, why: &'static str },
    #[error("{action} needs the flag -{name}")]
    Missing { action: &'static str, name: &'static str },
}

pub(crate) fn is_flag(argument: &str) -> bool {
    argument.len() > 1 && argument.starts_with('-')
}

/// Splits `-name`, `--name`, `-name=value` into name and value.
pub(crate) fn split(argument: &str) -> (&str, Option<&str>) {
    let bare = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')).unwrap_or(argument);
    match bare.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (bare, None),
    }
}

/// The value of a flag: behind its `=`, or the next argument.
pub(crate) fn value_of<'a>(
    name: &'static str,
    given: Option<&str>,
    rest: &mut impl Iterator<Item = &'a String>,
) -> Result<String, FlagError> {
    match given {
        Some(value) => Ok(value.to_owned()),
        None => rest.next().cloned().ok_or(FlagError::MissingValue { name }),
    }
}

/// The value of a flag that needs none.
pub(crate) fn truth_of(name: &'static str, given: Option<&str>) -> Result<bool, FlagError> {
    match given {
        None | Some("true" | "1" | "t") => Ok(true),
        Some("false" | "0" | "f") => Ok(false),
        Some(value) => Err(FlagError::NotTruth { name, value: value.to_owned() }),
    }
}
