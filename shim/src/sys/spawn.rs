//! Starts a process with exactly the given descriptors and environment, and a default signal state.
//!
//! **Invariant:** between fork and exec the child allocates nothing, takes no lock, logs nothing and runs no destructor.
#![allow(unsafe_code)]
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use nix::fcntl::OFlag;
use nix::libc;
use nix::unistd::{ForkResult, fork, pipe2};

/// The most descriptors of a new process.
pub(crate) const MAX_DESCRIPTORS: usize = 16;

/// The program to start, with its surroundings.
pub(crate) struct Command<'a> {
    /// Absolute path of the executable.
    pub(crate) program: CString,
    pub(crate) argv: Vec<CString>,
    pub(crate) env: Vec<CString>,
    pub(crate) cwd: CString,
    /// Descriptors of the new process, from 0 upwards, at most [`MAX_DESCRIPTORS`]; `None` is `/dev/null`.
    pub(crate) descriptors: Vec<Option<BorrowedFd<'a>>>,
    /// Kill the new process when this one dies.
    pub(crate) dies_with_parent: bool,
}

impl<'a> Command<'a> {
    /// An executable that is held open, in the root directory. It gets `descriptors` as 3 and upwards, and dies with this process.
    pub(crate) fn of_executable(
        executable: BorrowedFd<'_>,
        argv: Vec<CString>,
        env: Vec<CString>,
        descriptors: &[BorrowedFd<'a>],
    ) -> io::Result<Self> {
        Ok(Self {
            // Resolved by the child, whose descriptors are still a copy of ours then.
            program: CString::new(format!("/proc/self/fd/{}", executable.as_raw_fd()))?,
            argv,
            env,
            cwd: c"/".into(),
            descriptors: [None; 3].into_iter().chain(descriptors.iter().copied().map(Some)).collect(),
            dies_with_parent: true,
        })
    }
}

/// A process that was forked and is about to execute its program.
#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) pid: u32,
    pub(crate) failure: Failure,
}

/// Why a process could not execute its program: a pipe that the process closes by executing it.
#[derive(Debug)]
pub(crate) struct Failure(OwnedFd);

impl Failure {
    /// The error of a process that has ended without executing anything. Does not wait.
    pub(crate) fn error(self) -> Option<io::Error> {
        let mut number = [0; 4];
        File::from(self.0).read_exact(&mut number).ok()?;
        Some(io::Error::from_raw_os_error(i32::from_ne_bytes(number)))
    }
}

impl AsFd for Failure {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl From<OwnedFd> for Failure {
    fn from(pipe: OwnedFd) -> Self {
        Self(pipe)
    }
}

/// Forks and executes. Does not wait until the program runs: a hung file system blocks the child alone.
///
/// Errors: EAGAIN and ENOMEM of fork(2), EMFILE, and E2BIG for too many descriptors.
pub(crate) fn spawn(command: &Command<'_>) -> io::Result<Started> {
    if command.descriptors.len() > MAX_DESCRIPTORS {
        return Err(io::Error::from_raw_os_error(libc::E2BIG));
    }
    let argv: Vec<*const libc::c_char> = command.argv.iter().map(|a| a.as_ptr()).chain([ptr::null()]).collect();
    let env: Vec<*const libc::c_char> = command.env.iter().map(|e| e.as_ptr()).chain([ptr::null()]).collect();
    let null = File::options().read(true).write(true).open("/dev/null")?;
    let mut sources: [RawFd; MAX_DESCRIPTORS] = [-1; MAX_DESCRIPTORS];
    for (slot, descriptor) in sources.iter_mut().zip(&command.descriptors) {
        *slot = descriptor.unwrap_or(null.as_fd()).as_raw_fd();
    }
    let count = command.descriptors.len();
    let (failure, report) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    let parent = std::process::id() as libc::pid_t;
    // SAFETY: the child calls only async-signal-safe functions on data made before the fork (see `execute`), then executes or exits.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Started { pid: child.as_raw() as u32, failure: Failure(failure) }),
        ForkResult::Child => {
            // SAFETY: as above; all pointers stay valid since the child has its own copy of this frame.
            unsafe { execute(command, &argv, &env, &mut sources, count, report.as_raw_fd(), parent) }
        }
    }
}

/// The child's side. Never returns.
///
/// # Safety
/// Only in a fresh child; `argv` and `env` are null-terminated arrays of valid strings.
unsafe fn execute(
    command: &Command<'_>,
    argv: &[*const libc::c_char],
    env: &[*const libc::c_char],
    sources: &mut [RawFd; MAX_DESCRIPTORS],
    count: usize,
    report: RawFd,
    parent: libc::pid_t,
) -> ! {
    // SAFETY: every call here is async-signal-safe and gets integers or pointers to data that outlives it.
    unsafe {
        let fail = |report: RawFd| -> ! {
            let number = *libc::__errno_location();
            libc::write(report, (&raw const number).cast(), size_of::<libc::c_int>());
            libc::_exit(127)
        };
        // A process group, so that a terminal's signals to containerd's group do not arrive. Not a session: the kernel's autogroup would schedule
        // each helper as a stranger to its keeper, which costs milliseconds on a busy machine.
        libc::setpgid(0, 0);
        if command.dies_with_parent {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL as libc::c_ulong, 0, 0, 0);
            if libc::getppid() != parent {
                libc::_exit(127);
            }
        }
        // Moved above the numbers that the program gets, so that none is overwritten before it is used.
        let report = libc::fcntl(report, libc::F_DUPFD_CLOEXEC, count as libc::c_int);
        if report < 0 {
            libc::_exit(127);
        }
        for source in sources.iter_mut().take(count) {
            *source = libc::fcntl(*source, libc::F_DUPFD_CLOEXEC, count as libc::c_int);
            if *source < 0 {
                fail(report);
            }
        }
        for (target, source) in sources.iter().take(count).enumerate() {
            if libc::dup2(*source, target as RawFd) < 0 {
                fail(report);
            }
        }
        // Every other descriptor, those of the keeper included, closes at execve(2).
        if libc::close_range(count as libc::c_uint, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC as libc::c_int) < 0 {
            fail(report);
        }
        // The container would inherit blocked and ignored signals.
        for signal in 1..=64 {
            if signal != libc::SIGKILL && signal != libc::SIGSTOP {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
        let mut empty: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut empty);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const empty, ptr::null_mut());
        if libc::chdir(command.cwd.as_ptr()) < 0 {
            fail(report);
        }
        libc::execve(command.program.as_ptr(), argv.as_ptr(), env.as_ptr());
        fail(report)
    }
}
