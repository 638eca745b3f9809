//! What makes one process the only one that changes the store, while another takes over from it.
//!
//! ```text
//! open ──close: those inside leave, others wait──▶ closed ──▶ retired: nobody enters any more
//!   ▲────────────────────the successor failed─────────┘
//! ```
//! A step takes a pass, not a call: what waits for a shim has none, so that an upgrade waits for no shim. After such a wait a call enters again
//! for its next step. When another process has taken over meanwhile, the call ends with [`Error::Retired`] and its client makes it again there.
//!
//! **Invariant:** what changes the store has a [`Pass`], and waits for nothing but the disk while it has; so between close and open nothing changes.

use std::time::Duration;

use tokio::sync::watch;

use crate::error::{Error, Result};

/// The gate.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gate {
    state: watch::Sender<State>,
    /// One of its own, as every open stream waits for it.
    retired: watch::Sender<bool>,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// How many passes are out.
    inside: usize,
    /// How many calls are under way that are carried to their end.
    carried: usize,
    is_closed: bool,
    is_retired: bool,
}

/// The right to change something, for as long as it is held.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Gate,
}

/// A call that is under way.
#[derive(Debug)]
pub(crate) struct Carried {
    gate: Gate,
}

/// Nobody enters any more, for as long as it is held.
#[derive(Debug)]
pub(crate) struct Closed {
    gate: Gate,
}

impl Gate {
    /// Waits while it is closed.
    ///
    /// Errors: [`Error::Retired`] when it will never open again.
    pub(crate) async fn enter(&self) -> Result<Pass> {
        let mut changes = self.state.subscribe();
        loop {
            let entered = self.state.send_if_modified(|state| {
                let enters = !state.is_closed && !state.is_retired;
                state.inside += usize::from(enters);
                enters
            });
            if entered {
                return Ok(Pass { gate: self.clone() });
            }
            // the sender is part of the gate
            let state = *changes.wait_for(|state| state.is_retired || !state.is_closed).await.map_err(|_| Error::Retired)?;
            if state.is_retired {
                return Err(Error::Retired);
            }
        }
    }

    /// Counts a call as under way until what is returned is dropped: one that is to end by itself before this process does.
    pub(crate) fn carry(&self) -> Carried {
        self.state.send_modify(|state| state.carried += 1);
        Carried { gate: self.clone() }
    }

    /// Waits until no call is under way that is to be carried to its end.
    pub(crate) async fn carried(&self) {
        // the sender is part of the gate
        let _ = self.state.subscribe().wait_for(|state| state.carried == 0).await;
    }

    /// Lets nobody in any more and waits for those inside; none when they take longer than `limit`, and it is open again. To be closed by one at a
    /// time.
    pub(crate) async fn close(&self, limit: Duration) -> Option<Closed> {
        self.state.send_modify(|state| state.is_closed = true);
        let closed = Closed { gate: self.clone() };
        let mut changes = self.state.subscribe();
        let left = tokio::time::timeout(limit, changes.wait_for(|state| state.inside == 0)).await;
        left.is_ok().then_some(closed)
    }

    /// Turns everybody away for good.
    pub(crate) fn retire(&self) {
        self.state.send_modify(|state| state.is_retired = true);
        self.retired.send_replace(true);
    }

    /// Whether it was retired.
    pub(crate) fn is_retired(&self) -> bool {
        *self.retired.borrow()
    }

    /// Waits until it is retired.
    pub(crate) async fn retired(&self) {
        // the sender is part of the gate
        let _ = self.retired.subscribe().wait_for(|retired| *retired).await;
    }
}

impl Drop for Pass {
    fn drop(&mut self) {
        self.gate.state.send_modify(|state| state.inside -= 1);
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.gate.state.send_modify(|state| state.carried -= 1);
    }
}

impl Drop for Closed {
    fn drop(&mut self) {
        self.gate.state.send_modify(|state| state.is_closed = false);
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
        assert!(timeout(MOMENT, gate.enter()).await.expect("open again").is_ok());
    }

    #[tokio::test]
    async fn a_call_that_waits_at_a_retiring_gate_is_refused() {
        let gate = Gate::default();
        let closed = gate.close(MOMENT).await.expect("nobody is inside");
        let waiting = tokio::spawn({
            let gate = gate.clone();
            async move { matches!(gate.enter().await, Err(Error::Retired)) }
        });
        tokio::task::yield_now().await;
        gate.retire();
        assert!(waiting.await.expect("no panic"));
        drop(closed);
        assert!(matches!(gate.enter().await, Err(Error::Retired)));
    }
}
