//! Mounts, as far as `nix` lacks them, and loop devices.
#![allow(unsafe_code)]
use std::ffi::{CString, c_ulong};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::libc;

/// Whether `fd` is the root of a mount.
///
/// Errors: Unsupported on kernels that do not report it (before 5.8).
/// Source: statx(2), STATX_ATTR_MOUNT_ROOT.
pub(crate) fn is_mount_root(fd: BorrowedFd<'_>) -> io::Result<bool> {
    // SAFETY: all zeroes is a valid value of this plain C struct.
    let mut about: libc::statx = unsafe { std::mem::zeroed() };
    // SAFETY: the empty path makes the call look at the descriptor, borrowed for the call; it writes one statx to the pointer.
    let result = unsafe { libc::statx(fd.as_raw_fd(), c"".as_ptr(), libc::AT_EMPTY_PATH, 0, &raw mut about) };
    Errno::result(result)?;
    let mask = libc::STATX_ATTR_MOUNT_ROOT as u64;
    if about.stx_attributes_mask & mask == 0 {
        return Err(io::ErrorKind::Unsupported.into());
    }
    Ok(about.stx_attributes & mask != 0)
}

/// Sets the label of SELinux's that a file has.
///
/// Source: setxattr(2), `security.selinux`.
pub(crate) fn set_selinux_label(path: &Path, label: &str) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: both texts end with a zero and are valid for the call; pointer and length describe the label.
    let result = unsafe { libc::lsetxattr(path.as_ptr(), c"security.selinux".as_ptr(), label.as_ptr().cast(), label.len(), 0) };
    Ok(Errno::result(result).map(drop)?)
}

/// A block device over a file. The kernel removes it once it is neither open nor mounted.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    pub(crate) path: PathBuf,
    _open: File,
}

/// Makes a loop device over `file`.
///
/// Source: loop(4), LOOP_CONFIGURE, Linux ≥ 5.8.
pub(crate) fn attach_loop(file: &File, read_only: bool, direct: bool) -> io::Result<LoopDevice> {
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    for _ in 0..ATTEMPTS {
        // SAFETY: the call takes no argument and gives a number.
        let number = Errno::result(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) })?;
        let path = PathBuf::from(format!("/dev/loop{number}"));
        let device = OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_CLOEXEC).open(&path)?;
        match configure(device.as_fd(), file, read_only, direct) {
            Ok(()) => return Ok(LoopDevice { path, _open: device }),
            // Another process got the same number.
            Err(Errno::EBUSY) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EBUSY.into())
}

fn configure(device: BorrowedFd<'_>, file: &File, read_only: bool, direct: bool) -> Result<(), Errno> {
    let flags = LO_FLAGS_AUTOCLEAR | if read_only { LO_FLAGS_READ_ONLY } else { 0 } | if direct { LO_FLAGS_DIRECT_IO } else { 0 };
    let info = LoopInfo { numbers: [0; 5], number: 0, encrypt_type: 0, encrypt_key_size: 0, flags, names: [0; 22] };
    let config = LoopConfig { fd: file.as_raw_fd() as u32, block_size: 0, info, reserved: [0; 8] };
    // SAFETY: the kernel reads one loop_config from the pointer, which is valid for the call and as long as the kernel's.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) };
    Errno::result(result).map(drop)
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// `struct loop_info64` of linux/loop.h. Only the flags are used here.
#[repr(C)]
struct LoopInfo {
    /// Device, inode, device of the inode, offset, size limit.
    numbers: [u64; 5],
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    /// Two names, a key, two initial values.
    names: [u64; 22],
}

const LOOP_CTL_GET_FREE: c_ulong = 0x4C82;
const LOOP_CONFIGURE: c_ulong = 0x4C0A;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
/// How often another process may take the free number first.
const ATTEMPTS: u32 = 100;
