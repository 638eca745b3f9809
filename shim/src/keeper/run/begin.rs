//! How a keeper starts: new, or from the state of the previous executable.
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::process::ExitCode;
use std::time::Instant;

use log::{error, info};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::{Keeper, TRIM_AFTER, Timers, block_signals};
use crate::chain::chain;
use crate::handover::PartResult;
use crate::keeper::children::Children;
use crate::keeper::control::Control;
use crate::keeper::ledger::Ledger;
use crate::keeper::poison::Poison;
use crate::keeper::poll::Poll;
use crate::keeper::publisher::Publisher;
use crate::keeper::reexec::{self, Error};
use crate::keeper::relay::Relay;
use crate::keeper::streams::Streams;
use crate::keeper::supervisor::Supervisor;
use crate::keeper::upgrade::Upgrade;
use crate::saved::{Reader, Saved as _, Writer};
use crate::settings::Settings;
use crate::sys;
use crate::test_identity::{self, Place};

/// Runs until the last container was deleted and a client has called Shutdown.
///
/// `listener`, `control`: bound and listening already. Errors are logged; the exit code is for a manual start.
pub(crate) fn run(settings: Settings, listener: OwnedFd, control: OwnedFd) -> ExitCode {
    info!(pid = std::process::id(); "keeper started");
    end(Keeper::new(settings, listener.into(), control.into()).and_then(|mut keeper| keeper.serve()))
}

/// Resumes from the state of the previous executable.
///
/// `state`: the saved state. `before`: the previous executable, executed again if the state cannot be read; `None` when that has happened.
/// The whole state is read once as a rehearsal before any of it is taken over, except by the executable that wrote it.
pub(crate) fn resume(settings: Settings, state: OwnedFd, before: Option<OwnedFd>) -> ExitCode {
    test_identity::misbehave(Place::Resume);
    let is_back = before.is_none();
    let read = read_state(&state).and_then(|bytes| {
        if !is_back {
            test_identity::refuse(Place::Resume).map_err(|what| Error::Damaged { what })?;
            // beside the descriptors that were inherited
            sys::descriptors::with_raised_limit(|| Keeper::load(settings.clone(), &bytes, true).map(drop))?;
        }
        Ok(bytes)
    });
    let bytes = match (read, &before) {
        (Ok(bytes), _) => bytes,
        (Err(error), Some(before)) => {
            error!(error:% = chain(&error); "the new executable cannot resume, going back to the previous one");
            return end(go_back(&settings, &state, before));
        }
        (Err(error), None) => {
            error!(error:% = chain(&error); "the keeper cannot resume");
            return ExitCode::FAILURE;
        }
    };
    drop((state, before));
    end(Keeper::load(settings, &bytes, false).map_err(io::Error::other).and_then(|mut keeper| {
        keeper.resumed(is_back);
        keeper.serve()
    }))
}

/// Writes to `verdict` whether this executable could resume from a state. Changes nothing outside the process.
pub(crate) fn rehearse(settings: Settings, state: OwnedFd, verdict: OwnedFd) -> ExitCode {
    test_identity::misbehave(Place::Rehearsal);
    let result = read_state(&state).and_then(|bytes| {
        sys::descriptors::with_raised_limit(|| {
            // as many descriptors as the new executable inherits, which reads the state once beside them
            let _inherited = Keeper::load(settings.clone(), &bytes, true)?;
            Keeper::load(settings, &bytes, true).map(drop)
        })
    });
    let words = match &result {
        Ok(()) => reexec::ACCEPTS.to_owned(),
        Err(error) => format!("{}{}", reexec::REFUSES, chain(error)),
    };
    match File::from(verdict).write_all(words.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

impl Keeper {
    /// Saves everything in a file without a name. Returns it and the numbers of the descriptors that are handed over.
    pub(in crate::keeper) fn save(&self, upgrade: &Upgrade) -> io::Result<(OwnedFd, Vec<RawFd>)> {
        let mut writer = Writer::new();
        let w = &mut writer;
        w.list(11);
        self.started_at.save(w);
        self.last_upgrade.save(w);
        self.relay.save(w);
        self.control.save(w);
        self.ledger.save(w);
        self.children.save(w);
        self.streams.save(w);
        self.publisher.save(w);
        self.supervisor.save(w);
        upgrade.save(w);
        self.is_shutting_down.save(w);
        let (body, kept) = writer.finish();
        let bytes = reexec::seal(&body).map_err(io::Error::other)?;
        let mut file = File::from(memfd_create(c"x-keeper-state", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&bytes)?;
        file.rewind()?;
        Ok((file.into(), kept))
    }

    /// Makes a keeper from the state that another executable saved. Never inlined, and boxed: see [`Keeper::new`].
    #[inline(never)]
    fn load(settings: Settings, bytes: &[u8], is_rehearsal: bool) -> Result<Box<Self>, Error> {
        let mut reader = Reader::new(reexec::open(bytes)?, is_rehearsal);
        let mut parts = reader.list()?;
        let (started_at, last_upgrade) = (parts.next()?, parts.next()?);
        let (relay, control): (Relay, Control) = (parts.next()?, parts.next()?);
        let (mut ledger, mut children): (Ledger, Children) = (parts.next()?, parts.next()?);
        let (mut streams, mut publisher): (Streams, Publisher) = (parts.next()?, parts.next()?);
        let (supervisor, upgrade): (Supervisor, Upgrade) = (parts.next()?, parts.next()?);
        let is_shutting_down = parts.next()?;
        let mut poll = Poll::new()?;
        let signals = block_signals(&poll)?;
        relay.resume(&mut poll)?;
        control.resume(&poll)?;
        ledger.resume();
        children.resume(&mut poll)?;
        streams.resume(&mut poll)?;
        publisher.resume(settings.ttrpc_address.as_deref(), &mut poll)?;
        Ok(Box::new(Self {
            relay,
            control,
            ledger,
            children,
            streams,
            publisher,
            supervisor: supervisor.resume(&settings)?,
            upgrade: Some(upgrade),
            poison: Poison::default(),
            last_upgrade,
            started_at,
            is_shutting_down,
            timers: Timers::default(),
            settings,
            poll,
            signals,
        }))
    }

    /// This executable has taken over, or, if `is_back`, is the previous one that was executed again.
    fn resumed(&mut self, is_back: bool) {
        info!(pid = std::process::id(), build = test_identity::build(); "the keeper resumed after its re-exec");
        if let Some(upgrade) = self.upgrade.as_mut().filter(|_| is_back) {
            upgrade.report.keeper = PartResult::Kept("it could not resume from the state".into());
        }
        self.timers.trim_at = Some(Instant::now() + TRIM_AFTER);
        self.reap();
    }
}

fn end(result: io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error:%; "the keeper exits");
            ExitCode::FAILURE
        }
    }
}

fn read_state(state: &OwnedFd) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let file = File::from(sys::descriptors::duplicate(state)?);
    file.take(reexec::MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Executes the previous executable with the state and descriptors of which this one has not taken over any.
fn go_back(settings: &Settings, state: &OwnedFd, before: &OwnedFd) -> io::Result<()> {
    nix::unistd::lseek(state, 0, nix::unistd::Whence::SeekSet)?;
    let arguments = settings.command_line(&["keeper", "resume", &state.as_raw_fd().to_string()])?;
    match sys::exec::execute(before.as_fd(), &arguments, &sys::exec::environment(), &[state.as_raw_fd()])? {}
}
