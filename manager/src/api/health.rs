//! `grpc.health.v1.Health`

use std::collections::HashMap;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::call::Call;
use crate::error::{Error, Object, Result};
use crate::gate::Gate;

/// The service whose health is queried; empty for the whole server.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct HealthCheckRequest {
    #[prost(string, tag = "1")]
    service: String,
}

/// A health; 1 is `SERVING`, 3 `SERVICE_UNKNOWN`.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// A message without fields.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct HealthListRequest {}

/// The health of a known service.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct HealthListResponse {
    #[prost(map = "string, message", tag = "1")]
    statuses: HashMap<String, HealthCheckResponse>,
}

/// The service.
#[derive(Debug)]
pub(crate) struct Health {
    pub(crate) gate: Gate,
}

impl Health {
    pub(super) async fn check(self: Arc<Self>, _call: Call, request: HealthCheckRequest) -> Result<HealthCheckResponse> {
        if request.service.is_empty() {
            return Ok(HealthCheckResponse { status: SERVING });
        }
        Err(Error::NotFound(Object::Service(request.service)))
    }

    pub(super) async fn list(self: Arc<Self>, _call: Call, _request: HealthListRequest) -> Result<HealthListResponse> {
        Ok(HealthListResponse { statuses: HashMap::from([(String::new(), HealthCheckResponse { status: SERVING })]) })
    }

    pub(super) async fn watch(
        self: Arc<Self>,
        _call: Call,
        request: HealthCheckRequest,
    ) -> Result<impl Stream<Item = Result<HealthCheckResponse, Status>>> {
        let status = if request.service.is_empty() { SERVING } else { SERVICE_UNKNOWN };
        let (send, statuses) = mpsc::channel(1);
        tokio::spawn(async move {
            let first = send.send(Ok(HealthCheckResponse { status })).await;
            // it does not change until this process exits
            tokio::select! {
                () = self.gate.retired(), if first.is_ok() => {
                    // the client may have disconnected
                    let _ = send.send(Err(Status::unavailable("this x-manager has ended; ask the next one"))).await;
                }
                () = send.closed() => {}
            }
        });
        Ok(ReceiverStream::new(statuses))
    }
}

const SERVING: i32 = 1;
const SERVICE_UNKNOWN: i32 = 3;
