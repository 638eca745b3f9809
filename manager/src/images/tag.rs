//! Tagging: another name for an image.

use std::sync::Arc;

use super::Transfers;
use super::lease::Place;
use super::names::Wanted;
use super::tree::Tree;
use crate::error::{Error, Result};

impl Transfers {
    /// Gives an image the names that are wanted. What had a name before loses it.
    pub(crate) async fn tag(self: &Arc<Self>, place: &Place, source: &str, wanted: &Wanted) -> Result<()> {
        let target = self.target(&place.namespace, source).await?;
        let names = wanted.whole(&target);
        if names.is_empty() {
            return Err(Error::Invalid("a new name must be set".to_owned()));
        }
        self.record(&place.namespace, &Tree::default(), None, names, place.lease.as_deref()).await
    }
}
