//! The protocol between keeper and worker.
//!
//! Owns the format of the messages on the socketpair between a keeper and a worker generation, not their meaning. `docs/handover.md` is the
//! contract.
//!
//! ```text
//!  keeper                                              worker
//!    │ ◀─────────────── Hello {versions, build} ─────────┤   first, within a deadline
//!    ├─ Try*, Tried ────────────────────────────────────▶│   only beside a worker that serves: can it take over?
//!    │ ◀──────────────────────────── Fit {refusal} ──────┤
//!    ├─ Welcome, State*, Request*, Exit*, CaughtUp ─────▶│   in this order: state, open requests, exits
//!    ├─ Request | Exit ─────────────────────────────────▶│   as they come
//!    │ ◀──── Operation {cause, step, op} ────────────────┤   side effects that cannot be repeated
//!    ├───── Done {cause, step, outcome} ────────────────▶│   the same outcome whenever it is requested again
//!    │ ◀──── Commit {…} ─────────────────────────────────┤   all of it or nothing; ends causes
//!    ├─ Ping ───────────────────────────────────────────▶│   never to an idle worker
//!    │ ◀───────────────────────────────────────── Pong ──┤
//! ```
//!
//! A **cause** is what made the worker act: a client's request or the exit of a process. The keeper numbers causes and keeps each
//! of them, with the outcomes of its operations, until a commit ends it. When a worker dies, the keeper sends the open causes to the next
//! one, which runs the same code and receives the outcomes that are known already.
//!
//! **Invariant:** a message is applied whole or not at all; a torn message at the end of a dead worker's stream is dropped.
mod codec;
mod control;
mod message;
mod version;

use codec::part;
pub(crate) use codec::{HEAD_BYTES, Malformed, first_frame, length_of};
pub(crate) use control::*;
pub(crate) use message::*;
pub(crate) use version::Versions;

/// The longest message either side accepts, in bytes: a ttrpc message (4 MiB) and its envelope.
pub(crate) const MAX_MESSAGE_BYTES: usize = 6 << 20;
