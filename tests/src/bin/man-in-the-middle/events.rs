//! Between the shim and whoever takes its events.

use std::io::Write as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;

use anyhow::{Context as _, Result};
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::events::task::TaskExecStarted;
use containerd_shim_protos::ttrpc::{Request, Response, Status};
use protobuf::{Message as _, MessageField};
use shim_tests::ttrpc::{Frame, RESPONSE};

use super::calls::read_frame;

type Held = Arc<Mutex<Option<Frame>>>;

pub(super) fn accept(listener: &UnixListener, daemon: &Path, fault: &str) {
    let held = Held::default();
    for shim in listener.incoming().flatten() {
        let (daemon, fault, held) = (daemon.to_owned(), fault.to_owned(), Arc::clone(&held));
        thread::spawn(move || drop(serve(shim, &daemon, &fault, &held)));
    }
}

/// Passes events on, one after another, each with its answer; hangs up when the daemon does.
fn serve(mut shim: UnixStream, daemon: &Path, fault: &str, held: &Held) -> Result<()> {
    let mut upstream = UnixStream::connect(daemon)?;
    let (mut from_shim, mut from_daemon) = (Vec::new(), Vec::new());
    while let Some(mut frame) = read_frame(&mut shim, &mut from_shim)? {
        let topic = change(&mut frame, fault)?;
        let is = |name: &str, wanted: &str| fault == name && topic == wanted;
        if is("drop-exit", "/tasks/exit") && is_init(&frame)? || is("drop-paused", "/tasks/paused") || is("drop-oom", "/tasks/oom") {
            shim.write_all(&accepted(frame.stream)?)?;
            continue;
        }
        if is("late-start", "/tasks/start") || is("late-exec-started", "/tasks/exec-started") {
            shim.write_all(&accepted(frame.stream)?)?;
            *held.lock().expect("no panic under this lock") = Some(frame);
            continue;
        }
        let before = if is("double-exit", "/tasks/exit") { Some(frame.clone()) } else { None };
        let late = held.lock().expect("no panic under this lock").take();
        let stream = frame.stream;
        let mut answer = None;
        for next in before.into_iter().chain([frame]).chain(late) {
            upstream.write_all(&next.encode())?;
            let reply = read_frame(&mut upstream, &mut from_daemon)?.context("the daemon hung up")?;
            answer.get_or_insert(reply);
        }
        match answer {
            Some(reply) if fault == "give-events-up" && reply.answer().is_err() => shim.write_all(&accepted(stream)?)?,
            Some(reply) => shim.write_all(&Frame { stream, ..reply }.encode())?,
            None => {}
        }
    }
    Ok(())
}

fn forward_of(frame: &Frame) -> Result<(Request, ForwardRequest)> {
    let request = Request::parse_from_bytes(&frame.payload)?;
    let forward = ForwardRequest::parse_from_bytes(&request.payload)?;
    Ok((request, forward))
}

/// Changes what the fault says, and returns the topic.
fn change(frame: &mut Frame, fault: &str) -> Result<String> {
    let (mut request, mut forward) = forward_of(frame)?;
    let envelope = forward.envelope.as_mut().context("an event without an envelope")?;
    let topic = envelope.topic.clone();
    match fault {
        "wrong-namespace" => envelope.namespace = "elsewhere".to_owned(),
        "wrong-event-pid" if topic == "/tasks/exec-started" => {
            let event = envelope.event.as_mut().context("no event")?;
            let mut started = TaskExecStarted::parse_from_bytes(&event.value)?;
            started.pid += 1;
            event.value = started.write_to_bytes()?;
        }
        _ => return Ok(topic),
    }
    request.payload = forward.write_to_bytes()?;
    frame.payload = request.write_to_bytes()?;
    Ok(topic)
}

fn is_init(frame: &Frame) -> Result<bool> {
    let (_, forward) = forward_of(frame)?;
    let event = forward.envelope.into_option().and_then(|envelope| envelope.event.into_option()).context("no event")?;
    let exit = containerd_shim_protos::events::task::TaskExit::parse_from_bytes(&event.value)?;
    Ok(exit.id == exit.container_id)
}

fn accepted(stream: u32) -> Result<Vec<u8>> {
    let response = Response { status: MessageField::some(Status::default()), ..Default::default() };
    Ok(Frame { stream, kind: RESPONSE, payload: response.write_to_bytes()? }.encode())
}
