//! Mounts that only this process' own work sees, in a mount namespace that ends with a thread: nothing has to be unmounted, whatever happens.

use std::fs;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::error::{Error, IoContext as _, Result};

/// Does something on a thread with a mount namespace of its own, and waits for it.
pub(crate) fn in_own_mounts<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let own = || {
        let (root, none): (_, Option<&str>) = (Path::new("/"), None);
        unshare(CloneFlags::CLONE_FS | CloneFlags::CLONE_NEWNS).on("make a mount namespace for", root)?;
        mount(none, root, none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).on("make mounts private below", root)?;
        work()
    };
    thread::scope(|scope| {
        let stage = thread::Builder::new().name("mounts".to_owned());
        let spawned = stage.spawn_scoped(scope, own).on("start a thread for", Path::new("mounts"))?;
        spawned.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Tries an overlay whose folders are beside `base`.
///
/// Errors: why overlays cannot be used there.
pub(super) fn blocking_probe(base: &Path) -> Result<(), String> {
    blocking_try(base, |[lower, upper, work, merged]| {
        blocking_overlay(lower, upper, work, merged)?;
        // on some file systems an overlay is mounted, and then takes no file
        let file = merged.join("file");
        fs::write(&file, "").on("write", &file)?;
        fs::remove_file(&file).on("remove", &file)
    })
}

/// Tries one whose lower folder is id-mapped.
///
/// Errors: why that cannot be done.
pub(super) fn blocking_probe_maps(base: &Path) -> Result<(), String> {
    const OUTSIDE: u32 = 1000;
    blocking_try(base, |[lower, upper, work, merged]| {
        let file = lower.join("file");
        fs::write(&file, "").on("write", &file)?;
        let map = format!("0 {OUTSIDE} 1");
        let namespace = x_idmap::blocking_user_namespace(&map, &map).on("make a user namespace for", lower)?;
        blocking_mapped(lower, lower, namespace.as_fd())?;
        blocking_overlay(lower, upper, work, merged)?;
        let file = merged.join("file");
        let owner = fs::metadata(&file).on("look at", &file)?.uid();
        if owner == OUTSIDE { Ok(()) } else { Err(Error::Unimplemented(format!("the kernel shows user {owner} instead of {OUTSIDE}"))) }
    })
}

/// Mounts a folder on another, or on itself, with its users and groups as a user namespace maps them.
pub(crate) fn blocking_mapped(folder: &Path, at: &Path, namespace: BorrowedFd<'_>) -> Result<()> {
    let open = |path: &Path| fs::File::open(path).on("open", path);
    x_idmap::mount_mapped(open(folder)?.as_fd(), open(at)?.as_fd(), namespace).on("map the users of", folder)
}

fn blocking_overlay(lower: &Path, upper: &Path, work: &Path, merged: &Path) -> Result<()> {
    let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
    mount(Some("overlay"), merged, Some("overlay"), MsFlags::empty(), Some(&*options)).on("mount an overlay at", merged)
}

fn blocking_try(base: &Path, attempt: impl FnOnce(&[PathBuf; 4]) -> Result<()> + Send) -> Result<(), String> {
    // beside the snapshots: another process, which this one is about to replace, may be removing leftovers
    let folder = base.with_file_name("check");
    let names = ["lower", "upper", "work", "merged"].map(|name| folder.join(name));
    super::folders::blocking_remove(&folder).map_err(|error| error.chain())?;
    let tried = in_own_mounts(|| {
        for path in &names {
            fs::create_dir_all(path).on("make folder", path)?;
        }
        attempt(&names)
    });
    // the next start removes it otherwise
    let _ = super::folders::blocking_remove(&folder);
    tried.map_err(|error: Error| error.chain())
}
