//! Which request or exit kills workers.
//!
//! What a worker had been told and not ended when it died is suspected. What two have died over is held back and told in small groups,
//! at last alone: who lives through that is innocent, whose worker dies again is guilty.
//!
//! ```text
//!  told ──(worker dies)──▶ suspected once ──(dies again)──▶ on trial ──(ended, or lived through)──▶ innocent
//!                                                              │ ▲
//!                                                 (dies again) │ │ half of the group
//!                                                              ▼ │
//!                                                     alone? ──┴─┴──▶ guilty: a request is answered, an exit withheld
//! ```
//!
//! **Invariant:** a request is told before the exits that came after it, also when some are held back.
//! **Invariant:** while a trial is on, a look costs nothing that grows with what is open: a flood may be on trial.
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use super::life::{End, Fault};
use crate::handover::Cause;

/// So many workers must have died over a cause before it is tried.
const CRASHES: u32 = 2;
/// So long those on trial have to kill their worker, and until it has given a sign of life after it was told of them.
const TRIAL: Duration = Duration::from_secs(3);
/// A SIGKILL from outside is no proof: so many workers must be killed over a cause that is on trial alone.
const KILLS_ALONE: u32 = 3;
/// How long a guilty exit is withheld, doubled each time.
const WITHHOLD: Duration = Duration::from_secs(10);
const WITHHOLD_AT_MOST: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Suspect {
    crashes: u32,
    kills_alone: u32,
    /// How often it was found guilty, and until when it is withheld.
    guilty: u32,
    withheld_until: Option<Instant>,
}

#[derive(Debug)]
struct Trial {
    causes: BTreeSet<Cause>,
    until: Instant,
}

/// What is open, as far as it matters here.
pub(crate) struct Open<'a> {
    /// What the worker was not told of.
    pub(crate) untold: &'a BTreeSet<Cause>,
    /// What of all that is open is an exit, and not a request.
    pub(crate) exits: &'a BTreeSet<Cause>,
    pub(crate) is_open: &'a dyn Fn(Cause) -> bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Blame {
    suspects: BTreeMap<Cause, Suspect>,
    trial: Option<Trial>,
    /// How many are tried at once; halved by every crash.
    width: Option<usize>,
}

impl Blame {
    /// A worker has ended that had been told of these. Returns who is guilty.
    pub(crate) fn ended(&mut self, told: impl IntoIterator<Item = Cause>, end: &End, now: Instant) -> Option<Cause> {
        let trial = self.trial.take();
        if end.fault == Fault::Ours {
            return None;
        }
        let told: BTreeSet<Cause> = told.into_iter().collect();
        self.suspects.retain(|cause, suspect| told.contains(cause) || suspect.crashes >= CRASHES);
        let tried: Vec<Cause> = trial.iter().flat_map(|trial| trial.causes.intersection(&told)).copied().collect();
        let alone = match tried[..] {
            [] => {
                for cause in told {
                    self.suspects.entry(cause).or_default().crashes += 1;
                }
                return None;
            }
            [alone] => alone,
            _ => {
                self.width = Some(tried.len() / 2);
                return None;
            }
        };
        let suspect = self.suspects.entry(alone).or_default();
        suspect.kills_alone += 1;
        if end.fault == Fault::Stranger && suspect.kills_alone < KILLS_ALONE {
            return None;
        }
        suspect.withheld_until = Some(now + (WITHHOLD * 2u32.saturating_pow(suspect.guilty)).min(WITHHOLD_AT_MOST));
        suspect.guilty += 1;
        suspect.kills_alone = 0;
        Some(alone)
    }

    /// Chooses what a worker that serves is told of next. `is_lively`: it was heard since it was told anything.
    pub(crate) fn next(&mut self, open: &Open<'_>, is_lively: bool, now: Instant) -> Vec<Cause> {
        if self.suspects.is_empty() {
            return open.requests().chain(open.exits()).collect();
        }
        if let Some(trial) = &mut self.trial {
            while let Some(first) = trial.causes.first().filter(|first| !(open.is_open)(**first)).copied() {
                trial.causes.remove(&first);
                self.suspects.remove(&first);
            }
            if !trial.causes.is_empty() && (now < trial.until || !is_lively) {
                return Vec::new();
            }
            for innocent in self.trial.take().into_iter().flat_map(|trial| trial.causes) {
                self.suspects.remove(&innocent);
            }
        }
        for untold in [open.requests().collect::<Vec<_>>(), open.exits().collect()] {
            let held: Vec<Cause> = untold.iter().filter(|cause| self.is_to_be_tried(**cause, now)).copied().collect();
            if held.is_empty() {
                let free: Vec<Cause> = untold.into_iter().filter(|cause| !self.is_withheld(*cause, now)).collect();
                if !free.is_empty() {
                    return free;
                }
                continue;
            }
            let count = self.width.unwrap_or(held.len().div_ceil(2)).clamp(1, held.len());
            let causes: BTreeSet<Cause> = held[..count].iter().copied().collect();
            self.trial = Some(Trial { causes: causes.clone(), until: now + TRIAL });
            return causes.into_iter().collect();
        }
        self.width = None;
        self.suspects.retain(|cause, _| (open.is_open)(*cause));
        Vec::new()
    }

    fn is_to_be_tried(&self, cause: Cause, now: Instant) -> bool {
        self.suspects.get(&cause).is_some_and(|suspect| suspect.crashes >= CRASHES) && !self.is_withheld(cause, now)
    }

    fn is_withheld(&self, cause: Cause, now: Instant) -> bool {
        self.suspects.get(&cause).and_then(|suspect| suspect.withheld_until).is_some_and(|until| until > now)
    }

    /// Whether a trial is on.
    pub(crate) fn is_trying(&self) -> bool {
        self.trial.is_some()
    }

    /// Another program gets to see everything.
    pub(crate) fn forgive(&mut self) {
        *self = Self::default();
    }

    /// How many workers have died over a cause that was found guilty.
    pub(crate) fn withheld(&self, now: Instant) -> impl Iterator<Item = Cause> {
        self.suspects.keys().copied().filter(move |cause| self.is_withheld(*cause, now))
    }

    /// When [`Blame::next`] may say something else though nothing happens.
    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        let until = match &self.trial {
            Some(trial) => Some(trial.until),
            None => self.suspects.values().filter_map(|suspect| suspect.withheld_until).min(),
        };
        until.filter(|until| *until > now)
    }
}

impl Open<'_> {
    fn requests(&self) -> impl Iterator<Item = Cause> {
        self.untold.difference(self.exits).copied()
    }

    fn exits(&self) -> impl Iterator<Item = Cause> {
        self.untold.intersection(self.exits).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Causes of which some kill, in front of workers that die.
    struct World {
        blame: Blame,
        open: BTreeSet<Cause>,
        exits: BTreeSet<Cause>,
        untold: BTreeSet<Cause>,
        now: Instant,
        crashes: u32,
    }

    impl World {
        fn new(requests: std::ops::Range<Cause>, exits: std::ops::Range<Cause>) -> Self {
            let open: BTreeSet<Cause> = requests.chain(exits.clone()).collect();
            Self { blame: Blame::default(), untold: open.clone(), open, exits: exits.collect(), now: Instant::now(), crashes: 0 }
        }

        fn next(&mut self) -> Vec<Cause> {
            let open = self.open.clone();
            let told = self.blame.next(
                &Open { untold: &self.untold, exits: &self.exits, is_open: &|cause| open.contains(&cause) },
                true,
                self.now,
            );
            self.untold.retain(|cause| !told.contains(cause));
            told
        }

        fn die(&mut self, fault: Fault) -> Option<Cause> {
            self.crashes += 1;
            let told: Vec<Cause> = self.open.difference(&self.untold).copied().collect();
            self.untold = self.open.clone();
            self.blame.ended(told, &End { fault, why: String::new() }, self.now)
        }

        /// Lets workers live, who die of `deadly` and end everything else that they are told, unless it is `slow`. Returns who was found guilty.
        fn run(&mut self, fault: Fault, deadly: &[Cause], slow: &[Cause]) -> Vec<Cause> {
            let mut guilty = Vec::new();
            for _ in 0..1000 {
                let told = self.next();
                if told.iter().any(|cause| deadly.contains(cause)) {
                    if let Some(cause) = self.die(fault) {
                        guilty.push(cause);
                        if !self.exits.contains(&cause) {
                            self.open.remove(&cause);
                            self.untold.remove(&cause);
                        }
                    }
                } else if told.is_empty() {
                    match self.blame.trial.as_ref().map(|trial| trial.until) {
                        Some(until) => self.now = until,
                        None => return guilty,
                    }
                } else {
                    for cause in told.iter().filter(|cause| !slow.contains(cause)) {
                        self.open.remove(cause);
                    }
                }
            }
            panic!("no end: {:?}", self.blame);
        }
    }

    #[test]
    fn a_request_that_crashes_two_workers_is_isolated_then_poisoned_and_the_others_are_cleared() {
        let mut world = World::new(1..2, 0..0);
        assert_eq!((world.run(Fault::Its, &[1], &[]), world.crashes), (vec![1], 3));
        for (count, slow) in [(2, vec![]), (10, vec![]), (100, vec![]), (10, (1..=10).collect::<Vec<_>>())] {
            let mut world = World::new(1..count + 1, 0..0);
            assert_eq!(world.run(Fault::Its, &[count / 2], &slow), [count / 2], "of {count}");
            assert_eq!(world.open.len(), slow.len().saturating_sub(1), "of {count}");
            assert!(world.crashes <= 12, "{} crashes to find one of {count}", world.crashes);
        }
        let mut world = World::new(1..9, 0..0);
        let mut guilty = world.run(Fault::Its, &[2, 3, 8], &[]);
        guilty.sort_unstable();
        assert_eq!(guilty, [2, 3, 8]);
        assert!(world.open.is_empty());
    }

    #[test]
    fn a_kill_from_outside_is_held_against_a_request_only_when_it_happens_again_and_again() {
        let mut world = World::new(1..2, 0..0);
        assert_eq!((world.run(Fault::Stranger, &[1], &[]), world.crashes), (vec![1], 2 + KILLS_ALONE));
        let mut world = World::new(1..2, 0..0);
        for _ in 0..100 {
            world.next();
            assert_eq!(world.die(Fault::Ours), None);
        }
    }

    #[test]
    fn an_exit_that_crashes_the_worker_is_withheld_and_retried() {
        let mut world = World::new(1..4, 4..8);
        assert_eq!(world.run(Fault::Its, &[5], &[]), [5]);
        assert_eq!(world.open.iter().copied().collect::<Vec<_>>(), [5]);
        assert_eq!(world.blame.withheld(world.now).collect::<Vec<_>>(), [5]);
        world.now = world.blame.deadline(world.now).expect("it comes again");
        assert_eq!(world.next(), [5]);
        assert_eq!(world.die(Fault::Its), Some(5));
        world.blame.forgive();
        assert_eq!(world.next(), [5]);
    }

    #[test]
    fn no_request_is_cleared_before_the_worker_responds() {
        let mut world = World::new(1..4, 0..0);
        for _ in 0..2 {
            world.next();
            world.die(Fault::Its);
        }
        assert_eq!(world.next(), [1, 2]);
        let open = Open { untold: &world.untold, exits: &world.exits, is_open: &|_| true };
        assert!(world.blame.next(&open, false, world.now + TRIAL).is_empty());
        assert_eq!(world.blame.next(&open, true, world.now + TRIAL), [3]);
    }

    #[test]
    fn exits_are_sent_after_earlier_requests_even_isolated_ones() {
        let mut world = World::new(3..6, 1..3);
        assert_eq!(world.next(), [3, 4, 5, 1, 2]);
        world.die(Fault::Its);
        world.next();
        world.die(Fault::Its);
        let mut order = Vec::new();
        while !world.untold.is_empty() {
            order.extend(world.next());
            world.now += TRIAL;
        }
        assert_eq!(order, [3, 4, 5, 1, 2]);
    }
}
