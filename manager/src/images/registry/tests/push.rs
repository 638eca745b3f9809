//! Rows 24 and 25: what is sent.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// A source in memory; how often its first byte was read.
struct Memory {
    bytes: Bytes,
    starts: AtomicU64,
}

#[async_trait]
impl Source for Memory {
    async fn read(&self, offset: u64, most: usize) -> crate::error::Result<Bytes> {
        if offset == 0 {
            self.starts.fetch_add(1, Ordering::Relaxed);
        }
        let start = usize::try_from(offset).expect("small");
        Ok(self.bytes.slice(start..self.bytes.len().min(start + most)))
    }
}

fn memory(bytes: &[u8]) -> Memory {
    Memory { bytes: Bytes::copy_from_slice(bytes), starts: AtomicU64::new(0) }
}

async fn pushed(client: &Registry, content: &[u8], from: &[&str]) -> Result<Pushed> {
    let from: Vec<String> = from.iter().map(|&from| from.to_owned()).collect();
    client.push(&layer(content), &from, &memory(content), &|_| ()).await
}

const UPLOADS: &str = "/v2/a/b/blobs/uploads/";

#[tokio::test]
async fn a_blob_is_sent_once_to_where_the_registry_wants_it() {
    let world = World::new("upload");
    let content = bytes(1_000_000);
    for (location, path) in [
        ("/v2/a/b/blobs/uploads/1?_state=x%3D%3D", "/v2/a/b/blobs/uploads/1"),
        ("1", "/v2/a/b/blobs/uploads/1"),
        ("http://r.example:PORT/elsewhere", "/elsewhere"),
    ] {
        let registry = Double::http(move |seen, _| match seen.method.as_str() {
            "HEAD" => Reply::new(404),
            "POST" => Reply::new(202)
                .header("location", location.replace("PORT", seen.header("host").and_then(|host| host.split(':').nth(1)).expect("a port"))),
            _ => Reply::new(201),
        })
        .await;
        let client = world.plain(&registry, "a/b").await;
        let (source, last) = (memory(&content), AtomicU64::new(0));
        let progress = |sent: u64| assert!(last.swap(sent, Ordering::Relaxed) < sent);
        assert_eq!(client.push(&layer(&content), &[], &source, &progress).await.expect("pushed"), Pushed::Uploaded);
        let put = registry.seen().pop().expect("a request");
        assert!(put.is("PUT", path) && put.query("digest") == [digest(&content).to_string()], "{:?}", put.target);
        assert_eq!(put.target.contains("_state=x%3D%3D&"), location.contains("_state"), "{}", put.target);
        assert_eq!((put.body == content, last.into_inner(), source.starts.into_inner()), (true, 1_000_000, 1));
        assert_eq!(registry.seen().len(), 3);
    }
}

#[tokio::test]
async fn what_is_there_is_not_sent() {
    let world = World::new("exists");
    let registry = Double::http(|_, _| Reply::new(200)).await;
    let client = world.plain(&registry, "a/b").await;
    assert_eq!(pushed(&client, &bytes(10), &["c/d"]).await.expect("there"), Pushed::Exists);
    assert_eq!(registry.seen().len(), 1);
}

#[tokio::test]
async fn an_empty_blob_can_be_sent() {
    let world = World::new("empty");
    let registry = Double::http(|seen, _| match seen.method.as_str() {
        "HEAD" => Reply::new(404),
        "POST" => Reply::new(202).header("location", "/u"),
        _ => Reply::new(201),
    })
    .await;
    let client = world.plain(&registry, "a/b").await;
    assert_eq!(pushed(&client, b"", &[]).await.expect("sent"), Pushed::Uploaded);
    assert_eq!(registry.seen().pop().expect("a request").header("content-length"), Some("0"));
}

#[tokio::test]
async fn a_mount_that_is_refused_becomes_an_upload() {
    let world = World::new("mount");
    let content = bytes(1_000);
    for (status, expected, requests) in [
        (201, Pushed::Mounted, 2),
        (202, Pushed::Uploaded, 3),
        (401, Pushed::Uploaded, 4),
        (403, Pushed::Uploaded, 4),
        (404, Pushed::Uploaded, 4),
        (405, Pushed::Uploaded, 4),
        (500, Pushed::Uploaded, 4),
    ] {
        let registry = Double::http(move |seen, _| match (seen.method.as_str(), seen.target.contains("mount=")) {
            ("HEAD", _) => Reply::new(404),
            ("POST", true) if status == 202 => Reply::new(202).header("location", "/u"),
            ("POST", true) => Reply::new(status),
            ("POST", false) => Reply::new(202).header("location", "/u"),
            _ => Reply::new(201),
        })
        .await;
        let client = world.plain(&registry, "a/b").await;
        assert_eq!(
            pushed(&client, &content, &["a/b", "c/d"]).await.unwrap_or_else(|error| panic!("{status}: {error}")),
            expected,
            "{status}"
        );
        let post = registry.seen().into_iter().find(|seen| seen.is("POST", UPLOADS)).expect("a mount");
        assert_eq!((post.query("mount"), post.query("from")), (vec![digest(&content).to_string()], vec!["c/d".to_owned()]));
        assert_eq!(registry.seen().len(), requests, "{status}");
    }
}

#[tokio::test]
async fn a_mount_asks_for_a_token_of_both_repositories() {
    let world = World::new("mount-scopes");
    let tokens = Double::http(|_, _| Reply::new(200).body(r#"{"token":"good"}"#)).await;
    let port = tokens.port();
    let registry = Double::http(move |seen, _| match (seen.header("authorization"), seen.method.as_str()) {
        (None, _) => Reply::bearer(&format!("realm=\"http://t.example:{port}/\"")),
        (_, "HEAD") => Reply::new(404),
        _ => Reply::new(201),
    })
    .await;
    let client = world.plain(&registry, "a/b").await;
    assert_eq!(pushed(&client, &bytes(10), &["c/d"]).await.expect("mounted"), Pushed::Mounted);
    let scopes: Vec<Vec<String>> = tokens.seen().iter().map(|seen| seen.query("scope")).collect();
    assert_eq!(
        scopes,
        [vec!["repository:a/b:pull,push".to_owned()], vec!["repository:a/b:pull,push".to_owned(), "repository:c/d:pull".to_owned()]]
    );
}

#[tokio::test]
async fn an_upload_that_breaks_or_loses_its_token_is_repeated_from_its_first_byte() {
    let world = World::new("again");
    let content = bytes(2_000_000);
    for failure in
        [Reply::closed(), Reply::new(500), Reply::new(401).header("www-authenticate", "Bearer realm=\"http://t.example:TOKENS/\"")]
    {
        let tokens = Double::http(|_, _| Reply::new(200).body(r#"{"token":"good"}"#)).await;
        let (port, failed) = (tokens.port(), Mutex::new(false));
        let failure =
            if format!("{failure:?}").contains("TOKENS") { Reply::bearer(&format!("realm=\"http://t.example:{port}/\"")) } else { failure };
        let registry = Double::http(move |seen, nth| match seen.method.as_str() {
            "HEAD" => Reply::new(404),
            "POST" => Reply::new(202).header("location", format!("/u/{nth}")),
            // nothing is kept of an upload
            "GET" => Reply::new(404),
            _ if !std::mem::replace(&mut *failed.lock().expect("no panic"), true) => failure.clone(),
            _ => Reply::new(201).header("docker-content-digest", seen.query("digest").pop().expect("a digest")),
        })
        .await;
        let client = world.plain(&registry, "a/b").await;
        let source = memory(&content);
        let sent = client.push(&layer(&content), &[], &source, &|_| ()).await;
        assert_eq!(sent.unwrap_or_else(|error| panic!("{error}")), Pushed::Uploaded);
        let puts: Vec<Seen> = registry.seen().into_iter().filter(|seen| seen.method == "PUT").collect();
        assert_eq!((puts.len(), puts[1].body == content, source.starts.into_inner()), (2, true, 2));
        assert_ne!(puts[0].target, puts[1].target, "a new upload");
    }
}

#[tokio::test]
async fn an_upload_goes_on_behind_what_the_registry_has_kept() {
    let content = bytes(100_000);
    // what it says that it has kept, the method that breaks once more, and from where on it is sent in the end
    for (range, breaks, from) in [
        (Some("0-39999"), "", Some(40_000)),
        (Some("bytes=0-39999"), "", Some(40_000)),
        (Some("0-39999"), "PATCH", Some(70_000)),
        (Some("0-39999"), "refused", None),
        (Some("0-99999"), "", Some(100_000)),
        (Some("0-100000"), "", None),
        (Some("x"), "", None),
        (None, "", None),
    ] {
        let world = World::new("kept");
        let (broken, kept) = (Mutex::new(Vec::<String>::new()), Mutex::new(0));
        let registry = Double::http(move |seen, nth| {
            let is_first = |method: &str| {
                let mut broken = broken.lock().expect("no panic");
                !broken.iter().any(|other| other == method) && {
                    broken.push(method.to_owned());
                    true
                }
            };
            match seen.method.as_str() {
                "HEAD" => Reply::new(404),
                "POST" => Reply::new(202).header("location", format!("/u/{nth}")),
                "GET" => {
                    let times = std::mem::replace(&mut *kept.lock().expect("no panic"), 1);
                    let reply = Reply::new(204).header("location", format!("/u/{nth}?again"));
                    match range {
                        Some(_) if times == 1 && breaks == "PATCH" => reply.header("range", "0-69999"),
                        Some(range) => reply.header("range", range),
                        None => Reply::new(404),
                    }
                }
                "PUT" if is_first("PUT") => Reply::closed(),
                "PATCH" if breaks == "PATCH" && is_first("PATCH") => Reply::closed(),
                "PATCH" if breaks == "refused" => Reply::new(416),
                "PATCH" => Reply::new(202).header("location", "/u/last"),
                _ => Reply::new(201),
            }
        })
        .await;
        let client = world.plain(&registry, "a/b").await;
        assert_eq!(pushed(&client, &content, &[]).await.unwrap_or_else(|error| panic!("{range:?}: {error}")), Pushed::Uploaded);
        let seen = registry.seen();
        let last = seen.last().expect("a request");
        assert!(last.method == "PUT" && last.query("digest") == [digest(&content).to_string()], "{last:?}");
        match from {
            None => assert!(last.body == content && (breaks == "refused" || seen.iter().all(|seen| seen.method != "PATCH")), "{range:?}"),
            Some(100_000) => assert!(last.body.is_empty() && last.target.contains("?again&digest"), "{:?}", last.target),
            Some(from) => {
                let patch = seen.iter().rev().find(|seen| seen.method == "PATCH").expect("the rest is sent");
                assert_eq!((patch.body == content[from..], last.body.is_empty()), (true, true), "{range:?}");
                assert_eq!(patch.header("content-range"), Some(format!("{from}-99999").as_str()));
                assert!(patch.target.ends_with("?again") && last.target.starts_with("/u/last?"), "{:?}", last.target);
            }
        }
    }
}

#[tokio::test]
async fn a_registry_that_keeps_a_byte_of_each_attempt_ends_a_push() {
    let world = World::new("byte");
    let content = bytes(500);
    let registry = Double::http(move |seen, nth| match seen.method.as_str() {
        "HEAD" => Reply::new(404),
        "POST" => Reply::new(202).header("location", format!("/u/{nth}")),
        // it counts requests, so that each has one more byte
        "GET" => Reply::new(204).header("range", format!("0-{}", nth % 500)),
        _ => Reply::closed(),
    })
    .await;
    let client = world.plain(&registry, "a/b").await;
    let error = pushed(&client, &content, &[]).await.expect_err("it never takes all");
    assert_eq!(error.code(), tonic::Code::Unavailable, "{error}");
    let requests = registry.seen().len();
    assert!(requests < 250, "{requests} requests");
}

#[tokio::test]
async fn credentials_do_not_go_to_another_host_that_takes_the_upload() {
    let world = World::new("other-host");
    let store = Double::http(|seen, _| Reply::new(if seen.header("authorization").is_some() { 400 } else { 201 })).await;
    let port = store.port();
    let registry = Double::http(move |seen, _| match (seen.header("authorization"), seen.method.as_str()) {
        (None, _) => Reply::basic(),
        (_, "HEAD") => Reply::new(404),
        _ => Reply::new(202).header("location", format!("http://b.example:{port}/u?signature=x")),
    })
    .await;
    let known = Known::password(&[&format!("r.example:{}", registry.port()), &format!("b.example:{port}")]);
    let client = world.with(&registry, "a/b", Options { plain_http: Some(true), credentials: Some(known), ..world.options() }).await;
    assert_eq!(pushed(&client, &bytes(1_000), &[]).await.expect("pushed"), Pushed::Uploaded);
    assert_eq!(store.seen().len(), 1);
}

#[tokio::test]
async fn what_the_registry_has_stored_must_be_what_was_sent() {
    let world = World::new("stored");
    let other = digest(b"other").to_string();
    let registry = Double::http(move |seen, _| match seen.method.as_str() {
        "HEAD" => Reply::new(404),
        "POST" => Reply::new(202).header("location", "/u"),
        _ => Reply::new(201).header("docker-content-digest", other.clone()),
    })
    .await;
    let client = world.plain(&registry, "a/b").await;
    assert!(refused(pushed(&client, &bytes(10), &[]).await).contains("it has stored"));
}

#[tokio::test]
async fn a_source_that_fails_or_is_too_short_ends_a_push() {
    struct Failing(bool);
    #[async_trait]
    impl Source for Failing {
        async fn read(&self, offset: u64, most: usize) -> crate::error::Result<Bytes> {
            match (self.0, offset) {
                (_, 0) => Ok(Bytes::from(vec![0; most.min(100)])),
                (true, _) => Err(crate::error::Error::DataLoss("the disk is broken".to_owned())),
                (false, _) => Ok(Bytes::new()),
            }
        }
    }
    let world = World::new("source");
    let registry = Double::http(|seen, _| match seen.method.as_str() {
        "HEAD" => Reply::new(404),
        _ => Reply::new(202).header("location", "/u"),
    })
    .await;
    let client = world.plain(&registry, "a/b").await;
    let content = bytes(1_000);
    let failed = client.push(&layer(&content), &[], &Failing(true), &|_| ()).await.expect_err("fails");
    assert_eq!((failed.code(), crate::error::chain(&failed).contains("the disk is broken")), (tonic::Code::DataLoss, true));
    let short = refused(client.push(&layer(&content), &[], &Failing(false), &|_| ()).await);
    assert!(short.contains("has not the size"), "{short}");
}

#[tokio::test]
async fn a_manifest_is_put_under_its_tag_unless_that_is_it_already() {
    let world = World::new("manifest");
    let other = digest(b"other").to_string();
    let there = manifest().digest.to_string();
    for (head, tag, expected) in [
        (Reply::new(404), Some("1"), Pushed::Uploaded),
        (Reply::new(200).header("docker-content-digest", other), Some("1"), Pushed::Uploaded),
        (Reply::new(200), Some("1"), Pushed::Uploaded),
        (Reply::new(200).header("docker-content-digest", there), Some("1"), Pushed::Exists),
        (Reply::new(200), None, Pushed::Exists),
        (Reply::new(404), None, Pushed::Uploaded),
        (Reply::new(403), None, Pushed::Uploaded),
    ] {
        let registry = Double::http(move |seen, _| if seen.method == "HEAD" { head.clone() } else { Reply::new(201) }).await;
        let client = world.plain(&registry, "a/b").await;
        let pushed = client.push_manifest(&manifest(), Bytes::from_static(MANIFEST.as_bytes()), tag).await;
        assert_eq!(pushed.expect("pushed"), expected);
        let seen = registry.seen();
        let path = format!("/v2/a/b/manifests/{}", tag.unwrap_or(manifest().digest.as_str()));
        assert!(seen[0].is("HEAD", &path));
        if expected == Pushed::Uploaded {
            assert!(seen[1].is("PUT", &path) && seen[1].header("content-type") == Some(IMAGE) && seen[1].body == MANIFEST.as_bytes());
        }
    }
}

#[tokio::test]
async fn all_parts_of_an_image_are_pushed_to_one_host() {
    let world = World::new("one-host");
    let second = Double::http(|_, _| Reply::new(200)).await;
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address").port();
    let registry = format!("r.example:{}", second.port());
    world.configure(&registry, &format!("[host.\"http://m.example:{free}\"]"));
    let client = world.plain(&second, "a/b").await;
    for _ in 0..2 {
        let error = refused(pushed(&client, &bytes(10), &[]).await);
        assert!(error.contains("connection refused") && !error.contains(&registry.replace("r.", "; r.")), "{error}");
    }
    assert!(second.seen().is_empty());
}

#[tokio::test]
async fn a_refused_push_says_what_the_registry_says() {
    let world = World::new("refused");
    let registry = Double::http(|seen, _| match seen.method.as_str() {
        "HEAD" => Reply::new(404),
        _ => Reply::new(400).body(r#"{"errors":[{"code":"MANIFEST_BLOB_UNKNOWN","message":"blob unknown to registry"}]}"#),
    })
    .await;
    let client = world.plain(&registry, "a/b").await;
    let error = refused(client.push_manifest(&manifest(), Bytes::from_static(MANIFEST.as_bytes()), Some("1")).await);
    assert!(error.contains("/a/b:1: ") && error.contains("400 bad request (MANIFEST_BLOB_UNKNOWN: blob unknown to registry)"), "{error}");
    let error = refused(pushed(&client, &bytes(10), &[]).await);
    assert!(error.contains("400 bad request"), "{error}");
}
