//! The events that a daemon publishes for one namespace, in the order of their arrival.

use std::fmt;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use containerd_client::events as wire;
use containerd_client::types::Envelope;
use prost::Message as _;
use prost_types::Any;

use crate::client::Client;
use crate::eventually::{SOON, eventually};

const PROBE: &str = "/x-tests/probe";

/// One event about a task.
#[derive(Clone)]
pub struct Event {
    /// When the test received it.
    pub at: Instant,
    /// The topic without `/tasks/`.
    pub topic: String,
    /// The container.
    pub container: String,
    /// The exec, empty for init.
    pub exec: String,
    /// The pid, 0 where the event has none.
    pub pid: u32,
    /// The exit status, 0 where the event has none.
    pub status: u32,
}

impl fmt::Debug for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}/{} pid {} status {}", self.topic, self.container, self.exec, self.pid, self.status)
    }
}

/// A growing list of events.
#[derive(Debug, Clone, Default)]
pub struct Events {
    list: Arc<Mutex<Vec<Event>>>,
    probes: Arc<Mutex<usize>>,
}

impl Events {
    /// Subscribes, and returns once the subscription is known to work.
    pub async fn subscribe(client: &Client) -> Result<Self> {
        let events = Self::default();
        events.resubscribe(client).await?;
        Ok(events)
    }

    /// Subscribes again after a restart of the daemon; new events are appended.
    pub async fn resubscribe(&self, client: &Client) -> Result<()> {
        let before = self.probes();
        tokio::spawn(self.clone().collect(client.clone()));
        // a daemon does not confirm a subscription, so the test publishes probes until one arrives
        eventually("the subscription works", SOON, async || {
            client.publish(PROBE, Any::default()).await?;
            ensure!(self.probes() > before, "no probe received");
            Ok(())
        })
        .await
    }

    /// Waits until every event that the daemon has received so far has arrived here.
    pub async fn catch_up(&self, client: &Client) -> Result<()> {
        let before = self.probes();
        client.publish(PROBE, Any::default()).await?;
        eventually("the daemon's last event", SOON, async || {
            ensure!(self.probes() > before, "no probe received");
            Ok(())
        })
        .await
    }

    async fn collect(self, client: Client) {
        let Ok(mut stream) = client.subscribe().await else { return };
        while let Ok(Some(envelope)) = stream.message().await {
            if envelope.topic == PROBE {
                *self.probes.lock().expect("no panic under this lock") += 1;
            } else if let Some(event) = decode(&envelope) {
                self.push(event);
            }
        }
    }

    fn probes(&self) -> usize {
        *self.probes.lock().expect("no panic under this lock")
    }

    pub(crate) fn push(&self, event: Event) {
        self.list.lock().expect("no panic under this lock").push(event);
    }

    /// Everything so far.
    pub fn all(&self) -> Vec<Event> {
        self.list.lock().expect("no panic under this lock").clone()
    }

    /// The events of one container, as `topic` or `topic(exec)`.
    pub fn of(&self, container: &str) -> Vec<String> {
        self.all()
            .into_iter()
            .filter(|event| event.container == container)
            .map(|event| if event.exec.is_empty() { event.topic } else { format!("{}({})", event.topic, event.exec) })
            .collect()
    }

    /// The published exits of init (`exec` empty) or of an exec.
    pub fn exits(&self, container: &str, exec: &str) -> Vec<Event> {
        let mut exits = self.all();
        exits.retain(|event| event.topic == "exit" && event.container == container && event.exec == exec);
        exits
    }

    /// Waits until `enough` accepts the list.
    pub async fn until(&self, what: &str, enough: impl Fn(&[Event]) -> bool) -> Result<Vec<Event>> {
        self.until_within(what, SOON, enough).await
    }

    /// Like [`Self::until`], with a deadline.
    pub async fn until_within(&self, what: &str, deadline: Duration, enough: impl Fn(&[Event]) -> bool) -> Result<Vec<Event>> {
        eventually(format!("events: {what}"), deadline, async || {
            let all = self.all();
            ensure!(enough(&all), "{all:#?}");
            Ok(all)
        })
        .await
    }

    /// Waits until the container's events end with `last`, and returns them all.
    pub async fn of_until(&self, container: &str, last: &str) -> Result<Vec<String>> {
        let ends = |events: &[String]| events.last().is_some_and(|event| event == last);
        self.until(&format!("{container} … {last}"), |_| ends(&self.of(container))).await?;
        Ok(self.of(container))
    }
}

/// Checks that the exits of `count` processes of a container were published, init's last. `published`: as [`Events::of`] names events.
pub fn init_is_the_last_of(count: usize, published: &[String]) -> Result<()> {
    let exits: Vec<_> = published.iter().filter(|event| event.starts_with("exit")).collect();
    ensure!(exits.len() == count && exits.last().is_some_and(|last| *last == "exit"), "{published:?}");
    Ok(())
}

/// Reads an event about a task.
pub(crate) fn decode(envelope: &Envelope) -> Option<Event> {
    let topic = envelope.topic.strip_prefix("/tasks/")?.to_owned();
    let bytes = envelope.event.as_ref().map_or(&[][..], |event| &event.value);
    let (container, exec, pid, status) = match topic.as_str() {
        "create" => {
            let event = wire::TaskCreate::decode(bytes).ok()?;
            (event.container_id, String::new(), event.pid, 0)
        }
        "start" => {
            let event = wire::TaskStart::decode(bytes).ok()?;
            (event.container_id, String::new(), event.pid, 0)
        }
        "exec-added" => {
            let event = wire::TaskExecAdded::decode(bytes).ok()?;
            (event.container_id, event.exec_id, 0, 0)
        }
        "exec-started" => {
            let event = wire::TaskExecStarted::decode(bytes).ok()?;
            (event.container_id, event.exec_id, event.pid, 0)
        }
        "exit" => {
            let event = wire::TaskExit::decode(bytes).ok()?;
            let exec = if event.id == event.container_id { String::new() } else { event.id };
            (event.container_id, exec, event.pid, event.exit_status)
        }
        "delete" => {
            let event = wire::TaskDelete::decode(bytes).ok()?;
            let exec = if event.id == event.container_id { String::new() } else { event.id };
            (event.container_id, exec, event.pid, event.exit_status)
        }
        // the others begin with the container's id and end there as far as tests care
        _ => (wire::TaskOom::decode(bytes).ok()?.container_id, String::new(), 0, 0),
    };
    Some(Event { at: Instant::now(), topic, container, exec, pid, status })
}
