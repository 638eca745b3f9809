//! URIs of stdio streams.
//!
//! Owns the parsing of the strings in Create and Exec for stdin, stdout and stderr, and the decision which programs may
//! be loggers.
//!
//! **Invariant:** an unknown URI is refused, never ignored: its output would be lost silently.
use std::fs::Metadata;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// The target of one stream.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum StdioUri {
    /// None: the empty string.
    #[default]
    None,
    /// A fifo of the client: a bare path, or `fifo://`.
    Fifo(PathBuf),
    /// A file that is appended to: `file://`.
    File(PathBuf),
    /// A program that reads the output: `binary://`, `binary-v2://`.
    Binary(Logger),
}

/// A program that reads a container's output: stdout on descriptor 3, stderr on 4, and on 5 a pipe to report readiness.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Logger {
    pub(crate) path: PathBuf,
    /// Each key of the query followed by its value, as the stock shim passes them.
    pub(crate) arguments: Vec<String>,
    /// Keys of the query that begin with `env.`, without it.
    pub(crate) environment: Vec<(String, String)>,
    /// `binary-v2`: readiness is a byte, and the end of the pipe without one is a failure. For `binary`, either is readiness.
    pub(crate) ready_by_byte: bool,
}

/// A URI that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum StdioError {
    #[error("{stream} {uri:?}: unknown scheme {scheme:?}; use a path, fifo://, file://, binary:// or binary-v2://")]
    Scheme { stream: &'static str, uri: String, scheme: String },
    #[error("{stream} {uri:?}: path is not absolute")]
    Relative { stream: &'static str, uri: String },
    #[error("{stream} {uri:?} contains a NUL byte")]
    Nul { stream: &'static str, uri: String },
    #[error("{stream} {uri:?}: invalid percent-encoding")]
    Encoding { stream: &'static str, uri: String },
    #[error("{stream} {uri:?}: {scheme}:// cannot be read from")]
    Unreadable { stream: &'static str, uri: String, scheme: &'static str },
    #[error("{stream} is longer than {MAX_URI_BYTES} bytes")]
    TooLong { stream: &'static str },
}

impl StdioUri {
    /// Parses the URI of stdout or stderr; `stream` names it in errors.
    pub(crate) fn parse(stream: &'static str, uri: &str) -> Result<Self, StdioError> {
        let owned = || uri.to_owned();
        if uri.is_empty() {
            return Ok(Self::None);
        }
        if uri.len() > MAX_URI_BYTES {
            return Err(StdioError::TooLong { stream });
        }
        if uri.contains('\0') {
            return Err(StdioError::Nul { stream, uri: owned() });
        }
        // A path is not decoded: `%` and `?` are characters in it.
        let Some((scheme, rest)) = split_scheme(uri) else { return Ok(Self::Fifo(absolute(stream, uri, uri.into())?)) };
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = decode(path, false).ok_or_else(|| StdioError::Encoding { stream, uri: owned() })?;
        if path.contains('\0') {
            return Err(StdioError::Nul { stream, uri: owned() });
        }
        match scheme.to_ascii_lowercase().as_str() {
            "fifo" => Ok(Self::Fifo(absolute(stream, uri, path)?)),
            "file" => Ok(Self::File(absolute(stream, uri, path)?)),
            scheme @ ("binary" | "binary-v2") => {
                let (arguments, environment) = read_query(stream, uri, query)?;
                let path = absolute(stream, uri, path)?;
                Ok(Self::Binary(Logger { path, arguments, environment, ready_by_byte: scheme == "binary-v2" }))
            }
            _ => Err(StdioError::Scheme { stream, uri: owned(), scheme: scheme.to_owned() }),
        }
    }

    /// Parses the URI of stdin: empty or a FIFO.
    pub(crate) fn parse_stdin(uri: &str) -> Result<Option<PathBuf>, StdioError> {
        let unreadable = |scheme| StdioError::Unreadable { stream: "stdin", uri: uri.to_owned(), scheme };
        match Self::parse("stdin", uri)? {
            Self::None => Ok(None),
            Self::Fifo(path) => Ok(Some(path)),
            Self::File(_) => Err(unreadable("file")),
            Self::Binary(_) => Err(unreadable("binary")),
        }
    }
}

/// A logger that must not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LoggerRefused {
    #[error("logger {} is not allowed; allowed are: {}", path.display(), allowed.join(", "))]
    NotListed { path: PathBuf, allowed: Vec<String> },
    #[error("logger {}", path.display())]
    Missing { path: PathBuf, source: io::Error },
    #[error("logger {} is not an executable file", path.display())]
    NotExecutable { path: PathBuf },
    #[error("logger {}: {} is writable by users other than root", path.display(), weak.display())]
    Changeable { path: PathBuf, weak: PathBuf },
}

impl Logger {
    /// Whether this program may be started, as root, on the host.
    ///
    /// `allowed` is the option Loggers; [`LOGGERS_VARIABLE`] adds to it. With neither, every executable file that only root (or
    /// the shim's user) can change is allowed. That keeps other users' programs out, but not a forged URI:
    /// where URIs come from images or from users, list the loggers.
    pub(crate) fn blocking_admit(&self, allowed: &[PathBuf]) -> Result<(), LoggerRefused> {
        let variable = std::env::var_os(LOGGERS_VARIABLE).unwrap_or_default();
        let extra = std::env::split_paths(&variable).filter(|path| path.is_absolute());
        let allowed: Vec<PathBuf> = allowed.iter().cloned().chain(extra).collect();
        self.blocking_admit_from(&allowed)
    }

    fn blocking_admit_from(&self, allowed: &[PathBuf]) -> Result<(), LoggerRefused> {
        let path = || self.path.clone();
        if !allowed.is_empty() && !allowed.contains(&self.path) {
            let allowed = allowed.iter().map(|path| path.display().to_string()).collect();
            return Err(LoggerRefused::NotListed { path: path(), allowed });
        }
        let real = self.path.canonicalize().map_err(|source| LoggerRefused::Missing { path: path(), source })?;
        let about = real.metadata().map_err(|source| LoggerRefused::Missing { path: path(), source })?;
        if !about.is_file() || about.permissions().mode() & 0o111 == 0 {
            return Err(LoggerRefused::NotExecutable { path: path() });
        }
        for step in real.ancestors() {
            let about = step.metadata().map_err(|source| LoggerRefused::Missing { path: path(), source })?;
            if is_changeable_by_others(&about) {
                return Err(LoggerRefused::Changeable { path: path(), weak: step.to_owned() });
            }
        }
        Ok(())
    }
}

fn is_changeable_by_others(about: &Metadata) -> bool {
    let others = if about.gid() == 0 { 0o002 } else { 0o022 };
    // In a sticky folder only root can replace root's files.
    let is_sticky_folder = about.is_dir() && about.mode() & 0o1000 != 0;
    let is_ours = about.uid() == 0 || about.uid() == nix::unistd::geteuid().as_raw();
    !is_ours || about.mode() & others != 0 && !is_sticky_folder
}

/// `scheme://rest`. Anything else is a path.
fn split_scheme(uri: &str) -> Option<(&str, &str)> {
    let (scheme, rest) = uri.split_once("://")?;
    let is_scheme = scheme.starts_with(|c: char| c.is_ascii_alphabetic())
        && scheme.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '+' | '-' | '.'));
    is_scheme.then_some((scheme, rest))
}

fn absolute(stream: &'static str, uri: &str, path: String) -> Result<PathBuf, StdioError> {
    let path = PathBuf::from(path);
    if path.is_absolute() { Ok(path) } else { Err(StdioError::Relative { stream, uri: uri.to_owned() }) }
}

type Query = (Vec<String>, Vec<(String, String)>);

/// The query of a logger, in its own order. Of a repeated key the first value counts, as in the stock shim.
fn read_query(stream: &'static str, uri: &str, query: &str) -> Result<Query, StdioError> {
    let encoding = || StdioError::Encoding { stream, uri: uri.to_owned() };
    let mut pairs: Vec<(String, String)> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (key, value) = (decode(key, true).ok_or_else(encoding)?, decode(value, true).ok_or_else(encoding)?);
        if key.contains('\0') || value.contains('\0') {
            return Err(StdioError::Nul { stream, uri: uri.to_owned() });
        }
        if pairs.iter().all(|(known, _)| *known != key) {
            pairs.push((key, value));
        }
    }
    let (mut arguments, mut environment) = (Vec::new(), Vec::new());
    for (key, value) in pairs {
        match key.strip_prefix("env.") {
            // Only the shim sets it.
            Some("CONTAINER_ID" | "CONTAINER_NAMESPACE" | "") => {}
            Some(name) => environment.push((name.to_owned(), value)),
            None => arguments.extend([key, value]),
        }
    }
    Ok((arguments, environment))
}

/// Decodes percent-encoding; in a query, `+` is a space.
fn decode(text: &str, is_query: bool) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let (high, low) = (char::from(bytes.next()?).to_digit(16)?, char::from(bytes.next()?).to_digit(16)?);
                u8::try_from(high << 4 | low).ok()?
            }
            b'+' if is_query => b' ',
            other => other,
        });
    }
    String::from_utf8(decoded).ok()
}

/// More allowed loggers, separated by `:`, from the environment of the daemon that starts the shim.
pub(crate) const LOGGERS_VARIABLE: &str = "X_SHIM_LOGGERS";

const MAX_URI_BYTES: usize = 8 << 10;

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn logger(path: &str, arguments: &[&str], environment: &[(&str, &str)], ready_by_byte: bool) -> StdioUri {
        StdioUri::Binary(Logger {
            path: path.into(),
            arguments: arguments.iter().map(|&a| a.to_owned()).collect(),
            environment: environment.iter().map(|&(k, v)| (k.to_owned(), v.to_owned())).collect(),
            ready_by_byte,
        })
    }

    #[test]
    fn every_known_form_is_read() {
        for (uri, expected) in [
            ("", StdioUri::None),
            ("/run/f%20o?x", StdioUri::Fifo("/run/f%20o?x".into())),
            ("fifo:///run/f%20o", StdioUri::Fifo("/run/f o".into())),
            ("FILE:///var/log/x.log?ignored=1", StdioUri::File("/var/log/x.log".into())),
            ("binary:///bin/l", logger("/bin/l", &[], &[], false)),
            ("binary-v2:///bin/l?a=b", logger("/bin/l", &["a", "b"], &[], true)),
            (
                "binary:///bin/l?_LOG=%2Fvar%2Flib+x&flag&z=&a=1&a=2&env.K=v%3D&env.CONTAINER_ID=no&&",
                logger("/bin/l", &["_LOG", "/var/lib x", "flag", "", "z", "", "a", "1"], &[("K", "v=")], false),
            ),
        ] {
            assert_eq!(StdioUri::parse("stdout", uri).as_ref(), Ok(&expected), "{uri}");
            let record = serde_json::to_string(&expected).expect("serialisable");
            assert_eq!(serde_json::from_str::<StdioUri>(&record).expect("readable"), expected);
        }
    }

    #[test]
    fn what_is_not_understood_is_refused_with_a_sentence() {
        for (uri, expected) in [
            (
                "tcp://1.2.3.4:5",
                "stdout \"tcp://1.2.3.4:5\": unknown scheme \"tcp\"; use a path, fifo://, file://, binary:// or binary-v2://",
            ),
            ("run/fifo", "stdout \"run/fifo\": path is not absolute"),
            ("://x", "stdout \"://x\": path is not absolute"),
            ("file://var/x", "stdout \"file://var/x\": path is not absolute"),
            ("binary://?a=b", "stdout \"binary://?a=b\": path is not absolute"),
            ("/a\0b", "stdout \"/a\\0b\" contains a NUL byte"),
            ("file:///a%00b", "stdout \"file:///a%00b\" contains a NUL byte"),
            ("binary:///a?b=%00", "stdout \"binary:///a?b=%00\" contains a NUL byte"),
            ("file:///a%zz", "stdout \"file:///a%zz\": invalid percent-encoding"),
            ("file:///a%2", "stdout \"file:///a%2\": invalid percent-encoding"),
            ("binary:///a?b=%ff", "stdout \"binary:///a?b=%ff\": invalid percent-encoding"),
        ] {
            assert_eq!(StdioUri::parse("stdout", uri).expect_err(uri).to_string(), expected);
        }
        assert_eq!(StdioUri::parse("stderr", &"/".repeat(9000)), Err(StdioError::TooLong { stream: "stderr" }));
    }

    #[test]
    fn stdin_is_a_fifo_or_nothing() {
        assert_eq!(StdioUri::parse_stdin(""), Ok(None));
        assert_eq!(StdioUri::parse_stdin("/f"), Ok(Some("/f".into())));
        assert_eq!(
            StdioUri::parse_stdin("file:///f").expect_err("not readable").to_string(),
            "stdin \"file:///f\": file:// cannot be read from"
        );
        assert!(StdioUri::parse_stdin("binary:///f").is_err());
    }

    #[test]
    fn a_logger_runs_only_if_listed_or_writable_by_root_alone() {
        use std::fs::{self, Permissions};
        let folder = scratch::Folder::new("logger");
        let path = folder.join("logger");
        let mode = |path: &Path, mode| fs::set_permissions(path, Permissions::from_mode(mode)).expect("a mode");
        let admit = |allowed: &[PathBuf]| {
            let StdioUri::Binary(logger) = logger(path.to_str().expect("text"), &[], &[], false) else { panic!("a logger") };
            logger.blocking_admit_from(allowed).map_err(|error| error.to_string())
        };
        let shown = path.display();
        assert_eq!(admit(&[]), Err(format!("logger {shown}")));
        fs::write(&path, "").expect("a file");
        mode(&folder, 0o755);
        mode(&path, 0o644);
        assert_eq!(admit(&[]), Err(format!("logger {shown} is not an executable file")));
        mode(&path, 0o755);
        assert_eq!(admit(&[]), Ok(()));
        assert_eq!(admit(&["/bin/cat".into()]), Err(format!("logger {shown} is not allowed; allowed are: /bin/cat")));
        assert_eq!(admit(std::slice::from_ref(&path)), Ok(()));
        mode(&path, 0o757);
        assert_eq!(admit(&[]), Err(format!("logger {shown}: {shown} is writable by users other than root")));
        mode(&path, 0o755);
        mode(&folder, 0o777);
        assert_eq!(admit(&[]), Err(format!("logger {shown}: {} is writable by users other than root", folder.display())));
    }
}
