//! Outputs that go into files: `file://`.
//!
//! Owns a thread for each process that has such outputs, which splices from the keeper's pipe to the file. A hung disk blocks that
//! thread, and with it one container, never the keeper.
//!
//! ```text
//!  container ─▶ pipe (the keeper holds it) ─▶ splice ─▶ file, at its end
//! ```
//!
//! The pipe keeps what a killed worker had not spliced for the next generation. The file is never opened for appending: splice(2)
//! refuses that; each turn seeks to the end instead, so that writing continues at the new end of a truncated file.
//!
//! A full disk blocks the container for [`STALL_WITHIN`]; from then on the pump discards its output, counts it and logs the count,
//! until the disk has room again: a workload is worth more than its log.
//!
//! **Invariant:** both outputs of a process into the same file share one open file description.
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use tokio::sync::watch;

use super::cause::Cause;
use super::id::ProcessKey;
use super::link::Link;
use crate::handover::{Op, Stream};
use crate::sys;

/// The running pump of a process. Dropping it drains the pipes and ends it.
#[derive(Debug)]
pub(super) struct Pump {
    orders: Arc<Orders>,
    /// The number of flushes done; closed when everything is in the files.
    flushed: watch::Receiver<u64>,
}

/// Requests to a pump's thread.
#[derive(Debug)]
struct Orders {
    bell: EventFd,
    flushes: AtomicU64,
    stop: AtomicBool,
}

impl Pump {
    /// Starts to move the outputs of a process into files.
    pub(super) fn start(link: &Rc<Link>, key: ProcessKey, files: Vec<(Stream, PathBuf)>) -> io::Result<Rc<Self>> {
        let (sender, flushed) = watch::channel(0);
        let bell = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let orders = Arc::new(Orders { bell, flushes: AtomicU64::new(0), stop: AtomicBool::new(false) });
        let pump = Rc::new(Self { orders: Arc::clone(&orders), flushed });
        let link = Rc::clone(link);
        tokio::task::spawn_local(async move {
            let mut sources = Vec::new();
            for (stream, path) in files {
                match Cause::own(&link).descriptor(link.own_step(), Op::ReadEnd { key: key.to_string(), stream }).await {
                    Ok(Some(end)) => sources.push((end, path)),
                    Ok(None) => {}
                    Err(error) => {
                        log::error!(container:% = key, error:% = error.chain(); "cannot get the output pipe from the keeper: output stays in it until the next worker")
                    }
                }
            }
            if sources.is_empty() {
                return;
            }
            let name = key.to_string();
            let run = move || Thread::new(name, sources, orders, sender).run();
            if let Err(error) = std::thread::Builder::new().name("pump".into()).stack_size(STACK_BYTES).spawn(run) {
                log::error!(container:% = key, error:%; "cannot start a pump");
            }
        });
        Ok(pump)
    }

    /// Waits, with a bound, until the output written so far is in the files.
    pub(super) async fn flush(&self, within: Duration) {
        let wanted = self.orders.flushes.fetch_add(1, Ordering::SeqCst) + 1;
        self.orders.ring();
        let mut flushed = self.flushed.clone();
        if tokio::time::timeout(within, flushed.wait_for(|done| *done >= wanted)).await.is_err() {
            log::warn!("writing output files takes long");
        }
    }

    /// Drains the pipes and waits, with a bound, until that is done and losses are logged.
    pub(super) async fn end(&self, within: Duration) {
        self.orders.stop();
        let mut flushed = self.flushed.clone();
        let ended = async { while flushed.changed().await.is_ok() {} };
        if tokio::time::timeout(within, ended).await.is_err() {
            log::warn!("cannot finish writing output files in time");
        }
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.orders.stop();
    }
}

impl Orders {
    fn stop(&self) {
        self.stop.store(true, Ordering::SeqCst);
        self.ring();
    }

    fn ring(&self) {
        // A full counter wakes the thread as well.
        let _ = self.bell.write(1);
    }
}

/// Opens an output file, creating it and its folder.
pub(super) fn blocking_open(path: &Path) -> io::Result<File> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    // A FIFO without a reader would block the thread for ever: O_NONBLOCK fails with ENXIO instead.
    let flags = nix::libc::O_NOCTTY | nix::libc::O_NONBLOCK;
    let file = File::options().write(true).create(true).truncate(false).mode(0o644).custom_flags(flags).open(path)?;
    let flags = OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(flags & !OFlag::O_NONBLOCK))?;
    Ok(file)
}

/// The work of a pump.
struct Thread {
    key: String,
    sources: Vec<Source>,
    targets: Vec<Target>,
    orders: Arc<Orders>,
    flushed: watch::Sender<u64>,
}

struct Source {
    pipe: File,
    target: usize,
    ended: bool,
}

struct Target {
    path: PathBuf,
    file: Option<File>,
    /// Since when writing fails, and when to retry.
    failing: Option<(Instant, Instant)>,
    lost_bytes: u64,
    /// Bytes read and not yet written, where the kernel cannot splice.
    rest: Vec<u8>,
}

/// The outcome of a turn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Turn {
    /// This number of bytes.
    Moved(usize),
    Empty,
    Stalled,
}

impl Thread {
    fn new(key: String, pipes: Vec<(OwnedFd, PathBuf)>, orders: Arc<Orders>, flushed: watch::Sender<u64>) -> Self {
        let (mut sources, mut targets): (Vec<_>, Vec<Target>) = (Vec::new(), Vec::new());
        for (pipe, path) in pipes {
            let known = targets.iter().position(|target| target.path == path);
            let target = known.unwrap_or_else(|| {
                targets.push(Target { path, file: None, failing: None, lost_bytes: 0, rest: Vec::new() });
                targets.len() - 1
            });
            sources.push(Source { pipe: pipe.into(), target, ended: false });
        }
        Self { key, sources, targets, orders, flushed }
    }

    fn run(mut self) {
        while self.sources.iter().any(|source| !source.ended) {
            let stop = self.orders.stop.load(Ordering::SeqCst);
            let flushes = self.orders.flushes.load(Ordering::SeqCst);
            if stop {
                self.targets.iter_mut().for_each(Target::retry_at_once);
            }
            if self.round() {
                self.flushed.send_replace(flushes);
            }
            if stop {
                break;
            }
            self.wait();
        }
        self.lose_the_rest();
        for target in &self.targets {
            target.tell_loss(&self.key);
        }
    }

    /// Counts as lost what is left in the pipes and in memory.
    fn lose_the_rest(&mut self) {
        for target in &mut self.targets {
            target.lost_bytes += std::mem::take(&mut target.rest).len() as u64;
        }
        for source in self.sources.iter().filter(|source| !source.ended) {
            self.targets[source.target].lost_bytes += sys::descriptors::waiting_bytes(source.pipe.as_fd()).unwrap_or(0) as u64;
        }
    }

    /// Moves the content of the pipes. Returns whether all of it is in the files.
    ///
    /// No more than that: a process that writes as fast as the pump delays neither its other output nor a request.
    fn round(&mut self) -> bool {
        let mut stalled = false;
        for index in 0..self.sources.len() {
            let source = &self.sources[index];
            let mut left = sys::descriptors::waiting_bytes(source.pipe.as_fd()).unwrap_or(0) + self.targets[source.target].rest.len();
            while !self.sources[index].ended {
                match self.turn(index) {
                    Turn::Moved(count) if count < left => left -= count,
                    Turn::Moved(_) | Turn::Empty => break,
                    Turn::Stalled => {
                        stalled = true;
                        break;
                    }
                }
            }
        }
        !stalled
    }

    /// Waits for output, a request, or the retry time of a failing file.
    fn wait(&self) {
        let mut fds = vec![PollFd::new(self.orders.bell.as_fd(), PollFlags::POLLIN)];
        let mut until: Option<Instant> = None;
        for source in self.sources.iter().filter(|source| !source.ended) {
            match self.targets[source.target].failing {
                Some((_, retry_at)) => until = Some(until.map_or(retry_at, |until| until.min(retry_at))),
                None => fds.push(PollFd::new(source.pipe.as_fd(), PollFlags::POLLIN)),
            }
        }
        let timeout = until.map(|until| until.saturating_duration_since(Instant::now()) + Duration::from_millis(1));
        let timeout = timeout.and_then(|timeout| PollTimeout::try_from(timeout).ok()).unwrap_or(PollTimeout::NONE);
        // An interruption counts as a wake-up.
        let _ = poll(&mut fds, timeout);
        let _ = self.orders.bell.read();
    }

    fn turn(&mut self, index: usize) -> Turn {
        let source = &mut self.sources[index];
        let target = &mut self.targets[source.target];
        let now = Instant::now();
        if target.failing.is_some_and(|(_, retry_at)| retry_at > now) {
            return Turn::Stalled;
        }
        match target.take(&source.pipe) {
            Ok(0) => {
                source.ended = true;
                Turn::Empty
            }
            Ok(count) => {
                if target.failing.take().is_some() {
                    target.tell_loss(&self.key);
                    target.lost_bytes = 0;
                    log::info!(container:% = self.key, path:% = target.path.display(); "output file is writable again");
                }
                Turn::Moved(count)
            }
            Err(Errno::EAGAIN) => Turn::Empty,
            Err(Errno::EINTR) => Turn::Moved(0),
            Err(error) => target.failed(&self.key, &source.pipe, error, now),
        }
    }
}

impl Target {
    /// Moves the content of a pipe. 0: end of file.
    fn take(&mut self, pipe: &File) -> Result<usize, Errno> {
        if self.file.is_none() {
            self.file = Some(blocking_open(&self.path).map_err(errno)?);
        }
        let Some(file) = &mut self.file else { return Err(Errno::EBADF) };
        // A device has no end.
        let _ = file.seek(SeekFrom::End(0));
        let flags = SpliceFFlags::SPLICE_F_NONBLOCK | SpliceFFlags::SPLICE_F_MOVE;
        match splice(pipe, None, &*file, None, TURN_BYTES, flags) {
            // A file that cannot be spliced to: some devices and file systems.
            Err(Errno::EINVAL) => copy(pipe, file, &mut self.rest),
            result => result,
        }
    }

    fn failed(&mut self, key: &str, pipe: &File, error: Errno, now: Instant) -> Turn {
        let since = match self.failing {
            Some((since, _)) => since,
            None => {
                log::warn!(container:% = key, path:% = self.path.display(), error:%; "cannot write to output file, will retry");
                now
            }
        };
        self.failing = Some((since, now + RETRY_AFTER));
        if now.duration_since(since) >= STALL_WITHIN {
            if self.lost_bytes == 0 {
                log::error!(container:% = key, path:% = self.path.display(), error:%; "discarding output until its file is writable");
            }
            self.lost_bytes += throw_away(pipe);
        }
        Turn::Stalled
    }

    fn retry_at_once(&mut self) {
        self.failing = self.failing.map(|(since, _)| (since, Instant::now()));
    }

    fn tell_loss(&self, key: &str) {
        if self.lost_bytes > 0 {
            log::error!(container:% = key, path:% = self.path.display(), lost_bytes = self.lost_bytes; "output was lost");
        }
    }
}

/// Copies bytes through memory; what the file does not take waits in `rest`. A worker killed in between loses up to a page.
fn copy(mut pipe: &File, file: &mut File, rest: &mut Vec<u8>) -> Result<usize, Errno> {
    if rest.is_empty() {
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        if poll(&mut fds, PollTimeout::ZERO)? == 0 {
            return Err(Errno::EAGAIN);
        }
        let mut page = [0; 4096];
        let count = pipe.read(&mut page).map_err(errno)?;
        rest.extend_from_slice(&page[..count]);
    }
    let total = rest.len();
    while !rest.is_empty() {
        match file.write(rest).map_err(errno)? {
            0 => return Err(Errno::EIO),
            count => drop(rest.drain(..count)),
        }
    }
    Ok(total)
}

/// Empties a pipe and returns the number of bytes.
fn throw_away(mut pipe: &File) -> u64 {
    let mut lost = 0;
    let mut page = [0; 4096];
    loop {
        let mut fds = [PollFd::new(pipe.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(1..) => {}
            Ok(_) | Err(_) => return lost,
        }
        match pipe.read(&mut page) {
            Ok(0) | Err(_) => return lost,
            Ok(count) => lost += count as u64,
        }
        if lost >= TURN_BYTES as u64 {
            return lost;
        }
    }
}

fn errno(error: io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or(nix::libc::EIO))
}

/// The most that one splice moves.
const TURN_BYTES: usize = 1 << 20;
const STACK_BYTES: usize = 128 << 10;
/// How long an output file that cannot be written may block its container.
const STALL_WITHIN: Duration = Duration::from_secs(5);
const RETRY_AFTER: Duration = Duration::from_millis(100);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_without_end_does_not_keep_the_other_waiting() {
        let folder = scratch::Folder::new("pump");
        let (read, mut write) = std::io::pipe().expect("a pipe");
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a flag");
        write.write_all(b"the other").expect("room");
        let endless = File::open("/dev/zero").expect("a device");
        let pipes = vec![(endless.into(), "/dev/null".into()), (read.into(), folder.join("log"))];
        let orders = Orders { bell: EventFd::new().expect("an eventfd"), flushes: AtomicU64::new(0), stop: AtomicBool::new(false) };
        let mut thread = Thread::new("c1".into(), pipes, Arc::new(orders), watch::channel(0).0);
        assert!(thread.round());
        assert_eq!(std::fs::read(folder.join("log")).expect("a file"), b"the other");
    }

    #[test]
    fn what_is_not_moved_at_the_end_is_counted_as_lost() {
        let (read, mut write) = std::io::pipe().expect("a pipe");
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a flag");
        write.write_all(b"the end").expect("room");
        let orders = Orders { bell: EventFd::new().expect("an eventfd"), flushes: AtomicU64::new(0), stop: AtomicBool::new(false) };
        let pipes = vec![(read.into(), "/dev/null/is-no-folder".into())];
        let mut thread = Thread::new("c1".into(), pipes, Arc::new(orders), watch::channel(0).0);
        assert!(!thread.round());
        thread.lose_the_rest();
        assert_eq!(thread.targets[0].lost_bytes, 7);
    }

    #[test]
    fn what_a_device_does_not_take_is_kept_for_it() {
        let (read, mut write) = std::io::pipe().expect("a pipe");
        fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).expect("a flag");
        write.write_all(b"the end").expect("room");
        let (mut full, mut rest) = (File::options().write(true).open("/dev/full").expect("a device"), Vec::new());
        let pipe = File::from(OwnedFd::from(read));
        assert_eq!(copy(&pipe, &mut full, &mut rest), Err(Errno::ENOSPC));
        assert_eq!(rest, b"the end");
        let mut null = File::options().write(true).open("/dev/null").expect("a device");
        assert_eq!(copy(&pipe, &mut null, &mut rest), Ok(7));
        assert_eq!(copy(&pipe, &mut null, &mut rest), Err(Errno::EAGAIN));
    }

    #[test]
    fn a_fifo_without_a_reader_is_refused_at_once() {
        let folder = scratch::Folder::new("pump");
        let path = folder.join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
        let refused = blocking_open(&path).expect_err("it has no reader");
        assert_eq!(refused.raw_os_error(), Some(nix::libc::ENXIO));
    }
}
