//! Id-mapped mounts: `uidmap=` and `gidmap=`.
//!
//! An overlay takes the maps of the folders below it, any other file system one of its own. Either way a mount is needed
//! elsewhere for a moment: in the folder `x-staging` of the bundle.
//!
//! **Invariant:** that folder is empty except after a crash in the middle; the next attempt or unmount then clears it.
use std::fs::{self, DirBuilder};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use super::options::{Maps, Options};
use super::{Mount, MountError, Place, Unmount, errno, make, system, unmake};

/// Makes a mount, id-mapped if its options request it.
pub(super) fn first_mount(rootfs: &Path, wanted: &Mount, options: &Options, place: &Place) -> Result<(), MountError> {
    let Some(Ok(maps)) = &options.maps else { return make::first_mount(wanted, options, options.data.clone(), place) };
    let staging = Staging::open(rootfs, maps)?;
    let done = if wanted.kind == "overlay" {
        staging.map_lower_folders(wanted, &options.data, place).and_then(|data| make::first_mount(wanted, options, data, place))
    } else {
        let step = staging.step(0)?;
        make::first_mount(wanted, options, options.data.clone(), &step).and_then(|()| {
            // Opened again: now it is the mount's root.
            staging.map(&staging.step(0)?, place)
        })
    };
    clear(rootfs)?;
    done
}

/// Removes the leftovers of an earlier attempt.
pub(super) fn clear(rootfs: &Path) -> Result<(), MountError> {
    let folder = rootfs.with_file_name(NAME);
    if !folder.exists() {
        return Ok(());
    }
    unmake::unmount_below(&folder, Unmount::Detach)?;
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        // Folders without a mount are empty; anything else stays, and fails below.
        let _ = fs::remove_dir(entry.path());
    }
    match fs::remove_dir(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(system("remove", &folder)(errno(&error))),
        _ => Ok(()),
    }
}

struct Staging {
    folder: PathBuf,
    user_namespace: OwnedFd,
}

impl Staging {
    fn open(rootfs: &Path, maps: &Maps) -> Result<Self, MountError> {
        clear(rootfs)?;
        let folder = rootfs.with_file_name(NAME);
        DirBuilder::new().mode(0o700).create(&folder).map_err(|error| system("make", &folder)(errno(&error)))?;
        let user_namespace = x_idmap::blocking_user_namespace(&maps.uid, &maps.gid)
            .map_err(|error| system("make a user namespace for", rootfs)(errno(&error)))?;
        Ok(Self { folder, user_namespace })
    }

    /// The place of a mount, created if needed.
    fn step(&self, number: usize) -> Result<Place, MountError> {
        let path = self.folder.join(number.to_string());
        match DirBuilder::new().mode(0o700).create(&path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(system("make", &path)(errno(&error))),
            _ => Place::open(&path, ""),
        }
    }

    fn map(&self, source: &Place, target: &Place) -> Result<(), MountError> {
        x_idmap::mount_mapped(source.fd.as_fd(), target.fd.as_fd(), self.user_namespace.as_fd())
            .map_err(|error| system("map the users of", &source.path)(errno(&error)))
    }

    /// Replaces the lower folders with mapped copies.
    fn map_lower_folders(&self, wanted: &Mount, data: &[String], place: &Place) -> Result<Vec<String>, MountError> {
        let mut data = data.to_vec();
        let lower = data.iter_mut().find_map(|option| option.strip_prefix("lowerdir=").map(str::to_owned).map(|lower| (option, lower)));
        let Some((option, lower)) = lower else { return Ok(data) };
        if lower.contains('\\') || lower.contains("::") {
            let (kind, path) = (wanted.kind.clone(), place.path.clone());
            return Err(MountError::Unsupported { kind, path, why: "its lower folders cannot be separated to map them" });
        }
        let mut mapped = Vec::new();
        for (number, folder) in lower.split(':').enumerate() {
            let step = self.step(number)?;
            self.map(&Place::open(Path::new(folder), "")?, &step)?;
            let path = step.path.to_str().ok_or_else(|| system("name", &step.path)(Errno::EILSEQ))?;
            mapped.push(path.to_owned());
        }
        *option = format!("lowerdir={}", mapped.join(":"));
        Ok(data)
    }
}

const NAME: &str = "x-staging";
