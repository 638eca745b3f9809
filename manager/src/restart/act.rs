//! What the restart monitor does to a task.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use containerd_client::events::ContainerUpdate;
use containerd_client::services::v1::Container;
use containerd_client::types::Mount;
use containerd_shim_protos::api::{StateRequest, StateResponse, Status};
use log::{info, warn};
use serde::Deserialize;

use super::policy::{self, Decision, Observed};
use crate::error::{Error, Object, Result};
use crate::events::Exchange;
use crate::gate::Gate;
use crate::name::Namespace;
use crate::snapshots::{Snapshots, Snapshotter};
use crate::store::snapshots::Place;
use crate::store::{Store, containers, restarts};
use crate::tasks::limits::STATE;
use crate::tasks::{NewTask, Phase, Tasks};
use crate::timestamp;

/// Starts containers again, and stops them.
#[derive(Debug)]
pub(crate) struct Restarter {
    pub(crate) store: Store,
    pub(crate) snapshots: Snapshots,
    pub(crate) events: Arc<Exchange>,
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) gate: Gate,
    /// How many containers it has started.
    pub(crate) started: AtomicU64,
}

impl Restarter {
    /// The state of a container's task.
    pub(super) async fn observe(&self, namespace: &Namespace, id: &str) -> Observed {
        let Ok(task) = self.tasks.find(namespace, id) else { return Observed::Nothing };
        let shim = match task.phase() {
            Phase::Live(shim) | Phase::Deleting(shim) => shim,
            Phase::Ended(exit) => return Observed::Exited(exit.status),
            // the end of each of them is an event, or is seen in the next round
            Phase::Starting | Phase::Loading(_) | Phase::Cleaning(_) | Phase::Ending | Phase::Gone => return Observed::Undecided,
        };
        let request = StateRequest { id: id.to_owned(), ..StateRequest::default() };
        match shim.call::<StateResponse>("State", &request, Some(STATE)).await {
            Ok(state) => match state.status.enum_value() {
                Ok(Status::RUNNING) => Observed::Running,
                Ok(Status::STOPPED) => Observed::Exited(state.exit_status),
                Ok(Status::CREATED) => Observed::Created,
                Ok(Status::PAUSED | Status::PAUSING) => Observed::Paused,
                Ok(Status::UNKNOWN) | Err(_) => Observed::Undecided,
            },
            Err(_) => Observed::Undecided,
        }
    }

    /// Starts a container again, or ends its task. `is_half_made` when an earlier process has begun to.
    pub(super) async fn act(&self, namespace: &Namespace, container: Container, decision: Decision, is_half_made: bool) -> Result<()> {
        // another process has taken over
        let Ok(pass) = self.gate.enter().await else { return Ok(()) };
        drop(pass);
        let _carried = self.gate.carry();
        match decision {
            Decision::Leave => Ok(()),
            Decision::Stop => self.tasks.end_container(namespace, &container.id).await,
            Decision::Start => self.start(namespace, container, is_half_made).await,
        }
    }

    async fn start(&self, namespace: &Namespace, container: Container, is_half_made: bool) -> Result<()> {
        let id = container.id.clone();
        let started = self.create_and_start(namespace, container, is_half_made).await;
        self.is_settled(namespace, &id).await;
        started
    }

    /// Records that an attempt has left nothing half-made.
    pub(super) async fn is_settled(&self, namespace: &Namespace, id: &str) {
        // after a handover the new process continues
        let Ok(_pass) = self.gate.enter().await else { return };
        let (place, name) = (namespace.clone(), id.to_owned());
        if let Err(error) = self.store.note(move |db| restarts::end(db, place.as_str(), &name)).await {
            warn!(namespace:%, container = id, error = error.chain(); "cannot record the end of a restart");
        }
    }

    async fn create_and_start(&self, namespace: &Namespace, container: Container, is_half_made: bool) -> Result<()> {
        let rootfs = self.root(namespace, &container).await?;
        let output = policy::output(&container.labels).map_err(Error::Invalid)?;
        let id = container.id.clone();
        // an attempt of the previous process is counted already
        let count = policy::count(&container.labels) + u64::from(!is_half_made);
        self.note_count(namespace, &id, count).await?;
        self.tasks.end_container(namespace, &id).await?;
        let terminal = container.spec.as_ref().is_some_and(|spec| has_terminal(&spec.value));
        // a terminal has one output
        let stderr = if terminal { String::new() } else { output.clone() };
        let new = NewTask { container, rootfs, terminal, stdout: output, stderr, ..NewTask::default() };
        self.tasks.start_container(namespace, new).await?;
        self.started.fetch_add(1, Ordering::Relaxed);
        info!(namespace:%, container = id, count; "container started again");
        Ok(())
    }

    /// What is mounted as its root: its snapshot; nothing if the spec names a folder.
    async fn root(&self, namespace: &Namespace, container: &Container) -> Result<Vec<Mount>> {
        if container.snapshot_key.is_empty() {
            return Ok(Vec::new());
        }
        let snapshotter = Snapshotter::parse(&container.snapshotter)?.name().to_owned();
        self.snapshots.mounts(&Place { namespace: namespace.to_string(), snapshotter }, &container.snapshot_key).await
    }

    /// Records the restart count of a container, and that a restart begins.
    async fn note_count(&self, namespace: &Namespace, id: &str, count: u64) -> Result<()> {
        let (place, name) = (namespace.clone(), id.to_owned());
        let _pass = self.gate.enter().await?;
        // first: a daemon that crashes in between starts a container again whose task is left
        self.store.note(move |db| restarts::begin(db, place.as_str(), &name)).await?;
        let (place, name) = (namespace.clone(), id.to_owned());
        let updated = self
            .store
            .write(move |db| {
                let container = containers::get(db, place.as_str(), &name)?;
                let mut container =
                    container.ok_or_else(|| Error::NotFound(Object::Container { id: name.clone(), namespace: Some(place.to_string()) }))?;
                container.labels.insert(policy::COUNT.to_owned(), count.to_string());
                container.updated_at = Some(timestamp::now());
                containers::put(db, place.as_str(), &name, &container)?;
                Ok(container)
            })
            .await?;
        let event = ContainerUpdate { id: updated.id, image: updated.image, labels: updated.labels, snapshot_key: updated.snapshot_key };
        self.events.publish(namespace, "/containers/update", &event);
        Ok(())
    }
}

fn has_terminal(spec: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Spec {
        process: Option<Process>,
    }
    #[derive(Deserialize)]
    struct Process {
        #[serde(default)]
        terminal: bool,
    }
    serde_json::from_slice::<Spec>(spec).ok().and_then(|spec| spec.process).is_some_and(|process| process.terminal)
}
