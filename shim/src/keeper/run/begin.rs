//! How a keeper begins: new, or from the state of the image before.
use std::ffi::CString;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::process::ExitCode;

use log::{error, info};

use super::Keeper;
use crate::chain::chain;
use crate::disguise::{self, Place};
use crate::keeper::image::{self, Descriptors, Error};
use crate::settings::Settings;
use crate::sys;

/// Runs until the last container was deleted and the client has said Shutdown.
///
/// `listener`, `control`: bound and listening already. Errors are logged; the exit code is for whoever started it by hand.
pub(crate) fn run(settings: Settings, listener: OwnedFd, control: OwnedFd) -> ExitCode {
    info!(pid = std::process::id(); "keeper started");
    end(Keeper::new(settings, listener.into(), control.into()).and_then(|mut keeper| keeper.serve()))
}

/// Goes on from the state of the image before.
///
/// `state`: what that has saved. `before`: its program, to go back to if the state cannot be read; none if this is the way back.
/// Nothing is taken over before everything was read once; on the way back by whom has written it, and there is nobody left to go back to.
pub(crate) fn resume(settings: Settings, state: OwnedFd, before: Option<OwnedFd>) -> ExitCode {
    disguise::misbehave(Place::Resume);
    let is_back = before.is_none();
    let read = read_state(&state).and_then(|bytes| {
        if !is_back {
            disguise::refuse(Place::Resume).map_err(|what| Error::Damaged { what })?;
            // beside the descriptors that were inherited
            sys::descriptors::with_raised_limit(|| Keeper::load(settings.clone(), &bytes, &mut Descriptors::rehearsed()).map(drop))?;
        }
        Ok(bytes)
    });
    let bytes = match (read, &before) {
        (Ok(bytes), _) => bytes,
        (Err(error), Some(before)) => {
            error!(error:% = chain(&error); "the new image cannot go on, going back to the one before");
            return end(go_back(&settings, &state, before));
        }
        (Err(error), None) => {
            error!(error:% = chain(&error); "the keeper cannot go on");
            return ExitCode::FAILURE;
        }
    };
    drop((state, before));
    end(Keeper::load(settings, &bytes, &mut Descriptors::inherited()).map_err(io::Error::other).and_then(|mut keeper| {
        keeper.resumed(is_back);
        keeper.serve()
    }))
}

/// Says on `verdict` whether this image could go on from a state. Touches nothing.
pub(crate) fn rehearse(settings: Settings, state: OwnedFd, verdict: OwnedFd) -> ExitCode {
    disguise::misbehave(Place::Rehearsal);
    let result = read_state(&state).and_then(|bytes| {
        sys::descriptors::with_raised_limit(|| {
            // as many descriptors as the new image inherits, which reads the state once beside them
            let _inherited = Keeper::load(settings.clone(), &bytes, &mut Descriptors::rehearsed())?;
            Keeper::load(settings, &bytes, &mut Descriptors::rehearsed()).map(drop)
        })
    });
    let words = match &result {
        Ok(()) => image::ACCEPTS.to_owned(),
        Err(error) => format!("{}{}", image::REFUSES, chain(error)),
    };
    match std::fs::File::from(verdict).write_all(words.as_bytes()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

fn end(result: io::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!(error:%; "the keeper ends");
            ExitCode::FAILURE
        }
    }
}

fn read_state(state: &OwnedFd) -> Result<Vec<u8>, Error> {
    let mut bytes = Vec::new();
    let file = std::fs::File::from(sys::descriptors::duplicate(state)?);
    file.take(image::MAX_BYTES as u64 + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Executes the image before, with everything that this one was given and has not touched.
fn go_back(settings: &Settings, state: &OwnedFd, before: &OwnedFd) -> io::Result<()> {
    nix::unistd::lseek(state, 0, nix::unistd::Whence::SeekSet)?;
    let name = std::env::args().next().unwrap_or_default();
    let words = std::iter::once(name).chain(settings.to_arguments()).chain(["keeper", "resume"].map(str::to_owned));
    let words = words.chain([state.as_raw_fd().to_string()]);
    let arguments = words.map(CString::new).collect::<Result<Vec<_>, _>>()?;
    match sys::exec::execute(before.as_fd(), &arguments, &sys::exec::environment(), &[state.as_raw_fd()])? {}
}
