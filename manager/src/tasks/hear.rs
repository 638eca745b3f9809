//! What shims tell.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use containerd_client::events::TaskExit;
use containerd_client::types::Envelope;
use log::warn;
use prost::Message as _;

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
            if self.gate.is_retired() {
                return Err(Error::Retired);
            }
            self.events.forward(envelope);
            return Ok(());
        }
        let exit = TaskExit::decode(envelope.event.as_ref().map(|event| &*event.value).unwrap_or_default())
            .map_err(|error| Error::Invalid(format!("event {EXIT}: {error}")))?;
        let namespace = Namespace::parse(&envelope.namespace)?;
        let _pass = self.gate.enter().await?;
        let events = Arc::clone(&self.events);
        self.once(&namespace, &exit, move || events.forward(envelope)).await
    }

    /// Tells an exit unless it was told before.
    ///
    /// It is recorded, then told, and nothing else comes in between: of two who tell one exit at the same moment the second is too late, and
    /// whatever a crash comes in between, nobody hears it twice. Who loses the connection then has to look at the task, as after any loss of it.
    pub(super) async fn once(&self, namespace: &Namespace, event: &TaskExit, tell: impl FnOnce() + Send + 'static) -> Result<()> {
        let exec = if event.id == event.container_id { String::new() } else { event.id.clone() };
        let at = event.exited_at.as_ref().map_or(0, timestamp::to_nanos);
        let exit = Exit { pid: event.pid, status: event.exit_status, at };
        let (place, id) = (namespace.clone(), event.container_id.clone());
        // of a task that is gone it is kept for a while only, and not taken for the end of a later task of the same id
        let is_late = self.find(namespace, &event.container_id).is_err();
        let collected = is_late.then(|| timestamp::to_nanos(&timestamp::now()));
        let is_new = Arc::new(AtomicBool::new(false));
        let (found_new, tells) = (Arc::clone(&is_new), Arc::clone(&is_new));
        let record = move |db: &_| {
            if exits::is_told(db, place.as_str(), &id, &exec, exit)? {
                return Ok(());
            }
            found_new.store(true, Ordering::Relaxed);
            exits::add(db, place.as_str(), &id, &exec, exit, collected)
        };
        let then = move || {
            if tells.load(Ordering::Relaxed) {
                tell();
            }
        };
        match self.store.note_and_then(record, then).await {
            Err(error) if is_new.load(Ordering::Relaxed) => {
                // a full disk: told as it is, it shall not be told with every new attempt of its shim
                warn!(namespace:%, container = event.container_id.as_str(), error = error.chain(); "cannot record that an exit was told");
                Ok(())
            }
            recorded => recorded,
        }
    }
}

const EXIT: &str = "containerd.events.TaskExit";
