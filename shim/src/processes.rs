//! Processes in `/proc`: their state and their descendants.
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;

use nix::libc;
use nix::sys::signal::{self, Signal};
use nix::unistd::Pid;

use crate::sys;

/// The longest line of a process: 52 fields of 20 digits, and a name.
const MOST_LINE_BYTES: usize = 2048;

/// How often to look for descendants: a fork bomb may start them faster than they are killed.
const MOST_LOOKS: usize = 16;

/// The line of a process in `/proc/PID/stat`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stat {
    state: u8,
    pub(crate) parent: u32,
    pub(crate) session: u32,
    /// In clock ticks since the boot.
    pub(crate) start_time: u64,
    /// As wait(2) gives it.
    wait_status: u32,
}

impl Stat {
    /// Of the process `pid`, running or a zombie; absent if there is none.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        // The program's name may be any bytes: a process chooses it, and the kernel cuts it within a character.
        // The kernel gives the line at once.
        let mut line = [0; MOST_LINE_BYTES];
        let count = File::open(format!("/proc/{pid}/stat")).and_then(|mut file| file.read(&mut line)).ok()?;
        Self::parse(&String::from_utf8_lossy(&line[..count]))
    }

    /// Source: proc_pid_stat(5): field 3 is the state, 4 the parent, 6 the session, 22 the start time, 52 the exit status.
    fn parse(line: &str) -> Option<Self> {
        // The name of the program may hold spaces and parentheses.
        let (_, after_name) = line.rsplit_once(')')?;
        let fields: Vec<&str> = after_name.split_ascii_whitespace().collect();
        let field = |number: usize| fields.get(number - 3);
        Some(Self {
            state: *field(3)?.as_bytes().first()?,
            parent: field(4)?.parse().ok()?,
            session: field(6)?.parse().ok()?,
            start_time: field(22)?.parse().ok()?,
            wait_status: field(52)?.parse().ok()?,
        })
    }

    /// Whether it has not exited.
    pub(crate) fn is_running(&self) -> bool {
        !matches!(self.state, b'Z' | b'X')
    }

    /// The exit status of a zombie: 0–255, or 128 + signal number.
    pub(crate) fn exit_status(&self) -> Option<u32> {
        let signal = self.wait_status & 0x7f;
        (self.state == b'Z').then_some(if signal == 0 { self.wait_status >> 8 & 0xff } else { 128 + signal })
    }
}

/// Kills a child that was not reaped, and its descendants.
///
/// A runtime that dies during a create leaves processes in sessions of their own, which keep running, for instance in a root file system
/// that is unmounted meanwhile. They can be found only while the runtime is still their parent.
pub(crate) fn kill_tree(child: u32) {
    // Our child and not reaped: the pid is its own. Stopped, it starts no others and stays the parent of its children.
    let raw = Pid::from_raw(child as i32);
    let _ = signal::kill(raw, Signal::SIGSTOP);
    let mut killed = BTreeSet::new();
    for _look in 0..MOST_LOOKS {
        let mut found = Vec::new();
        collect_descendants(child, &mut found);
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
fn collect_descendants(parent: u32, found: &mut Vec<(u32, u32)>) {
    let Ok(threads) = fs::read_dir(format!("/proc/{parent}/task")) else { return };
    for thread in threads.flatten() {
        let children = fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        for pid in children.split_ascii_whitespace().filter_map(|word| word.parse().ok()) {
            collect_descendants(pid, found);
            found.push((pid, parent));
        }
    }
}

/// Kills a process if it is still a child of `parent`. Returns whether it was.
pub(crate) fn kill_child_of(parent: u32, pid: u32) -> bool {
    let Ok(handle) = sys::process::open(pid) else { return false };
    // Compared after the handle was opened: from then on the pid cannot mean another process.
    Stat::of(pid).is_some_and(|stat| stat.parent == parent) && sys::process::signal(handle.as_fd(), libc::SIGKILL).is_ok()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt as _;
    use std::process::{Child, Command};

    use super::*;

    /// Fields 5 to 52 of a process that has not exited.
    fn line(name: &str, state: char, wait_status: u32) -> String {
        let between = "42 43 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 777 1000 2 18446744073709551615";
        format!("42 ({name}) {state} 7 {between} {} {wait_status}", ["0"; 26].join(" "))
    }

    #[test]
    fn fields_are_found_behind_a_name_with_parentheses() {
        let stat = Stat::parse(&line("a) b (c)", 'S', 0)).expect("whole");
        assert_eq!(stat, Stat { state: b'S', parent: 7, session: 43, start_time: 777, wait_status: 0 });
        assert_eq!((stat.is_running(), stat.exit_status()), (true, None));
        for (wait_status, status) in [(0, 0), (3 << 8, 3), (9, 137), (0x80 | 11, 139)] {
            let stat = Stat::parse(&line("sh", 'Z', wait_status)).expect("whole");
            assert_eq!((stat.is_running(), stat.exit_status()), (false, Some(status)), "{wait_status}");
        }
        assert_eq!(Stat::parse("42 (sh) S 7"), None);
    }

    #[test]
    fn a_process_is_found_though_its_name_is_not_utf_8() {
        let folder = scratch::Folder::new("processes");
        // Its 15th byte begins a character of two.
        let program = folder.join("fifteen-bytes-ü");
        std::os::unix::fs::symlink("/bin/sleep", &program).expect("a link");
        let mut child = Command::new(program).arg0("sleep").arg("1000").spawn().expect("sleep can be started");
        let found = Stat::of(child.id());
        let is_killed = kill_child_of(std::process::id(), child.id());
        let _ = child.kill();
        let _ = child.wait();
        assert!(found.is_some_and(|stat| stat.is_running()), "{found:?}");
        assert!(is_killed);
    }

    #[test]
    fn a_zombie_has_a_status_and_a_reaped_process_has_no_line() {
        let me = Stat::of(std::process::id()).expect("this process has a line");
        assert!(me.is_running());
        let mut child: Child = Command::new("/bin/sh").args(["-c", "exit 3"]).spawn().expect("sh can be started");
        while Stat::of(child.id()).expect("it is not reaped").is_running() {
            std::thread::yield_now();
        }
        let zombie = Stat::of(child.id()).expect("it is not reaped");
        assert_eq!((zombie.parent, zombie.exit_status()), (std::process::id(), Some(3)));
        let _ = child.wait();
        assert_eq!(Stat::of(child.id()), None);
    }
}
