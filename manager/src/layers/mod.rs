//! Layers: tar archives, compressed or not, that become folders, and folders that become such archives. Everything here blocks.
//!
//! ```text
//! blob ─▶ decode ─▶ ring ─▶ hash, tar ─▶ apply ─▶ an overlay's upper folder, or a merged tree
//! two trees, or an overlay's upper folder ─▶ create ─▶ tar, hash ─▶ compression ─▶ blob
//! ```
//! **Invariants:** nothing outside the folder is touched, whatever a layer says: every path is resolved by the kernel within the folder
//! (`openat2` with `RESOLVE_IN_ROOT`) or step by step without following links. Memory is bounded: a layer is never held as a whole. Blobs,
//! snapshots and messages are unknown here.

mod apply;
mod copy;
mod create;
pub(crate) mod decode;
mod lower;
mod measure;
mod rebase;
mod ring;
pub(crate) mod tar;
#[cfg(test)]
pub(crate) mod testing;
mod tree;

use std::io;
use std::os::fd::AsFd as _;
use std::path::Path;

use rustix::io::Errno;

pub(crate) use apply::{Applied, Target, apply};
pub(crate) use copy::copy_tree;
pub(crate) use create::{Change, Created, Source, Times, create};
pub(crate) use decode::Compression;
pub(crate) use lower::Lowers;
pub(crate) use measure::{Beneath, measure};
pub(crate) use rebase::rebase;
pub(crate) use ring::Cancel;
pub(crate) use tar::TarError;

/// Bounds on what a layer may ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LayerLimits {
    /// Bytes of the uncompressed archive.
    pub(crate) layer_bytes: u64,
    /// Entries of it.
    pub(crate) entries: u64,
}

impl Default for LayerLimits {
    fn default() -> Self {
        Self { layer_bytes: 256 << 30, entries: 10_000_000 }
    }
}

/// Why a layer cannot be applied or created.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LayerError {
    /// It is no archive, or one that cannot be read.
    #[error("layer")]
    Tar(#[from] TarError),
    /// An entry asks for something that is not done.
    #[error("layer entry {name:?}: {why}")]
    Refused {
        /// Of the entry.
        name: String,
        /// What it asks for.
        why: String,
    },
    /// A file cannot be made or read.
    #[error("{op} {name:?} of the layer")]
    File {
        /// What was tried.
        op: &'static str,
        /// Its name in the layer.
        name: String,
        /// The kernel's error.
        source: io::Error,
    },
    /// Another call applies a layer to the same folder.
    #[error("another layer is being applied to the same snapshot; retry")]
    Busy,
}

impl LayerError {
    /// The kernel's error below it.
    pub(crate) fn io(&self) -> Option<&io::Error> {
        match self {
            Self::File { source, .. } | Self::Tar(TarError::Read(source)) => Some(source),
            Self::Tar(_) | Self::Refused { .. } | Self::Busy => None,
        }
    }
}

/// Removes a folder with everything in it, until it is to stop. That there is none is fine.
///
/// Errors: EXDEV if something is mounted in it; that is not touched. ECANCELED when it stops.
pub(crate) fn remove_tree(folder: &Path, stops: &dyn Fn() -> bool) -> io::Result<()> {
    let (Some(above), Some(name)) = (folder.parent(), folder.file_name()) else { return Err(io::ErrorKind::InvalidInput.into()) };
    let above = match tree::open_root(above) {
        Err(Errno::NOENT) => return Ok(()),
        above => above?,
    };
    Ok(tree::remove_unless(above.as_fd(), name.as_encoded_bytes(), stops)?)
}

type Result<T> = std::result::Result<T, LayerError>;

/// Names the operation and the file of a failed system call.
trait OnFile<T> {
    fn file(self, op: &'static str, name: &[u8]) -> Result<T>;
}

impl<T> OnFile<T> for rustix::io::Result<T> {
    fn file(self, op: &'static str, name: &[u8]) -> Result<T> {
        self.map_err(io::Error::from).file(op, name)
    }
}

impl<T> OnFile<T> for io::Result<T> {
    fn file(self, op: &'static str, name: &[u8]) -> Result<T> {
        self.map_err(|source| LayerError::File { op, name: tar::shown(name), source })
    }
}
