//! Settings of a keeper and its workers: the flags of their command lines, and a variable of their environment.
use std::ffi::{CString, OsStr};
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use log::warn;

use crate::flag::{self, FlagError};

/// The environment variable with the seconds after which an idle worker hibernates; 0: never.
const IDLE_VARIABLE: &str = "X_SHIM_IDLE_SECONDS";
/// The environment variable with the seconds after which a pod is dropped that was never started.
const UNSTARTED_VARIABLE: &str = "X_SHIM_UNSTARTED_POD_SECONDS";
/// Longer than a client waits for an image between Create and Start.
const DEFAULT_UNSTARTED_SECONDS: u32 = 600;
const DEFAULT_IDLE: Duration = Duration::from_secs(60);
/// A worker may still check for an OOM kill that the kernel has not counted yet.
const MIN_IDLE: Duration = Duration::from_secs(5);
/// Longer than any uptime, and still representable as an [`Instant`].
const MAX_IDLE: Duration = Duration::from_secs(u32::MAX as u64);

/// The flags of a keeper and of its workers.
///
/// They are containerd's where containerd has one, so that its tools recognise the line in `ps`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Settings {
    /// containerd's namespace: `-namespace`.
    pub(crate) namespace: String,
    /// The container, or the group, that this shim was started for: `-id`.
    pub(crate) id: String,
    /// containerd's gRPC socket: `-address`.
    pub(crate) containerd_address: String,
    /// containerd's ttrpc socket, where events go: `-ttrpc-address`. Without one, there are no events.
    pub(crate) ttrpc_address: Option<String>,
    /// The shim's address, `unix://…`: `-socket`.
    pub(crate) shim_address: String,
    /// Path of the keeper's control socket: `-control`.
    pub(crate) control_path: PathBuf,
    /// The bundle that `start` ran in: `-bundle`. Its `log` fifo is containerd's.
    pub(crate) bundle: PathBuf,
    /// The log level: `-log-level`.
    pub(crate) log_level: log::LevelFilter,
}

impl Settings {
    /// Encodes the settings as arguments.
    fn to_arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        let mut flag = |name: &str, value: String| arguments.extend([format!("-{name}"), value]);
        flag("namespace", self.namespace.clone());
        flag("id", self.id.clone());
        flag("address", self.containerd_address.clone());
        if let Some(address) = &self.ttrpc_address {
            flag("ttrpc-address", address.clone());
        }
        flag("socket", self.shim_address.clone());
        flag("control", self.control_path.display().to_string());
        flag("bundle", self.bundle.display().to_string());
        flag("log-level", self.log_level.to_string().to_lowercase());
        arguments
    }

    /// The command line of a keeper or a worker. `words`: what follows the flags.
    pub(crate) fn command_line(&self, words: &[&str]) -> io::Result<Vec<CString>> {
        let flags = self.to_arguments();
        let line = std::iter::once("containerd-shim-x-v2").chain(flags.iter().map(String::as_str)).chain(words.iter().copied());
        Ok(line.map(CString::new).collect::<Result<_, _>>()?)
    }

    /// Decodes arguments that [`Settings::to_arguments`] made. Unknown flags, each with a value, are skipped: a worker may be older
    /// than its keeper.
    ///
    /// Errors: the flag that is missing or invalid.
    pub(crate) fn from_arguments(arguments: &[String]) -> Result<Self, FlagError> {
        let mut rest = arguments.iter();
        let (mut namespace, mut id, mut containerd, mut ttrpc) = (None, None, None, None);
        let (mut socket, mut control, mut bundle, mut level) = (None, None, None, log::LevelFilter::Info);
        while let Some(argument) = rest.next() {
            if !flag::is_flag(argument) {
                return Err(FlagError::Unknown { flag: argument.clone() });
            }
            let (name, given) = flag::split(argument);
            let mut text = |name| flag::value_of(name, given, &mut rest);
            match name {
                "namespace" => namespace = Some(text("namespace")?),
                "id" => id = Some(text("id")?),
                "address" => containerd = Some(text("address")?),
                "ttrpc-address" => ttrpc = Some(text("ttrpc-address")?).filter(|address| !address.is_empty()),
                "socket" => socket = Some(text("socket")?),
                "control" => control = Some(text("control")?),
                "bundle" => bundle = Some(text("bundle")?),
                "log-level" => {
                    let value = text("log-level")?;
                    let bad = || FlagError::BadValue { name: "log-level", value: value.clone(), why: "is not a level" };
                    level = value.parse().map_err(|_| bad())?;
                }
                _ => drop(text("of an unknown name")?),
            }
        }
        let need = |name: &'static str, value: Option<String>| value.ok_or(FlagError::Missing { action: "keeper", name });
        Ok(Self {
            id: need("id", id)?,
            namespace: need("namespace", namespace)?,
            containerd_address: containerd.unwrap_or_default(),
            ttrpc_address: ttrpc,
            shim_address: need("socket", socket)?,
            control_path: need("control", control)?.into(),
            bundle: need("bundle", bundle)?.into(),
            log_level: level,
        })
    }
}

/// After how many seconds a pod that was created and not started is dropped.
pub(crate) fn unstarted_pod_seconds() -> u32 {
    let named = std::env::var(UNSTARTED_VARIABLE).ok().and_then(|text| text.trim().parse().ok());
    named.unwrap_or(DEFAULT_UNSTARTED_SECONDS)
}

/// After how long an idle worker hibernates; `None`: never.
pub(crate) fn idle_after() -> Option<Duration> {
    let text = std::env::var_os(IDLE_VARIABLE);
    parse_idle(text.as_deref()).unwrap_or_else(|text| {
        let text = text.display();
        warn!(text:%; "{IDLE_VARIABLE} is not a number of seconds, using {} s", DEFAULT_IDLE.as_secs());
        Some(DEFAULT_IDLE)
    })
}

/// After how long an idle worker hibernates, from the value of the variable.
///
/// Errors: it is not a number.
fn parse_idle(text: Option<&OsStr>) -> Result<Option<Duration>, &OsStr> {
    let named = match text {
        Some(text) => {
            let seconds: u64 = text.to_str().and_then(|text| text.trim().parse().ok()).ok_or(text)?;
            Duration::from_secs(seconds).min(MAX_IDLE)
        }
        None => DEFAULT_IDLE,
    };
    Ok(Some(named).filter(|idle_after| !idle_after.is_zero()).map(|idle_after| idle_after.max(MIN_IDLE)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn example() -> Settings {
        Settings {
            namespace: "n1".into(),
            id: "-odd=id".into(),
            containerd_address: String::new(),
            ttrpc_address: Some("/run/c.sock.ttrpc".into()),
            shim_address: "unix:///run/containerd/s/ab".into(),
            control_path: "/run/containerd-shim-x/ab.sock".into(),
            bundle: "/b/c 1".into(),
            log_level: log::LevelFilter::Trace,
        }
    }

    #[test]
    fn settings_survive_the_command_line() {
        for settings in [example(), Settings { ttrpc_address: None, log_level: log::LevelFilter::Off, ..example() }] {
            assert_eq!(Settings::from_arguments(&settings.to_arguments()), Ok(settings));
        }
    }

    #[test]
    fn an_unknown_flag_of_a_later_keeper_is_skipped() {
        let mut arguments = example().to_arguments();
        arguments.extend(["-later".to_owned(), "x".to_owned()]);
        assert_eq!(Settings::from_arguments(&arguments), Ok(example()));
    }

    #[test]
    fn a_missing_flag_is_named() {
        let arguments: Vec<String> = example().to_arguments().into_iter().skip(2).collect();
        assert_eq!(Settings::from_arguments(&arguments).expect_err("no namespace").to_string(), "keeper needs the flag -namespace");
    }

    #[test]
    fn the_idle_time_is_read_from_the_variable_within_bounds() {
        let of = |text: &'static str| parse_idle(Some(OsStr::new(text)));
        assert_eq!(parse_idle(None), Ok(Some(DEFAULT_IDLE)));
        assert_eq!(of("0"), Ok(None));
        assert_eq!(of("1"), Ok(Some(MIN_IDLE)));
        assert_eq!(of(" 90\n"), Ok(Some(Duration::from_secs(90))));
        assert_eq!(of("18446744073709551615"), Ok(Some(MAX_IDLE)));
        for text in ["", "never", "-1", "1.5", "18446744073709551616"] {
            assert_eq!(of(text), Err(OsStr::new(text)));
        }
    }
}
