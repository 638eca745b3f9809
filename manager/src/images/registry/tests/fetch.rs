//! Rows 6, 17–23: blobs.

use super::*;

/// Where in its content a request wants to begin.
fn start(seen: &Seen) -> Option<usize> {
    seen.header("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok())
}

/// What a good server answers.
fn served(seen: &Seen, content: &[u8]) -> Reply {
    match start(seen) {
        None => Reply::new(200).body(content),
        Some(start) => {
            let range = format!("bytes {start}-{}/{}", content.len() - 1, content.len());
            Reply::new(206).header("content-range", range).body(&content[start..])
        }
    }
}

#[tokio::test]
async fn a_blob_that_is_cut_anywhere_resumes_without_a_byte_twice() {
    let world = World::new("cut");
    let content = bytes(300_000);
    for cut in [0, 1, 150_000, 299_999] {
        let body = content.clone();
        let registry = Double::http(move |seen, nth| {
            let reply = served(seen, &body);
            match nth {
                0 => reply.cut(cut),
                1 => reply.reset(1),
                _ => reply,
            }
        })
        .await;
        let client = world.plain(&registry, "a/b").await;
        assert_eq!(fetched(&client, &layer(&content)).await, content, "{cut}");
        let starts: Vec<Option<usize>> = registry.seen().iter().map(start).collect();
        // a reset may take bytes with it that were sent already
        assert_eq!((starts[0], starts[1]), (None, Some(cut).filter(|cut| *cut > 0)), "{starts:?}");
        assert!(starts.len() <= 3 && starts.get(2).is_none_or(|third| *third <= Some(cut + 1)), "{starts:?}");
    }
}

#[tokio::test]
async fn a_fetch_from_an_offset_has_the_rest_only() {
    let world = World::new("offset");
    let content = bytes(10_000);
    let body = content.clone();
    let registry = Double::http(move |seen, _| served(seen, &body)).await;
    let client = world.plain(&registry, "a/b").await;
    for offset in [0, 1, 9_999, 10_000] {
        let mut blob = client.fetch(&layer(&content), offset).await.expect("a blob");
        assert_eq!(blob.left(), 10_000 - offset);
        let (all, end) = read(&mut blob).await;
        end.expect("the end");
        assert_eq!(all, content[usize::try_from(offset).expect("small")..]);
        assert_eq!(blob.next().await.expect("still the end"), None);
    }
    assert_eq!(registry.seen().len(), 3, "nothing is asked for where nothing is left");
}

#[tokio::test]
async fn a_range_that_is_not_the_one_asked_for_is_not_believed() {
    let world = World::new("range");
    let content = bytes(20_000);
    type Answer = fn(&[u8], usize) -> Reply;
    let wrong: [(&str, Answer); 7] = [
        ("200", |content, _| Reply::new(200).body(content)),
        ("200, chunked", |content, _| Reply::new(200).body(content).chunked()),
        ("206 without a range", |content, _| Reply::new(206).body(content)),
        ("206 from the start", |content, _| {
            Reply::new(206).header("content-range", format!("bytes 0-{}/{}", content.len() - 1, content.len())).body(content)
        }),
        ("206 of another size", |content, start| {
            Reply::new(206)
                .header("content-range", format!("bytes {start}-{}/{}", content.len(), content.len() + 1))
                .body(&content[start..])
        }),
        ("416", |_, _| Reply::new(416)),
        ("206 in two parts", |content, start| {
            let end = (start + 1000).min(content.len());
            Reply::new(206).header("content-range", format!("bytes {start}-{}/{}", end - 1, content.len())).body(&content[start..end])
        }),
    ];
    for (name, answer) in wrong {
        let body = content.clone();
        let registry = Double::http(move |seen, nth| match start(seen) {
            Some(start) => answer(&body, start),
            None if nth == 0 => Reply::new(200).body(body.clone()).cut(7_000),
            None => Reply::new(200).body(body.clone()),
        })
        .await;
        let client = world.plain(&registry, "a/b").await;
        assert_eq!(fetched(&client, &layer(&content)).await, content, "{name}");
    }
}

#[tokio::test]
async fn no_more_bytes_are_taken_than_the_descriptor_has() {
    let world = World::new("length");
    let content = bytes(5_000);
    for (reply, why) in [
        (Reply::new(200).body(bytes(6_000)), Some("6000 bytes instead of 5000")),
        (Reply::new(200).body(bytes(4_000)), Some("4000 bytes instead of 5000")),
        (Reply::new(200), Some("0 bytes instead of 5000")),
        (Reply::new(200).body(bytes(6_000)).chunked(), None),
        (Reply::new(200).body(content.clone()).header("content-encoding", "gzip"), Some("compresses")),
    ] {
        let registry = Double::http(move |_, _| reply.clone()).await;
        let client = world.plain(&registry, "a/b").await;
        match why {
            Some(why) => {
                let error = refused(client.fetch(&layer(&content), 0).await);
                assert!(error.contains(why), "{error}");
            }
            None => assert_eq!(fetched(&client, &layer(&content)).await, content),
        }
    }
}

#[tokio::test]
async fn a_blob_that_ends_early_for_ever_fails_after_a_few_attempts() {
    let world = World::new("early");
    let content = bytes(5_000);
    let body = content.clone();
    let registry = Double::http(move |seen, _| served(seen, &body[..2_000.max(start(seen).unwrap_or(0))]).chunked()).await;
    let client = world.plain(&registry, "a/b").await;
    let mut blob = client.fetch(&layer(&content), 0).await.expect("a blob");
    let (all, end) = read(&mut blob).await;
    let error = refused(end);
    assert_eq!(all, content[..2_000]);
    assert!(error.contains("ended at 2000 of 5000 bytes") && error.contains(&format!("r.example:{}", registry.port())), "{error}");
    assert!(registry.seen().len() < 20, "{}", registry.seen().len());
}

#[tokio::test]
async fn a_blob_with_other_bytes_is_fetched_elsewhere_the_second_time() {
    let world = World::new("distrust");
    let content = bytes(5_000);
    let (body, bad) = (content.clone(), vec![0; 5_000]);
    let origin = Double::http(move |_, _| Reply::new(200).body(body.clone())).await;
    let mirror = Double::http(move |_, _| Reply::new(200).body(bad.clone())).await;
    world.configure(&format!("r.example:{}", origin.port()), &format!("[host.\"http://m.example:{}\"]", mirror.port()));
    let client = world.plain(&origin, "a/b").await;
    let mut blob = client.fetch(&layer(&content), 0).await.expect("a blob");
    assert_ne!(read(&mut blob).await.0, content);
    blob.distrust();
    assert_eq!(fetched(&client, &layer(&content)).await, content);
    assert_eq!((mirror.seen().len(), origin.seen().len()), (1, 1));
}

#[tokio::test]
async fn a_silent_connection_is_given_up_and_resumed() {
    let world = World::new("silent");
    let content = bytes(50_000);
    let body = content.clone();
    let registry = Double::http(move |seen, nth| match nth {
        0 => Reply::nothing(),
        1 => served(seen, &body).silent(10_000),
        _ => served(seen, &body),
    })
    .await;
    let mut options = Options { plain_http: Some(true), ..world.options() };
    // longer than a busy machine leaves the server waiting: one that is late would be asked again
    options.limits.idle = Duration::from_secs(2);
    options.limits.head = Duration::from_secs(2);
    let client = world.with(&registry, "a/b", options).await;
    assert_eq!(fetched(&client, &layer(&content)).await, content);
    let starts: Vec<Option<usize>> = registry.seen().iter().map(start).collect();
    assert_eq!(starts, [None, None, Some(10_000)]);
}

#[tokio::test]
async fn a_trickle_ends_at_the_total_limit_and_a_reader_that_waits_does_not() {
    let world = World::new("trickle");
    let content = bytes(3_000_000);
    let (slow, body) = (bytes(1_000), content.clone());
    let registry = Double::http(move |seen, _| {
        if seen.target.contains("sha256") && seen.header("x").is_none() { Reply::new(200).body(body.clone()) } else { Reply::new(200) }
    })
    .await;
    let trickling = Double::http(move |_, _| Reply::new(200).body(slow.clone()).trickle()).await;
    let mut options = Options { plain_http: Some(true), ..world.options() };
    options.limits.total = Duration::from_millis(200);
    let client = world.with(&trickling, "a/b", options.clone()).await;
    let mut blob = client.fetch(&layer(&bytes(1_000)), 0).await.expect("a blob");
    let error = refused(read(&mut blob).await.1);
    assert!(error.contains("less than 10240 bytes per second"), "{error}");

    options.limits.idle = Duration::from_secs(2);
    let client = world.with(&registry, "a/b", options).await;
    let mut blob = client.fetch(&layer(&content), 0).await.expect("a blob");
    let first = blob.next().await.expect("bytes").expect("bytes");
    // longer than both limits
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let (rest, end) = read(&mut blob).await;
    end.expect("the end");
    assert_eq!([first.to_vec(), rest].concat(), content);
    assert_eq!(registry.seen().len(), 1);
}

async fn ends_at_the_total_limit(world: &World, registry: &Double, content: &[u8]) {
    let mut options = Options { plain_http: Some(true), ..world.options() };
    options.limits.total = Duration::from_millis(200);
    let client = world.with(registry, "a/b", options).await;
    let mut blob = client.fetch(&layer(content), 0).await.expect("a blob");
    let error = refused(read(&mut blob).await.1);
    assert!(error.contains("less than 10240 bytes per second"), "{error}");
}

#[tokio::test]
async fn a_server_that_breaks_off_after_each_byte_ends_at_the_total_limit_too() {
    let world = World::new("bytewise");
    let content = bytes(2_000);
    let body = content.clone();
    let registry = Double::http(move |seen, _| served(seen, &body).cut(1)).await;
    ends_at_the_total_limit(&world, &registry, &content).await;
}

#[tokio::test]
async fn a_server_that_sends_everything_again_for_each_byte_ends_at_the_total_limit_too() {
    let world = World::new("again");
    let content = bytes(7_000);
    let body = content.clone();
    let registry = Double::http(move |_, nth| Reply::new(200).body(body.clone()).cut((5_000 + nth).min(7_000))).await;
    ends_at_the_total_limit(&world, &registry, &content).await;
}

#[tokio::test]
async fn sixteen_blobs_arrive_while_one_is_held() {
    let world = World::new("parts");
    let content = bytes(20_000);
    let body = content.clone();
    let registry = Double::http(move |seen, _| served(seen, &body)).await;
    let client = world.plain(&registry, "a/b").await;
    let mut held = client.fetch(&layer(&content), 0).await.expect("a blob");
    let mut others = tokio::task::JoinSet::new();
    for _ in 0..15 {
        let (client, content) = (client.clone(), content.clone());
        others.spawn(async move { fetched(&client, &layer(&content)).await });
    }
    while let Some(fetched) = others.join_next().await {
        assert_eq!(fetched.expect("no panic"), content);
    }
    assert_eq!(read(&mut held).await.0, content);
}

#[tokio::test]
async fn a_signed_url_is_asked_of_the_registry_again_when_a_blob_resumes() {
    let world = World::new("signed");
    let content = bytes(30_000);
    let body = content.clone();
    let store = Double::http(move |seen, nth| match seen.target.as_str() {
        target if target == format!("/{nth}") => {
            if nth == 0 {
                served(seen, &body).cut(1_000)
            } else {
                served(seen, &body)
            }
        }
        _ => Reply::new(400),
    })
    .await;
    let port = store.port();
    let registry = Double::http(move |_, nth| Reply::redirect(format!("http://b.example:{port}/{nth}"))).await;
    let client = world.plain(&registry, "a/b").await;
    assert_eq!(fetched(&client, &layer(&content)).await, content);
    assert_eq!((registry.seen().len(), store.seen().len()), (2, 2));
    assert_eq!(start(&store.seen()[1]), Some(1_000), "the range goes along");
}

#[tokio::test]
async fn a_broken_mirror_is_left_in_the_middle_of_a_blob() {
    let world = World::new("left");
    let content = bytes(30_000);
    let (body, first) = (content.clone(), content.clone());
    let origin = Double::http(move |seen, _| served(seen, &body)).await;
    let mirror = Double::http(move |seen, nth| if nth == 0 { served(seen, &first).cut(1_000) } else { Reply::new(500) }).await;
    world.configure(&format!("r.example:{}", origin.port()), &format!("[host.\"http://m.example:{}\"]", mirror.port()));
    let client = world.plain(&origin, "a/b").await;
    assert_eq!(fetched(&client, &layer(&content)).await, content);
    assert_eq!((mirror.seen().len(), origin.seen().len(), start(&origin.seen()[0])), (2, 1, Some(1_000)));
}

#[tokio::test]
async fn a_blob_resumes_where_it_was_found_also_when_that_host_is_busy_for_a_while() {
    let world = World::new("found");
    let content = bytes(30_000);
    let body = content.clone();
    let mirror = Double::http(|_, _| Reply::new(404)).await;
    let origin = Double::http(move |seen, nth| match nth {
        0 => served(seen, &body).cut(1_000),
        1..4 => Reply::new(503),
        _ => served(seen, &body),
    })
    .await;
    world.configure(&format!("r.example:{}", origin.port()), &format!("[host.\"http://m.example:{}\"]", mirror.port()));
    let client = world.plain(&origin, "a/b").await;
    assert_eq!(fetched(&client, &layer(&content)).await, content);
    // once at first, and once when the origin did not answer
    assert_eq!((mirror.seen().len(), origin.seen().len()), (2, 5));
}

#[tokio::test]
async fn the_url_of_a_layer_gets_no_credential_and_is_asked_only_if_the_registry_lacks_the_layer() {
    let world = World::new("urls");
    let content = bytes(1_000);
    for (challenge, is_there) in [
        (Reply::basic(), false),
        (Reply::bearer("realm=\"http://b.example:1/\""), false),
        (Reply::new(200).body(content.clone()), false),
        (Reply::nothing(), true),
    ] {
        let reply = challenge.clone();
        let other = Double::http(move |_, _| reply.clone()).await;
        let body = content.clone();
        let registry = Double::http(move |seen, _| match (seen.header("authorization"), is_there) {
            (None, _) => Reply::basic(),
            (_, true) => Reply::new(200).body(body.clone()),
            (_, false) => Reply::new(404),
        })
        .await;
        let hosts = [format!("r.example:{}", registry.port()), format!("b.example:{}", other.port())];
        let known = Known::password(&[&hosts[0], &hosts[1]]);
        let client = world.with(&registry, "a/b", Options { plain_http: Some(true), credentials: Some(known), ..world.options() }).await;
        let mut content_with_url = layer(&content);
        content_with_url.urls = vec!["no url".to_owned(), format!("http://b.example:{}/layer?x=y", other.port())];
        let result = client.fetch(&content_with_url, 0).await;
        assert!(other.seen().iter().all(|seen| seen.header("authorization").is_none()), "{:?}", other.seen());
        if is_there {
            assert_eq!((read(&mut result.expect("a blob")).await.0, other.seen().len()), (content.clone(), 0));
        } else if let Ok(mut blob) = result {
            assert_eq!(read(&mut blob).await.0, content);
            assert_eq!(other.seen()[0].target, "/layer?x=y");
        } else {
            let error = refused(result);
            assert!(error.contains("404") && error.contains(&hosts[1]) && other.seen().len() == 1, "{error}");
        }
    }
}

#[tokio::test]
async fn a_busy_registry_is_asked_again_as_often_as_is_worth_it() {
    let world = World::new("busy");
    let content = bytes(1_000);
    for (status, requests, succeeds) in
        [(429, 3, true), (500, 3, true), (503, 3, true), (408, 3, true), (404, 1, false), (403, 1, false), (501, 1, false), (400, 1, false)]
    {
        let body = content.clone();
        let registry =
            Double::http(move |seen, nth| if nth < 2 { Reply::new(status).header("retry-after", "0") } else { served(seen, &body) }).await;
        let client = world.plain(&registry, "a/b").await;
        let blob = client.fetch(&layer(&content), 0).await;
        assert_eq!((blob.is_ok(), registry.seen().len()), (succeeds, requests), "{status}");
    }
    let registry = Double::http(|_, _| Reply::new(503).body(r#"{"errors":[{"code":"UNAVAILABLE","message":"later"}]}"#)).await;
    let client = world.plain(&registry, "a/b").await;
    let error = refused(client.fetch(&layer(&content), 0).await);
    assert!(error.contains("503 service unavailable (UNAVAILABLE: later) (5 times)"), "{error}");
    assert_eq!(registry.seen().len(), 5);
}

#[tokio::test]
async fn blobs_one_after_the_other_share_a_connection() {
    let world = World::new("shared");
    let content = bytes(100_000);
    let body = content.clone();
    let registry = Double::http(move |seen, _| if seen.method == "HEAD" { manifest_reply() } else { served(seen, &body) }).await;
    let client = world.plain(&registry, "a/b").await;
    client.resolve().await.expect("resolved");
    for _ in 0..4 {
        assert_eq!(fetched(&client, &layer(&content)).await, content);
    }
    assert_eq!(registry.connections(), 1);
}

#[tokio::test]
async fn a_challenge_and_a_redirect_cost_no_connection() {
    let world = World::new("kept");
    let content = bytes(1_000);
    let body = content.clone();
    let store = Double::http(move |_, _| Reply::new(200).body(body.clone())).await;
    let port = store.port();
    let registry = Double::http(move |seen, _| match seen.header("authorization") {
        None => Reply::basic().body(r#"{"errors":[{"code":"UNAUTHORIZED"}]}"#),
        Some(_) => Reply::redirect(format!("http://b.example:{port}/x")).body("<a href=\"x\">Temporary Redirect</a>").chunked(),
    })
    .await;
    let known = Known::password(&[&format!("r.example:{}", registry.port())]);
    let client = world.with(&registry, "a/b", Options { plain_http: Some(true), credentials: Some(known), ..world.options() }).await;
    for _ in 0..4 {
        assert_eq!(fetched(&client, &layer(&content)).await, content);
    }
    assert_eq!((registry.seen().len(), registry.connections(), store.connections()), (5, 1, 1));
}

#[tokio::test]
async fn a_kept_connection_that_the_registry_has_closed_costs_no_attempt() {
    let world = World::new("closed");
    let content = bytes(1_000);
    let body = content.clone();
    let registry = Double::http(move |seen, nth| match nth {
        1 => Reply::closed(),
        _ => served(seen, &body),
    })
    .await;
    let mut options = Options { plain_http: Some(true), ..world.options() };
    options.limits.attempts = 1;
    let client = world.with(&registry, "a/b", options).await;
    for _ in 0..2 {
        assert_eq!(fetched(&client, &layer(&content)).await, content);
    }
    assert_eq!(registry.seen().len(), 3);
}
