//! Execs that no client deletes, and execs that are started too late.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, ensure};
use containerd_shim_protos::api::{Empty, ExecProcessRequest, KillRequest};
use shim_tests::bundle::{Container, leave};
use shim_tests::eventually::{SOON, eventually, eventually_true, within};
use shim_tests::proc::{self, private_kib};
use shim_tests::programs;
use shim_tests::stand::Stand;
use shim_tests::stdio::{self, Pace, Reader, Writer};
use shim_tests::task::Task;
use shim_tests::times::repeated;
use shim_tests::ttrpc::{Code, refusal};
use tokio::task::{JoinSet, LocalSet};

/// More than the exited execs that the shim remembers per container: some 500 with names as long as [`long_fifo`]'s.
const MANY: usize = 600;

/// A fifo with a very long name, so that few execs fill the shim's memory limit.
fn long_fifo(stand: &Stand) -> Result<PathBuf> {
    let mut folder = stand.folder().join("long");
    while folder.as_os_str().len() < 1800 {
        folder.push("x".repeat(200));
    }
    fs::create_dir_all(&folder)?;
    let fifo = folder.join("output");
    stdio::fifo(&fifo)?;
    Ok(fifo)
}

/// Adds execs with `fifo` for both outputs, a few at a time, and starts each. Returns the answers of Wait or Start, the last first.
async fn add_and_start(container: &Container, numbers: std::ops::Range<usize>, args: &'static [&str], fifo: &Path) -> Result<Vec<u32>> {
    async fn one(task: Task, container: (String, ExecProcessRequest)) -> Result<u32> {
        let (id, request) = container;
        task.exec(&request).await?;
        match task.start(&id, &request.exec_id).await {
            Ok(_pid) => Ok(task.wait(&id, &request.exec_id).await?),
            Err(error) => Err(error.into()),
        }
    }
    let (mut running, mut statuses) = (JoinSet::new(), Vec::new());
    let mut take = |done: std::result::Result<Result<u32>, _>| -> Result<()> {
        let done: Result<u32> = done.map_err(|error: tokio::task::JoinError| anyhow::anyhow!(error))?;
        statuses.push(match done {
            Ok(status) => status,
            Err(error) if error.to_string().contains("/no/such/program") => 127,
            Err(error) => return Err(error),
        });
        Ok(())
    };
    for number in numbers {
        let mut request = container.bundle.exec_request(&format!("e{number}"), args);
        (request.stdout, request.stderr) = (fifo.display().to_string(), fifo.display().to_string());
        running.spawn(one(container.task.clone(), (container.id.clone(), request)));
        while running.len() == 8 {
            take(running.join_next().await.expect("eight are running"))?;
        }
    }
    while let Some(done) = running.join_next().await {
        take(done)?;
    }
    Ok(statuses)
}

fn specifications(container: &Container) -> Result<Vec<String>> {
    let names = fs::read_dir(&container.bundle.folder)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()));
    let names: Vec<String> = names.collect::<Result<_>>()?;
    Ok(names.into_iter().filter(|name| name.starts_with("x-exec-") || name.ends_with(".pid")).collect())
}

async fn memory(container: &Container) -> Result<u64> {
    Ok(private_kib(container.shim_pid()?)? + private_kib(container.worker_pid().await?)?)
}

/// containerd passes `all` on for a container only; other clients of the socket may ask for it.
pub(crate) async fn a_signal_for_all_of_an_exec_reaches_its_descendants_and_no_other_process(stand: Stand) -> Result<()> {
    let path = stand.folder().join("output");
    stdio::fifo(&path)?;
    let output = Reader::open(&path, Pace::Keep)?;
    let text = path.display().to_string();
    let waits = "while :; do sleep 0.05; done";
    let container = stand.bundle("c1", &["sh", "-c", &format!("trap 'exit 9' TERM; {waits}")]).run().await?;
    let script = format!("trap 'echo exec' TERM; (setsid sh -c \"trap 'echo orphan' TERM; echo ready; {waits}\" &); {waits}");
    let mut request = container.bundle.exec_request("e", &["sh", "-c", &script]);
    (request.stdout, request.stderr) = (text.clone(), text);
    container.task.exec(&request).await?;
    container.task.start("c1", "e").await?;
    output.until("ready\n").await?;
    let kill = |signal, all| KillRequest { id: "c1".into(), exec_id: "e".into(), signal, all, ..Default::default() };
    container.task.call::<Empty>("Kill", &kill(15, true), SOON).await?;
    output.until("exec\n").await?;
    output.until("orphan\n").await?;
    // and that one alone
    container.task.call::<Empty>("Kill", &kill(15, false), SOON).await?;
    eventually_true("the exec has it again", SOON, || output.text().matches("exec\n").count() == 2).await?;
    container.task.call::<Empty>("Kill", &kill(9, true), SOON).await?;
    ensure!(container.task.wait("c1", "e").await? == 137);
    let text = output.to_end().await?;
    ensure!(text.matches("orphan\n").count() == 1, "{text:?}");
    ensure!(refusal(container.task.call::<Empty>("Kill", &kill(9, true), SOON).await)?.0 == Code::NotFound);
    container.task.delete("c1", "e").await?;
    ensure!(proc::is_alive(container.pid.cast_signed()), "init has ended");
    ensure!(container.shut_down().await? == 137);
    Ok(())
}

pub(crate) async fn execs_that_are_never_deleted_do_not_accumulate(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let fifo = long_fifo(&stand)?;
    let _reader = Reader::open(&fifo, Pace::Count)?;
    let before = specifications(&container)?.len();
    let (many, begin) = (repeated(MANY), Instant::now());
    let mut statuses = add_and_start(&container, 0..1, &["sh", "-c", "exit 3"], &fifo).await?;
    let first = begin.elapsed();
    statuses.extend(add_and_start(&container, 1..many, &["sh", "-c", "exit 3"], &fifo).await?);
    let kib = memory(&container).await?;
    statuses.extend(add_and_start(&container, many..2 * many - 1, &["sh", "-c", "exit 3"], &fifo).await?);
    let begin = Instant::now();
    statuses.extend(add_and_start(&container, 2 * many - 1..2 * many, &["sh", "-c", "exit 3"], &fifo).await?);
    println!("of {} execs the first took {} ms, the last {} ms", 2 * many, first.as_millis(), begin.elapsed().as_millis());
    ensure!(statuses.len() == 2 * many && statuses.iter().all(|status| *status == 3), "{} are not 3", statuses.len());
    let later = memory(&container).await?;
    ensure!(later < kib + 2048, "{kib} KiB after {many}, {later} KiB after twice as many");
    let left = specifications(&container)?;
    let shown = stand.command(&["inspect", "--json", "--namespace", stand.namespace(), "c1"]).output().await?;
    let record = serde_json::from_slice::<serde_json::Value>(&shown.stdout)?["state"].to_string().len();
    println!("record: {record} bytes; files of execs: {}; private memory: {kib} KiB after half of them, then {later} KiB", left.len());
    ensure!(left.len() == before, "{left:?}");
    // the shim still knows the last one, but not the first
    let last = format!("e{}", 2 * many - 1);
    ensure!(container.task.state("c1", &last).await?.exit_status == 3);
    ensure!(container.task.delete("c1", &last).await?.exit_status == 3);
    for exec in ["e0", &last] {
        ensure!(refusal(container.task.state("c1", exec).await)?.0 == Code::NotFound, "{exec}");
    }
    ensure!(container.shut_down().await? == 137);
    Ok(())
}

pub(crate) async fn failed_execs_that_are_never_deleted_do_not_accumulate(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let fifo = long_fifo(&stand)?;
    let _reader = Reader::open(&fifo, Pace::Count)?;
    let many = repeated(MANY);
    let statuses = add_and_start(&container, 0..many, &["/no/such/program"], &fifo).await?;
    ensure!(statuses.len() == many && statuses.iter().all(|status| *status == 127), "{} failed", statuses.len());
    // each exec that the shim remembers may be started again
    let left = specifications(&container)?.len();
    ensure!(left < many, "{left} files for {many} execs");
    ensure!(refusal(container.task.state("c1", "e0").await)?.0 == Code::NotFound);
    ensure!(container.task.state("c1", &format!("e{}", many - 1)).await?.pid == 0);
    ensure!(container.shut_down().await? == 137);
    Ok(())
}

/// Runs an exec that reads a line and writes it to both outputs, each through a fifo of its own, and deletes it.
async fn echo(task: Task, id: String, mut request: ExecProcessRequest, folder: PathBuf) -> Result<()> {
    fs::create_dir(&folder)?;
    let [stdin, stdout, stderr] = ["0", "1", "2"].map(|name| folder.join(name));
    for path in [&stdin, &stdout, &stderr] {
        stdio::fifo(path)?;
    }
    let readers = [Reader::open(&stdout, Pace::Keep)?, Reader::open(&stderr, Pace::Keep)?];
    [request.stdin, request.stdout, request.stderr] = [&stdin, &stdout, &stderr].map(|path| path.display().to_string());
    task.exec(&request).await?;
    task.start(&id, &request.exec_id).await?;
    Writer::open(&stdin).await?.write_all(b"hello\n")?;
    ensure!(task.wait(&id, &request.exec_id).await? == 3);
    ensure!(task.delete(&id, &request.exec_id).await?.exit_status == 3);
    for reader in readers {
        let text = reader.to_end().await?;
        ensure!(text == "hello\n", "{}: {text:?}", request.exec_id);
    }
    Ok(fs::remove_dir_all(folder)?)
}

/// What a container's execs may leave: descriptors of its keeper and of its worker, and files of the host.
async fn left(container: &Container) -> Result<(usize, usize, BTreeSet<PathBuf>)> {
    fn list(folder: &Path, found: &mut BTreeSet<PathBuf>) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            found.insert(entry.path());
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                list(&entry.path(), found);
            }
        }
    }
    let mut files = BTreeSet::new();
    list(Path::new("/run"), &mut files);
    // those of other tests are theirs
    files.retain(|path| path.display().to_string().contains(container.stand().namespace()));
    ensure!(files.iter().any(|path| path.ends_with("config.json")), "not where the bundle is: {files:?}");
    let (keeper, worker) = (container.shim_pid()?, container.worker_pid().await?);
    Ok((proc::fewest_open_files(keeper).await?, proc::fewest_open_files(worker).await?, files))
}

pub(crate) async fn a_thousand_execs_with_fifos_leave_no_descriptor_and_no_file(stand: Stand) -> Result<()> {
    LocalSet::new().run_until(run_a_thousand(stand)).await
}

async fn run_a_thousand(stand: Stand) -> Result<()> {
    let container = stand.bundle("c1", &["sleep", "1000"]).run().await?;
    let (mut before, mut running) = (None, JoinSet::new());
    for number in 0..1008 {
        if number == 8 {
            running.join_all().await.into_iter().collect::<Result<()>>()?;
            (before, running) = (Some(left(&container).await?), JoinSet::new());
        }
        if running.len() == 4 {
            running.join_next().await.expect("four are running")??;
        }
        let request = container.bundle.exec_request(&format!("e{number}"), &["sh", "-c", "read line; echo $line; echo $line >&2; exit 3"]);
        running.spawn_local(echo(container.task.clone(), container.id.clone(), request, stand.folder().join(format!("io{number}"))));
    }
    running.join_all().await.into_iter().collect::<Result<()>>()?;
    let before = before.expect("more than eight have run");
    eventually("as much is left as after eight", SOON, async || {
        let now = left(&container).await?;
        ensure!(now == before, "{before:?}, then {now:?}");
        Ok(())
    })
    .await?;
    println!("descriptors of keeper and worker: {} and {}; {} files", before.0, before.1, before.2.len());
    ensure!(container.shut_down().await? == 137);
    Ok(())
}

pub(crate) async fn an_exec_is_added_while_the_exit_of_init_waits_to_be_published(stand: Stand) -> Result<()> {
    let gate = stand.gate(&stand.runtime())?;
    let container = stand.bundle("c1", &["sleep", "1000"]).runtime(&gate.binary()).run().await?;
    container.add("e1", &["sleep", "1000"]).await?;
    gate.hold("exec")?;
    let task = container.task.clone();
    let start = tokio::spawn(async move { task.start("c1", "e1").await });
    gate.held("exec").await?;
    let waiting = container.task.begin_wait("c1", "").await?;
    container.task.kill("c1", "", 9).await?;
    eventually("the exit is known", SOON, async || {
        let again = refusal(container.task.kill("c1", "", 9).await)?;
        ensure!(again.0 == Code::NotFound, "{again:?}");
        Ok(())
    })
    .await?;
    container.add("e2", &["true"]).await?;
    let (code, message) = refusal(container.task.start("c1", "e2").await)?;
    ensure!(code == Code::FailedPrecondition, "{code:?} {message}");
    gate.release("exec")?;
    ensure!(within("the start in progress", SOON, start).await??.is_err());
    ensure!(waiting.status(SOON).await? == 137);
    ensure!(refusal(container.task.exec(&container.bundle.exec_request("e3", &["true"])).await)?.0 == Code::FailedPrecondition);
    container.task.delete("c1", "e2").await?;
    container.task.delete("c1", "").await?;
    leave(&container.task, container.shim_pid()?, "c1").await
}

/// The runtime succeeds, and its pid file is missing or garbled: no record can name the process.
pub(crate) async fn an_exec_whose_pid_is_not_reported_is_killed_and_reaped(stand: Stand) -> Result<()> {
    let text = format!(
        "#!/bin/bash\n{} \"$@\"; status=$?\ncase \" $* \" in\n*x-exec-missing*) spoil() {{ rm \"$1\"; }} ;;\n*x-exec-garbled*) spoil() {{ echo none > \"$1\"; }} ;;\n\
         *) exit $status ;;\nesac\nwhile [ $# -gt 0 ]; do [ \"$1\" = --pid-file ] && spoil \"$2\"; shift; done\nexit $status\n",
        stand.runtime().display()
    );
    let runtime = programs::script(stand.folder(), "runtime", &text)?;
    let container = stand.bundle("c1", &["sleep", "1000"]).runtime(&runtime).run().await?;
    let before = container.exec("before", &["sleep", "1000"]).await?;
    let mut starts = JoinSet::new();
    for exec in ["missing", "garbled", "missing-too", "beside"] {
        container.add(exec, &["sleep", "1234"]).await?;
        let task = container.task.another().await?;
        starts.spawn(async move { (exec, task.start("c1", exec).await) });
    }
    let mut beside = 0;
    while let Some(started) = starts.join_next().await {
        match started? {
            ("beside", started) => beside = started?,
            (exec, started) => {
                let (code, message) = refusal(started)?;
                ensure!(code == Code::Internal && message.contains("reported no pid"), "{exec}: {code:?} {message}");
            }
        }
    }
    let shim = container.shim_pid()?;
    eventually("the processes that nobody can name are gone", SOON, async || {
        let mut left = container.task.pids("c1").await?;
        left.sort_unstable();
        let mut expected = [container.pid, before, beside];
        expected.sort_unstable();
        ensure!(left == expected, "{left:?}, not {expected:?}");
        let zombies = proc::zombies_of(shim);
        ensure!(zombies.is_empty(), "{zombies:?}");
        Ok(())
    })
    .await?;
    for (exec, pid) in [("before", before), ("beside", beside)] {
        ensure!(container.task.state("c1", exec).await?.pid == pid && proc::is_alive(pid.cast_signed()), "{exec} was killed");
    }
    container.shut_down().await.map(drop)
}
