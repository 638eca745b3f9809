//! When a fast output gets its next turn.
//!
//! ```text
//!  by events ──(1 MiB within 10 ms)──▶ by the clock ──(little comes, the output has ended, or a Delete waits)──▶ by events
//! ```
//!
//! A process that writes 64 KiB at a time wakes the keeper 16,384 times for a GiB, which costs more than moving the bytes. By the clock, nothing wakes it,
//! and larger pipes hold what comes between two turns: [`LONGEST`] is the most by which a byte is late. The pipes are large only for that time, since the
//! kernel limits the pages of all pipes of a user, and a Delete limits the time in which a slow reader can take what they hold.
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use super::pipes;

/// The pace of one output.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Since when bytes are counted, and how many have come.
    counted: Option<(Instant, u64)>,
    /// The time until the next turn; absent while events give it its turns.
    interval: Option<Duration>,
    /// When the clock gives the next turn.
    due: Option<Instant>,
    /// How many turns by the clock in a row have moved little.
    slow_turns: u32,
    /// It is a terminal, or this user may not have larger pipes.
    is_fixed: bool,
}

impl Pace {
    /// Whether the clock gives the turns.
    pub(super) fn is_timed(&self) -> bool {
        self.interval.is_some()
    }

    /// When the clock gives the next turn, if it does.
    pub(super) fn make_due(&mut self) -> Option<Instant> {
        // From the end of a turn: on a busy machine it may have taken longer than the time between two.
        self.due = self.interval.map(|interval| Instant::now() + interval);
        self.due
    }

    /// Forgets when that is.
    pub(super) fn take_due(&mut self) -> Option<Instant> {
        self.due.take()
    }

    /// Counts bytes of an output that has its turns by events. Returns whether it is fast.
    pub(super) fn is_fast(&mut self, moved: u64, now: Instant) -> bool {
        if self.is_fixed || moved == 0 {
            return false;
        }
        let (since, count) = self.counted.filter(|(since, _)| now.saturating_duration_since(*since) <= WINDOW).unwrap_or((now, 0));
        self.counted = Some((since, count + moved));
        count + moved >= FAST_BYTES
    }

    /// Makes both pipes large. Returns whether the clock gives the turns from now on.
    pub(super) fn begin(&mut self, pipes: [&OwnedFd; 2]) -> bool {
        self.counted = None;
        self.is_fixed = !pipes.iter().all(|pipe| pipes::resize(pipe, LARGE_BYTES));
        if self.is_fixed {
            self.end(pipes);
            return false;
        }
        self.interval = Some(FIRST);
        self.slow_turns = 0;
        true
    }

    /// After a turn by the clock: chooses the time until the next one. Returns whether the output is still fast.
    pub(super) fn go_on(&mut self, moved: u64) -> bool {
        let Some(interval) = self.interval else { return false };
        let large = LARGE_BYTES as u64;
        self.interval = Some(match moved {
            // The process may have waited for room.
            _ if moved > large / 4 * 3 => (interval / 2).max(SHORTEST),
            _ if moved < large / 4 => (interval * 2).min(LONGEST),
            _ => interval,
        });
        // One alone may only show that the process or the reader had no processor.
        self.slow_turns = if moved < SLOW_BYTES { self.slow_turns + 1 } else { 0 };
        self.slow_turns < SLOW_TURNS
    }

    /// Makes both pipes as large as the kernel makes them, unless they hold more than that.
    pub(super) fn end<'a>(&mut self, pipes: impl IntoIterator<Item = &'a OwnedFd>) {
        self.interval = None;
        for pipe in pipes {
            pipes::resize(pipe, SMALL_BYTES);
        }
    }
}

/// As much within [`WINDOW`] is fast: 100 MiB/s.
pub(super) const FAST_BYTES: u64 = 1 << 20;
const WINDOW: Duration = Duration::from_millis(10);
/// Less than this in as many turns by the clock is not worth it any more.
const SLOW_BYTES: u64 = 16 << 10;
pub(super) const SLOW_TURNS: u32 = 10;
/// A pipe's capacity, and that of one between two turns by the clock.
pub(super) const SMALL_BYTES: usize = 64 << 10;
const LARGE_BYTES: usize = 512 << 10;
/// The time between two turns by the clock: at first, and its limits.
const FIRST: Duration = Duration::from_micros(250);
const SHORTEST: Duration = Duration::from_micros(50);
const LONGEST: Duration = Duration::from_millis(1);
