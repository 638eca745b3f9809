//! Tar archives of images: reading by name, and writing. Only regular files count; names are looked up, and nothing is ever unpacked here.
//!
//! **Invariant:** a damaged archive is refused with the name and the place of the entry; no length in it decides how much memory is used.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Read, Seek as _, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext as _, Result};

/// An archive on disk, with the places of its files.
#[derive(Debug)]
pub(crate) struct Archive {
    path: PathBuf,
    file: File,
    entries: HashMap<String, Place>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    File {
        offset: u64,
        size: u64,
    },
    /// A link to another name: old versions of `docker save` write one for a layer that comes twice.
    Link(String),
}

impl Archive {
    /// Looks through the archive.
    ///
    /// Errors: if it is damaged, or compressed as a whole.
    pub(crate) fn open(path: &Path, mut file: File) -> Result<Self> {
        let entries = index(&mut file).map_err(|error| Error::unreadable(format!("the archive {}", path.display()), error))?;
        Ok(Self { path: path.to_owned(), file, entries })
    }

    /// Whether it has a file of that name.
    pub(crate) fn has(&self, name: &str) -> bool {
        self.place(name).is_some()
    }

    /// A file, to be read once, and its length.
    pub(crate) fn file(&mut self, name: &str) -> Result<(impl Read + use<>, u64)> {
        let (offset, size) = self
            .place(name)
            .ok_or_else(|| Error::unreadable(format!("the archive {}", self.path.display()), format!("it has no file {name}")))?;
        let mut file = self.file.try_clone().on("read", &self.path)?;
        file.seek(SeekFrom::Start(offset)).on("read", &self.path)?;
        Ok((file.take(size), size))
    }

    /// A file of a few MiB at most.
    pub(crate) fn bytes(&mut self, name: &str) -> Result<Vec<u8>> {
        let (mut file, size) = self.file(name)?;
        if size > LONGEST_TEXT {
            return Err(Error::unreadable(format!("{name} in the archive {}", self.path.display()), "it is longer than 8 MiB"));
        }
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).on("read", &self.path)?;
        Ok(bytes)
    }

    fn place(&self, name: &str) -> Option<(u64, u64)> {
        let mut name = plain(name);
        for _link in 0..4 {
            match self.entries.get(&name)? {
                Place::File { offset, size } => return Some((*offset, *size)),
                Place::Link(target) => name.clone_from(target),
            }
        }
        None
    }
}

/// A name as it is looked up.
fn plain(name: &str) -> String {
    name.trim_start_matches("./").trim_end_matches('/').to_owned()
}

fn bad(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}

fn index(file: &mut File) -> io::Result<HashMap<String, Place>> {
    let length = file.metadata()?.len();
    let mut entries = HashMap::new();
    let (mut at, mut long_name, mut long_link, mut pax) = (file.stream_position()?, None, None, HashMap::<String, String>::new());
    loop {
        let mut header = [0; BLOCK];
        file.seek(SeekFrom::Start(at))?;
        if at + BLOCK as u64 > length {
            return if at == length && at > 0 { Ok(entries) } else { Err(bad(too_short(at, file)?)) };
        }
        file.read_exact(&mut header)?;
        if header.iter().all(|byte| *byte == 0) {
            return Ok(entries);
        }
        check(&header, at)?;
        let kind = header[156];
        let size = match pax.get("size") {
            Some(size) if !matches!(kind, b'x' | b'g' | b'L' | b'K') => {
                size.parse::<u64>().ok().ok_or_else(|| bad(format!("the entry at byte {at} has an invalid size")))?
            }
            _ => number(&header[124..136]).ok_or_else(|| bad(format!("the entry at byte {at} has an invalid size")))?,
        };
        let data = at + BLOCK as u64;
        let end = data.checked_add(size).filter(|end| *end <= length).ok_or_else(|| bad(format!("the entry at byte {at} is cut off")))?;
        match kind {
            b'x' => pax = records(&text(file, size, at)?, at)?,
            b'g' => {}
            b'L' => long_name = Some(String::from_utf8_lossy(&text(file, size, at)?).trim_end_matches('\0').to_owned()),
            b'K' => long_link = Some(String::from_utf8_lossy(&text(file, size, at)?).trim_end_matches('\0').to_owned()),
            _ => {
                let name = pax.remove("path").or(long_name.take()).unwrap_or_else(|| name_of(&header));
                let link = pax.remove("linkpath").or(long_link.take()).unwrap_or_else(|| field(&header[157..257]));
                pax.clear();
                if entries.len() >= MOST_ENTRIES {
                    return Err(bad(format!("it has more than {MOST_ENTRIES} entries")));
                }
                let place = match kind {
                    b'0' | 0 => Some(Place::File { offset: data, size }),
                    b'1' => Some(Place::Link(plain(&link))),
                    b'2' => beside(&plain(&name), &link).map(Place::Link),
                    _ => None,
                };
                if let Some(place) = place {
                    entries.insert(plain(&name), place);
                }
            }
        }
        at = end.div_ceil(BLOCK as u64) * BLOCK as u64;
    }
}

fn too_short(at: u64, file: &mut File) -> io::Result<String> {
    let mut magic = [0; 4];
    file.seek(SeekFrom::Start(0))?;
    let length = file.read(&mut magic)?;
    Ok(if length == 0 {
        "it is empty".to_owned()
    } else {
        compressed(&magic).unwrap_or_else(|| format!("it ends within the entry at byte {at}"))
    })
}

/// What is wrong with a file that begins like that, if it is compressed.
fn compressed(magic: &[u8]) -> Option<String> {
    match magic {
        [0x1f, 0x8b, ..] => Some("it is compressed with gzip; `gunzip` it first".to_owned()),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Some("it is compressed with zstd; `unzstd` it first".to_owned()),
        [b'B', b'Z', b'h', ..] => Some("it is compressed with bzip2; `bunzip2` it first".to_owned()),
        [0xfd, b'7', b'z', b'X', ..] => Some("it is compressed with xz; `unxz` it first".to_owned()),
        _ => None,
    }
}

fn check(header: &[u8; BLOCK], at: u64) -> io::Result<()> {
    let sum: u64 = header.iter().enumerate().map(|(index, byte)| if (148..156).contains(&index) { 32 } else { u64::from(*byte) }).sum();
    if number(&header[148..156]) == Some(sum) {
        return Ok(());
    }
    let what = if at == 0 { compressed(header) } else { None };
    Err(bad(what.unwrap_or_else(|| format!("the entry at byte {at} has a wrong checksum: it is no tar archive, or damaged"))))
}

/// A number in octal digits, or in base 256.
fn number(field: &[u8]) -> Option<u64> {
    if field.first().is_some_and(|byte| byte & 0x80 != 0) {
        let (first, rest) = field.split_first()?;
        return rest.iter().try_fold(u64::from(first & 0x7f), |value, byte| value.checked_mul(256)?.checked_add(u64::from(*byte)));
    }
    let digits: Vec<u8> = field.iter().copied().skip_while(|byte| *byte == b' ').take_while(|byte| !matches!(byte, 0 | b' ')).collect();
    digits
        .iter()
        .try_fold(0_u64, |value, byte| value.checked_mul(8)?.checked_add(u64::from(byte.checked_sub(b'0').filter(|digit| *digit < 8)?)))
}

fn field(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

fn name_of(header: &[u8; BLOCK]) -> String {
    let prefix = if &header[257..262] == b"ustar" { field(&header[345..500]) } else { String::new() };
    let name = field(&header[..100]);
    if prefix.is_empty() { name } else { format!("{prefix}/{name}") }
}

fn text(file: &mut File, size: u64, at: u64) -> io::Result<Vec<u8>> {
    if size > LONGEST_NAME {
        return Err(bad(format!("the entry at byte {at} has a name that is longer than {LONGEST_NAME} bytes")));
    }
    let mut bytes = vec![0; usize::try_from(size).unwrap_or(0)];
    file.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Records of a pax header: `LENGTH KEY=VALUE\n`.
fn records(mut bytes: &[u8], at: u64) -> io::Result<HashMap<String, String>> {
    let invalid = || bad(format!("the extended header at byte {at} is invalid"));
    let mut records = HashMap::new();
    while !bytes.is_empty() {
        let space = bytes.iter().position(|byte| *byte == b' ').ok_or_else(invalid)?;
        let length: usize = std::str::from_utf8(&bytes[..space]).ok().and_then(|digits| digits.parse().ok()).ok_or_else(invalid)?;
        let record = bytes.get(space + 1..length).and_then(|record| record.strip_suffix(b"\n")).ok_or_else(invalid)?;
        let record = String::from_utf8_lossy(record);
        let (key, value) = record.split_once('=').ok_or_else(invalid)?;
        records.insert(key.to_owned(), value.to_owned());
        bytes = &bytes[length..];
    }
    Ok(records)
}

/// What a symbolic link leads to, within the archive.
fn beside(name: &str, target: &str) -> Option<String> {
    let mut parts: Vec<&str> = if target.starts_with('/') { Vec::new() } else { name.split('/').collect() };
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// Writes an archive.
#[derive(Debug)]
pub(crate) struct Writer<W: Write> {
    out: W,
}

impl<W: Write> Writer<W> {
    /// Into `out`.
    pub(crate) fn new(out: W) -> Self {
        Self { out }
    }

    /// Begins a file, of which exactly `size` bytes must follow by [`Self::part`].
    pub(crate) fn begin(&mut self, name: &str, size: u64) -> io::Result<()> {
        self.out.write_all(&header(name, size, b'0', 0o444)?)
    }

    /// A part of the file.
    pub(crate) fn part(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.out.write_all(bytes)
    }

    /// Ends the file, which had `size` bytes.
    pub(crate) fn end(&mut self, size: u64) -> io::Result<()> {
        let rest = usize::try_from(size % BLOCK as u64).unwrap_or(0);
        if rest == 0 { Ok(()) } else { self.out.write_all(&vec![0; BLOCK - rest]) }
    }

    /// A whole file.
    pub(crate) fn file(&mut self, name: &str, bytes: &[u8]) -> io::Result<()> {
        self.begin(name, bytes.len() as u64)?;
        self.part(bytes)?;
        self.end(bytes.len() as u64)
    }

    /// A folder.
    pub(crate) fn folder(&mut self, name: &str) -> io::Result<()> {
        self.out.write_all(&header(&format!("{name}/"), 0, b'5', 0o755)?)
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<()> {
        self.out.write_all(&[0; 2 * BLOCK])?;
        self.out.flush()
    }
}

fn header(name: &str, size: u64, kind: u8, mode: u32) -> io::Result<[u8; BLOCK]> {
    let mut header = [0; BLOCK];
    let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
    if name.len() > 100 {
        return Err(bad(format!("the name {name} is too long for an archive")));
    }
    put(0, name.as_bytes());
    put(100, format!("{mode:07o}\0").as_bytes());
    put(108, b"0000000\0");
    put(116, b"0000000\0");
    if size < 1 << 33 {
        put(124, format!("{size:011o}\0").as_bytes());
    } else {
        put(124, &[0x80, 0, 0, 0]);
        put(128, &size.to_be_bytes());
    }
    put(136, b"00000000000\0");
    put(148, b"        ");
    put(156, &[kind]);
    put(257, b"ustar\x0000");
    let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    Ok(header)
}

const BLOCK: usize = 512;
/// Of a name in an entry of its own.
const LONGEST_NAME: u64 = 64 << 10;
/// Manifests and configurations are kilobytes.
const LONGEST_TEXT: u64 = 8 << 20;
/// An archive of images has a file a layer and a few more.
const MOST_ENTRIES: usize = 100_000;

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn what_is_written_can_be_read_here_and_by_tar() {
        let folder = scratch::Folder::new("xctl-archive");
        let path = folder.join("a.tar");
        let mut writer = Writer::new(File::create(&path).expect("a file"));
        writer.folder("blobs").expect("written");
        writer.file("blobs/one", b"1").expect("written");
        writer.file("two", &[b'x'; 1024]).expect("written");
        writer.finish().expect("written");
        let mut archive = Archive::open(&path, File::open(&path).expect("it is there")).expect("an archive");
        assert_eq!(archive.bytes("./blobs/one").expect("there"), b"1");
        assert_eq!(archive.bytes("two").expect("there").len(), 1024);
        assert!(!archive.has("blobs") && archive.bytes("three").is_err());
        let listed = Command::new("tar").arg("-tf").arg(&path).output().expect("tar runs");
        assert_eq!(String::from_utf8_lossy(&listed.stdout), "blobs/\nblobs/one\ntwo\n");
        assert!(header("big", 1 << 40, b'0', 0).is_ok_and(|header| number(&header[124..136]) == Some(1 << 40)));
    }

    #[test]
    fn archives_of_tar_are_read_with_long_names_and_links() {
        let folder = scratch::Folder::new("xctl-archive");
        let long = "n".repeat(150);
        std::fs::create_dir(folder.join(&long)).expect("a folder");
        std::fs::write(folder.join(&long).join("layer.tar"), "layer").expect("a file");
        std::os::unix::fs::symlink(format!("../{long}/layer.tar"), folder.join(&long).join("again")).expect("a link");
        for format in ["gnu", "pax", "ustar"] {
            let path = folder.join(format!("{format}.tar"));
            let status =
                Command::new("tar").arg(format!("--format={format}")).arg("-C").arg(&*folder).arg("-cf").arg(&path).arg(&long).status();
            assert!(status.expect("tar runs").success() || format == "ustar");
            if format == "ustar" {
                continue;
            }
            let mut archive = Archive::open(&path, File::open(&path).expect("it is there")).expect("an archive");
            assert_eq!(archive.bytes(&format!("{long}/layer.tar")).expect("there"), b"layer", "{format}");
            assert_eq!(archive.bytes(&format!("{long}/again")).expect("a link"), b"layer", "{format}");
        }
    }

    #[test]
    fn damaged_archives_are_refused_with_the_reason() {
        let folder = scratch::Folder::new("xctl-archive");
        let whole = {
            let mut bytes = Vec::new();
            let mut writer = Writer::new(&mut bytes);
            writer.file("one", &[b'x'; 2000]).expect("written");
            writer.finish().expect("written");
            bytes
        };
        let mut wrong = whole.clone();
        wrong[3] ^= 1;
        for (bytes, reason) in [
            (&b""[..], "it is empty"),
            (b"short", "ends within"),
            (&whole[..700], "is cut off"),
            (&wrong, "wrong checksum"),
            (&[&[0x1f, 0x8b][..], &[0; 600]].concat(), "compressed with gzip"),
            (&[0x28, 0xb5, 0x2f, 0xfd], "compressed with zstd"),
        ] {
            let path = folder.join("bad.tar");
            std::fs::write(&path, bytes).expect("a file");
            let error = Archive::open(&path, File::open(&path).expect("it is there")).expect_err(reason).chain();
            assert!(error.contains(reason), "{error}");
        }
        assert_eq!(records(b"9 a=12345", 0).ok(), None);
        assert_eq!(beside("a/b", "../../../etc"), None);
        assert_eq!(number(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"), None);
    }
}
