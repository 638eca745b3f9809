//! The verbs of the native engine: plans that the keeper has performed, and what this worker does to a cgroup itself.
//!
//! **Invariant:** what is not an operation of the keeper can be done again: writes to a cgroup's files, and its removal. A signal for all is sent once at most.
use x_engine::{Refused, control, plan, spec};

use super::choose::{blocking_plan_config, check_keeper};
use super::create::blocking;
use super::kill::kill_unclaimed;
use super::unit::{self, Held};
use super::{Container, Record, Shared};
use crate::chain::chain;
use crate::engine::{self, CriuRequest, EngineError, NativeEngine, Verb};
use crate::handover::{Exited, Op, Perform, PlanKind};
use crate::worker::cause::{Cause, step};
use crate::worker::error::Error;
use crate::worker::id::{ContainerId, ProcessKey};
use crate::worker::phase::Phase;
use crate::worker::spec::Spec;

/// Makes a container: its init waits before the user's program. Returns its pid.
pub(super) async fn create(shared: &Shared, cause: &Cause, key: &ProcessKey, plan: &plan::Create) -> Result<u32, Error> {
    let Some(unit) = &plan.unit else { return perform(cause, key, plan).await };
    let held = Held::start(shared, cause, key, unit).await?;
    let made = async {
        let pid = perform(cause, key, &held.with_placeholder(plan)).await?;
        held.limit(&plan.cgroup).await.map(|()| pid)
    };
    match made.await {
        Ok(pid) => {
            held.end().await;
            Ok(pid)
        }
        Err(error) => {
            let cgroup = plan.cgroup.clone();
            let is_taken = matches!(error, Error::Engine(EngineError::Exists { .. }));
            // A folder elsewhere is another container's; the unit is this one's.
            if !is_taken
                && let Err(error) =
                    blocking(move || control::kill_all(&cgroup).map_err(failed(Verb::Create, "kill every process of the cgroup"))).await
            {
                log::debug!(container:% = key, error:% = error.chain(); "cannot kill what was made in vain");
            }
            if is_taken && !held.is_proven() {
                held.end().await;
                return Err(error);
            }
            held.stop().await;
            let cgroup = plan.cgroup.clone();
            if !is_taken
                && let Err(error) = blocking(move || control::remove(&cgroup).map_err(failed(Verb::Create, "remove the cgroup"))).await
            {
                log::warn!(container:% = key, error:% = error.chain(); "cannot remove the cgroup of a container that was not made");
            }
            Err(error)
        }
    }
}

async fn perform(cause: &Cause, key: &ProcessKey, plan: &plan::Create) -> Result<u32, Error> {
    let order = Perform {
        key: key.to_string(),
        kind: PlanKind::Create,
        plan: engine::encode(plan),
        init: String::new(),
        terminal: plan.process.terminal.is_some(),
        pid: None,
    };
    make(cause, key, order, Verb::Create).await
}

/// Has criu save the processes of a container, whose record was `record` when that began.
pub(super) async fn checkpoint(
    shared: &Shared,
    cause: &Cause,
    container: &Container,
    (record, native): (&Record, &NativeEngine),
    checkpoint: &engine::Checkpoint<'_>,
) -> Result<(), Error> {
    check_keeper(shared, Verb::Checkpoint)?;
    let was_paused = record.init.phase == Phase::Paused;
    let paths = CriuRequest { image_path: checkpoint.image_path, work_path: checkpoint.work_path, options: checkpoint.options };
    let criu = engine::blocking_plan_criu(Verb::Checkpoint, &record.options, paths)?;
    let mut create = blocking_plan_again(shared, record, Verb::Checkpoint)?;
    create.cgroup.clone_from(&native.container().cgroup);
    let refused = |why: Refused| engine::refused(Verb::Checkpoint, &why);
    let plan = plan::checkpoint(create, criu, checkpoint.exit, was_paused).map_err(refused)?;
    let key = ProcessKey::init(&record.id).to_string();
    let order = Perform { init: key.clone(), key, kind: PlanKind::Checkpoint, plan: engine::encode(&plan), terminal: false, pid: None };
    let exited = run_plan(cause, &record.id, order, Verb::Checkpoint).await?;
    let reported = engine::reported_pid(Verb::Checkpoint, &exited);
    let is_paused = container.record().init.phase == Phase::Paused;
    // Without a report it was killed: criu ends with it, and what criu has frozen stays so. Otherwise it has left all as it was at the beginning.
    if is_paused != was_paused || matches!(reported, Ok(None)) {
        let done = if is_paused { pause(native).await } else { resume(native).await };
        if let Err(error) = done {
            log::warn!(container:% = record.id, error:% = error.chain(); "cannot freeze or thaw what a checkpoint has left otherwise");
        }
    }
    reported?.map(drop).ok_or(Error::NoReport { verb: Verb::Checkpoint, status: exited.status })
}

/// Has criu make a container from its checkpoint: it runs. Returns init's pid, and what is to be recorded.
pub(super) async fn restore(
    shared: &Shared,
    cause: &Cause,
    record: &Record,
    key: &ProcessKey,
    restore: &engine::Restore<'_>,
) -> Result<(u32, NativeEngine), Error> {
    check_keeper(shared, Verb::Restore)?;
    let paths = CriuRequest { image_path: restore.image_path, work_path: restore.work_path, options: restore.options };
    let criu = engine::blocking_plan_criu(Verb::Restore, &record.options, paths)?;
    let create = blocking_plan_again(shared, record, Verb::Restore)?;
    let container = create.container();
    let terminal = create.process.terminal.is_some();
    let plan = plan::restore(create, criu).map_err(|why| engine::refused(Verb::Restore, &why))?;
    let order =
        Perform { key: key.to_string(), kind: PlanKind::Restore, plan: engine::encode(&plan), init: String::new(), terminal, pid: None };
    let pid = make(cause, key, order, Verb::Restore).await?;
    Ok((pid, NativeEngine::blocking_restored(container, pid)))
}

/// The plan of a container by the configuration in its bundle.
fn blocking_plan_again(shared: &Shared, record: &Record, verb: Verb) -> Result<plan::Create, Error> {
    let (_, config) = Spec::blocking_read(&record.bundle)?;
    blocking_plan_config(shared, &record.id, &record.bundle, &record.options, &config, None, verb)
}

/// Removes what a Create has made whose performer was killed, or after which something else failed. A performer that reports a failure has
/// removed all.
pub(super) async fn undo(native: &NativeEngine, key: &ProcessKey) -> Result<(), Error> {
    remove(native, key, true).await
}

/// Removes the cgroup, and the unit that it is of. `kill`: also what still runs in it.
async fn remove(native: &NativeEngine, key: &ProcessKey, kill: bool) -> Result<(), Error> {
    if kill {
        let cgroup = native.container().cgroup.clone();
        blocking(move || control::kill_all(&cgroup).map_err(failed(Verb::Delete, "kill every process of the cgroup"))).await?;
    }
    if let Some(unit) = &native.container().unit {
        unit::stop(key, unit).await;
    }
    let cgroup = native.container().cgroup.clone();
    blocking(move || control::remove(&cgroup).map_err(failed(Verb::Delete, "remove the cgroup"))).await
}

/// Lets init, which is `pid`, execute the user's program, then runs the hooks that follow a start, whether or not it has exited by then.
pub(super) async fn start(cause: &Cause, native: &NativeEngine, key: &ProcessKey, pid: Option<u32>) -> Result<(), Error> {
    match cause.perform(step::ENGINE, Op::OpenGate { key: key.to_string() }).await {
        Err(Error::Keeper { source, .. }) if source.raw_os_error() == Some(nix::libc::ESRCH) => {
            return Err(EngineError::NotRunning { verb: Verb::Start, message: "container not running".into() }.into());
        }
        other => other?,
    }
    if native.container().hooks.poststart.is_empty() {
        return Ok(());
    }
    let ran = hooks(cause, native, key, (PlanKind::Poststart, pid), Verb::Start).await;
    if ran.is_err() {
        // As runc: a container whose hook has failed does not run.
        if let Err(error) = cause.perform(step::SIGNAL, Op::Signal { key: key.to_string(), signal: nix::libc::SIGKILL }).await {
            log::debug!(container:% = key, error:% = error.chain(); "cannot kill init");
        }
    }
    ran
}

/// Adds a process that is described by a `Process` of the runtime specification as JSON. Returns its pid. Without the description the keeper knows
/// the outcome already.
pub(super) async fn exec(
    shared: &Shared,
    cause: &Cause,
    native: &NativeEngine,
    key: &ProcessKey,
    process: Option<&[u8]>,
    terminal: bool,
) -> Result<u32, Error> {
    let plan = match process {
        Some(process) => {
            let refused = |why| engine::refused(Verb::Exec, &why);
            let process = spec::parse_process(process).map_err(refused)?;
            engine::encode(&plan::exec(&process, native.container(), shared.blocking_host()?).map_err(refused)?)
        }
        None => Vec::new(),
    };
    let order = Perform { key: key.to_string(), kind: PlanKind::Exec, plan, init: key.container.to_string(), terminal, pid: None };
    make(cause, key, order, Verb::Exec).await
}

/// Removes the cgroup of a container, then runs the hooks that follow a deletion. `kill`: also what still runs in it.
pub(super) async fn delete(cause: &Cause, native: &NativeEngine, key: &ProcessKey, kill: bool) -> Result<(), Error> {
    remove(native, key, kill).await?;
    if native.container().hooks.poststop.is_empty() {
        return Ok(());
    }
    // The container is gone: the specification has its runtime warn and go on.
    if let Err(error) = hooks(cause, native, key, (PlanKind::Poststop, None), Verb::Delete).await {
        log::warn!(container:% = key, error:% = error.chain(); "a hook after the deletion has failed");
    }
    Ok(())
}

/// Freezes every process.
pub(super) async fn pause(native: &NativeEngine) -> Result<(), Error> {
    let cgroup = native.container().cgroup.clone();
    blocking(move || control::freeze(&cgroup).map_err(failed(Verb::Pause, "freeze the cgroup"))).await
}

/// Thaws every process.
pub(super) async fn resume(native: &NativeEngine) -> Result<(), Error> {
    let cgroup = native.container().cgroup.clone();
    blocking(move || control::thaw(&cgroup).map_err(failed(Verb::Resume, "thaw the cgroup"))).await
}

/// Changes limits: `resources` is a `LinuxResources` of the runtime specification as JSON.
pub(super) async fn update(container: &Container, native: &NativeEngine, resources: &[u8]) -> Result<(), Error> {
    let refused = |why| engine::refused(Verb::Update, &why);
    let resources = spec::parse_resources(resources).map_err(refused)?;
    let changed = plan::update(&resources, native.container()).map_err(refused)?;
    if let Some(unit) = &native.container().unit {
        return unit::update(container, unit, changed).await;
    }
    blocking(move || control::update(&changed).map_err(failed(Verb::Update, "change limits"))).await
}

/// Signals every process. A worker that dies meanwhile may have signalled all, some or none: the next one signals them again, for a signal
/// that is lost leaves a container running that its client takes for ended. Those that the first one has ended are no error.
pub(super) async fn signal_all(cause: &Cause, native: &NativeEngine, signal: i32) -> Result<(), Error> {
    let is_first = cause.is_first(step::SIGNAL).await;
    let cgroup = native.container().cgroup.clone();
    let signalled =
        blocking(move || control::signal_all(&cgroup, signal).map_err(failed(Verb::Kill, "signal every process of the cgroup"))).await;
    if is_first { signalled } else { Ok(()) }
}

/// The longest plan: with its envelope it has to fit into a message to the keeper.
const MAX_PLAN_BYTES: usize = 5 << 20;

/// Has a plan performed that makes a process, and returns its pid.
async fn make(cause: &Cause, key: &ProcessKey, order: Perform, verb: Verb) -> Result<u32, Error> {
    let wants_terminal = order.terminal;
    let exited = run_plan(cause, &key.container, order, verb).await?;
    let pid = engine::reported_pid(verb, &exited)?.ok_or(Error::NoReport { verb, status: exited.status })?;
    if wants_terminal && !exited.terminal {
        kill_unclaimed(pid);
        return Err(Error::NoTerminal { key: key.clone() });
    }
    Ok(pid)
}

/// Has the plan of a verb performed, to the performer's exit.
async fn run_plan(cause: &Cause, id: &ContainerId, order: Perform, verb: Verb) -> Result<Exited, Error> {
    if order.plan.len() > MAX_PLAN_BYTES {
        return Err(Error::TooMuch { id: id.clone(), bytes: order.plan.len(), limit: MAX_PLAN_BYTES });
    }
    match cause.run_plan(step::ENGINE, order).await {
        Err(Error::Keeper { source, .. }) if source.raw_os_error() == Some(nix::libc::ESRCH) => {
            Err(EngineError::NotRunning { verb, message: "container not running".into() }.into())
        }
        Err(Error::Keeper { what, source }) => Err(Error::NotPerformed { verb, what, source }),
        other => other,
    }
}

async fn hooks(
    cause: &Cause,
    native: &NativeEngine,
    key: &ProcessKey,
    (kind, pid): (PlanKind, Option<u32>),
    verb: Verb,
) -> Result<(), Error> {
    let order = Perform { key: key.to_string(), kind, plan: native.encoded(), init: key.container.to_string(), terminal: false, pid };
    let exited = match cause.run_plan(step::HOOKS, order).await {
        // A keeper of an earlier version finds a container by its process alone.
        Err(Error::Keeper { source, .. }) if kind == PlanKind::Poststart && source.raw_os_error() == Some(nix::libc::ESRCH) => {
            log::warn!(container:% = key; "the container has exited before its poststart hooks: a keeper of this version does not run them, upgrade it");
            return Ok(());
        }
        other => other?,
    };
    engine::reported_pid(verb, &exited)?.map(drop).ok_or(Error::NoReport { verb, status: exited.status })
}

pub(super) fn failed<E: std::error::Error>(verb: Verb, what: &'static str) -> impl Fn(E) -> Error {
    move |error| EngineError::Failed { verb, message: format!("{what}: {}", chain(&error)) }.into()
}
