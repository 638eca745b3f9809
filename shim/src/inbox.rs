//! Bytes that arrive: the heap gets those that did, no more. A buffer in which they might have arrived would leave a hole there that
//! keeps its pages in use; the stack below its live frames is given back.
use std::io;

/// The most bytes of one read.
pub(crate) const READ_BYTES: usize = 4096;

/// The result of a read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Read {
    Some,
    /// Nothing to read at the moment.
    Empty,
    /// There will never be more.
    End,
}

/// Appends the bytes of one read.
pub(crate) fn read_some(mut source: impl io::Read, into: &mut Vec<u8>) -> io::Result<Read> {
    let mut buffer = [0; READ_BYTES];
    match source.read(&mut buffer) {
        Ok(0) => Ok(Read::End),
        Ok(count) => {
            into.extend_from_slice(&buffer[..count]);
            Ok(Read::Some)
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Read::Empty),
        // The next turn of the caller's loop.
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Read::Some),
        Err(error) => Err(error),
    }
}
