//! The part of a bundle's `config.json` that the shim itself needs. The engine reads the rest.
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

/// The fields of a runtime specification that the shim needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spec {
    /// The root filesystem, absolute.
    pub(crate) rootfs: PathBuf,
    /// No pid namespace of its own: processes can outlive init.
    pub(crate) shared_pid_namespace: bool,
    /// Its cgroup is named as a unit of systemd's: `SLICE:PREFIX:NAME`.
    pub(crate) names_unit: bool,
}

/// A bundle that cannot be run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SpecError {
    #[error("open {}", path.display())]
    Missing { path: PathBuf, source: io::Error },
    #[error("{}: longer than {MAX_BYTES} bytes", path.display())]
    TooLong { path: PathBuf },
    #[error("{} is not a runtime specification", path.display())]
    Malformed { path: PathBuf, source: serde_json::Error },
    #[error("{}: ociVersion {version:?} is not supported, only 1.x is", path.display())]
    Version { path: PathBuf, version: String },
    #[error("{}: root.path is missing", path.display())]
    NoRoot { path: PathBuf },
    #[error("root filesystem {}", path.display())]
    NoRootfs { path: PathBuf, source: io::Error },
}

impl Spec {
    /// Reads `config.json` of `bundle`, on the daemon's own tmpfs. Returns its text too, for the engine.
    pub(crate) fn blocking_read(bundle: &Path) -> Result<(Self, Vec<u8>), SpecError> {
        let text = blocking_read_text(bundle)?;
        Ok((Self::parse(&text, bundle)?, text))
    }

    /// Reads the text of the `config.json` of `bundle`.
    pub(crate) fn parse(text: &[u8], bundle: &Path) -> Result<Self, SpecError> {
        let path = bundle.join("config.json");
        let config = serde_json::from_slice::<Config>(text).map_err(|source| SpecError::Malformed { path: path.clone(), source })?;
        if !config.oci_version.starts_with("1.") {
            return Err(SpecError::Version { path, version: config.oci_version });
        }
        let Some(root) = config.root.map(|root| root.path).filter(|root| !root.as_os_str().is_empty()) else {
            return Err(SpecError::NoRoot { path });
        };
        let has_own = |namespace: &Namespace| namespace.kind == "pid" && namespace.path.is_empty();
        let linux = config.linux.unwrap_or_default();
        let shared_pid_namespace = !linux.namespaces.is_some_and(|all| all.iter().any(has_own));
        let names_unit = linux.cgroups_path.is_some_and(|path| !path.starts_with('/') && path.split(':').count() == 3);
        Ok(Self { rootfs: bundle.join(root), shared_pid_namespace, names_unit })
    }

    /// Errors: the root filesystem, mounted by now, is missing.
    pub(crate) fn blocking_check_rootfs(&self) -> Result<(), SpecError> {
        match self.rootfs.metadata() {
            Ok(about) if about.is_dir() => Ok(()),
            Ok(_) => Err(SpecError::NoRootfs { path: self.rootfs.clone(), source: io::ErrorKind::NotADirectory.into() }),
            Err(source) => Err(SpecError::NoRootfs { path: self.rootfs.clone(), source }),
        }
    }
}

/// Reads the text of `config.json` of `bundle`.
pub(crate) fn blocking_read_text(bundle: &Path) -> Result<Vec<u8>, SpecError> {
    let path = bundle.join("config.json");
    let missing = |source| SpecError::Missing { path: path.clone(), source };
    let mut text = Vec::new();
    File::open(&path).map_err(missing)?.take(MAX_BYTES + 1).read_to_end(&mut text).map_err(missing)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(SpecError::TooLong { path });
    }
    Ok(text)
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Config {
    oci_version: String,
    root: Option<Root>,
    linux: Option<Linux>,
}

#[derive(Deserialize)]
struct Root {
    #[serde(default)]
    path: PathBuf,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Linux {
    namespaces: Option<Vec<Namespace>>,
    cgroups_path: Option<String>,
}

#[derive(Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: String,
}

const MAX_BYTES: u64 = 16 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn read(config: &str) -> Result<Spec, SpecError> {
        let bundle = scratch::Folder::new("spec");
        std::fs::write(bundle.join("config.json"), config).expect("a file");
        let spec = Spec::blocking_read(&bundle);
        spec.map(|(spec, _)| Spec { rootfs: spec.rootfs.strip_prefix(&bundle).map(Path::to_owned).unwrap_or(spec.rootfs), ..spec })
    }

    #[test]
    fn a_pid_namespace_is_shared_unless_a_new_one_is_asked_for() {
        for (namespaces, shared) in
            [(r#"[{"type":"pid"}]"#, false), (r#"[{"type":"pid","path":"/proc/1/ns/pid"}]"#, true), (r#"[{"type":"ipc"}]"#, true)]
        {
            let text = format!(r#"{{"ociVersion":"1.0.2","root":{{"path":"rootfs"}},"linux":{{"namespaces":{namespaces}}}}}"#);
            let expected = Spec { rootfs: "rootfs".into(), shared_pid_namespace: shared, names_unit: false };
            assert_eq!(read(&text).expect("a specification"), expected);
        }
    }

    #[test]
    fn a_systemd_unit_is_distinguished_from_a_path() {
        for (path, names_unit) in
            [("kubepods.slice:cri-containerd:c1", true), (":runc:c1", true), ("/kubepods/pod:1:2", false), ("c1", false)]
        {
            let text = format!(r#"{{"ociVersion":"1.0.2","root":{{"path":"rootfs"}},"linux":{{"cgroupsPath":"{path}"}}}}"#);
            assert_eq!(read(&text).expect("a specification").names_unit, names_unit, "{path}");
        }
    }

    #[test]
    fn a_bundle_that_cannot_be_run_is_refused() {
        type Expected = fn(&SpecError) -> bool;
        let malformed: Expected = |error| matches!(error, SpecError::Malformed { .. });
        let version: Expected = |error| matches!(error, SpecError::Version { .. });
        let no_root: Expected = |error| matches!(error, SpecError::NoRoot { .. });
        for (text, is_expected) in [
            ("", malformed),
            ("[]", malformed),
            (r#"{"root":{"path":"rootfs"}}"#, malformed),
            (r#"{"ociVersion":"2.0.0","root":{"path":"rootfs"}}"#, version),
            (r#"{"ociVersion":"1.0.0"}"#, no_root),
            (r#"{"ociVersion":"1.0.0","root":{}}"#, no_root),
        ] {
            let error = read(text).expect_err(text);
            assert!(is_expected(&error), "{text}: {error:?}");
        }
        let error = Spec::blocking_read(Path::new("/nowhere")).expect_err("there is no such bundle");
        assert!(matches!(&error, SpecError::Missing { source, .. } if source.kind() == io::ErrorKind::NotFound), "{error:?}");
    }
}
