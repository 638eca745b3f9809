//! Messages that the gRPC API and the shims' protocol share, from one library's types to the other's.

use containerd_client::types::Mount;
use containerd_shim_protos::types::mount::Mount as ShimMount;
use prost_types::{Any, Timestamp};
use protobuf::MessageField;
use protobuf::well_known_types::{any, timestamp};

/// To a shim.
pub(crate) fn to_shim(any: Any) -> any::Any {
    any::Any { type_url: any.type_url, value: any.value, ..any::Any::default() }
}

/// To a shim, or nothing; a message without a type is nothing.
pub(crate) fn to_shim_field(any: Option<Any>) -> MessageField<any::Any> {
    any.filter(|any| !any.type_url.is_empty()).map(to_shim).into()
}

/// From a shim.
pub(crate) fn from_shim(any: any::Any) -> Any {
    Any { type_url: any.type_url, value: any.value }
}

/// From a shim.
pub(crate) fn time_from_shim(time: Option<timestamp::Timestamp>) -> Option<Timestamp> {
    time.map(|time| Timestamp { seconds: time.seconds, nanos: time.nanos })
}

/// To a shim.
pub(crate) fn time_to_shim(time: Timestamp) -> MessageField<timestamp::Timestamp> {
    MessageField::some(timestamp::Timestamp { seconds: time.seconds, nanos: time.nanos, ..timestamp::Timestamp::default() })
}

/// To a shim.
pub(crate) fn mount_to_shim(mount: Mount) -> ShimMount {
    ShimMount { type_: mount.r#type, source: mount.source, target: mount.target, options: mount.options, ..ShimMount::default() }
}
