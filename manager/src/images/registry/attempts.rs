//! One host after the other, and each as often as it is worth it.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use log::debug;

use super::error::{Attempt, RegistryError, Result, Why};
use super::host::Host;
use super::options::Limits;

/// What is done, for errors.
#[derive(Debug, Clone)]
pub(super) struct Task {
    pub(super) op: &'static str,
    pub(super) what: String,
}

/// Asks hosts until one does it: each of them once, and then the one at `steady` again where it may work later.
pub(super) async fn first_of<T, F>(
    limits: &Limits,
    task: &Task,
    hosts: &[Arc<Host>],
    steady: usize,
    run: impl Fn(Arc<Host>) -> F,
) -> Result<T>
where
    F: Future<Output = Result<T, Why>>,
{
    let failed = |host: &Host, times: u32, why: Why| {
        debug!(host:% = host.name(), op = task.op, what = task.what.as_str(), attempt = times, error:% = why; "registry request failed");
        match why {
            Why::Source(error) => Err(RegistryError::Source(Box::new(error))),
            why => Ok(Attempt { host: host.name(), times, why }),
        }
    };
    let mut attempts = Vec::new();
    for host in hosts {
        match run(Arc::clone(host)).await {
            Ok(done) => return Ok(done),
            Err(why) => attempts.push(failed(host, 1, why)?),
        }
    }
    let (Some(host), Some(last)) = (hosts.get(steady), attempts.get_mut(steady)) else {
        return Err(RegistryError::NoHost { op: task.op, what: task.what.clone() });
    };
    // a host that was never reached is more likely not there than busy
    let most = if host.is_reached() { limits.attempts } else { limits.attempts.min(UNREACHED) };
    while last.why.is_passing() && last.times < most {
        tokio::time::sleep(pause(limits, last.times, last.why.retry_after())).await;
        match run(Arc::clone(host)).await {
            Ok(done) => return Ok(done),
            Err(why) => *last = failed(host, last.times + 1, why)?,
        }
    }
    Err(RegistryError::Failed { op: task.op, what: task.what.clone(), attempts })
}

/// How long to wait after so many attempts: twice as long each time, somewhat different for each client; or what the host asks for.
pub(super) fn pause(limits: &Limits, times: u32, asked: Option<Duration>) -> Duration {
    let doubled = limits.pause.saturating_mul(1 << times.saturating_sub(1).min(16)).min(limits.longest_pause);
    // 3/4 to 5/4
    let part = u32::try_from(RandomState::new().build_hasher().finish() % 512).unwrap_or(256);
    let spread = doubled.saturating_mul(768 + part) / 1024;
    asked.map_or(spread, |asked| asked.max(spread.min(limits.pause))).min(limits.longest_pause)
}

/// Attempts at a host that has never answered.
const UNREACHED: u32 = 3;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_within_their_limit_and_are_at_least_what_the_host_asks_for() {
        let limits = Limits { pause: Duration::from_millis(100), longest_pause: Duration::from_secs(2), ..Limits::default() };
        for (times, least, most) in [(1, 75, 125), (2, 150, 250), (3, 300, 500), (10, 1500, 2000), (100, 1500, 2000)] {
            let pause = pause(&limits, times, None).as_millis();
            assert!((least..=most).contains(&pause), "{times}: {pause}");
        }
        assert_eq!(pause(&limits, 1, Some(Duration::from_millis(700))), Duration::from_millis(700));
        assert_eq!(pause(&limits, 1, Some(Duration::from_secs(3600))), Duration::from_secs(2));
        assert!(pause(&limits, 1, Some(Duration::ZERO)) >= Duration::from_millis(75), "zero is no reason to hurry");
    }
}
