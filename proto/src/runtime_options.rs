//! `runtimeoptions.v1.Options`: what CRI sends to a runtime that is not runc's.
use protobuf::{CodedInputStream, Error};

/// Type URL of [`Options`], as containerd writes it.
pub const TYPE_URL: &str = "runtimeoptions.v1.Options";

/// Options of a runtime that containerd knows nothing about.
///
/// Source: containerd, `api/types/runtimeoptions/v1`: `type_url` = 1, `config_path` = 2, `config_body` = 3.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    /// What the configuration is.
    pub type_url: String,
    /// A file that holds it, or empty.
    pub config_path: String,
    /// The configuration itself; wins over the path.
    pub config_body: Vec<u8>,
}

impl Options {
    /// Decodes the message; unknown fields are skipped.
    pub fn parse_from_bytes(bytes: &[u8]) -> Result<Self, Error> {
        let mut input = CodedInputStream::from_bytes(bytes);
        let mut options = Self::default();
        while let Some(tag) = input.read_raw_tag_or_eof()? {
            match tag {
                0x0a => options.type_url = input.read_string()?,
                0x12 => options.config_path = input.read_string()?,
                0x1a => options.config_body = input.read_bytes()?,
                other => crate::linux_runc::skip(&mut input, other)?,
            }
        }
        Ok(options)
    }
}
