//! The gate: ensures that only one process changes the store while another takes over.
//!
//! ```text
//! open ──close: passes are returned, others wait──▶ closed ──▶ retired: no pass is granted
//!   ▲────────────────────the successor failed──────────┘
//! ```
//! A pass covers one step, not a whole call: no pass is held while waiting for a shim, so that an upgrade waits for no shim. After such a wait
//! the call enters again. If another process has taken over meanwhile, the call fails with [`Error::Retired`] and its client retries it there.
//!
//! **Invariant:** every change of the store holds a [`Pass`], and waits only for the disk while it does; so between close and open nothing changes.

use std::time::Duration;

use tokio::sync::watch;

use crate::error::{Error, Result};

/// The gate.
#[derive(Debug, Clone, Default)]
pub(crate) struct Gate {
    state: watch::Sender<State>,
    /// A channel of its own, as every open stream waits for it.
    retired: watch::Sender<bool>,
}

#[derive(Debug, Clone, Copy, Default)]
struct State {
    /// How many passes are out.
    inside: usize,
    /// How many calls in progress must run to completion.
    carried: usize,
    /// How many streams are open that may outlive this process' service.
    streams: usize,
    is_closed: bool,
    is_retired: bool,
    /// By another process, which serves.
    is_succeeded: bool,
}

/// The permission to change the store, while it is held.
#[derive(Debug)]
pub(crate) struct Pass {
    gate: Gate,
}

/// A call in progress that must run to completion.
#[derive(Debug)]
pub(crate) struct Carried {
    gate: Gate,
}

/// A stream that may outlive this process' service.
#[derive(Debug)]
pub(crate) struct Open {
    gate: Gate,
}

/// Keeps the gate closed while it is held.
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

    /// Counts a call that must complete before this process exits, until the returned value is dropped.
    pub(crate) fn carry(&self) -> Carried {
        self.state.send_modify(|state| state.carried += 1);
        Carried { gate: self.clone() }
    }

    /// Waits until all such calls have completed.
    pub(crate) async fn carried(&self) {
        // the sender is part of the gate
        let _ = self.state.subscribe().wait_for(|state| state.carried == 0).await;
    }

    /// Counts a stream whose client would not repeat it, until the returned value is dropped: this process exits when it has ended.
    pub(crate) fn stream(&self) -> Open {
        self.state.send_modify(|state| state.streams += 1);
        Open { gate: self.clone() }
    }

    /// Waits until there are no such streams.
    pub(crate) async fn streamed(&self) {
        // the sender is part of the gate
        let _ = self.state.subscribe().wait_for(|state| state.streams == 0).await;
    }

    /// Closes the gate and waits until all passes are returned; none when that takes longer than `limit`, and the gate is open again. Only one
    /// caller may close it at a time.
    pub(crate) async fn close(&self, limit: Duration) -> Option<Closed> {
        self.state.send_modify(|state| state.is_closed = true);
        let closed = Closed { gate: self.clone() };
        let mut changes = self.state.subscribe();
        let left = tokio::time::timeout(limit, changes.wait_for(|state| state.inside == 0)).await;
        left.is_ok().then_some(closed)
    }

    /// Refuses everyone from now on, as another process serves.
    pub(crate) fn succeed(&self) {
        self.state.send_modify(|state| state.is_succeeded = true);
        self.retire();
    }

    /// Whether another process serves.
    pub(crate) fn is_succeeded(&self) -> bool {
        self.state.borrow().is_succeeded
    }

    /// Refuses everyone from now on.
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

impl Drop for Open {
    fn drop(&mut self) {
        self.gate.state.send_modify(|state| state.streams -= 1);
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
        assert!(gate.close(MOMENT).await.is_none(), "a pass is out");
        let second = timeout(MOMENT, gate.enter()).await.expect("open again");
        drop((inside, second));
        let closed = gate.close(MOMENT).await.expect("no pass is out");
        assert!(timeout(MOMENT, gate.enter()).await.is_err(), "closed");
        drop(closed);
        assert!(timeout(MOMENT, gate.enter()).await.expect("open again").is_ok());
    }

    #[tokio::test]
    async fn a_call_that_waits_at_a_retiring_gate_is_refused() {
        let gate = Gate::default();
        let closed = gate.close(MOMENT).await.expect("no pass is out");
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
