//! A dockerd of one's own on top of a [`Daemon`](crate::daemon::Daemon), and its command line client.

use std::env;
use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::mount::{MntFlags, umount2};
use serde_json::{Value, json};

use crate::context::Context;
use crate::eventually::eventually;
use crate::runner::needs_controller;
use crate::suite::{Runtime, STOCK_TYPE, Shim, Suite};
use crate::{isolation, rootfs, suite};

/// The image that every container is made from.
pub const IMAGE: &str = "busybox";

/// A version of Docker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// 20.10. It runs OCI runtimes by their paths, with containerd's own shim alone: the shim under test has that one's name.
    V20,
    /// 26.
    V26,
    /// 28.
    V28,
}

impl Version {
    /// Whether containers can be of the shim's own engine.
    pub fn has_native(self, cx: &Context) -> bool {
        self != Self::V20 && cx.shim().is_ours()
    }
}

/// A dockerd, its containerd and its folder.
#[derive(Debug)]
pub struct Docker {
    version: Version,
    cx: Context,
    folder: PathBuf,
    process: Mutex<Option<Child>>,
}

/// The name of dockerd's runtime with the shim's own engine.
const NATIVE: &str = "with-native";

impl Docker {
    /// Starts Docker 26, or 28 with `X_DOCKER=28`, on a containerd of its own and imports the image.
    pub async fn start(cx: &Context) -> Result<Self> {
        let version = match env::var("X_DOCKER").as_deref() {
            Ok("28") => Version::V28,
            Ok("26") | Err(_) => Version::V26,
            Ok(other) => bail!("X_DOCKER={other}: 26 and 28 are there"),
        };
        Self::start_version(cx, version).await
    }

    /// Starts Docker 28, which keeps images and their layers in the daemon below instead of under its own data folder, and imports the image.
    pub async fn start_with_image_store(cx: &Context) -> Result<Self> {
        Self::start_configured(cx, Version::V28, json!({ "features": { "containerd-snapshotter": true } })).await
    }

    /// Starts dockerd on a containerd of its own and imports the image.
    pub async fn start_version(cx: &Context, version: Version) -> Result<Self> {
        Self::start_configured(cx, version, json!({})).await
    }

    async fn start_configured(cx: &Context, version: Version, mut config: Value) -> Result<Self> {
        // which it has the runtime set for every container
        needs_controller("io")?;
        let cx = match version {
            Version::V20 => cx.with_own_shim(&Shim { runtime_type: STOCK_TYPE.to_owned(), ..cx.shim().clone() }, &[]).await?,
            Version::V26 | Version::V28 => cx.with_own_daemon().await?,
        };
        let folder = cx.daemon().folder().join("docker");
        fs::create_dir_all(&folder)?;
        // dockerd reads the host's file unless it is given one that exists
        let with = |runtime: Runtime| {
            let binary = cx.suite().runtime(runtime);
            match version {
                Version::V20 => json!({ "path": binary }),
                Version::V26 | Version::V28 => json!({ "runtimeType": cx.shim().runtime_type, "options": { "BinaryName": binary } }),
            }
        };
        let mut runtimes = json!({ "with-crun": with(Runtime::Crun), "with-runc": with(Runtime::Runc) });
        if version.has_native(&cx) {
            runtimes[NATIVE] = with(Runtime::Native);
        }
        config["runtimes"] = runtimes;
        // containers that a build makes have no other
        config["default-runtime"] = if version.has_native(&cx) { NATIVE } else { "with-crun" }.into();
        fs::write(folder.join("daemon.json"), config.to_string())?;
        let docker = Self { version, cx, folder, process: Mutex::new(None) };
        docker.revive().await?;
        let archive = docker.folder.join("busybox.tar");
        let status = Command::new("tar").arg("-C").arg(rootfs::shared()?).arg("-cf").arg(&archive).arg(".").status()?;
        ensure!(status.success(), "tar: {status}");
        docker.run(&["import", &archive.display().to_string(), IMAGE])?;
        Ok(docker)
    }

    /// Gives the client its plugin for BuildKit, which is `docker buildx`.
    pub fn add_buildx(&self) -> Result<()> {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/fetch-buildx");
        let status = Command::new(&script).status().with_context(|| format!("run {}", script.display()))?;
        ensure!(status.success(), "{} failed: {status}", script.display());
        let plugins = self.folder.join("cli-plugins");
        fs::create_dir_all(&plugins)?;
        let plugin = plugins.join("docker-buildx");
        if !plugin.exists() {
            symlink(suite::cache().join("buildx/bin/docker-buildx"), plugin)?;
        }
        Ok(())
    }

    /// The surroundings, with the containerd below.
    pub fn context(&self) -> &Context {
        &self.cx
    }

    fn program(&self, name: &str) -> PathBuf {
        match self.version {
            Version::V20 => suite::cache().join("docker/bin").join(name),
            Version::V26 => Suite::Trixie.program(name),
            Version::V28 => Suite::Forky.program(name),
        }
    }

    /// Its API's socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("docker.sock")
    }

    fn host(&self) -> String {
        format!("unix://{}", self.socket().display())
    }

    /// What its API answers to a GET.
    pub fn get(&self, path: &str) -> Result<Value> {
        let mut socket = UnixStream::connect(self.socket())?;
        // one answer, and then the end: 1.0 has no chunks
        write!(socket, "GET {path} HTTP/1.0\r\nHost: docker\r\n\r\n")?;
        let mut answer = String::new();
        socket.read_to_string(&mut answer)?;
        let (head, body) = answer.split_once("\r\n\r\n").context("an answer without a body")?;
        ensure!(head.split(' ').nth(1) == Some("200"), "{path}: {answer}");
        serde_json::from_str(body).with_context(|| format!("{path}: {body}"))
    }

    /// Starts dockerd, again if need be, and waits until it answers.
    pub async fn revive(&self) -> Result<()> {
        let folder = self.folder.display();
        let log = File::options().create(true).append(true).open(self.folder.join("log"))?;
        let child = Command::new(self.program("dockerd"))
            .args(["--containerd", &self.cx.daemon().address().display().to_string()])
            .args(["--host", &self.host()])
            .args(["--data-root", &format!("{folder}/data"), "--exec-root", &format!("{folder}/exec")])
            .args(["--pidfile", &format!("{folder}/pid"), "--config-file", &format!("{folder}/daemon.json")])
            .args(["--cgroup-parent", &self.cx.cgroup_path("docker"), "--exec-opt", "native.cgroupdriver=cgroupfs"])
            .args(["--userland-proxy=false", "--iptables=false", "--ip6tables=false", "--bridge=none", "--live-restore"])
            .env_clear()
            .env("PATH", self.cx.daemon().path())
            .env("HOME", "/root")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start dockerd")?;
        isolation::keep(child.id());
        *self.process.lock().expect("no panic under this lock") = Some(child);
        eventually("dockerd answers", Duration::from_secs(30), async || self.run(&["version"]).map(drop))
            .await
            .with_context(|| fs::read_to_string(self.folder.join("log")).unwrap_or_default())
    }

    /// Kills dockerd with SIGKILL.
    pub fn kill(&self) -> Result<()> {
        if let Some(mut child) = self.process.lock().expect("no panic under this lock").take() {
            child.kill()?;
            child.wait()?;
            isolation::forget(child.id());
        }
        // a pid file names a process that may by now be another
        match fs::remove_file(self.folder.join("pid")) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// A command of the client, to be run.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(self.program("docker"));
        command.env("DOCKER_CONFIG", &self.folder).args(["--host", &self.host()]).args(arguments).stdin(Stdio::null());
        command
    }

    /// Runs a command of the client; any exit status is accepted.
    pub fn output(&self, arguments: &[&str]) -> Result<Output> {
        Ok(self.command(arguments).output()?)
    }

    /// Runs a command of the client and returns what it printed on stdout, without the last newline.
    pub fn run(&self, arguments: &[&str]) -> Result<String> {
        let output = self.output(arguments)?;
        let err = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "docker {arguments:?}: {}: {err}", output.status);
        Ok(String::from_utf8_lossy(&output.stdout).trim_end_matches('\n').to_owned())
    }

    /// Creates and starts a container without network, with the shim under test and its own engine, if it has one.
    pub fn container(&self, options: &[&str], command: &[&str]) -> Result<Output> {
        self.container_of(if self.version.has_native(&self.cx) { NATIVE } else { &self.cx.shim().runtime_type }, options, command)
    }

    /// The same with one of dockerd's runtimes: `with-native`, `with-crun` and `with-runc` are the shim under test with that engine.
    pub fn container_of(&self, runtime: &str, options: &[&str], command: &[&str]) -> Result<Output> {
        let mut arguments = vec!["run", "--network", "none", "--runtime", runtime];
        arguments.extend(options);
        arguments.push(IMAGE);
        arguments.extend(command);
        self.output(&arguments)
    }

    /// One field of `docker inspect`.
    pub fn inspect(&self, name: &str, field: &str) -> Result<String> {
        self.run(&["inspect", "--format", &format!("{{{{{field}}}}}"), name])
    }

    /// Removes every container, and waits until the shims have exited too.
    pub async fn leaves_nothing(&self) -> Result<()> {
        let names = self.run(&["ps", "--all", "--quiet"])?;
        for name in names.lines() {
            self.run(&["rm", "--force", name])?;
        }
        self.kill()?;
        self.cx.daemon().is_alone().await
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let _already_dead = self.kill();
        // dockerd mounts its data folder on itself, and leaves its sockets
        let _never_mounted = umount2(&self.folder.join("data"), MntFlags::MNT_DETACH);
        let _the_run_folder_goes_anyway = fs::remove_dir_all(&self.folder);
    }
}
