//! Kills every process of a cgroup.
//!
//! **Invariant:** a signal goes through a pidfd of a process that was in the cgroup after the pidfd was opened, so a reused pid
//! never hits another process.
use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::Path;

use nix::libc;

use super::{Cgroup, CgroupError, files};
use crate::sys;

/// See [`Cgroup::kill_all`].
pub(super) fn kill_all(cgroup: &Cgroup) -> Result<(), CgroupError> {
    let (unified, freezer) = match cgroup {
        Cgroup::None => return Ok(()),
        Cgroup::V1(folders) => (folders.get("unified"), folders.get("freezer")),
        Cgroup::V2(folder) => (Some(folder), None),
    };
    // One write, since Linux 5.14. Processes of a v1 container need not all be in its unified folder.
    let is_done = unified.is_some_and(|folder| fs::write(folder.join("cgroup.kill"), "1").is_ok());
    if is_done && matches!(cgroup, Cgroup::V2(_)) {
        return Ok(());
    }
    let Some(folder) = cgroup.processes() else { return Ok(()) };
    let mut killed = BTreeSet::new();
    let mut left = 0;
    for _ in 0..MAX_ROUNDS {
        // Stopped processes do not fork. Frozen processes of v1 die once they are thawed; those of v2 at once.
        if let Some(freezer) = freezer {
            // Without a freezer the rounds must be faster than the forks.
            let _ = fs::write(freezer.join(V1_STATE), "FROZEN");
        }
        let round = kill_once(folder, &mut killed);
        thaw(cgroup);
        left = round?;
        if left == 0 {
            return Ok(());
        }
    }
    Err(CgroupError::KeepAppearing { path: folder.to_owned(), left })
}

/// Signals those that have not been signalled yet, and returns their number.
fn kill_once(folder: &Path, killed: &mut BTreeSet<u32>) -> Result<usize, CgroupError> {
    let handles: Vec<_> = files::pids_below(folder)
        .into_iter()
        .filter(|pid| !killed.contains(pid))
        .filter_map(|pid| Some((pid, sys::process::open(pid).ok()?)))
        .collect();
    if handles.is_empty() {
        return Ok(0);
    }
    let still: BTreeSet<u32> = files::pids_below(folder).into_iter().collect();
    let mut count = 0;
    for (pid, handle) in handles.iter().filter(|(pid, _)| still.contains(pid)) {
        match sys::process::signal(handle.as_fd(), libc::SIGKILL) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(signal_error(*pid, error)),
            Ok(()) | Err(_) => {}
        }
        killed.insert(*pid);
        count += 1;
    }
    Ok(count)
}

fn signal_error(pid: u32, source: io::Error) -> CgroupError {
    CgroupError::Io { op: "send SIGKILL to", path: format!("/proc/{pid}").into(), source }
}

/// See [`Cgroup::thaw`].
pub(super) fn thaw(cgroup: &Cgroup) {
    let (folder, file, thawed) = match cgroup {
        Cgroup::None => return,
        Cgroup::V1(folders) => (folders.get("freezer"), V1_STATE, "THAWED"),
        Cgroup::V2(folder) => (Some(folder), "cgroup.freeze", "0"),
    };
    if let Some(folder) = folder {
        // Parents first: a cgroup cannot thaw below a frozen one.
        files::each_below(folder, &mut |folder| drop(fs::write(folder.join(file), thawed)));
    }
}

/// See [`Cgroup::let_die`].
pub(super) fn let_die(cgroup: &Cgroup, pid: u32) {
    let Cgroup::V1(folders) = cgroup else { return };
    let Some(folder) = folders.get("freezer") else { return };
    let is_below = files::pids_below(folder).contains(&pid);
    let is_frozen = files::any_below(folder, |folder| files::read(folder, V1_STATE).is_some_and(|state| state.trim() != "THAWED"));
    if let (true, true, Some(above)) = (is_below, is_frozen, folder.parent()) {
        let _ = fs::write(above.join("cgroup.procs"), pid.to_string());
    }
}

/// The file of cgroup v1's freezer.
const V1_STATE: &str = "freezer.state";

/// How often new processes may appear. Stopped ones fork none, so two rounds are the rule.
const MAX_ROUNDS: usize = 1000;
