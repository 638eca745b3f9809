//! Processes.
#![allow(unsafe_code)]

use std::io;
use std::os::unix::process::parent_id;

use nix::sys::prctl;
use nix::sys::signal::Signal;
use tokio::process::Command;

/// Has a program die with this process, even by SIGKILL. The programs that it starts in turn are not concerned.
///
/// It must be started from the main thread: the kernel means the thread that started it.
pub(crate) fn die_with_us(command: &mut Command) {
    let us = std::process::id();
    let die = move || {
        prctl::set_pdeathsig(Signal::SIGKILL)?;
        // too late for the signal
        if parent_id() == us { Ok(()) } else { Err(io::Error::from_raw_os_error(nix::libc::ESRCH)) }
    };
    // SAFETY: between fork and exec the closure makes two system calls; it neither allocates, locks nor unwinds.
    unsafe { command.pre_exec(die) };
}
