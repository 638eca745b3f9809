//! Metrics of cgroup v2, as `io.containerd.cgroups.v2.Metrics`.
use std::path::Path;

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData, PSIStats, PidsStat, RdmaEntry, RdmaStat,
};

use super::files;

/// The metrics of the controllers. A disabled controller is left out.
pub(super) fn metrics(folder: &Path) -> Metrics {
    if !folder.is_dir() {
        return Metrics::default();
    }
    Metrics {
        pids: pids(folder).into(),
        cpu: cpu(folder).into(),
        memory: memory(folder).into(),
        rdma: rdma(folder).into(),
        io: io(folder).into(),
        hugetlb: hugetlb(folder),
        memory_events: memory_events(folder).into(),
        ..Default::default()
    }
}

fn pids(folder: &Path) -> Option<PidsStat> {
    let current = files::number(folder, "pids.current")?;
    Some(PidsStat { current, limit: files::number(folder, "pids.max").unwrap_or(0), ..Default::default() })
}

fn cpu(folder: &Path) -> Option<CPUStat> {
    let text = files::read(folder, "cpu.stat")?;
    let stat = |key| files::value(&text, key);
    Some(CPUStat {
        usage_usec: stat("usage_usec"),
        user_usec: stat("user_usec"),
        system_usec: stat("system_usec"),
        nr_periods: stat("nr_periods"),
        nr_throttled: stat("nr_throttled"),
        throttled_usec: stat("throttled_usec"),
        psi: pressure(folder, "cpu.pressure").into(),
        nr_bursts: stat("nr_bursts"),
        burst_usec: stat("burst_usec"),
        ..Default::default()
    })
}

fn memory(folder: &Path) -> Option<MemoryStat> {
    let text = files::read(folder, "memory.stat")?;
    let stat = |key: &str| files::value(&text, key);
    let number = |name| files::number(folder, name).unwrap_or(0);
    // Since Linux 5.9 these are counted separately for anonymous memory and files.
    let workingset = |key: &str| match stat(key) {
        0 => stat(&format!("{key}_anon")).saturating_add(stat(&format!("{key}_file"))),
        both => both,
    };
    Some(MemoryStat {
        anon: stat("anon"),
        file: stat("file"),
        kernel_stack: stat("kernel_stack"),
        slab: stat("slab"),
        sock: stat("sock"),
        shmem: stat("shmem"),
        file_mapped: stat("file_mapped"),
        file_dirty: stat("file_dirty"),
        file_writeback: stat("file_writeback"),
        anon_thp: stat("anon_thp"),
        inactive_anon: stat("inactive_anon"),
        active_anon: stat("active_anon"),
        inactive_file: stat("inactive_file"),
        active_file: stat("active_file"),
        unevictable: stat("unevictable"),
        slab_reclaimable: stat("slab_reclaimable"),
        slab_unreclaimable: stat("slab_unreclaimable"),
        pgfault: stat("pgfault"),
        pgmajfault: stat("pgmajfault"),
        workingset_refault: workingset("workingset_refault"),
        workingset_activate: workingset("workingset_activate"),
        workingset_nodereclaim: stat("workingset_nodereclaim"),
        pgrefill: stat("pgrefill"),
        pgscan: stat("pgscan"),
        pgsteal: stat("pgsteal"),
        pgactivate: stat("pgactivate"),
        pgdeactivate: stat("pgdeactivate"),
        pglazyfree: stat("pglazyfree"),
        pglazyfreed: stat("pglazyfreed"),
        thp_fault_alloc: stat("thp_fault_alloc"),
        thp_collapse_alloc: stat("thp_collapse_alloc"),
        usage: number("memory.current"),
        usage_limit: number("memory.max"),
        swap_usage: number("memory.swap.current"),
        swap_limit: number("memory.swap.max"),
        max_usage: number("memory.peak"),
        swap_max_usage: number("memory.swap.peak"),
        psi: pressure(folder, "memory.pressure").into(),
        ..Default::default()
    })
}

fn memory_events(folder: &Path) -> Option<MemoryEvents> {
    let text = files::read(folder, "memory.events")?;
    let stat = |key| files::value(&text, key);
    Some(MemoryEvents {
        low: stat("low"),
        high: stat("high"),
        max: stat("max"),
        oom: stat("oom"),
        oom_kill: stat("oom_kill"),
        oom_group_kill: stat("oom_group_kill"),
        ..Default::default()
    })
}

fn io(folder: &Path) -> Option<IOStat> {
    let usage = io_entries(&files::read(folder, "io.stat")?);
    Some(IOStat { usage, psi: pressure(folder, "io.pressure").into(), ..Default::default() })
}

/// `254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`
fn io_entries(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let mut words = line.split_ascii_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let mut entry = IOEntry { major: major.parse().ok()?, minor: minor.parse().ok()?, ..Default::default() };
        let mut is_empty = true;
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            is_empty = false;
            match key {
                "rbytes" => entry.rbytes = files::to_number(value),
                "wbytes" => entry.wbytes = files::to_number(value),
                "rios" => entry.rios = files::to_number(value),
                "wios" => entry.wios = files::to_number(value),
                _ => {}
            }
        }
        // Some kernels list devices without values.
        (!is_empty).then_some(entry)
    };
    text.lines().filter_map(entry).collect()
}

fn rdma(folder: &Path) -> Option<RdmaStat> {
    let entries = |text: &str| {
        let entry = |(device, hca_handles, hca_objects)| RdmaEntry { device, hca_handles, hca_objects, ..Default::default() };
        files::rdma_lines(text).map(entry).collect()
    };
    let current = entries(&files::read(folder, "rdma.current")?);
    Some(RdmaStat { current, limit: entries(&files::read(folder, "rdma.max").unwrap_or_default()), ..Default::default() })
}

fn hugetlb(folder: &Path) -> Vec<HugeTlbStat> {
    let stat = |size: String| {
        let file = |what: &str| format!("hugetlb.{size}.{what}");
        Some(HugeTlbStat {
            current: files::number(folder, &file("current"))?,
            max: files::number(folder, &file("max"))?,
            failcnt: files::value(&files::read(folder, &file("events")).unwrap_or_default(), "max"),
            pagesize: size,
            ..Default::default()
        })
    };
    files::huge_page_sizes().into_iter().filter_map(stat).collect()
}

/// Absent where the kernel does not count pressure.
fn pressure(folder: &Path, name: &str) -> Option<PSIStats> {
    let text = files::read(folder, name).filter(|text| !text.is_empty())?;
    Some(PSIStats { some: pressure_line(&text, "some").into(), full: pressure_line(&text, "full").into(), ..Default::default() })
}

/// `some avg10=0.00 avg60=0.12 avg300=0.00 total=1234`
fn pressure_line(text: &str, kind: &str) -> Option<PSIData> {
    let line = text.lines().find_map(|line| line.strip_prefix(kind))?;
    let mut data = PSIData::default();
    for (key, value) in line.split_ascii_whitespace().filter_map(|word| word.split_once('=')) {
        match key {
            "avg10" => data.avg10 = value.parse().ok()?,
            "avg60" => data.avg60 = value.parse().ok()?,
            "avg300" => data.avg300 = value.parse().ok()?,
            "total" => data.total = value.parse().ok()?,
            _ => {}
        }
    }
    Some(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_controllers_files_are_read() {
        let folder = scratch::Folder::new("cgroup-v2");
        for (name, text) in [
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            (
                "cpu.stat",
                "usage_usec 10\nuser_usec 6\nsystem_usec 4\nnr_periods 1\nnr_throttled 2\nthrottled_usec 3\nnr_bursts 4\nburst_usec 5\n",
            ),
            ("cpu.pressure", "some avg10=0.50 avg60=1.25 avg300=0.00 total=77\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1\n"),
            ("memory.stat", "anon 1\nfile 2\nworkingset_refault_anon 3\nworkingset_refault_file 4\nthp_collapse_alloc 9\n"),
            ("memory.current", "4096\n"),
            ("memory.max", "max\n"),
            ("memory.peak", "8192\n"),
            ("memory.events", "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n"),
            ("io.stat", "254:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0\n7:0 \nbad\n"),
            ("rdma.current", "mlx4_0 hca_handle=2 hca_object=5\n"),
        ] {
            std::fs::write(folder.join(name), text).expect("a file");
        }
        let m = metrics(&folder);
        assert_eq!((m.pids.current, m.pids.limit), (3, u64::MAX));
        assert_eq!(
            (m.cpu.usage_usec, m.cpu.throttled_usec, m.cpu.burst_usec, m.cpu.psi.some.avg60, m.cpu.psi.full.total),
            (10, 3, 5, 1.25, 1)
        );
        assert_eq!((m.memory.anon, m.memory.workingset_refault, m.memory.usage, m.memory.usage_limit), (1, 7, 4096, u64::MAX));
        assert_eq!((m.memory.max_usage, m.memory.swap_usage, m.memory.psi.is_some()), (8192, 0, false));
        assert_eq!((m.memory_events.oom_kill, m.memory_events.oom_group_kill), (4, 5));
        let io: Vec<_> = m.io.usage.iter().map(|e| (e.major, e.minor, e.rbytes, e.wbytes, e.rios, e.wios)).collect();
        assert_eq!(io, [(254, 0, 1, 2, 3, 4)]);
        assert_eq!((m.rdma.current[0].hca_objects, m.rdma.limit.len()), (5, 0));
        std::fs::remove_dir_all(&folder).expect("removal");
        assert_eq!(metrics(&folder), Metrics::default());
    }
}
