//! Images: what brings them here, and sends them elsewhere.
//!
//! ```text
//! registry ──pull──▶ ┌───────────────────────────────────┐ ──push──▶ registry
//!                    │ content, names, unpacked snapshots │
//! archive ──import─▶ └───────────────────────────────────┘ ──export─▶ archive
//! ```
//! The API's Transfer service calls these functions, and others may: wire types other than records of the store are unknown here.
//!
//! When another process takes over, a pull or a push begins again there, and finds what has come; an export is read to its end here; the files of an
//! archive go on arriving here and are written there, where the rest of an import follows.
//!
//! **Invariants:** a name leads to an image only when everything that was asked for of it is there and on the disk. What an interrupted transfer
//! leaves is held by nothing. A digest that comes from outside is checked before it names anything.

pub(crate) mod ahead;
mod archive;
mod compress;
mod document;
mod export;
mod fetch;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod import;
mod index;
mod ingest;
mod lease;
mod names;
pub(crate) mod plan;
mod platform;
mod progress;
mod pull;
mod push;
mod record;
pub(crate) mod registry;
mod remote;
mod tag;
mod tree;
pub(crate) mod unpack;
mod unpacking;
mod verifiers;

use std::sync::Arc;

use tokio::sync::Semaphore;

pub(crate) use export::Export;
pub(crate) use import::{Contents, File as ArchiveFile, Import};
pub(crate) use lease::{Lease, Place};
pub(crate) use names::{NameRule, UnpackFor, Wanted, Where};
pub(crate) use platform::{Platform, Platforms};
pub(crate) use progress::{Event, Progress, Reader};
pub(crate) use pull::Pull;
pub(crate) use push::Push;
#[cfg(test)]
pub(crate) use record::tests::image;
pub(crate) use record::{IMAGES, put, validate};
pub(crate) use tree::Selection;

use crate::content::{Content, Digest};
use crate::diff::Differ;
use crate::error::Error;
use crate::events::Exchange;
use crate::gate::Gate;
use crate::gc::Collector;
use crate::pools::Pool;
use crate::settings::TransferSettings;
use crate::store::Store;
use crate::successor::Successor;
use ahead::Ahead;
use fetch::Flights;
use lease::Leases;
use unpack::Unpacker;
use verifiers::Verifiers;

/// Moves images.
#[derive(Debug)]
pub(crate) struct Transfers {
    content: Arc<Content>,
    store: Store,
    events: Arc<Exchange>,
    gate: Gate,
    collector: Arc<Collector>,
    unpacker: Unpacker,
    /// Unpacks images of archives while they come.
    ahead: Ahead,
    /// Applies layers to snapshots of other processes.
    differ: Differ,
    /// Reads blobs.
    pool: Pool,
    /// Reads and writes archives.
    archives: Pool,
    /// Are asked before a pull.
    verifiers: Verifiers,
    /// Blobs that arrive at the same time, of all pulls.
    downloads: Semaphore,
    /// Blobs that are sent at the same time, of all pushes.
    uploads: Semaphore,
    flights: Flights,
    /// Leases that transfers of this process have made.
    leases: Leases,
    /// Goes on with what this process cannot end, once another one serves.
    successor: Successor,
}

/// What transfers work with.
#[derive(Debug)]
pub(crate) struct Parts {
    pub(crate) content: Arc<Content>,
    pub(crate) store: Store,
    pub(crate) events: Arc<Exchange>,
    pub(crate) gate: Gate,
    pub(crate) collector: Arc<Collector>,
    pub(crate) unpacker: Unpacker,
    pub(crate) ahead: Ahead,
    pub(crate) differ: Differ,
    pub(crate) pool: Pool,
    pub(crate) archives: Pool,
    pub(crate) settings: TransferSettings,
    pub(crate) successor: Successor,
}

impl Transfers {
    /// With these.
    pub(crate) fn new(parts: Parts) -> Self {
        let Parts { content, store, events, gate, collector, unpacker, ahead, differ, pool, archives, settings, successor } = parts;
        let verifiers = Verifiers::new(settings.verifiers, pool.clone());
        Self {
            content,
            store,
            events,
            gate,
            collector,
            unpacker,
            ahead,
            differ,
            pool,
            archives,
            verifiers,
            downloads: Semaphore::new(settings.max_concurrent_downloads),
            uploads: Semaphore::new(settings.max_concurrent_uploaded_layers),
            flights: Flights::default(),
            leases: Leases::default(),
            successor,
        }
    }
}

/// Says of what an error about a document is.
fn of(digest: &Digest) -> impl FnOnce(Error) -> Error {
    move |error| match error {
        Error::Invalid(sentence) => Error::Invalid(format!("{digest}: {sentence}")),
        error => error,
    }
}
