//! `containerd.services.sandbox.v1.Store`: the records of sandboxes, whether or not they run.

use std::borrow::Cow;
use std::sync::Arc;

use containerd_client::services::v1::sandbox::{
    StoreCreateRequest, StoreCreateResponse, StoreDeleteRequest, StoreDeleteResponse, StoreGetRequest, StoreGetResponse, StoreListRequest,
    StoreListResponse, StoreUpdateRequest, StoreUpdateResponse,
};
use containerd_client::types::Sandbox;

use super::call::Call;
use super::mask;
use super::search::{Filters, Search};
use crate::error::{Error, Object, Result};
use crate::filter::{Fields, label};
use crate::store::{Meta, Store, namespaces, sandboxes};
use crate::{name, timestamp};

impl Fields for Sandbox {
    fn field(&self, path: &[&str]) -> Option<Cow<'_, str>> {
        match path {
            ["id"] => Some(Cow::Borrowed(&self.sandbox_id)),
            ["labels", key @ ..] => label(&self.labels, key),
            _ => None,
        }
    }
}

pub(super) fn not_found(id: &str) -> Error {
    Error::NotFound(Object::Sandbox(id.to_owned()))
}

/// The service.
#[derive(Debug)]
pub(crate) struct Sandboxes {
    pub(crate) store: Store,
    pub(crate) filters: Filters,
}

impl Sandboxes {
    pub(super) async fn create(self: Arc<Self>, call: Call, request: StoreCreateRequest) -> Result<StoreCreateResponse> {
        let namespace = call.namespace()?;
        let mut sandbox = given(request.sandbox)?;
        sandbox.labels = mask::without_empty(sandbox.labels);
        // as with containerd, answers always have one
        sandbox.runtime.get_or_insert_default();
        validate(&sandbox)?;
        let now = timestamp::now();
        (sandbox.created_at, sandbox.updated_at) = (Some(now), Some(now));
        let new = sandbox.clone();
        self.store
            .write(move |db| {
                if sandboxes::get(db, namespace.as_str(), &new.sandbox_id)?.is_some() {
                    return Err(Error::AlreadyExists(Object::Sandbox(new.sandbox_id)));
                }
                namespaces::ensure(db, namespace.as_str())?;
                sandboxes::put(db, namespace.as_str(), &new.sandbox_id, &new)
            })
            .await?;
        Ok(StoreCreateResponse { sandbox: Some(sandbox) })
    }

    pub(super) async fn update(self: Arc<Self>, call: Call, request: StoreUpdateRequest) -> Result<StoreUpdateResponse> {
        let (namespace, new) = (call.namespace()?, given(request.sandbox)?);
        let updated = self
            .store
            .write(move |db| {
                let found = sandboxes::get(db, namespace.as_str(), &new.sandbox_id)?;
                let mut sandbox = found.ok_or_else(|| not_found(&new.sandbox_id))?;
                apply(&mut sandbox, &new, &request.fields)?;
                validate(&sandbox)?;
                sandbox.updated_at = Some(timestamp::now());
                sandboxes::put(db, namespace.as_str(), &new.sandbox_id, &sandbox)?;
                Ok(sandbox)
            })
            .await?;
        Ok(StoreUpdateResponse { sandbox: Some(updated) })
    }

    pub(super) async fn delete(self: Arc<Self>, call: Call, request: StoreDeleteRequest) -> Result<StoreDeleteResponse> {
        let (namespace, id) = (call.namespace()?, request.sandbox_id);
        self.store.remove(move |db| if sandboxes::remove(db, namespace.as_str(), &id)? { Ok(()) } else { Err(not_found(&id)) }).await?;
        Ok(StoreDeleteResponse {})
    }

    pub(super) async fn list(self: Arc<Self>, call: Call, request: StoreListRequest) -> Result<StoreListResponse> {
        let (namespace, filters) = (call.namespace()?, &request.filters);
        let search = Search::new(&self.store, &self.filters, namespace, filters, sandboxes::page, |sandbox| &sandbox.sandbox_id)?;
        Ok(StoreListResponse { list: search.all().await? })
    }

    pub(super) async fn get(self: Arc<Self>, call: Call, request: StoreGetRequest) -> Result<StoreGetResponse> {
        let (namespace, id) = (call.namespace()?, request.sandbox_id);
        let get = move |db: &Meta<'_>| sandboxes::get(db, namespace.as_str(), &id)?.ok_or_else(|| not_found(&id));
        Ok(StoreGetResponse { sandbox: Some(self.store.read(get).await?) })
    }
}

pub(super) fn given(sandbox: Option<Sandbox>) -> Result<Sandbox> {
    sandbox.ok_or_else(|| Error::Invalid("sandbox must be set".to_owned()))
}

/// Takes what the fields name from `new`; without fields everything that may change, and the runtime's name must be the same.
fn apply(sandbox: &mut Sandbox, new: &Sandbox, fields: &[String]) -> Result<()> {
    if fields.is_empty() {
        let runtime_of = |sandbox: &Sandbox| sandbox.runtime.as_ref().map(|runtime| runtime.name.clone()).unwrap_or_default();
        if runtime_of(new) != runtime_of(sandbox) {
            return Err(Error::Invalid("sandbox.Runtime.Name field is immutable".to_owned()));
        }
        let all = ["labels", "extensions", "spec", "runtime"].map(ToOwned::to_owned);
        return apply(sandbox, new, &all);
    }
    for field in fields {
        match field.split_once('.').map_or((field.as_str(), None), |(field, key)| (field, Some(key))) {
            ("labels", None) => sandbox.labels = mask::without_empty(new.labels.clone()),
            ("labels", Some(key)) => mask::update_label(&mut sandbox.labels, key, &new.labels),
            ("extensions", None) => sandbox.extensions.clone_from(&new.extensions),
            ("extensions", Some(key)) => {
                match new.extensions.get(key) {
                    Some(extension) => sandbox.extensions.insert(key.to_owned(), extension.clone()),
                    None => sandbox.extensions.remove(key),
                };
            }
            ("runtime", None) => sandbox.runtime = Some(new.runtime.clone().unwrap_or_default()),
            ("spec", None) => sandbox.spec.clone_from(&new.spec),
            _ => return Err(Error::Invalid(format!("cannot update {field:?} field on sandbox {:?}", new.sandbox_id))),
        }
    }
    Ok(())
}

fn validate(sandbox: &Sandbox) -> Result<()> {
    name::identifier("sandbox ID", &sandbox.sandbox_id)?;
    if sandbox.extensions.keys().any(String::is_empty) {
        return Err(Error::Invalid("sandbox.Extensions keys must not be empty".to_owned()));
    }
    name::labels(&sandbox.labels)
}

#[cfg(test)]
mod tests {
    use containerd_client::types::sandbox::Runtime;
    use prost_types::Any;

    use super::*;

    fn any(value: u8) -> Any {
        Any { type_url: "t".into(), value: vec![value] }
    }

    fn sandbox() -> Sandbox {
        Sandbox {
            sandbox_id: "s".into(),
            runtime: Some(Runtime { name: "r".into(), options: None }),
            spec: Some(any(1)),
            labels: [("a".to_owned(), "1".to_owned()), ("b.c".to_owned(), "2".to_owned())].into(),
            extensions: [("x".to_owned(), any(2)), ("y".to_owned(), any(3))].into(),
            sandboxer: "shim".into(),
            ..Sandbox::default()
        }
    }

    fn updated(new: &Sandbox, fields: &[&str]) -> Result<Sandbox> {
        let fields: Vec<_> = fields.iter().map(|field| (*field).to_owned()).collect();
        let mut sandbox = sandbox();
        apply(&mut sandbox, new, &fields)?;
        validate(&sandbox)?;
        Ok(sandbox)
    }

    #[test]
    fn an_update_changes_what_its_fields_name_and_nothing_else() {
        let new = Sandbox {
            sandbox_id: "s".into(),
            runtime: Some(Runtime { name: "r".into(), options: Some(any(4)) }),
            labels: [("b.c".to_owned(), "3".to_owned())].into(),
            extensions: [("y".to_owned(), any(5))].into(),
            sandboxer: "other".into(),
            ..Sandbox::default()
        };
        let labels = updated(&new, &["labels.b.c"]).expect("allowed").labels;
        assert_eq!((labels["a"].as_str(), labels["b.c"].as_str()), ("1", "3"));
        assert_eq!(updated(&new, &["labels.a"]).expect("allowed").labels.len(), 1);
        let extensions = updated(&new, &["extensions.x", "extensions.y"]).expect("allowed").extensions;
        assert_eq!(extensions, new.extensions);
        assert_eq!(updated(&new, &["runtime"]).expect("allowed"), Sandbox { runtime: new.runtime.clone(), ..sandbox() });
        assert_eq!(updated(&new, &["spec"]).expect("allowed"), Sandbox { spec: None, ..sandbox() });
        assert_eq!(updated(&new, &[]).expect("allowed"), Sandbox { sandboxer: "shim".into(), ..new.clone() });
        let message = |error: Error| error.to_string();
        for field in ["sandboxer", "id", "runtime.name", "spec.x", "", "created_at"] {
            let error = updated(&new, &[field]).map_err(message).expect_err(field);
            assert_eq!(error, format!("cannot update {field:?} field on sandbox \"s\": invalid argument"));
        }
        let renamed = Sandbox { runtime: None, ..new };
        assert_eq!(
            updated(&renamed, &[]).map_err(message).expect_err("renamed"),
            "sandbox.Runtime.Name field is immutable: invalid argument"
        );
        assert_eq!(updated(&renamed, &["runtime"]).expect("containerd lets it").runtime, Some(Runtime::default()));
    }

    #[test]
    fn filters_see_the_id_and_the_labels() {
        let sandbox = sandbox();
        assert_eq!(sandbox.field(&["id"]).as_deref(), Some("s"));
        assert_eq!(sandbox.field(&["labels", "b", "c"]).as_deref(), Some("2"));
        assert_eq!(sandbox.field(&["sandboxer"]), None);
        assert_eq!(sandbox.field(&["runtime", "name"]), None);
    }
}
