//! Which method serves which path.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use prost::Message;
use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::body::Body;
use tonic::server::Grpc;
use tonic::{Code, Request, Response, Status};
use tonic_prost::ProstCodec;
use tower_service::Service;

use super::body::{MESSAGE_BYTES, Metered};
use super::call::Call;
use super::{containers, events, health, introspection, leases, namespaces, tasks, version};
use crate::error::{Error, Result};
use crate::gate::Pass;
use crate::manager::Manager;

/// A response, or a stream's reset.
type Answer = Result<http::Response<Body>, h2::Error>;

/// Turns true when the client has received GOAWAY.
type Leaving = watch::Receiver<bool>;

/// Serves one request, and counts it.
pub(super) async fn counted(manager: Arc<Manager>, leaving: Leaving, request: http::Request<Metered>) -> Answer {
    let path = request.uri().path().to_owned();
    let call = manager.calls.begin();
    let answer = route(Arc::clone(&manager), leaving, request).await;
    let code = match &answer {
        // the status of a success comes last
        Ok(response) => response.headers().get("grpc-status").map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes())),
        Err(_reset) => Code::Unavailable,
    };
    call.ended(&path, code);
    answer
}

/// Serves one request.
///
/// A call that changes something runs to completion, even if the client disconnects; one that only reads or waits ends with its client.
///
/// When this process retires, what still waits is reset with REFUSED_STREAM: nothing was done, and clients may ask again as if they
/// never had. gRPC's own do so by themselves, over a new connection, which the next process accepts. Streams of events end with an error,
/// so that their clients know that they have to subscribe again.
async fn route(manager: Arc<Manager>, leaving: Leaving, request: http::Request<Metered>) -> Answer {
    let path = request.uri().path().to_owned();
    let (service, method) = path.strip_prefix('/').and_then(|path| path.split_once('/')).unwrap_or_default();
    let m = manager;
    let r = request;
    match service {
        "containerd.services.containers.v1.Containers" => match method {
            "Get" => look(m, r, containers::get).await,
            "List" => look(m, r, containers::list).await,
            "ListStream" => stream(m, r, containers::list_stream).await,
            "Create" => change(m, leaving, r, containers::create).await,
            "Update" => change(m, leaving, r, containers::update).await,
            "Delete" => carry(m, leaving, r, containers::delete).await,
            _ => unknown(&path),
        },
        "containerd.services.tasks.v1.Tasks" => match method {
            "Create" => carry(m, leaving, r, tasks::create).await,
            "Start" => carry(m, leaving, r, tasks::start).await,
            "Delete" => carry(m, leaving, r, tasks::delete).await,
            "DeleteProcess" => carry(m, leaving, r, tasks::delete_process).await,
            "Get" => look(m, r, tasks::get).await,
            "List" => look(m, r, tasks::list).await,
            "Kill" => carry(m, leaving, r, tasks::kill).await,
            "Exec" => carry(m, leaving, r, tasks::exec).await,
            "ResizePty" => carry(m, leaving, r, tasks::resize_pty).await,
            "CloseIO" => carry(m, leaving, r, tasks::close_io).await,
            "Pause" => carry(m, leaving, r, tasks::pause).await,
            "Resume" => carry(m, leaving, r, tasks::resume).await,
            "ListPids" => look(m, r, tasks::list_pids).await,
            "Checkpoint" => carry(m, leaving, r, tasks::checkpoint).await,
            "Update" => carry(m, leaving, r, tasks::update).await,
            "Metrics" => look(m, r, tasks::metrics).await,
            "Wait" => park(m, leaving, r, tasks::wait).await,
            _ => unknown(&path),
        },
        "containerd.services.events.v1.Events" => match method {
            "Publish" => change(m, leaving, r, events::publish).await,
            "Forward" => change(m, leaving, r, events::forward).await,
            "Subscribe" => subscribe(m, leaving, r, events::subscribe).await,
            _ => unknown(&path),
        },
        "containerd.services.namespaces.v1.Namespaces" => match method {
            "Get" => look(m, r, namespaces::get).await,
            "List" => look(m, r, namespaces::list).await,
            "Create" => change(m, leaving, r, namespaces::create).await,
            "Update" => change(m, leaving, r, namespaces::update).await,
            "Delete" => change(m, leaving, r, namespaces::delete).await,
            _ => unknown(&path),
        },
        "containerd.services.leases.v1.Leases" => match method {
            "Create" => change(m, leaving, r, leases::create).await,
            "Delete" => change(m, leaving, r, leases::delete).await,
            "List" => look(m, r, leases::list).await,
            "AddResource" => change(m, leaving, r, leases::add_resource).await,
            "DeleteResource" => change(m, leaving, r, leases::delete_resource).await,
            "ListResources" => look(m, r, leases::list_resources).await,
            _ => unknown(&path),
        },
        "containerd.services.introspection.v1.Introspection" => match method {
            "Plugins" => look(m, r, introspection::plugins).await,
            "Server" => look(m, r, introspection::server).await,
            "PluginInfo" => look(m, r, introspection::plugin_info).await,
            _ => unknown(&path),
        },
        "containerd.services.version.v1.Version" => match method {
            "Version" => look(m, r, version::version).await,
            _ => unknown(&path),
        },
        "grpc.health.v1.Health" => match method {
            "Check" => look(m, r, health::check).await,
            "Watch" => stream(m, r, health::watch).await,
            "List" => look(m, r, health::list).await,
            _ => unknown(&path),
        },
        _ => unknown(&path),
    }
}

fn unknown(path: &str) -> Answer {
    Ok(Status::unimplemented(format!("x-manager does not serve {path}")).into_http())
}

/// A call that ends with its client.
async fn look<Q, A, H, F>(manager: Arc<Manager>, request: http::Request<Metered>, handler: H) -> Answer
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
    H: FnMut(Arc<Manager>, Call, Q) -> F,
    F: Future<Output = Result<A>> + Send + 'static,
{
    Ok(grpc().unary(Handler { manager, handler, finish: bounded::<A, F> }, request).await)
}

/// The same for one that may last as long as a container.
async fn park<Q, A, H, F>(manager: Arc<Manager>, leaving: Leaving, request: http::Request<Metered>, handler: H) -> Answer
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
    H: FnMut(Arc<Manager>, Call, Q) -> F,
    F: Future<Output = Result<A>> + Send + 'static,
{
    tokio::select! {
        biased;
        answer = look(manager, request, handler) => answer,
        refused = refused(leaving) => Err(refused),
    }
}

/// A call that is one step: it changes the store, and waits for nothing else.
async fn change<Q, A, H, F>(manager: Arc<Manager>, leaving: Leaving, request: http::Request<Metered>, handler: H) -> Answer
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
    H: FnMut(Arc<Manager>, Call, Q) -> F,
    F: Future<Output = Result<A>> + Send + 'static,
{
    to_its_end(manager, leaving, request, handler, Some).await
}

/// A call that may wait for a shim, and passes the gate with each of its steps.
async fn carry<Q, A, H, F>(manager: Arc<Manager>, leaving: Leaving, request: http::Request<Metered>, handler: H) -> Answer
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
    H: FnMut(Arc<Manager>, Call, Q) -> F,
    F: Future<Output = Result<A>> + Send + 'static,
{
    to_its_end(manager, leaving, request, handler, |_pass| None).await
}

/// A call that continues after its client disconnects. It begins when this process serves, and is refused if another process takes over before it ends.
async fn to_its_end<Q, A, H, F>(
    manager: Arc<Manager>,
    leaving: Leaving,
    request: http::Request<Metered>,
    handler: H,
    keep: fn(Pass) -> Option<Pass>,
) -> Answer
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
    H: FnMut(Arc<Manager>, Call, Q) -> F,
    F: Future<Output = Result<A>> + Send + 'static,
{
    let is_refused = Arc::new(AtomicBool::new(false));
    let (gate, refuse) = (manager.gate.clone(), Arc::clone(&is_refused));
    let finish = move |call: F| {
        let (gate, refuse) = (gate.clone(), Arc::clone(&refuse));
        async move {
            let carried = async move {
                let _carried = gate.carry();
                let _pass = keep(gate.enter().await?);
                bounded(call).await
            };
            let ended = tokio::spawn(carried).await;
            let ended = ended.unwrap_or_else(|error| Err(Error::Launch(format!("a request ended without an answer: {error}"))));
            refuse.store(matches!(ended, Err(Error::Retired)), Ordering::Relaxed);
            ended
        }
    };
    let answer = grpc().unary(Handler { manager, handler, finish }, request).await;
    if is_refused.load(Ordering::Relaxed) { Err(refused(leaving).await) } else { Ok(answer) }
}

/// A call that is answered by a stream.
async fn stream<Q, A, S, H, F>(manager: Arc<Manager>, request: http::Request<Metered>, handler: H) -> Answer
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
    S: Stream<Item = Result<A, Status>> + Send + 'static,
    H: FnMut(Arc<Manager>, Call, Q) -> F,
    F: Future<Output = Result<S>> + Send + 'static,
{
    Ok(grpc().server_streaming(Handler { manager, handler, finish: |call| call }, request).await)
}

/// The same, that begins once no other process is about to take over: what it begins is handed over with the others.
async fn subscribe<Q, A, S, H, F>(manager: Arc<Manager>, leaving: Leaving, request: http::Request<Metered>, handler: H) -> Answer
where
    Q: Message + Default + 'static,
    A: Message + Default + 'static,
    S: Stream<Item = Result<A, Status>> + Send + 'static,
    H: FnMut(Arc<Manager>, Call, Q) -> F,
    F: Future<Output = Result<S>> + Send + 'static,
{
    match manager.gate.enter().await {
        Ok(_pass) => stream(manager, request, handler).await,
        Err(_retired) => Err(refused(leaving).await),
    }
}

/// Refuses an answer that no client takes.
async fn bounded<A: Message, F: Future<Output = Result<A>>>(call: F) -> Result<A> {
    let answer = call.await?;
    match answer.encoded_len() {
        ..=MESSAGE_BYTES => Ok(answer),
        length => Err(Error::Exhausted(format!("trying to send message larger than max ({length} vs. {MESSAGE_BYTES})"))),
    }
}

/// What a call is refused with, once its client knows that the connection ends.
async fn refused(mut leaving: Leaving) -> h2::Error {
    // without a connection it does not matter
    let _ = leaving.wait_for(|leaving| *leaving).await;
    h2::Reason::REFUSED_STREAM.into()
}

fn grpc<A: Message + Default + 'static, Q: Message + Default + 'static>() -> Grpc<ProstCodec<A, Q>> {
    Grpc::new(ProstCodec::default()).max_decoding_message_size(MESSAGE_BYTES).max_encoding_message_size(MESSAGE_BYTES)
}

/// A method in the shape in which tonic calls it.
struct Handler<H, E> {
    manager: Arc<Manager>,
    handler: H,
    finish: E,
}

impl<Q, A, H, F, E, G> Service<Request<Q>> for Handler<H, E>
where
    H: FnMut(Arc<Manager>, Call, Q) -> F,
    E: FnMut(F) -> G,
    G: Future<Output = Result<A>> + Send + 'static,
{
    type Response = Response<A>;
    type Error = Status;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Status>> + Send>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Q>) -> Self::Future {
        let call = Call::of(&request);
        let answer = (self.finish)((self.handler)(Arc::clone(&self.manager), call, request.into_inner()));
        Box::pin(async move { Ok(Response::new(answer.await?)) })
    }
}
