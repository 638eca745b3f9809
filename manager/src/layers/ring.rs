//! Two stages of a layer: one thread decompresses, another hashes and unpacks, with a bounded ring of buffers between them.
//!
//! ```text
//! decoder ──filled buffers──▶ hash, tar, files
//!    ▲──────empty buffers──────────┘
//! ```
//! **Invariants:** the ring never has more than [`BUFFERS`] buffers. When one side ends, so does the other.

use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use sha2::{Digest as _, Sha256};

/// Cancels work on other threads once its client has left.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Whether it may stop.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Cancels when it is dropped.
    pub(crate) fn guard(&self) -> CancelGuard {
        CancelGuard(self.clone())
    }
}

/// Cancels when it is dropped.
#[derive(Debug)]
pub(crate) struct CancelGuard(Cancel);

impl Drop for CancelGuard {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

/// Ends a source once its reader is cancelled: a few bytes of it may decompress to nothing for a long time.
#[derive(Debug)]
pub(super) struct UntilCancelled<R> {
    source: R,
    cancel: Cancel,
}

impl<R> UntilCancelled<R> {
    pub(super) fn new(source: R, cancel: &Cancel) -> Self {
        Self { source, cancel: cancel.clone() }
    }
}

impl<R: Read> Read for UntilCancelled<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancel.is_cancelled() { Err(cancelled()) } else { self.source.read(buffer) }
    }
}

/// The side that fills.
#[derive(Debug)]
pub(super) struct Filler {
    full: SyncSender<io::Result<Vec<u8>>>,
    empty: Receiver<Vec<u8>>,
    made: usize,
    cancel: Cancel,
}

/// The side that takes, and hashes what it takes.
#[derive(Debug)]
pub(super) struct Taker {
    full: Receiver<io::Result<Vec<u8>>>,
    empty: Sender<Vec<u8>>,
    buffer: Vec<u8>,
    used: usize,
    hash: Sha256,
    bytes: u64,
    most: u64,
    has_ended: bool,
    cancel: Cancel,
}

/// A ring for a stream of at most `most` bytes.
pub(super) fn ring(most: u64, cancel: &Cancel) -> (Filler, Taker) {
    let (full, filled) = sync_channel(BUFFERS);
    let (emptied, empty) = channel();
    let taker = Taker {
        full: filled,
        empty: emptied,
        buffer: Vec::new(),
        used: 0,
        hash: Sha256::new(),
        bytes: 0,
        most,
        has_ended: false,
        cancel: cancel.clone(),
    };
    (Filler { full, empty, made: 0, cancel: cancel.clone() }, taker)
}

impl Filler {
    /// Passes on everything of `source`, or its error.
    pub(super) fn fill(mut self, mut source: impl Read) {
        loop {
            let mut buffer = if self.made < BUFFERS {
                self.made += 1;
                vec![0; BUFFER_BYTES]
            } else {
                // an error: the other side has ended
                let Ok(buffer) = self.empty.recv() else { return };
                buffer
            };
            buffer.resize(BUFFER_BYTES, 0);
            let filled = if self.cancel.is_cancelled() { Err(cancelled()) } else { fill(&mut source, &mut buffer) };
            let is_last = !filled.as_ref().is_ok_and(|count| *count > 0);
            let filled = filled.map(|count| {
                buffer.truncate(count);
                buffer
            });
            if self.full.send(filled).is_err() || is_last {
                return;
            }
        }
    }
}

/// Fills as much as there is.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

impl Taker {
    /// The digest of everything that was taken, and how much that was.
    pub(super) fn digest(self) -> ([u8; 32], u64) {
        (self.hash.finalize().into(), self.bytes)
    }
}

impl BufRead for Taker {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.used == self.buffer.len() && !self.has_ended {
            if self.cancel.is_cancelled() {
                return Err(cancelled());
            }
            let empty = std::mem::take(&mut self.buffer);
            self.used = 0;
            if empty.capacity() > 0 {
                // the other side may have ended
                let _ = self.empty.send(empty);
            }
            self.buffer = self.full.recv().map_err(|_| io::Error::other("the thread that decompresses has ended"))??;
            self.has_ended = self.buffer.is_empty();
            self.hash.update(&self.buffer);
            self.bytes += self.buffer.len() as u64;
            if self.bytes > self.most {
                return Err(io::Error::other(format!("it is longer than {} bytes when uncompressed, the limit", self.most)));
            }
        }
        Ok(&self.buffer[self.used..])
    }

    fn consume(&mut self, count: usize) {
        self.used = (self.used + count).min(self.buffer.len());
    }
}

impl Read for Taker {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let available = self.fill_buf()?;
        let count = available.len().min(buffer.len());
        buffer[..count].copy_from_slice(&available[..count]);
        self.consume(count);
        Ok(count)
    }
}

/// The error of work whose client has left.
pub(super) fn cancelled() -> io::Error {
    io::Error::other("the client has gone")
}

/// Of a ring: together no more than 768 KiB, so that what one thread has written is still in the processor's cache when the other reads it.
const BUFFERS: usize = 6;
const BUFFER_BYTES: usize = 128 << 10;
