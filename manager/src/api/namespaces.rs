//! `containerd.services.namespaces.v1.Namespaces`

use std::sync::Arc;

use containerd_client::events::{NamespaceCreate, NamespaceDelete, NamespaceUpdate};
use containerd_client::services::v1::{
    CreateNamespaceRequest, CreateNamespaceResponse, DeleteNamespaceRequest, GetNamespaceRequest, GetNamespaceResponse,
    ListNamespacesRequest, ListNamespacesResponse, Namespace as Record, UpdateNamespaceRequest, UpdateNamespaceResponse,
};

use super::call::Call;
use super::mask;
use crate::error::{Error, Object, Result};
use crate::events::Exchange;
use crate::name::{self, Namespace};
use crate::store::{Store, blobs, containers, images, leases, namespaces, sandboxes, snapshots};

fn not_found(name: &str) -> Error {
    Error::NotFound(Object::Namespace(name.to_owned()))
}

/// The service.
#[derive(Debug)]
pub(crate) struct Namespaces {
    pub(crate) store: Store,
    pub(crate) events: Arc<Exchange>,
}

impl Namespaces {
    /// As with containerd, a namespace that does not exist has no labels: clients query defaults before they use it.
    pub(super) async fn get(self: Arc<Self>, _call: Call, request: GetNamespaceRequest) -> Result<GetNamespaceResponse> {
        Namespace::parse(&request.name)?;
        let name = request.name.clone();
        let found = self.store.read(move |db| namespaces::get(db, &name)).await?;
        Ok(GetNamespaceResponse { namespace: Some(found.unwrap_or(Record { name: request.name, ..Record::default() })) })
    }

    pub(super) async fn list(self: Arc<Self>, _call: Call, _request: ListNamespacesRequest) -> Result<ListNamespacesResponse> {
        Ok(ListNamespacesResponse { namespaces: self.store.read(namespaces::list).await? })
    }

    pub(super) async fn create(self: Arc<Self>, _call: Call, request: CreateNamespaceRequest) -> Result<CreateNamespaceResponse> {
        let mut record = request.namespace.ok_or_else(|| Error::Invalid("namespace must be set".to_owned()))?;
        let namespace = Namespace::parse(&record.name)?;
        record.labels = mask::without_empty(record.labels);
        name::labels(&record.labels)?;
        let new = record.clone();
        self.store
            .write(move |db| match namespaces::get(db, &new.name)? {
                Some(_) => Err(Error::AlreadyExists(Object::Namespace(new.name))),
                None => namespaces::put(db, &new),
            })
            .await?;
        let event = NamespaceCreate { name: record.name.clone(), labels: record.labels.clone() };
        self.events.publish(&namespace, "/namespaces/create", &event);
        Ok(CreateNamespaceResponse { namespace: Some(record) })
    }

    pub(super) async fn update(self: Arc<Self>, _call: Call, request: UpdateNamespaceRequest) -> Result<UpdateNamespaceResponse> {
        let new = request.namespace.ok_or_else(|| Error::Invalid("namespace must be set".to_owned()))?;
        let namespace = Namespace::parse(&new.name)?;
        let paths = mask::paths(request.update_mask);
        let updated = self
            .store
            .write(move |db| {
                // as with containerd, setting labels creates the namespace
                let mut record = namespaces::get(db, &new.name)?.unwrap_or_else(|| Record { name: new.name.clone(), ..Record::default() });
                apply(&mut record, &new, paths.as_deref())?;
                namespaces::put(db, &record)?;
                Ok(record)
            })
            .await?;
        let event = NamespaceUpdate { name: updated.name.clone(), labels: updated.labels.clone() };
        self.events.publish(&namespace, "/namespaces/update", &event);
        Ok(UpdateNamespaceResponse { namespace: Some(updated) })
    }

    pub(super) async fn delete(self: Arc<Self>, _call: Call, request: DeleteNamespaceRequest) -> Result<()> {
        let namespace = Namespace::parse(&request.name)?;
        let name = request.name.clone();
        self.store
            .remove(move |db| {
                let kinds = [
                    ("images", images::is_empty(db, &name)?),
                    ("blobs", blobs::is_empty(db, &name)?),
                    ("snapshots", snapshots::is_empty(db, &name)?),
                    ("containers", containers::is_empty(db, &name)?),
                    ("sandboxes", sandboxes::is_empty(db, &name)?),
                ];
                let left: Vec<_> = kinds.into_iter().filter(|(_, is_empty)| !is_empty).map(|(kind, _)| kind).collect();
                if !left.is_empty() {
                    let left = left.join(", ");
                    return Err(Error::Precondition(format!("namespace {name:?} must be empty, but it still has {left}")));
                }
                // as with containerd, leases do not keep a namespace, and are deleted with it
                leases::remove_all(db, &name)?;
                if namespaces::remove(db, &name)? { Ok(()) } else { Err(not_found(&name)) }
            })
            .await?;
        self.events.publish(&namespace, "/namespaces/delete", &NamespaceDelete { name: request.name });
        Ok(())
    }
}

fn apply(record: &mut Record, new: &Record, paths: Option<&[String]>) -> Result<()> {
    let wrong = |path: &str| Error::Invalid(format!("cannot update field {path:?} of namespace {:?}", new.name));
    mask::update_labels(&mut record.labels, &new.labels, paths).map_err(wrong)?;
    name::labels(&record.labels)
}
