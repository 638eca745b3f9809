//! Makes and joins cgroups.
//!
//! **Invariant:** a process joins by writing `0` while it has one thread: a write of another's pid waits for the kernel's lock of thread groups, 10 ms after
//! a pause. Only folders that this very operation made are removed again.
use std::ffi::CStr;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::dir::{Dir, Type};
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::child::plain;
use super::{Doing, Failure, Step, failure};
use crate::control;
use crate::plan::{Cgroup, Folder, Hierarchy};
use crate::sys;

/// The folders of a container, to be joined by a child.
#[derive(Debug, Default)]
pub(super) struct Joining {
    /// Files that take the `0` of the child.
    tasks: Vec<(PathBuf, File)>,
    unified: Option<Unified>,
    /// The pid of the container's init, for an added process.
    init: Option<u32>,
    /// What counts OOM kills, open before the performer joins a namespace in which the path is the container's.
    kills: Vec<File>,
}

/// A folder of cgroup v2, and its list of processes.
#[derive(Debug)]
pub(super) struct Unified {
    folder: File,
    list: File,
}

/// Folders that were made.
#[derive(Debug, Default)]
pub(super) struct Made(Vec<PathBuf>);

impl Made {
    /// Removes them, with what is in them: it is this operation's. What cannot be removed is left to the deletion of the container.
    pub(super) fn remove(&self) {
        control::kill_and_remove(&self.0);
    }
}

impl Joining {
    /// Makes the folders. One that exists must be empty.
    pub(super) fn make(cgroup: &Cgroup) -> Result<(Self, Made), Failure> {
        let (mut joining, mut made) = (Self::default(), Made::default());
        let systemds = cgroup.placeholder.and_then(|_| cgroup.of_systemd());
        let all = cgroup.folders.iter().try_for_each(|folder| {
            if systemds == Some(folder) && !folder.absolute().is_dir() {
                return Err(plain(Step::Cgroup, &format!("systemd's cgroup {} is gone", folder.absolute().display())));
            }
            make_folder(folder, cgroup.placeholder, &mut made)?;
            allow_realtime(folder)?;
            joining.open(folder)
        });
        match all {
            Ok(()) => Ok((joining, made)),
            Err(failure) => {
                made.remove();
                Err(failure)
            }
        }
    }

    /// Opens the folders of a container that exists. `init` is a handle of its init.
    pub(super) fn open_all(cgroup: &Cgroup, init: BorrowedFd<'_>) -> Result<Self, Failure> {
        let mut joining = Self::default();
        cgroup.folders.iter().try_for_each(|folder| joining.open(folder))?;
        if joining.unified.is_some() && joining.tasks.is_empty() {
            // Now, as the performer does not see its own procfs later. An init that is gone is noticed later too.
            joining.init = sys::pid_of(init).ok();
        }
        Ok(joining)
    }

    fn open(&mut self, folder: &Folder) -> Result<(), Failure> {
        let path = folder.absolute();
        let opened = match folder.hierarchy {
            Hierarchy::Unified => {
                let folder = fs::OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(&path);
                let list = fs::OpenOptions::new().write(true).open(path.join("cgroup.procs"));
                folder.and_then(|folder| Ok(Unified { folder, list: list? })).map(|both| self.unified = Some(both))
            }
            Hierarchy::V1 | Hierarchy::Cpuset => {
                let file = path.join("tasks");
                fs::OpenOptions::new().write(true).open(&file).map(|tasks| self.tasks.push((path.clone(), tasks)))
            }
        };
        let kills = match folder.hierarchy {
            Hierarchy::Unified => Some("memory.events"),
            Hierarchy::V1 | Hierarchy::Cpuset => folder.of.iter().any(|controller| controller == "memory").then_some("memory.oom_control"),
        };
        // Absent from a v2 without the memory controller.
        self.kills.extend(kills.and_then(|file| File::open(path.join(file)).ok()));
        opened.doing(Step::Cgroup, || format!("open cgroup {}", path.display()))
    }

    /// Whether the kernel has killed a process of the container for memory.
    pub(super) fn is_out_of_memory(&self) -> bool {
        let counts = |file: &File| {
            let mut text = String::new();
            file.take(MAX_EVENTS_BYTES).read_to_string(&mut text).is_ok()
                && text.lines().filter_map(|line| line.strip_prefix("oom_kill ")).any(|count| count != "0")
        };
        self.kills.iter().any(counts)
    }

    /// The folder of cgroup v2 for the child to be made in.
    pub(super) fn unified(&self) -> Option<&Unified> {
        self.unified.as_ref()
    }

    /// The folder of cgroup v2 that init is in, where it is one below the container's own: the own one takes no process once init has enabled controllers
    /// for those below it. Never one elsewhere, wherever init may have moved.
    pub(super) fn of_init(&self) -> Option<Unified> {
        let (own, init) = (self.unified.as_ref()?, self.init?);
        find_process(own.folder.as_fd(), init, &mut { MAX_FOLDERS })
    }

    /// Moves the calling process into the folders of cgroup v1.
    pub(super) fn join(&self) -> Result<(), Failure> {
        self.tasks
            .iter()
            .try_for_each(|(path, tasks)| (&*tasks).write_all(b"0").doing(Step::Cgroup, || format!("join cgroup {}", path.display())))
    }

    /// The lists of all folders: a process joins by writing `0` to each.
    pub(super) fn lists(&self) -> io::Result<Vec<File>> {
        let unified = self.unified.as_ref().map(|unified| &unified.list);
        self.tasks.iter().map(|(_, tasks)| tasks).chain(unified).map(File::try_clone).collect()
    }
}

impl Unified {
    /// Moves the calling process into the folder: for one that could not be made there.
    pub(super) fn join(&self) -> Result<(), Failure> {
        (&self.list).write_all(b"0").doing(Step::Cgroup, || "join the cgroup".to_owned())
    }
}

impl AsFd for Unified {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }
}

/// The folder below one, by its descriptor, that has a process. `left`: how many may still be looked at.
fn find_process(folder: BorrowedFd<'_>, pid: u32, left: &mut usize) -> Option<Unified> {
    let open = |parent: BorrowedFd<'_>, name: &CStr, flags: OFlag| {
        openat(parent, name, flags | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC, Mode::empty()).ok()
    };
    let entries = Dir::from_fd(open(folder, c".", OFlag::O_DIRECTORY)?).ok()?;
    for entry in entries.into_iter().flatten().filter(|entry| entry.file_type() == Some(Type::Directory)) {
        if [c".", c".."].contains(&entry.file_name()) {
            continue;
        }
        *left = left.checked_sub(1)?;
        // What vanishes meanwhile is skipped.
        let Some(below) = open(folder, entry.file_name(), OFlag::O_DIRECTORY) else { continue };
        let mut text = String::new();
        // Of one whose threads are in different cgroups it cannot be read.
        let read = open(below.as_fd(), c"cgroup.procs", OFlag::O_RDONLY).map(|list| File::from(list).read_to_string(&mut text));
        if matches!(read, Some(Ok(_))) && text.lines().any(|line| line.parse() == Ok(pid)) {
            let list = open(below.as_fd(), c"cgroup.procs", OFlag::O_WRONLY)?;
            return Some(Unified { folder: below.into(), list: list.into() });
        }
        if let Some(found) = find_process(below.as_fd(), pid, left) {
            return Some(found);
        }
    }
    None
}

fn make_folder(folder: &Folder, placeholder: Option<u32>, made: &mut Made) -> Result<(), Failure> {
    let path = folder.absolute();
    if make(folder).doing(Step::Cgroup, || format!("make cgroup {}", path.display()))? {
        made.0.push(path.clone());
        return folder
            .owner
            .map_or(Ok(()), |owner| give(&path, owner))
            .doing(Step::Cgroup, || format!("give cgroup {} to its user", path.display()));
    }
    let processes =
        fs::read(path.join("cgroup.procs")).doing(Step::Cgroup, || format!("read the processes of cgroup {}", path.display()))?;
    let is_placeholder = |line: &[u8]| placeholder.is_some_and(|pid| line == pid.to_string().as_bytes());
    if processes.split(|byte| *byte == b'\n').all(|line| line.is_empty() || is_placeholder(line)) {
        // A folder of systemd's is there already.
        let owner = folder.owner.filter(|_| placeholder.is_some());
        return owner
            .map_or(Ok(()), |owner| give(&path, owner))
            .doing(Step::Cgroup, || format!("give cgroup {} to its user", path.display()));
    }
    Err(Failure { step: Step::Taken, what: format!("cgroup {} has processes already", path.display()), errno: 0 })
}

/// Gives a folder of v1 its real-time budget. Without any, a process whose policy is real-time cannot join it.
fn allow_realtime(folder: &Folder) -> Result<(), Failure> {
    let limits = folder.limits.iter().filter(|limit| limit.file.starts_with("cpu.rt_")).cloned().collect();
    limit(&Cgroup { folders: vec![Folder { limits, devices: None, ..folder.clone() }], placeholder: None })
}

/// Makes a folder with its parents, and fills what a cpuset needs. Whether the last one is new.
fn make(folder: &Folder) -> io::Result<bool> {
    // Nothing is to be done to what is above it, which mostly is there.
    if folder.hierarchy == Hierarchy::V1 {
        return make_below(Path::new(&folder.mount), &folder.absolute());
    }
    let mut path = PathBuf::from(&folder.mount);
    let (mut is_new, mut cpuset) = (false, Cpuset::default());
    for part in folder.path.split('/').filter(|part| !part.is_empty()) {
        let parent = path.clone();
        path.push(part);
        is_new = make_one(&path)?;
        if folder.hierarchy == Hierarchy::Cpuset {
            cpuset.fill(&parent, &path, is_new)?;
        }
        enable(&parent, &folder.controllers);
    }
    Ok(is_new)
}

/// Makes those folders of a list that are a folder or above it, as [`make`].
pub(crate) fn make_missing(folder: &Folder, missing: &[PathBuf]) -> io::Result<()> {
    if folder.hierarchy != Hierarchy::V1 {
        return make(folder).map(drop);
    }
    let (mount, path) = (Path::new(&folder.mount), folder.absolute());
    missing.iter().filter(|one| path.starts_with(one)).try_for_each(|one| make_below(mount, one).map(drop))
}

/// Whether it is new.
fn make_one(path: &Path) -> io::Result<bool> {
    match fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

/// Makes a folder, and what is missing between it and the mount. Whether it is new.
fn make_below(mount: &Path, path: &Path) -> io::Result<bool> {
    match (make_one(path), path.parent()) {
        (Err(error), Some(parent)) if error.kind() == io::ErrorKind::NotFound && parent != mount => {
            make_below(mount, parent)?;
            make_one(path)
        }
        (made, _) => made,
    }
}

/// Gives a folder of cgroup v2 to a user: it, and the files with which its processes are moved and its controllers enabled. Limits stay the runtime's.
fn give(folder: &Path, owner: u32) -> io::Result<()> {
    let files = fs::read_to_string("/sys/kernel/cgroup/delegate")
        .unwrap_or_else(|_old_kernel| "cgroup.procs\ncgroup.subtree_control\ncgroup.threads".to_owned());
    std::os::unix::fs::chown(folder, Some(owner), None)?;
    for file in files.lines().filter(|file| !file.contains('/')) {
        match std::os::unix::fs::chown(folder.join(file), Some(owner), None) {
            // Of a controller that this folder does not have.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    Ok(())
}

/// Enables controllers of cgroup v2 for the folders in one. A limit whose controller could not be enabled fails later, by its file.
fn enable(folder: &Path, controllers: &[String]) {
    if controllers.is_empty() {
        return;
    }
    let file = folder.join("cgroup.subtree_control");
    let all: Vec<String> = controllers.iter().map(|controller| format!("+{controller}")).collect();
    if fs::write(&file, all.join(" ")).is_err() {
        for one in all {
            let _ = fs::write(&file, one);
        }
    }
}

/// The processors and memory nodes of the cpuset that was last filled, by their files.
#[derive(Debug, Default)]
struct Cpuset([Option<Vec<u8>>; 2]);

impl Cpuset {
    /// Gives a cpuset that has none the processors and memory nodes of its parent. One that is new has none, or those of its parent already.
    fn fill(&mut self, parent: &Path, folder: &Path, is_new: bool) -> io::Result<()> {
        for (file, last) in ["cpuset.cpus", "cpuset.mems"].into_iter().zip(&mut self.0) {
            let own = if is_new { Vec::new() } else { fs::read(folder.join(file))? };
            if !own.trim_ascii().is_empty() {
                *last = Some(own);
                continue;
            }
            let value = last.take().map_or_else(|| fs::read(parent.join(file)), Ok)?;
            fs::write(folder.join(file), &value)?;
            *last = Some(value);
        }
        Ok(())
    }
}

/// Writes the limits, then attaches the program that decides about devices.
pub(super) fn limit(cgroup: &Cgroup) -> Result<(), Failure> {
    control::update(cgroup).map_err(|refused| {
        let usage = match refused.source.raw_os_error() {
            Some(libc::EBUSY) => fs::read_to_string(refused.path.with_file_name("memory.usage_in_bytes")).unwrap_or_default(),
            _ => String::new(),
        };
        let usage = if usage.is_empty() { usage } else { format!(" (in use: {})", usage.trim()) };
        failure(Step::Limits, format!("{refused}{usage}"), refused.source)
    })?;
    for folder in &cgroup.folders {
        let (path, Some(program)) = (folder.absolute(), &folder.devices) else { continue };
        let attach = || sys::attach_device_program(program, &File::open(&path)?);
        attach().doing(Step::Limits, || format!("allow devices in cgroup {}", path.display()))?;
    }
    Ok(())
}

/// More than a container has cgroups, and few enough that one that has more delays its execs alone.
const MAX_FOLDERS: usize = 10_000;

/// More than the kernel writes there.
const MAX_EVENTS_BYTES: u64 = 4 << 10;

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that looks like a cgroup with these processes.
    fn folder(scratch: &scratch::Folder, processes: &str) -> Folder {
        fs::create_dir_all(scratch.join("c")).expect("a folder");
        fs::write(scratch.join("c/cgroup.procs"), processes).expect("a file");
        Folder {
            mount: scratch.display().to_string(),
            path: "c".to_owned(),
            hierarchy: Hierarchy::Unified,
            limits: Vec::new(),
            controllers: Vec::new(),
            of: Vec::new(),
            devices: None,
            owner: None,
        }
    }

    #[test]
    fn a_folder_may_hold_its_placeholder_and_no_other_process() {
        let scratch = scratch::Folder::new("placeholder");
        for (processes, placeholder, is_free) in [
            ("", None, true),
            ("", Some(7), true),
            ("7\n", Some(7), true),
            ("7\n", None, false),
            ("7\n", Some(70), false),
            ("70\n", Some(7), false),
            ("7\n8\n", Some(7), false),
        ] {
            let made = make_folder(&folder(&scratch, processes), placeholder, &mut Made::default());
            match made {
                Ok(()) => assert!(is_free, "{processes:?} {placeholder:?}"),
                Err(failure) => assert!(!is_free && failure.step == Step::Taken, "{processes:?} {placeholder:?}: {failure:?}"),
            }
        }
    }

    #[test]
    fn a_folder_is_made_with_those_above_it_but_not_without_its_mount() {
        let scratch = scratch::Folder::new("parents");
        let own = Folder { path: "a/b/c".to_owned(), hierarchy: Hierarchy::V1, ..folder(&scratch, "") };
        assert!(make(&own).expect("made"));
        assert!(!make(&own).expect("is there") && scratch.join("a/b/c").is_dir());
        let beside = Folder { path: "a/d/e".to_owned(), ..own.clone() };
        make_missing(&beside, &[scratch.join("a/d"), scratch.join("x"), scratch.join("a/d/e")]).expect("made");
        assert!(scratch.join("a/d/e").is_dir() && !scratch.join("x").exists());
        let elsewhere = Folder { mount: scratch.join("none").display().to_string(), ..own };
        assert_eq!(make(&elsewhere).expect_err("no mount").kind(), io::ErrorKind::NotFound);
        assert!(!scratch.join("none").exists());
    }

    #[test]
    fn a_new_cpuset_has_what_the_one_above_it_has() {
        let scratch = scratch::Folder::new("cpuset");
        let write = |folder: &str, [cpus, mems]: [&str; 2]| {
            fs::create_dir_all(scratch.join(folder)).expect("a folder");
            fs::write(scratch.join(folder).join("cpuset.cpus"), cpus).expect("a file");
            fs::write(scratch.join(folder).join("cpuset.mems"), mems).expect("a file");
        };
        write(".", ["0-3\n", "0-1\n"]);
        write("a", ["\n", "1\n"]);
        let own = Folder { path: "a/b/c".to_owned(), hierarchy: Hierarchy::Cpuset, ..folder(&scratch, "") };
        for is_new in [true, false] {
            assert_eq!(make(&own).expect("made"), is_new);
            for name in ["a", "a/b", "a/b/c"] {
                let read = |file: &str| fs::read_to_string(scratch.join(name).join(file)).expect("a file");
                assert_eq!((read("cpuset.cpus"), read("cpuset.mems")), ("0-3\n".to_owned(), "1\n".to_owned()), "{name}");
            }
            // One that is there keeps what it has.
            write("a/b/c", ["0-3\n", "1\n"]);
        }
        write("a/b/c", ["2\n", "1\n"]);
        make(&own).expect("is there");
        assert_eq!(fs::read_to_string(scratch.join("a/b/c/cpuset.cpus")).expect("a file"), "2\n");
    }

    #[test]
    fn systemds_folder_is_not_made_in_its_place() {
        let scratch = scratch::Folder::new("gone");
        let own = |of: &[&str], path: &str| Folder {
            path: path.to_owned(),
            of: of.iter().map(|name| (*name).to_owned()).collect(),
            hierarchy: if of.is_empty() { Hierarchy::Unified } else { Hierarchy::V1 },
            ..folder(&scratch, "")
        };
        for folders in [vec![own(&[], "unified")], vec![own(&["name=systemd"], "systemd"), own(&[], "unified")]] {
            let cgroup = Cgroup { folders, placeholder: Some(7) };
            let failure = Joining::make(&cgroup).expect_err("nothing is there");
            assert!(failure.what.contains("systemd's cgroup") && failure.what.ends_with("is gone"), "{failure:?}");
        }
        assert!(!scratch.join("unified").exists() && !scratch.join("systemd").exists());
    }
}
