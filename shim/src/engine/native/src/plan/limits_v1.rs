//! Plans the limits of cgroup v1.
use oci_spec::runtime::{LinuxCpu, LinuxHugepageLimit, LinuxMemory, LinuxNetwork, LinuxResources};

use super::{Write, block_io};
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
    for page in resources.hugepage_limits().iter().flatten() {
        limits.0.extend(huge_pages(page, "limit_in_bytes")?);
    }
    if let Some(block_io) = resources.block_io() {
        limits.0.extend(block_io::v1(block_io)?);
    }
    if let Some(network) = resources.network() {
        limits.network(network)?;
    }
    limits.0.extend(rdma(resources)?);
    if resources.unified().as_ref().is_some_and(|unified| !unified.is_empty()) {
        return Err(Refused::invalid("linux.resources.unified", "needs cgroup v2 alone"));
    }
    Ok(limits.0)
}

/// A file with its controller.
pub(super) type Limit = (&'static str, Write);

/// The limit of processes. One that was given counts: 0 is the least that lets a process run.
pub(super) fn processes(limit: i64) -> String {
    if limit < 0 { "max".to_owned() } else { limit.max(1).to_string() }
}

/// The files of a size of huge pages: what is used, and, where the kernel has it, what is reserved.
pub(super) fn huge_pages(page: &LinuxHugepageLimit, suffix: &str) -> Result<[Limit; 2], Refused> {
    let size = page.page_size();
    // It becomes a part of a file's name.
    let unit = ["KB", "MB", "GB"].into_iter().find_map(|unit| size.strip_suffix(unit));
    if !unit.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())) {
        return Err(Refused::invalid("linux.resources.hugepageLimits[].pageSize", format!("{size:?} is not a size")));
    }
    let write = |file: String, optional| ("hugetlb", Write { file, value: page.limit().to_string(), optional, ..Write::default() });
    Ok([write(format!("hugetlb.{size}.{suffix}"), false), write(format!("hugetlb.{size}.rsvd.{suffix}"), true)])
}

/// The limits of devices for remote access to memory, which both versions of cgroups have in the same form.
pub(super) fn rdma(resources: &LinuxResources) -> Result<Vec<Limit>, Refused> {
    let mut limits = Vec::new();
    for (device, limit) in resources.rdma().iter().flatten() {
        check_word(device, "linux.resources.rdma")?;
        let values = [("hca_handle", limit.hca_handles()), ("hca_object", limit.hca_objects())];
        let line = |value: &dyn Fn(u32) -> String| {
            let given = values.iter().filter_map(|(name, limit)| limit.map(|limit| format!(" {name}={}", value(limit))));
            device.clone() + &given.collect::<String>()
        };
        if values.iter().any(|(_, limit)| limit.is_some()) {
            let reset = Some(line(&|_| "max".to_owned()));
            limits
                .push(("rdma", Write { file: "rdma.max".to_owned(), value: line(&|limit| limit.to_string()), reset, ..Write::default() }));
        }
    }
    limits.sort_by(|(_, one), (_, other)| one.value.cmp(&other.value));
    Ok(limits)
}

/// A name that is a part of a line.
fn check_word(name: &str, field: &str) -> Result<(), Refused> {
    if name.is_empty() || name.contains(|character: char| character.is_whitespace() || character.is_control()) {
        return Err(Refused::invalid(field, format!("{name:?} is not the name of a device")));
    }
    Ok(())
}

struct Limits(Vec<Limit>);

impl Limits {
    fn add(&mut self, controller: &'static str, file: &str, value: impl ToString) {
        self.0.push((controller, Write { file: file.to_owned(), value: value.to_string(), ..Write::default() }));
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
        // -1 is nothing, as for runc.
        if let Some(swappiness) = memory.swappiness().filter(|swappiness| *swappiness != u64::MAX) {
            if swappiness > 100 {
                return Err(Refused::invalid("linux.resources.memory.swappiness", format!("{swappiness} is not between 0 and 100")));
            }
            self.add("memory", "memory.swappiness", swappiness);
        }
        Ok(())
    }

    fn cpu(&mut self, cpu: &LinuxCpu) -> Result<(), Refused> {
        if let Some(idle) = cpu.idle() {
            self.add("cpu", "cpu.idle", idle);
        }
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
        if let Some(period) = cpu.realtime_period().filter(|period| *period != 0) {
            self.add("cpu", "cpu.rt_period_us", period);
        }
        if let Some(runtime) = cpu.realtime_runtime().filter(|runtime| *runtime != 0) {
            self.add("cpu", "cpu.rt_runtime_us", runtime);
        }
        for (file, value) in [("cpuset.cpus", cpu.cpus()), ("cpuset.mems", cpu.mems())] {
            if let Some(value) = value.as_ref().filter(|value| !value.is_empty()) {
                self.add("cpuset", file, value);
            }
        }
        Ok(())
    }
    fn network(&mut self, network: &LinuxNetwork) -> Result<(), Refused> {
        if let Some(class) = network.class_id().filter(|class| *class != 0) {
            self.add("net_cls", "net_cls.classid", class);
        }
        for priority in network.priorities().iter().flatten() {
            check_word(priority.name(), "linux.resources.network.priorities[].name")?;
            let (file, reset) = ("net_prio.ifpriomap".to_owned(), Some(format!("{} 0", priority.name())));
            let value = format!("{} {}", priority.name(), priority.priority());
            self.0.push(("net_prio", Write { file, value, reset, ..Write::default() }));
        }
        Ok(())
    }
}
