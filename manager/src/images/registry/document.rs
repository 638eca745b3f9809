//! What kind of document a manifest or an index is.
//!
//! Programs that disagree about that see different images under one digest (CVE-2021-41190): what may be read in two ways is refused.

use serde::Deserialize;
use serde::de::IgnoredAny;

use super::{MANIFESTS, is_manifest};

#[derive(Deserialize)]
struct Shape {
    #[serde(rename = "schemaVersion")]
    version: Option<u64>,
    #[serde(rename = "mediaType")]
    media_type: Option<String>,
    manifests: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    config: Option<IgnoredAny>,
    #[serde(rename = "fsLayers")]
    schema1_layers: Option<IgnoredAny>,
}

/// The media type of a manifest or an index, whose server or descriptor calls it `named`.
pub(crate) fn media_type(named: Option<&str>, body: &[u8]) -> Result<String, String> {
    let shape: Shape = serde_json::from_slice(body).map_err(|error| format!("it is no manifest: {error}"))?;
    let named = named.map(|named| named.split(';').next().unwrap_or_default().trim());
    if shape.version == Some(1) || shape.schema1_layers.is_some() || named.is_some_and(|named| named.starts_with(SCHEMA1)) {
        return Err("it is a manifest of schema 1, which is not supported; push the image again with a current tool".to_owned());
    }
    let (is_index, is_image) = (shape.manifests.is_some(), shape.layers.is_some() || shape.config.is_some());
    if is_index && is_image {
        return Err("it is both a manifest and an index".to_owned());
    }
    let named = named.filter(|named| is_manifest(named));
    let media_type = match (shape.media_type.as_deref().filter(|own| !own.is_empty()), named) {
        (Some(own), Some(named)) if own != named => return Err(format!("it is called {named}, and calls itself {own}")),
        (Some(own), _) => own,
        (None, Some(named)) => named,
        (None, None) if is_index => MANIFESTS[0],
        (None, None) => MANIFESTS[1],
    };
    if !is_manifest(media_type) {
        let shown: String = media_type.chars().take(SHOWN).collect();
        return Err(format!("its media type is {shown:?}"));
    }
    let expects_index = [MANIFESTS[0], MANIFESTS[2]].contains(&media_type);
    if expects_index && is_image || !expects_index && is_index {
        return Err(format!("it is called {media_type}, and is not"));
    }
    Ok(media_type.to_owned())
}

/// Types of the first format.
const SCHEMA1: &str = "application/vnd.docker.distribution.manifest.v1+";
/// Characters of a media type.
const SHOWN: usize = 100;

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
            (None, r#"{"config":{},"layers":[]}"#, IMAGE),
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
            (None, r#"{"manifests":[],"config":{}}"#, "both"),
            (Some(INDEX), r#"{"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[]}"#, "calls itself"),
            (Some(INDEX), r#"{"layers":[]}"#, "is not"),
            (Some(IMAGE), r#"{"manifests":[]}"#, "is not"),
            (None, r#"{"mediaType":"application/vnd.oci.image.index.v1+json","layers":[]}"#, "is not"),
            (None, r#"{"layers":[],"layers":[]}"#, "duplicate"),
            (None, r#"{"mediaType":"text/html"}"#, "text/html"),
            (None, r#"{"schemaVersion":1,"fsLayers":[]}"#, "schema 1"),
            (Some("application/vnd.docker.distribution.manifest.v1+prettyjws"), "{}", "schema 1"),
            (None, "[]", "no manifest"),
            (None, "<html>", "no manifest"),
            (None, "", "no manifest"),
        ] {
            let error = media_type(named, body.as_bytes()).expect_err(body);
            assert!(error.contains(why), "{body}: {error}");
        }
    }
}
