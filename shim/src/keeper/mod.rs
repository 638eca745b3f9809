//! The keeper: the process that lasts.
//!
//! One thread, one poll loop. It relays whole frames between clients and a worker, is the parent of every process, performs the
//! operations that cannot be done twice, moves stdio and sends events. It knows frames, operations, facts and blobs; only the worker knows
//! what a task is.
//!
//! ```text
//!  clients ⇄ relay ─▶ ledger ⇄ supervisor ⇄ worker
//!                       │ operations        │ commits
//!             children, streams        publisher ─▶ containerd
//!
//!  upgrade: another executable for the worker, then, by `reexec`, for the keeper itself
//! ```
//!
//! **Invariant:** the keeper never blocks: not on a client, a disk, the daemon, a runtime or the worker.
//! **Invariant:** the keeper does not change what containers inherit from it: limits, niceness, affinity, timer slack.
mod children;
mod control;
mod first_worker;
mod gates;
mod generation;
mod home;
mod ledger;
mod outbox;
mod poison;
mod poll;
mod publisher;
mod reexec;
mod relay;
mod run;
mod streams;
mod supervisor;
mod upgrade;

pub(crate) use first_worker::{Forked, fork};
pub(crate) use run::{rehearse, resume, run};
