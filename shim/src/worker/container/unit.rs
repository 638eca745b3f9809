//! Units of systemd's, in which it makes the cgroups of containers (the option SystemdCgroup).
//!
//! A scope is started with a process. That is a placeholder, a child of the keeper's: it outlives this worker, so that the next one finds the unit
//! while the keeper performs the plan. It ends with the request at the latest, and with the keeper, so that a shim that is killed leaves no unit.
//!
//! ```text
//!  placeholder (the keeper's) ─▶ unit started with it ─▶ plan performed: init is born in its cgroup ─▶ limits ─▶ placeholder killed
//! ```
//!
//! **Invariant:** a unit is ours if the placeholder is in it, a slice, which has none, if its description names the request; nothing is done to any other. Each
//! step can be done again.
use std::os::fd::AsFd;

use x_engine::control;
use x_engine::plan::{self, Property};

use super::create::blocking;
use super::native::failed;
use super::{Container, Shared};
use crate::engine::{self, EngineError, Verb};
use crate::handover::{Perform, PlanKind};
use crate::processes::Stat;
use crate::sys;
use crate::systemd::{self, Manager};
use crate::worker::cause::{Cause, step};
use crate::worker::error::Error;
use crate::worker::id::ProcessKey;
use crate::worker::phase::Phase;

/// The unit of a container that is being made.
#[derive(Debug)]
pub(super) struct Held {
    manager: Manager,
    unit: plan::Unit,
    placeholder: Option<u32>,
    /// This worker has seen that the unit is ours. Otherwise the placeholder has exited, and with it the proof.
    is_proven: bool,
}

impl Held {
    /// Starts the unit.
    pub(super) async fn start(shared: &Shared, cause: &Cause, key: &ProcessKey, unit: &plan::Unit) -> Result<Self, Error> {
        let placeholder = if unit.is_slice() { None } else { Some(placeholder(cause, key).await?) };
        let unit = match placeholder {
            Some(_) => unit.clone(),
            None => unit.described(&format!("container {}, request {} of shim {}", key.container, cause.number(), shared.keeper.get().pid)),
        };
        // In what follows, a placeholder that is in no unit of ours is left to the end of the request: a replay is to find it as this worker did.
        let manager = Manager::connect().await.map_err(|error| failure(Verb::Create, &error))?;
        let mut held = Self { manager, unit, placeholder, is_proven: false };
        // Its end has followed the making of init, or the stop of a unit of ours: an earlier worker has come further.
        if placeholder.is_some_and(|pid| !Stat::of(pid).is_some_and(|stat| stat.is_running())) {
            return Ok(held);
        }
        let pids: Vec<u32> = placeholder.into_iter().collect();
        let started = held.manager.start(&held.unit, &pids).await;
        held.is_proven = started.is_ok() || started.as_ref().is_err_and(systemd::Error::has_a_job) || held.is_ours().await;
        match started {
            Ok(()) => Ok(held),
            Err(systemd::Error::Exists { .. }) if held.is_proven => Ok(held),
            Err(error) => {
                if held.is_proven {
                    // It may have been started all the same.
                    held.stop().await;
                } else {
                    held.manager.close().await;
                }
                Err(match error {
                    systemd::Error::Exists { .. } => EngineError::Exists { verb: Verb::Create, message: error.to_string() }.into(),
                    error => failure(Verb::Create, &error),
                })
            }
        }
    }

    /// Whether the unit of the name is the one that this request has started.
    async fn is_ours(&self) -> bool {
        match self.placeholder {
            Some(pid) => is_in(pid, &self.unit.control_group),
            None => self.manager.has_description(&self.unit).await,
        }
    }

    /// The plan, for a cgroup in which the placeholder is.
    pub(super) fn with_placeholder(&self, plan: &plan::Create) -> plan::Create {
        plan::Create { cgroup: plan::Cgroup { placeholder: self.placeholder, ..plan.cgroup.clone() }, ..plan.clone() }
    }

    /// Gives the limits to systemd, then writes the files again: its idea of them may differ.
    pub(super) async fn limit(&self, cgroup: &plan::Cgroup) -> Result<(), Error> {
        set(&self.manager, Verb::Create, &self.unit.name, cgroup, &self.unit.limits, None).await
    }

    /// Whether the unit is ours though a folder of the container is another's. One that is only assumed to be ours is the other's too.
    pub(super) fn is_proven(&self) -> bool {
        self.is_proven
    }

    /// The container is made, or the unit another's.
    pub(super) async fn end(self) {
        self.placeholder.into_iter().for_each(kill);
        self.manager.close().await;
    }

    /// Stops the unit of what could not be made.
    pub(super) async fn stop(self) {
        self.placeholder.into_iter().for_each(kill);
        if let Err(error) = self.manager.stop(&self.unit.name).await {
            log::warn!(unit:% = self.unit.name, error:% = crate::chain::chain(&error); "cannot stop the unit of a container that was not made");
        }
        self.manager.close().await;
    }
}

/// Stops the unit of a container. What fails is logged: its folders are removed in any case.
pub(super) async fn stop(key: &ProcessKey, unit: &str) {
    let stopped = async {
        let manager = Manager::connect().await?;
        let stopped = manager.stop(unit).await;
        manager.close().await;
        stopped
    };
    if let Err(error) = stopped.await {
        log::warn!(container:% = key, unit, error:% = crate::chain::chain(&error); "cannot stop the unit of a container, its cgroup is removed without");
    }
}

/// Changes limits of a container: first as properties of its unit, then in its cgroup.
pub(super) async fn update(container: &Container, unit: &str, mut changed: plan::Cgroup) -> Result<(), Error> {
    let bandwidth = control::bandwidth(&changed);
    let properties = plan::settle(&mut changed, bandwidth).map_err(|why| engine::refused(Verb::Update, &why))?;
    if properties.is_empty() {
        return write(changed).await;
    }
    let manager = Manager::connect().await.map_err(|error| failure(Verb::Update, &error))?;
    let before = manager.values(unit, &properties).await;
    let updated = set(&manager, Verb::Update, unit, &changed, &properties, Some(container)).await;
    if updated.is_err()
        && let Err(error) = manager.set_back(unit, &before).await
    {
        log::warn!(unit, error:% = crate::chain::chain(&error); "cannot set the properties back to what they were");
    }
    manager.close().await;
    updated
}

/// On cgroup v1 systemd then writes its list of devices again, in steps: nothing may use a device meanwhile, and what a hook has added is added again.
/// `running`: what may use one.
async fn set(
    manager: &Manager,
    verb: Verb,
    unit: &str,
    cgroup: &plan::Cgroup,
    properties: &[Property],
    running: Option<&Container>,
) -> Result<(), Error> {
    if properties.is_empty() {
        return Ok(());
    }
    let devices = control::devices(cgroup);
    let running = running.filter(|_| !devices.is_empty());
    if running.is_some() && !control::is_frozen(cgroup) {
        let cgroup = cgroup.clone();
        // What cannot be frozen may be refused a device for a moment.
        if let Err(error) = blocking(move || control::freeze(&cgroup).map_err(failed(verb, "freeze the cgroup"))).await {
            log::warn!(unit, error:% = error.chain(); "cannot freeze a container while systemd writes its devices");
        }
    }
    let mut done = manager.set(unit, properties).await.map_err(|error| failure(verb, &error));
    let allowed = control::allow(&devices).map_err(failed(verb, "allow devices again"));
    // By the phase: a worker that was killed here has left it frozen, and a client may have paused it meanwhile.
    if running.is_some_and(|container| container.record().init.phase != Phase::Paused) {
        let cgroup = cgroup.clone();
        let thawed = blocking(move || control::thaw(&cgroup).map_err(failed(verb, "thaw the cgroup"))).await;
        done = done.and(thawed);
    }
    done.and(allowed)?;
    write(cgroup.clone()).await
}

async fn write(mut cgroup: plan::Cgroup) -> Result<(), Error> {
    cgroup.folders.iter_mut().for_each(|folder| folder.limits.retain(|limit| !limit.file.starts_with("devices.")));
    blocking(move || control::update(&cgroup).map_err(failed(Verb::Update, "change limits"))).await
}

/// Has the keeper make a placeholder. The same in a replay, though it may have ended by then.
async fn placeholder(cause: &Cause, key: &ProcessKey) -> Result<u32, Error> {
    let order =
        Perform { key: key.to_string(), kind: PlanKind::Placeholder, plan: Vec::new(), init: String::new(), terminal: false, pid: None };
    let made = async {
        let exited = cause.run_plan(step::PLACEHOLDER, order).await?;
        engine::reported_pid(Verb::Create, &exited)?.ok_or(Error::NoReport { verb: Verb::Create, status: exited.status })
    };
    // Nothing is to be undone: the unit of this name may be another's.
    made.await.map_err(|error| match error {
        error @ Error::Engine(_) => error,
        error => EngineError::Failed { verb: Verb::Create, message: error.chain() }.into(),
    })
}

/// Its pid is not reused: the keeper reaps nothing before the commit of this cause.
fn kill(placeholder: u32) {
    let killed = sys::process::open(placeholder).and_then(|process| sys::process::signal(process.as_fd(), nix::libc::SIGKILL));
    if let Err(error) = killed {
        log::debug!(pid = placeholder, error:%; "cannot kill a placeholder");
    }
}

/// Whether a process is in a cgroup, in any hierarchy.
fn is_in(pid: u32, control_group: &str) -> bool {
    let cgroups = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
    cgroups.lines().filter_map(|line| line.splitn(3, ':').nth(2)).any(|path| path == control_group)
}

fn failure(verb: Verb, error: &systemd::Error) -> Error {
    EngineError::Failed { verb, message: crate::chain::chain(error) }.into()
}
