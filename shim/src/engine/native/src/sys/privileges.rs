//! Ids, capabilities and system call filters of the calling process.
//!
//! Invariant: ids are set for the calling thread, without the C library's way of stopping all threads: the process has one.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use super::check;

/// Changes the supplementary groups.
pub(crate) fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: the pointer and the length describe the slice.
    check(unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) })?;
    Ok(())
}

/// Changes real, effective and saved ids: the group's first.
pub(crate) fn set_ids(uid: u32, gid: u32) -> io::Result<()> {
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_setresgid, gid, gid, gid) })?;
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_setresuid, uid, uid, uid) })?;
    Ok(())
}

/// Whether capabilities survive a change from root to another user.
pub(crate) fn set_keep_capabilities(keep: bool) -> io::Result<()> {
    prctl(libc::PR_SET_KEEPCAPS, u64::from(keep), 0)
}

/// Whether processes of the same user may trace this one and open its descriptors.
pub(crate) fn set_dumpable(dumpable: bool) -> io::Result<()> {
    prctl(libc::PR_SET_DUMPABLE, u64::from(dumpable), 0)
}

/// For good.
pub(crate) fn set_no_new_privileges() -> io::Result<()> {
    prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0)
}

/// The number of the kernel's last capability.
pub(crate) fn last_capability() -> u32 {
    let is_known = |number: u32| {
        // SAFETY: integers only.
        unsafe { libc::prctl(libc::PR_CAPBSET_READ, libc::c_ulong::from(number), 0, 0, 0) >= 0 }
    };
    // Those that the kernel knows are the first of 64.
    let (mut known, mut unknown) = (0, 64);
    while known + 1 < unknown {
        let middle = (known + unknown) / 2;
        if is_known(middle) { known = middle } else { unknown = middle }
    }
    known
}

/// Removes a capability from the bounding set.
pub(crate) fn drop_bounding(number: u32) -> io::Result<()> {
    prctl(libc::PR_CAPBSET_DROP, u64::from(number), 0)
}

/// Empties the ambient set.
pub(crate) fn clear_ambient() -> io::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL as u64, 0)
}

/// Adds a capability to the ambient set.
pub(crate) fn raise_ambient(number: u32) -> io::Result<()> {
    prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_RAISE as u64, u64::from(number))
}

/// Sets the three sets of the calling process, each with bit n for capability n.
pub(crate) fn set_capabilities(effective: u64, permitted: u64, inheritable: u64) -> io::Result<()> {
    #[repr(C)]
    struct Header {
        version: u32,
        pid: i32,
    }
    let header = Header { version: 0x2008_0522, pid: 0 };
    let word = |shift: u32| [effective, permitted, inheritable].map(|set| (set >> shift) as u32);
    let data = [word(0), word(32)];
    // SAFETY: the header's version asks for two triples of 32-bit words, which `data` holds.
    check(unsafe { libc::syscall(libc::SYS_capset, &raw const header, data.as_ptr()) })?;
    Ok(())
}

/// Installs a filter of system calls: `program` holds instructions of 8 bytes, as `struct sock_filter`.
pub(crate) fn load_filter(program: &[u8], flags: u64) -> io::Result<()> {
    install_filter(program, flags).map(drop)
}

/// The same, and returns the descriptor by which another process decides about calls.
pub(crate) fn load_filter_with_listener(program: &[u8], flags: u64) -> io::Result<OwnedFd> {
    let listener = install_filter(program, flags | libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?;
    // SAFETY: a descriptor that the kernel has just given to this process alone.
    Ok(unsafe { OwnedFd::from_raw_fd(listener as i32) })
}

/// Whether the kernel knows flags of filters. No filter is given, which it finds out after it has looked at the flags.
pub(crate) fn has_filter_flag(flags: u64) -> bool {
    let none = std::ptr::null::<libc::sock_fprog>();
    // SAFETY: the kernel reads the filter, which a null pointer makes it refuse.
    let asked = check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags as libc::c_uint, none) });
    asked.is_err_and(|error| error.raw_os_error() == Some(libc::EFAULT))
}

fn install_filter(program: &[u8], flags: u64) -> io::Result<i64> {
    let instructions: Vec<libc::sock_filter> = program
        .as_chunks::<8>()
        .0
        .iter()
        .map(|bytes| libc::sock_filter {
            code: u16::from_ne_bytes([bytes[0], bytes[1]]),
            jt: bytes[2],
            jf: bytes[3],
            k: u32::from_ne_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        })
        .collect();
    let length = u16::try_from(instructions.len()).map_err(|_too_long| io::Error::from_raw_os_error(libc::EINVAL))?;
    let program = libc::sock_fprog { len: length, filter: instructions.as_ptr().cast_mut() };
    // SAFETY: the kernel only reads the instructions, during the call.
    check(unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags as libc::c_uint, &raw const program) })
}

fn prctl(option: libc::c_int, second: u64, third: u64) -> io::Result<()> {
    // SAFETY: each option used here takes integers only.
    check(libc::c_long::from(unsafe { libc::prctl(option, second as libc::c_ulong, third as libc::c_ulong, 0, 0) }))?;
    Ok(())
}
