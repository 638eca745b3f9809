//! Kills a child of the keeper together with its descendants.
//!
//! A runtime that dies during a create leaves processes in sessions of their own, which keep running, for instance in a root file
//! system that is unmounted meanwhile. They can be found only while the runtime is still their parent.
use std::collections::BTreeSet;
use std::fs;
use std::os::fd::AsFd;

use nix::libc;
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::sys::process;

/// How often to look for descendants: a fork bomb may start them faster than they are killed.
const MOST_LOOKS: usize = 16;

/// Kills a child that was not reaped, and its descendants.
pub(super) fn kill(child: u32) {
    // Our child and not reaped: the pid is its own. Stopped, it starts no others and stays the parent of its children.
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

/// Adds the descendants of a process, each with its parent, the youngest first. Needs CONFIG_PROC_CHILDREN.
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
    // Compared after the handle was opened: from then on the pid cannot mean another process.
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
