//! What a handler decides of the pod: a part of its change.
use crate::worker::phase::Exit;

/// Applied whole, with the rest of the change.
#[derive(Debug, Default)]
pub(in crate::worker) struct PodChange {
    /// The record is new or has changed.
    pub(in crate::worker) save: bool,
    /// The pod is gone.
    pub(in crate::worker) remove: bool,
    /// It is dropped if nothing changes it within these seconds.
    pub(in crate::worker) expires_after_seconds: Option<u32>,
    /// The holder, for the keeper to watch.
    pub(in crate::worker) claim: Option<u32>,
    /// The holder is to be forgotten.
    pub(in crate::worker) release: bool,
    /// The request waits for the end of the pod.
    pub(in crate::worker) park: bool,
    /// The answer to all that wait for it.
    pub(in crate::worker) wake: Option<Exit>,
}
