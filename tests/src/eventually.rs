//! Waiting for something to become true: with a name, with a deadline, and with the last error on a timeout.

use std::env;
use std::fmt::Display;
use std::future::Future;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow};
use tokio::time::error::Elapsed;

/// The deadline of anything that should happen immediately; generous because the machine is shared.
pub const SOON: Duration = Duration::from_secs(10);

/// The environment variable with the factor by which all deadlines are longer: for machines that are emulated.
pub const PATIENCE: &str = "X_PATIENCE";

/// The value of [`PATIENCE`], 1 if it is not set.
pub fn patience() -> u32 {
    static FACTOR: LazyLock<u32> = LazyLock::new(|| env::var(PATIENCE).ok().and_then(|text| text.parse().ok()).unwrap_or(1).max(1));
    *FACTOR
}

/// The limit for operations that must finish within a second: a second, or five on a machine whose processors are busy.
pub fn a_second() -> Duration {
    let pressure = std::fs::read_to_string("/proc/pressure/cpu").unwrap_or_default();
    let waiting = pressure.split_once("avg10=").and_then(|(_, rest)| rest.split(' ').next()?.parse::<f32>().ok());
    Duration::from_secs(if waiting.is_some_and(|percent| percent > 60.0) { 5 } else { 1 }) * patience()
}

/// Calls `probe` until it succeeds, and returns what it returned.
///
/// Errors: the last error of `probe` once `deadline` has passed.
pub async fn eventually<T>(what: impl Display, deadline: Duration, mut probe: impl AsyncFnMut() -> Result<T>) -> Result<T> {
    let (begin, deadline) = (Instant::now(), deadline * patience());
    let mut pause = Duration::from_millis(1);
    loop {
        let last = match probe().await {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        if begin.elapsed() > deadline {
            return Err(last.context(format!("not within {deadline:?}: {what}; last seen")));
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Like [`eventually`], of a plain condition.
pub async fn eventually_true(what: impl Display, deadline: Duration, mut probe: impl FnMut() -> bool) -> Result<()> {
    eventually(what, deadline, async || if probe() { Ok(()) } else { Err(anyhow!("still false")) }).await
}

/// Waits for `future` no longer than `deadline`.
pub async fn within<T>(what: impl Display, deadline: Duration, future: impl Future<Output = T>) -> Result<T> {
    timeout(deadline, future).await.with_context(|| format!("not within {:?}: {what}", deadline * patience()))
}

/// Waits for `future` no longer than `deadline`, as [`patience`] stretches it.
pub async fn timeout<F: Future>(deadline: Duration, future: F) -> std::result::Result<F::Output, Elapsed> {
    tokio::time::timeout(deadline * patience(), future).await
}
