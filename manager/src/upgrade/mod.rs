//! One process takes over from another, and no client is refused.
//!
//! ```text
//!   running process                                   new process
//!   start it, hand it lock and sockets ─────────────▶ reads settings, finds its sockets, rehearses the store
//!   serves on                          ◀── prepared ─
//!   closes the gate: changes wait
//!   copies the store if it will change ─── yours ───▶ opens the store, finds the shims
//!                                      ◀── ready ────
//!   for each stream of events  ─── subscriber … ─────▶ keeps what happens until that client subscribes again
//!                                      ─── serve ───▶
//!   retires                            ◀── serving ── accepts; clients that connected meanwhile are in the sockets' queues
//!   refuses what waits, so that clients ask again; ends when calls in flight have ended
//! ```
//! After a timeout or `failed` the new process is killed; the running one restores the store if needed, opens the gate, and has missed
//! nothing. docs/decisions/0010-upgrade-side-by-side.md has the reasons.
//!
//! **Invariant:** until `serving` the running process can continue unaffected, as the new one has changed nothing but the store's tables;
//! from then on it changes nothing.

mod hand_over;
mod protocol;
mod take_over;

pub(crate) use hand_over::{HandedOver, hand_over};
pub(crate) use take_over::{Predecessor, report_failure};

/// The first message, with which lock and sockets come. A process that expects another one cannot take over.
const GREETING: &str = "x-manager hands over, version 2";
/// From the new process: all is well, and the store's tables stay as they are.
const PREPARED: &str = "prepared";
/// From the new process: all is well, and the store's tables will change.
const PREPARED_TO_MIGRATE: &str = "prepared to migrate";
/// From the running process: nothing changes any more.
const YOURS: &str = "yours";
/// From the new process: it could serve now.
const READY: &str = "ready";
/// From the running process, with JSON: a client that is subscribed to events.
const SUBSCRIBER: &str = "subscriber ";
/// From the running process: it may begin.
const SERVE: &str = "serve";
/// From the new process: it has begun.
const SERVING: &str = "serving";
/// From the new process, with a sentence: it gives up.
const FAILED: &str = "failed ";
