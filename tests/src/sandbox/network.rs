//! A network namespace at a path, as CRI makes one for a pod.

use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

/// A network namespace; it ends with this value, unless a process is in it.
#[derive(Debug)]
pub struct Network(PathBuf);

impl Network {
    /// Makes one, mounted at `path`.
    pub fn new(path: &Path) -> Result<Self> {
        fs::write(path, "").with_context(|| format!("make {}", path.display()))?;
        let place = path.to_owned();
        // A thread has namespaces of its own once it unshares them, and no other code runs in this one.
        let made = std::thread::spawn(move || -> Result<()> {
            unshare(CloneFlags::CLONE_NEWNET).context("a new network namespace")?;
            let none: Option<&str> = None;
            mount(Some("/proc/thread-self/ns/net"), &place, none, MsFlags::MS_BIND, none).context("mount the network namespace")
        });
        made.join().map_err(|_| anyhow!("the thread that makes a network namespace panicked"))??;
        Ok(Self(path.to_owned()))
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Its number: that of a process in it is the same.
    pub fn number(&self) -> Result<u64> {
        Ok(fs::metadata(&self.0)?.ino())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _gone_with_the_run = umount2(&self.0, MntFlags::MNT_DETACH);
        let _gone_with_the_run = fs::remove_file(&self.0);
    }
}

/// The number of a namespace of a process: `kind` is a name in `/proc/PID/ns`.
pub fn namespace_of(pid: u32, kind: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/ns/{kind}");
    Ok(fs::metadata(&path).with_context(|| format!("look at {path}"))?.ino())
}
