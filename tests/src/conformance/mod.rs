//! The conformance suite: the requirements of containerd's shim protocol, clause by clause, and how far a shim conforms.
//!
//! ```text
//!  docs/protocol.md ── clauses ──┐
//!  cases/* ─────────── registry ─┴▶ run ──one process each──▶ child: namespaces, a stand, the body, an audit
//!                                    │                          writes its verdict, the shim's log and a trace
//!                                    ▼
//!                         progress, summary, JSON, JUnit, tables
//! ```
//! **Invariant:** a case knows nothing of the shim but its path. Known deviations of a shim are in a file of
//! [`expect`]ations, each with a reason, never in a case.

pub mod cases;
pub mod child;
pub mod clauses;
pub mod expect;
pub mod faults;

pub mod report;
pub mod run;

use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use anyhow::Result;

use crate::runner::{needs_controller, needs_criu, skip};
use crate::stand::Stand;

/// The body of a case.
pub type Body = fn(Stand) -> Pin<Box<dyn Future<Output = Result<()>>>>;

/// Requirements of a case on the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Need {
    /// A controller in the cgroups that it sees.
    Controller(&'static str),
    /// A criu that works.
    Criu,
}

impl Need {
    /// Skips the case when it is not there, for shims and runtimes that look for programs in `path`.
    fn check(self, path: &str) -> Result<()> {
        match self {
            Self::Controller(name) => needs_controller(name),
            Self::Criu => {
                let mut programs = path.split(':').map(|folder| Path::new(folder).join("criu"));
                let Some(criu) = programs.find(|program| program.is_file()) else { return skip("no criu") };
                needs_criu(&criu)
            }
        }
    }
}

/// One property of a conforming shim.
#[derive(Debug, Clone, Copy)]
pub struct Case {
    /// `area.sentence`
    pub name: &'static str,
    /// The clause that it proves.
    pub clause: &'static str,
    /// Its requirements besides root and an OCI runtime.
    pub needs: &'static [Need],
    /// Its deadline.
    pub deadline: Duration,
    /// Its body.
    pub body: Body,
}

impl Case {
    /// A case with the usual deadline.
    pub const fn new(clause: &'static str, name: &'static str, body: Body) -> Self {
        Self { name, clause, needs: &[], deadline: Duration::from_secs(60), body }
    }

    /// Gives it another deadline.
    #[must_use]
    pub const fn within(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Adds a requirement.
    #[must_use]
    pub const fn needs(mut self, needs: &'static [Need]) -> Self {
        self.needs = needs;
        self
    }

    /// The part of the name before the dot.
    pub fn area(&self) -> &'static str {
        self.name.split_once('.').map_or(self.name, |(area, _)| area)
    }
}

/// Lists the cases of a module by clause: `clauses![stdio: "S1" => a, b; "S2" => c]`.
#[macro_export]
macro_rules! clauses {
    ($module:ident: $($clause:literal => $($name:ident),+ $(,)?);+ $(;)?) => {
        vec![$($($crate::conformance::Case::new(
            $clause,
            concat!(stringify!($module), ".", stringify!($name)),
            |stand| Box::pin($name(stand)),
        )),+),+]
    };
}
