//! Where the daemons and runtimes of each Debian suite are, and which shim is under test.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::{env, fmt};

use anyhow::{Context as _, Result, ensure};

use crate::cgroups::Version;
use crate::proc;

/// A containerd version, by the Debian suite that it comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Suite {
    /// containerd 1.6
    Bookworm,
    /// containerd 1.7; Docker 26
    Trixie,
    /// containerd 2.1; Docker 28; criu
    Forky,
}

impl Suite {
    /// All of them, oldest first.
    pub const ALL: [Self; 3] = [Self::Bookworm, Self::Trixie, Self::Forky];

    /// The folder with its programs.
    pub fn bin(self) -> PathBuf {
        let name = match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Forky => "forky",
        };
        cache().join(name).join("bin")
    }

    /// One of its programs.
    pub fn program(self, name: &str) -> PathBuf {
        self.bin().join(name)
    }

    /// Its OCI runtime. On cgroup v2 crun 1.8 raises its own RLIMIT_MEMLOCK for a device filter, which needs CAP_SYS_RESOURCE: without
    /// it, the next suite's takes its place.
    pub fn runtime(self, runtime: Runtime) -> PathBuf {
        if runtime == Runtime::Native {
            return PathBuf::from(runtime.name());
        }
        let is_unable = || Version::chosen().is_ok_and(|chosen| chosen == Version::V2) && !proc::may_raise_limits();
        let suite = if (self, runtime) == (Self::Bookworm, Runtime::Crun) && is_unable() { Self::Trixie } else { self };
        suite.program(runtime.name())
    }

    /// The version of containerd, as in names of tests.
    pub fn version(self) -> &'static str {
        match self {
            Self::Bookworm => "1.6",
            Self::Trixie => "1.7",
            Self::Forky => "2.1",
        }
    }
}

impl fmt::Display for Suite {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let daemon = if manager().is_some() { "x-manager-beside" } else { "containerd" };
        write!(f, "{daemon}-{}", self.version())
    }
}

static MANAGER: OnceLock<Option<PathBuf>> = OnceLock::new();

/// The x-manager that stands in for every containerd, with the suite's runtimes, shims and clients: `X_DAEMON`; none without it.
pub fn manager() -> Option<&'static Path> {
    MANAGER.get_or_init(|| env::var_os("X_DAEMON").map(PathBuf::from)).as_deref()
}

/// Has x-manager stand in for containerd even without `X_DAEMON`: by default it is the release build of this workspace.
///
/// Errors: when the binary does not exist.
pub fn use_manager() -> Result<()> {
    let release = || target_folder().join("x86_64-unknown-linux-gnu/release/x-manager");
    let path = env::var_os("X_DAEMON").map_or_else(release, PathBuf::from);
    ensure!(path.is_file(), "no x-manager at {}: build it, or name one with X_DAEMON", path.display());
    MANAGER.get_or_init(|| Some(path));
    Ok(())
}

/// The `xctl` under test: `X_XCTL`, by default the debug build of this workspace.
///
/// Errors: when the binary does not exist.
pub fn xctl() -> Result<PathBuf> {
    let debug = || target_folder().join("x86_64-unknown-linux-gnu/debug/xctl");
    let path = env::var_os("X_XCTL").map_or_else(debug, PathBuf::from);
    ensure!(path.is_file(), "no xctl at {}: build the package x-manager, or name one with X_XCTL", path.display());
    Ok(path)
}

/// What makes containers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Runtime {
    /// opencontainers/runc
    Runc,
    /// containers/crun
    Crun,
    /// The engine of the shim that this repository builds. Its option BinaryName is this name, not a path.
    Native,
}

impl Runtime {
    /// All.
    pub const ALL: [Self; 3] = [Self::Runc, Self::Crun, Self::Native];

    /// Those that are programs of their own, and work with the cgroups that are seen here.
    pub fn programs() -> Vec<Self> {
        let mut all = vec![Self::Runc, Self::Crun];
        all.retain(|runtime| runtime.works());
        all
    }

    /// The fastest of these.
    pub fn program() -> Self {
        if Self::Crun.works() { Self::Crun } else { Self::Runc }
    }

    /// Whether it works with the cgroups that are seen here: crun refuses v1 beside controllers on v2.
    pub fn works(self) -> bool {
        self != Self::Crun || !scratch::cgroups::are_mixed()
    }

    /// Its name, as the option BinaryName takes it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Runc => "runc",
            Self::Crun => "crun",
            Self::Native => "native",
        }
    }
}

impl fmt::Display for Runtime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The runtime type of the shim that this repository builds.
pub const OUR_TYPE: &str = "io.containerd.x.v2";
/// The runtime type of containerd's own shim.
pub const STOCK_TYPE: &str = "io.containerd.runc.v2";

/// The shim under test: `X_SHIM` and `X_RUNTIME_TYPE`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shim {
    /// The name that containers give as their runtime.
    pub runtime_type: String,
    /// The binary; none for the stock shim that comes with each daemon.
    pub binary: Option<PathBuf>,
}

impl Shim {
    /// The shim that the environment names; by default the release build of this workspace.
    ///
    /// Errors: when the binary does not exist.
    pub fn under_test() -> Result<Self> {
        let runtime_type = env::var("X_RUNTIME_TYPE").unwrap_or_else(|_| OUR_TYPE.to_owned());
        let binary = match env::var_os("X_SHIM") {
            Some(path) => Some(PathBuf::from(path)),
            None if runtime_type == STOCK_TYPE => None,
            None => Some(target_folder().join("x86_64-unknown-linux-gnu/release").join(binary_name(&runtime_type))),
        };
        if let Some(path) = &binary {
            ensure!(path.is_file(), "no shim at {}: build it, or name one with X_SHIM", path.display());
        }
        Ok(Self { runtime_type, binary: binary.map(|path| path.canonicalize()).transpose()? })
    }

    /// Our own, built to kill its worker where a test chooses: `X_SHIM_FAULTY`, by default the debug build of this workspace.
    ///
    /// Errors: when the binary does not exist.
    pub fn faulty() -> Result<Self> {
        let named = env::var_os("X_SHIM_FAULTY").map(PathBuf::from);
        let path = named.unwrap_or_else(|| target_folder().join("x86_64-unknown-linux-gnu/debug").join(binary_name(OUR_TYPE)));
        ensure!(path.is_file(), "no shim at {}: build it with --features fault-injection, or name one with X_SHIM_FAULTY", path.display());
        Ok(Self { runtime_type: OUR_TYPE.to_owned(), binary: Some(path.canonicalize()?) })
    }

    /// The stock shim that comes with each daemon.
    pub fn stock() -> Self {
        Self { runtime_type: STOCK_TYPE.to_owned(), binary: None }
    }

    /// Whether it is the shim of this repository, made of a keeper and a worker.
    pub fn is_ours(&self) -> bool {
        self.runtime_type == OUR_TYPE
    }

    /// The file name under which a daemon looks for it in PATH.
    pub fn binary_name(&self) -> String {
        binary_name(&self.runtime_type)
    }
}

/// `io.containerd.NAME.vN` is served by `containerd-shim-NAME-vN`.
fn binary_name(runtime_type: &str) -> String {
    let mut parts = runtime_type.rsplit('.');
    let (version, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    format!("containerd-shim-{name}-{version}")
}

fn target_folder() -> PathBuf {
    match env::var_os("CARGO_TARGET_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"),
    }
}

/// The folder that `tools/fetch-suites` fills.
pub fn cache() -> PathBuf {
    if let Some(folder) = env::var_os("X_TESTS_CACHE") {
        return folder.into();
    }
    let base =
        env::var_os("XDG_CACHE_HOME").map_or_else(|| PathBuf::from(env::var_os("HOME").unwrap_or_default()).join(".cache"), PathBuf::from);
    base.join("x-tests")
}

/// Runs `tools/fetch-suites`, which does nothing when nothing is missing.
pub fn fetch() -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tools/fetch-suites");
    let status = Command::new(&script).status().with_context(|| format!("run {}", script.display()))?;
    ensure!(status.success(), "{} failed: {status}", script.display());
    Ok(())
}
