//! Disks in files, with ext4: one that is recorded, and those that are made of its record.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MntFlags, umount2};

use super::Request;
use super::fuse::{Recorded, mounted, serve};
use crate::dice::Dice;
use crate::operator::printed;

/// A mounted ext4 in a file.
#[derive(Debug)]
pub struct Disk(PathBuf);

impl Disk {
    /// Mounts the file.
    pub fn mount(file: &Path, at: &Path) -> Result<Self> {
        fs::create_dir_all(at)?;
        printed(Command::new("mount").args(["-t", "ext4", "-o", "loop"]).arg(file).arg(at))?;
        Ok(Self(at.to_owned()))
    }

    /// Writes everything back, and unmounts it.
    pub fn unmount(self) -> Result<()> {
        umount2(&self.0, MntFlags::empty()).with_context(|| format!("unmount {}", self.0.display()))?;
        std::mem::forget(self);
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _it_goes_with_the_namespace = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

/// A mounted ext4 whose writes and flushes are recorded.
#[derive(Debug)]
pub struct Recorder {
    disk: Option<Disk>,
    file: PathBuf,
    serves: Option<JoinHandle<()>>,
    /// What the disk held before the first request.
    blank: Vec<u8>,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Recorder {
    /// Makes one of that size, with files in `folder`.
    pub fn mount(folder: &Path, bytes: u64, at: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let backing = folder.join("backing");
        File::create(&backing)?.set_len(bytes)?;
        // nothing is left for the kernel to initialise later
        let options = ["-q", "-F", "-b", "4096", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"];
        printed(Command::new("mkfs.ext4").args(options).arg(&backing))?;
        let blank = fs::read(&backing)?;
        let requests = Arc::<Mutex<Vec<Request>>>::default();
        let backing = OpenOptions::new().read(true).write(true).open(&backing)?;
        let recorded = Recorded { file: backing, size: bytes, requests: Arc::clone(&requests), held: Arc::default() };
        let file = folder.join("device");
        File::create(&file)?;
        let device = mounted(&file)?;
        let serves = thread::Builder::new().name("recorder".to_owned()).spawn(move || serve(device, &recorded))?;
        let mut recorder = Self { disk: None, file, serves: Some(serves), blank, requests };
        recorder.disk = Some(Disk::mount(&recorder.file, at)?);
        Ok(recorder)
    }

    /// How many requests there were until now.
    pub fn position(&self) -> usize {
        self.requests.lock().expect("no panic under this lock").len()
    }

    /// Ends the recording; the disks after it.
    pub fn end(mut self) -> Result<Cuts> {
        self.disk.take().context("it is mounted")?.unmount()?;
        let requests = std::mem::take(&mut *self.requests.lock().expect("no panic under this lock"));
        Ok(Cuts { durable: std::mem::take(&mut self.blank), requests, at: 0 })
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        drop(self.disk.take());
        // the kernel waits for no answer after that
        let _it_goes_with_the_namespace = umount2(&self.file, MntFlags::MNT_DETACH);
        if let Some(serves) = self.serves.take()
            && serves.is_finished()
        {
            let _a_panic_was_printed = serves.join();
        }
    }
}

/// What power cuts leave of a recorded disk, from the first moment to the last.
#[derive(Debug)]
pub struct Cuts {
    /// What is on the disk for good before the request `at`.
    durable: Vec<u8>,
    requests: Vec<Request>,
    at: usize,
}

impl Cuts {
    /// How many requests were recorded.
    pub fn len(&self) -> usize {
        self.requests.len()
    }

    /// Whether there were none.
    pub fn is_empty(&self) -> bool {
        self.requests.is_empty()
    }

    /// Bytes that were written, and how often the disk was flushed.
    pub fn volume(&self) -> (usize, usize) {
        self.requests.iter().fold((0, 0), |(bytes, flushes), request| match request {
            Request::Write(_, data) => (bytes + data.len(), flushes),
            Request::Flush => (bytes, flushes + 1),
        })
    }

    /// Writes the disk as it is when the power goes after `position` requests, which is not before that of the last cut. Of each page that was not
    /// flushed, `kept` in a hundred are there.
    pub fn cut(&mut self, position: usize, kept: u64, dice: &mut Dice, to: &Path) -> Result<()> {
        ensure!(position >= self.at && position <= self.requests.len(), "cuts are made in their order");
        let flushed = self.requests[..position].iter().rposition(|request| matches!(request, Request::Flush)).unwrap_or(0);
        for request in &self.requests[self.at..flushed.max(self.at)] {
            if let Request::Write(offset, data) = request {
                let offset = usize::try_from(*offset)?;
                self.durable[offset..offset + data.len()].copy_from_slice(data);
            }
        }
        self.at = flushed.max(self.at);
        let file = File::create(to)?;
        file.set_len(self.durable.len() as u64)?;
        for (number, page) in self.durable.chunks(PAGE).enumerate() {
            if *page != ZEROS[..page.len()] {
                file.write_all_at(page, (number * PAGE) as u64)?;
            }
        }
        for request in &self.requests[self.at..position] {
            if let Request::Write(offset, data) = request {
                for (number, page) in data.chunks(PAGE).enumerate() {
                    if dice.below(100) < kept {
                        file.write_all_at(page, offset + (number * PAGE) as u64)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// What a disk writes as a whole, or not at all.
const PAGE: usize = 4096;
const ZEROS: [u8; PAGE] = [0; PAGE];
