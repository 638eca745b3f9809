//! The options of Create and Checkpoint.
//!
//! Owns the translation from containerd's messages to plain values, and back for the details of a process in Pids.
//!
//! **Invariant:** unknown options are refused, never ignored: a container must not run with other settings
//! than it was given. Unknown keys in a TOML text are the exception, since other versions may know them; they are named.
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use containerd_shim_protos::shim::oci;
use protobuf::Message;
use protobuf::well_known_types::any::Any;
use serde::{Deserialize, Serialize};
use x_proto::{linux_runc, runtime_options};

/// The options of a container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RuntimeOptions {
    /// The OCI runtime: a name to look up in PATH, or an absolute path.
    pub(crate) binary_name: Option<String>,
    /// Where the OCI runtime keeps its state, without the namespace.
    pub(crate) root: Option<PathBuf>,
    /// systemd creates the cgroups.
    pub(crate) systemd_cgroup: bool,
    pub(crate) no_pivot_root: bool,
    pub(crate) no_new_keyring: bool,
    /// The cgroup of the shim itself.
    pub(crate) shim_cgroup: Option<String>,
    /// Owner of the pipes of stdin, stdout and stderr.
    pub(crate) io_uid: u32,
    pub(crate) io_gid: u32,
    /// A criu binary; its folder goes to the front of PATH. Sent by containerd before 2.0.
    pub(crate) criu_path: Option<PathBuf>,
    /// Where Checkpoint writes its image if the request names no path.
    pub(crate) criu_image_path: Option<PathBuf>,
    /// Where criu writes its own files; kept after success.
    pub(crate) criu_work_path: Option<PathBuf>,
    /// How criu restores the container, if it does.
    pub(crate) restore: CriuOptions,
    /// Bytes of output to keep in a file while no client reads. This shim's own: key `SpillBytes` of a TOML text.
    pub(crate) spill_bytes: u64,
    /// The only programs that `binary://` may name; none listed: see `stdio_uri`. This shim's own: key `Loggers`.
    pub(crate) loggers: Vec<PathBuf>,
    /// Keys of a TOML text that this version does not know. Logged as a warning.
    #[serde(skip)]
    pub(crate) unknown_keys: Vec<String>,
}

/// Why options are refused. The client must correct each of them.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OptionsError {
    #[error("options of unknown type {type_url:?}: expected {expected}")]
    Type { type_url: String, expected: &'static str },
    #[error("decode options of type {type_url}")]
    Message { type_url: String, source: protobuf::Error },
    #[error("read options from {}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("options in {origin}, line {line}: {why}")]
    Toml { origin: String, line: usize, why: String },
    #[error("option {key} in {origin}: expected {expected}, found {found}")]
    Value { key: String, origin: String, expected: &'static str, found: String },
    #[error("option {key}: path {value:?} is not absolute")]
    Relative { key: &'static str, value: PathBuf },
    #[error("option {key} contains a NUL byte")]
    Nul { key: &'static str },
}

impl RuntimeOptions {
    /// Reads the options of a Create request, or those that come with `start` and `-info`.
    ///
    /// Accepted are: nothing; `containerd.runc.v1.Options`; `runtimeoptions.v1.Options`, which CRI sends to every runtime type that
    /// is not runc's, with the table `[….runtimes.NAME.options]` of containerd's configuration as TOML in its body (since 1.7) or the
    /// path of a file (a table with the same keys); and `containerd.linux.runc.CreateOptions`, in which containerd's Go client up to 1.7
    /// sends the settings of a single task to such a runtime. Blocks on that file.
    pub(crate) fn blocking_read(any: Option<&Any>) -> Result<Self, OptionsError> {
        let Some(any) = any else { return Ok(Self::default()) };
        match bare_type(&any.type_url) {
            "" if any.value.is_empty() => Ok(Self::default()),
            RUNC_OPTIONS => Self::from_runc(&any.value),
            linux_runc::CREATE_OPTIONS => Self::from_linux_runc(&any.value),
            runtime_options::TYPE_URL | OLD_GENERIC_OPTIONS => Self::blocking_from_generic(&any.value),
            _ => Err(OptionsError::Type {
                type_url: any.type_url.clone(),
                expected: "containerd.runc.v1.Options or runtimeoptions.v1.Options",
            }),
        }
    }

    fn from_runc(bytes: &[u8]) -> Result<Self, OptionsError> {
        let message = parse::<oci::Options>(bytes, RUNC_OPTIONS)?;
        // Field 8 is CriuPath, which containerd 2.0 removed from the definition.
        let criu_path = message.special_fields.unknown_fields().get(8).and_then(|value| match value {
            protobuf::UnknownValueRef::LengthDelimited(bytes) => String::from_utf8(bytes.to_vec()).ok(),
            _ => None,
        });
        Self {
            binary_name: some(message.binary_name),
            root: some(message.root).map(PathBuf::from),
            systemd_cgroup: message.systemd_cgroup,
            no_pivot_root: message.no_pivot_root,
            no_new_keyring: message.no_new_keyring,
            shim_cgroup: some(message.shim_cgroup),
            io_uid: message.io_uid,
            io_gid: message.io_gid,
            criu_path: criu_path.and_then(some).map(PathBuf::from),
            criu_image_path: some(message.criu_image_path).map(PathBuf::from),
            criu_work_path: some(message.criu_work_path).map(PathBuf::from),
            ..Self::default()
        }
        .check()
    }

    fn from_linux_runc(bytes: &[u8]) -> Result<Self, OptionsError> {
        let message = linux_runc::CreateOptions::parse_from_bytes(bytes)
            .map_err(|source| OptionsError::Message { type_url: linux_runc::CREATE_OPTIONS.to_owned(), source })?;
        Self {
            no_pivot_root: message.no_pivot_root,
            no_new_keyring: message.no_new_keyring,
            shim_cgroup: some(message.shim_cgroup),
            io_uid: message.io_uid,
            io_gid: message.io_gid,
            criu_image_path: some(message.criu_image_path).map(PathBuf::from),
            criu_work_path: some(message.criu_work_path).map(PathBuf::from),
            restore: CriuOptions {
                open_tcp: message.open_tcp,
                external_unix_sockets: message.external_unix_sockets,
                terminal: message.terminal,
                file_locks: message.file_locks,
                empty_namespaces: message.empty_namespaces,
                cgroups_mode: some(message.cgroups_mode),
            },
            ..Self::default()
        }
        .check()
    }

    fn blocking_from_generic(bytes: &[u8]) -> Result<Self, OptionsError> {
        let message = runtime_options::Options::parse_from_bytes(bytes)
            .map_err(|source| OptionsError::Message { type_url: runtime_options::TYPE_URL.to_owned(), source })?;
        if !message.config_body.is_empty() {
            return Self::from_toml(&message.config_body, "the body of runtimeoptions.v1.Options");
        }
        if message.config_path.is_empty() {
            return Ok(Self::default());
        }
        let path = PathBuf::from(message.config_path);
        if !path.is_absolute() {
            return Err(OptionsError::Relative { key: "ConfigPath", value: path });
        }
        let text = blocking_read_bounded(&path).map_err(|source| OptionsError::File { path: path.clone(), source })?;
        Self::from_toml(&text, &path.display().to_string())
    }

    fn from_toml(text: &[u8], origin: &str) -> Result<Self, OptionsError> {
        let table: toml::Table = toml::from_slice(text).map_err(|error| {
            // The parser's message takes several lines and quotes the text, which may be anything.
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
            OptionsError::Toml { origin: origin.to_owned(), line, why: error.message().replace('\n', ", ") }
        })?;
        let mut options = Self::default();
        for (key, value) in table {
            let entry = Entry { key: &key, value: &value, origin };
            // As Go's decoders do it: BinaryName, binaryName, binary_name.
            let name: String = key.chars().filter(|c| *c != '_').map(|c| c.to_ascii_lowercase()).collect();
            match name.as_str() {
                "binaryname" => options.binary_name = entry.text()?,
                "root" => options.root = entry.text()?.map(PathBuf::from),
                "systemdcgroup" => options.systemd_cgroup = entry.truth()?,
                "nopivotroot" => options.no_pivot_root = entry.truth()?,
                "nonewkeyring" => options.no_new_keyring = entry.truth()?,
                "shimcgroup" => options.shim_cgroup = entry.text()?,
                "iouid" => options.io_uid = entry.number("a user id")?,
                "iogid" => options.io_gid = entry.number("a group id")?,
                "criupath" => options.criu_path = entry.text()?.map(PathBuf::from),
                "criuimagepath" => options.criu_image_path = entry.text()?.map(PathBuf::from),
                "criuworkpath" => options.criu_work_path = entry.text()?.map(PathBuf::from),
                "spillbytes" => options.spill_bytes = entry.number("a number of bytes")?,
                "loggers" => options.loggers = entry.paths()?,
                // An option of containerd, passed on with the rest of the table.
                "typeurl" | "configpath" | "configbody" | "taskapiaddress" | "taskapiversion" => {}
                _ => options.unknown_keys.push(key),
            }
        }
        options.check()
    }

    /// Refuses paths that no system call takes, or that depend on a working directory.
    fn check(self) -> Result<Self, OptionsError> {
        for (key, path) in [
            ("Root", &self.root),
            ("CriuPath", &self.criu_path),
            ("CriuImagePath", &self.criu_image_path),
            ("CriuWorkPath", &self.criu_work_path),
        ] {
            if let Some(path) = path {
                absolute(key, path)?;
            }
        }
        self.loggers.iter().try_for_each(|path| absolute("Loggers", path))?;
        for (key, text) in [("BinaryName", &self.binary_name), ("ShimCgroup", &self.shim_cgroup)] {
            if text.as_ref().is_some_and(|text| text.contains('\0')) {
                return Err(OptionsError::Nul { key });
            }
        }
        Ok(self)
    }
}

/// Permissions for criu.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct CriuOptions {
    pub(crate) open_tcp: bool,
    pub(crate) external_unix_sockets: bool,
    pub(crate) terminal: bool,
    pub(crate) file_locks: bool,
    /// Namespaces to create empty instead of restoring them.
    pub(crate) empty_namespaces: Vec<String>,
    /// `soft`, `full` or `strict`; the engine's own choice if absent.
    pub(crate) cgroups_mode: Option<String>,
}

/// The options of a Checkpoint request.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct CheckpointOptions {
    /// The container exits after it.
    pub(crate) exit: bool,
    pub(crate) criu: CriuOptions,
    /// Takes precedence over the path of the request.
    pub(crate) image_path: Option<PathBuf>,
    pub(crate) work_path: Option<PathBuf>,
}

impl CheckpointOptions {
    /// Reads the options of a Checkpoint request: nothing, `containerd.runc.v1.CheckpointOptions`, or the older
    /// `containerd.linux.runc.CheckpointOptions`, as [`RuntimeOptions::blocking_read`] does.
    pub(crate) fn read(any: Option<&Any>) -> Result<Self, OptionsError> {
        let Some(any) = any else { return Ok(Self::default()) };
        match bare_type(&any.type_url) {
            "" if any.value.is_empty() => return Ok(Self::default()),
            CHECKPOINT_OPTIONS | linux_runc::CHECKPOINT_OPTIONS => {}
            _ => return Err(OptionsError::Type { type_url: any.type_url.clone(), expected: CHECKPOINT_OPTIONS }),
        }
        let mut message = parse::<oci::CheckpointOptions>(&any.value, &any.type_url)?;
        if bare_type(&any.type_url) == linux_runc::CHECKPOINT_OPTIONS {
            std::mem::swap(&mut message.image_path, &mut message.work_path);
        }
        let options = Self {
            exit: message.exit,
            criu: CriuOptions {
                open_tcp: message.open_tcp,
                external_unix_sockets: message.external_unix_sockets,
                terminal: message.terminal,
                file_locks: message.file_locks,
                empty_namespaces: message.empty_namespaces,
                cgroups_mode: some(message.cgroups_mode),
            },
            image_path: some(message.image_path).map(PathBuf::from),
            work_path: some(message.work_path).map(PathBuf::from),
        };
        for (key, path) in [("ImagePath", &options.image_path), ("WorkPath", &options.work_path)] {
            if let Some(path) = path {
                absolute(key, path)?;
            }
        }
        Ok(options)
    }
}

/// The details of an exec in the answer to Pids.
pub(crate) fn process_details(exec_id: &str) -> Any {
    let details = oci::ProcessDetails { exec_id: exec_id.to_owned(), ..Default::default() };
    let value = details.write_to_bytes().expect("a message without required fields is always complete");
    Any { type_url: PROCESS_DETAILS.to_owned(), value, ..Default::default() }
}

/// A key of a TOML table, and its field.
struct Entry<'a> {
    key: &'a str,
    value: &'a toml::Value,
    origin: &'a str,
}

impl Entry<'_> {
    fn wrong(&self, expected: &'static str) -> OptionsError {
        OptionsError::Value {
            key: self.key.to_owned(),
            origin: self.origin.to_owned(),
            expected,
            found: match self.value {
                toml::Value::Integer(number) => number.to_string(),
                other => other.type_str().to_owned(),
            },
        }
    }

    fn text(&self) -> Result<Option<String>, OptionsError> {
        self.value.as_str().map(|text| some(text.to_owned())).ok_or_else(|| self.wrong("a string"))
    }

    fn truth(&self) -> Result<bool, OptionsError> {
        self.value.as_bool().ok_or_else(|| self.wrong("true or false"))
    }

    fn number<T: TryFrom<i64>>(&self, expected: &'static str) -> Result<T, OptionsError> {
        self.value.as_integer().and_then(|number| T::try_from(number).ok()).ok_or_else(|| self.wrong(expected))
    }

    fn paths(&self) -> Result<Vec<PathBuf>, OptionsError> {
        let list = self.value.as_array().ok_or_else(|| self.wrong("a list of paths"))?;
        list.iter().map(|item| item.as_str().map(PathBuf::from).ok_or_else(|| self.wrong("a list of paths"))).collect()
    }
}

/// The name of a message's type: containerd's clients write it without a prefix, others with a host in front.
fn bare_type(type_url: &str) -> &str {
    type_url.rsplit_once('/').map_or(type_url, |(host, name)| if host == "type.googleapis.com" { name } else { type_url })
}

fn parse<M: Message>(bytes: &[u8], type_url: &str) -> Result<M, OptionsError> {
    M::parse_from_bytes(bytes).map_err(|source| OptionsError::Message { type_url: type_url.to_owned(), source })
}

fn some(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn absolute(key: &'static str, path: &Path) -> Result<(), OptionsError> {
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(OptionsError::Nul { key });
    }
    if !path.is_absolute() {
        return Err(OptionsError::Relative { key, value: path.to_owned() });
    }
    Ok(())
}

fn blocking_read_bounded(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    File::open(path)?.take(MAX_FILE_BYTES + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX_FILE_BYTES {
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, "too long for a file of options"));
    }
    Ok(text)
}

const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";
const CHECKPOINT_OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";
const PROCESS_DETAILS: &str = "containerd.runc.v1.ProcessDetails";
/// The name of `runtimeoptions.v1.Options` while CRI was a project of its own.
const OLD_GENERIC_OPTIONS: &str = "cri.runtimeoptions.v1.Options";
const MAX_FILE_BYTES: u64 = 256 << 10;

#[cfg(test)]
mod tests;
