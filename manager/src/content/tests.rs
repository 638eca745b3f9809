use std::fs;

use super::*;
use crate::store;

struct Fixture {
    content: Arc<Content>,
    folder: scratch::Folder,
}

impl Fixture {
    fn new(name: &str) -> Self {
        let folder = scratch::Folder::new(name);
        let store = Store::open(&store::Files { meta: folder.join("meta.db"), notes: folder.join("notes.db") }).expect("a new store");
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
