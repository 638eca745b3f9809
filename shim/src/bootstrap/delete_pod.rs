//! `delete` for a pod: removes it in any state, with its containers and its keeper.
//!
//! containerd runs it after the shutdown of a pod, when the connection to its keeper has ended, and for what it finds of a pod when it starts.
//!
//! ```text
//!  keeper has the pod ─▶ keeper: DeletePod ─┬─ done ──────────────────────────────────────────────▶ files
//!                                           └─ fails, or no answer ─▶ keeper killed ─┐
//!  keeper silent ────────────────────────────────────────────────── keeper killed ───┤
//!  keeper dead ──────────────────────────────────────────────────────────────────────┴▶ containers, by their journals ─▶ cgroups, files, sockets
//! ```
//!
//! The keeper is found by the pod's name, which is its group's: asking all keepers of a host takes long.
//!
//! **Invariant:** as `delete`'s: only processes of the pod are signalled, and a second run does no harm.
use std::fs;
use std::os::fd::AsFd;
use std::path::Path;
use std::thread;
use std::time::Instant;

use nix::libc;

use super::delete::{KEEPER_WITHIN, UNKNOWN_STATUS, WITHIN, ask_worker, now_nanos, recorded_place, remove_stale};
use super::manual_cleanup::{self, Leftovers};
use super::{Error, native_cleanup, wait};
use crate::handover::{ControlRequest, POD_KEY, Snapshot};
use crate::invocation::Flags;
use crate::journal::{self, Journal, RecordedExit};
use crate::journal_body::JournalBody;
use crate::pod_folder::Slice;
use crate::run_dir::RunDir;
use crate::{control, pod_folder, sys};

/// Removes the pod of a bundle. Returns how it ended; nothing if the bundle is that of a container which has lost its configuration.
pub(super) fn delete(flags: &Flags, bundle: &Path, begun: Instant) -> Result<Option<RecordedExit>, Error> {
    let deadline = begun + WITHIN;
    let control = RunDir::from_environment().place(&flags.address, &flags.namespace, &flags.id, None)?.control;
    let keeper = match control::describe(&control, begun + KEEPER_WITHIN) {
        Ok(snapshot) if has_pod(&snapshot, &flags.id) => Some(snapshot.keeper_pid),
        Ok(snapshot) if snapshot.state.iter().any(|(key, _)| *key == flags.id) => return Ok(None),
        // It has removed the pod, or has not been given one: then it need not wait for that.
        Ok(_) => {
            let _ = control::ask(&control, &ControlRequest::Forget { id: flags.id.clone() }, begun + KEEPER_WITHIN);
            None
        }
        Err(error) if error.is_gone() => None,
        Err(_) => recorded_keeper(bundle, &control),
    };
    if let Some(pid) = keeper
        && ask_worker(&control, "DeletePod", &flags.id, begun).is_none()
    {
        eprintln!("containerd-shim-x-v2: delete {}: its shim does not answer, killing the keeper, pid {pid}", flags.id);
        kill(pid, deadline);
    }
    delete_containers(flags, bundle, deadline)?;
    let leftovers = pod_folder::Leftovers::blocking_read(bundle);
    leftovers.blocking_remove_cgroups();
    if let Some(slice) = leftovers.slice.filter(Slice::blocking_is_empty)
        && let Some(complaint) = native_cleanup::stop_unit(&slice.name, deadline)
    {
        eprintln!("containerd-shim-x-v2: delete {}: {complaint}", flags.id);
    }
    // Last: a second run finds in it what this one has not come to.
    let removed = pod_folder::blocking_remove(bundle);
    removed.map_err(|source| Error::Io { op: "remove", path: bundle.join(pod_folder::FOLDER), source })?;
    if let Some(place) = recorded_place(&control, bundle).filter(|place| place.socket.exists() || place.control.exists()) {
        remove_stale(&place);
    }
    Ok(Some(RecordedExit { pid: keeper.unwrap_or(0), status: UNKNOWN_STATUS, at_nanos: now_nanos() }))
}

fn has_pod(snapshot: &Snapshot, id: &str) -> bool {
    let read = |value: &[u8]| serde_json::from_slice::<serde_json::Value>(value).ok();
    let pod = snapshot.state.iter().find(|(key, _)| key == POD_KEY);
    // A record that cannot be read is another build's: the group has the pod's name.
    pod.is_some_and(|(_, value)| read(value).is_none_or(|record| record["id"] == id))
}

/// The keeper that `start` has recorded, if it is one of this control socket.
fn recorded_keeper(bundle: &Path, control: &Path) -> Option<u32> {
    let pid: u32 = fs::read_to_string(bundle.join("shim.pid")).ok()?.trim().parse().ok()?;
    let line = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let mut words = line.split(|byte| *byte == 0);
    words.any(|word| word == control.as_os_str().as_encoded_bytes()).then_some(pid)
}

fn kill(pid: u32, deadline: Instant) {
    if let Ok(process) = sys::process::open(pid) {
        let _ = sys::process::signal(process.as_fd(), libc::SIGKILL);
        wait::for_end(process.as_fd(), deadline);
    }
}

/// Ends the containers whose journals are there, all at once: each may take as long as the command may.
///
/// Errors: one has not exited, or cannot be removed.
fn delete_containers(flags: &Flags, bundle: &Path, deadline: Instant) -> Result<(), Error> {
    let journals = pod_folder::blocking_journals(bundle);
    thread::scope(|scope| {
        let deleting: Vec<_> = journals.iter().map(|(id, path)| scope.spawn(move || delete_container(flags, id, path, deadline))).collect();
        // One that panicked has been reported.
        deleting.into_iter().filter_map(|thread| thread.join().ok()).fold(Ok(()), Result::and)
    })
}

fn delete_container(flags: &Flags, id: &str, path: &Path, deadline: Instant) -> Result<(), Error> {
    let Ok(found) = journal::read(path) else { return Ok(()) };
    let Some(body) = found.body.as_deref().and_then(|bytes| JournalBody::decode(bytes).ok()) else { return Ok(()) };
    // A name that is none of this pod's.
    if body.id != id || body.namespace != flags.namespace {
        return Ok(());
    }
    let leftovers = Leftovers { id, bundle: &body.bundle, body: Some(&body) };
    if found.exit.is_some() && manual_cleanup::is_clean(&leftovers) {
        return Ok(());
    }
    let seen = manual_cleanup::end_of_zombie(&leftovers);
    manual_cleanup::kill(&leftovers, deadline)?;
    let has_exit = || journal::read(path).is_ok_and(|contents| contents.exit.is_some());
    if !has_exit() {
        let pid = body.init.map_or(0, |init| init.pid);
        let exit = RecordedExit { pid, status: seen.unwrap_or(UNKNOWN_STATUS), at_nanos: now_nanos() };
        if let Err(error) = Journal::open(path).and_then(|journal| journal.write_exit(exit)) {
            eprintln!("containerd-shim-x-v2: delete {}: cannot write the exit of {id} into its journal: {error}", flags.id);
        }
    }
    manual_cleanup::clean(&leftovers, deadline)
}
