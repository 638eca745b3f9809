//! What all services share.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use tokio::sync::Semaphore;

use crate::api::Calls;
use crate::error::{IoContext as _, Result};
use crate::events::Exchange;
use crate::gate::Gate;
use crate::settings::Settings;
use crate::store::{self, Store};
use crate::tasks::Tasks;

/// The daemon's parts.
#[derive(Debug)]
pub(crate) struct Manager {
    pub(crate) store: Store,
    pub(crate) events: Arc<Exchange>,
    pub(crate) tasks: Arc<Tasks>,
    /// Entered for every change.
    pub(crate) gate: Gate,
    /// Bounds the lists that evaluate filters at the same time.
    pub(crate) filtering: Semaphore,
    /// Counters of calls.
    pub(crate) calls: Calls,
    /// How many containers the restart monitor has started.
    pub(crate) restarts: AtomicU64,
    /// The answer to `Introspection.Server`; it stays the same as long as the store exists.
    pub(crate) uuid: String,
}

impl Manager {
    /// Opens the store.
    pub(crate) async fn open(settings: &Settings) -> Result<Self> {
        let store = Store::open(&settings.store_files())?;
        let (new, boot) = (kernel_id("uuid")?, kernel_id("boot_id")?);
        store.note(move |db| store::new_boot(db, &boot)).await?;
        let uuid = store.write(move |db| store::uuid(db, &new)).await?;
        let gate = Gate::default();
        let events = Arc::new(Exchange::new(settings.limits));
        let tasks = Arc::new(Tasks::new(settings, store.clone(), Arc::clone(&events), gate.clone()));
        Ok(Self {
            store,
            events,
            tasks,
            gate,
            filtering: Semaphore::new(FILTERING),
            calls: Calls::default(),
            restarts: AtomicU64::new(0),
            uuid,
        })
    }
}

/// One of the identifiers that the kernel gives.
pub(crate) fn kernel_id(name: &str) -> Result<String> {
    let path = Path::new("/proc/sys/kernel/random").join(name);
    Ok(std::fs::read_to_string(&path).on("read", &path)?.trim().to_owned())
}

/// Lists that evaluate filters at the same moment.
const FILTERING: usize = 2;
