//! `upgrade`: has a running x-manager replaced by the installed program, as `x-manager upgrade` does.

use std::ffi::OsString;
use std::io::{self, Read as _, Write as _};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use crate::error::{Error, IoContext as _, Result};
use crate::{output, parse};

/// Arguments of `upgrade`.
#[derive(Debug, Clone, Args)]
pub(crate) struct UpgradeArgs {
    /// Program to run instead of the installed one
    #[arg(long, value_name = "PATH", value_parser = parse::absolute)]
    binary: Option<PathBuf>,
    /// x-manager's folder for runtime data
    #[arg(long, value_name = "FOLDER", default_value = "/run/x-manager", value_parser = parse::absolute)]
    manager_state: PathBuf,
}

/// Prints the pid of the process that serves now.
pub(crate) fn run(args: &UpgradeArgs) -> Result<u8> {
    let address = args.manager_state.join(SOCKET);
    for _attempt in 0..ATTEMPTS {
        let answer = ask(&address, args.binary.as_deref())?;
        if let Some(sentence) = answer.strip_prefix("error ") {
            return Err(Error::refused(format!(
                "x-manager is not upgraded, and the running one stays: {}",
                output::printable(sentence.trim_end())
            )));
        }
        if let Some(pid) = answer.strip_prefix("ok ").and_then(|pid| pid.trim_end().parse::<u32>().ok()) {
            output::print(&format!("process {pid} has taken over\n"))?;
            return Ok(0);
        }
        // another upgrade was about to replace it: the request goes to the next process
    }
    Err(Error::refused("x-manager did not answer: it has exited; see its log"))
}

fn ask(address: &Path, program: Option<&Path>) -> Result<String> {
    let mut socket = UnixStream::connect(address).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::refused(format!(
            "no x-manager can be asked at {}: {source}; is it running? containerd is upgraded by restarting it, and --manager-state names another folder",
            address.display()
        )),
        _ => Error::Io { op: "connect to", path: address.to_owned(), source },
    })?;
    socket.set_read_timeout(Some(ANSWERED)).on("wait for", address)?;
    let mut request = OsString::from("upgrade");
    if let Some(program) = program {
        request.push(" ");
        request.push(program);
    }
    request.push("\n");
    let mut answer = String::new();
    match socket.write_all(&request.into_vec()).and_then(|()| (&socket).take(LONGEST).read_to_string(&mut answer)) {
        Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => Ok(String::new()),
        asked => asked.on("wait for the answer of", address).map(|_bytes| answer),
    }
}

/// In x-manager's folder for runtime data.
const SOCKET: &str = "control.sock";
/// A request that a process accepts while it is being replaced is repeated to the next one.
const ATTEMPTS: usize = 3;
/// Upper bound of an upgrade.
const ANSWERED: Duration = Duration::from_secs(90);
/// Of an answer.
const LONGEST: u64 = 64 << 10;
