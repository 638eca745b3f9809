//! The state that a keeper hands over when it re-executes itself.
//!
//! Owns the format, and the descriptors, which are handed over by number. The parts of the keeper derive their encoding, by the numbers
//! of their fields, as the messages do (`handover`).
//!
//! ```text
//!  0        16        18       20    24
//!  ├ magic ─┼ version ┼ oldest ┼ sum ┼ list of the parts, CBOR … ┤     head: little-endian
//! ```
//!
//! `oldest` is the oldest version whose readers understand it. A reader skips parts and fields that it does not know.
//!
//! **Invariant:** a rehearsal changes nothing outside the process: every descriptor in it is a placeholder.
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use minicbor::decode::{self, Decoder};
use minicbor::encode::{self, Encoder, Write};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::handover::Part;
use crate::journal::Journal;
use crate::sys;

/// The version that this build writes, and the oldest whose readers understand that.
pub(crate) const VERSION: u16 = 1;
const OLDEST_READER: u16 = 1;

const MAGIC: &[u8; 16] = b"x-shim keeper 1\n";
const HEAD_BYTES: usize = 24;
/// The longest state that is handed over.
pub(crate) const MAX_BYTES: usize = 64 << 20;

/// The answers of a rehearsal; `REFUSES` is followed by the reason.
pub(crate) const ACCEPTS: &str = "OK";
pub(crate) const REFUSES: &str = "NO ";

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the keeper's state is damaged: {what}")]
    Damaged { what: &'static str },
    #[error("the keeper's state has version {version}, which needs a reader of version {oldest} or later; this one has version {ours}")]
    TooNew { version: u16, oldest: u16, ours: u16 },
    #[error(
        "the keeper's state has {bytes} bytes, at most {MAX_BYTES} can be handed over; try again when fewer requests and events are pending"
    )]
    TooMuch { bytes: usize },
    #[error("read the keeper's state")]
    Malformed(#[from] decode::Error),
    #[error("take over descriptor {number}")]
    Descriptor { number: RawFd, source: io::Error },
    #[error("resume from the keeper's state")]
    Io(#[from] io::Error),
}

/// The context for encoding descriptors and times.
#[derive(Debug)]
pub(crate) struct Carrier {
    /// Times are written as the distance from now.
    now: Instant,
    descriptors: Descriptors,
}

#[derive(Debug)]
enum Descriptors {
    /// Writing: the numbers of the descriptors that are handed over.
    Kept(Vec<RawFd>),
    /// Reading: taken over from the previous executable, each once.
    Inherited(BTreeSet<RawFd>),
    /// Rehearsing: replaced by placeholders, each once.
    Rehearsed(BTreeSet<RawFd>),
}

impl Carrier {
    fn new(descriptors: Descriptors) -> Self {
        Self { now: Instant::now(), descriptors }
    }

    /// For a state whose descriptors this process has inherited.
    pub(crate) fn inherited() -> Self {
        Self::new(Descriptors::Inherited(BTreeSet::new()))
    }

    /// For a rehearsal with a copy of a state.
    pub(crate) fn rehearsed() -> Self {
        Self::new(Descriptors::Rehearsed(BTreeSet::new()))
    }

    /// Whether files and processes must not be touched.
    pub(crate) fn is_rehearsal(&self) -> bool {
        matches!(self.descriptors, Descriptors::Rehearsed(_))
    }

    fn take(&mut self, number: RawFd) -> Result<OwnedFd, Error> {
        let (Descriptors::Inherited(taken) | Descriptors::Rehearsed(taken)) = &mut self.descriptors else {
            return Err(Error::Damaged { what: "it is written, not read" });
        };
        if number < 0 || !taken.insert(number) {
            return Err(Error::Damaged { what: "a descriptor occurs twice" });
        }
        let taken = match self.descriptors {
            Descriptors::Rehearsed(_) => EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map(OwnedFd::from).map_err(io::Error::from),
            _ => sys::inherited::take(number),
        };
        taken.map_err(|source| Error::Descriptor { number, source })
    }
}

impl AsMut<Self> for Carrier {
    fn as_mut(&mut self) -> &mut Self {
        self
    }
}

/// Writes a state. `write`: its parts, as one list. Returns the state, and the numbers of the descriptors to hand over.
pub(crate) fn save(
    write: impl FnOnce(&mut Encoder<Vec<u8>>, &mut Carrier) -> Result<(), encode::Error<std::convert::Infallible>>,
) -> Result<(Vec<u8>, Vec<RawFd>), Error> {
    let mut carrier = Carrier::new(Descriptors::Kept(Vec::new()));
    let mut encoder = Encoder::new(Vec::new());
    write(&mut encoder, &mut carrier).map_err(|_| Error::Damaged { what: "a part cannot be written" })?;
    let body = encoder.into_writer();
    if body.len() > MAX_BYTES - HEAD_BYTES {
        return Err(Error::TooMuch { bytes: body.len() });
    }
    let head = [&MAGIC[..], &VERSION.to_le_bytes(), &OLDEST_READER.to_le_bytes(), &sum(&body).to_le_bytes()].concat();
    let Descriptors::Kept(kept) = carrier.descriptors else { return Err(Error::Damaged { what: "it was read" }) };
    Ok(([head, body].concat(), kept))
}

/// Checks a state and finds the list of its parts.
pub(crate) fn open(bytes: &[u8]) -> Result<Decoder<'_>, Error> {
    if bytes.len() > MAX_BYTES {
        return Err(Error::TooMuch { bytes: bytes.len() });
    }
    let short = Error::Damaged { what: "it does not begin with the magic bytes" };
    let Some((&[a, b, c, d, e, f, g, h], body)) = bytes.strip_prefix(MAGIC).and_then(<[u8]>::split_first_chunk) else {
        return Err(short);
    };
    let (version, oldest) = (u16::from_le_bytes([a, b]), u16::from_le_bytes([c, d]));
    if u32::from_le_bytes([e, f, g, h]) != sum(body) {
        return Err(Error::Damaged { what: "its checksum is wrong" });
    }
    let ours = crate::test_identity::state_version(VERSION);
    if ours < oldest {
        return Err(Error::TooNew { version, oldest, ours });
    }
    Ok(Decoder::new(body))
}

/// FNV-1a: detects damage, not malice.
fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

/// Descriptors are handed over by number.
macro_rules! descriptors {
    ($($owner:ty),*) => {$(
        impl<C: AsMut<Carrier>> Part<C> for $owner {
            fn put<W: Write>(&self, e: &mut Encoder<W>, context: &mut C) -> Result<(), encode::Error<W::Error>> {
                let number = self.as_fd().as_raw_fd();
                if let Descriptors::Kept(kept) = &mut context.as_mut().descriptors {
                    kept.push(number);
                }
                e.i32(number)?.ok()
            }

            fn take(d: &mut Decoder<'_>, context: &mut C) -> Result<Self, decode::Error> {
                let taken = context.as_mut().take(d.i32()?).map_err(decode::Error::custom)?;
                Ok(taken.into())
            }
        }
    )*};
}

descriptors!(OwnedFd, File, UnixListener, UnixStream, Journal);

impl<C: AsMut<Carrier>> Part<C> for Instant {
    fn put<W: Write>(&self, e: &mut Encoder<W>, context: &mut C) -> Result<(), encode::Error<W::Error>> {
        let now = context.as_mut().now;
        let ahead = self.saturating_duration_since(now).as_nanos() as i64;
        let behind = now.saturating_duration_since(*self).as_nanos() as i64;
        e.i64(ahead - behind)?.ok()
    }

    fn take(d: &mut Decoder<'_>, context: &mut C) -> Result<Self, decode::Error> {
        let now = context.as_mut().now;
        let nanos = d.i64()?;
        let distance = Duration::from_nanos(nanos.unsigned_abs());
        let at = if nanos >= 0 { now.checked_add(distance) } else { now.checked_sub(distance) };
        // Before the clock began: now is as good.
        Ok(at.unwrap_or(now))
    }
}

/// A file that its owner removes when dropped: empty in a rehearsal.
impl<C: AsMut<Carrier>> Part<C> for PathBuf {
    fn put<W: Write>(&self, e: &mut Encoder<W>, _: &mut C) -> Result<(), encode::Error<W::Error>> {
        e.str(&self.to_string_lossy())?.ok()
    }

    fn take(d: &mut Decoder<'_>, context: &mut C) -> Result<Self, decode::Error> {
        let path = Self::from(d.str()?);
        Ok(if context.as_mut().is_rehearsal() { Self::new() } else { path })
    }
}

#[cfg(test)]
mod tests {
    use minicbor::{Decode, Encode};

    use super::*;
    use crate::handover::part;

    #[derive(Debug, Encode, Decode)]
    #[cbor(context_bound = "AsMut<Carrier>")]
    struct Saved {
        #[cbor(n(0), with = "part")]
        at: Instant,
        #[cbor(n(1), with = "part")]
        null: Option<File>,
        #[cbor(n(2), with = "part")]
        path: PathBuf,
        #[cbor(n(3), with = "part")]
        ends: [Option<OwnedFd>; 3],
    }

    fn saved(at: Instant) -> (Vec<u8>, Vec<RawFd>, Saved) {
        let null = || File::open("/dev/null").expect("the null device");
        let saved = Saved { at, null: Some(null()), path: "/x".into(), ends: [None, Some(null().into()), None] };
        let (bytes, kept) = save(|e, carrier| e.array(2)?.encode_with(&saved, carrier)?.str("of a later version")?.ok()).expect("small");
        (bytes, kept, saved)
    }

    fn load(bytes: &[u8], carrier: &mut Carrier) -> Result<Saved, Error> {
        let mut d = open(bytes)?;
        d.array()?;
        Ok(d.decode_with(carrier)?)
    }

    #[test]
    fn a_rehearsal_reads_everything_with_placeholders_for_descriptors() {
        let (bytes, kept, saved) = saved(Instant::now());
        let numbers = [saved.null.as_ref().map(AsRawFd::as_raw_fd), saved.ends[1].as_ref().map(AsRawFd::as_raw_fd)];
        assert_eq!(kept, numbers.into_iter().flatten().collect::<Vec<_>>());
        let read = load(&bytes, &mut Carrier::rehearsed()).expect("whole");
        assert!(read.null.is_some_and(|null| !kept.contains(&null.as_raw_fd())));
        assert!(matches!(read.ends, [None, Some(_), None]));
        assert_eq!(read.path, PathBuf::new(), "its owner would remove it");
    }

    #[test]
    fn every_damage_is_detected() {
        let whole = saved(Instant::now()).0;
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            // The version it was written in is no reason to refuse it.
            assert!(load(&bytes, &mut Carrier::rehearsed()).is_err() || (16..18).contains(&at), "byte {at}");
            assert!(load(&whole[..at], &mut Carrier::rehearsed()).is_err(), "the first {at} bytes");
        }
    }

    #[test]
    fn a_descriptor_is_handed_over_once() {
        let mut carrier = Carrier::rehearsed();
        assert!(carrier.take(5).is_ok());
        assert!(matches!(carrier.take(5), Err(Error::Damaged { .. })));
        assert!(matches!(carrier.take(-1), Err(Error::Damaged { .. })));
    }

    #[test]
    fn times_keep_their_distance() {
        let now = Instant::now();
        for at in [now + Duration::from_secs(3), now - Duration::from_millis(2)] {
            let mut carrier = Carrier { now, ..Carrier::rehearsed() };
            let mut e = Encoder::new(Vec::new());
            at.put(&mut e, &mut carrier).expect("bytes");
            carrier.now += Duration::from_secs(100);
            let read = Instant::take(&mut Decoder::new(e.writer()), &mut carrier).expect("a time");
            assert_eq!(read, at + Duration::from_secs(100));
        }
    }
}
