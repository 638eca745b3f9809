//! What a tree uses of its file system.

use std::collections::HashSet;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, Stat, fremovexattr, fstat, statat, unlinkat};
use rustix::io::Errno;

use super::tree::{self, Found};
use super::{OnFile as _, Result};

/// What a tree uses.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Measured {
    /// As the file system counts them: holes use none, links to one file use theirs once.
    pub(crate) bytes: i64,
    pub(crate) inodes: i64,
}

/// Measures a tree. If nothing is below it, whiteouts in it hide nothing and are removed: where a layer is mounted alone, they would be seen.
pub(crate) fn measure(path: &Path, is_lowest: bool) -> Result<Measured> {
    let root = tree::open_root(path).file("open folder", path.as_os_str().as_encoded_bytes())?;
    let mut count = Count { seen: HashSet::new(), measured: Measured::default() };
    count.add(&fstat(&root).file("look at", b"/")?);
    let mut levels: Vec<(OwnedFd, Vec<Vec<u8>>)> =
        vec![(root.try_clone().file("open", b"/")?, tree::names(root.as_fd()).file("read folder", b"/")?)];
    while let Some((folder, names)) = levels.last_mut() {
        let Some(name) = names.pop() else {
            levels.pop();
            continue;
        };
        let stat = match statat(&*folder, &*name, AtFlags::SYMLINK_NOFOLLOW) {
            // it is in use, and changes
            Err(Errno::NOENT) => continue,
            stat => stat.file("look at", &name)?,
        };
        match tree::found(stat) {
            Found::Whiteout if is_lowest => unlinkat(&*folder, &*name, AtFlags::empty()).file("remove whiteout", &name)?,
            Found::Folder(stat) => {
                count.add(&stat);
                let below = match tree::open_folder(folder.as_fd(), &name) {
                    Err(Errno::NOENT | Errno::NOTDIR) => continue,
                    below => below.file("open folder", &name)?,
                };
                if is_lowest && tree::is_opaque(below.as_fd()) {
                    fremovexattr(&below, tree::OPAQUE).file("remove mark of", &name)?;
                }
                let names = tree::names(below.as_fd()).file("read folder", &name)?;
                levels.push((below, names));
            }
            _ => count.add(&stat),
        }
    }
    Ok(count.measured)
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
