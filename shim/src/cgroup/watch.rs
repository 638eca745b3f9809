//! Wakes for want of memory.
//!
//! **Invariant:** a wake says "look", no more: the truth is the kernel's counter.
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, timeout_at};

use super::CgroupError;
use crate::sys;

/// Wakes when [`super::Cgroup::oom_kills`] may have grown. Wakes may come without reason.
#[derive(Debug)]
pub(crate) struct OomWatch {
    folder: PathBuf,
    fd: AsyncFd<OwnedFd>,
    /// v1 wakes before the kernel has chosen whom to kill, and so before it counts: each wake has echoes.
    has_echoes: bool,
    /// When the next echo is due, and which it is.
    echo: Option<(Instant, usize)>,
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
        Self::begin(folder, event.into(), true)
    }

    /// Source: cgroup-v2.rst, "memory.events": a change makes a file modified event. That of cgroup.events comes when the last process
    /// has gone, which is when the counter is looked at for the last time.
    pub(super) fn begin_v2(folder: &Path) -> Result<Self, CgroupError> {
        let inotify = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK).map_err(failed("watch", folder))?;
        for name in ["memory.events", "cgroup.events"] {
            let path = folder.join(name);
            let flags = AddWatchFlags::IN_MODIFY | AddWatchFlags::IN_DELETE_SELF;
            inotify.add_watch(&path, flags).map_err(failed("watch", &path))?;
        }
        Self::begin(folder, inotify.into(), false)
    }

    fn begin(folder: &Path, fd: OwnedFd, has_echoes: bool) -> Result<Self, CgroupError> {
        let fd = sys::ready::to_read(fd).map_err(failed("watch", folder))?;
        Ok(Self { folder: folder.to_owned(), fd, has_echoes, echo: None })
    }

    /// Has it wake as if something had just happened: what a watch before this one was woken by may not have been counted yet.
    pub(crate) fn follow(&mut self) {
        self.echo = if self.has_echoes { Self::echo(0) } else { None };
    }

    /// Waits for the next wake. Can be dropped at any time without missing one.
    ///
    /// On v2 the removal of a cgroup makes no wake of its own on every kernel: drop the watch with the container.
    pub(crate) async fn changed(&mut self) -> OomWake {
        loop {
            let ready = match self.echo {
                None => self.fd.readable().await,
                Some((at, number)) => match timeout_at(at, self.fd.readable()).await {
                    Ok(ready) => ready,
                    Err(_) => {
                        self.echo = Self::echo(number + 1);
                        return self.state();
                    }
                },
            };
            let Ok(mut ready) = ready else { return OomWake::Gone };
            match ready.try_io(|fd| empty(fd.get_ref())) {
                Ok(Ok(())) => {
                    self.echo = if self.has_echoes { Self::echo(0) } else { None };
                    return self.state();
                }
                Ok(Err(_)) => return OomWake::Gone,
                // Woken in vain.
                Err(_) => {}
            }
        }
    }

    /// Gives the descriptor away. It can be read when [`OomWatch::changed`] would have returned.
    pub(crate) fn into_descriptor(self) -> OwnedFd {
        self.fd.into_inner()
    }

    fn state(&self) -> OomWake {
        if self.folder.is_dir() { OomWake::Changed } else { OomWake::Gone }
    }

    fn echo(number: usize) -> Option<(Instant, usize)> {
        ECHOES.get(number).map(|delay| (Instant::now() + *delay, number))
    }
}

/// Reads all that waits, which is of no interest by itself.
fn empty(fd: &OwnedFd) -> io::Result<()> {
    let mut buffer = [0; 1024];
    nix::unistd::read(fd, &mut buffer)?;
    loop {
        match nix::unistd::read(fd, &mut buffer) {
            Ok(1..) => {}
            Ok(0) | Err(nix::errno::Errno::EAGAIN) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn failed<E: Into<io::Error>>(op: &'static str, path: &Path) -> impl FnOnce(E) -> CgroupError {
    move |error| CgroupError::Io { op, path: path.to_owned(), source: error.into() }
}

/// When to look again after a wake of v1, each after the one before. Choosing a victim takes microseconds, or long on a host that is
/// out of memory as a whole.
const ECHOES: [Duration; 3] = [Duration::from_millis(10), Duration::from_millis(200), Duration::from_secs(3)];
