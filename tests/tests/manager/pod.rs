//! A client of one sandbox, and what is published about sandboxes.

use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result, ensure};
use containerd_client::services::v1::sandbox::{
    ControllerCreateRequest, ControllerShutdownRequest, ControllerStartRequest, ControllerStartResponse, ControllerStatusRequest,
    ControllerStatusResponse, ControllerStopRequest, ControllerWaitRequest, ControllerWaitResponse, StoreCreateRequest, StoreDeleteRequest,
    StoreGetRequest,
};
use containerd_client::types::Sandbox;
use containerd_client::types::sandbox::Runtime;
use prost::Message as _;
use prost_types::Any;
use serde_json::json;
use shim_tests::client::{Answer, Client};
use shim_tests::context::Context;
use shim_tests::eventually::{SOON, eventually_true};
use shim_tests::messages::{self, any_json};
use shim_tests::suite::Suite;
use tonic::Code;

/// The name of the only controller.
pub(crate) const CONTROLLER: &str = "shim";

/// A sandbox of one client.
pub(crate) struct Pod<'a> {
    pub(crate) client: &'a Client,
    pub(crate) id: String,
    pub(crate) runtime: String,
    /// What becomes config.json.
    pub(crate) spec: Option<Any>,
    /// The controller's name; empty as clients of containerd 1.7 have it.
    pub(crate) sandboxer: String,
}

impl<'a> Pod<'a> {
    pub(crate) fn new(cx: &'a Context, id: &str) -> Self {
        let (runtime, sandboxer) = (cx.shim().runtime_type.clone(), CONTROLLER.to_owned());
        Self { client: cx.client(), id: id.to_owned(), runtime, spec: None, sandboxer }
    }

    /// One of a stock shim, which looks for annotations in its specification.
    pub(crate) fn of(suite: Suite, cx: &'a Context, id: &str) -> Self {
        let runtime = suite.program("containerd-shim-runc-v2").display().to_string();
        Self { runtime, spec: Some(any_json(messages::SPEC, &json!({}))), ..Self::new(cx, id) }
    }

    pub(crate) fn record(&self) -> Sandbox {
        Sandbox {
            spec: self.spec.clone(),
            sandbox_id: self.id.clone(),
            runtime: Some(Runtime { name: self.runtime.clone(), options: None }),
            sandboxer: self.sandboxer.clone(),
            ..Sandbox::default()
        }
    }

    pub(crate) async fn store(&self, sandbox: Sandbox) -> Answer<Sandbox> {
        let request = self.client.request(StoreCreateRequest { sandbox: Some(sandbox) });
        Ok(self.client.api().sandbox_store().create(request).await?.into_inner().sandbox.unwrap_or_default())
    }

    pub(crate) async fn forget(&self) -> Answer<()> {
        let request = self.client.request(StoreDeleteRequest { sandbox_id: self.id.clone() });
        self.client.api().sandbox_store().delete(request).await.map(drop)
    }

    pub(crate) async fn get(&self) -> Answer<Sandbox> {
        let request = self.client.request(StoreGetRequest { sandbox_id: self.id.clone() });
        Ok(self.client.api().sandbox_store().get(request).await?.into_inner().sandbox.unwrap_or_default())
    }

    pub(crate) async fn create(&self) -> Answer<()> {
        let request = ControllerCreateRequest {
            sandbox_id: self.id.clone(),
            sandbox: Some(self.record()),
            sandboxer: self.sandboxer.clone(),
            ..ControllerCreateRequest::default()
        };
        self.client.api().sandbox_controller().create(self.client.request(request)).await.map(drop)
    }

    pub(crate) async fn start(&self) -> Answer<ControllerStartResponse> {
        let request = ControllerStartRequest { sandbox_id: self.id.clone(), sandboxer: self.sandboxer.clone() };
        Ok(self.client.api().sandbox_controller().start(self.client.request(request)).await?.into_inner())
    }

    pub(crate) async fn stop(&self) -> Answer<()> {
        let (sandbox_id, sandboxer) = (self.id.clone(), self.sandboxer.clone());
        let request = ControllerStopRequest { sandbox_id, sandboxer, timeout_secs: 1 };
        self.client.api().sandbox_controller().stop(self.client.request(request)).await.map(drop)
    }

    pub(crate) async fn status(&self) -> Answer<ControllerStatusResponse> {
        let (sandbox_id, sandboxer) = (self.id.clone(), self.sandboxer.clone());
        let request = ControllerStatusRequest { sandbox_id, sandboxer, verbose: false };
        Ok(self.client.api().sandbox_controller().status(self.client.request(request)).await?.into_inner())
    }

    pub(crate) async fn wait(&self) -> Answer<ControllerWaitResponse> {
        let request = ControllerWaitRequest { sandbox_id: self.id.clone(), sandboxer: self.sandboxer.clone() };
        Ok(self.client.api().sandbox_controller().wait(self.client.request(request)).await?.into_inner())
    }

    pub(crate) async fn shut_down(&self) -> Answer<()> {
        let request = ControllerShutdownRequest { sandbox_id: self.id.clone(), sandboxer: self.sandboxer.clone() };
        self.client.api().sandbox_controller().shutdown(self.client.request(request)).await.map(drop)
    }

    /// Record, shim, start.
    pub(crate) async fn run(&self) -> Result<ControllerStartResponse> {
        self.store(self.record()).await.context("record")?;
        self.create().await.context("create")?;
        self.start().await.context("start")
    }

    /// What `ctr sandboxes remove` does.
    pub(crate) async fn remove(&self) -> Result<()> {
        self.stop().await.context("stop")?;
        unless(self.shut_down().await, Code::NotFound).context("shutdown")?;
        unless(self.forget().await, Code::NotFound).context("delete")
    }
}

pub(crate) fn unless(answer: Answer<()>, code: Code) -> Result<()> {
    match answer {
        Err(status) if status.code() != code => Err(status.into()),
        _ => Ok(()),
    }
}

pub(crate) fn refused<T: std::fmt::Debug>(answer: Answer<T>, code: Code, message: &str) -> Result<()> {
    let status = answer.err().context("it was accepted")?;
    ensure!(status.code() == code && status.message().contains(message), "{status:?} instead of {code:?} with {message:?}");
    Ok(())
}

/// What every event about a sandbox begins with.
#[derive(Clone, PartialEq, prost::Message)]
struct SandboxEvent {
    #[prost(string, tag = "1")]
    sandbox_id: String,
}

/// Topics and sandboxes of the events about sandboxes.
#[derive(Debug, Clone, Default)]
pub(crate) struct Published(Arc<Mutex<Vec<String>>>);

impl Published {
    pub(crate) async fn from(client: &Client) -> Result<Self> {
        let published = Self::default();
        let (mut stream, list) = (client.subscribe().await?, published.clone());
        tokio::spawn(async move {
            while let Ok(Some(envelope)) = stream.message().await {
                let bytes = envelope.event.unwrap_or_default().value;
                if !envelope.topic.starts_with("/sandboxes/") {
                    continue;
                }
                let event = SandboxEvent::decode(&*bytes).unwrap_or_default();
                let line = format!("{} {}", envelope.topic, event.sandbox_id);
                list.0.lock().expect("no panic under this lock").push(line);
            }
        });
        Ok(published)
    }

    fn all(&self) -> Vec<String> {
        self.0.lock().expect("no panic under this lock").clone()
    }

    pub(crate) async fn are(&self, expected: &[&str]) -> Result<()> {
        eventually_true(format!("{expected:?}"), SOON, || self.all().len() >= expected.len()).await?;
        ensure!(self.all() == expected, "{:?}", self.all());
        Ok(())
    }
}
