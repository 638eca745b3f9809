//! The cgroup of a container.
//!
//! Owns which folders it consists of, and what can be read from and done to them: metrics, processes, kills by the kernel for
//! want of memory. Makes and removes none: that is the engine's.
//!
//! **Invariant:** a folder that the shim itself is in, or above it, is never taken for a container's: a container without a cgroup of
//! its own has no metrics and is not killed by cgroup. A cgroup that is gone reads as empty.
use std::io;

use protobuf::well_known_types::any::Any;
use serde::{Deserialize, Serialize};

/// The folders of a container's cgroup. Recorded in the container's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cgroup {}

/// Whether the processes of a cgroup are stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Freezer {
    Thawed,
    Freezing,
    Frozen,
}

impl Cgroup {
    /// Finds the cgroup of `pid`: a container's init that has not run the user's program yet, so that it sits where the engine put it.
    pub(crate) fn of_pid(pid: u32) -> io::Result<Self> {
        let _ = pid;
        Ok(Self::default())
    }

    /// The metrics in the message that containerd expects on this kind of host (`io.containerd.cgroups.v1.Metrics` or `…v2…`).
    /// What cannot be read is left out: without a cgroup the message is empty.
    pub(crate) fn metrics(&self) -> Any {
        Any::default()
    }

    /// Every process in it and below it, in no order. Zombies may be among them.
    pub(crate) fn pids(&self) -> Vec<u32> {
        Vec::new()
    }

    /// Sends SIGKILL to every process in it and below it, thawing it if needed. They are dying afterwards, not dead.
    pub(crate) fn kill_all(&self) -> io::Result<()> {
        Ok(())
    }

    /// How many processes the kernel has killed in it for want of memory. `None` if that cannot be known (any more).
    pub(crate) fn oom_kills(&self) -> Option<u64> {
        None
    }

    /// Whether its processes are stopped. `None` if that cannot be known (any more).
    pub(crate) fn freezer(&self) -> Option<Freezer> {
        None
    }

    /// Watches for want of memory. Begin to watch first, then read [`Cgroup::oom_kills`]: so nothing is missed.
    pub(crate) fn watch_oom(&self) -> io::Result<OomWatch> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Wakes when [`Cgroup::oom_kills`] may have grown. The counter is the truth; wakes may come without reason.
#[derive(Debug)]
pub(crate) struct OomWatch {}

/// What an [`OomWatch`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OomWake {
    /// Look at the counter.
    Changed,
    /// The cgroup is gone: the watch has ended.
    Gone,
}

impl OomWatch {
    /// Waits for the next wake. Can be dropped at any time without missing one.
    pub(crate) async fn changed(&mut self) -> OomWake {
        OomWake::Gone
    }
}
