//! What keeper and worker say to each other.
//!
//! Owns the format of the messages on the socketpair between a keeper and the life of a worker, and nothing of their meaning.
//! `docs/handover.md` describes it for people.
//!
//! ```text
//!  keeper                                              worker
//!    │ ◀─────────────── Hello {versions, build} ─────────┤   first, within a deadline
//!    ├─ Try*, Tried ────────────────────────────────────▶│   only beside a worker that serves: can it take over?
//!    │ ◀──────────────────────────── Fit {refusal} ──────┤
//!    ├─ Welcome, State*, Request*, Exit*, CaughtUp ─────▶│   in this order: what is known, what is unanswered, what happened
//!    ├─ Request | Exit ─────────────────────────────────▶│   as they come
//!    │ ◀──── Operation {cause, step, op} ────────────────┤   what cannot be done twice
//!    ├───── Done {cause, step, outcome} ────────────────▶│   the same answer whenever it is asked again
//!    │ ◀──── Commit {…} ─────────────────────────────────┤   all of it or nothing; ends causes
//!    ├─ Ping ───────────────────────────────────────────▶│   only while something is unanswered
//!    │ ◀───────────────────────────────────────── Pong ──┤
//! ```
//!
//! A **cause** is what made the worker act: a client's request or the exit of a process. The keeper numbers causes and keeps each
//! of them, with the outcomes of its operations, until a commit ends it. A worker that dies is followed by one that is given
//! the open causes again, runs the same code, and is told the outcomes that are known already.
//!
//! **Invariant:** a message is applied whole or not at all; a torn one at the end of a dead worker's stream is dropped.
mod codec;
mod control;
mod message;
mod version;

pub(crate) use codec::{HEAD_BYTES, Malformed, Part, first_frame, length_of, part, plain_parts};
pub(crate) use control::*;
pub(crate) use message::*;
pub(crate) use version::Versions;

/// The longest message either side accepts, in bytes: a ttrpc message (4 MiB) and what surrounds it.
pub(crate) const MAX_MESSAGE_BYTES: usize = 6 << 20;
