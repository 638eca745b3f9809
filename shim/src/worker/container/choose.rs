//! The choice of the engine for a container that is to be created.
//!
//! Owns the order: the engine that the option BinaryName names; without it the native engine, if that takes the configuration, else an OCI runtime.
use std::path::Path;

use x_engine::plan::{self, Request, RootMount};
use x_engine::spec::{self, Spec};
use x_engine::{Host, Refused};

use super::{CreateCall, Shared};
use crate::chain::chain;
use crate::engine::{self, CommandEngine, CriuRequest, Engine, EngineError, NATIVE, NativeEngine, Verb};
use crate::handover::Versions;
use crate::options::RuntimeOptions;
use crate::systemd;
use crate::worker::error::Error;
use crate::worker::id::ContainerId;

/// An engine, and its plan if it has one.
pub(super) struct Chosen {
    pub(super) engine: Engine,
    pub(super) plan: Option<Box<plan::Create>>,
}

/// What an earlier worker has begun with.
pub(super) struct Begun {
    pub(super) engine: Engine,
    /// It mounts the root file system on the host.
    pub(super) mounts_on_host: bool,
}

/// Chooses. `config` is the bundle's configuration, `begun` what an earlier worker has begun with.
///
/// Errors: a configuration that no engine takes, or none of those that are there.
pub(super) fn blocking_choose(
    shared: &Shared,
    id: &ContainerId,
    call: &CreateCall,
    config: &[u8],
    begun: Option<Begun>,
) -> Result<Chosen, Error> {
    let on_host = match begun {
        Some(Begun { engine: engine @ Engine::Command(_), .. }) => return Ok(Chosen { engine, plan: None }),
        Some(Begun { engine: Engine::Native(_), mounts_on_host }) => {
            let plan = blocking_plan(shared, id, call, config, mounts_on_host)?;
            return Ok(native(id, plan, "an earlier worker has begun with it"));
        }
        None => false,
    };
    let reason = match call.options.binary_name.as_deref() {
        Some(NATIVE) => {
            return blocking_plan(shared, id, call, config, on_host).map(|plan| native(id, plan, "named by the option BinaryName"));
        }
        Some(_) => None,
        None => match blocking_plan(shared, id, call, config, on_host) {
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

/// Plans the container for the native engine. `on_host`: its root file system is mounted on the host already, or is about to be.
///
/// Errors: [`EngineError::Unsupported`] for what another engine may take.
fn blocking_plan(shared: &Shared, id: &ContainerId, call: &CreateCall, config: &[u8], on_host: bool) -> Result<plan::Create, Error> {
    let unsupported = |message: &str| EngineError::Unsupported { verb: Verb::Create, message: format!("the native engine {message}") };
    let options = &call.options;
    if shared.version.get() < Versions::PERFORMS {
        return Err(unsupported("needs the keeper of a later build: upgrade the shim with its keeper").into());
    }
    if options.systemd_cgroup {
        check_systemd(shared, &unsupported)?;
        if !call.checkpoint.is_empty() {
            return Err(unsupported("does not restore a checkpoint with the option SystemdCgroup").into());
        }
    }
    let mounting = (!on_host).then_some(call);
    let plan = blocking_plan_config(shared, id, &call.bundle, options, config, mounting, Verb::Create)?;
    if !call.checkpoint.is_empty() {
        check_keeper(shared, Verb::Create)?;
        plan::check_restore(&plan).map_err(|why| engine::refused(Verb::Create, &why))?;
        let paths = CriuRequest { image_path: Path::new(&call.checkpoint), work_path: &call.bundle, options: &options.restore };
        engine::blocking_plan_criu(Verb::Create, options, paths)?;
    }
    Ok(plan)
}

/// Plans a container by its configuration: before it is made, or as it was made. `mounting`: the call whose mounts its init is to make, where it can.
pub(super) fn blocking_plan_config(
    shared: &Shared,
    id: &ContainerId,
    bundle: &Path,
    options: &RuntimeOptions,
    config: &[u8],
    mounting: Option<&CreateCall>,
    verb: Verb,
) -> Result<plan::Create, Error> {
    let refused = |why: Refused| engine::refused(verb, &why);
    let config = spec::parse(config).map_err(refused)?;
    let mut host = blocking_read_host()?;
    if options.systemd_cgroup {
        host = host.with_init().map_err(|source| Error::Io { op: "read", path: "/proc/1/cgroup".into(), source })?;
    }
    let filters = shared.settings.control_path.parent().map(|folder| folder.join(FILTERS));
    let root_mounts = mounting.map(|call| root_mounts(id, call, &config)).unwrap_or_default();
    let request = Request {
        no_new_keyring: options.no_new_keyring,
        default_oom_score_adj: blocking_read_oom_score_adj(),
        filters: filters.as_deref(),
        no_pivot_root: options.no_pivot_root,
        systemd_cgroup: options.systemd_cgroup,
        root_mounts: &root_mounts,
        ..Request::new(id.as_str(), bundle)
    };
    Ok(plan::create(&config, &request, &host).map_err(refused)?)
}

/// Whether systemd can be asked for cgroups.
fn check_systemd(shared: &Shared, unsupported: &impl Fn(&str) -> EngineError) -> Result<(), Error> {
    if shared.version.get() < Versions::HOLDS_UNITS {
        return Err(unsupported("needs the keeper of a later build for the option SystemdCgroup: upgrade the shim with its keeper").into());
    }
    if !nix::unistd::geteuid().is_root() {
        return Err(unsupported("does not implement the option SystemdCgroup for a user's own instance of systemd").into());
    }
    // Every other engine needs it as well.
    if !systemd::blocking_is_running() {
        let message = format!(
            "the option SystemdCgroup needs systemd as the host's init, and there is no folder {}; unset it, and have the client use the cgroupfs driver",
            systemd::RUNNING
        );
        return Err(EngineError::Failed { verb: Verb::Create, message }.into());
    }
    Ok(())
}

/// The mounts of the root file system, if they can be made in the container's mount namespace alone; else none, and the shim mounts them on the host.
fn root_mounts<'a>(id: &ContainerId, call: &'a CreateCall, config: &Spec) -> Vec<RootMount<'a>> {
    if call.mounts.is_empty() {
        return Vec::new();
    }
    let mounts: Vec<_> =
        call.mounts.iter().map(|mount| RootMount { kind: &mount.kind, source: &mount.source, options: &mount.options }).collect();
    let reason = match call.mounts.iter().find(|mount| !mount.target.trim_matches('/').is_empty()) {
        // criu looks for it there.
        _ if !call.checkpoint.is_empty() => "the container is restored from a checkpoint".to_owned(),
        Some(mount) => format!("{} is to be mounted below it, at {}", mount.kind, mount.target),
        None => match plan::check_root_mounts(config, &mounts) {
            Ok(()) => return mounts,
            Err(refused) => chain(&refused),
        },
    };
    log::debug!(container:% = id, reason; "the root filesystem is mounted on the host");
    Vec::new()
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
fn blocking_read_host() -> Result<Host, Error> {
    Host::read().map_err(|source| Error::Io { op: "read", path: "/proc/self/mountinfo".into(), source })
}

/// The shim's own: what a process inherits from an OCI runtime that sets none.
fn blocking_read_oom_score_adj() -> i32 {
    let text = std::fs::read_to_string(Path::new("/proc/self/oom_score_adj")).unwrap_or_default();
    text.trim().parse().unwrap_or(0)
}
