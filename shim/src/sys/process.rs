//! Processes: pidfds, signals and exits.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;

/// Opens a pidfd, which stays with its process when the pid is reused.
///
/// Source: pidfd_open(2), Linux ≥ 5.3.
pub(crate) fn open(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: the call takes two integers and gives a new descriptor or -1.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    let number = Errno::result(result)?;
    // SAFETY: the kernel has just made this descriptor; it is close-on-exec by itself.
    Ok(unsafe { OwnedFd::from_raw_fd(number as i32) })
}

/// Sends a signal through a pidfd. Any number that the kernel takes, real-time ones included.
///
/// Errors: ESRCH once the process was reaped; EINVAL for no signal.
pub(crate) fn signal(process: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    // SAFETY: a null siginfo makes the kernel fill it as kill(2) does; the descriptor is borrowed for the call.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), number, std::ptr::null::<libc::siginfo_t>(), 0) };
    Errno::result(result)?;
    Ok(())
}

/// The CPU time of a process; zero if it does not exist.
pub(crate) fn cpu_time(pid: u32) -> Duration {
    let clock = nix::time::clock_getcpuclockid(nix::unistd::Pid::from_raw(pid as i32));
    clock.and_then(nix::time::clock_gettime).map_or(Duration::ZERO, Duration::from)
}

/// A child that has exited and is still a zombie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) pid: u32,
    /// 0–255, or 128 + signal number.
    pub(crate) status: u32,
}

/// Looks for an exited child, `pid` or any, and leaves it a zombie.
///
/// Errors: ECHILD if there is no such child at all.
pub(crate) fn peek(pid: Option<u32>) -> io::Result<Option<Ended>> {
    wait(pid, libc::WNOWAIT)
}

/// Waits until a child has exited, and reaps it.
pub(crate) fn wait_for(pid: u32) -> io::Result<()> {
    nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid as i32), None)?;
    Ok(())
}

/// Reaps a zombie that [`peek`] has shown.
pub(crate) fn reap(pid: u32) -> io::Result<Option<Ended>> {
    wait(Some(pid), 0)
}

/// waitid(2) itself: nix turns a death by a real-time signal into an error.
fn wait(pid: Option<u32>, flags: i32) -> io::Result<Option<Ended>> {
    let (kind, id) = pid.map_or((libc::P_ALL, 0), |pid| (libc::P_PID, pid));
    // SAFETY: an all-zero siginfo is a valid value of this plain C struct.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    // SAFETY: waitid writes one siginfo to the pointer, which is valid for the call.
    let result = unsafe { libc::waitid(kind, id, &raw mut info, libc::WEXITED | libc::WNOHANG | libc::__WALL | flags) };
    Errno::result(result)?;
    // SAFETY: waitid filled in the fields of a child's signal, or left pid at 0 if no child has exited.
    let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
    if pid == 0 {
        return Ok(None);
    }
    let status = if info.si_code == libc::CLD_EXITED { status as u32 & 0xff } else { 128 + status as u32 };
    Ok(Some(Ended { pid: pid as u32, status }))
}
