//! The commands for people.
use std::io::{self, Write};

use crate::control;
use crate::invocation::HELP;
use crate::run_dir;

/// Why a command for people failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("write to standard output")]
    Stdout(#[from] io::Error),
    #[error(transparent)]
    RunDir(#[from] run_dir::Error),
    #[error("no shim of this host knows a container {id}{}", in_namespace(namespace.as_deref()))]
    NoContainer { id: String, namespace: Option<String> },
    #[error(transparent)]
    Control(#[from] control::Error),
}

fn in_namespace(namespace: Option<&str>) -> String {
    namespace.map_or_else(String::new, |namespace| format!(" in the namespace {namespace}"))
}

/// Prints who we are, in the form of containerd's own shim.
pub(crate) fn version() -> Result<(), Error> {
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "containerd-shim-x-v2:")?;
    writeln!(stdout, "  Version:  {}", env!("CARGO_PKG_VERSION"))?;
    writeln!(stdout, "  Revision: {}", revision())?;
    Ok(())
}

/// The commit that this binary was built from, if the build said so.
pub(crate) fn revision() -> &'static str {
    option_env!("X_REVISION").unwrap_or("unknown")
}

/// Prints what the command line can be.
pub(crate) fn help() -> Result<(), Error> {
    Ok(io::stdout().lock().write_all(HELP.as_bytes())?)
}
