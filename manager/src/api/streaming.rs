//! `containerd.services.streaming.v1.Streaming`: streams that a client opens under a name, for another of its calls to use.
//!
//! ```text
//! StreamInit{id} ─▶ named ─▶ an empty message: ready ─▶ taken by a Transfer ─▶ messages, both ways ─▶ closed by either end
//!                     └─ not taken for a while: closed
//! ```
//! When another process takes over, streams that nothing has taken are connected with streams of their names there.
//!
//! **Invariant:** a stream is taken once, and nothing of it is read before.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use containerd_client::services::v1::StreamInit;
use containerd_client::to_any;
use log::warn;
use prost_types::Any;
use tokio::sync::{Mutex as Turn, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};

use super::call::Call;
use super::stream::{Stream, decode, gone};
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
        let (stream, answers) = Stream::of(requests, call);
        stream.offer(Ok(Any { type_url: "google.protobuf.Empty".to_owned(), value: Vec::new() }));
        let key = (namespace, init.id);
        let number = self.add(key.clone(), stream)?;
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
        Ok(Answers { stream: answers, _open: open })
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
                stream.offer(Err(status));
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

/// For the first message.
const OPENED: Duration = Duration::from_secs(30);
/// For the call that uses a stream.
const UNUSED: Duration = Duration::from_secs(600);
/// Not taken by a call.
const MOST_STREAMS: usize = 128;
const MAX_ID_BYTES: usize = 256;
const STREAM: &str = "/containerd.services.streaming.v1.Streaming/Stream";

#[cfg(test)]
mod tests {
    use containerd_client::types::transfer::Data;
    use hyper::body::Bytes;

    use super::*;
    use crate::api::stream::{DATA_BYTES, stream};

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
}
