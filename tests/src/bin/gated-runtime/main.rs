//! An OCI runtime that blocks, fails or prints as the files beside it say, and otherwise executes the real one.
//! The table of those files is in `src/gate.rs`. Where none of them is, it is an [`instant`] one itself.

mod instant;

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::thread;
use std::time::Duration;

/// Global flags of runc and crun that take a value.
const WITH_VALUE: [&str; 7] = ["--root", "--log", "--log-format", "--criu", "--rootless", "--cgroup-manager", "--log-level"];

fn main() -> ExitCode {
    let is_gate = std::env::current_exe().is_ok_and(|program| program.with_file_name("real").exists());
    if !is_gate {
        return instant::main();
    }
    match run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("gated-runtime: {error}");
            ExitCode::from(125)
        }
    }
}

fn run() -> io::Result<ExitCode> {
    let program = std::env::current_exe()?;
    let folder = program.parent().unwrap_or(Path::new("/"));
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let verb = verb(&arguments);
    let mut calls = File::options().create(true).append(true).open(folder.join("calls"))?;
    calls.write_all(format!("{verb} {}\n", arguments.join(" ")).as_bytes())?;
    if let Ok(bytes) = fs::read_to_string(folder.join(format!("flood.{verb}"))) {
        let line = format!("{}\n", "x".repeat(1023));
        for _kilobyte in 0..bytes.trim().parse().unwrap_or(0) / line.len() {
            io::stderr().write_all(line.as_bytes())?;
        }
    }
    block_while(folder, "hold", &verb)?;
    if let Ok(message) = fs::read_to_string(folder.join(format!("fail.{verb}"))) {
        return fail(&arguments, &message);
    }
    let mut real = Command::new(fs::read_to_string(folder.join("real"))?);
    real.args(&arguments);
    if folder.join(format!("after.{verb}")).exists() {
        let status = real.status()?;
        block_while(folder, "after", &verb)?;
        return Ok(ExitCode::from(status.code().and_then(|code| code.try_into().ok()).unwrap_or(125)));
    }
    Err(real.exec())
}

/// The first argument that is neither a flag nor the value of one.
fn verb(arguments: &[String]) -> String {
    let mut rest = arguments.iter();
    while let Some(argument) = rest.next() {
        if WITH_VALUE.contains(&argument.as_str()) {
            rest.next();
        } else if !argument.starts_with('-') {
            return argument.clone();
        }
    }
    String::new()
}

fn block_while(folder: &Path, kind: &str, verb: &str) -> io::Result<()> {
    let order = folder.join(format!("{kind}.{verb}"));
    if !order.exists() {
        return Ok(());
    }
    let mark = folder.join(format!("held.{verb}"));
    fs::write(&mark, std::process::id().to_string())?;
    while order.exists() {
        thread::sleep(Duration::from_millis(2)); // it is released by removing a file
    }
    match fs::remove_file(&mark) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Fails like a runtime does: on stderr, and as JSON in the log file.
fn fail(arguments: &[String], message: &str) -> io::Result<ExitCode> {
    if let Some(log) = arguments.iter().skip_while(|argument| *argument != "--log").nth(1) {
        let entry = serde_json::json!({ "level": "error", "msg": message, "time": "2026-01-01T00:00:00Z" });
        writeln!(File::options().create(true).append(true).open(log)?, "{entry}")?;
    }
    eprintln!("{message}");
    Ok(ExitCode::FAILURE)
}
