//! The restart policy: what a container's labels ask for, and the resulting action.
//!
//! | label `containerd.io/restart.` | |
//! | --- | --- |
//! | `status` | `running` or `stopped`: what its task shall be |
//! | `policy` | `always` (also when missing), `on-failure`, `on-failure:N`, `unless-stopped`, `no` |
//! | `count` | how often it was started again |
//! | `explicitly-stopped` | `true`: a client stopped it for good |
//! | `loguri` | where its output goes |
//! | `logpath` | the same as a file, when there is no `loguri`: containerd 1.4 to 1.7 |

use std::collections::HashMap;
use std::time::Duration;

/// The desired state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wish {
    /// A running task, under this policy.
    Running(Policy),
    /// None.
    Stopped,
}

/// When a task that has ended is started again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Policy {
    Always,
    /// At most this many times.
    OnFailure(Option<u64>),
    UnlessStopped,
    No,
}

/// The observed state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Observed {
    /// No task.
    Nothing,
    /// Its shim does not answer.
    Undecided,
    /// Created; its client is to start it.
    Created,
    /// Paused; its client is to resume it.
    Paused,
    Running,
    /// With this status.
    Exited(u32),
}

/// What to do about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    Leave,
    Start,
    Stop,
}

/// What the labels ask for; nothing without a `status`.
///
/// Errors: a sentence.
pub(super) fn wish(labels: &HashMap<String, String>) -> Result<Option<Wish>, String> {
    match labels.get(STATUS).map(String::as_str) {
        None | Some("") => Ok(None),
        Some("stopped") => Ok(Some(Wish::Stopped)),
        Some("running") => policy(labels.get(POLICY).map_or("", String::as_str)).map(|policy| Some(Wish::Running(policy))),
        Some(other) => Err(format!("label {STATUS} is {other:?}: expected running or stopped")),
    }
}

fn policy(text: &str) -> Result<Policy, String> {
    match text.split_once(':') {
        None => match text {
            "" | "always" => Ok(Policy::Always),
            "on-failure" => Ok(Policy::OnFailure(None)),
            "unless-stopped" => Ok(Policy::UnlessStopped),
            "no" => Ok(Policy::No),
            _ => Err(format!("label {POLICY} is {text:?}: expected always, on-failure[:N], unless-stopped or no")),
        },
        Some(("on-failure", most)) => match most.parse() {
            Ok(0) => Ok(Policy::OnFailure(None)),
            Ok(most) => Ok(Policy::OnFailure(Some(most))),
            Err(_) => Err(format!("label {POLICY} is {text:?}: {most:?} is not a number")),
        },
        Some((name, _)) => Err(format!("label {POLICY} is {text:?}: {name} takes no number")),
    }
}

/// Where its output goes; empty when nowhere.
///
/// Errors: a sentence.
pub(super) fn output(labels: &HashMap<String, String>) -> Result<String, String> {
    let of = |label| labels.get(label).filter(|value| !value.is_empty());
    match (of(LOG_URI), of(LOG_PATH)) {
        (Some(uri), _) => Ok(uri.clone()),
        (None, None) => Ok(String::new()),
        (None, Some(path)) if path.starts_with('/') => {
            let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte);
            let escaped = path.bytes().map(|byte| if is_plain(byte) { char::from(byte).to_string() } else { format!("%{byte:02X}") });
            Ok(format!("file://{}", escaped.collect::<String>()))
        }
        (None, Some(path)) => Err(format!("label {LOG_PATH} is {path:?}: expected an absolute path")),
    }
}

/// How often it was started again.
pub(super) fn count(labels: &HashMap<String, String>) -> u64 {
    labels.get(COUNT).and_then(|count| count.parse().ok()).unwrap_or(0)
}

/// What follows.
pub(super) fn decide(wish: Wish, observed: Observed, labels: &HashMap<String, String>) -> Decision {
    match (wish, observed) {
        (Wish::Stopped, Observed::Running | Observed::Created | Observed::Paused) => Decision::Stop,
        (Wish::Stopped, Observed::Nothing | Observed::Undecided | Observed::Exited(_))
        | (Wish::Running(_), Observed::Running | Observed::Undecided | Observed::Created | Observed::Paused) => Decision::Leave,
        (Wish::Running(policy), Observed::Nothing | Observed::Exited(_)) => {
            let starts = match policy {
                Policy::Always => true,
                Policy::OnFailure(most) => matches!(observed, Observed::Exited(1..)) && most.is_none_or(|most| count(labels) < most),
                Policy::UnlessStopped => {
                    !matches!(labels.get(EXPLICITLY_STOPPED).map(String::as_str), Some("true" | "1" | "t" | "T" | "TRUE" | "True"))
                }
                Policy::No => false,
            };
            if starts { Decision::Start } else { Decision::Leave }
        }
    }
}

/// The pause before the next start, by the number of consecutive short runs.
pub(super) fn pause(short_runs: u32) -> Duration {
    SHORTEST.saturating_mul(1 << short_runs.min(10)).min(LONGEST)
}

pub(super) const STATUS: &str = "containerd.io/restart.status";
const POLICY: &str = "containerd.io/restart.policy";
pub(super) const COUNT: &str = "containerd.io/restart.count";
const EXPLICITLY_STOPPED: &str = "containerd.io/restart.explicitly-stopped";
const LOG_URI: &str = "containerd.io/restart.loguri";
const LOG_PATH: &str = "containerd.io/restart.logpath";
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| (format!("containerd.io/restart.{key}"), (*value).to_owned())).collect()
    }

    fn decision(pairs: &[(&str, &str)], observed: Observed) -> Decision {
        let labels = labels(pairs);
        let wish = wish(&labels).expect("labels that make sense").expect("a status");
        decide(wish, observed, &labels)
    }

    #[test]
    fn each_policy_starts_what_it_should() {
        use Decision::{Leave, Start};
        use Observed::{Created, Exited, Nothing, Paused, Running, Undecided};
        let running = ("status", "running");
        for (rest, exited_0, exited_3, nothing) in [
            (&[][..], Start, Start, Start),
            (&[("policy", "always")], Start, Start, Start),
            (&[("policy", "no")], Leave, Leave, Leave),
            (&[("policy", "on-failure")], Leave, Start, Leave),
            (&[("policy", "on-failure:0"), ("count", "70")], Leave, Start, Leave),
            (&[("policy", "on-failure:2"), ("count", "1")], Leave, Start, Leave),
            (&[("policy", "on-failure:2"), ("count", "2")], Leave, Leave, Leave),
            (&[("policy", "unless-stopped")], Start, Start, Start),
            (&[("policy", "unless-stopped"), ("explicitly-stopped", "false")], Start, Start, Start),
            (&[("policy", "unless-stopped"), ("explicitly-stopped", "true")], Leave, Leave, Leave),
        ] {
            let all: Vec<_> = rest.iter().copied().chain([running]).collect();
            let found = [Exited(0), Exited(3), Nothing].map(|observed| decision(&all, observed));
            assert_eq!(found, [exited_0, exited_3, nothing], "{rest:?}");
            assert_eq!([Running, Undecided, Created, Paused].map(|observed| decision(&all, observed)), [Leave; 4], "{rest:?}");
        }
    }

    #[test]
    fn what_shall_be_stopped_is_stopped_also_before_it_runs_and_while_it_is_paused() {
        let stopped = [("status", "stopped"), ("policy", "always")];
        for observed in [Observed::Running, Observed::Created, Observed::Paused] {
            assert_eq!(decision(&stopped, observed), Decision::Stop);
        }
        for observed in [Observed::Nothing, Observed::Undecided, Observed::Exited(1)] {
            assert_eq!(decision(&stopped, observed), Decision::Leave);
        }
        assert_eq!(wish(&labels(&[("policy", "always")])), Ok(None));
    }

    #[test]
    fn invalid_labels_are_reported() {
        for bad in ["sometimes", "always:3", "on-failure:", "on-failure:-1", "on-failure:x"] {
            assert!(wish(&labels(&[("status", "running"), ("policy", bad)])).is_err(), "{bad}");
        }
        assert!(wish(&labels(&[("status", "dancing")])).is_err());
    }

    #[test]
    fn output_goes_to_a_uri_or_a_file() {
        let output = |pairs: &[_]| output(&labels(pairs));
        assert_eq!(output(&[]), Ok(String::new()));
        assert_eq!(output(&[("loguri", "binary:///a?b"), ("logpath", "/c")]), Ok("binary:///a?b".to_owned()));
        assert_eq!(output(&[("loguri", ""), ("logpath", "/var/log/a b%é")]), Ok("file:///var/log/a%20b%25%C3%A9".to_owned()));
        assert!(output(&[("logpath", "c")]).is_err());
    }

    #[test]
    fn pauses_grow_to_a_minute() {
        assert_eq!([0, 1, 2, 5, 6, 4_000_000].map(|n| pause(n).as_secs()), [1, 2, 4, 32, 60, 60]);
    }
}
