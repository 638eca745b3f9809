//! What a test has for itself: a keeper, a folder with a bundle, cgroups.
use std::cell::{Cell, RefCell};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};

use crate::bundle;

/// Set in the environment of a keeper.
pub(crate) const KEEPER: &str = "X_ENGINE_TESTS_KEEPER";

/// Its value for one that sees cgroup v2 alone.
pub(crate) const KEEPER_V2: &str = "v2";

/// How often something is repeated: a few times, or `X_TIMES` times as often.
pub(crate) fn repeated(count: u64) -> u64 {
    count * std::env::var("X_TIMES").ok().and_then(|times| times.parse::<u64>().ok()).unwrap_or(1).max(1)
}

/// What this machine lacks for containers, if anything.
pub(crate) fn missing() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".to_owned());
    }
    if bundle::busybox().is_none() {
        return Some("needs a static busybox in /bin".to_owned());
    }
    if !is_v2_alone() && !Path::new("/sys/fs/cgroup/memory/cgroup.procs").exists() {
        return Some("needs cgroup v1 or v2 in /sys/fs/cgroup".to_owned());
    }
    None
}

/// Whether this host has cgroup v2 and nothing else.
pub(crate) fn is_v2_alone() -> bool {
    Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
}

/// The folder of a path in each hierarchy of this host.
fn in_each_hierarchy(cgroup: &str) -> Vec<PathBuf> {
    let top = Path::new("/sys/fs/cgroup");
    let cgroup = cgroup.trim_start_matches('/');
    if is_v2_alone() {
        return vec![top.join(cgroup)];
    }
    fs::read_dir(top).expect("cgroups").flatten().map(|entry| entry.path().join(cgroup)).collect()
}

/// Has crun accept this host, in a mount namespace that the tests share. Returns why that cannot be.
pub(crate) fn show_cgroups_to_crun() -> Option<String> {
    let show = || -> io::Result<()> {
        unshare(CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        scratch::cgroups::show_v1(&scratch::Folder::new("cgroups"))
    };
    // Its own folder is gone from the namespace when it is in its place.
    scratch::cgroups::are_mixed().then(show)?.err().map(|error| error.to_string())
}

pub(crate) struct Stage {
    pub(crate) folder: PathBuf,
    /// The folder of the test's cgroups, as a `cgroupsPath`.
    pub(crate) cgroup: String,
    child: RefCell<Child>,
    requests: RefCell<Option<ChildStdin>>,
    answers: RefCell<BufReader<ChildStdout>>,
    outputs: Cell<u32>,
    /// Whether containers are made without pivot_root(2).
    pub(crate) no_pivot_root: Cell<bool>,
    /// Whether they keep the session keyring that they are started with.
    pub(crate) no_new_keyring: Cell<bool>,
    /// Type, source and options of what containers have as their root.
    pub(crate) root_mounts: RefCell<Vec<(String, String, Vec<String>)>>,
}

impl Stage {
    pub(crate) fn new() -> Self {
        Self::with(false)
    }

    /// With no cgroups but those of v2.
    pub(crate) fn on_v2() -> Self {
        Self::with(true)
    }

    fn with(v2: bool) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("x-engine-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let folder = std::env::temp_dir().join(&name);
        fs::create_dir_all(folder.join("rootfs")).expect("a folder");
        bundle::make_root(&folder.join("rootfs"));
        let mut child = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "--"])
            .arg(std::env::current_exe().expect("this program"))
            .env(KEEPER, if v2 { KEEPER_V2 } else { "1" })
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare");
        let (requests, answers) = (child.stdin.take(), child.stdout.take().expect("a pipe"));
        Self {
            folder,
            cgroup: format!("/{name}"),
            child: RefCell::new(child),
            requests: RefCell::new(requests),
            answers: RefCell::new(BufReader::new(answers)),
            outputs: Cell::new(0),
            no_pivot_root: Cell::new(false),
            no_new_keyring: Cell::new(false),
            root_mounts: RefCell::default(),
        }
    }

    /// A configuration for this test's container.
    pub(crate) fn config(&self, args: &[&str]) -> Value {
        bundle::config(args, &format!("{}/c", self.cgroup))
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.folder.join("rootfs")
    }

    fn ask(&self, request: &Value) -> Result<Value, String> {
        let mut requests = self.requests.borrow_mut();
        writeln!(requests.as_mut().expect("open until the end"), "{request}").expect("a keeper");
        let mut line = String::new();
        self.answers.borrow_mut().read_line(&mut line).expect("an answer");
        let answer: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("the keeper answered {line:?}: {error}"));
        match answer["error"].as_str() {
            Some(error) => Err(error.to_owned()),
            None => Ok(answer),
        }
    }

    /// A file for the next process's output.
    fn output(&self) -> PathBuf {
        self.outputs.set(self.outputs.get() + 1);
        self.folder.join(format!("output-{}", self.outputs.get()))
    }

    /// Makes the container `id`.
    pub(crate) fn create(&self, id: &str, config: &Value) -> Result<Process<'_>, String> {
        fs::write(self.folder.join("config.json"), config.to_string()).expect("a file");
        let output = self.output();
        let terminal = &config["process"]["terminal"];
        let answer = self.ask(&json!({ "do": "create", "id": id, "bundle": self.folder, "output": output, "terminal": terminal, "no_pivot_root": self.no_pivot_root.get(), "no_new_keyring": self.no_new_keyring.get(), "root_mounts": *self.root_mounts.borrow() }))?;
        Ok(Process { stage: self, pid: answer["pid"].as_u64().expect("a pid"), output })
    }

    /// Makes the container `id`, whose outputs go to a pipe.
    pub(crate) fn create_piped(&self, id: &str, config: &Value) -> Result<Process<'_>, String> {
        fs::write(self.folder.join("config.json"), config.to_string()).expect("a file");
        let answer = self.ask(&json!({ "do": "create", "id": id, "bundle": self.folder, "pipe": true, "root_mounts": [] }))?;
        Ok(Process { stage: self, pid: answer["pid"].as_u64().expect("a pid"), output: PathBuf::new() })
    }

    /// Has criu save a container.
    pub(crate) fn checkpoint(&self, id: &str, criu: &Value, exit: bool, paused: bool) -> Result<(), String> {
        self.ask(&json!({ "do": "checkpoint", "id": id, "criu": criu, "exit": exit, "paused": paused })).map(drop)
    }

    /// Makes the container `id` from a checkpoint. Its outputs go to a pipe, or its terminal is received.
    pub(crate) fn restore(&self, id: &str, config: &Value, criu: &Value) -> Result<Process<'_>, String> {
        fs::write(self.folder.join("config.json"), config.to_string()).expect("a file");
        let terminal = config["process"]["terminal"] == json!(true);
        let answer =
            self.ask(&json!({ "do": "restore", "id": id, "bundle": self.folder, "criu": criu, "pipe": !terminal, "terminal": terminal }))?;
        Ok(Process { stage: self, pid: answer["pid"].as_u64().expect("a pid"), output: PathBuf::new() })
    }

    /// Makes a container whose performer is killed after some microseconds. Whether it had finished.
    pub(crate) fn create_killed(&self, config: &Value, after: u64) -> Result<bool, String> {
        fs::write(self.folder.join("config.json"), config.to_string()).expect("a file");
        let answer = self.ask(&json!({ "do": "create-killed", "id": "c", "bundle": self.folder, "after": after }))?;
        Ok(answer["late"] == json!(true))
    }

    pub(crate) fn start(&self, id: &str) {
        self.ask(&json!({ "do": "start", "id": id })).expect("started");
    }

    /// Adds a process to the container `id`.
    pub(crate) fn exec(&self, id: &str, process: &Value) -> Result<Process<'_>, String> {
        let output = self.output();
        let terminal = &process["terminal"];
        let answer = self.ask(&json!({ "do": "exec", "id": id, "process": process, "output": output, "terminal": terminal }))?;
        Ok(Process { stage: self, pid: answer["pid"].as_u64().expect("a pid"), output })
    }

    pub(crate) fn delete(&self, id: &str) -> Result<(), String> {
        self.ask(&json!({ "do": "delete", "id": id })).map(drop)
    }

    pub(crate) fn freeze(&self, id: &str, freeze: bool) -> Result<(), String> {
        self.ask(&json!({ "do": "freeze", "id": id, "freeze": freeze })).map(drop)
    }

    pub(crate) fn update(&self, id: &str, resources: &Value) -> Result<(), String> {
        self.ask(&json!({ "do": "update", "id": id, "resources": resources })).map(drop)
    }

    /// How many processes a container has.
    pub(crate) fn count(&self, id: &str) -> u64 {
        self.ask(&json!({ "do": "count", "id": id })).expect("a number")["count"].as_u64().expect("a number")
    }

    /// Freezes and thaws a container all the time, until [`Beside::end`].
    pub(crate) fn freeze_beside(&self, id: &str) -> Beside<'_> {
        self.beside(json!({ "do": "freeze-beside", "id": id }))
    }

    /// Reads all of a container's cgroup all the time.
    pub(crate) fn look_beside(&self, id: &str) -> Beside<'_> {
        self.beside(json!({ "do": "look-beside", "id": id }))
    }

    fn beside(&self, mut request: Value) -> Beside<'_> {
        let output = self.output();
        let until = output.with_extension("until");
        request["until"] = json!(until);
        request["report"] = json!(output);
        let pid = self.ask(&request).expect("forked")["pid"].as_u64().expect("a pid");
        Beside { process: Process { stage: self, pid, output }, until }
    }

    /// Has a process made that holds the namespaces of a pod.
    pub(crate) fn holder(&self, label: Option<&str>) -> Result<Process<'_>, String> {
        let answer = self.ask(&json!({ "do": "holder", "label": label }))?;
        Ok(Process { stage: self, pid: answer["pid"].as_u64().expect("a pid"), output: PathBuf::new() })
    }

    /// Has a process killed after some microseconds, by another one.
    pub(crate) fn kill_beside(&self, pid: u64, after: u64) -> Process<'_> {
        let answer = self.ask(&json!({ "do": "kill-beside", "pid": pid, "after": after })).expect("forked");
        Process { stage: self, pid: answer["pid"].as_u64().expect("a pid"), output: PathBuf::new() }
    }

    /// Has a user of the host own as many keys as one may.
    pub(crate) fn use_up_keys(&self, user: u32) -> Result<(), String> {
        self.ask(&json!({ "do": "use-up-keys", "user": user })).map(drop)
    }

    /// How many descriptors the keeper has.
    pub(crate) fn descriptors(&self) -> u64 {
        self.ask(&json!({ "do": "descriptors" })).expect("a number")["count"].as_u64().expect("a number")
    }

    /// Puts a process into a cgroup that cannot be frozen.
    pub(crate) fn wait_for_page(&self, cgroup: &str) -> Process<'_> {
        let pid = self.ask(&json!({ "do": "wait-for-page", "cgroup": cgroup })).expect("forked")["pid"].as_u64();
        Process { stage: self, pid: pid.expect("a pid"), output: PathBuf::new() }
    }

    /// Gives the keeper, and so what it makes, a real-time policy, or takes it away.
    pub(crate) fn set_real_time(&self, is_real_time: bool) {
        self.ask(&json!({ "do": "real-time", "on": is_real_time })).expect("a policy");
    }

    /// Makes plans as for a host on which AppArmor and SELinux are active.
    pub(crate) fn pretend_security_modules(&self) {
        self.ask(&json!({ "do": "pretend" })).expect("pretended");
    }

    /// Runs a shell command in the keeper's namespaces: what it mounts goes with the test.
    pub(crate) fn on_host(&self, script: &str) -> String {
        let answer = self.ask(&json!({ "do": "run", "script": script })).unwrap_or_else(|error| panic!("{script}: {error}"));
        answer["output"].as_str().expect("text").to_owned()
    }

    pub(crate) fn leak(&self) {
        self.ask(&json!({ "do": "leak" })).expect("a leak");
    }

    /// Runs a container to its end, removes it, and returns its status and output.
    pub(crate) fn run(&self, config: &Value) -> (u64, String) {
        let init = self.create("c", config).unwrap_or_else(|error| panic!("create: {error}"));
        self.start("c");
        let ended = init.end();
        self.delete("c").expect("deleted");
        ended
    }

    /// Runs a shell command in the container of a configuration.
    pub(crate) fn shell(&self, script: &str, change: impl FnOnce(&mut Value)) -> String {
        let mut config = self.config(&["sh", "-c", script]);
        change(&mut config);
        let (status, output) = self.run(&config);
        assert_eq!(status, 0, "{output}");
        output
    }

    /// Runs an added shell command to its end.
    pub(crate) fn exec_shell(&self, id: &str, script: &str, change: impl FnOnce(&mut Value)) -> String {
        let mut process = bundle::process(&["sh", "-c", script]);
        change(&mut process);
        let (status, output) = self.exec(id, &process).unwrap_or_else(|error| panic!("exec: {error}")).end();
        assert_eq!(status, 0, "{output}");
        output
    }

    /// The container's folders of cgroups that exist.
    pub(crate) fn cgroups(&self) -> Vec<PathBuf> {
        in_each_hierarchy(&format!("{}/c", self.cgroup)).into_iter().filter(|folder| folder.exists()).collect()
    }

    /// The content of a file of a cgroup of the container. On a host with v2 alone there is one for all controllers.
    pub(crate) fn limit(&self, controller: &str, file: &str) -> String {
        let hierarchy = if is_v2_alone() { "" } else { controller };
        let path = Path::new("/sys/fs/cgroup").join(hierarchy).join(self.cgroup.trim_start_matches('/')).join("c").join(file);
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display())).trim().to_owned()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        // The end of its input ends the keeper, and it ends everything else.
        drop(self.requests.borrow_mut().take());
        let _ = self.child.borrow_mut().wait();
        for folder in in_each_hierarchy(&self.cgroup) {
            let _ = fs::remove_dir(folder.join("c"));
            let _ = fs::remove_dir(folder);
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// A process that does something to a container while other things happen.
pub(crate) struct Beside<'a> {
    process: Process<'a>,
    until: PathBuf,
}

impl Beside<'_> {
    /// Ends it, and returns what it has written.
    pub(crate) fn end(self) -> String {
        fs::write(&self.until, "").expect("a file");
        let (status, output) = self.process.end();
        assert_eq!(status, 0, "{output}");
        output
    }
}

/// A process of a container.
pub(crate) struct Process<'a> {
    stage: &'a Stage,
    pub(crate) pid: u64,
    output: PathBuf,
}

impl Process<'_> {
    /// Waits for its end, and returns its status and output.
    pub(crate) fn end(&self) -> (u64, String) {
        let status = self.stage.ask(&json!({ "do": "wait", "pid": self.pid })).expect("a status")["status"].as_u64();
        (status.expect("a status"), fs::read_to_string(&self.output).unwrap_or_default())
    }

    /// What it wrote to its terminal or its pipe, to the end.
    pub(crate) fn terminal(&self) -> String {
        let answer = self.stage.ask(&json!({ "do": "read", "pid": self.pid })).expect("a terminal");
        answer["output"].as_str().expect("text").to_owned()
    }

    /// Whether its executable could be opened for writing, if no process executed it.
    pub(crate) fn write_access(&self) -> Result<(), String> {
        self.stage.ask(&json!({ "do": "access", "pid": self.pid })).map(drop)
    }

    /// Waits for its end, and leaves it unreaped.
    pub(crate) fn exited(&self) {
        self.stage.ask(&json!({ "do": "exited", "pid": self.pid })).expect("exited");
    }

    /// Waits until it executes the program `name`: a start is answered before that.
    pub(crate) fn executes(&self, name: &str) {
        let comm = format!("cat /proc/{}/comm", self.pid);
        scratch::eventually("it executes its program", || self.stage.on_host(&comm).trim_end() == name);
    }

    pub(crate) fn kill(&self) {
        self.stage.ask(&json!({ "do": "kill", "pid": self.pid })).expect("killed");
    }
}
