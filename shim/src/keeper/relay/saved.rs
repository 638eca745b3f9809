//! The clients on their way to another image.
use std::os::unix::net::{UnixListener, UnixStream};

use super::{Client, Relay};
use crate::keeper::image::{Error, Loader, Saver};
use crate::keeper::outbox::Outbox;
use crate::keeper::poll::{Poll, Source};

impl Relay {
    pub(crate) fn save(&self, s: &mut Saver) {
        s.fd(&self.listener);
        s.u32(self.last_id);
        s.each(self.clients.iter(), |s, (id, client)| {
            s.u32(*id);
            s.fd(&client.socket);
            s.bytes(&client.input).u64(client.skip as u64).bytes(&client.output.unsent()).u32(client.last_stream);
            s.u64(client.unanswered as u64).u64(client.unanswered_bytes as u64);
        });
    }

    pub(crate) fn load(l: &mut Loader<'_, '_>, poll: &mut Poll) -> Result<Self, Error> {
        let mut relay = Self::new(UnixListener::from(l.fd()?), poll)?;
        relay.last_id = l.u32()?;
        let clients = l.each(|l| {
            let id = l.u32()?;
            let client = Client {
                socket: UnixStream::from(l.fd()?),
                input: l.bytes()?,
                skip: l.u64()? as usize,
                output: Outbox::of(l.bytes()?),
                last_stream: l.u32()?,
                unanswered: l.u64()? as usize,
                unanswered_bytes: l.u64()? as usize,
            };
            poll.add(&client.socket, Source::Client(id))?;
            // What was read already may be whole requests.
            poll.again(Source::Client(id));
            Ok((id, Box::new(client)))
        })?;
        relay.clients = clients.into_iter().collect();
        Ok(relay)
    }
}
