//! Moving bytes from one descriptor to another inside the kernel.
//!
//! **Invariant:** no byte enters this process, so none can be read and not yet written.
use std::io;
use std::os::fd::BorrowedFd;

use nix::errno::Errno;
use nix::fcntl::{SpliceFFlags, splice};
use nix::libc;

/// The most bytes that one turn moves.
pub(super) const TURN_BYTES: usize = 1 << 20;

/// Why moving stopped.
#[derive(Debug)]
pub(super) enum Stop {
    /// The source is empty or the sink is full; an edge follows.
    Idle,
    /// The turn is over; there may be more.
    Turn,
    /// The source has ended.
    End,
    /// The sink has lost its last reader.
    Closed,
    /// Another error of the source or the sink.
    Failed(io::Error),
}

/// Moves what the source holds, as far as there is room. More may come meanwhile: that is for the next turn.
pub(super) fn move_once(source: BorrowedFd<'_>, sink: BorrowedFd<'_>) -> (u64, Stop) {
    match move_some(source, sink, None, TURN_BYTES) {
        Ok(count) => (count as u64, Stop::Turn),
        Err(stop) => (0, stop),
    }
}

/// Moves bytes until it must stop. `sink_at`: the position in a sink that is a file. Returns the number of bytes moved.
pub(super) fn move_bytes(
    source: BorrowedFd<'_>,
    sink: BorrowedFd<'_>,
    mut sink_at: Option<&mut libc::loff_t>,
    limit: usize,
) -> (u64, Stop) {
    let mut moved = 0;
    while moved < limit {
        match move_some(source, sink, sink_at.as_deref_mut(), limit - moved) {
            Ok(count) => moved += count,
            Err(stop) => return (moved as u64, stop),
        }
    }
    (moved as u64, Stop::Turn)
}

/// One splice(2), of at least one byte.
fn move_some(source: BorrowedFd<'_>, sink: BorrowedFd<'_>, mut sink_at: Option<&mut libc::loff_t>, limit: usize) -> Result<usize, Stop> {
    let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
    loop {
        return match splice(source, None, sink, sink_at.as_deref_mut(), limit, flags) {
            Ok(0) => Err(Stop::End),
            Ok(count) => Ok(count),
            Err(Errno::EINTR) => continue,
            Err(Errno::EAGAIN) => Err(Stop::Idle),
            Err(Errno::EPIPE) => Err(Stop::Closed),
            // A terminal whose other side no process has open any more.
            Err(Errno::EIO) => Err(Stop::End),
            Err(error) => Err(Stop::Failed(error.into())),
        };
    }
}
