//! Call counts and durations, for metrics.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tonic::Code;

/// All calls so far.
#[derive(Debug, Default)]
pub(crate) struct Calls {
    count: AtomicU64,
    under_way: AtomicUsize,
    by_method: Mutex<BTreeMap<String, Cost>>,
}

/// The calls of one method.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cost {
    /// How many ended with each code.
    pub(crate) codes: BTreeMap<i32, u64>,
    /// How many took no longer than each of [`BOUNDS`].
    pub(crate) within: [u64; BOUNDS.len()],
    /// How many there were.
    pub(crate) count: u64,
    /// How long they took; streams, until they began.
    pub(crate) took: Duration,
}

impl Calls {
    /// How many there were.
    pub(crate) fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }

    /// How many are not answered yet.
    pub(crate) fn under_way(&self) -> usize {
        self.under_way.load(Ordering::Relaxed)
    }

    /// Methods with their counts and durations.
    pub(crate) fn costs(&self) -> BTreeMap<String, Cost> {
        self.by_method.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Counts a call, for as long as the result is kept.
    pub(super) fn begin(&self) -> UnderWay<'_> {
        self.count.fetch_add(1, Ordering::Relaxed);
        self.under_way.fetch_add(1, Ordering::Relaxed);
        UnderWay { calls: self, since: Instant::now() }
    }
}

/// A call that is not answered yet.
pub(super) struct UnderWay<'a> {
    calls: &'a Calls,
    since: Instant,
}

impl UnderWay<'_> {
    /// Records the result. Unknown methods share one label, so that clients cannot create new ones.
    pub(super) fn ended(self, path: &str, code: Code) {
        let method = if code == Code::Unimplemented { "other" } else { path };
        let took = self.since.elapsed();
        let mut all = self.calls.by_method.lock().unwrap_or_else(PoisonError::into_inner);
        let cost = all.entry(method.to_owned()).or_default();
        *cost.codes.entry(code.into()).or_default() += 1;
        cost.count += 1;
        cost.took += took;
        for (within, bound) in cost.within.iter_mut().zip(BOUNDS) {
            *within += u64::from(took.as_secs_f64() <= bound);
        }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.calls.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// In seconds.
pub(crate) const BOUNDS: [f64; 6] = [0.001, 0.005, 0.025, 0.1, 1.0, 10.0];
