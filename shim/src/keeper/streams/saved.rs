//! The streams on their way to another image. What is in their pipes stays there.
use super::incoming::Incoming;
use super::outgoing::Outgoing;
use super::{Client, Entry, Pump, Streams};
use crate::handover::{Malformed, Reader};
use crate::keeper::image::{Error, Loader, Saver};
use crate::keeper::poll::Poll;

impl Streams {
    pub(crate) fn save(&self, s: &mut Saver) {
        s.u32(self.last_number).u64(self.bytes_moved).u64(self.bytes_lost);
        s.each(self.entries.iter(), |s, (number, entry)| {
            s.u32(*number);
            entry.save(s);
        });
    }

    pub(crate) fn load(l: &mut Loader<'_, '_>, poll: &mut Poll) -> Result<Self, Error> {
        let (last_number, bytes_moved, bytes_lost) = (l.u32()?, l.u64()?, l.u64()?);
        let mut streams = Self { last_number, bytes_moved, bytes_lost, ..Self::default() };
        for (number, mut entry) in l.each(|l| Ok((l.u32()?, Entry::load(l)?)))? {
            for (index, slot) in entry.pumps.iter_mut().enumerate() {
                *slot = slot.take().map(|pump| pump.registered(number, index, poll)).transpose()?;
            }
            if !entry.released {
                streams.numbers.insert(entry.key.clone(), number);
            }
            streams.due.extend(entry.drain_until.map(|until| (until, number)));
            streams.entries.insert(number, entry);
        }
        streams.due.make_contiguous().sort();
        Ok(streams)
    }
}

impl Entry {
    fn save(&self, s: &mut Saver) {
        s.str(&self.key);
        for end in self.process_ends.iter().chain(&self.read_ends) {
            s.optional_fd(end.as_ref());
        }
        for pump in &self.pumps {
            match pump {
                None => drop(s.u8(0)),
                Some(Pump::Out(out)) => {
                    s.u8(1);
                    out.save(s);
                }
                Some(Pump::In(input)) => {
                    s.u8(2);
                    input.save(s);
                }
                Some(Pump::Held(end)) => {
                    s.u8(3);
                    s.fd(end);
                }
            }
        }
        for client in &self.clients {
            s.bool(client.is_some());
            if let Some(client) = client {
                client.save(s);
            }
        }
        s.optional_fd(self.terminal.as_ref());
        s.bool(self.wants_terminal).option(self.size.as_ref(), |w, (rows, columns)| {
            w.u16(*rows).u16(*columns);
        });
        s.bool(self.stdin_closed).u64(self.spill_bytes).str(&self.spill_folder).bool(self.exited).bool(self.released);
        s.optional_instant(self.drain_until);
        s.each(self.waiting.iter(), |s, (cause, step)| {
            s.u64(*cause).u32(*step);
        });
    }

    fn load(l: &mut Loader<'_, '_>) -> Result<Self, Error> {
        Ok(Self {
            key: l.string()?,
            process_ends: three(l, Loader::optional_fd)?,
            read_ends: three(l, Loader::optional_fd)?,
            pumps: three(l, |l| {
                Ok(match l.u8()? {
                    0 => None,
                    1 => Some(Pump::Out(Outgoing::load(l)?)),
                    2 => Some(Pump::In(Incoming::load(l)?)),
                    3 => Some(Pump::Held(l.fd()?)),
                    _ => return Err(Malformed { what: "a pump" }.into()),
                })
            })?,
            clients: three(l, |l| Ok(if l.bool()? { Some(Client::load(l)?) } else { None }))?,
            terminal: l.optional_fd()?,
            wants_terminal: l.bool()?,
            size: l.option(|r: &mut Reader<'_>| Ok((r.u16()?, r.u16()?)))?,
            stdin_closed: l.bool()?,
            spill_bytes: l.u64()?,
            spill_folder: l.string()?,
            exited: l.bool()?,
            released: l.bool()?,
            drain_until: l.optional_instant()?,
            waiting: l.each(|l| Ok((l.u64()?, l.u32()?)))?,
        })
    }
}

impl Client {
    pub(super) fn save(&self, s: &mut Saver) {
        s.fd(&self.fd);
        s.str(&self.target).bool(self.is_fifo);
    }

    pub(super) fn load(l: &mut Loader<'_, '_>) -> Result<Self, Error> {
        Ok(Self { fd: l.fd()?, target: l.string()?, is_fifo: l.bool()? })
    }
}

fn three<'a, 'd, T>(l: &mut Loader<'a, 'd>, mut load: impl FnMut(&mut Loader<'a, 'd>) -> Result<T, Error>) -> Result<[T; 3], Error> {
    Ok([load(l)?, load(l)?, load(l)?])
}
