//! One at a time for each blob.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio::sync::{Mutex as Turn, OwnedMutexGuard};

use super::{Digest, lock};

/// Blobs of which something is being done, or waited for.
#[derive(Debug, Default)]
pub(super) struct Turns(Arc<Mutex<HashMap<Digest, Arc<Turn<()>>>>>);

/// The turn to work on a blob, which one task has at a time.
#[derive(Debug)]
pub(super) struct Taken {
    all: Arc<Mutex<HashMap<Digest, Arc<Turn<()>>>>>,
    digest: Digest,
    /// None once it is being released.
    guard: Option<OwnedMutexGuard<()>>,
}

impl Turns {
    /// Waits for the blob.
    pub(super) async fn take(&self, digest: &Digest) -> Taken {
        let turn = Arc::clone(lock(&self.0).entry(digest.clone()).or_default());
        let mut taken = Taken { all: Arc::clone(&self.0), digest: digest.clone(), guard: None };
        taken.guard = Some(turn.lock_owned().await);
        taken
    }

    /// The blob, if no other has it.
    pub(super) fn try_take(&self, digest: &Digest) -> Option<Taken> {
        let turn = Arc::clone(lock(&self.0).entry(digest.clone()).or_default());
        let guard = turn.try_lock_owned().ok()?;
        Some(Taken { all: Arc::clone(&self.0), digest: digest.clone(), guard: Some(guard) })
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.guard = None;
        let mut all = lock(&self.all);
        // others who have it, or wait for it, hold it as well
        if all.get(&self.digest).is_some_and(|turn| Arc::strong_count(turn) == 1) {
            all.remove(&self.digest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_blob_is_one_callers_at_a_time_and_is_forgotten_with_the_last() {
        let (turns, digest) = (Turns::default(), Digest::of_bytes(b"x"));
        let first = turns.take(&digest).await;
        assert!(turns.try_take(&digest).is_none());
        let other = turns.take(&Digest::of_bytes(b"y")).await;
        let waiting = turns.take(&digest);
        tokio::pin!(waiting);
        assert!(futures_pending(waiting.as_mut()).await);
        drop(first);
        let second = waiting.await;
        drop((second, other));
        assert!(lock(&turns.0).is_empty());
        let first = turns.take(&digest).await;
        // one that stops to wait
        assert!(tokio::time::timeout(std::time::Duration::from_millis(1), turns.take(&digest)).await.is_err());
        drop(first);
        assert!(lock(&turns.0).is_empty());
    }

    async fn futures_pending(future: std::pin::Pin<&mut impl Future>) -> bool {
        let mut future = future;
        std::future::poll_fn(|cx| std::task::Poll::Ready(future.as_mut().poll(cx).is_pending())).await
    }
}
