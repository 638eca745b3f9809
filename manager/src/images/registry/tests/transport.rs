//! Rows 13 and 15: TLS and proxies.

use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig};

use super::*;

/// An authority, and what it has issued.
struct Authority {
    certificate: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("parameters");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let certificate = params.self_signed(&key).expect("a certificate").pem();
        Self { certificate, issuer: Issuer::new(params, key) }
    }

    /// A certificate for a name, and its key.
    fn issue(&self, name: &str, usage: ExtendedKeyUsagePurpose) -> (String, String) {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(vec![name.to_owned()]).expect("parameters");
        params.extended_key_usages.push(usage);
        params.distinguished_name.push(DnType::CommonName, name);
        (params.signed_by(&key, &self.issuer).expect("a certificate").pem(), key.serialize_pem())
    }

    /// What serves with its certificate for a name, and asks for those of `clients`.
    fn acceptor(&self, name: &str, clients: Option<&Authority>) -> TlsAcceptor {
        let (certificate, key) = self.issue(name, ExtendedKeyUsagePurpose::ServerAuth);
        let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).expect("a certificate");
        let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("a key");
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions().expect("versions");
        let builder = match clients {
            None => builder.with_no_client_auth(),
            Some(clients) => {
                let mut roots = RootCertStore::empty();
                roots.add(CertificateDer::from_pem_slice(clients.certificate.as_bytes()).expect("a certificate")).expect("a root");
                builder.with_client_cert_verifier(
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().expect("a verifier"),
                )
            }
        };
        TlsAcceptor::from(Arc::new(builder.with_single_cert(vec![certificate], key).expect("a configuration")))
    }
}

fn put(world: &World, registry: &str, name: &str, text: &str) {
    let folder = world.scratch.join("certs.d").join(registry);
    std::fs::create_dir_all(&folder).expect("a folder");
    std::fs::write(folder.join(name), text).expect("written");
}

#[tokio::test]
async fn a_certificate_is_trusted_by_its_authority_and_name_only() {
    let world = World::new("tls");
    let (ours, other) = (Authority::new("ours"), Authority::new("other"));
    let double = Double::tls(ours.acceptor("r.example", None), |_, _| manifest_reply()).await;
    let wrong = Double::tls(ours.acceptor("x.example", None), |_, _| manifest_reply()).await;
    let registry = format!("r.example:{}", double.port());
    put(&world, &registry, "ours.pem", &ours.certificate);
    put(&world, &registry, "other.pem", &other.certificate);
    put(&world, &registry, "none.pem", "nothing\n");
    for (text, why) in [
        ("", Some("UnknownIssuer")),
        ("ca = \"ours.pem\"", None),
        ("ca = [\"other.pem\", \"ours.pem\"]", None),
        ("ca = \"other.pem\"", Some("UnknownIssuer")),
        ("skip_verify = true", None),
        ("ca = \"none.pem\"", Some("no certificate")),
        ("ca = \"missing.pem\"", Some("missing.pem")),
        ("client = \"ours.pem\"\nskip_verify = true", Some("no private key")),
    ] {
        // an empty file is as none
        world.configure(&registry, &format!("{text}\n"));
        let result = world.with(&double, "a/b", world.options()).await.resolve().await;
        match why {
            None => assert_eq!(result.unwrap_or_else(|error| panic!("{text}: {error}")), manifest()),
            Some(why) => {
                let error = refused(result);
                assert!(error.contains(why) && !error.contains("times)"), "{text}: {error}");
            }
        }
    }
    let registry = format!("r.example:{}", wrong.port());
    put(&world, &registry, "ours.crt", &ours.certificate);
    let error = refused(world.with(&wrong, "a/b", world.options()).await.resolve().await);
    assert!(error.contains("TLS: ") && error.contains("r.example"), "{error}");
}

#[tokio::test]
async fn client_certificates_are_presented_as_hosts_toml_or_docker_has_them() {
    let world = World::new("client");
    let (servers, clients, others) = (Authority::new("servers"), Authority::new("clients"), Authority::new("others"));
    let double = Double::tls(servers.acceptor("r.example", Some(&clients)), |_, _| manifest_reply()).await;
    let registry = format!("r.example:{}", double.port());
    let (certificate, key) = clients.issue("me", ExtendedKeyUsagePurpose::ClientAuth);
    let (other_certificate, other_key) = others.issue("me", ExtendedKeyUsagePurpose::ClientAuth);
    put(&world, &registry, "ca.crt", &servers.certificate);
    let resolve = async || world.with(&double, "a/b", world.options()).await.resolve().await;
    assert!(refused(resolve().await).contains(&registry), "none is presented");
    put(&world, &registry, "z.cert", &certificate);
    put(&world, &registry, "z.key", &key);
    assert_eq!(resolve().await.expect("as Docker has them"), manifest());
    put(&world, &registry, "a.cert", &other_certificate);
    put(&world, &registry, "a.key", &other_key);
    assert_eq!(resolve().await.expect("the one that the server names"), manifest());
    put(&world, &registry, "both.pem", &format!("{certificate}{key}"));
    for client in ["\"both.pem\"", "[\"both.pem\"]", "[[\"z.cert\", \"z.key\"]]", "[[\"a.cert\", \"a.key\"], [\"z.cert\", \"z.key\"]]"] {
        world.configure(&registry, &format!("ca = \"ca.crt\"\nclient = {client}\n"));
        assert_eq!(resolve().await.unwrap_or_else(|error| panic!("{client}: {error}")), manifest());
    }
    world.configure(&registry, "ca = \"ca.crt\"\nclient = [[\"a.cert\", \"a.key\"]]\n");
    assert!(resolve().await.is_err());
    world.configure(&registry, "ca = \"ca.crt\"\nclient = [[\"a.cert\", \"z.key\"]]\n");
    assert!(refused(resolve().await).contains("z.key"));
}

#[tokio::test]
async fn this_machine_is_tried_with_tls_and_then_without() {
    let world = World::new("loopback");
    let authority = Authority::new("any");
    let plain = Double::http(|_, _| manifest_reply()).await;
    let tls = Double::tls(authority.acceptor("localhost", None), |_, _| manifest_reply()).await;
    for (double, connections) in [(&plain, 2), (&tls, 1)] {
        let reference = Reference::parse(&format!("localhost:{}/a/b", double.port())).expect("a reference");
        let client = Registry::new(reference, world.options()).await.expect("a registry");
        for _ in 0..2 {
            assert_eq!(client.resolve().await.unwrap_or_else(|error| panic!("{error}")), manifest());
        }
        assert_eq!(double.connections(), connections);
    }
    let client = world.with(&plain, "a/b", world.options()).await;
    assert!(refused(client.resolve().await).contains("TLS: "), "another machine is not asked without TLS");
}

#[tokio::test]
async fn what_breaks_a_connection_off_has_nothing_sent_without_tls() {
    let world = World::new("reset");
    // it closes what begins with TLS, and would take HTTP
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let plain = Arc::<Mutex<usize>>::default();
    let count = Arc::clone(&plain);
    let serving = tokio::spawn(async move {
        while let Ok((stream, _peer)) = listener.accept().await {
            let mut first = [0];
            if matches!(stream.peek(&mut first).await, Ok(1)) && first[0] != 0x16 {
                *count.lock().expect("no panic") += 1;
            }
        }
    });
    let reference = Reference::parse(&format!("localhost:{port}/a/b")).expect("a reference");
    let client = Registry::new(reference, world.options()).await.expect("a registry");
    assert!(refused(client.resolve().await).contains("TLS: "));
    assert_eq!(*plain.lock().expect("no panic"), 0);
    serving.abort();
}

#[tokio::test]
async fn a_password_is_not_sent_to_a_realm_without_tls() {
    let world = World::new("realm-tls");
    let authority = Authority::new("any");
    let tokens = Double::http(|_, _| Reply::new(200).body(r#"{"token":"x"}"#)).await;
    let port = tokens.port();
    let double =
        Double::tls(authority.acceptor("r.example", None), move |_, _| Reply::bearer(&format!("realm=\"http://t.example:{port}/\""))).await;
    let registry = format!("r.example:{}", double.port());
    world.configure(&registry, "skip_verify = true\n");
    let options = Options { credentials: Some(Known::password(&[&registry])), ..world.options() };
    let error = refused(world.with(&double, "a/b", options).await.resolve().await);
    assert!(error.contains("without TLS") && tokens.seen().is_empty(), "{error}");
    // an anonymous token is no secret
    refused(world.with(&double, "a/b", world.options()).await.resolve().await);
    assert!(!tokens.seen().is_empty());
}

#[tokio::test]
async fn a_registry_is_reached_through_the_proxy_of_the_environment() {
    let world = World::new("proxy");
    let authority = Authority::new("any");
    let tls = Double::tls(authority.acceptor("r.example", None), |_, _| manifest_reply()).await;
    let registry = format!("r.example:{}", tls.port());
    put(&world, &registry, "ca.crt", &authority.certificate);
    let proxy = Double::http(|seen, _| if seen.method == "CONNECT" { Reply::new(200) } else { manifest_reply() }).await;
    let refusing = Double::http(|_, _| Reply::new(407)).await;
    let options = |address: String, exceptions: &'static str| {
        let variable = move |name: &str| match name {
            "HTTPS_PROXY" | "HTTP_PROXY" => Some(address.clone()),
            "NO_PROXY" => Some(exceptions.to_owned()),
            _ => None,
        };
        Options { proxies: Proxies::of(variable), ..world.options() }
    };
    let through = format!("http://user:p%40ss@127.0.0.1:{}", proxy.port());
    let resolve = async |options: Options| world.with(&tls, "a/b", options).await.resolve().await;

    assert_eq!(resolve(options(through.clone(), "")).await.unwrap_or_else(|error| panic!("{error}")), manifest());
    let seen = proxy.seen().pop().expect("a request");
    assert!(seen.is("CONNECT", &registry), "{seen:?}");
    assert_eq!(seen.header("proxy-authorization"), Some(format!("Basic {}", text::base64(b"user:p@ss")).as_str()));
    assert!(tls.seen().iter().all(|seen| seen.header("proxy-authorization").is_none()));

    assert_eq!(resolve(options(through.clone(), ".example")).await.expect("directly"), manifest());
    assert_eq!(proxy.seen().len(), 1);

    let error = refused(resolve(options(format!("127.0.0.1:{}", refusing.port()), "")).await);
    assert!(error.contains(&format!("proxy 127.0.0.1:{}: CONNECT {registry}: HTTP/1.1 407", refusing.port())), "{error}");
    let error = refused(resolve(options("socks5://x:y@z".to_owned(), "")).await);
    assert!(error.contains("HTTPS_PROXY cannot be used") && !error.contains("x:y"), "{error}");

    // without TLS the proxy is sent the whole URL
    let plain = world.with(&tls, "a/b", Options { plain_http: Some(true), ..options(through, "") }).await;
    assert_eq!(plain.resolve().await.expect("resolved"), manifest());
    let seen = proxy.seen().pop().expect("a request");
    assert!(
        seen.is("HEAD", &format!("http://{registry}/v2/a/b/manifests/latest")) && seen.header("proxy-authorization").is_some(),
        "{seen:?}"
    );
}

#[tokio::test]
async fn a_host_that_does_not_answer_is_given_up_at_its_own_limit() {
    let world = World::new("dial");
    // it takes connections, and nothing else
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let good = Double::http(|_, _| manifest_reply()).await;
    world.configure(&format!("r.example:{}", good.port()), &format!("[host.\"https://m.example:{port}\"]\ndial_timeout = \"200ms\"\n"));
    let client = world.plain(&good, "a/b").await;
    assert_eq!(client.resolve().await.expect("resolved"), manifest());
    world.configure("m.example:1", &format!("server = \"https://m.example:{port}\"\ndial_timeout = \"200ms\"\n"));
    let client = Registry::new(Reference::parse("m.example:1/a/b").expect("a name"), world.options()).await.expect("a registry");
    assert!(refused(client.resolve().await).contains("no connection within 200ms"));
}
