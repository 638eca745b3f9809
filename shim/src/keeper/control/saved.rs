//! The commands that wait, on their way to another image.
use std::os::unix::net::{UnixListener, UnixStream};

use super::{Commander, Control};
use crate::keeper::image::{Error, Loader, Saver};
use crate::keeper::outbox::Outbox;
use crate::keeper::poll::{Poll, Source};

impl Control {
    pub(crate) fn save(&self, s: &mut Saver) {
        s.fd(&self.listener);
        s.u32(self.last_id);
        s.each(self.commanders.iter(), |s, (id, commander)| {
            s.u32(*id);
            s.fd(&commander.socket);
            s.optional_fd(commander.attached.as_ref());
            s.bytes(&commander.input).bytes(&commander.output.unsent()).bool(commander.asked);
        });
    }

    pub(crate) fn load(l: &mut Loader<'_, '_>, poll: &mut Poll) -> Result<Self, Error> {
        let mut control = Self::new(UnixListener::from(l.fd()?), poll)?;
        control.last_id = l.u32()?;
        let commanders = l.each(|l| {
            let id = l.u32()?;
            let commander = Commander {
                socket: UnixStream::from(l.fd()?),
                attached: l.optional_fd()?,
                input: l.bytes()?,
                output: Outbox::of(l.bytes()?),
                asked: l.bool()?,
            };
            poll.add(&commander.socket, Source::Commander(id))?;
            Ok((id, commander))
        })?;
        control.commanders = commanders.into_iter().collect();
        Ok(control)
    }
}
