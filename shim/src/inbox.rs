//! Bytes that arrive: the heap gets those that did, no more. A buffer in which they might have arrived would leave a hole there that
//! keeps its pages in use; the stack below its live frames is given back.
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use minicbor::decode;

use crate::handover::{HEAD_BYTES, Malformed, first_frame};
use crate::saved::{Reader, Saved, Writer};
use crate::sys;

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

/// Bytes that have arrived and were not taken yet.
#[derive(Debug, Default)]
pub(crate) struct Inbox {
    bytes: Vec<u8>,
    /// So many of them are taken.
    taken: usize,
}

impl Inbox {
    /// Adds the bytes of one read.
    pub(crate) fn read(&mut self, mut source: impl io::Read) -> io::Result<Read> {
        self.fill(|buffer| Ok((source.read(buffer)?, None))).map(|(read, _)| read)
    }

    /// Adds the bytes of one read of a socket, and returns the descriptor that may be attached to them.
    pub(crate) fn receive(&mut self, socket: impl AsFd) -> io::Result<(Read, Option<OwnedFd>)> {
        self.fill(|buffer| sys::descriptors::receive(socket.as_fd(), buffer))
    }

    fn fill(&mut self, mut read: impl FnMut(&mut [u8]) -> io::Result<(usize, Option<OwnedFd>)>) -> io::Result<(Read, Option<OwnedFd>)> {
        let mut buffer = [0; READ_BYTES];
        loop {
            match read(&mut buffer) {
                Ok((0, _)) => return Ok((Read::End, None)),
                Ok((count, attached)) => {
                    self.bytes.drain(..std::mem::take(&mut self.taken));
                    self.bytes.extend_from_slice(&buffer[..count]);
                    return Ok((Read::Some, attached));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok((Read::Empty, None)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes[self.taken..]
    }

    /// Removes the first `count` bytes.
    pub(crate) fn take(&mut self, count: usize) {
        self.taken += count;
        if self.taken == self.bytes.len() {
            *self = Self::default();
        }
    }

    /// Takes the first message of the handover, once it has arrived whole.
    ///
    /// Errors: it has more than `most` bytes, or `decode` refuses it.
    pub(crate) fn message<T>(&mut self, most: usize, decode: impl FnOnce(&[u8]) -> Result<T, Malformed>) -> Result<Option<T>, Malformed> {
        let Some(message) = first_frame(self.bytes(), most)? else { return Ok(None) };
        let (decoded, length) = (decode(message)?, HEAD_BYTES + message.len());
        self.take(length);
        Ok(Some(decoded))
    }
}

impl Saved for Inbox {
    fn save(&self, writer: &mut Writer) {
        self.bytes().to_vec().save(writer);
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, decode::Error> {
        Ok(Self { bytes: Vec::load(reader)?, taken: 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::handover::{MAX_MESSAGE_BYTES, ToKeeper};

    #[test]
    fn messages_are_taken_whole_however_they_arrive_and_no_memory_stays() {
        let sent: Vec<ToKeeper> = (0..50).map(|number| ToKeeper::Pong { number }).collect();
        let bytes: Vec<u8> = sent.iter().flat_map(ToKeeper::encode).collect();
        for part in [1, 7, bytes.len()] {
            let (mut inbox, mut taken) = (Inbox::default(), Vec::new());
            for part in bytes.chunks(part) {
                assert_eq!(inbox.read(part).expect("from memory"), Read::Some);
                while let Some(message) = inbox.message(MAX_MESSAGE_BYTES, ToKeeper::decode).expect("well-formed") {
                    taken.push(message);
                }
            }
            assert_eq!(taken, sent);
            assert_eq!((inbox.bytes(), inbox.bytes.capacity()), (&[][..], 0));
            assert_eq!(inbox.read(&[][..]).expect("from memory"), Read::End);
        }
    }
}
