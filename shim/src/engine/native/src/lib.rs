//! Makes, enters and removes containers of the OCI runtime specification, without starting a program.
//!
//! ```text
//!  process that decides                          process that is the containers' parent (one thread, subreaper)
//!  parse ─▶ plan::create ─▶ Create (CBOR) ─────▶ fork ─▶ perform::create ─clone3(CLONE_PARENT)─▶ init, waits at its gate
//!                              │                            └─ pid, or what failed ─▶ report
//!                              └─▶ Container ─▶ plan::exec ─▶ Exec ─▶ fork ─▶ perform::exec ─clone3(CLONE_PARENT)─▶ process
//! ```
//!
//! [`spec`] parses a configuration and refuses what the engine does not implement, by name. [`plan`] resolves it: pure, tested alone. [`perform`]
//! turns a plan into system calls, in a child of its own. [`control`] freezes and kills what is in a cgroup, and removes it. `docs/engine.md` has the order of
//! operations and the reasons.
//!
//! **Invariant:** `unsafe` is in `sys` alone. A path that a container can influence is resolved inside the container's root and acted on through a
//! descriptor.
pub mod control;
mod executable;
mod features;
pub mod fuzz;
mod host;
pub mod perform;
pub mod plan;

mod seccomp;
pub mod spec;
mod sys;

pub use executable::readonly_executable;
pub use features::features;
pub use host::{Host, MountedHierarchy};

/// Why a configuration is not for this engine.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Valid, but not implemented. Another engine may take it.
    #[error("the native engine does not implement {field}")]
    Unsupported { field: String },
    /// No engine would take it.
    #[error("{field}: {why}")]
    Invalid { field: String, why: String },
    /// Not the JSON of a configuration.
    #[error("parse the configuration")]
    Json { source: serde_json::Error },
}

impl Refused {
    fn invalid(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Invalid { field: field.into(), why: why.into() }
    }

    fn unsupported(field: impl Into<String>) -> Self {
        Self::Unsupported { field: field.into() }
    }
}

/// A handle of a process (a pidfd), as [`perform::exec`] needs it of a container's init. Open it while the process is not reaped.
pub fn open_process(pid: u32) -> std::io::Result<std::os::fd::OwnedFd> {
    sys::open_pidfd(pid)
}
