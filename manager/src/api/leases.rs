//! `containerd.services.leases.v1.Leases`

use std::borrow::Cow;
use std::sync::Arc;

use containerd_client::services::v1::{
    AddResourceRequest, CreateRequest, CreateResponse, DeleteRequest, DeleteResourceRequest, Lease, ListRequest, ListResourcesRequest,
    ListResourcesResponse, ListResponse, Resource as WireResource,
};

use super::call::Call;
use super::mask;
use super::search::{Filters, Search};
use crate::content::Digest;
use crate::error::{Error, Object, Result};
use crate::filter::{Fields, label, text};
use crate::gate::Gate;
use crate::gc::Collector;
use crate::store::{Meta, Resource, Store, leases, namespaces, resources};
use crate::{host, name, timestamp};

impl Fields for Lease {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        match path {
            ["id"] => text(&self.id),
            ["labels", key @ ..] => label(&self.labels, key),
            _ => None,
        }
    }
}

fn must_exist(db: &Meta<'_>, namespace: &str, id: &str) -> Result<()> {
    leases::get(db, namespace, id)?.map(drop).ok_or_else(|| Error::NotFound(Object::Lease(id.to_owned())))
}

/// The service.
#[derive(Debug)]
pub(crate) struct Leases {
    pub(crate) store: Store,
    pub(crate) filters: Filters,
    pub(crate) gate: Gate,
    pub(crate) collector: Arc<Collector>,
}

impl Leases {
    pub(super) async fn create(self: Arc<Self>, call: Call, request: CreateRequest) -> Result<CreateResponse> {
        let namespace = call.namespace()?;
        if request.id.len() > MAX_ID_BYTES {
            return Err(Error::Invalid(format!("lease id of {} bytes", request.id.len())));
        }
        name::labels(&request.labels)?;
        // without an id, one is generated
        let id = if request.id.is_empty() { host::kernel_id("uuid")? } else { request.id };
        let lease = Lease { id, created_at: Some(timestamp::now()), labels: mask::without_empty(request.labels) };
        let new = lease.clone();
        self.store
            .write(move |db| {
                if leases::get(db, namespace.as_str(), &new.id)?.is_some() {
                    return Err(Error::AlreadyExists(Object::Lease(new.id)));
                }
                namespaces::ensure(db, namespace.as_str())?;
                leases::put(db, namespace.as_str(), &new.id, &new)?;
                leases::note_expiry(db, namespace.as_str(), &new)
            })
            .await?;
        Ok(CreateResponse { lease: Some(lease) })
    }

    pub(super) async fn delete(self: Arc<Self>, call: Call, request: DeleteRequest) -> Result<()> {
        let namespace = call.namespace()?;
        let pass = self.gate.enter().await?;
        self.store
            .remove(move |db| {
                must_exist(db, namespace.as_str(), &request.id)?;
                leases::remove(db, namespace.as_str(), &request.id).map(drop)
            })
            .await?;
        drop(pass);
        if request.sync { self.collector.collect().await } else { Ok(()) }
    }

    pub(super) async fn list(self: Arc<Self>, call: Call, request: ListRequest) -> Result<ListResponse> {
        let search = Search::new(&self.store, &self.filters, call.namespace()?, &request.filters, leases::page, |lease| &lease.id)?;
        Ok(ListResponse { leases: search.all().await? })
    }

    pub(super) async fn add_resource(self: Arc<Self>, call: Call, request: AddResourceRequest) -> Result<()> {
        let (namespace, resource) = (call.namespace()?, resource(request.resource)?);
        self.store
            .write(move |db| {
                must_exist(db, namespace.as_str(), &request.id)?;
                resources::add(db, namespace.as_str(), &request.id, &resource)
            })
            .await
    }

    pub(super) async fn delete_resource(self: Arc<Self>, call: Call, request: DeleteResourceRequest) -> Result<()> {
        let (namespace, resource) = (call.namespace()?, resource(request.resource)?);
        self.store
            .remove(move |db| {
                must_exist(db, namespace.as_str(), &request.id)?;
                resources::remove(db, namespace.as_str(), &request.id, &resource)
            })
            .await
    }

    pub(super) async fn list_resources(self: Arc<Self>, call: Call, request: ListResourcesRequest) -> Result<ListResourcesResponse> {
        let namespace = call.namespace()?;
        let held = self
            .store
            .read(move |db| {
                must_exist(db, namespace.as_str(), &request.id)?;
                resources::list(db, namespace.as_str(), &request.id)
            })
            .await?;
        Ok(ListResourcesResponse { resources: held.into_iter().map(|held| WireResource { id: held.id, r#type: held.kind }).collect() })
    }
}

/// What a lease can hold: `content`, `ingests`, `images` or `snapshots/NAME`.
fn resource(resource: Option<WireResource>) -> Result<Resource> {
    let resource = resource.ok_or_else(|| Error::Invalid("resource must be set".to_owned()))?;
    let parts: Vec<_> = resource.r#type.split('/').collect();
    let is_possible = match parts[..] {
        ["content" | "ingests" | "images"] => true,
        ["snapshots", snapshotter] => name::identifier("snapshotter", snapshotter).is_ok(),
        ["content" | "ingests" | "images" | "snapshots", ..] => false,
        _ => return Err(Error::Unimplemented(format!("lease resource of type {:?}", resource.r#type))),
    };
    if !is_possible {
        return Err(Error::Invalid(format!("lease resource of type {:?}", resource.r#type)));
    }
    if resource.id.is_empty() || resource.id.len() > MAX_RESOURCE_BYTES {
        return Err(Error::Invalid(format!("lease resource id of {} bytes", resource.id.len())));
    }
    if resource.r#type == "content" && Digest::of(&resource.id).is_none() {
        return Err(Error::Invalid(format!("content resource id {:?} is not a digest", resource.id)));
    }
    Ok(Resource { kind: resource.r#type, id: resource.id })
}

/// Clients make up ids that are no identifiers.
const MAX_ID_BYTES: usize = 256;
const MAX_RESOURCE_BYTES: usize = 4096;

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn what_a_lease_can_hold_is_what_containerd_lets_it() {
        let digest = format!("sha256:{}", "0f".repeat(32));
        let held = |kind: &str, id: &str| resource(Some(WireResource { id: id.to_owned(), r#type: kind.to_owned() }));
        for kind in ["content", "ingests", "images", "snapshots/overlayfs"] {
            assert!(held(kind, &digest).is_ok(), "{kind}");
        }
        for (kind, id, code) in [
            ("content", "sha256:1", Code::InvalidArgument),
            ("content", "md5:00", Code::InvalidArgument),
            ("content", &digest.to_uppercase(), Code::InvalidArgument),
            ("content/x", &digest, Code::InvalidArgument),
            ("images/x", "i", Code::InvalidArgument),
            ("snapshots", "s", Code::InvalidArgument),
            ("snapshots/a/b", "s", Code::InvalidArgument),
            ("snapshots/", "s", Code::InvalidArgument),
            ("ingests", "", Code::InvalidArgument),
            ("volumes", "v", Code::Unimplemented),
            ("", "v", Code::Unimplemented),
        ] {
            assert_eq!(held(kind, id).map(drop).expect_err(kind).code(), code, "{kind} {id}");
        }
    }
}
