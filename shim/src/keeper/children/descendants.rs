//! A child of the keeper and what it has started.
//!
//! A runtime that dies in the middle of a create leaves processes in sessions of their own, which go on with what they were told until they
//! look for it: in a root file system that is unmounted meanwhile, say. They have to be found while it is still their parent.
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;

use nix::libc;
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::sys::process;

/// What starts others faster than it is found and killed, is left after so many looks.
const MOST_LOOKS: usize = 16;

/// Kills a child that was not reaped, and its descendants.
pub(super) fn kill(child: u32) {
    // Our child and not reaped: the number is its own. Stopped it starts no others, and stays the parent of those that it has.
    let raw = Pid::from_raw(child as i32);
    let _ = signal::kill(raw, Signal::SIGSTOP);
    let mut killed = BTreeSet::new();
    for _look in 0..MOST_LOOKS {
        let mut found = Vec::new();
        collect(child, &mut found);
        found.retain(|(pid, _)| killed.insert(*pid));
        if found.is_empty() {
            break;
        }
        for (pid, parent) in found {
            kill_child_of(parent, pid);
        }
    }
    let _ = signal::kill(raw, Signal::SIGKILL);
}

/// Adds the descendants of a process, each with its parent, the youngest first. Linux tells of them only with CONFIG_PROC_CHILDREN.
fn collect(parent: u32, found: &mut Vec<(u32, u32)>) {
    let Ok(threads) = fs::read_dir(format!("/proc/{parent}/task")) else { return };
    for thread in threads.flatten() {
        let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for pid in children.split_ascii_whitespace().filter_map(|word| word.parse().ok()) {
            collect(pid, found);
            found.push((pid, parent));
        }
    }
}

/// Kills a process if it is still a child of `parent`.
fn kill_child_of(parent: u32, pid: u32) {
    let Ok(handle) = process::open(pid) else { return };
    // Compared after the handle was opened: from then on the number cannot come to mean another.
    if parent_of(pid) == Some(parent) {
        let _ = process::signal(handle.as_fd(), libc::SIGKILL);
    }
}

/// Field 4 of `/proc/PID/stat`.
fn parent_of(pid: u32) -> Option<u32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(1)?.parse().ok()
}
