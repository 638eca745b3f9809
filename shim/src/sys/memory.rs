//! Returns unused memory to the kernel.
#![allow(unsafe_code)]
use std::time::Duration;

use nix::libc;

/// How long after an activity a process calls [`trim`].
pub(crate) const TRIM_AFTER: Duration = Duration::from_millis(500);

const PAGE_BYTES: usize = 4096;
/// What may be in use below the marker: the rest of its frame, the red zone, and the frame of the call to the kernel.
const IN_USE_BYTES: usize = 1024;
/// The deepest stack that is assumed.
const DEPTH_BYTES: usize = 256 << 10;

/// The allocator's initial bounds.
#[cfg(target_env = "gnu")]
const KEPT_BYTES: libc::c_int = 128 << 10;

/// Returns free pages of the heap and of the stack to the kernel. Otherwise a process that waits for months would hold for
/// ever what its busiest moment took. Only for the main thread, whose stack has room for that depth.
///
/// Never inlined: the marker must be in a frame of its own, and not above the live variables of a caller with a large one.
#[inline(never)]
pub(crate) fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call takes an integer and changes nothing that is in use.
    unsafe {
        libc::malloc_trim(0);
    }
    let marker = 0u8;
    let end = (&raw const marker as usize - IN_USE_BYTES) & !(PAGE_BYTES - 1);
    // SAFETY: memory below the stack pointer, by more than the frames of this call, is unused: the next call writes before it
    // reads. What is not mapped of the range is skipped by the kernel with ENOMEM.
    unsafe {
        libc::madvise((end - DEPTH_BYTES) as *mut libc::c_void, DEPTH_BYTES, libc::MADV_DONTNEED);
    }
}

/// Has the allocator return large free blocks at once, and its threads share one heap. By default it keeps up to twice the largest block that it has ever
/// returned, and each thread has a heap of its own.
pub(crate) fn keep_little() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the calls take integers and set bounds of the allocator.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_MMAP_THRESHOLD, KEPT_BYTES);
        libc::mallopt(libc::M_TRIM_THRESHOLD, KEPT_BYTES);
    }
}

unsafe extern "C" {
    /// Where the program begins in memory, and the end of its code. Defined by the linker.
    static __executable_start: u8;
    static etext: u8;
}

/// Unmaps the pages of code and constants of the program; they come back one by one when touched, from the page
/// cache. For a process that is about to wait for long: mapped pages count as its share of the program, and stay in memory.
pub(crate) fn leave_program() {
    let start = &raw const __executable_start as usize;
    let end = &raw const etext as usize & !(PAGE_BYTES - 1);
    // SAFETY: both segments are mapped read-only from the executable's file, which cannot be written while it runs: nothing in them can be
    // lost. The pages of this very function are mapped again on the way back.
    unsafe {
        libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_DONTNEED);
    }
}
