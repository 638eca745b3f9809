//! The lifecycle of a process: a container's init, or an exec.
//!
//! Owns which requests are admitted when, and what follows from each fact. Pure: handlers perform.
//!
//! ```text
//!             StartAsked           Started              Paused
//!  Created ──────────────▶ Starting ─────────▶ Running ───────▶ Paused
//!     ▲                      │  │                │ ▲               │
//!     └──── StartFailed ─────┘  │                │ └── Resumed ────┤
//!     │                         │ (early exit)   │                 │
//!     └────── Reaped ───────────┴──▶ Dying ◀─────┴──── Reaped ─────┘
//!                                      │ Settled
//!                                      ▼
//!                                    Exited
//! ```
//!
//! `Dying` is an exit that is known but not yet published: the exits of execs are published first.
//!
//! **Invariant:** requests can be refused, facts cannot. An exit is announced once, and never before the start.
//! A saved phase waits for nothing: a replay reconstructs the others, from the request or the exit that
//! led to them.
use std::fmt;

use serde::{Deserialize, Serialize};

/// The exit of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Exit {
    /// 0–255, or 128 + signal number.
    pub(crate) status: u32,
    /// Unix time in nanoseconds.
    pub(crate) at_nanos: i64,
}

/// The phase of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Saved", into = "Saved")]
pub(crate) enum Phase {
    Created,
    /// Its program is being started. `early` is an exit that arrived before the start was complete.
    Starting {
        early: Option<Exit>,
    },
    Running,
    Paused,
    /// It has exited, and that is still to be published.
    Dying {
        exit: Exit,
        /// Whether its start was published.
        started: bool,
    },
    Exited(Exit),
}

/// The requests of clients that depend on the phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    Start,
    /// On init: adds an exec.
    Exec,
    /// On init: starts an exec.
    StartExec,
    Kill,
    Pause,
    Resume,
    Checkpoint,
    Update,
    Delete,
}

/// Reports of the kernel or the runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fact {
    StartAsked,
    Started,
    StartFailed,
    Paused,
    Resumed,
    Reaped(Exit),
    /// Everything that must be published before the exit was.
    Settled,
}

/// What is to be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Announce {
    Start,
    Pause,
    Resume,
    Exit,
}

/// A request that does not fit the phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("cannot {request} while {}", phase.name())]
pub(crate) struct Refused {
    pub(crate) request: Request,
    pub(crate) phase: Phase,
}

impl Phase {
    /// Whether the phase admits the request. A refusal changes nothing.
    pub(crate) fn admit(self, request: Request) -> Result<(), Refused> {
        use {Phase as P, Request as R};
        match (request, self) {
            (R::Start, P::Created)
            // As the stock shim does: an exit that is not published yet does not refuse an Exec.
            | (R::Exec, P::Created | P::Starting { .. } | P::Running | P::Dying { .. })
            | (R::StartExec, P::Created | P::Starting { early: None } | P::Running)
            | (R::Kill, P::Created | P::Starting { .. } | P::Running | P::Paused)
            | (R::Pause, P::Running)
            | (R::Resume, P::Paused)
            | (R::Checkpoint, P::Running | P::Paused)
            | (R::Update, P::Created | P::Starting { .. } | P::Running | P::Paused)
            | (R::Delete, P::Created | P::Exited(_)) => Ok(()),
            (request, phase) => Err(Refused { request, phase }),
        }
    }

    /// Applies a fact. Total: a fact is never refused.
    pub(crate) fn observe(self, fact: Fact) -> (Self, &'static [Announce]) {
        use {Announce as A, Fact as F, Phase as P};
        match (self, fact) {
            (P::Exited(exit), _) => (P::Exited(exit), &[]),
            (P::Dying { exit, .. }, F::Settled) => (P::Exited(exit), &[A::Exit]),
            (P::Dying { .. }, _) => (self, &[]),
            (P::Created, F::StartAsked) => (P::Starting { early: None }, &[]),
            (P::Created, F::Reaped(exit)) => (P::Dying { exit, started: false }, &[]),
            (P::Running | P::Paused, F::Reaped(exit)) => (P::Dying { exit, started: true }, &[]),
            (P::Starting { early }, F::Reaped(exit)) => (P::Starting { early: early.or(Some(exit)) }, &[]),
            (P::Starting { early: None }, F::Started) => (P::Running, &[A::Start]),
            (P::Starting { early: Some(exit) }, F::Started) => (P::Dying { exit, started: true }, &[A::Start]),
            (P::Starting { early: None }, F::StartFailed) => (P::Created, &[]),
            (P::Starting { early: Some(exit) }, F::StartFailed) => (P::Dying { exit, started: false }, &[]),
            (P::Running, F::Paused) => (P::Paused, &[A::Pause]),
            (P::Paused, F::Resumed) => (P::Running, &[A::Resume]),
            (P::Created, F::Started | F::StartFailed | F::Paused | F::Resumed | F::Settled)
            | (P::Starting { .. }, F::StartAsked | F::Paused | F::Resumed | F::Settled)
            | (P::Running, F::StartAsked | F::Started | F::StartFailed | F::Resumed | F::Settled)
            | (P::Paused, F::StartAsked | F::Started | F::StartFailed | F::Paused | F::Settled) => (self, &[]),
        }
    }

    /// Its exit, once published.
    pub(crate) fn exit(self) -> Option<Exit> {
        match self {
            Self::Exited(exit) => Some(exit),
            Self::Created | Self::Starting { .. } | Self::Running | Self::Paused | Self::Dying { .. } => None,
        }
    }

    /// Whether its exit is still to be published.
    pub(crate) fn is_under_way(self) -> bool {
        match self {
            Self::Starting { .. } | Self::Running | Self::Paused | Self::Dying { .. } => true,
            Self::Created | Self::Exited(_) => false,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Starting { .. } => "starting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Dying { .. } | Self::Exited(_) => "stopped",
        }
    }
}

impl fmt::Display for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Start => "start",
            Self::Exec => "exec",
            Self::StartExec => "start an exec",
            Self::Kill => "kill",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Checkpoint => "checkpoint",
            Self::Update => "update",
            Self::Delete => "delete",
        })
    }
}

/// The phases that are saved.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Saved {
    Created,
    Running,
    Paused,
    Exited(Exit),
}

impl From<Phase> for Saved {
    fn from(phase: Phase) -> Self {
        match phase {
            // The Start or the exit is still open, and the keeper sends it again.
            Phase::Created | Phase::Starting { .. } | Phase::Dying { started: false, .. } => Self::Created,
            Phase::Running | Phase::Dying { started: true, .. } => Self::Running,
            Phase::Paused => Self::Paused,
            Phase::Exited(exit) => Self::Exited(exit),
        }
    }
}

impl From<Saved> for Phase {
    fn from(saved: Saved) -> Self {
        match saved {
            Saved::Created => Self::Created,
            Saved::Running => Self::Running,
            Saved::Paused => Self::Paused,
            Saved::Exited(exit) => Self::Exited(exit),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXIT: Exit = Exit { status: 3, at_nanos: 7 };
    const LATER: Exit = Exit { status: 4, at_nanos: 8 };

    const PHASES: [Phase; 7] = [
        Phase::Created,
        Phase::Starting { early: None },
        Phase::Starting { early: Some(EXIT) },
        Phase::Running,
        Phase::Paused,
        Phase::Dying { exit: EXIT, started: true },
        Phase::Exited(EXIT),
    ];

    fn admitted(request: Request) -> Vec<Phase> {
        PHASES.into_iter().filter(|phase| phase.admit(request).is_ok()).collect()
    }

    #[test]
    fn pause_is_refused_unless_running() {
        assert_eq!(admitted(Request::Pause), [Phase::Running]);
        assert_eq!(admitted(Request::Resume), [Phase::Paused]);
    }

    #[test]
    fn delete_is_refused_unless_created_or_exited() {
        assert_eq!(admitted(Request::Delete), [Phase::Created, Phase::Exited(EXIT)]);
    }

    #[test]
    fn an_added_process_cannot_start_once_init_has_exited_nor_be_added_once_that_is_published() {
        assert_eq!(admitted(Request::StartExec), [Phase::Created, Phase::Starting { early: None }, Phase::Running]);
        let published = PHASES.into_iter().filter(|phase| matches!(phase, Phase::Paused | Phase::Exited(_)));
        assert!(published.clone().count() == 2 && published.clone().all(|phase| phase.admit(Request::Exec).is_err()));
        assert_eq!(admitted(Request::Exec).len() + published.count(), PHASES.len());
    }

    #[test]
    fn kill_is_refused_only_after_the_end() {
        assert_eq!(
            admitted(Request::Kill),
            [Phase::Created, Phase::Starting { early: None }, Phase::Starting { early: Some(EXIT) }, Phase::Running, Phase::Paused]
        );
    }

    #[test]
    fn exit_reaped_during_start_is_announced_after_start() {
        let (phase, announcements) = Phase::Created.observe(Fact::StartAsked);
        assert_eq!(announcements, &[]);
        let (phase, announcements) = phase.observe(Fact::Reaped(EXIT));
        assert_eq!((phase, announcements), (Phase::Starting { early: Some(EXIT) }, &[] as &[_]));
        let (phase, announcements) = phase.observe(Fact::Started);
        assert_eq!((phase, announcements), (Phase::Dying { exit: EXIT, started: true }, &[Announce::Start] as &[_]));
        assert_eq!(phase.observe(Fact::Settled), (Phase::Exited(EXIT), &[Announce::Exit] as &[_]));
    }

    #[test]
    fn exit_reaped_during_a_start_that_fails_is_announced() {
        let (phase, announcements) = Phase::Starting { early: Some(EXIT) }.observe(Fact::StartFailed);
        assert_eq!((phase, announcements), (Phase::Dying { exit: EXIT, started: false }, &[] as &[_]));
    }

    #[test]
    fn a_phase_in_flight_is_saved_as_the_one_it_came_from() {
        for (phase, saved) in [
            (Phase::Starting { early: Some(EXIT) }, Phase::Created),
            (Phase::Dying { exit: EXIT, started: true }, Phase::Running),
            (Phase::Dying { exit: EXIT, started: false }, Phase::Created),
            (Phase::Paused, Phase::Paused),
            (Phase::Exited(EXIT), Phase::Exited(EXIT)),
        ] {
            let text = serde_json::to_string(&phase).expect("a phase has a JSON form");
            assert_eq!(serde_json::from_str::<Phase>(&text).expect("what was written can be read"), saved, "{text}");
        }
    }

    #[test]
    fn start_is_published_once_before_exit_and_exit_once_and_last() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut random = move |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            (seed >> 32) % below
        };
        let facts = [
            Fact::StartAsked,
            Fact::Started,
            Fact::StartFailed,
            Fact::Paused,
            Fact::Resumed,
            Fact::Reaped(EXIT),
            Fact::Reaped(LATER),
            Fact::Settled,
        ];
        for _ in 0..20_000 {
            let (mut phase, mut published, mut first_exit) = (Phase::Created, Vec::new(), None);
            for _ in 0..random(24) {
                let fact = facts[random(facts.len() as u64) as usize];
                if let Fact::Reaped(exit) = fact {
                    first_exit.get_or_insert(exit);
                }
                let (next, announcements) = phase.observe(fact);
                assert!(phase.exit().is_none() || next == phase, "{phase:?} was left by {fact:?}");
                published.extend_from_slice(announcements);
                phase = next;
            }
            let at = |what| published.iter().position(|found| *found == what);
            let count = |what| published.iter().filter(|found| **found == what).count();
            assert!(count(Announce::Start) <= 1 && count(Announce::Exit) <= 1, "{published:?}");
            if let Some(exit) = at(Announce::Exit) {
                assert_eq!(exit, published.len() - 1, "{published:?}");
                assert_eq!(phase.exit(), first_exit);
            }
            if let Some(paused) = at(Announce::Pause) {
                assert!(at(Announce::Start).is_some_and(|start| start < paused), "{published:?}");
            }
        }
    }
}
