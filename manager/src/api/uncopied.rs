//! Messages with many bytes, which stay where they were received: the generated types would copy each into a block of its own.

use std::collections::HashMap;

use containerd_client::services::v1::WriteAction;
use hyper::body::Bytes;
use prost::{Message, Name};
#[cfg(test)]
use prost_types::Any;

/// `containerd.services.content.v1.WriteContentRequest`
#[derive(Clone, PartialEq, Message)]
pub(super) struct WriteRequest {
    #[prost(enumeration = "WriteAction", tag = "1")]
    pub(super) action: i32,
    #[prost(string, tag = "2")]
    pub(super) r#ref: String,
    #[prost(int64, tag = "3")]
    pub(super) total: i64,
    #[prost(string, tag = "4")]
    pub(super) expected: String,
    #[prost(int64, tag = "5")]
    pub(super) offset: i64,
    #[prost(bytes = "bytes", tag = "6")]
    pub(super) data: Bytes,
    #[prost(map = "string, string", tag = "7")]
    pub(super) labels: HashMap<String, String>,
}

/// `google.protobuf.Any`
#[derive(Clone, PartialEq, Message)]
pub(super) struct Received {
    #[prost(string, tag = "1")]
    pub(super) type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) value: Bytes,
}

/// `containerd.types.transfer.Data`
#[derive(Clone, PartialEq, Message)]
pub(super) struct Data {
    #[prost(bytes = "bytes", tag = "1")]
    pub(super) data: Bytes,
}

impl Name for Data {
    const NAME: &'static str = "Data";
    const PACKAGE: &'static str = "containerd.types.transfer";
}

impl Received {
    /// The message in it, if it is one of that type.
    pub(super) fn message<M: Message + Name + Default>(&self) -> Option<M> {
        let name = self.type_url.rsplit('/').next().unwrap_or_default();
        (name == M::full_name()).then(|| M::decode(self.value.clone()).ok()).flatten()
    }
}

#[cfg(test)]
impl From<Any> for Received {
    fn from(Any { type_url, value }: Any) -> Self {
        Self { type_url, value: value.into() }
    }
}

#[cfg(test)]
mod tests {
    use containerd_client::services::v1::WriteContentRequest;
    use containerd_client::{to_any, types::transfer};

    use super::*;

    #[test]
    fn a_request_is_the_same_in_both_types() {
        let generated = WriteContentRequest {
            action: WriteAction::Commit as i32,
            r#ref: "r".to_owned(),
            total: 7,
            expected: "e".to_owned(),
            offset: 3,
            data: vec![1, 2, 3],
            labels: [("k".to_owned(), "v".to_owned())].into(),
        };
        let bytes = generated.encode_to_vec();
        let own = WriteRequest::decode(&*bytes).expect("a message");
        assert_eq!((own.action, &*own.r#ref, own.total, &*own.expected, own.offset), (generated.action, "r", 7, "e", 3));
        assert_eq!((&own.data[..], &own.labels), (&[1, 2, 3][..], &generated.labels));
        assert_eq!(own.encode_to_vec(), bytes);
    }

    #[test]
    fn data_in_a_stream_is_decoded_without_a_copy() {
        let bytes = Bytes::from(to_any(&transfer::Data { data: vec![5; 1000] }).encode_to_vec());
        let received = Received::decode(bytes.clone()).expect("a message");
        let Data { data } = received.message().expect("data");
        assert_eq!(&data[..], [5; 1000]);
        assert!(bytes.as_ptr_range().contains(&data.as_ptr()), "it is where it was received");
        assert!(received.message::<transfer::WindowUpdate>().is_none(), "another type");
    }
}
