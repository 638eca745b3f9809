//! PAX records: `LENGTH KEY=VALUE\n`.

use std::collections::BTreeMap;

use super::Time;
use super::sparse::Parts;

/// What the records before an entry say of it.
#[derive(Debug, Clone, Default)]
pub(super) struct Pax {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<i64>,
    pub(super) gid: Option<i64>,
    pub(super) mtime: Option<Time>,
    pub(super) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub(super) sparse: Sparse,
}

/// What they say of a sparse file.
#[derive(Debug, Clone, Default)]
pub(super) struct Sparse {
    pub(super) version: (Option<u64>, Option<u64>),
    pub(super) name: Option<Vec<u8>>,
    /// `GNU.sparse.size` or `GNU.sparse.realsize`: the length of the file.
    pub(super) length: Option<u64>,
    /// Offsets and lengths, of versions 0.0 and 0.1.
    pub(super) map: Parts,
    /// An offset whose length has not come, of version 0.0.
    offset: Option<u64>,
    pub(super) blocks: Option<u64>,
}

impl Sparse {
    /// Whether the file is a sparse one.
    pub(super) fn is_meant(&self) -> bool {
        self.version.0.is_some() || !self.map.is_empty() || self.blocks.is_some()
    }
}

impl Pax {
    /// Reads the records of one header.
    pub(super) fn parse(bytes: &[u8]) -> Result<Self, String> {
        let mut pax = Self::default();
        let mut rest = bytes;
        // some programs fill up with NULs
        while rest.iter().any(|byte| *byte != 0) {
            let (key, value, after) = record(rest)?;
            pax.take(key, value)?;
            rest = after;
        }
        if pax.xattrs.keys().map(|name| name.len() + 1).sum::<usize>() > XATTR_NAMES_BYTES {
            return Err("it has more extended attributes than a file can have".to_owned());
        }
        if pax.sparse.offset.is_some() {
            return Err("the last part of its sparse map has no length".to_owned());
        }
        Ok(pax)
    }

    /// Whether a header for all following entries changes what they are called or how long they are: programs differ in whether they heed it.
    pub(super) fn has_effect_on_all(&self) -> bool {
        self.path.is_some() || self.link.is_some() || self.size.is_some() || self.sparse.is_meant() || self.sparse.name.is_some()
    }

    fn take(&mut self, key: &[u8], value: &[u8]) -> Result<(), String> {
        if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
            if name.is_empty() || name.contains(&0) {
                return Err("it has an extended attribute without a name".to_owned());
            }
            self.xattrs.insert(name.to_owned(), value.to_owned());
            return Ok(());
        }
        let key = String::from_utf8_lossy(key);
        let number = || decimal(&key, value);
        // no value: the header's own counts
        match &*key {
            "path" => self.path = name(&key, value)?,
            "linkpath" => self.link = name(&key, value)?,
            "size" => self.size = optional(value, number)?,
            "uid" => self.uid = optional(value, || signed(&key, value))?,
            "gid" => self.gid = optional(value, || signed(&key, value))?,
            "mtime" => self.mtime = optional(value, || time(value))?,
            "GNU.sparse.major" => self.sparse.version.0 = Some(number()?),
            "GNU.sparse.minor" => self.sparse.version.1 = Some(number()?),
            "GNU.sparse.name" => self.sparse.name = name(&key, value)?,
            "GNU.sparse.size" | "GNU.sparse.realsize" => self.sparse.length = Some(number()?),
            "GNU.sparse.numblocks" => self.sparse.blocks = Some(number()?),
            "GNU.sparse.offset" => {
                let earlier = self.sparse.offset.replace(number()?);
                if earlier.is_some() {
                    return Err("a part of its sparse map has no length".to_owned());
                }
            }
            "GNU.sparse.numbytes" => {
                let offset = self.sparse.offset.take().ok_or("a part of its sparse map has no offset")?;
                self.sparse.map.push((offset, number()?));
            }
            "GNU.sparse.map" => {
                let numbers = value.split(|byte| *byte == b',').filter(|part| !part.is_empty());
                let numbers = numbers.map(|part| decimal(&key, part)).collect::<Result<Vec<_>, _>>()?;
                let (pairs, []) = numbers.as_chunks::<2>() else {
                    return Err("the last part of its sparse map has no length".to_owned());
                };
                self.sparse.map = pairs.iter().map(|[offset, length]| (*offset, *length)).collect();
            }
            _ => {}
        }
        Ok(())
    }
}

fn optional<T>(value: &[u8], parse: impl FnOnce() -> Result<T, String>) -> Result<Option<T>, String> {
    if value.is_empty() { Ok(None) } else { parse().map(Some) }
}

/// Key, value, what follows.
type Record<'b> = (&'b [u8], &'b [u8], &'b [u8]);

/// The first record.
fn record(bytes: &[u8]) -> Result<Record<'_>, String> {
    let wrong = || "its PAX records are damaged".to_owned();
    let blank = bytes.iter().take(MOST_DIGITS + 1).position(|byte| *byte == b' ').ok_or_else(wrong)?;
    let digits = std::str::from_utf8(&bytes[..blank]).ok().filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()));
    let length: usize = digits.and_then(|digits| digits.parse().ok()).ok_or_else(wrong)?;
    let record = bytes.get(blank + 1..length).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(wrong)?;
    let equals = record.iter().position(|byte| *byte == b'=').filter(|at| *at > 0).ok_or_else(wrong)?;
    Ok((&record[..equals], &record[equals + 1..], &bytes[length..]))
}

fn name(key: &str, value: &[u8]) -> Result<Option<Vec<u8>>, String> {
    if value.contains(&0) {
        return Err(format!("its PAX record {key:?} has a NUL"));
    }
    Ok((!value.is_empty()).then(|| value.to_owned()))
}

fn decimal(key: &str, value: &[u8]) -> Result<u64, String> {
    let digits = std::str::from_utf8(value).ok().filter(|digits| digits.bytes().all(|digit| digit.is_ascii_digit()));
    digits.and_then(|digits| digits.parse().ok()).ok_or_else(|| format!("its PAX record {key:?} is {:?}", super::shown(value)))
}

fn signed(key: &str, value: &[u8]) -> Result<i64, String> {
    let (is_negative, digits) = value.strip_prefix(b"-").map_or((false, value), |digits| (true, digits));
    let number: i64 = decimal(key, digits)?.try_into().map_err(|_| format!("its PAX record {key:?} is {:?}", super::shown(value)))?;
    Ok(if is_negative { -number } else { number })
}

/// Seconds with a fraction of any length, of which nine digits count.
pub(super) fn time(value: &[u8]) -> Result<Time, String> {
    let (whole, fraction) = match value.iter().position(|byte| *byte == b'.') {
        Some(point) => (&value[..point], &value[point + 1..]),
        None => (value, &b""[..]),
    };
    let seconds = signed("mtime", whole)?;
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err(format!("its PAX record \"mtime\" is {:?}", super::shown(value)));
    }
    let digits = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9);
    let nanos = digits.fold(0, |nanos, digit| nanos * 10 + u32::from(digit - b'0'));
    if whole.starts_with(b"-") && nanos > 0 {
        return Ok(Time { seconds: seconds.saturating_sub(1), nanos: 1_000_000_000 - nanos });
    }
    Ok(Time { seconds, nanos })
}

/// The longest list of their names that Linux has.
const XATTR_NAMES_BYTES: usize = 64 << 10;
/// Of a record's length.
const MOST_DIGITS: usize = 10;
