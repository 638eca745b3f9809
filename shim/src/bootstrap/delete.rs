//! `delete`: whatever became of a container, it is gone afterwards, and containerd is told how it ended.
//!
//! Owns the order in which the truth is asked for. containerd runs this after every deletion and when a shim does not answer, and
//! waits five seconds at most.
//!
//! ```text
//!  journal says how it ended, keeper does not know it ─────────────────▶ answer from the record
//!  keeper knows it, or may ─▶ keeper: Delete ─┬─ done ─────────────────▶ answer from the record
//!                                             └─ fails, or no answer ─┐
//!  keeper dead ───────────────────────────────────────────────────────┴▶ manual cleanup, answer from the record
//!  no bundle any more: the keepers are asked whose the container is, then as above
//!  no journal: no container was ever made ─────────────────────────────▶ unmount, 137 now
//! ```
//!
//! **Invariant:** no process is signalled unless it is certainly the container's: by a handle, after its start time was compared. A
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
use super::{Error, group, start};
use crate::commands::survey::{Found, Shim, survey};
use crate::control;
use crate::handover::{CONTROL_SERVICE, ControlReply, ControlRequest, ReportedExit, Snapshot};
use crate::invocation::{Flags, Query};
use crate::journal::{self, Contents, RecordedExit};
use crate::journal_body::{JournalBody, ProcessIdentity};
use crate::run_dir::{Place, RunDir};

/// containerd kills a `delete` that takes longer than 5 s. From there on backwards: time for our own hands, for the worker, and for a
/// keeper to say what it knows.
const WITHIN: Duration = Duration::from_millis(3900);
const WORKER_WITHIN: Duration = Duration::from_millis(2300);
const KEEPER_WITHIN: Duration = Duration::from_millis(600);

/// The status of a container whose end nobody has seen, as containerd's own shim gives it: killed.
const UNKNOWN_STATUS: u32 = 128 + 9;

/// Removes what is left of a container and prints how it ended.
pub(crate) fn delete(flags: &Flags) -> Result<(), Error> {
    let begun = Instant::now();
    let bundle = start::bundle_of(flags)?;
    let deletion = Deletion::new(flags, &bundle, begun)?;
    let exit = deletion.perform()?;
    print(exit)
}

struct Deletion<'a> {
    flags: &'a Flags,
    bundle: &'a Path,
    begun: Instant,
    /// What the journal said when we came.
    found: Contents,
    body: Option<JournalBody>,
    /// Absent where nobody can know: there is no journal, and no configuration that tells the group.
    control: Option<PathBuf>,
}

/// What a keeper says about a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keeper {
    /// There is none, or not the one that made the container.
    Dead,
    /// It is there and does not answer.
    Silent,
    /// It has never heard of it, or has deleted it.
    KnowsNothing,
    /// It has it, or does something that may concern it.
    MayKnow,
}

impl<'a> Deletion<'a> {
    fn new(flags: &'a Flags, bundle: &'a Path, begun: Instant) -> Result<Self, Error> {
        let found = match journal::read(&bundle.join(journal::FILE_NAME)) {
            Ok(found) => found,
            // Not a journal: then there is nothing to learn from it.
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
            // The keeper has left, as keepers do after the last deletion, unless it was killed on its way.
            (Keeper::Dead, Some(exit)) if manual_cleanup::is_clean(&self.leftovers()) => {
                self.remove_sockets();
                return Ok(exit);
            }
            (Keeper::MayKnow, _) => {
                if let Some(told) = self.ask_worker()
                    && let Some(exit) = self.recorded_now().or(told)
                {
                    return Ok(exit);
                }
            }
            _ => {}
        }
        let leftovers = self.leftovers();
        let deadline = self.begun + WITHIN;
        // A keeper that hangs has not reaped it: the kernel still knows.
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

    /// Has the keeper forget what was removed without it, so that it does not stay for a container that is gone. One that does not
    /// answer is asked by the next `delete`, or ends by hand: the container is gone in any case.
    fn tell_keeper(&self) {
        if let Some(control) = &self.control {
            let request = ControlRequest::Forget { id: self.flags.id.clone() };
            let _ = control::ask(control, &request, self.begun + WITHIN);
        }
    }

    /// The exit in the journal that we found.
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
        // A Create that is under way has left nothing in the state so far.
        let may_make_it = snapshot.requests.iter().any(|request| request.method == "Create");
        match &self.body {
            _ if knows || may_make_it => Keeper::MayKnow,
            // Another keeper has the place of the dead one.
            Some(body) if body.keeper.pid != snapshot.keeper_pid => Keeper::Dead,
            _ => Keeper::KnowsNothing,
        }
    }

    /// Has the worker delete the container, in its turn among the container's other requests. Absent if it does not say that it did;
    /// else what it says about the end.
    fn ask_worker(&self) -> Option<Option<RecordedExit>> {
        let control = self.control.as_ref()?;
        let request = ttrpc::Request {
            service: CONTROL_SERVICE.to_owned(),
            method: "Delete".to_owned(),
            payload: serde_json::json!({ "id": self.flags.id }).to_string().into_bytes(),
            timeout_nano: i64::try_from(WORKER_WITHIN.as_nanos()).unwrap_or(i64::MAX),
            ..ttrpc::Request::new()
        };
        let payload = request.write_to_bytes().ok()?;
        let reply = control::ask(control, &ControlRequest::Ask { payload }, self.begun + WORKER_WITHIN).ok()?;
        let ControlReply::Answer { response } = reply else { return None };
        let response = ttrpc::Response::parse_from_bytes(&response).ok()?;
        (response.status.code.value() == 0).then(|| told_exit(&response.payload))
    }

    fn leftovers(&self) -> Leftovers<'_> {
        Leftovers { id: &self.flags.id, bundle: self.bundle, body: self.body.as_ref() }
    }

    /// How the container ended: as its keeper saw it, or at our hands. A living keeper needs a moment to see it.
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

    /// Writes down what we answer: a second run shall say the same.
    fn record(&self, exit: RecordedExit) {
        let written = journal::Journal::open(&self.bundle.join(journal::FILE_NAME)).and_then(|journal| journal.write_exit(exit));
        if let Err(error) = written {
            eprintln!("containerd-shim-x-v2: delete {}: the journal does not take the exit: {error}", self.flags.id);
        }
    }

    /// Removes the sockets of a keeper that is dead, unless another has their place by now.
    fn remove_sockets(&self) {
        self.remove_console_sockets();
        let Some(place) = self.place() else { return };
        if !place.socket.exists() && !place.control.exists() {
            return;
        }
        let Ok(_lock) = Lock::take(&place.lock, Instant::now() + Duration::from_millis(100)) else { return };
        if !control::is_listening(&place.control, Duration::from_millis(50)) {
            let _ = socket::remove_stale(&place);
        }
    }

    /// Removes the sockets on which the dead keeper waited for terminals, unless another process has its number by now.
    fn remove_console_sockets(&self) {
        let Some(body) = self.body.as_ref().filter(|body| ProcessIdentity::of(body.keeper.pid).is_none()) else { return };
        let prefix = format!("c{}-", body.keeper.pid);
        let folder = body.control_path.parent().and_then(|folder| folder.read_dir().ok());
        for entry in folder.into_iter().flatten().flatten() {
            let is_socket = entry.file_type().is_ok_and(|kind| kind.is_socket());
            if is_socket && entry.file_name().to_string_lossy().starts_with(&prefix) {
                let _ = std::fs::remove_file(entry.path());
            }
        }
    }

    /// Where the dead keeper's sockets are. The bundle tells the clients' one, which a daemon may have put anywhere.
    fn place(&self) -> Option<Place> {
        let control = self.control.clone()?;
        let name = control.file_stem()?;
        let told = std::fs::read_to_string(self.bundle.join("address")).ok();
        let told = told.as_deref().and_then(|address| address.strip_prefix("unix://")).map(PathBuf::from);
        // The path comes from a file: nothing is removed but a socket of the shim's own name.
        let told = told.filter(|socket| socket.file_name() == Some(name));
        let socket = told.unwrap_or_else(|| RunDir::from_environment().sockets().join(name));
        Some(Place { socket, lock: control.with_extension("lock"), control })
    }
}

/// The control socket of the shim of a container that has no journal: it was never created.
fn place_of(flags: &Flags, bundle: &Path) -> Option<PathBuf> {
    let group = group::of_bundle(bundle).unwrap_or_default();
    let group = group.as_deref().unwrap_or(&flags.id);
    RunDir::from_environment().place(&flags.address, &flags.namespace, group, None).ok().map(|place| place.control)
}

/// The control socket of the shim that has the container, though nothing in the bundle says so: a containerd that does not find the
/// shim's program when it starts removes the bundle of a container that runs.
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

/// What the worker's answer says of the end. Absent for a container that never ran.
fn told_exit(payload: &[u8]) -> Option<RecordedExit> {
    let told = ReportedExit::decode(payload)?;
    Some(RecordedExit { pid: told.pid.unwrap_or(0), status: told.status?, at_nanos: told.at_nanos.unwrap_or_else(now_nanos) })
}

fn now_nanos() -> i64 {
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
