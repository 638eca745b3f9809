//! What all services share.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use crate::error::{IoContext as _, Result};
use crate::events::Exchange;
use crate::gate::Gate;
use crate::settings::Settings;
use crate::store::Store;
use crate::tasks::Tasks;

/// The daemon's parts.
#[derive(Debug)]
pub(crate) struct Manager {
    pub(crate) store: Store,
    pub(crate) events: Arc<Exchange>,
    pub(crate) tasks: Arc<Tasks>,
    /// Passed by whatever changes something.
    pub(crate) gate: Gate,
    /// What the restart monitor has started.
    pub(crate) restarts: AtomicU64,
    /// Told to whoever asks for the server: the same for as long as the store is.
    pub(crate) uuid: String,
}

impl Manager {
    /// Opens the store.
    pub(crate) fn open(settings: &Settings) -> Result<Self> {
        let store = Store::open(&settings.store())?;
        let uuid = uuid(settings)?;
        let gate = Gate::default();
        let events = Arc::new(Exchange::new(settings.limits));
        let tasks = Arc::new(Tasks::new(settings, store.clone(), Arc::clone(&events), gate.clone()));
        Ok(Self { store, events, tasks, gate, restarts: AtomicU64::new(0), uuid })
    }
}

fn uuid(settings: &Settings) -> Result<String> {
    let path = settings.root.join("uuid");
    if let Ok(uuid) = std::fs::read_to_string(&path)
        && uuid.trim().len() == 36
    {
        return Ok(uuid.trim().to_owned());
    }
    let kernel = Path::new("/proc/sys/kernel/random/uuid");
    let uuid = std::fs::read_to_string(kernel).on("read", kernel)?;
    std::fs::write(&path, uuid.trim()).on("write", &path)?;
    Ok(uuid.trim().to_owned())
}
