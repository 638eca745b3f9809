//! Bytes that arrive: read onto the heap, not over the stack, whose touched pages stay with a process for ever.
use std::io;

/// The most bytes of one read.
pub(crate) const READ_BYTES: usize = 4096;

/// What a read has come to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Read {
    Some,
    /// Nothing there at the moment.
    Empty,
    /// There will never be more.
    End,
}

/// Appends what one read gives.
pub(crate) fn read_some(mut source: impl io::Read, into: &mut Vec<u8>) -> io::Result<Read> {
    let length = into.len();
    into.resize(length + READ_BYTES, 0);
    let result = source.read(&mut into[length..]);
    into.truncate(length + result.as_ref().copied().unwrap_or(0));
    match result {
        Ok(0) => Ok(Read::End),
        Ok(_) => Ok(Read::Some),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Read::Empty),
        // The next turn of the caller's loop.
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Read::Some),
        Err(error) => Err(error),
    }
}
