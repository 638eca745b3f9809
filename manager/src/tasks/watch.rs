//! The crash of a shim, as the end of its connection shows it.

use std::sync::Arc;

use log::warn;

use super::end::Left;
use super::{Fact, Shim, Task, Tasks};

impl Tasks {
    /// Waits for a live shim to exit, and cleans up unless it was asked to.
    pub(super) async fn watch(self: Arc<Self>, task: Arc<Task>, shim: Shim) {
        tokio::select! {
            () = shim.closed() => {}
            () = task.left() => return,
        }
        // a client's Delete may have begun at the same moment
        if task.observe(Fact::ShimGone) {
            warn!(namespace:% = task.namespace, container = task.id.as_str(); "a shim has crashed");
            // otherwise another process has taken over
            if let Ok(claim) = self.claim(&task).await {
                self.clean_up(&task, Left::Dead, claim).await;
            }
        }
    }
}
