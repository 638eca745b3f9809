//! Sets how a process is scheduled, and where.
use super::{Doing, Failure, Step, failure};
use crate::plan::{MAX_NODES, MAX_PROCESSORS, Process, Range, Scheduler};
use crate::sys::{self, SchedulerAttributes};

/// Sets the scheduler and the I/O priority of the process that is `pid` here. By the performer: in a user namespace a process has no privileges for it.
pub(super) fn schedule(pid: u32, process: &Process) -> Result<(), Failure> {
    let wanted = &process.scheduling;
    if let Some(scheduler) = &wanted.scheduler {
        sys::set_scheduler(pid, attributes(scheduler)).map_err(|error| {
            // The kernel's reason for a deadline, whose guarantee is for all processors.
            let why =
                if error.raw_os_error() == Some(libc::EPERM) { " (it can't be used together with a choice of processors)" } else { "" };
            failure(Step::Settings, format!("error setting scheduler{why}"), error)
        })?;
    }
    if let Some(priority) = wanted.io_priority {
        sys::set_io_priority(pid, priority).doing(Step::Settings, || "failed to set io priority".to_owned())?;
    }
    Ok(())
}

/// Sets the personality and the memory policy of this process. Before the filter, which may forbid it.
pub(super) fn choose_memory(process: &Process) -> Result<(), Failure> {
    let wanted = &process.scheduling;
    if let Some(personality) = wanted.personality {
        sys::set_personality(personality).doing(Step::Settings, || "set the personality".to_owned())?;
    }
    if let Some(policy) = &wanted.memory_policy {
        let nodes = if policy.nodes.is_empty() { Vec::new() } else { bits(&policy.nodes, MAX_NODES) };
        sys::set_memory_policy(policy.mode, &nodes).doing(Step::Settings, || "set the memory policy".to_owned())?;
    }
    Ok(())
}

/// Before the cgroup is joined: the processors of an added process, if it has a choice for that time.
pub(super) fn choose_first_processors(process: &Process) -> Result<(), Failure> {
    match process.scheduling.affinity.as_ref().and_then(|affinity| affinity.initial.as_ref()) {
        Some(initial) => choose(initial),
        None => Ok(()),
    }
}

/// Once the cgroup is joined: with no choice at all every processor that it allows, since the shim's own choice is not to be inherited.
pub(super) fn choose_processors(process: &Process) -> Result<(), Failure> {
    let affinity = process.scheduling.affinity.as_ref();
    match affinity.and_then(|affinity| affinity.last.as_ref()) {
        Some(last) => choose(last),
        None if affinity.is_some() => Ok(()),
        None => allow_every_processor(),
    }
}

/// Every processor that the cgroup allows.
pub(super) fn allow_every_processor() -> Result<(), Failure> {
    choose(&[(0, MAX_PROCESSORS - 1)])
}

fn choose(processors: &[Range]) -> Result<(), Failure> {
    sys::set_affinity(&bits(processors, MAX_PROCESSORS)).doing(Step::Settings, || format!("allow processors {processors:?}"))
}

fn attributes(scheduler: &Scheduler) -> SchedulerAttributes {
    let Scheduler { policy, flags, nice, priority, runtime, deadline, period } = *scheduler;
    SchedulerAttributes { policy, flags, nice, priority, runtime, deadline, period, ..SchedulerAttributes::default() }
}

/// A bit for each number. A plan has none at or above `end`; one that has is cut.
fn bits(ranges: &[Range], end: u32) -> Vec<u64> {
    let mut words = vec![0; end as usize / 64];
    for (first, last) in ranges {
        for number in *first..=(*last).min(end - 1) {
            words[number as usize / 64] |= 1 << (number % 64);
        }
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_bits() {
        assert_eq!(bits(&[(0, 1), (63, 64), (200, u32::MAX)], 128), [1 << 63 | 3, 1]);
    }
}
