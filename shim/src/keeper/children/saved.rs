//! The processes on their way to another image.
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

use super::{Children, Claimed, Console, Helper};
use crate::handover::Stream;
use crate::journal::Journal;
use crate::keeper::capture::Capture;
use crate::keeper::image::{Error, Loader, Saver};
use crate::keeper::poll::{Poll, Source};

impl Children {
    pub(crate) fn save(&self, s: &mut Saver) {
        s.u64(self.started).u64(self.exits_seen);
        s.each(self.helpers.iter(), |s, (pid, helper)| {
            s.u32(*pid);
            helper.save(s);
        });
        s.each(self.claimed.iter(), |s, (pid, claimed)| {
            s.u32(*pid).str(&claimed.key).bool(claimed.foreign);
            s.optional_fd(claimed.handle.as_ref());
            s.optional_fd(claimed.journal.as_ref());
        });
        s.each(self.vanished.iter(), |s, pid| {
            s.u32(*pid);
        });
    }

    pub(crate) fn load(l: &mut Loader<'_, '_>, poll: &mut Poll) -> Result<Self, Error> {
        let mut children = Self { started: l.u64()?, exits_seen: l.u64()?, ..Self::default() };
        let helpers = l.each(|l| {
            let pid = l.u32()?;
            Ok((pid, Box::new(Helper::load(l, pid, poll)?)))
        })?;
        children.helpers = helpers.into_iter().collect();
        let claimed = l.each(|l| {
            let (pid, key, foreign) = (l.u32()?, l.string()?, l.bool()?);
            let handle = l.optional_fd()?;
            if let (true, Some(handle)) = (foreign, &handle) {
                poll.add_reader(handle, Source::Foreign(pid))?;
            }
            Ok((pid, Box::new(Claimed { key, handle, journal: l.optional_fd()?.map(Journal::from), foreign })))
        })?;
        children.claimed = claimed.into_iter().collect();
        children.pids = children.claimed.iter().map(|(pid, claimed)| (claimed.key.clone(), *pid)).collect();
        children.vanished = l.each(|l| Ok(l.u32()?))?;
        Ok(children)
    }
}

impl Helper {
    fn save(&self, s: &mut Saver) {
        s.u64(self.cause).u32(self.step).str(&self.key).str(&self.program).bool(self.reported);
        self.failure.save(s);
        s.bool(self.log.is_some());
        if let Some((log, write)) = &self.log {
            log.save(s);
            s.fd(write);
        }
        for capture in [&self.output, &self.ready] {
            s.bool(capture.is_some());
            if let Some(capture) = capture {
                capture.save(s);
            }
        }
        s.bool(self.console.is_some());
        if let Some(console) = &self.console {
            s.fd(&console.listener);
            s.str(&console.path.to_string_lossy());
        }
        s.each(self.reads.iter(), |s, (key, stream)| {
            s.str(key).u8(*stream as u8);
        });
    }

    fn load(l: &mut Loader<'_, '_>, pid: u32, poll: &mut Poll) -> Result<Self, Error> {
        let (cause, step, key, program, reported) = (l.u64()?, l.u32()?, l.string()?, l.string()?, l.bool()?);
        let failure = Capture::load(l)?;
        let log = if l.bool()? { Some((Capture::load(l)?, l.fd()?)) } else { None };
        let output = if l.bool()? { Some(Capture::load(l)?) } else { None };
        let ready = if l.bool()? { Some(Capture::load(l)?) } else { None };
        let console = if l.bool()? {
            let listener = UnixListener::from(l.fd()?);
            let path = PathBuf::from(l.string()?);
            // The socket goes with the one who has it: not with a rehearsal.
            Some(Console { listener, path: if l.is_rehearsal() { PathBuf::new() } else { path } })
        } else {
            None
        };
        let reads = l.each(|l| {
            let (key, stream) = (l.string()?, l.u8()?);
            Ok((key, stream_of(stream)?))
        })?;
        for capture in [log.as_ref().map(|(log, _)| log), output.as_ref(), ready.as_ref()].into_iter().flatten() {
            capture.watch(poll, Source::Helper(pid))?;
        }
        poll.again(Source::Helper(pid));
        Ok(Self { cause, step, key, program, failure, log, output, ready, reported, console, reads })
    }
}

fn stream_of(number: u8) -> Result<Stream, Error> {
    [Stream::Stdin, Stream::Stdout, Stream::Stderr]
        .get(usize::from(number))
        .copied()
        .ok_or_else(|| crate::handover::Malformed { what: "a stream" }.into())
}
