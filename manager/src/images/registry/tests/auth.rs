//! Rows 1–5 and 9: tokens, and who sees credentials.

use super::*;

/// The target of all requests.
const TARGET: &str = "/v2/a/b/manifests/latest";

/// A registry that wants a token, and the requests for tokens of a token server.
async fn guarded(
    world: &World,
    challenge: impl Fn(u16) -> String + Send + Sync + 'static,
    token: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static,
) -> (Double, Double, Registry) {
    let tokens = Double::http(token).await;
    let port = tokens.port();
    let registry = Double::http(move |seen, _| match seen.header("authorization") {
        Some(value) if value.starts_with("Bearer good") => manifest_reply(),
        _ => Reply::bearer(&challenge(port)),
    })
    .await;
    let client = world.plain(&registry, "a/b").await;
    (registry, tokens, client)
}

fn realm(port: u16) -> String {
    format!("realm=\"http://t.example:{port}/token\",service=\"s\"")
}

#[tokio::test]
async fn a_challenge_without_a_scope_is_answered_with_pull_of_the_repository() {
    let world = World::new("scope");
    for scope in ["", ",scope=\"\"", ",scope=\"repository:a/b:pull\""] {
        let (_registry, tokens, client) =
            guarded(&world, move |port| format!("{}{scope}", realm(port)), |_, _| Reply::new(200).body(r#"{"token":"good"}"#)).await;
        assert_eq!(client.resolve().await.expect("resolved"), manifest());
        let seen = tokens.seen();
        assert_eq!(
            (seen.len(), seen[0].query("scope"), seen[0].query("service")),
            (1, vec!["repository:a/b:pull".to_owned()], vec!["s".to_owned()])
        );
        assert_eq!(seen[0].header("authorization"), None);
    }
}

#[tokio::test]
async fn several_scopes_are_requested_in_each_form_until_the_token_server_takes_one() {
    let world = World::new("scopes");
    for accepted in [2, 1, 0] {
        let (registry, tokens, client) = guarded(
            &world,
            |port| format!("{},scope=\"repository:proxy/a/b:pull\"", realm(port)),
            move |seen, _| {
                let scopes = seen.query("scope");
                let is_accepted = match accepted {
                    2 => scopes.len() == 2,
                    1 => scopes.len() == 1 && scopes[0].contains(' '),
                    _ => scopes == ["repository:a/b:pull"],
                };
                if is_accepted { Reply::new(200).body(r#"{"access_token":"good"}"#) } else { Reply::new(400) }
            },
        )
        .await;
        client.resolve().await.unwrap_or_else(|error| panic!("{accepted}: {error}"));
        let requests = tokens.seen().len();
        assert_eq!(requests, 3 - accepted);
        client.fetch_document(&manifest()).await.expect("fetched");
        assert_eq!((tokens.seen().len(), registry.seen().len()), (requests, 3), "the token is used again");
    }
}

#[tokio::test]
async fn a_token_that_ends_between_two_layers_is_requested_again() {
    let world = World::new("expiry");
    let tokens = Double::http(|_, nth| Reply::new(200).body(format!(r#"{{"token":"good-{nth}","expires_in":3600}}"#))).await;
    let port = tokens.port();
    let content = bytes(1000);
    let body = content.clone();
    // each token is good for one answer, whatever it says itself
    let used = Mutex::new(Vec::<String>::new());
    let registry = Double::http(move |seen, _| {
        let mut used = used.lock().expect("no panic");
        match seen.header("authorization") {
            Some(value) if value.starts_with("Bearer good-") && !used.contains(&value.to_owned()) => {
                used.push(value.to_owned());
                Reply::new(200).body(body.clone())
            }
            _ => Reply::bearer(&format!("{},error=\"invalid_token\"", realm(port))),
        }
    })
    .await;
    let client = world.plain(&registry, "a/b").await;
    for _layer in 0..4 {
        assert_eq!(fetched(&client, &layer(&content)).await, content);
    }
    assert_eq!((tokens.seen().len(), registry.seen().len()), (4, 8));
}

#[tokio::test]
async fn a_token_is_used_until_shortly_before_its_end_by_this_clock() {
    let world = World::new("lifetime");
    for (lifetime, requests) in [("0", 3), ("0.000001", 3), ("1e300", 1), ("60", 1)] {
        let (_registry, tokens, client) = guarded(&world, realm, move |_, _| {
            Reply::new(200).body(format!(r#"{{"token":"good","issued_at":"1999-01-01T00:00:00Z","expires_in":{lifetime}}}"#))
        })
        .await;
        for _ in 0..3 {
            client.resolve().await.unwrap_or_else(|error| panic!("{lifetime}: {error}"));
        }
        assert_eq!(tokens.seen().len(), requests, "{lifetime}");
    }
}

#[tokio::test]
async fn a_good_token_that_is_refused_once_is_replaced_and_refusals_for_ever_end_soon() {
    let world = World::new("lag");
    for (refusals, succeeds) in [(1, true), (usize::MAX, false)] {
        let tokens = Double::http(|_, _| Reply::new(200).body(r#"{"token":"good"}"#)).await;
        let (port, count) = (tokens.port(), Mutex::new(0));
        let registry = Double::http(move |seen, _| {
            let mut count = count.lock().expect("no panic");
            if seen.header("authorization").is_some() {
                if *count == refusals {
                    return manifest_reply();
                }
                *count += 1;
            }
            Reply::bearer(&realm(port)).body(r#"{"errors":[{"code":"UNAUTHORIZED","message":"too early"}]}"#)
        })
        .await;
        let client = world.plain(&registry, "a/b").await;
        let resolved = client.resolve().await;
        assert_eq!(resolved.is_ok(), succeeds, "{resolved:?}");
        assert!(registry.seen().len() < 5, "{}", registry.seen().len());
        if let Err(error) = resolved {
            assert_eq!(error.code(), tonic::Code::Unauthenticated);
            assert!(error.to_string().contains("401"), "{error}");
        }
    }
}

#[tokio::test]
async fn authorization_and_configured_headers_do_not_follow_a_redirect() {
    let world = World::new("redirect");
    let content = bytes(5000);
    let body = content.clone();
    let store = Double::http(move |seen, _| match (seen.header("authorization"), seen.header("x-secret"), seen.target.as_str()) {
        (None, None, "/1") => Reply::redirect("/2"),
        (None, None, "/2") => Reply::redirect("3?signature=x%2Fy"),
        (None, None, "/3?signature=x%2Fy") => Reply::new(200).body(body.clone()),
        _ => Reply::new(400),
    })
    .await;
    let port = store.port();
    let registry = Double::http(move |seen, _| match (seen.header("authorization"), seen.header("x-secret"), seen.target.as_str()) {
        (None, _, _) => Reply::basic(),
        (Some(_), Some("1"), "/elsewhere") => Reply::redirect(format!("http://b.example:{port}/1")),
        (Some(_), Some("1"), _) => Reply::redirect("/elsewhere"),
        _ => Reply::new(400),
    })
    .await;
    let options = Options {
        plain_http: Some(true),
        headers: vec![("x-secret".to_owned(), "1".to_owned())],
        credentials: Some(Known::password(&[&format!("r.example:{}", registry.port())])),
        ..world.options()
    };
    let client = world.with(&registry, "a/b", options).await;
    assert_eq!(fetched(&client, &layer(&content)).await, content);
    let hosts: Vec<String> = store.seen().iter().filter_map(|seen| seen.header("host").map(ToOwned::to_owned)).collect();
    assert_eq!(hosts, vec![format!("b.example:{port}"); 3]);
}

#[tokio::test]
async fn redirects_without_end_are_given_up() {
    let world = World::new("circle");
    let registry = Double::http(|_, nth| Reply::redirect(format!("/{nth}"))).await;
    let client = world.plain(&registry, "a/b").await;
    let error = refused(client.fetch_document(&manifest()).await);
    assert!(error.contains("redirects more than 10 times"), "{error}");
    assert_eq!(registry.seen().len(), 11);
}

#[tokio::test]
async fn each_host_gets_its_own_credential_only() {
    let world = World::new("mirror");
    let content = bytes(100);
    let body = content.clone();
    let origin = Double::http(
        move |seen, _| if seen.header("authorization").is_some() { Reply::new(200).body(body.clone()) } else { Reply::basic() },
    )
    .await;
    let mirror = Double::http(|seen, _| if seen.header("authorization").is_some() { Reply::new(404) } else { Reply::basic() }).await;
    let silent = Double::http(|_, _| Reply::basic()).await;
    let (own, other) = (format!("r.example:{}", origin.port()), format!("m.example:{}", mirror.port()));
    world.configure(&own, &format!("[host.\"http://{other}\"]\n[host.\"http://n.example:{}\"]\n", silent.port()));
    let known = Known::password(&[&own, &other]);
    let options = Options { plain_http: Some(true), credentials: Some(known.clone()), ..world.options() };
    let client = world.with(&origin, "a/b", options).await;
    assert_eq!(fetched(&client, &layer(&content)).await, content);
    let sent =
        |double: &Double| double.seen().iter().filter_map(|seen| seen.header("authorization").map(ToOwned::to_owned)).collect::<Vec<_>>();
    let basic = |user: &str| format!("Basic {}", text::base64(format!("user-of-{user}:p:w").as_bytes()));
    assert_eq!((sent(&origin), sent(&mirror)), (vec![basic("r.example")], vec![basic("m.example")]));
    assert!(sent(&silent).is_empty());
    assert_eq!(known.asked.lock().expect("no panic").len(), 3, "each host is asked about once");
}

#[tokio::test]
async fn a_password_is_exchanged_for_a_token_by_get_or_by_post() {
    let world = World::new("password");
    for takes_get in [true, false] {
        let (registry, tokens, _anonymous) = guarded(&world, realm, move |seen, _| {
            let body = String::from_utf8_lossy(&seen.body).into_owned();
            let basic = format!("Basic {}", text::base64(b"user-of-r.example:p:w"));
            match seen.method.as_str() {
                "GET" if takes_get && seen.header("authorization") == Some(&basic) => Reply::new(200).body(r#"{"token":"good"}"#),
                "POST"
                    if body.contains("grant_type=password&username=user-of-r.example&password=p:w")
                        && body.contains("scope=repository:a/b:pull") =>
                {
                    Reply::new(200).body(r#"{"access_token":"good"}"#)
                }
                "GET" => Reply::new(404),
                _ => Reply::new(401),
            }
        })
        .await;
        let known = Known::password(&[&format!("r.example:{}", registry.port())]);
        let client = world.with(&registry, "a/b", Options { plain_http: Some(true), credentials: Some(known), ..world.options() }).await;
        client.resolve().await.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(tokens.seen().len(), if takes_get { 1 } else { 2 });
    }
}

#[tokio::test]
async fn a_refresh_token_is_posted_and_its_successor_is_kept() {
    let world = World::new("refresh");
    let (registry, tokens, _anonymous) = guarded(&world, realm, |seen, nth| {
        let body = String::from_utf8_lossy(&seen.body).into_owned();
        let is_right = seen.method == "POST"
            && body.contains(&format!("grant_type=refresh_token&refresh_token=secret-{nth}"))
            && body.contains("client_id=x-manager");
        if !is_right {
            return Reply::new(401);
        }
        Reply::new(200).body(format!(r#"{{"access_token":"good","expires_in":0,"refresh_token":"secret-{}"}}"#, nth + 1))
    })
    .await;
    let known = Known::secret(format!("r.example:{}", registry.port()), Secret::RefreshToken("secret-0".to_owned()));
    let client = world.with(&registry, "a/b", Options { plain_http: Some(true), credentials: Some(known), ..world.options() }).await;
    for _ in 0..3 {
        client.resolve().await.unwrap_or_else(|error| panic!("{error}"));
    }
    assert_eq!(tokens.seen().len(), 3);
}

#[tokio::test]
async fn a_header_that_is_given_answers_any_challenge() {
    let world = World::new("header");
    let registry =
        Double::http(|seen, _| if seen.header("authorization") == Some("Custom x") { manifest_reply() } else { Reply::basic() }).await;
    let known = Known::secret(format!("r.example:{}", registry.port()), Secret::Header("Custom x".to_owned()));
    let client = world.with(&registry, "a/b", Options { plain_http: Some(true), credentials: Some(known), ..world.options() }).await;
    client.resolve().await.expect("resolved");
    assert_eq!(registry.count("HEAD", TARGET), 2);
}

#[tokio::test]
async fn a_token_server_that_fails_is_named_and_its_answer_is_bounded() {
    let world = World::new("realm");
    for (reply, why) in [
        (Reply::new(403).body(r#"{"errors":[{"message":"go away"}]}"#), "403 forbidden (go away)"),
        (Reply::new(200).body("{}"), "without a token"),
        (Reply::new(200).body("secret"), "no JSON"),
        (Reply::new(200).body(vec![b' '; 70_000]), "longer than 65536"),
        (Reply::redirect("/token"), "redirects more than 5"),
        (Reply::new(503), "503"),
    ] {
        let (registry, tokens, client) = guarded(&world, realm, move |_, _| reply.clone()).await;
        let error = refused(client.resolve().await);
        assert!(error.contains(&format!("http://t.example:{}/token", tokens.port())) && error.contains(why), "{error}");
        assert!(!error.contains("secret"), "{error}");
        assert!(registry.seen().len() <= 5 && tokens.seen().len() <= 5, "{} {}", registry.seen().len(), tokens.seen().len());
    }
    let (_registry, _tokens, client) = guarded(&world, |_| "realm=\"ftp://x/\"".to_owned(), |_, _| Reply::new(200)).await;
    assert!(refused(client.resolve().await).contains("realm"));
    let (_registry, _tokens, client) = guarded(&world, |_| "scope=\"x\"".to_owned(), |_, _| Reply::new(200)).await;
    assert!(refused(client.resolve().await).contains("no way to authenticate"));
}

#[test]
fn secrets_are_not_in_what_is_printed_for_debugging() {
    let options = Options { headers: vec![("x".to_owned(), "secret".to_owned())], ..Options::default() };
    let all = [
        format!("{options:?}"),
        format!("{:?}", Secret::Password { user: "secret".to_owned(), password: "secret".to_owned() }),
        format!("{:?}", Secret::RefreshToken("secret".to_owned())),
        format!("{:?}", Secret::Header("secret".to_owned())),
    ];
    assert!(!all.concat().contains("secret"), "{all:?}");
}

/// A user who takes a while to answer.
struct Asked(Duration);

#[async_trait]
impl Credentials for Asked {
    async fn of(&self, _challenge: &Challenge<'_>) -> crate::error::Result<Option<Secret>> {
        tokio::time::sleep(self.0).await;
        Ok(Some(Secret::Password { user: "u".to_owned(), password: "p".to_owned() }))
    }
}

#[tokio::test]
async fn a_credential_is_waited_for_longer_than_an_answer_and_not_for_ever() {
    let world = World::new("asked");
    let registry = Double::http(|seen, _| match seen.header("authorization") {
        Some(_) => manifest_reply(),
        None => Reply::basic(),
    })
    .await;
    for (takes, most, is_taken) in [(600, 60_000, true), (60_000, 100, false)] {
        let mut options = Options { plain_http: Some(true), ..world.options() };
        options.limits.head = Duration::from_millis(500);
        options.limits.credential = Duration::from_millis(most);
        options.credentials = Some(Arc::new(Asked(Duration::from_millis(takes))));
        let resolved = world.with(&registry, "a/b", options).await.resolve().await;
        match is_taken {
            true => assert_eq!(resolved.unwrap_or_else(|error| panic!("{error}")), manifest()),
            false => assert!(refused(resolved).contains("no credentials within 100ms")),
        }
    }
}
