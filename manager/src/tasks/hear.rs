//! What shims tell.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use containerd_client::events::TaskExit;
use containerd_client::types::Envelope;
use log::warn;
use prost::Message as _;
use tokio::sync::Mutex;

use super::Tasks;
use crate::error::{Error, Result};
use crate::name::Namespace;
use crate::store::{Exit, exits};
use crate::timestamp;

impl Tasks {
    /// Passes an event on. An exit is passed on once, however often it is told.
    ///
    /// Errors: it is for the shim to tell it again.
    pub(crate) async fn hear(&self, envelope: Envelope) -> Result<()> {
        let is_exit = envelope.event.as_ref().is_some_and(|event| event.type_url.ends_with(EXIT));
        if !is_exit {
            self.still_serves()?;
            self.events.forward(envelope);
            return Ok(());
        }
        let exit = TaskExit::decode(envelope.event.as_ref().map(|event| &*event.value).unwrap_or_default())
            .map_err(|error| Error::Invalid(format!("event {EXIT}: {error}")))?;
        let namespace = Namespace::parse(&envelope.namespace)?;
        self.once(&namespace, &exit, || self.events.forward(envelope)).await
    }

    /// Tells an exit unless it was told before, then records that.
    pub(super) async fn once(&self, namespace: &Namespace, event: &TaskExit, tell: impl FnOnce()) -> Result<()> {
        let exec = if event.id == event.container_id { String::new() } else { event.id.clone() };
        let at = event.exited_at.as_ref().map_or(0, timestamp::to_nanos);
        let exit = Exit { pid: event.pid, status: event.exit_status, at };
        let (place, id) = (namespace.clone(), event.container_id.clone());
        let (again, name) = (place.clone(), (id.clone(), exec.clone()));
        let container = id.clone();
        // a shim that had no answer tells it again while it is being told
        let _one_at_a_time = self.telling.of(namespace, &event.container_id).lock().await;
        if self.store.read(move |db| exits::is_told(db, place.as_str(), &id, &exec, exit)).await? {
            return Ok(());
        }
        self.still_serves()?;
        tell();
        let is_late = self.find(namespace, &container).is_err();
        let collected = is_late.then(|| timestamp::to_nanos(&timestamp::now()));
        let recorded = self.store.note(move |db| exits::add(db, again.as_str(), &name.0, &name.1, exit, collected)).await;
        if let Err(error) = recorded {
            // a full disk: told as it is, it shall not be told with every new attempt of its shim
            warn!(namespace:%, container, error = error.chain(); "cannot record that an exit was told");
        }
        Ok(())
    }

    /// Nobody listens to a process any more that another has taken over from.
    fn still_serves(&self) -> Result<()> {
        if self.gate.is_retired() { Err(Error::Unavailable("this x-manager has ended; tell the next one".to_owned())) } else { Ok(()) }
    }
}

/// Locks for exits that are being told: those of one task have one.
#[derive(Debug)]
pub(super) struct Telling([Mutex<()>; LOCKS]);

impl Telling {
    pub(super) const fn new() -> Self {
        Self([const { Mutex::const_new(()) }; LOCKS])
    }

    fn of(&self, namespace: &Namespace, id: &str) -> &Mutex<()> {
        let mut hasher = DefaultHasher::new();
        (namespace.as_str(), id).hash(&mut hasher);
        &self.0[usize::try_from(hasher.finish() % LOCKS as u64).unwrap_or_default()]
    }
}

/// So many tasks may have exits told at one time, at best.
const LOCKS: usize = 64;

const EXIT: &str = "containerd.events.TaskExit";
