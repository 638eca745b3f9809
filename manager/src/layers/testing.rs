//! What the tests of layers share: archives made header by header, and trees as texts that can be compared.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use super::tar::{BLOCK, Entry, Kind, Time, Writer};
use super::{Applied, Cancel, LayerError, LayerLimits, Lowers, Result, Target, apply, tree};

/// Whether owners and devices can be made; says so if not.
pub(crate) fn is_root() -> bool {
    let is_root = nix::unistd::geteuid().is_root();
    if !is_root {
        eprintln!("skipped: owners and devices need root");
    }
    is_root
}

/// A new folder that all may read.
pub(crate) fn new(folder: &scratch::Folder, name: &str) -> PathBuf {
    let path = folder.join(name);
    fs::create_dir(&path).expect("a folder");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("a mode");
    path
}

/// An archive without an end marker.
#[derive(Debug, Clone, Default)]
pub(crate) struct Archive(pub(super) Vec<u8>);

impl Archive {
    pub(super) fn entry(mut self, entry: &Entry, data: &[u8]) -> Self {
        let mut writer = Writer::new(Vec::new());
        writer.begin(entry).and_then(|()| writer.data(data)).expect("memory");
        let bytes = writer.finish().expect("memory");
        self.0.extend_from_slice(&bytes[..bytes.len() - 2 * BLOCK]);
        self
    }

    pub(crate) fn file(self, path: impl AsRef<[u8]>, data: impl AsRef<[u8]>) -> Self {
        let data = data.as_ref();
        self.entry(&entry(path, Kind::File { size: data.len() as u64 }), data)
    }

    pub(crate) fn folder(self, path: impl AsRef<[u8]>) -> Self {
        self.entry(&Entry { mode: 0o755, ..entry(path, Kind::Folder) }, b"")
    }

    pub(crate) fn symlink(self, path: impl AsRef<[u8]>, target: &str) -> Self {
        self.entry(&entry(path, Kind::Symlink { target: target.into() }), b"")
    }

    pub(crate) fn link(self, path: impl AsRef<[u8]>, target: &str) -> Self {
        self.entry(&entry(path, Kind::HardLink { target: target.into() }), b"")
    }

    /// A header block as it is given, with its checksum, and what follows it, filled up.
    pub(super) fn raw(mut self, kind: u8, path: &[u8], size: &str, change: impl FnOnce(&mut [u8]), data: &[u8]) -> Self {
        let mut block = vec![0; BLOCK];
        block[..path.len()].copy_from_slice(path);
        block[100..107].copy_from_slice(b"0000644");
        block[108..115].copy_from_slice(b"0000000");
        block[116..123].copy_from_slice(b"0000000");
        block[124..124 + size.len()].copy_from_slice(size.as_bytes());
        block[136..147].copy_from_slice(b"00000000001");
        block[156] = kind;
        block[257..265].copy_from_slice(b"ustar\x0000");
        change(&mut block);
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&block);
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
        self
    }

    /// A PAX header with these records.
    pub(super) fn pax(self, records: &[(&str, &[u8])]) -> Self {
        let mut bytes = Vec::new();
        for (key, value) in records {
            let rest = key.len() + value.len() + 3;
            let length = (rest..).find(|length| rest + length.to_string().len() == *length).expect("there is one");
            bytes.extend_from_slice(format!("{length} {key}=").as_bytes());
            bytes.extend_from_slice(value);
            bytes.push(b'\n');
        }
        self.raw(b'x', b"pax", &format!("{:011o}", bytes.len()), |_| {}, &bytes)
    }

    /// With its end marker.
    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 2 * BLOCK]);
        self.0
    }
}

pub(super) fn entry(path: impl AsRef<[u8]>, kind: Kind) -> Entry {
    let mtime = Time { seconds: 1_000_000_000, nanos: 0 };
    Entry { path: path.as_ref().to_owned(), kind, mode: 0o644, uid: 0, gid: 0, mtime, xattrs: Vec::new() }
}

/// Applies to a merged tree.
pub(super) fn merge(bytes: &[u8], to: &Path) -> Result<Applied> {
    patiently(|| apply(bytes, Target::Merged(to), LayerLimits::default(), &Cancel::default()))
}

/// A process that another test starts has the lock of the layer before until it executes its program.
fn patiently(apply: impl Fn() -> Result<Applied>) -> Result<Applied> {
    loop {
        match apply() {
            Err(LayerError::Busy) => std::thread::yield_now(),
            applied => return applied,
        }
    }
}

/// Applies to an upper folder on lower ones, the uppermost first.
pub(super) fn overlay(bytes: &[u8], upper: &Path, lowers: &[&Path]) -> Result<Applied> {
    let lowers: Vec<_> = lowers.iter().map(|lower| (*lower).to_owned()).collect();
    patiently(|| apply(bytes, Target::Upper(upper, Lowers::open(&lowers)?), LayerLimits::default(), &Cancel::default()))
}

/// Everything below a folder: type, mode, owner, size, target, device, attributes, a hash of the data, and links as the first name.
pub(crate) fn view(root: &Path) -> BTreeMap<String, String> {
    let (mut all, mut names, mut todo) = (BTreeMap::new(), BTreeMap::new(), vec![root.to_owned()]);
    while let Some(path) = todo.pop() {
        let about = fs::symlink_metadata(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let name = path.strip_prefix(root).expect("below").as_os_str().as_bytes().escape_ascii().to_string();
        let mut text = format!("{:o} {}:{}", about.mode(), about.uid(), about.gid());
        if about.is_dir() {
            let entries = fs::read_dir(&path).expect("a folder");
            let mut below: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
            below.sort();
            todo.extend(below.into_iter().rev());
        } else if about.is_symlink() {
            text += &format!(" -> {}", fs::read_link(&path).expect("a link").display());
        } else if about.is_file() {
            let hash = Sha256::digest(fs::read(&path).expect("a file"));
            text += &format!(" {} bytes, {:02x}{:02x}{:02x}", about.len(), hash[0], hash[1], hash[2]);
        } else {
            text += &format!(" device {}", about.rdev());
        }
        if !about.is_dir() && about.nlink() > 1 {
            let first = names.entry((about.dev(), about.ino())).or_insert_with(|| name.clone());
            text += &format!(" linked to {first}");
        }
        let (above, own) = (path.parent().expect("a parent"), path.file_name().expect("a name"));
        let above = tree::open_root(above).expect("a folder");
        for (key, value) in tree::xattrs(std::os::fd::AsFd::as_fd(&above), own.as_bytes()).expect("attributes") {
            text += &format!(" {}={}", key.escape_ascii(), value.escape_ascii());
        }
        all.insert(name, text);
    }
    all
}
