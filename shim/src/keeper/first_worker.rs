//! The first worker of a new keeper: a fork of it, which saves the time of executing the program once more.
//!
//! Only the first one, and before the keeper has done anything: a copy of a keeper that has served would hold its memory, its descriptors and its
//! epoll set, and a worker that crashes would be followed by one at the same addresses.
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use crate::sys;

/// The keeper's side of a worker that was forked.
#[derive(Debug)]
pub(crate) struct FirstWorker {
    pub(super) pid: u32,
    pub(super) link: UnixStream,
}

/// Which of the two this process is.
#[derive(Debug)]
pub(crate) enum Forked {
    Keeper(FirstWorker),
    /// With the worker's end of the link. It has to close the keeper's descriptors.
    Worker(OwnedFd),
}

/// Forks a worker. To be called before anything is opened, started, logged or hashed.
pub(crate) fn fork() -> io::Result<Forked> {
    // Before: the keeper must receive the signal of its exit.
    sys::signals::block_all_but(&[])?;
    let (ours, theirs) = UnixStream::pair()?;
    match sys::fork::copy()? {
        Some(pid) => Ok(Forked::Keeper(FirstWorker { pid, link: ours })),
        None => {
            // The command line is for operators alone.
            let _ = sys::fork::rename_argument(c"keeper", c"worker");
            Ok(Forked::Worker(theirs.into()))
        }
    }
}
