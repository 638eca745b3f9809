//! CPU priority of threads.
#![allow(unsafe_code)]

use std::io;

use nix::errno::Errno;
use nix::libc;

/// Has calls go before what this thread does from now on, until it ends: only a privileged process could take that back. One that is behind
/// them already, as all of a daemon that was started with nice, stays where it is.
///
/// Source: setpriority(2); on Linux a thread has its own.
pub(crate) fn lower() -> io::Result<()> {
    // SAFETY: the call takes integers; 0 is the calling thread.
    let now = unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) };
    // -1 may be an error too: both are less
    if now >= BELOW_CALLS {
        return Ok(());
    }
    // SAFETY: as above.
    let lowered = unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, BELOW_CALLS) };
    Errno::result(lowered).map(drop).map_err(Into::into)
}

/// A tenth of the time that a thread of a call gets, if both want all of it.
const BELOW_CALLS: libc::c_int = 10;
