//! The lifecycle of a task, as far as this process is concerned.
//!
//! ```text
//!  created ──▶ Starting ─▶ Live ──shim gone──▶ Cleaning ─▶ Ended ─collected─▶ Ending ─▶ Gone
//!                │  │      ▲ │▲                ▲                              ▲         ▲
//!                │  │      │ ▼└─refused        │                              │         │
//!                │  │      │ Deleting ─────────┘──deleted by its shim─────────┘         │
//!                │  └──────┼──could not be undone──▶ Cleaning                           │
//!                └─────────┼──undone────────────────────────────────────────────────────┤
//!  found ──▶ Loading ──────┘ └─shim gone──▶ Cleaning                                    │
//!               └─nothing there─────────────────────────────────────────────────────────┘
//! ```
//! The state of a task's processes is known to its shim alone.

use std::sync::Arc;

use super::Shim;
use crate::store::Exit;

/// The phase of a task.
#[derive(Debug, Clone)]
pub(crate) enum Phase {
    /// Its shim is being started; for clients it does not exist.
    Starting,
    /// This process has just started and looks for its shim; the error of the last attempt, if any.
    Loading(Option<Arc<str>>),
    /// Its shim answers.
    Live(Shim),
    /// The same, and a client has asked for its deletion.
    Deleting(Shim),
    /// Its shim is gone, and its program's `delete` is to report the exit; the error of the last attempt, if any.
    Cleaning(Option<Arc<str>>),
    /// Its shim is gone; this is kept until a client collects it.
    Ended(Exit),
    /// A client has received, or is about to receive, its exit; for clients it does not exist.
    Ending,
    /// It does not exist any more.
    Gone,
}

/// What has become of a task.
#[derive(Debug, Clone)]
pub(super) enum Fact {
    /// There is a connection to its shim, and the shim has, or may have, the task.
    Connected(Shim),
    /// It is not known whether there is a shim, and why.
    Unreachable(Arc<str>),
    /// Its shim is dead, or reports that it does not know the task.
    ShimGone,
    /// A client asks its shim to delete it.
    DeletionBegun,
    /// That has not led to anything.
    DeletionOver,
    /// Its shim has deleted it.
    Deleted,
    /// The shim's program could not clean up, and why; that is tried again.
    NotCleaned(Arc<str>),
    /// Only its exit record is left.
    CleanedUp(Exit),
    /// A client has collected its exit.
    Collected,
    /// Nothing is left of it.
    Removed,
}

impl Phase {
    /// Folds in what happened; none when it changes nothing, as something else happened first. Total: a fact is never refused.
    pub(super) fn observe(&self, fact: Fact) -> Option<Self> {
        use {Fact as F, Phase as P};
        match (self, fact) {
            (P::Gone, _) => None,
            (_, F::Removed) => Some(P::Gone),
            (P::Starting | P::Loading(_), F::Connected(shim)) => Some(P::Live(shim)),
            (P::Deleting(shim), F::DeletionOver) => Some(P::Live(shim.clone())),
            (P::Loading(_), F::Unreachable(why)) => Some(P::Loading(Some(why))),
            (P::Loading(_) | P::Live(_) | P::Deleting(_), F::ShimGone) => Some(P::Cleaning(None)),
            (P::Live(shim), F::DeletionBegun) => Some(P::Deleting(shim.clone())),
            (P::Deleting(_), F::Deleted) | (P::Ended(_), F::Collected) => Some(P::Ending),
            (P::Starting | P::Cleaning(_), F::NotCleaned(why)) => Some(P::Cleaning(Some(why))),
            (P::Loading(_) | P::Cleaning(_), F::CleanedUp(exit)) => Some(P::Ended(exit)),
            (
                P::Starting,
                F::Unreachable(_) | F::ShimGone | F::DeletionBegun | F::DeletionOver | F::Deleted | F::CleanedUp(_) | F::Collected,
            )
            | (P::Loading(_), F::DeletionBegun | F::DeletionOver | F::Deleted | F::NotCleaned(_) | F::Collected)
            | (
                P::Live(_),
                F::Connected(_) | F::Unreachable(_) | F::DeletionOver | F::Deleted | F::NotCleaned(_) | F::CleanedUp(_) | F::Collected,
            )
            | (
                P::Deleting(_),
                F::Connected(_) | F::Unreachable(_) | F::DeletionBegun | F::NotCleaned(_) | F::CleanedUp(_) | F::Collected,
            )
            | (
                P::Cleaning(_),
                F::Connected(_) | F::Unreachable(_) | F::ShimGone | F::DeletionBegun | F::DeletionOver | F::Deleted | F::Collected,
            )
            | (
                P::Ended(_) | P::Ending,
                F::Connected(_)
                | F::Unreachable(_)
                | F::ShimGone
                | F::DeletionBegun
                | F::DeletionOver
                | F::Deleted
                | F::NotCleaned(_)
                | F::CleanedUp(_),
            )
            | (P::Ending, F::Collected) => None,
        }
    }

    /// Its shim, while that answers.
    pub(crate) fn shim(&self) -> Option<&Shim> {
        match self {
            Self::Live(shim) | Self::Deleting(shim) => Some(shim),
            Self::Starting | Self::Loading(_) | Self::Cleaning(_) | Self::Ended(_) | Self::Ending | Self::Gone => None,
        }
    }

    /// Whether clients find the task.
    pub(super) fn is_visible(&self) -> bool {
        match self {
            Self::Loading(_) | Self::Live(_) | Self::Deleting(_) | Self::Cleaning(_) | Self::Ended(_) => true,
            Self::Starting | Self::Ending | Self::Gone => false,
        }
    }

    /// What metrics call it.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Self::Starting | Self::Ending | Self::Gone => "starting_or_ending",
            Self::Loading(_) => "loading",
            Self::Live(_) | Self::Deleting(_) => "live",
            Self::Cleaning(_) => "cleaning",
            Self::Ended(_) => "ended",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit { pid: 7, status: 3, at: 1 };

    fn why() -> Arc<str> {
        "why".into()
    }

    fn facts() -> Vec<Fact> {
        vec![
            Fact::Connected(Shim::unconnected()),
            Fact::Unreachable(why()),
            Fact::ShimGone,
            Fact::DeletionBegun,
            Fact::DeletionOver,
            Fact::Deleted,
            Fact::NotCleaned(why()),
            Fact::CleanedUp(EXIT),
            Fact::Collected,
            Fact::Removed,
        ]
    }

    fn name(phase: &Phase) -> &'static str {
        match phase {
            Phase::Starting => "starting",
            Phase::Ending => "ending",
            Phase::Gone => "gone",
            Phase::Deleting(_) => "deleting",
            Phase::Loading(_) | Phase::Live(_) | Phase::Cleaning(_) | Phase::Ended(_) => phase.name(),
        }
    }

    #[test]
    fn each_fact_leads_where_the_table_says() {
        let phases = [
            (Phase::Starting, ["live", "-", "-", "-", "-", "-", "cleaning", "-", "-", "gone"]),
            (Phase::Loading(None), ["live", "loading", "cleaning", "-", "-", "-", "-", "ended", "-", "gone"]),
            (Phase::Live(Shim::unconnected()), ["-", "-", "cleaning", "deleting", "-", "-", "-", "-", "-", "gone"]),
            (Phase::Deleting(Shim::unconnected()), ["-", "-", "cleaning", "-", "live", "ending", "-", "-", "-", "gone"]),
            (Phase::Cleaning(None), ["-", "-", "-", "-", "-", "-", "cleaning", "ended", "-", "gone"]),
            (Phase::Ended(EXIT), ["-", "-", "-", "-", "-", "-", "-", "-", "ending", "gone"]),
            (Phase::Ending, ["-", "-", "-", "-", "-", "-", "-", "-", "-", "gone"]),
            (Phase::Gone, ["-", "-", "-", "-", "-", "-", "-", "-", "-", "-"]),
        ];
        for (phase, expected) in phases {
            let led: Vec<_> = facts().into_iter().map(|fact| phase.observe(fact).map_or("-", |next| name(&next))).collect();
            assert_eq!(led, expected, "{phase:?}");
        }
    }

    #[test]
    fn an_end_is_collected_once_and_what_is_gone_stays_so_whatever_happens() {
        let mut random = 1_u64;
        for _sequence in 0..2000 {
            let mut phase = if random & 1 == 0 { Phase::Starting } else { Phase::Loading(None) };
            let (mut ends, mut was_hidden) = (0, false);
            for _fact in 0..20 {
                random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let all = facts();
                let fact = all[(random >> 33) as usize % all.len()].clone();
                let hands_out = matches!(fact, Fact::Deleted | Fact::Collected);
                let before = phase.clone();
                if let Some(next) = phase.observe(fact) {
                    ends += u32::from(hands_out);
                    phase = next;
                }
                assert!(ends <= 1, "two clients received the exit");
                was_hidden |= matches!(phase, Phase::Ending | Phase::Gone);
                assert!(!was_hidden || !phase.is_visible(), "{before:?} came back as {phase:?}");
                assert!(!matches!(before, Phase::Cleaning(_) | Phase::Ended(_)) || phase.shim().is_none(), "{before:?} became live again");
            }
        }
    }
}
