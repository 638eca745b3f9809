use std::fs;

use super::files::{Removed, SMALL_BYTES};
use super::*;

struct Fixture {
    content: Arc<Content>,
    folder: scratch::Folder,
}

impl Fixture {
    fn new(name: &str) -> Self {
        let folder = scratch::Folder::new(name);
        let store = Store::new(&folder);
        let content = Content::open(&folder.join("content"), Sharing::Shared, store, Pool::new("test", 3), Gate::default());
        Self { content: Arc::new(content.expect("a folder")), folder }
    }

    async fn writer(&self, place: &str, expected: Option<&Digest>) -> Result<Writer> {
        let (namespace, reference) = (namespace(place), "r".to_owned());
        self.content.write(Opening { namespace, reference, total: 0, expected: expected.cloned(), lease: None }).await
    }

    /// A blob whose file has lost its end.
    async fn damaged(&self) -> Digest {
        let mut writer = self.writer("one", None).await.expect("a writer");
        writer.write(BYTES.into()).await.expect("written");
        let digest = writer.commit(0, None, HashMap::new()).await.expect("committed");
        let path = self.content.files.blob(&digest);
        fs::remove_file(&path).and_then(|()| fs::write(&path, &BYTES[..2])).expect("damage");
        assert!(matches!(self.content.read(&namespace("one"), &digest).await, Err(Error::DataLoss(_))));
        digest
    }

    async fn text(&self, place: &str, digest: &Digest) -> Vec<u8> {
        self.content.read(&namespace(place), digest).await.and_then(|blob| blob.blocking_read(0, 100)).expect("it is whole")
    }
}

fn namespace(name: &str) -> Namespace {
    Namespace::parse(name).expect("a name")
}

const BYTES: &[u8] = b"hello";

#[tokio::test]
async fn a_blob_of_another_length_is_whole_when_it_was_written_again() {
    let f = Fixture::new("content-again");
    let digest = f.damaged().await;
    let mut writer = f.writer("one", Some(&digest)).await.expect("it is not there");
    writer.write(BYTES.into()).await.expect("written");
    let committed = writer.commit(0, Some(&digest), HashMap::new()).await;
    assert!(matches!(committed, Err(Error::AlreadyExists(_))), "it has its row: {committed:?}");
    assert_eq!(f.text("one", &digest).await, BYTES);
}

#[tokio::test]
async fn a_blob_of_another_length_is_not_given_to_another_namespace() {
    let f = Fixture::new("content-shared");
    let digest = f.damaged().await;
    let mut writer = f.writer("two", Some(&digest)).await.expect("a writer");
    assert_eq!(writer.progress().expect("open").offset, 0);
    writer.write(BYTES.into()).await.expect("written");
    writer.commit(0, Some(&digest), HashMap::new()).await.expect("committed");
    assert_eq!(f.text("two", &digest).await, BYTES);
    assert_eq!(f.text("one", &digest).await, BYTES);
}

#[tokio::test]
async fn nothing_is_left_to_go_on_with_of_an_ingest_that_could_not_be_written_to_the_disk() {
    let f = Fixture::new("content-sync");
    let mut writer = f.writer("one", None).await.expect("a writer");
    writer.write(BYTES.into()).await.expect("written");
    f.content.status(&namespace("one"), "r").await.expect("it is there");
    let hex = Digest::of_text("one/r").hex().to_owned();
    let data = f.folder.join("content/ingest").join(hex).join("data");
    fs::OpenOptions::new().write(true).open(data).and_then(|data| data.set_len(2)).expect("damage");
    let error = writer.commit(0, None, HashMap::new()).await.expect_err("it lost bytes");
    assert!(matches!(error, Error::DataLoss(_)), "{error}");
    assert!(matches!(f.content.status(&namespace("one"), "r").await, Err(Error::NotFound(_))));
}

#[tokio::test]
async fn a_commit_of_what_was_aborted_meanwhile_says_so() {
    let f = Fixture::new("content-aborted");
    let mut writer = f.writer("one", None).await.expect("a writer");
    writer.write(BYTES.into()).await.expect("written");
    f.content.abort(&namespace("one"), "r").await.expect("aborted");
    let error = writer.commit(0, None, HashMap::new()).await.expect_err("nothing is there to commit");
    assert_eq!((error.code(), error.chain().as_str()), (tonic::Code::NotFound, "reference r: not found"));
    drop(writer);
    let mut writer = f.writer("one", None).await.expect("it is free");
    writer.write(BYTES.into()).await.expect("written");
    writer.commit(0, None, HashMap::new()).await.expect("committed");
}

#[tokio::test]
async fn a_flipped_byte_is_found_and_the_next_writer_mends_it() {
    let f = Fixture::new("content-verify");
    let mut digests = Vec::new();
    for text in [BYTES, b"other", b"third"] {
        let mut writer = f.writer("one", None).await.expect("a writer");
        writer.write(text.into()).await.expect("written");
        digests.push(writer.commit(0, None, HashMap::new()).await.expect("committed"));
    }
    let sound = Verified { sound: 3, ..Verified::default() };
    assert_eq!(f.content.verify().await.expect("all is read"), sound);
    let path = f.content.files.blob(&digests[0]);
    fs::remove_file(&path).and_then(|()| fs::write(&path, b"hellO")).expect("damage");
    fs::remove_file(f.content.files.blob(&digests[1])).expect("damage");
    let found = Verified { sound: 1, damaged: vec![digests[0].clone()], missing: vec![digests[1].clone()] };
    assert_eq!(f.content.verify().await.expect("all is read"), found);
    assert!(f.content.take_left(), "a collection removes what was taken away");
    let mut writer = f.writer("one", Some(&digests[0])).await.expect("it is not there");
    writer.write(BYTES.into()).await.expect("written");
    writer.commit(0, Some(&digests[0]), HashMap::new()).await.expect_err("it has its row");
    assert_eq!(f.text("one", &digests[0]).await, BYTES);
    assert_eq!(f.content.verify().await.expect("all is read").missing, [digests[1].clone()]);
    f.content.collect(Scan::All).await.expect("collected");
    assert_eq!(fs::read_dir(f.folder.join("content/removed")).expect("a folder").count(), 0);
}

#[test]
fn a_small_file_is_removed_at_once_and_a_large_one_is_put_aside_first() {
    let folder = scratch::Folder::new("content-remove");
    let files = Files::open(&folder).expect("folders");
    let aside = || fs::read_dir(folder.join("removed")).expect("a folder").count();
    for (bytes, is_small) in [(0, true), (SMALL_BYTES, true), (SMALL_BYTES + 1, false)] {
        let digest = Digest::of_text(&bytes.to_string());
        fs::File::create(files.blob(&digest)).and_then(|file| file.set_len(bytes)).expect("a file");
        let removed = files.remove(&digest).expect("removed");
        assert_eq!(files.size(&digest), None, "{bytes}");
        assert_eq!((matches!(removed, Removed::Freed(freed) if freed == bytes), aside()), (is_small, usize::from(!is_small)), "{bytes}");
        assert_eq!(files.remove(&digest).expect("it is not there"), Removed::Freed(0));
    }
}

#[tokio::test]
async fn an_ingest_that_is_leased_after_it_was_listed_is_not_collected() {
    let f = Fixture::new("content-recheck");
    let mut writer = f.writer("one", None).await.expect("a writer");
    writer.write(BYTES.into()).await.expect("written");
    writer.close().await.expect("closed");
    let folder = f.folder.join("content/ingest").join(Digest::of_text("one/r").hex());
    let long_ago = std::time::SystemTime::now() - std::time::Duration::from_secs(48 * 60 * 60);
    for name in ["data", "updatedat"] {
        fs::File::options().write(true).open(folder.join(name)).and_then(|file| file.set_modified(long_ago)).expect("a time");
    }
    fs::write(folder.join("updatedat"), "2001-01-01T00:00:00Z").expect("a time");
    // it is listed as abandoned, and then a writer takes it up and leaves it again, before the collector has it
    let closed = f.content.gate.close(std::time::Duration::ZERO).await;
    let collect = tokio::spawn({
        let content = Arc::clone(&f.content);
        async move { content.collect(Scan::Known).await }
    });
    scratch_wait(&f, "one/r").await;
    fs::write(folder.join("updatedat"), crate::timestamp::now().to_string()).expect("a time");
    drop(closed);
    collect.await.expect("no panic").expect("collected");
    f.content.status(&namespace("one"), "r").await.expect("it was written lately");
}

/// Until the collector has a reference.
async fn scratch_wait(f: &Fixture, name: &str) {
    while !f.content.references.is_taken(name) {
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn a_verification_ends_with_its_caller() {
    let f = Fixture::new("content-verify-ends");
    let mut writer = f.writer("one", None).await.expect("a writer");
    writer.write(BYTES.into()).await.expect("written");
    let digest = writer.commit(0, None, HashMap::new()).await.expect("committed");
    // minutes of zeros
    let path = f.content.files.blob(&digest);
    fs::remove_file(&path).expect("removed");
    fs::File::create(&path).and_then(|file| file.set_len(256 << 30)).expect("a sparse file");
    let verifying = tokio::spawn({
        let content = Arc::clone(&f.content);
        async move { content.verify().await }
    });
    let is_busy = async |expected: bool| {
        let waits = async {
            while (f.content.pool.busy() > 0) != expected {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(std::time::Duration::from_secs(20), waits).await.is_ok()
    };
    assert!(is_busy(true).await);
    verifying.abort();
    let _aborted = verifying.await;
    let ends = is_busy(false).await;
    // a thread that reads on would keep this process
    f.content.gate.retire();
    assert!(ends);
    assert!(path.exists(), "it was not found damaged");
}
