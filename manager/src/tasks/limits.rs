//! How long a shim's answer to a call is waited for.

use std::time::Duration;

/// For what a shim has at hand.
pub(crate) const STATE: Duration = Duration::from_secs(2);
/// For what it does by itself.
pub(crate) const SHORT: Duration = Duration::from_secs(10);
/// For what its runtime does.
pub(crate) const LONG: Duration = Duration::from_secs(120);
/// For what may write all of a container's memory.
pub(crate) const VERY_LONG: Duration = Duration::from_secs(3600);
