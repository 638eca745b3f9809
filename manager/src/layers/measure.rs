//! What a tree uses of its file system.

use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::path::Path;

use rustix::fs::{AtFlags, Stat, fremovexattr, fstat, statat, unlinkat};
use rustix::io::Errno;

use super::lower::{Below, Lowers};
use super::tree::{self, Found, Rung};
use super::{Cancel, OnFile as _, Result};

/// What a tree uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Measured {
    /// As the file system counts them: holes use none, links to one file use theirs once.
    pub(crate) bytes: i64,
    pub(crate) inodes: i64,
}

/// What is known of the layers below a tree.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Beneath<'l> {
    /// Whiteouts in it are right.
    Known,
    /// There are none.
    Nothing,
    /// Whiteouts in it were made without knowing these.
    Layers(&'l Lowers),
}

/// A folder that is being measured.
struct Level {
    folder: Rung,
    name: Vec<u8>,
    /// What is left to look at.
    names: Vec<Vec<u8>>,
    /// Whether nothing of lower layers is seen in it.
    hides_lower: bool,
}

/// Measures a tree. Whiteouts that hide nothing are removed from it: lists of a folder that only one layer has would show them.
///
/// Errors: ECANCELED when it is cancelled.
pub(crate) fn measure(path: &Path, beneath: Beneath<'_>, cancel: &Cancel) -> Result<Measured> {
    let root = tree::open_root(path).file("open folder", path.as_os_str().as_encoded_bytes())?;
    let mut count = Count { seen: HashSet::new(), measured: Measured::default() };
    count.add(&fstat(&root).file("look at", b"/")?);
    let names = tree::names(root.as_fd()).file("read folder", b"/")?;
    let root = Rung::new(root).file("look at", b"/")?;
    let mut levels = vec![Level { folder: root, name: Vec::new(), names, hides_lower: false }];
    loop {
        let Some(level) = levels.last_mut() else { return Ok(count.measured) };
        let Some(name) = level.names.pop() else {
            tree::climb(&mut levels, |level| &mut level.folder).file("leave folder", b"..")?;
            levels.pop();
            continue;
        };
        if cancel.is_cancelled() {
            return Err(Errno::CANCELED).file("measure", &name);
        }
        let folder = level.folder.fd().file("look at", &name)?;
        let stat = match statat(folder, &*name, AtFlags::SYMLINK_NOFOLLOW) {
            // it is in use, and changes
            Err(Errno::NOENT) => continue,
            stat => stat.file("look at", &name)?,
        };
        let hides_lower = level.hides_lower;
        match tree::found(stat) {
            Found::Whiteout => {
                let path: Vec<_> = levels.iter().skip(1).map(|level| &level.name).chain([&name]).cloned().collect();
                let hides_nothing = match beneath {
                    Beneath::Known => false,
                    Beneath::Nothing => true,
                    Beneath::Layers(_) if hides_lower => true,
                    Beneath::Layers(lowers) => matches!(lowers.find(&path).file("look below at", &name)?, Below::Absent),
                };
                let Some(level) = levels.last() else { continue };
                if hides_nothing {
                    unlinkat(level.folder.fd().file("remove whiteout", &name)?, &*name, AtFlags::empty()).file("remove whiteout", &name)?;
                } else {
                    count.add(&stat);
                }
            }
            Found::Folder(stat) => {
                count.add(&stat);
                let folder = match tree::open_folder(folder, &name) {
                    Err(Errno::NOENT | Errno::NOTDIR) => continue,
                    folder => folder.file("open folder", &name)?,
                };
                let is_opaque = !matches!(beneath, Beneath::Known) && tree::is_opaque(folder.as_fd());
                if is_opaque && matches!(beneath, Beneath::Nothing) {
                    fremovexattr(&folder, tree::OPAQUE).file("remove mark of", &name)?;
                }
                let names = tree::names(folder.as_fd()).file("read folder", &name)?;
                let folder = Rung::new(folder).file("look at", &name)?;
                levels.push(Level { folder, name, names, hides_lower: hides_lower || is_opaque });
                tree::shed(&mut levels, |level| &mut level.folder);
            }
            _ => count.add(&stat),
        }
    }
}

struct Count {
    /// Files with several names.
    seen: HashSet<(u64, u64)>,
    measured: Measured,
}

impl Count {
    fn add(&mut self, stat: &Stat) {
        if stat.st_nlink > 1 && !matches!(tree::found(*stat), Found::Folder(_)) && !self.seen.insert((stat.st_dev, stat.st_ino)) {
            return;
        }
        self.measured.inodes += 1;
        self.measured.bytes += stat.st_blocks * BLOCK_BYTES;
    }
}

/// What `st_blocks` counts, whatever the file system's own blocks are.
const BLOCK_BYTES: i64 = 512;
