//! `containerd.services.sandbox.v1.Controller`: sandboxes that run, each in a shim of its own.
//!
//! Clients of containerd 1.7 name no controller, and never call Create: for them a sandbox is made from its record when it is started, and one
//! that has a record but no shim is shut down already.

use std::sync::Arc;
use std::time::Duration;

use containerd_client::services::v1::sandbox::{
    ControllerCreateRequest, ControllerCreateResponse, ControllerMetricsRequest, ControllerMetricsResponse, ControllerPlatformRequest,
    ControllerPlatformResponse, ControllerShutdownRequest, ControllerShutdownResponse, ControllerStartRequest, ControllerStartResponse,
    ControllerStatusRequest, ControllerStatusResponse, ControllerStopRequest, ControllerStopResponse, ControllerUpdateRequest,
    ControllerUpdateResponse, ControllerWaitRequest, ControllerWaitResponse,
};
use containerd_client::types::{Metric, Platform, Sandbox};
use containerd_shim_protos::sandbox_api as shim;

use super::call::Call;
use super::sandboxes::{given, not_found};
use crate::error::{Error, Object, Result};
use crate::events::{Exchange, SandboxCreate, SandboxStart};
use crate::name::{self, Namespace};
use crate::store::{Store, sandboxes};
use crate::tasks::limits::{LONG, SHORT, STATE};
use crate::tasks::{NewSandbox, Shim, Task, Tasks, Unanswered};
use crate::{timestamp, wire};

/// The service.
#[derive(Debug)]
pub(crate) struct SandboxController {
    pub(crate) tasks: Arc<Tasks>,
    /// Records of sandboxes.
    pub(crate) store: Store,
    pub(crate) events: Arc<Exchange>,
}

impl SandboxController {
    fn find(&self, call: &Call, sandboxer: &str, id: &str) -> Result<Arc<Task>> {
        served(sandboxer)?;
        self.tasks.find_sandbox(&call.namespace()?, id)
    }

    async fn record(&self, namespace: &Namespace, id: &str) -> Result<Sandbox> {
        let (namespace, id) = (namespace.clone(), id.to_owned());
        self.store.read(move |db| sandboxes::get(db, namespace.as_str(), &id)?.ok_or_else(|| not_found(&id))).await
    }

    pub(super) async fn create(self: Arc<Self>, call: Call, request: ControllerCreateRequest) -> Result<ControllerCreateResponse> {
        let namespace = call.namespace()?;
        served(&request.sandboxer)?;
        let record = match request.sandbox {
            Some(record) => record,
            None => self.record(&namespace, &request.sandbox_id).await?,
        };
        name::identifier("sandbox ID", &record.sandbox_id)?;
        if !request.sandbox_id.is_empty() && request.sandbox_id != record.sandbox_id {
            return Err(Error::Invalid(format!("sandbox_id {:?} is not that of the sandbox", request.sandbox_id)));
        }
        let new = NewSandbox {
            record,
            options: request.options,
            rootfs: request.rootfs,
            netns_path: request.netns_path,
            annotations: request.annotations,
        };
        let sandbox_id = self.make(&namespace, new).await?;
        Ok(ControllerCreateResponse { sandbox_id })
    }

    async fn make(&self, namespace: &Namespace, new: NewSandbox) -> Result<String> {
        let sandbox_id = new.record.sandbox_id.clone();
        self.tasks.create_sandbox(namespace, new).await?;
        self.events.publish(namespace, "/sandboxes/create", &SandboxCreate { sandbox_id: sandbox_id.clone() });
        Ok(sandbox_id)
    }

    pub(super) async fn start(self: Arc<Self>, call: Call, request: ControllerStartRequest) -> Result<ControllerStartResponse> {
        let namespace = call.namespace()?;
        let sandbox = match self.find(&call, &request.sandboxer, &request.sandbox_id) {
            Err(Error::NotFound(Object::Sandbox(_))) if request.sandboxer.is_empty() => {
                let record = self.record(&namespace, &request.sandbox_id).await?;
                self.make(&namespace, NewSandbox { record, ..NewSandbox::default() }).await?;
                self.tasks.find_sandbox(&namespace, &request.sandbox_id)?
            }
            found => found?,
        };
        let shim = sandbox.shim().await?;
        let (address, version) = endpoint(&shim);
        drop(shim);
        let started = self.tasks.start_sandbox(&sandbox).await?;
        self.events.publish(&namespace, "/sandboxes/start", &SandboxStart { sandbox_id: request.sandbox_id.clone() });
        Ok(ControllerStartResponse {
            sandbox_id: request.sandbox_id,
            pid: started.pid,
            created_at: wire::time_from_shim(started.created_at.into_option()),
            address,
            version,
            ..ControllerStartResponse::default()
        })
    }

    pub(super) async fn platform(self: Arc<Self>, call: Call, request: ControllerPlatformRequest) -> Result<ControllerPlatformResponse> {
        let sandbox = self.find(&call, &request.sandboxer, &request.sandbox_id)?;
        let ask = shim::PlatformRequest { sandbox_id: request.sandbox_id, ..shim::PlatformRequest::default() };
        let answer: shim::PlatformResponse = sandbox.shim().await?.call_sandbox("Platform", &ask, Some(SHORT)).await?;
        let platform = answer.platform.into_option().unwrap_or_default();
        let platform =
            Platform { os: platform.os, architecture: platform.architecture, variant: platform.variant, os_version: platform.os_version };
        Ok(ControllerPlatformResponse { platform: Some(platform) })
    }

    /// As with containerd, a sandbox without a shim has stopped.
    pub(super) async fn stop(self: Arc<Self>, call: Call, request: ControllerStopRequest) -> Result<ControllerStopResponse> {
        let shim = match self.find(&call, &request.sandboxer, &request.sandbox_id) {
            Ok(sandbox) => sandbox.shim().await,
            Err(error) => Err(error),
        };
        let shim = match shim {
            Err(Error::NotFound(Object::Sandbox(_)) | Error::Precondition(_)) => return Ok(ControllerStopResponse {}),
            shim => shim?,
        };
        let stop = shim::StopSandboxRequest {
            sandbox_id: request.sandbox_id,
            timeout_secs: request.timeout_secs,
            ..shim::StopSandboxRequest::default()
        };
        let limit = LONG + Duration::from_secs(request.timeout_secs.into());
        match shim.call_sandbox::<shim::StopSandboxResponse>("StopSandbox", &stop, Some(limit)).await {
            Err(reason) if !reason.is_not_found() && !matches!(reason, Unanswered::Lost) => Err(reason.into()),
            _ => Ok(ControllerStopResponse {}),
        }
    }

    pub(super) async fn wait(self: Arc<Self>, call: Call, request: ControllerWaitRequest) -> Result<ControllerWaitResponse> {
        let ended = self.find(&call, &request.sandboxer, &request.sandbox_id)?.end_of_sandbox().await?;
        Ok(ControllerWaitResponse { exit_status: ended.status, exited_at: ended.at })
    }

    /// As with containerd, a sandbox that is not there has just exited.
    pub(super) async fn status(self: Arc<Self>, call: Call, request: ControllerStatusRequest) -> Result<ControllerStatusResponse> {
        let status = match self.find(&call, &request.sandboxer, &request.sandbox_id) {
            Ok(sandbox) => sandbox.status_of_sandbox(request.verbose).await,
            Err(error) => Err(error),
        };
        let (status, shim) = match status {
            Err(Error::NotFound(Object::Sandbox(sandbox_id))) => {
                return Ok(ControllerStatusResponse {
                    sandbox_id,
                    exited_at: Some(timestamp::now()),
                    ..ControllerStatusResponse::default()
                });
            }
            status => status?,
        };
        let (address, version) = shim.as_ref().map(endpoint).unwrap_or_default();
        Ok(ControllerStatusResponse {
            sandbox_id: status.sandbox_id,
            pid: status.pid,
            state: status.state,
            info: status.info,
            created_at: wire::time_from_shim(status.created_at.into_option()),
            exited_at: wire::time_from_shim(status.exited_at.into_option()),
            extra: Some(status.extra.into_option().map(wire::from_shim).unwrap_or_default()),
            address,
            version,
        })
    }

    pub(super) async fn shutdown(self: Arc<Self>, call: Call, request: ControllerShutdownRequest) -> Result<ControllerShutdownResponse> {
        let shut_down = match self.find(&call, &request.sandboxer, &request.sandbox_id) {
            Ok(sandbox) => self.tasks.shut_down(&sandbox).await,
            Err(error) => Err(error),
        };
        match shut_down {
            Err(Error::NotFound(Object::Sandbox(_))) if request.sandboxer.is_empty() => {
                self.record(&call.namespace()?, &request.sandbox_id).await?;
            }
            shut_down => shut_down?,
        }
        Ok(ControllerShutdownResponse {})
    }

    pub(super) async fn metrics(self: Arc<Self>, call: Call, request: ControllerMetricsRequest) -> Result<ControllerMetricsResponse> {
        let sandbox = self.find(&call, &request.sandboxer, &request.sandbox_id)?;
        let ask = shim::SandboxMetricsRequest { sandbox_id: request.sandbox_id, ..shim::SandboxMetricsRequest::default() };
        let answer: shim::SandboxMetricsResponse = sandbox.shim().await?.call_sandbox("SandboxMetrics", &ask, Some(STATE)).await?;
        let metrics = answer.metrics.into_option().map(|metric| Metric {
            timestamp: wire::time_from_shim(metric.timestamp.into_option()),
            id: metric.id,
            data: metric.data.into_option().map(wire::from_shim),
        });
        Ok(ControllerMetricsResponse { metrics })
    }

    /// As with containerd, shims are not told of a changed record.
    pub(super) async fn update(self: Arc<Self>, call: Call, request: ControllerUpdateRequest) -> Result<ControllerUpdateResponse> {
        call.namespace()?;
        served(&request.sandboxer)?;
        given(request.sandbox)?;
        Ok(ControllerUpdateResponse {})
    }
}

/// Errors: there is no such controller.
fn served(sandboxer: &str) -> Result<()> {
    match sandboxer {
        // clients of containerd 1.7 name none
        "" | SANDBOX_CONTROLLER => Ok(()),
        other => Err(Error::NotFound(Object::SandboxController(other.to_owned()))),
    }
}

/// Where a sandbox's shim serves, as containerd writes it, and the version of its task service.
fn endpoint(shim: &Shim) -> (String, u32) {
    let at = shim.at();
    (format!("{}+{}", at.protocol, at.address), at.version.try_into().unwrap_or_default())
}

/// The only controller.
pub(super) const SANDBOX_CONTROLLER: &str = "shim";
