//! Signals to this process: blocked, and read from a descriptor instead.
//!
//! The C library's own calls skip the two signals that it reserves (32 and 33); a stray one of those kills like any other.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use nix::libc;

/// The size of the kernel's set of signals, in bytes.
const SET_BYTES: usize = size_of::<u64>();

/// A signal that was sent to this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Received {
    pub(crate) number: u32,
    /// 0: the kernel, or a process of another pid namespace.
    pub(crate) sender: u32,
}

/// Blocks every signal for this thread and those that it starts, but those in `open`, SIGKILL and SIGSTOP. A CPU exception kills
/// although its signal is blocked.
pub(crate) fn block_all_but(open: &[libc::c_int]) -> io::Result<()> {
    let set = open.iter().fold(u64::MAX, |set, signal| set & !(1 << (signal - 1)));
    // SAFETY: the kernel reads SET_BYTES from a number that lives for the call; the old mask is not asked for.
    let result =
        unsafe { libc::syscall(libc::SYS_rt_sigprocmask, libc::SIG_SETMASK, &raw const set, std::ptr::null_mut::<u64>(), SET_BYTES) };
    Errno::result(result)?;
    Ok(())
}

/// A signalfd for every blocked signal.
pub(crate) fn descriptor() -> io::Result<OwnedFd> {
    let set = u64::MAX;
    let flags = libc::SFD_CLOEXEC | libc::SFD_NONBLOCK;
    // SAFETY: the kernel reads SET_BYTES from a number that lives for the call, and gives a new descriptor or -1.
    let number = Errno::result(unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const set, SET_BYTES, flags) })?;
    // SAFETY: the kernel has just made this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(number as i32) })
}

/// The next pending signal, if any.
pub(crate) fn next(signals: &OwnedFd) -> Option<Received> {
    // SAFETY: an all-zero value is valid for this plain C struct.
    let mut info: libc::signalfd_siginfo = unsafe { std::mem::zeroed() };
    let size = size_of::<libc::signalfd_siginfo>();
    // SAFETY: the kernel writes at most `size` bytes to a value of that size.
    let count = unsafe { libc::read(signals.as_raw_fd(), (&raw mut info).cast(), size) };
    (count == size as isize).then_some(Received { number: info.ssi_signo, sender: info.ssi_pid })
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    #[test]
    fn every_signal_that_can_be_blocked_is_read_from_the_descriptor() {
        thread::spawn(|| {
            block_all_but(&[]).expect("signals can be blocked");
            let signals = descriptor().expect("a descriptor");
            let thread = nix::unistd::gettid().as_raw();
            let pid = std::process::id();
            // children of other tests exit meanwhile
            let own = || std::iter::from_fn(|| next(&signals)).find(|received| received.sender == pid);
            for number in (1..=64).filter(|number| ![libc::SIGKILL, libc::SIGSTOP].contains(number)) {
                // SAFETY: the call takes three integers; the signal is blocked in this thread, which is the one that gets it.
                let sent = unsafe { libc::syscall(libc::SYS_tgkill, pid, thread, number) };
                assert_eq!(sent, 0, "signal {number}");
                // a stop signal drops a pending SIGCONT, and the other way round: each is read before the next is sent
                assert_eq!(own(), Some(Received { number: number as u32, sender: pid }));
            }
            assert_eq!(own(), None);
        })
        .join()
        .expect("the thread is alive");
    }
}
