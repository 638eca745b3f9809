//! Images: what is done with whole images, beside their rows in the store.
#![allow(dead_code, reason = "the Transfer service calls it")]

pub(crate) mod ahead;
pub(crate) mod plan;
pub(crate) mod unpack;
