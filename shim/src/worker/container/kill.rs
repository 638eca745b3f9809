//! Kill: a signal for a process, for an exec with its descendants, or for all of a container.
use std::os::fd::AsFd;
use std::rc::Rc;

use super::create::{at, blocking};
use super::queries::recorded_pids;
use super::verb::run_verb;
use super::{Change, Container, Reply, Shared, Target, native};
use crate::cgroup::Cgroup;
use crate::descendants::{Descendants, Identity};
use crate::engine::{CommandEngine, Engine, EngineError, Verb};
use crate::handover::Op;
use crate::sys;
use crate::worker::cause::{Cause, step};
use crate::worker::error::Error;
use crate::worker::id::ProcessKey;
use crate::worker::phase::{Phase, Request};

/// The request.
#[derive(Debug, Clone)]
pub(in crate::worker) struct KillCall {
    pub(in crate::worker) target: Target,
    pub(in crate::worker) signal: u32,
    /// Every process of the container. Of an exec: with its descendants. SIGKILL takes those of an exec in any case: containerd leaves
    /// `all` out for execs, also when the CRI plugin ends one at its timeout.
    pub(in crate::worker) all: bool,
}

/// Signals.
pub(in crate::worker) async fn kill(shared: &Shared, cause: &Cause, call: KillCall) -> Result<Change, Error> {
    let signal = match i32::try_from(call.signal) {
        // 0 asks whether the process is there.
        Ok(number @ 0..=64) => number,
        _ => return Err(Error::Signal { number: call.signal }),
    };
    let container = shared.registry.get(&call.target.id)?;
    let key = container.key(&call.target.exec)?;
    // Requested in any case: an earlier worker may have sent this very signal, and this one may have handled the exit that followed before
    // the request. Then the keeper answers that it was done.
    let has_ended = container.phase(&key)?.admit(Request::Kill).is_err();
    let Some(pid) = container.process(&key, |process| process.pid)? else { return Err(Error::NotStarted { key }) };
    let was_paused = container.record().init.phase == Phase::Paused;
    let is_init = key.exec.is_none();
    if call.all && is_init && signal != nix::libc::SIGKILL {
        return by_engine(cause, &container, signal).await.map_err(|error| if has_ended { Error::Finished { key } } else { error });
    }
    if !is_init && signal != 0 && (call.all || signal == nix::libc::SIGKILL) {
        signal_descendants(cause, &container, &key, pid, signal).await;
    }
    match cause.perform(step::SIGNAL, Op::Signal { key: key.to_string(), signal }).await {
        Ok(()) => {}
        Err(Error::Keeper { source, .. }) if source.raw_os_error() == Some(nix::libc::ESRCH) => return Err(Error::Finished { key }),
        Err(error) => return Err(error),
    }
    // On cgroup v1 a frozen process cannot die. The cgroup is asked, as others freeze containers too.
    match signal == nix::libc::SIGKILL {
        true if is_init && (call.all || was_paused) => kill_rest(cause, &container).await,
        true if is_init => container.record().cgroup.thaw(),
        true => container.record().cgroup.let_die(&[pid]),
        false => {}
    }
    Ok(Change::reply(Reply::Empty))
}

/// Signals the descendants of an exec, before the exec itself: without it they cannot be told from those of init. Failures are logged.
async fn signal_descendants(cause: &Cause, container: &Rc<Container>, key: &ProcessKey, pid: u32, signal: i32) {
    let is_kill = signal == nix::libc::SIGKILL;
    let mut at = step::DESCENDANTS;
    while !cause.is_first(at).await {
        at += 2;
    }
    let is_first = at == step::DESCENDANTS;
    if !is_first && !is_kill {
        // An earlier worker may have signalled all of them, some or none.
        return;
    }
    let Some(exec) = Identity::of(pid) else { return };
    // Asked anew by each worker: it may have been reaped since, and its pid reused.
    if cause.perform(at + 1, Op::Signal { key: key.to_string(), signal: 0 }).await.is_err() {
        return;
    }
    let (init, spared, cgroup, is_paused) = {
        let record = container.record();
        let spared = recorded_pids(&record).into_iter().map(|(other, _)| other).filter(|other| *other != pid).collect();
        (record.init.pid, spared, record.cgroup.clone(), record.init.phase == Phase::Paused)
    };
    let name = key.to_string();
    let signalled = blocking(move || {
        if !is_first && !is_paused {
            // The earlier worker may have frozen it.
            cgroup.thaw();
        }
        let descendants = Descendants::blocking_of(exec, init, spared, cgroup);
        let count = if is_kill { descendants.blocking_kill() } else { descendants.blocking_signal(signal) };
        let failed = |source| Error::Io { op: "signal the descendants of process", path: pid.to_string().into(), source };
        let count = count.map_err(failed)?;
        log::debug!(container:% = name, signal, count; "descendants of an exec signalled");
        Ok::<_, Error>(())
    });
    if let Err(error) = signalled.await {
        log::warn!(container:% = key, error:% = error.chain(); "cannot signal every descendant of an exec");
    }
}

/// Sends SIGKILL to all processes of a container, frozen or not. Failures are logged.
pub(super) async fn kill_rest(cause: &Cause, container: &Rc<Container>) {
    let (cgroup, engine) = {
        let record = container.record();
        (record.cgroup.clone(), record.engine.clone())
    };
    match &engine {
        Engine::Command(engine) if cgroup == Cgroup::default() => kill_rest_by_runtime(cause, engine, container).await,
        _ => {
            if let Err(error) = cgroup.kill_all() {
                log::warn!(container:% = container.id, error:%; "cannot kill all processes of the cgroup");
            }
        }
    }
}

/// Kills a process that runs, and that no commit will claim. Its pid is not reused before its cause ends.
pub(super) fn kill_unclaimed(pid: u32) {
    let killed = sys::process::open(pid).and_then(|process| sys::process::signal(process.as_fd(), nix::libc::SIGKILL));
    if let Err(error) = killed {
        log::debug!(pid, error:%; "cannot kill a process that no commit will claim");
    }
}

async fn kill_rest_by_runtime(cause: &Cause, engine: &CommandEngine, container: &Rc<Container>) {
    let spawns = {
        let record = container.record();
        [
            (step::KILL_ALL, Verb::Kill, engine.kill(&at(&record), nix::libc::SIGKILL, true)),
            (step::THAW, Verb::Resume, engine.resume(&at(&record))),
        ]
    };
    for (step, verb, spawn) in spawns {
        if let Err(error) = run_verb(cause, step, engine, verb, spawn).await {
            log::debug!(container:% = container.id, error:% = error.chain(); "cannot kill all processes with the OCI runtime");
        }
    }
}

async fn by_engine(cause: &Cause, container: &Rc<Container>, signal: i32) -> Result<Change, Error> {
    let engine = container.engine();
    let result = match &engine {
        Engine::Native(engine) => native::signal_all(cause, engine, signal).await,
        Engine::Command(engine) => {
            let spawn = engine.kill(&at(&container.record()), signal, true);
            run_verb(cause, step::ENGINE, engine, Verb::Kill, spawn).await.map(drop)
        }
    };
    match result {
        Ok(()) => Ok(Change::reply(Reply::Empty)),
        Err(Error::Engine(EngineError::NotRunning { .. })) => Err(Error::Finished { key: ProcessKey::init(&container.id) }),
        Err(error) => Err(error),
    }
}
