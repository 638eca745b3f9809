//! The folder of an entry: found, or made where a layer has no entry for it.

use std::collections::VecDeque;
use std::os::fd::{AsFd as _, OwnedFd};
use std::rc::Rc;

use rustix::fs::{Gid, Mode, OFlags, SeekFrom, Stat, Uid, fchmod, fchown, fsetxattr, fstat, mkdirat, openat, seek};
use rustix::io::Errno;

use super::{Layer, Place, refused};
use crate::layers::lower::{Below, Lowers, Seen};
use crate::layers::ring::cancelled;
use crate::layers::tree::{self, Found};
use crate::layers::{LayerError, OnFile as _, Result};

/// A folder on the way down.
struct Way {
    folder: OwnedFd,
    path: Vec<u8>,
    /// Of each folder from the root on: how long the path to it is, and whether lower layers are seen in it.
    steps: Vec<(usize, bool)>,
    /// What is seen of them here, if that is known.
    seen: Option<Seen>,
}

impl Way {
    fn top(layer: &Layer, entry: &[u8]) -> Result<Self> {
        let folder = layer.root.try_clone().file("open folder of", entry)?;
        Ok(Self { folder, path: Vec::new(), steps: vec![(0, true)], seen: None })
    }

    fn shows_lower(&self) -> bool {
        self.steps.last().is_some_and(|(_length, shows_lower)| *shows_lower)
    }

    /// What lower layers have of a name here.
    fn below(&mut self, lowers: &Lowers, name: &[u8]) -> rustix::io::Result<Below> {
        let seen = match self.seen.take() {
            Some(seen) => seen,
            None => {
                let names: Vec<_> = self.path.split(|byte| *byte == b'/').filter(|name| !name.is_empty()).map(ToOwned::to_owned).collect();
                lowers.seen(&names)?
            }
        };
        let below = seen.find(name);
        self.seen = Some(seen);
        below
    }

    fn place(&self, name: &[u8]) -> rustix::io::Result<Place> {
        let mut path = self.path.clone();
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        let folder = openat(&self.folder, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Place { path, folder: Rc::new(folder), name: name.to_owned() })
    }

    fn enter(&mut self, folder: OwnedFd, place: Place, shows_lower: bool) -> rustix::io::Result<()> {
        self.seen = match self.seen.take() {
            Some(seen) if shows_lower => Some(seen.enter(&place.name)?),
            _ => None,
        };
        (self.folder, self.path) = (folder, place.path);
        self.steps.push((self.path.len(), shows_lower));
        Ok(())
    }

    /// To the folder above; that of the root is the root.
    fn leave(&mut self) -> rustix::io::Result<()> {
        if self.steps.len() > 1 {
            self.steps.pop();
            self.path.truncate(self.steps.last().map_or(0, |(length, _shows_lower)| *length));
            self.folder = openat(&self.folder, "..", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            self.seen = None;
        }
        Ok(())
    }
}

impl Layer {
    /// The folder at a path, with links resolved within the layer.
    pub(super) fn folder(&mut self, path: &[u8], entry: &[u8]) -> Result<Rc<OwnedFd>> {
        if let Some((last, folder)) = &self.last
            && last == path
        {
            return Ok(Rc::clone(folder));
        }
        let folder = match tree::open_in_root(self.root.as_fd(), path) {
            Ok(folder) => folder,
            // also a link to what only lower layers have
            Err(Errno::NOENT | Errno::NOTDIR) => self.make_folders(path, entry)?,
            Err(Errno::LOOP) => return Err(refused(entry, "its folder is a link that leads to itself")),
            Err(error) => return Err(error).file("open folder of", entry),
        };
        let folder = Rc::new(folder);
        self.last = Some((path.to_owned(), Rc::clone(&folder)));
        Ok(folder)
    }

    /// Its work grows with the path's length, and it has a few descriptors open, however deep that is.
    fn make_folders(&mut self, path: &[u8], entry: &[u8]) -> Result<OwnedFd> {
        let mut way = Way::top(self, entry)?;
        let mut todo: VecDeque<Vec<u8>> = path.split(|byte| *byte == b'/').map(ToOwned::to_owned).collect();
        let mut links = 0;
        while let Some(name) = todo.pop_front() {
            if self.bounds.cancel.is_cancelled() {
                return Err(cancelled()).file("make folder of", entry);
            }
            match &*name {
                b"" | b"." => continue,
                b".." => {
                    way.leave().file("open folder of", entry)?;
                    continue;
                }
                _ => {}
            }
            let found = tree::look(way.folder.as_fd(), &name).file("look at folder of", entry)?;
            let below = match found {
                Found::Absent if way.shows_lower() => way.below(&self.lowers, &name).file("look below at folder of", entry)?,
                _ => Below::Absent,
            };
            let target = match (&found, &below) {
                (Found::Symlink(_), _) => Some(tree::link_target(way.folder.as_fd(), &name).file("read link in path of", entry)?),
                (_, Below::Symlink(target)) => Some(target.clone()),
                _ => None,
            };
            if let Some(target) = target {
                links += 1;
                if links > LINKS {
                    return Err(refused(entry, "its folder is a link that leads to itself"));
                }
                if target.starts_with(b"/") {
                    way = Way::top(self, entry)?;
                }
                target.split(|byte| *byte == b'/').rev().for_each(|part| todo.push_front(part.to_owned()));
                continue;
            }
            let place = way.place(&name).file("open folder of", entry)?;
            let shows_lower = way.shows_lower();
            match found {
                Found::Folder(_) => {
                    let folder = tree::open_folder(place.folder.as_fd(), &place.name).file("open folder of", entry)?;
                    let shows_lower = shows_lower && !tree::is_opaque(folder.as_fd());
                    way.enter(folder, place, shows_lower).file("look below at folder of", entry)?;
                }
                Found::Other(stat) if self.is_own(&stat, &place) => {
                    return Err(refused(entry, "the layer has a file where this entry needs a folder"));
                }
                Found::Absent | Found::Symlink(_) | Found::Whiteout | Found::Other(_) => {
                    let replaces = !matches!(found, Found::Absent);
                    if replaces {
                        self.remove(&place)?;
                    }
                    let folder = self.make_implicit(&place, &below)?;
                    if replaces && self.is_overlay {
                        self.set_opaque(&folder, &place.path)?;
                    }
                    way.enter(folder, place, shows_lower && !replaces).file("look below at folder of", entry)?;
                }
            }
        }
        Ok(way.folder)
    }

    /// A folder like the one below; without one, root's, for all to read.
    pub(super) fn make_implicit(&mut self, place: &Place, below: &Below) -> Result<OwnedFd> {
        self.bounds.keep(&place.path)?;
        mkdirat(&place.folder, &*place.name, Mode::RWXU).file("make folder", &place.path)?;
        let folder = tree::open_folder(place.folder.as_fd(), &place.name).file("open", &place.path)?;
        self.own.insert(fstat(&folder).file("look at", &place.path)?.st_ino);
        self.implicit.insert(place.path.clone());
        match below {
            Below::Folder(lower, stat) => {
                copy_attributes(lower, stat, &folder).file("set owner and mode of", &place.path)?;
                self.folder_times.insert(place.path.clone(), tree::mtime(stat));
            }
            _ => {
                fchown(&folder, Some(Uid::ROOT), Some(Gid::ROOT)).file("set owner of", &place.path)?;
                fchmod(&folder, Mode::from_raw_mode(0o755)).file("set mode of", &place.path)?;
            }
        }
        Ok(folder)
    }

    /// Hides what lower layers have in a folder of that name.
    pub(super) fn set_opaque(&mut self, folder: &OwnedFd, path: &[u8]) -> Result<()> {
        self.has_whiteouts = true;
        match fsetxattr(folder, tree::OPAQUE, b"y", rustix::fs::XattrFlags::empty()) {
            Err(Errno::PERM | Errno::ACCESS | Errno::NOTSUP) => Err(LayerError::Refused {
                name: super::shown(path),
                why: format!("the file system or the user namespace does not allow {}, which overlayfs needs", tree::OPAQUE),
            }),
            result => result.file("make opaque", path),
        }
    }

    /// A file of a lower layer becomes one of the upper folder: what links to it needs it there.
    pub(super) fn copy_up(&mut self, path: &[u8], entry: &[u8]) -> Result<Option<Place>> {
        if self.lowers.is_empty() || self.is_hidden(path)? == Some(true) {
            return Ok(None);
        }
        let names: Vec<Vec<u8>> = path.split(|byte| *byte == b'/').map(ToOwned::to_owned).collect();
        let Below::Other(lower, stat) = self.lowers.find(&names).file("look below at", path)? else { return Ok(None) };
        let Some((name, folders)) = names.split_last() else { return Ok(None) };
        if Found::is_file(&stat) {
            let folder = self.folder(&folders.join(&b'/'), entry)?;
            let place = Place { path: path.to_owned(), folder, name: name.clone() };
            self.copy_file(&lower, name, &stat, &place)?;
            return Ok(Some(place));
        }
        Ok(None)
    }

    fn copy_file(&mut self, folder: &OwnedFd, name: &[u8], stat: &Stat, place: &Place) -> Result<()> {
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || -> rustix::io::Result<_> {
            let from = openat(folder, name, OFlags::RDONLY | flags, Mode::empty())?;
            let to = openat(&place.folder, &*place.name, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | flags, Mode::RUSR | Mode::WUSR)?;
            Ok((from, to))
        };
        let (from, to) = open().file("copy up", &place.path)?;
        let (mut at, length) = (0, u64::try_from(stat.st_size).unwrap_or_default());
        let mut buffer = vec![0; BUFFER_BYTES];
        // holes stay: one may be longer than a disk
        while let Some((begin, end)) = next_data(&from, at).file("copy up", &place.path)? {
            at = begin;
            while at < end {
                let most = usize::try_from(end - at).unwrap_or(usize::MAX).min(BUFFER_BYTES);
                let count = rustix::io::pread(&from, &mut buffer[..most], at).file("copy up", &place.path)?;
                if count == 0 {
                    break;
                }
                self.bounds.copy(count as u64, &place.path)?;
                super::data::write_all(&to, &buffer[..count], at).file("copy up", &place.path)?;
                at += count as u64;
            }
            if at < end {
                break;
            }
        }
        let finish = || -> rustix::io::Result<()> {
            rustix::fs::ftruncate(&to, length)?;
            copy_attributes(&from, stat, &to)?;
            rustix::fs::futimens(&to, &tree::timestamps(tree::mtime(stat)))
        };
        finish().file("copy up", &place.path)
    }
}

/// The next part of a file that is no hole; none after the last.
fn next_data(file: &OwnedFd, at: u64) -> rustix::io::Result<Option<(u64, u64)>> {
    let begin = match seek(file, SeekFrom::Data(at)) {
        Err(Errno::NXIO) => return Ok(None),
        begin => begin?,
    };
    Ok(Some((begin, seek(file, SeekFrom::Hole(begin))?)))
}

impl Found {
    fn is_file(stat: &Stat) -> bool {
        rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::RegularFile
    }
}

/// Owner, mode and extended attributes; the order matters: a new owner clears bits of the mode, and capabilities.
pub(in crate::layers) fn copy_attributes(from: &OwnedFd, stat: &Stat, to: &OwnedFd) -> rustix::io::Result<()> {
    fchown(to, Some(Uid::from_raw(stat.st_uid)), Some(Gid::from_raw(stat.st_gid)))?;
    fchmod(to, Mode::from_raw_mode(stat.st_mode & 0o7777))?;
    for (key, value) in tree::xattrs_of(from.as_fd())? {
        match fsetxattr(to, &*key, &value, rustix::fs::XattrFlags::empty()) {
            Err(Errno::NOTSUP) => {}
            result => result?,
        }
    }
    Ok(())
}

/// Of a copy.
const BUFFER_BYTES: usize = 256 << 10;
/// As many links in a path as the kernel follows.
const LINKS: usize = 40;
