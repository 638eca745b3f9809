//! Mounts that only this process' own work sees, in a mount namespace that ends with a thread: nothing has to be unmounted, whatever happens.

use std::fs;
use std::path::Path;
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
    // beside the snapshots: another process, which this one is about to replace, may be removing leftovers
    let folder = base.with_file_name("check");
    let names = ["lower", "upper", "work", "merged"].map(|name| folder.join(name));
    super::folders::blocking_remove(&folder).map_err(|error| error.chain())?;
    let tried = in_own_mounts(|| {
        for path in &names {
            fs::create_dir_all(path).on("make folder", path)?;
        }
        let [lower, upper, work, merged] = &names;
        let options = format!("lowerdir={},upperdir={},workdir={}", lower.display(), upper.display(), work.display());
        mount(Some("overlay"), merged, Some("overlay"), MsFlags::empty(), Some(&*options)).on("mount an overlay at", merged)?;
        // on some file systems an overlay is mounted, and then takes no file
        let file = merged.join("file");
        fs::write(&file, "").on("write", &file)?;
        fs::remove_file(&file).on("remove", &file)
    });
    // the next start removes it otherwise
    let _ = super::folders::blocking_remove(&folder);
    tried.map_err(|error: Error| error.chain())
}
