//! Metrics of cgroup v1, as `io.containerd.cgroups.v1.Metrics`.
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use containerd_shim_protos::cgroups::metrics::{
    BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl, MemoryStat, Metrics, PidsStat, RdmaEntry,
    RdmaStat, Throttle,
};
use protobuf::MessageField;

use super::files;

type Folders = BTreeMap<String, PathBuf>;

/// The metrics of the controllers. A missing controller is left out.
pub(super) fn metrics(folders: &Folders) -> Metrics {
    let folder = |name: &str| folders.get(name).map(PathBuf::as_path).filter(|folder| folder.is_dir());
    Metrics {
        hugetlb: folder("hugetlb").map(hugetlb).unwrap_or_default(),
        pids: folder("pids").map(pids).into(),
        cpu: cpu(folder("cpu"), folder("cpuacct")).into(),
        memory: folder("memory").and_then(memory).into(),
        blkio: folder("blkio").map(blkio).into(),
        rdma: folder("rdma").map(rdma).into(),
        memory_oom_control: folder("memory").and_then(oom_control).into(),
        ..Default::default()
    }
}

fn hugetlb(folder: &Path) -> Vec<HugetlbStat> {
    let number = |size: &str, what: &str| files::number(folder, &format!("hugetlb.{size}.{what}"));
    let stat = |size: String| {
        Some(HugetlbStat {
            usage: number(&size, "usage_in_bytes")?,
            max: number(&size, "max_usage_in_bytes")?,
            failcnt: number(&size, "failcnt")?,
            pagesize: size,
            ..Default::default()
        })
    };
    files::huge_page_sizes().into_iter().filter_map(stat).collect()
}

fn pids(folder: &Path) -> PidsStat {
    let number = |name| files::number(folder, name).unwrap_or(0);
    // Without a limit, v1 shows 0.
    let limit = Some(number("pids.max")).filter(|limit| *limit != u64::MAX).unwrap_or(0);
    PidsStat { current: number("pids.current"), limit, ..Default::default() }
}

fn cpu(cpu: Option<&Path>, cpuacct: Option<&Path>) -> Option<CPUStat> {
    let throttling = cpu.and_then(|folder| files::read(folder, "cpu.stat")).map(|text| Throttle {
        periods: files::value(&text, "nr_periods"),
        throttled_periods: files::value(&text, "nr_throttled"),
        throttled_time: files::value(&text, "throttled_time"),
        ..Default::default()
    });
    let usage = cpuacct.and_then(|folder| {
        let stat = files::read(folder, "cpuacct.stat")?;
        let nanos = |key| files::value(&stat, key).saturating_mul(NANOS_PER_TICK);
        let per_cpu = files::read(folder, "cpuacct.usage_percpu").unwrap_or_default();
        Some(CPUUsage {
            total: files::number(folder, "cpuacct.usage")?,
            kernel: nanos("system"),
            user: nanos("user"),
            per_cpu: per_cpu.split_ascii_whitespace().map(files::to_number).collect(),
            ..Default::default()
        })
    });
    // containerd and kubelet read both without checking for their presence.
    (usage.is_some() || throttling.is_some()).then(|| CPUStat {
        usage: MessageField::some(usage.unwrap_or_default()),
        throttling: MessageField::some(throttling.unwrap_or_default()),
        ..Default::default()
    })
}

fn memory(folder: &Path) -> Option<MemoryStat> {
    let text = files::read(folder, "memory.stat")?;
    let stat = |key| files::value(&text, key);
    let entry = |module: &str| {
        let number = |what: &str| files::number(folder, &format!("memory{module}.{what}")).unwrap_or(0);
        MessageField::some(MemoryEntry {
            limit: number("limit_in_bytes"),
            usage: number("usage_in_bytes"),
            max: number("max_usage_in_bytes"),
            failcnt: number("failcnt"),
            ..Default::default()
        })
    };
    Some(MemoryStat {
        cache: stat("cache"),
        rss: stat("rss"),
        rss_huge: stat("rss_huge"),
        mapped_file: stat("mapped_file"),
        dirty: stat("dirty"),
        writeback: stat("writeback"),
        pg_pg_in: stat("pgpgin"),
        pg_pg_out: stat("pgpgout"),
        pg_fault: stat("pgfault"),
        pg_maj_fault: stat("pgmajfault"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        hierarchical_memory_limit: stat("hierarchical_memory_limit"),
        hierarchical_swap_limit: stat("hierarchical_memsw_limit"),
        total_cache: stat("total_cache"),
        total_rss: stat("total_rss"),
        total_rss_huge: stat("total_rss_huge"),
        total_mapped_file: stat("total_mapped_file"),
        total_dirty: stat("total_dirty"),
        total_writeback: stat("total_writeback"),
        total_pg_pg_in: stat("total_pgpgin"),
        total_pg_pg_out: stat("total_pgpgout"),
        total_pg_fault: stat("total_pgfault"),
        total_pg_maj_fault: stat("total_pgmajfault"),
        total_inactive_anon: stat("total_inactive_anon"),
        total_active_anon: stat("total_active_anon"),
        total_inactive_file: stat("total_inactive_file"),
        total_active_file: stat("total_active_file"),
        total_unevictable: stat("total_unevictable"),
        usage: entry(""),
        swap: entry(".memsw"),
        kernel: entry(".kmem"),
        kernel_tcp: entry(".kmem.tcp"),
        ..Default::default()
    })
}

fn oom_control(folder: &Path) -> Option<MemoryOomControl> {
    let text = files::read(folder, "memory.oom_control")?;
    Some(MemoryOomControl {
        oom_kill_disable: files::value(&text, "oom_kill_disable"),
        under_oom: files::value(&text, "under_oom"),
        oom_kill: files::value(&text, "oom_kill"),
        ..Default::default()
    })
}

/// Kernels with the CFQ scheduler have their own files, all others count where they throttle.
fn blkio(folder: &Path) -> BlkIOStat {
    let entries = |name: &str| files::read(folder, &format!("blkio.{name}")).map(|text| blkio_entries(&text)).unwrap_or_default();
    let mut stat = BlkIOStat {
        io_service_bytes_recursive: entries("io_service_bytes_recursive"),
        io_serviced_recursive: entries("io_serviced_recursive"),
        io_queued_recursive: entries("io_queued_recursive"),
        io_service_time_recursive: entries("io_service_time_recursive"),
        io_wait_time_recursive: entries("io_wait_time_recursive"),
        io_merged_recursive: entries("io_merged_recursive"),
        io_time_recursive: entries("time_recursive"),
        sectors_recursive: entries("sectors_recursive"),
        ..Default::default()
    };
    if stat == BlkIOStat::default() {
        let throttled = |name: &str| {
            let whole = entries(&format!("throttle.{name}_recursive"));
            if whole.is_empty() { entries(&format!("throttle.{name}")) } else { whole }
        };
        stat.io_serviced_recursive = throttled("io_serviced");
        stat.io_service_bytes_recursive = throttled("io_service_bytes");
    }
    stat
}

/// `254:0 Read 4096`, or `254:0 4096`; `Total 4096` at the end.
fn blkio_entries(text: &str) -> Vec<BlkIOEntry> {
    let entry = |line: &str| {
        let words: Vec<&str> = line.split([' ', ':']).collect();
        let (major, minor, op, value) = match words[..] {
            [major, minor, value] => (major, minor, "", value),
            [major, minor, op, value] => (major, minor, op, value),
            _ => return None,
        };
        let (major, minor, value) = (major.parse().ok()?, minor.parse().ok()?, value.parse().ok()?);
        Some(BlkIOEntry { op: op.to_owned(), device: device(major, minor), major, minor, value, ..Default::default() })
    };
    text.lines().filter_map(entry).collect()
}

/// The device's path, or nothing.
fn device(major: u64, minor: u64) -> String {
    let link = Path::new("/sys/dev/block").join(format!("{major}:{minor}")).read_link();
    link.ok().and_then(|link| Some(format!("/dev/{}", link.file_name()?.to_str()?))).unwrap_or_default()
}

fn rdma(folder: &Path) -> RdmaStat {
    let entries = |name| {
        let text = files::read(folder, name).unwrap_or_default();
        let entry = |(device, hca_handles, hca_objects)| RdmaEntry { device, hca_handles, hca_objects, ..Default::default() };
        files::rdma_lines(&text).map(entry).collect()
    };
    RdmaStat { current: entries("rdma.current"), limit: entries("rdma.max"), ..Default::default() }
}

/// The kernel shows times of cpuacct in hundredths of a second (USER_HZ) on every architecture that matters here.
const NANOS_PER_TICK: u64 = 10_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_devices_are_read_in_both_forms() {
        let entries = blkio_entries("999:1 Read 4096\n999:1 7\nTotal 4103\n\nx:1 Read 1\n");
        let read: Vec<_> = entries.iter().map(|e| (e.major, e.minor, e.op.as_str(), e.value, e.device.as_str())).collect();
        assert_eq!(read, [(999, 1, "Read", 4096, ""), (999, 1, "", 7, "")]);
    }

    #[test]
    fn a_cgroup_that_is_gone_has_no_metrics() {
        let folders = ["memory", "cpu", "cpuacct", "pids", "blkio"].map(|name| (name.to_owned(), "/nonexistent".into())).into();
        assert_eq!(metrics(&folders), Metrics::default());
    }
}
