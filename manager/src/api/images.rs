//! `containerd.services.images.v1.Images`

use std::borrow::Cow;
use std::sync::Arc;

use containerd_client::services::v1::{
    CreateImageRequest, CreateImageResponse, DeleteImageRequest, GetImageRequest, GetImageResponse, Image, ImageCreate, ImageDelete,
    ImageUpdate, ListImagesRequest, ListImagesResponse, UpdateImageRequest, UpdateImageResponse,
};

use super::call::Call;
use super::mask;
use super::search::{Filters, Search};
use crate::error::{Error, Object, Result};
use crate::events::Exchange;
use crate::filter::{Fields, label, text};
use crate::gate::Gate;
use crate::gc::Collector;
use crate::images::{IMAGES, put, validate};
use crate::store::{Meta, Resource, Store, images, namespaces, resources};
use crate::timestamp;

impl Fields for Image {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        match path {
            ["name"] => text(&self.name),
            ["target", "digest"] => text(&self.target.as_ref()?.digest),
            ["target", "mediatype"] => text(&self.target.as_ref()?.media_type),
            ["labels", key @ ..] => label(&self.labels, key),
            ["annotations", key @ ..] => label(&self.target.as_ref()?.annotations, key),
            _ => None,
        }
    }
}

fn not_found(name: &str) -> Error {
    Error::NotFound(Object::Image(name.to_owned()))
}

/// The service.
#[derive(Debug)]
pub(crate) struct Images {
    pub(crate) store: Store,
    pub(crate) events: Arc<Exchange>,
    pub(crate) filters: Filters,
    pub(crate) gate: Gate,
    pub(crate) collector: Arc<Collector>,
}

impl Images {
    pub(super) async fn get(self: Arc<Self>, call: Call, request: GetImageRequest) -> Result<GetImageResponse> {
        let (namespace, name) = (call.namespace()?, request.name);
        let get = move |db: &Meta<'_>| images::get(db, namespace.as_str(), &name)?.ok_or_else(|| not_found(&name));
        Ok(GetImageResponse { image: Some(self.store.read(get).await?) })
    }

    pub(super) async fn list(self: Arc<Self>, call: Call, request: ListImagesRequest) -> Result<ListImagesResponse> {
        let search = Search::new(&self.store, &self.filters, call.namespace()?, &request.filters, images::page, |image| &image.name)?;
        Ok(ListImagesResponse { images: search.all().await? })
    }

    pub(super) async fn create(self: Arc<Self>, call: Call, request: CreateImageRequest) -> Result<CreateImageResponse> {
        let (namespace, lease) = (call.namespace()?, call.lease());
        let mut image = request.image.ok_or_else(|| Error::Invalid("image must be set".to_owned()))?;
        image.labels = mask::without_empty(image.labels);
        if image.name.is_empty() {
            return Err(Error::Invalid("image name is required for create".to_owned()));
        }
        validate(&image)?;
        let now = request.source_date_epoch.unwrap_or_else(timestamp::now);
        (image.created_at, image.updated_at) = (Some(now), Some(now));
        let (new, place) = (image.clone(), namespace.clone());
        self.store
            .write(move |db| {
                if images::get(db, place.as_str(), &new.name)?.is_some() {
                    return Err(Error::AlreadyExists(Object::Image(new.name)));
                }
                namespaces::ensure(db, place.as_str())?;
                put(db, place.as_str(), &new, lease.as_deref())
            })
            .await?;
        let event = ImageCreate { name: image.name.clone(), labels: image.labels.clone() };
        self.events.publish(&namespace, "/images/create", &event);
        Ok(CreateImageResponse { image: Some(image) })
    }

    pub(super) async fn update(self: Arc<Self>, call: Call, request: UpdateImageRequest) -> Result<UpdateImageResponse> {
        let (namespace, paths) = (call.namespace()?, mask::paths(request.update_mask));
        let new = request.image.ok_or_else(|| Error::Invalid("image must be set".to_owned()))?;
        if new.name.is_empty() {
            return Err(Error::Invalid("image name is required for update".to_owned()));
        }
        let now = request.source_date_epoch.unwrap_or_else(timestamp::now);
        let (place, lease) = (namespace.clone(), call.lease());
        let updated = self
            .store
            .write(move |db| {
                let mut image = images::get(db, place.as_str(), &new.name)?.ok_or_else(|| not_found(&new.name))?;
                apply(&mut image, &new, paths.as_deref())?;
                validate(&image)?;
                image.updated_at = Some(now);
                put(db, place.as_str(), &image, lease.as_deref())?;
                Ok(image)
            })
            .await?;
        // it may have led elsewhere before
        self.collector.removed();
        let event = ImageUpdate { name: updated.name.clone(), labels: updated.labels.clone() };
        self.events.publish(&namespace, "/images/update", &event);
        Ok(UpdateImageResponse { image: Some(updated) })
    }

    pub(super) async fn delete(self: Arc<Self>, call: Call, request: DeleteImageRequest) -> Result<()> {
        let (namespace, name) = (call.namespace()?, request.name.clone());
        let (place, target) = (namespace.clone(), request.target.map(|target| target.digest).filter(|digest| !digest.is_empty()));
        let lease = call.lease();
        let pass = self.gate.enter().await?;
        self.store
            .remove(move |db| {
                if let Some(lease) = &lease {
                    resources::remove(db, place.as_str(), lease, &Resource { kind: IMAGES.to_owned(), id: name.clone() })?;
                }
                if let Some(target) = &target {
                    let image = images::get(db, place.as_str(), &name)?.ok_or_else(|| not_found(&name))?;
                    let leads_to = image.target.map(|target| target.digest).unwrap_or_default();
                    if leads_to != *target {
                        return Err(Error::NotFound(Object::ImageTarget { name: name.clone(), has: leads_to, wanted: target.clone() }));
                    }
                }
                if images::remove(db, place.as_str(), &name)? { Ok(()) } else { Err(not_found(&name)) }
            })
            .await?;
        drop(pass);
        self.events.publish(&namespace, "/images/delete", &ImageDelete { name: request.name });
        if request.sync {
            self.collector.collect().await?;
        }
        Ok(())
    }
}

/// Takes what the paths name from `new`; without paths everything.
fn apply(image: &mut Image, new: &Image, paths: Option<&[String]>) -> Result<()> {
    let Some(paths) = paths else {
        image.labels = mask::without_empty(new.labels.clone());
        image.target.clone_from(&new.target);
        return Ok(());
    };
    for path in paths {
        match path.split_once('.').map_or((path.as_str(), None), |(field, key)| (field, Some(key))) {
            ("labels", None) => image.labels = mask::without_empty(new.labels.clone()),
            ("labels", Some(key)) => mask::update_label(&mut image.labels, key, &new.labels),
            // as a whole: a size without its digest makes no sense
            ("target", None) => image.target.clone_from(&new.target),
            ("annotations", key) => {
                let new = new.target.clone().unwrap_or_default().annotations;
                let annotations = &mut image.target.get_or_insert_default().annotations;
                match key {
                    None => *annotations = mask::without_empty(new),
                    Some(key) => mask::update_label(annotations, key, &new),
                }
            }
            _ => return Err(Error::Invalid(format!("cannot update {path:?} field on image {:?}", new.name))),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use containerd_client::services::v1::Lease;
    use prost_types::FieldMask;

    use super::*;
    use crate::images::image;
    use crate::layers::testing::is_root;
    use crate::settings::Settings;
    use crate::store::leases;

    #[tokio::test]
    async fn a_lease_holds_the_images_that_expire_until_they_are_deleted() {
        if !is_root() {
            return;
        }
        let folder = scratch::Folder::new("image-leases");
        let settings = Settings { root: folder.join("root"), state: folder.join("state"), ..Settings::default() };
        let parts = crate::parts::Parts::open(&settings).await.expect("a store");
        let service = parts.services().images;
        let lease = Lease { id: "l".to_owned(), ..Lease::default() };
        let added = move |db: &mut Meta<'_>| {
            namespaces::ensure(db, "n")?;
            leases::put(db, "n", "l", &lease)
        };
        parts.store.write(added).await.expect("a lease");
        let call = |lease: &str| {
            let mut request = tonic::Request::new(());
            request.metadata_mut().insert("containerd-namespace", "n".parse().expect("a value"));
            request.metadata_mut().insert("containerd-lease", lease.parse().expect("a value"));
            Call::of(&request)
        };
        let named = |name: &str, expires: bool| {
            let labels = expires.then(|| ("containerd.io/gc.expire".to_owned(), "2100-01-01T00:00:00Z".to_owned()));
            Image { name: name.to_owned(), labels: labels.into_iter().collect(), ..image() }
        };
        let create = async |lease: &str, image| {
            let request = CreateImageRequest { image: Some(image), ..CreateImageRequest::default() };
            Arc::clone(&service).create(call(lease), request).await
        };
        let held = async || {
            let held = parts.store.read(|db| resources::list(db, "n", "l")).await.expect("read");
            held.into_iter().map(|held| format!("{}/{}", held.kind, held.id)).collect::<Vec<_>>()
        };
        create("l", named("stays", false)).await.expect("created");
        create("gone", named("other", false)).await.expect("no lease is needed");
        assert_eq!(create("gone", named("expires", true)).await.expect_err("no lease").code(), tonic::Code::NotFound);
        assert_eq!(held().await, [""; 0]);
        create("l", named("expires", true)).await.expect("created");
        assert_eq!(held().await, ["images/expires"]);
        let update_mask = Some(FieldMask { paths: vec!["labels".to_owned()] });
        let request = UpdateImageRequest { image: Some(named("stays", true)), update_mask, ..UpdateImageRequest::default() };
        Arc::clone(&service).update(call("l"), request).await.expect("updated");
        assert_eq!(held().await, ["images/expires", "images/stays"]);
        let request = DeleteImageRequest { name: "expires".to_owned(), ..DeleteImageRequest::default() };
        Arc::clone(&service).delete(call("l"), request).await.expect("deleted");
        assert_eq!(held().await, ["images/stays"]);
    }

    #[test]
    fn an_update_changes_what_its_mask_names_and_nothing_else() {
        let mut new = image();
        new.labels = [("b.c".to_owned(), "2".to_owned())].into();
        let target = new.target.get_or_insert_default();
        (target.size, target.annotations) = (8, [("b.c".to_owned(), "2".to_owned())].into());
        let updated = |paths: &[&str]| {
            let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
            let mut image = image();
            apply(&mut image, &new, (!paths.is_empty()).then_some(&paths[..])).map(|()| image)
        };
        let size = |image: &Image| image.target.as_ref().map(|target| (target.size, target.annotations.len()));
        let labels = updated(&["labels.b.c"]).expect("allowed");
        assert_eq!((labels.labels.len(), size(&labels)), (2, Some((7, 1))));
        assert_eq!(updated(&["labels.a"]).expect("allowed").labels.len(), 0);
        assert_eq!(size(&updated(&["annotations.b.c"]).expect("allowed")), Some((7, 2)));
        assert_eq!(updated(&["target"]).expect("allowed").target, new.target);
        assert_eq!(updated(&[]).expect("allowed"), new);
        for path in ["name", "target.size", "created_at"] {
            assert_eq!(updated(&[path]).expect_err(path).code(), tonic::Code::InvalidArgument);
        }
    }
}
