//! Processes, read from `/proc`.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use std::{fs, thread};

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::eventually::{SOON, eventually_true};

/// One process as `/proc/PID/stat` and `/proc/PID/cmdline` show it.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its pid in the namespace of the run.
    pub pid: i32,
    /// Its parent's pid.
    pub parent: i32,
    /// Its process group.
    pub group: i32,
    /// One letter, `Z` for a zombie.
    pub state: char,
    /// The kernel's short name.
    pub comm: String,
    /// Arguments joined by a space; empty for a zombie.
    pub command: String,
    /// Clock ticks after boot; together with the pid this names one process for ever.
    pub start: u64,
}

impl Process {
    /// Reads one process.
    ///
    /// Errors: when there is none with that pid any more.
    pub fn read(pid: i32) -> Result<Self> {
        let command = words(pid, "cmdline");
        let stat = stat(pid)?;
        Ok(Self {
            pid,
            parent: stat.field(4).parse()?,
            group: stat.field(5).parse()?,
            state: stat.field(3).chars().next().unwrap_or('?'),
            command: String::from_utf8_lossy(&command).replace('\0', " ").trim().to_owned(),
            start: stat.field(22).parse()?,
            comm: stat.comm,
        })
    }

    /// Whether it has ended without having been waited for.
    pub fn is_zombie(&self) -> bool {
        self.state == 'Z'
    }
}

/// `/proc/PID/stat`, with the fields numbered as in proc(5).
#[derive(Debug)]
pub struct Stat {
    comm: String,
    rest: Vec<String>,
}

impl Stat {
    /// The field with that number, 3 or more.
    pub fn field(&self, number: usize) -> &str {
        self.rest.get(number - 3).map_or("", String::as_str)
    }
}

/// Reads `/proc/PID/stat`.
pub fn stat(pid: i32) -> Result<Stat> {
    let path = format!("/proc/{pid}/stat");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    let (open, close) = (text.find('(').context("no comm")?, text.rfind(')').context("no comm")?);
    Ok(Stat { comm: text[open + 1..close].to_owned(), rest: text[close + 1..].split_whitespace().map(str::to_owned).collect() })
}

/// The bytes of `/proc/PID/cmdline` or `/proc/PID/environ`; empty for a process that has no memory any more, as it exits or has exited.
///
/// Both are also empty while a process executes another program, as a keeper does in an upgrade, for as long as the scheduler keeps it in the
/// middle of that: they are read again then, for a second at most.
fn words(pid: i32, file: &str) -> Vec<u8> {
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_secs(1) {
        let words = fs::read(format!("/proc/{pid}/{file}")).unwrap_or_default();
        if !words.is_empty() || !stat(pid).is_ok_and(|stat| stat.field(VIRTUAL_MEMORY) != "0") {
            return words;
        }
        thread::sleep(Duration::from_micros(100)); // how often it is read
    }
    Vec::new()
}

/// The number of a field of `/proc/PID/stat`: the size of the virtual memory.
const VIRTUAL_MEMORY: usize = 23;

/// Every process of the run's pid namespace, by pid.
pub fn all() -> BTreeMap<i32, Process> {
    let Ok(entries) = fs::read_dir("/proc") else { return BTreeMap::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(|pid| Process::read(pid).ok())
        .map(|process| (process.pid, process))
        .collect()
}

/// Whether a process with that pid exists and is not a zombie.
pub fn is_alive(pid: i32) -> bool {
    Process::read(pid).is_ok_and(|process| !matches!(process.state, 'Z' | 'X'))
}

/// The living children of `pid`.
pub fn children(pid: i32) -> Vec<Process> {
    all().into_values().filter(|process| process.parent == pid && !process.is_zombie()).collect()
}

/// The children of `pid` that have exited and were not reaped.
pub fn zombies_of(pid: i32) -> Vec<Process> {
    all().into_values().filter(|process| process.parent == pid && process.is_zombie()).collect()
}

/// Whether the environment or the command line of `pid` contains `text`.
pub fn mentions(pid: i32, text: &str) -> bool {
    ["environ", "cmdline"].iter().any(|file| String::from_utf8_lossy(&words(pid, file)).contains(text))
}

/// The value of one line of `/proc/PID/status`.
pub fn status_field(pid: i32, name: &str) -> Result<String> {
    let path = format!("/proc/{pid}/status");
    let text = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    text.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .map(|value| value.trim().to_owned())
        .with_context(|| format!("{path} has no {name}"))
}

/// The open files of `pid`, by number.
pub fn open_files(pid: i32) -> Result<BTreeMap<i32, PathBuf>> {
    let folder = format!("/proc/{pid}/fd");
    Ok(fs::read_dir(&folder)
        .with_context(|| format!("read {folder}"))?
        .flatten()
        .filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, fs::read_link(entry.path()).ok()?)))
        .collect())
}

/// The fewest descriptors that a shim has at once over a tenth of a second. Commands of other tests connect to every shim of the host
/// for a moment.
pub async fn fewest_open_files(shim: i32) -> Result<usize> {
    let (begin, mut fewest) = (Instant::now(), usize::MAX);
    while begin.elapsed() < Duration::from_millis(100) {
        fewest = fewest.min(open_files(shim)?.len());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(fewest)
}

/// Waits until the init `pid` runs `program`: a runtime answers Start before that, and criu cannot save the runtime.
pub async fn executes(pid: u32, program: &str) -> Result<()> {
    let is_program = || Process::read(pid.cast_signed()).is_ok_and(|process| process.command.starts_with(program));
    eventually_true(format!("{pid} executes {program}"), SOON, is_program).await
}

/// Sends SIGKILL; the process may have exited already.
pub fn kill_hard(pid: i32) {
    let _gone = kill(Pid::from_raw(pid), Signal::SIGKILL);
}

/// Sends a signal.
///
/// Errors: when there is no such process.
pub fn signal(pid: i32, signal: Signal) -> Result<()> {
    kill(Pid::from_raw(pid), signal).with_context(|| format!("{signal} to {pid}"))
}

/// Memory that it shares with no other process, in KiB.
pub fn private_kib(pid: i32) -> Result<u64> {
    Ok(status_field(pid, "RssAnon")?.trim_end_matches(" kB").parse()?)
}

/// Whether this process has CAP_SYS_RESOURCE.
pub fn may_raise_limits() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let effective = status_field(std::process::id().cast_signed(), "CapEff").unwrap_or_default();
    u64::from_str_radix(&effective, 16).is_ok_and(|set| set & (1 << CAP_SYS_RESOURCE) != 0)
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_that_replaces_its_image_is_never_seen_without_its_command() {
        let forever = r#"exec sh -c "$1" forever "$1""#;
        let mut child = Command::new("sh").args(["-c", forever, "forever", forever]).spawn().expect("a shell");
        let pid = child.id().cast_signed();
        let blind = (0..20_000).find(|_| !Process::read(pid).expect("the child is alive").command.contains("forever"));
        child.kill().expect("the child is alive");
        child.wait().expect("it is ours");
        assert_eq!(blind, None, "the first time that it had no command");
    }
}
