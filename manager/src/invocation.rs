//! The command line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use crate::config::{self, ConfigError};
use crate::settings::Settings;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Invocation {
    /// Serve until told to stop.
    Serve(Settings),
    /// The same, from where another process leaves off.
    TakeOver(Settings),
    /// Have the running daemon replaced, by the program at this path if one is named.
    Upgrade(Settings, Option<PathBuf>),
    /// Copy the store to a file.
    Backup(Settings, PathBuf),
    /// Tell the running daemon of an event, which standard input holds.
    Publish(Settings, EventName),
    /// Say whether the store is sound.
    Check(Settings),
    /// Print the default configuration.
    ConfigDefault,
    /// The configuration can be used.
    ConfigCheck(Settings),
    /// Say which version this is.
    Version,
    /// Say how to use it.
    Help,
}

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EventName {
    pub(crate) namespace: String,
    pub(crate) topic: String,
}

/// Why a command line makes no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UsageError {
    /// No such flag or command.
    #[error("unknown argument {0:?}")]
    Unknown(OsString),
    /// The flag or command is the last word.
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
    /// The configuration file cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

impl Invocation {
    /// Reads the words after the program's name, and the configuration file.
    pub(crate) fn parse(words: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        Self::parse_over(words, Path::new(DEFAULT_CONFIG))
    }

    fn parse_over(words: impl IntoIterator<Item = OsString>, default_config: &Path) -> Result<Self, UsageError> {
        let mut words = words.into_iter();
        let mut flags = Flags::default();
        let mut command = Vec::new();
        while let Some(word) = words.next() {
            let flag = word.to_str().unwrap_or_default().to_owned();
            match flag.as_str() {
                "-v" | "--version" => return Ok(Self::Version),
                "-h" | "--help" => return Ok(Self::Help),
                TAKE_OVER => flags.take_over = true,
                _ if flag.starts_with('-') => flags.take(&flag, words.next())?,
                _ => command.push(word),
            }
        }
        let mut command = command.into_iter();
        let name = command.next();
        let mut argument = command.next();
        let invocation =
            match (name.as_ref().map(|name| name.to_str().unwrap_or_default()), argument.as_ref().and_then(|word| word.to_str())) {
                (None, _) if flags.take_over => Self::TakeOver(flags.settings(default_config)?),
                (None, _) => Self::Serve(flags.settings(default_config)?),
                (Some("upgrade"), _) => Self::Upgrade(flags.settings(default_config)?, flags.binary.take()),
                (Some("backup"), _) => {
                    let file = argument.take().ok_or_else(|| UsageError::NoValue("backup".to_owned()))?;
                    Self::Backup(flags.settings(default_config)?, file.into())
                }
                (Some("publish"), _) => {
                    let named = |flag: &str, value: Option<String>| value.ok_or_else(|| UsageError::NoValue(flag.to_owned()));
                    let topic = named("publish --topic", flags.topic.take())?;
                    let event = EventName { namespace: named("publish --namespace", flags.namespace.take())?, topic };
                    Self::Publish(flags.settings(default_config)?, event)
                }
                (Some("check"), _) => Self::Check(flags.settings(default_config)?),
                (Some("config"), Some("default")) => {
                    argument = None;
                    Self::ConfigDefault
                }
                (Some("config"), Some("check")) => {
                    argument = None;
                    if let Some(file) = command.next() {
                        flags.config = Some(file.into());
                    }
                    Self::ConfigCheck(flags.settings(default_config)?)
                }
                (Some("config"), None) => return Err(UsageError::NoValue("config".to_owned())),
                (Some("version"), _) => Self::Version,
                (Some("help"), _) => Self::Help,
                _ => return Err(UsageError::Unknown(name.unwrap_or_default())),
            };
        let of_another = flags.binary.map(OsString::from).or(flags.topic.map(OsString::from)).or(flags.namespace.map(OsString::from));
        match argument.or_else(|| command.next()).or(of_another) {
            None => Ok(invocation),
            Some(word) => Err(UsageError::Unknown(word)),
        }
    }
}

/// What flags say; the configuration file is read when they are all known.
#[derive(Debug, Default)]
struct Flags {
    config: Option<PathBuf>,
    root: Option<PathBuf>,
    state: Option<PathBuf>,
    address: Option<PathBuf>,
    gid: Option<u32>,
    log_level: Option<log::LevelFilter>,
    binary: Option<PathBuf>,
    topic: Option<String>,
    namespace: Option<String>,
    take_over: bool,
}

impl Flags {
    fn take(&mut self, flag: &str, value: Option<OsString>) -> Result<(), UsageError> {
        if !["--config", "--root", "--state", "--address", "--binary", "--gid", "--log-level", "--topic", "--namespace"].contains(&flag) {
            return Err(UsageError::Unknown(flag.into()));
        }
        let value = value.ok_or_else(|| UsageError::NoValue(flag.to_owned()))?;
        match flag {
            "--config" => self.config = Some(value.into()),
            "--root" => self.root = Some(absolute(flag, value)?),
            "--state" => self.state = Some(absolute(flag, value)?),
            "--address" => self.address = Some(absolute(flag, value)?),
            "--binary" => self.binary = Some(absolute(flag, value)?),
            "--topic" => self.topic = Some(parsed(flag, value, "text")?),
            "--namespace" => self.namespace = Some(parsed(flag, value, "text")?),
            "--gid" => self.gid = Some(parsed(flag, value, "the number of a group")?),
            _ => self.log_level = Some(parsed(flag, value, "one of off, error, warn, info, debug, trace")?),
        }
        Ok(())
    }

    /// The file that is named must be there; the default one may be missing.
    fn settings(&self, default_config: &Path) -> Result<Settings, UsageError> {
        let mut settings = match &self.config {
            Some(path) => config::read(path)?,
            None if default_config.exists() => config::read(default_config)?,
            None => Settings::default(),
        };
        let paths = [(&self.root, &mut settings.root), (&self.state, &mut settings.state), (&self.address, &mut settings.address)];
        for (flag, place) in paths {
            if let Some(path) = flag {
                place.clone_from(path);
            }
        }
        settings.gid = self.gid.unwrap_or(settings.gid);
        settings.log_level = self.log_level.unwrap_or(settings.log_level);
        Ok(settings)
    }
}

fn absolute(flag: &str, value: OsString) -> Result<PathBuf, UsageError> {
    let path = PathBuf::from(&value);
    if path.is_absolute() { Ok(path) } else { Err(UsageError::BadValue { flag: flag.to_owned(), value, expected: "an absolute path" }) }
}

fn parsed<T: std::str::FromStr>(flag: &str, value: OsString, expected: &'static str) -> Result<T, UsageError> {
    let text = value.to_str().unwrap_or_default();
    text.parse().map_err(|_| UsageError::BadValue { flag: flag.to_owned(), value: value.clone(), expected })
}

/// Says that standard input is the socket on which another process hands over; not for people.
pub(crate) const TAKE_OVER: &str = "--take-over";
const DEFAULT_CONFIG: &str = "/etc/x-manager/config.toml";

/// How to use it.
pub(crate) const HELP: &str = "\
x-manager: a supervisor of containers that speaks containerd's API

  x-manager [FLAGS]                          serve until SIGTERM or SIGINT
  x-manager [FLAGS] upgrade [--binary PATH]  replace the running daemon by the program at PATH, or by the one that is now
                                             where the daemon's own was; no call is refused, and it stays if that fails
  x-manager [FLAGS] backup FILE              copy the metadata store, also while the daemon runs
  x-manager [FLAGS] check                    say whether the metadata store is sound
  x-manager [FLAGS] publish --topic TOPIC --namespace NAMESPACE
                                             tell the daemon of the event on standard input, as some shims do
  x-manager config default                   print a configuration file that says the defaults
  x-manager config check [FILE]              say whether a configuration file can be used
  x-manager version
  x-manager help

  --config     configuration file              /etc/x-manager/config.toml, if it is there
  --root       what outlives a reboot          /var/lib/x-manager
  --state      what does not                   /run/x-manager
  --address    socket of the gRPC API          /run/x-manager/x-manager.sock
  --gid        group that may use the socket   0
  --log-level  off, error, warn, info, debug, trace

Flags count before the file. SIGHUP is the same as `x-manager upgrade`.
";

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Invocation, UsageError> {
        Invocation::parse_over(line.split_whitespace().map(OsString::from), Path::new("/nonexistent"))
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
        assert_eq!(parse(""), Ok(Invocation::Serve(Settings::default())));
        assert_eq!(parse(TAKE_OVER), Ok(Invocation::TakeOver(Settings::default())));
    }

    #[test]
    fn commands_are_known_by_name() {
        let settings = Settings::default;
        assert_eq!(parse("upgrade"), Ok(Invocation::Upgrade(settings(), None)));
        assert_eq!(parse("upgrade --binary /x"), Ok(Invocation::Upgrade(settings(), Some("/x".into()))));
        assert_eq!(parse("backup b.db"), Ok(Invocation::Backup(settings(), "b.db".into())));
        assert_eq!(parse("check"), Ok(Invocation::Check(settings())));
        assert_eq!(parse("config default"), Ok(Invocation::ConfigDefault));
        assert_eq!(parse("config check"), Ok(Invocation::ConfigCheck(settings())));
        assert_eq!(parse("help"), Ok(Invocation::Help));
        assert_eq!(parse("--version"), Ok(Invocation::Version));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let lines = [
            "--rot /r",
            "--root",
            "--root relative",
            "--gid many",
            "--log-level loud",
            "serve",
            "backup",
            "config",
            "config chekc",
            "check twice",
            "--binary /x",
            "upgrade now",
            "config check --config /nonexistent",
            "config default extra",
        ];
        for bad in lines {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
