//! The events on their way to containerd, on their way to another image.
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::{Connection, Publisher};
use crate::keeper::image::{Error, Loader, Saver};
use crate::keeper::outbox::Outbox;
use crate::keeper::poll::{Poll, Source};

impl Publisher {
    pub(crate) fn save(&self, s: &mut Saver) {
        s.u64(self.sent).u64(self.backoff.as_nanos() as u64);
        s.optional_instant(self.retry_at);
        s.each(self.queue.iter(), |s, event| {
            s.bytes(event);
        });
        s.bool(self.connection.is_some());
        if let Some(connection) = &self.connection {
            s.fd(&connection.socket);
            s.bytes(&connection.input).bytes(&connection.output.unsent()).u32(connection.last_stream);
            s.bool(connection.awaited.is_some());
            if let Some((stream, since)) = connection.awaited {
                s.u32(stream);
                s.instant(since);
            }
        }
    }

    /// `address`: as for [`Publisher::new`].
    pub(crate) fn load(l: &mut Loader<'_, '_>, address: Option<&str>, poll: &mut Poll) -> Result<Self, Error> {
        let mut publisher = Self::new(address);
        publisher.sent = l.u64()?;
        publisher.backoff = Duration::from_nanos(l.u64()?);
        publisher.retry_at = l.optional_instant()?;
        publisher.queue = l.each(|l| Ok(l.bytes()?))?.into();
        if l.bool()? {
            let connection = Connection {
                socket: UnixStream::from(l.fd()?),
                input: l.bytes()?,
                output: Outbox::of(l.bytes()?),
                last_stream: l.u32()?,
                awaited: if l.bool()? { Some((l.u32()?, l.instant()?)) } else { None },
            };
            poll.add(&connection.socket, Source::Publisher)?;
            publisher.connection = Some(connection);
        }
        poll.again(Source::Publisher);
        Ok(publisher)
    }
}
