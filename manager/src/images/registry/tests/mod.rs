//! The client against servers that answer by script. Names of the tests are the rows of docs/field.md.

mod auth;
mod double;
mod fetch;
mod hosts;
mod push;
mod resolve;
mod transport;

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use hyper::body::Bytes;

use super::*;
use crate::content::{Algorithm, Hasher};
use double::{Double, Reply, Seen};

/// Files of one test, and how its client reaches everything.
struct World {
    scratch: scratch::Folder,
}

impl World {
    /// All names end at this machine.
    fn new(name: &str) -> Self {
        let scratch = scratch::Folder::new(name);
        std::fs::write(scratch.join("hosts"), "127.0.0.1 r.example m.example n.example o.example b.example t.example\n").expect("written");
        std::fs::write(scratch.join("resolv.conf"), "nameserver 127.0.0.1\noptions timeout:1 attempts:1\n").expect("written");
        Self { scratch }
    }

    /// hosts.toml for a registry.
    fn configure(&self, registry: &str, text: &str) -> &Self {
        let folder = self.scratch.join("certs.d").join(registry);
        std::fs::create_dir_all(&folder).expect("a folder");
        std::fs::write(folder.join("hosts.toml"), text).expect("written");
        self
    }

    /// Quick pauses, and limits that no machine is too slow for.
    fn options(&self) -> Options {
        Options {
            config_path: vec![self.scratch.join("certs.d")],
            limits: Limits { pause: Duration::from_millis(2), longest_pause: Duration::from_millis(50), ..Limits::default() },
            proxies: Proxies::default(),
            resolver: Resolver::with(self.scratch.join("hosts"), self.scratch.join("resolv.conf"), 9),
            ..Options::default()
        }
    }

    /// The client for a name at `r.example:PORT`, over HTTP.
    async fn plain(&self, double: &Double, rest: &str) -> Registry {
        self.with(double, rest, Options { plain_http: Some(true), ..self.options() }).await
    }

    async fn with(&self, double: &Double, rest: &str, options: Options) -> Registry {
        let reference = Reference::parse(&format!("r.example:{}/{rest}", double.port())).expect("a reference");
        Registry::new(reference, options).await.expect("a registry")
    }
}

/// A credential for each host, and who has asked for which.
#[derive(Default)]
struct Known {
    secrets: Vec<(String, Secret)>,
    asked: Mutex<Vec<String>>,
}

impl Known {
    fn password(hosts: &[&str]) -> Arc<Self> {
        let secret = |host: &&str| {
            let name = host.split(':').next().unwrap_or_default();
            ((*host).to_owned(), Secret::Password { user: format!("user-of-{name}"), password: "p:w".to_owned() })
        };
        Arc::new(Self { secrets: hosts.iter().map(secret).collect(), asked: Mutex::default() })
    }

    fn secret(host: String, secret: Secret) -> Arc<Self> {
        Arc::new(Self { secrets: vec![(host, secret)], asked: Mutex::default() })
    }
}

#[async_trait]
impl Credentials for Known {
    async fn of(&self, challenge: &Challenge<'_>) -> crate::error::Result<Option<Secret>> {
        self.asked.lock().expect("no panic").push(challenge.host.to_owned());
        Ok(self.secrets.iter().find(|(host, _)| host == challenge.host).map(|(_, secret)| secret.clone()))
    }
}

/// Bytes that look like no others of that length.
fn bytes(length: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..length).map(|_| next()).collect()
}

fn digest(bytes: &[u8]) -> Digest {
    let mut hasher = Hasher::new(Algorithm::Sha256);
    hasher.update(bytes);
    hasher.digest()
}

fn layer(bytes: &[u8]) -> Descriptor {
    Descriptor::new("application/vnd.oci.image.layer.v1.tar+gzip", digest(bytes), bytes.len() as u64)
}

const IMAGE: &str = "application/vnd.oci.image.manifest.v1+json";
const MANIFEST: &str = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","layers":[]}"#;

fn manifest() -> Descriptor {
    Descriptor::new(IMAGE, digest(MANIFEST.as_bytes()), MANIFEST.len() as u64)
}

/// The manifest, as a registry answers for it.
fn manifest_reply() -> Reply {
    Reply::new(200).header("content-type", IMAGE).header("docker-content-digest", manifest().digest.to_string()).body(MANIFEST)
}

/// All bytes of a blob, or why there are no more.
async fn read(blob: &mut Blob) -> (Vec<u8>, Result<()>) {
    let mut all = Vec::new();
    loop {
        match blob.next().await {
            Ok(Some(bytes)) => all.extend_from_slice(&bytes),
            Ok(None) => return (all, Ok(())),
            Err(error) => return (all, Err(error)),
        }
    }
}

/// Fetches all of a blob.
async fn fetched(registry: &Registry, content: &Descriptor) -> Vec<u8> {
    let mut blob = registry.fetch(content, 0).await.unwrap_or_else(|error| panic!("{error}"));
    let (all, end) = read(&mut blob).await;
    end.unwrap_or_else(|error| panic!("{error}"));
    all
}

/// Why something failed that had to.
fn refused<T: std::fmt::Debug>(result: Result<T>) -> String {
    result.expect_err("it fails").to_string()
}
