//! The folder `pod` in the bundle of a pod: its files, and what `delete` needs to clean up after a dead keeper.
//!
//! ```text
//!  BUNDLE/pod/hostname, hosts, resolv.conf    mounted into its containers
//!  BUNDLE/pod/shm                             a file system in memory, mounted there
//!  BUNDLE/pod/leftovers                       what the pod has made outside of its bundle: JSON
//!  BUNDLE/pod/containers/ID                   the journal of a container, a hard link: its own bundle may be removed before
//! ```
//!
//! **Invariant:** removing can be repeated, and follows no mount.
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use serde::{Deserialize, Serialize};
use x_engine::control;

use crate::whole_file::blocking_replace;

/// The folder.
pub(crate) const FOLDER: &str = "pod";
/// The memory that containers share, in it.
pub(crate) const SHM: &str = "shm";
const CONTAINERS: &str = "containers";
const LEFTOVERS: &str = "leftovers";

/// What a pod has made outside of its bundle.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Leftovers {
    /// Folders of cgroups, each after those above it.
    pub(crate) cgroups: Vec<PathBuf>,
    /// A slice that it has had systemd start.
    pub(crate) slice: Option<Slice>,
}

/// A slice of systemd's.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Slice {
    pub(crate) name: String,
    /// Its folders, where systemd makes them.
    pub(crate) folders: Vec<PathBuf>,
}

impl Slice {
    /// Whether nothing is in it: stopping it would end what is.
    pub(crate) fn blocking_is_empty(&self) -> bool {
        self.folders.iter().all(|folder| !folder.exists() || control::is_empty(folder))
    }
}

impl Leftovers {
    /// Writes them, before they are made. The folder must be there. Without any there is no file.
    pub(crate) fn blocking_write(&self, bundle: &Path) -> io::Result<()> {
        if *self == Self::default() {
            return blocking_remove_file(&bundle.join(FOLDER).join(LEFTOVERS));
        }
        let bytes = serde_json::to_vec(self).expect("a list of paths has a JSON form");
        blocking_replace(&bundle.join(FOLDER).join(LEFTOVERS), &bytes, 0o600)
    }

    /// Reads them; none if there are none, or they cannot be read.
    pub(crate) fn blocking_read(bundle: &Path) -> Self {
        let bytes = fs::read(bundle.join(FOLDER).join(LEFTOVERS)).unwrap_or_default();
        serde_json::from_slice(&bytes).unwrap_or_default()
    }

    /// Removes the cgroups that are empty, from the last one on.
    pub(crate) fn blocking_remove_cgroups(&self) {
        for folder in self.cgroups.iter().rev() {
            if let Err(error) = control::remove_if_empty(folder) {
                log::info!(path:% = folder.display(), error:%; "the cgroup of a pod stays");
            }
        }
    }
}

/// Keeps the journal of a container also if its bundle is removed. One of the name is replaced.
pub(crate) fn blocking_link_journal(bundle: &Path, id: &str, journal: &Path) -> io::Result<()> {
    let folder = bundle.join(FOLDER).join(CONTAINERS);
    match fs::create_dir(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    let link = folder.join(id);
    blocking_unlink_journal(bundle, id)?;
    fs::hard_link(journal, link)
}

/// The container is deleted.
pub(crate) fn blocking_unlink_journal(bundle: &Path, id: &str) -> io::Result<()> {
    blocking_remove_file(&bundle.join(FOLDER).join(CONTAINERS).join(id))
}

/// One that is not there is removed.
fn blocking_remove_file(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// The containers whose journals are kept, with their paths.
pub(crate) fn blocking_journals(bundle: &Path) -> Vec<(String, PathBuf)> {
    let entries = fs::read_dir(bundle.join(FOLDER).join(CONTAINERS)).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().into_string().ok()?, entry.path()))).collect()
}

/// Removes the folder, with what is mounted in it.
pub(crate) fn blocking_remove(bundle: &Path) -> io::Result<()> {
    let folder = bundle.join(FOLDER);
    let shm = folder.join(SHM);
    loop {
        match umount2(&shm, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            // One may be below another.
            Ok(()) => {}
            // Not mounted, or not there.
            Err(Errno::EINVAL | Errno::ENOENT) => break,
            Err(error) => return Err(error.into()),
        }
    }
    match fs::remove_dir_all(&folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_journal_of_a_container_outlives_its_bundle() {
        let bundle = scratch::Folder::new("pod-folder");
        fs::create_dir(bundle.join(FOLDER)).expect("a folder");
        for content in ["one", "two"] {
            fs::write(bundle.join("journal.new"), content).expect("a file");
            fs::rename(bundle.join("journal.new"), bundle.join("journal")).expect("renamed");
            blocking_link_journal(&bundle, "c1", &bundle.join("journal")).expect("linked");
            let [(id, path)] = &blocking_journals(&bundle)[..] else { panic!("one journal") };
            assert_eq!((id.as_str(), fs::read_to_string(path).expect("readable")), ("c1", content.to_owned()));
        }
        fs::remove_file(bundle.join("journal")).expect("removed");
        assert_eq!(fs::read_to_string(&blocking_journals(&bundle)[0].1).expect("readable"), "two");
        for _ in 0..2 {
            blocking_unlink_journal(&bundle, "c1").expect("none is no error");
        }
        assert!(blocking_journals(&bundle).is_empty());
    }

    #[test]
    fn a_cgroup_that_is_in_use_stays_with_those_above_it() {
        let folder = scratch::Folder::new("pod-cgroups");
        let cgroups: Vec<PathBuf> = ["a", "a/b", "a/b/c"].iter().map(|path| folder.join(path)).collect();
        fs::create_dir_all(&cgroups[2]).expect("folders");
        fs::create_dir(folder.join("a/other")).expect("a folder");
        let slice = Some(Slice { name: "kubepods.slice".to_owned(), folders: vec![folder.join("none")] });
        let leftovers = Leftovers { cgroups, slice };
        fs::create_dir(folder.join(FOLDER)).expect("a folder");
        leftovers.blocking_write(&folder).expect("written");
        assert_eq!(Leftovers::blocking_read(&folder), leftovers);
        assert!(leftovers.slice.as_ref().is_some_and(Slice::blocking_is_empty));
        leftovers.blocking_remove_cgroups();
        assert!(folder.join("a/other").exists() && !folder.join("a/b").exists());
        Leftovers::default().blocking_write(&folder).expect("removed");
        assert!(!folder.join(FOLDER).join(LEFTOVERS).exists());
        assert_eq!(Leftovers::blocking_read(&folder), Leftovers::default());
    }
}
