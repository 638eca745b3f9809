//! A test stand: a shim driven directly, between a client of its socket and a fake containerd. No daemon is there.
//!
//! ```text
//!  Stand ─bundle▶ Bundle ─start▶ address ─Task::connect▶ Task ─create▶ …
//! ```
//! Everything of a stand bears its namespace: what is left of it is found, reported and killed.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use containerd_shim_protos::api;
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::types::mount::Mount;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};
use tokio::io::AsyncWriteExt as _;

use crate::eventually::{SOON, a_second, eventually, eventually_true, within};
use crate::fake_containerd::FakeContainerd;
use crate::gate::Gate;
use crate::spec::{self, Spec};
use crate::stdio::{self, Pace, Reader};
use crate::suite::{Runtime, Shim, Suite};
use crate::task::{Task, any_json};
use crate::{isolation, messages, proc};

/// The surroundings of one test; cheap to clone.
#[derive(Debug, Clone)]
pub struct Stand(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    shim: Shim,
    binary: PathBuf,
    programs: PathBuf,
    folder: PathBuf,
    namespace: String,
    containerd: FakeContainerd,
    /// What shims log, by container.
    logs: Mutex<BTreeMap<String, Reader>>,
}

impl Stand {
    /// A stand for the shim on trial, whose helper programs are in `programs`.
    pub fn new(shim: &Shim, programs: &Path) -> Result<Self> {
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
        let (shim, programs, logs) = (shim.clone(), programs.to_owned(), Mutex::default());
        Ok(Self(Arc::new(Inner { shim, binary, programs, folder, namespace, containerd, logs })))
    }

    /// The same with another shim.
    pub fn with_shim(&self, shim: &Shim) -> Result<Self> {
        Self::new(shim, &self.0.programs)
    }

    /// The shim on trial.
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

    /// The OCI runtime: the faster one.
    pub fn runtime(&self) -> PathBuf {
        Suite::Bookworm.program(Runtime::Crun.name())
    }

    /// A gated runtime in front of another.
    pub fn gate(&self, real: &Path) -> Result<Gate> {
        static NEXT: AtomicU32 = AtomicU32::new(1);
        let folder = self.folder().join(format!("gate{}", NEXT.fetch_add(1, Ordering::Relaxed)));
        Gate::new(&folder, &self.program("gated-runtime"), real)
    }

    /// A busybox container to be, which runs `args`.
    pub fn bundle(&self, id: &str, args: &[&str]) -> Bundle {
        let cgroup = format!("/{}/{}/{id}", isolation::cgroup(), self.namespace());
        Bundle {
            stand: self.clone(),
            id: id.to_owned(),
            folder: self.folder().join("b").join(id),
            spec: Spec::new(args, &cgroup),
            runtime: self.runtime(),
            stdio: [String::new(), String::new(), String::new()],
            terminal: false,
            mounts: vec![bind_mount(&crate::rootfs::shared().expect("the shared root file system can be made"))],
            log_is_read: true,
        }
    }

    /// A process to be that has nothing of a container but the name. See `bin/instant-runtime.rs`.
    pub fn instant(&self, id: &str, args: &[&str]) -> Bundle {
        let mut bundle = self.bundle(id, args).runtime(&self.program("instant-runtime"));
        bundle.mounts.clear();
        bundle
    }

    /// The program, with the environment that containerd gives it.
    pub fn command(&self, arguments: &[&str]) -> tokio::process::Command {
        let mut command = tokio::process::Command::new(self.binary());
        command.args(arguments).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("TTRPC_ADDRESS", self.containerd().path());
        command.env("GRPC_ADDRESS", self.grpc()).env("MAX_SHIM_VERSION", "2").env("GOMAXPROCS", "2").env("SECRET_OF_THE_DAEMON", "1");
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    fn grpc(&self) -> PathBuf {
        self.folder().join("c.sock")
    }

    /// The shims of this stand: the keepers of ours.
    pub fn shims(&self) -> Vec<proc::Process> {
        let ours = |process: &proc::Process| {
            process.parent == 1
                && process.command.contains("containerd-shim-")
                && proc::mentions(process.pid, self.namespace())
                && !process.is_zombie()
        };
        proc::all().into_values().filter(ours).collect()
    }

    /// What of this stand still exists.
    pub fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for process in proc::all().into_values() {
            if process.pid != 1 && proc::mentions(process.pid, self.namespace()) {
                left.push(format!("process {} {}", process.pid, process.command));
            }
        }
        for folder in isolation::cgroup_folders(&isolation::cgroup()) {
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

    /// What the shim that was started for a container has logged.
    pub fn log_of(&self, id: &str) -> String {
        self.0.logs.lock().expect("no panic under this lock").get(id).map_or_else(String::new, Reader::text)
    }

    /// The last lines that all shims have logged.
    pub(crate) fn last_words(&self) -> String {
        let logs = self.0.logs.lock().expect("no panic under this lock");
        let lines = logs.iter().flat_map(|(id, log)| log.text().lines().map(|line| format!("{id}: {line}\n")).collect::<Vec<_>>());
        let lines: Vec<_> = lines.collect();
        lines[lines.len().saturating_sub(12)..].concat()
    }
}

/// Kills what is left, however the test ended.
impl Drop for Inner {
    fn drop(&mut self) {
        isolation::remove_cgroups(&format!("{}/{}", isolation::cgroup(), self.namespace));
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

fn bind_mount(source: &Path) -> Mount {
    Mount {
        type_: "bind".to_owned(),
        source: source.display().to_string(),
        options: vec!["rbind".to_owned(), "rw".to_owned()],
        ..Mount::default()
    }
}

/// A container to be.
#[derive(Debug, Clone)]
pub struct Bundle {
    stand: Stand,
    /// The container's id.
    pub id: String,
    /// Its folder.
    pub folder: PathBuf,
    spec: Spec,
    runtime: PathBuf,
    stdio: [String; 3],
    terminal: bool,
    mounts: Vec<Mount>,
    log_is_read: bool,
}

impl Bundle {
    /// Leaves the fifo of the shim's log without a reader.
    #[must_use]
    pub fn without_log_reader(mut self) -> Self {
        self.log_is_read = false;
        self
    }

    /// Changes the spec.
    #[must_use]
    pub fn spec(mut self, change: impl FnOnce(Spec) -> Spec) -> Self {
        self.spec = change(self.spec);
        self
    }

    /// Puts it into a group.
    #[must_use]
    pub fn group(self, group: &str) -> Self {
        self.spec(|spec| spec.annotation("io.containerd.runc.v2.group", group))
    }

    /// Chooses the OCI runtime.
    #[must_use]
    pub fn runtime(mut self, runtime: &Path) -> Self {
        runtime.clone_into(&mut self.runtime);
        self
    }

    /// Connects stdin, stdout and stderr.
    #[must_use]
    pub fn stdio(mut self, stdin: &str, stdout: &str, stderr: &str) -> Self {
        self.stdio = [stdin, stdout, stderr].map(str::to_owned);
        self
    }

    /// Gives init a terminal.
    #[must_use]
    pub fn terminal(mut self) -> Self {
        self.terminal = true;
        self.spec = self.spec.terminal(true);
        self
    }

    /// Chooses what is mounted as root file system.
    #[must_use]
    pub fn mounts(mut self, mounts: Vec<Mount>) -> Self {
        self.mounts = mounts;
        self
    }

    /// Writes the bundle down as containerd does.
    pub fn write(&self) -> Result<&Self> {
        fs::create_dir_all(self.folder.join("rootfs"))?;
        fs::write(self.folder.join("config.json"), self.spec.0.to_string())?;
        if !self.folder.join("log").exists() {
            stdio::fifo(&self.folder.join("log"))?;
        }
        Ok(self)
    }

    /// The options.
    pub fn options(&self) -> Any {
        let options = Options { binary_name: self.runtime.display().to_string(), ..Options::default() };
        let value = options.write_to_bytes().expect("a message without required fields is always complete");
        Any { type_url: "containerd.runc.v1.Options".to_owned(), value, ..Any::default() }
    }

    /// The request that creates it.
    pub fn request(&self) -> api::CreateTaskRequest {
        let [stdin, stdout, stderr] = self.stdio.clone();
        api::CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.folder.display().to_string(),
            rootfs: self.mounts.clone(),
            terminal: self.terminal,
            stdin,
            stdout,
            stderr,
            options: MessageField::some(self.options()),
            ..Default::default()
        }
    }

    /// The request that adds a process to it.
    pub fn exec_request(&self, exec: &str, args: &[&str]) -> api::ExecProcessRequest {
        api::ExecProcessRequest {
            id: self.id.clone(),
            exec_id: exec.to_owned(),
            spec: MessageField::some(any_json(messages::PROCESS, &spec::process(args))),
            ..Default::default()
        }
    }

    /// One of containerd's commands on this bundle: `start` or `delete`.
    pub fn command(&self, action: &str, flags: &[&str]) -> tokio::process::Command {
        let (grpc, folder) = (self.stand.grpc().display().to_string(), self.folder.display().to_string());
        let mut arguments = vec!["-namespace", self.stand.namespace(), "-address", &grpc, "-publish-binary", "/bin/true", "-id", &self.id];
        if action == "delete" {
            arguments.extend(["-bundle", &folder]);
        }
        arguments.extend(flags);
        arguments.push(action);
        let mut command = self.stand.command(&arguments);
        command.current_dir(&self.folder);
        command
    }

    /// Runs `start`, and returns where the shim listens.
    pub async fn start_shim(&self) -> Result<PathBuf> {
        self.start_shim_with(&[], &[]).await
    }

    /// Runs `start` with more flags and with something on standard input, and returns where the shim listens.
    pub async fn start_shim_with(&self, flags: &[&str], input: &[u8]) -> Result<PathBuf> {
        self.write()?;
        if self.log_is_read {
            // containerd reads it before it runs `start`, and the stock shim waits for that
            let mut logs = self.stand.0.logs.lock().expect("no panic under this lock");
            logs.insert(self.id.clone(), Reader::open(&self.folder.join("log"), Pace::Keep)?);
        }
        let output = run(self.command("start", flags), input).await?;
        ensure!(output.status.success(), "start: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        // containerd reads both streams as one
        ensure!(output.stderr.is_empty(), "start says {:?}", String::from_utf8_lossy(&output.stderr));
        let address = String::from_utf8(output.stdout)?;
        let Some(path) = address.trim().strip_prefix("unix://") else { bail!("not an address: {address:?}") };
        Ok(PathBuf::from(path))
    }

    /// Starts a shim for it, or joins the group's, and connects.
    pub async fn shim(&self) -> Result<Task> {
        let socket = self.start_shim().await?;
        // with the stock shim of old, the socket listens before its process does
        Task::connect(&socket).await
    }

    /// Starts a shim and creates the container.
    pub async fn create(self) -> Result<Container> {
        let task = self.shim().await?;
        self.create_in(&task).await
    }

    /// Creates the container in a shim that is there.
    pub async fn create_in(self, task: &Task) -> Result<Container> {
        self.write()?;
        let pid = task.create(&self.request()).await.with_context(|| format!("create {}", self.id))?;
        Ok(Container { task: task.clone(), id: self.id.clone(), pid, bundle: self })
    }

    /// Starts a shim, creates the container and starts it.
    pub async fn run(self) -> Result<Container> {
        let container = self.create().await?;
        container.start().await?;
        Ok(container)
    }

    /// Creates and starts the container in a shim that is there.
    pub async fn run_in(self, task: &Task) -> Result<Container> {
        let container = self.create_in(task).await?;
        container.start().await?;
        Ok(container)
    }

    /// Runs `delete`, and returns what it says.
    pub async fn delete_command(&self) -> Result<api::DeleteResponse> {
        let output = run(self.command("delete", &[]), &[]).await?;
        ensure!(output.status.success(), "delete: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        Ok(api::DeleteResponse::parse_from_bytes(&output.stdout)?)
    }

    /// The pid of the shim, as `start` has noted it.
    pub fn shim_pid(&self) -> Result<i32> {
        Ok(fs::read_to_string(self.folder.join("shim.pid")).context("shim.pid")?.trim().parse()?)
    }
}

/// Runs a command of the shim with that on its standard input.
pub async fn run(mut command: tokio::process::Command, input: &[u8]) -> Result<Output> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.as_std_mut().process_group(0);
    let mut child = command.spawn()?;
    let pid = child.id().unwrap_or_default();
    isolation::keep(pid);
    let mut stdin = child.stdin.take().expect("it was asked for");
    // it may answer without reading: then this pipe breaks
    let _its_own_business = stdin.write_all(input).await;
    drop(stdin);
    let output = within("a command of the shim", Duration::from_secs(30), child.wait_with_output()).await;
    isolation::forget(pid);
    Ok(output??)
}

/// A container that exists.
#[derive(Debug)]
pub struct Container {
    /// A client of its shim.
    pub task: Task,
    /// Its id.
    pub id: String,
    /// The pid of its init.
    pub pid: u32,
    /// What it was made from.
    pub bundle: Bundle,
}

impl Container {
    /// Starts init.
    pub async fn start(&self) -> Result<()> {
        let pid = self.task.start(&self.id, "").await.with_context(|| format!("start {}", self.id))?;
        ensure!(pid == self.pid, "create says pid {}, start says {pid}", self.pid);
        Ok(())
    }

    /// Adds a process.
    pub async fn add(&self, exec: &str, args: &[&str]) -> Result<()> {
        self.task.exec(&self.bundle.exec_request(exec, args)).await.with_context(|| format!("exec {exec}"))
    }

    /// Adds a process and starts it.
    pub async fn exec(&self, exec: &str, args: &[&str]) -> Result<u32> {
        self.add(exec, args).await?;
        self.task.start(&self.id, exec).await.with_context(|| format!("start {exec}"))
    }

    /// Runs a process to its end and deletes it.
    pub async fn run(&self, exec: &str, args: &[&str]) -> Result<u32> {
        self.exec(exec, args).await?;
        let status = self.task.wait(&self.id, exec).await?;
        let deleted = self.task.delete(&self.id, exec).await?;
        ensure!(deleted.exit_status == status, "wait says {status}, delete says {}", deleted.exit_status);
        Ok(status)
    }

    /// Kills init, waits for its end and deletes it.
    pub async fn destroy(&self) -> Result<u32> {
        match self.task.kill(&self.id, "", 9).await {
            Err(error) if error.code() != Some(crate::ttrpc::Code::NotFound) => return Err(error.into()),
            _ => {}
        }
        self.finish().await
    }

    /// Waits for the end and deletes it.
    pub async fn finish(&self) -> Result<u32> {
        let status = self.task.wait(&self.id, "").await?;
        let deleted = self.task.delete(&self.id, "").await?;
        ensure!(deleted.exit_status == status, "wait says {status}, delete says {}", deleted.exit_status);
        Ok(status)
    }

    /// Deletes it and has the shim leave, and waits until it has.
    pub async fn shut_down(&self) -> Result<u32> {
        let status = self.destroy().await?;
        leave(&self.task, self.bundle.shim_pid()?, &self.id).await?;
        Ok(status)
    }

    /// The pid of its shim.
    pub fn shim_pid(&self) -> Result<i32> {
        self.bundle.shim_pid()
    }

    /// The pid of the worker of its shim, once there is one.
    pub async fn worker_pid(&self) -> Result<i32> {
        worker_of(self.shim_pid()?).await
    }

    /// What its stand is.
    pub fn stand(&self) -> &Stand {
        &self.bundle.stand
    }
}

/// Says Shutdown, and waits until the shim has left: at once, since nothing is left to do.
pub async fn leave(task: &Task, shim: i32, id: &str) -> Result<()> {
    match task.shutdown(id).await {
        Ok(()) | Err(crate::ttrpc::CallError::Closed) => {}
        Err(error) => return Err(error.into()),
    }
    eventually_true("the shim has left", SOON, || !proc::is_alive(shim)).await
}

/// The worker of a keeper, once there is one.
pub async fn worker_of(keeper: i32) -> Result<i32> {
    eventually("the keeper has a worker", SOON, async || {
        let is_worker = |child: &proc::Process| child.command.split(' ').any(|word| word == "worker");
        proc::children(keeper).into_iter().find(is_worker).map(|child| child.pid).context("no child is called worker")
    })
    .await
}

/// Sends a signal to a process of the stand.
pub fn signal(pid: i32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to {pid}"))
}

/// A container that counts aloud, in the same shim as what is abused: it has to go on as if nothing were.
#[derive(Debug)]
pub struct Witness {
    /// The container.
    pub container: Container,
    numbers: Reader,
}

/// A count that a shell has no part in, once a millisecond or so.
const COUNT: &str = "i=0; while :; do i=$((i+1)); echo $i; usleep 2000; done";

impl Witness {
    /// Starts it in a shim of its own, which others may join under the group `pod`.
    pub async fn start(stand: &Stand) -> Result<Self> {
        let fifo = stand.folder().join("numbers");
        stdio::fifo(&fifo)?;
        let numbers = Reader::open(&fifo, Pace::Keep)?;
        let path = fifo.display().to_string();
        let bundle = stand.bundle("witness", &["sh", "-c", COUNT]).group("pod").stdio("", &path, &path);
        let witness = Self { container: bundle.run().await?, numbers };
        witness.goes_on().await?;
        Ok(witness)
    }

    /// A container in the same shim.
    pub fn sibling(&self, id: &str, args: &[&str]) -> Bundle {
        self.container.stand().bundle(id, args).group("pod")
    }

    /// Where their shim listens.
    pub fn socket(&self) -> &Path {
        self.container.task.socket()
    }

    async fn goes_on(&self) -> Result<()> {
        let before = self.numbers.count();
        eventually("the witness counts on", a_second() * 2, async || {
            ensure!(self.numbers.count() > before, "{before} bytes");
            Ok(())
        })
        .await
    }

    /// Checks that nothing has happened to it: it answers State within a second on the old connection and on a new one, is the same
    /// process, counts on, and has left no number out.
    pub async fn is_untouched(&self) -> Result<()> {
        let second = a_second();
        for task in [self.container.task.clone(), self.container.task.another().await?] {
            let state = task.state_within("witness", "", second).await.context("state of the witness")?;
            ensure!(state.pid == self.container.pid && state.status.value() == 2, "{state:?}");
        }
        ensure!(proc::is_alive(self.container.pid.cast_signed()), "the witness is dead");
        self.goes_on().await?;
        let text = self.numbers.text();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        for (index, line) in whole.lines().enumerate() {
            ensure!(line == (index + 1).to_string(), "{line:?} in the place of {}", index + 1);
        }
        Ok(())
    }

    /// Checks it a last time, and ends it and its shim.
    pub async fn dismiss(self) -> Result<()> {
        self.is_untouched().await?;
        ensure!(self.container.shut_down().await? == 137);
        Ok(())
    }
}

/// Memory of a process that nobody shares with it, in KiB.
pub fn private_kib(pid: i32) -> Result<u64> {
    let text = proc::status_field(pid, "RssAnon")?;
    Ok(text.trim_end_matches(" kB").parse()?)
}
