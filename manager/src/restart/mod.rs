//! The restart monitor: keeps the tasks of labelled containers as their labels say.
//!
//! ```text
//! exit, changed labels ─▶ that container ┐
//! every interval ─▶ all containers ──────┼─▶ what shall be, what is (policy) ─▶ start, stop (act), at once or after a pause
//! the end of a pause ─▶ that container ──┘
//! ```
//! It behaves as containerd's, which only has the interval, and starts again without a pause. A container without a task is left alone for
//! one interval: its client may be about to make one.

mod act;
mod policy;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use containerd_client::events::{ContainerUpdate, TaskExit};
use containerd_client::services::v1::Container;
use containerd_client::types::Envelope;
use log::{error, warn};
use prost::Message as _;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_stream::StreamExt as _;

use crate::filter::Filter;
use crate::manager::Manager;
use crate::name::Namespace;
use crate::store::{containers, namespaces};
use policy::{Decision, Observed};

type Key = (Namespace, String);

/// Watches until this process retires.
pub(crate) async fn watch(manager: Arc<Manager>, interval: Duration) {
    let mut monitor =
        Monitor { manager: Arc::clone(&manager), interval, known: HashMap::new(), busy: HashSet::new(), acting: JoinSet::new() };
    tokio::select! {
        () = manager.gate.retired() => {}
        () = monitor.run() => {}
    }
    // what is under way has a pass and is carried to its end
    monitor.acting.detach_all();
}

struct Monitor {
    manager: Arc<Manager>,
    interval: Duration,
    known: HashMap<Key, History>,
    /// Those for which something is being done.
    busy: HashSet<Key>,
    acting: JoinSet<Key>,
}

/// What is remembered of a container.
#[derive(Debug, Default)]
struct History {
    /// When this monitor has last started it.
    started: Option<Instant>,
    /// How many of its last lives were short.
    short_lives: u32,
    /// It is to be started, then.
    due: Option<Instant>,
    /// Whether its labels were complained about.
    is_reported: bool,
}

impl Monitor {
    async fn run(&mut self) {
        let filter = Filter::parse(&["topic==/tasks/exit", "topic==/containers/update"]).unwrap_or_default();
        let mut events = self.manager.events.overhear(filter.clone());
        let mut next_round = Instant::now();
        loop {
            let wake = self.known.values().filter_map(|history| history.due).min().map_or(next_round, |first| first.min(next_round));
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(envelope)) => {
                        if let Some(key) = container_of(&envelope) {
                            self.look(&key).await;
                        }
                    }
                    // dropped for being slow: the next round sees what was missed
                    _ => events = self.manager.events.overhear(filter.clone()),
                },
                Some(ended) = self.acting.join_next() => {
                    match ended {
                        Ok(key) => {
                            self.busy.remove(&key);
                            self.look(&key).await;
                        }
                        Err(panic) => error!(error:% = panic; "a restart was not carried to its end"),
                    }
                }
                () = tokio::time::sleep_until(wake) => {
                    if wake == next_round {
                        next_round = Instant::now() + self.interval;
                        self.look_at_all().await;
                    } else {
                        let due: Vec<_> = self.known.iter().filter(|(_, history)| history.due == Some(wake)).map(|(key, _)| key.clone()).collect();
                        for key in due {
                            self.look(&key).await;
                        }
                    }
                }
            }
        }
    }

    async fn look_at_all(&mut self) {
        let labelled = self.manager.store.read(|db| {
            let mut all = Vec::new();
            for namespace in namespaces::list(db)? {
                let name = Namespace::parse(&namespace.name)?;
                all.extend(containers::list(db, name.as_str(), has_wish)?.into_iter().map(|container| (name.clone(), container)));
            }
            Ok(all)
        });
        match labelled.await {
            Ok(labelled) => {
                let keys: HashSet<Key> = labelled.iter().map(|(namespace, container)| (namespace.clone(), container.id.clone())).collect();
                self.known.retain(|key, _| keys.contains(key));
                for (namespace, container) in labelled {
                    self.consider((namespace, container.id.clone()), container).await;
                }
            }
            Err(error) => warn!(error = error.chain(); "the restart monitor cannot read containers"),
        }
    }

    async fn look(&mut self, key: &Key) {
        let (namespace, id) = key.clone();
        match self.manager.store.read(move |db| containers::get(db, namespace.as_str(), &id)).await {
            Ok(Some(container)) if has_wish(&container) => self.consider(key.clone(), container).await,
            Ok(_) => drop(self.known.remove(key)),
            Err(error) => {
                warn!(error = error.chain(); "the restart monitor cannot read a container");
                self.known.entry(key.clone()).or_default().due = Some(Instant::now() + self.interval);
            }
        }
    }

    /// Does what follows from a container's labels and its task.
    async fn consider(&mut self, key: Key, container: Container) {
        if self.busy.contains(&key) {
            return;
        }
        let history = self.known.entry(key.clone()).or_default();
        let wish = match policy::wish(&container.labels) {
            Ok(Some(wish)) => wish,
            Ok(None) => return,
            Err(sentence) => {
                if !std::mem::replace(&mut history.is_reported, true) {
                    error!(namespace:% = key.0, container = key.1.as_str(), error = sentence; "the restart monitor does not know what to do");
                }
                return;
            }
        };
        let observed = act::observe(&self.manager, &key.0, &key.1).await;
        let decision = policy::decide(wish, observed, &container.labels);
        let is_time = match decision {
            Decision::Start => history.may_start(observed, self.interval),
            Decision::Stop | Decision::Leave => {
                history.due = None;
                decision == Decision::Stop
            }
        };
        if !is_time {
            return;
        }
        let manager = Arc::clone(&self.manager);
        self.busy.insert(key.clone());
        self.acting.spawn(async move {
            let done = act::act(&manager, &key.0, container, decision).await;
            if let Err(error) = done {
                warn!(namespace:% = key.0, container = key.1.as_str(), error = error.chain(); "the restart monitor has no success");
            }
            key
        });
    }
}

impl History {
    /// Whether it is time; if not, notes when it will be.
    fn may_start(&mut self, observed: Observed, grace: Duration) -> bool {
        let now = Instant::now();
        let due = *self.due.get_or_insert_with(|| match self.started {
            None if observed == Observed::Nothing => now + grace,
            None => now + policy::pause(0),
            Some(started) => {
                let was_short = now.duration_since(started) < LASTING;
                self.short_lives = if was_short { self.short_lives.saturating_add(1) } else { 0 };
                now + policy::pause(self.short_lives)
            }
        });
        if now < due {
            return false;
        }
        self.due = None;
        self.started = Some(now);
        true
    }
}

fn has_wish(container: &Container) -> bool {
    !matches!(policy::wish(&container.labels), Ok(None))
}

/// Which container an event is about, if it may mean something here.
fn container_of(envelope: &Envelope) -> Option<Key> {
    let namespace = Namespace::parse(&envelope.namespace).ok()?;
    let bytes = &*envelope.event.as_ref()?.value;
    let id = if envelope.topic == "/tasks/exit" {
        let exit = TaskExit::decode(bytes).ok()?;
        (exit.id == exit.container_id).then_some(exit.container_id)?
    } else {
        ContainerUpdate::decode(bytes).ok()?.id
    };
    Some((namespace, id))
}

/// A task that has run for so long is started again after the shortest pause.
const LASTING: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn starts_are_spread_out_while_lives_are_short() {
        let mut history = History::default();
        let mut pauses = Vec::new();
        for life in [0, 1, 1, 1, 11] {
            tokio::time::advance(Duration::from_secs(life)).await;
            let ended = Instant::now();
            while !history.may_start(Observed::Exited(1), Duration::from_secs(10)) {
                tokio::time::advance(Duration::from_millis(500)).await;
            }
            pauses.push(ended.elapsed().as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 1]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_container_without_a_task_is_left_to_its_client_for_an_interval() {
        let mut history = History::default();
        assert!(!history.may_start(Observed::Nothing, Duration::from_secs(10)));
        tokio::time::advance(Duration::from_secs(9)).await;
        assert!(!history.may_start(Observed::Nothing, Duration::from_secs(10)));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(history.may_start(Observed::Nothing, Duration::from_secs(10)));
    }
}
