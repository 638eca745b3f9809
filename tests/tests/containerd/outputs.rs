//! No byte of an output is lost: all kinds of stdio, descendants that hold it, slow and late readers, init and execs.
//!
//! A client of containerd reads while Delete waits, and closes its end afterwards. The stock shims are run beside ours, for the table in
//! docs/stdio.md.

use std::collections::BTreeMap;
use std::fmt::{self, Display};
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use shim_tests::container::{Container, Process, Stdio};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, a_second, eventually_true, within};
use shim_tests::proc;
use shim_tests::runner::skip;
use shim_tests::stdio::Pace;
use shim_tests::suite::{STOCK_TYPE, Shim, Suite};
use tokio::task::{JoinSet, LocalSet};

use crate::worker::{kill_worker, ours_only};

/// The process that holds the output when the main process has exited, and writes once more a second later.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Holder {
    None,
    Child,
    /// In a session of its own, so that no signal to a group reaches it.
    Grandchild,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Reading {
    Fast,
    Slow,
    /// Opens, and reads nothing for a second.
    Pausing,
    /// Opens after the exit.
    Late,
    /// Opens, reads nothing, and closes after Delete was called.
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Kind {
    Pipe,
    Terminal,
    File,
    Logger,
}

#[derive(Debug, Clone, Copy)]
struct Cell {
    holder: Holder,
    reading: Reading,
    kind: Kind,
    is_exec: bool,
}

impl Cell {
    fn all() -> Vec<Self> {
        let mut cells = Vec::new();
        for holder in [Holder::None, Holder::Child, Holder::Grandchild] {
            for is_exec in [false, true] {
                for kind in [Kind::Pipe, Kind::Terminal] {
                    for reading in [Reading::Fast, Reading::Slow, Reading::Pausing, Reading::Late, Reading::Gone] {
                        cells.push(Self { holder, reading, kind, is_exec });
                    }
                }
                // these are read by the shim and the logger
                cells.extend([Kind::File, Kind::Logger].map(|kind| Self { holder, reading: Reading::Fast, kind, is_exec }));
            }
        }
        cells
    }

    /// The number that `seq` counts to: more than pipe and fifo hold, if it is read. Without a reader, a pipe holds less from a terminal, which
    /// writes small pieces.
    fn lines(self) -> u64 {
        match (self.reading, self.kind) {
            (Reading::Fast | Reading::Slow | Reading::Pausing, _) => 30_000,
            (Reading::Late | Reading::Gone, Kind::Terminal) => 300,
            (Reading::Late | Reading::Gone, _) => 10_000,
        }
    }

    fn script(self) -> String {
        let late = match self.holder {
            Holder::None => "",
            Holder::Child => "(sleep 1; echo late) &",
            Holder::Grandchild => "setsid sh -c '(sleep 1; echo late) &';",
        };
        // not the last word: the shell would become it, and setsid could not make a session without leaving the one that ends
        format!("seq {}; {late} exit 0", self.lines())
    }

    /// The expected output. No process outlives init, and the kernel hangs up a terminal for its whole session.
    fn bytes(self) -> u64 {
        let line_end = if self.kind == Kind::Terminal { 2 } else { 1 };
        let late = match self.holder {
            Holder::Child if self.is_exec && self.kind != Kind::Terminal => 4 + line_end,
            Holder::Grandchild if self.is_exec => 4 + line_end,
            Holder::None | Holder::Child | Holder::Grandchild => 0,
        };
        late + (1..=self.lines()).map(|number| u64::from(number.ilog10()) + 1 + line_end).sum::<u64>()
    }

    /// Runs it.
    async fn run(self, cx: Context) -> Result<Outcome> {
        let is_terminal = self.kind == Kind::Terminal;
        let folder = cx.folder().join(format!("{self:?}").replace([' ', '{', '}', ':', ','], ""));
        fs::create_dir_all(&folder)?;
        let log = folder.join("log");
        let pace = match self.reading {
            Reading::Fast => Some(Pace::Count),
            Reading::Slow => Some(Pace::Slow { chunk: 4096, pause: Duration::from_millis(75) }),
            Reading::Pausing => Some(Pace::Pausing(Duration::from_secs(1))),
            Reading::Gone => Some(Pace::OnCue),
            Reading::Late => None,
        };
        let stdio = match self.kind {
            Kind::Pipe | Kind::Terminal => Stdio::Fifos { stdin: false, pace },
            Kind::File => Stdio::uri(format!("file://{}", log.display())),
            Kind::Logger => Stdio::uri(format!("binary://{}?folder={}", cx.program("log-sink").display(), folder.display())),
        };
        let command = ["sh", "-c", &self.script()];
        let (mut container, mut exec): (Container, Option<Process>);
        if self.is_exec {
            container = cx.container(&["sleep", "1000"]).start().await?;
            let new = container.exec("e", &command).stdio(stdio);
            exec = Some(if is_terminal { new.terminal() } else { new }.add().await?);
        } else {
            let new = cx.container(&command).stdio(stdio);
            (container, exec) = (if is_terminal { new.terminal() } else { new }.create().await?, None);
        }
        let process: &mut Process = exec.as_mut().unwrap_or(&mut container);
        process.start().await?;
        process.wait().await?;
        if self.reading == Reading::Late {
            process.io.read(Pace::Count)?;
        }
        let begin = Instant::now();
        let (deleted, ()) = if self.reading == Reading::Gone {
            let (stdout, stderr) = (process.io.stdout.take(), process.io.stderr.take());
            tokio::join!(process.delete(), async { drop((stdout, stderr)) })
        } else {
            (process.delete().await, ())
        };
        deleted?;
        let took = begin.elapsed();
        let count = match self.kind {
            Kind::File => fs::metadata(log)?.len(),
            Kind::Logger => {
                eventually_true("the logger is done", SOON, || folder.join("done").exists()).await?;
                fs::metadata(folder.join("stdout"))?.len()
            }
            Kind::Pipe | Kind::Terminal => match &mut process.io.stdout {
                Some(reader) => {
                    // the stock shim's Delete is answered when it has given its bytes to the fifo
                    if !cx.shim().is_ours() {
                        reader.to_end().await?;
                    }
                    reader.leave();
                    reader.count()
                }
                None => 0,
            },
        };
        if self.is_exec {
            container.destroy().await?;
        }
        Ok(Outcome { count, took })
    }

    /// Whether it is as it has to be. Without a reader there is nothing to wait for.
    fn is_right(self, outcome: Outcome) -> bool {
        if self.reading == Reading::Gone { outcome.took < Duration::from_secs(5) } else { outcome.count == self.bytes() }
    }

    /// The part of docs/stdio.md's table that it belongs to.
    fn row(self) -> Row {
        Row { is_exec: self.is_exec, kind: self.kind, holder: self.holder }
    }
}

/// How a cell ended.
#[derive(Debug, Clone, Copy)]
struct Outcome {
    /// The bytes that had arrived.
    count: u64,
    /// How long Delete took.
    took: Duration,
}

/// A row of docs/stdio.md's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Row {
    is_exec: bool,
    kind: Kind,
    holder: Holder,
}

impl Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let process = if self.is_exec { "exec" } else { "init" };
        let kind = match self.kind {
            Kind::Pipe => "pipe",
            Kind::Terminal => "terminal",
            Kind::File => "`file://`",
            Kind::Logger => "`binary://`",
        };
        let holder = match self.holder {
            Holder::None => "none",
            Holder::Child => "child",
            Holder::Grandchild => "grandchild",
        };
        write!(f, "| {process} | {kind} | {holder} |")
    }
}

pub(crate) async fn every_byte_arrives_from_every_holder_of_the_output_to_every_reader(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    let outcomes = LocalSet::new().run_until(run_all(&cx)).await?;
    let wrong: Vec<_> = outcomes.into_iter().filter(|(cell, outcome)| !cell.is_right(*outcome)).collect();
    ensure!(wrong.is_empty(), "{wrong:#?}");
    Ok(())
}

/// Prints the table of docs/stdio.md: `make stdio-docs`. Minutes, for what the test before this one says of our shim.
pub(crate) async fn ours_loses_no_output_that_a_stock_shim_delivers(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    if std::env::var_os("X_STDIO_TABLE").is_none() {
        return skip("X_STDIO_TABLE is not set: minutes on four shims");
    }
    let (mut rows, mut worse) = (BTreeMap::<Row, String>::new(), Vec::new());
    let mut shims = vec![cx.shim().clone()];
    for suite in Suite::ALL {
        let binary = suite.program("containerd-shim-runc-v2");
        shims.push(Shim { runtime_type: STOCK_TYPE.to_owned(), binary: Some(binary) });
    }
    let mut ours = BTreeMap::new();
    for shim in shims {
        let outcomes = LocalSet::new().run_until(run_all(&cx.with_own_shim(&shim, &[]).await?)).await?;
        let mut cells = BTreeMap::<Row, Vec<String>>::new();
        for (cell, outcome) in outcomes {
            let (row, is_right) = (cell.row(), cell.is_right(outcome));
            if shim.is_ours() {
                ours.insert((row, cell.reading), is_right);
            } else if is_right && !ours[&(row, cell.reading)] {
                worse.push(cell);
            }
            let notes = cells.entry(row).or_default();
            if !is_right {
                let reading = format!("{:?}", cell.reading).to_lowercase();
                notes.push(match cell.reading {
                    Reading::Gone => format!("{reading}: Delete after {} s", outcome.took.as_secs()),
                    _ => format!("{reading}: {} of {}", outcome.count, cell.bytes()),
                });
            }
        }
        for (row, notes) in cells {
            let text = if notes.is_empty() { "all".to_owned() } else { notes.join("; ") };
            rows.entry(row).or_default().push_str(&format!(" {text} |"));
        }
    }
    for (row, cells) in rows {
        println!("{row}{cells}");
    }
    ensure!(worse.is_empty(), "{worse:#?}");
    Ok(())
}

/// Runs all cells, a few at a time, in their order.
async fn run_all(cx: &Context) -> Result<Vec<(Cell, Outcome)>> {
    let mut cells = Cell::all();
    if !cx.shim().is_ours() {
        // its Create waits for a reader
        cells.retain(|cell| cell.reading != Reading::Late);
    }
    let mut outcomes = Vec::new();
    for some in cells.chunks(8) {
        let mut runs = JoinSet::new();
        for cell in some {
            let (cell, cx) = (*cell, cx.clone());
            runs.spawn_local(async move { (cell, cell.run(cx).await) });
        }
        while let Some(run) = runs.join_next().await {
            let (cell, outcome) = run?;
            outcomes.push((cell, outcome.with_context(|| format!("{cell:?}"))?));
        }
    }
    outcomes.sort_by_key(|(cell, _)| (cell.row(), cell.reading));
    Ok(outcomes)
}

/// Adds an exec whose output a descendant holds and a client reads, and waits for its end.
async fn held(container: &Container, exec: &str, script: &str) -> Result<Process> {
    let exec = container.exec(exec, &["sh", "-c", script]).stdio(Stdio::OUTPUT).start().await?;
    ensure!(exec.wait().await? == 0);
    Ok(exec)
}

pub(crate) async fn a_delete_that_waits_for_output_delays_no_other_call_and_ends(cx: Context) -> Result<()> {
    let container = cx.container(&["sleep", "1000"]).start().await?;
    let shim = cx.shim_pid(&container.id)?;
    let mut files = Vec::new();
    for round in 0..2 {
        let exec = held(&container, &format!("held{round}"), "sleep 1000 & echo hello").await?;
        let begin = Instant::now();
        let mut deleting = Box::pin(exec.delete());
        let others = async {
            let begin = Instant::now();
            container.state().await?;
            exec.state().await?;
            ensure!(exec.wait().await? == 0);
            let other = container.exec("other", &["sleep", "1000"]).start().await?;
            other.kill(9).await?;
            other.finish().await?;
            ensure!(begin.elapsed() < a_second() * 3, "the other calls took {:?}", begin.elapsed());
            anyhow::Ok(())
        };
        tokio::select! {
            answer = &mut deleting => anyhow::bail!("Delete has not waited: {answer:?} after {:?}", begin.elapsed()),
            others = others => others?,
        }
        within("Delete of an exec whose output is held", SOON * 2, deleting).await??;
        ensure!(exec.io.out().to_end().await? == "hello\n");
        files.push(proc::fewest_open_files(shim).await?);
    }
    ensure!(files[0] == files[1], "open files of the shim: {files:?}");
    container.destroy().await?;
    Ok(())
}

pub(crate) async fn a_delete_that_waits_for_output_outlives_the_worker(cx: Context) -> Result<()> {
    ours_only(&cx)?;
    let container = cx.container(&["tail", "-f", "/dev/null"]).start().await?;
    let keeper = cx.shim_pid(&container.id)?;
    let gate = container.exec("gate", &["sleep", "1000"]).start().await?;
    let exec = held(&container, "e", "(while pidof sleep >/dev/null; do usleep 50000; done; echo late) & echo now").await?;
    let (client, id) = (cx.client().clone(), container.id.clone());
    let deleting = tokio::spawn(async move { client.delete_exec(&id, "e").await });
    for _life in 0..2 {
        container.exec("other", &["true"]).run().await?;
        ensure!(!deleting.is_finished(), "Delete has not waited");
        kill_worker(keeper).await?;
    }
    gate.kill(9).await?;
    ensure!(within("Delete", SOON, deleting).await???.exit_status == 0);
    ensure!(exec.io.out().to_end().await? == "now\nlate\n");
    container.destroy().await?;
    Ok(())
}
