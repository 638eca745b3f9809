//! Starts a process with exactly the given descriptors and environment, and a default signal state.
//!
//! **Invariant:** between fork and exec the child allocates nothing, takes no lock, logs nothing and runs no destructor.
#![allow(unsafe_code)]
use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::ptr;

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::{ForkResult, fork, pipe2};

/// The most descriptors of a new process.
pub(crate) const MAX_DESCRIPTORS: usize = 16;

/// The most namespaces that a new process joins.
pub(crate) const MAX_NAMESPACES: usize = 3;

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
    /// Namespaces that it joins first, at most [`MAX_NAMESPACES`].
    pub(crate) namespaces: Vec<BorrowedFd<'a>>,
}

impl<'a> Command<'a> {
    /// An executable that is held open, in the root directory. It gets `descriptors` as 3 and upwards, and dies with this process.
    pub(crate) fn of_executable(
        executable: BorrowedFd<'_>,
        argv: Vec<CString>,
        env: Vec<CString>,
        descriptors: &[BorrowedFd<'a>],
    ) -> io::Result<Self> {
        debug_assert!(executable.as_raw_fd() as usize >= 3 + descriptors.len(), "another would take the executable's number");
        Ok(Self {
            // Resolved by the child, whose descriptors are still a copy of ours then.
            program: CString::new(format!("/proc/self/fd/{}", executable.as_raw_fd()))?,
            argv,
            env,
            cwd: c"/".into(),
            descriptors: [None; 3].into_iter().chain(descriptors.iter().copied().map(Some)).collect(),
            dies_with_parent: true,
            namespaces: Vec::new(),
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
    let (mut child, failure) = Child::prepare(command)?;
    // SAFETY: the child calls only async-signal-safe functions on data made before the fork, then executes or exits.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => Ok(Started { pid: child.as_raw() as u32, failure }),
        // SAFETY: this is the child, which has its own copy of all that `child` points to.
        ForkResult::Child => unsafe { child.execute() },
    }
}

/// Starts a program and waits until it runs. Returns its pid. Cheaper than [`spawn`], which copies the memory's page tables, and each page that is
/// written to meanwhile. For a process with one thread that has nothing else to do.
///
/// Errors: those of [`spawn`], and those of executing the program.
pub(crate) fn spawn_and_wait(command: &Command<'_>) -> io::Result<u32> {
    let (mut child, failure) = Child::prepare(command)?;
    let mut stack: Vec<u128> = Vec::with_capacity(STACK_BYTES / size_of::<u128>());
    // A handler that runs in the child would change the memory of this process.
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&SigSet::all()), Some(&mut before))?;
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: this process is suspended until the child has executed its program or has exited. So the stack and all that `child` points to are
    // the child's alone for as long as it uses them. Until then it calls only async-signal-safe functions, and writes to nothing else but
    // `errno`. The stack is aligned, and its top is the end of the allocation.
    let result = unsafe { libc::clone(execute, stack.as_mut_ptr().add(stack.capacity()).cast(), flags, (&raw mut child).cast()) };
    let pid = Errno::result(result);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None)?;
    let pid = pid? as u32;
    match failure.error() {
        None => Ok(pid),
        Some(error) => {
            // It has exited.
            let _ = super::process::reap(pid);
            Err(error)
        }
    }
}

/// More than [`Child::execute`] and the calls in it need.
const STACK_BYTES: usize = 16 << 10;

/// The child's side of [`spawn_and_wait`].
extern "C" fn execute(child: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `spawn_and_wait` passes its `Child`, which it does not touch while this runs, in the process that has just been made.
    unsafe { (*child.cast::<Child<'_>>()).execute() }
}

/// All that the child needs, made before it is.
struct Child<'a> {
    command: &'a Command<'a>,
    argv: Vec<*const libc::c_char>,
    env: Vec<*const libc::c_char>,
    /// The descriptors that it gets, from 0 upwards.
    sources: [RawFd; MAX_DESCRIPTORS],
    /// The namespaces that it joins; -1 for none.
    namespaces: [RawFd; MAX_NAMESPACES],
    report: OwnedFd,
    parent: libc::pid_t,
    _null: File,
}

impl<'a> Child<'a> {
    fn prepare(command: &'a Command<'a>) -> io::Result<(Self, Failure)> {
        if command.descriptors.len() > MAX_DESCRIPTORS || command.namespaces.len() > MAX_NAMESPACES {
            return Err(io::Error::from_raw_os_error(libc::E2BIG));
        }
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let mut sources: [RawFd; MAX_DESCRIPTORS] = [-1; MAX_DESCRIPTORS];
        for (slot, descriptor) in sources.iter_mut().zip(&command.descriptors) {
            *slot = descriptor.unwrap_or(null.as_fd()).as_raw_fd();
        }
        let mut namespaces: [RawFd; MAX_NAMESPACES] = [-1; MAX_NAMESPACES];
        for (slot, namespace) in namespaces.iter_mut().zip(&command.namespaces) {
            *slot = namespace.as_raw_fd();
        }
        let (failure, report) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        let child = Self {
            argv: command.argv.iter().map(|argument| argument.as_ptr()).chain([ptr::null()]).collect(),
            env: command.env.iter().map(|entry| entry.as_ptr()).chain([ptr::null()]).collect(),
            command,
            sources,
            namespaces,
            report,
            parent: std::process::id() as libc::pid_t,
            _null: null,
        };
        Ok((child, Failure(failure)))
    }

    /// The child's side. Never returns.
    ///
    /// # Safety
    /// Only in a fresh child.
    unsafe fn execute(&mut self) -> ! {
        let (command, count) = (self.command, self.command.descriptors.len());
        // SAFETY: every call here is async-signal-safe and gets integers or pointers to data that outlives it; `argv` and `env` end with a null.
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
                if libc::getppid() != self.parent {
                    libc::_exit(127);
                }
            }
            // Moved above the numbers that the program gets, so that none is overwritten before it is used.
            let report = libc::fcntl(self.report.as_raw_fd(), libc::F_DUPFD_CLOEXEC, count as libc::c_int);
            if report < 0 {
                libc::_exit(127);
            }
            for namespace in self.namespaces {
                if namespace >= 0 && libc::setns(namespace, 0) < 0 {
                    fail(report);
                }
            }
            for source in self.sources.iter_mut().take(count) {
                *source = libc::fcntl(*source, libc::F_DUPFD_CLOEXEC, count as libc::c_int);
                if *source < 0 {
                    fail(report);
                }
            }
            for (target, source) in self.sources.iter().take(count).enumerate() {
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
            libc::execve(command.program.as_ptr(), self.argv.as_ptr(), self.env.as_ptr());
            fail(report)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn command(program: &str) -> Command<'static> {
        let program = CString::new(program).expect("text");
        let argv = vec![program.clone(), c"1000".into()];
        Command {
            program,
            argv,
            env: Vec::new(),
            cwd: c"/".into(),
            descriptors: vec![None; 3],
            dies_with_parent: true,
            namespaces: Vec::new(),
        }
    }

    #[test]
    fn the_program_runs_as_soon_as_it_was_waited_for() {
        for _ in 0..100 {
            let pid = spawn_and_wait(&command("/bin/sleep")).expect("runs");
            let program = std::fs::read_link(format!("/proc/{pid}/exe"));
            nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid as i32), nix::sys::signal::SIGKILL).expect("is ours");
            while crate::sys::process::reap(pid).expect("is ours").is_none() {
                std::thread::yield_now();
            }
            assert_eq!(program.expect("is there"), std::fs::canonicalize("/bin/sleep").expect("is there"));
        }
    }

    #[test]
    fn a_program_that_cannot_be_executed_is_an_error() {
        let error = |program| spawn_and_wait(&command(program)).expect_err("cannot be executed").kind();
        assert_eq!(error("/no/such/program"), io::ErrorKind::NotFound);
        assert_eq!(error("/etc/passwd"), io::ErrorKind::PermissionDenied);
    }
}
