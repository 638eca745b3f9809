//! `containerd.services.version.v1.Version`

use std::sync::Arc;

use containerd_client::services::v1::VersionResponse;

use super::call::Call;
use crate::error::Result;

/// The service.
#[derive(Debug)]
pub(crate) struct Version;

impl Version {
    pub(super) async fn version(self: Arc<Self>, _call: Call, _request: ()) -> Result<VersionResponse> {
        Ok(VersionResponse { version: VERSION.to_owned(), revision: REVISION.to_owned() })
    }
}

/// What clients show as the daemon's version.
pub(crate) const VERSION: &str = concat!(env!("CARGO_PKG_VERSION"), "+x-manager");
/// The commit, if set at build time; clients take an empty one for an error.
const REVISION: &str = match option_env!("X_REVISION") {
    Some(revision) if !revision.is_empty() => revision,
    _ => env!("CARGO_PKG_VERSION"),
};
