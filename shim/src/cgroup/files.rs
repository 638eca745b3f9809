//! The files of a cgroup: short texts, which can vanish at any time.
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// Reads a file, up to a length that no file of the kernel has. `None` if it cannot be read (any more).
pub(super) fn read(folder: &Path, name: &str) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(folder.join(name)).ok()?.take(MAX_FILE_BYTES).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Reads a file that holds one number. `max` is read as the largest number.
pub(super) fn number(folder: &Path, name: &str) -> Option<u64> {
    read(folder, name).map(|text| to_number(text.trim()))
}

/// The value of `key` in lines of `key value`; 0 if it is missing.
pub(super) fn value(text: &str, key: &str) -> u64 {
    pairs(text).find(|(name, _)| *name == key).map_or(0, |(_, value)| value)
}

fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| line.split_once(' ')).map(|(name, value)| (name, to_number(value.trim())))
}

/// A counter of the kernel, as Go's library reads it: negative values and text count as 0.
pub(super) fn to_number(text: &str) -> u64 {
    if text == "max" { u64::MAX } else { text.parse().unwrap_or(0) }
}

/// The names of the sizes of huge pages in files of cgroups: `2MB`, `1GB`.
pub(super) fn huge_page_sizes() -> Vec<String> {
    let entries = Path::new("/sys/kernel/mm/hugepages").read_dir().into_iter().flatten().flatten();
    let mut sizes: Vec<u64> =
        entries.filter_map(|entry| entry.file_name().to_str()?.strip_prefix("hugepages-")?.strip_suffix("kB")?.parse().ok()).collect();
    sizes.sort_unstable();
    sizes.into_iter().map(size_name).collect()
}

fn size_name(kib: u64) -> String {
    match kib {
        kib if kib >= 1 << 20 => format!("{}GB", kib >> 20),
        kib if kib >= 1 << 10 => format!("{}MB", kib >> 10),
        kib => format!("{kib}KB"),
    }
}

/// `device hca_handle=2 hca_object=max`, a line each.
pub(super) fn rdma_lines(text: &str) -> impl Iterator<Item = (String, u32, u32)> {
    let limit = |text: &str| if text == "max" { u32::MAX } else { text.parse().unwrap_or(0) };
    text.lines().filter_map(move |line| {
        let mut words = line.split_ascii_whitespace();
        let (device, mut handles, mut objects) = (words.next()?.to_owned(), 0, 0);
        for (key, value) in words.filter_map(|word| word.split_once('=')) {
            match key {
                "hca_handle" => handles = limit(value),
                "hca_object" => objects = limit(value),
                _ => {}
            }
        }
        Some((device, handles, objects))
    })
}

/// Calls `visit` for `folder` and every cgroup below it.
pub(super) fn each_below(folder: &Path, visit: &mut impl FnMut(&Path)) {
    each(folder, MAX_DEPTH, visit);
}

fn each(folder: &Path, depth: usize, visit: &mut impl FnMut(&Path)) {
    visit(folder);
    if depth == 0 {
        return;
    }
    for entry in folder.read_dir().into_iter().flatten().flatten() {
        // cgroup file systems know no links.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            each(&entry.path(), depth - 1, visit);
        }
    }
}

/// Whether `holds` is true of `folder` or of a cgroup below it.
pub(super) fn any_below(folder: &Path, holds: impl Fn(&Path) -> bool) -> bool {
    let mut any = false;
    each_below(folder, &mut |folder| any |= holds(folder));
    any
}

/// The processes in `folder` and below it.
pub(super) fn pids_below(folder: &Path) -> Vec<u32> {
    let mut pids = Vec::new();
    each_below(folder, &mut |folder| {
        // 0 stands for a process that our pid namespace does not show.
        let list = read(folder, "cgroup.procs").unwrap_or_default();
        pids.extend(list.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
    });
    pids
}

/// A list of four million processes is shorter.
const MAX_FILE_BYTES: u64 = 32 << 20;
/// Deeper than any container goes, and shallow enough for a thread's stack.
const MAX_DEPTH: usize = 64;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read_as_gos_library_does() {
        let text = "cache 1\nrss -2\noom_kill 18446744073709551615\nlimit max\nbroken\nword x\n";
        for (key, expected) in
            [("cache", 1), ("rss", 0), ("oom_kill", u64::MAX), ("limit", u64::MAX), ("broken", 0), ("word", 0), ("none", 0)]
        {
            assert_eq!(value(text, key), expected, "{key}");
        }
    }

    #[test]
    fn page_sizes_have_the_names_of_the_kernels_files() {
        assert_eq!([64, 2048, 32 << 10, 1 << 20, 16 << 20].map(size_name), ["64KB", "2MB", "32MB", "1GB", "16GB"]);
    }

    #[test]
    fn rdma_lines_are_taken_apart() {
        let text = "mlx4_0 hca_handle=2 hca_object=max\nocrdma1 hca_handle=3 hca_object=4 new=1\n\n";
        assert_eq!(rdma_lines(text).collect::<Vec<_>>(), [("mlx4_0".into(), 2, u32::MAX), ("ocrdma1".into(), 3, 4)]);
    }
}
