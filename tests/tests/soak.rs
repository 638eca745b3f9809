//! Containers and execs without pause while everything around them fails, for a given time; then an audit. Needs root.
//!
//! `X_SOAK_SECONDS` is the duration of each test (10 by default), `X_SEED` its seed, `X_SOAK_CONTAINERD` the containerd (`1.6`, `1.7`
//! or `2.1`, the default); `X_SHIM` names the shim's binary. A run prints its seed.

#[path = "soak/containerd.rs"]
mod containerd;
#[path = "soak/shim.rs"]
mod shim;

use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use std::{env, fs};

use anyhow::{Context as _, Result};
use nix::sys::signal::Signal;
use shim_tests::direct::{self, Case};
use shim_tests::direct_cases;
use shim_tests::proc::{self, Process};

fn main() -> ExitCode {
    let programs = Path::new(env!("CARGO_BIN_EXE_gated-runtime")).parent().expect("a file is in a folder");
    let mut cases: Vec<Case> = direct_cases![shim: every_exit_is_published_once_and_no_byte_is_lost_after_random_failures].to_vec();
    // the audit looks at every leftover
    cases.extend(direct_cases![containerd: every_exit_is_known_and_nothing_is_left_after_random_kills].map(Case::alone));
    let cases: Vec<_> = cases.into_iter().map(|case| case.within(seconds() + Duration::from_secs(180))).collect();
    direct::main(&cases, programs)
}

fn number(name: &str) -> Option<u64> {
    env::var(name).ok()?.parse().ok()
}

fn seconds() -> Duration {
    Duration::from_secs(number("X_SOAK_SECONDS").unwrap_or(10))
}

/// The sum of these counters.
fn sum(counters: &[&AtomicU64]) -> u64 {
    counters.iter().map(|counter| counter.load(Ordering::Relaxed)).sum()
}

/// The seed of this run, which it prints.
fn seed() -> u64 {
    let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let seed = number("X_SEED").unwrap_or(since_1970.as_secs());
    println!("soak: X_SEED={seed} repeats this run, for {:?}", seconds());
    seed
}

/// Sets `over` when the time is up, unless another lane has.
async fn timer(over: &AtomicBool) {
    let begin = Instant::now();
    while begin.elapsed() < seconds() && !over.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(100)).await; // until the requested duration is over
    }
    over.store(true, Ordering::Relaxed);
}

/// Four lanes of containers, `chaos` beside them, and a disk that is full at times, until the time is up or something fails.
/// `disk`: where it is, and how often it was full.
async fn until_over(
    over: &AtomicBool,
    seed: u64,
    (disk, times): (&Path, &AtomicU64),
    chaos: impl Future<Output = Result<()>>,
    live: impl AsyncFn(&str, &mut Dice) -> Result<()>,
) -> [Result<()>; 6] {
    let lane = |lane| run_containers(over, lane, Dice::new(seed, lane), &live);
    let full = fill_the_disk(over, disk, times, Dice::new(seed, 97));
    let (chaos, full, (), one, two, three, four) = tokio::join!(chaos, full, timer(over), lane(0), lane(1), lane(2), lane(3));
    [chaos, full, one, two, three, four]
}

/// One container after the other, until the time is up or something fails.
async fn run_containers(over: &AtomicBool, lane: u64, mut dice: Dice, live: impl AsyncFn(&str, &mut Dice) -> Result<()>) -> Result<()> {
    for number in 0.. {
        if over.load(Ordering::Relaxed) {
            break;
        }
        let id = format!("c{lane}-{number}");
        live(&id, &mut dice).await.inspect_err(|_| over.store(true, Ordering::Relaxed)).context(id)?;
    }
    Ok(())
}

/// A sequence that its seed decides.
struct Dice(u64);

impl Dice {
    fn new(seed: u64, lane: u64) -> Self {
        let mut dice = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (lane + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1);
        dice.below(2);
        dice
    }

    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % limit
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }

    fn one_of<T>(&mut self, all: Vec<T>) -> Option<T> {
        if all.is_empty() {
            return None;
        }
        let chosen = self.below(all.len() as u64) as usize;
        all.into_iter().nth(chosen)
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// Kills a process of the OCI runtime `engine` that is at work. Returns whether there was one.
fn kill_a_runtime(engine: &Path, dice: &mut Dice) -> bool {
    let name = engine.file_name().unwrap_or_default().to_string_lossy().into_owned();
    // not a runtime process that is about to become a container's process, which has a pid in the container as well
    let is_helper = |pid| proc::status_field(pid, "NSpid").is_ok_and(|pids| pids.split_whitespace().count() == 1);
    let helpers = proc::all().into_values().filter(|process| process.comm == name && !process.is_zombie());
    let found = dice.one_of(helpers.filter(|process| is_helper(process.pid)).collect());
    found.map(|process| proc::kill_hard(process.pid)).is_some()
}

/// The file that fills a disk.
const FILLER: &str = "filler";

/// Fills the disk for a while, repeatedly: sometimes longer than a shim makes a container wait.
async fn fill_the_disk(over: &AtomicBool, disk: &Path, times: &AtomicU64, mut dice: Dice) -> Result<()> {
    while !over.load(Ordering::Relaxed) {
        tokio::time::sleep(Duration::from_millis(dice.below(1000))).await; // a random time
        let _full = fs::write(disk.join(FILLER), vec![0; 8 << 20]);
        let spell = if dice.one_in(3) { 5_500 } else { 0 } + dice.below(700);
        tokio::time::sleep(Duration::from_millis(spell)).await;
        fs::remove_file(disk.join(FILLER))?;
        count(times);
    }
    Ok(())
}

/// What was done to a worker.
enum Worker {
    Killed,
    Stopped,
}

/// Kills a worker of one of `shims`, or stops it for a while.
async fn hurt_a_worker(shims: &[Process], dice: &mut Dice) -> Option<Worker> {
    let workers = shims.iter().flat_map(|shim| proc::children(shim.pid)).filter(|child| child.command.contains(" worker"));
    let worker = dice.one_of(workers.collect())?.pid;
    if !dice.one_in(3) {
        proc::kill_hard(worker);
        return Some(Worker::Killed);
    }
    let _gone = proc::signal(worker, Signal::SIGSTOP);
    tokio::time::sleep(Duration::from_millis(dice.below(500))).await;
    let _gone = proc::signal(worker, Signal::SIGCONT);
    Some(Worker::Stopped)
}
