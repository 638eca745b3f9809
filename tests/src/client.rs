//! containerd's gRPC API in one namespace, every call with a deadline.

use std::fmt;
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use containerd_client as api;
use containerd_client::services::v1::CreateRequest as CreateLeaseRequest;
use containerd_client::services::v1::container::Runtime;
use containerd_client::services::v1::{
    CheckpointTaskRequest, CloseIoRequest, Container, CreateContainerRequest, CreateNamespaceRequest, CreateTaskRequest,
    DeleteContainerRequest, DeleteProcessRequest, DeleteResponse, DeleteTaskRequest, ExecProcessRequest, GetRequest, KillRequest,
    ListPidsRequest, ListTasksRequest, MetricsRequest, Namespace, PauseTaskRequest, PublishRequest, ResizePtyRequest, ResumeTaskRequest,
    StartRequest, SubscribeRequest, UpdateContainerRequest, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_client::types::v1::{Process, ProcessInfo};
use containerd_client::types::{Descriptor, Metric};
use prost_types::{Any, FieldMask};
use tonic::{Code, Request, Response, Status};

use crate::eventually::{self, SOON, eventually};

/// The result of a call: tests look at the code of an error.
pub type Answer<T> = std::result::Result<T, Status>;

/// No single call but Wait takes longer than this.
const DEADLINE: Duration = Duration::from_secs(30);

/// A connection to a daemon, bound to one namespace; cheap to clone.
#[derive(Clone)]
pub struct Client {
    api: Arc<api::Client>,
    namespace: Arc<str>,
    lease: Option<Arc<str>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({})", self.namespace)
    }
}

impl Client {
    /// Connects to the daemon at `address`.
    pub async fn connect(address: &Path, namespace: &str) -> Result<Self> {
        let api = api::Client::from_path(address).await.with_context(|| format!("connect {}", address.display()))?;
        Ok(Self { api: Arc::new(api), namespace: namespace.into(), lease: None })
    }

    /// The same connection with a new lease: content that its calls store is not garbage-collected while the lease exists.
    pub async fn with_lease(&self, id: &str) -> Answer<Self> {
        let request = self.request(CreateLeaseRequest { id: id.to_owned(), ..CreateLeaseRequest::default() });
        self.call("create lease", self.api.leases().create(request)).await?;
        Ok(Self { lease: Some(id.into()), ..self.clone() })
    }

    /// The same with a lease that is there.
    pub fn with_existing_lease(&self, id: &str) -> Self {
        Self { lease: Some(id.into()), ..self.clone() }
    }

    /// The namespace of every call.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// All of the API; requests for it come from [`Self::request`].
    pub fn api(&self) -> &api::Client {
        &self.api
    }

    /// A request in this namespace.
    pub fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        let namespace = self.namespace.parse().expect("tests name namespaces in ASCII");
        request.metadata_mut().insert("containerd-namespace", namespace);
        if let Some(lease) = &self.lease {
            request.metadata_mut().insert("containerd-lease", lease.parse().expect("tests name leases in ASCII"));
        }
        request
    }

    async fn call<T>(&self, name: &str, call: impl Future<Output = Answer<Response<T>>>) -> Answer<T> {
        match eventually::timeout(DEADLINE, call).await {
            Ok(answer) => answer.map(Response::into_inner),
            Err(_elapsed) => Err(Status::deadline_exceeded(format!("{name}: no answer within {DEADLINE:?}"))),
        }
    }

    /// A call that no daemon serves.
    pub async fn unserved(&self) -> Answer<()> {
        let mut grpc = tonic::client::Grpc::new(self.api.channel().clone());
        grpc.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = tonic::codegen::http::uri::PathAndQuery::from_static("/containerd.services.none.v1.None/Nothing");
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        grpc.unary(self.request(()), path, codec).await.map(Response::into_inner)
    }

    /// The daemon's version.
    pub async fn version(&self) -> Answer<String> {
        self.call("version", self.api.version().version(())).await.map(|answer| answer.version)
    }

    /// Waits until the connection works again after a restart of the daemon.
    pub async fn reconnected(&self) -> Result<()> {
        eventually("the connection works again", SOON, async || Ok(self.version().await.map(drop)?)).await
    }

    /// Creates the namespace unless it exists.
    pub async fn create_namespace(&self) -> Answer<()> {
        let namespace = Namespace { name: self.namespace.to_string(), ..Namespace::default() };
        let request = self.request(CreateNamespaceRequest { namespace: Some(namespace) });
        match self.call("create namespace", self.api.namespaces().create(request)).await {
            Err(status) if status.code() != Code::AlreadyExists => Err(status),
            _ => Ok(()),
        }
    }

    /// Creates the metadata of a container.
    pub async fn create_container(&self, id: &str, runtime: &str, options: Option<Any>, spec: Any) -> Answer<()> {
        let container = Container {
            id: id.to_owned(),
            runtime: Some(Runtime { name: runtime.to_owned(), options }),
            spec: Some(spec),
            ..Container::default()
        };
        self.create_metadata(container).await
    }

    /// Creates the metadata of a container with all its fields.
    pub async fn create_metadata(&self, container: Container) -> Answer<()> {
        let request = self.request(CreateContainerRequest { container: Some(container) });
        self.call("create container", self.api.containers().create(request)).await.map(drop)
    }

    /// Labels a container, as clients do with the labels of an image.
    pub async fn label(&self, id: &str, labels: &[(&str, &str)]) -> Answer<()> {
        let labels = labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let container = Container { id: id.to_owned(), labels, ..Container::default() };
        let update_mask = Some(FieldMask { paths: vec!["labels".to_owned()] });
        let request = self.request(UpdateContainerRequest { container: Some(container), update_mask });
        self.call("update container", self.api.containers().update(request)).await.map(drop)
    }

    /// Deletes the metadata of a container.
    pub async fn delete_container(&self, id: &str) -> Answer<()> {
        let request = self.request(DeleteContainerRequest { id: id.to_owned() });
        self.call("delete container", self.api.containers().delete(request)).await
    }

    /// Creates a task and returns the pid of its init.
    pub async fn create_task(&self, request: CreateTaskRequest) -> Answer<u32> {
        self.call("create", self.api.tasks().create(self.request(request))).await.map(|answer| answer.pid)
    }

    /// Starts init, or an exec, and returns its pid.
    pub async fn start(&self, id: &str, exec: &str) -> Answer<u32> {
        let request = self.request(StartRequest { container_id: id.to_owned(), exec_id: exec.to_owned() });
        self.call("start", self.api.tasks().start(request)).await.map(|answer| answer.pid)
    }

    /// Deletes a task.
    pub async fn delete(&self, id: &str) -> Answer<DeleteResponse> {
        let request = self.request(DeleteTaskRequest { container_id: id.to_owned() });
        self.call("delete", self.api.tasks().delete(request)).await
    }

    /// Deletes an exec.
    pub async fn delete_exec(&self, id: &str, exec: &str) -> Answer<DeleteResponse> {
        let request = self.request(DeleteProcessRequest { container_id: id.to_owned(), exec_id: exec.to_owned() });
        self.call("delete exec", self.api.tasks().delete_process(request)).await
    }

    /// The state of init, or of an exec.
    pub async fn state(&self, id: &str, exec: &str) -> Answer<Process> {
        let request = self.request(GetRequest { container_id: id.to_owned(), exec_id: exec.to_owned() });
        let answer = self.call("get", self.api.tasks().get(request)).await?;
        answer.process.ok_or_else(|| Status::internal("a state without a process"))
    }

    /// The state of every task of the namespace.
    pub async fn list(&self) -> Answer<Vec<Process>> {
        let request = self.request(ListTasksRequest { filter: String::new() });
        self.call("list", self.api.tasks().list(request)).await.map(|answer| answer.tasks)
    }

    /// Sends a signal.
    pub async fn kill(&self, id: &str, exec: &str, signal: u32, all: bool) -> Answer<()> {
        let request = self.request(KillRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), signal, all });
        self.call("kill", self.api.tasks().kill(request)).await
    }

    /// Adds an exec.
    pub async fn exec(&self, request: ExecProcessRequest) -> Answer<()> {
        self.call("exec", self.api.tasks().exec(self.request(request))).await
    }

    /// Resizes a terminal.
    pub async fn resize(&self, id: &str, exec: &str, width: u32, height: u32) -> Answer<()> {
        let request = self.request(ResizePtyRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), width, height });
        self.call("resize", self.api.tasks().resize_pty(request)).await
    }

    /// Closes stdin.
    pub async fn close_stdin(&self, id: &str, exec: &str) -> Answer<()> {
        let request = self.request(CloseIoRequest { container_id: id.to_owned(), exec_id: exec.to_owned(), stdin: true });
        self.call("close io", self.api.tasks().close_io(request)).await
    }

    /// Pauses every process of a container.
    pub async fn pause(&self, id: &str) -> Answer<()> {
        self.call("pause", self.api.tasks().pause(self.request(PauseTaskRequest { container_id: id.to_owned() }))).await
    }

    /// Lets them run again.
    pub async fn resume(&self, id: &str) -> Answer<()> {
        let request = self.request(ResumeTaskRequest { container_id: id.to_owned() });
        self.call("resume", self.api.tasks().resume(request)).await
    }

    /// The processes of a container.
    pub async fn pids(&self, id: &str) -> Answer<Vec<ProcessInfo>> {
        let request = self.request(ListPidsRequest { container_id: id.to_owned() });
        self.call("pids", self.api.tasks().list_pids(request)).await.map(|answer| answer.processes)
    }

    /// Writes a checkpoint: into the content store, which names it, or to the path in the options.
    pub async fn checkpoint(&self, id: &str, options: Any) -> Answer<Vec<Descriptor>> {
        let request = CheckpointTaskRequest { container_id: id.to_owned(), options: Some(options), ..CheckpointTaskRequest::default() };
        self.call("checkpoint", self.api.tasks().checkpoint(self.request(request))).await.map(|answer| answer.descriptors)
    }

    /// Changes limits.
    pub async fn update(&self, id: &str, resources: Any) -> Answer<()> {
        let request = UpdateTaskRequest { container_id: id.to_owned(), resources: Some(resources), ..UpdateTaskRequest::default() };
        self.call("update", self.api.tasks().update(self.request(request))).await
    }

    /// The metrics of a container.
    pub async fn metrics(&self, id: &str) -> Answer<Metric> {
        let request = self.request(MetricsRequest { filters: vec![format!("id=={id}")] });
        let answer = self.call("metrics", self.api.tasks().metrics(request)).await?;
        answer.metrics.into_iter().next().ok_or_else(|| Status::not_found(format!("no metrics of {id}")))
    }

    /// Waits for init, or an exec, to exit.
    pub async fn wait(&self, id: &str, exec: &str) -> Answer<WaitResponse> {
        self.call("wait", self.wait_for_ever(id, exec)).await
    }

    /// Like [`Self::wait`], without a deadline; for waits that a test leaves pending.
    pub async fn wait_for_ever(&self, id: &str, exec: &str) -> Answer<Response<WaitResponse>> {
        let request = self.request(WaitRequest { container_id: id.to_owned(), exec_id: exec.to_owned() });
        self.api.tasks().wait(request).await
    }

    /// Opens the stream of this namespace's events.
    pub async fn subscribe(&self) -> Answer<tonic::Streaming<api::types::Envelope>> {
        let filters = vec![format!("namespace=={}", self.namespace)];
        Ok(self.api.events().subscribe(self.request(SubscribeRequest { filters })).await?.into_inner())
    }

    /// Publishes an event.
    pub async fn publish(&self, topic: &str, event: Any) -> Answer<()> {
        let request = self.request(PublishRequest { topic: topic.to_owned(), event: Some(event) });
        self.call("publish", self.api.events().publish(request)).await
    }
}
