//! How a keeper starts: new, or from the state of the previous executable.
use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::Instant;

use log::{error, info};
use nix::sys::memfd::{MFdFlags, memfd_create};

use super::Keeper;
use crate::chain::chain;
use crate::handover::{PartResult, ToKeeper};
use crate::keeper::control::Control;
use crate::keeper::first_worker::FirstWorker;
use crate::keeper::reexec::{self, Error};
use crate::keeper::relay::Relay;
use crate::keeper::upgrade::Stage;
use crate::saved::{Reader, Saved as _, Writer};
use crate::settings::Settings;
use crate::sys;
use crate::test_identity::{self, Place};

/// Runs until the last container was deleted and a client has called Shutdown.
///
/// `program`: the path of the executable; on a mount of its own, the kernel knows its name only. `listener`, `control`: bound and listening already.
/// `worker`: absent if it could not be forked. Errors are logged; the exit code is for a manual start.
pub(crate) fn run(
    settings: Settings,
    program: Option<String>,
    listener: OwnedFd,
    control: OwnedFd,
    worker: Option<FirstWorker>,
) -> ExitCode {
    info!(pid = std::process::id(); "keeper started");
    let keeper = Relay::new(listener.into()).and_then(|relay| {
        let mut keeper = Keeper::new(settings, relay, Control::new(control.into())?)?;
        if let Some(program) = program {
            keeper.supervisor.executable.path = program;
        }
        if let Some(worker) = worker {
            keeper.supervisor.adopt(worker, Instant::now(), &keeper.poll)?;
        }
        Ok(keeper)
    });
    end(keeper.and_then(|mut keeper| keeper.serve()))
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
    let bytes = match read {
        Ok(bytes) => bytes,
        Err(error) => {
            error!(error:% = chain(&error), is_back; "the keeper cannot resume; the previous executable is executed again, once");
            return before.map_or(ExitCode::FAILURE, |before| end(go_back(&settings, &state, &before)));
        }
    };
    drop((state, before));
    end(Keeper::load(settings, &bytes, false).map_err(io::Error::other).and_then(|mut keeper| {
        keeper.resumed(is_back);
        keeper.serve()
    }))
}

/// Answers on `link` whether this executable could resume from a state. Changes nothing outside the process, which the keeper ends.
pub(crate) fn rehearse(settings: Settings, link: OwnedFd, state: OwnedFd) -> ExitCode {
    test_identity::misbehave(Place::Rehearsal);
    let result = read_state(&state).and_then(|bytes| {
        sys::descriptors::with_raised_limit(|| {
            // as many descriptors as the new executable inherits, which reads the state once beside them
            let _inherited = Keeper::load(settings.clone(), &bytes, true)?;
            Keeper::load(settings, &bytes, true).map(drop)
        })
    });
    let fit = ToKeeper::Fit { refusal: result.err().map(|error| chain(&error)) };
    let mut link = UnixStream::from(link);
    end(link.write_all(&fit.encode()).and_then(|()| io::copy(&mut link, &mut io::sink()).map(drop)))
}

impl Keeper {
    /// Saves everything in a file without a name. Returns it and the numbers of the descriptors that are handed over.
    pub(super) fn save(&self) -> io::Result<(OwnedFd, Vec<RawFd>)> {
        let mut writer = Writer::new();
        let w = &mut writer;
        w.list(11);
        self.relay.save(w);
        self.control.save(w);
        self.started_at.save(w);
        self.last_upgrade.save(w);
        self.ledger.save(w);
        self.children.save(w);
        self.streams.save(w);
        self.publisher.save(w);
        self.supervisor.save(w);
        self.upgrade.save(w);
        self.is_shutting_down.save(w);
        let (body, kept) = writer.finish();
        let bytes = reexec::seal(&body, self.children.home.is_left()).map_err(io::Error::other)?;
        let mut file = File::from(memfd_create(c"x-keeper-state", MFdFlags::MFD_CLOEXEC)?);
        file.write_all(&bytes)?;
        file.rewind()?;
        Ok((file.into(), kept))
    }

    /// Makes a keeper from the state that another executable saved.
    fn load(settings: Settings, bytes: &[u8], is_rehearsal: bool) -> Result<Box<Self>, Error> {
        let mut reader = Reader::new(reexec::open(bytes)?, is_rehearsal);
        let mut parts = reader.list()?;
        let mut keeper = Self::new(settings, parts.next()?, parts.next()?)?;
        (keeper.started_at, keeper.last_upgrade) = (parts.next()?, parts.next()?);
        (keeper.ledger, keeper.children) = (parts.next()?, parts.next()?);
        (keeper.streams, keeper.publisher) = (parts.next()?, parts.next()?);
        (keeper.supervisor, keeper.upgrade) = (parts.next()?, parts.next()?);
        keeper.is_shutting_down = parts.next()?;
        keeper.ledger.resume();
        keeper.children.resume(&mut keeper.poll)?;
        keeper.streams.resume(&mut keeper.poll)?;
        keeper.publisher.resume(keeper.settings.ttrpc_address.as_deref(), &mut keeper.poll)?;
        Ok(keeper)
    }

    /// This executable has taken over, or, if `is_back`, is the previous one that was executed again.
    fn resumed(&mut self, is_back: bool) {
        info!(pid = std::process::id(), build = test_identity::build(); "the keeper resumed after its re-exec");
        let now = Instant::now();
        if let Some(upgrade) = &mut self.upgrade {
            upgrade.enter(Stage::Settling, now);
            if is_back {
                upgrade.report.keeper = PartResult::Kept("it could not resume from the state".into());
            }
        }
        self.timers.trim_at = Some(now + sys::memory::TRIM_AFTER);
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
