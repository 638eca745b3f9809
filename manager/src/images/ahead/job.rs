//! An image that is unpacked ahead.
//!
//! ```text
//! each layer:  Coming ─▶ Done ─▶ Taken: recorded, or given to a client's snapshot
//!                 └─▶ Failed: the client does it, and learns why
//! ```

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use log::debug;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};

use super::lock;
use crate::content::Digest;
use crate::error::{Error, Result};
use crate::images::plan::{Layer, Plan};
use crate::images::unpack::Unpacker;
use crate::images::unpack::layer::{Job as LayerJob, Slots};
use crate::images::unpack::record::{Recorded, label_layer};
use crate::name::Namespace;
use crate::snapshots::Snapshotter;
use crate::store::Meta;
use crate::store::snapshots::Place;

/// It ends when it is dropped.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) place: Place,
    namespace: Namespace,
    plan: Plan,
    shared: Arc<Shared>,
    task: AbortHandle,
    /// One call at a time records.
    recording: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct Shared {
    layers: Mutex<Vec<State>>,
    changes: watch::Sender<u64>,
}

/// Of a layer.
#[derive(Debug)]
enum State {
    Coming,
    Done(Box<Recorded>),
    Taken,
    Failed,
}

impl Shared {
    fn set(&self, number: usize, state: State) {
        if let Some(place) = lock(&self.layers).get_mut(number) {
            *place = state;
        }
        self.changes.send_modify(|changes| *changes += 1);
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Job {
    /// Begins to unpack the layers whose snapshots are not there; none if all are.
    pub(super) async fn begin(unpacker: &Unpacker, namespace: Namespace, place: Place, plan: Plan) -> Result<Option<Self>> {
        let first = first_missing(unpacker, &place, &plan).await?;
        if first == plan.layers.len() {
            return Ok(None);
        }
        let states = (0..plan.layers.len()).map(|number| if number < first { State::Taken } else { State::Coming }).collect();
        let shared = Arc::new(Shared { layers: Mutex::new(states), changes: watch::Sender::default() });
        let slots = Arc::<Slots>::default();
        let mut tasks = JoinSet::new();
        for (number, layer) in plan.layers.iter().enumerate().skip(first) {
            let job = LayerJob {
                namespace: namespace.clone(),
                snapshotter: Snapshotter::Overlayfs,
                layer: layer.clone(),
                below: (number == 0).then(Vec::new),
                waits: true,
                slots: Arc::clone(&slots),
                on_bytes: Arc::new(|_bytes| {}),
            };
            let (unpacker, shared) = (unpacker.clone(), Arc::clone(&shared));
            tasks.spawn(async move {
                let state = match unpacker.layer(job.clone()).await {
                    Ok(outcome) => State::Done(Box::new(Recorded { job, outcome })),
                    Err(error) => {
                        debug!(layer:% = job.layer.blob, error = error.chain(); "cannot unpack a layer ahead");
                        State::Failed
                    }
                };
                shared.set(number, state);
            });
        }
        let task = tokio::spawn(async move { while tasks.join_next().await.is_some() {} }).abort_handle();
        Ok(Some(Self { place, namespace, plan, shared, task, recording: tokio::sync::Mutex::default() }))
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Which layer has that chain ID.
    pub(super) fn number_of(&self, chain: &Digest) -> Option<usize> {
        self.plan.layers.iter().position(|layer| layer.chain == *chain)
    }

    /// Waits until a chain is unpacked, and with it what is on its way of the layers above, and records them. Returns at once where bytes are
    /// missing that are not on their way.
    pub(super) async fn settle(self: &Arc<Self>, unpacker: &Unpacker, chain: &Digest, lease: Option<String>) -> Result<()> {
        let Some(number) = self.number_of(chain) else { return Ok(()) };
        let _one_at_a_time = self.recording.lock().await;
        let (mut changes, mut arrivals) = (self.shared.changes.subscribe(), unpacker.content.arrivals());
        loop {
            let first = first_missing(unpacker, &self.place, &self.plan).await?;
            if first > number {
                return Ok(());
            }
            let run = self.run(unpacker, first).await?;
            if run.waits {
                tokio::select! {
                    // the sender is this job's
                    changed = changes.changed() => changed.map_err(|_| Error::Retired)?,
                    () = arrivals.any() => {}
                }
                continue;
            }
            if run.end <= number {
                return Ok(());
            }
            // also if the client that asks leaves meanwhile: the drafts are taken
            let (this, unpacker) = (Arc::clone(self), unpacker.clone());
            let record = tokio::spawn(async move { this.record(&unpacker, first, run.end, lease).await });
            return record.await.map_err(|source| Error::Panicked { what: "an unpack", source })?;
        }
    }

    /// How far layers from `first` on are unpacked or on their way, one on the other.
    async fn run(&self, unpacker: &Unpacker, first: usize) -> Result<Run> {
        let (mut end, mut waits) = (first, false);
        for (number, layer) in self.plan.layers.iter().enumerate().skip(first) {
            let state = lock(&self.shared.layers).get(number).map(State::kind);
            match state {
                Some(Kind::Done) => {}
                Some(Kind::Coming) if self.is_here(unpacker, layer).await? => waits = true,
                _ => break,
            }
            end = number + 1;
        }
        Ok(Run { end, waits })
    }

    async fn is_here(&self, unpacker: &Unpacker, layer: &Layer) -> Result<bool> {
        let content = &unpacker.content;
        Ok(content.is_arriving(&self.namespace, &layer.blob) || content.has(&self.namespace, &layer.blob).await?)
    }

    async fn record(&self, unpacker: &Unpacker, first: usize, end: usize, lease: Option<String>) -> Result<()> {
        let layers: Vec<_> = (first..end).filter_map(|number| self.take(number)).collect();
        if layers.len() < end - first {
            // another call has taken one of them
            return Ok(());
        }
        let below = first.checked_sub(1).and_then(|number| self.plan.layers.get(number)).map(|layer| layer.chain.clone());
        let (namespace, labelled) = (self.namespace.clone(), self.plan.layers.get(first..end).unwrap_or_default().to_vec());
        let and = move |db: &mut Meta<'_>| labelled.iter().try_for_each(|layer| label_layer(db, &namespace, layer));
        unpacker.record(&self.place, below.as_ref(), layers, &HashMap::new(), lease, and).await
    }

    fn take(&self, number: usize) -> Option<Recorded> {
        let mut layers = lock(&self.shared.layers);
        let state = layers.get_mut(number)?;
        if !matches!(state, State::Done(_)) {
            return None;
        }
        let State::Done(recorded) = std::mem::replace(state, State::Taken) else { return None };
        drop(layers);
        Some(*recorded)
    }

    /// Waits for a layer with that blob, which is in the content store, and takes it; none if this job has none to give.
    pub(super) async fn take_blob(&self, blob: &Digest) -> Option<Recorded> {
        let mut changes = self.shared.changes.subscribe();
        loop {
            let mut waits = false;
            for (number, layer) in self.plan.layers.iter().enumerate() {
                if layer.blob != *blob {
                    continue;
                }
                if let Some(recorded) = self.take(number) {
                    return Some(recorded);
                }
                waits |= lock(&self.shared.layers).get(number).map(State::kind) == Some(Kind::Coming);
            }
            if !waits {
                return None;
            }
            changes.changed().await.ok()?;
        }
    }
}

/// Layers one on the other.
#[derive(Debug, Clone, Copy)]
struct Run {
    end: usize,
    /// Whether one of them is still on its way.
    waits: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Coming,
    Done,
    Over,
}

impl State {
    fn kind(&self) -> Kind {
        match self {
            Self::Coming => Kind::Coming,
            Self::Done(_) => Kind::Done,
            Self::Taken | Self::Failed => Kind::Over,
        }
    }
}

async fn first_missing(unpacker: &Unpacker, place: &Place, plan: &Plan) -> Result<usize> {
    let keys = plan.layers.iter().map(|layer| layer.chain.to_string()).collect();
    let found = unpacker.snapshots.committed(place, keys, None).await?;
    Ok(found.iter().rposition(|is_there| *is_there).map_or(0, |top| top + 1))
}
