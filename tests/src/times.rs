//! How often repeated tests repeat: a few times by default, `X_TIMES` times as often on request.

use std::env;
use std::sync::LazyLock;

/// The environment variable with the factor by which counts, sizes and durations of cases that repeat something are larger, and all
/// deadlines of whole cases longer.
pub const TIMES: &str = "X_TIMES";

/// The value of [`TIMES`], 1 if it is not set.
pub fn times() -> u32 {
    static FACTOR: LazyLock<u32> = LazyLock::new(|| env::var(TIMES).ok().and_then(|text| text.parse().ok()).unwrap_or(1).max(1));
    *FACTOR
}

/// A count, multiplied by [`times`].
pub fn repeated(count: usize) -> usize {
    count * times() as usize
}
