//! What a call says beside its message.

use tonic::metadata::MetadataMap;

use crate::error::{Error, Result};
use crate::name::Namespace;

/// The metadata of a call.
#[derive(Debug, Clone)]
pub(super) struct Call {
    namespace: Option<String>,
}

impl Call {
    pub(super) fn of(metadata: &MetadataMap) -> Self {
        let namespace = metadata.get("containerd-namespace").and_then(|value| value.to_str().ok());
        Self { namespace: namespace.map(ToOwned::to_owned) }
    }

    /// The namespace that it is about.
    ///
    /// Errors: when it names none, or an impossible one.
    pub(super) fn namespace(&self) -> Result<Namespace> {
        let name = self.namespace.as_deref().filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| Error::Precondition("namespace is required".to_owned()))?;
        Namespace::parse(name)
    }
}
