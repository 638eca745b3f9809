//! Encoding of messages: CBOR (RFC 8949), derived, behind the message's length in 4 bytes, little-endian.
//!
//! Fields and variants are numbered, and a number is never reused. A reader skips fields that it does not know; one that may be
//! absent is an `Option` or `#[cbor(default)]`.
//!
//! **Invariant:** decoding never panics, and allocates no more than the message holds: it does not trust a count before its items have arrived.
use minicbor::Encode;
use minicbor::decode::{self, Decoder};
use minicbor::encode::{self, Encoder, Write};

/// Length of the head of a message, in bytes.
pub(crate) const HEAD_BYTES: usize = 4;

/// Bytes that violate the format.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("malformed message")]
    Content(#[from] decode::Error),
    #[error("message of {length} bytes, {most} are the most")]
    TooLong { length: usize, most: usize },
}

/// Encodes a message with its length.
pub(super) fn frame(message: &impl Encode<()>) -> Vec<u8> {
    let mut bytes = vec![0; HEAD_BYTES];
    minicbor::encode(message, &mut bytes).expect("a Vec takes every byte");
    let length = (bytes.len() - HEAD_BYTES) as u32;
    bytes[..HEAD_BYTES].copy_from_slice(&length.to_le_bytes());
    // it may be queued for long
    bytes.shrink_to_fit();
    bytes
}

/// Finds the first message in `input`, without its length; `None` until it has arrived whole.
///
/// Errors: its length exceeds `most` bytes.
pub(crate) fn first_frame(input: &[u8], most: usize) -> Result<Option<&[u8]>, Malformed> {
    let Some((head, rest)) = input.split_first_chunk::<HEAD_BYTES>() else { return Ok(None) };
    Ok(rest.get(..length_of(*head, most)?))
}

/// The length of the message behind `head`. Errors as of [`first_frame`].
pub(crate) fn length_of(head: [u8; HEAD_BYTES], most: usize) -> Result<usize, Malformed> {
    let length = u32::from_le_bytes(head) as usize;
    if length > most { Err(Malformed::TooLong { length, most }) } else { Ok(length) }
}

/// Gives messages their frame.
macro_rules! messages {
    ($($message:ty),*) => {$(
        impl $message {
            /// Encodes the message with its length.
            pub(crate) fn encode(&self) -> Vec<u8> {
                frame(self)
            }

            /// Decodes a message without its length.
            pub(crate) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
                Ok(minicbor::decode(bytes)?)
            }
        }
    )*};
}

messages!(super::ToWorker, super::ToKeeper, super::ControlRequest, super::ControlReply);

/// Byte strings, of which the derive would make lists of numbers. For `#[cbor(with = "part")]`.
pub(super) trait Part: Sized {
    fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>>;
    fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error>;
}

/// See [`Part`].
pub(super) mod part {
    use super::*;

    pub(crate) fn encode<C, T: Part, W: Write>(value: &T, e: &mut Encoder<W>, _: &mut C) -> Result<(), encode::Error<W::Error>> {
        value.put(e)
    }

    pub(crate) fn decode<C, T: Part>(d: &mut Decoder<'_>, _: &mut C) -> Result<T, decode::Error> {
        T::take(d)
    }
}

impl Part for Vec<u8> {
    fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
        e.bytes(self)?.ok()
    }

    fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
        Ok(d.bytes()?.to_vec())
    }
}

/// What stands beside a byte string in a pair.
macro_rules! plain_parts {
    ($($plain:ty),*) => {$(
        impl Part for $plain {
            fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
                e.encode(self)?.ok()
            }

            fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
                d.decode()
            }
        }
    )*};
}

plain_parts!(super::Cause, String);

impl<A: Part, B: Part> Part for (A, B) {
    fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
        e.array(2)?;
        self.0.put(e)?;
        self.1.put(e)
    }

    fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
        match d.array()? {
            Some(2) => Ok((A::take(d)?, B::take(d)?)),
            _ => Err(decode::Error::message("a pair was expected")),
        }
    }
}

impl<T: Part> Part for Option<T> {
    fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
        match self {
            Some(value) => value.put(e),
            None => e.null()?.ok(),
        }
    }

    fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
        if d.datatype()? == minicbor::data::Type::Null {
            d.null()?;
            return Ok(None);
        }
        T::take(d).map(Some)
    }
}

impl<T: Part> Part for Vec<T> {
    fn put<W: Write>(&self, e: &mut Encoder<W>) -> Result<(), encode::Error<W::Error>> {
        e.array(self.len() as u64)?;
        self.iter().try_for_each(|item| item.put(e))
    }

    fn take(d: &mut Decoder<'_>) -> Result<Self, decode::Error> {
        let count = d.array()?.ok_or_else(|| decode::Error::message("a list has no definite length"))?;
        // Grows with the items that are read: the count may be wrong.
        let mut items = Self::new();
        for _ in 0..count {
            items.push(T::take(d)?);
        }
        Ok(items)
    }
}

#[cfg(test)]
mod tests {
    use minicbor::Decode;

    use super::super::{Commit, ControlRequest, MAX_MESSAGE_BYTES, ToKeeper, ToWorker};
    use super::*;

    #[derive(Debug, PartialEq, Encode, Decode)]
    struct Newer {
        #[n(0)]
        key: String,
        #[cbor(n(1), with = "part")]
        value: Vec<u8>,
        #[n(2)]
        appended: Vec<(u32, String)>,
    }

    #[derive(Debug, PartialEq, Encode, Decode)]
    struct Older {
        #[n(0)]
        key: String,
        #[cbor(n(1), with = "part")]
        value: Vec<u8>,
    }

    #[derive(Debug, PartialEq, Encode, Decode)]
    struct Lenient {
        #[n(0)]
        key: String,
        #[cbor(n(1), with = "part")]
        value: Vec<u8>,
        #[cbor(n(2), default)]
        appended: Vec<(u32, String)>,
    }

    #[test]
    fn fields_that_a_later_version_appends_are_skipped_and_missing_ones_are_filled_in() {
        let newer = minicbor::to_vec([Newer { key: "c1".into(), value: vec![1, 200], appended: vec![(7, "x".into())] }]).expect("bytes");
        let older = minicbor::to_vec([Older { key: "c1".into(), value: vec![1, 200] }]).expect("bytes");
        let [read]: [Older; 1] = minicbor::decode(&newer).expect("skips what it does not know");
        assert_eq!(read, Older { key: "c1".into(), value: vec![1, 200] });
        let [read]: [Lenient; 1] = minicbor::decode(&older).expect("fills in what is missing");
        assert_eq!(read, Lenient { key: "c1".into(), value: vec![1, 200], appended: Vec::new() });
        assert!(minicbor::decode::<[Newer; 1]>(&older).is_err(), "a field that must be there is missing");
    }

    #[test]
    fn a_count_or_a_length_that_lies_is_refused() {
        // arrays, maps, byte strings and texts of 2^32 − 1 and of 2^64 − 1 items in place of each value of a commit
        let whole = ToKeeper::Commit(Commit { events: vec![vec![7; 30]], releases: vec!["c1".into()], ..Commit::default() }).encode();
        let mut refused = 0;
        for at in HEAD_BYTES..whole.len() {
            for major in [0x40u8, 0x60, 0x80, 0xa0] {
                for lie in [&[major | 26, 0xff, 0xff, 0xff, 0xff][..], &[major | 27, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff][..]] {
                    let bytes = [&whole[HEAD_BYTES..at], lie, &whole[at + 1..]].concat();
                    refused += usize::from(ToKeeper::decode(&bytes).is_err());
                }
            }
        }
        // all but those within the byte string, whose length no longer holds what follows
        assert!(refused > (whole.len() - HEAD_BYTES - 40) * 8, "{refused} of {}", whole.len());
    }

    #[test]
    fn a_message_is_found_once_it_is_whole_and_refused_if_it_is_too_long() {
        let bytes = [ToWorker::Ping { number: 300 }.encode(), ControlRequest::Describe.encode()].concat();
        let first = first_frame(&bytes, MAX_MESSAGE_BYTES).expect("bounded").expect("whole");
        assert_eq!(ToWorker::decode(first).ok(), Some(ToWorker::Ping { number: 300 }));
        for end in 0..HEAD_BYTES + first.len() {
            assert!(first_frame(&bytes[..end], MAX_MESSAGE_BYTES).expect("bounded").is_none(), "{end}");
        }
        let length = MAX_MESSAGE_BYTES as u32 + 1;
        assert!(matches!(first_frame(&length.to_le_bytes(), MAX_MESSAGE_BYTES), Err(Malformed::TooLong { .. })));
    }
}
