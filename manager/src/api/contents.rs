//! What an import has made content of, as one process passes it on to the next: a source of a transfer, like a client's stream.
//!
//! A client that sends one itself gets what an archive with these files would give it: digests lead to content of its namespace only.

use std::collections::HashMap;

use prost::Message;
use prost_types::Any;

use crate::content::Digest;
use crate::error::{Error, Result};
use crate::images::{ArchiveFile, Contents};

/// Its fields are only ever added to.
#[derive(Clone, PartialEq, Message)]
struct Wire {
    #[prost(map = "string, message", tag = "1")]
    files: HashMap<String, File>,
    #[prost(map = "string, string", tag = "2")]
    links: HashMap<String, String>,
    #[prost(map = "string, bytes", tag = "3")]
    documents: HashMap<String, Vec<u8>>,
    #[prost(bool, tag = "4")]
    compresses: bool,
}

#[derive(Clone, PartialEq, Message)]
struct File {
    #[prost(string, tag = "1")]
    digest: String,
    #[prost(uint64, tag = "2")]
    size: u64,
    #[prost(bytes = "vec", tag = "3")]
    magic: Vec<u8>,
}

/// As the source of a transfer.
pub(super) fn to_any(contents: Contents, compresses: bool) -> Any {
    let Contents { files, links, documents, .. } = contents;
    let files = files.into_iter().map(|(path, file)| {
        let ArchiveFile { digest, size, magic } = file;
        (path, File { digest: digest.to_string(), size, magic })
    });
    let wire = Wire { files: files.collect(), links, documents, compresses };
    Any { type_url: TYPE.to_owned(), value: wire.encode_to_vec() }
}

/// What such a source has, and whether layers are to be compressed.
pub(super) fn of_any(any: &Any) -> Result<(Contents, bool)> {
    let wire = Wire::decode(any.value.as_slice()).map_err(|error| Error::Invalid(format!("the contents of an archive: {error}")))?;
    let Wire { files, links, documents, compresses } = wire;
    let mut contents = Contents { links, documents, ..Contents::default() };
    for (path, File { digest, size, magic }) in files {
        contents.files.insert(path, ArchiveFile { digest: Digest::parse(&digest)?, size, magic });
    }
    Ok((contents, compresses))
}

/// The name of its type.
pub(super) const TYPE: &str = "x-manager.transfer.Contents";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_come_of_an_archive_is_read_as_it_was_written_and_a_bad_digest_is_refused() {
        let mut contents = Contents::default();
        let file = ArchiveFile { digest: Digest::of_bytes(b"x"), size: 1, magic: b"x".to_vec() };
        contents.files.insert("a/layer.tar".to_owned(), file);
        contents.links.insert("b/layer.tar".to_owned(), "a/layer.tar".to_owned());
        contents.documents.insert("manifest.json".to_owned(), vec![0xff, 0]);
        let mut any = to_any(contents, true);
        let (read, compresses) = of_any(&any).expect("it was written so");
        assert!(compresses && read.links["b/layer.tar"] == "a/layer.tar" && read.documents["manifest.json"] == [0xff, 0]);
        assert_eq!(read.files["a/layer.tar"].digest, Digest::of_bytes(b"x"));
        any.value = Wire { files: [("f".to_owned(), File::default())].into(), ..Wire::default() }.encode_to_vec();
        assert_eq!(of_any(&any).expect_err("no digest").code(), tonic::Code::InvalidArgument);
        any.value = vec![0xff; 3];
        assert_eq!(of_any(&any).expect_err("no message").code(), tonic::Code::InvalidArgument);
    }
}
