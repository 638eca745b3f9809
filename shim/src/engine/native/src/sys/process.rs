//! Processes: birth, descriptors, signals, limits, execution.
#![allow(unsafe_code)]
use std::ffi::{CStr, CString};
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::ptr;

use super::check;

/// The two sides of [`clone_into`].
pub(crate) enum Born {
    Child,
    Parent { pid: u32, pidfd: OwnedFd },
}

/// clone3(2) without shared memory: a child of the caller's *parent*, in the new namespaces of `flags`, and in `cgroup` (v2) from the beginning.
///
/// Must be called by a process with one thread only: the child goes on with a copy of its memory.
pub(crate) fn clone_into(flags: u64, cgroup: Option<BorrowedFd<'_>>) -> io::Result<Born> {
    let mut pidfd: i32 = -1;
    // SAFETY: a structure of integers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    // The signal at exit is inherited with the parent.
    arguments.flags = flags | libc::CLONE_PARENT as u64 | libc::CLONE_PIDFD as u64;
    arguments.pidfd = &raw mut pidfd as u64;
    if let Some(cgroup) = &cgroup {
        arguments.flags |= CLONE_INTO_CGROUP;
        arguments.cgroup = cgroup.as_raw_fd() as u64;
    }
    // SAFETY: no memory is shared and no stack given, so the child returns like fork(2)'s. The process has one thread, so no lock is
    // held by another.
    match check(unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) })? {
        0 => Ok(Born::Child),
        // SAFETY: the kernel has stored a new descriptor there.
        pid => Ok(Born::Parent { pid: pid as u32, pidfd: unsafe { OwnedFd::from_raw_fd(pidfd) } }),
    }
}

/// The two sides of [`fork_into`].
pub(crate) enum Forked {
    Child,
    Parent { pid: u32 },
}

/// fork(2) into the new namespaces of `flags`. As [`clone_into`], but for a child of the caller's own.
pub(crate) fn fork_into(flags: u64) -> io::Result<Forked> {
    // SAFETY: a structure of integers.
    let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
    arguments.flags = flags;
    arguments.exit_signal = libc::SIGCHLD as u64;
    // SAFETY: as in `clone_into`.
    match check(unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>()) })? {
        0 => Ok(Forked::Child),
        pid => Ok(Forked::Parent { pid: pid as u32 }),
    }
}

/// The pid of a process, by its handle, as the mounted procfs counts.
pub(crate) fn pid_of(process: BorrowedFd<'_>) -> io::Result<u32> {
    let about = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", process.as_raw_fd()))?;
    let pid = about.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
    // −1: it was reaped; 0: it is of another pid namespace.
    pid.filter(|pid| *pid != 0).ok_or_else(|| io::Error::from_raw_os_error(libc::ESRCH))
}

/// Forks, and runs `live` in the child, which exits should it return. Refuses to with EDEADLK if this process has more than one thread.
pub(crate) fn fork(live: impl FnOnce()) -> io::Result<u32> {
    // As any folder, it has two links of its own, and one for each folder in it: one for each thread.
    if std::fs::metadata("/proc/self/task")?.nlink() != 3 {
        return Err(io::Error::from_raw_os_error(libc::EDEADLK));
    }
    // SAFETY: the only thread is the one that calls, so the child may do whatever this process may.
    match check(libc::c_long::from(unsafe { libc::fork() }))? {
        0 => {
            live();
            exit_now(1)
        }
        pid => Ok(pid as u32),
    }
}

/// Has the kernel kill a command's process when this one ends.
pub(crate) fn end_with_this_process(command: &mut Command) {
    let parent = nix::unistd::getpid();
    let tie = move || {
        nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
        // 0: the parent is outside of a pid namespace that its children are born into.
        if [parent.as_raw(), 0].contains(&nix::unistd::getppid().as_raw()) {
            Ok(())
        } else {
            Err(io::Error::from_raw_os_error(libc::ESRCH))
        }
    };
    // SAFETY: system calls alone, on integers.
    unsafe { command.pre_exec(tie) };
}

/// Has a command's process write to files before it executes its program.
pub(crate) fn write_before(command: &mut Command, files: Vec<File>, bytes: &'static [u8]) {
    let write = move || files.iter().try_for_each(|mut file| file.write_all(bytes));
    // SAFETY: system calls alone, on descriptors that are open.
    unsafe { command.pre_exec(write) };
}

/// Has a command's process keep descriptors under their numbers: that process alone, whatever else this one starts.
pub(crate) fn keep_open<'a>(command: &mut Command, descriptors: impl Iterator<Item = &'a OwnedFd>) {
    let numbers: Vec<i32> = descriptors.map(AsRawFd::as_raw_fd).collect();
    let keep = move || {
        numbers.iter().try_for_each(|number| {
            // SAFETY: integers only.
            check(libc::c_long::from(unsafe { libc::fcntl(*number, libc::F_SETFD, 0) })).map(drop)
        })
    };
    // SAFETY: system calls alone, on integers.
    unsafe { command.pre_exec(keep) };
}

/// A handle of a process.
pub(crate) fn open_pidfd(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) })?;
    // SAFETY: a descriptor that the kernel has just given to this process alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A copy of another process's descriptor (pidfd_getfd(2)).
pub(crate) fn fetch(process: BorrowedFd<'_>, number: i32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    let fd = check(unsafe { libc::syscall(libc::SYS_pidfd_getfd, process.as_raw_fd(), number, 0) })?;
    // SAFETY: a descriptor that the kernel has just given to this process alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Signals a process by its handle.
pub(crate) fn signal(process: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    // SAFETY: integers, and no `siginfo`.
    check(unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), signal, ptr::null::<u8>(), 0) })?;
    Ok(())
}

/// Waits at most `milliseconds` until a process has exited; reaps nothing. Whether it has.
pub(crate) fn wait_for_exit(process: BorrowedFd<'_>, milliseconds: u16) -> io::Result<bool> {
    use nix::poll::{PollFd, PollFlags, poll};
    Ok(poll(&mut [PollFd::new(process, PollFlags::POLLIN)], milliseconds)? > 0)
}

/// The streams of this process, without the buffers that the standard library makes for them.
pub(crate) fn streams() -> [BorrowedFd<'static>; 3] {
    // SAFETY: a performer and its child have all three from their beginning to their end, and none of them is owned: see `perform::descriptors`.
    [0, 1, 2].map(|number| unsafe { BorrowedFd::borrow_raw(number) })
}

/// Closes the descriptors from `first` to `last`.
pub(crate) fn close_range(first: u32, last: u32) -> io::Result<()> {
    // SAFETY: the caller gives up every such descriptor and drops none of their owners; see `perform::descriptors`.
    check(unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) })?;
    Ok(())
}

/// A copy of a descriptor, close-on-exec, whose number is `least` or higher.
pub(crate) fn duplicate(fd: &impl AsRawFd, least: i32) -> io::Result<OwnedFd> {
    // SAFETY: integers only.
    let copy = check(libc::c_long::from(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_DUPFD_CLOEXEC, least) }))?;
    // SAFETY: a descriptor that the kernel has just given to this process alone.
    Ok(unsafe { OwnedFd::from_raw_fd(copy as i32) })
}

/// Default dispositions for all signals, those that the C library reserves too, and none blocked.
pub(crate) fn reset_signals() {
    // `struct sigaction` of the kernel: handler, flags, restorer, mask; all zero is the default.
    let default = [0_u64; 4];
    let none_blocked = 0_u64;
    // SAFETY: both structures have the kernel's layout and size and are only read; numbers that may not be changed are refused by the kernel.
    unsafe {
        for signal in 1..=64 {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), ptr::null_mut::<u64>(), size_of_val(&none_blocked));
        }
        libc::syscall(
            libc::SYS_rt_sigprocmask,
            libc::SIG_SETMASK,
            &raw const none_blocked,
            ptr::null_mut::<u64>(),
            size_of_val(&none_blocked),
        );
    }
}

/// Has SIGHUP, SIGINT, SIGQUIT and SIGTERM end this process with status 2, until it executes a program: as they end runc's init before its program.
pub(crate) fn exit_on_signals() {
    extern "C" fn exit(_signal: libc::c_int) {
        // SAFETY: a call that a handler may make; it does not return.
        unsafe { libc::_exit(STATUS_OF_SIGNAL) }
    }
    // SAFETY: all zero is an empty mask and no flags.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = exit as *const () as usize;
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        // SAFETY: the structure is valid for the time of the call; these four can be handled.
        unsafe { libc::sigaction(signal, &raw const action, ptr::null_mut()) };
    }
}

/// Of a program written in Go that a signal ends where the kernel would not.
const STATUS_OF_SIGNAL: i32 = 2;

/// Sets a limit of another process.
pub(crate) fn set_rlimit(pid: u32, resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit64 { rlim_cur: soft, rlim_max: hard };
    // SAFETY: the new limit is read during the call, the old one not asked for.
    check(unsafe { libc::syscall(libc::SYS_prlimit64, pid, resource, &raw const limit, ptr::null_mut::<libc::rlimit64>()) })?;
    Ok(())
}

/// Whether the effective user may execute a file.
pub(crate) fn may_execute(path: &CStr) -> io::Result<()> {
    // SAFETY: a valid string for the time of the call.
    check(unsafe { libc::syscall(libc::SYS_faccessat2, libc::AT_FDCWD, path.as_ptr(), libc::X_OK, libc::AT_EACCESS) })?;
    Ok(())
}

/// The working directory as the kernel names it: not absolute if it cannot be reached from the root.
pub(crate) fn current_directory() -> io::Result<Vec<u8>> {
    let read = |bytes: usize| -> io::Result<Vec<u8>> {
        let mut buffer = vec![0_u8; bytes];
        // SAFETY: pointer and length describe the buffer.
        let length = check(unsafe { libc::syscall(libc::SYS_getcwd, buffer.as_mut_ptr(), buffer.len()) })?;
        buffer.truncate((length as usize).saturating_sub(1));
        Ok(buffer)
    };
    match read(MOST_PATHS_BYTES) {
        Err(error) if error.raw_os_error() == Some(libc::ERANGE) => read(libc::PATH_MAX as usize),
        other => other,
    }
}

/// execve(2). Returns only if it failed.
pub(crate) fn execute(program: &CStr, arguments: &[CString], environment: &[CString]) -> io::Error {
    let list =
        |strings: &[CString]| -> Vec<*const libc::c_char> { strings.iter().map(|text| text.as_ptr()).chain([ptr::null()]).collect() };
    let (arguments, environment) = (list(arguments), list(environment));
    // SAFETY: arrays of valid strings that end with null.
    unsafe { libc::execve(program.as_ptr(), arguments.as_ptr(), environment.as_ptr()) };
    io::Error::last_os_error()
}

/// Ends the process if it unwinds: the frames above are copies of another process's, which must not go on twice.
pub(crate) struct ExitOnUnwind;

impl Drop for ExitOnUnwind {
    fn drop(&mut self) {
        exit_now(101);
    }
}

/// Ends the process without destructors and exit handlers: they belong to the process that it was forked from.
pub(crate) fn exit_now(status: i32) -> ! {
    // SAFETY: has no preconditions.
    unsafe { libc::_exit(status) }
}

/// Changes the permissions of what `node` is a handle of: fchmodat2(2), or before Linux 6.6 the link of procfs, which leads to the handle's file.
pub(crate) fn set_mode(node: &OwnedFd, mode: u32) -> io::Result<()> {
    // SAFETY: the path is the empty string.
    let done = check(unsafe { libc::syscall(libc::SYS_fchmodat2, node.as_raw_fd(), c"".as_ptr(), mode, libc::AT_EMPTY_PATH) });
    match done {
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => {
            use std::os::unix::fs::PermissionsExt;
            std::fs::set_permissions(format!("/proc/self/fd/{}", node.as_raw_fd()), std::fs::Permissions::from_mode(mode))
        }
        other => other.map(drop),
    }
}

/// Sets the NIS domain name of the uts namespace.
pub(crate) fn set_domain_name(name: &str) -> io::Result<()> {
    // SAFETY: pointer and length describe the text.
    check(libc::c_long::from(unsafe { libc::setdomainname(name.as_ptr().cast(), name.len()) }))?;
    Ok(())
}

/// Enough for most paths. After a fork each page that is written is a fault.
const MOST_PATHS_BYTES: usize = 256;

const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
