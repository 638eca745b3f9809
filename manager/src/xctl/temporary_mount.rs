//! A snapshot's mounts, for the time that it takes to read or write files of it.
//!
//! **Invariant:** nothing is left behind, even by SIGKILL: the mounts are in a mount namespace of a thread, which ends with it.

use std::path::Path;

use containerd_client::types::Mount;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::error::{Error, IoContext as _, Result};
use crate::stdio;

/// Runs `work` with `place`, at which `mounts` are mounted for nobody else. The folder is made.
pub(crate) fn with<T: Send>(place: &Path, mounts: &[Mount], work: impl FnOnce(&Path) -> Result<T> + Send) -> Result<T> {
    stdio::make_folder(place)?;
    std::thread::scope(|scope| {
        let worker = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS).on("make a mount namespace at", "/")?;
            mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).on("make private", "/")?;
            for each in mounts {
                let (flags, data) = flags(&each.options);
                let source = Path::new(&each.source);
                mount(Some(source), place, Some(each.r#type.as_str()), flags, Some(data.as_str())).on("mount", source)?;
            }
            work(place)
        });
        worker.join().unwrap_or_else(|_| Err(Error::refused("reading the root file system failed; this is a bug of xctl")))
    })
}

/// Options of mount(8), as snapshotters give them.
fn flags(options: &[String]) -> (MsFlags, String) {
    let (mut flags, mut data) = (MsFlags::empty(), Vec::new());
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" => flags -= MsFlags::MS_RDONLY,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            other => data.push(other),
        }
    }
    (flags, data.join(","))
}
