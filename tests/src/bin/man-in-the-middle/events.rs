//! Between the shim and the receiver of its events: how faults change events.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context as _, Result};
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::{TaskExecStarted, TaskExit};
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::ttrpc::{Code, Request, Response};
use protobuf::Message as _;
use shim_tests::ttrpc::{Frame, RESPONSE};

use super::calls::{Shared, edit, read_frame, status};
use super::requests::AN_EVENT;

/// State shared by all connections.
#[derive(Default)]
struct Memory {
    held: Mutex<Option<Frame>>,
    /// The first process that was started with a pid.
    owners: Mutex<BTreeMap<u32, String>>,
}

/// The effect on an event.
enum Then {
    /// Takes it, and keeps it.
    Drop,
    /// Forwards it after the next one.
    Late,
    Twice,
    /// Forwards it with this change.
    Change(fn(&Memory, &mut Envelope) -> Result<()>),
}

use Then::{Change, Drop, Late, Twice};

const EXIT_OF_INIT: &str = "/tasks/exit of init";

/// Fault, topic (none: all), and effect.
const RULES: &[(&str, &str, Then)] = &[
    ("drop-exit", EXIT_OF_INIT, Drop),
    ("drop-paused", "/tasks/paused", Drop),
    ("drop-oom", "/tasks/oom", Drop),
    ("late-start", "/tasks/start", Late),
    ("late-exec-started", "/tasks/exec-started", Late),
    ("double-exit", "/tasks/exit", Twice),
    ("wrong-namespace", "", Change(|_, envelope| rename(&mut envelope.namespace, "elsewhere"))),
    ("drop-create", "/tasks/create", Drop),
    (
        "wrong-event-pid",
        "/tasks/exec-started",
        Change(|_, envelope| edit_event(envelope, |started: &mut TaskExecStarted| started.pid += 1)),
    ),
    ("first-owner", "/tasks/exec-started", Change(note_owner)),
    ("first-owner", "/tasks/exit", Change(credit_owner)),
];

pub(super) fn accept(listener: &UnixListener, daemon: &Path, shared: &Arc<Shared>) {
    let memory = Arc::new(Memory::default());
    for shim in listener.incoming().flatten() {
        let (daemon, shared, memory) = (daemon.to_owned(), Arc::clone(shared), Arc::clone(&memory));
        thread::spawn(move || drop(serve(shim, &daemon, &shared, &memory)));
    }
}

/// Forwards events, one after another, each with its answer; closes the connection when the daemon does.
fn serve(mut shim: UnixStream, daemon: &Path, shared: &Arc<Shared>, memory: &Memory) -> Result<()> {
    let mut upstream = UnixStream::connect(daemon)?;
    let (mut from_shim, mut from_daemon) = (Vec::new(), Vec::new());
    while let Some(mut frame) = read_frame(&mut shim, &mut from_shim)? {
        let _until_it_is_taken = shared.begin(AN_EVENT);
        let stream = frame.stream;
        let mut before = None;
        match rule_of(&frame, &shared.fault)? {
            None => {}
            Some(Drop) => {
                shim.write_all(&accepted(stream)?)?;
                continue;
            }
            Some(Late) => {
                shim.write_all(&accepted(stream)?)?;
                *memory.held.lock().expect("no panic under this lock") = Some(frame);
                continue;
            }
            Some(Twice) => before = Some(frame.clone()),
            Some(Change(change)) => change_envelope(&mut frame, |envelope| change(memory, envelope))?,
        }
        let late = memory.held.lock().expect("no panic under this lock").take();
        let mut answer = None;
        for next in before.into_iter().chain([frame]).chain(late) {
            upstream.write_all(&next.encode())?;
            let reply = read_frame(&mut upstream, &mut from_daemon)?.context("the daemon closed the connection")?;
            answer.get_or_insert(reply);
        }
        match answer {
            Some(reply) if shared.is("give-events-up") && reply.answer().is_err() => shim.write_all(&accepted(stream)?)?,
            Some(reply) => shim.write_all(&Frame { stream, ..reply }.encode())?,
            None => {}
        }
    }
    Ok(())
}

/// Applies the fault to an event.
fn rule_of(frame: &Frame, fault: &str) -> Result<Option<&'static Then>> {
    let forward = ForwardRequest::parse_from_bytes(&Request::parse_from_bytes(&frame.payload)?.payload)?;
    let envelope = forward.envelope.into_option().context("an event without an envelope")?;
    let of_init = is_init_exit(&envelope);
    let is_of = |wanted: &str| wanted.is_empty() || wanted == envelope.topic || of_init && wanted == EXIT_OF_INIT;
    Ok(RULES.iter().find(|(name, topic, _)| *name == fault && is_of(topic)).map(|(_, _, then)| then))
}

fn is_init_exit(envelope: &Envelope) -> bool {
    let exit = TaskExit::parse_from_bytes(&envelope.event.value);
    envelope.topic == "/tasks/exit" && exit.is_ok_and(|exit| exit.id == exit.container_id)
}

fn change_envelope(frame: &mut Frame, change: impl FnOnce(&mut Envelope) -> Result<()>) -> Result<()> {
    let mut request = Request::parse_from_bytes(&frame.payload)?;
    let mut forward = ForwardRequest::parse_from_bytes(&request.payload)?;
    change(forward.envelope.as_mut().context("an event without an envelope")?)?;
    request.payload = forward.write_to_bytes()?;
    frame.payload = request.write_to_bytes()?;
    Ok(())
}

fn rename(field: &mut String, name: &str) -> Result<()> {
    name.clone_into(field);
    Ok(())
}

fn edit_event<M: protobuf::Message>(envelope: &mut Envelope, change: impl FnOnce(&mut M)) -> Result<()> {
    edit(&mut envelope.event.as_mut().context("no event")?.value, change)
}

fn note_owner(memory: &Memory, envelope: &mut Envelope) -> Result<()> {
    let started = TaskExecStarted::parse_from_bytes(&envelope.event.value)?;
    memory.owners.lock().expect("no panic under this lock").entry(started.pid).or_insert(started.exec_id);
    Ok(())
}

fn credit_owner(memory: &Memory, envelope: &mut Envelope) -> Result<()> {
    let owners = memory.owners.lock().expect("no panic under this lock");
    edit_event(envelope, |exit: &mut TaskExit| {
        if let Some(owner) = owners.get(&exit.pid) {
            exit.id.clone_from(owner);
        }
    })
}

fn accepted(stream: u32) -> Result<Vec<u8>> {
    let response = Response { status: status(Code::OK), ..Default::default() };
    Ok(Frame { stream, kind: RESPONSE, payload: response.write_to_bytes()? }.encode())
}
