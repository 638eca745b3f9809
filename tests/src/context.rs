//! The surroundings of a test: a daemon, a namespace of its own, a folder of its own, and the combination it runs for.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use containerd_shim_protos::api::DeleteResponse;
use protobuf::Message as _;
use tonic::Code;

use crate::client::Client;
use crate::container::{Builder, Container, code_of};
use crate::daemon::Daemon;
use crate::events::Events;
use crate::eventually::eventually;
use crate::gate::Gate;
use crate::proc::{self, Process};
use crate::suite::{Runtime, Shim, Suite};
use crate::{cgroups, isolation};

/// The surroundings of one test; cheap to clone.
#[derive(Debug, Clone)]
pub struct Context(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    suite: Suite,
    runtime: Runtime,
    shim: Shim,
    daemon: Arc<Daemon>,
    client: Client,
    folder: PathBuf,
    programs: PathBuf,
    logs: Logs,
}

/// The log and the namespace of each daemon that a test has used.
type Logs = Arc<Mutex<Vec<(PathBuf, String)>>>;

impl Context {
    /// A context on `daemon`.
    pub async fn new(daemon: Arc<Daemon>, runtime: Runtime, shim: Shim, programs: &Path) -> Result<Self> {
        Self::beside(daemon, runtime, shim, programs, Logs::default()).await
    }

    async fn beside(daemon: Arc<Daemon>, runtime: Runtime, shim: Shim, programs: &Path, logs: Logs) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        // of fixed width, so that no name is a part of another
        let namespace = format!("n{:04}", NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = Path::new(isolation::RUN).join(&namespace);
        fs::create_dir_all(&folder)?;
        let client = daemon.client(&namespace).await?;
        let suite = daemon.suite();
        let log = (daemon.folder().join("log"), namespace);
        logs.lock().expect("no panic under this lock").push(log);
        Ok(Self(Arc::new(Inner { suite, runtime, shim, daemon, client, folder, programs: programs.to_owned(), logs })))
    }

    /// The same on a daemon of its own, which may therefore be killed.
    pub async fn with_own_daemon(&self) -> Result<Self> {
        let daemon = Arc::new(Daemon::start(self.0.suite, &self.0.shim).await?);
        Self::beside(daemon, self.0.runtime, self.0.shim.clone(), &self.0.programs, Arc::clone(&self.0.logs)).await
    }

    /// The same, with a daemon whose log records each event.
    pub async fn with_own_verbose_daemon(&self) -> Result<Self> {
        let daemon = Arc::new(Daemon::start_verbose(self.0.suite, &self.0.shim).await?);
        Self::beside(daemon, self.0.runtime, self.0.shim.clone(), &self.0.programs, Arc::clone(&self.0.logs)).await
    }

    /// The same, with a daemon that has containerd's service for sandboxes.
    pub async fn with_own_sandboxes(&self) -> Result<Self> {
        let daemon = Arc::new(Daemon::start_for_sandboxes(self.0.suite, &self.0.shim).await?);
        Self::beside(daemon, self.0.runtime, self.0.shim.clone(), &self.0.programs, Arc::clone(&self.0.logs)).await
    }

    /// The same with another shim and more environment for it.
    pub async fn with_own_shim(&self, shim: &Shim, environment: &[(&str, &str)]) -> Result<Self> {
        let daemon = Arc::new(Daemon::start_with(self.0.suite, shim, environment).await?);
        Self::beside(daemon, self.0.runtime, shim.clone(), &self.0.programs, Arc::clone(&self.0.logs)).await
    }

    /// The same in another namespace of the same daemon.
    pub async fn with_own_namespace(&self) -> Result<Self> {
        Self::new(Arc::clone(&self.0.daemon), self.0.runtime, self.0.shim.clone(), &self.0.programs).await
    }

    /// The Debian suite.
    pub fn suite(&self) -> Suite {
        self.0.suite
    }

    /// The OCI runtime.
    pub fn runtime(&self) -> Runtime {
        self.0.runtime
    }

    /// The option BinaryName of its containers.
    pub fn runtime_binary(&self) -> PathBuf {
        if self.0.shim.is_ours() { self.0.suite.runtime(self.0.runtime) } else { self.runtime_program() }
    }

    /// An OCI runtime's program: crun where the native engine is used, which has none.
    pub fn runtime_program(&self) -> PathBuf {
        let runtime = if self.0.runtime == Runtime::Native { Runtime::program() } else { self.0.runtime };
        self.0.suite.runtime(runtime)
    }

    /// The shim under test.
    pub fn shim(&self) -> &Shim {
        &self.0.shim
    }

    /// The daemon.
    pub fn daemon(&self) -> &Daemon {
        &self.0.daemon
    }

    /// The last lines about the test in the logs of the daemons that it used.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for (path, namespace) in self.0.logs.lock().expect("no panic under this lock").iter() {
            let log = fs::read_to_string(path).unwrap_or_default();
            let lines: Vec<_> = log.lines().filter(|line| line.contains(namespace)).collect();
            for line in &lines[lines.len().saturating_sub(15)..] {
                text.push_str(line);
                text.push('\n');
            }
        }
        text
    }

    /// A client in the test's namespace.
    pub fn client(&self) -> &Client {
        &self.0.client
    }

    /// The test's folder.
    pub fn folder(&self) -> &Path {
        &self.0.folder
    }

    /// One of this package's helper programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.0.programs.join(name)
    }

    /// The cgroup path of a container.
    pub fn cgroup_path(&self, id: &str) -> String {
        format!("/{}/{}/{id}", isolation::cgroup(), self.client().namespace())
    }

    /// A busybox container that runs `args`.
    pub fn container(&self, args: &[&str]) -> Builder {
        Builder::new(self, args).expect("the shared root file system can be made")
    }

    /// The events of the namespace from now on.
    pub async fn events(&self) -> Result<Events> {
        Events::subscribe(self.client()).await
    }

    /// The events of a container that has been deleted; the stock shim of 2.1 sometimes exits before it has published the last one.
    pub async fn history(&self, events: &Events, id: &str) -> Result<Vec<String>> {
        if self.shim().is_ours() {
            return events.of_until(id, "delete").await;
        }
        events.until("the exit of init", |_| !events.exits(id, "").is_empty()).await?;
        let mut published = events.of(id);
        published.retain(|event| event != "delete");
        published.push("delete".to_owned());
        Ok(published)
    }

    /// A gated runtime in front of the real one.
    pub fn gate(&self) -> Result<Gate> {
        Gate::new(&self.folder().join("gate"), &self.program("gated-runtime"), &self.runtime_program())
    }

    /// Kills the daemon with SIGKILL, starts it again and waits until the client works again.
    pub async fn crash_daemon(&self) -> Result<()> {
        self.daemon().kill()?;
        self.revive_daemon().await
    }

    /// Starts the killed daemon again and waits until the client works again.
    pub async fn revive_daemon(&self) -> Result<()> {
        self.daemon().restart().await?;
        self.client().reconnected().await
    }

    /// The shims of this namespace: the keepers of ours.
    pub fn shims(&self) -> Vec<Process> {
        let (namespace, name) = (self.client().namespace(), self.shim().binary_name());
        let ours = |process: &Process| {
            let program = process.command.split(' ').next().unwrap_or_default();
            process.parent == 1 && program.ends_with(&name) && proc::mentions(process.pid, namespace)
        };
        proc::all().into_values().filter(ours).collect()
    }

    /// The pid of the shim that was started for a container or group.
    pub fn shim_pid(&self, id: &str) -> Result<i32> {
        let mut found = self.shims();
        found.retain(|shim| shim.command.split(' ').any(|word| word == id));
        ensure!(found.len() == 1, "exactly one shim of {id} expected: {found:?}");
        Ok(found.remove(0).pid)
    }

    /// Runs the shim's command `delete` in the bundle of a container, as the daemon does for a shim that it believes dead.
    pub async fn delete_command(&self, container: &Container) -> Result<DeleteResponse> {
        let (program, bundle) = (self.shim().binary.as_ref().context("the stock shim has no path here")?, container.bundle());
        let mut command = tokio::process::Command::new(program);
        command.args(["-namespace", self.client().namespace(), "-id", &container.id, "-address"]).arg(self.daemon().address());
        command.arg("-bundle").arg(&bundle).arg("delete").current_dir(&bundle).stdin(Stdio::null()).kill_on_drop(true);
        let output = command.output().await?;
        ensure!(output.status.success(), "delete: {}", String::from_utf8_lossy(&output.stderr));
        Ok(DeleteResponse::parse_from_bytes(&output.stdout)?)
    }

    /// Checks that something was refused with `code`; the stock shim answers Unknown where its state machine refuses.
    pub fn refuses<T>(&self, result: std::result::Result<T, impl Into<anyhow::Error>>, code: Code) -> Result<()> {
        let found = code_of(result)?;
        let excused = !self.shim().is_ours() && found == Code::Unknown;
        ensure!(found == code || excused, "refused with {found:?}, not with {code:?}");
        Ok(())
    }

    /// The leftovers of this namespace.
    pub fn leftovers(&self) -> Vec<String> {
        let namespace = self.client().namespace();
        let mut left = Vec::new();
        for process in proc::all().into_values() {
            if process.pid != 1 && proc::mentions(process.pid, namespace) {
                left.push(format!("process {} {}", process.pid, process.command));
            }
        }
        for folder in cgroups::folders(&isolation::cgroup()) {
            for entry in fs::read_dir(folder.join(namespace)).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    left.push(format!("cgroup {}", entry.path().display()));
                }
            }
        }
        for folder in [self.daemon().bundle(namespace, ""), self.daemon().sandbox_bundle(namespace, "")] {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                left.push(format!("bundle {}", entry.path().display()));
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        left.extend(mounts.lines().filter(|line| line.contains(&format!("/{namespace}/"))).map(str::to_owned));
        left
    }

    /// Waits until nothing of this namespace is left.
    pub async fn leaves_nothing(&self) -> Result<()> {
        eventually("nothing of the test is left behind", Duration::from_secs(5), async || {
            let left = self.leftovers();
            ensure!(left.is_empty(), "{left:#?}");
            Ok(())
        })
        .await
    }
}

/// Kills the leftovers of the namespace, also after a failed test.
impl Drop for Inner {
    fn drop(&mut self) {
        let namespace = self.client.namespace();
        cgroups::remove(&format!("{}/{namespace}", isolation::cgroup()));
        for pid in proc::all().into_keys() {
            if pid != 1 && proc::mentions(pid, namespace) {
                proc::kill_hard(pid);
            }
        }
        let _the_run_folder_goes_anyway = fs::remove_dir_all(&self.folder);
    }
}
