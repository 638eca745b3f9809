//! A content store of another process, in this one: what it has is in memory, and a test says how it misbehaves.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use containerd_client::services::v1::{
    AbortRequest, DeleteContentRequest, Info, InfoRequest, InfoResponse, ReadContentRequest, ReadContentResponse, WriteAction,
    WriteContentRequest, WriteContentResponse,
};
use hyper::body::Incoming;
use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message;
use tokio::net::UnixListener;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::server::Grpc;
use tonic::{Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tower_service::Service;

use crate::content::{Digest, lock};

/// How it misbehaves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Lie {
    #[default]
    Nothing,
    /// It sends as many bytes, and others.
    OtherBytes,
    /// It sends bytes without an end.
    Endless,
    /// It sends nothing but empty messages.
    Nothingness,
    /// It leaves out the last byte.
    Short,
    /// It says that blobs are longer.
    Longer,
    /// It answers a commit, and has nothing.
    Forgetful,
}

/// What it has.
#[derive(Debug, Default)]
pub(super) struct Has {
    pub(super) blobs: HashMap<String, Vec<u8>>,
    /// By reference.
    pub(super) ingests: HashMap<String, Vec<u8>>,
    pub(super) lie: Lie,
    /// Bytes that were written to it, whether or not it has them.
    pub(super) written: usize,
    /// Blobs that were read.
    pub(super) reads: usize,
    /// Namespaces that calls were for.
    pub(super) namespace: String,
}

/// It, while it serves.
#[derive(Debug)]
pub(super) struct Double {
    address: PathBuf,
    pub(super) has: Arc<Mutex<Has>>,
    connections: JoinSet<()>,
}

impl Double {
    pub(super) fn new(address: &Path) -> Self {
        let mut double = Self { address: address.to_owned(), has: Arc::default(), connections: JoinSet::new() };
        double.start();
        double
    }

    /// Serves again.
    pub(super) fn start(&mut self) {
        let listener = UnixListener::bind(&self.address).expect("a socket");
        let has = Arc::clone(&self.has);
        self.connections.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((socket, _)) = listener.accept().await {
                let has = Arc::clone(&has);
                let service = service_fn(move |request| answer(Arc::clone(&has), request));
                let connection = http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service);
                connections.spawn(async move { drop(connection.await) });
            }
        });
    }

    /// Is gone, with all connections.
    pub(super) async fn stop(&mut self) {
        self.connections.shutdown().await;
        std::fs::remove_file(&self.address).expect("a socket");
    }

    pub(super) fn put(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of_bytes(bytes);
        lock(&self.has).blobs.insert(digest.to_string(), bytes.to_vec());
        digest
    }

    pub(super) fn has(&self, digest: &Digest) -> bool {
        lock(&self.has).blobs.contains_key(digest.as_str())
    }

    pub(super) fn lie(&self, lie: Lie) {
        lock(&self.has).lie = lie;
    }
}

/// A method of the service, in the shape in which tonic calls it.
struct Method<Q, A> {
    has: Shared,
    answer: fn(&Shared, Q) -> Result<A, Status>,
}

impl<Q, A> Service<Request<Q>> for Method<Q, A> {
    type Response = Response<A>;
    type Error = Status;
    type Future = std::future::Ready<Result<Self::Response, Status>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        std::future::ready((self.answer)(&self.has, request.into_inner()).map(Response::new))
    }
}

type Shared = Arc<Mutex<Has>>;
type Answers<A> = Pin<Box<dyn Stream<Item = Result<A, Status>> + Send>>;

async fn answer(has: Shared, request: http::Request<Incoming>) -> Result<http::Response<tonic::body::Body>, std::convert::Infallible> {
    let header = request.headers().get("containerd-namespace").and_then(|value| value.to_str().ok());
    header.unwrap_or_default().clone_into(&mut lock(&has).namespace);
    let path = request.uri().path().to_owned();
    let method = path.rsplit('/').next().unwrap_or_default();
    Ok(match method {
        "Info" => grpc().unary(Method { has, answer: info }, request).await,
        "Delete" => grpc().unary(Method { has, answer: delete }, request).await,
        "Abort" => grpc().unary(Method { has, answer: abort }, request).await,
        "Read" => grpc().server_streaming(Method { has, answer: read }, request).await,
        "Write" => grpc().streaming(Method { has, answer: write }, request).await,
        _ => Status::unimplemented(path).into_http(),
    })
}

fn grpc<A: Message + Default + 'static, Q: Message + Default + 'static>() -> Grpc<ProstCodec<A, Q>> {
    Grpc::new(ProstCodec::default())
}

fn info(has: &Shared, asked: InfoRequest) -> Result<InfoResponse, Status> {
    let has = lock(has);
    let blob = has.blobs.get(&asked.digest).ok_or_else(|| Status::not_found("no such content"))?;
    let size = blob.len() + usize::from(has.lie == Lie::Longer);
    let info = Info { digest: asked.digest, size: i64::try_from(size).expect("a size"), ..Info::default() };
    Ok(InfoResponse { info: Some(info) })
}

fn delete(has: &Shared, asked: DeleteContentRequest) -> Result<(), Status> {
    lock(has).blobs.remove(&asked.digest).map(drop).ok_or_else(|| Status::not_found("no such content"))
}

fn abort(has: &Shared, asked: AbortRequest) -> Result<(), Status> {
    lock(has).ingests.remove(&asked.r#ref).map(drop).ok_or_else(|| Status::not_found("no such reference"))
}

fn read(has: &Shared, asked: ReadContentRequest) -> Result<Answers<ReadContentResponse>, Status> {
    let mut has = lock(has);
    has.reads += 1;
    let lie = has.lie;
    let mut blob = has.blobs.get(&asked.digest).ok_or_else(|| Status::not_found("no such content"))?.clone();
    let answer = |data: Vec<u8>| Ok(ReadContentResponse { offset: 0, data });
    match lie {
        Lie::OtherBytes => blob.iter_mut().for_each(|byte| *byte ^= 1),
        Lie::Short => drop(blob.pop()),
        Lie::Endless => return Ok(Box::pin(tokio_stream::iter(std::iter::repeat_with(move || answer(vec![0; 1000]))))),
        Lie::Nothingness => return Ok(Box::pin(tokio_stream::iter(std::iter::repeat_with(move || answer(Vec::new())).take(1000)))),
        _ => {}
    }
    let begin = usize::try_from(asked.offset).unwrap_or_default().min(blob.len());
    let end = begin.saturating_add(usize::try_from(asked.size).unwrap_or_default()).min(blob.len());
    let pieces: Vec<_> = blob[begin..end].chunks(100_000).map(|piece| answer(piece.to_vec())).collect();
    Ok(Box::pin(tokio_stream::iter(pieces)))
}

fn write(has: &Shared, mut asked: Streaming<WriteContentRequest>) -> Result<Answers<WriteContentResponse>, Status> {
    let has = Arc::clone(has);
    let (answers, stream) = mpsc::channel(1);
    tokio::spawn(async move {
        let mut reference = String::new();
        while let Some(Ok(request)) = asked.next().await {
            if reference.is_empty() {
                reference.clone_from(&request.r#ref);
            }
            let answer = step(&mut lock(&has), &reference, &request);
            let is_last = answer.is_err();
            if answers.send(answer).await.is_err() || is_last {
                return;
            }
        }
    });
    Ok(Box::pin(ReceiverStream::new(stream)))
}

fn step(has: &mut Has, reference: &str, request: &WriteContentRequest) -> Result<WriteContentResponse, Status> {
    if has.blobs.contains_key(&request.expected) {
        return Err(Status::already_exists("it has it"));
    }
    let ingest = has.ingests.entry(reference.to_owned()).or_default();
    let action = WriteAction::try_from(request.action).expect("an action");
    if action != WriteAction::Stat {
        if usize::try_from(request.offset) != Ok(ingest.len()) {
            return Err(Status::out_of_range("another offset"));
        }
        ingest.extend_from_slice(&request.data);
        has.written += request.data.len();
    }
    let offset = i64::try_from(ingest.len()).expect("an offset");
    let mut answer = WriteContentResponse { action: request.action, offset, total: request.total, ..WriteContentResponse::default() };
    if action == WriteAction::Commit {
        let bytes = has.ingests.remove(reference).unwrap_or_default();
        let digest = Digest::of_bytes(&bytes);
        if digest.as_str() != request.expected {
            return Err(Status::failed_precondition("another digest"));
        }
        if has.lie != Lie::Forgetful {
            has.blobs.insert(digest.to_string(), bytes);
        }
        answer.digest = digest.to_string();
    }
    Ok(answer)
}
