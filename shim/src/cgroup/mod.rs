//! The cgroup of a container.
//!
//! Owns the list of its folders, and what can be read from and done to them: metrics, processes, OOM kills, signals.
//! The engine creates and removes them.
//!
//! **Invariant:** a folder that the shim itself is in, or one above it, is never taken for a container's: a container without a cgroup
//! of its own has no metrics and is not killed by cgroup. A cgroup that is gone reads as empty.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde::{Deserialize, Serialize};

mod files;
mod hierarchy;
mod kill;
mod v1;
mod v2;
mod watch;

pub(crate) use kill::Frozen;
pub(crate) use watch::{OomWake, OomWatch};

/// The folders of a container's cgroup. Recorded in the container's state.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Cgroup {
    /// The container has no cgroup of its own.
    #[default]
    None,
    /// cgroup v1: a folder for each controller and named hierarchy, and for the unified hierarchy beside them (`unified`) if mounted.
    V1(BTreeMap<String, PathBuf>),
    /// cgroup v2.
    V2(PathBuf),
}

/// Why a cgroup cannot be read or changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error("{op} {}", path.display())]
    Io { op: &'static str, path: PathBuf, source: std::io::Error },
    #[error("cgroup of process {pid}: {what} is not the path of a cgroup")]
    Malformed { pid: u32, what: String },
    #[error("the container has no memory cgroup of its own")]
    NoMemory,
}

impl Cgroup {
    /// Finds the cgroup of `pid`: a container's init that has not run the user's program yet, so that it sits where the engine put it.
    ///
    /// Errors: Io with NotFound or ESRCH if there is no such process.
    pub(crate) fn of_pid(pid: u32) -> Result<Self, CgroupError> {
        hierarchy::of_pid(pid)
    }

    /// The metrics in the message that containerd expects on this kind of host: `io.containerd.cgroups.v1.Metrics` or `…v2…`.
    /// What cannot be read is left out: without a cgroup the message is empty.
    pub(crate) fn metrics(&self) -> Any {
        let (kind, value) = match self {
            Self::V1(folders) => (V1_METRICS, v1::metrics(folders).write_to_bytes()),
            Self::V2(folder) => (V2_METRICS, v2::metrics(folder).write_to_bytes()),
            Self::None if hierarchy::is_unified() => (V2_METRICS, Ok(Vec::new())),
            Self::None => (V1_METRICS, Ok(Vec::new())),
        };
        let value = value.expect("a message without required fields is always complete");
        Any { type_url: kind.to_owned(), value, ..Default::default() }
    }

    /// Every process in it and below it, in no order.
    pub(crate) fn pids(&self) -> Vec<u32> {
        self.processes().map(files::pids_below).unwrap_or_default()
    }

    /// Sends SIGKILL to every process in it and below it, frozen or not, and does not wait for their exits.
    pub(crate) fn kill_all(&self) -> Result<(), CgroupError> {
        kill::kill_all(self)
    }

    /// Removes the folders and those below them, without their engine. One that has processes stays.
    pub(crate) fn remove(&self) -> std::io::Result<()> {
        let folders: Vec<&Path> = match self {
            Self::None => Vec::new(),
            Self::V1(folders) => folders.values().map(PathBuf::as_path).collect(),
            Self::V2(folder) => vec![folder],
        };
        let mut all = Vec::new();
        for folder in folders {
            files::each_below(folder, &mut |folder| all.push(folder.to_owned()));
        }
        all.iter().rev().try_for_each(|folder| match std::fs::remove_dir(folder) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        })
    }

    /// Thaws it and every cgroup below it. A freeze of a cgroup above stays.
    pub(crate) fn thaw(&self) {
        kill::thaw(self);
    }

    /// Freezes it until the result is dropped. Nothing if it is frozen already, or cannot be frozen.
    pub(crate) fn freeze(&self) -> Option<Frozen> {
        kill::freeze(self)
    }

    /// Lets some processes exit after SIGKILL, and leaves the others frozen: cgroup v1 keeps a frozen process alive, so
    /// it is moved to the cgroup above, where it handles the signal.
    pub(crate) fn let_die(&self, pids: &[u32]) {
        kill::let_die(self, pids);
    }

    /// The kernel's count of OOM kills in it. `None` if it cannot be read (any more).
    pub(crate) fn oom_kills(&self) -> Option<u64> {
        match self {
            Self::None => None,
            // v1 counts for each folder separately.
            Self::V1(folders) => {
                let folder = folders.get("memory")?;
                files::read(folder, "memory.oom_control")?;
                let mut kills = 0;
                files::each_below(folder, &mut |folder| {
                    kills += files::read(folder, "memory.oom_control").map_or(0, |text| files::value(&text, "oom_kill"));
                });
                Some(kills)
            }
            Self::V2(folder) => files::read(folder, "memory.events").map(|text| files::value(&text, "oom_kill")),
        }
    }

    /// Watches for OOM kills. Start the watch first, then read [`Cgroup::oom_kills`]: so none is missed.
    ///
    /// Must be called within a tokio runtime with I/O and time enabled.
    pub(crate) fn watch_oom(&self) -> Result<OomWatch, CgroupError> {
        match self {
            Self::None => Err(CgroupError::NoMemory),
            Self::V1(folders) => OomWatch::begin_v1(folders.get("memory").ok_or(CgroupError::NoMemory)?),
            Self::V2(folder) => OomWatch::begin_v2(folder),
        }
    }

    /// The folder whose list of processes is read.
    fn processes(&self) -> Option<&Path> {
        match self {
            Self::None => None,
            Self::V1(folders) => V1_WITH_PROCESSES.iter().find_map(|name| folders.get(*name)).or_else(|| folders.values().next()),
            Self::V2(folder) => Some(folder),
        }
        .map(PathBuf::as_path)
    }
}

/// Every process of a container is in each of them; the first is the freezer.
const V1_WITH_PROCESSES: [&str; 6] = ["freezer", "pids", "devices", "memory", "cpu", "systemd"];

const V1_METRICS: &str = "io.containerd.cgroups.v1.Metrics";
const V2_METRICS: &str = "io.containerd.cgroups.v2.Metrics";

#[cfg(test)]
mod tests;
