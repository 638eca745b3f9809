//! Sizes, depths and times that a layer may have, and its end when it is cancelled.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::*;

/// 67.
#[test]
fn zeros_take_no_room_and_a_layer_too_long_is_refused() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("zeros");
    let target = new(&folder, "target");
    let mut data = vec![0; 8 << 20];
    data[5 << 20] = 1;
    let layer = tar().file("zeros", &data).raw(b'0', b"sparse", "", |_| {}, b"");
    let sparse = layer.pax(&[
        ("GNU.sparse.major", b"1"),
        ("GNU.sparse.minor", b"0"),
        ("GNU.sparse.name", b"lastlog"),
        ("GNU.sparse.realsize", b"107374182400"),
    ]);
    let layer = sparse.raw(b'0', b"x", "00000001000", |_| {}, b"0\n").end();
    merge(&layer, &target).expect("applied");
    let about = |name: &str| fs::metadata(target.join(name)).expect("it is there");
    assert!(about("zeros").blocks() * 512 <= 128 << 10, "{}", about("zeros").blocks());
    assert!(fs::read(target.join("zeros")).expect("a file") == data);
    assert_eq!((about("lastlog").len(), about("lastlog").blocks()), (100 << 30, 0));
    let limits = LayerLimits { layer_bytes: 1 << 20, entries: 3 };
    let limited =
        |bytes: &[u8]| crate::error::chain(&apply(bytes, Target::Merged(&target), limits, &Cancel::default()).expect_err("too much"));
    assert!(limited(&layer).contains("longer than 1048576 bytes"));
    assert!(limited(&tar().file("a", "").file("b", "").file("c", "").file("d", "").end()).contains("more than 3 entries"));
    let huge = tar().pax(&[("GNU.sparse.size", b"99999999999999999"), ("GNU.sparse.map", b"0,0")]).raw(b'0', b"x", "", |_| {}, b"").end();
    assert!(crate::error::chain(&merge(&huge, &target).expect_err("too long")).contains("the limit is"));
}

/// 110.
#[test]
fn what_is_cancelled_ends() {
    let folder = scratch::Folder::new("cancel");
    let target = new(&folder, "target");
    let cancel = Cancel::default();
    struct Endless(Option<Cancel>, u64);
    impl Read for Endless {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.1 += 1;
            // in the middle of a file
            if self.1 == 100 {
                drop(self.0.take().map(|cancel| cancel.guard()));
            }
            let head = Archive::default().raw(b'0', b"long", "77777777777", |_| {}, b"").0;
            let count = buffer.len().min(512);
            buffer[..count].copy_from_slice(if self.1 == 1 { &head[..count] } else { &[7; 512][..count] });
            Ok(count)
        }
    }
    // the first bytes are asked for alone
    let archive = Archive::default().raw(b'0', b"long", "77777777777", |_| {}, b"").0;
    let source = io::Cursor::new(archive).chain(Endless(Some(cancel.clone()), 1));
    let error = apply(source, Target::Merged(&target), LayerLimits::default(), &cancel).expect_err("cancelled");
    assert!(crate::error::chain(&error).contains("the client has gone"), "{error:?}");
}

#[test]
fn links_to_files_of_lower_layers_copy_no_more_than_a_layer_may_have() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("copied-bytes");
    let (lower, upper) = (new(&folder, "lower"), new(&folder, "upper"));
    for name in ["a", "b", "c"] {
        fs::write(lower.join(name), [1; 20_000]).expect("a file");
    }
    let layer = Archive::default().link("x", "a").link("y", "b").link("z", "c").end();
    let limits = LayerLimits { layer_bytes: 50_000, ..LayerLimits::default() };
    let lowers = Lowers::open(std::slice::from_ref(&lower)).expect("a folder");
    let error = apply(&layer[..], Target::Upper(&upper, lowers), limits, &Cancel::default()).expect_err("too much");
    assert!(error.to_string().contains("\"c\": with it, links to files of lower layers need more bytes"), "{error}");
    assert!(upper.join("y").exists() && !upper.join("z").exists());
}

#[test]
fn names_of_folders_that_a_layer_has_kept_in_memory_are_bounded() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("names");
    for (kind, path) in [(Kind::Fifo, "a/b/c/d/f"), (Kind::Folder, "folder")] {
        let root = tree::open_root(&new(&folder, path.get(..1).expect("a name"))).expect("a folder");
        let bounds = Bounds { copied: 0, names: 4 * (NAME_COSTS + 8), cancel: Cancel::default() };
        let mut layer = Layer::new(root, Lowers::default(), false, bounds);
        let mut reader = Reader::new(io::empty(), Limits::default());
        let mut refusals =
            (0..8).map(|number| layer.entry(&entry(format!("{number}/{path}"), kind.clone()), &mut reader)).skip_while(Result::is_ok);
        let error = refusals.next().expect("a refusal").expect_err("the first");
        assert!(error.to_string().contains("names of folders up to it have more than"), "{error}");
    }
}

#[test]
fn a_folder_is_gone_through_once_however_often_it_is_said_to_be_opaque() {
    if !is_root() {
        return;
    }
    let folder = scratch::Folder::new("marks");
    let root = tree::open_root(&new(&folder, "root")).expect("a folder");
    let bounds = Bounds { copied: 0, names: NAMES_BYTES, cancel: Cancel::default() };
    let mut layer = Layer::new(root, Lowers::default(), true, bounds);
    let mut reader = Reader::new(io::empty(), Limits::default());
    let mut add = |layer: &mut Layer, path: &str| layer.entry(&entry(path, Kind::Fifo), &mut reader).expect("applied");
    for number in 0..100 {
        add(&mut layer, &format!("a/b/c/{number}"));
    }
    for _again in 0..20 {
        for mark in ["a/b/c/.wh..wh..opq", "a/b/.wh..wh..opq", "a/.wh..wh..opq", ".wh.a", ".wh..wh..opq"] {
            add(&mut layer, mark);
        }
    }
    assert!(layer.judged <= 110, "{}", layer.judged);
    assert_eq!(fs::read_dir(folder.join("root/a/b/c")).expect("a folder").count(), 100);
}

/// The same bytes for ever.
struct Endless {
    bytes: Vec<u8>,
    at: usize,
    /// How often it was read.
    reads: Arc<AtomicUsize>,
}

impl std::io::Read for Endless {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = (self.bytes.len() - self.at).min(buffer.len());
        buffer[..count].copy_from_slice(&self.bytes[self.at..self.at + count]);
        self.at = (self.at + count) % self.bytes.len();
        self.reads.fetch_add(1, Ordering::Relaxed);
        Ok(count)
    }
}

#[test]
fn a_layer_of_which_nothing_comes_ends_when_it_is_cancelled() {
    let folder = scratch::Folder::new("endless");
    let upper = new(&folder, "upper");
    let empty = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()).finish().expect("memory");
    // a frame of zstd that is skipped
    let skipped = [&[0x50, 0x2a, 0x4d, 0x18, 4, 0, 0, 0][..], &[0; 4]].concat();
    for bytes in [empty, skipped] {
        let cancel = Cancel::default();
        let (cancels, target) = (cancel.guard(), upper.clone());
        let (done, ends) = std::sync::mpsc::channel();
        let reads = Arc::new(AtomicUsize::new(0));
        let begun = Endless { bytes: bytes.repeat(1000), at: 0, reads: Arc::clone(&reads) };
        std::thread::spawn(move || {
            let applied = apply(begun, Target::Merged(&target), LayerLimits::default(), &cancel);
            let _ = done.send(applied.is_err());
        });
        scratch::eventually("much is read", || reads.load(Ordering::Relaxed) > 100);
        drop(cancels);
        assert_eq!(ends.recv_timeout(Duration::from_secs(60)), Ok(true));
    }
}

#[test]
fn a_deep_folder_costs_as_much_as_it_is_deep() {
    let folder = scratch::Folder::new("deep");
    let (lower, upper) = (new(&folder, "lower"), new(&folder, "upper"));
    let deep = |name: &str| vec![name; 2000].join("/");
    let mut archive = Archive::default();
    for name in ["a", "b", "c", "d", "e"] {
        archive = archive.file(deep(name), "x");
    }
    let archive = archive.end();
    merge(&archive, &lower).expect("applied");
    // of this thread alone: the machine may be busy
    let processor = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("a clock"));
    let begin = processor();
    overlay(&archive, &upper, &[&lower]).expect("applied");
    let took = processor() - begin;
    // from the root again for each folder of them, it took a minute
    assert!(took < Duration::from_secs(15), "{took:?}");
    tree::remove(tree::open_root(&folder).expect("a folder").as_fd(), b"upper").expect("removed");
    tree::remove(tree::open_root(&folder).expect("a folder").as_fd(), b"lower").expect("removed");
}

#[test]
fn a_deep_tree_is_measured_and_removed_with_few_descriptors() {
    let folder = scratch::Folder::new("descriptors");
    let target = new(&folder, "target");
    merge(&Archive::default().file(vec!["a"; 1500].join("/"), "x").end(), &target).expect("applied");
    let measured = crate::layers::measure(&target, Beneath::Known, &Cancel::default()).expect("measured");
    assert_eq!(measured.inodes, 1501, "the root and all in it");
    let most = std::cell::Cell::new(0);
    let count = || most.set(most.get().max(fs::read_dir("/proc/self/fd").expect("descriptors").count()));
    let mut judge = |_folder: u64, _name: &[u8], _stat: &Stat| {
        count();
        tree::Fate::Removed
    };
    tree::clear(tree::open_root(&target).expect("a folder"), &mut judge, &|| false).expect("removed");
    assert!(most.get() < 700, "{} descriptors", most.get());
    assert_eq!(fs::read_dir(&target).expect("a folder").count(), 0);
}

/// Bytes whose reader's priority is looked at.
struct Looked<'b>(&'b [u8], std::sync::mpsc::Sender<Option<i32>>);

impl std::io::Read for Looked<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let stat = fs::read_to_string("/proc/thread-self/stat")?;
        // behind the name, which may have spaces
        let nice = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(16)).and_then(|nice| nice.parse().ok());
        let _ = self.1.send(nice);
        let count = self.0.len().min(buffer.len()).min(100);
        buffer[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        Ok(count)
    }
}

#[test]
fn a_layer_is_applied_at_a_lower_priority_than_the_thread_that_asks_for_it() {
    let folder = scratch::Folder::new("priority");
    let upper = new(&folder, "upper");
    let layer = Archive::default().file("a", "x".repeat(1000)).end();
    let nice = || -> i32 {
        let stat = fs::read_to_string("/proc/thread-self/stat").expect("a thread");
        stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(16)).and_then(|nice| nice.parse().ok()).expect("a number")
    };
    let own = nice();
    let (looked, seen) = std::sync::mpsc::channel();
    apply(Looked(&layer, looked), Target::Merged(&upper), LayerLimits::default(), &Cancel::default()).expect("applied");
    let last = seen.iter().last().flatten().expect("it was read");
    assert!(last >= own.max(10), "{last}");
    assert_eq!(nice(), own, "this thread is as before");
}
