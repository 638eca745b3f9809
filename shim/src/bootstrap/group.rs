//! The group of a container: containers of one group share a shim.
//!
//! Owns the two annotations in `config.json` that name it.
use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::Deserialize;

use super::Error;

/// The longest `config.json` that is read, in bytes: containerd's own limit for a request.
const MAX_CONFIG_BYTES: u64 = 16 << 20;

#[derive(Debug, Default, Deserialize)]
struct Config {
    #[serde(default)]
    annotations: Option<Annotations>,
}

/// In order of precedence.
#[derive(Debug, Default, Deserialize)]
struct Annotations {
    #[serde(default, rename = "io.containerd.runc.v2.group")]
    group: Option<String>,
    #[serde(default, rename = "io.kubernetes.cri.sandbox-id")]
    sandbox: Option<String>,
}

/// Reads the group of the bundle's container; absent if the container has a shim of its own.
///
/// Errors: the file is missing, too long, or not the expected JSON.
pub(crate) fn of_bundle(bundle: &Path) -> Result<Option<String>, Error> {
    let path = bundle.join("config.json");
    let failed = |source| Error::Io { op: "read", path: path.clone(), source };
    let mut bytes = Vec::with_capacity(32 << 10);
    File::open(&path).and_then(|file| file.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut bytes)).map_err(failed)?;
    if bytes.len() as u64 > MAX_CONFIG_BYTES {
        return Err(Error::TooLong { what: path.display().to_string(), limit_bytes: MAX_CONFIG_BYTES });
    }
    parse(&bytes).map_err(|source| Error::Config { path, source })
}

fn parse(bytes: &[u8]) -> Result<Option<String>, serde_json::Error> {
    // serde accepts a list for a struct whose fields may all be absent.
    if !bytes.trim_ascii_start().starts_with(b"{") {
        return Err(serde::de::Error::custom("expected an object"));
    }
    let annotations = serde_json::from_slice::<Config>(bytes)?.annotations.unwrap_or_default();
    let named = |group: Option<String>| group.filter(|group| !group.is_empty());
    Ok(named(annotations.group).or_else(|| named(annotations.sandbox)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_annotation_that_is_there_names_the_group() {
        for (config, group) in [
            (r#"{}"#, None),
            (r#"{"annotations": null}"#, None),
            (r#"{"annotations": {}}"#, None),
            (r#"{"annotations": {"other": "x", "io.kubernetes.cri.sandbox-id": "s1"}}"#, Some("s1")),
            (r#"{"annotations": {"io.kubernetes.cri.sandbox-id": "s1", "io.containerd.runc.v2.group": "g1"}}"#, Some("g1")),
            (r#"{"annotations": {"io.containerd.runc.v2.group": "", "io.kubernetes.cri.sandbox-id": "s1"}}"#, Some("s1")),
            (
                r#"{"ociVersion": "99", "process": [1, {"a": null}], "annotations": {"io.containerd.runc.v2.group": "g/1 ü"}}"#,
                Some("g/1 ü"),
            ),
        ] {
            assert_eq!(parse(config.as_bytes()).expect(config).as_deref(), group, "{config}");
        }
    }

    #[test]
    fn what_is_not_a_config_is_an_error() {
        let deep = "[".repeat(100_000);
        for config in ["", "[]", "{", "null,", r#"{"annotations": {"io.containerd.runc.v2.group": 1}}"#, "\u{0}", &deep] {
            assert!(parse(config.as_bytes()).is_err(), "{}", &config[..config.len().min(40)]);
        }
    }
}
