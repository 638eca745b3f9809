//! Rows 10–12 and 14: mirrors.

use super::*;

const TARGET: &str = "/v2/a/b/manifests/latest";

#[tokio::test]
async fn whatever_a_mirror_does_the_server_is_asked_next_and_an_error_names_both() {
    let world = World::new("fallback");
    for (name, reply) in [
        ("404", Reply::new(404)),
        ("401", Reply::new(401)),
        ("403", Reply::new(403)),
        ("429", Reply::new(429).header("retry-after", "3600")),
        ("500", Reply::new(500)),
        ("garbage", Reply::new(200).body("<html>")),
        ("hang", Reply::nothing()),
        ("closed", Reply::closed()),
    ] {
        let mirror = Double::http(move |_, _| reply.clone()).await;
        let good = Double::http(|_, _| manifest_reply()).await;
        let bad = Double::http(|_, _| Reply::new(404)).await;
        for (server, succeeds) in [(&good, true), (&bad, false)] {
            for has_server in [true, false] {
                let line = if has_server { format!("server = \"http://n.example:{}\"\n", server.port()) } else { String::new() };
                let registry = format!("r.example:{}", server.port());
                world.configure(&registry, &format!("{line}[host.\"http://m.example:{}\"]\n", mirror.port()));
                let mut options = Options { plain_http: Some(true), ..world.options() };
                if name == "hang" {
                    options.limits.head = Duration::from_secs(1);
                }
                let client = world.with(server, "a/b", options).await;
                match client.resolve().await {
                    Ok(found) => assert_eq!((found, succeeds), (manifest(), true), "{name}"),
                    Err(error) => {
                        assert!(!succeeds, "{name}: {error}");
                        let text = error.to_string();
                        let own = if has_server { "n" } else { "r" };
                        for host in [format!("m.example:{}: ", mirror.port()), format!("{own}.example:{}: 404", server.port())] {
                            assert!(text.contains(&host), "{name}: {text}");
                        }
                    }
                }
            }
        }
        assert!(mirror.seen().len() <= 8, "{name}: each pull asks a mirror once, by HEAD and GET");
    }
}

#[tokio::test]
async fn a_mirror_that_cannot_be_reached_is_named_with_the_reason() {
    let world = World::new("unreachable");
    let server = Double::http(|_, _| manifest_reply()).await;
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address").port();
    let registry = format!("r.example:{}", server.port());
    let missing = Double::http(|_, _| Reply::new(404)).await;
    let gone = format!("r.example:{}", missing.port());
    for (mirror, why) in [
        (format!("http://m.example:{free}"), "connection refused"),
        ("http://nowhere.example".to_owned(), "look up nowhere.example"),
        (format!("https://m.example:{}", server.port()), "TLS: "),
    ] {
        let text = format!("[host.\"{mirror}\"]");
        world.configure(&registry, &text).configure(&gone, &text);
        world.plain(&server, "a/b").await.resolve().await.unwrap_or_else(|error| panic!("{mirror}: {error}"));
        let error = refused(world.plain(&missing, "a/b").await.resolve().await);
        assert!(error.contains(why) && error.contains(&format!("{gone}: 404")), "{error}");
    }
}

#[tokio::test]
async fn a_mirror_that_never_answers_is_waited_for_once() {
    let world = World::new("dead");
    let content = bytes(1_000);
    let body = content.clone();
    let silent = Double::http(|_, _| Reply::nothing()).await;
    let server = Double::http(move |_, _| Reply::new(200).body(body.clone())).await;
    world.configure(&format!("r.example:{}", server.port()), &format!("[host.\"http://m.example:{}\"]", silent.port()));
    let mut options = Options { plain_http: Some(true), ..world.options() };
    options.limits.head = Duration::from_secs(2);
    let client = world.with(&server, "a/b", options).await;
    for _layer in 0..3 {
        assert_eq!(fetched(&client, &layer(&content)).await, content);
    }
    assert_eq!((silent.seen().len(), server.seen().len()), (1, 3));
}

#[tokio::test]
async fn a_callers_credential_in_a_header_is_for_the_registry_only() {
    let world = World::new("caller");
    let mirror = Double::http(|_, _| Reply::new(404)).await;
    let server = Double::http(|_, _| manifest_reply()).await;
    world.configure(&format!("r.example:{}", server.port()), &format!("[host.\"http://m.example:{}\"]", mirror.port()));
    let headers = vec![("Authorization".to_owned(), "Bearer x".to_owned()), ("x-other".to_owned(), "y".to_owned())];
    let client = world.with(&server, "a/b", Options { plain_http: Some(true), headers, ..world.options() }).await;
    client.resolve().await.expect("resolved");
    let sent = |double: &Double| {
        double.seen().iter().map(|seen| (seen.header("authorization").is_some(), seen.header("x-other").is_some())).collect::<Vec<_>>()
    };
    assert_eq!((sent(&mirror), sent(&server)), (vec![(false, true); 2], vec![(true, true)]));
}

#[tokio::test]
async fn a_registry_that_was_never_reached_is_given_up_sooner() {
    let world = World::new("never");
    let free = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address").port();
    let reference = Reference::parse(&format!("r.example:{free}/a/b")).expect("a reference");
    let client = Registry::new(reference, Options { plain_http: Some(true), ..world.options() }).await.expect("a registry");
    let error = client.resolve().await.expect_err("refused");
    assert_eq!(error.code(), tonic::Code::Unavailable);
    assert!(error.to_string().contains(&format!("connect to 127.0.0.1:{free}: connection refused (3 times)")), "{error}");
}

#[tokio::test]
async fn mirrors_are_told_whose_they_are_and_the_registry_is_not() {
    let world = World::new("namespace");
    let content = bytes(100);
    let origin = Double::http(|_, _| Reply::new(404)).await;
    let mirror = Double::http(|_, _| Reply::new(404)).await;
    let registry = format!("r.example:{}", origin.port());
    world.configure(
        &registry,
        &format!("[host.\"http://m.example:{}\"]\n[host.\"http://{registry}\"]\ncapabilities = [\"pull\"]\n", mirror.port()),
    );
    let client = world.plain(&origin, "a/b").await;
    client.resolve().await.expect_err("not found");
    client.fetch(&layer(&content), 0).await.expect_err("not found");
    client.fetch_document(&manifest()).await.expect_err("not found");
    assert_eq!(mirror.seen().len(), 4);
    assert!(mirror.seen().iter().all(|seen| seen.query("ns") == [registry.as_str()]), "{:?}", mirror.seen());
    assert!(origin.seen().len() >= 4 && origin.seen().iter().all(|seen| !seen.target.contains('?')), "{:?}", origin.seen());
}

#[tokio::test]
async fn a_host_is_asked_only_what_it_is_capable_of() {
    let world = World::new("capable");
    let content = bytes(100);
    let body = content.clone();
    let doubles = [
        Double::http(|_, _| manifest_reply()).await,
        Double::http(move |_, _| Reply::new(200).body(body.clone())).await,
        Double::http(|seen, _| Reply::new(if seen.method == "HEAD" { 404 } else { 201 })).await,
    ];
    let [resolves, pulls, pushes] = &doubles;
    let registry = "r.example:1";
    world.configure(
        registry,
        &format!(
            "capabilities = [\"push\"]\nserver = \"http://o.example:{}\"\n[host.\"http://m.example:{}\"]\ncapabilities = [\"resolve\"]\n[host.\"http://n.example:{}\"]\ncapabilities = [\"pull\"]\n",
            pushes.port(),
            resolves.port(),
            pulls.port()
        ),
    );
    let client = Registry::new(Reference::parse(&format!("{registry}/a/b")).expect("a name"), world.options()).await.expect("a registry");
    assert_eq!(client.resolve().await.expect("resolved"), manifest());
    assert_eq!(fetched(&client, &layer(&content)).await, content);
    client.push_manifest(&manifest(), Bytes::from_static(MANIFEST.as_bytes()), None).await.expect("pushed");
    assert_eq!(doubles.each_ref().map(|double| double.seen().len()), [1, 1, 2]);
    world.configure(registry, "capabilities = [\"push\"]\n");
    let client = Registry::new(Reference::parse(&format!("{registry}/a/b")).expect("a name"), world.options()).await.expect("a registry");
    assert!(refused(client.resolve().await).contains("no host of the configuration has the capability"));
}

#[tokio::test]
async fn paths_and_headers_are_as_the_file_has_them() {
    let world = World::new("paths");
    let double = Double::http(|_, _| manifest_reply()).await;
    let port = double.port();
    for (text, path) in [
        (format!("server = \"http://m.example:{port}\""), TARGET),
        (format!("server = \"http://m.example:{port}/\""), TARGET),
        (format!("server = \"http://m.example:{port}/v2/\""), TARGET),
        (format!("server = \"http://m.example:{port}/v2\""), TARGET),
        (format!("server = \"http://m.example:{port}/mirror\""), "/mirror/v2/a/b/manifests/latest"),
        (format!("server = \"http://m.example:{port}/v2/mirror/\"\noverride_path = true"), "/v2/mirror/a/b/manifests/latest"),
        (format!("[host.\"http://m.example:{port}/x//y\"]"), "/x/y/v2/a/b/manifests/latest"),
    ] {
        world.configure("r.example:1", &format!("{text}\n[host.\"http://127.0.0.1:9\"]\ncapabilities = [\"push\"]\n"));
        let options = Options { headers: vec![("x-caller".to_owned(), "2".to_owned())], ..world.options() };
        let client = Registry::new(Reference::parse("r.example:1/a/b").expect("a name"), options).await.expect("a registry");
        client.resolve().await.unwrap_or_else(|error| panic!("{text}: {error}"));
        let seen = double.seen().pop().expect("a request");
        assert!(seen.is("HEAD", path) && seen.header("x-caller") == Some("2"), "{text}: {seen:?}");
    }
    world.configure("r.example:1", &format!("[host.\"http://m.example:{port}\".header]\nx-one = \"1\"\nx-many = [\"a\", \"b\"]\n"));
    let client = Registry::new(Reference::parse("r.example:1/a/b").expect("a name"), world.options()).await.expect("a registry");
    client.resolve().await.expect("resolved");
    let seen = double.seen().pop().expect("a request");
    assert_eq!((seen.header("x-one"), seen.headers.iter().filter(|(name, _)| name == "x-many").count()), (Some("1"), 2));
    world.configure("r.example:1", "[header]\n\"bad name\" = \"1\"\n");
    let broken = Registry::new(Reference::parse("r.example:1/a/b").expect("a name"), world.options()).await;
    assert!(refused(broken).contains("bad name"));
}
