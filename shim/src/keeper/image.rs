//! The state of a keeper on its way to another image of itself.
//!
//! Owns the format, and the descriptors that go over by their numbers. What is in a section is the business of whoever it belongs to.
//!
//! ```text
//!  0        16         18        20       28    32
//!  ├ magic ─┼ version ─┼ oldest ─┼ length ┼ sum ┼ sections: tag u16, bytes … ┤     little-endian
//! ```
//!
//! `oldest` is the oldest version whose readers understand it. A reader skips sections that it does not know, unless their tag has the
//! highest bit, and what stands behind the fields that it knows of a record.
//!
//! **Invariant:** in a rehearsal nothing outside of the process is touched: every descriptor is one that leads nowhere.
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::handover::{Malformed, Reader, Writer};
use crate::sys;

/// The version that this build writes, and the oldest whose readers understand that.
pub(crate) const VERSION: u16 = 1;
const OLDEST_READER: u16 = 1;

const MAGIC: &[u8; 16] = b"x-shim keeper 1\n";
const HEAD_BYTES: usize = 32;
/// The longest state that goes over. A keeper with more under way is asked again later.
pub(crate) const MAX_BYTES: usize = 64 << 20;
/// Sections that a reader must know.
const REQUIRED: u16 = 0x8000;

/// What a rehearsal says: that all is well, or, behind the second, why not.
pub(crate) const ACCEPTS: &str = "OK";
pub(crate) const REFUSES: &str = "NO ";

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the keeper's state is not one: {what}")]
    Damaged { what: &'static str },
    #[error("the keeper's state has version {version}, which readers from version {oldest} on understand; this one has version {ours}")]
    TooNew { version: u16, oldest: u16, ours: u16 },
    #[error("the keeper's state has the section {tag:#06x}, which this image would have to know")]
    Unknown { tag: u16 },
    #[error("the keeper's state has {bytes} bytes, and {MAX_BYTES} are the most that go over; try again when less is under way")]
    TooMuch { bytes: usize },
    #[error("the keeper's state")]
    Malformed(#[from] Malformed),
    #[error("take over descriptor {number}")]
    Descriptor { number: RawFd, source: io::Error },
    #[error("go on from the keeper's state")]
    Io(#[from] io::Error),
}

/// Writes the state, and notes what goes over.
#[derive(Debug)]
pub(crate) struct Saver {
    out: Writer,
    now: Instant,
    kept: Vec<RawFd>,
}

impl Deref for Saver {
    type Target = Writer;

    fn deref(&self) -> &Writer {
        &self.out
    }
}

impl DerefMut for Saver {
    fn deref_mut(&mut self) -> &mut Writer {
        &mut self.out
    }
}

impl Saver {
    pub(crate) fn new(now: Instant) -> Self {
        Self { out: Writer::value(), now, kept: Vec::new() }
    }

    /// Writes a section.
    pub(crate) fn section(&mut self, tag: u16, write: impl FnOnce(&mut Self)) {
        self.u16(tag);
        self.record(write);
    }

    /// Writes a part to which later versions may append.
    pub(crate) fn record(&mut self, write: impl FnOnce(&mut Self)) {
        let mut part = Self { out: Writer::value(), now: self.now, kept: std::mem::take(&mut self.kept) };
        write(&mut part);
        self.kept = part.kept;
        self.bytes(&part.out.into_bytes());
    }

    /// Writes a record for each item.
    pub(crate) fn each<T>(&mut self, items: impl ExactSizeIterator<Item = T>, mut write: impl FnMut(&mut Self, T)) {
        self.u32(items.len() as u32);
        for item in items {
            self.record(|s| write(s, item));
        }
    }

    /// Hands a descriptor over.
    pub(crate) fn fd(&mut self, fd: impl AsFd) {
        let number = fd.as_fd().as_raw_fd();
        self.kept.push(number);
        self.i32(number);
    }

    pub(crate) fn optional_fd(&mut self, fd: Option<impl AsFd>) {
        self.bool(fd.is_some());
        if let Some(fd) = fd {
            self.fd(fd);
        }
    }

    /// Writes a time as the distance from now: the clock has no meaning of its own.
    pub(crate) fn instant(&mut self, at: Instant) {
        let ahead = at.saturating_duration_since(self.now).as_nanos() as i64;
        let behind = self.now.saturating_duration_since(at).as_nanos() as i64;
        self.i64(ahead - behind);
    }

    pub(crate) fn optional_instant(&mut self, at: Option<Instant>) {
        self.bool(at.is_some());
        if let Some(at) = at {
            self.instant(at);
        }
    }

    /// The whole state, and the numbers of all that goes over.
    pub(crate) fn finish(self) -> Result<(Vec<u8>, Vec<RawFd>), Error> {
        let body = self.out.into_bytes();
        if body.len() > MAX_BYTES - HEAD_BYTES {
            return Err(Error::TooMuch { bytes: body.len() });
        }
        let mut head = Writer::value();
        head.u16(VERSION).u16(OLDEST_READER).u64(body.len() as u64).u32(sum(&body));
        Ok(([MAGIC.as_slice(), &head.into_bytes(), &body].concat(), self.kept))
    }
}

/// Where descriptors come from.
#[derive(Debug)]
pub(crate) enum Descriptors {
    /// From the image before, each once.
    Inherited(BTreeSet<RawFd>),
    /// From nowhere.
    Rehearsed(BTreeSet<RawFd>),
}

impl Descriptors {
    pub(crate) fn inherited() -> Self {
        Self::Inherited(BTreeSet::new())
    }

    pub(crate) fn rehearsed() -> Self {
        Self::Rehearsed(BTreeSet::new())
    }

    fn take(&mut self, number: RawFd) -> Result<OwnedFd, Error> {
        let (Self::Inherited(taken) | Self::Rehearsed(taken)) = self;
        if number < 0 || !taken.insert(number) {
            return Err(Error::Damaged { what: "a descriptor that goes over once" });
        }
        let taken = match self {
            Self::Inherited(_) => sys::inherited::take(number),
            Self::Rehearsed(_) => EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map(OwnedFd::from).map_err(io::Error::from),
        };
        taken.map_err(|source| Error::Descriptor { number, source })
    }
}

/// The sections of a state.
#[derive(Debug)]
pub(crate) struct Sections<'a>(BTreeMap<u16, &'a [u8]>);

impl<'a> Sections<'a> {
    /// Takes a state apart as far as it is known which sections there are.
    pub(crate) fn read(bytes: &'a [u8], known: &[u16]) -> Result<Self, Error> {
        if bytes.len() > MAX_BYTES {
            return Err(Error::TooMuch { bytes: bytes.len() });
        }
        let head = bytes.strip_prefix(MAGIC).ok_or(Error::Damaged { what: "another beginning was expected" })?;
        let mut r = Reader::new(head);
        let (version, oldest, length, expected) = (r.u16()?, r.u16()?, r.u64()?, r.u32()?);
        let body = &bytes[HEAD_BYTES..];
        if body.len() as u64 != length || sum(body) != expected {
            return Err(Error::Damaged { what: "its sum is wrong" });
        }
        let ours = crate::disguise::image_version(VERSION);
        if ours < oldest {
            return Err(Error::TooNew { version, oldest, ours });
        }
        let mut sections = BTreeMap::new();
        let mut r = Reader::new(body);
        while !r.is_empty() {
            let (tag, section) = (r.u16()?, r.slice()?);
            if known.contains(&tag) {
                sections.insert(tag, section);
            } else if tag & REQUIRED != 0 {
                return Err(Error::Unknown { tag });
            }
        }
        Ok(Self(sections))
    }

    /// A section that must be there.
    pub(crate) fn loader<'d>(&self, tag: u16, now: Instant, descriptors: &'d mut Descriptors) -> Result<Loader<'a, 'd>, Error> {
        let section = self.0.get(&tag).ok_or(Error::Damaged { what: "a section is missing" })?;
        Ok(Loader { r: Reader::new(section), now, descriptors })
    }
}

/// Reads a section, or a record in one.
#[derive(Debug)]
pub(crate) struct Loader<'a, 'd> {
    r: Reader<'a>,
    now: Instant,
    descriptors: &'d mut Descriptors,
}

impl<'a> Deref for Loader<'a, '_> {
    type Target = Reader<'a>;

    fn deref(&self) -> &Reader<'a> {
        &self.r
    }
}

impl<'a> DerefMut for Loader<'a, '_> {
    fn deref_mut(&mut self) -> &mut Reader<'a> {
        &mut self.r
    }
}

impl<'a> Loader<'a, '_> {
    pub(crate) fn record<T>(&mut self, read: impl FnOnce(&mut Loader<'a, '_>) -> Result<T, Error>) -> Result<T, Error> {
        let part = self.r.slice()?;
        read(&mut Loader { r: Reader::new(part), now: self.now, descriptors: self.descriptors })
    }

    pub(crate) fn each<T>(&mut self, mut read: impl FnMut(&mut Loader<'a, '_>) -> Result<T, Error>) -> Result<Vec<T>, Error> {
        let count = self.r.u32()?;
        (0..count).map(|_| self.record(&mut read)).collect()
    }

    pub(crate) fn fd(&mut self) -> Result<OwnedFd, Error> {
        let number = self.r.i32()?;
        self.descriptors.take(number)
    }

    pub(crate) fn optional_fd(&mut self) -> Result<Option<OwnedFd>, Error> {
        if self.r.bool()? { self.fd().map(Some) } else { Ok(None) }
    }

    pub(crate) fn instant(&mut self) -> Result<Instant, Error> {
        let nanos = self.r.i64()?;
        let distance = Duration::from_nanos(nanos.unsigned_abs());
        let at = if nanos >= 0 { self.now.checked_add(distance) } else { self.now.checked_sub(distance) };
        // Longer ago than the clock can say: as long ago as matters.
        Ok(at.unwrap_or(self.now))
    }

    pub(crate) fn optional_instant(&mut self) -> Result<Option<Instant>, Error> {
        if self.r.bool()? { self.instant().map(Some) } else { Ok(None) }
    }

    /// Whether files and processes must not be touched.
    pub(crate) fn is_rehearsal(&self) -> bool {
        matches!(self.descriptors, Descriptors::Rehearsed(_))
    }
}

/// FNV-1a: against damage, not against malice.
fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> Vec<u8> {
        let mut saver = Saver::new(Instant::now());
        saver.section(7, |s| {
            s.u32(5);
            s.each([1u8, 2, 3].iter(), |s, item| {
                // A later version has appended a field.
                s.u8(*item).u64(99);
            });
        });
        saver.section(300, |s| {
            s.str("of a later version");
        });
        saver.finish().expect("small").0
    }

    fn load(bytes: &[u8]) -> Result<(u32, Vec<u8>), Error> {
        let mut descriptors = Descriptors::rehearsed();
        let sections = Sections::read(bytes, &[7])?;
        let mut l = sections.loader(7, Instant::now(), &mut descriptors)?;
        Ok((l.u32()?, l.each(|l| Ok(l.u8()?))?))
    }

    #[test]
    fn what_a_later_version_adds_is_skipped() {
        assert_eq!(load(&saved()).expect("is read"), (5, vec![1, 2, 3]));
    }

    #[test]
    fn an_unknown_mandatory_section_is_refused() {
        let mut saver = Saver::new(Instant::now());
        saver.section(REQUIRED | 9, |_| {});
        let bytes = saver.finish().expect("small").0;
        assert!(matches!(Sections::read(&bytes, &[]), Err(Error::Unknown { tag }) if tag == REQUIRED | 9));
    }

    #[test]
    fn every_damage_is_seen() {
        let whole = saved();
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            // The version it was written in is no reason to refuse it.
            assert!(load(&bytes).is_err() || (16..20).contains(&at), "byte {at}");
            assert!(load(&whole[..at]).is_err(), "the first {at} bytes");
        }
    }

    #[test]
    fn a_descriptor_goes_over_once() {
        let mut descriptors = Descriptors::rehearsed();
        assert!(descriptors.take(5).is_ok());
        assert!(matches!(descriptors.take(5), Err(Error::Damaged { .. })));
        assert!(matches!(descriptors.take(-1), Err(Error::Damaged { .. })));
    }

    #[test]
    fn times_keep_their_distance() {
        let now = Instant::now();
        let mut saver = Saver::new(now);
        saver.section(1, |s| {
            s.instant(now + Duration::from_secs(3));
            s.instant(now - Duration::from_millis(2));
        });
        let bytes = saver.finish().expect("small").0;
        let later = now + Duration::from_secs(100);
        let mut descriptors = Descriptors::rehearsed();
        let sections = Sections::read(&bytes, &[1]).expect("whole");
        let mut l = sections.loader(1, later, &mut descriptors).expect("is there");
        assert_eq!(l.instant().expect("a time"), later + Duration::from_secs(3));
        assert_eq!(l.instant().expect("a time"), later - Duration::from_millis(2));
    }
}
