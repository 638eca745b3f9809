//! The descendants of an exec: also those that have left their parents and their session, and that ignore signals.
//!
//! Owns how they are found among the processes of the container, and how all of them are signalled.
//!
//! ```text
//!  processes of the cgroup ─▶ descendants among them ─▶ stopped ─┐
//!         ▲                                                      │ until there is no new one, and none has exited unseen
//!         └───── cgroup frozen, if they start others faster ◀────┘ then: killed, the youngest first
//! ```
//!
//! A descendant is known by its time namespace, which the native engine makes for each exec. Where there is none, by the session that
//! the exec leads, and by the exec's pipes as its standard streams. A process whose parent is a descendant is one in any case.
//!
//! **Invariant:** a signal goes through a handle of a process whose start time was compared after the handle was opened, so a reused pid
//! never hits another process. Nothing is recorded: an exec takes up no memory for this before it is killed.
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::path::PathBuf;

use nix::libc;

use crate::cgroup::{Cgroup, Frozen};
use crate::processes::Stat;
use crate::sys;

/// An exec that runs, and by what its descendants are known.
#[derive(Debug)]
pub(crate) struct Descendants {
    cgroup: Cgroup,
    exec: Identity,
    /// The other processes that the container's record names: never signalled.
    spared: BTreeSet<u32>,
    mark: Mark,
}

/// A process, for ever: its pid and when it was started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) pid: u32,
    /// In clock ticks since the boot.
    pub(crate) start_time: u64,
}

/// What the descendants have in common.
#[derive(Debug)]
enum Mark {
    /// A time namespace that neither the container's init nor the shim is in.
    Clock(PathBuf),
    Traces {
        leads_session: bool,
        pipes: BTreeSet<PathBuf>,
    },
}

/// Those that were found, in the order in which they were.
#[derive(Debug, Default)]
struct Found {
    order: Vec<Identity>,
    start_times: BTreeMap<u32, u64>,
    /// Other processes that had exited when they were looked at.
    exited: BTreeSet<u32>,
}

/// What one look at the processes has shown.
#[derive(Debug)]
struct Look {
    new: Vec<Identity>,
    /// Whether none that was listed had exited before it was looked at: it may have started another one after the list was read.
    is_complete: bool,
}

impl Identity {
    /// Of the process `pid`, if it runs.
    pub(crate) fn of(pid: u32) -> Option<Self> {
        Stat::of(pid).filter(Stat::is_running).map(|stat| Self { pid, start_time: stat.start_time })
    }

    /// Signals it. That it has exited is a success.
    fn signal(self, signal: i32) -> io::Result<()> {
        let sent = || {
            let handle = sys::process::open(self.pid)?;
            match Stat::of(self.pid) {
                Some(stat) if stat.start_time == self.start_time => sys::process::signal(handle.as_fd(), signal),
                _ => Ok(()),
            }
        };
        match sent() {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            other => other,
        }
    }
}

impl Descendants {
    /// Of `exec`, in the container whose init is `init`.
    pub(crate) fn blocking_of(exec: Identity, init: Option<u32>, spared: BTreeSet<u32>, cgroup: Cgroup) -> Self {
        Self { mark: Mark::blocking_of(exec.pid, init), cgroup, exec, spared }
    }

    /// Signals each of them once, and returns how many there are.
    pub(crate) fn blocking_signal(&self, signal: i32) -> io::Result<usize> {
        let all = self.blocking_look(&mut Found::default()).new;
        all.iter().try_for_each(|process| process.signal(signal))?;
        Ok(all.len())
    }

    /// Stops the exec, then kills every descendant, frozen or not. Returns how many there were, and does not wait for their exits.
    ///
    /// Errors: EBUSY if they start others faster than they can be stopped, in a cgroup that cannot be frozen.
    pub(crate) fn blocking_kill(&self) -> io::Result<usize> {
        let (mut found, mut frozen) = (Found::default(), None);
        // What is stopped starts no other, and stays the parent of its children.
        let stopped = self.exec.signal(libc::SIGSTOP).and(self.blocking_rounds(&mut found, libc::SIGSTOP, &mut frozen));
        // Children before parents: the kernel wakes the stopped children of a parent that exits.
        let killed = found.order.iter().rev().map(|process| process.signal(libc::SIGKILL)).fold(Ok(()), io::Result::and);
        // One that another process has woken in between.
        let escaped = self.blocking_rounds(&mut found, libc::SIGKILL, &mut frozen);
        drop(frozen);
        self.cgroup.let_die(&found.order.iter().map(|process| process.pid).collect::<Vec<_>>());
        stopped.and(killed).and(escaped).map(|()| found.order.len())
    }

    /// Signals every descendant that is not in `found` yet, until a complete look shows no new one: a process with a pending signal starts no
    /// other.
    fn blocking_rounds(&self, found: &mut Found, signal: i32, frozen: &mut Option<Frozen>) -> io::Result<()> {
        let mut failure = None;
        for round in 0..MAX_ROUNDS {
            if round == ROUNDS_BEFORE_FREEZE && frozen.is_none() {
                *frozen = self.cgroup.freeze();
            }
            let look = self.blocking_look(found);
            let is_as_good_as_can_be = look.is_complete || round > ROUNDS_BEFORE_FREEZE && frozen.is_none();
            if look.new.is_empty() && is_as_good_as_can_be {
                return Ok(());
            }
            for process in look.new {
                match process.signal(signal) {
                    Ok(()) => found.add(process),
                    // Without a free descriptor, for instance: it is found again.
                    Err(error) => failure = Some(error),
                }
            }
        }
        Err(failure.unwrap_or_else(|| io::Error::from_raw_os_error(libc::EBUSY)))
    }

    /// The descendants that are not in `found`, of which only those are changed that had exited.
    fn blocking_look(&self, found: &mut Found) -> Look {
        // The exec may have been killed by another process, and its pid reused.
        let is_same = Identity::of(self.exec.pid) == Some(self.exec);
        let mut family: BTreeSet<u32> = is_same.then_some(self.exec.pid).into_iter().collect();
        let (mut others, mut is_complete) = (Vec::new(), true);
        for pid in self.candidates().into_iter().filter(|pid| *pid != self.exec.pid && !self.spared.contains(pid)) {
            let Some(stat) = Stat::of(pid).filter(Stat::is_running) else {
                // What was signalled, or had exited before the list was read, has started no other.
                let is_known = found.start_times.contains_key(&pid) || !found.exited.insert(pid);
                is_complete &= is_known;
                continue;
            };
            let process = Identity { pid, start_time: stat.start_time };
            if found.contains(process) {
                family.insert(pid);
            } else {
                let is_marked = self.mark.blocking_is_on(pid, stat.session, is_same.then_some(self.exec.pid));
                others.push((process, stat.parent, is_marked));
            }
        }
        let mut new = Vec::new();
        loop {
            let before = new.len();
            others.retain(|(process, parent, is_marked)| {
                let is_one = *is_marked || family.contains(parent);
                if is_one {
                    family.insert(process.pid);
                    new.push(*process);
                }
                !is_one
            });
            if new.len() == before {
                return Look { new, is_complete };
            }
        }
    }

    /// Every process of the container; of the host, if the container has no cgroup of its own.
    fn candidates(&self) -> Vec<u32> {
        if self.cgroup != Cgroup::default() {
            return self.cgroup.pids();
        }
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }
}

impl Mark {
    fn blocking_of(exec: u32, init: Option<u32>) -> Self {
        let clock = |process: &str| fs::read_link(format!("/proc/{process}/ns/time")).ok();
        let inits = init.and_then(|init| clock(&init.to_string()));
        // An exec that an OCI runtime or an earlier build has made is in the same one as init.
        if let (Some(own), Some(inits)) = (clock(&exec.to_string()), inits)
            && own != inits
            && Some(&own) != clock("self").as_ref()
        {
            return Self::Clock(own);
        }
        // The exec may be the member of another's session.
        let leads_session = Stat::of(exec).is_some_and(|stat| stat.session == exec);
        Self::Traces { leads_session, pipes: blocking_pipes(exec) }
    }

    /// Whether the process `pid` has it. `leader` is the exec, as long as it runs.
    fn blocking_is_on(&self, pid: u32, session: u32, leader: Option<u32>) -> bool {
        match self {
            Self::Clock(clock) => fs::read_link(format!("/proc/{pid}/ns/time")).is_ok_and(|own| own == *clock),
            Self::Traces { leads_session, pipes } => {
                *leads_session && Some(session) == leader || !pipes.is_empty() && !blocking_pipes(pid).is_disjoint(pipes)
            }
        }
    }
}

/// The pipes among the standard streams of a process. The links are read and not followed: a file may be on a disk that hangs.
fn blocking_pipes(pid: u32) -> BTreeSet<PathBuf> {
    let streams = (0..3).filter_map(|number| fs::read_link(format!("/proc/{pid}/fd/{number}")).ok());
    streams.filter(|stream| stream.as_os_str().as_encoded_bytes().starts_with(b"pipe:[")).collect()
}

impl Found {
    fn add(&mut self, process: Identity) {
        self.order.push(process);
        self.start_times.insert(process.pid, process.start_time);
    }

    fn contains(&self, process: Identity) -> bool {
        self.start_times.get(&process.pid) == Some(&process.start_time)
    }
}

/// How often new ones may appear. With a cgroup that was frozen, only those that were born before do.
const MAX_ROUNDS: usize = 200;
/// Those of an ordinary program are found in two.
const ROUNDS_BEFORE_FREEZE: usize = 5;

#[cfg(test)]
mod tests {
    use std::io::{BufRead as _, BufReader};
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A shell that leads a session, and the pids that its script prints.
    fn exec(script: &str, count: usize) -> (Child, Vec<u32>) {
        // The child leads no group, so the program makes no process for the session.
        let mut command = Command::new("setsid");
        command.args(["sh", "-c", &format!("{script}; exec sleep 1000")]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
        let mut child = command.spawn().expect("setsid can be started");
        let lines = BufReader::new(child.stdout.take().expect("a pipe")).lines();
        let pids = lines.take(count).map(|line| line.expect("a line").parse().expect("a pid")).collect();
        (child, pids)
    }

    fn is_running(pid: u32) -> bool {
        Stat::of(pid).is_some_and(|stat| stat.is_running())
    }

    #[test]
    fn children_and_those_with_the_session_or_an_output_are_killed_and_the_exec_is_stopped() {
        let script = "trap '' HUP TERM; sleep 1000 & echo $!; (sleep 1000 & echo $!); (setsid sh -c 'echo $$; exec sleep 1000' &)";
        let (mut shell, pids) = exec(script, 3);
        let (mut other, others) = exec("sleep 1000 & echo $!", 1);
        let own = Identity::of(shell.id()).expect("it runs");
        let descendants = Descendants::blocking_of(own, None, BTreeSet::new(), Cgroup::default());
        assert_eq!(descendants.blocking_kill().expect("a kill"), 3);
        for pid in pids {
            scratch::eventually("a descendant is dead", || !is_running(pid));
        }
        assert!(is_running(shell.id()) && is_running(other.id()) && is_running(others[0]));
        for child in [&mut shell, &mut other] {
            child.kill().expect("a signal");
            child.wait().expect("a child");
        }
        others.iter().for_each(|pid| Identity::of(*pid).expect("it runs").signal(libc::SIGKILL).expect("a signal"));
    }

    #[test]
    fn one_that_has_exited_unseen_makes_another_look_necessary() {
        let folder = scratch::Folder::new("descendants");
        let mut gone = Command::new("true").spawn().expect("true can be started");
        gone.wait().expect("a child");
        std::fs::write(folder.join("cgroup.procs"), format!("{}\n", gone.id())).expect("a file");
        let (mut shell, _) = exec(":", 0);
        let own = Identity::of(shell.id()).expect("it runs");
        let descendants = Descendants::blocking_of(own, None, BTreeSet::new(), Cgroup::V2(folder.to_path_buf()));
        let mut found = Found::default();
        assert!(!descendants.blocking_look(&mut found).is_complete, "it may have started another one");
        assert!(descendants.blocking_look(&mut found).is_complete, "it had exited before");
        shell.kill().expect("a signal");
        shell.wait().expect("a child");
    }

    #[test]
    fn spared_processes_and_other_owners_of_a_pid_get_no_signal() {
        let (mut shell, pids) = exec("sleep 1000 & echo $!; sleep 1000 & echo $!", 2);
        let own = Identity::of(shell.id()).expect("it runs");
        let descendants = Descendants::blocking_of(own, None, [pids[0]].into(), Cgroup::default());
        let former = Identity { start_time: own.start_time - 1, ..own };
        former.signal(libc::SIGKILL).expect("nothing to do");
        assert_eq!(descendants.blocking_signal(libc::SIGKILL).expect("a signal"), 1);
        scratch::eventually("the other is dead", || !is_running(pids[1]));
        assert!(is_running(pids[0]) && is_running(own.pid));
        Identity::of(pids[0]).expect("it runs").signal(libc::SIGKILL).expect("a signal");
        shell.kill().expect("a signal");
        shell.wait().expect("a child");
    }
}
