//! Messages of `containerd.services.mounts.v1.Mounts`, which the `containerd-client` crate has not: containerd 2.2 was the first with them.

use std::collections::HashMap;

use containerd_client::types::Mount;
use prost_types::{FieldMask, Timestamp};

/// Asks for mounts to be made, as far as a client or a shim cannot make them by itself.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ActivateRequest {
    /// Of the activation, in its namespace.
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(message, repeated, tag = "2")]
    pub(crate) mounts: Vec<Mount>,
    #[prost(map = "string, string", tag = "3")]
    pub(crate) labels: HashMap<String, String>,
    /// Whether all of them are to be made.
    #[prost(bool, tag = "4")]
    pub(crate) temporary: bool,
}

/// The answer to all that return one activation.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ActivationResponse {
    #[prost(message, optional, tag = "1")]
    pub(crate) info: Option<ActivationInfo>,
}

/// Names an activation.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct NameRequest {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
}

/// Changes the labels of an activation.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct UpdateRequest {
    #[prost(message, optional, tag = "1")]
    pub(crate) info: Option<ActivationInfo>,
    #[prost(message, optional, tag = "2")]
    pub(crate) update_mask: Option<FieldMask>,
}

/// Asks for activations that a filter takes.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ListRequest {
    #[prost(string, repeated, tag = "1")]
    pub(crate) filters: Vec<String>,
}

/// A mount that was made.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ActiveMount {
    #[prost(message, optional, tag = "1")]
    pub(crate) mount: Option<Mount>,
    #[prost(message, optional, tag = "2")]
    pub(crate) mounted_at: Option<Timestamp>,
    /// Where.
    #[prost(string, tag = "3")]
    pub(crate) mount_point: String,
    #[prost(map = "string, string", tag = "4")]
    pub(crate) data: HashMap<String, String>,
}

/// An activation.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct ActivationInfo {
    #[prost(string, tag = "1")]
    pub(crate) name: String,
    #[prost(message, repeated, tag = "2")]
    pub(crate) active: Vec<ActiveMount>,
    /// What is left to mount.
    #[prost(message, repeated, tag = "3")]
    pub(crate) system: Vec<Mount>,
    #[prost(map = "string, string", tag = "4")]
    pub(crate) labels: HashMap<String, String>,
}

/// An activation as it is kept in its folder.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct Record {
    #[prost(string, tag = "1")]
    pub(crate) namespace: String,
    /// None while it is being made.
    #[prost(message, optional, tag = "2")]
    pub(crate) info: Option<ActivationInfo>,
    /// What holds it; empty for none.
    #[prost(string, tag = "3")]
    pub(crate) lease: String,
}
