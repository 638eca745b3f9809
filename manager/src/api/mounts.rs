//! `containerd.services.mounts.v1.Mounts`

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

use tokio_stream::Stream;
use tonic::Status;

use super::call::Call;
use super::mask;
use super::search::Filters;
use crate::error::{Error, Result};
use crate::filter::{Fields, Filter, label, text};
use crate::mounts::messages::{ActivateRequest, ActivationInfo, ActivationResponse, ListRequest, NameRequest, UpdateRequest};
use crate::mounts::{Activation, Mounts};

impl Fields for ActivationInfo {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        match path {
            ["name"] => text(&self.name),
            ["labels", key @ ..] => label(&self.labels, key),
            _ => None,
        }
    }
}

/// The service.
#[derive(Debug)]
pub(crate) struct MountService {
    pub(crate) mounts: Mounts,
    pub(crate) filters: Filters,
}

impl MountService {
    pub(super) async fn activate(self: Arc<Self>, call: Call, request: ActivateRequest) -> Result<ActivationResponse> {
        let ActivateRequest { name, mounts, labels, temporary } = request;
        let asked = Activation { name, mounts, labels: mask::without_empty(labels), temporary, lease: call.lease() };
        Ok(ActivationResponse { info: Some(self.mounts.activate(&call.namespace()?, asked).await?) })
    }

    pub(super) async fn deactivate(self: Arc<Self>, call: Call, request: NameRequest) -> Result<()> {
        self.mounts.deactivate(&call.namespace()?, &request.name).await
    }

    pub(super) async fn info(self: Arc<Self>, call: Call, request: NameRequest) -> Result<ActivationResponse> {
        Ok(ActivationResponse { info: Some(self.mounts.info(&call.namespace()?, &request.name).await?) })
    }

    /// Only labels can change.
    pub(super) async fn update(self: Arc<Self>, call: Call, request: UpdateRequest) -> Result<ActivationResponse> {
        let new = request.info.ok_or_else(|| Error::Invalid("info must be set".to_owned()))?;
        let (name, paths) = (new.name.clone(), mask::paths(request.update_mask));
        let change = move |labels: &mut HashMap<String, String>| {
            let wrong = |path: &str| Error::Invalid(format!("cannot update {path:?} field on mount {:?}", new.name));
            mask::update_labels(labels, &new.labels, paths.as_deref()).map_err(wrong)
        };
        Ok(ActivationResponse { info: Some(self.mounts.relabel(&call.namespace()?, &name, change).await?) })
    }

    pub(super) async fn list(
        self: Arc<Self>,
        call: Call,
        request: ListRequest,
    ) -> Result<impl Stream<Item = Result<ActivationResponse, Status>>> {
        let filter = Filter::parse(&request.filters)?;
        let found = self.filters.matching(&filter, self.mounts.list(&call.namespace()?).await?).await?;
        Ok(tokio_stream::iter(found.into_iter().map(|info| Ok(ActivationResponse { info: Some(info) }))))
    }
}
