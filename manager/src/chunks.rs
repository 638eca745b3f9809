//! Bytes from a thread that writes to a task that takes them.

use std::io::{self, Write};

use hyper::body::Bytes;
use tokio::sync::mpsc;

/// Passes on what is written to another task, in chunks.
#[derive(Debug)]
pub(crate) struct Sink {
    send: mpsc::Sender<Bytes>,
    buffer: Vec<u8>,
}

impl Sink {
    pub(crate) fn new(send: mpsc::Sender<Bytes>) -> Self {
        Self { send, buffer: Vec::with_capacity(CHUNK_BYTES) }
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= CHUNK_BYTES {
            self.flush()?;
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        let full = std::mem::replace(&mut self.buffer, Vec::with_capacity(CHUNK_BYTES));
        let gone = |_| io::Error::other("its receiver has ended");
        if full.is_empty() { Ok(()) } else { self.send.blocking_send(full.into()).map_err(gone) }
    }
}

/// A chunk has this many bytes, or as many more as one write brings; the last one fewer.
pub(crate) const CHUNK_BYTES: usize = 256 << 10;
