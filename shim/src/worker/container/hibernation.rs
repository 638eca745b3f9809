//! Whether a worker is needed while nothing is asked of it.
use std::rc::Rc;

use super::{Container, Phase};
use crate::cgroup::Cgroup;
use crate::worker::Worker;

/// Whether the worker may end until something is asked or told. What it watches for want of memory goes to the keeper.
///
/// A worker that moves outputs into files may not, nor one that has something to tell.
pub(in crate::worker) fn may_hibernate(worker: &Worker) -> bool {
    worker.registry.all().iter().all(|container| hand_over(worker, container))
}

fn hand_over(worker: &Worker, container: &Rc<Container>) -> bool {
    let record = container.record();
    if !container.attachments.borrow().pumps.is_empty() {
        return false;
    }
    let has_ended = matches!(record.init.phase, Phase::Exited(_));
    if has_ended || record.cgroup == Cgroup::default() {
        return true;
    }
    // Where it cannot be watched now, this worker may be the one who can.
    let Ok(watch) = record.cgroup.watch_oom() else { return container.attachments.borrow().oom.is_none() };
    let descriptors = watch.into_descriptors();
    // What came before this watch must be told by this worker.
    let is_told = record.cgroup.oom_kills().is_none_or(|kills| kills <= record.oom_kills);
    is_told && descriptors.iter().all(|descriptor| worker.link.watch(descriptor))
}
