//! Rows 6–8, 16, 28, 29: what a name means.

use super::*;

const TARGET: &str = "/v2/a/b/manifests/latest";

#[tokio::test]
async fn a_tag_is_resolved_by_one_head() {
    let world = World::new("head");
    let registry = Double::http(|_, _| manifest_reply()).await;
    for (rest, target) in [("a/b", TARGET), ("a/b:1.2", "/v2/a/b/manifests/1.2")] {
        let client = world.plain(&registry, rest).await;
        assert_eq!(client.resolve().await.expect("resolved"), manifest());
        let seen = registry.seen().pop().expect("a request");
        assert!(seen.is("HEAD", target), "{seen:?}");
        let accept = seen.header("accept").expect("an accept");
        for media_type in MANIFESTS {
            assert!(accept.contains(media_type), "{accept}");
        }
        assert!(seen.header("user-agent").is_some_and(|agent| agent.starts_with("x-manager/")));
    }
    assert_eq!(registry.seen().len(), 2);
}

#[tokio::test]
async fn a_head_that_does_not_say_everything_becomes_a_get() {
    let world = World::new("get");
    let whole = || Reply::new(200).body(MANIFEST);
    let named = |reply: Reply| reply.header("content-type", IMAGE);
    let digest_of = |reply: Reply, digest: String| reply.header("docker-content-digest", digest);
    for (name, head) in [
        ("no digest", named(whole())),
        ("a digest that is none", digest_of(named(whole()), "sha256:../../x".to_owned())),
        ("no type", digest_of(whole(), manifest().digest.to_string())),
        ("another type", digest_of(whole(), manifest().digest.to_string()).header("content-type", "application/octet-stream")),
        ("no size", digest_of(named(Reply::new(200)), manifest().digest.to_string())),
        ("not found", Reply::new(404)),
        ("not allowed", Reply::new(405)),
        ("bad", Reply::new(400)),
        ("out of order", Reply::new(500)),
    ] {
        // a server that names no type, or a wrong one: the body counts
        let registry = Double::http(move |seen, _| {
            if seen.method == "HEAD" { head.clone() } else { Reply::new(200).header("content-type", "text/plain").body(MANIFEST) }
        })
        .await;
        let client = world.plain(&registry, "a/b").await;
        let resolved = client.resolve().await.unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(resolved, manifest(), "{name}");
        assert_eq!((registry.count("HEAD", TARGET), registry.count("GET", TARGET)), (1, 1), "{name}");
        assert_eq!(client.fetch_document(&resolved).await.expect("a document"), MANIFEST);
        assert_eq!(registry.seen().len(), 2, "{name}: the document is here already");
    }
}

#[tokio::test]
async fn a_redirect_that_is_signed_for_get_only_is_no_refusal() {
    let world = World::new("signed-head");
    for status in [403, 401] {
        let store = Double::http(move |seen, _| if seen.method == "HEAD" { Reply::new(status) } else { manifest_reply() }).await;
        let port = store.port();
        let registry = Double::http(move |_, _| Reply::redirect(format!("http://b.example:{port}/x"))).await;
        let client = world.plain(&registry, "a/b").await;
        assert_eq!(client.resolve().await.expect("resolved"), manifest());
    }
}

#[tokio::test]
async fn a_name_with_a_digest_is_that_digest_or_nothing() {
    let world = World::new("digest");
    let own = manifest().digest;
    let other = digest(b"other");
    // the tag of such a name says nothing
    for rest in [format!("a/b@{own}"), format!("a/b:1@{own}")] {
        for head in [
            manifest_reply(),
            Reply::new(200).header("content-type", IMAGE).header("docker-content-digest", other.to_string()).body(MANIFEST),
        ] {
            let registry = Double::http(move |seen, _| if seen.method == "HEAD" { head.clone() } else { manifest_reply() }).await;
            let client = world.plain(&registry, &rest).await;
            assert_eq!(client.resolve().await.expect("resolved").digest, own);
            assert!(registry.seen().iter().all(|seen| seen.target == format!("/v2/a/b/manifests/{own}")));
        }
    }
    let registry = Double::http(|seen, _| if seen.method == "HEAD" { Reply::new(404) } else { manifest_reply() }).await;
    let client = world.plain(&registry, &format!("a/b@{other}")).await;
    let error = refused(client.resolve().await);
    assert!(error.contains(&format!("sends {own} instead of {other}")), "{error}");
    let long = format!("sha512:{}", "0".repeat(128));
    let client = world.plain(&registry, &format!("a/b@{long}")).await;
    assert!(refused(client.resolve().await).contains("instead of sha512:0"));
}

#[tokio::test]
async fn a_missing_name_is_not_found_and_says_what_the_registry_says() {
    let world = World::new("missing");
    let registry = Double::http(|_, _| Reply::new(404).body(r#"{"errors":[{"code":"MANIFEST_UNKNOWN","message":"no such tag"}]}"#)).await;
    let client = world.plain(&registry, "a/b:x").await;
    let error = client.resolve().await.expect_err("not found");
    assert_eq!(error.code(), tonic::Code::NotFound);
    let host = format!("r.example:{}", registry.port());
    assert_eq!(error.to_string(), format!("resolve {host}/a/b:x: {host}: 404 not found (MANIFEST_UNKNOWN: no such tag)"));
    assert_eq!(registry.seen().len(), 2);
}

#[tokio::test]
async fn a_rate_limit_is_waited_for_and_costs_no_get() {
    let world = World::new("limit");
    for after in ["0", "Sun, 06 Nov 1994 08:49:37 GMT", "880µs", "soon", ""] {
        let registry = Double::http(move |_, nth| match nth {
            0 if after.is_empty() => Reply::new(429),
            0 => Reply::new(429).header("retry-after", after),
            _ => manifest_reply(),
        })
        .await;
        let client = world.plain(&registry, "a/b").await;
        assert_eq!(client.resolve().await.expect("resolved"), manifest(), "{after}");
        assert_eq!((registry.count("HEAD", TARGET), registry.seen().len()), (2, 2), "{after}");
    }
}

#[tokio::test]
async fn what_is_no_manifest_is_refused() {
    let world = World::new("strange");
    for (media_type, body, why) in [
        (IMAGE, r#"{"layers":[],"manifests":[]}"#.to_owned(), "both"),
        (MANIFESTS[0], MANIFEST.to_owned(), "calls itself"),
        ("text/html", "<html>".to_owned(), "no document"),
        ("application/vnd.docker.distribution.manifest.v1+prettyjws", "{}".to_owned(), "schema 1"),
        (IMAGE, " ".repeat(9 << 20), "more than 8388608 bytes"),
    ] {
        let registry = Double::http(move |seen, _| {
            if seen.method == "HEAD" { Reply::new(404) } else { Reply::new(200).header("content-type", media_type).body(body.clone()) }
        })
        .await;
        let client = world.plain(&registry, "a/b").await;
        let error = refused(client.resolve().await);
        assert!(error.contains(why), "{error}");
    }
}

#[tokio::test]
async fn a_document_is_that_of_its_descriptor_or_nothing() {
    let world = World::new("document");
    let config = Descriptor::new("application/vnd.oci.image.config.v1+json", digest(b"{}"), 2);
    let registry =
        Double::http(|seen, _| if seen.target.contains("/blobs/") { Reply::new(200).body("{}") } else { Reply::new(200).body(MANIFEST) })
            .await;
    let client = world.plain(&registry, "a/b").await;
    assert_eq!(client.fetch_document(&config).await.expect("a document"), "{}");
    assert_eq!(registry.seen()[0].target, format!("/v2/a/b/blobs/{}", config.digest));
    assert_eq!(client.fetch_document(&manifest()).await.expect("a document"), MANIFEST);
    let wrong = |media_type: &str, digest: &Digest, size| Descriptor::new(media_type, digest.clone(), size);
    for (descriptor, why) in [
        (wrong(&config.media_type, &digest(b"[]"), 2), "instead of"),
        (wrong(&config.media_type, &config.digest, 3), "2 bytes instead of 3"),
        (wrong(&config.media_type, &config.digest, 1), "more than 1 bytes"),
        (wrong(&config.media_type, &config.digest, 9 << 20), "more than the 8388608"),
        (wrong(MANIFESTS[0], &manifest().digest, manifest().size), "calls itself"),
    ] {
        let error = refused(client.fetch_document(&descriptor).await);
        assert!(error.contains(why), "{error}");
    }
}

#[tokio::test]
async fn a_mirror_with_a_wrong_document_is_passed_over() {
    let world = World::new("wrong-mirror");
    let origin = Double::http(|_, _| manifest_reply()).await;
    let mirror = Double::http(|_, _| Reply::new(200).body("x".repeat(MANIFEST.len()))).await;
    world.configure(&format!("r.example:{}", origin.port()), &format!("[host.\"http://m.example:{}\"]", mirror.port()));
    let client = world.plain(&origin, "a/b").await;
    assert_eq!(client.fetch_document(&manifest()).await.expect("a document"), MANIFEST);
    assert_eq!((mirror.seen().len(), origin.seen().len()), (1, 1));
}

#[tokio::test]
async fn images_of_docker_hub_itself_are_in_its_library() {
    let world = World::new("library");
    let mirror = Double::http(|_, _| manifest_reply()).await;
    world.configure("docker.io", &format!("server = \"http://m.example:{}\"", mirror.port()));
    for (name, path) in [("docker.io/busybox", "/v2/library/busybox/manifests/latest"), ("docker.io/a/b", TARGET)] {
        let client = Registry::new(Reference::parse(name).expect("a name"), world.options()).await.expect("a registry");
        client.resolve().await.expect("resolved");
        let seen = mirror.seen().pop().expect("a request");
        assert!(seen.is("HEAD", path) && seen.query("ns") == ["docker.io"], "{seen:?}");
    }
}
