//! Between clients and the shim: frames in both directions. [`requests`] and [`answers`] describe how faults change them.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use anyhow::Result;
use containerd_shim_protos::api;
use containerd_shim_protos::ttrpc::{Code, Request, Response, Status};
use protobuf::{EnumOrUnknown, Message, MessageField};
use shim_tests::ttrpc::{Frame, HEADER_BYTES, MAX_PAYLOAD_BYTES, REQUEST, RESPONSE, take_frame};

use super::{answers, requests};

/// State shared by all connections.
pub(super) struct Shared {
    pub(super) fault: String,
    real: PathBuf,
    own: PathBuf,
    /// The number of operations in progress, by name.
    busy: Mutex<BTreeMap<String, usize>>,
    idle: Condvar,
    /// The last connection on which each operation was performed, by container and process.
    pub(super) done: Mutex<BTreeMap<[String; 3], usize>>,
    pub(super) lost: Mutex<Vec<File>>,
}

impl Shared {
    pub(super) fn new(fault: &str, real: &str, own: &str) -> Arc<Self> {
        let (busy, idle, done, lost) = (Mutex::default(), Condvar::new(), Mutex::default(), Mutex::default());
        Arc::new(Self { fault: fault.to_owned(), real: real.into(), own: own.into(), busy, idle, done, lost })
    }

    pub(super) fn is(&self, fault: &str) -> bool {
        self.fault == fault
    }

    /// Marks something as in progress for as long as it is kept.
    pub(super) fn begin(self: &Arc<Self>, what: &str) -> Busy {
        *self.busy.lock().expect("no panic under this lock").entry(what.to_owned()).or_default() += 1;
        Busy { shared: Arc::clone(self), what: what.to_owned() }
    }

    pub(super) fn is_busy(&self, what: &str) -> bool {
        self.busy.lock().expect("no panic under this lock").get(what).is_some_and(|count| *count > 0)
    }

    /// Waits until it is not in progress.
    pub(super) fn wait(&self, what: &str) {
        let busy = self.busy.lock().expect("no panic under this lock");
        drop(self.idle.wait_while(busy, |busy| busy.get(what).is_some_and(|count| *count > 0)));
    }

    /// On which connection something was done last.
    pub(super) fn done(&self, call: &Call, method: &str) -> Option<usize> {
        let key = [method, &call.id, &call.exec].map(str::to_owned);
        self.done.lock().expect("no panic under this lock").get(&key).copied()
    }

    /// Calls the shim on a separate connection.
    pub(super) fn ask<A: Message>(&self, method: &str, message: &impl Message) -> Result<A> {
        let mut shim = UnixStream::connect(&self.real)?;
        shim.write_all(&Frame::request(1, shim_tests::task::V2, method, message).encode())?;
        let frame = read_frame(&mut shim, &mut Vec::new())?.ok_or_else(|| anyhow::anyhow!("the shim closed the connection"))?;
        Ok(A::parse_from_bytes(&frame.answer()?)?)
    }

    /// What the shim reports about the process of a call.
    pub(super) fn state(&self, call: &Call) -> Option<api::StateResponse> {
        let request = api::StateRequest { id: call.id.clone(), exec_id: call.exec.clone(), ..Default::default() };
        self.ask("State", &request).ok()
    }
}

/// Something is in progress.
pub(super) struct Busy {
    shared: Arc<Shared>,
    what: String,
}

impl Drop for Busy {
    fn drop(&mut self) {
        let mut busy = self.shared.busy.lock().expect("no panic under this lock");
        *busy.entry(self.what.clone()).or_default() -= 1;
        self.shared.idle.notify_all();
    }
}

/// The part of a request that faults need.
pub(super) struct Call {
    pub(super) service: String,
    pub(super) method: String,
    pub(super) payload: Vec<u8>,
    pub(super) id: String,
    /// Empty for a container's.
    pub(super) exec: String,
    /// Folders that must exist when it is answered.
    pub(super) folders: Vec<PathBuf>,
}

/// The methods whose second field is the id of a process.
const OF_PROCESSES: [&str; 8] = ["State", "Start", "Delete", "Kill", "Exec", "ResizePty", "CloseIO", "Wait"];

impl Call {
    fn of(request: &Request) -> Self {
        let (method, payload) = (request.method.clone(), request.payload.clone());
        let (id, exec) = match api::StateRequest::parse_from_bytes(&payload) {
            Ok(names) if OF_PROCESSES.contains(&method.as_str()) => (names.id, names.exec_id),
            _ => (api::PidsRequest::parse_from_bytes(&payload).map(|names| names.id).unwrap_or_default(), String::new()),
        };
        Self { service: request.service.clone(), method, payload, id, exec, folders: Vec::new() }
    }
}

/// One client's connection.
pub(super) struct Link {
    pub(super) shared: Arc<Shared>,
    pub(super) number: usize,
    client: Mutex<UnixStream>,
    shim: UnixStream,
    /// The requests in progress.
    open: Mutex<BTreeMap<u32, (Call, [Busy; 2])>>,
}

pub(super) fn accept(listener: &UnixListener, shared: &Arc<Shared>) {
    for client in listener.incoming().flatten() {
        // From here on, in the order of connections: its thread may begin to read after a request on a later one.
        let half = shared.is("half-frame-blocks").then(|| shared.begin(requests::HALF_A_FRAME));
        let shared = Arc::clone(shared);
        thread::spawn(move || drop(serve(client, shared, half)));
    }
}

fn serve(mut client: UnixStream, shared: Arc<Shared>, half: Option<Busy>) -> Result<()> {
    static LINKS: AtomicUsize = AtomicUsize::new(0);
    let Ok(shim) = UnixStream::connect(&shared.real) else {
        if shared.is("ghost") {
            io::copy(&mut client, &mut io::sink())?;
        }
        return Ok(());
    };
    let (mut from_shim, writer) = (shim.try_clone()?, Mutex::new(client.try_clone()?));
    let number = LINKS.fetch_add(1, Ordering::Relaxed);
    let link = Arc::new(Link { shared, number, client: writer, shim, open: Mutex::default() });
    let other = Arc::clone(&link);
    let answers = thread::spawn(move || {
        let _hung_up = other.answers(&mut from_shim);
        let client = other.client.lock().expect("no panic under this lock");
        let _gone_already = client.shutdown(std::net::Shutdown::Both);
    });
    let _hung_up = link.requests(&mut client, half);
    let _gone_already = link.shim.shutdown(std::net::Shutdown::Both);
    let _it_says_nothing = answers.join();
    Ok(())
}

impl Link {
    /// Its name among the operations that are [`Busy`].
    pub(super) fn name(&self) -> String {
        format!("connection {}", self.number)
    }

    /// Forwards requests, and frames that are no requests. `half`: kept while the last frame is not whole.
    fn requests(&self, client: &mut UnixStream, mut half: Option<Busy>) -> Result<()> {
        let (mut input, mut shim) = (Vec::new(), &self.shim);
        loop {
            let length = input.first_chunk::<4>().map(|bytes| u32::from_be_bytes(*bytes) as usize);
            if let Some(length) = length.filter(|length| *length > MAX_PAYLOAD_BYTES) {
                if self.shared.is("hang-up-on-length") {
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
                half = None;
                self.request(frame)?;
                continue;
            }
            if !input.is_empty() {
                if self.shared.is("whole-frames-only") {
                    return Ok(());
                }
                half.get_or_insert_with(|| self.shared.begin(requests::HALF_A_FRAME));
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
            anyhow::ensure!(!self.shared.is("hang-up-on-garbage"), "the fault");
            return self.pass(&frame);
        };
        let mut call = Call::of(&request);
        match requests::meet(self, &mut call) {
            requests::Met::Passed => {}
            requests::Met::Lost => {
                self.pass(&frame)?;
                anyhow::bail!("the fault");
            }
            requests::Met::Kept => return Ok(()),
            requests::Met::Answered => return self.reply(frame.stream, &Response { status: status(Code::OK), ..Default::default() }),
            requests::Met::Refused(code) => return self.reply(frame.stream, &Response { status: status(code), ..Default::default() }),
        }
        request.payload.clone_from(&call.payload);
        frame.payload = request.write_to_bytes()?;
        let busy = [self.shared.begin(&call.method), self.shared.begin(&self.name())];
        self.open.lock().expect("no panic under this lock").insert(frame.stream, (call, busy));
        self.pass(&frame)
    }

    fn pass(&self, frame: &Frame) -> Result<()> {
        Ok((&self.shim).write_all(&frame.encode())?)
    }

    /// Forwards answers.
    fn answers(&self, shim: &mut UnixStream) -> Result<()> {
        let mut input = Vec::new();
        while let Some(mut frame) = read_frame(shim, &mut input)? {
            let open = self.open.lock().expect("no panic under this lock").remove(&frame.stream);
            if let Some((call, _)) = &open {
                self.rewrite_address(call);
                if let Ok(mut response) = Response::parse_from_bytes(&frame.payload) {
                    if response.status.code.value() == 0 {
                        let key = [&call.method, &call.id, &call.exec].map(String::clone);
                        self.shared.done.lock().expect("no panic under this lock").insert(key, self.number);
                    }
                    if answers::change(self, call, &mut response) {
                        frame.payload = response.write_to_bytes()?;
                    }
                }
            }
            self.client.lock().expect("no panic under this lock").write_all(&frame.encode())?;
        }
        Ok(())
    }

    /// The real shim may have written its own address into the bundle.
    fn rewrite_address(&self, call: &Call) {
        let Some(create) = Some(call).filter(|call| call.method == "Create") else { return };
        let bundle = api::CreateTaskRequest::parse_from_bytes(&create.payload).map(|create| create.bundle).unwrap_or_default();
        let address = PathBuf::from(bundle).join("address");
        if self.shared.is("no-address") {
            let _not_there = fs::remove_file(address);
        } else if address.exists() {
            let _its_reader_will_tell = fs::write(address, format!("unix://{}", self.shared.own.display()));
        }
    }

    fn reply(&self, stream: u32, response: &Response) -> Result<()> {
        let frame = Frame { stream, kind: RESPONSE, payload: response.write_to_bytes()? };
        Ok(self.client.lock().expect("no panic under this lock").write_all(&frame.encode())?)
    }
}

/// A status with that code.
pub(super) fn status(code: Code) -> MessageField<Status> {
    let message = if code == Code::OK { String::new() } else { "no".to_owned() };
    MessageField::some(Status { code: EnumOrUnknown::new(code), message, ..Default::default() })
}

/// Changes a message in its bytes.
pub(super) fn edit<M: Message>(payload: &mut Vec<u8>, change: impl FnOnce(&mut M)) -> Result<()> {
    let mut message = M::parse_from_bytes(payload)?;
    change(&mut message);
    *payload = message.write_to_bytes()?;
    Ok(())
}

fn read_more(stream: &mut UnixStream, input: &mut Vec<u8>) -> io::Result<usize> {
    let mut buffer = [0; 1 << 16];
    let count = stream.read(&mut buffer)?;
    input.extend_from_slice(&buffer[..count]);
    Ok(count)
}

/// Waits for a frame; none when the peer has closed the connection.
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
