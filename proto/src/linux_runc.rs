//! `containerd.linux.runc`: what containerd's Go client up to 1.7 sends to a runtime whose name does not begin with `io.containerd.runc`.
use protobuf::rt::WireType;
use protobuf::{CodedInputStream, Error};

/// Type URL of [`CreateOptions`].
pub const CREATE_OPTIONS: &str = "containerd.linux.runc.CreateOptions";

/// Type URL of the options of a checkpoint. Its fields are those of `containerd.runc.v1.CheckpointOptions`, but for the last two, which
/// have changed places: `work_path` = 8, `image_path` = 9.
pub const CHECKPOINT_OPTIONS: &str = "containerd.linux.runc.CheckpointOptions";

/// The options of a container and of its restore.
///
/// Source: containerd 1.x, `runtime/linux/runctypes`; the fields have the numbers 1 to 13 in this order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct CreateOptions {
    /// Do not use pivot_root.
    pub no_pivot_root: bool,
    /// Of a restore, as the next five: TCP connections are restored.
    pub open_tcp: bool,
    /// Unix sockets whose other end is outside are restored.
    pub external_unix_sockets: bool,
    /// A terminal is restored.
    pub terminal: bool,
    /// File locks are restored.
    pub file_locks: bool,
    /// Namespaces that are made anew.
    pub empty_namespaces: Vec<String>,
    /// `soft`, `full` or `strict`.
    pub cgroups_mode: String,
    /// Give the container the caller's session keyring.
    pub no_new_keyring: bool,
    /// The cgroup of the shim.
    pub shim_cgroup: String,
    /// Owner of the pipes of stdio.
    pub io_uid: u32,
    /// Group of the pipes of stdio.
    pub io_gid: u32,
    /// Where criu writes its own files.
    pub criu_work_path: String,
    /// Where a checkpoint is written.
    pub criu_image_path: String,
}

impl CreateOptions {
    /// Decodes the message; unknown fields are skipped.
    pub fn parse_from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let mut input = CodedInputStream::from_bytes(bytes);
        let mut options = Self::default();
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag {
                0x08 => options.no_pivot_root = input.read_bool()?,
                0x10 => options.open_tcp = input.read_bool()?,
                0x18 => options.external_unix_sockets = input.read_bool()?,
                0x20 => options.terminal = input.read_bool()?,
                0x28 => options.file_locks = input.read_bool()?,
                0x32 => options.empty_namespaces.push(input.read_string()?),
                0x3a => options.cgroups_mode = input.read_string()?,
                0x40 => options.no_new_keyring = input.read_bool()?,
                0x4a => options.shim_cgroup = input.read_string()?,
                0x50 => options.io_uid = input.read_uint32()?,
                0x58 => options.io_gid = input.read_uint32()?,
                0x62 => options.criu_work_path = input.read_string()?,
                0x6a => options.criu_image_path = input.read_string()?,
                other => skip(&mut input, other)?,
            }
        }
        Ok(options)
    }
}

/// Skips the field that begins with `tag`.
pub(crate) fn skip(input: &mut CodedInputStream<'_>, tag: u32) -> Result<(), Error> {
    let unknown = || Error::from(std::io::Error::new(std::io::ErrorKind::InvalidData, "unknown wire type"));
    input.skip_field(WireType::new(tag & 7).ok_or_else(unknown)?)
}
