//! The keeper: the process that lasts.
//!
//! One thread, one poll loop. It relays whole frames between clients and a worker, is the parent of every process, performs what
//! cannot be done twice, moves stdio, sends events. It knows frames, operations, facts and blobs; what a task is, only the worker knows.
//!
//! ```text
//!  clients ⇄ relay ─▶ ledger ⇄ supervisor ⇄ worker
//!                       │ operations        │ commits
//!             children, streams        publisher ─▶ containerd
//!
//!  upgrade: another program for the worker, then, by way of `image`, for the keeper itself
//! ```
//!
//! **Invariant:** nothing here waits for anybody: not for a client, a disk, a daemon, a runtime or the worker.
//! **Invariant:** what containers inherit is not touched: no limit, niceness, affinity, timer slack of its own.
mod capture;
mod children;
mod control;
mod generation;
mod inbox;
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

pub(crate) use run::{rehearse, resume, run};
