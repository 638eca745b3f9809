//! `-info`: describes the runtime and its features.
//!
//! Owns the `RuntimeInfo` on standard output. containerd decodes it directly, without an `Any` around it, and requests it before it
//! allows a container with id-mapped mounts.
use std::io::{self, Write};
use std::time::{Duration, Instant};

use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};
use protobuf::well_known_types::any::Any;
use protobuf::{Message, MessageField};

use super::input::Input;
use super::{Error, helper};
use crate::commands::revision;
use crate::engine::{CommandEngine, NATIVE, Verb};
use crate::options::RuntimeOptions;

const NAME: &str = "io.containerd.x.v2";

/// The shim's own annotations: the OCI runtime that it chooses for these options, and why.
const RUNTIME: &str = "io.containerd.x.v2.oci-runtime";
const REASON: &str = "io.containerd.x.v2.oci-runtime.reason";

/// The features of an OCI runtime, as JSON.
const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// How long the engine may take to print its features.
const PATIENCE: Duration = Duration::from_secs(5);

/// Reads options from standard input, queries the features of the engine that they choose, and prints the description.
///
/// Errors: options that cannot be decoded; no engine. An engine without a `features` command is described without them.
pub(crate) fn info() -> Result<(), Error> {
    let input = Input::of_client()?;
    let options = if input.is_empty() { None } else { Some(Any::parse_from_bytes(&input).map_err(|source| Error::Options { source })?) };
    let read = RuntimeOptions::blocking_read(options.as_ref())?;
    let (features, runtime, reason) = match read.binary_name.as_deref() {
        Some(NATIVE) => (native_features(), NATIVE.to_owned(), "named by the option BinaryName".to_owned()),
        None => (native_features(), NATIVE.to_owned(), "BinaryName is not set; crun or runc run what it does not implement".to_owned()),
        Some(_) => {
            let (engine, reason) = CommandEngine::blocking_choose(&read, "", false)?;
            (features(&engine), engine.binary().display().to_string(), reason)
        }
    };
    let mut info = describe(options, features);
    info.annotations.insert(RUNTIME.to_owned(), runtime);
    info.annotations.insert(REASON.to_owned(), reason);
    let bytes = info.write_to_bytes().map_err(|error| Error::Stdout { source: io::Error::other(error) })?;
    io::stdout().lock().write_all(&bytes).map_err(|source| Error::Stdout { source })
}

fn describe(options: Option<Any>, features: Option<Vec<u8>>) -> RuntimeInfo {
    let mut version = RuntimeVersion::new();
    version.version = env!("CARGO_PKG_VERSION").to_owned();
    version.revision = revision().to_owned();
    let mut info = RuntimeInfo::new();
    info.name = NAME.to_owned();
    info.version = MessageField::some(version);
    info.options = options.into();
    info.features = features.map(|value| Any { type_url: FEATURES_TYPE.to_owned(), value, ..Any::new() }).into();
    info
}

fn native_features() -> Option<Vec<u8>> {
    serde_json::to_vec(&x_engine::features(&x_engine::Host::read().ok()?)).ok()
}

/// The engine's features, if they are JSON: containerd cannot decode anything else.
fn features(engine: &CommandEngine) -> Option<Vec<u8>> {
    let exited = helper::run(&engine.features(), Instant::now() + PATIENCE).ok()?;
    engine.interpret(Verb::Features, &exited).ok()?;
    serde_json::from_slice::<serde::de::IgnoredAny>(&exited.output).ok()?;
    Some(exited.output)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_and_features_are_there_only_if_they_are_known() {
        let info = describe(None, None);
        assert_eq!(info.name, "io.containerd.x.v2");
        assert!(info.options.is_none() && info.features.is_none());
        let info = describe(Some(Any::new()), Some(b"{}".to_vec()));
        assert!(info.options.is_some());
        assert_eq!(info.features.type_url, FEATURES_TYPE);
    }
}
