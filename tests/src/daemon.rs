//! One containerd in a folder of its own: root, state, sockets, configuration, log.
//!
//! ```text
//! (none) ─start▶ running ─kill or stop▶ down ─restart▶ running     drop: everything of it is killed
//! ```

use std::fs::{self, File};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::Client;
use crate::eventually::{SOON, eventually, eventually_true};
use crate::network::Network;
use crate::suite::{self, Runtime, Shim, Suite};
use crate::{isolation, proc};

/// A containerd of one's own.
#[derive(Debug)]
pub struct Daemon {
    suite: Mutex<Suite>,
    folder: PathBuf,
    environment: Vec<(String, String)>,
    /// The host's without it.
    network: Option<Network>,
    process: Mutex<Option<Running>>,
}

#[derive(Debug)]
enum Running {
    Child(Child),
    /// A process that has taken over from a child.
    Successor(i32),
}

impl Daemon {
    /// Starts one and waits until it answers.
    ///
    /// Its PATH begins with a folder that holds `shim` under the name that its runtime type requires.
    pub async fn start(suite: Suite, shim: &Shim) -> Result<Self> {
        Self::start_with(suite, shim, &[]).await
    }

    /// The same with its CRI plugin, with the lines of `more` in the configuration, and with a network of its own in the place of the host's: CNI
    /// plugins make bridges and forward packets there.
    pub async fn start_for_pods(
        suite: Suite,
        shim: &Shim,
        environment: &[(&str, &str)],
        more: impl FnOnce(&Path) -> Result<String>,
    ) -> Result<Self> {
        let configuration = |folder: &Path| Ok(format!("{}{}", base_configuration(suite, folder, ""), more(folder)?));
        Self::start_configured(suite, shim, environment, Some(Network::new()?), configuration).await
    }

    /// The same with containerd's service for sandboxes, which is there only beside the controller of its CRI plugin.
    pub async fn start_for_sandboxes(suite: Suite, shim: &Shim) -> Result<Self> {
        let disabled = r#""io.containerd.grpc.v1.cri", "io.containerd.nri.v1.nri", "#;
        Self::start_configured(suite, shim, &[], None, |folder| Ok(base_configuration(suite, folder, disabled))).await
    }

    /// The same, with a log that records each event: see [`Self::received_exits`].
    pub async fn start_verbose(suite: Suite, shim: &Shim) -> Result<Self> {
        Self::start_configured(suite, shim, &[], None, |folder| {
            Ok(configuration(suite, folder).replace(&format!("level = {:?}", level()), "level = \"trace\""))
        })
        .await
    }

    /// The same with more environment, which its shims inherit.
    pub async fn start_with(suite: Suite, shim: &Shim, environment: &[(&str, &str)]) -> Result<Self> {
        Self::start_configured(suite, shim, environment, None, |folder| Ok(configuration(suite, folder))).await
    }

    async fn start_configured(
        suite: Suite,
        shim: &Shim,
        environment: &[(&str, &str)],
        network: Option<Network>,
        configuration: impl FnOnce(&Path) -> Result<String>,
    ) -> Result<Self> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = Path::new(isolation::RUN).join(format!("d{number}"));
        fs::create_dir_all(folder.join("bin"))?;
        fs::create_dir_all(folder.join("faults"))?;
        if let Some(binary) = &shim.binary {
            symlink(binary, folder.join("bin").join(shim.binary_name()))?;
        }
        // where the suite's own does not work
        let crun = suite.runtime(Runtime::Crun);
        if crun != suite.program(Runtime::Crun.name()) {
            symlink(crun, folder.join("bin").join(Runtime::Crun.name()))?;
        }
        // for the native engine: only one suite comes with it
        let criu = Suite::Forky.program("criu");
        if criu.exists() {
            symlink(criu, folder.join("bin").join("criu"))?;
        }
        fs::write(folder.join("config.toml"), configuration(&folder)?)?;
        let environment = environment.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let daemon = Self { suite: Mutex::new(suite), folder, environment, network, process: Mutex::new(None) };
        daemon.spawn()?;
        daemon.answering().await?;
        Ok(daemon)
    }

    /// The version it runs.
    pub fn suite(&self) -> Suite {
        *self.suite.lock().expect("no panic under this lock")
    }

    /// Uses another version from the next start on, with the same root and state: an upgrade or a downgrade.
    pub async fn becomes(&self, suite: Suite) -> Result<()> {
        self.stop()?;
        fs::write(self.folder.join("config.toml"), configuration(suite, &self.folder))?;
        *self.suite.lock().expect("no panic under this lock") = suite;
        self.restart().await
    }

    /// Its folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The folder that comes first in its PATH, with the shim in it.
    pub fn bin(&self) -> PathBuf {
        self.folder.join("bin")
    }

    /// The PATH that it and its shims have.
    pub fn path(&self) -> String {
        format!("{}:{}:/usr/sbin:/usr/bin:/sbin:/bin", self.bin().display(), self.suite().bin().display())
    }

    /// The folder in which a shim that is built for it looks up where its worker must crash: see `shim/src/worker/fault.rs`.
    pub fn faults(&self) -> PathBuf {
        self.folder.join("faults")
    }

    /// Its gRPC socket.
    pub fn address(&self) -> PathBuf {
        self.folder.join("c.sock")
    }

    /// The network that it has instead of the host's.
    pub fn network(&self) -> Option<&Network> {
        self.network.as_ref()
    }

    /// Its log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// How many exits of a namespace it has received or published, over all its restarts, also before a client can subscribe. Needs the daemon
    /// of [`Self::start_verbose`], whose log records each event.
    pub fn received_exits(&self, namespace: &str) -> usize {
        let is_exit = |line: &&str| {
            ["event forwarded", "event published"].iter().any(|word| line.contains(word))
                && line.contains("topic=/tasks/exit")
                && line.contains(&format!("ns={namespace}"))
        };
        self.log().lines().filter(is_exit).count()
    }

    /// The folder of a container's bundle.
    pub fn bundle(&self, namespace: &str, id: &str) -> PathBuf {
        self.folder.join("state/io.containerd.runtime.v2.task").join(namespace).join(id)
    }

    /// The folder of a sandbox's bundle.
    pub fn sandbox_bundle(&self, namespace: &str, id: &str) -> PathBuf {
        self.folder.join("state/io.containerd.sandbox.controller.v1.shim").join(namespace).join(id)
    }

    /// A client of it.
    pub async fn client(&self, namespace: &str) -> Result<Client> {
        let client = Client::connect(&self.address(), namespace).await?;
        client.create_namespace().await?;
        Ok(client)
    }

    /// Kills it with SIGKILL, like a crash.
    pub fn kill(&self) -> Result<()> {
        self.end(Signal::SIGKILL)
    }

    /// Stops it with SIGTERM, like an upgrade.
    pub fn stop(&self) -> Result<()> {
        self.end(Signal::SIGTERM)
    }

    /// Starts it again on the same folder, and waits until it answers.
    pub async fn restart(&self) -> Result<()> {
        self.spawn()?;
        self.answering().await
    }

    /// Its pid, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.process.lock().expect("no panic under this lock").as_ref().map(|running| match running {
            Running::Child(child) => child.id(),
            Running::Successor(pid) => pid.cast_unsigned(),
        })
    }

    fn end(&self, signal: Signal) -> Result<()> {
        let running = self.process.lock().expect("no panic under this lock").take();
        match running {
            None => {}
            Some(Running::Child(mut child)) => {
                kill(Pid::from_raw(child.id().cast_signed()), signal)?;
                child.wait()?;
                isolation::forget(child.id());
            }
            Some(Running::Successor(pid)) => {
                kill(Pid::from_raw(pid), signal)?;
                let begin = Instant::now();
                while proc::is_alive(pid) {
                    ensure!(begin.elapsed() < SOON, "process {pid} does not end");
                    std::thread::sleep(Duration::from_millis(5)); // polls a process that is not a child of this one
                }
            }
        }
        Ok(())
    }

    /// Records that process `pid` has taken over, and waits until the previous one exits.
    pub async fn is_succeeded_by(&self, pid: i32) -> Result<()> {
        let before = self.process.lock().expect("no panic under this lock").replace(Running::Successor(pid));
        match before {
            None => bail!("no daemon ran before process {pid}"),
            Some(Running::Child(mut child)) => {
                let status = eventually("the previous process has exited", SOON, async || child.try_wait()?.context("it runs")).await?;
                isolation::forget(child.id());
                ensure!(status.success(), "the previous process exited with {status}");
            }
            Some(Running::Successor(old)) => {
                eventually_true("the previous process has exited", SOON, || !proc::is_alive(old)).await?;
            }
        }
        Ok(())
    }

    /// Has x-manager's next start read that configuration.
    pub fn configure(&self, text: &str) -> Result<()> {
        Ok(fs::write(self.folder.join("manager.toml"), text)?)
    }

    /// Starts it, without waiting for anything.
    pub fn spawn(&self) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.folder.join("log"))?;
        let mut program = self.program();
        program
            .env_clear()
            .env("PATH", self.path())
            .env("HOME", "/root")
            // containerd leaves the images of restored containers there
            .env("TMPDIR", &self.folder)
            .env("X_FAULT", self.faults())
            .envs(self.environment.iter().map(|(key, value)| (key, value)))
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let mut spawn = || program.spawn().with_context(|| format!("start {}", self.suite()));
        let child = match &self.network {
            Some(network) => network.within(spawn)?,
            None => spawn()?,
        };
        isolation::keep(child.id());
        *self.process.lock().expect("no panic under this lock") = Some(Running::Child(child));
        Ok(())
    }

    /// containerd, or x-manager in its place.
    fn program(&self) -> Command {
        let Some(manager) = suite::manager() else {
            let mut command = Command::new(self.suite().program("containerd"));
            command.arg("--config").arg(self.folder.join("config.toml"));
            return command;
        };
        let mut command = Command::new(manager);
        command.arg("--root").arg(self.folder.join("root")).arg("--state").arg(self.folder.join("state"));
        command.arg("--address").arg(self.address()).args(["--log-level", level()]);
        let config = self.folder.join("manager.toml");
        if config.exists() {
            command.arg("--config").arg(config);
        }
        command
    }

    async fn answering(&self) -> Result<()> {
        let what = format!("{} answers", self.suite());
        eventually(what, Duration::from_secs(30), async || {
            Client::connect(&self.address(), "default").await?.version().await?;
            Ok(())
        })
        .await
        .with_context(|| self.log())
    }

    /// Waits until only the daemon's own process is left.
    pub async fn is_alone(&self) -> Result<()> {
        let own = self.pid().map_or(0, u32::cast_signed);
        eventually_true("no shim of this daemon is left", SOON, || self.strangers().all(|pid| pid == own)).await
    }

    fn strangers(&self) -> impl Iterator<Item = i32> {
        let folder = format!("{}/", self.folder.display());
        proc::all().into_keys().filter(move |pid| *pid != 1 && proc::mentions(*pid, &folder))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _already_dead = self.kill();
        self.strangers().for_each(proc::kill_hard);
    }
}

fn level() -> &'static str {
    if std::env::var_os("X_TESTS_DEBUG").is_some() { "debug" } else { "info" }
}

fn configuration(suite: Suite, folder: &Path) -> String {
    let pods = match suite {
        Suite::Bookworm | Suite::Trixie => r#""io.containerd.grpc.v1.cri", "#,
        Suite::Forky => {
            r#""io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images", "io.containerd.cri.v1.runtime",
               "io.containerd.podsandbox.controller.v1.podsandbox", "io.containerd.nri.v1.nri", "#
        }
    };
    base_configuration(suite, folder, pods)
}

/// The configuration without the plugins that `disabled` lists.
fn base_configuration(suite: Suite, folder: &Path, disabled: &str) -> String {
    let version = if suite == Suite::Forky { 3 } else { 2 };
    let level = level();
    let restart = if suite == Suite::Forky { "io.containerd.monitor.container.v1.restart" } else { "io.containerd.internal.v1.restart" };
    format!(
        r#"version = {version}
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = [{disabled}"io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.blockfile", "io.containerd.tracing.processor.v1.otlp", "io.containerd.internal.v1.tracing"]
[grpc]
address = "{folder}/c.sock"
[debug]
address = "{folder}/debug.sock"
level = "{level}"
[plugins."io.containerd.internal.v1.opt"]
path = "{folder}/opt"
[plugins."{restart}"]
interval = "1s"
"#,
        folder = folder.display()
    )
}
