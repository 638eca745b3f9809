//! Totals of all runs, for reports.

use std::fmt;
use std::ops::Sub;
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Debug)]
pub(crate) struct Tally<N = AtomicU64> {
    pub(crate) kills: N,
    pub(crate) stops: N,
    pub(crate) upgrades: N,
    pub(crate) answers: N,
    pub(crate) events: N,
    pub(crate) exits: N,
    pub(crate) bytes: N,
}

static ALL: Tally = Tally {
    kills: AtomicU64::new(0),
    stops: AtomicU64::new(0),
    upgrades: AtomicU64::new(0),
    answers: AtomicU64::new(0),
    events: AtomicU64::new(0),
    exits: AtomicU64::new(0),
    bytes: AtomicU64::new(0),
};

/// All so far.
pub(crate) fn tally() -> Tally<u64> {
    let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
    Tally {
        kills: read(&ALL.kills),
        stops: read(&ALL.stops),
        upgrades: read(&ALL.upgrades),
        answers: read(&ALL.answers),
        events: read(&ALL.events),
        exits: read(&ALL.exits),
        bytes: read(&ALL.bytes),
    }
}

impl Tally {
    pub(crate) fn add(which: impl FnOnce(&'static Self) -> &'static AtomicU64, count: u64) {
        which(&ALL).fetch_add(count, Ordering::Relaxed);
    }
}

impl Sub for Tally<u64> {
    type Output = Self;

    fn sub(self, before: Self) -> Self {
        Self {
            kills: self.kills - before.kills,
            stops: self.stops - before.stops,
            upgrades: self.upgrades - before.upgrades,
            answers: self.answers - before.answers,
            events: self.events - before.events,
            exits: self.exits - before.exits,
            bytes: self.bytes - before.bytes,
        }
    }
}

impl fmt::Display for Tally<u64> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { kills, stops, upgrades, answers, events, exits, bytes } = self;
        write!(
            f,
            "{kills} kills, {stops} stops and {upgrades} upgrades from outside; {answers} answers, {events} events, {exits} exits and {bytes} bytes"
        )
    }
}
