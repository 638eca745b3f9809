//! Scheduling, processors, memory nodes and personality of processes.
#![allow(unsafe_code)]
use std::io;

use super::check;

/// As `struct sched_attr` of Linux 5.3 and later.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
pub(crate) struct SchedulerAttributes {
    pub(crate) size: u32,
    pub(crate) policy: u32,
    pub(crate) flags: u64,
    pub(crate) nice: i32,
    pub(crate) priority: u32,
    pub(crate) runtime: u64,
    pub(crate) deadline: u64,
    pub(crate) period: u64,
    pub(crate) least_utilization: u32,
    pub(crate) most_utilization: u32,
}

/// sched_setattr(2).
pub(crate) fn set_scheduler(pid: u32, attributes: SchedulerAttributes) -> io::Result<()> {
    let attributes = SchedulerAttributes { size: size_of::<SchedulerAttributes>() as u32, ..attributes };
    // SAFETY: the structure has the kernel's layout, says its size, and is valid for the time of the call.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const attributes, 0) })?;
    Ok(())
}

/// ioprio_set(2).
pub(crate) fn set_io_priority(pid: u32, priority: u32) -> io::Result<()> {
    const OF_PROCESS: libc::c_int = 1;
    // SAFETY: integers only.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, OF_PROCESS, pid, priority) })?;
    Ok(())
}

/// personality(2) of this process.
pub(crate) fn set_personality(personality: u32) -> io::Result<()> {
    // SAFETY: an integer.
    check(libc::c_long::from(unsafe { libc::personality(libc::c_ulong::from(personality)) }))?;
    Ok(())
}

/// set_mempolicy(2) for this process, with a bit for each node.
pub(crate) fn set_memory_policy(mode: u32, nodes: &[u64]) -> io::Result<()> {
    // The kernel counts one bit less than it is given.
    let bits = if nodes.is_empty() { 0 } else { nodes.len() as u64 * 64 + 1 };
    let nodes = if nodes.is_empty() { std::ptr::null() } else { nodes.as_ptr() };
    // SAFETY: null without bits, or a pointer to as many as are read.
    check(unsafe { libc::syscall(libc::SYS_set_mempolicy, mode, nodes, bits) })?;
    Ok(())
}

/// Restricts this process to processors: a bit for each. Those that do not exist are ignored.
pub(crate) fn set_affinity(processors: &[u64]) -> io::Result<()> {
    // SAFETY: pointer and length describe the slice.
    check(unsafe { libc::syscall(libc::SYS_sched_setaffinity, 0, size_of_val(processors), processors.as_ptr()) })?;
    Ok(())
}
