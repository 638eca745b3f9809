//! systemd's manager, over D-Bus: units are started, changed and stopped.
//!
//! Owns the connection, which is made for one call of a client and closed after it, and what systemd's answers mean. Which unit with which properties is a plan's
//! (`x_engine::plan`).
//!
//! ```text
//!  Manager::connect ── system bus
//!     start ── StartTransientUnit ─▶ job ── JobRemoved "done" ─▶ the cgroup is there, and where it was expected
//!       └─ UnitExists ── ResetFailedUnit, once more ─▶ Exists
//! ```
//!
//! **Invariant:** every wait has a deadline. A unit that is not there is no error of a stop.
use std::time::Duration;

mod manager;
mod value;

pub(crate) use manager::Manager;

/// Why systemd has not done it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("cannot reach systemd, which the option SystemdCgroup needs: tried {tried}; is it the host's init, and its bus up?")]
    Unreachable { tried: String },
    #[error("systemd: {method} of unit {unit}")]
    Call { method: &'static str, unit: String, source: Box<zbus::Error> },
    /// A unit of the name is active, and it is not ours.
    #[error("systemd: unit {unit} already exists, with processes or as part of something else; stop it with `systemctl stop {unit}`")]
    Exists { unit: String },
    #[error("systemd: the job to {what} unit {unit} ended with the result {result:?}, `systemctl status {unit}` may have the reason")]
    Job { what: &'static str, unit: String, result: String },
    #[error("systemd: the job to {what} unit {unit} took longer than {} s", JOB_WITHIN.as_secs())]
    Late { what: &'static str, unit: String },
    #[error("systemd: the connection was closed before the job to {what} unit {unit} ended")]
    Closed { what: &'static str, unit: String },
    #[error("systemd: unit {unit} is at {found:?} in the cgroups and not at {expected:?}: an annotation or a drop-in has moved it")]
    Elsewhere { unit: String, expected: String, found: String },
}

impl Error {
    /// Whether systemd has taken the order to start the unit before this happened: the unit is ours then.
    pub(crate) fn has_a_job(&self) -> bool {
        match self {
            Self::Job { .. } | Self::Late { .. } | Self::Closed { .. } | Self::Elsewhere { .. } => true,
            Self::Unreachable { .. } | Self::Call { .. } | Self::Exists { .. } => false,
        }
    }
}

/// How long connecting may take.
const CONNECT_WITHIN: Duration = Duration::from_secs(10);
/// How long an answer may take: systemd answers nothing while it reloads.
const ANSWER_WITHIN: Duration = Duration::from_secs(25);
/// How long a job may take.
const JOB_WITHIN: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 30 });

/// Whether systemd is the host's init, as sd_booted(3) finds out.
pub(crate) fn blocking_is_running() -> bool {
    std::path::Path::new(RUNNING).symlink_metadata().is_ok_and(|about| about.is_dir())
}

pub(crate) const RUNNING: &str = "/run/systemd/system";

#[cfg(test)]
mod tests;
