//! The command line.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use clap::error::ErrorKind;
use clap::{Args, CommandFactory as _, Parser, Subcommand};
use log::LevelFilter;

use crate::config::{self, ConfigError};
use crate::host::group;
use crate::settings::Settings;

/// The command to run.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Invocation {
    /// Serve until SIGTERM.
    Serve(Settings),
    /// Take over from the running process, then serve.
    TakeOver(Settings),
    /// Have the running daemon replaced, by the program at this path if given.
    Upgrade(Settings, Option<PathBuf>),
    /// Copy the store to a file.
    Backup(Settings, PathBuf),
    /// Send the event on standard input to the running daemon.
    Publish(Settings, EventName),
    /// Check the store.
    Check(Settings),
    /// Have the running daemon read all content.
    Verify(Settings),
    /// Print the default configuration.
    ConfigDefault,
    /// Check whether the daemon could start with these settings.
    ConfigCheck(Settings),
    /// Print help or the version.
    Print(String),
}

/// What an event is about.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct EventName {
    /// What happened, like /tasks/exit.
    #[arg(long)]
    pub(crate) topic: String,
    /// Where it happened.
    #[arg(long)]
    pub(crate) namespace: String,
}

/// Why a command line is invalid.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum UsageError {
    /// In one line.
    #[error("{0}; see `x-manager help`")]
    Line(String),
    /// The configuration file cannot be used.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

#[derive(Debug, Parser)]
#[command(
    name = "x-manager",
    version,
    disable_version_flag = true,
    args_override_self = true,
    about = "A container supervisor with containerd's API. Without a command it serves until SIGTERM."
)]
#[command(after_help = "Flags override the configuration file. SIGHUP is the same as `x-manager upgrade`, unless the terminal was closed.")]
struct Line {
    #[command(flatten)]
    flags: Flags,
    /// Print the version
    #[arg(short, long, action = clap::ArgAction::Version)]
    version: Option<bool>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Default, Args)]
struct Flags {
    /// Configuration file [default: /etc/x-manager/config.toml, if it exists]
    #[arg(short, long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Folder for persistent data [default: /var/lib/x-manager]
    #[arg(long, global = true, value_name = "FOLDER", value_parser = absolute)]
    root: Option<PathBuf>,
    /// Folder for runtime data, lost with a reboot [default: /run/x-manager]
    #[arg(long, global = true, value_name = "FOLDER", value_parser = absolute)]
    state: Option<PathBuf>,
    /// Socket of the gRPC API [default: /run/x-manager/x-manager.sock]
    #[arg(short, long, global = true, value_name = "PATH", value_parser = absolute)]
    address: Option<PathBuf>,
    /// Group that may use the socket, by name or number [default: 0]
    #[arg(long, global = true, value_parser = group)]
    group: Option<u32>,
    /// Log level: off, error, warn, info, debug or trace [default: info]
    #[arg(short, long, global = true, value_name = "LEVEL")]
    log_level: Option<LevelFilter>,
    /// Standard input is the socket on which another process hands over.
    #[arg(long, hide = true)]
    take_over: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Replace the running daemon with the installed program, without downtime; if that fails, the running one stays
    Upgrade {
        /// Program to run instead of the installed one
        #[arg(long, value_name = "PATH", value_parser = absolute)]
        binary: Option<PathBuf>,
    },
    /// Copy the metadata store to a file, even while the daemon runs
    Backup {
        /// File to create; an existing file is not overwritten
        file: PathBuf,
    },
    /// Check the metadata store for damage
    Check,
    /// Read all content, and take away what is damaged, so that the next pull brings it again
    Verify,
    /// Publish the event on standard input; for shims that publish with a program
    Publish(EventName),
    /// Print or check a configuration
    #[command(subcommand)]
    Config(Config),
    /// Print the version
    Version,
}

#[derive(Debug, Subcommand)]
enum Config {
    /// Print a configuration file with every key and its default
    Default,
    /// Check whether the daemon could start with a configuration file
    Check {
        /// File to check [default: the one that the daemon would read]
        file: Option<PathBuf>,
    },
}

impl Invocation {
    /// Parses the arguments, the program's name first, and reads the configuration file.
    pub(crate) fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, UsageError> {
        Self::parse_over(arguments, Path::new(DEFAULT_CONFIG))
    }

    fn parse_over(arguments: impl IntoIterator<Item = OsString>, default_config: &Path) -> Result<Self, UsageError> {
        let Line { mut flags, command, .. } = match Line::try_parse_from(arguments) {
            Ok(line) => line,
            Err(error) if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) => {
                return Ok(Self::Print(error.to_string()));
            }
            Err(error) => return Err(UsageError::Line(one_line(&error.to_string()))),
        };
        if let Some(Command::Config(Config::Check { file: Some(file) })) = &command {
            flags.config = Some(file.clone());
        }
        let settings = || flags.settings(default_config);
        Ok(match command {
            None if flags.take_over => Self::TakeOver(settings()?),
            None => Self::Serve(settings()?),
            Some(Command::Upgrade { binary }) => Self::Upgrade(settings()?, binary),
            Some(Command::Backup { file }) => Self::Backup(settings()?, file),
            Some(Command::Check) => Self::Check(settings()?),
            Some(Command::Verify) => Self::Verify(settings()?),
            Some(Command::Publish(event)) => Self::Publish(settings()?, event),
            Some(Command::Config(Config::Default)) => Self::ConfigDefault,
            Some(Command::Config(Config::Check { .. })) => Self::ConfigCheck(settings()?),
            Some(Command::Version) => Self::Print(Line::command().render_version()),
        })
    }
}

impl Flags {
    /// A file given by flag must exist; the default one may be missing.
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
        settings.gid = self.group.unwrap_or(settings.gid);
        settings.log_level = self.log_level.unwrap_or(settings.log_level);
        Ok(settings)
    }
}

/// The first line of a usage error.
fn one_line(error: &str) -> String {
    let about: Vec<_> = error.lines().take_while(|line| !line.is_empty()).map(str::trim).collect();
    about.join(" ").trim_start_matches("error: ").to_owned()
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() { Ok(path) } else { Err("should be an absolute path".to_owned()) }
}

/// The flag: standard input is the socket on which another process hands over.
pub(crate) const TAKE_OVER: &str = "--take-over";
const DEFAULT_CONFIG: &str = "/etc/x-manager/config.toml";

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Invocation, UsageError> {
        let arguments = ["x-manager"].into_iter().chain(line.split_whitespace());
        Invocation::parse_over(arguments.map(OsString::from), Path::new("/nonexistent"))
    }

    #[test]
    fn flags_set_what_they_name_in_either_form() {
        for line in
            ["--root /r --state /s --address /a.sock --group 7 --log-level debug", "--root=/r --state=/s -a/a.sock --group=7 -l debug"]
        {
            let Ok(Invocation::Serve(settings)) = parse(line) else { panic!("{line}: {:?}", parse(line)) };
            assert_eq!(settings.store().to_str(), Some("/r/meta.db"));
            assert_eq!(settings.bundles(crate::store::Kind::Task).to_str(), Some("/s/io.containerd.runtime.v2.task"));
            assert_eq!(settings.ttrpc_address().to_str(), Some("/a.sock.ttrpc"));
            assert_eq!((settings.gid, settings.log_level), (7, LevelFilter::Debug));
        }
        assert_eq!(parse(""), Ok(Invocation::Serve(Settings::default())));
        assert_eq!(parse(TAKE_OVER), Ok(Invocation::TakeOver(Settings::default())));
        let Ok(Invocation::Serve(settings)) = parse("--root /a --root /r") else { panic!("not understood") };
        assert_eq!(settings.root.to_str(), Some("/r"), "the last one counts");
        assert_eq!(parse("check --root /r").ok(), parse("--root=/r check").ok(), "before and after the command");
    }

    #[test]
    fn commands_are_known_by_name() {
        let settings = Settings::default;
        assert_eq!(parse("upgrade"), Ok(Invocation::Upgrade(settings(), None)));
        assert_eq!(parse("upgrade --binary /x"), Ok(Invocation::Upgrade(settings(), Some("/x".into()))));
        assert_eq!(parse("backup b.db"), Ok(Invocation::Backup(settings(), "b.db".into())));
        assert_eq!(parse("check"), Ok(Invocation::Check(settings())));
        assert_eq!(parse("verify"), Ok(Invocation::Verify(settings())));
        assert_eq!(parse("config default"), Ok(Invocation::ConfigDefault));
        assert_eq!(parse("config check"), Ok(Invocation::ConfigCheck(settings())));
        let event = EventName { namespace: "n".to_owned(), topic: "/t".to_owned() };
        assert_eq!(parse("--address /a publish --topic /t --namespace n").map(drop), Ok(()));
        assert_eq!(parse("publish --topic /t --namespace n"), Ok(Invocation::Publish(settings(), event)));
        for line in ["help", "--help", "-h", "upgrade --help", "help config check", "--version", "-v", "version"] {
            assert!(matches!(parse(line), Ok(Invocation::Print(_))), "{line}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_one_line() {
        let lines = [
            "--rot /r",
            "--root",
            "--root relative",
            "--group nosuchgroup",
            "--log-level loud",
            "serve",
            "backup",
            "publish",
            "config",
            "config chekc",
            "check twice",
            "--binary /x",
            "upgrade now",
            "config check --config /nonexistent",
            "config default extra",
        ];
        for bad in lines {
            let error = parse(bad).expect_err(bad).to_string();
            assert!(!error.contains('\n') && !error.starts_with("error"), "{error}");
        }
        let error = parse("publish").expect_err("two are missing").to_string();
        assert!(error.contains("--topic") && error.contains("--namespace"), "{error}");
    }
}
