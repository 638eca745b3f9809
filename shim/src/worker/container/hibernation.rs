//! Hibernation: whether the worker may exit until the next request or exit.
use std::rc::Rc;

use super::{Container, Shared};
use crate::cgroup::Cgroup;
use crate::worker::phase::Phase;

/// Whether the worker may exit until the next request, exit or OOM kill. Its OOM watches go to the keeper.
///
/// A worker that pumps outputs into files may not, nor one with an unpublished OOM kill.
pub(in crate::worker) fn may_hibernate(shared: &Shared) -> bool {
    shared.registry.all().iter().all(|container| hand_over(shared, container))
}

fn hand_over(shared: &Shared, container: &Rc<Container>) -> bool {
    let record = container.record();
    if !container.attachments.borrow().pumps.is_empty() {
        return false;
    }
    let has_ended = matches!(record.init.phase, Phase::Exited(_));
    if has_ended || record.cgroup == Cgroup::default() {
        return true;
    }
    // Where the cgroup cannot be watched now, this worker's own watch may work.
    let Ok(watch) = record.cgroup.watch_oom() else { return container.attachments.borrow().oom.is_none() };
    let descriptors = watch.into_descriptors();
    // An OOM kill before this watch must be published by this worker.
    let is_told = record.cgroup.oom_kills().is_none_or(|kills| kills <= record.oom_kills);
    is_told && descriptors.iter().all(|descriptor| shared.link.watch(descriptor))
}
