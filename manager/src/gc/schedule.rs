//! When garbage is collected: containerd's rules.
//!
//! ```text
//! start ─startup_delay─▶ first ─▶ idle ─a removal, or mutation_threshold changes─▶ when the pause since the last is long enough ─▶ collection
//!                                  ├─deletion_threshold removals, a client waits──▶ after schedule_delay ───────────────────────────▶
//!                                  ├─a minute after something could not be removed, then two, four …─────────────────────────────────▶
//!                                  └─an hour: ingests expire──────────────────────────────────────────────────────────────────────▶
//! ```
//! The pause is so long that collections take no more than `pause_threshold` of the time.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use log::warn;
use tokio::time::Instant;

use super::Collector;
use crate::content::Scan;
use crate::error::Error;
use crate::settings::Collection;
use crate::store::Changes;

/// Collects until this process retires.
pub(crate) async fn run(collector: Arc<Collector>) {
    let mut changes = collector.store.changes();
    let mut plan = Plan::new(collector.settings, *changes.borrow_and_update());
    let mut scan = Scan::All;
    loop {
        let is_waited_for = !collector.waiting.lock().unwrap_or_else(PoisonError::into_inner).is_empty();
        let due = plan.due(*changes.borrow_and_update(), is_waited_for);
        tokio::select! {
            () = collector.gate.retired() => return,
            // the store is part of the collector
            _changed = changes.changed() => continue,
            () = collector.wake.notified() => continue,
            () = tokio::time::sleep_until(due) => {}
        }
        if plan.tries_again() {
            scan = Scan::All;
        }
        let waiting = std::mem::take(&mut *collector.waiting.lock().unwrap_or_else(PoisonError::into_inner));
        let before = *changes.borrow_and_update();
        let collected = collector.collect_now(scan).await;
        match &collected {
            Ok(_) => scan = Scan::Known,
            Err(Error::Retired) => return,
            Err(error) => {
                collector.totals_mut().failed += 1;
                warn!(error = error.chain(); "garbage collection failed");
            }
        }
        plan.ended(before, collected.as_ref().ok().copied());
        plan.left(collector.take_left());
        let reason = collected.as_ref().err().map(Error::chain);
        for done in waiting {
            // it may wait no longer
            let _ = done.send(reason.clone().map_or(Ok(()), |reason| Err(Error::Collection(reason))));
        }
    }
}

/// What the next collection depends on.
#[derive(Debug)]
struct Plan {
    settings: Collection,
    /// Changes that the last collection has seen.
    seen: Changes,
    /// Not before the first.
    last: Option<Instant>,
    started: Instant,
    pause: Duration,
    took: Duration,
    count: u32,
    /// When the first caller began to wait, or enough was removed.
    asked: Option<Instant>,
    /// When to look for what could not be removed, and how long that was waited for.
    again: Option<(Instant, Duration)>,
}

impl Plan {
    fn new(settings: Collection, seen: Changes) -> Self {
        let started = Instant::now();
        Self {
            settings,
            seen,
            last: None,
            started,
            pause: Duration::from_secs(1),
            took: Duration::ZERO,
            count: 0,
            asked: None,
            again: None,
        }
    }

    /// When to collect, as things are now.
    fn due(&mut self, now: Changes, is_waited_for: bool) -> Instant {
        let (removals, changes) = (now.removals - self.seen.removals, now.all - self.seen.all);
        let is_enough = self.settings.deletion_threshold > 0 && removals >= self.settings.deletion_threshold;
        if is_waited_for || is_enough {
            self.asked.get_or_insert_with(Instant::now);
        }
        let is_needed = removals > 0 || self.settings.mutation_threshold > 0 && changes >= self.settings.mutation_threshold;
        let scheduled = match self.last {
            None => self.started + self.settings.startup_delay,
            Some(last) if is_needed => last + self.pause,
            Some(last) => last + IDLE,
        };
        let scheduled = self.again.map_or(scheduled, |(again, _)| scheduled.min(again));
        self.asked.map_or(scheduled, |asked| scheduled.min(asked + self.settings.schedule_delay))
    }

    /// Whether it is time to look for what could not be removed.
    fn tries_again(&self) -> bool {
        self.again.is_some_and(|(again, _)| again <= Instant::now())
    }

    /// Notes whether something could not be removed: it is looked for again after a while, which is longer each time.
    fn left(&mut self, something: bool) {
        match self.again {
            Some((again, _)) if again > Instant::now() => {}
            before if something => {
                let pause = before.map_or(AGAIN, |(_, pause)| (2 * pause).min(IDLE));
                self.again = Some((Instant::now() + pause, pause));
            }
            _ => self.again = None,
        }
    }

    fn ended(&mut self, seen: Changes, took: Option<Duration>) {
        let now = Instant::now();
        match took {
            Some(took) => {
                self.seen = seen;
                self.took += took;
                self.count += 1;
                if self.settings.pause_threshold > 0.0 {
                    let average = self.took / self.count;
                    self.pause = average.div_f64(self.settings.pause_threshold).saturating_sub(average);
                }
            }
            // what failed is tried again, a little later each time
            None => self.pause = (self.pause + Duration::from_secs(1)).min(IDLE),
        }
        (self.last, self.asked) = (Some(now), None);
    }
}

/// Until it is tried for the second time to remove something.
const AGAIN: Duration = Duration::from_secs(60);
/// Without changes: ingests that were left expire.
const IDLE: Duration = Duration::from_secs(60 * 60);

#[cfg(test)]
mod tests {
    use super::*;

    fn changes(all: u64, removals: u64) -> Changes {
        Changes { all, removals }
    }

    #[tokio::test(start_paused = true)]
    async fn collections_are_scheduled_as_containerd_does() {
        let settings = Collection { deletion_threshold: 5, schedule_delay: Duration::from_millis(7), ..Collection::default() };
        let mut plan = Plan::new(settings, changes(3, 2));
        let begin = Instant::now();
        assert_eq!(plan.due(changes(3, 2), false), begin + Duration::from_millis(100), "the first");
        plan.ended(changes(3, 2), Some(Duration::from_millis(2)));
        assert_eq!(plan.due(changes(4, 2), false), begin + IDLE, "one change is not enough");
        let pause = Duration::from_millis(98);
        assert_eq!(plan.due(changes(103, 2), false), begin + pause, "2 % of the time at most");
        assert_eq!(plan.due(changes(5, 3), false), begin + pause, "one removal is");
        assert_eq!(plan.due(changes(9, 7), false), begin + settings.schedule_delay);
        plan.ended(changes(9, 7), Some(Duration::from_millis(4)));
        assert_eq!(plan.due(changes(9, 7), false), begin + IDLE);
        assert_eq!(plan.due(changes(9, 7), true), begin + settings.schedule_delay);
        plan.ended(changes(9, 7), None);
        assert_eq!(plan.due(changes(10, 8), false), begin + Duration::from_millis(147) + Duration::from_secs(1));
        let mut plain = Plan::new(Collection { mutation_threshold: 0, ..settings }, changes(0, 0));
        plain.ended(changes(0, 0), Some(Duration::from_millis(2)));
        assert_eq!(plain.due(changes(1000, 0), false), begin + IDLE);
        plan.left(true);
        assert!(!plan.tries_again());
        tokio::time::advance(AGAIN).await;
        assert!(plan.tries_again() && plan.due(changes(9, 7), false) <= Instant::now(), "what could not be removed is tried again");
        plan.left(true);
        tokio::time::advance(AGAIN).await;
        assert!(!plan.tries_again(), "twice as long");
        tokio::time::advance(AGAIN).await;
        assert!(plan.tries_again());
        plan.left(false);
        assert!(!plan.tries_again() && plan.due(changes(9, 7), false) == begin + IDLE, "all is removed");
    }
}
