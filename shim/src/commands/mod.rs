//! The commands for operators.
//!
//! Owns the output about the shims of a host, as a table or as JSON. All of it comes from the keepers' control sockets, the journals
//! and `/proc`: no worker is started for it.
//!
//! **Invariant:** a shim that is dead or does not answer is shown as such and delays no other. Fields of the JSON are only ever added.
use std::io::{self, Write};

use crate::invocation::HELP;
use crate::run_dir;

mod inspect;
mod ps;
pub(crate) mod survey;
mod table;
mod upgrade;

pub(crate) use inspect::{inspect, log_snapshot};
pub(crate) use ps::ps;
pub(crate) use upgrade::upgrade;

/// Why a command for operators failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("write to standard output")]
    Stdout(#[from] io::Error),
    #[error(transparent)]
    RunDir(#[from] run_dir::Error),
    #[error("no shim on this host has a container {id}{}{}", in_namespace(namespace.as_deref()), but_silent(*silent))]
    NoContainer { id: String, namespace: Option<String>, silent: usize },
    #[error("several namespaces have a container {id} ({namespaces}): choose one with --namespace")]
    Ambiguous { id: String, namespaces: String },
    #[error("no shim on this host has {ids}{}{}", in_namespace(namespace.as_deref()), but_silent(*silent))]
    NotAll { ids: String, namespace: Option<String>, silent: usize },
    #[error("upgrade to {}: {why}", path.display())]
    NoProgram { path: std::path::PathBuf, why: &'static str },
    #[error("upgrade to {}", path.display())]
    Program { path: std::path::PathBuf, source: io::Error },
    #[error("read {}", path.display())]
    Journal { path: std::path::PathBuf, source: io::Error },
}

fn in_namespace(namespace: Option<&str>) -> String {
    namespace.map_or_else(String::new, |namespace| format!(" in the namespace {namespace}"))
}

fn but_silent(silent: usize) -> String {
    match silent {
        0 => String::new(),
        count => format!("; {count} did not answer"),
    }
}

/// Prints the version, in the form of the stock shim.
pub(crate) fn version() -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "containerd-shim-x-v2:")?;
    writeln!(stdout, "  Version:  {}", env!("CARGO_PKG_VERSION"))?;
    writeln!(stdout, "  Revision: {}", revision())?;
    Ok(())
}

/// The commit that this binary was built from, if the build recorded it.
pub(crate) fn revision() -> &'static str {
    env!("X_BUILD").split_once('+').map_or("unknown", |(_version, revision)| revision)
}

/// Prints the help.
pub(crate) fn help() -> Result<(), Error> {
    Ok(io::stdout().lock().write_all(HELP.as_bytes())?)
}

/// Prints JSON for programs.
fn print_json(value: &serde_json::Value) -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    serde_json::to_writer_pretty(&mut stdout, value).map_err(io::Error::from)?;
    Ok(writeln!(stdout)?)
}
