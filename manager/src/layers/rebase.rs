//! A layer that was applied without the layers below it, put on top of them.
//!
//! Folders for which it had no entry were made as root's, for all to read. They get owner, mode, attributes and times of the layers below.

use std::os::fd::AsFd as _;
use std::path::Path;

use rustix::fs::{AtFlags, fchmod, fchown, utimensat};
use rustix::io::Errno;

use super::apply::copy_attributes;
use super::lower::{Below, Lowers};
use super::{OnFile as _, Result, tree};

/// Corrects the folders of an upper folder that its layer had no entries for. Done twice, it gives the same.
///
/// False if a layer below has a link where one of them is, which the layer's files should have followed: only applying it again, with the layers
/// below known, gives what it means.
pub(crate) fn rebase(upper: &Path, lowers: &Lowers, implicit: &[Vec<u8>]) -> Result<bool> {
    let mut is_right = true;
    let root = tree::open_root(upper).file("open folder", upper.as_os_str().as_encoded_bytes())?;
    for path in implicit {
        if path.is_empty() {
            if let Some(stat) = lowers.root().file("look at", b"/")? {
                fchown(&root, Some(rustix::fs::Uid::from_raw(stat.st_uid)), Some(rustix::fs::Gid::from_raw(stat.st_gid)))
                    .file("set owner of", b"/")?;
                fchmod(&root, rustix::fs::Mode::from_raw_mode(stat.st_mode & 0o7777)).file("set mode of", b"/")?;
            }
            continue;
        }
        let names: Vec<Vec<u8>> = path.split(|byte| *byte == b'/').map(ToOwned::to_owned).collect();
        let (lower, stat) = match lowers.find(&names).file("look below at", path)? {
            Below::Folder(lower, stat) => (lower, stat),
            Below::Symlink(_) => {
                is_right = false;
                continue;
            }
            Below::Absent | Below::Other(..) => continue,
        };
        let root = root.try_clone().file("open", path)?;
        let opened = names.iter().try_fold(root, |folder, name| tree::open_folder(folder.as_fd(), name));
        let folder = match opened {
            Ok(folder) => folder,
            // the client has removed it
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
            Err(error) => return Err(error).file("open folder", path),
        };
        copy_attributes(&lower, &stat, &folder).file("set owner and mode of", path)?;
        utimensat(&folder, ".", &tree::timestamps(tree::mtime(&stat)), AtFlags::empty()).file("set times of", path)?;
    }
    Ok(is_right)
}
