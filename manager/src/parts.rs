//! The daemon's parts, and which of them each service gets.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::api::{
    Calls, Containers, DiffService, Events, Filters, Health, Introspection, Leases, Namespaces, SandboxController, Sandboxes, Services, SnapshotService, TaskService,
    Version,
};
use crate::diff::{Blobs, Differ};
use crate::error::Result;
use crate::events::Exchange;
use crate::gate::Gate;
use crate::host::kernel_id;
use crate::metrics::Sources;
use crate::pools::Pools;
use crate::restart::Restarter;
use crate::settings::Settings;
use crate::snapshots::Snapshots;
use crate::store::{self, Store};
use crate::tasks::Tasks;

/// The parts. Only the daemon has all of them.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) store: Store,
    pub(crate) events: Arc<Exchange>,
    pub(crate) tasks: Arc<Tasks>,
    /// Entered for every change.
    pub(crate) gate: Gate,
    /// Counters of calls.
    pub(crate) calls: Arc<Calls>,
    pub(crate) restarter: Arc<Restarter>,
    pub(crate) snapshots: Snapshots,
    differ: Differ,
    pools: Pools,
    uuid: String,
}

impl Parts {
    /// Opens the store.
    pub(crate) async fn open(settings: &Settings) -> Result<Self> {
        let store = Store::open(&settings.store_files())?;
        let (new, boot) = (kernel_id("uuid")?, kernel_id("boot_id")?);
        store.note(move |db| store::new_boot(db, &boot)).await?;
        let uuid = store.write(move |db| store::uuid(db, &new)).await?;
        let (gate, pools) = (Gate::default(), Pools::default());
        let events = Arc::new(Exchange::new(settings.limits, pools.event_filters.clone()));
        let tasks = Arc::new(Tasks::new(settings, store.clone(), Arc::clone(&events), gate.clone(), pools.bundles.clone()));
        let restarter = Arc::new(Restarter {
            store: store.clone(),
            events: Arc::clone(&events),
            tasks: Arc::clone(&tasks),
            gate: gate.clone(),
            started: AtomicU64::new(0),
        });
        let snapshots =
            Snapshots::open(&settings.root, store.clone(), gate.clone(), pools.snapshots.clone(), pools.removal.clone())?;
        let differ = Differ {
            snapshots: snapshots.clone(),
            pool: pools.layers.clone(),
            limits: settings.limits.layers,
            state: settings.state.clone(),
        };
        Ok(Self { store, events, tasks, gate, snapshots, differ, calls: Arc::default(), restarter, pools, uuid })
    }

    /// The services of the API.
    pub(crate) fn services(&self) -> Services {
        let filters = Filters::new(self.pools.list_filters.clone());
        let (store, gate) = (|| self.store.clone(), || self.gate.clone());
        let (events, tasks) = (|| Arc::clone(&self.events), || Arc::clone(&self.tasks));
        Services {
            containers: Arc::new(Containers { store: store(), events: events(), tasks: tasks(), gate: gate(), filters: filters.clone() }),
            tasks: Arc::new(TaskService { tasks: tasks(), store: store(), gate: gate(), filters: filters.clone() }),
            sandboxes: Arc::new(Sandboxes { store: store(), filters: filters.clone() }),
            sandbox_controller: Arc::new(SandboxController { tasks: tasks(), store: store(), events: events() }),
            events: Arc::new(Events { events: events(), tasks: tasks() }),
            namespaces: Arc::new(Namespaces { store: store(), events: events() }),
            leases: Arc::new(Leases { store: store(), filters: filters.clone() }),
            snapshots: Arc::new(SnapshotService {
                snapshots: self.snapshots.clone(),
                store: store(),
                events: events(),
                filters: filters.clone(),
            }),
            diff: Arc::new(DiffService { differ: self.differ.clone(), blobs: self.blobs() }),
            introspection: Arc::new(Introspection { uuid: self.uuid.clone(), tasks: tasks(), filters }),
            version: Arc::new(Version),
            health: Arc::new(Health { gate: gate() }),
            gate: gate(),
            calls: Arc::clone(&self.calls),
        }
    }

    fn blobs(&self) -> Arc<dyn Blobs> {
        Arc::new(crate::diff::NoBlobs)
    }

    /// What metrics show.
    pub(crate) fn sources(&self) -> Sources {
        Sources {
            store: self.store.clone(),
            events: Arc::clone(&self.events),
            tasks: Arc::clone(&self.tasks),
            calls: Arc::clone(&self.calls),
            restarter: Arc::clone(&self.restarter),
            pools: self.pools.clone(),
            gate: self.gate.clone(),
        }
    }
}
