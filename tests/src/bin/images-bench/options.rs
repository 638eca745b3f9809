//! Which images a benchmark measures with, and where.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;
use nix::mount::{MsFlags, mount};
use shim_tests::isolation;

/// Images, rounds and the folder.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct Images {
    /// MiB of files in an image
    #[arg(long, default_value_t = 512)]
    pub(crate) mib: usize,
    /// Layers of an image
    #[arg(long, default_value_t = 10)]
    pub(crate) layers: usize,
    /// Rounds, in each of which every daemon is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) rounds: u32,
    /// A folder on a disk, for the images and the files of the daemons
    #[arg(long, default_value = "/var/tmp")]
    pub(crate) folder: PathBuf,
    /// The run of one daemon, with the images of this folder
    #[arg(long, hide = true)]
    pub(crate) one: Option<PathBuf>,
}

impl Images {
    /// Measures with a folder of its own, which is removed then.
    pub(crate) fn with_folder<T>(&self, program: &str, measure: impl FnOnce(&Path) -> Result<T>) -> Result<T> {
        let folder = self.folder.join(format!("x-{program}-{}", std::process::id()));
        fs::create_dir(&folder)?;
        let measured = measure(&folder);
        fs::remove_dir_all(&folder)?;
        measured
    }
}

/// Measures one daemon, whose files are on the disk of the folder. In this run's own mount namespace.
pub(crate) async fn on_disk<T>(folder: &Path, measuring: impl Future<Output = Result<T>>) -> Result<T> {
    let disk = folder.join("daemon");
    fs::create_dir_all(&disk)?;
    mount(Some(&disk), isolation::RUN, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    let measured = measuring.await;
    // the daemon has ended; what cannot be removed goes with the whole folder
    let _ = fs::remove_dir_all(isolation::RUN);
    measured
}
