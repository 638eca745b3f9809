//! Freezes, thaws, kills and removes containers: by their cgroups.
//!
//! **Invariant:** a signal goes through a handle of a process that was in the cgroup after the handle was opened, so a reused pid never hits another
//! process. What is gone already is no error.
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write as _};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, poll};

use crate::plan::{Bandwidth, Cgroup, Folder, KEEP, Write};
use crate::sys;

/// Makes the folders of a cgroup, with their parents: those of a list by [`missing`]. Those that are there stay as they are.
pub fn make(cgroup: &Cgroup, missing: &[PathBuf]) -> io::Result<()> {
    cgroup.folders.iter().try_for_each(|folder| crate::perform::cgroup::make_missing(folder, missing))
}

/// The folders that [`make`] would make, each after those above it.
#[must_use]
pub fn missing(cgroup: &Cgroup) -> Vec<PathBuf> {
    let (mut missing, mut last) = (Vec::new(), 0);
    for folder in &cgroup.folders {
        let (mount, path) = (Path::new(&folder.mount), folder.absolute());
        let mut paths: Vec<&Path> = path.ancestors().take_while(|path| *path != mount).collect();
        paths.reverse();
        let is_there = |count: usize| count == 0 || paths[count - 1].exists();
        // Mostly the hierarchies have the same folders, so as many are there as in the one before.
        let is_as_last = last <= paths.len() && is_there(last) && (last == paths.len() || !is_there(last + 1));
        if !is_as_last {
            last = (1..=paths.len()).rev().find(|count| is_there(*count)).unwrap_or(0);
        }
        missing.extend(paths[last..].iter().map(|path| path.to_path_buf()));
    }
    missing
}

/// Freezes every process in a cgroup and below it, and waits until all are. On failure none is.
///
/// Errors: EBUSY if they do not stop: processes that are in the kernel, or join all the time.
pub fn freeze(cgroup: &Cgroup) -> io::Result<()> {
    freeze_in(&freezer_folder(cgroup)?)
}

/// Freezes every process in a folder of cgroup v2 or of v1's freezer, and below it. As [`freeze`].
pub fn freeze_in(folder: &Path) -> io::Result<()> {
    let (frozen, file, thawed) =
        if folder.join(FREEZER).exists() { (freeze_v1(folder), FREEZER, "THAWED") } else { (freeze_v2(folder), "cgroup.freeze", "0") };
    if frozen.is_err() {
        // What matters is why it failed.
        let _ = fs::write(folder.join(file), thawed);
    }
    frozen
}

/// Thaws what was frozen by [`freeze`].
pub fn thaw(cgroup: &Cgroup) -> io::Result<()> {
    match freezer(cgroup)? {
        Freezer::V1(folder) => fs::write(folder.join(FREEZER), "THAWED"),
        Freezer::V2(folder) => fs::write(folder.join("cgroup.freeze"), "0"),
    }
}

/// Every process in a cgroup and below it, sorted.
#[must_use]
pub fn pids(cgroup: &Cgroup) -> Vec<u32> {
    let folders: Vec<PathBuf> = cgroup.folders.iter().map(Folder::absolute).collect();
    processes(&folders).into_iter().collect()
}

/// Writes the limits of a changed cgroup (see `plan::update`). If one is refused, those that were written get their former values.
///
/// Errors: the first file that is refused, with what was to be written.
pub fn update(cgroup: &Cgroup) -> Result<(), UpdateError> {
    let mut written: Vec<(PathBuf, String)> = Vec::new();
    let changed = cgroup.folders.iter().try_for_each(|folder| update_folder(&folder.absolute(), &folder.limits, &mut written));
    if changed.is_err() {
        // In the other order, for the same reason that there is an order at all.
        written.iter().rev().for_each(|(path, former)| drop(write(path, former)));
    }
    changed
}

/// What is limited of processor time, as far as the files show it.
#[must_use]
pub fn bandwidth(cgroup: &Cgroup) -> Bandwidth {
    let read = |file: &str| cgroup.folders.iter().find_map(|folder| fs::read_to_string(folder.absolute().join(file)).ok());
    let of_v2 = || {
        let text = read("cpu.max")?;
        let (quota, period) = text.trim().split_once(' ')?;
        Some(Bandwidth { quota: quota.parse().ok(), period: period.parse().ok()? })
    };
    let of_v1 = || {
        let quota = read("cpu.cfs_quota_us")?.trim().parse().ok();
        Some(Bandwidth { quota, period: read("cpu.cfs_period_us")?.trim().parse().ok()? })
    };
    of_v2().or_else(of_v1).unwrap_or_default()
}

/// The devices that are allowed on cgroup v1, to be allowed again by [`allow`] after systemd has written its own list: a hook may have added some.
#[must_use]
pub fn devices(cgroup: &Cgroup) -> Vec<(PathBuf, String)> {
    let lists = cgroup.folders.iter().map(|folder| folder.absolute().join("devices.list"));
    let lists = lists.filter_map(|list| Some((list.with_file_name("devices.allow"), fs::read_to_string(&list).ok()?)));
    lists.flat_map(|(file, text)| text.lines().map(|line| (file.clone(), line.to_owned())).collect::<Vec<_>>()).collect()
}

/// Allows devices again, as far as they are not allowed.
pub fn allow(devices: &[(PathBuf, String)]) -> Result<(), UpdateError> {
    devices.iter().try_for_each(|(path, line)| {
        let is_there = fs::read_to_string(path.with_file_name("devices.list")).is_ok_and(|list| list.lines().any(|other| other == line));
        if is_there {
            return Ok(());
        }
        write(path, line).map_err(|source| UpdateError { path: path.clone(), value: line.clone(), source })
    })
}

/// Whether every process is frozen on cgroup v1, where systemd's list of devices is written in steps.
#[must_use]
pub fn is_frozen(cgroup: &Cgroup) -> bool {
    match freezer(cgroup) {
        Ok(Freezer::V1(folder)) => fs::read(folder.join(FREEZER)).is_ok_and(|state| state.trim_ascii() != b"THAWED"),
        Ok(Freezer::V2(folder)) => fs::read(folder.join("cgroup.freeze")).is_ok_and(|state| state.trim_ascii() == b"1"),
        Err(_) => false,
    }
}

/// A limit that the kernel refuses.
#[derive(Debug, thiserror::Error)]
#[error("write {value} to {}", path.display())]
pub struct UpdateError {
    pub path: PathBuf,
    pub value: String,
    pub source: io::Error,
}

/// Which of two limits comes first depends on what they are now (memory alone is never above memory and swap, a burst never above a quota), so
/// what is refused is tried again after the others.
fn update_folder(folder: &Path, limits: &[Write], written: &mut Vec<(PathBuf, String)>) -> Result<(), UpdateError> {
    let mut left: Vec<&Write> = limits.iter().collect();
    loop {
        let before = left.len();
        let mut refused = None;
        left.retain(|limit| {
            let path = folder.join(&limit.file);
            if limit.unless.as_ref().is_some_and(|other| folder.join(other).exists()) {
                return false;
            }
            // Lists of devices cannot be read back, and are not changed.
            let is_list = limit.file.starts_with("devices.");
            let former = if is_list { String::new() } else { fs::read_to_string(&path).unwrap_or_default() };
            let former = limit.reset.as_ref().map_or(former.clone(), |reset| line_of(&former, &limit.value).unwrap_or(reset).to_owned());
            match value(limit, &former).and_then(|value| write(&path, &value)) {
                Ok(()) => {
                    if !is_list {
                        written.push((path, former.trim().to_owned()));
                    }
                    false
                }
                Err(error) if limit.optional && error.kind() == io::ErrorKind::NotFound => false,
                Err(source) => {
                    refused.get_or_insert(UpdateError { path, value: limit.value.clone(), source });
                    true
                }
            }
        });
        match refused {
            None => return Ok(()),
            Some(refused) if left.len() == before => return Err(refused),
            Some(_) => {}
        }
    }
}

/// The line of the same device as a value's, which is its first word.
fn line_of<'a>(text: &'a str, value: &str) -> Option<&'a str> {
    let key = value.split(' ').next();
    text.lines().find(|line| line.split_whitespace().next() == key)
}

/// Of `cpu.max` the half that is not given stays.
fn value(limit: &Write, former: &str) -> io::Result<String> {
    match (limit.file.as_str(), limit.value.split_once(' ')) {
        ("cpu.max", Some((quota, period))) if quota == KEEP || period == KEEP => {
            let (former_quota, former_period) = former.trim().split_once(' ').ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))?;
            let pick = |given: &str, former: &str| if given == KEEP { former.to_owned() } else { given.to_owned() };
            Ok(format!("{} {}", pick(quota, former_quota), pick(period, former_period)))
        }
        _ => Ok(limit.value.clone()),
    }
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

/// The folder that freezes.
enum Freezer {
    V1(PathBuf),
    V2(PathBuf),
}

fn freezer(cgroup: &Cgroup) -> io::Result<Freezer> {
    let v1 = cgroup.folders.iter().map(Folder::absolute).find(|folder| folder.join(FREEZER).exists()).map(Freezer::V1);
    let v2 = || cgroup.unified().map(|folder| Freezer::V2(folder.absolute()));
    v1.or_else(v2).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))
}

/// The folder that freezes a cgroup.
pub(crate) fn freezer_folder(cgroup: &Cgroup) -> io::Result<PathBuf> {
    freezer(cgroup).map(|freezer| match freezer {
        Freezer::V1(folder) | Freezer::V2(folder) => folder,
    })
}

/// The kernel may not get done while a process of the cgroup forks or exits; it starts afresh when it is thawed in between.
fn freeze_v1(folder: &Path) -> io::Result<()> {
    let file = folder.join(FREEZER);
    for attempt in 1..=MAX_ROUNDS {
        if attempt % THAW_EVERY == 0 {
            fs::write(&file, "THAWED")?;
            sleep(THAWED_FOR);
        }
        fs::write(&file, "FROZEN")?;
        if fs::read(&file)?.trim_ascii() == b"FROZEN" {
            return Ok(());
        }
        sleep(FREEZING_FOR);
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

fn freeze_v2(folder: &Path) -> io::Result<()> {
    fs::write(folder.join("cgroup.freeze"), "1")?;
    let events = File::open(folder.join("cgroup.events"))?;
    let deadline = Instant::now() + FREEZE_WITHIN;
    loop {
        let mut text = String::new();
        (&events).seek(SeekFrom::Start(0))?;
        (&events).read_to_string(&mut text)?;
        if text.lines().any(|line| line == "frozen 1") {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        // The file reports its changes.
        let mut wait = [PollFd::new(events.as_fd(), PollFlags::POLLPRI)];
        if left.is_zero() || poll(&mut wait, u16::try_from(left.as_millis()).unwrap_or(u16::MAX))? == 0 {
            return Err(io::Error::from_raw_os_error(libc::EBUSY));
        }
    }
}

/// Kills every process in a cgroup and below it, frozen or not, and does not wait for their exits.
pub fn kill_all(cgroup: &Cgroup) -> io::Result<()> {
    let folders: Vec<PathBuf> = cgroup.folders.iter().map(Folder::absolute).collect();
    let freezers: Vec<&Path> = folders.iter().map(PathBuf::as_path).filter(|folder| folder.join(FREEZER).exists()).collect();
    let unified = cgroup.unified().map(Folder::absolute);
    kill_in(&folders.iter().map(PathBuf::as_path).collect::<Vec<_>>(), unified.as_deref(), &freezers)
}

/// Kills every process that is in one of `folders` or below it. `unified` is the one of cgroup v2, which need not have all of a hybrid host's;
/// `freezers` are those of v1 that freeze, which are thawed.
///
/// Errors: EBUSY if they fork faster than they can be killed.
pub fn kill_in(folders: &[&Path], unified: Option<&Path>, freezers: &[&Path]) -> io::Result<()> {
    // Since Linux 5.14.
    let is_killed = unified.is_some_and(|unified| fs::write(unified.join("cgroup.kill"), "1").is_ok());
    // Nothing is frozen for nothing: it is the rule that init took all others with it.
    if is_killed && folders.iter().all(|folder| Some(*folder) == unified) || processes(folders).is_empty() {
        return Ok(());
    }
    let mut killed = BTreeSet::new();
    for _round in 0..MAX_ROUNDS {
        // What is frozen does not fork; what has been killed exits once it is thawed. On v2 it exits at once.
        freezers.iter().for_each(|folder| drop(fs::write(folder.join(FREEZER), "FROZEN")));
        let round = signal_new(folders, &mut killed, libc::SIGKILL);
        // Parents first: a cgroup cannot thaw below a frozen one.
        freezers.iter().for_each(|folder| each_below(folder, &mut |folder| drop(fs::write(folder.join(FREEZER), "THAWED"))));
        if round? == 0 {
            return Ok(());
        }
    }
    Err(io::Error::from_raw_os_error(libc::EBUSY))
}

/// Signals every process in a cgroup and below it, once.
///
/// Errors: EINVAL for a number that is no signal.
pub fn signal_all(cgroup: &Cgroup, signal: i32) -> io::Result<()> {
    let folders: Vec<PathBuf> = cgroup.folders.iter().map(Folder::absolute).collect();
    signal_new(&folders, &mut BTreeSet::new(), signal).map(drop)
}

/// Kills what is in folders that were made in vain, and removes them. What fails is left.
pub(crate) fn kill_and_remove(folders: &[PathBuf]) {
    // Nothing is in them but for a rule: a hook's child, or an init that is about to exit.
    let _ = signal_new(folders, &mut BTreeSet::new(), libc::SIGKILL);
    for folder in folders {
        let _ = remove_folder(folder);
    }
}

/// Removes the folders of a cgroup and those below them. Processes that are about to exit are waited for, a second at most.
pub fn remove(cgroup: &Cgroup) -> io::Result<()> {
    cgroup.folders.iter().try_for_each(|folder| remove_folder(&folder.absolute()))
}

/// Removes the folder of a cgroup if it is empty; one with processes or folders in it stays as it is. For a moment the kernel may call one busy whose last
/// process or folder has just gone: that is waited for, a second at most.
///
/// Errors: EBUSY if it is in use.
pub fn remove_if_empty(folder: &Path) -> io::Result<()> {
    remove_when_free(|| remove_one(folder), || is_empty(folder))
}

/// Whether a cgroup has neither processes nor folders.
#[must_use]
pub fn is_empty(folder: &Path) -> bool {
    let has_folders = fs::read_dir(folder).into_iter().flatten().flatten().any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    !has_folders && fs::read(folder.join("cgroup.procs")).is_ok_and(|pids| pids.is_empty())
}

fn remove_folder(path: &Path) -> io::Result<()> {
    remove_when_free(|| remove_tree(path), || true)
}

/// Repeats a removal while the kernel calls the folder busy and it `may` become free.
fn remove_when_free(remove: impl Fn() -> io::Result<()>, may: impl Fn() -> bool) -> io::Result<()> {
    let mut pause = FIRST_PAUSE;
    loop {
        match remove() {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && pause <= LAST_PAUSE && may() => {
                sleep(pause);
                pause *= 2;
            }
            other => return other,
        }
    }
}

fn remove_one(folder: &Path) -> io::Result<()> {
    match fs::remove_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// One call if there is nothing below it.
fn remove_tree(path: &Path) -> io::Result<()> {
    if remove_one(path).is_ok() {
        return Ok(());
    }
    let mut folders = Vec::new();
    each_below(path, &mut |folder| folders.push(folder.to_owned()));
    folders.iter().rev().try_for_each(|folder| remove_one(folder))
}

/// Signals those that have not been signalled yet. Returns how many these were, with those that had exited before: they may have started others.
fn signal_new(folders: &[impl AsRef<Path>], signalled: &mut BTreeSet<u32>, signal: i32) -> io::Result<usize> {
    let new: Vec<u32> = processes(folders).into_iter().filter(|pid| !signalled.contains(pid)).collect();
    if new.is_empty() {
        return Ok(0);
    }
    let handles: Vec<_> = new.iter().filter_map(|pid| Some((*pid, sys::open_pidfd(*pid).ok()?))).collect();
    let still = processes(folders);
    for (pid, handle) in handles.iter().filter(|(pid, _)| still.contains(pid)) {
        match sys::signal(handle.as_fd(), signal) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => return Err(error),
            Ok(()) | Err(_) => {}
        }
        signalled.insert(*pid);
    }
    Ok(new.len())
}

fn processes(folders: &[impl AsRef<Path>]) -> BTreeSet<u32> {
    let mut pids = BTreeSet::new();
    for folder in folders {
        each_below(folder.as_ref(), &mut |folder| {
            let text = fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
            // 0: a process of another pid namespace.
            pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()).filter(|pid| *pid != 0));
        });
    }
    pids
}

/// A folder, then those below it. What vanishes meanwhile is skipped.
fn each_below(folder: &Path, act: &mut dyn FnMut(&Path)) {
    act(folder);
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            each_below(&entry.path(), act);
        }
    }
}

/// cgroup v1's.
const FREEZER: &str = "freezer.state";

/// How often new processes may appear.
const MAX_ROUNDS: usize = 1000;

/// How long cgroup v2 may take.
const FREEZE_WITHIN: Duration = Duration::from_secs(10);

const THAW_EVERY: usize = 50;
const THAWED_FOR: Duration = Duration::from_millis(10);
const FREEZING_FOR: Duration = Duration::from_micros(500);

const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(512);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Hierarchy;

    #[test]
    fn what_is_missing_is_found_in_each_hierarchy() {
        let scratch = scratch::Folder::new("missing");
        for path in ["a/x/y/z", "b/x/y/z", "c/x", "d/x/y", "e", "f/x"] {
            fs::create_dir_all(scratch.join(path)).expect("folders");
        }
        let folder = |mount: &str| Folder {
            mount: scratch.join(mount).display().to_string(),
            path: "x/y/z".to_owned(),
            hierarchy: Hierarchy::V1,
            limits: Vec::new(),
            controllers: Vec::new(),
            of: Vec::new(),
            devices: None,
            owner: None,
        };
        let cgroup = Cgroup { folders: ["a", "b", "c", "d", "e", "f"].map(folder).to_vec(), placeholder: None };
        let expected = ["c/x/y", "c/x/y/z", "d/x/y/z", "e/x", "e/x/y", "e/x/y/z", "f/x/y", "f/x/y/z"].map(|path| scratch.join(path));
        assert_eq!(missing(&cgroup), expected);
        make(&cgroup, &expected).expect("made");
        assert_eq!(missing(&cgroup), Vec::<PathBuf>::new());
    }
}
