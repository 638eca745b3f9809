//! The choice of the engine for a container that is to be created.
//!
//! Owns the order: the engine that the option BinaryName names; without it the native engine, if that takes the configuration, else an OCI runtime.
use std::path::Path;

use x_engine::plan::{self, Request};
use x_engine::{Host, Refused, spec};

use super::{CreateCall, Shared};
use crate::engine::{self, CommandEngine, CriuRequest, Engine, EngineError, NATIVE, NativeEngine, Verb};
use crate::handover::Versions;
use crate::options::RuntimeOptions;
use crate::worker::error::Error;
use crate::worker::id::ContainerId;

/// An engine, and its plan if it has one.
pub(super) struct Chosen {
    pub(super) engine: Engine,
    pub(super) plan: Option<Box<plan::Create>>,
}

/// Chooses. `config` is the bundle's configuration, `begun` the engine with which an earlier worker has begun.
///
/// Errors: a configuration that no engine takes, or none of those that are there.
pub(super) fn blocking_choose(
    shared: &Shared,
    id: &ContainerId,
    call: &CreateCall,
    config: &[u8],
    begun: Option<Engine>,
) -> Result<Chosen, Error> {
    match begun {
        Some(engine @ Engine::Command(_)) => return Ok(Chosen { engine, plan: None }),
        Some(Engine::Native(_)) => {
            return blocking_plan(shared, id, call, config).map(|plan| native(id, plan, "an earlier worker has begun with it"));
        }
        None => {}
    }
    let reason = match call.options.binary_name.as_deref() {
        Some(NATIVE) => return blocking_plan(shared, id, call, config).map(|plan| native(id, plan, "named by the option BinaryName")),
        Some(_) => None,
        None => match blocking_plan(shared, id, call, config) {
            Ok(plan) => return Ok(native(id, plan, "BinaryName is not set")),
            // Another may take it.
            Err(Error::Engine(EngineError::Unsupported { message, .. })) => Some(message),
            Err(error) => return Err(error),
        },
    };
    let is_debugging = log::max_level() >= log::LevelFilter::Debug;
    match (CommandEngine::blocking_choose(&call.options, &shared.settings.namespace, is_debugging), reason) {
        (Ok((engine, why)), reason) => {
            let reason = reason.map_or(why.clone(), |reason| format!("{reason}; {why}"));
            log::info!(container:% = id, runtime:% = engine.binary().display(), reason:%; "OCI runtime chosen");
            Ok(Chosen { engine: Engine::Command(engine), plan: None })
        }
        (Err(error), Some(reason)) => {
            Err(EngineError::Unsupported { verb: Verb::Create, message: format!("{reason}, and there is no other: {error}") }.into())
        }
        (Err(error), None) => Err(error.into()),
    }
}

fn native(id: &ContainerId, plan: plan::Create, reason: &str) -> Chosen {
    log::info!(container:% = id, runtime = NATIVE, reason; "OCI runtime chosen");
    Chosen { engine: Engine::Native(NativeEngine::new(plan.container())), plan: Some(Box::new(plan)) }
}

/// Plans the container for the native engine.
///
/// Errors: [`EngineError::Unsupported`] for what another engine may take.
fn blocking_plan(shared: &Shared, id: &ContainerId, call: &CreateCall, config: &[u8]) -> Result<plan::Create, Error> {
    let unsupported = |message: &str| EngineError::Unsupported { verb: Verb::Create, message: format!("the native engine {message}") };
    let options = &call.options;
    if shared.version.get() < Versions::PERFORMS {
        return Err(unsupported("needs the keeper of a later build: upgrade the shim with its keeper").into());
    }
    if options.systemd_cgroup {
        return Err(unsupported("does not implement the option SystemdCgroup").into());
    }
    let plan = blocking_plan_config(shared, id, &call.bundle, options, config, Verb::Create)?;
    if !call.checkpoint.is_empty() {
        check_keeper(shared, Verb::Create)?;
        plan::check_restore(&plan).map_err(|why| engine::refused(Verb::Create, &why))?;
        let paths = CriuRequest { image_path: Path::new(&call.checkpoint), work_path: &call.bundle, options: &options.restore };
        engine::blocking_plan_criu(Verb::Create, options, paths)?;
    }
    Ok(plan)
}

/// Plans a container by its configuration: before it is made, or as it was made.
pub(super) fn blocking_plan_config(
    shared: &Shared,
    id: &ContainerId,
    bundle: &Path,
    options: &RuntimeOptions,
    config: &[u8],
    verb: Verb,
) -> Result<plan::Create, Error> {
    let refused = |why: Refused| engine::refused(verb, &why);
    let config = spec::parse(config).map_err(refused)?;
    let host = blocking_read_host()?;
    let filters = shared.settings.control_path.parent().map(|folder| folder.join(FILTERS));
    let request = Request {
        no_new_keyring: options.no_new_keyring,
        default_oom_score_adj: blocking_read_oom_score_adj(),
        filters: filters.as_deref(),
        no_pivot_root: options.no_pivot_root,
        ..Request::new(id.as_str(), bundle)
    };
    Ok(plan::create(&config, &request, &host).map_err(refused)?)
}

/// Whether the keeper performs plans with criu.
pub(super) fn check_keeper(shared: &Shared, verb: Verb) -> Result<(), EngineError> {
    if shared.version.get() >= Versions::CHECKPOINTS {
        return Ok(());
    }
    let message = "a checkpoint needs the keeper of a later build: upgrade the shim with its keeper".to_owned();
    Err(EngineError::Unsupported { verb, message })
}

/// The folder beside the control sockets in which compiled filters of system calls are kept: all shims of a host have the same few.
const FILTERS: &str = "filters";

/// Reads what plans depend on.
pub(super) fn blocking_read_host() -> Result<Host, Error> {
    Host::read().map_err(|source| Error::Io { op: "read", path: "/proc/self/mountinfo".into(), source })
}

/// The shim's own: what a process inherits from an OCI runtime that sets none.
fn blocking_read_oom_score_adj() -> i32 {
    let text = std::fs::read_to_string(Path::new("/proc/self/oom_score_adj")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}
