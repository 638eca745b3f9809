//! What kind of document a manifest or an index is.
//!
//! Programs that disagree about that see different images under one digest (CVE-2021-41190): what may be read in two ways is refused.

use crate::error::Error;
use crate::images::document::Document;

/// The media type of a manifest or an index, whose server or descriptor calls it `named`.
pub(super) fn media_type(named: Option<&str>, body: &[u8]) -> Result<String, String> {
    let named = named.and_then(|named| named.split(';').next()).unwrap_or_default().trim();
    let parsed = Document::parse(body, named).map_err(|error| match error {
        Error::Invalid(sentence) => sentence,
        error => error.to_string(),
    });
    parsed.map(|(_document, media_type)| media_type)
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = "application/vnd.oci.image.index.v1+json";
    const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
    const LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

    #[test]
    fn a_document_without_a_media_type_is_known_by_its_server_or_its_shape() {
        for (named, body, expected) in [
            (None, r#"{"manifests":[]}"#, INDEX),
            (None, r#"{"layers":[]}"#, IMAGE),
            (Some("application/json"), r#"{"schemaVersion":2,"manifests":[]}"#, INDEX),
            (Some("application/octet-stream"), r#"{"layers":[]}"#, IMAGE),
            (Some(LIST), r#"{"manifests":[]}"#, LIST),
            (Some("application/vnd.oci.image.index.v1+json; charset=utf-8"), r#"{"manifests":[]}"#, INDEX),
            (Some("text/plain"), r#"{"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[]}"#, INDEX),
            (Some(IMAGE), r#"{"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[]}"#, IMAGE),
        ] {
            assert_eq!(media_type(named, body.as_bytes()).as_deref(), Ok(expected), "{body}");
        }
    }

    #[test]
    fn a_document_that_can_be_read_in_two_ways_is_refused() {
        for (named, body, why) in [
            (None, r#"{"manifests":[],"layers":[]}"#, "both"),
            (None, r#"{"manifests":[],"config":{"digest":"x","size":1}}"#, "both"),
            (Some(INDEX), r#"{"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[]}"#, "calls itself"),
            (Some(INDEX), r#"{"layers":[]}"#, "an index with layers"),
            (Some(IMAGE), r#"{"manifests":[]}"#, "a manifest with manifests"),
            (None, r#"{"mediaType":"application/vnd.oci.image.index.v1+json","layers":[]}"#, "an index with layers"),
            (None, r#"{"layers":[],"layers":[]}"#, "duplicate"),
            (None, r#"{"mediaType":"text/html"}"#, "text/html"),
            (None, r#"{"schemaVersion":1,"fsLayers":[]}"#, "schema 1"),
            (Some("application/vnd.docker.distribution.manifest.v1+prettyjws"), "{}", "schema 1"),
            (None, "[]", "no document"),
            (None, "<html>", "no document"),
            (None, "", "no document"),
        ] {
            let error = media_type(named, body.as_bytes()).expect_err(body);
            assert!(error.contains(why), "{body}: {error}");
        }
    }
}
