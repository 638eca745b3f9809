//! Messages of streams, as clients send them. `stream` and `write` in `fuzz/`.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;

use containerd_client::services::v1::{TransferRequest, WriteAction, WriteContentRequest, WriteContentResponse};
use hyper::body::{Body, Bytes, Frame};
use prost::Message;
use prost_types::Any;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;
use tokio_stream::StreamExt as _;
use tonic::codec::Codec as _;
use tonic::{Request, Streaming};
use tonic_prost::ProstCodec;

use super::body::{Budget, MESSAGE_BYTES, Metered, Unfinished};
use super::call::Call;
use super::content::ContentService;
use super::search::Filters;
use super::streaming::Streams;
use super::transfer;
use crate::content::{Content, Digest, Opening};
use crate::events::Exchange;
use crate::gate::Gate;
use crate::images::ahead::Ahead;
use crate::images::unpack::Unpacker;
use crate::layers::LayerLimits;
use crate::name::Namespace;
use crate::pools::Pools;
use crate::settings::{Limits, Sharing};
use crate::snapshots::Snapshots;
use crate::store::Store;
use crate::successor::Successor;

/// Messages of a stream that a client opens, in pieces of any length, and requests of transfers: what they hold of the budget comes back.
pub fn stream(bytes: &[u8]) {
    if let Ok(request) = TransferRequest::decode(bytes) {
        let _ = transfer::parsed(request);
    }
    let Some((&first, rest)) = bytes.split_first() else { return };
    // hours pass at once
    let runtime = Builder::new_current_thread().enable_time().start_paused(true).build().expect("a runtime");
    let budget = Budget::default();
    runtime.block_on(async {
        let (call, requests) = requests::<Any>(first, rest, &budget);
        let (streams, namespace) = (Arc::new(Streams::new(Gate::default(), Successor::new("/".as_ref()))), namespace());
        let Ok(answers) = Arc::clone(&streams).stream(call, requests).await else { return };
        let Ok(mut stream) = streams.take(&namespace, "s") else { return };
        let mut answers = Box::pin(answers);
        let reading = async { while answers.next().await.is_some() {} };
        let using = async {
            if first & 1 == 0 {
                let (to, mut received) = mpsc::channel::<crate::error::Result<Bytes>>(1);
                let counting = async {
                    let mut count = 0;
                    while let Some(Ok(part)) = received.recv().await {
                        count += part.len();
                    }
                    count
                };
                let ((), count) = tokio::join!(stream.receive_bytes(to), counting);
                assert!(count <= rest.len(), "{count} bytes of {}", rest.len());
            } else {
                let (from, parts) = mpsc::channel(1);
                from.send(Bytes::from(vec![7; 100_000])).await.expect("there is room");
                drop(from);
                let _ = stream.send_bytes(parts).await;
            }
        };
        tokio::select! { () = reading => {}, () = using => {} }
    });
    drop(runtime);
    assert!(budget.is_free(), "a share of the budget is lost");
}

/// Requests to write content: what is stored is what came, under its digest; afterwards the reference is free.
pub fn write(bytes: &[u8]) {
    static WORLD: OnceLock<World> = OnceLock::new();
    let Some((&first, rest)) = bytes.split_first() else { return };
    let world = WORLD.get_or_init(World::new);
    let ((asked, left), budget) = (messages::<WriteContentRequest>(rest), Budget::default());
    world.runtime.block_on(async {
        let (call, requests) = requests(first, rest, &budget);
        let answers = Arc::clone(&world.service).write(call, requests).await.expect("a stream");
        let answers: Vec<_> = tokio::time::timeout(LONG, answers.collect()).await.expect("an end");
        let answers: Vec<Option<WriteContentResponse>> = answers.into_iter().map(Result::ok).collect();
        let is_commit = |request: &WriteContentRequest| request.action == WriteAction::Commit as i32;
        let is_over = answers.last().is_some_and(Option::is_none) || !answers.is_empty() && is_commit(&asked[answers.len() - 1]);
        // what is no message may be refused together with those before it
        let is_answered = answers.len() == asked.len() || (is_over || left > 0) && answers.len() < asked.len();
        assert!(is_answered, "{} of {} answered", answers.len(), asked.len());
        let mut written = Vec::new();
        for (request, answer) in asked.iter().zip(&answers) {
            let Some(answer) = answer else { break };
            if request.action != WriteAction::Stat as i32 {
                if request.offset == 0 && (!is_commit(request) || !request.data.is_empty()) {
                    written.clear();
                }
                written.extend_from_slice(&request.data);
            }
            assert_eq!(usize::try_from(answer.offset), Ok(written.len()), "{request:?} {answer:?}");
            if is_commit(request) {
                world.check(&answer.digest, &written).await;
            }
        }
        if let Some(first) = asked.first() {
            world.clear(&first.r#ref).await;
        }
    });
    assert!(budget.is_free(), "a share of the budget is lost");
}

/// A content service.
struct World {
    runtime: Runtime,
    service: Arc<ContentService>,
    _folder: scratch::Folder,
}

impl World {
    fn new() -> Self {
        let folder = scratch::Folder::new("write");
        let store = Store::new(&folder);
        let (pools, gate, limits) = (Pools::default(), Gate::default(), Limits::default());
        let content = Content::open(&folder.join("content"), Sharing::Shared, store.clone(), pools.content.clone(), gate.clone());
        let content = Arc::new(content.expect("a folder"));
        let snapshots = Snapshots::open(&folder, store.clone(), gate.clone(), pools.snapshots.clone(), pools.removal.clone());
        let snapshots = snapshots.expect("a root");
        let unpacker = Unpacker::new(store.clone(), Arc::clone(&content), snapshots, gate.clone(), &pools, LayerLimits::default());
        let service = ContentService {
            content,
            store,
            events: Arc::new(Exchange::new(limits, pools.event_filters.clone())),
            filters: Filters::new(pools.list_filters.clone()),
            gate,
            pool: pools.content.clone(),
            ahead: Ahead::new(unpacker, false),
            successor: Successor::new("/nowhere".as_ref()),
        };
        let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
        Self { runtime, service: Arc::new(service), _folder: folder }
    }

    /// What was committed is there, and no longer afterwards.
    async fn check(&self, digest: &str, bytes: &[u8]) {
        let (namespace, digest) = (namespace(), Digest::parse(digest).expect("a digest"));
        let blob = self.service.content.read(&namespace, &digest).await.expect("it was committed");
        assert_eq!(blob.blocking_read(0, bytes.len() + 1).expect("it is whole"), bytes);
        assert!(digest.is_of(bytes), "{digest}");
        self.service.content.delete(&namespace, &digest, None).await.expect("it is there");
    }

    /// The reference can be written to at once, and is forgotten then.
    async fn clear(&self, reference: &str) {
        let opening = Opening { namespace: namespace(), reference: reference.to_owned(), total: 0, expected: None, lease: None };
        match tokio::time::timeout(LONG, self.service.content.write(opening)).await.expect("an end") {
            Ok(writer) => writer.abort().await.expect("aborted"),
            Err(error) => assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}"),
        }
        assert!(self.service.content.statuses(&namespace()).await.expect("a list").is_empty());
    }
}

fn namespace() -> Namespace {
    Namespace::parse("n").expect("a name")
}

/// A call whose body comes in pieces, and then ends.
fn requests<M: Message + Default + 'static>(first: u8, bytes: &[u8], budget: &Budget) -> (Call, Streaming<M>) {
    let pieces = bytes.chunks(1 + usize::from(first) * 16).map(Bytes::copy_from_slice).collect();
    let mut body = Metered::new(Pieces(pieces), budget.clone(), Unfinished::default());
    body.allow_many();
    let mut request = Request::new(());
    request.metadata_mut().insert("containerd-namespace", "n".parse().expect("a value"));
    request.extensions_mut().insert(body.share());
    let decoder = ProstCodec::<M, M>::default().decoder();
    (Call::of(&request), Streaming::new_request(decoder, body, None, Some(MESSAGE_BYTES)))
}

/// The messages that a body has before what is none, and the bytes of that.
fn messages<M: Message + Default>(mut bytes: &[u8]) -> (Vec<M>, usize) {
    let mut found = Vec::new();
    while let Some(([0, a, b, c, d], rest)) = bytes.split_first_chunk() {
        let Some((message, rest)) = rest.split_at_checked(u32::from_be_bytes([*a, *b, *c, *d]) as usize) else { break };
        let Ok(message) = M::decode(message) else { break };
        found.push(message);
        bytes = rest;
    }
    (found, bytes.len())
}

struct Pieces(VecDeque<Bytes>);

impl Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.pop_front().map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// Longer than a busy machine takes.
const LONG: Duration = Duration::from_secs(60);
