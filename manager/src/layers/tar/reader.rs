//! Reading an archive, entry by entry.

use std::io::{BufRead, ErrorKind};

use super::header::{self, Header};
use super::pax::Pax;
use super::sparse::{Map, Parts};
use super::{BLOCK, Entry, Kind, Limits, TarError, Time, shown};

/// An archive that is being read.
#[derive(Debug)]
pub(crate) struct Reader<R> {
    source: R,
    limits: Limits,
    /// What the source has given and is not used any more.
    used: usize,
    /// Bytes read.
    at: u64,
    entries: u64,
    /// Of the current entry: bytes of data that have not been read.
    left: u64,
    /// After them, up to the end of the block.
    padding: u64,
    map: Map,
    name: Vec<u8>,
}

/// What precedes an entry and is about it.
#[derive(Debug, Default)]
struct Ahead {
    pax: Option<Pax>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    count: usize,
    bytes: u64,
}

impl<R: BufRead> Reader<R> {
    pub(crate) fn new(source: R, limits: Limits) -> Self {
        Self { source, limits, used: 0, at: 0, entries: 0, left: 0, padding: 0, map: Map::whole(0), name: Vec::new() }
    }

    /// The next entry; none at the end. Data of the current one that has not been read is passed over.
    pub(crate) fn next(&mut self) -> Result<Option<Entry>, TarError> {
        self.finish_entry()?;
        let mut ahead = Ahead::default();
        loop {
            let at = self.at;
            let Some(block) = self.block()? else {
                if ahead.count > 0 {
                    return Err(TarError::Short("the headers of an entry".to_owned()));
                }
                return Ok(None);
            };
            let wrong = |why| TarError::Header { at, why };
            if block.iter().all(|byte| *byte == 0) {
                // the end has two such blocks; some programs write one
                return match self.block()? {
                    _ if ahead.count > 0 => Err(wrong("the archive ends after the headers of an entry".to_owned())),
                    Some(second) if second.iter().any(|byte| *byte != 0) => {
                        Err(wrong("a block of zeros, with entries after it that some programs would read, and some not".to_owned()))
                    }
                    _ => Ok(None),
                };
            }
            let header = Header::new(&block).map_err(wrong)?;
            let size = header.size().map_err(wrong)?;
            match header.kind() {
                b'x' => {
                    let bytes = self.metadata(at, size, &mut ahead)?;
                    if ahead.pax.replace(Pax::parse(&bytes).map_err(wrong)?).is_some() {
                        return Err(wrong("an entry has two PAX headers".to_owned()));
                    }
                }
                b'g' => {
                    let bytes = self.metadata(at, size, &mut ahead)?;
                    ahead.count -= 1;
                    if Pax::parse(&bytes).map_err(wrong)?.has_effect_on_all() {
                        let why = "a PAX header for all entries gives them a name or a size";
                        return Err(wrong(why.to_owned()));
                    }
                }
                kind @ (b'L' | b'K') => {
                    let bytes = self.metadata(at, size, &mut ahead)?;
                    let name = bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_owned();
                    let place = if kind == b'L' { &mut ahead.long_name } else { &mut ahead.long_link };
                    if place.replace(name).is_some() {
                        return Err(wrong("an entry has two long names".to_owned()));
                    }
                }
                _ => {
                    let entry = self.entry(header, size, ahead)?;
                    return Ok(Some(entry));
                }
            }
        }
    }

    /// The next bytes of the current entry's data and their place in the file; none after the last.
    pub(crate) fn data(&mut self) -> Result<Option<(u64, &[u8])>, TarError> {
        if self.left == 0 {
            return Ok(None);
        }
        let most = usize::try_from(self.left).unwrap_or(usize::MAX);
        let available = self.fill()?.len().min(most);
        if available == 0 {
            return Err(TarError::Short(format!("the data of {:?}", shown(&self.name))));
        }
        let (offset, count) = self.map.take(available);
        if count == 0 {
            return Err(TarError::Entry { name: shown(&self.name), why: "its sparse map has less than its data".to_owned() });
        }
        self.left -= count as u64;
        self.at += count as u64;
        let bytes = fill(&mut self.source)?.get(..count).unwrap_or_default();
        self.used = count;
        Ok(Some((offset, bytes)))
    }

    /// Reads what is behind the end of the archive: it counts for the digest.
    pub(crate) fn drain(mut self) -> Result<R, TarError> {
        loop {
            let count = self.fill()?.len();
            if count == 0 {
                return Ok(self.source);
            }
            self.used = count;
        }
    }

    fn entry(&mut self, header: Header<'_>, size: u64, ahead: Ahead) -> Result<Entry, TarError> {
        let Ahead { pax, long_name, long_link, .. } = ahead;
        let mut pax = pax.unwrap_or_default();
        let path = pax.sparse.name.clone().or_else(|| pax.path.clone()).or_else(|| long_name.clone()).unwrap_or_else(|| header.path());
        let name = shown(&path);
        let wrong = |why: String| TarError::Entry { name: name.clone(), why };
        if self.entries == self.limits.entries {
            return Err(wrong(format!("the archive has more than {} entries", self.limits.entries)));
        }
        self.entries += 1;
        let differs = |gnu: &Option<Vec<u8>>, pax: &Option<Vec<u8>>| matches!((gnu, pax), (Some(gnu), Some(pax)) if gnu != pax);
        if differs(&long_name, &pax.path) || differs(&long_link, &pax.link) {
            return Err(wrong("it has one name from GNU tar and another from PAX, and programs differ in which one counts".to_owned()));
        }
        let link = pax.link.take().or(long_link).unwrap_or_else(|| header.link().to_owned());
        let uid = owner("uid", pax.uid.map_or_else(|| header.uid(), Ok).map_err(&wrong)?).map_err(&wrong)?;
        let gid = owner("gid", pax.gid.map_or_else(|| header.gid(), Ok).map_err(&wrong)?).map_err(&wrong)?;
        let mtime = match pax.mtime {
            Some(time) => time,
            None => Time { seconds: header.mtime().map_err(&wrong)?, nanos: 0 },
        };
        let stored = pax.size.unwrap_or(size);
        let (mut data, mut map) = (0, None);
        let kind = match header.kind() {
            // a folder of V7 ends with a slash
            0 if path.ends_with(b"/") => Kind::Folder,
            0 | b'0' | b'7' if pax.sparse.is_meant() => {
                let (left, parts, length) = self.pax_sparse(&pax, stored).map_err(|error| error.named(wrong))?;
                data = left;
                map = Some(Map::new(parts, length, left).map_err(&wrong)?);
                Kind::File { size: length }
            }
            0 | b'0' | b'7' => {
                data = stored;
                Kind::File { size: stored }
            }
            b'S' if header.is_gnu() => {
                let (parts, length) = self.gnu_sparse(header).map_err(|error| error.named(wrong))?;
                data = stored;
                map = Some(Map::new(parts, length, stored).map_err(&wrong)?);
                Kind::File { size: length }
            }
            b'1' => Kind::HardLink { target: link },
            b'2' => Kind::Symlink { target: link },
            b'3' => device(header).map(|(major, minor)| Kind::Char { major, minor }).map_err(&wrong)?,
            b'4' => device(header).map(|(major, minor)| Kind::Block { major, minor }).map_err(&wrong)?,
            b'5' => Kind::Folder,
            b'6' => Kind::Fifo,
            other => return Err(wrong(format!("it is of type {:?}, which a layer cannot have", char::from(other)))),
        };
        if path.is_empty() {
            return Err(wrong("it has no name".to_owned()));
        }
        if let Kind::File { size } = kind
            && size > self.limits.file_bytes
        {
            return Err(wrong(format!("it has {size} bytes; the limit is {}", self.limits.file_bytes)));
        }
        // of the other types no data follows, whatever their size: so Go, whose programs write layers
        self.left = data;
        self.padding = data.next_multiple_of(BLOCK as u64) - data;
        self.map = map.unwrap_or_else(|| Map::whole(data));
        let mode = header.mode().map_err(&wrong)?;
        self.name.clone_from(&path);
        Ok(Entry { path, kind, mode, uid, gid, mtime, xattrs: pax.xattrs.into_iter().collect() })
    }

    /// Data, map and length of a sparse file in PAX's formats 0.0, 0.1 and 1.0.
    fn pax_sparse(&mut self, pax: &Pax, stored: u64) -> Result<(u64, Parts, u64), Wrong> {
        let sparse = &pax.sparse;
        let length = sparse.length.ok_or_else(|| Wrong::Why("a sparse file without its length".to_owned()))?;
        match sparse.version {
            (None, None) | (Some(0), None | Some(0 | 1)) => {
                if sparse.blocks.is_some_and(|blocks| blocks != sparse.map.len() as u64) {
                    return Err(Wrong::Why("its sparse map has not as many parts as it says".to_owned()));
                }
                Ok((stored, sparse.map.clone(), length))
            }
            (Some(1), Some(0)) => {
                let mut left = stored;
                let mut block: Vec<u8> = Vec::new();
                let mut at = 0;
                let mut line = |reader: &mut Self| -> Result<u64, Wrong> {
                    let mut number = 0_u64;
                    let mut digits = 0;
                    loop {
                        if at == block.len() {
                            left = left.checked_sub(BLOCK as u64).ok_or_else(|| Wrong::Why("its sparse map has no end".to_owned()))?;
                            let next = reader.block()?.ok_or_else(|| TarError::Short("a sparse map".to_owned()))?;
                            block = next.to_vec();
                            at = 0;
                        }
                        let byte = block[at];
                        at += 1;
                        match byte {
                            b'0'..=b'9' if digits < 20 => {
                                let next = number.checked_mul(10).and_then(|number| number.checked_add(u64::from(byte - b'0')));
                                number = next.ok_or_else(|| Wrong::Why("its sparse map has too large a number".to_owned()))?;
                                digits += 1;
                            }
                            b'\n' if digits > 0 => return Ok(number),
                            _ => return Err(Wrong::Why("its sparse map is damaged".to_owned())),
                        }
                    }
                };
                let count = line(self)?;
                if count > SPARSE_PARTS {
                    return Err(Wrong::Why(format!("its sparse map has {count} parts; the limit is {SPARSE_PARTS}")));
                }
                let mut parts = Vec::new();
                for _part in 0..count {
                    parts.push((line(self)?, line(self)?));
                }
                Ok((left, parts, length))
            }
            (major, minor) => Err(Wrong::Why(format!("a sparse file of version {major:?}.{minor:?}"))),
        }
    }

    /// Map and length of a sparse file in GNU's old format.
    fn gnu_sparse(&mut self, header: Header<'_>) -> Result<(Parts, u64), Wrong> {
        let (mut parts, mut is_more, length) = header.sparse().map_err(Wrong::Why)?;
        while is_more {
            let block = self.block()?.ok_or_else(|| TarError::Short("a sparse map".to_owned()))?;
            let (more, again) = header::more_sparse(&block).map_err(Wrong::Why)?;
            parts.extend(more);
            is_more = again;
            if parts.len() as u64 > SPARSE_PARTS {
                return Err(Wrong::Why(format!("its sparse map has more than {SPARSE_PARTS} parts")));
            }
        }
        Ok((parts, length))
    }

    /// What follows a header that is about another one.
    fn metadata(&mut self, at: u64, size: u64, ahead: &mut Ahead) -> Result<Vec<u8>, TarError> {
        ahead.count += 1;
        ahead.bytes = ahead.bytes.saturating_add(size);
        if ahead.bytes > METADATA_BYTES {
            let why = format!("names and attributes of {} bytes; the limit is {METADATA_BYTES}", ahead.bytes);
            return Err(TarError::Header { at, why });
        }
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < size.next_multiple_of(BLOCK as u64) {
            let block = self.block()?.ok_or_else(|| TarError::Short("names and attributes".to_owned()))?;
            bytes.extend_from_slice(&block);
        }
        bytes.truncate(usize::try_from(size).unwrap_or(usize::MAX));
        Ok(bytes)
    }

    /// The next block; none at the end.
    fn block(&mut self) -> Result<Option<[u8; BLOCK]>, TarError> {
        let (mut block, mut read) = ([0; BLOCK], 0);
        while read < BLOCK {
            let available = self.fill()?;
            let count = available.len().min(BLOCK - read);
            if count == 0 {
                return if read == 0 { Ok(None) } else { Err(TarError::Short("a block".to_owned())) };
            }
            block[read..read + count].copy_from_slice(&available[..count]);
            self.used = count;
            read += count;
        }
        self.at += BLOCK as u64;
        Ok(Some(block))
    }

    /// Passes over what is left of the current entry.
    fn finish_entry(&mut self) -> Result<(), TarError> {
        self.at += self.left + self.padding;
        if self.skip(self.left)? > 0 {
            return Err(TarError::Short(format!("the data of {:?}", shown(&self.name))));
        }
        // some archives end with the data of the last entry
        self.skip(self.padding)?;
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// How many of the bytes are not there.
    fn skip(&mut self, mut bytes: u64) -> Result<u64, TarError> {
        while bytes > 0 {
            let count = (self.fill()?.len() as u64).min(bytes);
            if count == 0 {
                break;
            }
            self.used = usize::try_from(count).unwrap_or(usize::MAX);
            bytes -= count;
        }
        Ok(bytes)
    }

    /// The bytes that the source has ready, empty at the end of the archive.
    fn fill(&mut self) -> Result<&[u8], TarError> {
        self.source.consume(std::mem::take(&mut self.used));
        fill(&mut self.source)
    }
}

fn fill<R: BufRead>(source: &mut R) -> Result<&[u8], TarError> {
    loop {
        match source.fill_buf() {
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(TarError::Read(error)),
        }
    }
    // what it has is there already
    source.fill_buf().map_err(TarError::Read)
}

/// An error that gets the name of its entry.
enum Wrong {
    Why(String),
    Tar(TarError),
}

impl Wrong {
    fn named(self, wrong: impl FnOnce(String) -> TarError) -> TarError {
        match self {
            Self::Why(why) => wrong(why),
            Self::Tar(error) => error,
        }
    }
}

impl From<TarError> for Wrong {
    fn from(error: TarError) -> Self {
        Self::Tar(error)
    }
}

/// A user or a group: the highest number means none to the kernel.
fn owner(what: &str, id: i64) -> Result<u32, String> {
    u32::try_from(id).ok().filter(|id| *id != u32::MAX).ok_or_else(|| format!("its {what} is {id}"))
}

/// As many bits as the kernel has for them.
fn device(header: Header<'_>) -> Result<(u32, u32), String> {
    let (major, minor) = header.device()?;
    match (u32::try_from(major), u32::try_from(minor)) {
        (Ok(major), Ok(minor)) if major < 1 << 12 && minor < 1 << 20 => Ok((major, minor)),
        _ => Err(format!("its device number is {major}:{minor}")),
    }
}

/// Of the names and attributes before one entry.
const METADATA_BYTES: u64 = 1 << 20;
/// Of a sparse file.
const SPARSE_PARTS: u64 = 1 << 20;
