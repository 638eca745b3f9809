//! Images: what brings them here, and sends them elsewhere.

#[allow(dead_code, unused_imports)] // until pulls use all of it
pub(crate) mod registry;
