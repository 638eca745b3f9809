//! A fake containerd for shims: the service that receives events. It accepts, refuses, does not answer or disconnects as the test says.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use containerd_client::types::Envelope;
use containerd_shim_protos::api::ForwardRequest;
use containerd_shim_protos::ttrpc::{Request, Response, Status};
use nix::unistd::unlink;
use prost::Message as _;
use protobuf::{EnumOrUnknown, Message as _, MessageField};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{AbortHandle, JoinSet};

use crate::events::{Event, Events, decode};
use crate::trace;
use crate::ttrpc::{Code, Frame, RESPONSE, take_frame};

/// How it handles an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manner {
    /// Takes it.
    Accept,
    /// Answers with a status that is not OK.
    Refuse(Code),
    /// Closes the connection after the event without an answer, like a daemon that crashes: the shim cannot know whether it was accepted.
    HangUp {
        /// Whether the event is in the list.
        taken: bool,
    },
    /// Closes the connection after half of the event.
    HangUpEarly,
    /// Answers with invalid bytes.
    Garbage,
    /// Does not answer.
    Silent,
}

/// A listener on containerd's ttrpc socket.
#[derive(Debug)]
pub struct FakeContainerd {
    path: PathBuf,
    shared: Arc<Shared>,
    listener: Mutex<Option<AbortHandle>>,
}

#[derive(Debug)]
struct Shared {
    manner: Mutex<Manner>,
    events: Events,
    /// All requests that arrived, accepted or not.
    tries: Mutex<Vec<String>>,
    namespaces: Mutex<BTreeSet<String>>,
    /// The accepted and acknowledged ones.
    acknowledged: Mutex<Vec<Event>>,
}

impl FakeContainerd {
    /// Listens at `path` and accepts.
    pub fn listen(path: &Path) -> Result<Self> {
        let shared = Shared {
            manner: Mutex::new(Manner::Accept),
            events: Events::default(),
            tries: Mutex::default(),
            namespaces: Mutex::default(),
            acknowledged: Mutex::default(),
        };
        let fake = Self { path: path.to_owned(), shared: Arc::new(shared), listener: Mutex::new(None) };
        fake.come_back()?;
        Ok(fake)
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Sets how it handles events from now on.
    pub fn behave(&self, manner: Manner) {
        *self.shared.manner.lock().expect("no panic under this lock") = manner;
    }

    /// Closes every connection and the socket, as a daemon that exits does.
    pub fn vanish(&self) {
        if let Some(listener) = self.listener.lock().expect("no panic under this lock").take() {
            listener.abort();
        }
        let _not_there = unlink(&self.path);
    }

    /// Listens again.
    pub fn come_back(&self) -> Result<()> {
        let socket = UnixListener::bind(&self.path).with_context(|| format!("listen on {}", self.path.display()))?;
        let task = tokio::spawn(accept(socket, Arc::clone(&self.shared)));
        *self.listener.lock().expect("no panic under this lock") = Some(task.abort_handle());
        Ok(())
    }

    /// The accepted events.
    pub fn events(&self) -> &Events {
        &self.shared.events
    }

    /// The namespaces of the accepted events.
    pub fn namespaces(&self) -> BTreeSet<String> {
        self.shared.namespaces.lock().expect("no panic under this lock").clone()
    }

    /// The events of a container that were acknowledged more than once, although they were not sent again.
    pub fn sent_twice(&self, container: &str) -> Vec<Event> {
        let acknowledged = self.shared.acknowledged.lock().expect("no panic under this lock");
        let of_it: Vec<_> = acknowledged.iter().filter(|event| event.container == container).collect();
        let name = |event: &Event| (event.topic.clone(), event.exec.clone());
        let again = of_it.iter().enumerate().filter(|(at, event)| of_it[..*at].iter().any(|other| name(other) == name(event)));
        again.map(|(_, event)| (*event).clone()).collect()
    }

    /// How many events have arrived, accepted or not.
    pub fn tries(&self) -> usize {
        self.shared.tries.lock().expect("no panic under this lock").len()
    }
}

impl Drop for FakeContainerd {
    fn drop(&mut self) {
        self.vanish();
    }
}

async fn accept(listener: UnixListener, shared: Arc<Shared>) {
    // they end with this task
    let mut connections = JoinSet::new();
    while let Ok((socket, _)) = listener.accept().await {
        connections.spawn(serve(socket, Arc::clone(&shared)));
        while connections.try_join_next().is_some() {}
    }
}

async fn serve(mut socket: UnixStream, shared: Arc<Shared>) {
    let mut input = Vec::new();
    loop {
        match socket.read_buf(&mut input).await {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if shared.manner() == Manner::HangUpEarly {
            shared.tries.lock().expect("no panic under this lock").push("half".to_owned());
            return;
        }
        while let Some(frame) = take_frame(&mut input) {
            if shared.manner() == Manner::Garbage {
                shared.tries.lock().expect("no panic under this lock").push("garbage".to_owned());
                let _it_may_hang_up = socket.write_all(&[0xff; 32]).await;
                continue;
            }
            let Some((answer, taken)) = shared.meet(&frame) else { return };
            if let Some(answer) = answer
                && socket.write_all(&answer.encode()).await.is_err()
            {
                return;
            }
            shared.acknowledged.lock().expect("no panic under this lock").extend(taken);
        }
    }
}

impl Shared {
    fn manner(&self) -> Manner {
        *self.manner.lock().expect("no panic under this lock")
    }

    /// The answer, if any, and the event that is accepted; none to close the connection.
    fn meet(&self, frame: &Frame) -> Option<(Option<Frame>, Option<Event>)> {
        let manner = self.manner();
        let taken = match manner {
            Manner::Accept => true,
            Manner::HangUp { taken } => taken,
            Manner::Refuse(_) | Manner::HangUpEarly | Manner::Garbage | Manner::Silent => false,
        };
        let read = self.read(frame, taken);
        let code = match (&read, manner) {
            (Err(_), _) => Code::InvalidArgument,
            (Ok(_), Manner::Refuse(code)) => code,
            (Ok(_), _) => Code::Ok,
        };
        let event = read.as_ref().ok().cloned();
        let message = read.err().map_or_else(String::new, |error| format!("{error:#}"));
        let status = Status { code: EnumOrUnknown::from_i32(code as i32), message, ..Status::default() };
        let response = Response { status: MessageField::some(status), ..Response::default() };
        let payload = response.write_to_bytes().expect("a message without required fields is always complete");
        match manner {
            Manner::HangUp { .. } | Manner::HangUpEarly => None,
            Manner::Silent | Manner::Garbage => Some((None, None)),
            Manner::Accept | Manner::Refuse(_) => {
                Some((Some(Frame { stream: frame.stream, kind: RESPONSE, payload }), event.filter(|_| manner == Manner::Accept)))
            }
        }
    }

    fn read(&self, frame: &Frame, taken: bool) -> Result<Event> {
        let request = Request::parse_from_bytes(&frame.payload)?;
        anyhow::ensure!(request.service == "containerd.services.events.ttrpc.v1.Events" && request.method == "Forward", "{request:?}");
        let forward = ForwardRequest::parse_from_bytes(&request.payload)?;
        let envelope = forward.envelope.into_option().context("an event without an envelope")?;
        // the same message as containerd's gRPC API has it
        let envelope = Envelope::decode(&*envelope.write_to_bytes()?)?;
        let event = decode(&envelope).with_context(|| format!("cannot read {}", envelope.topic))?;
        self.tries.lock().expect("no panic under this lock").push(format!("{event:?}"));
        trace::note("event", format_args!("{event:?}{}", if taken { "" } else { ", not taken" }));
        if taken {
            self.namespaces.lock().expect("no panic under this lock").insert(envelope.namespace.clone());
            self.events.push(event.clone());
        }
        Ok(event)
    }
}
