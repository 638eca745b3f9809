//! `start`: provides a shim for the bundle in the working directory.
//!
//! Owns the decision between a new keeper and the group's running one, and the start of a new one.
//!
//! ```text
//!  lock, join or bind ─▶ read the input ─▶ another place? again ─▶ keeper ─▶ unlock, answer
//!                                    └ late? unlock, read on, again
//! ```
//!
//! **Invariant:** when `start` answers, both sockets listen, and the keeper has no descriptor of this process.
use std::cell::OnceCell;
use std::env;
use std::ffi::{CString, OsStr};
use std::fs;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use log::LevelFilter;
use nix::fcntl::{OFlag, open};
use nix::libc;
use nix::sys::stat::Mode;

use super::dialect::{Dialect, Question};
use super::input::Input;
use super::socket::{Lock, Sockets};
use super::{Error, group, placement};
use crate::control;
use crate::executable::{self, Protected};
use crate::handover::{POD_KEY, Snapshot};
use crate::invocation::Flags;
use crate::options::RuntimeOptions;
use crate::run_dir::{self, Place, RunDir};
use crate::settings::Settings;
use crate::sys::{self, spawn::Command};
use crate::whole_file::blocking_replace;

/// How long a `start` waits for another of the same group, and for the group's keeper.
const PATIENCE: Duration = Duration::from_secs(3);
/// How long a `start` that waits for its input makes others of the group wait: less than their patience.
const HELD_FOR: Duration = Duration::from_millis(200);

/// Variables that the keeper inherits, and the runtimes from it. The daemon's others may hold secrets, or tune Go programs.
const VARIABLES: [&str; 5] = ["HOME", "TMPDIR", "XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS"];
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Starts a shim, or joins the group's, and prints its address for containerd.
pub(crate) fn start(flags: &Flags) -> Result<(), Error> {
    let mut deadline = Instant::now() + PATIENCE;
    let bundle = bundle_of(flags)?;
    let is_pod = is_of_pod(&bundle);
    let group = if is_pod { None } else { group::of_bundle(&bundle)? };
    let shim = Shim { flags, bundle: &bundle, is_pod, group: group.as_deref().unwrap_or(&flags.id) };
    // containerd writes the input a while after it has executed this program. What fails is repeated with the input, which may name another place.
    let program = OnceCell::new();
    let ahead = Some(&flags.address).filter(|daemon| !daemon.is_empty()).and_then(|daemon| {
        let place = shim.place(daemon, None).ok()?;
        shim.begin(place, &program, deadline).ok()
    });
    let mut input = Input::default();
    let is_whole = input.read(io::stdin(), Instant::now() + HELD_FOR)?;
    // A client that writes late, or never, delays no other `start` of the group: what was begun for it is dropped, and begun again.
    let ahead = ahead.filter(|_| is_whole);
    if !is_whole {
        input.read_all()?;
        deadline = Instant::now() + PATIENCE;
    }
    let question = Question::parse(&input.bytes, flags);
    let daemon = question.grpc_address.as_deref().unwrap_or(&flags.address);
    let place = shim.place(daemon, question.socket_dir.as_deref())?;
    let Begun { found, place, lock } = match ahead.filter(|begun| begun.place == place) {
        Some(begun) => begun,
        None => shim.begin(place, &program, deadline)?,
    };
    let address = match found {
        Found::Keeper { address, pid } => shim.note(&address, pid).map(|()| address)?,
        Found::None { sockets, program } => shim.launch(&place, sockets, program, &question, daemon)?,
    };
    drop(lock);
    print(question.dialect, &address)
}

/// The requested shim.
struct Shim<'a> {
    flags: &'a Flags,
    bundle: &'a Path,
    /// It is to be a pod, and not for a container.
    is_pod: bool,
    group: &'a str,
}

/// A shim whose place no other `start` takes. Dropped, the place is free again.
struct Begun<'a> {
    // Before the lock: sockets are removed under it.
    found: Found<'a>,
    place: Place,
    lock: Lock,
}

/// What is at the place of a shim.
enum Found<'a> {
    /// A keeper, in which a place is reserved.
    Keeper { address: String, pid: u32 },
    /// Sockets for a new one.
    None { sockets: Sockets, program: &'a Program },
}

impl Shim<'_> {
    fn place(&self, daemon: &str, socket_dir: Option<&Path>) -> Result<Place, Error> {
        Ok(RunDir::from_environment().place(daemon, &self.flags.namespace, self.group, socket_dir)?)
    }

    /// Locks the place, and joins the keeper there, or prepares a new one. `program`: for it, found once. To dissolve its mount takes milliseconds.
    fn begin<'a>(&self, place: Place, program: &'a OnceCell<Program>, deadline: Instant) -> Result<Begun<'a>, Error> {
        run_dir::ensure_private(&RunDir::from_environment().controls())?;
        if let Some(folder) = place.socket.parent() {
            run_dir::ensure_shared(folder)?;
        }
        let lock = Lock::take(&place.lock, deadline)?;
        let found = match self.join(&place, deadline)? {
            Some((address, pid)) => Found::Keeper { address, pid },
            None => {
                let sockets = Sockets::bind(&place)?;
                placement::adjust_oom_score();
                let program = match program.get() {
                    Some(found) => found,
                    None => {
                        let found = Program::find()?;
                        program.get_or_init(|| found)
                    }
                };
                Found::None { sockets, program }
            }
        };
        Ok(Begun { found, place, lock })
    }

    /// Reserves a place in the running keeper, if there is one. Returns its address and pid.
    fn join(&self, place: &Place, deadline: Instant) -> Result<Option<(String, u32)>, Error> {
        let snapshot = loop {
            match control::join(&place.control, &self.flags.id, deadline) {
                Ok(snapshot) => break snapshot,
                // A clients' socket without a control socket is stale, unless another process listens on it.
                Err(error) if error.is_gone() => match control::is_listening(&place.socket, Duration::from_millis(100)) {
                    true if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
                    true => return Err(Error::Foreign { path: place.socket.clone() }),
                    false => return Ok(None),
                },
                Err(error) => return Err(error.into()),
            }
        };
        let key = if self.is_pod { POD_KEY } else { &self.flags.id };
        match snapshot.state.iter().find(|(id, _)| id == key) {
            Some((_, state)) => Err(self.exists(snapshot.keeper_pid, state)),
            None => Ok(Some((address_of(&snapshot, place), snapshot.keeper_pid))),
        }
    }

    fn exists(&self, keeper: u32, state: &[u8]) -> Error {
        let bundle = bundle_in(state).unwrap_or_else(|| self.bundle.to_owned());
        let (id, namespace) = (self.flags.id.clone(), self.flags.namespace.clone());
        if self.is_pod {
            Error::PodExists { id, namespace, bundle, keeper }
        } else {
            Error::AlreadyExists { id, namespace, bundle, keeper }
        }
    }

    /// Records the shim's address and pid in the bundle, for containerd and for operators.
    fn note(&self, address: &str, keeper: u32) -> Result<(), Error> {
        write_file(&self.bundle.join("address"), address.as_bytes())?;
        write_file(&self.bundle.join("shim.pid"), keeper.to_string().as_bytes())
    }

    /// Starts a new keeper. Returns its address.
    fn launch(&self, place: &Place, sockets: Sockets, program: &Program, question: &Question, daemon: &str) -> Result<String, Error> {
        let address = format!("unix://{}", text_of(&place.socket)?);
        let level = if self.flags.debug { LevelFilter::Debug } else { LevelFilter::Info };
        let settings = Settings {
            namespace: self.flags.namespace.clone(),
            id: self.group.to_owned(),
            containerd_address: daemon.to_owned(),
            ttrpc_address: question.ttrpc_address.clone().or_else(|| variable("TTRPC_ADDRESS")),
            shim_address: address.clone(),
            control_path: place.control.clone(),
            bundle: self.bundle.to_owned(),
            log_level: question.log_level.map_or(level, |asked| asked.max(level)),
        };
        text_of(self.bundle)?;

        placement::separate_cores()?;
        // Create refuses options that cannot be decoded, by name.
        let options = RuntimeOptions::blocking_read(question.options.as_ref()).unwrap_or_default();
        if let Some(cgroup) = &options.shim_cgroup {
            placement::join_cgroup(cgroup)?;
        }
        let keeper = program.execute(&settings, &sockets)?;
        if let Err(error) = self.note(&address, keeper) {
            // Its address was not published, and its sockets are removed now. It is our child: its pid is not reused.
            let _ = sys::process::open(keeper).and_then(|keeper| sys::process::signal(keeper.as_fd(), libc::SIGKILL));
            return Err(error);
        }
        sockets.keep();
        Ok(address)
    }
}

/// The program of a new keeper: this process's own.
struct Program {
    file: OwnedFd,
    /// Its path, for operators.
    path: PathBuf,
    /// The same on a mount of its own, or why it cannot have one.
    protected: io::Result<Protected>,
}

impl Program {
    fn find() -> Result<Self, Error> {
        let own = Path::new("/proc/self/exe");
        let failed = |source| Error::Io { op: "execute", path: own.to_owned(), source };
        let file: OwnedFd = open(own, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(|error| failed(error.into()))?;
        let path = fs::read_link(own).map_err(failed)?;
        let protected = executable::protect(file.as_fd());
        Ok(Self { file, path, protected })
    }

    /// Starts the keeper. Returns its pid.
    fn execute(&self, settings: &Settings, sockets: &Sockets) -> Result<u32, Error> {
        let launch = Launch { settings, sockets, path: &self.path };
        let unprotected = |error: &io::Error| launch.spawn(self.file.as_fd(), Err(error));
        let begun = match &self.protected {
            // On a mount that no rule of the host's administrator names, the program may be refused too.
            Ok(protected) => launch.spawn(protected.file.as_fd(), Ok(protected.mount.as_fd())).or_else(|error| unprotected(&error)),
            Err(error) => unprotected(error),
        };
        begun.map_err(|source| Error::Io { op: "execute", path: self.path.clone(), source })
    }
}

/// A keeper about to be started.
struct Launch<'a> {
    settings: &'a Settings,
    sockets: &'a Sockets,
    /// The program's path, for operators.
    path: &'a Path,
}

impl Launch<'_> {
    /// Executes `program`. `mount`: the one that it is on, or why it has none of its own.
    fn spawn(&self, program: BorrowedFd<'_>, mount: Result<BorrowedFd<'_>, &io::Error>) -> io::Result<u32> {
        let (path, why) = (self.path.to_string_lossy(), mount.err().map(ToString::to_string));
        let words = ["keeper", &path].into_iter().chain(why.iter().flat_map(|why| ["unprotected", why]));
        let argv = self.settings.command_line(&words.collect::<Vec<_>>())?;
        let sockets = [&self.sockets.clients, &self.sockets.control].map(AsFd::as_fd);
        let descriptors: Vec<_> = sockets.into_iter().chain(mount.ok()).collect();
        // In the root directory, not the bundle: a working directory would keep its file system busy while the pod runs.
        let command = Command::of_executable(program, argv, environment(), &descriptors)?;
        sys::spawn::spawn_and_wait(&Command { dies_with_parent: false, ..command })
    }
}

fn environment() -> Vec<CString> {
    let path = variable("PATH").unwrap_or_else(|| DEFAULT_PATH.to_owned());
    // A per-thread malloc cache does not help a process that waits; it keeps pages from being returned.
    let mut environment = vec![format!("PATH={path}").into_bytes(), b"GLIBC_TUNABLES=glibc.malloc.tcache_count=0".to_vec()];
    for (name, value) in env::vars_os() {
        let is_known = |name: &str| VARIABLES.contains(&name) || name.starts_with("X_SHIM_");
        let is_fault = cfg!(feature = "fault-injection") && name == "X_FAULT";
        let known = is_fault || name.to_str().is_some_and(is_known);
        if known {
            environment.push([name.into_vec(), vec![b'='], value.into_vec()].concat());
        }
    }
    environment.into_iter().filter_map(|entry| CString::new(entry).ok()).collect()
}

fn variable(name: &str) -> Option<String> {
    env::var(name).ok().filter(|value| !value.is_empty())
}

/// The address of a running keeper, from its command line: the daemon may choose another folder now than it did then.
fn address_of(snapshot: &Snapshot, place: &Place) -> String {
    let recorded = || {
        let line = fs::read(format!("/proc/{}/cmdline", snapshot.keeper_pid)).ok()?;
        let mut arguments = line.split(|byte| *byte == 0).map(|argument| OsStr::from_bytes(argument).to_str().map(str::to_owned));
        arguments.next()?;
        let arguments: Vec<String> = arguments.collect::<Option<_>>()?;
        let flags = arguments.iter().rposition(|argument| argument == "keeper")?;
        Settings::from_arguments(&arguments[..flags]).ok().map(|settings| settings.shim_address)
    };
    recorded().unwrap_or_else(|| format!("unix://{}", place.socket.display()))
}

pub(super) fn bundle_of(flags: &Flags) -> Result<PathBuf, Error> {
    if let Some(bundle) = flags.bundle.as_ref().filter(|bundle| bundle.is_absolute()) {
        return Ok(bundle.clone());
    }
    env::current_dir().map_err(|source| Error::Io { op: "find", path: "the working directory".into(), source })
}

/// Whether a bundle is that of a pod: containerd writes a configuration into those of containers. Clients of its sandbox controller can give one
/// to a pod as well, whose bundle is in the controller's folder.
pub(crate) fn is_of_pod(bundle: &Path) -> bool {
    let controllers = bundle.ancestors().nth(2).and_then(Path::file_name);
    bundle.is_dir() && (controllers.is_some_and(|name| name == SANDBOX_CONTROLLER) || !bundle.join("config.json").exists())
}

/// The folder of containerd's controller of sandboxes in shims: `FOLDER/NAMESPACE/ID` is a bundle.
const SANDBOX_CONTROLLER: &str = "io.containerd.sandbox.controller.v1.shim";

/// The bundle in a keeper's record of a container.
pub(super) fn bundle_in(state: &[u8]) -> Option<PathBuf> {
    let state: serde_json::Value = serde_json::from_slice(state).ok()?;
    state.get("bundle").and_then(serde_json::Value::as_str).map(PathBuf::from)
}

fn text_of(path: &Path) -> Result<&str, Error> {
    path.to_str().ok_or_else(|| Error::NotText { path: path.to_owned() })
}

fn write_file(path: &Path, content: &[u8]) -> Result<(), Error> {
    blocking_replace(path, content, 0o644).map_err(|source| Error::Io { op: "write", path: path.to_owned(), source })
}

fn print(dialect: Dialect, address: &str) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(&dialect.answer(address)).and_then(|()| stdout.flush()).map_err(|source| Error::Stdout { source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_runtimes_need_reaches_the_keeper() {
        let names: Vec<String> =
            environment().iter().map(|entry| entry.to_string_lossy().split('=').next().unwrap_or_default().to_owned()).collect();
        assert_eq!(names.iter().filter(|name| *name == "PATH").count(), 1);
        let known = |name: &String| {
            matches!(name.as_str(), "PATH" | "GLIBC_TUNABLES") || VARIABLES.contains(&name.as_str()) || name.starts_with("X_SHIM_")
        };
        assert!(names.iter().all(known), "{names:?}");
    }
}
