//! Core scheduling: prctl(PR_SCHED_CORE).
#![allow(unsafe_code)]
use std::io;

use nix::errno::Errno;
use nix::libc;

const PR_SCHED_CORE: libc::c_int = 62;
const PR_SCHED_CORE_CREATE: libc::c_ulong = 1;
/// All threads of the process.
const PIDTYPE_TGID: libc::c_ulong = 1;

/// Gives this process a cookie of its own: from now on only it and its descendants run on the two threads of a core together.
///
/// Errors: EINVAL from a kernel without core scheduling, ENODEV where no core has two threads.
/// Source: prctl(2), PR_SCHED_CORE, Linux ≥ 5.14.
pub(crate) fn create_cookie() -> io::Result<()> {
    // SAFETY: the call takes integers only; 0 is this process.
    let result = unsafe { libc::prctl(PR_SCHED_CORE, PR_SCHED_CORE_CREATE, 0 as libc::c_ulong, PIDTYPE_TGID, 0 as libc::c_ulong) };
    Errno::result(result)?;
    Ok(())
}
