//! The crash of a shim, as the end of its connection shows it.

use std::sync::Arc;

use log::warn;

use super::end::Left;
use super::{Phase, Shim, Task, Tasks};

impl Tasks {
    /// Waits for the end of a live shim, and cleans up after one that nobody has sent away.
    pub(super) async fn watch(self: Arc<Self>, task: Arc<Task>, shim: Shim) {
        tokio::select! {
            () = shim.closed() => {}
            () = task.left() => return,
        }
        // whoever has a pass may wait for the end of this task
        let Some(pass) = self.gate.follow().await else {
            // another process sees to it
            return;
        };
        // a client's Delete may have begun at the same moment
        if task.leaves_live(Phase::Cleaning(None)) {
            drop(pass);
            warn!(namespace:% = task.namespace, container = task.id.as_str(); "a shim has ended");
            self.clean_up(&task, Left::Dead).await;
        }
    }
}
