use std::sync::PoisonError;

use super::double::{Double, Lie};
use super::*;
use crate::content::{Opening, Scan, Verified};
use crate::gate::Gate;
use crate::pools::Pool;
use crate::settings::Sharing;
use crate::store::Store;

struct Fixture {
    content: Arc<Content>,
    store: Store,
    double: Double,
    folder: scratch::Folder,
}

impl Fixture {
    fn new(name: &str) -> Self {
        let folder = scratch::Folder::new(name);
        let store = Store::new(&folder);
        let double = Double::new(&folder.join("p.sock"));
        Self { content: open(&folder, &store, Gate::default()), store, double, folder }
    }

    /// As another process finds what this one has left.
    fn crashed(&mut self) {
        self.content = open(&self.folder, &self.store, Gate::default());
    }

    fn remote(&self) -> &Remote {
        self.content.remote.as_ref().expect("a proxy")
    }

    async fn writer(&self, place: &str, expected: Option<&Digest>) -> Result<Writer> {
        let (namespace, reference) = (namespace(place), "r".to_owned());
        self.content.write(Opening { namespace, reference, total: 0, expected: expected.cloned(), lease: None }).await
    }

    async fn commit(&self, place: &str, bytes: &[u8]) -> Result<Digest> {
        let mut writer = self.writer(place, None).await?;
        if writer.progress()?.offset == 0 {
            writer.write(bytes.to_vec().into()).await?;
        }
        let committed = writer.commit(bytes.len() as u64, None, HashMap::new()).await;
        writer.close().await?;
        committed
    }

    async fn read(&self, place: &str, digest: &Digest) -> Result<Vec<u8>> {
        let blob = self.content.read(&namespace(place), digest).await?;
        blob.blocking_read(0, usize::MAX)
    }

    async fn delete(&self, place: &str, digest: &Digest) {
        self.content.delete(&namespace(place), digest, None).await.expect("it was there");
    }

    /// Collects until the proxy's part is done.
    async fn collect(&self, scan: Scan) {
        self.content.collect(scan).await.expect("collected");
        // it is started by then, or has not got its turn yet
        while self.remote().has_unnamed.load(Ordering::Relaxed) && !self.content.has_left.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(self.remote().removing.lock().await);
    }

    /// Files of blobs, of ingests, and of what was fetched.
    fn files(&self) -> usize {
        let count = |name: &str| std::fs::read_dir(self.folder.join("content").join(name)).map_or(0, Iterator::count);
        count("blobs/sha256") + count("ingest") + count("removed")
    }

    async fn noted(&self, digest: &Digest) -> Option<remote::Kept> {
        self.content.noted(self.remote(), digest).await.expect("read")
    }

    /// What a commit does until its row is written.
    async fn put_without_a_row(&self, bytes: &[u8]) -> Digest {
        let digest = Digest::of_bytes(bytes);
        let path = self.folder.join("bytes");
        std::fs::write(&path, bytes).expect("a file");
        let blob = blocking_open(&path.into(), bytes.len() as u64, None).expect("a blob");
        self.content.put_there(self.remote(), &namespace("one"), &digest, blob).await.expect("written there");
        digest
    }
}

fn open(folder: &Path, store: &Store, gate: Gate) -> Arc<Content> {
    let settings = ContentProxy {
        name: "far".to_owned(),
        namespace: "shared".to_owned(),
        address: folder.join("p.sock"),
        platform: None,
        exports: std::collections::BTreeMap::new(),
        capabilities: Vec::new(),
    };
    let content = Content::open(&folder.join("content"), Sharing::Shared, store.clone(), Pool::new("test", 3), gate);
    Arc::new(content.expect("a folder").with_proxy(Some(&settings)))
}

fn namespace(name: &str) -> Namespace {
    Namespace::parse(name).expect("a name")
}

const BYTES: &[u8] = b"hello";

#[tokio::test]
async fn what_is_committed_is_at_the_proxy_and_is_read_from_there() {
    let mut f = Fixture::new("proxied");
    // several messages
    let long: Vec<u8> = (0..3_000_000_u32).map(|number| (number >> 8) as u8).collect();
    for bytes in [BYTES, b"", &long] {
        let digest = f.commit("one", bytes).await.expect("committed");
        assert!(f.double.has(&digest) && f.files() == 0, "nothing stays here");
        assert_eq!(f.read("one", &digest).await.expect("read"), bytes);
        assert_eq!(lock(&f.double.has).reads, 0, "it was written a moment ago");
        f.crashed();
        for _again in 0..2 {
            assert_eq!(f.read("one", &digest).await.expect("read"), bytes);
        }
        let reads = std::mem::take(&mut lock(&f.double.has).reads);
        assert_eq!((reads, f.files()), (1, 0), "it is fetched once");
        assert!(f.read("two", &digest).await.is_err_and(|error| error.code() == tonic::Code::NotFound));
    }
    assert_eq!(lock(&f.double.has).namespace, "shared");
    assert!(lock(&f.double.has).ingests.is_empty());
}

#[tokio::test]
async fn what_a_proxy_has_by_itself_gets_a_row_without_its_bytes_and_goes_with_the_last_row() {
    let f = Fixture::new("proxied-shared");
    let (digest, other) = (f.double.put(BYTES), f.double.put(b"other"));
    for place in ["one", "two"] {
        let mut writer = f.writer(place, Some(&digest)).await.expect("a writer");
        assert_eq!(writer.progress().expect("open").offset, BYTES.len() as u64);
        assert_eq!(writer.commit(0, Some(&digest), HashMap::new()).await.expect("committed"), digest);
        drop(writer);
        assert!(matches!(f.writer(place, Some(&digest)).await, Err(Error::AlreadyExists(_))));
        assert_eq!(f.read(place, &digest).await.expect("read"), BYTES);
    }
    assert_eq!(lock(&f.double.has).written, 0);
    f.delete("one", &digest).await;
    f.collect(Scan::All).await;
    assert!(f.double.has(&digest), "another namespace has it");
    f.delete("two", &digest).await;
    f.collect(Scan::Known).await;
    assert!(!f.double.has(&digest) && f.double.has(&other), "what has got no row is not ours");
    assert_eq!(f.noted(&digest).await, None);
}

#[tokio::test]
async fn bytes_that_come_nevertheless_are_taken() {
    let f = Fixture::new("proxied-unshared");
    let digest = f.double.put(BYTES);
    let mut writer = f.writer("one", Some(&digest)).await.expect("a writer");
    writer.truncate().await.expect("truncated");
    writer.write(BYTES.into()).await.expect("written");
    writer.commit(0, Some(&digest), HashMap::new()).await.expect("committed");
    drop(writer);
    let mut writer = f.writer("two", Some(&digest)).await.expect("a writer");
    writer.write(b"!".as_slice().into()).await.expect("appended to what is there");
    let committed = writer.commit(0, None, HashMap::new()).await.expect("committed");
    assert_eq!(committed, Digest::of_bytes(b"hello!"));
}

#[tokio::test]
async fn what_a_proxy_gets_wrong_is_an_error_and_takes_no_room() {
    let mut f = Fixture::new("proxied-lies");
    let digest = f.commit("one", BYTES).await.expect("committed");
    for lie in [Lie::OtherBytes, Lie::Endless, Lie::Short, Lie::Nothingness] {
        f.crashed();
        f.double.lie(lie);
        let error = f.read("one", &digest).await.expect_err("it lies");
        assert!(matches!(&error, Error::DataLoss(why) if why.starts_with("content proxy far: sha256:")), "{lie:?}: {error}");
        assert_eq!((f.files(), *lock(&f.remote().expected)), (0, 0), "{lie:?}");
    }
    f.double.lie(Lie::Longer);
    assert!(!f.content.is_whole(&namespace("one"), &digest).await.expect("read"), "it can be written again");
    let error = f.commit("one", BYTES).await.expect_err("it is there, with another length");
    assert!(matches!(&error, Error::DataLoss(why) if why.ends_with("has 6 bytes there instead of 5")), "{error}");
    f.double.lie(Lie::Forgetful);
    let error = f.commit("two", b"forgotten").await.expect_err("it is not there");
    assert!(matches!(&error, Error::DataLoss(why) if why.ends_with("is not there, though it was written")), "{error}");
    f.double.lie(Lie::Nothing);
    assert_eq!(f.read("one", &digest).await.expect("it is there"), BYTES);
}

#[tokio::test]
async fn a_proxy_that_is_gone_is_named_and_nothing_is_lost() {
    let mut f = Fixture::new("proxied-gone");
    let digest = f.commit("one", b"before").await.expect("committed");
    f.double.stop().await;
    let begin = format!("content proxy far: cannot reach {}: ", f.folder.join("p.sock").display());
    let is_unreachable = |error: Error| error.code() == tonic::Code::Unavailable && error.chain().starts_with(&begin);
    assert!(matches!(f.writer("one", Some(&digest)).await, Err(Error::AlreadyExists(_))), "its row says so");
    assert_eq!(f.read("one", &digest).await.expect("it was written a moment ago"), b"before");
    assert!(f.commit("one", BYTES).await.is_err_and(is_unreachable));
    assert_eq!(f.content.status(&namespace("one"), "r").await.expect("it is there").offset, 5);
    f.crashed();
    assert!(f.read("one", &digest).await.is_err_and(is_unreachable));
    // its row goes, and the proxy's part waits
    f.delete("one", &digest).await;
    f.content.take_left();
    f.collect(Scan::Known).await;
    assert!(f.content.take_left(), "a later collection repeats it");
    f.double.start();
    f.collect(Scan::All).await;
    assert!(!f.double.has(&digest) && f.noted(&digest).await.is_none() && !f.content.take_left());
    let digest = f.commit("one", BYTES).await.expect("it goes on with what was written");
    assert!(f.double.has(&digest) && f.files() == 0);
}

#[tokio::test]
async fn what_a_crash_has_left_at_a_proxy_without_a_row_is_deleted_there() {
    let mut f = Fixture::new("proxied-crash");
    // it was written there, and got no row
    let whole = f.put_without_a_row(BYTES).await;
    // a part of it was
    let part = Digest::of_bytes(b"a part");
    let noted = f.store.write(|db| remote::put(db, "far", Digest::of_bytes(b"a part").as_str(), "one")).await.expect("noted");
    lock(&f.double.has).ingests.insert(reference(&noted.namespace, &part), b"a p".to_vec());
    f.crashed();
    f.collect(Scan::All).await;
    assert!(!f.double.has(&whole) && lock(&f.double.has).ingests.is_empty());
    assert!(f.noted(&whole).await.is_none() && f.noted(&part).await.is_none());
}

#[tokio::test]
async fn what_a_crash_has_left_is_gone_on_with_by_the_client_that_comes_again() {
    let mut f = Fixture::new("proxied-again");
    // after the proxy's commit
    let digest = f.put_without_a_row(BYTES).await;
    f.crashed();
    let writer = f.writer("one", Some(&digest)).await.expect("a writer");
    assert_eq!(writer.progress().expect("open").offset, 5, "it is there");
    drop(writer);
    assert_eq!(f.commit("one", BYTES).await.expect("committed"), digest);
    assert_eq!(lock(&f.double.has).written, 5);
    // with a part of it there, which is right, or not
    for (part, written) in [(b"ot".as_slice(), 3), (b"xx", 3 + 5), (b"too long", 5)] {
        let other = Digest::of_bytes(b"other");
        lock(&f.double.has).ingests.insert(reference("one", &other), part.to_vec());
        let before = lock(&f.double.has).written;
        assert_eq!(f.commit("one", b"other").await.expect("committed"), other);
        assert_eq!(lock(&f.double.has).written - before, written);
        f.delete("one", &other).await;
        f.collect(Scan::Known).await;
        assert!(!f.double.has(&other));
    }
    // after the decision to delete it: that comes first
    f.delete("one", &digest).await;
    let id = digest.clone();
    assert!(f.store.write(move |db| remote::leave(db, "far", id.as_str())).await.expect("noted"));
    f.crashed();
    let writer = f.writer("two", Some(&digest)).await.expect("a writer");
    assert_eq!(writer.progress().expect("open").offset, 0, "it is about to go");
    drop(writer);
    lock(&f.double.has).written = 0;
    f.commit("two", BYTES).await.expect("committed");
    assert_eq!(lock(&f.double.has).written, 5, "it was deleted, and written");
    f.collect(Scan::All).await;
    assert!(f.double.has(&digest));
    // after the row: its ingest is dropped by the next writer
    let mut writer = f.content.begin_for_test("two").await;
    writer.write(BYTES.into()).await.expect("written");
    writer.close().await.expect("closed");
    assert_eq!(f.files(), 1);
    f.writer("two", Some(&digest)).await.expect_err("it is there");
    assert_eq!(f.files(), 0);
}

impl Content {
    /// A writer that does not look for what is expected.
    async fn begin_for_test(self: &Arc<Self>, place: &str) -> Writer {
        let (namespace, reference) = (namespace(place), "r".to_owned());
        self.write(Opening { namespace, reference, total: 0, expected: None, lease: None }).await.expect("a writer")
    }
}

#[tokio::test]
async fn what_a_writer_is_about_to_share_is_not_deleted_there() {
    let f = Fixture::new("proxied-pinned");
    let digest = f.commit("one", BYTES).await.expect("committed");
    let mut writer = f.writer("two", Some(&digest)).await.expect("a writer");
    f.delete("one", &digest).await;
    f.content.delete_unnamed().await.expect("nothing is to be deleted");
    assert!(f.double.has(&digest));
    writer.commit(0, Some(&digest), HashMap::new()).await.expect("committed");
    drop(writer);
    f.delete("two", &digest).await;
    let writer = f.writer("two", Some(&digest)).await.expect("a writer");
    f.content.delete_unnamed().await.expect("nothing is to be deleted");
    assert!(f.double.has(&digest));
    let before = f.store.changes().borrow().removals;
    drop(writer);
    assert!(f.store.changes().borrow().removals > before, "its end is the sign for the next collection");
    f.collect(Scan::Known).await;
    assert!(!f.double.has(&digest));
}

#[tokio::test]
async fn damage_at_a_proxy_is_found_by_a_verification_and_the_next_writer_mends_it() {
    let f = Fixture::new("proxied-verify");
    let (damaged, lost) = (f.commit("one", BYTES).await.expect("committed"), f.commit("one", b"lost").await.expect("committed"));
    f.commit("two", b"sound").await.expect("committed");
    {
        let mut has = f.double.has.lock().unwrap_or_else(PoisonError::into_inner);
        has.blobs.insert(damaged.to_string(), b"hellO".to_vec());
        has.blobs.remove(lost.as_str());
    }
    let found = Verified { sound: 1, damaged: vec![damaged.clone()], missing: vec![lost] };
    assert_eq!(f.content.verify().await.expect("all is read"), found);
    assert!(!f.double.has(&damaged));
    let mut writer = f.writer("one", Some(&damaged)).await.expect("it is not there");
    writer.write(BYTES.into()).await.expect("written");
    writer.commit(0, Some(&damaged), HashMap::new()).await.expect_err("it has its row");
    assert_eq!(f.content.verify().await.expect("all is read").damaged, []);
    assert!(f.double.has(&damaged));
}

#[tokio::test]
async fn files_from_before_the_proxy_was_configured_are_used() {
    let f = Fixture::new("proxied-before");
    let before = Content::open(&f.folder.join("content"), Sharing::Shared, f.store.clone(), Pool::new("test", 3), Gate::default());
    let before = Arc::new(before.expect("a folder"));
    let opening = Opening { namespace: namespace("one"), reference: "r".to_owned(), total: 0, expected: None, lease: None };
    let mut writer = before.write(opening).await.expect("a writer");
    writer.write(BYTES.into()).await.expect("written");
    let digest = writer.commit(0, None, HashMap::new()).await.expect("committed");
    assert_eq!(f.read("one", &digest).await.expect("read"), BYTES);
    let mut writer = f.writer("two", Some(&digest)).await.expect("a writer");
    writer.commit(5, Some(&digest), HashMap::new()).await.expect("committed");
    assert!(!f.double.has(&digest) && f.files() == 1);
    for place in ["one", "two"] {
        f.delete(place, &digest).await;
    }
    f.collect(Scan::Known).await;
    assert_eq!(f.files(), 0);
}

#[tokio::test]
async fn a_process_that_is_replaced_leaves_the_rest_to_the_next() {
    let f = Fixture::new("proxied-retired");
    let gate = Gate::default();
    let retiring = open(&f.folder, &f.store, gate.clone());
    let opening = Opening { namespace: namespace("one"), reference: "r".to_owned(), total: 0, expected: None, lease: None };
    let mut writer = retiring.write(opening).await.expect("a writer");
    writer.write(BYTES.into()).await.expect("written");
    gate.retire();
    assert!(matches!(writer.commit(0, None, HashMap::new()).await, Err(Error::Retired)));
    drop(writer);
    let digest = f.commit("one", BYTES).await.expect("it goes on");
    assert!(f.double.has(&digest));
}

#[tokio::test]
async fn a_proxy_that_hangs_holds_up_nothing_but_its_own_calls() {
    let mut f = Fixture::new("proxied-hangs");
    let (gone, other) = (f.commit("one", b"gone").await.expect("committed"), f.commit("one", b"other").await.expect("committed"));
    f.double.stop().await;
    // without a connection that is broken
    f.crashed();
    // connections wait to be accepted
    let _silent = std::os::unix::net::UnixListener::bind(f.folder.join("p.sock")).expect("a socket");
    let mut writer = f.writer("one", None).await.expect("a writer");
    writer.write(BYTES.into()).await.expect("written");
    let hangs = tokio::spawn(async move { writer.commit(0, None, HashMap::new()).await });
    let quick = async {
        f.delete("one", &gone).await;
        f.content.collect(Scan::Known).await.expect("collected");
        while f.remote().removing.try_lock().is_ok() || f.remote().turns.try_take(&Digest::of_bytes(BYTES)).is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(f.content.info(&namespace("one"), &other).await.expect("it has its row").size, 5);
        let mut writer = f.writer("two", None).await.expect("a writer");
        writer.write(BYTES.into()).await.expect("written");
        writer.close().await.expect("closed");
        f.content.collect(Scan::All).await.expect("collected");
        assert!(f.content.gate.close(Duration::from_secs(10)).await.is_some(), "another process can take over");
    };
    // less than a call waits for
    tokio::time::timeout(Duration::from_secs(30), quick).await.expect("nothing waits for the proxy");
    assert!(!hangs.is_finished());
    hangs.abort();
}

#[tokio::test]
async fn a_blob_for_which_the_disk_has_no_room_is_not_fetched() {
    let mut f = Fixture::new("proxied-room");
    let digest = f.commit("one", BYTES).await.expect("committed");
    f.crashed();
    *lock(&f.remote().expected) = u64::MAX / 2;
    let error = f.read("one", &digest).await.expect_err("others take all of it");
    assert_eq!(error.code(), tonic::Code::ResourceExhausted, "{error}");
    assert_eq!((lock(&f.double.has).reads, *lock(&f.remote().expected)), (0, u64::MAX / 2));
    *lock(&f.remote().expected) = 0;
    assert_eq!(f.read("one", &digest).await.expect("there is room"), BYTES);
}
