//! Plans the limits of cgroup v1.
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::Write;
use crate::Refused;

/// Files to write, each with its controller.
pub(super) fn plan(resources: &LinuxResources) -> Result<Vec<Limit>, Refused> {
    let mut limits = Limits(Vec::new());
    if let Some(memory) = resources.memory() {
        limits.memory(memory)?;
    }
    if let Some(cpu) = resources.cpu() {
        limits.cpu(cpu)?;
    }
    if let Some(pids) = resources.pids() {
        limits.add("pids", "pids.max", processes(pids.limit()));
    }
    Ok(limits.0)
}

/// A file with its controller.
pub(super) type Limit = (&'static str, Write);

/// The limit of processes. One that was given counts: 0 is the least that lets a process run.
pub(super) fn processes(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.max(1).to_string() }
}

struct Limits(Vec<Limit>);

impl Limits {
    fn add(&mut self, controller: &'static str, file: &str, value: impl ToString) {
        self.0.push((controller, Write { file: file.to_owned(), value: value.to_string(), optional: false }));
    }

    fn memory(&mut self, memory: &LinuxMemory) -> Result<(), Refused> {
        let limit = memory.limit().filter(|limit| *limit != 0);
        let mut swap = memory.swap().filter(|swap| *swap != 0);
        if limit == Some(-1) {
            swap = swap.or(Some(-1));
        }
        if let (Some(limit), Some(swap)) = (limit, swap)
            && swap > 0
            && swap < limit
        {
            return Err(Refused::invalid("linux.resources.memory.swap", "is memory and swap together and cannot be less than limit"));
        }
        // The new folder has no limits, so that the one of memory and swap together can come second.
        if let Some(limit) = limit {
            self.add("memory", "memory.limit_in_bytes", limit);
        }
        if let Some(swap) = swap {
            self.add("memory", "memory.memsw.limit_in_bytes", swap);
        }
        if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
            self.add("memory", "memory.soft_limit_in_bytes", reservation);
        }
        if memory.disable_oom_killer() == Some(true) {
            self.add("memory", "memory.oom_control", 1);
        }
        if let Some(swappiness) = memory.swappiness() {
            if swappiness > 100 {
                return Err(Refused::invalid("linux.resources.memory.swappiness", format!("{swappiness} is not between 0 and 100")));
            }
            self.add("memory", "memory.swappiness", swappiness);
        }
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<(), Refused> {
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            if !(2..=262_144).contains(&shares) {
                return Err(Refused::invalid("linux.resources.cpu.shares", format!("{shares} is not between 2 and 262144")));
            }
            self.add("cpu", "cpu.shares", shares);
        }
        // A burst may not exceed the quota; both begin at nothing.
        if let Some(period) = cpu.period().filter(|period| *period != 0) {
            self.add("cpu", "cpu.cfs_period_us", period);
        }
        if let Some(quota) = cpu.quota().filter(|quota| *quota != 0) {
            self.add("cpu", "cpu.cfs_quota_us", quota);
        }
        if let Some(burst) = cpu.burst() {
            self.add("cpu", "cpu.cfs_burst_us", burst);
        }
        for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
                self.add("cpuset", file, value);
            }
        }
        Ok(())
    }
}
