//! Creating a layer: what differs between two trees, or between an overlay's upper folder and the layers below it.
//!
//! ```text
//! folder by folder, names in order ─▶ changed? ─▶ tar ─▶ SHA-256 ─▶ compression ─▶ blob
//! ```
//! The same trees give the same bytes. Times have whole seconds, as containerd's layers have them: what unpacks a layer compares them.

mod same;
#[cfg(test)]
mod tests;
mod walk;

use std::io::{self, Write};
use std::path::Path;

use flate2::write::GzEncoder;
use sha2::{Digest as _, Sha256};

use super::decode::Compression;
use super::lower::Lowers;
use super::ring::Cancel;
use super::tar::Writer;
use super::{OnFile as _, Result};

/// What a layer is created from.
#[derive(Debug)]
pub(crate) enum Source<'a> {
    /// The upper folder of an overlay, and the layers below it.
    Upper(&'a Path, Lowers),
    /// A tree, and the one before, if there was one.
    Trees(Option<&'a Path>, &'a Path),
}

/// What has been created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Created {
    /// SHA-256 of the uncompressed layer.
    pub(crate) diff_id: [u8; 32],
    /// Its length.
    pub(crate) bytes: u64,
}

/// The result of comparing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// The layer is written.
    Written(Created),
    /// The upper folder has files whose data, or folders whose files, are in a lower layer under another name: only the mounted overlay shows
    /// them. What was written is to be thrown away.
    NeedsMount,
}

/// Which times files have in a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Times {
    /// Their own, in whole seconds; later ones than this one, where it is given, become it.
    Seconds(Option<i64>),
}

/// Writes a layer, compressed as asked, until it is done or cancelled.
pub(crate) fn create(sink: impl Write, source: &Source<'_>, compression: Compression, times: Times, cancel: &Cancel) -> Result<Change> {
    let sink = Encoder::new(sink, compression).file("compress", b"")?;
    let mut writer = Writer::new(Hashed { sink, hash: Sha256::new(), bytes: 0 });
    if !walk::walk(&mut writer, source, times, cancel)? {
        return Ok(Change::NeedsMount);
    }
    let Hashed { sink, hash, bytes } = writer.finish().file("write", b"")?;
    sink.finish().file("write", b"")?;
    Ok(Change::Written(Created { diff_id: hash.finalize().into(), bytes }))
}

/// Hashes what it passes on.
#[derive(Debug)]
struct Hashed<W> {
    sink: W,
    hash: Sha256,
    bytes: u64,
}

impl<W: Write> Write for Hashed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.sink.write(bytes)?;
        self.hash.update(&bytes[..count]);
        self.bytes += count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.sink.flush()
    }
}

/// Compresses what it passes on.
enum Encoder<W: Write> {
    Plain(W),
    Gzip(Box<GzEncoder<W>>),
    Zstd(Box<zstd::Encoder<'static, W>>),
}

impl<W: Write> Encoder<W> {
    fn new(sink: W, compression: Compression) -> io::Result<Self> {
        Ok(match compression {
            Compression::Plain => Self::Plain(sink),
            // without a name or a time in its head
            Compression::Gzip => Self::Gzip(Box::new(GzEncoder::new(sink, flate2::Compression::default()))),
            Compression::Zstd => Self::Zstd(Box::new(zstd::Encoder::new(sink, ZSTD_LEVEL)?)),
        })
    }

    fn finish(self) -> io::Result<()> {
        let mut sink = match self {
            Self::Plain(sink) => sink,
            Self::Gzip(encoder) => encoder.finish()?,
            Self::Zstd(encoder) => encoder.finish()?,
        };
        sink.flush()
    }
}

impl<W: Write> Write for Encoder<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(sink) => sink.write(bytes),
            Self::Gzip(encoder) => encoder.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(sink) => sink.flush(),
            Self::Gzip(encoder) => encoder.flush(),
            Self::Zstd(encoder) => encoder.flush(),
        }
    }
}

/// The compressor's own default.
const ZSTD_LEVEL: i32 = 3;
