//! Power cuts: a disk that records what is written to it, and disks as a power cut at any moment would have left it.
//!
//! ```text
//! daemon ─▶ ext4 ─▶ loop device ─▶ FUSE file ─▶ recorder: write, write, flush, write, …
//!                                                  │ cut after the n-th
//!                                                  ▼
//!                       all writes before the last flush, and some of those after it ─▶ ext4 again, as after a reboot
//! ```
//! A disk with a volatile cache promises that what was written before a flush is there when the flush has ended, and nothing about what was written
//! since: any part of it may be there. A page cache that outlives the cut, as that of a host whose guest is killed, would hide what a guest
//! has not flushed; here nothing is hidden.
//!
//! **Invariant:** requests are recorded one by one, each when it is done: what a file system has waited for comes before what it did next.

mod disk;
mod fuse;
mod held;
mod server;

pub use disk::{Cuts, Disk, Recorder};
pub use held::HeldFile;
pub use server::{Program, Server};

/// What was asked of a disk.
#[derive(Debug, Clone)]
pub(crate) enum Request {
    /// Bytes at an offset.
    Write(u64, Vec<u8>),
    /// Everything before it is on the disk for good.
    Flush,
}
