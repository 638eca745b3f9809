//! `start`, `delete`, `-info` and `ps`, as containerd and operators run them: the real binary in a `/run` of its own.
use std::ffi::OsStr;
use std::fs::{self, File, Permissions};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::shim::oci::Options;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use protobuf::Message;
use protobuf::well_known_types::any::Any;

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-x-v2");
const DAEMON: &str = "/no/such/containerd.sock";

/// A `/run` of its own, with bundles. Its keepers are killed with it.
struct Host {
    run: PathBuf,
}

impl Host {
    fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        // Short: it goes to the front of socket paths.
        let run = PathBuf::from(format!("/tmp/xb{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir_all(&run).expect("a temporary folder can be made");
        Self { run }
    }

    /// Makes a bundle whose container names this group.
    fn bundle(&self, id: &str, group: Option<&str>) -> PathBuf {
        let bundle = self.run.join("b").join(id);
        fs::create_dir_all(&bundle).expect("a bundle can be made");
        let annotations = group.map_or(String::new(), |group| format!(r#", "annotations": {{"io.kubernetes.cri.sandbox-id": "{group}"}}"#));
        fs::write(bundle.join("config.json"), format!(r#"{{"ociVersion": "1.0.2"{annotations}}}"#)).expect("a file can be written");
        bundle
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(SHIM);
        command.args(arguments).env("X_SHIM_RUN_DIR", &self.run).env("TTRPC_ADDRESS", "/no/such/containerd.sock.ttrpc");
        command.env("SECRET_OF_THE_DAEMON", "1").env("GOMAXPROCS", "2").stdin(Stdio::null());
        command
    }

    fn action(&self, id: &str, action: &str) -> Command {
        let mut command = self.command(&["-namespace", "n1", "-address", DAEMON, "-publish-binary", "/c", "-id", id, action]);
        command.current_dir(self.run.join("b").join(id));
        command
    }

    fn start(&self, id: &str) -> String {
        text(&succeeded(self.action(id, "start").output().expect("the shim can be executed")))
    }

    fn ps(&self) -> serde_json::Value {
        let output = succeeded(self.command(&["ps", "--json"]).output().expect("the shim can be executed"));
        serde_json::from_slice(&output.stdout).expect("JSON")
    }

    /// A copy of the program of its own.
    fn install(&self) -> PathBuf {
        let installed = self.run.join("containerd-shim-x-v2");
        assert!(Command::new("/bin/cp").arg(SHIM).arg(&installed).status().expect("executes").success());
        installed
    }

    /// The worker of the only shim, once it serves.
    fn worker(&self) -> u32 {
        let worker = || self.ps()["shims"][0]["worker"].clone();
        scratch::eventually("a worker serves", || worker()["build"].as_str().is_some_and(|build| !build.is_empty()));
        worker()["pid"].as_u64().and_then(|pid| pid.try_into().ok()).expect("a pid")
    }

    fn keeper_of(&self, id: &str) -> u32 {
        let pid = fs::read_to_string(self.run.join("b").join(id).join("shim.pid")).expect("start writes shim.pid");
        pid.parse().expect("a number")
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for pid in numbers_in("/proc") {
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let ours = format!("X_SHIM_RUN_DIR={}", self.run.display());
            if environment.split(|byte| *byte == 0).any(|entry| entry == ours.as_bytes()) {
                kill(pid, "-KILL");
            }
        }
        let _ = fs::remove_dir_all(&self.run);
    }
}

fn numbers_in(folder: impl AsRef<Path>) -> Vec<u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}

/// The variables that were set for a command.
fn set_in(command: &Command) -> impl Iterator<Item = (&OsStr, &OsStr)> {
    command.get_envs().filter_map(|(name, value)| Some((name, value?)))
}

fn may_mount() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    let status = fs::read_to_string("/proc/self/status").expect("is there");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("is there");
    u64::from_str_radix(effective.trim(), 16).expect("a number") & 1 << CAP_SYS_ADMIN != 0
}

fn kill(pid: u32, signal: &str) {
    let _ = Command::new("/bin/kill").args([signal, &pid.to_string()]).stderr(Stdio::null()).status();
}

/// Writes a script in a child process: children that other threads fork inherit a file open for writing here, which cannot
/// be executed meanwhile.
fn script(path: &Path, text: &str) {
    const WRITE: &str = "printf %s \"$2\" > \"$1\" && chmod 755 \"$1\"";
    assert!(Command::new("/bin/sh").args(["-c", WRITE, "sh"]).arg(path).arg(text).status().expect("executes").success());
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("text")
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Checks that a command succeeded and wrote nothing to stderr, since containerd reads both streams as one.
fn succeeded(output: Output) -> Output {
    assert!(output.status.success() && output.stderr.is_empty(), "{}: {}", output.status, stderr(&output));
    output
}

fn failed(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{}", stderr(output));
    assert!(output.stdout.is_empty(), "an answer beside the error: {}", text(output));
    stderr(output)
}

fn run_with(mut command: Command, input: &[u8]) -> Output {
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("executes");
    // It may have answered without reading: then this write fails.
    let _ = child.stdin.take().expect("a pipe").write_all(input);
    child.wait_with_output().expect("ends")
}

fn path_of(address: &str) -> PathBuf {
    PathBuf::from(address.strip_prefix("unix://").expect("the address of a socket in a file system"))
}

#[test]
fn start_answers_the_plain_address_of_a_private_listening_socket() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    let address = host.start("c1");
    let socket = path_of(&address);
    assert_eq!(socket.parent(), Some(host.run.join("containerd/s").as_path()));
    UnixStream::connect(&socket).expect("the keeper listens");
    let control = host.run.join("containerd-shim-x").join(socket.file_name().expect("a name")).with_extension("sock");
    for path in [&socket, &control] {
        assert_eq!(fs::metadata(path).expect("is there").mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(path.parent().expect("a folder")).expect("is there").mode() & 0o777, 0o700);
    }
    assert_eq!(fs::read_to_string(bundle.join("address")).expect("is there"), address);
    let files: Vec<_> = fs::read_dir(control.parent().expect("a folder")).expect("is there").collect();
    assert_eq!(files.len(), 1, "no lock file is left: {files:?}");
}

#[test]
fn the_keeper_has_nothing_of_the_daemon() {
    let host = Host::new();
    host.bundle("c1", None);
    let mut command = host.action("c1", "start");
    // A leaked descriptor of the daemon.
    let stray = fs::File::open("/etc/passwd").expect("opens");
    command.stdin(stray.try_clone().expect("copies"));
    // `output` returns when both streams are closed: a keeper that held one would block containerd for ever.
    succeeded(command.output().expect("executes"));
    let keeper = host.keeper_of("c1");
    let proc = |name: &str| format!("/proc/{keeper}/{name}");
    for number in 0..3 {
        assert_eq!(fs::read_link(proc(&format!("fd/{number}"))).expect("is open"), Path::new("/dev/null"));
    }
    for number in numbers_in(proc("fd")) {
        let target = fs::read_link(proc(&format!("fd/{number}"))).unwrap_or_default();
        assert_ne!(target, Path::new("/etc/passwd"), "descriptor {number}");
    }
    assert_eq!(fs::read_link(proc("cwd")).expect("is there"), Path::new("/"));
    let environment = fs::read_to_string(proc("environ")).expect("is there");
    assert!(!environment.contains("SECRET") && !environment.contains("GOMAXPROCS"), "{environment}");
    assert!(environment.contains("PATH="), "{environment}");
    let stat = fs::read_to_string(proc("stat")).expect("is there");
    let fields: Vec<&str> = stat.rsplit_once(") ").expect("a name").1.split(' ').collect();
    assert_eq!(fields[2], keeper.to_string(), "a process group of its own");
    let daemon: i32 = fs::read_to_string("/proc/self/oom_score_adj").expect("is there").trim().parse().expect("a number");
    let score: i32 = fs::read_to_string(proc("oom_score_adj")).expect("is there").trim().parse().expect("a number");
    assert_eq!(score, (daemon + 1).min(1000));
}

#[test]
fn the_program_cannot_be_written_through_a_keeper_even_after_its_exit() {
    if !may_mount() {
        return eprintln!("skipped: needs CAP_SYS_ADMIN");
    }
    let host = Host::new();
    host.bundle("c1", None);
    let installed = host.install();
    let start = host.action("c1", "start");
    let mut command = Command::new(&installed);
    command.args(start.get_args()).envs(set_in(&start)).current_dir(host.run.join("b/c1")).stdin(Stdio::null());
    succeeded(command.output().expect("executes"));
    let keeper = host.keeper_of("c1");
    let executable = format!("/proc/{keeper}/exe");
    assert_eq!(fs::read_link(&executable).expect("is there"), Path::new("/containerd-shim-x-v2"), "the name without the folder");
    assert!(fs::metadata(&executable).is_ok_and(|own| own.ino() == fs::metadata(&installed).expect("is there").ino()));
    let line = fs::read_to_string(format!("/proc/{keeper}/cmdline")).expect("is there");
    assert!(line.ends_with(&format!("\0keeper\0{}\0", installed.display())), "the path is its last argument: {line}");
    // `start` does not wait for what the keeper does first.
    scratch::eventually("it has named itself", || {
        fs::read_to_string(format!("/proc/{keeper}/comm")).is_ok_and(|name| name.trim() == "containerd-shim")
    });
    // As a process in a container would hold it; here it needs a path to be opened again.
    let held = File::options().read(true).custom_flags(nix::libc::O_PATH).open(&executable).expect("is there");
    let write = || File::options().write(true).open(format!("/proc/self/fd/{}", held.as_raw_fd())).map(drop);
    assert!(write().is_err(), "while it runs");
    kill(keeper, "-KILL");
    scratch::eventually("no process executes the program", || File::options().write(true).open(&installed).is_ok());
    assert_eq!(write().expect_err("the mount is read-only").raw_os_error(), Some(nix::libc::EROFS));
}

#[test]
fn without_the_right_to_mount_a_keeper_starts_and_logs_why_it_is_unprotected() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    nix::unistd::mkfifo(&bundle.join("log"), nix::sys::stat::Mode::S_IRWXU).expect("a fifo");
    let start = host.action("c1", "start");
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set=-sys_admin", "--inh-caps=-sys_admin", SHIM]).args(start.get_args()).current_dir(&bundle);
    command.envs(set_in(&start));
    let Ok(output) = command.stdin(Stdio::null()).output() else { return eprintln!("skipped: there is no setpriv") };
    succeeded(output);
    let mut log = File::options().read(true).write(true).open(bundle.join("log")).expect("a fifo");
    let mut text = String::new();
    while !text.contains("is not executed on a read-only mount") {
        let mut bytes = [0; 4096];
        let count = log.read(&mut bytes).expect("a line");
        text.push_str(&String::from_utf8_lossy(&bytes[..count]));
    }
    assert!(text.contains("Operation not permitted"), "{text}");
    scratch::eventually("a worker serves", || host.ps()["shims"][0]["worker"]["build"].as_str().is_some_and(|build| !build.is_empty()));
}

#[test]
fn the_first_worker_is_a_fork_of_the_keeper_that_has_nothing_of_it() {
    let host = Host::new();
    host.bundle("c1", None);
    host.start("c1");
    let keeper = host.keeper_of("c1");
    let worker = host.worker();
    let line = |pid: u32| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    assert_eq!(line(worker), line(keeper).replace("\0keeper\0", "\0worker\0"));
    assert!(line(worker).contains("\0worker\0"));
    let field = |pid: u32, number: usize| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("is there");
        stat.rsplit_once(") ").expect("a name").1.split(' ').nth(number - 3).expect("a field").to_owned()
    };
    // 28: the bottom of the stack, which execve(2) would place elsewhere
    assert_eq!(field(worker, 28), field(keeper, 28), "it was executed");
    assert_eq!(field(worker, 5), worker.to_string(), "a process group of its own");
    assert_eq!(fs::read_to_string(format!("/proc/{worker}/comm")).expect("is there").trim(), "containerd-shim");
    for number in numbers_in(format!("/proc/{worker}/fd")) {
        let target = fs::read_link(format!("/proc/{worker}/fd/{number}")).unwrap_or_default();
        let inode = |pid: u32| fs::metadata(format!("/proc/{pid}/fd/{number}")).map(|about| about.ino());
        let is_keepers = number > 2 && target.to_string_lossy().starts_with("socket:") && inode(keeper).ok() == inode(worker).ok();
        assert!(!is_keepers, "descriptor {number} is the keeper's {}", target.display());
    }
    kill(worker, "-KILL");
    scratch::eventually("another worker serves", || host.worker() != worker);
    let next = host.worker();
    assert_ne!(field(next, 28), field(keeper, 28), "the next one is executed, with addresses of its own");
}

#[test]
fn the_first_worker_ends_with_its_keeper() {
    let host = Host::new();
    host.bundle("c1", None);
    host.start("c1");
    let worker = host.worker();
    kill(host.keeper_of("c1"), "-KILL");
    scratch::eventually("the worker has exited", || fs::read(format!("/proc/{worker}/cmdline")).map_or(true, |line| line.is_empty()));
}

#[test]
fn a_keeper_that_may_open_few_descriptors_has_a_worker() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    let start = host.action("c1", "start");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "ulimit -n 60; exec \"$0\" \"$@\"", SHIM]).args(start.get_args()).current_dir(bundle);
    command.envs(set_in(&start));
    succeeded(command.stdin(Stdio::null()).output().expect("executes"));
    let limits = fs::read_to_string(format!("/proc/{}/limits", host.keeper_of("c1"))).expect("is there");
    assert!(limits.lines().any(|line| line.starts_with("Max open files") && line.contains(" 60 ")), "{limits}");
    scratch::eventually("a worker serves", || host.ps()["shims"][0]["worker"]["build"].as_str().is_some_and(|build| !build.is_empty()));
}

#[test]
fn a_daemon_of_2_3_is_answered_in_protobuf_and_chooses_the_folder() {
    let host = Host::new();
    // As the word behind the flags of a keeper.
    let first = "keeper";
    host.bundle(first, None);
    let mut params = BootstrapParams::new();
    params.instance_id = first.into();
    params.namespace = "n1".into();
    params.containerd_grpc_address = DAEMON.into();
    params.socket_dir = Some(host.run.join("short").display().to_string());
    let output = succeeded(run_with(host.action(first, "start"), &params.write_to_bytes().expect("encodes")));
    let result = BootstrapResult::parse_from_bytes(&output.stdout).expect("protobuf");
    assert_eq!((result.version, result.protocol.as_str()), (2, "ttrpc"));
    assert_eq!(path_of(&result.address).parent(), Some(host.run.join("short").as_path()));

    // A daemon that requests another folder, or none, gets the address of the running shim.
    host.bundle("c2", Some(first));
    assert_eq!(host.start("c2"), result.address);
    assert_eq!(host.keeper_of("c2"), host.keeper_of(first));

    params.socket_dir = Some(host.run.join("x".repeat(100)).display().to_string());
    params.instance_id = "c3".into();
    host.bundle("c3", None);
    let message = failed(&run_with(host.action("c3", "start"), &params.write_to_bytes().expect("encodes")), 1);
    assert!(message.contains("107") && message.contains("xxxx"), "{message}");
}

#[test]
fn older_daemons_are_answered_in_text() {
    let host = Host::new();
    let mut options = Options::new();
    options.binary_name = "crun".into();
    let any = Any { type_url: "containerd.runc.v1.Options".into(), value: options.write_to_bytes().expect("encodes"), ..Any::new() };
    let inputs = [any.write_to_bytes().expect("encodes"), b"garbage".to_vec(), vec![0xff; 3000], vec![0; 4 << 20]];
    for (number, input) in inputs.iter().enumerate() {
        let id = format!("c{number}");
        host.bundle(&id, None);
        let output = succeeded(run_with(host.action(&id, "start"), input));
        assert!(text(&output).starts_with("unix:///"), "{number}");
    }
    host.bundle("long", None);
    let message = failed(&run_with(host.action("long", "start"), &vec![0; (4 << 20) + 1]), 1);
    assert!(message.contains("standard input is longer than 4194304 bytes"), "{message}");
    assert!(!host.run.join("b/long/address").exists());
}

#[test]
fn starts_at_the_same_time_make_one_keeper() {
    let host = Host::new();
    let ids: Vec<String> = (0..12).map(|number| format!("c{number}")).collect();
    for id in &ids {
        host.bundle(id, Some("pod"));
    }
    let addresses: Vec<String> = thread::scope(|scope| {
        let threads: Vec<_> = ids.iter().map(|id| scope.spawn(|| host.start(id))).collect();
        threads.into_iter().map(|thread| thread.join().expect("starts")).collect()
    });
    assert!(addresses.iter().all(|address| *address == addresses[0]), "{addresses:?}");
    let shims = host.ps();
    assert_eq!(shims["shims"].as_array().map(Vec::len), Some(1), "{shims}");
    assert_eq!(shims["shims"][0]["group"], "pod");
    // The first start needs no reserved place, the others have one each.
    let reserved = shims["shims"][0]["containers"].as_array().expect("a list");
    assert_eq!(reserved.len(), ids.len() - 1, "{shims}");
}

#[test]
fn leftovers_of_a_dead_keeper_are_listed_until_replaced() {
    let host = Host::new();
    host.bundle("c1", None);
    let address = host.start("c1");
    let first = host.keeper_of("c1");
    kill(first, "-KILL");
    scratch::eventually("the keeper is dead", || UnixStream::connect(path_of(&address)).is_err());
    assert_eq!(host.ps()["shims"][0]["status"], "dead");
    assert_eq!(host.start("c1"), address);
    assert_ne!(host.keeper_of("c1"), first);
    UnixStream::connect(path_of(&address)).expect("the keeper listens");
    assert_eq!(host.ps()["shims"][0]["status"], "alive");
}

#[test]
fn a_hanging_keeper_is_reported_and_not_replaced() {
    let host = Host::new();
    host.bundle("c1", None);
    host.start("c1");
    let keeper = host.keeper_of("c1");
    kill(keeper, "-STOP");
    let begun = Instant::now();
    let message = failed(&host.action("c1", "start").output().expect("executes"), 1);
    assert!(message.contains("did not answer in time"), "{message}");
    assert!(begun.elapsed() < Duration::from_secs(5));
    assert_eq!(host.ps()["shims"][0]["status"], "silent");
    kill(keeper, "-CONT");
    host.start("c1");
    assert_eq!(host.keeper_of("c1"), keeper);
}

#[test]
fn an_invalid_bundle_is_refused_with_one_line_and_leaves_nothing() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    for (content, words) in [("{", "is not a valid container configuration"), ("[]", "expected an object")] {
        fs::write(bundle.join("config.json"), content).expect("a file can be written");
        let message = failed(&host.action("c1", "start").output().expect("executes"), 1);
        assert!(message.contains(words) && message.contains("config.json"), "{message}");
        assert_eq!(message.lines().count(), 1, "{message}");
    }
    assert!(!host.run.join("containerd/s").exists(), "no socket was made");
}

#[test]
fn no_keeper_is_left_where_the_bundle_cannot_be_written() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    fs::create_dir(bundle.join("address")).expect("a folder can be made");
    let message = failed(&host.action("c1", "start").output().expect("executes"), 1);
    assert!(message.contains("write ") && message.contains("/address"), "{message}");
    assert_eq!(host.ps()["shims"].as_array().map(Vec::len), Some(0));
    let ours = format!("{}/containerd", host.run.display());
    scratch::eventually("the keeper is gone", || {
        let lines = numbers_in("/proc").into_iter().filter_map(|pid| fs::read(format!("/proc/{pid}/cmdline")).ok());
        !lines.into_iter().any(|line| String::from_utf8_lossy(&line).contains(&ours))
    });
}

#[test]
fn a_folder_that_others_can_reach_is_refused() {
    let host = Host::new();
    host.bundle("c1", None);
    let controls = host.run.join("containerd-shim-x");
    fs::create_dir(&controls).expect("a folder can be made");
    fs::set_permissions(&controls, Permissions::from_mode(0o755)).expect("can be opened up");
    let message = failed(&host.action("c1", "start").output().expect("executes"), 1);
    assert!(message.contains("lets others in"), "{message}");
    fs::remove_dir(&controls).expect("is empty");
    symlink("/tmp", &controls).expect("a link can be made");
    let message = failed(&host.action("c1", "start").output().expect("executes"), 1);
    assert!(message.contains("symbolic link"), "{message}");
}

#[test]
fn a_missing_cgroup_is_named_and_no_keeper_is_left() {
    let host = Host::new();
    host.bundle("c1", None);
    let mut options = Options::new();
    options.shim_cgroup = "/no/such/cgroup".into();
    let any = Any { type_url: "containerd.runc.v1.Options".into(), value: options.write_to_bytes().expect("encodes"), ..Any::new() };
    let message = failed(&run_with(host.action("c1", "start"), &any.write_to_bytes().expect("encodes")), 1);
    assert!(message.contains("/no/such/cgroup") && message.contains("ShimCgroup"), "{message}");
    assert_eq!(host.ps()["shims"].as_array().map(Vec::len), Some(0));
}

#[test]
fn a_usage_error_is_answered_with_one_line_and_code_2() {
    let host = Host::new();
    for (arguments, words) in [
        (&["-namespace", "n1", "-id", "a/b", "start"][..], "without a slash"),
        (&["-nonsense"], "unknown flag -nonsense"),
        (&["fly"], "unknown command"),
        (&[], "no command"),
        (&["-namespace", "n1", "start"], "needs the flag -id"),
    ] {
        let message = failed(&host.command(arguments).output().expect("executes"), 2);
        assert!(message.contains(words), "{message}");
    }
    assert!(text(&succeeded(host.command(&["--help"]).output().expect("executes"))).contains("inspect ID"));
    assert!(text(&succeeded(host.command(&["-v"]).output().expect("executes"))).contains("Version:"));
}

#[test]
fn a_container_that_was_never_created_is_deleted_as_killed() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    let address = host.start("c1");
    // The keeper waits for a Create that never comes.
    for _ in 0..2 {
        let mut command = host.action("c1", "delete");
        command.arg("-ignored");
        let output = succeeded(command.output().expect("executes"));
        let response = DeleteResponse::parse_from_bytes(&output.stdout).expect("protobuf");
        assert_eq!((response.pid, response.exit_status), (0, 137));
        assert!(response.exited_at.seconds > 1_600_000_000);
    }
    kill(host.keeper_of("c1"), "-KILL");
    scratch::eventually("the keeper is dead", || UnixStream::connect(path_of(&address)).is_err());
    succeeded(host.action("c1", "delete").output().expect("executes"));
    assert!(!path_of(&address).exists(), "the dead keeper's sockets are gone");
    assert_eq!(host.ps()["shims"].as_array().map(Vec::len), Some(0));
    // Also from another directory, with the flag -bundle, even if the bundle is gone.
    fs::remove_dir_all(&bundle).expect("is there");
    let bundle = bundle.display().to_string();
    succeeded(host.command(&["-namespace", "n1", "-id", "c1", "-bundle", &bundle, "delete"]).output().expect("executes"));
}

/// A journal, as a keeper writes it: see `docs/handover.md`.
fn journal(body: &str, exit: Option<(u32, u32, i64)>) -> Vec<u8> {
    let sum = |bytes: &[u8]| bytes.iter().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    let mut slot = Vec::new();
    if let Some((pid, status, at_nanos)) = exit {
        slot.extend(pid.to_le_bytes());
        slot.extend(status.to_le_bytes());
        slot.extend(at_nanos.to_le_bytes());
        slot.extend(sum(&slot).to_le_bytes());
    }
    slot.resize(48, 0);
    let mut head = Vec::new();
    head.extend((body.len() as u32).to_le_bytes());
    head.extend(sum(body.as_bytes()).to_le_bytes());
    head.resize(32, 0);
    [b"x-shim journal 1".to_vec(), slot, head, body.as_bytes().to_vec()].concat()
}

fn start_time(pid: u32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).expect("the process exists");
    stat.rsplit_once(')').expect("a name").1.split_ascii_whitespace().nth(19).expect("field 22").parse().expect("a number")
}

#[test]
fn with_a_dead_keeper_the_journal_reports_the_exit() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    let body = format!(r#"{{"version": 1, "id": "c1", "control_path": "{}/containerd-shim-x/none.sock"}}"#, host.run.display());
    fs::write(bundle.join("x-journal"), journal(&body, Some((4242, 3, 1_700_000_000_000_000_007)))).expect("a file can be written");
    for _ in 0..2 {
        let output = succeeded(host.action("c1", "delete").output().expect("executes"));
        let response = DeleteResponse::parse_from_bytes(&output.stdout).expect("protobuf");
        assert_eq!((response.pid, response.exit_status), (4242, 3));
        assert_eq!((response.exited_at.seconds, response.exited_at.nanos), (1_700_000_000, 7));
    }
}

#[test]
fn with_a_dead_keeper_a_running_container_is_killed_and_recorded() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    let mut init = Command::new("/bin/sleep").arg("1000").spawn().expect("sleep can be executed");
    let mut bystander = Command::new("/bin/sleep").arg("1000").spawn().expect("sleep can be executed");
    let body = |pid: u32, start_time: u64| {
        let control = host.run.join("containerd-shim-x/none.sock");
        format!(
            r#"{{"id": "c1", "control_path": "{}", "later": [1], "init": {{"pid": {pid}, "start_time": {start_time}}}}}"#,
            control.display()
        )
    };
    fs::write(bundle.join("x-journal"), journal(&body(init.id(), start_time(init.id())), None)).expect("a file can be written");
    let answers: Vec<Vec<u8>> = (0..2).map(|_| succeeded(host.action("c1", "delete").output().expect("executes")).stdout).collect();
    let response = DeleteResponse::parse_from_bytes(&answers[0]).expect("protobuf");
    assert_eq!((response.pid, response.exit_status), (init.id(), 137));
    assert_eq!(answers[0], answers[1], "a second run reports the same");
    assert!(!init.wait().expect("is our child").success());

    // A process that only has the pid of the container's init.
    let bundle = host.bundle("c2", None);
    fs::write(bundle.join("x-journal"), journal(&body(bystander.id(), 1), None)).expect("a file can be written");
    succeeded(host.action("c2", "delete").output().expect("executes"));
    assert!(bystander.try_wait().expect("is our child").is_none(), "it is alive");
    let _ = bystander.kill();
    let _ = bystander.wait();
}

#[test]
fn a_torn_or_missing_journal_does_not_prevent_delete() {
    let host = Host::new();
    let bundle = host.bundle("c1", None);
    let whole = journal(r#"{"id": "c1"}"#, Some((7, 3, 1)));
    let mut torn = whole.clone();
    torn[20] ^= 1;
    for content in [torn, whole[..50].to_vec(), vec![], b"something else".to_vec(), vec![0xff; 200_000]] {
        fs::write(bundle.join("x-journal"), &content).expect("a file can be written");
        let output = host.action("c1", "delete").output().expect("executes");
        assert!(output.status.success(), "{}", stderr(&output));
        let response = DeleteResponse::parse_from_bytes(&output.stdout).expect("protobuf");
        assert_eq!(response.exit_status, 137);
    }
}

#[test]
fn info_describes_the_engine_that_the_options_name() {
    let host = Host::new();
    let engine = host.run.join("engine");
    script(&engine, "#!/bin/sh\necho '{\"ociVersionMin\": \"1.0.0\"}'\n");
    let mut options = Options::new();
    options.binary_name = engine.display().to_string();
    let any = Any { type_url: "containerd.runc.v1.Options".into(), value: options.write_to_bytes().expect("encodes"), ..Any::new() };
    let input = any.write_to_bytes().expect("encodes");
    let output = succeeded(run_with(host.command(&["-info"]), &input));
    let info = RuntimeInfo::parse_from_bytes(&output.stdout).expect("protobuf");
    assert_eq!(info.name, "io.containerd.x.v2");
    assert_eq!(info.options.as_ref(), Some(&any));
    assert_eq!(info.features.value, b"{\"ociVersionMin\": \"1.0.0\"}\n");
    assert_eq!(info.annotations["io.containerd.x.v2.oci-runtime"], options.binary_name);
    assert_eq!(info.annotations["io.containerd.x.v2.oci-runtime.reason"], "named by the option BinaryName");

    // A runtime without the command features is described without them.
    script(&engine, "#!/bin/sh\necho no such command >&2; exit 1\n");
    let output = succeeded(run_with(host.command(&["-info"]), &input));
    assert!(RuntimeInfo::parse_from_bytes(&output.stdout).expect("protobuf").features.is_none());
    fs::remove_file(&engine).expect("is there");
    let message = failed(&run_with(host.command(&["-info"]), &input), 1);
    assert!(message.contains(&engine.display().to_string()), "{message}");
}

#[test]
fn a_shim_whose_file_was_replaced_still_starts() {
    let host = Host::new();
    host.bundle("c1", None);
    let installed = host.install();
    // It waits for its standard input, and its file is replaced meanwhile.
    let mut command = Command::new(&installed);
    command.args(["-namespace", "n1", "-address", DAEMON, "-id", "c1", "start"]).env("X_SHIM_RUN_DIR", &host.run);
    command.current_dir(host.run.join("b/c1")).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().expect("executes");
    fs::remove_file(&installed).expect("is there");
    fs::write(&installed, "#!/bin/false\n").expect("a file can be written");
    drop(child.stdin.take());
    let mut answer = String::new();
    child.stdout.take().expect("a pipe").read_to_string(&mut answer).expect("text");
    assert!(child.wait().expect("ends").success());
    UnixStream::connect(path_of(&answer)).expect("the keeper listens");
    scratch::eventually("the keeper serves", || host.ps()["shims"][0]["status"] == "alive");
}

#[test]
fn a_bundle_without_a_configuration_is_a_pods_and_containers_with_its_id_join_it() {
    let host = Host::new();
    let pod = host.bundle("p1", None);
    fs::remove_file(pod.join("config.json")).expect("is there");
    let address = host.start("p1");
    assert_eq!(host.ps()["shims"][0]["group"], "p1");
    host.bundle("c1", Some("p1"));
    assert_eq!(host.start("c1"), address);
    assert_eq!(host.keeper_of("c1"), host.keeper_of("p1"));
    // Of neither has anything been created.
    for id in ["c1", "p1"] {
        succeeded(host.action(id, "delete").output().expect("executes"));
    }
    scratch::eventually("the keeper exits", || host.ps()["shims"].as_array().is_some_and(Vec::is_empty));
}

#[test]
fn delete_removes_what_a_pod_with_a_dead_keeper_has_left() {
    let host = Host::new();
    let bundle = host.bundle("p1", None);
    fs::remove_file(bundle.join("config.json")).expect("is there");
    let address = path_of(&host.start("p1"));
    kill(host.keeper_of("p1"), "-KILL");
    let cgroup = host.run.join("cgroup");
    fs::create_dir_all(bundle.join("pod/shm")).expect("folders");
    fs::create_dir(&cgroup).expect("a folder");
    fs::write(bundle.join("pod/leftovers"), format!(r#"{{"cgroups": ["{}"]}}"#, cgroup.display())).expect("a file");
    for _ in 0..2 {
        let output = succeeded(host.action("p1", "delete").output().expect("executes"));
        assert_eq!(DeleteResponse::parse_from_bytes(&output.stdout).expect("an answer").exit_status, 137);
    }
    assert!(!bundle.join("pod").exists() && !cgroup.exists() && !address.exists());
    assert_eq!(host.ps()["shims"].as_array().map(Vec::len), Some(0));
}
