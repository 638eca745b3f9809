//! Fifos watched for readers that open or read them, which causes no edge on our end.
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};

use crate::keeper::poll::{Poll, Source};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Watches {
    /// Open only while there is a fifo to watch, since a user has 128 instances by default.
    inotify: Option<Inotify>,
    /// By watch, the streams to look at: two may share a fifo.
    streams: BTreeMap<WatchDescriptor, Vec<u32>>,
}

impl Watches {
    /// Watches the fifo of a stream.
    pub(super) fn add(&mut self, fifo: impl AsFd, stream: u32, poll: &Poll) -> io::Result<WatchDescriptor> {
        if self.inotify.is_none() {
            let new = Inotify::init(InitFlags::IN_CLOEXEC | InitFlags::IN_NONBLOCK)?;
            poll.add_reader(&new, Source::Fifos)?;
            self.inotify = Some(new);
        }
        let Some(inotify) = &self.inotify else { return Err(Errno::EBADF.into()) };
        let path = format!("/proc/self/fd/{}", fifo.as_fd().as_raw_fd());
        let watch = inotify.add_watch(path.as_str(), AddWatchFlags::IN_OPEN | AddWatchFlags::IN_ACCESS)?;
        self.streams.entry(watch).or_default().push(stream);
        Ok(watch)
    }

    pub(super) fn remove(&mut self, watch: WatchDescriptor, stream: u32) {
        let Some(streams) = self.streams.get_mut(&watch) else { return };
        streams.retain(|other| *other != stream);
        if streams.is_empty() {
            self.streams.remove(&watch);
            // The fifo may be removed already.
            let _ = self.inotify.as_ref().map(|inotify| inotify.rm_watch(watch));
        }
        if self.streams.is_empty() {
            self.inotify = None;
        }
    }

    /// Gives a turn to the streams whose fifo was opened or read from.
    pub(super) fn touched(&self, poll: &mut Poll) {
        while let Some(events) = self.inotify.as_ref().and_then(|inotify| inotify.read_events().ok()) {
            for stream in events.iter().filter_map(|event| self.streams.get(&event.wd)).flatten() {
                poll.again(Source::Stream(*stream));
            }
        }
    }
}
