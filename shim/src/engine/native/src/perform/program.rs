//! Turns the calling process into the process that was planned.
//!
//! Owns what is allowed to it, its environment, and the search for its program.
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{Mode, umask};
use nix::unistd::fchdir;

use super::descriptors::Kept;
use super::labels::Attributes;
use super::root::{self, Root};
use super::sync::{ChildEnd, Message};
use super::{Doing, Failure, Step, errno_text, ids, init};
use crate::plan::Process;
use crate::sys;

/// What a process is to its container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Its working directory is made if it is missing.
    Init,
    /// Its profile of AppArmor is set once it has its user's ids, as runc does.
    Added,
}

/// A process that only has to be executed.
pub(super) struct Program {
    path: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
}

/// Gives up privileges, loads the filter, and finds the program as the user.
///
/// Source of the order: docs/engine.md.
pub(super) fn become_it(
    process: &Process,
    kept: &Kept,
    attributes: &Attributes,
    performer: &ChildEnd,
    role: Role,
) -> Result<Program, Failure> {
    let doing = |what: &str| {
        let what = what.to_owned();
        move || what
    };
    // Before any path of the container is followed without its root.
    let still_needed: Vec<RawFd> = std::iter::once(performer.as_raw_fd()).chain(attributes.number()).collect();
    kept.close_others(&still_needed).doing(Step::Identity, doing("close what the program does not get"))?;
    let root = root::absolute(Path::new("/")).map(Root::new).doing(Step::Identity, doing("open the root"))?;
    let environment = environment(process, &root);
    umask(Mode::from_bits_truncate(process.umask));
    if role == Role::Init {
        attributes.confine(process)?;
    }
    attributes.label(process)?;
    // The user may not be allowed where root is; or, on a network file system, the other way round. A filter may forbid what this takes.
    let entered = enter(&root, &process.cwd, role == Role::Init);
    drop(root);
    if role == Role::Init {
        attributes.close();
    }
    if process.no_new_privileges {
        sys::set_no_new_privileges().doing(Step::Identity, doing("set no new privileges"))?;
    } else {
        // Afterwards it needs a capability that the process may not have any more.
        load_filter(process, performer)?;
    }
    if let Some(sets) = &process.capabilities {
        for number in (0..64).filter(|number| sets.bounding & (1 << number) == 0) {
            match sys::drop_bounding(number) {
                // Above the kernel's last.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => break,
                other => other.doing(Step::Identity, doing("drop a capability from the bounding set"))?,
            }
        }
        sys::set_keep_capabilities(true).doing(Step::Identity, doing("keep capabilities"))?;
    }
    ids::own_streams(process.uid)?;
    match sys::set_groups(&process.groups) {
        // A user namespace can forbid it; then there are none to get rid of.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) && is_setgroups_denied() => {}
        other => other.doing(Step::Identity, doing("set the additional groups"))?,
    }
    sys::set_ids(process.uid, process.gid).doing(Step::Identity, || format!("become user {}:{}", process.uid, process.gid))?;
    // The change of ids may have allowed it again: `fs.suid_dumpable`.
    sys::set_dumpable(false).doing(Step::Identity, doing("forbid tracing"))?;
    if role == Role::Added {
        attributes.confine(process)?;
        attributes.close();
    }
    entered
        .or_else(|_as_root| std::env::set_current_dir(&process.cwd))
        .doing(Step::Identity, || format!("chdir to cwd ({:?}) set in config.json failed", process.cwd))?;
    check_cwd()?;
    if let Some(sets) = &process.capabilities {
        sys::set_keep_capabilities(false).doing(Step::Identity, doing("keep no capabilities"))?;
        sys::set_capabilities(sets.effective, sets.permitted, sets.inheritable).doing(Step::Identity, doing("set capabilities"))?;
        sys::clear_ambient().doing(Step::Identity, doing("clear ambient capabilities"))?;
        for number in (0..64).filter(|number| sets.ambient & (1 << number) != 0) {
            // As the other runtimes do: it is not inheritable and permitted, so it cannot be ambient.
            let _ = sys::raise_ambient(number);
        }
    }
    let path = find(process)?;
    let program = Program {
        path: text(path.as_os_str().as_bytes())?,
        arguments: process.args.iter().map(|argument| text(argument.as_bytes())).collect::<Result<_, _>>()?,
        environment,
    };
    if process.no_new_privileges {
        load_filter(process, performer)?;
    }
    Ok(program)
}

impl Program {
    /// Executes it. Returns only if that failed, with the failure.
    pub(super) fn execute(&self) -> Failure {
        let error = sys::execute(&self.path, &self.arguments, &self.environment);
        Failure {
            step: Step::Program,
            what: format!("exec {}", self.path.to_string_lossy()),
            errno: error.raw_os_error().unwrap_or(libc::EIO),
        }
    }
}

/// Loads the filter, and lets the performer fetch the descriptor of the agent that decides about calls. From then on any call but write(2) may be one that
/// waits for the agent.
fn load_filter(process: &Process, performer: &ChildEnd) -> Result<(), Failure> {
    let Some(filter) = &process.filter else { return Ok(()) };
    let doing = || "load the seccomp filter".to_owned();
    if filter.agent.is_none() {
        return sys::load_filter(&filter.program, filter.flags).doing(Step::Filter, doing);
    }
    let listener = sys::load_filter_with_listener(&filter.program, filter.flags).doing(Step::Filter, doing)?;
    // Closed afterwards: else calls would wait for an agent that has exited.
    init::report_and_wait(performer, &Message::Filtered { listener: listener.as_raw_fd() })
}

/// Enters the working directory, which is made with its parents if it is missing and may be.
fn enter(root: &Root, cwd: &str, make: bool) -> io::Result<()> {
    let open = || root.open(cwd, OFlag::O_PATH | OFlag::O_DIRECTORY);
    let folder = match open() {
        Err(error) if error.kind() == io::ErrorKind::NotFound && make => {
            let before = umask(Mode::empty());
            let made = root.folder(cwd);
            umask(before);
            made?;
            open()?
        }
        opened => opened?,
    };
    Ok(fchdir(folder)?)
}

/// A working directory outside the root, reached through a leaked descriptor, has no absolute path.
fn check_cwd() -> Result<(), Failure> {
    let cwd = sys::current_directory().doing(Step::Identity, || "find the working directory".to_owned())?;
    if cwd.first() == Some(&b'/') {
        return Ok(());
    }
    Err(Failure { step: Step::Identity, what: "the working directory is outside the container's root".to_owned(), errno: 0 })
}

fn is_setgroups_denied() -> bool {
    std::fs::read("/proc/self/setgroups").is_ok_and(|word| word.trim_ascii() == b"deny")
}

fn environment(process: &Process, root: &Root) -> Vec<CString> {
    let is_home = |entry: &&String| entry.starts_with("HOME=");
    let mut entries: Vec<String> = process.env.clone();
    if process.env.iter().find(is_home).is_none_or(|entry| entry == "HOME=") {
        entries.retain(|entry| !is_home(&entry));
        entries.push(format!("HOME={}", home(root, process.uid).unwrap_or_else(|| "/".to_owned())));
    }
    // None has a NUL byte: the plan has refused it, and a passwd's line with one is skipped.
    entries.into_iter().filter_map(|entry| CString::new(entry).ok()).collect()
}

/// The home of a user in the container's passwd: an ordinary file of limited size, whatever the image has there.
fn home(root: &Root, uid: u32) -> Option<String> {
    let file = File::from(root.open("/etc/passwd", OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let uid = uid.to_string();
    for line in BufReader::new(file.take(MAX_PASSWD_BYTES)).lines() {
        let line = line.ok()?;
        let fields: Vec<&str> = line.split(':').collect();
        if fields.len() >= 6 && fields[2] == uid && !fields[5].contains('\0') {
            return Some(fields[5].to_owned()).filter(|home| !home.is_empty());
        }
    }
    None
}

/// Finds the program as the user who will execute it.
fn find(process: &Process) -> Result<PathBuf, Failure> {
    let name = &process.args[0];
    let refuse = |text: String| Failure { step: Step::Program, what: format!("exec: {name:?}: {text}"), errno: 0 };
    if name.contains('/') {
        return match check(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(errno @ (Errno::EISDIR | Errno::EACCES)) => Err(refuse(errno_text(errno as i32))),
            Err(errno) => Err(refuse(format!("stat {name}: {}", errno_text(errno as i32)))),
        };
    }
    let path = process.env.iter().rev().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or_default();
    let found = std::env::split_paths(OsStr::new(path)).find_map(|folder| {
        let folder = if folder.as_os_str().is_empty() { PathBuf::from(".") } else { folder };
        let candidate = folder.join(name);
        (!name.is_empty() && check(&candidate).is_ok()).then_some(candidate)
    });
    found.ok_or_else(|| refuse("executable file not found in $PATH".to_owned()))
}

fn check(path: &Path) -> Result<(), Errno> {
    let about = nix::sys::stat::stat(path)?;
    if about.st_mode & libc::S_IFMT == libc::S_IFDIR {
        return Err(Errno::EISDIR);
    }
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_nul| Errno::EINVAL)?;
    match sys::may_execute(&path) {
        Ok(()) => Ok(()),
        // A filter may not know the call; as runc does, the permissions have to answer then.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSYS | libc::EPERM)) => {
            if about.st_mode & 0o111 == 0 {
                Err(Errno::EACCES)
            } else {
                Ok(())
            }
        }
        Err(error) => Err(Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}

fn text(bytes: &[u8]) -> Result<CString, Failure> {
    CString::new(bytes).map_err(|_nul| Failure { step: Step::Plan, what: "an argument has a NUL byte".to_owned(), errno: 0 })
}

const MAX_PASSWD_BYTES: u64 = 1 << 20;
