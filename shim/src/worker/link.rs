//! The socket to the keeper.
//!
//! Owns the framing, the queue of outgoing messages, and the table of operations in progress.
//!
//! **Invariant:** messages leave in the order in which they were given to [`Link::commit`] and [`Link::operation`], which never wait.
//! If this worker dies before a message has left, the keeper hands the same causes to the next generation.
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::rc::Rc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{ControlMessage, MsgFlags, send, sendmsg};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, oneshot};

use super::fault::Faults;
use crate::handover::{Cause, Commit, HEAD_BYTES, MAX_MESSAGE_BYTES, Malformed, Op, Outcome, Step, ToKeeper, ToWorker, first_frame};
use crate::{sys, test_identity};

/// The outcome of an operation, with the descriptor that came with it.
pub(crate) type Answer = (Outcome, Option<OwnedFd>);

/// The end of a link. The worker exits with it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    #[error("keeper closed the link")]
    Closed,
    #[error("read or write the link to the keeper")]
    Io { source: io::Error },
    #[error("decode a message of the keeper")]
    Malformed { source: Malformed },
}

/// The sending side, and the table of operations in progress.
#[derive(Debug)]
pub(crate) struct Link {
    /// Polled for input only: it nearly always has room, and epoll would report that after each message that the keeper reads.
    socket: AsyncFd<OwnedFd>,
    /// A ring: a long queue that is sent in small parts is never moved.
    queue: RefCell<VecDeque<u8>>,
    queued: Notify,
    waiting: RefCell<BTreeMap<(Cause, Step), oneshot::Sender<Answer>>>,
    /// The last step of an operation that belongs to no cause.
    own_steps: Cell<Step>,
    faults: Faults,
}

impl Link {
    /// Takes over the worker's end of the socketpair and sends Hello.
    pub(crate) fn new(socket: OwnedFd, faults: Faults) -> io::Result<Rc<Self>> {
        fcntl(&socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
        let socket = sys::ready::to_read(socket)?;
        let link = Self {
            socket,
            queue: RefCell::default(),
            queued: Notify::new(),
            waiting: RefCell::default(),
            own_steps: Cell::default(),
            faults,
        };
        link.send(&ToKeeper::Hello { versions: test_identity::versions(), build: test_identity::build().to_owned() }.encode());
        Ok(Rc::new(link))
    }

    /// Ends a step. See [`Commit`].
    pub(crate) fn commit(&self, commit: Commit) {
        self.send(&ToKeeper::Commit(commit).encode());
    }

    /// Reports whether this worker can take over, or why not.
    pub(crate) fn fit(&self, refusal: Option<String>) {
        self.send(&ToKeeper::Fit { refusal }.encode());
    }

    /// Reports whether this worker may hibernate.
    pub(crate) fn hibernate(&self, may: bool) {
        self.put(&ToKeeper::Hibernate { may }.encode());
    }

    /// Hands over a descriptor that wakes the worker. Returns whether it was sent, without waiting.
    pub(crate) fn watch(&self, descriptor: &OwnedFd) -> bool {
        let frame = ToKeeper::Watch.encode();
        let numbers = [descriptor.as_raw_fd()];
        let flags = MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT;
        let slices = [io::IoSlice::new(&frame)];
        let sent = || sendmsg::<()>(self.socket.get_ref().as_raw_fd(), &slices, &[ControlMessage::ScmRights(&numbers)], flags, None);
        self.queue.borrow().is_empty() && sent().is_ok_and(|count| count == frame.len())
    }

    /// Requests an operation at once; the returned future waits for its outcome.
    ///
    /// Dropping the future does not cancel the operation.
    pub(crate) fn operation(&self, cause: Cause, step: Step, op: Op) -> impl Future<Output = Answer> + use<> {
        let (sender, receiver) = oneshot::channel();
        let before = self.waiting.borrow_mut().insert((cause, step), sender);
        debug_assert!(before.is_none_or(|sender| sender.is_closed()), "step {step} of cause {cause} was requested twice");
        self.send(&ToKeeper::Operation { cause, step, op }.encode());
        async move {
            match receiver.await {
                Ok(answer) => answer,
                // Only the end of the link drops a sender, and the worker with it.
                Err(_) => std::future::pending().await,
            }
        }
    }

    /// A step for an operation that belongs to no request and no exit.
    pub(crate) fn own_step(&self) -> Step {
        self.own_steps.update(|step| step + 1);
        self.own_steps.get()
    }

    /// Writes what is queued whenever the socket takes it. Runs as a task of its own; ends with the link.
    pub(crate) async fn write_queue(self: Rc<Self>) -> io::Result<()> {
        loop {
            self.queued.notified().await;
            if self.queue.borrow().is_empty() {
                continue;
            }
            let socket = sys::ready::to_write(sys::descriptors::duplicate(self.socket.get_ref())?)?;
            while !self.queue.borrow().is_empty() {
                let mut room = socket.writable().await?;
                let mut queue = self.queue.borrow_mut();
                // of a ring, the part up to its end: the other one has its turn
                match write(self.socket.get_ref(), queue.as_slices().0) {
                    Ok(count) => drop(queue.drain(..count)),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => room.clear_ready(),
                    Err(error) => return Err(error),
                }
                if queue.is_empty() && queue.capacity() > KEPT_BYTES {
                    *queue = VecDeque::new();
                }
            }
        }
    }

    fn send(&self, frame: &[u8]) {
        self.faults.sending(self.socket.get_ref(), &self.queue, frame);
        self.put(frame);
        self.faults.sent(self.socket.get_ref(), &self.queue);
    }

    fn put(&self, frame: &[u8]) {
        let mut queue = self.queue.borrow_mut();
        // Mostly the socket has room: no copy, no wake-up.
        let sent = if queue.is_empty() { write(self.socket.get_ref(), frame).unwrap_or(0) } else { 0 };
        if sent < frame.len() {
            queue.extend(&frame[sent..]);
            self.queued.notify_one();
        }
    }

    fn finish(&self, cause: Cause, step: Step, answer: Answer) {
        match self.waiting.borrow_mut().remove(&(cause, step)) {
            Some(sender) => drop(sender.send(answer)),
            None => log::debug!(cause, step; "no task waits for the outcome of this operation"),
        }
    }
}

/// The receiving side.
#[derive(Debug)]
pub(crate) struct Incoming {
    link: Rc<Link>,
    /// Bytes that were read; the first `taken` of them are consumed.
    buffer: Vec<u8>,
    taken: usize,
    descriptors: VecDeque<OwnedFd>,
}

impl Incoming {
    pub(crate) fn new(link: Rc<Link>) -> Self {
        Self { link, buffer: Vec::new(), taken: 0, descriptors: VecDeque::new() }
    }

    /// Waits for the next message that is not the outcome of an operation; those go to the tasks that wait for them. Can be
    /// dropped at any time without losing one.
    pub(crate) async fn next(&mut self) -> Result<ToWorker, LinkError> {
        loop {
            while let Some(message) = self.take_frame()? {
                match message {
                    ToWorker::Done { cause, step, outcome } => {
                        let descriptor = matches!(outcome, Outcome::Descriptor).then(|| self.descriptors.pop_front()).flatten();
                        self.link.finish(cause, step, (outcome, descriptor));
                        self.link.faults.acted();
                    }
                    ToWorker::Ping { number } => self.link.put(&ToKeeper::Pong { number }.encode()),
                    message => return Ok(message),
                }
            }
            self.read().await?;
        }
    }

    /// Reports to the fault injection that the message of [`Incoming::next`] was handled.
    pub(crate) fn acted(&self) {
        self.link.faults.acted();
    }

    fn take_frame(&mut self) -> Result<Option<ToWorker>, LinkError> {
        let malformed = |source| LinkError::Malformed { source };
        let Some(frame) = first_frame(&self.buffer[self.taken..], MAX_MESSAGE_BYTES).map_err(malformed)? else { return Ok(None) };
        let length = frame.len();
        let message = ToWorker::decode(frame).map_err(malformed)?;
        // These depend on timing alone: faults are counted without them.
        if !matches!(message, ToWorker::Ping { .. } | ToWorker::MayHibernate) {
            self.link.faults.received(&message);
        }
        self.taken += HEAD_BYTES + length;
        if self.taken == self.buffer.len() {
            self.taken = 0;
            self.buffer.clear();
            self.buffer.shrink_to(KEPT_BYTES);
        }
        Ok(Some(message))
    }

    async fn read(&mut self) -> Result<(), LinkError> {
        self.buffer.drain(..self.taken);
        self.taken = 0;
        let missing = match self.buffer.first_chunk::<HEAD_BYTES>() {
            Some(head) => HEAD_BYTES + u32::from_le_bytes(*head) as usize - self.buffer.len(),
            None => HEAD_BYTES - self.buffer.len(),
        };
        let wanted = self.link.faults.limit_read(&self.buffer, missing).unwrap_or_else(|| missing.max(READ_BYTES));
        let start = self.buffer.len();
        let result = loop {
            // No state is half changed while this waits: the future can be dropped.
            let mut readable = self.link.socket.readable().await.map_err(|source| LinkError::Io { source })?;
            self.buffer.resize(start + wanted, 0);
            match readable.try_io(|socket| sys::descriptors::receive(socket.as_fd(), &mut self.buffer[start..])) {
                Err(_would_block) => self.buffer.truncate(start),
                Ok(result) => break result,
            }
        };
        let (count, descriptor) = match result {
            Ok((0, _)) => return Err(LinkError::Closed),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(LinkError::Closed),
            Err(source) => return Err(LinkError::Io { source }),
        };
        self.buffer.truncate(start + count);
        self.descriptors.extend(descriptor);
        self.link.faults.read(&self.buffer);
        Ok(())
    }
}

/// Writes what the socket takes.
pub(super) fn write(socket: &OwnedFd, bytes: &[u8]) -> io::Result<usize> {
    Ok(send(socket.as_raw_fd(), bytes, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT)?)
}

/// Bytes read at once.
const READ_BYTES: usize = 4 << 10;
/// The largest buffer that is kept while it is empty.
const KEPT_BYTES: usize = 16 << 10;
