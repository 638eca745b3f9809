//! `containerd.services.streaming.v1.Streaming`: streams that a client opens under a name, for another of its calls to use.
//!
//! ```text
//! StreamInit{id} ─▶ named ─▶ an empty message: ready ─▶ taken by a Transfer ─▶ messages, both ways ─▶ closed by either end
//!                     └─ not taken for a while: closed
//! ```
//! When another process takes over, streams that nothing has taken are connected with streams of their names there.
//!
//! **Invariant:** a stream is taken once, and nothing of it is read before. Then one message of it is here at a time, as long as a client of
//! these streams sends at most, which counts in the budget of requests until the next one is received.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use containerd_client::services::v1::StreamInit;
use containerd_client::to_any;
use containerd_client::types::transfer::{Data, WindowUpdate};
use hyper::body::Bytes;
use log::warn;
use prost_types::Any;
use tokio::sync::{Mutex as Turn, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::call::Call;
use crate::error::{Error, Object, Result};
use crate::gate::Gate;
use crate::name::Namespace;
use crate::successor::{Headers, Successor};

type Key = (Namespace, String);

/// The service, and the streams that nothing has taken yet.
#[derive(Debug)]
pub(crate) struct Streams {
    open: Mutex<Open>,
    gate: Gate,
    successor: Successor,
    /// While streams are being handed over.
    handing_over: Turn<()>,
}

#[derive(Debug, Default)]
struct Open {
    /// Each with a number of its own: an id may be used again.
    streams: HashMap<Key, (u64, Stream)>,
    /// Whether they go to another process.
    are_handed_over: bool,
    last: u64,
}

/// This end of a stream.
pub(crate) struct Stream {
    incoming: Incoming,
    outgoing: mpsc::Sender<Result<Any, Status>>,
}

/// Messages of a client.
type Incoming = Pin<Box<dyn tokio_stream::Stream<Item = Result<Any>> + Send + Sync>>;

impl std::fmt::Debug for Stream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Stream").finish_non_exhaustive()
    }
}

impl Streams {
    /// Without streams.
    pub(crate) fn new(gate: Gate, successor: Successor) -> Self {
        Self { open: Mutex::default(), gate, successor, handing_over: Turn::default() }
    }

    pub(super) async fn stream(
        self: Arc<Self>,
        call: Call,
        mut requests: Streaming<Any>,
    ) -> Result<impl tokio_stream::Stream<Item = Result<Any, Status>>> {
        let namespace = call.namespace()?;
        let first = tokio::time::timeout(OPENED, requests.message()).await;
        let first = first.map_err(|_elapsed| Error::Invalid(format!("no message came within {OPENED:?}")))?;
        let first = first.map_err(gone)?.ok_or_else(|| Error::Invalid("a stream begins with its id".to_owned()))?;
        let init: StreamInit = decode(&first).ok_or_else(|| Error::Invalid("a stream begins with StreamInit".to_owned()))?;
        call.answered();
        let (outgoing, answers) = mpsc::channel(MESSAGES);
        let incoming: Incoming = Box::pin(Messages { requests, call, is_held: false, has_ended: false });
        // there is room
        let _ = outgoing.try_send(Ok(Any { type_url: "google.protobuf.Empty".to_owned(), value: Vec::new() }));
        let key = (namespace, init.id);
        let number = self.add(key.clone(), Stream { incoming, outgoing })?;
        if self.open().are_handed_over {
            self.hand_over().await;
        }
        let (open, closed) = oneshot::channel::<()>();
        tokio::spawn(async move {
            tokio::select! {
                // closed by either end
                _ = closed => {}
                () = self.expire(&key, number) => {}
            }
            self.remove(&key, number);
        });
        Ok(Answers { stream: ReceiverStream::new(answers), _open: open })
    }

    fn add(&self, key: Key, stream: Stream) -> Result<u64> {
        let id = &key.1;
        if id.is_empty() || id.len() > MAX_ID_BYTES {
            let bytes = id.len();
            return Err(Error::Invalid(format!("a stream id of {bytes} bytes; it must not be empty, nor longer than {MAX_ID_BYTES}")));
        }
        let mut open = self.open();
        if open.streams.len() >= MOST_STREAMS {
            return Err(Error::Exhausted(format!("{MOST_STREAMS} streams are open that no call uses")));
        }
        open.last += 1;
        let number = open.last;
        match open.streams.entry(key) {
            Entry::Occupied(taken) => Err(Error::AlreadyExists(Object::Stream(taken.key().1.clone()))),
            Entry::Vacant(place) => {
                place.insert((number, stream));
                Ok(number)
            }
        }
    }

    /// Connects all streams that nothing has taken with the process that has taken over: the call that uses one may come there. When this returns,
    /// they are known there.
    pub(crate) async fn hand_over(&self) {
        let _turn = self.handing_over.lock().await;
        let streams: Vec<_> = {
            let mut open = self.open();
            open.are_handed_over = true;
            open.streams.drain().collect()
        };
        for ((namespace, id), (_number, stream)) in streams {
            self.connect(&namespace, &id, stream, 0).await;
        }
    }

    /// Connects a stream with one of its name at the process that has taken over, except for some messages of the client that come next. If that
    /// fails, the stream is closed.
    pub(super) async fn connect(&self, namespace: &Namespace, id: &str, stream: Stream, passed_over: usize) -> Option<JoinHandle<()>> {
        let headers = Headers { namespace: Some(namespace.to_string()), ..Headers::default() };
        let open = self.gate.stream();
        let first = to_any(&StreamInit { id: id.to_owned() });
        let begin = async {
            let (requests, mut answers) = self.successor.connect().await?.duplex::<Any, Any>(STREAM, &headers, first).await?;
            // it is ready
            answers.message().await?.ok_or_else(|| Status::unavailable("the stream has ended"))?;
            Ok::<_, Status>((requests, answers))
        };
        let begun = match tokio::time::timeout(OPENED, begin).await {
            Ok(begun) => begun,
            Err(_elapsed) => Err(Status::deadline_exceeded(format!("no answer came within {OPENED:?}"))),
        };
        match begun {
            Ok((requests, answers)) => Some(tokio::spawn(async move {
                let _open = open;
                stream.relay(requests, answers, passed_over).await;
            })),
            Err(status) => {
                warn!(stream = id, error:% = status; "cannot hand a stream over");
                let _ = stream.outgoing.try_send(Err(status));
                None
            }
        }
    }

    /// Takes a stream for a call.
    pub(super) fn take(&self, namespace: &Namespace, id: &str) -> Result<Stream> {
        let taken = self.open().streams.remove(&(namespace.clone(), id.to_owned()));
        taken.map(|(_number, stream)| stream).ok_or_else(|| Error::NotFound(Object::Stream(id.to_owned())))
    }

    /// Returns when a stream that no call has taken is to be closed.
    async fn expire(&self, key: &Key, number: u64) {
        tokio::time::sleep(UNUSED).await;
        let is_unused = self.open().streams.get(key).is_some_and(|(other, _)| *other == number);
        if !is_unused {
            std::future::pending::<()>().await;
        }
    }

    fn remove(&self, key: &Key, number: u64) {
        let mut open = self.open();
        if open.streams.get(key).is_some_and(|(other, _)| *other == number) {
            open.streams.remove(key);
        }
    }

    fn open(&self) -> MutexGuard<'_, Open> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is sent to the client, until either end closes the stream.
struct Answers {
    stream: ReceiverStream<Result<Any, Status>>,
    _open: oneshot::Sender<()>,
}

impl tokio_stream::Stream for Answers {
    type Item = Result<Any, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        Pin::new(&mut self.stream).poll_next(cx)
    }
}

/// What a client sends, read when it is asked for.
struct Messages {
    requests: Streaming<Any>,
    call: Call,
    /// Whether there is one that has not been answered.
    is_held: bool,
    has_ended: bool,
}

impl tokio_stream::Stream for Messages {
    type Item = Result<Any>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if this.has_ended {
            return Poll::Ready(None);
        }
        if std::mem::take(&mut this.is_held) {
            this.call.answered();
        }
        let message = match std::task::ready!(Pin::new(&mut this.requests).poll_next(cx)) {
            None => None,
            Some(Ok(message)) => Some(bounded(message)),
            Some(Err(status)) => Some(Err(gone(status))),
        };
        this.is_held = true;
        this.has_ended = !matches!(message, Some(Ok(_)));
        Poll::Ready(message)
    }
}

fn closed() -> Error {
    Error::Remote { code: tonic::Code::Cancelled, message: "the client has closed its stream".to_owned() }
}

fn bounded(message: Any) -> Result<Any> {
    let length = message.value.len();
    if length > MESSAGE_BYTES {
        return Err(Error::Exhausted(format!("a message of {length} bytes in a stream; the most is {MESSAGE_BYTES}")));
    }
    Ok(message)
}

fn gone(status: Status) -> Error {
    Error::Remote { code: status.code(), message: format!("the client's stream has ended: {}", status.message()) }
}

/// A message, if it is one of that type.
pub(super) fn decode<M: prost::Message + prost::Name + Default>(any: &Any) -> Option<M> {
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    (name == M::full_name()).then(|| M::decode(any.value.as_slice()).ok()).flatten()
}

impl Stream {
    /// Passes on what comes from either side, until the other process closes the stream, or the client is gone.
    async fn relay(self, requests: mpsc::Sender<Any>, mut answers: Streaming<Any>, mut passed_over: usize) {
        let Self { mut incoming, outgoing } = self;
        let forth = async move {
            let requests = requests;
            while let Some(message) = incoming.next().await {
                let Ok(message) = message else { return };
                if passed_over > 0 {
                    passed_over -= 1;
                } else if requests.send(message).await.is_err() {
                    return;
                }
            }
            // the client has sent everything, and may go on reading
            drop(requests);
            std::future::pending::<()>().await;
        };
        let back = async move {
            loop {
                let message = answers.message().await.transpose();
                let Some(message) = message else { return };
                let is_last = message.is_err();
                if outgoing.send(message).await.is_err() || is_last {
                    return;
                }
            }
        };
        tokio::select! {
            () = forth => {}
            () = back => {}
        }
    }

    /// The next message; none when the client has sent everything.
    pub(super) async fn receive(&mut self) -> Result<Option<Any>> {
        let next = tokio::time::timeout(IDLE, self.incoming.next()).await;
        let next = next.map_err(|_elapsed| Error::Exhausted(format!("nothing came in the client's stream for {IDLE:?}")))?;
        next.transpose()
    }

    /// Sends a message, as soon as the client has room for it.
    pub(super) async fn send(&self, message: Any) -> Result<()> {
        let sent = tokio::time::timeout(IDLE, self.outgoing.send(Ok(message))).await;
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(closed()),
            Err(_elapsed) => Err(Error::Exhausted(format!("the client has read nothing of its stream for {IDLE:?}"))),
        }
    }

    /// Receives all bytes of a stream of data, and tells the sender how many it may send: many, so that it never waits for that.
    pub(super) async fn receive_bytes(mut self, to: mpsc::Sender<Result<Bytes>>) {
        let mut granted = 0;
        loop {
            let next = self.next_bytes(&mut granted).await;
            let message = match next {
                Ok(None) => return,
                Ok(Some(bytes)) => Ok(bytes),
                Err(error) => Err(error),
            };
            let is_last = message.is_err();
            if to.send(message).await.is_err() || is_last {
                return;
            }
        }
    }

    async fn next_bytes(&mut self, granted: &mut i64) -> Result<Option<Bytes>> {
        loop {
            if *granted < i64::from(WINDOW_BYTES / 2) {
                // a client that has sent everything takes no more
                let _ = self.send(to_any(&WindowUpdate { update: WINDOW_BYTES })).await;
                *granted += i64::from(WINDOW_BYTES);
            }
            let Some(message) = self.receive().await? else { return Ok(None) };
            let Some(Data { data }) = decode(&message) else {
                let kind: String = message.type_url.chars().take(100).collect();
                return Err(Error::Invalid(format!("{kind:?} in a stream of data")));
            };
            *granted -= i64::try_from(data.len()).unwrap_or(i64::MAX);
            if !data.is_empty() {
                return Ok(Some(data.into()));
            }
        }
    }

    /// Sends all bytes as the client grants it.
    pub(super) async fn send_bytes(&mut self, mut from: mpsc::Receiver<Bytes>) -> Result<()> {
        let mut granted: i64 = 0;
        loop {
            let next = tokio::select! {
                next = from.recv() => next,
                // there may be nothing to send for a long time
                () = self.outgoing.closed() => return Err(closed()),
            };
            let Some(mut bytes) = next else { return Ok(()) };
            while !bytes.is_empty() {
                while granted <= 0 {
                    let Some(message) = self.receive().await? else {
                        return Err(Error::Invalid("the client has closed its stream before everything was sent".to_owned()));
                    };
                    let Some(WindowUpdate { update }) = decode(&message) else {
                        return Err(Error::Invalid("a stream that receives data sends updates of its window only".to_owned()));
                    };
                    granted = granted.saturating_add(i64::from(update.max(0)));
                }
                let most = usize::try_from(granted).unwrap_or(usize::MAX).min(DATA_BYTES);
                let part = bytes.split_to(most.min(bytes.len()));
                granted -= i64::try_from(part.len()).unwrap_or(i64::MAX);
                self.send(to_any(&Data { data: part.to_vec() })).await?;
            }
        }
    }
}

/// For the first message.
const OPENED: Duration = Duration::from_secs(30);
/// For the call that uses a stream.
const UNUSED: Duration = Duration::from_secs(600);
/// For the next message of a client: its source may be slow.
const IDLE: Duration = Duration::from_secs(1800);
/// On their way to a client.
const MESSAGES: usize = 8;
/// Clients send 32 KiB.
const MESSAGE_BYTES: usize = 256 << 10;
/// As much as containerd sends, and its clients expect.
const DATA_BYTES: usize = 32 << 10;
/// What a sender may send before the next update. HTTP/2 bounds what is on its way.
const WINDOW_BYTES: i32 = 8 << 20;
/// Not taken by a call.
const MOST_STREAMS: usize = 128;
const MAX_ID_BYTES: usize = 256;
const STREAM: &str = "/containerd.services.streaming.v1.Streaming/Stream";

/// A stream, and its client's ends.
#[cfg(test)]
pub(super) type Ends = (Stream, mpsc::Sender<Result<Any>>, mpsc::Receiver<Result<Any, Status>>);

/// Makes one.
#[cfg(test)]
pub(super) fn stream() -> Ends {
    let (client, incoming) = mpsc::channel(MESSAGES);
    let (outgoing, answers) = mpsc::channel(MESSAGES);
    (Stream { incoming: Box::pin(ReceiverStream::new(incoming)), outgoing }, client, answers)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str) -> Key {
        (Namespace::parse("n").expect("a name"), id.to_owned())
    }

    #[tokio::test]
    async fn a_stream_is_taken_once_and_its_id_is_free_then() {
        let gate = Gate::default();
        let streams = Streams::new(gate, Successor::new("/".as_ref()));
        let number = streams.add(key("a"), stream().0).expect("free");
        assert_eq!(streams.add(key("a"), stream().0).expect_err("taken").code(), tonic::Code::AlreadyExists);
        let namespace = Namespace::parse("n").expect("a name");
        assert!(streams.take(&Namespace::parse("other").expect("a name"), "a").is_err());
        streams.take(&namespace, "a").expect("it is there");
        assert_eq!(streams.take(&namespace, "a").expect_err("taken").code(), tonic::Code::NotFound);
        let next = streams.add(key("a"), stream().0).expect("free again");
        streams.remove(&key("a"), number);
        assert!(next != number && streams.take(&namespace, "a").is_ok(), "another one of the same name stays");
        for bad in ["", &"x".repeat(MAX_ID_BYTES + 1)] {
            assert_eq!(streams.add(key(bad), stream().0).expect_err("bad").code(), tonic::Code::InvalidArgument);
        }
        for number in 0..MOST_STREAMS {
            streams.add(key(&number.to_string()), stream().0).expect("there is room");
        }
        assert_eq!(streams.add(key("more"), stream().0).expect_err("full").code(), tonic::Code::ResourceExhausted);
    }

    /// The body of a request: one message after the other, as often as it is read.
    struct Endless {
        first: Option<Any>,
        read: Arc<std::sync::atomic::AtomicUsize>,
    }

    impl hyper::body::Body for Endless {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Result<hyper::body::Frame<Bytes>, Status>>> {
            self.read.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let message = self.first.take().unwrap_or_else(|| to_any(&Data { data: vec![7; DATA_BYTES] }));
            let message = prost::Message::encode_to_vec(&message);
            let mut framed = vec![0];
            framed.extend(u32::try_from(message.len()).expect("short").to_be_bytes());
            framed.extend(message);
            Poll::Ready(Some(Ok(hyper::body::Frame::data(framed.into()))))
        }
    }

    #[tokio::test]
    async fn a_stream_is_read_only_once_a_call_takes_it_and_a_message_at_a_time() {
        use tonic::codec::Codec as _;
        let read = Arc::<std::sync::atomic::AtomicUsize>::default();
        let count = || read.load(std::sync::atomic::Ordering::Relaxed);
        let body = Endless { first: Some(to_any(&StreamInit { id: "a".to_owned() })), read: Arc::clone(&read) };
        let decoder = tonic_prost::ProstCodec::<Any, Any>::default().decoder();
        let mut request = tonic::Request::new(());
        request.metadata_mut().insert("containerd-namespace", "n".parse().expect("a value"));
        let streams = Arc::new(Streams::new(Gate::default(), Successor::new("/".as_ref())));
        let requests = Streaming::new_request(decoder, body, None, None);
        let _answers = Arc::clone(&streams).stream(Call::of(&request), requests).await.expect("opened");
        let settle = async || {
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
        };
        settle().await;
        assert_eq!(count(), 1, "no call has taken it");
        let mut stream = streams.take(&Namespace::parse("n").expect("a name"), "a").expect("it is there");
        for number in 2..5 {
            let message = stream.receive().await.expect("a message").expect("a message");
            assert_eq!(decode::<Data>(&message).expect("data").data.len(), DATA_BYTES);
            settle().await;
            assert_eq!(count(), number);
        }
    }

    #[tokio::test]
    async fn a_sender_is_granted_mibs_at_once_and_never_more_than_it_counts() {
        let (ours, client, mut answers) = stream();
        let (to, mut bytes) = mpsc::channel(1);
        let receiving = tokio::spawn(ours.receive_bytes(to));
        let mut granted: i64 = 0;
        let mut sent: i64 = 0;
        let data = Bytes::from(vec![7; DATA_BYTES]);
        while sent < 20 << 20 {
            while let Ok(update) = answers.try_recv() {
                let update: WindowUpdate = decode(&update.expect("no error")).expect("an update");
                granted += i64::from(update.update);
                assert!(granted < i64::from(i32::MAX));
            }
            if granted > 0 {
                client.send(Ok(to_any(&Data { data: data.to_vec() }))).await.expect("it receives");
                granted -= DATA_BYTES as i64;
                sent += DATA_BYTES as i64;
                assert_eq!(bytes.recv().await.expect("bytes").expect("no error").len(), DATA_BYTES);
            } else {
                tokio::task::yield_now().await;
            }
        }
        client.send(Ok(to_any(&WindowUpdate { update: 1 }))).await.expect("it receives");
        assert!(bytes.recv().await.expect("an error").is_err(), "no data");
        receiving.await.expect("no panic");
    }

    #[tokio::test]
    async fn no_more_is_sent_than_was_granted() {
        let (ours, client, mut answers) = stream();
        let (from, bytes) = mpsc::channel(1);
        let sending = tokio::spawn(async move {
            let mut ours = ours;
            ours.send_bytes(bytes).await
        });
        from.send(Bytes::from(vec![7; 100_000])).await.expect("it takes them");
        let (mut got, mut granted) = (0, 0);
        while got < 100_000 {
            client.send(Ok(to_any(&WindowUpdate { update: 30_000 }))).await.expect("it receives");
            granted += 30_000;
            while got < granted.min(100_000) {
                let data: Data = decode(&answers.recv().await.expect("data").expect("no error")).expect("data");
                got += data.data.len();
                assert!(got <= granted && data.data.len() <= DATA_BYTES);
            }
        }
        drop(from);
        sending.await.expect("no panic").expect("all is sent");
        assert!(answers.recv().await.is_none(), "it is closed");
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_noticed_also_when_there_is_nothing_to_send() {
        let (mut ours, _client, answers) = stream();
        let (_from, bytes) = mpsc::channel(1);
        let sending = tokio::spawn(async move { ours.send_bytes(bytes).await });
        drop(answers);
        let ended = tokio::time::timeout(Duration::from_secs(20), sending).await.expect("it ends").expect("no panic");
        assert_eq!(ended.expect_err("it was not sent").code(), tonic::Code::Cancelled);
    }
}
