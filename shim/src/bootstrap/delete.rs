//! `delete`: removes a container in any state, and reports its exit to containerd.
//!
//! Owns the order of the sources of the exit. containerd runs this after every deletion and when a shim does not answer, and
//! waits five seconds at most.
//!
//! ```text
//!  journal has the exit, keeper does not have the container ───────────▶ answer from the record
//!  keeper has it, or may ───▶ keeper: Delete ─┬─ done ─────────────────▶ answer from the record
//!                                             └─ fails, or no answer ─┐
//!  keeper dead ───────────────────────────────────────────────────────┴▶ manual cleanup, answer from the record
//!  no bundle: find the container's keeper among all keepers, then as above
//!  no journal: the container was never created ────────────────────────▶ unmount, 137 now
//! ```
//!
//! **Invariant:** only processes of the container are signalled: through a pidfd, after comparing the start time. A
//! second run gives the same answer.
use std::io::{self, Write};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::DeleteResponse;
use protobuf::well_known_types::timestamp::Timestamp;
use protobuf::{Message, MessageField};

use super::manual_cleanup::{self, Leftovers};
use super::socket::{self, Lock};
use super::{Error, delete_pod, group, start};
use crate::commands::survey::{Found, Shim, survey};
use crate::control;
use crate::handover::{CONTROL_SERVICE, ControlReply, ControlRequest, ReportedExit, Snapshot};
use crate::invocation::{Flags, Query};
use crate::journal::{self, Contents, RecordedExit};
use crate::journal_body::{JournalBody, ProcessIdentity};
use crate::run_dir::{Place, RunDir};

/// containerd kills a `delete` that takes longer than 5 s. Backwards from there: time for the manual cleanup, for the worker, and for a
/// keeper's snapshot.
pub(super) const WITHIN: Duration = Duration::from_millis(3900);
pub(super) const WORKER_WITHIN: Duration = Duration::from_millis(2300);
pub(super) const KEEPER_WITHIN: Duration = Duration::from_millis(600);

/// The status of a container whose exit is unknown, the stock shim's: killed.
pub(super) const UNKNOWN_STATUS: u32 = 128 + 9;

/// Removes a container and prints its exit.
pub(crate) fn delete(flags: &Flags) -> Result<(), Error> {
    let begun = Instant::now();
    let bundle = start::bundle_of(flags)?;
    if start::is_of_pod(&bundle)
        && !bundle.join(journal::FILE_NAME).exists()
        && let Some(exit) = delete_pod::delete(flags, &bundle, begun)?
    {
        return print(exit);
    }
    let deletion = Deletion::new(flags, &bundle, begun)?;
    let exit = deletion.perform()?;
    print(exit)
}

struct Deletion<'a> {
    flags: &'a Flags,
    bundle: &'a Path,
    begun: Instant,
    /// The journal as first read.
    found: Contents,
    body: Option<JournalBody>,
    /// Absent if unknown: there is neither a journal nor a configuration that names the group.
    control: Option<PathBuf>,
}

/// What a keeper reports about a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keeper {
    /// It does not run, or another keeper runs in its place.
    Dead,
    /// It runs and does not answer.
    Silent,
    /// It does not have the container, or has deleted it.
    KnowsNothing,
    /// It has the container, or handles a request that may concern it.
    MayKnow,
}

impl<'a> Deletion<'a> {
    fn new(flags: &'a Flags, bundle: &'a Path, begun: Instant) -> Result<Self, Error> {
        let found = match journal::read(&bundle.join(journal::FILE_NAME)) {
            Ok(found) => found,
            // Not a journal: treated as absent.
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::InvalidData) => Contents::default(),
            Err(source) => return Err(Error::Io { op: "read", path: bundle.join(journal::FILE_NAME), source }),
        };
        let body = found.body.as_deref().and_then(|bytes| JournalBody::decode(bytes).ok());
        let control = match &body {
            Some(body) => Some(body.control_path.clone()),
            None if !bundle.join("config.json").exists() => keeper_of(flags, bundle).or_else(|| place_of(flags, bundle)),
            None => place_of(flags, bundle),
        };
        Ok(Self { flags, bundle, begun, found, body, control })
    }

    fn perform(&self) -> Result<RecordedExit, Error> {
        let keeper = self.ask_keeper();
        match (keeper, self.recorded()) {
            (Keeper::KnowsNothing, Some(exit)) => return Ok(exit),
            // The keeper has exited, as keepers do after the last deletion, or was killed on the way.
            (Keeper::Dead, Some(exit)) if manual_cleanup::is_clean(&self.leftovers()) => {
                self.remove_sockets();
                return Ok(exit);
            }
            (Keeper::MayKnow, _) => {
                if let Some(reported) = self.ask_worker()
                    && let Some(exit) = self.recorded_now().or(reported)
                {
                    return Ok(exit);
                }
            }
            _ => {}
        }
        let leftovers = self.leftovers();
        let deadline = self.begun + WITHIN;
        // A keeper that hangs has not reaped it: the kernel still has the status.
        let seen = manual_cleanup::end_of_zombie(&leftovers);
        manual_cleanup::kill(&leftovers, deadline)?;
        let exit = self.true_end(keeper, seen.unwrap_or(UNKNOWN_STATUS), deadline);
        manual_cleanup::clean(&leftovers, deadline)?;
        if self.body.is_some() && self.recorded_now().is_none() {
            self.record(exit);
        }
        if keeper == Keeper::Dead {
            self.remove_sockets();
        } else {
            self.tell_keeper();
        }
        Ok(exit)
    }

    /// Has the keeper forget what was removed without it, so that it does not stay for a deleted container. If it does not answer, the
    /// next `delete` asks again, or an operator ends it: the container is removed in any case.
    fn tell_keeper(&self) {
        if let Some(control) = &self.control {
            let request = ControlRequest::Forget { id: self.flags.id.clone() };
            let _ = control::ask(control, &request, self.begun + WITHIN);
        }
    }

    /// The exit in the journal as first read.
    fn recorded(&self) -> Option<RecordedExit> {
        self.found.exit
    }

    /// The exit in the journal as it is now.
    fn recorded_now(&self) -> Option<RecordedExit> {
        journal::read(&self.bundle.join(journal::FILE_NAME)).ok()?.exit
    }

    fn ask_keeper(&self) -> Keeper {
        let Some(control) = &self.control else { return Keeper::Dead };
        match control::describe(control, self.begun + KEEPER_WITHIN) {
            Ok(snapshot) => self.judge(&snapshot),
            Err(error) if error.is_gone() => Keeper::Dead,
            Err(_) => Keeper::Silent,
        }
    }

    fn judge(&self, snapshot: &Snapshot) -> Keeper {
        let id = &self.flags.id;
        let knows = snapshot.state.iter().any(|(key, _)| key == id) || snapshot.reservations.contains(id);
        // A Create under way has saved nothing so far.
        let may_make_it = snapshot.requests.iter().any(|request| request.method == "Create");
        match &self.body {
            _ if knows || may_make_it => Keeper::MayKnow,
            // Another keeper has the place of the dead one.
            Some(body) if body.keeper.pid != snapshot.keeper_pid => Keeper::Dead,
            _ => Keeper::KnowsNothing,
        }
    }

    /// Has the worker delete the container, in turn with the container's other requests. Absent if it does not answer with success;
    /// else its report of the exit.
    fn ask_worker(&self) -> Option<Option<RecordedExit>> {
        ask_worker(self.control.as_ref()?, "Delete", &self.flags.id, self.begun).map(|payload| told_exit(&payload))
    }

    fn leftovers(&self) -> Leftovers<'_> {
        Leftovers { id: &self.flags.id, bundle: self.bundle, body: self.body.as_ref() }
    }

    /// The container's exit: as its keeper recorded it, or by this command's SIGKILL. A running keeper needs a moment to record it.
    fn true_end(&self, keeper: Keeper, otherwise: u32, deadline: Instant) -> RecordedExit {
        let pid = self.body.as_ref().and_then(|body| body.init).map_or(0, |init| init.pid);
        let will_be_recorded = pid != 0 && matches!(keeper, Keeper::KnowsNothing | Keeper::MayKnow);
        loop {
            if let Some(exit) = self.recorded_now() {
                return exit;
            }
            if !will_be_recorded || Instant::now() >= deadline.min(self.begun + WITHIN * 3 / 4) {
                return RecordedExit { pid, status: otherwise, at_nanos: now_nanos() };
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Writes the answer into the journal, so that a second run gives the same.
    fn record(&self, exit: RecordedExit) {
        let written = journal::Journal::open(&self.bundle.join(journal::FILE_NAME)).and_then(|journal| journal.write_exit(exit));
        if let Err(error) = written {
            eprintln!("containerd-shim-x-v2: delete {}: cannot write the exit into the journal: {error}", self.flags.id);
        }
    }

    /// Removes the sockets of a dead keeper, unless another keeper uses them by now.
    fn remove_sockets(&self) {
        let Some(place) = self.control.as_deref().and_then(|control| recorded_place(control, self.bundle)) else { return };
        // A keeper that exits removes its sockets. One that was killed leaves them, and may leave console sockets.
        if !place.socket.exists() && !place.control.exists() {
            return;
        }
        self.remove_console_sockets();
        remove_stale(&place);
    }

    /// Removes the console sockets of the dead keeper, unless its pid was reused.
    fn remove_console_sockets(&self) {
        let Some(body) = &self.body else { return };
        // A keeper that was killed stays a zombie until its parent reaps it.
        if ProcessIdentity::of(body.keeper.pid).is_some_and(|found| found != body.keeper || found.is_running()) {
            return;
        }
        let prefix = format!("c{}-", body.keeper.pid);
        let folder = body.control_path.parent().and_then(|folder| folder.read_dir().ok());
        for entry in folder.into_iter().flatten().flatten() {
            let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
            if is_socket && entry.file_name().to_string_lossy().starts_with(&prefix) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }
}

/// Has the worker behind a control socket delete something, in turn with the container's other requests. Absent if it does not answer with success.
pub(super) fn ask_worker(control: &Path, method: &str, id: &str, begun: Instant) -> Option<Vec<u8>> {
    let request = ttrpc::Request {
        service: CONTROL_SERVICE.to_owned(),
        method: method.to_owned(),
        payload: serde_json::json!({ "id": id }).to_string().into_bytes(),
        timeout_nano: i64::try_from(WORKER_WITHIN.as_nanos()).unwrap_or(i64::MAX),
        ..ttrpc::Request::new()
    };
    let payload = request.write_to_bytes().ok()?;
    let reply = control::ask(control, &ControlRequest::Ask { payload }, begun + WORKER_WITHIN).ok()?;
    let ControlReply::Answer { response } = reply else { return None };
    let response = ttrpc::Response::parse_from_bytes(&response).ok()?;
    (response.status.code.value() == 0).then_some(response.payload)
}

/// The sockets of a dead keeper. The bundle names the clients' one, whose folder the daemon chooses.
pub(super) fn recorded_place(control: &Path, bundle: &Path) -> Option<Place> {
    let name = control.file_stem()?;
    let recorded = std::fs::read_to_string(bundle.join("address")).ok();
    let recorded = recorded.as_deref().and_then(|address| address.strip_prefix("unix://")).map(PathBuf::from);
    // The path comes from a file: only a socket with a shim's name is removed.
    let recorded = recorded.filter(|socket| socket.file_name() == Some(name));
    let socket = recorded.unwrap_or_else(|| RunDir::from_environment().sockets().join(name));
    Some(Place { socket, lock: control.with_extension("lock"), control: control.to_owned() })
}

/// Removes sockets, unless a keeper listens there.
pub(super) fn remove_stale(place: &Place) {
    let Ok(_lock) = Lock::take(&place.lock, Instant::now() + Duration::from_millis(100)) else { return };
    if !control::is_listening(&place.control, Duration::from_millis(50)) {
        let _ = socket::remove_stale(place);
    }
}

/// The control socket of the shim of a container that has no journal: it was never created.
fn place_of(flags: &Flags, bundle: &Path) -> Option<PathBuf> {
    let group = group::of_bundle(bundle).unwrap_or_default();
    let group = group.as_deref().unwrap_or(&flags.id);
    RunDir::from_environment().place(&flags.address, &flags.namespace, group, None).ok().map(|place| place.control)
}

/// The control socket of the shim that has the container, found without the bundle: a containerd that does not find the
/// shim's program at its start removes the bundle of a running container.
fn keeper_of(flags: &Flags, bundle: &Path) -> Option<PathBuf> {
    let query = Query { namespace: Some(flags.namespace.clone()), ..Query::default() };
    let has_it = |shim: &Shim| match &shim.found {
        Found::Alive(snapshot) => {
            snapshot.state.iter().any(|(id, state)| *id == flags.id && start::bundle_in(state).as_deref() == Some(bundle))
        }
        Found::Silent(_) | Found::Dead => false,
    };
    survey(&query).ok()?.into_iter().find(has_it).map(|shim| shim.control)
}

/// The exit in the worker's answer. Absent for a container that never ran.
fn told_exit(payload: &[u8]) -> Option<RecordedExit> {
    let reported = ReportedExit::decode(payload)?;
    Some(RecordedExit { pid: reported.pid.unwrap_or(0), status: reported.status?, at_nanos: reported.at_nanos.unwrap_or_else(now_nanos) })
}

pub(super) fn now_nanos() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_nanos()).unwrap_or(i64::MAX))
}

fn print(exit: RecordedExit) -> Result<(), Error> {
    let mut stamp = Timestamp::new();
    stamp.seconds = exit.at_nanos.div_euclid(1_000_000_000);
    stamp.nanos = exit.at_nanos.rem_euclid(1_000_000_000) as i32;
    let mut response = DeleteResponse::new();
    response.pid = exit.pid;
    response.exit_status = exit.status;
    response.exited_at = MessageField::some(stamp);
    let bytes = response.write_to_bytes().map_err(|error| Error::Stdout { source: io::Error::other(error) })?;
    io::stdout().lock().write_all(&bytes).map_err(|source| Error::Stdout { source })
}
