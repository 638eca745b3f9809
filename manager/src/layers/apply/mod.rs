//! Applying a layer to a folder.
//!
//! ```text
//! entry ─▶ its folder, found or made (parents) ─▶ whiteout: a device, or removal (whiteouts)
//!                                             └─▶ file, folder, link … (entries): made, owner, mode, attributes, times
//! end ─▶ times of folders ─▶ what is behind the end is read ─▶ digest
//! ```
//! Whiteouts are about lower layers: what a layer itself has stays, in whatever order its entries come. Applied twice, it gives the same.
//!
//! **Invariant:** when this returns, its threads have ended.

mod data;
mod entries;
mod parents;
mod whiteouts;

#[cfg(test)]
mod surroundings;
#[cfg(test)]
mod tests;

pub(in crate::layers) use parents::copy_attributes;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, Read};
use std::os::fd::{AsFd as _, OwnedFd};
use std::panic::resume_unwind;
use std::path::Path;
use std::rc::Rc;
use std::thread;

use log::{debug, warn};
use rustix::fs::{AtFlags, FlockOperation, Stat, flock, fstat, utimensat};
use rustix::io::Errno;

use super::decode::{Compression, Decoder};
use super::lower::Lowers;
use super::ring::{Cancel, UntilCancelled, cancelled, ring};
use super::tar::{Entry, Limits, Reader, TarError, Time, shown};
use super::{LayerError, LayerLimits, OnFile as _, Result, tree};
use crate::sys::priority;

/// What a layer is applied to.
#[derive(Debug)]
pub(crate) enum Target<'a> {
    /// The upper folder of an overlay, with the layers below as far as they are known: whiteouts become the overlay's.
    Upper(&'a Path, Lowers),
    /// A folder with everything of the layers below: whiteouts are executed.
    Merged(&'a Path),
}

/// What has been applied.
#[derive(Debug)]
pub(crate) struct Applied {
    /// SHA-256 of the uncompressed layer, all of it.
    pub(crate) diff_id: [u8; 32],
    /// Its length.
    pub(crate) bytes: u64,
    pub(crate) compression: Compression,
    /// Folders that the layer has files in and no entry for, the root among them: their owner and mode should be those of the layers below.
    pub(crate) implicit: Vec<Vec<u8>>,
    /// Whether it deletes something of the layers below.
    pub(crate) has_whiteouts: bool,
    /// Whether it can only be applied with the layers below known: it deletes everything of theirs, which the kernel has no mark for.
    pub(crate) needs_lowers: bool,
}

/// Applies a layer, compressed or not, on two threads of its own, until it is done or cancelled. Calls go before them.
///
/// Errors: [`LayerError::Busy`], before anything of the blob is read.
pub(crate) fn apply(blob: impl Read + Send, target: Target<'_>, limits: LayerLimits, cancel: &Cancel) -> Result<Applied> {
    let (path, lowers, is_overlay) = match target {
        Target::Upper(path, lowers) => (path, lowers, true),
        Target::Merged(path) => (path, Lowers::default(), false),
    };
    let root = tree::open_root(path).file("open folder", path.as_os_str().as_encoded_bytes())?;
    lock(&root)?;
    let decoder = Decoder::new(UntilCancelled::new(blob, cancel)).map_err(TarError::Read)?;
    let compression = decoder.compression();
    let (filler, taker) = ring(limits.layer_bytes, cancel);
    let bounds = Bounds { copied: limits.layer_bytes, names: NAMES_BYTES, cancel: cancel.clone() };
    let tar_limits = Limits { entries: limits.entries, ..Limits::default() };
    let write = move || {
        let mut reader = Reader::new(taker, tar_limits);
        let mut layer = Layer::new(root, lowers, is_overlay, bounds);
        while let Some(entry) = reader.next()? {
            layer.entry(&entry, &mut reader)?;
        }
        // the archive's end says nothing of the end of its bytes
        let taker = reader.drain()?;
        layer.finish()?;
        let (diff_id, bytes) = taker.digest();
        let (has_whiteouts, needs_lowers) = (layer.has_whiteouts, layer.needs_lowers);
        let implicit = layer.implicit.into_iter().collect();
        Ok(Applied { diff_id, bytes, compression, implicit, has_whiteouts, needs_lowers })
    };
    thread::scope(|scope| {
        stage(scope, "layer-decode", move || filler.fill(decoder))?;
        let writes = stage(scope, "layer-write", write)?;
        writes.join().unwrap_or_else(|panic| resume_unwind(panic))
    })
}

/// A thread of this layer. This one's priority could not be raised again.
fn stage<'s, T: Send + 's>(
    scope: &'s thread::Scope<'s, '_>,
    name: &str,
    job: impl FnOnce() -> T + Send + 's,
) -> Result<thread::ScopedJoinHandle<'s, T>> {
    let begin = move || {
        if let Err(error) = priority::lower() {
            debug!(error:%; "a layer is applied at the priority of calls");
        }
        job()
    };
    let thread = thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
    thread.spawn_scoped(scope, begin).file("start a thread for", b"")
}

/// Two layers at once would make one tree of both.
fn lock(root: &OwnedFd) -> Result<()> {
    match flock(root, FlockOperation::NonBlockingLockExclusive) {
        Err(Errno::WOULDBLOCK) => Err(LayerError::Busy),
        locked => locked.file("lock", b"/"),
    }
}

/// A layer that is being applied.
#[derive(Debug)]
struct Layer {
    root: OwnedFd,
    lowers: Lowers,
    is_overlay: bool,
    /// Files that this layer has made, or has an entry for, by inode.
    own: HashSet<u64>,
    /// Hard links that it has made: the file may be another layer's.
    own_links: Links,
    /// Folders in which nothing of lower layers is left, by inode.
    cleared: HashSet<u64>,
    /// Set at the end: what is made in a folder changes them.
    folder_times: BTreeMap<Vec<u8>, Time>,
    implicit: BTreeSet<Vec<u8>>,
    /// The folder of the last entry: the next is likely to be in it too.
    last: Option<(Vec<u8>, Rc<OwnedFd>)>,
    has_warned: bool,
    has_whiteouts: bool,
    needs_lowers: bool,
    bounds: Bounds,
    /// How many files were looked at to clear folders.
    #[cfg(test)]
    judged: usize,
}

/// Names in folders, as hashes by a key of this process.
#[derive(Debug, Default)]
struct Links {
    hasher: RandomState,
    hashes: HashSet<u64>,
}

impl Links {
    /// By the folder's inode: a path may lead there over links.
    fn insert(&mut self, folder: u64, name: &[u8]) {
        self.hashes.insert(self.hasher.hash_one((folder, name)));
    }

    fn contains(&self, folder: u64, name: &[u8]) -> bool {
        !self.hashes.is_empty() && self.hashes.contains(&self.hasher.hash_one((folder, name)))
    }
}

/// What a layer may still use, beside what is as long as its archive: a few bytes of it can ask for a lot.
#[derive(Debug)]
struct Bounds {
    /// Bytes of files of lower layers that are copied.
    copied: u64,
    /// Bytes of names of folders that are kept in memory.
    names: usize,
    cancel: Cancel,
}

impl Bounds {
    /// Before a folder's name is kept.
    fn keep(&mut self, path: &[u8]) -> Result<()> {
        let left = self.names.checked_sub(path.len() + NAME_COSTS);
        self.names =
            left.ok_or_else(|| refused(path, &format!("names of folders up to it have more than {NAMES_BYTES} bytes, the limit")))?;
        Ok(())
    }

    /// Before data is copied.
    fn copy(&mut self, bytes: u64, path: &[u8]) -> Result<()> {
        if self.cancel.is_cancelled() {
            return Err(cancelled()).file("copy up", path);
        }
        let left = self.copied.checked_sub(bytes);
        self.copied = left.ok_or_else(|| refused(path, "with it, links to files of lower layers need more bytes than a layer may have"))?;
        Ok(())
    }
}

/// Where an entry is to be.
#[derive(Debug, Clone)]
struct Place {
    /// Without `.`, `..` and slashes at the ends.
    path: Vec<u8>,
    folder: Rc<OwnedFd>,
    name: Vec<u8>,
}

impl Layer {
    fn new(root: OwnedFd, lowers: Lowers, is_overlay: bool, bounds: Bounds) -> Self {
        Self {
            root,
            lowers,
            is_overlay,
            own: HashSet::new(),
            own_links: Links::default(),
            cleared: HashSet::new(),
            folder_times: BTreeMap::new(),
            implicit: [Vec::new()].into(),
            last: None,
            has_warned: false,
            has_whiteouts: false,
            needs_lowers: false,
            bounds,
            #[cfg(test)]
            judged: 0,
        }
    }

    fn entry<R: io::BufRead>(&mut self, entry: &Entry, reader: &mut Reader<R>) -> Result<()> {
        let names = checked_path(&entry.path, &entry.path)?;
        let Some((name, folders)) = names.split_last() else { return self.root_entry(entry) };
        let parent = folders.join(&b'/');
        if folders.iter().chain([name]).any(|part| part.starts_with(AUFS_PREFIX) && *part != whiteouts::OPAQUE_MARK) {
            // folders of AUFS itself
            return Ok(());
        }
        if folders.iter().any(|part| part.starts_with(whiteouts::PREFIX)) {
            return Err(refused(&entry.path, "it is within a whiteout"));
        }
        if *name == whiteouts::OPAQUE_MARK {
            return self.opaque(folders, &entry.path);
        }
        if let Some(deleted) = name.strip_prefix(whiteouts::PREFIX) {
            if matches!(deleted, b"" | b"." | b"..") {
                return Err(refused(&entry.path, "it is a whiteout of no file"));
            }
            return self.whiteout(&parent, deleted);
        }
        let folder = self.folder(&parent, &entry.path)?;
        let place = Place { path: names.join(&b'/'), folder, name: (*name).to_owned() };
        self.make(&place, entry, reader)
    }

    fn is_own(&self, stat: &Stat, place: &Place) -> bool {
        self.own.contains(&stat.st_ino) || fstat(&place.folder).is_ok_and(|folder| self.own_links.contains(folder.st_ino, &place.name))
    }

    /// What is under a name goes, and with it what is known of it.
    fn remove(&mut self, place: &Place) -> Result<()> {
        self.last = None;
        // the path itself, and all that begin with it and a slash
        let (first, behind) = ([&place.path[..], b"/"].concat(), [&place.path[..], b"0"].concat());
        let below: Vec<_> = self.folder_times.range(first.clone()..behind.clone()).map(|(path, _)| path.clone()).collect();
        for path in below.iter().chain([&place.path]) {
            self.folder_times.remove(path);
        }
        let below: Vec<_> = self.implicit.range(first..behind).cloned().collect();
        for path in below.iter().chain([&place.path]) {
            self.implicit.remove(path);
        }
        tree::remove(place.folder.as_fd(), &place.name).file("replace", &place.path)
    }

    /// An attribute that the file system cannot have is left out, as containerd does, and reported once.
    fn warn_of_attribute(&mut self, path: &[u8], key: &[u8], error: Errno) {
        if !std::mem::replace(&mut self.has_warned, true) {
            warn!(entry = shown(path), attribute = shown(key), error:%; "the file system takes no such extended attribute; left out, also of other files");
        }
    }

    fn finish(&mut self) -> Result<()> {
        for (path, time) in std::mem::take(&mut self.folder_times) {
            let times = tree::timestamps(time);
            let result = match path.iter().rposition(|byte| *byte == b'/') {
                _ if path.is_empty() => utimensat(&self.root, ".", &times, AtFlags::empty()),
                None => utimensat(&self.root, &*path, &times, AtFlags::SYMLINK_NOFOLLOW),
                Some(slash) => tree::open_in_root(self.root.as_fd(), &path[..slash])
                    .and_then(|folder| utimensat(&folder, &path[slash + 1..], &times, AtFlags::SYMLINK_NOFOLLOW)),
            };
            match result {
                // a later entry has replaced it
                Err(Errno::NOENT | Errno::NOTDIR) => {}
                result => result.file("set times of", &path)?,
            }
        }
        Ok(())
    }
}

/// The names of a path in the layer, whose first slash means its root.
fn checked_path<'p>(path: &'p [u8], entry: &[u8]) -> Result<Vec<&'p [u8]>> {
    let names = tree::components(path).ok_or_else(|| refused(entry, &format!("{:?} leads out of the layer", shown(path))))?;
    if path.len() > PATH_BYTES || names.iter().any(|name| name.len() > NAME_BYTES) {
        return Err(refused(entry, "a name is longer than 255 bytes, or a path longer than 4095"));
    }
    if path.contains(&0) {
        return Err(refused(entry, "a name has a NUL"));
    }
    Ok(names)
}

fn refused(name: &[u8], why: &str) -> LayerError {
    LayerError::Refused { name: shown(name), why: why.to_owned() }
}

const AUFS_PREFIX: &[u8] = b".wh..wh.";
/// As long as the kernel takes them.
const PATH_BYTES: usize = 4095;
const NAME_BYTES: usize = 255;
/// Of names of folders, of one layer: two million that are a hundred bytes long.
const NAMES_BYTES: usize = 512 << 20;
/// Of each, beside its bytes.
const NAME_COSTS: usize = 128;
/// Of a thread that decompresses or writes.
const STACK_BYTES: usize = 256 << 10;
