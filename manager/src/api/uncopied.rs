//! A message with many bytes, which stay where they were received: the generated type would copy them into a block of its own.

use std::collections::HashMap;

use containerd_client::services::v1::WriteAction;
use hyper::body::Bytes;
use prost::Message;

/// `containerd.services.content.v1.WriteContentRequest`
#[derive(Clone, PartialEq, Message)]
pub(crate) struct WriteRequest {
    #[prost(enumeration = "WriteAction", tag = "1")]
    pub(crate) action: i32,
    #[prost(string, tag = "2")]
    pub(crate) r#ref: String,
    #[prost(int64, tag = "3")]
    pub(crate) total: i64,
    #[prost(string, tag = "4")]
    pub(crate) expected: String,
    #[prost(int64, tag = "5")]
    pub(crate) offset: i64,
    #[prost(bytes = "bytes", tag = "6")]
    pub(crate) data: Bytes,
    #[prost(map = "string, string", tag = "7")]
    pub(crate) labels: HashMap<String, String>,
}

#[cfg(test)]
mod tests {
    use containerd_client::services::v1::WriteContentRequest;

    use super::*;

    #[test]
    fn a_request_is_the_same_in_both_types_and_its_data_is_not_copied() {
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
        let received = Bytes::from(bytes.clone());
        let own = WriteRequest::decode(received.clone()).expect("a message");
        assert_eq!((own.action, &*own.r#ref, own.total, &*own.expected, own.offset), (generated.action, "r", 7, "e", 3));
        assert_eq!((&own.data[..], &own.labels), (&[1, 2, 3][..], &generated.labels));
        assert!(received.as_ptr_range().contains(&own.data.as_ptr()), "it is where it was received");
        assert_eq!(own.encode_to_vec(), bytes);
    }
}
