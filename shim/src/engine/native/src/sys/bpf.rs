//! Programs of cgroup v2 that are asked about devices.
#![allow(unsafe_code)]
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use super::check;

/// Loads a program, and attaches it to a cgroup; it stays as long as the cgroup.
pub(crate) fn attach_device_program(program: &[u8], cgroup: &impl AsRawFd) -> io::Result<()> {
    let license = c"Apache-2.0";
    let load = Load {
        kind: PROGRAM_TYPE_CGROUP_DEVICE,
        instructions: (program.len() / 8) as u32,
        program: program.as_ptr() as u64,
        license: license.as_ptr() as u64,
    };
    // SAFETY: the structure is the beginning of the kernel's `union bpf_attr` for this command; what it points to is valid for the time of the call.
    let loaded = check(unsafe { libc::syscall(libc::SYS_bpf, PROGRAM_LOAD, &raw const load, size_of::<Load>()) })?;
    // SAFETY: a descriptor that the kernel has just given to this process alone.
    let loaded = unsafe { OwnedFd::from_raw_fd(loaded as i32) };
    let attach = Attach {
        cgroup: cgroup.as_raw_fd() as u32,
        program: loaded.as_raw_fd() as u32,
        kind: ATTACH_TYPE_CGROUP_DEVICE,
        flags: ALLOW_MULTI,
    };
    // SAFETY: as above.
    check(unsafe { libc::syscall(libc::SYS_bpf, PROGRAM_ATTACH, &raw const attach, size_of::<Attach>()) })?;
    Ok(())
}

#[repr(C)]
struct Load {
    kind: u32,
    instructions: u32,
    program: u64,
    license: u64,
}

#[repr(C)]
struct Attach {
    cgroup: u32,
    program: u32,
    kind: u32,
    flags: u32,
}

const PROGRAM_LOAD: libc::c_int = 5;
const PROGRAM_ATTACH: libc::c_int = 8;
const PROGRAM_TYPE_CGROUP_DEVICE: u32 = 15;
const ATTACH_TYPE_CGROUP_DEVICE: u32 = 6;
/// Programs of cgroups above and below are asked too.
const ALLOW_MULTI: u32 = 2;
