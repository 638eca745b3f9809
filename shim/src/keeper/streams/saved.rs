//! The streams on their way to another image. What is in their pipes stays there.
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::incoming::Incoming;
use super::outgoing::Outgoing;
use super::{Entry, Pump, Streams};
use crate::handover::Malformed;
use crate::keeper::image::{Error, Loader, Saver};
use crate::keeper::poll::{Poll, Source};

impl Streams {
    pub(crate) fn save(&self, s: &mut Saver) {
        s.u32(self.last_pump).u64(self.bytes_moved).u64(self.bytes_lost);
        s.each(self.entries.iter(), |s, entry| entry.save(s));
        s.each(self.pumps.iter(), |s, (id, pump)| {
            s.u32(*id);
            match pump {
                Pump::Out(out) => {
                    s.u8(1);
                    out.save(s);
                }
                Pump::In(input) => {
                    s.u8(2);
                    input.save(s);
                }
                Pump::Discard { source, sink, bytes } => {
                    s.u8(3);
                    s.fd(source);
                    s.fd(sink);
                    s.u64(*bytes);
                }
            }
        });
    }

    pub(crate) fn load(l: &mut Loader<'_, '_>, poll: &mut Poll) -> Result<Self, Error> {
        let mut streams = Self::new();
        (streams.last_pump, streams.bytes_moved, streams.bytes_lost) = (l.u32()?, l.u64()?, l.u64()?);
        streams.entries = l.each(Entry::load)?;
        let pumps = l.each(|l| {
            let id = l.u32()?;
            let mut draining = None;
            let pump = match l.u8()? {
                1 => {
                    let out = Outgoing::load(l)?;
                    draining = out.is_draining().then(|| out.sink().as_raw_fd());
                    Pump::Out(out)
                }
                2 => Pump::In(Incoming::load(l)?),
                3 => Pump::Discard { source: l.fd()?, sink: File::from(l.fd()?), bytes: l.u64()? },
                _ => return Err(Malformed { what: "a pump" }.into()),
            };
            pump.watch(id, poll)?;
            poll.again(Source::Stream(id));
            Ok((id, pump, draining))
        })?;
        for (id, pump, draining) in pumps {
            streams.pumps.insert(id, pump);
            if let Some(number) = draining.filter(|_| !l.is_rehearsal()) {
                streams.watch_fifo(id, number, poll);
            }
        }
        Ok(streams)
    }
}

impl Entry {
    fn save(&self, s: &mut Saver) {
        s.str(&self.key);
        for end in self.process_ends.iter().chain(&self.read_ends) {
            s.optional_fd(end.as_ref());
        }
        for pump in self.pumps {
            s.option(pump.as_ref(), |w, id| {
                w.u32(*id);
            });
        }
        for fifo in &self.fifos {
            s.bool(fifo.is_some());
            if let Some((fifo, target)) = fifo {
                s.fd(fifo);
                s.str(target);
            }
        }
        s.optional_fd(self.terminal.as_ref());
        s.bool(self.wants_terminal).option(self.size.as_ref(), |w, (rows, columns)| {
            w.u16(*rows).u16(*columns);
        });
        s.bool(self.stdin_closed).u64(self.spill_bytes).str(&self.spill_folder);
        s.optional_instant(self.exited);
        s.optional_instant(self.deleted);
    }

    fn load(l: &mut Loader<'_, '_>) -> Result<Self, Error> {
        let key = l.string()?;
        let process_ends = three(l, Loader::optional_fd)?;
        let read_ends = three(l, Loader::optional_fd)?;
        let pumps = three(l, |l| Ok(l.option(crate::handover::Reader::u32)?))?;
        let fifos = three(l, |l| Ok(if l.bool()? { Some((l.fd()?, l.string()?)) } else { None }))?;
        Ok(Self {
            key,
            process_ends,
            read_ends,
            pumps,
            fifos,
            terminal: l.optional_fd()?,
            wants_terminal: l.bool()?,
            size: l.option(|r| Ok((r.u16()?, r.u16()?)))?,
            stdin_closed: l.bool()?,
            spill_bytes: l.u64()?,
            spill_folder: l.string()?,
            exited: l.optional_instant()?,
            deleted: l.optional_instant()?,
        })
    }
}

fn three<'a, 'd, T>(l: &mut Loader<'a, 'd>, mut load: impl FnMut(&mut Loader<'a, 'd>) -> Result<T, Error>) -> Result<[T; 3], Error> {
    Ok([load(l)?, load(l)?, load(l)?])
}

impl Pump {
    /// Watches both ends.
    pub(super) fn watch(&self, id: u32, poll: &Poll) -> io::Result<()> {
        let source = Source::Stream(id);
        match self {
            Self::Out(out) => {
                if let Some(from) = out.source() {
                    poll.add_reader(from, source)?;
                }
                // One of which the write end alone is left gives no edge for what matters; its own watch does.
                if out.is_draining() { Ok(()) } else { poll.add_writer(out.sink(), source) }
            }
            Self::In(input) => {
                poll.add_reader(input.source(), source)?;
                poll.add_writer(input.sink(), source)
            }
            Self::Discard { source: from, .. } => poll.add_reader(from, source),
        }
    }
}
