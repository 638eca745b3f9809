//! A file whose writes and flushes are recorded, or of which a part cannot be read yet: what a loop device and readers use of the FUSE protocol.
//!
//! Source: include/uapi/linux/fuse.h, version 7.31. The mount is the file itself: there are no names to look up.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};

use super::Request;

/// What is recorded, and the file behind it.
#[derive(Debug)]
pub(super) struct Recorded {
    /// What was written until now.
    pub(super) file: File,
    pub(super) size: u64,
    pub(super) requests: Arc<Mutex<Vec<Request>>>,
    pub(super) held: Arc<Mutex<Held>>,
}

/// From where on nothing can be read, if there is such a place, and the reads that wait for it.
#[derive(Debug, Default)]
pub(super) struct Held {
    pub(super) from: Option<u64>,
    pub(super) reads: Vec<Vec<u8>>,
}

/// Mounts it over a file, and answers the kernel by the returned device.
pub(super) fn mounted(over: &Path) -> Result<File> {
    let device = File::options().read(true).write(true).open("/dev/fuse").context("open /dev/fuse")?;
    let options = format!("fd={},rootmode=100600,user_id=0,group_id=0", device.as_raw_fd());
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("recorder"), over, Some("fuse"), flags, Some(&*options)).context("mount a FUSE file")?;
    Ok(device)
}

/// Answers the kernel until the mount is gone.
pub(super) fn serve(mut device: File, recorded: &Recorded) {
    let mut buffer = vec![0; 1 << 20];
    loop {
        let count = match device.read(&mut buffer) {
            Ok(count) => count,
            Err(error) if matches!(error.raw_os_error(), Some(EINTR | ENOENT | EAGAIN)) => continue,
            // unmounted
            Err(_ended) => return,
        };
        if recorded.holds(&buffer[..count]) {
            continue;
        }
        if let Some(answer) = answer(&buffer[..count], recorded)
            && device.write_all(&answer).is_err()
        {
            return;
        }
    }
}

impl Recorded {
    /// Keeps a read for later, if it is of what is held.
    fn holds(&self, request: &[u8]) -> bool {
        let (offset, count) = (number::<8>(request, HEADER + 8), number::<4>(request, HEADER + 16));
        let mut held = self.held.lock().expect("no panic under this lock");
        let is_held = number::<4>(request, 4) == u64::from(READ) && held.from.is_some_and(|from| offset + count > from);
        if is_held {
            held.reads.push(request.to_vec());
        }
        is_held
    }

    /// Answers what waits, and from now on everything.
    pub(super) fn release(&self, device: &mut File) {
        let mut held = self.held.lock().expect("no panic under this lock");
        held.from = None;
        for request in held.reads.drain(..) {
            if let Some(answer) = answer(&request, self) {
                // one whose reader has gone
                let _ = device.write_all(&answer);
            }
        }
    }
}

/// The answer to a request, if it gets one.
fn answer(request: &[u8], recorded: &Recorded) -> Option<Vec<u8>> {
    let (kind, unique, body) = (number::<4>(request, 4), number::<8>(request, 8), request.get(HEADER..).unwrap_or_default());
    let body = match u32::try_from(kind).unwrap_or_default() {
        INIT => Ok(init()),
        GETATTR | SETATTR => Ok(attributes(recorded.size)),
        OPEN => Ok([0_u64.to_le_bytes(), DIRECT_IO.to_le_bytes()].concat()),
        READ => read(body, recorded),
        WRITE => write(body, recorded),
        FSYNC => {
            recorded.requests.lock().expect("no panic under this lock").push(Request::Flush);
            Ok(Vec::new())
        }
        FLUSH | RELEASE => Ok(Vec::new()),
        STATFS => Ok(vec![0; 80]),
        FORGET | BATCH_FORGET | INTERRUPT => return None,
        _ => Err(ENOSYS),
    };
    let (error, body) = match body {
        Ok(body) => (0, body),
        Err(error) => (-error, Vec::new()),
    };
    let length = u32::try_from(16 + body.len()).expect("answers are short");
    Some([&length.to_le_bytes()[..], &error.to_le_bytes(), &unique.to_le_bytes(), &body].concat())
}

fn init() -> Vec<u8> {
    let mut answer = Vec::new();
    for value in [7_u32, 31, 1 << 17, BIG_WRITES, 16 | 12 << 16, 1 << 17, 1] {
        answer.extend(value.to_le_bytes());
    }
    answer.resize(64, 0);
    answer
}

/// Those of a regular file of root.
fn attributes(size: u64) -> Vec<u8> {
    let mut answer = Vec::new();
    // valid for ever, then inode, size, blocks and times
    for value in [u64::MAX >> 1, 0, 1, size, size / 512, 0, 0, 0] {
        answer.extend(value.to_le_bytes());
    }
    for value in [0_u32, 0, 0, 0o100_600, 1, 0, 0, 0, 4096, 0] {
        answer.extend(value.to_le_bytes());
    }
    answer
}

fn read(body: &[u8], recorded: &Recorded) -> std::result::Result<Vec<u8>, i32> {
    let (offset, count) = (number::<8>(body, 8), number::<4>(body, 16));
    let count = count.min(recorded.size.saturating_sub(offset));
    let mut bytes = vec![0; usize::try_from(count).map_err(|_| EIO)?];
    recorded.file.read_exact_at(&mut bytes, offset).map_err(|error| code(&error))?;
    Ok(bytes)
}

fn write(body: &[u8], recorded: &Recorded) -> std::result::Result<Vec<u8>, i32> {
    let (offset, count) = (number::<8>(body, 8), number::<4>(body, 16));
    let bytes = body.get(40..40 + usize::try_from(count).map_err(|_| EIO)?).ok_or(EIO)?;
    recorded.file.write_all_at(bytes, offset).map_err(|error| code(&error))?;
    recorded.requests.lock().expect("no panic under this lock").push(Request::Write(offset, bytes.to_vec()));
    Ok(count.to_le_bytes().to_vec())
}

fn code(error: &io::Error) -> i32 {
    error.raw_os_error().unwrap_or(EIO)
}

/// A number of N bytes in a request of the kernel, which is well-formed.
fn number<const N: usize>(bytes: &[u8], at: usize) -> u64 {
    let mut number = [0; 8];
    if let Some(bytes) = bytes.get(at..at + N) {
        number[..N].copy_from_slice(bytes);
    }
    u64::from_le_bytes(number)
}

const HEADER: usize = 40;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const SETATTR: u32 = 4;
const OPEN: u32 = 14;
const READ: u32 = 15;
const WRITE: u32 = 16;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const FSYNC: u32 = 20;
const FLUSH: u32 = 25;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const BIG_WRITES: u32 = 1 << 5;
/// Of an opened file: nothing of it is cached.
const DIRECT_IO: u64 = 1;
const ENOENT: i32 = 2;
const EINTR: i32 = 4;
const EIO: i32 = 5;
const EAGAIN: i32 = 11;
const ENOSYS: i32 = 38;
