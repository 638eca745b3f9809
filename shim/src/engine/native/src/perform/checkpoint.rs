//! Has criu save the processes of a container.
//!
//! **Invariant:** whatever fails, the processes go on: thawed, unless they were frozen before.
use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::fcntl::{OFlag, openat, readlink};
use nix::sys::stat::{Mode, stat};

use super::criu::{EXTERNAL_NAMESPACES, Options, Request, Session};
use super::root::{self, Root};
use super::{Doing, Failure, Step};
use crate::control;
use crate::host::unescape;
use crate::plan::{Checkpoint, Create};

/// Saves the container whose init is `pid`.
pub(super) fn save(plan: &Checkpoint, pid: u32) -> Result<(), Failure> {
    let saved = dump(plan, pid);
    let cgroup = &plan.imaged.create.cgroup;
    // criu leaves frozen what it has found frozen, also what it has killed, and what it has frozen itself if it is killed.
    let restored = match (&saved, plan.is_paused && (saved.is_err() || !plan.exit)) {
        (_, true) => control::freeze(cgroup),
        (_, false) => control::thaw(cgroup),
    };
    // A cgroup that is gone has nothing in it.
    saved.and(match restored {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).doing(Step::Cgroup, || "thaw the container".to_owned()),
        Ok(()) | Err(_) => Ok(()),
    })
}

fn dump(plan: &Checkpoint, pid: u32) -> Result<(), Failure> {
    let (criu, create) = (&plan.imaged.criu, &plan.imaged.create);
    let (image, work) = (open_folder(&criu.image)?, open_folder(&criu.work)?);
    write_descriptors(&image, pid).doing(Step::Criu, || format!("write {}/{DESCRIPTORS}", criu.image))?;
    let freezer = control::freezer_folder(&create.cgroup).doing(Step::Criu, || "find the freezer of the cgroup".to_owned())?;
    let mut options = Options::new(criu, create, &image, &work, "dump.log");
    options.dump(pid, !plan.exit, &freezer.to_string_lossy());
    for (path, name) in mounts(create, pid).doing(Step::Criu, || "read the mounts of the container".to_owned())? {
        options.external_mount(&path, &name);
    }
    for (kind, file, name) in EXTERNAL_NAMESPACES {
        if create.joined(kind).is_some() {
            let about =
                stat(format!("/proc/{pid}/ns/{file}").as_str()).doing(Step::Namespaces, || format!("look at the {file} namespace"))?;
            options.external(&format!("{file}[{}]:{name}", about.st_ino));
        }
    }
    Session::start(criu, None, &[])?.request(Request::Dump, &options, |_| Ok(())).map(drop)
}

/// The mounts of the plan that come from outside: where the container has them, and the names that the configuration gives them.
fn mounts(create: &Create, pid: u32) -> io::Result<Vec<(String, String)>> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))?;
    let mounted: BTreeSet<String> = text.lines().filter_map(|line| line.split(' ').nth(4)).map(unescape).collect();
    let root = Root::new(root::absolute(Path::new(&format!("/proc/{pid}/root")))?);
    // A link on the way to a target: the mount is where it leads.
    let resolve = |name: &str| -> Option<String> {
        let found = root.find(name).ok()?;
        readlink(format!("/proc/self/fd/{}", found.as_raw_fd()).as_str()).ok()?.into_string().ok()
    };
    let external = create.external_mounts().filter_map(|(name, _)| {
        let path = if mounted.contains(name) { name.to_owned() } else { resolve(name).filter(|path| mounted.contains(path))? };
        Some((path, name.to_owned()))
    });
    Ok(external.collect())
}

pub(super) fn open_folder(path: &str) -> Result<OwnedFd, Failure> {
    nix::fcntl::open(Path::new(path), OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC, Mode::empty())
        .doing(Step::Criu, || format!("open {path}"))
}

/// What the three streams of init are, for the restore: pipes have other names then.
///
/// Source: the file that runc and crun write and read.
fn write_descriptors(image: &OwnedFd, pid: u32) -> io::Result<()> {
    let streams = (0..3).map(|number| match readlink(format!("/proc/{pid}/fd/{number}").as_str()) {
        Ok(target) => Ok(target.to_string_lossy().into_owned()),
        // Closed by the program.
        Err(nix::errno::Errno::ENOENT) => Ok(String::new()),
        Err(error) => Err(error.into()),
    });
    let streams = streams.collect::<io::Result<Vec<String>>>()?;
    // A pipe of this name without a reader would be waited for.
    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_TRUNC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = openat(image, DESCRIPTORS, flags, Mode::from_bits_truncate(0o600))?;
    File::from(file).write_all(serde_json::to_string(&streams)?.as_bytes())
}

/// Reads what [`write_descriptors`] or another runtime has written.
pub(super) fn read_descriptors(image: &OwnedFd) -> io::Result<Vec<String>> {
    let file = openat(image, DESCRIPTORS, OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC, Mode::empty())?;
    let mut text = Vec::new();
    File::from(file).take(MAX_DESCRIPTORS_BYTES).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

const DESCRIPTORS: &str = "descriptors.json";

/// More than three paths have.
const MAX_DESCRIPTORS_BYTES: u64 = 64 << 10;
