//! containerd's own command line client, of each version: every subcommand that needs no snapshot. docs/ctr.md is the table of it.

#[path = "ctr/coverage.rs"]
mod coverage;
#[path = "ctr/stored.rs"]
mod stored;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use shim_tests::context::Context;
use shim_tests::eventually::SOON;
use shim_tests::suite::Suite;
use shim_tests::{isolation, rootfs};

/// One version of ctr, in a namespace of its own.
struct Ctr<'a> {
    cx: &'a Context,
    suite: Suite,
    namespace: String,
}

/// A subcommand, the versions that have it, and its check.
type Row = (&'static str, &'static [Suite], fn(&Ctr<'_>) -> Result<()>);

const ALL: &[Suite] = &Suite::ALL;
const NEWEST: &[Suite] = &[Suite::Forky];
const SINCE_1_7: &[Suite] = &[Suite::Trixie, Suite::Forky];
/// Those that can leave it to the daemon; 1.7 does it with `--local=false`.
const WITH_TRANSFER: &[Suite] = &[Suite::Trixie, Suite::Forky];
const WITH_SANDBOXES: &[Suite] = &[Suite::Trixie, Suite::Forky];

const ROWS: &[Row] = &[
    ("version", ALL, version),
    ("info", SINCE_1_7, info),
    ("plugins ls", ALL, plugins),
    ("plugins inspect-runtime", NEWEST, inspect_runtime),
    ("namespaces create, label, ls, remove", ALL, namespaces),
    ("leases create, ls, delete", ALL, leases),
    ("containers create, info, label, ls, delete", ALL, containers),
    ("run --rootfs", ALL, run_prints),
    ("run --rootfs, exit status", ALL, run_exit_status),
    ("run --rootfs, stdin from a pipe", ALL, run_stdin),
    ("run --rootfs --tty", ALL, run_tty),
    ("run --rootfs --null-io", ALL, run_null_io),
    ("run --rootfs --log-uri file://", ALL, run_log_uri),
    ("run --rootfs --log-uri binary://", ALL, run_log_binary),
    ("run --rootfs --detach; tasks ls, ps, metrics", ALL, run_detached),
    ("run --rootfs --pid-file, --fifo-dir", ALL, run_files),
    ("tasks exec, exec --tty, exec --detach", ALL, exec),
    ("tasks exec --log-uri, --cwd, --user; kill --exec-id", ALL, exec_flags),
    ("tasks pause, resume", ALL, pause),
    ("tasks start, attach, kill, delete", ALL, tasks),
    ("tasks start --null-io, --log-uri, --pid-file, --fifo-dir", ALL, start_flags),
    ("tasks checkpoint is refused with a clear message", ALL, checkpoint),
    ("events", ALL, events),
    ("events, with filters", ALL, some_events),
    ("sandboxes create, ls, remove", WITH_SANDBOXES, sandboxes),
    ("run --rootfs --sandbox", WITH_SANDBOXES, run_in_sandbox),
    ("deprecations list", SINCE_1_7, deprecations),
    ("content ingest, get, ls, active, label, rm", ALL, stored::content),
    ("content edit", SINCE_1_7, stored::edit),
    ("content fetch, fetch-object, push-object, prune references; images push, pull by the client", ALL, stored::pulls),
    ("content fetch-blob", SINCE_1_7, stored::fetch_blob),
    ("images import --no-unpack, tag, ls, label, export, rm --sync", ALL, stored::images),
    ("images import, check, mount, mount --rw, unmount, convert", ALL, stored::unpacked),
    ("images usage, prune", SINCE_1_7, stored::usage_and_prune),
    ("images inspect", NEWEST, stored::inspect),
    ("images import, tag, push, export, pull by the daemon", WITH_TRANSFER, stored::transfers),
    ("snapshots unpack, prepare, view, mounts, commit, info, label, ls, tree, usage, diff, rm", ALL, stored::snapshots),
    ("leases delete --sync", ALL, stored::leases_sync),
    ("run IMAGE, --rm, --env, --cwd, --mount, --read-only, --detach, exit status", ALL, stored::run_image),
    ("install --path", ALL, stored::install),
];

pub(crate) async fn every_subcommand_does_what_it_does_with_containerd(cx: Context) -> Result<()> {
    let mut seen: BTreeMap<(usize, Suite), &str> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (number, (name, versions, check)) in ROWS.iter().enumerate() {
        for suite in Suite::ALL {
            let verdict = if versions.contains(&suite) {
                let namespace = format!("{}-{}-{number}", cx.client().namespace(), suite.version());
                let ctr = Ctr { cx: &cx, suite, namespace };
                match check(&ctr) {
                    Ok(()) => "yes",
                    Err(error) => {
                        wrong.push(format!("{name}, {}: {error:#}", suite.version()));
                        "NO"
                    }
                }
            } else {
                coverage::why_not(name, suite)?
            };
            seen.insert((number, suite), verdict);
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    let names: Vec<_> = ROWS.iter().map(|(name, ..)| *name).collect();
    coverage::is_complete(&names)?;
    let mut table = HEAD.to_owned();
    for (number, (name, _, _)) in ROWS.iter().enumerate() {
        let cells = Suite::ALL.map(|suite| seen[&(number, suite)]).join(" | ");
        table.push_str(&format!("| `{name}` | {cells} |\n"));
    }
    coverage::append_others(&mut table);
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/ctr.md");
    if std::env::var_os("X_WRITE_DOCS").is_some() {
        fs::write(&path, &table)?;
    }
    ensure!(fs::read_to_string(&path).unwrap_or_default() == table, "docs/ctr.md is out of date: run with X_WRITE_DOCS=1");
    Ok(())
}

const HEAD: &str = "\
# ctr on x-manager

The subcommands of containerd's own client that work with `x-manager`, by version of the client. Generated by `tests/tests/manager/ctr.rs`, which runs each row and checks its output and effect.

| | ctr 1.6 | ctr 1.7 | ctr 2.1 |
| --- | --- | --- | --- |
";

impl Ctr<'_> {
    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = bounded();
        command.arg(self.suite.program("ctr")).args(self.globals()).args(arguments);
        command
    }

    fn globals(&self) -> [String; 4] {
        let address = self.cx.daemon().address().display().to_string();
        ["--address".to_owned(), address, "--namespace".to_owned(), self.namespace.clone()]
    }

    /// Runs it and returns what it printed.
    fn run(&self, arguments: &[&str]) -> Result<String> {
        finish(self.command(arguments))
    }

    /// Runs it in a terminal, in the foreground: `timeout` makes a process group of its own, so it stays outside.
    fn run_in_terminal(&self, arguments: &[&str]) -> Result<String> {
        let mut line = format!("'{}'", self.suite.program("ctr").display());
        for argument in self.globals().iter().map(String::as_str).chain(arguments.iter().copied()) {
            line.push_str(&format!(" '{argument}'"));
        }
        let mut command = bounded();
        command.args(["script", "--quiet", "--return", "--command", &line, "/dev/null"]);
        finish(command)
    }

    fn refused(&self, arguments: &[&str], why: &str) -> Result<()> {
        let output = self.command(arguments).output()?;
        let message = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && message.contains(why), "{arguments:?}: {output:?}");
        Ok(())
    }

    /// The arguments of a `run`.
    fn container<'w>(&self, flags: &[&'w str], id: &'w str, program: &[&'w str]) -> Result<Vec<String>> {
        let mut arguments = vec!["run".to_owned(), "--rootfs".to_owned(), "--env".to_owned(), "PATH=/bin".to_owned()];
        arguments.extend(["--runtime".to_owned(), self.cx.shim().runtime_type.clone(), "--cgroup".to_owned(), self.cgroup(id)]);
        arguments.extend(flags.iter().map(|argument| (*argument).to_owned()));
        arguments.extend([rootfs::shared()?.display().to_string(), id.to_owned()]);
        arguments.extend(program.iter().map(|argument| (*argument).to_owned()));
        Ok(arguments)
    }

    fn run_container(&self, flags: &[&str], id: &str, program: &[&str]) -> Result<String> {
        let arguments = self.container(flags, id, program)?;
        self.run(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn cgroup(&self, id: &str) -> String {
        format!("/{}/{}/{}-{id}", isolation::cgroup(), self.cx.client().namespace(), self.namespace)
    }

    /// A container that sleeps, for as long as `use_it` runs.
    fn with_container(&self, id: &str, use_it: impl FnOnce() -> Result<()>) -> Result<()> {
        self.run_container(&["--detach"], id, &["sleep", "1000"])?;
        let used = use_it();
        let killed = self.run(&["tasks", "kill", "--signal", "KILL", "--all", id]);
        let deleted = retry(|| self.run(&["tasks", "delete", id]));
        let removed = self.run(&["containers", "delete", id]);
        used?;
        killed?;
        // a task that was killed makes ctr end with its status
        deleted?;
        removed.map(drop)
    }

    /// The path of a file or folder of its own.
    fn file(&self, name: &str) -> String {
        self.cx.folder().join(format!("{}-{name}", self.namespace)).display().to_string()
    }

    fn start(&self, arguments: &[&str]) -> Result<Child> {
        Ok(self.command(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?)
    }
}

/// A command, to be appended, that is ended after 20 s.
fn bounded() -> Command {
    let mut command = Command::new("timeout");
    command.args(["--kill-after=1", "20"]).stdin(Stdio::null());
    command
}

/// Runs a command and returns what it printed on stdout.
fn finish(mut command: Command) -> Result<String> {
    let output = command.output()?;
    let (out, err) = (String::from_utf8_lossy(&output.stdout).into_owned(), String::from_utf8_lossy(&output.stderr).into_owned());
    let ended_by_signal = err.contains("exit with non-zero exit code");
    ensure!(output.status.success() || ended_by_signal, "{command:?}: {}: {out}{err}", output.status);
    Ok(out)
}

fn retry<T>(mut attempt: impl FnMut() -> Result<T>) -> Result<T> {
    let begin = std::time::Instant::now();
    loop {
        match attempt() {
            Err(_) if begin.elapsed() < SOON => std::thread::sleep(std::time::Duration::from_millis(20)),
            result => return result,
        }
    }
}

fn has(text: &str, parts: &[&str]) -> Result<()> {
    ensure!(parts.iter().all(|part| text.contains(part)), "{parts:?} are not all in {text:?}");
    Ok(())
}

fn version(ctr: &Ctr<'_>) -> Result<()> {
    has(&ctr.run(&["version"])?, &["Server:", "+x-manager", "UUID:"])
}

fn info(ctr: &Ctr<'_>) -> Result<()> {
    has(&ctr.run(&["info"])?, &["\"uuid\"", "\"pid\""])
}

fn plugins(ctr: &Ctr<'_>) -> Result<()> {
    has(&ctr.run(&["plugins", "ls"])?, &["io.containerd.runtime.v2", "io.containerd.grpc.v1", "tasks", "ok"])?;
    has(&ctr.run(&["plugins", "ls", "--detailed", "id==tasks"])?, &["io.containerd.grpc.v1"])
}

fn inspect_runtime(ctr: &Ctr<'_>) -> Result<()> {
    has(&ctr.run(&["plugins", "inspect-runtime", "--runtime", &ctr.cx.shim().runtime_type])?, &["\"Name\"", "\"Features\""])
}

fn namespaces(ctr: &Ctr<'_>) -> Result<()> {
    let name = &ctr.namespace;
    ctr.run(&["namespaces", "create", name, "a=1"])?;
    ctr.refused(&["namespaces", "create", name], "already exists")?;
    ctr.run(&["namespaces", "label", name, "a=", "b=2"])?;
    let listed = ctr.run(&["namespaces", "ls"])?;
    let line = listed.lines().find(|line| line.starts_with(name.as_str())).context("not listed")?;
    ensure!(line.contains("b=2") && !line.contains("a="), "{line:?}");
    ctr.run(&["namespaces", "remove", name])?;
    let listed = ctr.run(&["namespaces", "ls"])?;
    ensure!(!listed.contains(name.as_str()), "{listed:?}");
    Ok(())
}

fn leases(ctr: &Ctr<'_>) -> Result<()> {
    let id = ctr.run(&["leases", "create", "--id", "mine", "a=1"])?;
    ensure!(id.trim() == "mine", "{id:?}");
    let other = ctr.run(&["leases", "create"])?;
    has(&ctr.run(&["leases", "ls"])?, &["mine", "a=1", other.trim()])?;
    ensure!(ctr.run(&["leases", "ls", "--quiet", "id==mine"])?.trim() == "mine");
    ctr.run(&["leases", "delete", "mine", other.trim()])?;
    ensure!(ctr.run(&["leases", "ls", "--quiet"])?.is_empty());
    Ok(())
}

fn containers(ctr: &Ctr<'_>) -> Result<()> {
    let config = ctr.cx.folder().join(format!("{}.json", ctr.namespace));
    fs::write(&config, r#"{"ociVersion":"1.0.2","process":{"cwd":"/","args":["true"]},"root":{"path":"rootfs"}}"#)?;
    let config = config.display().to_string();
    ctr.run(&["containers", "create", "--config", &config, "--label", "a=1", "--runtime", &ctr.cx.shim().runtime_type, "c"])?;
    ctr.refused(&["containers", "create", "--config", &config, "c"], "already exists")?;
    let info: serde_json::Value = serde_json::from_str(&ctr.run(&["containers", "info", "c"])?)?;
    ensure!(info["ID"] == "c" && info["Labels"]["a"] == "1" && info["Spec"]["process"]["args"][0] == "true", "{info}");
    ctr.run(&["containers", "label", "c", "a=", "b=2"])?;
    let info: serde_json::Value = serde_json::from_str(&ctr.run(&["containers", "info", "c"])?)?;
    ensure!(info["Labels"] == serde_json::json!({ "b": "2" }), "{info}");
    has(&ctr.run(&["containers", "ls", "labels.b==2"])?, &["c ", &ctr.cx.shim().runtime_type])?;
    ensure!(ctr.run(&["containers", "ls", "--quiet", "labels.b==3"])?.is_empty());
    ctr.run(&["containers", "delete", "c"])?;
    ctr.refused(&["containers", "info", "c"], "not found")
}

fn run_prints(ctr: &Ctr<'_>) -> Result<()> {
    let out = ctr.run_container(&["--rm"], "c", &["echo", "hello"])?;
    ensure!(out == "hello\n", "{out:?}");
    ensure!(ctr.run(&["containers", "ls", "--quiet"])?.is_empty());
    Ok(())
}

fn run_exit_status(ctr: &Ctr<'_>) -> Result<()> {
    let arguments = ctr.container(&["--rm"], "c", &["sh", "-c", "echo to stderr >&2; exit 3"])?;
    let output = ctr.command(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).output()?;
    ensure!(output.status.code() == Some(3) && output.stderr.starts_with(b"to stderr\n"), "{output:?}");
    Ok(())
}

fn run_stdin(ctr: &Ctr<'_>) -> Result<()> {
    let arguments = ctr.container(&["--rm"], "c", &["cat"])?;
    let mut child = ctr.start(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?;
    // ctr does not forward the end of stdin if it comes before the task exists
    let mut stdin = child.stdin.take().context("a pipe")?;
    stdin.write_all(b"one\n")?;
    let mut out = BufReader::new(child.stdout.take().context("a pipe")?).lines();
    ensure!(out.next().transpose()?.as_deref() == Some("one"));
    stdin.write_all(b"two\n")?;
    drop(stdin);
    ensure!(out.next().transpose()?.as_deref() == Some("two") && out.next().is_none());
    let status = child.wait()?;
    ensure!(status.success(), "{status}");
    Ok(())
}

fn run_tty(ctr: &Ctr<'_>) -> Result<()> {
    let arguments = ctr.container(&["--rm", "--tty"], "c", &["sh", "-c", "test -t 0 && test -t 1 && echo terminal"])?;
    has(&ctr.run_in_terminal(&arguments.iter().map(String::as_str).collect::<Vec<_>>())?, &["terminal\r"])
}

fn run_null_io(ctr: &Ctr<'_>) -> Result<()> {
    let out = ctr.run_container(&["--rm", "--null-io"], "c", &["echo", "hello"])?;
    ensure!(out.is_empty(), "{out:?}");
    Ok(())
}

fn run_log_uri(ctr: &Ctr<'_>) -> Result<()> {
    let log = ctr.cx.folder().join(format!("{}.log", ctr.namespace));
    let uri = format!("file://{}", log.display());
    ctr.run_container(&["--rm", "--log-uri", &uri], "c", &["echo", "hello"])?;
    ensure!(fs::read_to_string(&log)? == "hello\n");
    Ok(())
}

fn run_log_binary(ctr: &Ctr<'_>) -> Result<()> {
    let folder = ctr.cx.folder().join(format!("{}-sink", ctr.namespace));
    fs::create_dir(&folder)?;
    let uri = format!("binary://{}?folder={}", ctr.cx.program("log-sink").display(), folder.display());
    ctr.run_container(&["--rm", "--log-uri", &uri], "c", &["sh", "-c", "echo hello; echo to stderr >&2"])?;
    retry(|| fs::metadata(folder.join("done")).context("the logger has not finished"))?;
    let read = |name: &str| fs::read_to_string(folder.join(name)).context(name.to_owned());
    ensure!(read("stdout")? == "hello\n" && read("stderr")? == "to stderr\n");
    has(&read("environment")?, &["CONTAINER_ID=c\n", &format!("CONTAINER_NAMESPACE={}\n", ctr.namespace)])
}

fn run_detached(ctr: &Ctr<'_>) -> Result<()> {
    ctr.with_container("c", || {
        let listed = ctr.run(&["tasks", "ls"])?;
        has(&listed, &["RUNNING"])?;
        let pid = listed.lines().find_map(|line| line.strip_prefix("c ")?.split_whitespace().next()).context("not listed")?.to_owned();
        has(&ctr.run(&["tasks", "ps", "c"])?, &[&pid])?;
        ensure!(ctr.run(&["tasks", "ls", "--quiet"])?.trim() == "c");
        has(&ctr.run(&["tasks", "metrics", "c"])?, &["METRIC", "memory.usage_in_bytes"])
    })
}

fn exec(ctr: &Ctr<'_>) -> Result<()> {
    ctr.with_container("c", || {
        let out = ctr.run(&["tasks", "exec", "--exec-id", "e1", "c", "sh", "-c", "echo in; exit 0"])?;
        ensure!(out == "in\n", "{out:?}");
        let failed = ctr.command(&["tasks", "exec", "--exec-id", "e2", "c", "sh", "-c", "exit 5"]).output()?;
        ensure!(failed.status.code() == Some(5), "{failed:?}");
        let terminal =
            ctr.run_in_terminal(&["tasks", "exec", "--tty", "--exec-id", "e3", "c", "sh", "-c", "test -t 0 && echo terminal"])?;
        has(&terminal, &["terminal\r"])?;
        // a detached run does not remove its fifos
        let fifos = ctr.cx.folder().join("fifos").display().to_string();
        fs::create_dir_all(&fifos)?;
        ctr.run(&["tasks", "exec", "--detach", "--fifo-dir", &fifos, "--exec-id", "e4", "c", "sleep", "1000"])?;
        let listed = ctr.run(&["tasks", "ps", "c"])?;
        ensure!(listed.lines().count() == 3, "{listed:?}");
        Ok(())
    })
}

fn exec_flags(ctr: &Ctr<'_>) -> Result<()> {
    ctr.with_container("c", || {
        let log = ctr.file("exec.log");
        ctr.run(&["tasks", "exec", "--log-uri", &format!("file://{log}"), "--exec-id", "e1", "c", "sh", "-c", "echo hello"])?;
        ensure!(fs::read_to_string(&log)? == "hello\n");
        let out = ctr.run(&["tasks", "exec", "--cwd", "/bin", "--user", "7:8", "--exec-id", "e2", "c", "sh", "-c", "pwd; id -u; id -g"])?;
        ensure!(out == "/bin\n7\n8\n", "{out:?}");
        let mut running = ctr.start(&["tasks", "exec", "--exec-id", "e3", "c", "sleep", "1000"])?;
        retry(|| ctr.run(&["tasks", "kill", "--signal", "KILL", "--exec-id", "e3", "c"]))?;
        let status = running.wait()?;
        ensure!(status.code() == Some(137), "the exec ended with {status}");
        has(&ctr.run(&["tasks", "ls"])?, &["RUNNING"])
    })
}

fn run_files(ctr: &Ctr<'_>) -> Result<()> {
    let (pid, fifos) = (ctr.file("pid"), ctr.file("fifos"));
    fs::create_dir_all(&fifos)?;
    let out = ctr.run_container(&["--rm", "--pid-file", &pid, "--fifo-dir", &fifos], "c", &["echo", "hello"])?;
    ensure!(out == "hello\n", "{out:?}");
    ensure!(fs::read_to_string(&pid)?.trim().parse::<i32>()? > 1);
    Ok(())
}

fn start_flags(ctr: &Ctr<'_>) -> Result<()> {
    let config = ctr.file("start.json");
    let spec = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": { "cwd": "/", "args": ["sh", "-c", "echo hello"], "env": ["PATH=/bin"], "user": { "uid": 0, "gid": 0 } },
        "root": { "path": rootfs::shared()?, "readonly": true },
        "mounts": [{ "destination": "/proc", "type": "proc", "source": "proc" }],
        "linux": { "namespaces": [{ "type": "pid" }, { "type": "mount" }], "cgroupsPath": ctr.cgroup("c") },
    });
    fs::write(&config, spec.to_string())?;
    ctr.run(&["containers", "create", "--config", &config, "--runtime", &ctr.cx.shim().runtime_type, "c"])?;
    let (pid, fifos, log) = (ctr.file("start.pid"), ctr.file("start-fifos"), ctr.file("start.log"));
    fs::create_dir_all(&fifos)?;
    let out = ctr.run(&["tasks", "start", "--pid-file", &pid, "--fifo-dir", &fifos, "c"])?;
    ensure!(out == "hello\n" && fs::read_to_string(&pid)?.trim().parse::<i32>()? > 1, "{out:?}");
    let out = ctr.run(&["tasks", "start", "--null-io", "c"])?;
    ensure!(out.is_empty(), "{out:?}");
    let out = ctr.run(&["tasks", "start", "--log-uri", &format!("file://{log}"), "c"])?;
    ensure!(out.is_empty() && fs::read_to_string(&log)? == "hello\n", "{out:?}");
    ctr.run(&["containers", "delete", "c"]).map(drop)
}

fn pause(ctr: &Ctr<'_>) -> Result<()> {
    ctr.with_container("c", || {
        ctr.run(&["tasks", "pause", "c"])?;
        has(&ctr.run(&["tasks", "ls"])?, &["PAUSED"])?;
        ctr.run(&["tasks", "resume", "c"])?;
        has(&ctr.run(&["tasks", "ls"])?, &["RUNNING"])
    })
}

fn tasks(ctr: &Ctr<'_>) -> Result<()> {
    ctr.with_container("c", || {
        ctr.run(&["tasks", "kill", "--signal", "KILL", "c"])?;
        retry(|| has(&ctr.run(&["tasks", "ls"])?, &["STOPPED"]))?;
        ctr.run(&["tasks", "delete", "c"])?;
        ctr.refused(&["tasks", "kill", "c"], "not found")?;
        // the spec of a rootfs is in its container: it can be started again
        ctr.run(&["tasks", "start", "--detach", "c"])?;
        let mut attached = ctr.start(&["tasks", "attach", "c"])?;
        ctr.run(&["tasks", "kill", "--signal", "KILL", "c"])?;
        let status = attached.wait()?;
        ensure!(status.code() == Some(137), "attach ended with {status}");
        // which deletes the task
        ctr.run(&["tasks", "start", "--detach", "c"])?;
        Ok(())
    })
}

fn checkpoint(ctr: &Ctr<'_>) -> Result<()> {
    ctr.with_container("c", || {
        let output = ctr.command(&["tasks", "checkpoint", "c"]).output()?;
        let message = String::from_utf8_lossy(&output.stderr);
        ensure!(!output.status.success() && (message.contains("folders only") || message.contains("does not serve")), "{output:?}");
        has(&ctr.run(&["tasks", "ls"])?, &["RUNNING"])
    })
}

fn events(ctr: &Ctr<'_>) -> Result<()> {
    let file = ctr.cx.folder().join(format!("{}-events", ctr.namespace));
    let mut listening = ctr.command(&["events"]).stdout(fs::File::create(&file)?).spawn()?;
    let mut number = 0;
    // a subscription is not confirmed
    let received = retry(|| {
        number += 1;
        ctr.run_container(&["--rm"], &format!("c{number}"), &["true"])?;
        let received = fs::read_to_string(&file)?;
        has(&received, &["/containers/create", "/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete", "/containers/delete"])
    });
    kill(Pid::from_raw(listening.id().cast_signed()), Signal::SIGTERM)?;
    listening.wait()?;
    received
}

fn some_events(ctr: &Ctr<'_>) -> Result<()> {
    let file = ctr.cx.folder().join(format!("{}-some-events", ctr.namespace));
    let filters = ["topic==/tasks/exit,event.container_id~=/^c[0-9]+$/", "topic==/containers/delete"];
    let mut listening = ctr.command(&["events", filters[0], filters[1]]).stdout(fs::File::create(&file)?).spawn()?;
    let mut number = 0;
    let received = retry(|| {
        number += 1;
        ctr.run_container(&["--rm"], &format!("c{number}"), &["true"])?;
        has(&fs::read_to_string(&file)?, &["/tasks/exit", "/containers/delete"])
    });
    kill(Pid::from_raw(listening.id().cast_signed()), Signal::SIGTERM)?;
    listening.wait()?;
    received?;
    let received = fs::read_to_string(&file)?;
    ensure!(received.lines().all(|line| line.contains("/tasks/exit") || line.contains("/containers/delete")), "{received}");
    Ok(())
}

/// A sandbox, for as long as `use_it` runs.
fn with_sandbox(ctr: &Ctr<'_>, use_it: impl FnOnce() -> Result<()>) -> Result<()> {
    let config = ctr.file("pod.json");
    fs::write(&config, "{}")?;
    let created = ctr.run(&["sandboxes", "create", "--runtime", &ctr.cx.shim().runtime_type, &config, "s"])?;
    ensure!(created.trim() == "s", "{created:?}");
    let used = use_it();
    // ctr logs errors, and succeeds
    let output = ctr.command(&["sandboxes", "remove", "s"]).output()?;
    let removed = String::from_utf8_lossy(&output.stderr);
    used?;
    ensure!(removed.contains("deleted: s") && !removed.contains("level=error"), "{output:?}");
    let listed = ctr.run(&["sandboxes", "ls"])?;
    ensure!(listed.lines().count() == 1, "{listed:?}");
    let shims = ctr.cx.daemon().sandbox_bundle(&ctr.namespace, "s");
    ensure!(!shims.exists(), "{} is left", shims.display());
    Ok(())
}

fn sandboxes(ctr: &Ctr<'_>) -> Result<()> {
    with_sandbox(ctr, || {
        let listed = ctr.run(&["sandboxes", "ls"])?;
        let line = listed.lines().find(|line| line.starts_with("s ")).context("not listed")?;
        has(line, &[&ctr.cx.shim().runtime_type])?;
        let listed = ctr.run(&["sandboxes", "ls", "--filters", "id==other"])?;
        ensure!(listed.lines().count() == 1, "{listed:?}");
        ctr.refused(&["sandboxes", "create", "--runtime", &ctr.cx.shim().runtime_type, &ctr.file("pod.json"), "s"], "already exists")
    })
}

fn run_in_sandbox(ctr: &Ctr<'_>) -> Result<()> {
    with_sandbox(ctr, || {
        let out = ctr.run_container(&["--rm", "--sandbox", "s"], "c", &["echo", "hello"])?;
        ensure!(out == "hello\n", "{out:?}");
        ctr.refused(&["containers", "info", "c"], "not found")
    })
}

fn deprecations(ctr: &Ctr<'_>) -> Result<()> {
    let listed = ctr.run(&["deprecations", "list"])?;
    ensure!(listed.lines().count() <= 1, "{listed:?}");
    let listed = ctr.run(&["deprecations", "list", "--format", "json"])?;
    ensure!(listed.trim().is_empty(), "{listed:?}");
    Ok(())
}
