//! Create and Start of a pod, and the calls that change nothing.
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use protobuf::well_known_types::any::Any;
use x_engine::Host;

use super::config::Config;
use super::record::{Phase, Record};
use super::{Apply, Pod, PodChange, cgroup, files, find};
use crate::bootstrap;
use crate::engine;
use crate::handover::{Op, POD_KEY, Perform, PlanKind, Versions};
use crate::settings;
use crate::worker::cause::{Cause, step};
use crate::worker::container::{Change, PodReply, Reply, Shared, blocking};
use crate::worker::error::Error;
use crate::worker::id::ContainerId;

/// The request.
#[derive(Debug, Clone)]
pub(in crate::worker) struct CreateCall {
    pub(in crate::worker) id: String,
    pub(in crate::worker) bundle: PathBuf,
    /// Whether a root file system is named, which a pod has no use for.
    pub(in crate::worker) has_rootfs: bool,
    pub(in crate::worker) options: Option<Any>,
    /// Empty for the host's network.
    pub(in crate::worker) network: String,
}

/// Reads what the plan of a pod depends on, if this shim was started for one that is not there yet: its client needs longer to connect. A failure
/// is one of Create.
pub(in crate::worker) fn blocking_look_ahead(shared: &Shared) {
    if shared.pod.borrow().is_none() && shared.registry.is_empty() && bootstrap::is_of_pod(&shared.settings.bundle) {
        *shared.cgroups.borrow_mut() = Host::read_cgroups().ok();
    }
}

/// Takes the configuration of a pod. Nothing is made.
pub(in crate::worker) fn create(shared: &Shared, call: CreateCall) -> Result<Change, Error> {
    let id = ContainerId::new(&call.id)?;
    let refused = |field: &str, why: String| Error::PodConfig { id: call.id.clone(), field: field.to_owned(), why };
    if shared.version.get() < Versions::HOLDS_PODS {
        return Err(Error::NoPods { id: call.id });
    }
    if shared.registry.is_set_aside(POD_KEY) {
        return Err(Error::SetAside { id: call.id });
    }
    if let Some(pod) = &*shared.pod.borrow() {
        return Err(Error::PodExists { id: pod.record().id.clone() });
    }
    if id.as_str() != shared.settings.id {
        return Err(refused("sandbox_id", format!("this shim was started for {:?}", shared.settings.id)));
    }
    if !call.bundle.is_absolute() {
        return Err(refused("bundle_path", format!("{} is not absolute", call.bundle.display())));
    }
    if call.has_rootfs {
        return Err(refused("rootfs", "a pod without a pause process has no root file system".to_owned()));
    }
    let config = Config::blocking_read(&call.id, call.options.as_ref(), &call.network)?;
    let record = Record::new(id, call.bundle, config);
    // Refuses what it would not be started with.
    let plan = Plan::blocking_make(&record, shared.cgroups.take())?;
    log::info!(sandbox:% = record.id, pod:% = record.config.name, namespace:% = record.config.namespace; "sandbox created");
    *shared.pod.borrow_mut() = Some(Rc::new(Pod::with_plan(record, Some(plan))));
    let pod = PodChange { save: true, expires_after_seconds: Some(settings::unstarted_pod_seconds()), ..PodChange::default() };
    Ok(Change { pod, ..Change::reply(Reply::Empty) })
}

/// Makes what the pod consists of.
pub(in crate::worker) async fn start(shared: &Shared, cause: &Cause, id: &str, apply: &impl Apply) -> Result<Change, Error> {
    let pod = find(shared, id)?;
    let _turn = pod.turn.lock().await;
    if pod.record().phase != Phase::Created || pod.is_stopping.get() {
        return Err(pod.refused("start"));
    }
    match make(cause, &pod, apply).await {
        Ok(holder) => {
            let pid = holder.unwrap_or_else(|| shared.keeper.get().pid);
            let since_nanos = now_nanos();
            pod.update(|record| (record.holder, record.phase) = (holder, Phase::Ready { pid, since_nanos }));
            log::info!(sandbox:% = id, pid; "sandbox started");
            let reply = PodReply::Started { pid, since_nanos, spec: pod.record().spec(pid) };
            let change = PodChange { save: true, claim: holder, ..PodChange::default() };
            Ok(Change { pod: change, ..Change::reply(Reply::Pod(reply)) })
        }
        Err(error) => {
            undo(cause, &pod).await;
            let expires_after_seconds = Some(settings::unstarted_pod_seconds());
            Ok(Change { pod: PodChange { save: true, expires_after_seconds, ..PodChange::default() }, ..Change::refuse(error) })
        }
    }
}

/// What a pod is to have outside of its bundle.
#[derive(Debug)]
pub(super) struct Plan {
    namespaces: x_engine::plan::Pod,
    /// The cgroup above those of its containers, if it names one.
    parent: Option<cgroup::Planned>,
}

impl Plan {
    /// Plans a pod. For its cgroup, the host's mounts are read, if they were not.
    fn blocking_make(record: &Record, host: Option<Host>) -> Result<Self, Error> {
        Ok(Self { namespaces: record.config.blocking_plan(record.id.as_str())?, parent: cgroup::blocking_plan(record, host)? })
    }
}

/// Returns the holder's pid, if there is one.
async fn make(cause: &Cause, pod: &Rc<Pod>, apply: &impl Apply) -> Result<Option<u32>, Error> {
    let planned = pod.plan.take();
    let Plan { namespaces, parent } = match planned {
        Some(plan) => plan,
        None => Plan::blocking_make(&pod.record(), None)?,
    };
    let is_held = namespaces.needs_holder();
    let plan = engine::encode(&namespaces);
    if !is_held {
        // The keeper enters them while the rest is made. If that fails, the keeper returns from them.
        let (made, entered) = tokio::join!(make_around(cause, pod, parent, apply), cause.perform(step::ENTER_POD, Op::EnterPod { plan }));
        return made.and(entered).map(|()| None);
    }
    make_around(cause, pod, parent, apply).await?;
    let order = Perform { key: POD_KEY.to_owned(), kind: PlanKind::Holder, plan, init: String::new(), terminal: false, pid: None };
    let exited = cause.run_plan(step::HOLDER, order).await?;
    let not_made = |failure: String| Error::PodNotMade { id: pod.record().id.clone(), failure };
    let pid = engine::reported_pid_of_holder(&exited).map_err(not_made)?;
    Ok(Some(pid))
}

/// Makes what is around the namespaces: the files and the cgroup, at the same time.
async fn make_around(cause: &Cause, pod: &Rc<Pod>, parent: Option<cgroup::Planned>, apply: &impl Apply) -> Result<(), Error> {
    let record = pod.record().clone();
    files::blocking_make_folder(&record)?;
    let (files, cgroup) = tokio::join!(blocking(move || files::blocking_make(&record)), make_cgroup(cause, pod, parent, apply));
    files.and(cgroup)
}

/// Makes the cgroup above those of the containers. The folder of the files must be there.
async fn make_cgroup(cause: &Cause, pod: &Rc<Pod>, parent: Option<cgroup::Planned>, apply: &impl Apply) -> Result<(), Error> {
    let is_recorded = pod.record().cgroup != cgroup::Parent::default();
    // Recorded before it is made: a replay would take it for another's.
    if let Some(planned) = parent.as_ref().filter(|_| !is_recorded) {
        pod.update(|record| record.cgroup = planned.blocking_parent());
        apply.apply(Change { pod: PodChange { save: true, ..PodChange::default() }, ..Change::default() });
        cause.until_taken(step::POD_RECORDED).await;
    }
    let record = pod.record().clone();
    // Before it too: `delete` removes what is in the list.
    files::blocking_list_leftovers(&record)?;
    match parent {
        Some(planned) => planned.make(&record.cgroup).await,
        None => Ok(()),
    }
}

/// Removes what a Start has made that failed. Failures are logged: the client gets the error that led here.
async fn undo(cause: &Cause, pod: &Rc<Pod>) {
    let record = pod.record().clone();
    if let Err(error) = cause.perform(step::UNDO_POD, Op::LeavePod).await {
        log::error!(sandbox:% = record.id, error:% = error.chain(); "the keeper cannot return from the namespaces of the pod");
    }
    record.cgroup.remove().await;
    let with_files = record.clone();
    if let Err(error) = blocking(move || files::blocking_remove(&with_files)).await {
        log::warn!(sandbox:% = record.id, error:% = error.chain(); "cannot remove the files of a pod that was not started");
    }
    pod.update(|record| record.cgroup = cgroup::Parent::default());
}

/// The platform of its containers.
pub(in crate::worker) fn platform(shared: &Shared, id: &str) -> Result<Change, Error> {
    find(shared, id)?;
    Ok(Change::reply(Reply::Pod(PodReply::Platform)))
}

/// The state of the pod, from its record.
pub(in crate::worker) fn status(shared: &Shared, id: &str, is_verbose: bool) -> Result<Change, Error> {
    let status = find(shared, id)?.record().status(is_verbose);
    Ok(Change::reply(Reply::Pod(PodReply::Status(Box::new(status)))))
}

/// Waits for the end of the pod: parked with the keeper.
pub(in crate::worker) fn wait(shared: &Shared, id: &str) -> Result<Change, Error> {
    let pod = find(shared, id)?;
    let phase = pod.record().phase;
    Ok(match phase {
        Phase::NotReady { exit, .. } => Change::reply(Reply::Exit(exit)),
        Phase::Created | Phase::Ready { .. } => Change { pod: PodChange { park: true, ..PodChange::default() }, ..Change::default() },
    })
}

/// Whether the pod is there and has not stopped.
pub(in crate::worker) fn ping(shared: &Shared, id: &str) -> Result<Change, Error> {
    let pod = find(shared, id)?;
    match pod.record().phase {
        Phase::Created | Phase::Ready { .. } => Ok(Change::reply(Reply::Empty)),
        Phase::NotReady { .. } => Err(pod.refused("answer")),
    }
}

/// The metrics of the pod's cgroup.
pub(in crate::worker) fn metrics(shared: &Shared, id: &str) -> Result<Change, Error> {
    let pod = find(shared, id)?;
    let record = pod.record();
    let metrics = record.cgroup.cgroup.metrics();
    Ok(Change::reply(Reply::Pod(PodReply::Metrics { id: id.to_owned(), at_nanos: now_nanos(), metrics })))
}

pub(super) fn now_nanos() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}
