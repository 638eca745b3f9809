//! How long a container takes from create to deleted, beside crun and runc: `bench BUNDLE ROUNDS [PROGRAM…]`.
//!
//! The bundle's program is to end at once (`/bin/true`). All are run in turn, after a pause each, on the same bundle; medians and quartiles of wall time
//! are printed. Another process of the container is measured too, from the request to its reaping.
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use x_engine::Host;
use x_engine::plan::Request;

#[path = "../tests/support/added.rs"]
mod added;
#[path = "../tests/support/keeper.rs"]
mod keeper;

/// Before each measurement, so that what is measured starts on an idle machine, as containers do.
const PAUSE: Duration = Duration::from_millis(60);

const ID: &str = "x-engine-bench";

type Result<T> = std::result::Result<T, String>;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [bundle, rounds, programs @ ..] = &arguments[..] else { return Err("usage: bench BUNDLE ROUNDS [PROGRAM…]".to_owned()) };
    let bundle = Path::new(bundle).canonicalize().map_err(text)?;
    let rounds: usize = rounds.parse().map_err(|error| format!("{rounds}: {error}"))?;
    keeper::become_keeper().map_err(text)?;
    let state = bundle.join("bench-state");
    let mut columns: Vec<Column> = vec![Column::new("native"), Column::new("native, exec")];
    columns.extend(programs.iter().flat_map(|program| [Column::new(program), Column::new(&format!("{program}, exec"))]));
    let process = bundle.join("bench-process.json");
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(bundle.join("config.json")).map_err(text)?).map_err(|error| error.to_string())?;
    std::fs::write(&process, config["process"].to_string()).map_err(text)?;
    for _ in 0..rounds {
        native(&bundle, &process, &mut columns[..2])?;
        for (program, columns) in programs.iter().zip(columns[2..].chunks_mut(2)) {
            command(program, &state, &bundle, &process, columns)?;
        }
    }
    println!("{:<24} {:>8} {:>8} {:>8} ms", "", "lower", "median", "upper");
    for column in &mut columns {
        column.print();
    }
    Ok(())
}

struct Column {
    name: String,
    times: Vec<Duration>,
}

impl Column {
    fn new(name: &str) -> Self {
        Self { name: name.to_owned(), times: Vec::new() }
    }

    fn measure<T>(&mut self, act: impl FnOnce() -> Result<T>) -> Result<T> {
        std::thread::sleep(PAUSE);
        let begin = Instant::now();
        let made = act()?;
        self.times.push(begin.elapsed());
        Ok(made)
    }

    fn print(&mut self) {
        self.times.sort();
        let quartile = |quarters: usize| self.times[self.times.len() * quarters / 4].as_secs_f64() * 1e3;
        println!("{:<24} {:>8.2} {:>8.2} {:>8.2}", self.name, quartile(1), quartile(2), quartile(3));
    }
}

/// Facts about the host are read once, as a worker does.
fn native(bundle: &Path, process: &Path, columns: &mut [Column]) -> Result<()> {
    let host = Host::read().map_err(text)?;
    let create = || -> Result<keeper::Made> {
        keeper::create(&keeper::planned(&Request::new(ID, bundle), &host)?, keeper::Streams::inherited().map_err(text)?)
    };
    columns[0].measure(|| {
        let made = create()?;
        made.start()?;
        keeper::wait(made.init).map_err(text)?;
        made.delete()
    })?;
    // Its program waits at the gate: processes can be added.
    let made = create()?;
    let process = std::fs::read(process).map_err(text)?;
    columns[1].measure(|| {
        let pid = made.exec(&process, &host, keeper::Streams::inherited().map_err(text)?)?;
        keeper::wait(pid).map_err(text)
    })?;
    made.start()?;
    keeper::wait(made.init).map_err(text)?;
    made.delete()
}

fn command(program: &str, state: &Path, bundle: &Path, process: &Path, columns: &mut [Column]) -> Result<()> {
    let pid_file: PathBuf = state.with_extension("pid");
    let runtime = |arguments: &[&str]| -> Result<()> {
        let mut command = Command::new(program);
        command
            .arg("--root")
            .arg(state)
            .args(arguments)
            .current_dir(bundle)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = command.status().map_err(text)?;
        if status.success() { Ok(()) } else { Err(format!("{program} {arguments:?}: {status}")) }
    };
    let pid = || -> Result<u32> { std::fs::read_to_string(&pid_file).map_err(text)?.trim().parse().map_err(|error| format!("{error}")) };
    let (pid_path, process_path) = (pid_file.display().to_string(), process.display().to_string());
    columns[0].measure(|| {
        runtime(&["create", "--pid-file", &pid_path, ID])?;
        runtime(&["start", ID])?;
        keeper::wait(pid()?).map_err(text)?;
        runtime(&["delete", ID])
    })?;
    runtime(&["create", "--pid-file", &pid_path, ID])?;
    let init = pid()?;
    columns[1].measure(|| {
        runtime(&["exec", "--detach", "--process", &process_path, "--pid-file", &pid_path, ID])?;
        keeper::wait(pid()?).map_err(text)
    })?;
    runtime(&["start", ID])?;
    keeper::wait(init).map_err(text)?;
    runtime(&["delete", ID])
}

fn text(error: impl Into<std::io::Error>) -> String {
    error.into().to_string()
}
