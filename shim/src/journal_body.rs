//! The body of a container's journal: all that `delete` needs to clean up after a dead keeper.
//!
//! Owns the JSON form of the body. The worker writes it (through the keeper), `delete` and `inspect` read it. The frame around it,
//! and the exit slot beside it, are [`crate::journal`]'s.
//!
//! **Invariant:** fields are only ever added, each with a default: a journal of any earlier version can be read.
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::processes::Stat;

/// Version of the body that this binary writes.
pub(crate) const VERSION: u32 = 1;

/// The body of a journal. Engine and cgroup are values, so that this version can read the rest if it cannot read one. Written at create before the runtime runs, and after each addition.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct JournalBody {
    pub(crate) version: u32,
    pub(crate) namespace: String,
    /// The container's id.
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    /// The mount point of the root filesystem; absent if the shim mounted nothing.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rootfs: Option<PathBuf>,
    pub(crate) keeper: ProcessIdentity,
    /// The keeper's number of the request or exit that this was last written for.
    pub(crate) cause: u64,
    /// The keeper's control socket.
    pub(crate) control_path: PathBuf,
    /// The record of the engine that made the container: what `engine::Engine` serialises to.
    pub(crate) engine: serde_json::Value,
    /// The container has no pid namespace of its own: killing init is not enough.
    pub(crate) shared_pid_namespace: bool,
    /// The container's cgroup, once known: what `cgroup::Cgroup` serialises to.
    pub(crate) cgroup: serde_json::Value,
    /// The container's init, once known.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) init: Option<ProcessIdentity>,
}

/// The identity of a process, distinct from a later one with the same pid.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct ProcessIdentity {
    pub(crate) pid: u32,
    /// Field 22 of `/proc/PID/stat`, in clock ticks since boot; 0 if it had exited when read.
    pub(crate) start_time: u64,
}

impl JournalBody {
    /// Encodes the body.
    pub(crate) fn encode(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a struct of strings and numbers has a JSON form")
    }

    /// Decodes a body that this or another version wrote.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, serde_json::Error> {
        serde_json::from_slice(bytes)
    }
}

impl ProcessIdentity {
    /// Identifies the running (or zombie) process `pid`; absent if there is none.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        Some(Self { pid, start_time: Stat::of(pid)?.start_time })
    }

    /// Whether exactly this process still exists, also as a zombie.
    pub(crate) fn exists(self) -> bool {
        Self::of(self.pid) == Some(self)
    }

    /// Whether exactly this process runs: it exists, and is not a zombie.
    pub(crate) fn is_running(self) -> bool {
        Stat::of(self.pid).is_some_and(|stat| stat.start_time == self.start_time && stat.is_running())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_exists_and_its_like_with_another_start_does_not() {
        let me = ProcessIdentity::of(std::process::id()).expect("this process has a line in /proc");
        assert!(me.exists() && me.is_running());
        let another = ProcessIdentity { start_time: me.start_time + 1, ..me };
        assert!(!another.exists() && !another.is_running());
        let mut child = std::process::Command::new("/bin/true").spawn().expect("true can be started");
        let dead = ProcessIdentity::of(child.id()).expect("it is not reaped");
        while dead.is_running() {
            std::thread::yield_now();
        }
        assert!(dead.exists());
        let _ = child.wait();
    }

    #[test]
    fn a_body_with_fields_of_a_later_version_can_be_read() {
        let body = JournalBody::decode(br#"{"version": 9, "id": "c1", "surprise": [1]}"#).expect("unknown fields are skipped");
        assert_eq!((body.version, body.id.as_str()), (9, "c1"));
    }
}
