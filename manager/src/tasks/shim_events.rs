//! Events that shims publish.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use containerd_client::events::TaskExit;
use containerd_client::types::Envelope;
use log::warn;
use prost::Message as _;

use super::{Key, Tasks};
use crate::error::{Error, Result};
use crate::name::Namespace;
use crate::store::{Exit, Notes, exits};
use crate::timestamp;

impl Tasks {
    /// Forwards an event to subscribers. An exit is forwarded once, however often the shim sends it.
    ///
    /// Errors: the shim has to send it again.
    pub(crate) async fn receive(&self, envelope: Envelope) -> Result<()> {
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
        let exec = if exit.id == exit.container_id { String::new() } else { exit.id };
        let at = exit.exited_at.as_ref().map_or(0, timestamp::to_nanos);
        let ended = Exit { pid: exit.pid, status: exit.exit_status, at };
        self.once((namespace, exit.container_id), exec, ended, move || events.forward(envelope)).await
    }

    /// Publishes the exit of a process unless it was published before; init's `exec` is empty.
    ///
    /// The exit is recorded and then published, with nothing in between: of two concurrent reports the second is dropped, and no subscriber
    /// receives the exit twice, even across a crash. A subscriber that loses its connection has to query the task, as after any such loss.
    pub(super) async fn once(
        &self,
        (namespace, container): Key,
        exec: String,
        exit: Exit,
        publish: impl FnOnce() + Send + 'static,
    ) -> Result<()> {
        let (place, id) = (namespace.clone(), container.clone());
        // the record for a deleted task expires, and is never taken for the exit of a later task with the same id
        let is_late = self.find_any(&namespace, &container).is_none();
        let collected = is_late.then(|| timestamp::to_nanos(&timestamp::now()));
        let is_new = Arc::new(AtomicBool::new(false));
        let (found_new, publishes) = (Arc::clone(&is_new), Arc::clone(&is_new));
        let record = move |db: &mut Notes<'_>| {
            if exits::is_published(db, place.as_str(), &id, &exec, exit)? {
                return Ok(());
            }
            found_new.store(true, Ordering::Relaxed);
            exits::add(db, place.as_str(), &id, &exec, exit, collected)
        };
        let then = move || {
            if publishes.load(Ordering::Relaxed) {
                publish();
            }
        };
        match self.store.note_and_then(record, then).await {
            Err(error) if is_new.load(Ordering::Relaxed) => {
                // disk full: the exit is published now, and acknowledged so that the shim does not send it again and again
                warn!(namespace:%, container = container.as_str(), error = error.chain(); "cannot record that an exit was published");
                Ok(())
            }
            recorded => recorded,
        }
    }
}

const EXIT: &str = "containerd.events.TaskExit";
