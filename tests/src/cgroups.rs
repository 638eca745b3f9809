//! Which cgroups a run sees, and its own folders in them.
//!
//! ```text
//!  X_CGROUP   host has v1 (hybrid)                       host has v2 alone
//!  unset      the host's v1 hierarchies, and one for     the host's
//!             each controller that v2 has there
//!  1          the same                                   refused
//!  2          the unified hierarchy alone, mounted in    the host's
//!             the run's own mount namespace
//! ```
//! On a hybrid host every controller of a v1 hierarchy is missing on the unified one: freezing, killing, events and device
//! filters work there, limits and statistics of memory, for example, do not. Cases that need a controller ask [`lacks`].
//!
//! crun refuses a hybrid host whose v2 hierarchy has controllers: see [`scratch::cgroups`].

use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{env, fmt, fs, thread};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::eventually::{SOON, eventually};
use crate::runner::skip;
use crate::{isolation, proc};

/// The environment variable that chooses: `1` or `2`.
pub const CHOICE: &str = "X_CGROUP";

const ROOT: &str = "/sys/fs/cgroup";
const NONE: Option<&str> = None;

/// A version of cgroups.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// A hierarchy for each controller.
    V1,
    /// One hierarchy.
    V2,
}

impl Version {
    /// The version that this process sees.
    pub fn here() -> Self {
        if Path::new(ROOT).join("cgroup.controllers").exists() { Self::V2 } else { Self::V1 }
    }

    /// The version that [`CHOICE`] requests, or the host's.
    ///
    /// Errors: a word that is no version; v1 where there is none.
    pub fn chosen() -> Result<Self> {
        match env::var(CHOICE) {
            Ok(word) => Self::available(&word).with_context(|| format!("{CHOICE}={word}")),
            Err(_) => Ok(Self::here()),
        }
    }

    /// The version that `word` names, `1` or `2`.
    ///
    /// Errors: it names none; v1 where there is none.
    pub fn available(word: &str) -> Result<Self> {
        match (word, Self::here()) {
            ("1", Self::V1) => Ok(Self::V1),
            ("1", Self::V2) => bail!("this host has cgroup v2 alone"),
            ("2", _) => Ok(Self::V2),
            _ => bail!("unknown cgroup version; use 1 or 2"),
        }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if *self == Self::V1 { "1" } else { "2" })
    }
}

/// Has this mount namespace see the chosen version. Its mounts have to be private.
pub(crate) fn show(chosen: Version) -> Result<()> {
    if Version::here() == Version::V2 {
        return Ok(());
    }
    match chosen {
        Version::V1 => show_v1(),
        Version::V2 => show_v2(),
    }
}

fn show_v1() -> Result<()> {
    let own = Path::new(isolation::RUN).join("cgroup-v1");
    fs::create_dir_all(&own)?;
    scratch::cgroups::show_v1(&own).context("show cgroup v1")
}

fn show_v2() -> Result<()> {
    let below = |mount: &String| mount == ROOT || mount.starts_with(&format!("{ROOT}/"));
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4).map(str::to_owned)).filter(below);
    for point in points.collect::<Vec<_>>().iter().rev() {
        umount2(point.as_str(), MntFlags::MNT_DETACH).with_context(|| format!("unmount {point}"))?;
    }
    mount(Some("cgroup2"), ROOT, Some("cgroup2"), MsFlags::empty(), NONE).context("mount the unified cgroup hierarchy")
}

/// Why cgroups here lack `controller`; nothing if they have it.
pub fn lacks(controller: &str) -> Option<String> {
    if Version::here() == Version::V1 {
        let controller = if controller == "io" { "blkio" } else { controller };
        return (!Path::new(ROOT).join(controller).is_dir()).then(|| format!("no cgroup v1 hierarchy has the {controller} controller"));
    }
    let file = Path::new(ROOT).join("cgroup.controllers");
    let there = fs::read_to_string(&file).unwrap_or_default().split_whitespace().any(|name| name == controller);
    (!there).then(|| format!("cgroup v2 has no {controller} controller here: it is not in {}", file.display()))
}

/// The folder of the cgroup that `pid` is in: of the v1 hierarchy with `controller`, or of the unified one.
pub fn of(pid: u32, controller: &str) -> Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    for line in text.lines() {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(controllers), Some(path)) = (fields.next(), fields.next()) else { continue };
        let root = match Version::here() {
            Version::V2 if controllers.is_empty() => PathBuf::from(ROOT),
            Version::V1 if controllers.split(',').any(|name| name == controller) => {
                Path::new(ROOT).join(controllers.split(',').next().unwrap_or(controller))
            }
            _ => continue,
        };
        let folder = root.join(path.trim_start_matches('/'));
        if folder.is_dir() {
            return Ok(folder);
        }
    }
    bail!("no cgroup of {controller}: {text}")
}

/// The folders called `name` in every hierarchy, where they exist.
pub fn folders(name: &str) -> Vec<PathBuf> {
    let mut folders: Vec<_> = hierarchies().into_iter().map(|root| root.join(name)).collect();
    folders.retain(|folder| folder.is_dir());
    folders
}

fn hierarchies() -> Vec<PathBuf> {
    let all = fs::read_dir(ROOT).into_iter().flatten().flatten().map(|entry| entry.path());
    [PathBuf::from(ROOT)].into_iter().chain(all).collect()
}

/// A cgroup of v1 below the run's own, into which a test puts processes.
#[derive(Debug)]
pub struct Own(PathBuf);

impl Own {
    /// One of the hierarchy whose cgroups have `file`, with `value` in it; skips where there is none.
    pub fn with(name: &str, file: &str, value: &str) -> Result<Self> {
        let Some(parent) = folders(&isolation::cgroup()).into_iter().find(|folder| folder.join(file).exists()) else {
            return skip(format!("there is no {file} of cgroup v1"));
        };
        let own = Self(parent.join(name));
        fs::create_dir_all(&own.0)?;
        own.set(file, value)?;
        Ok(own)
    }

    /// Writes one of its files.
    pub fn set(&self, file: &str, value: &str) -> Result<()> {
        fs::write(self.0.join(file), value).with_context(|| format!("{value} to {file}"))
    }

    /// Reads one of its files.
    pub fn get(&self, file: &str) -> Result<String> {
        fs::read_to_string(self.0.join(file)).with_context(|| file.to_owned())
    }

    /// Moves a process in.
    pub fn take(&self, pid: i32) -> Result<()> {
        self.set("cgroup.procs", &pid.to_string())
    }

    /// Removes it when the last process in it has exited.
    pub async fn emptied(&self) -> Result<()> {
        eventually("every process in it has exited", SOON, async || Ok(fs::remove_dir(&self.0)?)).await
    }
}

/// Freezes the cgroup in the folder that [`of`] finds for `freezer`.
pub fn freeze(folder: &Path) -> Result<()> {
    let (file, text) = match Version::here() {
        Version::V1 => ("freezer.state", "FROZEN"),
        Version::V2 => ("cgroup.freeze", "1"),
    };
    fs::write(folder.join(file), text).with_context(|| format!("freeze {}", folder.display()))
}

/// Kills the processes in the cgroups of that name and removes them, as far as the kernel allows.
pub fn remove(name: &str) {
    folders(name).iter().for_each(|folder| remove_folder(folder));
}

/// Removes the cgroups that killed runs left behind: a run's folders are called `prefix` and the pid of its
/// outer process.
pub(crate) fn remove_of_the_dead(prefix: &str) {
    for hierarchy in hierarchies() {
        for entry in fs::read_dir(hierarchy).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let outer = name.strip_prefix(prefix).and_then(|pid| pid.parse().ok());
            if outer.is_some_and(|pid| !proc::is_alive(pid)) {
                remove_folder(&entry.path());
            }
        }
    }
}

fn remove_folder(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_folder(&entry.path());
        }
    }
    let _v1_only = fs::write(folder.join("freezer.state"), "THAWED");
    for _attempt in 0..50 {
        for pid in fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default().lines() {
            // 0 is a process of another pid namespace, never ours to kill
            if let Some(pid) = pid.parse().ok().filter(|pid| *pid > 0) {
                proc::kill_hard(pid);
            }
        }
        if fs::remove_dir(folder).is_ok() {
            return;
        }
        thread::sleep(Duration::from_millis(10)); // a killed process leaves its cgroup a little later
    }
}
