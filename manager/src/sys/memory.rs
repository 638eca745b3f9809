//! The allocator.
#![allow(unsafe_code)]

#[cfg(target_env = "gnu")]
use nix::libc;

/// Has the allocator keep few arenas and give large free blocks back at once.
pub(crate) fn keep_little() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the calls take integers and set bounds of the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
    }
}

/// Gives every free page back to the kernel.
pub(crate) fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes an integer, and the allocator locks what it looks at.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// What the allocator has as its bounds at the beginning.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: libc::c_int = 128 << 10;
