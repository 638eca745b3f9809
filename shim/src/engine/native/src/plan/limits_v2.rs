//! Plans the limits of cgroup v2.
use oci_spec::runtime::{LinuxCpu, LinuxMemory, LinuxResources};

use super::limits_v1::{Limit, huge_pages, processes, rdma};
use super::{KEEP, Write, block_io};
use crate::Refused;

/// Files to write, each with its controller.
pub(super) fn plan(resources: &LinuxResources) -> Result<Vec<Limit>, Refused> {
    let mut limits = Vec::new();
    if let Some(memory) = resources.memory() {
        add_memory(memory, &mut limits)?;
    }
    if let Some(cpu) = resources.cpu() {
        add_cpu(cpu, &mut limits)?;
    }
    if let Some(pids) = resources.pids() {
        limits.push(("pids", write("pids.max", processes(pids.limit()))));
    }
    for page in resources.hugepage_limits().iter().flatten() {
        limits.extend(huge_pages(page, "max")?);
    }
    if let Some(block_io) = resources.block_io() {
        limits.extend(block_io::v2(block_io)?);
    }
    if resources
        .network()
        .as_ref()
        .is_some_and(|network| network.class_id().unwrap_or(0) != 0 || network.priorities().iter().flatten().next().is_some())
    {
        return Err(Refused::unsupported("linux.resources.network on cgroup v2"));
    }
    limits.extend(rdma(resources)?);
    add_unified(resources, &mut limits)?;
    Ok(limits)
}

/// Files that the configuration names itself: after the others, each line by itself.
fn add_unified(resources: &LinuxResources, limits: &mut Vec<Limit>) -> Result<(), Refused> {
    let mut files: Vec<(&String, &String)> = resources.unified().iter().flatten().collect();
    files.sort();
    for (file, lines) in files {
        let controller = CONTROLLERS.into_iter().find(|controller| file.split('.').next() == Some(controller));
        match controller {
            Some(controller) if !file.contains('/') => limits.extend(lines.lines().map(|line| (controller, write(file, line)))),
            Some(_) | None => return Err(Refused::invalid(format!("linux.resources.unified.{file}"), "is not a file of a controller")),
        }
    }
    Ok(())
}

fn write(file: &str, value: impl ToString) -> Write {
    Write { file: file.to_owned(), value: value.to_string(), ..Write::default() }
}

fn bytes(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.to_string() }
}

fn add_memory(memory: &LinuxMemory, limits: &mut Vec<Limit>) -> Result<(), Refused> {
    // There is neither a swappiness nor a switch of the OOM killer here: as with runc, they change nothing.
    let limit = memory.limit().filter(|limit| *limit != 0);
    if let Some(swap) = swap(limit, memory.swap().filter(|swap| *swap != 0))? {
        // First, so that what is over the limit of memory may still go there. A kernel without swap has no such file.
        let optional = swap <= 0;
        limits.push(("memory", Write { optional, ..write("memory.swap.max", bytes(swap)) }));
    }
    if let Some(limit) = limit {
        limits.push(("memory", write("memory.max", bytes(limit))));
    }
    if let Some(reservation) = memory.reservation().filter(|reservation| *reservation != 0) {
        limits.push(("memory", write("memory.low", bytes(reservation))));
    }
    Ok(())
}

/// The limit of swap alone: the specification's is one of memory and swap together, as cgroup v1's.
fn swap(limit: Option<i64>, both: Option<i64>) -> Result<Option<i64>, Refused> {
    let invalid = |why: &str| Err(Refused::invalid("linux.resources.memory.swap", why));
    match (limit, both) {
        (Some(..0), None) | (_, Some(..0)) => Ok(Some(-1)),
        (_, None) => Ok(None),
        (None | Some(..0), Some(_)) => invalid("needs a limit of memory"),
        (Some(limit), Some(both)) if both < limit => invalid("is memory and swap together and cannot be less than limit"),
        (Some(limit), Some(both)) => Ok(Some(both - limit)),
    }
}

fn add_cpu(cpu: &LinuxCpu, limits: &mut Vec<Limit>) -> Result<(), Refused> {
    if cpu.realtime_runtime().unwrap_or(0) != 0 || cpu.realtime_period().unwrap_or(0) != 0 {
        return Err(Refused::unsupported("linux.resources.cpu.realtimeRuntime and realtimePeriod on cgroup v2"));
    }
    if let Some(idle) = cpu.idle() {
        limits.push(("cpu", write("cpu.idle", idle)));
    }
    if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
        if shares > MAX_SHARES {
            return Err(Refused::invalid("linux.resources.cpu.shares", format!("{shares} is more than {MAX_SHARES}")));
        }
        limits.push(("cpu", write("cpu.weight", weight(shares))));
    }
    let quota = cpu.quota().filter(|quota| *quota != 0);
    let period = cpu.period().filter(|period| *period != 0);
    if quota.is_some() || period.is_some() {
        // In a new cgroup these are "max" and 100 ms.
        let quota = quota.map_or_else(|| KEEP.to_owned(), bytes);
        let period = period.map_or_else(|| KEEP.to_owned(), |period| period.to_string());
        limits.push(("cpu", write("cpu.max", format!("{quota} {period}"))));
    }
    if let Some(burst) = cpu.burst() {
        limits.push(("cpu", write("cpu.max.burst", burst)));
    }
    for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
        if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
            limits.push(("cpuset", write(file, value)));
        }
    }
    Ok(())
}

/// The weight for v1's shares: the curve through (2, 1), (1024, 100) and (262144, 10000), so that the default of one is the default of the other.
fn weight(shares: u64) -> u64 {
    if shares <= 2 {
        return 1;
    }
    let log = (shares as f64).log2();
    let exponent = (log * log + 125.0 * log) / 612.0 - 7.0 / 34.0;
    // 99.999… is 100, not what is above it.
    ((10_f64.powf(exponent) - 1e-9).ceil() as u64).clamp(1, 10_000)
}

const CONTROLLERS: [&str; 8] = ["cpu", "cpuset", "hugetlb", "io", "memory", "misc", "pids", "rdma"];
const MAX_SHARES: u64 = 262_144;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn weights_follow_the_curve() {
        let weights = [(1, 1), (2, 1), (10, 4), (100, 17), (512, 59), (1024, 100), (2048, 174), (10_000, 627), (262_144, 10_000)];
        for (shares, expected) in weights {
            assert_eq!(weight(shares), expected, "{shares}");
        }
    }

    #[test]
    fn swap_is_what_exceeds_memory() {
        for (limit, both, expected) in [
            (Some(10), Some(15), Some(5)),
            (Some(10), Some(10), Some(0)),
            (Some(10), Some(-1), Some(-1)),
            (Some(10), None, None),
            (Some(-1), None, Some(-1)),
            (None, Some(-1), Some(-1)),
            (None, None, None),
        ] {
            assert_eq!(swap(limit, both).expect("valid"), expected, "{limit:?} {both:?}");
        }
        assert!(swap(Some(10), Some(5)).is_err());
        assert!(swap(None, Some(5)).is_err());
        assert!(swap(Some(-1), Some(5)).is_err());
    }
}
