//! The state that a keeper hands over when it re-executes itself.
//!
//! Owns its head, which shows who can read it and whether it is whole. `saved` has the encoding of the parts.
//!
//! ```text
//!  0        16        18       20    24
//!  ├ magic ─┼ version ┼ oldest ┼ sum ┼ list of the parts, CBOR … ┤     head: little-endian
//! ```
//!
//! `oldest` is the oldest version whose readers understand it. A reader skips parts that it does not know.
use std::io;

/// The version that this build writes, and the oldest whose readers understand that.
pub(crate) const VERSION: u16 = 2;
const OLDEST_READER: u16 = 1;
/// The oldest that knows the way back from the namespaces of a pod.
const OLDEST_READER_IN_POD: u16 = 2;

const MAGIC: &[u8; 16] = b"x-shim keeper 1\n";
const HEAD_BYTES: usize = 24;
/// The longest state that is handed over.
pub(crate) const MAX_BYTES: usize = 64 << 20;

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
    Malformed(#[from] minicbor::decode::Error),
    #[error("resume from the keeper's state")]
    Io(#[from] io::Error),
}

/// Puts the head before the list of the parts. `is_in_pod`: the keeper is in the namespaces of a pod.
pub(crate) fn seal(body: &[u8], is_in_pod: bool) -> Result<Vec<u8>, Error> {
    if body.len() > MAX_BYTES - HEAD_BYTES {
        return Err(Error::TooMuch { bytes: body.len() });
    }
    let oldest = if is_in_pod { OLDEST_READER_IN_POD } else { OLDEST_READER };
    Ok([&MAGIC[..], &VERSION.to_le_bytes(), &oldest.to_le_bytes(), &sum(body).to_le_bytes(), body].concat())
}

/// Checks a state and finds the list of its parts.
pub(crate) fn open(bytes: &[u8]) -> Result<&[u8], Error> {
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
    Ok(body)
}

/// FNV-1a: detects damage, not malice.
fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_damage_is_detected() {
        let whole = seal(b"a list of parts", false).expect("is short");
        assert_eq!(open(&whole).expect("whole"), b"a list of parts");
        for at in 0..whole.len() {
            let mut bytes = whole.clone();
            bytes[at] ^= 0x10;
            // The version it was written in is no reason to refuse it.
            assert!(open(&bytes).is_err() || (16..18).contains(&at), "byte {at}");
            assert!(open(&whole[..at]).is_err(), "the first {at} bytes");
        }
    }
}
