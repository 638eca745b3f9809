//! The walk through both sides, names in order.

use std::collections::BTreeSet;
use std::io::{Read as _, Write};
use std::os::fd::{AsFd as _, OwnedFd};

use rustix::fs::{FileType, Stat, fgetxattr, lgetxattr, major, minor};

use super::same::{File1, is_same, open_file};
use super::{Source, Times};
use crate::layers::lower::{Below, Lowers};
use crate::layers::ring::{Cancel, cancelled};
use crate::layers::tar::{Entry, Kind, Time, Writer};
use crate::layers::tree::{self, FirstNames, Found};
use crate::layers::{OnFile as _, Result};

/// A folder that is being compared.
struct Level {
    path: Vec<u8>,
    right: OwnedFd,
    left: Left,
    /// What is left to compare, the next one last.
    names: Vec<Vec<u8>>,
    /// Its own entry, if it is the same on both sides: written before that of a file in it.
    entry: Option<Entry>,
}

/// The other side of a folder.
enum Left {
    /// There is none.
    Nothing,
    Folder(OwnedFd),
    /// What the lower layers have under that path.
    Lower(Vec<Vec<u8>>),
}

/// A file on the left.
enum Before {
    Absent,
    Folder(OwnedFd, Stat),
    Other(OwnedFd, Stat),
    Link,
}

struct Walk<'a, W> {
    writer: &'a mut Writer<W>,
    lowers: Option<&'a Lowers>,
    times: Times,
    first_names: FirstNames,
    buffer: Vec<u8>,
}

/// Whether everything could be seen: see [`super::Change::NeedsMount`].
pub(super) fn walk<W: Write>(writer: &mut Writer<W>, source: &Source<'_>, times: Times, cancel: &Cancel) -> Result<bool> {
    let open = |path: &std::path::Path| tree::open_root(path).file("open folder", path.as_os_str().as_encoded_bytes());
    let (right, left, lowers) = match source {
        Source::Upper(upper, lowers) => (open(upper)?, Left::Lower(Vec::new()), Some(lowers)),
        Source::Trees(left, right) => (open(right)?, left.map(open).transpose()?.map_or(Left::Nothing, Left::Folder), None),
    };
    let mut walk = Walk { writer, lowers, times, first_names: FirstNames::new(), buffer: vec![0; BUFFER_BYTES] };
    let mut levels = vec![Level { names: names(&right, &left).file("read folder", b"/")?, path: Vec::new(), right, left, entry: None }];
    loop {
        let Some(level) = levels.last_mut() else { return Ok(true) };
        let Some(name) = level.names.pop() else {
            levels.pop();
            continue;
        };
        if cancel.is_cancelled() {
            return Err(cancelled()).file("read", &level.path);
        }
        let path = if level.path.is_empty() { name.clone() } else { [&level.path[..], &name].join(&b'/') };
        let before = walk.before(&level.left, &name).file("look below at", &path)?;
        let found = tree::look(level.right.as_fd(), &name).file("look at", &path)?;
        let stat = match found {
            // in a tree without layers it is a device
            Found::Whiteout if lowers.is_none() => {
                rustix::fs::statat(&level.right, &*name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW).file("look at", &path)?
            }
            Found::Absent | Found::Whiteout => {
                if !matches!(before, Before::Absent) {
                    walk.parents(&mut levels).file("write", &path)?;
                    walk.whiteout(&path).file("write", &path)?;
                }
                continue;
            }
            Found::Folder(stat) | Found::Symlink(stat) | Found::Other(stat) => stat,
        };
        let file = File1 { folder: &level.right, name: &name, stat: &stat };
        let is_same = match &before {
            Before::Folder(folder, stat) | Before::Other(folder, stat) => {
                is_same(File1 { folder, name: if matches!(before, Before::Folder(..)) { b"." } else { &name }, stat }, file)
                    .file("compare", &path)?
            }
            Before::Absent | Before::Link => false,
        };
        let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if is_same && !is_folder {
            continue;
        }
        let Some(entry) = walk.describe(file, &path).file("read", &path)? else { continue };
        if !is_folder {
            if lowers.is_some() && is_redirected(&level.right, &name, METACOPY) {
                return Ok(false);
            }
            let source =
                if matches!(entry.kind, Kind::File { .. }) { Some(open_file(&level.right, &name).file("open", &path)?) } else { None };
            walk.parents(&mut levels).file("write", &path)?;
            walk.write(&entry, source).file("write", &path)?;
            continue;
        }
        let right = tree::open_folder(level.right.as_fd(), &name).file("open folder", &path)?;
        if lowers.is_some() && fgetxattr(&right, REDIRECT, &mut [0_u8; 0][..]).is_ok() {
            return Ok(false);
        }
        let hides = lowers.is_some() && tree::is_opaque(right.as_fd());
        let left = match (before, &level.left) {
            (Before::Folder(..), Left::Lower(above)) if !hides => Left::Lower([&above[..], std::slice::from_ref(&name)].concat()),
            (Before::Folder(folder, _), Left::Folder(_)) => Left::Folder(folder),
            (Before::Folder(..), Left::Lower(_)) => {
                walk.parents(&mut levels).file("write", &path)?;
                walk.write(&entry, None).file("write", &path)?;
                walk.mark([&path[..], b".wh..wh..opq"].join(&b'/')).file("write", &path)?;
                let names = names(&right, &Left::Nothing).file("read folder", &path)?;
                levels.push(Level { names, path, right, left: Left::Nothing, entry: None });
                continue;
            }
            _ => Left::Nothing,
        };
        let entry = if is_same {
            Some(entry)
        } else {
            walk.parents(&mut levels).file("write", &path)?;
            walk.write(&entry, None).file("write", &path)?;
            None
        };
        levels.push(Level { names: names(&right, &left).file("read folder", &path)?, path, right, left, entry });
    }
}

/// The names on both sides, the first one last. What only lower layers have is unchanged.
fn names(right: &OwnedFd, left: &Left) -> rustix::io::Result<Vec<Vec<u8>>> {
    let mut names: BTreeSet<_> = tree::names(right.as_fd())?.into_iter().collect();
    if let Left::Folder(left) = left {
        names.extend(tree::names(left.as_fd())?);
    }
    Ok(names.into_iter().rev().collect())
}

fn is_redirected(folder: &OwnedFd, name: &[u8], key: &str) -> bool {
    let path = tree::path_of(folder.as_fd(), name);
    lgetxattr(path, key, &mut [0_u8; 0][..]).is_ok()
}

impl<W: Write> Walk<'_, W> {
    fn before(&self, left: &Left, name: &[u8]) -> rustix::io::Result<Before> {
        Ok(match (left, self.lowers) {
            (Left::Nothing, _) | (Left::Lower(_), None) => Before::Absent,
            (Left::Folder(folder), _) => match tree::look(folder.as_fd(), name)? {
                Found::Absent => Before::Absent,
                Found::Folder(stat) => Before::Folder(tree::open_folder(folder.as_fd(), name)?, stat),
                Found::Symlink(stat) | Found::Other(stat) => Before::Other(folder.try_clone().map_err(|_| rustix::io::Errno::MFILE)?, stat),
                Found::Whiteout => Before::Link,
            },
            (Left::Lower(path), Some(lowers)) => match lowers.find(&[&path[..], &[name.to_owned()]].concat())? {
                Below::Absent => Before::Absent,
                Below::Folder(folder, stat) => Before::Folder(folder, stat),
                Below::Symlink(_) => Before::Link,
                Below::Other(folder, stat) => Before::Other(folder, stat),
            },
        })
    }

    /// Writes the entries of the folders that the next one is in.
    fn parents(&mut self, levels: &mut [Level]) -> std::io::Result<()> {
        for level in levels {
            if let Some(entry) = level.entry.take() {
                self.write(&entry, None)?;
            }
        }
        Ok(())
    }

    /// The entry of a file; none for a socket, which a layer cannot have.
    fn describe(&mut self, file: File1<'_>, path: &[u8]) -> std::io::Result<Option<Entry>> {
        let stat = file.stat;
        let device = || (major(stat.st_rdev), minor(stat.st_rdev));
        let mut path = path.to_owned();
        let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        let first = if stat.st_nlink > 1 && !is_folder {
            let first = self.first_names.entry((stat.st_dev, stat.st_ino)).or_insert_with(|| path.clone());
            (*first != path).then(|| first.clone())
        } else {
            None
        };
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Socket | FileType::Unknown => return Ok(None),
            _ if let Some(target) = first => Kind::HardLink { target },
            FileType::RegularFile => Kind::File { size: u64::try_from(stat.st_size).unwrap_or_default() },
            FileType::Directory => {
                path.push(b'/');
                Kind::Folder
            }
            FileType::Symlink => Kind::Symlink { target: tree::link_target(file.folder.as_fd(), file.name)? },
            FileType::CharacterDevice => Kind::Char { major: device().0, minor: device().1 },
            FileType::BlockDevice => Kind::Block { major: device().0, minor: device().1 },
            FileType::Fifo => Kind::Fifo,
        };
        let exact = tree::mtime(stat);
        let Times::Seconds(latest) = self.times;
        let mtime = Time { seconds: exact.seconds.min(latest.unwrap_or(i64::MAX)), nanos: 0 };
        let xattrs = if matches!(kind, Kind::HardLink { .. }) { Vec::new() } else { tree::xattrs(file.folder.as_fd(), file.name)? };
        Ok(Some(Entry { path, kind, mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid, mtime, xattrs }))
    }

    fn write(&mut self, entry: &Entry, data: Option<std::fs::File>) -> std::io::Result<()> {
        self.writer.begin(entry)?;
        let (Some(mut data), Kind::File { size }) = (data, &entry.kind) else { return Ok(()) };
        let mut left = *size;
        while left > 0 {
            let most = usize::try_from(left).unwrap_or(usize::MAX).min(self.buffer.len());
            let count = data.read(&mut self.buffer[..most])?;
            if count == 0 {
                return Err(std::io::Error::other("a file shrank while it was read"));
            }
            self.writer.data(&self.buffer[..count])?;
            left -= count as u64;
        }
        Ok(())
    }

    fn whiteout(&mut self, path: &[u8]) -> std::io::Result<()> {
        let (folder, name) = match path.iter().rposition(|byte| *byte == b'/') {
            Some(slash) => path.split_at(slash + 1),
            None => (&b""[..], path),
        };
        self.mark([folder, b".wh.", name].concat())
    }

    fn mark(&mut self, path: Vec<u8>) -> std::io::Result<()> {
        let kind = Kind::File { size: 0 };
        self.writer.begin(&Entry { path, kind, mode: 0, uid: 0, gid: 0, mtime: Time::default(), xattrs: Vec::new() })
    }
}

const BUFFER_BYTES: usize = 128 << 10;
/// The folder's files are those of another name.
const REDIRECT: &str = "trusted.overlay.redirect";
/// The file's data is a lower layer's.
const METACOPY: &str = "trusted.overlay.metacopy";
