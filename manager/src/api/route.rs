//! Which method serves which path.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};

use log::info;
use prost::Message;
use tokio::sync::watch;
use tokio_stream::Stream;
use tonic::body::Body;
use tonic::server::Grpc;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_prost::ProstCodec;
use tower_service::Service;

use super::body::{MESSAGE_BYTES, Metered};
use super::call::Call;
use super::calls::Calls;
use super::containers::Containers;
use super::content::ContentService;
use super::diff::DiffService;
use super::events::Events;
use super::health::Health;
use super::images::Images;
use super::introspection::Introspection;
use super::leases::Leases;
use super::mounts::MountService;
use super::namespaces::Namespaces;
use super::sandbox_controller::SandboxController;
use super::sandboxes::Sandboxes;
use super::snapshots::SnapshotService;
use super::streaming::Streams;
use super::tasks::TaskService;
use super::transfer::TransferService;
use super::version::Version;
use crate::error::{Error, Result};
use crate::gate::{Gate, Pass};
use crate::layers::Cancel;
use crate::successor::{Headers, Successor, remote};

/// A response, or a stream's reset.
type Answer = Result<http::Response<Body>, h2::Error>;

/// Turns true when the client has received GOAWAY.
type Leaving = watch::Receiver<bool>;

/// The services, each with what it needs.
#[derive(Debug)]
pub(crate) struct Services {
    pub(crate) containers: Arc<Containers>,
    pub(crate) tasks: Arc<TaskService>,
    pub(crate) sandboxes: Arc<Sandboxes>,
    pub(crate) sandbox_controller: Arc<SandboxController>,
    pub(crate) events: Arc<Events>,
    pub(crate) content: Arc<ContentService>,
    pub(crate) images: Arc<Images>,
    pub(crate) namespaces: Arc<Namespaces>,
    pub(crate) leases: Arc<Leases>,
    pub(crate) snapshots: Arc<SnapshotService>,
    pub(crate) diff: Arc<DiffService>,
    pub(crate) streams: Arc<Streams>,
    pub(crate) transfer: Arc<TransferService>,
    pub(crate) mounts: Arc<MountService>,
    pub(crate) introspection: Arc<Introspection>,
    pub(crate) version: Arc<Version>,
    pub(crate) health: Arc<Health>,
    /// Entered by each call that changes something.
    pub(crate) gate: Gate,
    /// Answers what this process cannot, once another one serves.
    pub(crate) successor: Successor,
    /// Counts all calls.
    pub(crate) calls: Arc<Calls>,
}

/// Serves one request, and counts it.
pub(super) async fn counted(services: Arc<Services>, leaving: Leaving, request: http::Request<Metered>) -> Answer {
    let path = request.uri().path().to_owned();
    let call = services.calls.begin();
    let incoming = Incoming { gate: services.gate.clone(), successor: services.successor.clone(), leaving, request };
    let answer = route(&services, &path, incoming).await;
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
/// When this process retires, a change that has not been made is passed on to the next process, and transfers and writes of content go on there
/// likewise. What may wait as long as a container runs is reset with REFUSED_STREAM: nothing was done, and clients may ask again as if they never
/// had. gRPC's own do so by themselves, once for each call, over a new connection, which the next process accepts. Streams of events end with an
/// error, so that their clients know that they have to subscribe again.
async fn route(s: &Services, path: &str, incoming: Incoming) -> Answer {
    let (service, method) = path.strip_prefix('/').and_then(|path| path.split_once('/')).unwrap_or_default();
    match service {
        "containerd.services.containers.v1.Containers" => match method {
            "Get" => incoming.look(&s.containers, Containers::get).await,
            "List" => incoming.look(&s.containers, Containers::list).await,
            "ListStream" => incoming.stream(&s.containers, Containers::list_stream).await,
            "Create" => incoming.change(&s.containers, Containers::create).await,
            "Update" => incoming.change(&s.containers, Containers::update).await,
            "Delete" => incoming.carry(&s.containers, Containers::delete).await,
            _ => unknown(path),
        },
        "containerd.services.tasks.v1.Tasks" => match method {
            "Create" => incoming.carry(&s.tasks, TaskService::create).await,
            "Start" => incoming.carry(&s.tasks, TaskService::start).await,
            "Delete" => incoming.carry(&s.tasks, TaskService::delete).await,
            "DeleteProcess" => incoming.carry(&s.tasks, TaskService::delete_process).await,
            "Get" => incoming.look(&s.tasks, TaskService::get).await,
            "List" => incoming.look(&s.tasks, TaskService::list).await,
            "Kill" => incoming.carry(&s.tasks, TaskService::kill).await,
            "Exec" => incoming.carry(&s.tasks, TaskService::exec).await,
            "ResizePty" => incoming.carry(&s.tasks, TaskService::resize_pty).await,
            "CloseIO" => incoming.carry(&s.tasks, TaskService::close_io).await,
            "Pause" => incoming.carry(&s.tasks, TaskService::pause).await,
            "Resume" => incoming.carry(&s.tasks, TaskService::resume).await,
            "ListPids" => incoming.look(&s.tasks, TaskService::list_pids).await,
            "Checkpoint" => incoming.carry(&s.tasks, TaskService::checkpoint).await,
            "Update" => incoming.carry(&s.tasks, TaskService::update).await,
            "Metrics" => incoming.look(&s.tasks, TaskService::metrics).await,
            "Wait" => park(incoming.leaving.clone(), incoming.look(&s.tasks, TaskService::wait)).await,
            _ => unknown(path),
        },
        "containerd.services.sandbox.v1.Store" => match method {
            "Create" => incoming.change(&s.sandboxes, Sandboxes::create).await,
            "Update" => incoming.change(&s.sandboxes, Sandboxes::update).await,
            "Delete" => incoming.change(&s.sandboxes, Sandboxes::delete).await,
            "List" => incoming.look(&s.sandboxes, Sandboxes::list).await,
            "Get" => incoming.look(&s.sandboxes, Sandboxes::get).await,
            _ => unknown(path),
        },
        "containerd.services.sandbox.v1.Controller" => match method {
            "Create" => incoming.carry(&s.sandbox_controller, SandboxController::create).await,
            "Start" => incoming.carry(&s.sandbox_controller, SandboxController::start).await,
            "Platform" => incoming.look(&s.sandbox_controller, SandboxController::platform).await,
            "Stop" => incoming.carry(&s.sandbox_controller, SandboxController::stop).await,
            "Wait" => park(incoming.leaving.clone(), incoming.look(&s.sandbox_controller, SandboxController::wait)).await,
            "Status" => incoming.look(&s.sandbox_controller, SandboxController::status).await,
            "Shutdown" => incoming.carry(&s.sandbox_controller, SandboxController::shutdown).await,
            "Metrics" => incoming.look(&s.sandbox_controller, SandboxController::metrics).await,
            "Update" => incoming.look(&s.sandbox_controller, SandboxController::update).await,
            _ => unknown(path),
        },
        "containerd.services.events.v1.Events" => match method {
            "Publish" => incoming.change(&s.events, Events::publish).await,
            "Forward" => incoming.change(&s.events, Events::forward).await,
            "Subscribe" => incoming.subscribe(&s.events, Events::subscribe).await,
            _ => unknown(path),
        },
        "containerd.services.namespaces.v1.Namespaces" => match method {
            "Get" => incoming.look(&s.namespaces, Namespaces::get).await,
            "List" => incoming.look(&s.namespaces, Namespaces::list).await,
            "Create" => incoming.change(&s.namespaces, Namespaces::create).await,
            "Update" => incoming.change(&s.namespaces, Namespaces::update).await,
            "Delete" => incoming.change(&s.namespaces, Namespaces::delete).await,
            _ => unknown(path),
        },
        "containerd.services.leases.v1.Leases" => match method {
            "Create" => incoming.change(&s.leases, Leases::create).await,
            "Delete" => incoming.carry(&s.leases, Leases::delete).await,
            "List" => incoming.look(&s.leases, Leases::list).await,
            "AddResource" => incoming.change(&s.leases, Leases::add_resource).await,
            "DeleteResource" => incoming.change(&s.leases, Leases::delete_resource).await,
            "ListResources" => incoming.look(&s.leases, Leases::list_resources).await,
            _ => unknown(path),
        },
        "containerd.services.snapshots.v1.Snapshots" => match method {
            "Prepare" => incoming.carry(&s.snapshots, SnapshotService::prepare).await,
            "View" => incoming.carry(&s.snapshots, SnapshotService::view).await,
            "Mounts" => incoming.look(&s.snapshots, SnapshotService::mounts).await,
            "Commit" => incoming.carry(&s.snapshots, SnapshotService::commit).await,
            "Remove" => incoming.change(&s.snapshots, SnapshotService::remove).await,
            "Stat" => incoming.look(&s.snapshots, SnapshotService::stat).await,
            "Update" => incoming.change(&s.snapshots, SnapshotService::update).await,
            "List" => incoming.stream(&s.snapshots, SnapshotService::list).await,
            "Usage" => incoming.look(&s.snapshots, SnapshotService::usage).await,
            "Cleanup" => incoming.carry(&s.snapshots, SnapshotService::cleanup).await,
            _ => unknown(path),
        },
        "containerd.services.diff.v1.Diff" => match method {
            // they end with their client. A client repeats a refused call once, and a long one may outlast two upgrades: files are all that it needs
            "Apply" => outlast(&incoming.gate.clone(), incoming.look(&s.diff, DiffService::apply)).await,
            // repeated after an upgrade, it gives the same
            "Diff" => park(incoming.leaving.clone(), incoming.look(&s.diff, DiffService::diff)).await,
            _ => unknown(path),
        },
        "containerd.services.mounts.v1.Mounts" => match method {
            "Activate" => incoming.carry(&s.mounts, MountService::activate).await,
            "Deactivate" => incoming.carry(&s.mounts, MountService::deactivate).await,
            "Info" => incoming.look(&s.mounts, MountService::info).await,
            "Update" => incoming.carry(&s.mounts, MountService::update).await,
            "List" => incoming.stream(&s.mounts, MountService::list).await,
            _ => unknown(path),
        },
        "containerd.services.content.v1.Content" => match method {
            "Info" => incoming.look(&s.content, ContentService::info).await,
            "Update" => incoming.change(&s.content, ContentService::update).await,
            "List" => incoming.stream(&s.content, ContentService::list).await,
            "Delete" => incoming.change(&s.content, ContentService::delete).await,
            "Read" => incoming.stream(&s.content, ContentService::read).await,
            "Status" => incoming.look(&s.content, ContentService::status).await,
            "ListStatuses" => incoming.look(&s.content, ContentService::list_statuses).await,
            "Write" => incoming.duplex(&s.content, ContentService::write).await,
            "Abort" => incoming.change(&s.content, ContentService::abort).await,
            _ => unknown(path),
        },
        "containerd.services.images.v1.Images" => match method {
            "Get" => incoming.look(&s.images, Images::get).await,
            "List" => incoming.look(&s.images, Images::list).await,
            "Create" => incoming.change(&s.images, Images::create).await,
            "Update" => incoming.change(&s.images, Images::update).await,
            "Delete" => incoming.carry(&s.images, Images::delete).await,
            _ => unknown(path),
        },
        "containerd.services.streaming.v1.Streaming" => match method {
            "Stream" => incoming.duplex(&s.streams, Streams::stream).await,
            _ => unknown(path),
        },
        "containerd.services.transfer.v1.Transfer" => match method {
            // it ends with its client
            "Transfer" => incoming.look(&s.transfer, TransferService::transfer).await,
            _ => unknown(path),
        },
        "containerd.services.introspection.v1.Introspection" => match method {
            "Plugins" => incoming.look(&s.introspection, Introspection::plugins).await,
            "Server" => incoming.look(&s.introspection, Introspection::server).await,
            "PluginInfo" => incoming.look(&s.introspection, Introspection::plugin_info).await,
            _ => unknown(path),
        },
        "containerd.services.version.v1.Version" => match method {
            "Version" => incoming.look(&s.version, Version::version).await,
            _ => unknown(path),
        },
        "grpc.health.v1.Health" => match method {
            "Check" => incoming.look(&s.health, Health::check).await,
            "Watch" => incoming.stream(&s.health, Health::watch).await,
            "List" => incoming.look(&s.health, Health::list).await,
            _ => unknown(path),
        },
        _ => unknown(path),
    }
}

fn unknown(path: &str) -> Answer {
    Ok(Status::unimplemented(format!("x-manager does not serve {path}")).into_http())
}

/// A call that has not reached its service.
struct Incoming {
    gate: Gate,
    successor: Successor,
    leaving: Leaving,
    request: http::Request<Metered>,
}

impl Incoming {
    /// A call that ends with its client.
    async fn look<S, Q, A, H, F>(self, service: &Arc<S>, handler: H) -> Answer
    where
        S: Send + Sync + 'static,
        Q: Message + Default + 'static,
        A: Message + Default + 'static,
        H: FnMut(Arc<S>, Call, Q) -> F,
        F: Future<Output = Result<A>> + Send + 'static,
    {
        let service = Arc::clone(service);
        Ok(grpc().unary(Handler { service, handler, finish: bounded::<A, F> }, self.request).await)
    }

    /// A call that is one step: it changes the store, and waits for nothing else.
    async fn change<S, Q, A, H, F>(self, service: &Arc<S>, handler: H) -> Answer
    where
        S: Send + Sync + 'static,
        Q: Message + Clone + Default + 'static,
        A: Message + Default + 'static,
        H: FnMut(Arc<S>, Call, Q) -> F,
        F: Future<Output = Result<A>> + Send + 'static,
    {
        self.run_to_end(service, handler, Some).await
    }

    /// A call that may wait for a shim, and passes the gate with each of its steps.
    async fn carry<S, Q, A, H, F>(self, service: &Arc<S>, handler: H) -> Answer
    where
        S: Send + Sync + 'static,
        Q: Message + Clone + Default + 'static,
        A: Message + Default + 'static,
        H: FnMut(Arc<S>, Call, Q) -> F,
        F: Future<Output = Result<A>> + Send + 'static,
    {
        self.run_to_end(service, handler, |_pass| None).await
    }

    /// A call that continues after its client disconnects. It begins when this process serves, and is passed on if another process takes over before
    /// it ends.
    async fn run_to_end<S, Q, A, H, F>(mut self, service: &Arc<S>, mut handler: H, keep: fn(Pass) -> Option<Pass>) -> Answer
    where
        S: Send + Sync + 'static,
        Q: Message + Clone + Default + 'static,
        A: Message + Default + 'static,
        H: FnMut(Arc<S>, Call, Q) -> F,
        F: Future<Output = Result<A>> + Send + 'static,
    {
        let gone = Cancel::default();
        // this future ends with the client
        let _client = gone.guard();
        self.request.extensions_mut().insert(gone);
        let is_refused = Arc::new(AtomicBool::new(false));
        let path = self.request.uri().path().to_owned();
        let (gate, successor, refuse) = (self.gate, self.successor, Arc::clone(&is_refused));
        let handler = move |service: Arc<S>, call: Call, message: Q| {
            let again = (call.headers(), message.clone());
            (handler(service, call, message), again)
        };
        let finish = move |(call, (headers, message)): (F, (Headers, Q))| {
            let (gate, refuse, successor, path) = (gate.clone(), Arc::clone(&refuse), successor.clone(), path.clone());
            async move {
                let next = gate.clone();
                let carried = async move {
                    let _carried = gate.carry();
                    let _pass = keep(gate.enter().await?);
                    bounded(call).await
                };
                let ended = tokio::spawn(carried).await;
                let ended = ended.unwrap_or_else(|source| Err(Error::Panicked { what: "a request", source }));
                if !matches!(ended, Err(Error::Retired)) {
                    return ended;
                }
                if next.is_succeeded() {
                    let _open = next.stream();
                    // without a connection nothing was asked for: the client asks again
                    if let Ok(connected) = successor.connect().await {
                        info!(method = path; "a call is passed on to the process that has taken over");
                        return connected.unary(&path, &headers, message).await.map_err(remote);
                    }
                }
                refuse.store(true, Ordering::Relaxed);
                ended
            }
        };
        let service = Arc::clone(service);
        let answer = grpc().unary(Handler { service, handler, finish }, self.request).await;
        if is_refused.load(Ordering::Relaxed) { Err(refused(self.leaving).await) } else { Ok(answer) }
    }

    /// A call that is answered by a stream.
    async fn stream<S, Q, A, T, H, F>(self, service: &Arc<S>, handler: H) -> Answer
    where
        S: Send + Sync + 'static,
        Q: Message + Default + 'static,
        A: Message + Default + 'static,
        T: Stream<Item = Result<A, Status>> + Send + 'static,
        H: FnMut(Arc<S>, Call, Q) -> F,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let service = Arc::clone(service);
        Ok(grpc().server_streaming(Handler { service, handler, finish: |call| call }, self.request).await)
    }

    /// A call whose request is a stream too. Its handler passes the gate with each step, and continues as long as it holds the stream.
    async fn duplex<S, Q, A, T, H, F>(mut self, service: &Arc<S>, handler: H) -> Answer
    where
        S: Send + Sync + 'static,
        Q: Message + Default + 'static,
        A: Message + Default + 'static,
        T: Stream<Item = Result<A, Status>> + Send + 'static,
        H: FnMut(Arc<S>, Call, Streaming<Q>) -> F + Send + Sync,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        self.request.body_mut().allow_many();
        let service = Arc::clone(service);
        Ok(grpc().streaming(Handler { service, handler, finish: |call| call }, self.request).await)
    }

    /// The same, that begins once no other process is about to take over: what it begins is handed over with the others.
    async fn subscribe<S, Q, A, T, H, F>(self, service: &Arc<S>, handler: H) -> Answer
    where
        S: Send + Sync + 'static,
        Q: Message + Default + 'static,
        A: Message + Default + 'static,
        T: Stream<Item = Result<A, Status>> + Send + 'static,
        H: FnMut(Arc<S>, Call, Q) -> F,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        match self.gate.clone().enter().await {
            Ok(_pass) => self.stream(service, handler).await,
            Err(_retired) => Err(refused(self.leaving).await),
        }
    }
}

/// A call that ends with its client and may last as long as a container: it ends with this process' service, too.
async fn park(leaving: Leaving, answer: impl Future<Output = Answer>) -> Answer {
    tokio::select! {
        biased;
        answer = answer => answer,
        refused = refused(leaving) => Err(refused),
    }
}

/// A call that ends with its client and goes on when another process has taken over: it changes nothing of the store.
async fn outlast(gate: &Gate, answer: impl Future<Output = Answer>) -> Answer {
    let _open = gate.stream();
    answer.await
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
struct Handler<S, H, E> {
    service: Arc<S>,
    handler: H,
    finish: E,
}

impl<S, Q, A, H, F, E, G> Service<Request<Q>> for Handler<S, H, E>
where
    H: FnMut(Arc<S>, Call, Q) -> F,
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
        let answer = (self.finish)((self.handler)(Arc::clone(&self.service), call, request.into_inner()));
        Box::pin(async move { Ok(Response::new(answer.await?)) })
    }
}
