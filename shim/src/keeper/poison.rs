//! Finds poison: the request or exit that crashes every worker that handles it.
//!
//! Causes that were sent to a worker and still open when it died are suspected. Causes that were open in two crashes are isolated: sent
//! in small groups, at last alone. A cause whose group survives is cleared; one that crashes a worker alone is poisoned.
//!
//! ```text
//!  sent ──(worker dies)──▶ suspected ──(dies again)──▶ isolated ──(done, or the worker survives)──▶ cleared
//!                                                        │ ▲
//!                                           (dies again) │ │ half of the group
//!                                                        ▼ │
//!                                               alone? ──┴─┴──▶ poisoned: a request is answered, an exit withheld
//! ```
//!
//! **Invariant:** a request is sent before the exits that came after it, also when some are held back.
//! **Invariant:** during isolation, the cost of a check does not grow with the number of open causes: a flood may be isolated.
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::generation::{End, Fault};
use crate::handover::Cause;

/// Crashes with a cause open before it is isolated.
const CRASHES: u32 = 2;
/// How long isolated causes have to crash the worker; they are cleared after that, once the worker has responded.
const ISOLATION: Duration = Duration::from_secs(3);
/// A SIGKILL from outside is no proof: a cause isolated alone is poisoned after this many.
const KILLS_ALONE: u32 = 3;
/// How long a poisoned exit is withheld, doubled each time.
const WITHHOLD: Duration = Duration::from_secs(10);
const WITHHOLD_AT_MOST: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Suspect {
    crashes: u32,
    kills_alone: u32,
    /// How often it was found poisoned.
    poisoned: u32,
    /// Not sent to a worker before then.
    withheld_until: Option<Instant>,
}

#[derive(Debug)]
struct Isolation {
    causes: BTreeSet<Cause>,
    until: Instant,
}

/// The open causes.
pub(crate) struct Open<'a> {
    /// Not yet sent to the worker.
    pub(crate) unsent: &'a BTreeSet<Cause>,
    /// The exits among them; the others are requests.
    pub(crate) exits: &'a BTreeSet<Cause>,
    pub(crate) is_open: &'a dyn Fn(Cause) -> bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Poison {
    suspects: BTreeMap<Cause, Suspect>,
    isolation: Option<Isolation>,
    /// The size of the isolated group, halved by every crash.
    width: Option<usize>,
}

impl Poison {
    /// A worker exited to which the causes in `sent` had been sent. Returns the one found poisoned.
    pub(crate) fn ended(&mut self, sent: impl IntoIterator<Item = Cause>, end: &End, now: Instant) -> Option<Cause> {
        let isolation = self.isolation.take();
        if end.fault == Fault::Keeper {
            return None;
        }
        let sent: BTreeSet<Cause> = sent.into_iter().collect();
        self.suspects.retain(|cause, suspect| sent.contains(cause) || suspect.crashes >= CRASHES);
        let isolated: Vec<Cause> = isolation.iter().flat_map(|isolation| isolation.causes.intersection(&sent)).copied().collect();
        let alone = match isolated[..] {
            [] => {
                for cause in sent {
                    self.suspects.entry(cause).or_default().crashes += 1;
                }
                return None;
            }
            [alone] => alone,
            _ => {
                self.width = Some(isolated.len() / 2);
                return None;
            }
        };
        let suspect = self.suspects.entry(alone).or_default();
        suspect.kills_alone += 1;
        if end.fault == Fault::Outside && suspect.kills_alone < KILLS_ALONE {
            return None;
        }
        suspect.withheld_until = Some(now + (WITHHOLD * 2u32.saturating_pow(suspect.poisoned)).min(WITHHOLD_AT_MOST));
        suspect.poisoned += 1;
        suspect.kills_alone = 0;
        Some(alone)
    }

    /// Chooses what to send to the worker next. `is_lively`: it has responded since the last message to it.
    pub(crate) fn next(&mut self, open: &Open<'_>, is_lively: bool, now: Instant) -> Vec<Cause> {
        if self.suspects.is_empty() {
            return open.requests().chain(open.exits()).collect();
        }
        if let Some(isolation) = &mut self.isolation {
            while let Some(first) = isolation.causes.first().filter(|first| !(open.is_open)(**first)).copied() {
                isolation.causes.remove(&first);
                self.suspects.remove(&first);
            }
            if !isolation.causes.is_empty() && (now < isolation.until || !is_lively) {
                return Vec::new();
            }
            for cleared in self.isolation.take().into_iter().flat_map(|isolation| isolation.causes) {
                self.suspects.remove(&cleared);
            }
        }
        for unsent in [open.requests().collect::<Vec<_>>(), open.exits().collect()] {
            let held: Vec<Cause> = unsent.iter().filter(|cause| self.is_to_be_isolated(**cause, now)).copied().collect();
            if held.is_empty() {
                let free: Vec<Cause> = unsent.into_iter().filter(|cause| !self.is_withheld(*cause, now)).collect();
                if !free.is_empty() {
                    return free;
                }
                continue;
            }
            let count = self.width.unwrap_or(held.len().div_ceil(2)).clamp(1, held.len());
            let causes: BTreeSet<Cause> = held[..count].iter().copied().collect();
            self.isolation = Some(Isolation { causes: causes.clone(), until: now + ISOLATION });
            return causes.into_iter().collect();
        }
        self.width = None;
        self.suspects.retain(|cause, _| (open.is_open)(*cause));
        Vec::new()
    }

    fn is_to_be_isolated(&self, cause: Cause, now: Instant) -> bool {
        self.suspects.get(&cause).is_some_and(|suspect| suspect.crashes >= CRASHES) && !self.is_withheld(cause, now)
    }

    fn is_withheld(&self, cause: Cause, now: Instant) -> bool {
        self.suspects.get(&cause).and_then(|suspect| suspect.withheld_until).is_some_and(|until| until > now)
    }

    /// Whether a group is isolated.
    pub(crate) fn is_isolating(&self) -> bool {
        self.isolation.is_some()
    }

    /// Forgets all suspects: another build of the worker may handle them.
    pub(crate) fn reset(&mut self) {
        *self = Self::default();
    }

    /// The poisoned causes that are withheld at the moment.
    pub(crate) fn withheld(&self, now: Instant) -> impl Iterator<Item = Cause> {
        self.suspects.keys().copied().filter(move |cause| self.is_withheld(*cause, now))
    }

    /// When [`Poison::next`] may return something else although nothing happens.
    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        let until = match &self.isolation {
            Some(isolation) => Some(isolation.until),
            None => self.suspects.values().filter_map(|suspect| suspect.withheld_until).min(),
        };
        until.filter(|until| *until > now)
    }
}

impl Open<'_> {
    fn requests(&self) -> impl Iterator<Item = Cause> {
        self.unsent.difference(self.exits).copied()
    }

    fn exits(&self) -> impl Iterator<Item = Cause> {
        self.unsent.intersection(self.exits).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Causes, some of which crash the worker.
    struct World {
        poison: Poison,
        open: BTreeSet<Cause>,
        exits: BTreeSet<Cause>,
        unsent: BTreeSet<Cause>,
        now: Instant,
        crashes: u32,
    }

    impl World {
        fn new(requests: std::ops::Range<Cause>, exits: std::ops::Range<Cause>) -> Self {
            let open: BTreeSet<Cause> = requests.chain(exits.clone()).collect();
            Self { poison: Poison::default(), unsent: open.clone(), open, exits: exits.collect(), now: Instant::now(), crashes: 0 }
        }

        fn next(&mut self) -> Vec<Cause> {
            let open = self.open.clone();
            let sent = self.poison.next(
                &Open { unsent: &self.unsent, exits: &self.exits, is_open: &|cause| open.contains(&cause) },
                true,
                self.now,
            );
            self.unsent.retain(|cause| !sent.contains(cause));
            sent
        }

        fn crash(&mut self, fault: Fault) -> Option<Cause> {
            self.crashes += 1;
            let sent: Vec<Cause> = self.open.difference(&self.unsent).copied().collect();
            self.unsent = self.open.clone();
            self.poison.ended(sent, &End { fault, why: String::new() }, self.now)
        }

        /// Runs workers that crash over `deadly` and complete everything else except `slow`. Returns the causes found poisoned.
        fn run(&mut self, fault: Fault, deadly: &[Cause], slow: &[Cause]) -> Vec<Cause> {
            let mut poisoned = Vec::new();
            for _ in 0..1000 {
                let sent = self.next();
                if sent.iter().any(|cause| deadly.contains(cause)) {
                    if let Some(cause) = self.crash(fault) {
                        poisoned.push(cause);
                        if !self.exits.contains(&cause) {
                            self.open.remove(&cause);
                            self.unsent.remove(&cause);
                        }
                    }
                } else if sent.is_empty() {
                    match self.poison.isolation.as_ref().map(|isolation| isolation.until) {
                        Some(until) => self.now = until,
                        None => return poisoned,
                    }
                } else {
                    for cause in sent.iter().filter(|cause| !slow.contains(cause)) {
                        self.open.remove(cause);
                    }
                }
            }
            panic!("no end: {:?}", self.poison);
        }
    }

    #[test]
    fn a_request_that_crashes_two_workers_is_isolated_then_poisoned_and_the_others_are_cleared() {
        let mut world = World::new(1..2, 0..0);
        assert_eq!((world.run(Fault::Worker, &[1], &[]), world.crashes), (vec![1], 3));
        for (count, slow) in [(2, vec![]), (10, vec![]), (100, vec![]), (10, (1..=10).collect::<Vec<_>>())] {
            let mut world = World::new(1..count + 1, 0..0);
            assert_eq!(world.run(Fault::Worker, &[count / 2], &slow), [count / 2], "of {count}");
            assert_eq!(world.open.len(), slow.len().saturating_sub(1), "of {count}");
            assert!(world.crashes <= 12, "{} crashes to find one of {count}", world.crashes);
        }
        let mut world = World::new(1..9, 0..0);
        let mut poisoned = world.run(Fault::Worker, &[2, 3, 8], &[]);
        poisoned.sort_unstable();
        assert_eq!(poisoned, [2, 3, 8]);
        assert!(world.open.is_empty());
    }

    #[test]
    fn a_kill_from_outside_is_held_against_a_request_only_when_it_happens_again_and_again() {
        let mut world = World::new(1..2, 0..0);
        assert_eq!((world.run(Fault::Outside, &[1], &[]), world.crashes), (vec![1], 2 + KILLS_ALONE));
        let mut world = World::new(1..2, 0..0);
        for _ in 0..100 {
            world.next();
            assert_eq!(world.crash(Fault::Keeper), None);
        }
    }

    #[test]
    fn an_exit_that_crashes_the_worker_is_withheld_and_retried() {
        let mut world = World::new(1..4, 4..8);
        assert_eq!(world.run(Fault::Worker, &[5], &[]), [5]);
        assert_eq!(world.open.iter().copied().collect::<Vec<_>>(), [5]);
        assert_eq!(world.poison.withheld(world.now).collect::<Vec<_>>(), [5]);
        world.now = world.poison.deadline(world.now).expect("it is retried");
        assert_eq!(world.next(), [5]);
        assert_eq!(world.crash(Fault::Worker), Some(5));
        world.poison.reset();
        assert_eq!(world.next(), [5]);
    }

    #[test]
    fn no_request_is_cleared_before_the_worker_responds() {
        let mut world = World::new(1..4, 0..0);
        for _ in 0..2 {
            world.next();
            world.crash(Fault::Worker);
        }
        assert_eq!(world.next(), [1, 2]);
        let open = Open { unsent: &world.unsent, exits: &world.exits, is_open: &|_| true };
        assert!(world.poison.next(&open, false, world.now + ISOLATION).is_empty());
        assert_eq!(world.poison.next(&open, true, world.now + ISOLATION), [3]);
    }

    #[test]
    fn exits_are_sent_after_earlier_requests_even_isolated_ones() {
        let mut world = World::new(3..6, 1..3);
        assert_eq!(world.next(), [3, 4, 5, 1, 2]);
        world.crash(Fault::Worker);
        world.next();
        world.crash(Fault::Worker);
        let mut order = Vec::new();
        while !world.unsent.is_empty() {
            order.extend(world.next());
            world.now += ISOLATION;
        }
        assert_eq!(order, [3, 4, 5, 1, 2]);
    }
}
