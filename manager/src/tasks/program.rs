//! A shim's program: which one a runtime's name means, and what it is run for.
//!
//! ```text
//! start   in the bundle; leaves a shim behind and prints where it serves
//! delete  in the bundle; cleans up after a dead shim and prints how its container ended
//! -info   prints what the runtime can do
//! ```
//!
//! | dialect | stdin of `start` | its answer |
//! | --- | --- | --- |
//! | containerd 2.3 | `BootstrapParams` | `BootstrapResult` |
//! | before | the options, or nothing | the address as text, or as JSON with version and protocol |
//!
//! The newer one is tried first. A program that fails over it is asked again in the older one, and remembered.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult, Extension, LogLevel};
use log::LevelFilter;
use protobuf::well_known_types::any::Any;
use protobuf::{EnumOrUnknown, Message, MessageField};
use tokio::process::Command;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::bundle::{Address, Bundle};
use crate::child::{self, Limits};
use crate::error::{Error, Result};
use crate::name::Namespace;
use crate::settings::Settings;

/// Finds the program of a runtime: an absolute path as it is, `io.containerd.NAME.vN` as `containerd-shim-NAME-vN` in PATH or
/// beside this program.
pub(crate) fn find(runtime: &str) -> Result<PathBuf> {
    if runtime.starts_with('/') {
        let path = PathBuf::from(runtime);
        return if path.is_file() { Ok(path) } else { Err(Error::Precondition(format!("runtime {runtime:?} is not installed"))) };
    }
    let name = binary_name(runtime).ok_or_else(|| {
        Error::Invalid(format!("runtime name {runtime:?}: it should be like io.containerd.runc.v2, or the absolute path of a shim"))
    })?;
    let path = std::env::var_os("PATH").unwrap_or_default();
    let beside = std::env::current_exe().ok().and_then(|own| own.parent().map(Path::to_owned));
    let found = std::env::split_paths(&path).chain(beside).map(|folder| folder.join(&name)).find(|file| is_executable(file));
    found.ok_or_else(|| Error::Precondition(format!("runtime {runtime:?} is not installed: no {name} in PATH or beside x-manager")))
}

fn binary_name(runtime: &str) -> Option<String> {
    let mut parts = runtime.rsplit('.');
    let (version, name) = (parts.next()?, parts.next()?);
    let is_plain = |part: &str| !part.is_empty() && part.chars().all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    (is_plain(version) && is_plain(name) && parts.all(is_plain)).then(|| format!("containerd-shim-{name}-{version}"))
}

fn is_executable(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|about| about.is_file() && about.mode() & 0o111 != 0)
}

/// How a dead shim's container ended, as far as `delete` knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ended {
    pub(crate) pid: u32,
    pub(crate) status: u32,
    /// Nanoseconds since 1970; none when it is not reported.
    pub(crate) at: Option<i64>,
}

/// What to run programs with.
#[derive(Debug)]
pub(crate) struct Programs {
    settings: Settings,
    /// This program, for shims that publish events by running it.
    own: PathBuf,
    /// Programs that do not understand the newer dialect: path, inode, change time.
    older: Mutex<HashMap<PathBuf, (u64, i64)>>,
    /// One for each `delete` that may run at the same time.
    deletions: Semaphore,
}

impl Programs {
    pub(crate) fn new(settings: &Settings) -> Self {
        let own = std::env::current_exe().unwrap_or_else(|_| PathBuf::from("x-manager"));
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        Self { settings: settings.clone(), own, older: Mutex::default(), deletions: Semaphore::new(2 * processors) }
    }

    /// Starts a shim for a bundle, or finds the one that shall have it.
    pub(crate) async fn start(
        &self,
        program: &Path,
        bundle: &Bundle,
        namespace: &Namespace,
        id: &str,
        options: Option<&Any>,
    ) -> Result<Address> {
        let identity = std::fs::metadata(program).map(|about| (about.ino(), about.ctime())).unwrap_or_default();
        let is_older = self.older.lock().unwrap_or_else(PoisonError::into_inner).get(program) == Some(&identity);
        let options_alone = || options.map(|options| options.write_to_bytes().unwrap_or_default()).unwrap_or_default();
        let start = async |input: Vec<u8>| {
            let output = self.run(program, bundle, namespace, id, &["start"], input, START).await?;
            answer(program, &output)
        };
        if is_older {
            return start(options_alone()).await;
        }
        match start(self.parameters(namespace, id, options)).await {
            Ok(address) => Ok(address),
            Err(newer @ (Error::ProgramFailed { .. } | Error::ProgramAnswer { .. })) => {
                // a program that does not know the dialect takes the parameters for broken options
                let address = start(options_alone()).await.map_err(|older| if options.is_some() { older } else { newer })?;
                self.older.lock().unwrap_or_else(PoisonError::into_inner).insert(program.to_owned(), identity);
                Ok(address)
            }
            // a timeout, or a program that cannot be run, does not depend on the dialect
            Err(other) => Err(other),
        }
    }

    fn parameters(&self, namespace: &Namespace, id: &str, options: Option<&Any>) -> Vec<u8> {
        let extensions =
            options.map(|options| Extension { value: MessageField::some(options.clone()), ..Extension::default() }).into_iter().collect();
        let level = match self.settings.log_level {
            LevelFilter::Trace => LogLevel::LOG_LEVEL_TRACE,
            LevelFilter::Debug => LogLevel::LOG_LEVEL_DEBUG,
            _ => LogLevel::LOG_LEVEL_INFO,
        };
        let parameters = BootstrapParams {
            instance_id: id.to_owned(),
            namespace: namespace.to_string(),
            log_level: EnumOrUnknown::new(level),
            containerd_version: env!("CARGO_PKG_VERSION").to_owned(),
            containerd_ttrpc_address: self.settings.ttrpc_address().to_string_lossy().into_owned(),
            containerd_grpc_address: self.settings.address.to_string_lossy().into_owned(),
            containerd_binary: self.own.to_string_lossy().into_owned(),
            extensions,
            ..BootstrapParams::default()
        };
        parameters.write_to_bytes().unwrap_or_default()
    }

    /// Waits for a turn to run [`Programs::delete`]. A few at a time: of a thousand at once, each would take longer than it may.
    pub(crate) async fn turn(&self) -> Option<SemaphorePermit<'_>> {
        // the semaphore is never closed
        self.deletions.acquire().await.ok()
    }

    /// Cleans up after a dead shim.
    pub(crate) async fn delete(&self, program: &Path, bundle: &Bundle, namespace: &Namespace, id: &str) -> Result<Ended> {
        let path = bundle.path().to_string_lossy();
        let output = self.run(program, bundle, namespace, id, &["-bundle", &path, "delete"], Vec::new(), DELETE).await?;
        let answer = DeleteResponse::parse_from_bytes(&output.stdout).map_err(|error| Error::ProgramAnswer {
            program: program.to_owned(),
            action: "delete",
            why: error.to_string(),
        })?;
        let at = answer.exited_at.as_ref().map(|at| at.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(at.nanos)));
        Ok(Ended { pid: answer.pid, status: answer.exit_status, at })
    }

    /// What a runtime reports about itself: a `RuntimeInfo`.
    pub(crate) async fn info(&self, program: &Path, options: Option<&Any>) -> Result<Vec<u8>> {
        let mut command = Command::new(program);
        command.arg("-info");
        let input = options.map(|options| options.write_to_bytes().unwrap_or_default()).unwrap_or_default();
        finish(program, command, input, INFO).await.map(|output| output.stdout)
    }

    #[expect(clippy::too_many_arguments, reason = "they are the arguments of the program")]
    async fn run(
        &self,
        program: &Path,
        bundle: &Bundle,
        namespace: &Namespace,
        id: &str,
        arguments: &[&str],
        input: Vec<u8>,
        limit: Duration,
    ) -> Result<Output> {
        let mut command = Command::new(program);
        command.current_dir(bundle.path()).args(["-namespace", namespace.as_str(), "-address"]).arg(&self.settings.address);
        command.arg("-publish-binary").arg(&self.own).args(["-id", id]);
        if self.settings.log_level >= LevelFilter::Debug {
            command.arg("-debug");
        }
        command.args(arguments);
        command.env("TTRPC_ADDRESS", self.settings.ttrpc_address()).env("GRPC_ADDRESS", &self.settings.address);
        command.env("NAMESPACE", namespace.as_str()).env("MAX_SHIM_VERSION", "2").env("GOMAXPROCS", "2");
        finish(program, command, input, limit).await
    }
}

/// Runs a program, and takes what it printed.
async fn finish(program: &Path, command: Command, input: Vec<u8>, limit: Duration) -> Result<Output> {
    let output = child::run(program, command, input, Limits { time: limit, bytes: SAID_BYTES }).await?;
    if output.status.success() {
        return Ok(output);
    }
    let message: String =
        String::from_utf8_lossy(if output.stderr.is_empty() { &output.stdout } else { &output.stderr }).chars().take(2000).collect();
    Err(Error::ProgramFailed { program: program.to_owned(), status: output.status, output: message.trim().to_owned() })
}

/// Reads the answer to `start`, in any dialect.
fn answer(program: &Path, output: &Output) -> Result<Address> {
    let bytes = output.stdout.trim_ascii();
    let unreadable = || {
        let shown: String = String::from_utf8_lossy(bytes).chars().take(200).collect();
        Error::ProgramAnswer { program: program.to_owned(), action: "start", why: format!("{shown:?}") }
    };
    if bytes.first() == Some(&b'{') {
        return serde_json::from_slice(bytes).map_err(|_| unreadable());
    }
    let text = std::str::from_utf8(bytes).ok().filter(|text| text.starts_with("unix://") || text.starts_with('/'));
    if let Some(text) = text {
        return Ok(Address { version: 2, address: text.to_owned(), protocol: "ttrpc".to_owned() });
    }
    let result = BootstrapResult::parse_from_bytes(&output.stdout).map_err(|_| unreadable())?;
    if result.address.is_empty() {
        return Err(unreadable());
    }
    Ok(Address { version: result.version, address: result.address, protocol: result.protocol })
}

/// Of each stream of a program; answers are far shorter.
const SAID_BYTES: u64 = 1 << 20;
/// A `start` takes no longer.
const START: Duration = Duration::from_secs(30);
/// A `delete` takes no longer: shims promise four seconds, and containerd allows five on a machine that is not as busy.
const DELETE: Duration = Duration::from_secs(10);
/// An `-info` takes no longer.
const INFO: Duration = Duration::from_secs(10);

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::ExitStatus;

    use super::*;

    fn read(stdout: &[u8]) -> Result<Address> {
        answer(Path::new("/shim"), &Output { status: ExitStatus::from_raw(0), stdout: stdout.to_vec(), stderr: Vec::new() })
    }

    #[test]
    fn an_answer_is_read_in_every_dialect() {
        let text = read(b"unix:///run/containerd/s/abc\n").expect("text");
        assert_eq!(text, Address { version: 2, address: "unix:///run/containerd/s/abc".into(), protocol: "ttrpc".into() });
        let json = read(br#"{"version":3,"address":"unix:///s","protocol":"ttrpc"}"#).expect("JSON");
        assert_eq!(json, Address { version: 3, address: "unix:///s".into(), protocol: "ttrpc".into() });
        let result = BootstrapResult { version: 2, address: "unix:///s".into(), protocol: "ttrpc".into(), ..BootstrapResult::default() };
        let result = read(&result.write_to_bytes().expect("bytes")).expect("protobuf");
        assert_eq!(result, Address { version: 2, address: "unix:///s".into(), protocol: "ttrpc".into() });
        for garbage in [&b""[..], b"{", b"hello", &[0xff; 20]] {
            assert!(read(garbage).is_err(), "{garbage:?}");
        }
    }

    #[test]
    fn a_runtime_is_named_by_type_or_path() {
        assert_eq!(binary_name("io.containerd.runc.v2").as_deref(), Some("containerd-shim-runc-v2"));
        assert_eq!(binary_name("a.b").as_deref(), Some("containerd-shim-a-b"));
        for bad in ["", "runc", "io..v2", "io.containerd.../../x.v2", "io.containerd.a/b.v2", ".v2"] {
            assert_eq!(binary_name(bad), None, "{bad}");
        }
        assert_eq!(find("/nonexistent/shim").expect_err("not there").code(), tonic::Code::FailedPrecondition);
    }
}
