//! Processes that do something to a container while the tests' keeper does something else. They end with the keeper.
use std::fs::{self, File};
use std::io::{self, IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::sys::signal::{Signal, kill};
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::{Gid, Pid, Uid, pause, pipe2, setresgid, setresuid};
use x_engine::plan::Cgroup;
use x_engine::{control, perform};

use crate::keeper::text;

/// Freezes and thaws a cgroup until a file exists, then writes into another how often, and each error.
pub(crate) fn freeze(cgroup: &Cgroup, until: &Path, report: &Path) -> Result<u32, String> {
    fork(|| {
        let (mut count, mut errors) = (0, String::new());
        while !until.exists() {
            count += 1;
            for act in [control::freeze, control::thaw] {
                if let Err(error) = act(cgroup) {
                    errors += &format!("{error}\n");
                }
            }
        }
        let written = fs::write(report, format!("{count}\n{errors}"));
        i32::from(written.is_err())
    })
}

/// Reads all that there is to read of a cgroup until a file exists.
pub(crate) fn look(cgroup: &Cgroup, until: &Path) -> Result<u32, String> {
    fork(|| {
        while !until.exists() {
            let _ = control::pids(cgroup);
            let _ = control::is_frozen(cgroup);
            let _ = control::bandwidth(cgroup);
            let _ = control::devices(cgroup);
        }
        0
    })
}

/// Kills a process after a while.
pub(crate) fn kill_later(pid: u32, after: Duration) -> Result<u32, String> {
    fork(|| {
        std::thread::sleep(after);
        // It may have exited.
        let _ = kill(Pid::from_raw(pid as i32), Signal::SIGKILL);
        0
    })
}

/// Makes as many keys as a user may have, and keeps them.
pub(crate) fn use_up_keys(user: u32) -> Result<u32, String> {
    let (mut ours, theirs) = pipe2(OFlag::O_CLOEXEC).map(|(ours, theirs)| (File::from(ours), File::from(theirs))).map_err(text)?;
    let pid = fork(|| {
        let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
        let became = setresgid(gid, gid, gid).and_then(|()| setresuid(uid, uid, uid));
        let last = became.map_err(io::Error::from).and_then(|()| (0..MAX_KEYS).try_for_each(add_key));
        let is_full = last.is_err_and(|error| error.raw_os_error() == Some(libc::EDQUOT));
        let _ = (&theirs).write_all(&[u8::from(is_full)]);
        loop {
            pause();
        }
    })?;
    drop(theirs);
    let mut is_full = [0];
    ours.read_exact(&mut is_full).map_err(text)?;
    if is_full == [1] { Ok(pid) } else { Err("the keys of a user are not limited here".to_owned()) }
}

#[allow(unsafe_code, reason = "no wrapper is at hand")]
fn add_key(number: u32) -> io::Result<()> {
    const OF_PROCESS: i32 = -2;
    let name = std::ffi::CString::new(format!("x-{number}"))?;
    // SAFETY: two strings that live as long as the call, one byte to read, and a number.
    let key = unsafe { libc::syscall(libc::SYS_add_key, c"user".as_ptr(), name.as_ptr(), c"x".as_ptr(), 1, OF_PROCESS) };
    if key < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Moves itself to a cgroup, and waits in the kernel for a page that nothing provides: it cannot be frozen.
pub(crate) fn wait_for_page(cgroup: &Path) -> Result<u32, String> {
    fork(|| {
        let waits = || -> io::Result<()> {
            fs::write(cgroup.join("cgroup.procs"), "0")?;
            let (page, _faults) = missing_page()?;
            // Of memory that is read like another process's no signal interrupts it, unless it kills.
            let mut copy = [0];
            let from = [RemoteIoVec { base: page, len: 1 }];
            process_vm_readv(Pid::this(), &mut [IoSliceMut::new(&mut copy)], &from)?;
            Ok(())
        };
        i32::from(waits().is_err())
    })
}

/// The address of a page that its userfaultfd is to provide.
#[allow(unsafe_code, reason = "no wrapper is at hand")]
fn missing_page() -> io::Result<(usize, OwnedFd)> {
    const API: libc::c_ulong = 0xc018_aa3f;
    const REGISTER: libc::c_ulong = 0xc020_aa00;
    const BYTES: usize = 4096;
    let check = |result: libc::c_long| if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) };
    let (mut api, private) = ([0xaa_u64, 0, 0], libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping, of which no Rust object is made; a descriptor that the kernel has just made for this process alone; both structures have the
    // kernel's layout.
    unsafe {
        let page = libc::mmap(std::ptr::null_mut(), BYTES, libc::PROT_READ | libc::PROT_WRITE, private, -1, 0) as usize;
        let faults = OwnedFd::from_raw_fd(check(libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC))? as i32);
        check(libc::ioctl(faults.as_raw_fd(), API, api.as_mut_ptr()).into())?;
        // For pages that are missing.
        let mut register = [page as u64, BYTES as u64, 1, 0];
        check(libc::ioctl(faults.as_raw_fd(), REGISTER, register.as_mut_ptr()).into())?;
        Ok((page, faults))
    }
}

fn fork(act: impl FnOnce() -> i32) -> Result<u32, String> {
    perform::fork(|| std::process::exit(act())).map_err(text)
}

/// More than any limit.
const MAX_KEYS: u32 = 1_000_000;
