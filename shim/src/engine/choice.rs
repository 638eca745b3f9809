//! The choice of the OCI runtime for a container.
//!
//! Owns the choice and its reason: the binary that the option BinaryName names, else the first of crun and runc that is installed and
//! works on this host. One property of the host matters: crun refuses to create a container where cgroup v1 and v2 hierarchies are
//! mixed and the v2 one has controllers of its own.
//!
//! **Invariant:** a named runtime is used in any case: its refusal is reported, and no other runs in its place.
use std::fs;
use std::path::{Path, PathBuf};

use std::os::unix::fs::PermissionsExt;

/// The chosen runtime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Choice {
    /// Absolute path.
    pub(crate) binary: PathBuf,
    /// The reason, for the log and for `-info`.
    pub(crate) reason: String,
}

/// No runtime can be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EngineNotFound {
    /// A binary was named, by the option BinaryName.
    #[error(
        "OCI runtime {name:?}, named by the option BinaryName, not found as an executable file in PATH={path:?}; install it there or name an absolute path"
    )]
    Name { name: String, path: String },
    /// A path was named, by the option BinaryName.
    #[error("OCI runtime {}, named by the option BinaryName, is not an executable file; install it there or name another", path.display())]
    Path { path: PathBuf },
    /// No binary was named, and none is installed.
    #[error("no OCI runtime: neither crun nor runc found in PATH={path:?}; install one of them, or name one with the option BinaryName")]
    Default { path: String },
    /// No binary was named, and the only installed one does not support this host.
    #[error(
        "no OCI runtime for this host: {} does not support {mixed}, and runc was not found in PATH={path:?}; install runc, mount a v1 hierarchy for each of these controllers, or name a runtime with the option BinaryName", crun.display()
    )]
    Unsupported { crun: PathBuf, mixed: MixedCgroups, path: String },
}

/// A host with both cgroup v1 and v2 hierarchies, of which the v2 one has controllers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MixedCgroups {
    /// Their mount points.
    file: PathBuf,
    controllers: String,
}

impl std::fmt::Display for MixedCgroups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "cgroup v1 beside a v2 hierarchy that has controllers ({}: {})", self.file.display(), self.controllers)
    }
}

impl Choice {
    /// Chooses the binary that `name` names, else the first that works on this host, from `path`, a value of PATH.
    ///
    /// The stock shim runs `runc` when no binary is named. crun comes first here because it is the faster of the two
    /// and takes the same arguments; clients that depend on runc name it.
    pub(crate) fn blocking_make(name: Option<&str>, path: &str) -> Result<Self, EngineNotFound> {
        Self::make(name, path, || MixedCgroups::blocking_find(Path::new("/sys/fs/cgroup")))
    }

    fn make(name: Option<&str>, path: &str, mixed: impl FnOnce() -> Option<MixedCgroups>) -> Result<Self, EngineNotFound> {
        if let Some(name) = name {
            let binary = if name.contains('/') {
                Some(PathBuf::from(name))
                    .filter(|binary| binary.is_absolute() && is_executable(binary))
                    .ok_or_else(|| EngineNotFound::Path { path: name.into() })?
            } else {
                find(name, path).ok_or_else(|| EngineNotFound::Name { name: name.to_owned(), path: path.to_owned() })?
            };
            return Ok(Self { binary, reason: "named by the option BinaryName".to_owned() });
        }
        match (find("crun", path), find("runc", path)) {
            (None, None) => Err(EngineNotFound::Default { path: path.to_owned() }),
            (None, Some(binary)) => Ok(Self { binary, reason: "BinaryName is not set, and crun is not in PATH".to_owned() }),
            (Some(crun), runc) => match (mixed(), runc) {
                (None, _) => Ok(Self { binary: crun, reason: "BinaryName is not set, and crun is the first choice".to_owned() }),
                (Some(mixed), Some(binary)) => {
                    Ok(Self { binary, reason: format!("BinaryName is not set, and {} does not support {mixed}", crun.display()) })
                }
                (Some(mixed), None) => Err(EngineNotFound::Unsupported { crun, mixed, path: path.to_owned() }),
            },
        }
    }
}

impl MixedCgroups {
    /// Detects the layout as crun does: a v2 hierarchy that is mounted as `unified` beside those of v1.
    fn blocking_find(mount: &Path) -> Option<Self> {
        let file = mount.join("unified/cgroup.controllers");
        let controllers = fs::read_to_string(&file).ok()?.trim().to_owned();
        // On a host with v2 alone, `unified` could only be a cgroup of that name.
        let v2_alone = mount.join("cgroup.controllers").exists();
        (!v2_alone && !controllers.is_empty()).then_some(Self { file, controllers })
    }
}

/// Looks `name` up in the folders of `path`, absolute ones only.
pub(super) fn find(name: &str, path: &str) -> Option<PathBuf> {
    path.split(':').map(Path::new).filter(|folder| folder.is_absolute()).map(|folder| folder.join(name)).find(|file| is_executable(file))
}

pub(super) fn is_executable(file: &Path) -> bool {
    file.metadata().is_ok_and(|about| about.is_file() && about.permissions().mode() & 0o111 != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A temporary folder with executable files of these names.
    struct Folder(scratch::Folder);

    impl Folder {
        fn with(names: &[&str]) -> Self {
            let folder = scratch::Folder::new("choice");
            for name in names {
                fs::write(folder.join(name), "").expect("a file");
                fs::set_permissions(folder.join(name), fs::Permissions::from_mode(0o755)).expect("its mode");
            }
            Self(folder)
        }

        fn choose(&self, name: Option<&str>, mixed: Option<MixedCgroups>) -> Result<Choice, EngineNotFound> {
            Choice::make(name, &format!("relative:{}", self.0.display()), || mixed)
        }
    }

    fn mixed() -> MixedCgroups {
        MixedCgroups { file: "/sys/fs/cgroup/unified/cgroup.controllers".into(), controllers: "hugetlb".to_owned() }
    }

    #[test]
    fn the_binary_is_the_named_one_else_crun_else_runc() {
        let (both, runc, none) = (Folder::with(&["crun", "runc"]), Folder::with(&["runc"]), Folder::with(&["other"]));
        fs::write(none.0.join("runc"), "").expect("a file that is not executable");
        let absolute = both.0.join("runc").display().to_string();
        for (folder, name, expected) in [
            (&both, None, &both.0.join("crun")),
            (&runc, None, &runc.0.join("runc")),
            (&both, Some("runc"), &both.0.join("runc")),
            (&none, Some("other"), &none.0.join("other")),
            (&none, Some(absolute.as_str()), &both.0.join("runc")),
        ] {
            assert_eq!(folder.choose(name, None).expect("a runtime").binary, *expected, "{name:?}");
        }
        for (name, words) in [
            (None, "no OCI runtime: neither crun nor runc found in PATH="),
            (Some("youki"), "OCI runtime \"youki\", named by the option BinaryName, not found"),
            (Some("/no/such/runc"), "OCI runtime /no/such/runc, named by the option BinaryName, is not an executable file"),
            (Some("./runc"), "OCI runtime ./runc, named by the option BinaryName, is not an executable file"),
        ] {
            let error = none.choose(name, None).expect_err("no such binary").to_string();
            assert!(error.starts_with(words), "{error}");
        }
    }

    #[test]
    fn crun_is_not_taken_where_it_would_refuse_the_host_unless_it_is_named() {
        let (both, crun) = (Folder::with(&["crun", "runc", "b"]), Folder::with(&["crun"]));
        let choice = both.choose(None, Some(mixed())).expect("runc");
        assert_eq!(choice.binary, both.0.join("runc"));
        assert!(choice.reason.ends_with("(/sys/fs/cgroup/unified/cgroup.controllers: hugetlb)"), "{}", choice.reason);
        assert_eq!(both.choose(Some("crun"), Some(mixed())).expect("crun").binary, both.0.join("crun"));
        let error = crun.choose(None, Some(mixed())).expect_err("nothing works").to_string();
        for words in [
            "crun does not support cgroup v1 beside a v2 hierarchy that has controllers",
            "hugetlb",
            "runc was not found in PATH=",
            "install runc",
        ] {
            assert!(error.contains(words), "{error}");
        }
    }

    #[test]
    fn only_controllers_on_v2_beside_v1_make_a_mixed_host() {
        let host = scratch::Folder::new("cgroups");
        let unified = host.join("unified/cgroup.controllers");
        fs::create_dir_all(host.join("unified")).expect("a temporary folder");
        assert_eq!(MixedCgroups::blocking_find(&host), None, "v1 alone");
        fs::write(&unified, "").expect("a file");
        assert_eq!(MixedCgroups::blocking_find(&host), None, "no controllers on v2");
        fs::write(&unified, "cpuset hugetlb\n").expect("a file");
        assert_eq!(MixedCgroups::blocking_find(&host), Some(MixedCgroups { file: unified, controllers: "cpuset hugetlb".to_owned() }));
        fs::write(host.join("cgroup.controllers"), "cpu").expect("a file");
        assert_eq!(MixedCgroups::blocking_find(&host), None, "v2 alone");
    }
}
