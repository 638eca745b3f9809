//! The restart monitor: keeps the tasks of labelled containers in the state that the labels ask for.
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

use crate::name::Namespace;
use crate::store::{containers, namespaces, restarts};
pub(crate) use act::Restarter;
use policy::{Decision, Observed, Wish};

type Key = (Namespace, String);

/// Watches until this process retires.
pub(crate) async fn watch(restarter: Arc<Restarter>, interval: Duration) {
    let unfinished = restarter.store.recall(restarts::list).await.unwrap_or_else(|error| {
        warn!(error = error.chain(); "cannot read which restarts the previous process had begun");
        Vec::new()
    });
    let unfinished = unfinished.into_iter().filter_map(|(namespace, id)| Some((Namespace::parse(&namespace).ok()?, id))).collect();
    let gate = restarter.gate.clone();
    let mut monitor = Monitor { restarter, interval, known: HashMap::new(), unfinished, busy: HashMap::new(), acting: JoinSet::new() };
    tokio::select! {
        () = gate.retired() => {}
        () = monitor.run() => {}
    }
    // actions in progress run to completion
    monitor.acting.detach_all();
}

struct Monitor {
    restarter: Arc<Restarter>,
    interval: Duration,
    known: HashMap<Key, History>,
    /// Containers that the previous process was about to start when it crashed.
    unfinished: HashSet<Key>,
    /// Containers being queried, started or stopped; true for those to be checked again afterwards.
    busy: HashMap<Key, bool>,
    acting: JoinSet<(Key, Step)>,
}

/// The result of a step, which runs concurrently: a shim that does not answer delays no other container.
enum Step {
    /// Its shim was asked.
    Observed(Box<Container>, Observed),
    /// It was started or stopped, if it could be.
    Acted(bool),
}

/// What is remembered of a container.
#[derive(Debug, Default)]
struct History {
    /// When this monitor has last started it.
    started: Option<Instant>,
    /// How many of its last runs were short.
    short_runs: u32,
    /// When it is to be started.
    due: Option<Instant>,
    /// Whether invalid labels were logged.
    is_reported: bool,
}

impl Monitor {
    async fn run(&mut self) {
        let mut events = self.restarter.events.overhear();
        let mut next_round = Instant::now();
        loop {
            // busy containers wait until they are no longer busy
            let due = self.known.iter().filter(|(key, _)| !self.busy.contains_key(key)).filter_map(|(_, history)| history.due);
            let wake = due.min().map_or(next_round, |first| first.min(next_round));
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(envelope)) => {
                        if let Some(key) = container_of(&envelope) {
                            self.look(&key).await;
                        }
                    }
                    // dropped for being slow: the next round sees what was missed
                    _ => events = self.restarter.events.overhear(),
                },
                Some(ended) = self.acting.join_next() => {
                    match ended {
                        Ok((key, step)) => self.proceed(key, step).await,
                        Err(panic) => error!(error:% = panic; "a restart panicked"),
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
        let labelled = self.restarter.store.read(|db| {
            let mut all = Vec::new();
            for namespace in namespaces::list(db)? {
                let name = Namespace::parse(&namespace.name)?;
                let labelled = containers::labelled(db, name.as_str(), policy::STATUS)?;
                all.extend(labelled.into_iter().filter(has_wish).map(|container| (name.clone(), container)));
            }
            Ok(all)
        });
        match labelled.await {
            Ok(labelled) => {
                let keys: HashSet<Key> = labelled.iter().map(|(namespace, container)| (namespace.clone(), container.id.clone())).collect();
                self.known.retain(|key, _| keys.contains(key));
                for (namespace, container) in labelled {
                    self.consider((namespace, container.id.clone()), container);
                }
            }
            Err(error) => warn!(error = error.chain(); "cannot read containers to restart"),
        }
    }

    async fn look(&mut self, key: &Key) {
        let (namespace, id) = key.clone();
        match self.restarter.store.read(move |db| containers::get(db, namespace.as_str(), &id)).await {
            Ok(Some(container)) if has_wish(&container) => self.consider(key.clone(), container),
            Ok(_) => drop(self.known.remove(key)),
            Err(error) => {
                warn!(error = error.chain(); "cannot read a container to restart");
                self.known.entry(key.clone()).or_default().due = Some(Instant::now() + self.interval);
            }
        }
    }

    /// Queries the state of a container's task, if its labels ask for a state.
    fn consider(&mut self, key: Key, container: Container) {
        if let Some(look_again) = self.busy.get_mut(&key) {
            *look_again = true;
            return;
        }
        let history = self.known.entry(key.clone()).or_default();
        match policy::wish(&container.labels) {
            Ok(Some(_)) => {}
            Ok(None) => return,
            Err(sentence) => {
                if !std::mem::replace(&mut history.is_reported, true) {
                    error!(namespace:% = key.0, container = key.1.as_str(), error = sentence; "cannot apply restart labels");
                }
                return;
            }
        }
        let (restarter, watched) = (Arc::clone(&self.restarter), key.clone());
        self.busy.insert(key, false);
        self.acting.spawn(async move {
            let observed = restarter.observe(&watched.0, &watched.1).await;
            (watched, Step::Observed(Box::new(container), observed))
        });
    }

    /// Continues with the result of a step.
    async fn proceed(&mut self, key: Key, step: Step) {
        let look_again = self.busy.remove(&key).unwrap_or(false);
        match step {
            _ if look_again => self.look(&key).await,
            Step::Observed(container, observed) => self.decide(key, *container, observed).await,
            Step::Acted(true) => self.look(&key).await,
            Step::Acted(false) => {
                let history = self.known.entry(key).or_default();
                history.due.get_or_insert(Instant::now() + self.interval);
            }
        }
    }

    async fn decide(&mut self, key: Key, container: Container, observed: Observed) {
        let Ok(Some(wish)) = policy::wish(&container.labels) else { return };
        let is_half_made = observed != Observed::Undecided && self.unfinished.remove(&key);
        let decision = match (wish, observed) {
            (Wish::Running(_), Observed::Created | Observed::Nothing) if is_half_made => Decision::Start,
            _ => policy::decide(wish, observed, &container.labels),
        };
        if is_half_made && decision != Decision::Start {
            self.restarter.is_settled(&key.0, &key.1).await;
        }
        let history = self.known.entry(key.clone()).or_default();
        let is_time = match decision {
            Decision::Start if is_half_made => true,
            Decision::Start => history.may_start(observed, self.interval),
            Decision::Stop | Decision::Leave => {
                history.due = None;
                decision == Decision::Stop
            }
        };
        if !is_time {
            return;
        }
        let restarter = Arc::clone(&self.restarter);
        self.busy.insert(key.clone(), false);
        self.acting.spawn(async move {
            let done = restarter.act(&key.0, container, decision, is_half_made).await;
            if let Err(error) = &done {
                let sentence = if decision == Decision::Stop { "cannot stop container" } else { "cannot restart container" };
                warn!(namespace:% = key.0, container = key.1.as_str(), error = error.chain(); "{sentence}");
            }
            (key, Step::Acted(done.is_ok()))
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
                self.short_runs = if was_short { self.short_runs.saturating_add(1) } else { 0 };
                now + policy::pause(self.short_runs)
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
    let id = match envelope.topic.as_str() {
        "/tasks/exit" => {
            let exit = TaskExit::decode(bytes).ok()?;
            (exit.id == exit.container_id).then_some(exit.container_id)?
        }
        "/containers/update" => ContainerUpdate::decode(bytes).ok()?.id,
        _ => return None,
    };
    Some((namespace, id))
}

/// A task that ran this long is restarted after the shortest pause.
const LASTING: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn restarts_are_delayed_while_runs_are_short() {
        let mut history = History::default();
        let mut pauses = Vec::new();
        for run in [0, 1, 1, 1, 11] {
            tokio::time::advance(Duration::from_secs(run)).await;
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
