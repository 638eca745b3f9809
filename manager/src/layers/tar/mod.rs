//! The tar format, in and out: headers and data, nothing of files.
//!
//! ```text
//! blocks ─▶ header ─▶ (PAX records, GNU long names) ─▶ entry ─▶ its data in chunks, with their places where the file is sparse
//! ```
//! Source: pax(1) of POSIX, GNU tar's manual ("Basic Tar Format", "Sparse Formats"). Where GNU tar and Go's archive/tar differ in how long an
//! entry is or what it is called, a layer could have files that one of them does not see: such entries are refused.
//!
//! **Invariants:** nothing here allocates more than the limits allow, whatever the bytes say. This module depends on nothing else of the
//! program, so that it can be fuzzed alone.

mod header;
mod pax;
mod reader;
mod sparse;
#[cfg(test)]
mod tests;
mod writer;

use std::io;

pub(crate) use reader::Reader;
pub(crate) use writer::Writer;

/// A block, of which everything is a multiple.
pub(crate) const BLOCK: usize = 512;

/// A file in an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Entry {
    /// As the archive has it.
    pub(crate) path: Vec<u8>,
    pub(crate) kind: Kind,
    /// Permissions, set-id bits and sticky bit.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mtime: Time,
    /// Names and values, in the archive's order.
    pub(crate) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Kind {
    /// With its length in bytes, holes included.
    File {
        size: u64,
    },
    Folder,
    Symlink {
        target: Vec<u8>,
    },
    /// Another name of an entry or file.
    HardLink {
        target: Vec<u8>,
    },
    Char {
        major: u32,
        minor: u32,
    },
    Block {
        major: u32,
        minor: u32,
    },
    Fifo,
}

/// A point in time: seconds since 1970, and nanoseconds after those.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Time {
    pub(crate) seconds: i64,
    pub(crate) nanos: u32,
}

/// Bounds on what an archive may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Of all its entries.
    pub(crate) entries: u64,
    /// Bytes of the longest file, holes included.
    pub(crate) file_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { entries: 10_000_000, file_bytes: 16 << 40 }
    }
}

/// Why an archive cannot be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TarError {
    /// Its bytes cannot be had.
    #[error("read the archive")]
    Read(#[source] io::Error),
    /// It ends too early.
    #[error("the archive ends within {0}")]
    Short(String),
    /// A header makes no sense.
    #[error("header at byte {at}: {why}")]
    Header { at: u64, why: String },
    /// An entry makes no sense, or asks for too much.
    #[error("entry {name:?}: {why}")]
    Entry { name: String, why: String },
}

/// A name for people.
pub(crate) fn shown(name: &[u8]) -> String {
    let mut shown: String = String::from_utf8_lossy(name).chars().take(SHOWN).collect();
    if name.len() > SHOWN {
        shown.push('…');
    }
    shown
}

/// Characters of a name in an error.
const SHOWN: usize = 200;
