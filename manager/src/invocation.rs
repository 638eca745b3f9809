//! The command line.

use std::ffi::OsString;

use crate::settings::Settings;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Invocation {
    /// Serve until told to stop.
    Serve(Settings),
    /// Say which version this is.
    Version,
    /// Say how to use it.
    Help,
}

/// Why a command line makes no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UsageError {
    /// No such flag or command.
    #[error("unknown argument {0:?}")]
    Unknown(OsString),
    /// The flag is the last word.
    #[error("{0} needs a value")]
    NoValue(String),
    /// The value is not one of the flag's.
    #[error("{flag} {value:?}: {expected}")]
    BadValue {
        /// The flag.
        flag: String,
        /// What it was given.
        value: OsString,
        /// What it takes.
        expected: &'static str,
    },
}

impl Invocation {
    /// Reads the words after the program's name.
    pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        let mut words = words.into_iter();
        let mut settings = Settings::default();
        while let Some(word) = words.next() {
            let Some(flag) = word.to_str().map(ToOwned::to_owned) else { return Err(UsageError::Unknown(word)) };
            let mut value = || words.next().ok_or_else(|| UsageError::NoValue(flag.clone()));
            match flag.as_str() {
                "--root" => settings.root = absolute(&flag, value()?)?,
                "--state" => settings.state = absolute(&flag, value()?)?,
                "--address" => settings.address = absolute(&flag, value()?)?,
                "--gid" => settings.gid = parsed(&flag, value()?, "the number of a group")?,
                "--log-level" => settings.log_level = parsed(&flag, value()?, "one of off, error, warn, info, debug, trace")?,
                "-v" | "--version" | "version" => return Ok(Self::Version),
                "-h" | "--help" | "help" => return Ok(Self::Help),
                _ => return Err(UsageError::Unknown(word)),
            }
        }
        Ok(Self::Serve(settings))
    }
}

fn absolute(flag: &str, value: OsString) -> Result<std::path::PathBuf, UsageError> {
    let path = std::path::PathBuf::from(&value);
    if path.is_absolute() { Ok(path) } else { Err(UsageError::BadValue { flag: flag.to_owned(), value, expected: "an absolute path" }) }
}

fn parsed<T: std::str::FromStr>(flag: &str, value: OsString, expected: &'static str) -> Result<T, UsageError> {
    let text = value.to_str().unwrap_or_default();
    text.parse().map_err(|_| UsageError::BadValue { flag: flag.to_owned(), value: value.clone(), expected })
}

/// How to use it.
pub(crate) const HELP: &str = "\
x-manager: a supervisor of containers that speaks containerd's API

  x-manager [--root FOLDER] [--state FOLDER] [--address SOCKET] [--gid GROUP] [--log-level LEVEL]

  --root       what outlives a reboot          /var/lib/x-manager
  --state      what does not                   /run/x-manager
  --address    socket of the gRPC API          /run/x-manager/x-manager.sock
  --gid        group that may use the socket   0
  --log-level  off, error, warn, info, debug, trace

  x-manager version
  x-manager help
";

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Invocation, UsageError> {
        Invocation::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn flags_set_what_they_name() {
        let Ok(Invocation::Serve(settings)) = parse("--root /r --state /s --address /a.sock --gid 7 --log-level debug") else {
            panic!("not understood");
        };
        assert_eq!(settings.store().to_str(), Some("/r/meta.db"));
        assert_eq!(settings.bundles().to_str(), Some("/s/io.containerd.runtime.v2.task"));
        assert_eq!(settings.ttrpc_address().to_str(), Some("/a.sock.ttrpc"));
        assert_eq!((settings.gid, settings.log_level), (7, log::LevelFilter::Debug));
    }

    #[test]
    fn what_makes_no_sense_is_named() {
        assert_eq!(parse("--rot /r"), Err(UsageError::Unknown("--rot".into())));
        assert_eq!(parse("--root"), Err(UsageError::NoValue("--root".into())));
        let error = parse("--state here").expect_err("relative");
        assert_eq!(error.to_string(), "--state \"here\": an absolute path");
        assert!(parse("--gid many").is_err());
    }
}
