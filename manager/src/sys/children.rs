//! Processes that this one starts.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::{CommandExt as _, parent_id};
use std::sync::OnceLock;

use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

/// The soft and the hard limit on open files that this process was started with, once it has raised its own.
static FILES: OnceLock<(rlim_t, rlim_t)> = OnceLock::new();

/// Lets this process open as many files as it may. What it starts with [`restores_open_files`] is not concerned.
pub(crate) fn raise_open_files() -> io::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    // the first time it is raised counts
    let _ = FILES.set((soft, hard));
    Ok(())
}

/// Gives a program the limit on open files that this process was started with: a high soft limit breaks programs that use select(2), or that
/// close everything up to it, and the processes of containers inherit it.
pub(crate) fn restores_open_files(command: &mut std::process::Command) {
    let Some((soft, hard)) = FILES.get().copied() else { return };
    let restore = move || Ok(setrlimit(Resource::RLIMIT_NOFILE, soft, hard)?);
    // SAFETY: between fork and exec the closure makes one system call; it neither allocates, locks nor unwinds.
    unsafe { command.pre_exec(restore) };
}

/// A program, with what it starts, that is killed unless it is [released](Group::release): for one that is to be started in a process group of its own.
///
/// To be dropped before the program is waited for, or its number may be another's.
#[derive(Debug)]
pub(crate) struct Group {
    leader: Option<Pid>,
}

impl Group {
    /// That of a process that has not been waited for.
    pub(crate) fn of(leader: u32) -> Self {
        Self { leader: i32::try_from(leader).ok().map(Pid::from_raw) }
    }

    /// Lets it keep running.
    pub(crate) fn release(mut self) {
        self.leader = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(leader) = self.leader {
            // all of them may have ended
            let _ = killpg(leader, Signal::SIGKILL);
        }
    }
}

/// Has a program die with this process, even by SIGKILL. The programs that it starts in turn are not concerned.
///
/// It must be started from the main thread: the kernel means the thread that started it.
pub(crate) fn die_with_us(command: &mut std::process::Command) {
    let us = std::process::id();
    let die = move || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // too late for the signal
        if parent_id() == us { Ok(()) } else { Err(io::Error::from_raw_os_error(nix::libc::ESRCH)) }
    };
    // SAFETY: between fork and exec the closure makes two system calls; it neither allocates, locks nor unwinds.
    unsafe { command.pre_exec(die) };
}
