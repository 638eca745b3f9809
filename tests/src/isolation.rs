//! The namespaces of a whole run, and the role of init in them.
//!
//! ```text
//!  cargo ─▶ outer ──unshare(pid, mount)──▶ inner = pid 1 of the run
//!             │ own mounts on /run and       │ own /proc, reaps orphans
//!             │ /sys/fs/cgroup; waits, then  ▼ daemons, shims, containers
//!             ▼ removes what cgroups are left
//! ```
//! So every process, mount, socket and fifo that the run can see is its own, other users of the machine are
//! neither seen nor disturbed, and when the run ends, even by SIGKILL, the kernel removes everything.
//! Only cgroups are shared with the host: each run has one folder of its own in every hierarchy that it sees; see [`cgroups`].

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::{Command, ExitCode, ExitStatus};
use std::sync::{LazyLock, Mutex};
use std::time::Duration;
use std::{env, fs, thread};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount, umount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::cgroups::{self, Version};
use crate::proc;

const MARK: &str = "X_TESTS_INNER";
/// A run's cgroups are called that and the pid of its outer process.
const PREFIX: &str = "x-tests-";

const NONE: Option<&str> = None;

const CNI: &str = "/var/lib/cni";

/// The folder of the run, on the run's own tmpfs.
pub const RUN: &str = "/run/x-tests";

/// Runs `inside` as pid 1 of namespaces of its own, and returns its exit code.
///
/// Errors: without root, or when the kernel refuses the namespaces.
pub fn run(inside: impl FnOnce() -> ExitCode) -> Result<ExitCode> {
    if env::var_os(MARK).is_some() {
        match under_systemd() {
            true => fs::create_dir_all(RUN)?,
            false => become_init()?,
        }
        return Ok(inside());
    }
    ensure!(nix::unistd::geteuid().is_root(), "these tests need root: they start daemons and containers");
    let version = Version::chosen()?;
    let cgroup = format!("{PREFIX}{}", std::process::id());
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWPID).context("new pid and mount namespaces")?;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE).context("make mounts private")?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context("mount /run")?;
    fs::create_dir_all(RUN)?;
    // where CNI plugins and their caller keep what they have done, if they are installed
    let is_cni_new = !Path::new(CNI).exists();
    if Path::new("/usr/lib/cni").exists() {
        fs::create_dir_all(CNI)?;
        mount(Some("tmpfs"), CNI, Some("tmpfs"), MsFlags::empty(), Some("mode=755")).context("mount the folder of CNI plugins")?;
    }
    cgroups::show(version)?;
    cgroups::remove_of_the_dead(PREFIX);
    let status = Command::new(env::current_exe()?)
        .args(env::args_os().skip(1))
        .env(MARK, &cgroup)
        .env(cgroups::CHOICE, version.to_string())
        .env("RUST_LIB_BACKTRACE", "1")
        .status()?;
    cgroups::remove(&cgroup);
    if is_cni_new {
        let _not_made = umount(CNI);
        let _in_use = fs::remove_dir(CNI);
    }
    Ok(exit_code(status))
}

/// Whether the run's namespaces and their init are a systemd's (`tests/tools/systemd-check`): then nothing else is to be made.
pub fn under_systemd() -> bool {
    env::var_os("X_TESTS_UNDER_SYSTEMD").is_some()
}

fn exit_code(status: ExitStatus) -> ExitCode {
    ExitCode::from(status.code().and_then(|code| u8::try_from(code).ok()).unwrap_or(101))
}

/// The name of the run's own cgroup in every hierarchy.
pub fn cgroup() -> String {
    env::var(MARK).unwrap_or_else(|_| "x-tests".to_owned())
}

/// Removes the cgroups of a killed run whose outer process was `pid`, and kills the processes in them.
pub fn remove_cgroups_of(pid: u32) {
    cgroups::remove(&format!("{PREFIX}{pid}"));
}

fn become_init() -> Result<()> {
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL).context("die with the outer process")?;
    ensure!(std::process::id() == 1, "{MARK} is for internal use");
    mount(Some("proc"), "/proc", Some("proc"), MsFlags::empty(), NONE).context("mount /proc")?;
    thread::Builder::new().name("init".to_owned()).spawn(reap_orphans)?;
    Ok(())
}

static OWN: LazyLock<Mutex<BTreeSet<i32>>> = LazyLock::new(Mutex::default);
static ORPHANS: LazyLock<Mutex<Vec<String>>> = LazyLock::new(Mutex::default);

/// Records that its own parent waits for `pid`.
pub fn keep(pid: u32) {
    OWN.lock().expect("no panic under this lock").insert(pid.cast_signed());
}

/// Records that `pid` has been waited for.
pub fn forget(pid: u32) {
    OWN.lock().expect("no panic under this lock").remove(&pid.cast_signed());
}

/// The names of the processes that ended as children of init: their parent had died, or did not wait for them.
pub fn orphans() -> Vec<String> {
    ORPHANS.lock().expect("no panic under this lock").clone()
}

/// The names of the processes that have ended as children of init and are not among the [`orphans`] yet.
pub fn unreaped() -> Vec<String> {
    let own = OWN.lock().expect("no panic under this lock").clone();
    let _reaping_paused = ORPHANS.lock().expect("no panic under this lock");
    let zombies = proc::all().into_values().filter(|p| p.parent == 1 && p.is_zombie() && !own.contains(&p.pid));
    zombies.map(|zombie| zombie.comm).collect()
}

/// Runs init: reaps orphans after a second. What is in the test's own process group, as commands are that it runs, is left for the code that
/// waits for it, and reaped only when that does not come for long: on a busy machine it may be late.
fn reap_orphans() {
    let own = proc::Process::read(1).map_or(0, |init| init.group);
    let mut seen: BTreeMap<i32, u32> = BTreeMap::new();
    loop {
        let zombies: Vec<_> = proc::all().into_values().filter(|p| p.parent == 1 && p.is_zombie()).collect();
        seen.retain(|pid, _| zombies.iter().any(|zombie| zombie.pid == *pid));
        for zombie in zombies {
            let rounds = seen.entry(zombie.pid).or_default();
            *rounds += 1;
            let patience = if zombie.group == own { 300 } else { 10 };
            if *rounds < patience || OWN.lock().expect("no panic under this lock").contains(&zombie.pid) {
                continue;
            }
            let mut orphans = ORPHANS.lock().expect("no panic under this lock");
            if let Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) = waitpid(Pid::from_raw(zombie.pid), Some(WaitPidFlag::WNOHANG)) {
                orphans.push(zombie.comm);
            }
        }
        thread::sleep(Duration::from_millis(100)); // the polling interval of init; no test depends on it
    }
}
