//! A file of which the end cannot be read yet.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use anyhow::Result;
use nix::mount::{MntFlags, umount2};

use super::fuse::{Recorded, mounted, serve};

/// It stands over the file whose bytes it has.
#[derive(Debug)]
pub struct HeldFile {
    path: PathBuf,
    device: File,
    served: Arc<Recorded>,
}

impl HeldFile {
    /// A reader that opens the file from now on gets the bytes before `from`, and waits for the rest until they are released.
    pub fn over(path: &Path, from: u64) -> Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let served = Arc::new(Recorded { file, size, requests: Arc::default(), held: Arc::default() });
        served.held.lock().expect("no panic under this lock").from = Some(from);
        let device = mounted(path)?;
        let (own, recorded) = (device.try_clone()?, Arc::clone(&served));
        // it ends with the mount
        thread::Builder::new().name("held-file".to_owned()).spawn(move || serve(device, &recorded))?;
        Ok(Self { path: path.to_owned(), device: own, served })
    }

    /// Whether a reader waits.
    pub fn is_waited_for(&self) -> bool {
        !self.served.held.lock().expect("no panic under this lock").reads.is_empty()
    }

    /// Everything can be read.
    pub fn release(&mut self) {
        self.served.release(&mut self.device);
    }
}

impl Drop for HeldFile {
    fn drop(&mut self) {
        self.release();
        let _it_goes_with_the_namespace = umount2(&self.path, MntFlags::MNT_DETACH);
    }
}
