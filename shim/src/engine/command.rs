//! The engine for OCI command lines: runc, crun, or any other runtime that takes the same arguments.
//!
//! Owns the arguments, descriptors and environment of each invocation.
//!
//! **Invariant:** the runtime gets only the variables of [`ENVIRONMENT`] of the daemon's environment, and only the
//! three descriptors that are named here. Its log goes to a pipe of that one invocation.
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::choice::{self, Choice, EngineNotFound};
use super::{Checkpoint, Container, Create, EngineError, Exec, Restore, Verb, complaint};
use crate::handover::{Exited, Fd, LOG_ARGUMENT, Spawn, Stream};
use crate::options::{CriuOptions, RuntimeOptions};

/// An OCI command line. Recorded with its container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CommandEngine {
    /// Absolute path of the runtime.
    binary: PathBuf,
    /// The folder of the runtime's own state for one namespace: `--root`.
    root: PathBuf,
    #[serde(default, skip_serializing_if = "is_false")]
    systemd_cgroup: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    no_pivot_root: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    no_new_keyring: bool,
    #[serde(default, skip_serializing_if = "is_false")]
    debug: bool,
    /// `NAME=value`.
    environment: Vec<String>,
}

impl CommandEngine {
    /// Chooses the engine for a container of `namespace`, and gives the reason: see [`Choice`]. Reads files.
    ///
    /// Source of the root: `join(Root, namespace)` with `/run/containerd/runc` as the default, as the stock shim does, so
    /// that `runc --root … list` finds containers where operators expect them.
    pub(crate) fn blocking_choose(options: &RuntimeOptions, namespace: &str, debug: bool) -> Result<(Self, String), EngineNotFound> {
        Self::blocking_choose_from(options, namespace, debug, |name| std::env::var(name).ok())
    }

    fn blocking_choose_from(
        options: &RuntimeOptions,
        namespace: &str,
        debug: bool,
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<(Self, String), EngineNotFound> {
        let path = variable("PATH").filter(|path| !path.is_empty()).unwrap_or_else(|| DEFAULT_PATH.to_owned());
        let Choice { binary, reason } = Choice::blocking_make(options.binary_name.as_deref(), &path)?;
        // runc and crun find criu in PATH only.
        let path = match options.criu_path.as_deref().and_then(Path::parent) {
            Some(folder) => format!("{}:{path}", folder.display()),
            None => path,
        };
        let mut environment = vec![format!("PATH={path}")];
        for name in ENVIRONMENT {
            environment.extend(variable(name).filter(|value| !value.contains('\0')).map(|value| format!("{name}={value}")));
        }
        let root = options.root.as_deref().unwrap_or(Path::new(DEFAULT_ROOT));
        let engine = Self {
            binary,
            root: root.join(namespace),
            systemd_cgroup: options.systemd_cgroup,
            no_pivot_root: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            debug,
            environment,
        };
        Ok((engine, reason))
    }

    /// The runtime's path at the creation of the container.
    pub(crate) fn binary(&self) -> &Path {
        &self.binary
    }

    /// The runtime's path now: a package upgrade may have moved it. The recorded one if no other is found.
    fn blocking_locate(&self) -> PathBuf {
        let elsewhere = || choice::find(self.binary.file_name()?.to_str()?, self.path());
        if choice::is_executable(&self.binary) { self.binary.clone() } else { elsewhere().unwrap_or_else(|| self.binary.clone()) }
    }

    /// The runtime's PATH.
    fn path(&self) -> &str {
        self.environment.iter().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH)
    }

    /// The runtime's state of a container: every OCI runtime uses a folder named after the container.
    pub(crate) fn state_of(&self, id: &str) -> PathBuf {
        self.root.join(id)
    }

    /// The command line up to the verb. Streams are `/dev/null`.
    fn begin(&self, key: &str, cwd: &Path, verb: &str) -> Arguments {
        let mut arguments = Arguments(Spawn {
            key: key.to_owned(),
            env: self.environment.iter().map(|entry| entry.clone().into_bytes()).collect(),
            cwd: cwd.to_string_lossy().into_owned(),
            fds: vec![Fd::Null, Fd::Null, Fd::Null],
            ..Spawn::default()
        });
        arguments.add(self.blocking_locate()).pair("--root", &self.root).flag(self.debug, "--debug");
        arguments.add("--log").add(OsStr::from_bytes(LOG_ARGUMENT)).pair("--log-format", "json");
        arguments.flag(self.systemd_cgroup, "--systemd-cgroup").add(verb);
        arguments
    }

    /// A verb whose only argument is the container. Its output beside the log is kept for the error.
    fn plain(&self, at: &Container<'_>, verb: &str) -> Arguments {
        let mut arguments = self.begin(at.id, at.bundle, verb);
        arguments.0.fds = vec![Fd::Null, Fd::Output, Fd::Output];
        arguments
    }
}

/// The verbs. Every verb gives the process that performs it. Its exit goes to [`CommandEngine::interpret`].
impl CommandEngine {
    /// Makes a container: its init exists afterwards, stopped before the user's program, its pid in the pid file.
    pub(crate) fn create(&self, at: &Container<'_>, create: &Create<'_>) -> Spawn {
        let mut arguments = self.begin(create.stdio_key, at.bundle, "create");
        arguments.pair("--bundle", at.bundle).pair("--pid-file", create.pid_file);
        arguments.flag(self.no_pivot_root, "--no-pivot").flag(self.no_new_keyring, "--no-new-keyring");
        arguments.process(create.stdio_key, create.console_socket);
        arguments.finish(at.id)
    }

    /// Lets init run the user's program.
    pub(crate) fn start(&self, at: &Container<'_>) -> Spawn {
        self.plain(at, "start").finish(at.id)
    }

    /// Starts another process in a container; its pid is in the pid file afterwards.
    pub(crate) fn exec(&self, at: &Container<'_>, exec: &Exec<'_>) -> Spawn {
        let mut arguments = self.begin(exec.stdio_key, at.bundle, "exec");
        arguments.pair("--process", exec.process_file).add("--detach").pair("--pid-file", exec.pid_file);
        arguments.process(exec.stdio_key, exec.console_socket);
        arguments.finish(at.id)
    }

    /// Removes the engine's state of a container, and its cgroups. With `force` its processes are killed first.
    pub(crate) fn delete(&self, at: &Container<'_>, force: bool) -> Spawn {
        let mut arguments = self.plain(at, "delete");
        arguments.flag(force, "--force");
        arguments.finish(at.id)
    }

    /// Signals init, or with `all` every process of the container.
    pub(crate) fn kill(&self, at: &Container<'_>, signal: i32, all: bool) -> Spawn {
        let mut arguments = self.plain(at, "kill");
        arguments.flag(all, "--all").add(at.id).add(signal.to_string());
        arguments.0
    }

    /// Freezes every process of the container.
    pub(crate) fn pause(&self, at: &Container<'_>) -> Spawn {
        self.plain(at, "pause").finish(at.id)
    }

    /// Thaws every process of the container.
    pub(crate) fn resume(&self, at: &Container<'_>) -> Spawn {
        self.plain(at, "resume").finish(at.id)
    }

    /// Changes limits. `resources` is a file with a `LinuxResources` of the runtime specification as JSON.
    pub(crate) fn update(&self, at: &Container<'_>, resources: &Path) -> Spawn {
        let mut arguments = self.plain(at, "update");
        arguments.pair("--resources", resources);
        arguments.finish(at.id)
    }

    /// Writes the container's state into files.
    pub(crate) fn checkpoint(&self, at: &Container<'_>, checkpoint: &Checkpoint<'_>) -> Spawn {
        let mut arguments = self.plain(at, "checkpoint");
        arguments.pair("--image-path", checkpoint.image_path).pair("--work-path", checkpoint.work_path);
        arguments.flag(!checkpoint.exit, "--leave-running").criu(checkpoint.options);
        arguments.finish(at.id)
    }

    /// Makes a container from such files: it runs afterwards, its init's pid in the pid file.
    pub(crate) fn restore(&self, at: &Container<'_>, restore: &Restore<'_>) -> Spawn {
        let mut arguments = self.begin(restore.stdio_key, at.bundle, "restore");
        arguments.pair("--bundle", at.bundle).pair("--image-path", restore.image_path).pair("--work-path", restore.work_path);
        arguments.pair("--pid-file", restore.pid_file).add("--detach").flag(self.no_pivot_root, "--no-pivot").criu(restore.options);
        arguments.process(restore.stdio_key, restore.console_socket);
        arguments.finish(at.id)
    }

    /// Lists the processes of the container on its output: see [`Self::interpret_pids`].
    pub(crate) fn pids(&self, at: &Container<'_>) -> Spawn {
        let mut arguments = self.begin(at.id, at.bundle, "ps");
        arguments.0.fds = vec![Fd::Null, Fd::Output, Fd::Null];
        arguments.pair("--format", "json");
        arguments.finish(at.id)
    }

    /// Prints the container's state: see [`Self::blocking_is_in_bundle`].
    pub(crate) fn state(&self, at: &Container<'_>) -> Spawn {
        let mut arguments = self.begin(at.id, at.bundle, "state");
        arguments.0.fds = vec![Fd::Null, Fd::Output, Fd::Null];
        arguments.finish(at.id)
    }

    /// Prints the engine's features as JSON.
    pub(crate) fn features(&self) -> Spawn {
        let mut arguments = self.begin("", Path::new("/"), "features");
        arguments.0.fds = vec![Fd::Null, Fd::Output, Fd::Null];
        arguments.0
    }

    /// The error of a verb whose program could not be started because the engine is missing.
    pub(crate) fn blocking_explain(&self, verb: Verb) -> Option<EngineError> {
        if choice::is_executable(&self.blocking_locate()) {
            return None;
        }
        let (binary, path) = (self.binary.display(), self.path());
        let message =
            format!("{binary} is not an executable file any more, and none of its name is in PATH={path}; install it again and repeat");
        Some(EngineError::Gone { verb, message })
    }

    /// Whether a verb succeeded, or why not.
    pub(crate) fn interpret(&self, verb: Verb, exited: &Exited) -> Result<(), EngineError> {
        if exited.status == 0 { Ok(()) } else { Err(complaint::read(&self.binary, verb, exited)) }
    }

    /// The process ids that [`Self::pids`] found.
    pub(crate) fn interpret_pids(&self, exited: &Exited) -> Result<Vec<u32>, EngineError> {
        self.interpret(Verb::Pids, exited)?;
        // runc prints `null` for an empty cgroup.
        serde_json::from_slice::<Option<Vec<u32>>>(&exited.output).map(Option::unwrap_or_default).map_err(|error| EngineError::Failed {
            verb: Verb::Pids,
            message: format!("{} printed no list of process ids: {error}", self.binary.display()),
        })
    }

    /// Whether the container that [`Self::state`] found is the one of this bundle: another daemon's has the id, if not. Absent if it found
    /// none, or one that is not made yet.
    ///
    /// Source: `bundle` in the state of the runtime specification. runc prints it with symbolic links resolved, crun as it was named.
    pub(crate) fn blocking_is_in_bundle(&self, at: &Container<'_>, exited: &Exited) -> Option<bool> {
        #[derive(Deserialize)]
        struct State {
            bundle: PathBuf,
        }
        self.interpret(Verb::State, exited).ok()?;
        let State { bundle } = serde_json::from_slice(&exited.output).ok()?;
        let is_same_folder = || Some(bundle.canonicalize().ok()? == at.bundle.canonicalize().ok()?);
        Some(bundle == at.bundle || is_same_folder().unwrap_or(false))
    }
}

/// A command line under construction.
struct Arguments(Spawn);

impl Arguments {
    fn add(&mut self, argument: impl AsRef<OsStr>) -> &mut Self {
        self.0.argv.push(argument.as_ref().as_bytes().to_vec());
        self
    }

    fn pair(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.add(name).add(value)
    }

    fn flag(&mut self, set: bool, name: &str) -> &mut Self {
        if set { self.add(name) } else { self }
    }

    fn criu(&mut self, options: &CriuOptions) -> &mut Self {
        self.flag(options.open_tcp, "--tcp-established")
            .flag(options.external_unix_sockets, "--ext-unix-sk")
            .flag(options.terminal, "--shell-job")
            .flag(options.file_locks, "--file-locks");
        if let Some(mode) = &options.cgroups_mode {
            self.pair("--manage-cgroups-mode", mode);
        }
        for namespace in &options.empty_namespaces {
            self.pair("--empty-ns", namespace);
        }
        self
    }

    /// The verb leaves a process behind that keeps the streams: those of `key`, or a terminal that goes to `console_socket`.
    fn process(&mut self, key: &str, console_socket: Option<&Path>) {
        self.0.reports_pid = true;
        match console_socket {
            Some(path) => {
                self.pair("--console-socket", path);
                self.0.console_socket = Some(path.to_string_lossy().into_owned());
                // The process gets its streams from the terminal; the runtime's own output is kept for the error: crun reports
                // some failures on stderr only, before it has opened its log.
                self.0.fds = vec![Fd::Null, Fd::Output, Fd::Output];
            }
            None => self.0.fds = [Stream::Stdin, Stream::Stdout, Stream::Stderr].map(|stream| Fd::Process(key.to_owned(), stream)).into(),
        }
    }

    fn finish(mut self, id: &str) -> Spawn {
        self.add(id);
        self.0
    }
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// The variables that a runtime inherits, beside PATH: how it reaches systemd, and where a user's own instance keeps its files.
/// The others are the daemon's alone: secrets, proxies, GOMAXPROCS, NOTIFY_SOCKET, LISTEN_FDS.
const ENVIRONMENT: [&str; 3] = ["XDG_RUNTIME_DIR", "DBUS_SESSION_BUS_ADDRESS", "DBUS_SYSTEM_BUS_ADDRESS"];

/// Used when PATH is not set.
pub(super) const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The stock shim keeps runc's state here.
const DEFAULT_ROOT: &str = "/run/containerd/runc";

#[cfg(test)]
mod tests;
