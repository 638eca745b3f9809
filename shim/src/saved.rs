//! How state that a process hands over to its next executable is written and read: values, descriptors, times.
//!
//! CBOR (RFC 8949). A struct is the list of its fields in the order in which [`saved!`] names them; a variant is its number and its content.
//! Descriptors are handed over by number, times as the distance from now.
//!
//! **Invariant:** a field is only ever appended, and a number never reused: a reader skips fields that it does not know, and reads those that
//! are missing as null, which is `None` of an `Option` and an error of anything else.
//! **Invariant:** reading never panics, and allocates no more than the state holds: it does not trust a count before its items have arrived.
//! **Invariant:** a rehearsal changes nothing outside the process: every descriptor in it is a placeholder.
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use minicbor::bytes::ByteSlice;
use minicbor::data::Type;
use minicbor::decode::{Decode, Decoder, Error};
use minicbor::encode::{Encode, Encoder};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::handover::{Outcome, ProcessExit, Ready, Stream, UpgradeReport, Versions};
use crate::journal::Journal;
use crate::sys::{self, spawn::Failure};

/// A part of the state.
pub(crate) trait Saved: Sized {
    fn save(&self, writer: &mut Writer);
    fn load(reader: &mut Reader<'_>) -> Result<Self, Error>;
}

/// Writes a state.
#[derive(Debug)]
pub(crate) struct Writer {
    encoder: Encoder<Vec<u8>>,
    now: Instant,
    /// The numbers of the descriptors that are handed over.
    kept: Vec<RawFd>,
}

impl Writer {
    pub(crate) fn new() -> Self {
        Self { encoder: Encoder::new(Vec::new()), now: Instant::now(), kept: Vec::new() }
    }

    /// Begins a list of `count` items.
    pub(crate) fn list(&mut self, count: usize) {
        self.encoder.array(count as u64).expect("a Vec takes every byte");
    }

    pub(crate) fn write(&mut self, value: impl Encode<()>) {
        self.encoder.encode(value).expect("a Vec takes every byte");
    }

    fn items<'t, T: Saved + 't>(&mut self, items: impl ExactSizeIterator<Item = &'t T>) {
        self.list(items.len());
        items.for_each(|item| item.save(self));
    }

    /// The bytes that were written, and the numbers of the descriptors to hand over.
    pub(crate) fn finish(self) -> (Vec<u8>, Vec<RawFd>) {
        (self.encoder.into_writer(), self.kept)
    }
}

/// Reads a state.
#[derive(Debug)]
pub(crate) struct Reader<'a> {
    decoder: Decoder<'a>,
    now: Instant,
    /// Descriptors are replaced by placeholders, and files and processes are not touched.
    is_rehearsal: bool,
    /// The descriptors that were read: each can be taken over once.
    taken: BTreeSet<RawFd>,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(bytes: &'a [u8], is_rehearsal: bool) -> Self {
        Self { decoder: Decoder::new(bytes), now: Instant::now(), is_rehearsal, taken: BTreeSet::new() }
    }

    /// Begins to read a list of items of different types.
    pub(crate) fn list(&mut self) -> Result<List<'_, 'a>, Error> {
        let left = self.count()?;
        Ok(List { reader: self, left })
    }

    fn count(&mut self) -> Result<u64, Error> {
        self.decoder.array()?.ok_or_else(|| Error::message("a list has no definite length"))
    }

    fn items<T: Saved, L: FromIterator<T>>(&mut self) -> Result<L, Error> {
        (0..self.count()?).map(|_| T::load(self)).collect()
    }

    fn descriptor(&mut self) -> Result<OwnedFd, Error> {
        let number = self.decoder.i32()?;
        if number < 0 || !self.taken.insert(number) {
            return Err(Error::message("a descriptor occurs twice"));
        }
        let taken = match self.is_rehearsal {
            true => EventFd::from_flags(EfdFlags::EFD_CLOEXEC).map(OwnedFd::from).map_err(io::Error::from),
            false => sys::inherited::take(number),
        };
        taken.map_err(|error| Error::message(format!("cannot take over descriptor {number}: {error}")))
    }
}

/// A list that is being read.
pub(crate) struct List<'r, 'a> {
    reader: &'r mut Reader<'a>,
    left: u64,
}

impl List<'_, '_> {
    pub(crate) fn next<T: Saved>(&mut self) -> Result<T, Error> {
        if let Some(left) = self.left.checked_sub(1) {
            self.left = left;
            return T::load(self.reader);
        }
        const NULL: &[u8] = &[0xf6];
        let decoder = std::mem::replace(&mut self.reader.decoder, Decoder::new(NULL));
        let missing = T::load(self.reader);
        self.reader.decoder = decoder;
        missing
    }

    /// Skips the rest.
    pub(crate) fn end(self) -> Result<(), Error> {
        (0..self.left).try_for_each(|_| self.reader.decoder.skip())
    }
}

/// Saves a struct as the list of the named fields; those behind the semicolon get their defaults. An enum's variants have one content each.
macro_rules! saved {
    (enum $name:ident { $($number:literal => $variant:ident),* }) => {
        impl $crate::saved::Saved for $name {
            fn save(&self, writer: &mut $crate::saved::Writer) {
                writer.list(2);
                match self {
                    $(Self::$variant(content) => {
                        writer.write($number);
                        content.save(writer);
                    })*
                }
            }

            fn load(reader: &mut $crate::saved::Reader<'_>) -> Result<Self, minicbor::decode::Error> {
                let mut list = reader.list()?;
                let loaded = match list.next::<u32>()? {
                    $($number => Self::$variant(list.next()?),)*
                    number => return Err(minicbor::decode::Error::unknown_variant(number.into())),
                };
                list.end()?;
                Ok(loaded)
            }
        }
    };
    ($name:ident { $($field:ident),* $(; $($fresh:ident),*)? }) => {
        impl $crate::saved::Saved for $name {
            fn save(&self, writer: &mut $crate::saved::Writer) {
                writer.list([$(stringify!($field)),*].len());
                $(self.$field.save(writer);)*
            }

            fn load(reader: &mut $crate::saved::Reader<'_>) -> Result<Self, minicbor::decode::Error> {
                let mut list = reader.list()?;
                let loaded = Self { $($field: list.next()?,)* $($($fresh: Default::default(),)*)? };
                list.end()?;
                Ok(loaded)
            }
        }
    };
}
pub(crate) use saved;

/// Types with an encoding of their own.
macro_rules! encoded {
    ($($type:ty),*) => {$(
        impl Saved for $type {
            fn save(&self, writer: &mut Writer) {
                writer.write(self);
            }

            fn load(reader: &mut Reader<'_>) -> Result<Self, Error> {
                Decode::decode(&mut reader.decoder, &mut ())
            }
        }
    )*};
}

encoded!(bool, u16, u32, u64, i64, usize, String, Duration, Outcome, ProcessExit, Ready, Stream, UpgradeReport, Versions);

macro_rules! descriptors {
    ($($owner:ty),*) => {$(
        impl Saved for $owner {
            fn save(&self, writer: &mut Writer) {
                let number = self.as_fd().as_raw_fd();
                writer.kept.push(number);
                writer.write(number);
            }

            fn load(reader: &mut Reader<'_>) -> Result<Self, Error> {
                Ok(reader.descriptor()?.into())
            }
        }
    )*};
}

descriptors!(OwnedFd, File, UnixListener, UnixStream, Journal, Failure);

macro_rules! lists {
    ($($list:ident $(: $bound:ident)?),*) => {$(
        impl<T: Saved $(+ $bound)?> Saved for $list<T> {
            fn save(&self, writer: &mut Writer) {
                writer.items(self.iter());
            }

            fn load(reader: &mut Reader<'_>) -> Result<Self, Error> {
                reader.items()
            }
        }
    )*};
}

lists!(Vec, VecDeque, BTreeSet: Ord);

impl<T: Saved, const N: usize> Saved for [T; N] {
    fn save(&self, writer: &mut Writer) {
        writer.items(self.iter());
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, Error> {
        Vec::load(reader)?.try_into().map_err(|_| Error::message("a list of another length was expected"))
    }
}

impl<K: Saved + Ord, T: Saved> Saved for BTreeMap<K, T> {
    fn save(&self, writer: &mut Writer) {
        writer.list(self.len());
        for (key, value) in self {
            writer.list(2);
            key.save(writer);
            value.save(writer);
        }
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, Error> {
        reader.items::<(K, T), _>()
    }
}

impl<A: Saved, B: Saved> Saved for (A, B) {
    fn save(&self, writer: &mut Writer) {
        writer.list(2);
        self.0.save(writer);
        self.1.save(writer);
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, Error> {
        let mut list = reader.list()?;
        let pair = (list.next()?, list.next()?);
        list.end()?;
        Ok(pair)
    }
}

impl<T: Saved> Saved for Option<T> {
    fn save(&self, writer: &mut Writer) {
        match self {
            Some(value) => value.save(writer),
            None => writer.write(None::<bool>),
        }
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, Error> {
        match reader.decoder.datatype()? {
            Type::Null => reader.decoder.null().map(|()| None),
            _ => T::load(reader).map(Some),
        }
    }
}

impl<T: Saved> Saved for Box<T> {
    fn save(&self, writer: &mut Writer) {
        T::save(self, writer);
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, Error> {
        T::load(reader).map(Self::new)
    }
}

impl Saved for Vec<u8> {
    fn save(&self, writer: &mut Writer) {
        writer.write(<&ByteSlice>::from(self.as_slice()));
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, Error> {
        Ok(reader.decoder.bytes()?.to_vec())
    }
}

impl Saved for Rc<[u8]> {
    fn save(&self, writer: &mut Writer) {
        writer.write(<&ByteSlice>::from(&**self));
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, Error> {
        Ok(reader.decoder.bytes()?.into())
    }
}

impl Saved for Instant {
    fn save(&self, writer: &mut Writer) {
        let ahead = self.saturating_duration_since(writer.now).as_nanos() as i64;
        let behind = writer.now.saturating_duration_since(*self).as_nanos() as i64;
        writer.write(ahead - behind);
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, Error> {
        let nanos = reader.decoder.i64()?;
        let distance = Duration::from_nanos(nanos.unsigned_abs());
        let at = if nanos >= 0 { reader.now.checked_add(distance) } else { reader.now.checked_sub(distance) };
        // Before the clock began: now is as good.
        Ok(at.unwrap_or(reader.now))
    }
}

/// A file that its owner removes when dropped: empty in a rehearsal.
impl Saved for PathBuf {
    fn save(&self, writer: &mut Writer) {
        writer.write(&*self.to_string_lossy());
    }

    fn load(reader: &mut Reader<'_>) -> Result<Self, Error> {
        let path = Self::from(reader.decoder.str()?);
        Ok(if reader.is_rehearsal { Self::new() } else { path })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Part {
        at: Instant,
        null: Option<File>,
        path: PathBuf,
        ends: [Option<OwnedFd>; 3],
        fresh: u32,
    }

    saved!(Part { at, null, path, ends; fresh });

    #[derive(Debug, PartialEq)]
    struct Older {
        key: String,
        value: Vec<u8>,
    }

    saved!(Older { key, value });

    #[derive(Debug, PartialEq)]
    struct Newer {
        key: String,
        value: Vec<u8>,
        appended: Option<BTreeMap<u32, String>>,
    }

    saved!(Newer { key, value, appended });

    #[derive(Debug, PartialEq)]
    enum Either {
        Old(Older),
        New(Newer),
    }

    saved!(enum Either { 0 => Old, 3 => New });

    fn written(value: &impl Saved) -> (Vec<u8>, Vec<RawFd>) {
        let mut writer = Writer::new();
        value.save(&mut writer);
        writer.finish()
    }

    fn read<T: Saved>(bytes: &[u8]) -> Result<T, Error> {
        T::load(&mut Reader::new(bytes, true))
    }

    #[test]
    fn a_rehearsal_reads_everything_with_placeholders_for_descriptors() {
        let null = || File::open("/dev/null").expect("the null device");
        let part = Part { at: Instant::now(), null: Some(null()), path: "/x".into(), ends: [None, Some(null().into()), None], fresh: 7 };
        let (bytes, kept) = written(&part);
        let numbers = [part.null.as_ref().map(AsRawFd::as_raw_fd), part.ends[1].as_ref().map(AsRawFd::as_raw_fd)];
        assert_eq!(kept, numbers.into_iter().flatten().collect::<Vec<_>>());
        let read: Part = read(&bytes).expect("whole");
        assert!(read.null.is_some_and(|null| !kept.contains(&null.as_raw_fd())));
        assert!(matches!(read.ends, [None, Some(_), None]));
        assert_eq!(read.path, PathBuf::new(), "its owner would remove it");
        assert_eq!(read.fresh, 0);
        assert!(part.at.duration_since(read.at) < Duration::from_secs(60));
    }

    #[test]
    fn fields_that_a_later_version_appends_are_skipped_and_missing_ones_are_absent() {
        let appended = Some(BTreeMap::from([(7, "x".to_owned())]));
        let newer =
            vec![Newer { key: "c1".into(), value: vec![1, 200], appended }, Newer { key: String::new(), value: vec![], appended: None }];
        let older = vec![Older { key: "c1".into(), value: vec![1, 200] }, Older { key: String::new(), value: vec![] }];
        assert_eq!(read::<Vec<Older>>(&written(&newer).0).expect("skips what it does not know"), older);
        let read_again: Vec<Newer> = read(&written(&older).0).expect("fills in what is missing");
        assert!(read_again.iter().zip(&newer).all(|(read, newer)| read.key == newer.key && read.appended.is_none()));
        assert_eq!(read::<Vec<Newer>>(&written(&newer).0).expect("whole"), newer);
        assert!(read::<Older>(&written(&vec!["c1".to_owned()]).0).is_err(), "a field that must be there is missing");
    }

    #[test]
    fn a_variant_is_found_by_its_number_and_an_unknown_one_refused() {
        for either in
            [Either::Old(Older { key: "a".into(), value: vec![] }), Either::New(Newer { key: "b".into(), value: vec![], appended: None })]
        {
            assert_eq!(read::<Either>(&written(&either).0).expect("whole"), either);
        }
        assert!(read::<Either>(&written(&(1u32, 1u32)).0).is_err());
    }

    #[test]
    fn a_descriptor_is_handed_over_once() {
        assert!(read::<Vec<OwnedFd>>(&[0x82, 5, 6]).is_ok());
        assert!(read::<Vec<OwnedFd>>(&[0x82, 5, 5]).is_err());
        assert!(read::<OwnedFd>(&[0x20]).is_err(), "-1 is none");
    }

    #[test]
    fn a_count_or_a_length_that_lies_is_refused() {
        for lie in [&[0x9a, 0xff, 0xff, 0xff, 0xff, 1][..], &[0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1]] {
            assert!(read::<Vec<u32>>(lie).is_err());
            assert!(read::<BTreeMap<u32, u32>>(lie).is_err());
            assert!(read::<Older>(lie).is_err());
        }
        assert!(read::<Vec<u8>>(&[0x5a, 0xff, 0xff, 0xff, 0xff, 1]).is_err());
    }

    #[test]
    fn times_keep_their_distance() {
        let writer = Writer::new();
        for at in [writer.now + Duration::from_secs(3), writer.now - Duration::from_millis(2)] {
            let mut writer = Writer { now: writer.now, ..Writer::new() };
            at.save(&mut writer);
            let bytes = writer.encoder.writer();
            let mut reader = Reader::new(bytes, true);
            reader.now = writer.now + Duration::from_secs(100);
            assert_eq!(Instant::load(&mut reader).expect("a time"), at + Duration::from_secs(100));
        }
    }
}
