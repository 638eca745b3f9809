//! The journal of a container, for `delete` when the keeper is dead.
//!
//! Owns the format of the file `x-journal` in a bundle. The keeper writes it (the body at a worker's request, the exit slot by
//! itself), `delete` and `inspect` read it.
//!
//! ```text
//!  0        16                64                     96
//!  ├ magic ─┼─ exit slot ─────┼─ body: length, sum ──┼─ body … ┤     little-endian
//! ```
//!
//! **Invariant:** the exit slot exists, allocated, from the first write on, so that recording an exit needs no space. Writing is
//! `pwrite` of whole records; a torn record is detected by its checksum and counts as absent.
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// Name of the file in the bundle.
pub(crate) const FILE_NAME: &str = "x-journal";

const MAGIC: &[u8; 16] = b"x-shim journal 1";
const SLOT_AT: u64 = 16;
const SLOT_BYTES: usize = 48;
const BODY_SUM_AT: u64 = 64;
const BODY_AT: u64 = 96;
/// The longest body that is written or read.
pub(crate) const MAX_BODY_BYTES: usize = 64 << 10;

/// The exit of a container's init.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RecordedExit {
    pub(crate) pid: u32,
    /// 0–255, or 128 + signal number.
    pub(crate) status: u32,
    /// Unix time in nanoseconds.
    pub(crate) at_nanos: i64,
}

/// A journal that is open for writing.
#[derive(Debug)]
pub(crate) struct Journal(File);

impl From<OwnedFd> for Journal {
    /// A journal that was opened before.
    fn from(file: OwnedFd) -> Self {
        Self(file.into())
    }
}

impl AsFd for Journal {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Journal {
    /// Opens or creates the journal at `path` and allocates the exit slot.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(nix::libc::O_CLOEXEC | nix::libc::O_NOFOLLOW)
            .open(path)?;
        if file.metadata()?.len() < BODY_AT {
            let mut head = [0; BODY_AT as usize];
            head[..MAGIC.len()].copy_from_slice(MAGIC);
            file.write_all_at(&head, 0)?;
        }
        Ok(Self(file))
    }

    /// Replaces the body, whose content is the worker's. An existing exit belongs to another container, which used the
    /// bundle before: it is cleared first.
    ///
    /// Errors: InvalidInput if it is longer than [`MAX_BODY_BYTES`].
    pub(crate) fn write_body(&self, body: &[u8]) -> io::Result<()> {
        if body.len() > MAX_BODY_BYTES {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "journal body too long"));
        }
        self.0.write_all_at(&[0; SLOT_BYTES], SLOT_AT)?;
        // The checksum last: a body without it counts as absent.
        self.0.write_all_at(body, BODY_AT)?;
        let head = [(body.len() as u32).to_le_bytes(), sum(body).to_le_bytes()];
        self.0.write_all_at(head.as_flattened(), BODY_SUM_AT)
    }

    /// Records the exit of the container's init.
    pub(crate) fn write_exit(&self, exit: RecordedExit) -> io::Result<()> {
        let slot = [&exit.pid.to_le_bytes()[..], &exit.status.to_le_bytes(), &exit.at_nanos.to_le_bytes()].concat();
        self.0.write_all_at(&[&slot[..], &sum(&slot).to_le_bytes()].concat(), SLOT_AT)
    }
}

/// The content of a journal.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    /// Absent if torn or never written.
    pub(crate) body: Option<Vec<u8>>,
    pub(crate) exit: Option<RecordedExit>,
}

/// Reads the journal at `path`.
///
/// Errors: NotFound if there is none; InvalidData if it is not a journal.
pub(crate) fn read(path: &Path) -> io::Result<Contents> {
    let file = OpenOptions::new().read(true).custom_flags(nix::libc::O_CLOEXEC | nix::libc::O_NOFOLLOW).open(path)?;
    let mut bytes = vec![0; BODY_AT as usize + MAX_BODY_BYTES];
    let mut filled = 0;
    while filled < bytes.len() {
        match file.read_at(&mut bytes[filled..], filled as u64)? {
            0 => break,
            count => filled += count,
        }
    }
    bytes.truncate(filled);
    parse(&bytes)
}

/// Reads a journal that is in memory.
///
/// Errors: InvalidData if it is not a journal.
pub(crate) fn parse(bytes: &[u8]) -> io::Result<Contents> {
    if !bytes.starts_with(MAGIC) || bytes.len() < BODY_AT as usize {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a journal of this shim"));
    }
    Ok(Contents { body: read_body(bytes), exit: read_exit(bytes) })
}

fn read_exit(bytes: &[u8]) -> Option<RecordedExit> {
    let slot = &bytes[SLOT_AT as usize..];
    let exit =
        RecordedExit { pid: u32_at(slot, 0)?, status: u32_at(slot, 4)?, at_nanos: i64::from_le_bytes(*slot.get(8..)?.first_chunk()?) };
    (exit.pid != 0 && u32_at(slot, 16)? == sum(&slot[..16])).then_some(exit)
}

fn read_body(bytes: &[u8]) -> Option<Vec<u8>> {
    let (length, expected) = (u32_at(bytes, BODY_SUM_AT as usize)? as usize, u32_at(bytes, BODY_SUM_AT as usize + 4)?);
    let body = bytes.get(BODY_AT as usize..BODY_AT as usize + length)?;
    (length > 0 && expected == sum(body)).then(|| body.to_vec())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// FNV-1a: enough to distinguish a torn record from a whole one.
fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_journal_record_counts_as_absent() {
        let folder = scratch::Folder::new("journal");
        let path = folder.join(FILE_NAME);
        let journal = Journal::open(&path).expect("a journal");
        let exit = RecordedExit { pid: 7, status: 3, at_nanos: 5 };
        journal.write_body(br#"{"version":1,"id":"c1"}"#).expect("a body");
        journal.write_exit(exit).expect("an exit");
        let whole = std::fs::read(&path).expect("its bytes");
        let contents = read(&path).expect("a journal");
        assert_eq!(contents.exit, Some(exit));
        scratch::corpus::each(std::slice::from_ref(&whole), 20_000, |bytes| {
            let Ok(found) = parse(bytes) else { return };
            // a 32-bit sum does not match by accident
            assert!(found.exit.is_none_or(|found| found == exit), "{found:?}");
        });
    }
}
