//! Wakes for want of memory.
//!
//! **Invariant:** a wake says "look", no more: the truth is the kernel's counter.
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

use super::CgroupError;
use crate::sys;

/// Wakes when [`super::Cgroup::oom_kills`] may have grown. Wakes may come without reason.
#[derive(Debug)]
pub(crate) struct OomWatch {
    folder: PathBuf,
    bell: Bell,
}

/// What the kernel rings.
#[derive(Debug)]
enum Bell {
    /// v1 wakes before the kernel has chosen whom to kill, and so before it counts: each wake has echoes. `echo`: when the next one is
    /// due, and which it is.
    V1 {
        event: AsyncFd<OwnedFd>,
        echo: Option<(Instant, usize)>,
    },
    V2 {
        memory: AsyncFd<File>,
        group: AsyncFd<File>,
    },
}

/// What an [`OomWatch`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OomWake {
    /// Look at the counter.
    Changed,
    /// The cgroup is gone: the watch has ended.
    Gone,
}

impl OomWatch {
    /// Source: cgroup-v1/memory.rst, "OOM Control": an eventfd is registered with memory.oom_control.
    pub(super) fn begin_v1(folder: &Path) -> Result<Self, CgroupError> {
        let event = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK).map_err(failed("watch", folder))?;
        let control = folder.join("memory.oom_control");
        let control = File::open(&control).map_err(failed("open", &control))?;
        let order = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
        let path = folder.join("cgroup.event_control");
        fs::write(&path, order).map_err(failed("write", &path))?;
        let event = sys::ready::to_read(event.into()).map_err(failed("watch", folder))?;
        Ok(Self { folder: folder.to_owned(), bell: Bell::V1 { event, echo: None } })
    }

    /// Source: cgroup-v2.rst, "memory.events": a change makes a file modified event, which poll(2) tells as POLLPRI until the file is
    /// read again. That of cgroup.events comes when the last process has gone, which is when the counter is looked at for the last time.
    /// An inotify instance would do as well, but a user has 128 of them.
    pub(super) fn begin_v2(folder: &Path) -> Result<Self, CgroupError> {
        let open = |name| {
            let path = folder.join(name);
            let file = File::open(&path).map_err(failed("open", &path))?;
            silence(&file).map_err(failed("read", &path))?;
            sys::ready::to_hear(file).map_err(failed("watch", &path))
        };
        let bell = Bell::V2 { memory: open("memory.events")?, group: open("cgroup.events")? };
        Ok(Self { folder: folder.to_owned(), bell })
    }

    /// Has it wake as if something had just happened: what a watch before this one was woken by may not have been counted yet.
    pub(crate) fn follow(&mut self) {
        match &mut self.bell {
            Bell::V1 { echo, .. } => *echo = echo_number(0),
            Bell::V2 { .. } => {}
        }
    }

    /// Waits for the next wake. Can be dropped at any time without missing one.
    ///
    /// On v2 the removal of a cgroup makes no wake of its own on every kernel: drop the watch with the container.
    pub(crate) async fn changed(&mut self) -> OomWake {
        let heard = match &mut self.bell {
            Bell::V1 { event, echo } => hear_v1(event, echo).await,
            Bell::V2 { memory, group } => tokio::select! {
                heard = hear_v2(memory) => heard,
                heard = hear_v2(group) => heard,
            },
        };
        if heard.is_ok() && self.folder.is_dir() { OomWake::Changed } else { OomWake::Gone }
    }

    /// Gives the descriptors away. One of them is ready when [`OomWatch::changed`] would have returned: a file, which can always be read,
    /// has something of priority then.
    pub(crate) fn into_descriptors(self) -> Vec<OwnedFd> {
        match self.bell {
            Bell::V1 { event, .. } => vec![event.into_inner()],
            Bell::V2 { memory, group } => vec![memory.into_inner().into(), group.into_inner().into()],
        }
    }
}

async fn hear_v1(event: &AsyncFd<OwnedFd>, echo: &mut Option<(Instant, usize)>) -> io::Result<()> {
    loop {
        let mut ready = match *echo {
            None => event.readable().await?,
            Some((at, number)) => match timeout_at(at, event.readable()).await {
                Ok(ready) => ready?,
                Err(_) => {
                    *echo = echo_number(number + 1);
                    return Ok(());
                }
            },
        };
        // The count is of no interest. Where there is none, it was woken in vain.
        let mut count = [0; 8];
        if let Ok(read) = ready.try_io(|event| Ok(nix::unistd::read(event.get_ref(), &mut count)?)) {
            read?;
            *echo = echo_number(0);
            return Ok(());
        }
    }
}

async fn hear_v2(file: &AsyncFd<File>) -> io::Result<()> {
    // Before the file is read: what comes after that rings again.
    file.ready(Interest::PRIORITY).await?.clear_ready();
    silence(file.get_ref())
}

/// Reads a file of events from its beginning: what has happened so far does not ring any more.
fn silence(file: &File) -> io::Result<()> {
    let mut text = [0; 1024];
    file.read_at(&mut text, 0).map(drop)
}

fn echo_number(number: usize) -> Option<(Instant, usize)> {
    ECHOES.get(number).map(|delay| (Instant::now() + *delay, number))
}

fn failed<E: Into<io::Error>>(op: &'static str, path: &Path) -> impl FnOnce(E) -> CgroupError {
    move |error| CgroupError::Io { op, path: path.to_owned(), source: error.into() }
}

/// When to look again after a wake of v1, each after the one before. Choosing a victim takes microseconds, or long on a host that is
/// out of memory as a whole.
const ECHOES: [Duration; 3] = [Duration::from_millis(10), Duration::from_millis(200), Duration::from_secs(3)];
