//! Manual cleanup: removes a container without a worker.
//!
//! Owns the kills, the engine's delete and the unmounts, from what the journal records.
//!
//! **Invariant:** repeating any of it does no harm.
use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::libc;
use serde::Deserialize;

use super::{Error, helper, native_cleanup, wait};
use crate::cgroup::Cgroup;
use crate::engine::{CommandEngine, Container, Engine, EngineError, Verb};
use crate::journal_body::{JournalBody, ProcessIdentity};
use crate::processes::Stat;
use crate::rootfs::{self, MountError, Unmount};
use crate::sys;

/// The possible leftovers of a container.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Leftovers<'a> {
    pub(crate) id: &'a str,
    pub(crate) bundle: &'a Path,
    /// Absent without a journal: then the shim has never run a process.
    pub(crate) body: Option<&'a JournalBody>,
}

impl Leftovers<'_> {
    fn init(&self) -> Option<ProcessIdentity> {
        self.body?.init
    }

    fn cgroup(&self) -> Option<Cgroup> {
        let recorded = &self.body?.cgroup;
        if recorded.is_null() { None } else { Cgroup::deserialize(recorded).ok() }
    }

    fn engine(&self) -> Option<Engine> {
        Engine::deserialize(&self.body?.engine).ok()
    }

    /// Whether its processes may outlive init.
    fn shares_pid_namespace(&self) -> bool {
        self.body.is_some_and(|body| body.shared_pid_namespace)
    }

    /// The container, described for the engine.
    fn at(&self) -> Container<'_> {
        Container { id: self.id, bundle: self.body.map_or(self.bundle, |body| &body.bundle) }
    }

    fn rootfs(&self) -> PathBuf {
        self.body.and_then(|body| body.rootfs.clone()).unwrap_or_else(|| self.bundle.join("rootfs"))
    }
}

/// How long another Create may take until its container names its bundle.
const HALF_MADE_WITHIN: Duration = Duration::from_secs(1);

/// Whether nothing is left: no process, no mount, no state of the engine.
pub(crate) fn is_clean(leftovers: &Leftovers<'_>) -> bool {
    let is_kept = match leftovers.engine() {
        Some(Engine::Native(engine)) => engine.blocking_cgroup_folder().is_some(),
        Some(Engine::Command(engine)) => engine.state_of(leftovers.id).exists(),
        None => false,
    };
    !is_kept && !is_mounted(leftovers) && !is_alive(leftovers)
}

/// The exit status of init if it is a zombie: 0–255, or 128 + signal number.
pub(crate) fn end_of_zombie(leftovers: &Leftovers<'_>) -> Option<u32> {
    let init = leftovers.init()?;
    let status = Stat::of(init.pid)?.exit_status()?;
    init.exists().then_some(status)
}

/// Whether a process of the container runs.
fn is_alive(leftovers: &Leftovers<'_>) -> bool {
    leftovers.init().and_then(handle).is_some() || leftovers.cgroup().is_some_and(|cgroup| cgroup.pids().into_iter().any(is_running))
}

/// Kills every process of the container and waits for their exits.
///
/// Errors: [`Error::StillAlive`] if one does not exit in time, as in an uninterruptible sleep.
pub(crate) fn kill(leftovers: &Leftovers<'_>, deadline: Instant) -> Result<(), Error> {
    let deadline = deadline.checked_sub(Duration::from_millis(800)).unwrap_or(deadline);
    let init = leftovers.init().and_then(handle);
    // Once ours is gone, another container of the id may have the same cgroup.
    let is_anothers = || match leftovers.engine() {
        // What was in its pid namespace has ended with init.
        Some(Engine::Native(_)) => !leftovers.shares_pid_namespace(),
        Some(Engine::Command(engine)) => is_of_another(leftovers, &engine, deadline).unwrap_or(true),
        None => false,
    };
    let cgroup = leftovers.cgroup().filter(|cgroup| init.is_some() || cgroup.pids().is_empty() || !is_anothers());
    if let Some(init) = &init {
        let _ = sys::process::signal(init.as_fd(), libc::SIGKILL);
    }
    loop {
        // The next round finds processes forked meanwhile. This also thaws a paused container.
        let living: Vec<u32> =
            cgroup.as_ref().map_or_else(Vec::new, |cgroup| cgroup.pids().into_iter().filter(|pid| is_running(*pid)).collect());
        if let (Some(cgroup), false) = (&cgroup, living.is_empty()) {
            let _ = cgroup.kill_all();
        }
        let turn = deadline.min(Instant::now() + Duration::from_millis(20));
        let init_ended = init.as_ref().is_none_or(|init| wait::for_end(init.as_fd(), turn));
        match living.first() {
            None if init_ended => return Ok(()),
            Some(pid) => {
                if let Ok(process) = sys::process::open(*pid) {
                    wait::for_end(process.as_fd(), turn);
                }
            }
            None => {}
        }
        if Instant::now() >= deadline {
            let pid = living.first().copied().or_else(|| leftovers.init().map(|init| init.pid)).unwrap_or(0);
            return Err(Error::StillAlive { id: leftovers.id.to_owned(), pid });
        }
    }
}

/// Has the engine delete the container, unless the engine's container of this id is another one, and unmounts its root filesystem.
///
/// Errors: the mounts cannot be undone, or the engine's program is missing and its state cannot be removed without it. Any other failure
/// of the engine is a warning: there may be nothing left to delete.
pub(crate) fn clean(leftovers: &Leftovers<'_>, deadline: Instant) -> Result<(), Error> {
    let complaint = match leftovers.engine() {
        Some(Engine::Native(engine)) => native_cleanup::clean(&engine, leftovers.init().is_some(), deadline),
        Some(Engine::Command(engine)) => delete_from_engine(leftovers, &engine, deadline)?,
        None => None,
    };
    if let Some(complaint) = complaint {
        eprintln!("containerd-shim-x-v2: delete {}: {complaint}", leftovers.id);
    }
    let rootfs = leftovers.rootfs();
    match rootfs::blocking_unmount_all(&rootfs, Unmount::Clean) {
        // A process of the host uses it: containerd must be able to forget the container in any case.
        Err(MountError::Busy { .. }) => rootfs::blocking_unmount_all(&rootfs, Unmount::Detach)?,
        other => other?,
    }
    Ok(())
}

/// Has the engine delete the container. Returns why it has not.
fn delete_from_engine(leftovers: &Leftovers<'_>, engine: &CommandEngine, deadline: Instant) -> Result<Option<String>, Error> {
    let state = engine.state_of(leftovers.id);
    match is_of_another(leftovers, engine, deadline) {
        Ok(false) => {}
        Ok(true) => {
            return Ok(Some(format!("{} is the OCI runtime's state of another bundle's container; it is left alone", state.display())));
        }
        Err(error) => {
            let binary = engine.binary().display();
            return Ok(Some(format!("{binary} does not answer whose state {} is; it is left alone: {error}", state.display())));
        }
    }
    match helper::run(&engine.delete(&leftovers.at(), true), deadline) {
        Ok(exited) => match engine.interpret(Verb::Delete, &exited) {
            Ok(()) | Err(EngineError::NoContainer { .. }) => Ok(None),
            Err(error) => Ok(Some(error.to_string())),
        },
        Err(error) => match engine.blocking_explain(Verb::Delete) {
            Some(gone) if leftovers.init().is_none() => Ok(Some(gone.to_string())),
            Some(gone) => {
                remove_without_engine(leftovers, engine)?;
                Ok(Some(format!("{gone} (its state and the cgroup were removed without it)")))
            }
            None => Ok(Some(format!("{}: {error}", engine.binary().display()))),
        },
    }
}

/// Whether the engine's container of this id is of another bundle. The journal names the engine before the engine runs, and a keeper
/// that is killed records nothing of a Create that finds the id taken.
///
/// A half-created container names no bundle: another Create may be creating it, which takes a moment, or the runtime was killed.
///
/// Errors: the engine does not answer in time, and the journal does not show that the container is ours.
fn is_of_another(leftovers: &Leftovers<'_>, engine: &CommandEngine, deadline: Instant) -> io::Result<bool> {
    let is_made = leftovers.init().is_some();
    let until = deadline.min(Instant::now() + HALF_MADE_WITHIN);
    loop {
        match helper::run(&engine.state(&leftovers.at()), if is_made { until } else { deadline }) {
            Ok(exited) => {
                if let Some(is_ours) = engine.blocking_is_in_bundle(&leftovers.at(), &exited) {
                    return Ok(!is_ours);
                }
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut && !is_made => return Err(error),
            // Its program is missing, or it hangs: the deletion shows that.
            Err(_) => {}
        }
        if is_made || !engine.state_of(leftovers.id).exists() || Instant::now() >= until {
            return Ok(false);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Removes the state of an engine whose program is missing: the id would stay taken.
fn remove_without_engine(leftovers: &Leftovers<'_>, engine: &CommandEngine) -> Result<(), Error> {
    // From the journal, where it was checked to be an id: never a path from a command line.
    let Some(state) = leftovers.body.map(|body| engine.state_of(&body.id)) else { return Ok(()) };
    // The kernel takes a moment to release the cgroup of processes that have just exited.
    let until = Instant::now() + Duration::from_millis(300);
    while let Some(Err(source)) = leftovers.cgroup().map(|cgroup| cgroup.remove()) {
        if source.raw_os_error() != Some(libc::EBUSY) || Instant::now() >= until {
            eprintln!("containerd-shim-x-v2: delete {}: cannot remove its cgroup: {source}", leftovers.id);
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    match fs::remove_dir_all(&state) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(Error::Io { op: "remove", path: state, source }),
        _ => Ok(()),
    }
}

/// Whether something is mounted at or below the root filesystem. An error counts as yes.
fn is_mounted(leftovers: &Leftovers<'_>) -> bool {
    rootfs::blocking_is_mounted(&leftovers.rootfs()).unwrap_or(true)
}

/// A pidfd of exactly this process; absent if it has exited.
fn handle(process: ProcessIdentity) -> Option<OwnedFd> {
    let handle = sys::process::open(process.pid).ok()?;
    // Compared after the pidfd was opened: from then on a reused pid does not matter.
    if !process.exists() {
        return None;
    }
    // A zombie has exited, reaped or not.
    match wait::for_input(handle.as_fd(), Some(Instant::now())) {
        Ok(false) => Some(handle),
        Ok(true) | Err(_) => None,
    }
}

/// Whether a process exists and is not a zombie.
fn is_running(pid: u32) -> bool {
    let open: io::Result<OwnedFd> = sys::process::open(pid);
    open.is_ok_and(|handle| !wait::for_input(handle.as_fd(), Some(Instant::now())).unwrap_or(true))
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    fn sleeper() -> Child {
        Command::new("/bin/sleep").arg("1000").spawn().expect("sleep can be started")
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    fn body(init: ProcessIdentity) -> JournalBody {
        JournalBody { init: Some(init), ..JournalBody::default() }
    }

    #[test]
    fn the_process_in_the_journal_is_killed_though_it_stays_a_zombie() {
        let mut child = sleeper();
        let body = body(ProcessIdentity::of(child.id()).expect("is there"));
        let leftovers = Leftovers { id: "c1", bundle: Path::new("/nowhere"), body: Some(&body) };
        assert!(is_alive(&leftovers));
        assert_eq!(end_of_zombie(&leftovers), None);
        kill(&leftovers, soon()).expect("dies");
        assert_eq!(end_of_zombie(&leftovers), Some(137));
        assert!(!is_alive(&leftovers));
        kill(&leftovers, soon()).expect("is dead");
        let _ = child.wait();
        kill(&leftovers, soon()).expect("is gone");
        assert_eq!(end_of_zombie(&leftovers), None);
    }

    #[test]
    fn a_zombie_reports_its_exit_status() {
        let mut child = Command::new("/bin/sh").args(["-c", "exit 3"]).spawn().expect("sh can be started");
        let body = body(ProcessIdentity::of(child.id()).expect("is there"));
        let leftovers = Leftovers { id: "c1", bundle: Path::new("/nowhere"), body: Some(&body) };
        let handle = sys::process::open(child.id()).expect("is our child");
        assert!(wait::for_end(handle.as_fd(), soon()));
        assert_eq!(end_of_zombie(&leftovers), Some(3));
        let _ = child.wait();
    }

    #[test]
    fn a_process_that_only_has_the_number_is_left_alone() {
        let mut child = sleeper();
        let identity = ProcessIdentity::of(child.id()).expect("is there");
        let body = body(ProcessIdentity { start_time: identity.start_time.wrapping_sub(1), ..identity });
        let leftovers = Leftovers { id: "c1", bundle: Path::new("/nowhere"), body: Some(&body) };
        assert!(!is_alive(&leftovers));
        kill(&leftovers, soon()).expect("there is nothing to kill");
        assert!(child.try_wait().expect("is our child").is_none(), "it was killed");
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Leftovers in a temporary folder, and a runtime that notes its verbs.
    struct Scene {
        folder: scratch::Folder,
        body: JournalBody,
    }

    impl Scene {
        /// `state`: what the runtime does for the verb `state`, in shell.
        fn new(state: &str, init: Option<ProcessIdentity>) -> Self {
            let folder = scratch::Folder::new("leftovers");
            fs::create_dir_all(folder.join("root/c1")).expect("a folder");
            fs::create_dir_all(folder.join("cgroup")).expect("a folder");
            let runtime = folder.join("runtime");
            let script = format!("case \"$*\" in *' state '*) {state};; *) echo \"$*\" >> {};; esac", folder.join("verbs").display());
            // By a child: what a thread of this process writes, the fork of another may keep open.
            let write = r#"printf '#!/bin/sh\n%s\n' "$2" > "$1" && chmod 755 "$1""#;
            let written = Command::new("/bin/sh").args(["-c", write, "sh"]).arg(&runtime).arg(script).status();
            assert!(written.expect("sh can be started").success());
            let engine = serde_json::json!({ "binary": runtime, "root": folder.join("root"), "environment": ["PATH=/usr/bin:/bin"] });
            let cgroup = serde_json::to_value(Cgroup::V2(folder.join("cgroup"))).expect("serialisable");
            let body = JournalBody { id: "c1".into(), bundle: folder.to_owned(), engine, cgroup, init, ..JournalBody::default() };
            Self { folder, body }
        }

        fn leftovers(&self) -> Leftovers<'_> {
            Leftovers { id: "c1", bundle: &self.folder, body: Some(&self.body) }
        }

        /// Whether [`clean`] has the runtime delete.
        fn is_deleted(&self, within: Duration) -> bool {
            clean(&self.leftovers(), Instant::now() + within).expect("nothing is mounted");
            self.folder.join("verbs").exists()
        }
    }

    /// As runtimes print it, in shell.
    fn state_of_another() -> String {
        r#"echo '{"bundle":"/another"}'"#.to_owned()
    }

    /// Of an init that has exited.
    fn gone() -> ProcessIdentity {
        ProcessIdentity { pid: 1 << 30, start_time: 0 }
    }

    #[test]
    fn the_engine_is_not_asked_to_delete_a_container_that_may_be_anothers() {
        let long = Duration::from_secs(30);
        assert!(Scene::new(r#"echo "{\"bundle\":\"$PWD\"}""#, None).is_deleted(long));
        assert!(!Scene::new(&state_of_another(), None).is_deleted(long));
        assert!(!Scene::new("sleep 60", None).is_deleted(Duration::from_millis(1500)), "it does not answer");
        assert!(Scene::new("exit 1", None).is_deleted(long), "half created, and no Create goes on");
        assert!(Scene::new("sleep 60", Some(gone())).is_deleted(long), "the journal says that it is ours");
    }

    #[test]
    fn the_processes_of_another_container_in_the_same_cgroup_are_left_alone() {
        let mut child = sleeper();
        let is_killed = |state: &str| {
            let scene = Scene::new(state, Some(gone()));
            fs::write(scene.folder.join("cgroup/cgroup.procs"), child.id().to_string()).expect("a file");
            let is_done = kill(&scene.leftovers(), Instant::now() + Duration::from_millis(1500)).is_ok();
            // No cgroup: the write has no effect.
            assert_eq!(is_done, !scene.folder.join("cgroup/cgroup.kill").exists());
            !is_done
        };
        let is_anothers_killed = is_killed(&state_of_another());
        let is_ours_killed = is_killed("exit 1");
        let _ = child.kill();
        let _ = child.wait();
        assert!(!is_anothers_killed);
        assert!(is_ours_killed, "the engine has no container");
    }

    #[test]
    fn mounts_are_found_at_and_below_the_root() {
        let none = Leftovers { id: "c1", bundle: Path::new("/no/such/bundle"), body: None };
        assert!(!is_mounted(&none));
        let root = JournalBody { rootfs: Some("/proc".into()), ..JournalBody::default() };
        assert!(is_mounted(&Leftovers { body: Some(&root), ..none }));
    }
}
