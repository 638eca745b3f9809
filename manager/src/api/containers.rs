//! `containerd.services.containers.v1.Containers`

use std::borrow::Cow;
use std::sync::Arc;

use containerd_client::events::container_create::Runtime as EventRuntime;
use containerd_client::events::{ContainerCreate, ContainerDelete, ContainerUpdate};
use containerd_client::services::v1::{
    Container, CreateContainerRequest, CreateContainerResponse, DeleteContainerRequest, GetContainerRequest, GetContainerResponse,
    ListContainerMessage, ListContainersRequest, ListContainersResponse, UpdateContainerRequest, UpdateContainerResponse,
};
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;

use super::call::Call;
use super::mask;
use super::search::{Filters, Search};
use crate::error::{Error, Object, Result};
use crate::events::Exchange;
use crate::filter::{Fields, label, text};
use crate::gate::Gate;
use crate::name::Namespace;
use crate::store::{Meta, Store, containers, namespaces};
use crate::tasks::Tasks;
use crate::{name, timestamp};

impl Fields for Container {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        match path {
            ["id"] => text(&self.id),
            ["image"] => text(&self.image),
            ["runtime", "name"] => text(&self.runtime.as_ref()?.name),
            ["labels", key @ ..] => label(&self.labels, key),
            _ => None,
        }
    }
}

pub(crate) fn not_found(namespace: &Namespace, id: &str) -> Error {
    Error::NotFound(Object::Container { id: id.to_owned(), namespace: Some(namespace.to_string()) })
}

/// The service.
#[derive(Debug)]
pub(crate) struct Containers {
    pub(crate) store: Store,
    pub(crate) events: Arc<Exchange>,
    /// Their tasks may have ended, and go with them.
    pub(crate) tasks: Arc<Tasks>,
    pub(crate) gate: Gate,
    pub(crate) filters: Filters,
}

impl Containers {
    fn search(&self, call: &Call, filters: &[String]) -> Result<Search<Container>> {
        Search::new(&self.store, &self.filters, call.namespace()?, filters, containers::page, |container| &container.id)
    }

    pub(super) async fn get(self: Arc<Self>, call: Call, request: GetContainerRequest) -> Result<GetContainerResponse> {
        let (namespace, id) = (call.namespace()?, request.id);
        let get = move |db: &Meta<'_>| containers::get(db, namespace.as_str(), &id)?.ok_or_else(|| not_found(&namespace, &id));
        Ok(GetContainerResponse { container: Some(self.store.read(get).await?) })
    }

    pub(super) async fn list(self: Arc<Self>, call: Call, request: ListContainersRequest) -> Result<ListContainersResponse> {
        Ok(ListContainersResponse { containers: self.search(&call, &request.filters)?.all().await? })
    }

    pub(super) async fn list_stream(
        self: Arc<Self>,
        call: Call,
        request: ListContainersRequest,
    ) -> Result<impl Stream<Item = Result<ListContainerMessage, Status>>> {
        let found = self.search(&call, &request.filters)?.each().await?;
        Ok(found.map(|container| Ok(ListContainerMessage { container: Some(container?) })))
    }

    pub(super) async fn create(self: Arc<Self>, call: Call, request: CreateContainerRequest) -> Result<CreateContainerResponse> {
        let namespace = call.namespace()?;
        let mut container = request.container.ok_or_else(|| Error::Invalid("container must be set".to_owned()))?;
        container.labels = mask::without_empty(container.labels);
        validate(&container)?;
        let now = timestamp::now();
        (container.created_at, container.updated_at) = (Some(now), Some(now));
        let (new, place) = (container.clone(), namespace.clone());
        self.store
            .write(move |db| {
                if containers::get(db, place.as_str(), &new.id)?.is_some() {
                    return Err(Error::AlreadyExists(Object::Container { id: new.id, namespace: None }));
                }
                namespaces::ensure(db, place.as_str())?;
                containers::put(db, place.as_str(), &new.id, &new)
            })
            .await?;
        let runtime = container.runtime.clone().map(|runtime| EventRuntime { name: runtime.name, options: runtime.options });
        let event = ContainerCreate { id: container.id.clone(), image: container.image.clone(), runtime };
        self.events.publish(&namespace, "/containers/create", &event);
        Ok(CreateContainerResponse { container: Some(container) })
    }

    pub(super) async fn update(self: Arc<Self>, call: Call, request: UpdateContainerRequest) -> Result<UpdateContainerResponse> {
        let namespace = call.namespace()?;
        let new = request.container.ok_or_else(|| Error::Invalid("container must be set".to_owned()))?;
        name::identifier("container id", &new.id)?;
        let (paths, place) = (mask::paths(request.update_mask), namespace.clone());
        let updated = self
            .store
            .write(move |db| {
                let mut container = containers::get(db, place.as_str(), &new.id)?.ok_or_else(|| not_found(&place, &new.id))?;
                apply(&mut container, &new, paths.as_deref())?;
                validate(&container)?;
                container.updated_at = Some(timestamp::now());
                containers::put(db, place.as_str(), &new.id, &container)?;
                Ok(container)
            })
            .await?;
        let event = ContainerUpdate {
            id: updated.id.clone(),
            image: updated.image.clone(),
            labels: updated.labels.clone(),
            snapshot_key: updated.snapshot_key.clone(),
        };
        self.events.publish(&namespace, "/containers/update", &event);
        Ok(UpdateContainerResponse { container: Some(updated) })
    }

    pub(super) async fn delete(self: Arc<Self>, call: Call, request: DeleteContainerRequest) -> Result<()> {
        let namespace = call.namespace()?;
        let pass = self.gate.enter().await?;
        let (place, id) = (namespace.clone(), request.id.clone());
        self.store
            .remove(move |db| if containers::remove(db, place.as_str(), &id)? { Ok(()) } else { Err(not_found(&place, &id)) })
            .await?;
        self.tasks.collect_with_container(&namespace, &request.id, &pass).await;
        self.events.publish(&namespace, "/containers/delete", &ContainerDelete { id: request.id });
        Ok(())
    }
}

/// Takes what the paths name from `new`; without paths everything that may change, and the rest must be the same.
fn apply(container: &mut Container, new: &Container, paths: Option<&[String]>) -> Result<()> {
    let Some(paths) = paths else {
        let runtime_of = |container: &Container| container.runtime.as_ref().map(|runtime| runtime.name.clone()).unwrap_or_default();
        if new.snapshotter != container.snapshotter {
            return Err(Error::Invalid("container.Snapshotter field is immutable".to_owned()));
        }
        if runtime_of(new) != runtime_of(container) {
            return Err(Error::Invalid("container.Runtime.Name field is immutable".to_owned()));
        }
        let all = ["labels", "spec", "extensions", "image", "snapshotkey"].map(ToOwned::to_owned);
        return apply(container, new, Some(&all));
    };
    for path in paths {
        match path.split_once('.').map_or((path.as_str(), None), |(field, key)| (field, Some(key))) {
            ("labels", None) => container.labels = mask::without_empty(new.labels.clone()),
            ("labels", Some(key)) => mask::update_label(&mut container.labels, key, &new.labels),
            ("extensions", None) => container.extensions.clone_from(&new.extensions),
            ("extensions", Some("")) => return Err(Error::Invalid("container.Extensions keys must not be empty".to_owned())),
            ("extensions", Some(key)) => {
                match new.extensions.get(key) {
                    Some(extension) => container.extensions.insert(key.to_owned(), extension.clone()),
                    None => container.extensions.remove(key),
                };
            }
            ("spec", None) => container.spec.clone_from(&new.spec),
            ("image", None) => container.image.clone_from(&new.image),
            ("snapshotkey" | "snapshot_key", None) => container.snapshot_key.clone_from(&new.snapshot_key),
            _ => return Err(Error::Invalid(format!("cannot update field {path:?} of container {:?}", new.id))),
        }
    }
    Ok(())
}

fn validate(container: &Container) -> Result<()> {
    name::identifier("container.ID", &container.id)?;
    for (key, extension) in &container.extensions {
        if key.is_empty() {
            return Err(Error::Invalid("container.Extensions keys must not be empty".to_owned()));
        }
        if extension.type_url.is_empty() {
            return Err(Error::Invalid(format!("container.Extensions[{key:?}].TypeURL must be set")));
        }
    }
    name::labels(&container.labels)?;
    if container.runtime.as_ref().is_none_or(|runtime| runtime.name.is_empty()) {
        return Err(Error::Invalid("container.Runtime.Name must be set".to_owned()));
    }
    if container.spec.is_none() {
        return Err(Error::Invalid("container.Spec must be set".to_owned()));
    }
    if !container.snapshot_key.is_empty() && container.snapshotter.is_empty() {
        return Err(Error::Invalid("container.Snapshotter must be set if container.SnapshotKey is set".to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use containerd_client::services::v1::container::Runtime;
    use prost_types::Any;

    use super::*;

    fn container() -> Container {
        Container {
            id: "c".into(),
            labels: [("a".to_owned(), "1".to_owned()), ("b.c".to_owned(), "2".to_owned())].into(),
            image: "i".into(),
            runtime: Some(Runtime { name: "r".into(), options: None }),
            spec: Some(Any::default()),
            extensions: [("x".to_owned(), Any { type_url: "t".into(), value: vec![1] })].into(),
            ..Container::default()
        }
    }

    fn updated(new: &Container, paths: &[&str]) -> Result<Container> {
        let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
        let mut container = container();
        apply(&mut container, new, (!paths.is_empty()).then_some(&paths[..]))?;
        validate(&container)?;
        Ok(container)
    }

    #[test]
    fn an_update_changes_what_its_mask_names_and_nothing_else() {
        let new =
            Container { id: "c".into(), labels: [("b.c".to_owned(), "3".to_owned())].into(), image: "j".into(), ..Container::default() };
        let labels = updated(&new, &["labels.b.c"]).expect("allowed").labels;
        assert_eq!((labels["a"].as_str(), labels["b.c"].as_str()), ("1", "3"));
        assert_eq!(updated(&new, &["labels.a"]).expect("allowed").labels.len(), 1);
        assert_eq!(updated(&new, &["labels"]).expect("allowed").labels, new.labels);
        let changed = updated(&new, &["image", "extensions.x"]).expect("allowed");
        assert_eq!((changed.image.as_str(), changed.extensions.len(), changed.labels.len()), ("j", 0, 2));
        assert_eq!(updated(&new, &["labels."]).expect("the label of no name stays absent"), container());
        let unnamed = Container { labels: [(String::new(), "3".to_owned())].into(), ..new.clone() };
        assert_eq!(updated(&unnamed, &["labels."]).expect_err("no name").code(), tonic::Code::InvalidArgument);
        assert_eq!(updated(&new, &["extensions."]).expect_err("no name").code(), tonic::Code::InvalidArgument);
        assert!(updated(&new, &["runtime"]).is_err());
        assert!(updated(&new, &["image.x"]).is_err());
        assert!(updated(&new, &["spec"]).is_err(), "a container has a spec");
    }

    #[test]
    fn an_update_without_a_mask_is_refused_where_it_would_change_what_is_fixed() {
        let new = Container { image: "j".into(), labels: [].into(), ..container() };
        let changed = updated(&new, &[]).expect("allowed");
        assert_eq!((changed.image.as_str(), changed.labels.len()), ("j", 0));
        let runtime = Some(Runtime { name: "other".into(), options: None });
        assert!(updated(&Container { runtime, ..new.clone() }, &[]).is_err());
        assert!(updated(&Container { snapshotter: "s".into(), ..new }, &[]).is_err());
    }

    #[test]
    fn what_no_container_can_be_is_refused() {
        assert!(validate(&container()).is_ok());
        for bad in [
            Container { id: "a/b".into(), ..container() },
            Container { runtime: None, ..container() },
            Container { spec: None, ..container() },
            Container { snapshot_key: "k".into(), ..container() },
            Container { extensions: [(String::new(), Any { type_url: "t".into(), value: vec![] })].into(), ..container() },
            Container { labels: [("k".to_owned(), "v".repeat(5000))].into(), ..container() },
        ] {
            assert_eq!(validate(&bad).expect_err("bad").code(), tonic::Code::InvalidArgument);
        }
    }
}
