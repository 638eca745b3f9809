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
use crate::content::hold;
use crate::error::{Error, Object, Result};
use crate::events::Exchange;
use crate::filter::{Fields, label, text};
use crate::gate::Gate;
use crate::gc::Collector;
use crate::images::{put, validate};
use crate::store::{Meta, Store, images, namespaces};
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
                put(db, place.as_str(), &new)?;
                hold(db, place.as_str(), lease.as_deref(), "images", &new.name)
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
        let place = namespace.clone();
        let updated = self
            .store
            .write(move |db| {
                let mut image = images::get(db, place.as_str(), &new.name)?.ok_or_else(|| not_found(&new.name))?;
                apply(&mut image, &new, paths.as_deref())?;
                validate(&image)?;
                image.updated_at = Some(now);
                put(db, place.as_str(), &image)?;
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
        let pass = self.gate.enter().await?;
        self.store
            .remove(move |db| {
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
    use super::*;
    use crate::images::image;

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
