//! Between clients and the shim.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use anyhow::Result;
use containerd_shim_protos::api;
use containerd_shim_protos::ttrpc::{Code, Request, Response, Status};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use protobuf::{EnumOrUnknown, Message, MessageField};
use shim_tests::task::V3;
use shim_tests::ttrpc::{Frame, HEADER_BYTES, MAX_PAYLOAD_BYTES, REQUEST, RESPONSE, take_frame};

use super::stdout;

/// What all connections know.
pub(super) struct Shared {
    fault: String,
    real: PathBuf,
    own: PathBuf,
    lost: Mutex<Vec<File>>,
}

impl Shared {
    pub(super) fn new(fault: &str, real: &Path, own: &Path) -> Arc<Self> {
        Arc::new(Self { fault: fault.to_owned(), real: real.to_owned(), own: own.to_owned(), lost: Mutex::default() })
    }
}

/// One client's connection.
struct Link {
    shared: Arc<Shared>,
    client: Mutex<UnixStream>,
    shim: UnixStream,
    /// The methods of the requests under way.
    open: Mutex<BTreeMap<u32, String>>,
    /// The bundles of containers that were created on it.
    bundles: Mutex<Vec<PathBuf>>,
    answered: Condvar,
}

pub(super) fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for client in listener.incoming().flatten() {
        let shared = Arc::clone(shared);
        thread::spawn(move || drop(serve(client, shared)));
    }
}

fn serve(mut client: UnixStream, shared: Arc<Shared>) -> Result<()> {
    let shim = UnixStream::connect(&shared.real)?;
    let (mut from_shim, writer) = (shim.try_clone()?, Mutex::new(client.try_clone()?));
    let link = Arc::new(Link { shared, client: writer, shim, open: Mutex::default(), bundles: Mutex::default(), answered: Condvar::new() });
    let other = Arc::clone(&link);
    let answers = thread::spawn(move || {
        let _hung_up = other.answers(&mut from_shim);
        let client = other.client.lock().expect("no panic under this lock");
        let _gone_already = client.shutdown(std::net::Shutdown::Both);
    });
    let _hung_up = link.requests(&mut client);
    let _gone_already = link.shim.shutdown(std::net::Shutdown::Both);
    let _it_says_nothing = answers.join();
    Ok(())
}

impl Link {
    fn is(&self, fault: &str) -> bool {
        self.shared.fault == fault
    }

    /// Passes requests on, and what is none too.
    fn requests(&self, client: &mut UnixStream) -> Result<()> {
        let (mut input, mut shim) = (Vec::new(), &self.shim);
        loop {
            let length = input.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes) as usize);
            if let Some(length) = length.filter(|length| *length > MAX_PAYLOAD_BYTES) {
                if self.is("hang-up-on-length") {
                    return Ok(());
                }
                let whole = HEADER_BYTES + length;
                let first = input.len().min(whole);
                shim.write_all(&input[..first])?;
                input.drain(..first);
                io::copy(&mut client.take((whole - first) as u64), &mut shim)?;
                continue;
            }
            if let Some(frame) = take_frame(&mut input) {
                self.request(frame)?;
                continue;
            }
            if read_more(client, &mut input)? == 0 {
                shim.write_all(&input)?;
                return Ok(());
            }
        }
    }

    fn request(&self, mut frame: Frame) -> Result<()> {
        let request = Request::parse_from_bytes(&frame.payload).ok().filter(|_| frame.kind == REQUEST);
        let Some(mut request) = request.filter(|request| !request.method.is_empty()) else {
            anyhow::ensure!(!self.is("hang-up-on-garbage"), "the fault");
            return self.pass(&frame);
        };
        if self.is("no-v3") && request.service == V3 {
            return self.refuse(frame.stream, Code::UNIMPLEMENTED);
        }
        let at_the_end = || self.has_ended(&request.payload);
        match (self.shared.fault.as_str(), request.method.as_str()) {
            ("no-close-io", "CloseIO")
            | ("no-resize", "ResizePty")
            | ("no-pause", "Pause")
            | ("no-update", "Update")
            | ("stay", "Shutdown") => {
                return self.answer(frame.stream, &api::Empty::default());
            }
            ("silent-stats", "Stats") => return Ok(()),
            ("no-stats-at-the-end", "Stats") if at_the_end() => return self.refuse(frame.stream, Code::NOT_FOUND),
            ("no-pids-at-the-end", "Pids") if at_the_end() => return self.answer(frame.stream, &api::PidsResponse::default()),
            ("leave-early", "Shutdown") => {
                let connect: api::ConnectResponse = self.ask("Connect", &api::ConnectRequest::default())?;
                kill(Pid::from_raw(connect.shim_pid.cast_signed()), Signal::SIGKILL)?;
                return Ok(());
            }
            ("leak", "Create") => self.shared.lost.lock().expect("no panic under this lock").push(File::open("/dev/null")?),
            ("kill-init-only" | "kill-wrong-process", "Kill") => {
                let mut kill = api::KillRequest::parse_from_bytes(&request.payload)?;
                if self.is("kill-init-only") {
                    kill.all = false;
                } else {
                    kill.exec_id.clear();
                }
                request.payload = kill.write_to_bytes()?;
            }
            ("lost-byte" | "late-end", "Create") => {
                let mut create = api::CreateTaskRequest::parse_from_bytes(&request.payload)?;
                create.stdout = stdout::intercept(&create.stdout, &self.shared.fault);
                request.payload = create.write_to_bytes()?;
            }
            _ => {}
        }
        if request.method == "Create"
            && let Ok(create) = api::CreateTaskRequest::parse_from_bytes(&request.payload)
        {
            self.bundles.lock().expect("no panic under this lock").push(create.bundle.into());
        }
        let mut open = self.open.lock().expect("no panic under this lock");
        open.insert(frame.stream, request.method.clone());
        if self.is("in-order") {
            drop(open);
            frame.payload = request.write_to_bytes()?;
            self.pass(&frame)?;
            let open = self.open.lock().expect("no panic under this lock");
            drop(self.answered.wait_while(open, |open| open.contains_key(&frame.stream)));
            return Ok(());
        }
        drop(open);
        frame.payload = request.write_to_bytes()?;
        self.pass(&frame)
    }

    fn pass(&self, frame: &Frame) -> Result<()> {
        Ok((&self.shim).write_all(&frame.encode())?)
    }

    /// Passes answers on.
    fn answers(&self, shim: &mut UnixStream) -> Result<()> {
        let mut input = Vec::new();
        while let Some(mut frame) = read_frame(shim, &mut input)? {
            let method = self.open.lock().expect("no panic under this lock").remove(&frame.stream);
            if method.as_deref() == Some("Create") {
                self.rewrite_addresses();
            }
            if let Some(changed) = method.and_then(|method| self.change(&method, &frame).ok().flatten()) {
                frame.payload = changed;
            }
            let mut client = self.client.lock().expect("no panic under this lock");
            client.write_all(&frame.encode())?;
            self.answered.notify_all();
        }
        Ok(())
    }

    /// The real shim may have written its own address into the bundle.
    fn rewrite_addresses(&self) {
        for bundle in self.bundles.lock().expect("no panic under this lock").drain(..) {
            let address = bundle.join("address");
            if self.is("no-address") {
                let _not_there = fs::remove_file(address);
            } else if address.exists() {
                let _its_reader_will_tell = fs::write(address, format!("unix://{}", self.shared.own.display()));
            }
        }
    }

    /// What the fault makes of an answer.
    fn change(&self, method: &str, frame: &Frame) -> Result<Option<Vec<u8>>> {
        let mut response = Response::parse_from_bytes(&frame.payload)?;
        let code = response.status.as_ref().map_or(0, |status| status.code.value());
        let instead = match (self.shared.fault.as_str(), code) {
            ("wrong-code", 5) | ("wrong-refusal", 9) => Some(Code::UNKNOWN),
            ("internal", 12) => Some(Code::INTERNAL),
            _ => None,
        };
        if let (Some(code), Some(status)) = (instead, response.status.as_mut()) {
            status.code = EnumOrUnknown::new(code);
            return Ok(Some(response.write_to_bytes()?));
        }
        if code != 0 {
            return Ok(None);
        }
        match (self.shared.fault.as_str(), method) {
            ("wait-137", "Wait") => edit(&mut response, |wait: &mut api::WaitResponse| wait.exit_status = 137)?,
            ("wrong-task-pid", "Connect") => edit(&mut response, |connect: &mut api::ConnectResponse| connect.task_pid += 1)?,
            ("leak", "Connect") => edit(&mut response, |connect: &mut api::ConnectResponse| connect.shim_pid = std::process::id())?,
            ("wrong-exit-time", "State") => edit(&mut response, |state: &mut api::StateResponse| {
                if let Some(at) = state.exited_at.as_mut() {
                    at.nanos = (at.nanos + 1) % 1_000_000_000;
                }
            })?,
            ("lost-byte" | "late-end", "State") => {
                edit(&mut response, |state: &mut api::StateResponse| state.stdout = stdout::client_path(&state.stdout))?;
            }
            _ => return Ok(None),
        }
        Ok(Some(response.write_to_bytes()?))
    }

    fn answer(&self, stream: u32, message: &impl Message) -> Result<()> {
        let response = Response { status: MessageField::some(Status::default()), payload: message.write_to_bytes()?, ..Default::default() };
        self.reply(stream, &response)
    }

    fn refuse(&self, stream: u32, code: Code) -> Result<()> {
        let status = Status { code: EnumOrUnknown::new(code), message: "no".to_owned(), ..Default::default() };
        self.reply(stream, &Response { status: MessageField::some(status), ..Default::default() })
    }

    fn reply(&self, stream: u32, response: &Response) -> Result<()> {
        let frame = Frame { stream, kind: RESPONSE, payload: response.write_to_bytes()? };
        Ok(self.client.lock().expect("no panic under this lock").write_all(&frame.encode())?)
    }

    /// Asks the shim something itself, on a connection of its own.
    fn ask<A: Message>(&self, method: &str, message: &impl Message) -> Result<A> {
        let mut shim = UnixStream::connect(&self.shared.real)?;
        shim.write_all(&Frame::request(1, shim_tests::task::V2, method, message).encode())?;
        let frame = read_frame(&mut shim, &mut Vec::new())?.ok_or_else(|| anyhow::anyhow!("it hung up"))?;
        Ok(A::parse_from_bytes(&frame.answer()?)?)
    }

    fn has_ended(&self, payload: &[u8]) -> bool {
        let request = api::StateRequest { id: id_of(payload), ..Default::default() };
        self.ask::<api::StateResponse>("State", &request).is_ok_and(|state| state.status.value() == 3)
    }
}

/// Every request of the task service begins with the container's id.
fn id_of(payload: &[u8]) -> String {
    api::PidsRequest::parse_from_bytes(payload).map(|request| request.id).unwrap_or_default()
}

fn edit<M: Message>(response: &mut Response, change: impl FnOnce(&mut M)) -> Result<()> {
    let mut message = M::parse_from_bytes(&response.payload)?;
    change(&mut message);
    response.payload = message.write_to_bytes()?;
    Ok(())
}

fn read_more(stream: &mut UnixStream, input: &mut Vec<u8>) -> io::Result<usize> {
    let mut buffer = [0; 1 << 16];
    let count = stream.read(&mut buffer)?;
    input.extend_from_slice(&buffer[..count]);
    Ok(count)
}

/// Waits for a frame; none when the peer has hung up.
pub(super) fn read_frame(stream: &mut UnixStream, input: &mut Vec<u8>) -> io::Result<Option<Frame>> {
    loop {
        if let Some(frame) = take_frame(input) {
            return Ok(Some(frame));
        }
        if read_more(stream, input)? == 0 {
            return Ok(None);
        }
    }
}
