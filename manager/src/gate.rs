//! What makes one process the only one that changes anything, while another takes over from it.
//!
//! ```text
//! open ──close: those inside leave, others wait──▶ closed ──▶ retired: nobody enters any more
//!   ▲────────────────────the successor failed─────────┘
//! ```
//! **Invariant:** what changes tasks or the store has a [`Pass`]; so between close and open nothing does.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, watch};

/// The gate.
#[derive(Debug, Clone)]
pub(crate) struct Gate {
    inside: Arc<RwLock<()>>,
    retired: watch::Sender<bool>,
}

/// The right to change something, for as long as it is held.
#[derive(Debug)]
pub(crate) struct Pass {
    _inside: OwnedRwLockReadGuard<()>,
}

/// Nobody is inside, for as long as it is held.
#[derive(Debug)]
pub(crate) struct Closed {
    _alone: OwnedRwLockWriteGuard<()>,
}

impl Default for Gate {
    fn default() -> Self {
        Self { inside: Arc::default(), retired: watch::Sender::new(false) }
    }
}

impl Gate {
    /// Waits while it is closed; none when it will never open again.
    pub(crate) async fn enter(&self) -> Option<Pass> {
        let pass = tokio::select! {
            biased;
            () = self.retired() => return None,
            inside = Arc::clone(&self.inside).read_owned() => Pass { _inside: inside },
        };
        (!self.is_retired()).then_some(pass)
    }

    /// Lets nobody in any more and waits for those inside; none when they take longer than `limit`, and it is open again.
    pub(crate) async fn close(&self, limit: Duration) -> Option<Closed> {
        let alone = tokio::time::timeout(limit, Arc::clone(&self.inside).write_owned()).await.ok()?;
        Some(Closed { _alone: alone })
    }

    /// Turns everybody away for good.
    pub(crate) fn retire(&self) {
        self.retired.send_replace(true);
    }

    /// Whether it was retired.
    pub(crate) fn is_retired(&self) -> bool {
        *self.retired.borrow()
    }

    /// Waits until it is retired.
    pub(crate) async fn retired(&self) {
        let mut retired = self.retired.subscribe();
        // the sender is part of the gate
        let _ = retired.wait_for(|retired| *retired).await;
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::timeout;

    use super::*;

    const MOMENT: Duration = Duration::from_millis(20);

    #[tokio::test]
    async fn a_gate_that_closes_waits_for_those_inside_and_holds_the_others() {
        let gate = Gate::default();
        let inside = gate.enter().await.expect("open");
        assert!(gate.close(MOMENT).await.is_none(), "somebody is inside");
        let second = timeout(MOMENT, gate.enter()).await.expect("open again");
        drop((inside, second));
        let closed = gate.close(MOMENT).await.expect("nobody is inside");
        assert!(timeout(MOMENT, gate.enter()).await.is_err(), "closed");
        drop(closed);
        assert!(timeout(MOMENT, gate.enter()).await.expect("open again").is_some());
    }

    #[tokio::test]
    async fn who_waits_at_a_gate_that_retires_is_turned_away() {
        let gate = Gate::default();
        let closed = gate.close(MOMENT).await.expect("nobody is inside");
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter().await.is_none() }
        });
        tokio::task::yield_now().await;
        gate.retire();
        assert!(waiting.await.expect("no panic"));
        drop(closed);
        assert!(gate.enter().await.is_none());
    }
}
