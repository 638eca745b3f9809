//! Which chains are being unpacked: one caller at a time unpacks a chain.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

use crate::content::Digest;
use crate::store::snapshots::Place;

type Key = (Place, Digest);

/// All of them; cheap to clone.
#[derive(Debug, Clone, Default)]
pub(super) struct Claims(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    taken: Mutex<HashSet<Key>>,
    released: Notify,
}

/// The right to unpack a chain; until it is dropped, no other caller unpacks it.
#[derive(Debug)]
pub(super) struct Claim {
    claims: Claims,
    key: Key,
}

impl Claims {
    /// Takes a chain, unless another caller has it.
    pub(super) fn try_take(&self, place: &Place, chain: &Digest) -> Option<Claim> {
        let key = (place.clone(), chain.clone());
        self.taken().insert(key.clone()).then(|| Claim { claims: self.clone(), key })
    }

    /// Waits until no caller has a chain: it is unpacked then, or has failed.
    pub(super) async fn released(&self, place: &Place, chain: &Digest) {
        let key = (place.clone(), chain.clone());
        loop {
            let mut released = std::pin::pin!(self.0.released.notified());
            released.as_mut().enable();
            if !self.taken().contains(&key) {
                return;
            }
            released.await;
        }
    }

    fn taken(&self) -> MutexGuard<'_, HashSet<Key>> {
        self.0.taken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.taken().remove(&self.key);
        self.claims.0.released.notify_waiters();
    }
}
