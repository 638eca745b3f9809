//! A test bed: a shim driven directly, between a client of its socket and a fake containerd, without a daemon.
//! All its processes and files carry its namespace, so that leftovers are found, reported and killed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use anyhow::{Result, ensure};

use crate::bundle::Bundle;
use crate::eventually::{SOON, eventually};
use crate::fake_containerd::FakeContainerd;
use crate::gate::Gate;
use crate::runner::skip;
use crate::stdio::{Pace, Reader};
use crate::suite::{Runtime, Shim, Suite};
use crate::{cgroups, isolation, proc, trace};

/// The surroundings of one test; cheap to clone.
#[derive(Debug, Clone)]
pub struct Stand(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shim: Shim,
    binary: PathBuf,
    programs: PathBuf,
    engine: PathBuf,
    folder: PathBuf,
    namespace: String,
    containerd: FakeContainerd,
    /// The logs of shims, by container.
    logs: Mutex<BTreeMap<String, Reader>>,
}

impl Stand {
    /// A stand for the shim under test with the fastest runtime that every shim has; the helper programs are in `programs`.
    pub fn new(shim: &Shim, programs: &Path) -> Result<Self> {
        Self::with_engine(shim, programs, &Suite::Bookworm.runtime(Runtime::program()))
    }

    /// A stand for the shim under test with the OCI runtime `engine`.
    pub fn with_engine(shim: &Shim, programs: &Path, engine: &Path) -> Result<Self> {
        if engine.ends_with(Runtime::Crun.name()) && !Runtime::Crun.works() {
            return skip("crun does not work with v1 cgroups beside controllers on v2");
        }
        static NEXT: AtomicU32 = AtomicU32::new(1);
        // of fixed width, so that no name is a part of another
        let namespace = format!("p{:04}", NEXT.fetch_add(1, Ordering::Relaxed));
        let folder = Path::new(isolation::RUN).join(&namespace);
        fs::create_dir_all(folder.join("b"))?;
        let containerd = FakeContainerd::listen(&folder.join("c.sock.ttrpc"))?;
        let binary = match &shim.binary {
            Some(binary) => binary.clone(),
            None => Suite::Bookworm.program(&shim.binary_name()),
        };
        let (shim, programs, engine, logs) = (shim.clone(), programs.to_owned(), engine.to_owned(), Mutex::default());
        Ok(Self(Arc::new(Inner { shim, binary, programs, engine, folder, namespace, containerd, logs })))
    }

    /// The same with another shim.
    pub fn with_shim(&self, shim: &Shim) -> Result<Self> {
        Self::with_engine(shim, &self.0.programs, &self.0.engine)
    }

    /// The shim under test.
    pub fn shim(&self) -> &Shim {
        &self.0.shim
    }

    /// Its program.
    pub fn binary(&self) -> &Path {
        &self.0.binary
    }

    /// The folder of the test.
    pub fn folder(&self) -> &Path {
        &self.0.folder
    }

    /// The namespace of every container.
    pub fn namespace(&self) -> &str {
        &self.0.namespace
    }

    /// The fake containerd.
    pub fn containerd(&self) -> &FakeContainerd {
        &self.0.containerd
    }

    /// One of this package's helper programs.
    pub fn program(&self, name: &str) -> PathBuf {
        self.0.programs.join(name)
    }

    /// The OCI runtime, or the name of the shim's own engine.
    pub fn runtime(&self) -> PathBuf {
        self.0.engine.clone()
    }

    /// The OCI runtime's program; skips where the shim makes containers itself.
    pub fn runtime_program(&self) -> Result<PathBuf> {
        if self.is_native() {
            return skip("the shim makes the containers itself: there is no runtime whose program can be replaced");
        }
        Ok(self.runtime())
    }

    /// Whether the shim makes the containers itself.
    pub fn is_native(&self) -> bool {
        self.0.engine == Path::new(Runtime::Native.name())
    }

    /// A gated runtime in front of another.
    pub fn gate(&self, real: &Path) -> Result<Gate> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let folder = self.folder().join(format!("gate{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        Gate::new(&folder, &self.program("gated-runtime"), real)
    }

    /// A bundle for a busybox container that runs `args`.
    pub fn bundle(&self, id: &str, args: &[&str]) -> Bundle {
        Bundle::new(self, id, args).expect("the shared root file system can be made")
    }

    /// A bundle for the instant runtime, whose containers are plain processes. See `bin/gated-runtime/instant.rs`.
    pub fn instant(&self, id: &str, args: &[&str]) -> Bundle {
        self.bundle(id, args).runtime(&self.program("gated-runtime")).mounts(Vec::new())
    }

    /// Where programs are looked for: beside the OCI runtime first.
    pub fn path(&self) -> String {
        const USUAL: &str = "/usr/sbin:/usr/bin:/sbin:/bin";
        if self.is_native() {
            // Where the only criu is.
            return format!("{USUAL}:{}", Suite::Forky.bin().display());
        }
        format!("{}:{USUAL}", self.0.engine.parent().unwrap_or(Path::new("/usr/bin")).display())
    }

    /// The program, with the environment that containerd gives it.
    pub fn command(&self, arguments: &[&str]) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(self.binary());
        command.args(arguments).env_clear().env("PATH", self.path()).env("TTRPC_ADDRESS", self.containerd().path());
        command.env("GRPC_ADDRESS", self.grpc()).env("MAX_SHIM_VERSION", "2").env("GOMAXPROCS", "2").env("SECRET_OF_THE_DAEMON", "1");
        // for measurements
        command.envs(std::env::var_os("X_SHIM_IDLE_SECONDS").map(|spell| ("X_SHIM_IDLE_SECONDS", spell)));
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    /// Where containerd's gRPC API would be.
    pub(crate) fn grpc(&self) -> PathBuf {
        self.folder().join("c.sock")
    }

    /// The shims of this stand: the keepers of ours.
    pub fn shims(&self) -> Vec<proc::Process> {
        let name = self.binary().file_name().unwrap_or_default().to_string_lossy().into_owned();
        let ours = |process: &proc::Process| {
            process.parent == 1
                && (process.command.contains("containerd-shim-") || process.command.split(' ').next().is_some_and(|it| it.ends_with(&name)))
                && proc::mentions(process.pid, self.namespace())
                && !process.is_zombie()
        };
        proc::all().into_values().filter(ours).collect()
    }

    /// The leftovers of this stand.
    pub fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for process in proc::all().into_values() {
            if process.pid != 1 && proc::mentions(process.pid, self.namespace()) {
                left.push(format!("process {} {}", process.pid, process.command));
            }
        }
        for folder in cgroups::folders(&isolation::cgroup()) {
            for entry in fs::read_dir(folder.join(self.namespace())).into_iter().flatten().flatten() {
                if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                    left.push(format!("cgroup {}", entry.path().display()));
                }
            }
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        left.extend(mounts.lines().filter(|line| line.contains(&format!("/{}/", self.namespace()))).map(str::to_owned));
        for entry in fs::read_dir(self.folder().join("b")).into_iter().flatten().flatten() {
            let address = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
            let socket = address.strip_prefix("unix://").unwrap_or(&address);
            if !socket.is_empty() && Path::new(socket).exists() {
                left.push(format!("socket {socket}"));
            }
        }
        left
    }

    /// Waits until nothing is left.
    pub async fn leaves_nothing(&self) -> Result<()> {
        eventually("nothing of the test is left behind", SOON, async || {
            let left = self.leftovers();
            ensure!(left.is_empty(), "{left:#?}");
            Ok(())
        })
        .await
    }

    /// Reads a shim's log from now on, as containerd does.
    pub fn read_log_of(&self, id: &str, fifo: &Path) -> Result<()> {
        let of = id.to_owned();
        let reader = Reader::open_and_show(fifo, Pace::Keep, move |bytes| trace::copy_log(&of, bytes))?;
        self.0.logs.lock().expect("no panic under this lock").insert(id.to_owned(), reader);
        Ok(())
    }

    /// The log of the shim that was started for a container.
    pub fn log_of(&self, id: &str) -> String {
        self.0.logs.lock().expect("no panic under this lock").get(id).map_or_else(String::new, Reader::text)
    }

    /// The last lines that all shims have logged.
    pub(crate) fn last_log_lines(&self) -> String {
        let logs = self.0.logs.lock().expect("no panic under this lock");
        let lines = logs.iter().flat_map(|(id, log)| log.text().lines().map(|line| format!("{id}: {line}\n")).collect::<Vec<_>>());
        let lines: Vec<_> = lines.collect();
        lines[lines.len().saturating_sub(12)..].concat()
    }
}

/// Kills leftovers, also after a failed test.
impl Drop for Inner {
    fn drop(&mut self) {
        cgroups::remove(&format!("{}/{}", isolation::cgroup(), self.namespace));
        for pid in proc::all().into_keys() {
            if pid != 1 && proc::mentions(pid, &self.namespace) {
                proc::kill_hard(pid);
            }
        }
        for line in fs::read_to_string("/proc/self/mountinfo").unwrap_or_default().lines().rev() {
            if let Some(path) = line.split(' ').nth(4).filter(|path| path.contains(&format!("/{}/", self.namespace))) {
                let _gone_with_the_run = nix::mount::umount2(path, nix::mount::MntFlags::MNT_DETACH);
            }
        }
        let _the_run_folder_goes_anyway = fs::remove_dir_all(&self.folder);
    }
}
