//! The daemon's parts, and which of them each service gets.

use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::api::{
    Calls, Containers, ContentService, DiffService, Events, Filters, Health, Images, Introspection, Leases, MountService, Namespaces,
    SandboxController, Sandboxes, Services, SnapshotService, Streams, TaskService, TransferService, Version,
};
use crate::content::Content;
use crate::diff::Differ;
use crate::error::Result;
use crate::events::Exchange;
use crate::gate::Gate;
use crate::gc::Collector;
use crate::host::kernel_id;
use crate::images::ahead::Ahead;
use crate::images::unpack::Unpacker;
use crate::images::{self, Transfers};
use crate::metrics::Sources;
use crate::mounts::Mounts;
use crate::pools::Pools;
use crate::restart::Restarter;
use crate::settings::Settings;
use crate::snapshots::Snapshots;
use crate::store::{self, Store};
use crate::successor::Successor;
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
    pub(crate) transfers: Arc<Transfers>,
    /// Unpacks them before clients ask for it.
    pub(crate) ahead: Ahead,
    mounts: Mounts,
    pub(crate) collector: Arc<Collector>,
    pub(crate) content: Arc<Content>,
    pools: Pools,
    settings: Arc<Settings>,
    uuid: String,
    /// The process that takes over.
    successor: Successor,
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
        let snapshots = Snapshots::open(&settings.root, store.clone(), gate.clone(), pools.snapshots.clone(), pools.removal.clone())?
            .with_pools(pools.usage.clone(), pools.copies.clone())
            .with_proxies(&settings.proxies);
        let restarter = Arc::new(Restarter {
            store: store.clone(),
            snapshots: snapshots.clone(),
            events: Arc::clone(&events),
            tasks: Arc::clone(&tasks),
            gate: gate.clone(),
            started: AtomicU64::new(0),
        });
        let content = Content::open(&settings.content(), settings.sharing, store.clone(), pools.content.clone(), gate.clone())?;
        let content = Arc::new(content.with_proxy(settings.content_proxy.as_ref()));
        let differ = Differ {
            snapshots: snapshots.clone(),
            content: Arc::clone(&content),
            pool: pools.layers.clone(),
            limits: settings.limits.layers,
            state: settings.state.clone(),
        };
        let unpacker = Unpacker::new(store.clone(), Arc::clone(&content), snapshots.clone(), gate.clone(), &pools, settings.limits.layers);
        let ahead = Ahead::new(unpacker.clone(), settings.unpacks_ahead);
        let mounts = Mounts::new(&settings.state, &settings.root, store.clone(), pools.mounts.clone(), gate.clone());
        let collector = Arc::new(Collector::new(
            store.clone(),
            Arc::clone(&content),
            Arc::new(snapshots.clone()),
            mounts.clone(),
            Arc::clone(&events),
            gate.clone(),
            settings.collection,
        ));
        let successor = Successor::new(&settings.address);
        let transfers = Arc::new(Transfers::new(images::Parts {
            successor: successor.clone(),
            content: Arc::clone(&content),
            store: store.clone(),
            events: Arc::clone(&events),
            gate: gate.clone(),
            collector: Arc::clone(&collector),
            unpacker,
            ahead: ahead.clone(),
            differ: differ.clone(),
            pool: pools.content.clone(),
            archives: pools.archives.clone(),
            settings: settings.transfer.clone(),
        }));
        Ok(Self {
            store,
            events,
            tasks,
            gate,
            calls: Arc::default(),
            restarter,
            collector,
            content,
            snapshots,
            differ,
            transfers,
            ahead,
            mounts,
            pools,
            settings: Arc::new(settings.clone()),
            uuid,
            successor,
        })
    }

    /// The services of the API.
    pub(crate) fn services(&self) -> Services {
        let filters = Filters::new(self.pools.list_filters.clone());
        let (store, gate) = (|| self.store.clone(), || self.gate.clone());
        let (events, tasks, collector) = (|| Arc::clone(&self.events), || Arc::clone(&self.tasks), || Arc::clone(&self.collector));
        let streams = Arc::new(Streams::new(gate(), self.successor.clone()));
        Services {
            transfer: Arc::new(TransferService {
                transfers: Arc::clone(&self.transfers),
                streams: Arc::clone(&streams),
                gate: gate(),
                successor: self.successor.clone(),
                config_path: self.settings.transfer.config_path.clone(),
            }),
            streams,
            containers: Arc::new(Containers { store: store(), events: events(), tasks: tasks(), gate: gate(), filters: filters.clone() }),
            tasks: Arc::new(TaskService { tasks: tasks(), store: store(), gate: gate(), filters: filters.clone() }),
            sandboxes: Arc::new(Sandboxes { store: store(), filters: filters.clone() }),
            sandbox_controller: Arc::new(SandboxController { tasks: tasks(), store: store(), events: events() }),
            events: Arc::new(Events { events: events(), tasks: tasks() }),
            namespaces: Arc::new(Namespaces { store: store(), events: events() }),
            snapshots: Arc::new(SnapshotService {
                snapshots: self.snapshots.clone(),
                store: store(),
                events: events(),
                filters: filters.clone(),
                ahead: self.ahead.clone(),
            }),
            diff: Arc::new(DiffService { differ: self.differ.clone(), ahead: self.ahead.clone() }),
            mounts: Arc::new(MountService { mounts: self.mounts.clone(), filters: filters.clone() }),
            leases: Arc::new(Leases { store: store(), filters: filters.clone(), gate: gate(), collector: collector() }),
            content: Arc::new(ContentService {
                content: Arc::clone(&self.content),
                store: store(),
                events: events(),
                filters: filters.clone(),
                gate: gate(),
                pool: self.pools.content.clone(),
                ahead: self.ahead.clone(),
                successor: self.successor.clone(),
            }),
            images: Arc::new(Images { store: store(), events: events(), filters: filters.clone(), gate: gate(), collector: collector() }),
            introspection: Arc::new(Introspection {
                uuid: self.uuid.clone(),
                tasks: tasks(),
                settings: Arc::clone(&self.settings),
                snapshots: self.snapshots.clone(),
                filters,
            }),
            version: Arc::new(Version),
            health: Arc::new(Health { gate: gate() }),
            gate: gate(),
            successor: self.successor.clone(),
            calls: Arc::clone(&self.calls),
        }
    }

    /// What metrics show.
    pub(crate) fn sources(&self) -> Sources {
        Sources {
            store: self.store.clone(),
            events: Arc::clone(&self.events),
            tasks: Arc::clone(&self.tasks),
            calls: Arc::clone(&self.calls),
            restarter: Arc::clone(&self.restarter),
            collector: Arc::clone(&self.collector),
            pools: self.pools.clone(),
            gate: self.gate.clone(),
        }
    }
}
