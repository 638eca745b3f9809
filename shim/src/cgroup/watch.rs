//! Wake-ups after OOM kills.
//!
//! **Invariant:** a wake-up only asks for a read of the kernel's counter, which decides.
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

/// Wakes when [`super::Cgroup::oom_kills`] may have grown. Spurious wake-ups are allowed.
#[derive(Debug)]
pub(crate) struct OomWatch {
    folder: PathBuf,
    bell: Bell,
}

/// The kernel's notification.
#[derive(Debug)]
enum Bell {
    /// v1 wakes before the kernel has chosen a victim and counted it: each wake-up is repeated. `echo`: when the next repetition is
    /// due, and its number.
    V1 {
        event: AsyncFd<OwnedFd>,
        echo: Option<(Instant, usize)>,
    },
    V2 {
        memory: AsyncFd<File>,
        group: AsyncFd<File>,
    },
}

/// The result of a wait for an [`OomWatch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OomWake {
    /// Read the counter.
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

    /// Source: cgroup-v2.rst, "memory.events": a change makes a file modified event, which poll(2) reports as POLLPRI until the file is
    /// read again. That of cgroup.events comes when the last process has exited, which is when the counter is read for the last time.
    /// An inotify instance would work as well, but a user may have only 128 of them.
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

    /// Wakes once more soon: a kill that woke an earlier watch may not have been counted yet.
    pub(crate) fn follow(&mut self) {
        match &mut self.bell {
            Bell::V1 { echo, .. } => *echo = echo_number(0),
            Bell::V2 { .. } => {}
        }
    }

    /// Waits for the next wake. Can be dropped at any time without missing one.
    ///
    /// On v2 not every kernel wakes at the removal of a cgroup: drop the watch with the container.
    pub(crate) async fn changed(&mut self) -> OomWake {
        let woken = match &mut self.bell {
            Bell::V1 { event, echo } => hear_v1(event, echo).await,
            Bell::V2 { memory, group } => tokio::select! {
                woken = wait_v2(memory) => woken,
                woken = wait_v2(group) => woken,
            },
        };
        if woken.is_ok() && self.folder.is_dir() { OomWake::Changed } else { OomWake::Gone }
    }

    /// Gives the descriptors away. One of them is ready when [`OomWatch::changed`] would have returned: a file, which can always be read,
    /// has priority data then.
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
        // The count does not matter. Without one, the wake-up was spurious.
        let mut count = [0; 8];
        if let Ok(read) = ready.try_io(|event| Ok(nix::unistd::read(event.get_ref(), &mut count)?)) {
            read?;
            *echo = echo_number(0);
            return Ok(());
        }
    }
}

async fn wait_v2(file: &AsyncFd<File>) -> io::Result<()> {
    // Before the file is read: a later event wakes again.
    file.ready(Interest::PRIORITY).await?.clear_ready();
    silence(file.get_ref())
}

/// Reads an events file from its beginning: events so far cause no more wake-ups.
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

/// When to read again after a v1 wake-up, each delay after the one before. Choosing a victim takes microseconds, or long on a host that is
/// out of memory as a whole.
const ECHOES: [Duration; 3] = [Duration::from_millis(10), Duration::from_millis(200), Duration::from_secs(3)];
