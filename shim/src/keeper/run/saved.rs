//! The whole keeper on its way to another image of itself.
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::time::Instant;

use log::info;
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Chores, Keeper, TRIM_AFTER, block_signals};
use crate::handover::{PartResult, UpgradeReport};
use crate::keeper::blame::Blame;
use crate::keeper::children::Children;
use crate::keeper::control::Control;
use crate::keeper::image::{Descriptors, Error, Saver, Sections};
use crate::keeper::ledger::Ledger;
use crate::keeper::life::Executable;
use crate::keeper::poll::Poll;
use crate::keeper::publisher::Publisher;
use crate::keeper::relay::Relay;
use crate::keeper::streams::Streams;
use crate::keeper::supervisor::Supervisor;
use crate::keeper::upgrade::{SETTLED_WITHIN, Stage, Upgrade};
use crate::settings::Settings;

/// The sections of the state.
mod tag {
    pub(super) const KEEPER: u16 = 1;
    pub(super) const RELAY: u16 = 2;
    pub(super) const CONTROL: u16 = 3;
    pub(super) const LEDGER: u16 = 4;
    pub(super) const CHILDREN: u16 = 5;
    pub(super) const STREAMS: u16 = 6;
    pub(super) const PUBLISHER: u16 = 7;
    pub(super) const SUPERVISOR: u16 = 8;
    pub(super) const UPGRADE: u16 = 9;
    pub(super) const ALL: [u16; 9] = [KEEPER, RELAY, CONTROL, LEDGER, CHILDREN, STREAMS, PUBLISHER, SUPERVISOR, UPGRADE];
}

impl Keeper {
    /// Saves everything in a file without a name. Returns it and the numbers of the descriptors that go over.
    pub(in crate::keeper) fn save(&self, upgrade: &Upgrade) -> io::Result<(OwnedFd, Vec<RawFd>)> {
        let mut s = Saver::new(Instant::now());
        s.section(tag::KEEPER, |s| {
            s.instant(self.born);
            s.bool(self.is_shutting_down);
            s.option(self.last_upgrade.as_ref(), |w, report| report.write(w));
        });
        s.section(tag::RELAY, |s| self.relay.save(s));
        s.section(tag::CONTROL, |s| self.control.save(s));
        s.section(tag::LEDGER, |s| self.ledger.save(s));
        s.section(tag::CHILDREN, |s| self.children.save(s));
        s.section(tag::STREAMS, |s| self.streams.save(s));
        s.section(tag::PUBLISHER, |s| self.publisher.save(s));
        s.section(tag::SUPERVISOR, |s| self.supervisor.save(s));
        s.section(tag::UPGRADE, |s| upgrade.save(s));
        let (bytes, kept) = s.finish().map_err(io::Error::other)?;
        let mut file = File::from(memfd_create(c"x-keeper-state", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&bytes)?;
        file.rewind()?;
        Ok((file.into(), kept))
    }

    /// Makes a keeper from what another image has saved. Never inlined, and boxed: see [`Keeper::new`].
    #[inline(never)]
    pub(super) fn load(settings: Settings, bytes: &[u8], descriptors: &mut Descriptors) -> Result<Box<Self>, Error> {
        let now = Instant::now();
        let sections = Sections::read(bytes, &tag::ALL)?;
        let mut poll = Poll::new()?;
        let signals = block_signals(&poll)?;
        let mut l = sections.loader(tag::KEEPER, now, descriptors)?;
        let (born, is_shutting_down, last_upgrade) = (l.instant()?, l.bool()?, l.option(UpgradeReport::read)?);
        Ok(Box::new(Self {
            relay: Relay::load(&mut sections.loader(tag::RELAY, now, descriptors)?, &mut poll)?,
            control: Control::load(&mut sections.loader(tag::CONTROL, now, descriptors)?, &mut poll)?,
            ledger: Ledger::load(&mut sections.loader(tag::LEDGER, now, descriptors)?)?,
            children: Children::load(&mut sections.loader(tag::CHILDREN, now, descriptors)?, &mut poll)?,
            streams: Streams::load(&mut sections.loader(tag::STREAMS, now, descriptors)?, &mut poll)?,
            publisher: Publisher::load(
                &mut sections.loader(tag::PUBLISHER, now, descriptors)?,
                settings.ttrpc_address.as_deref(),
                &mut poll,
            )?,
            supervisor: Supervisor::load(&mut sections.loader(tag::SUPERVISOR, now, descriptors)?, &settings)?,
            upgrade: Some(Upgrade::load(&mut sections.loader(tag::UPGRADE, now, descriptors)?)?),
            blame: Blame::default(),
            last_upgrade,
            born,
            is_shutting_down,
            chores: Chores::default(),
            settings,
            poll,
            signals,
        }))
    }

    /// This image has taken over, or, if `is_back`, is the one before that has everything again.
    pub(super) fn resumed(&mut self, is_back: bool) {
        let now = Instant::now();
        info!(pid = std::process::id(), build = crate::disguise::build(); "the keeper goes on as another image");
        if let Some(upgrade) = self.upgrade.as_mut().filter(|_| is_back) {
            upgrade.report.keeper = PartResult::Kept("it could not go on from the state after all".into());
        }
        self.chores.trim_at = Some(now + TRIM_AFTER);
        self.reap();
    }
}

impl Upgrade {
    fn save(&self, s: &mut Saver) {
        s.u32(self.asker);
        s.record(|s| self.executable.save(s));
        s.bool(self.keeper_too);
        s.record(|s| self.report.write(s));
        s.instant(match self.stage {
            Stage::Left { since }
            | Stage::Leaving { since }
            | Stage::Ended { since }
            | Stage::Ending { since }
            | Stage::Settling { since, .. } => since,
            Stage::Trial { until } | Stage::Rehearsal { until, .. } => until,
        });
    }

    fn load(l: &mut crate::keeper::image::Loader<'_, '_>) -> Result<Self, Error> {
        Ok(Self {
            asker: l.u32()?,
            executable: l.record(|l| Executable::load(l))?,
            keeper_too: l.bool()?,
            report: l.record(|l| Ok(UpgradeReport::read(l)?))?,
            stage: Stage::Settling { since: l.instant()?, until: Instant::now() + SETTLED_WITHIN },
        })
    }
}
