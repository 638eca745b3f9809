//! A registry on loopback: it keeps what is pushed in memory, and asks for a name and a password if it has one. A blob can be held: half of what is
//! asked for is sent then, and the rest when it is released; if it is pushed, its answer waits for that.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use anyhow::{Context as _, Result};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// A registry, until it is dropped.
#[derive(Debug)]
pub struct Registry {
    port: u16,
    serving: tokio::task::JoinHandle<()>,
    store: Arc<Store>,
}

#[derive(Debug, Default)]
struct Store {
    /// By path: manifests with their type, and blobs.
    files: Mutex<HashMap<String, (String, Vec<u8>)>>,
    requests: Mutex<Vec<String>>,
    /// From where each GET of a blob asks for it: the path, and the offset.
    begins: Mutex<Vec<(String, usize)>>,
    password: Option<String>,
    /// Digests of which half is sent only.
    held: Mutex<HashSet<String>>,
    released: tokio::sync::Notify,
}

impl Store {
    /// Waits until a blob is not held.
    async fn wait_for(&self, digest: &str) {
        loop {
            let mut released = std::pin::pin!(self.released.notified());
            // a release from now on counts
            released.as_mut().enable();
            if !self.held.lock().expect("no panic under this lock").contains(digest) {
                return;
            }
            released.await;
        }
    }
}

impl Registry {
    /// Serves; `password` is `NAME:PASSWORD` in base 64.
    pub async fn start(password: Option<&str>) -> Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let port = listener.local_addr()?.port();
        let store = Arc::new(Store { password: password.map(str::to_owned), ..Store::default() });
        let shared = Arc::clone(&store);
        let serving = tokio::spawn(async move {
            while let Ok((socket, _)) = listener.accept().await {
                tokio::spawn(serve(socket, Arc::clone(&shared)));
            }
        });
        Ok(Self { port, serving, store })
    }

    /// The name of an image there.
    pub fn image(&self, name: &str) -> String {
        format!("127.0.0.1:{}/{name}", self.port)
    }

    /// Stores a blob, and returns its digest.
    pub fn put_blob(&self, repository: &str, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let file = ("application/octet-stream".to_owned(), bytes.to_vec());
        self.store.files.lock().expect("no panic under this lock").insert(format!("/v2/{repository}/blobs/{digest}"), file);
        digest
    }

    /// Stores a manifest or an index under its digest and a tag, and returns its digest.
    pub fn put_manifest(&self, repository: &str, tag: &str, media_type: &str, bytes: &[u8]) -> String {
        let digest = digest(bytes);
        let mut files = self.store.files.lock().expect("no panic under this lock");
        for name in [&digest, tag] {
            files.insert(format!("/v2/{repository}/manifests/{name}"), (media_type.to_owned(), bytes.to_vec()));
        }
        digest
    }

    /// Replaces what is stored under a digest by something else.
    pub fn falsify_blob(&self, repository: &str, digest: &str, bytes: &[u8]) {
        let file = ("application/octet-stream".to_owned(), bytes.to_vec());
        self.store.files.lock().expect("no panic under this lock").insert(format!("/v2/{repository}/blobs/{digest}"), file);
    }

    /// Sends half of a blob only, and answers no push of it, until it is released.
    pub fn hold(&self, digest: &str) {
        self.store.held.lock().expect("no panic under this lock").insert(digest.to_owned());
    }

    /// Sends all of every blob.
    pub fn release(&self) {
        self.store.held.lock().expect("no panic under this lock").clear();
        self.store.released.notify_waiters();
    }

    /// How often a blob was asked for.
    pub fn fetches(&self, digest: &str) -> usize {
        let is_fetch = |request: &&String| request.starts_with("GET ") && request.ends_with(&format!("/blobs/{digest}"));
        self.requests().iter().filter(is_fetch).count()
    }

    /// From where each fetch of a blob asks for it.
    pub fn begins(&self, digest: &str) -> Vec<usize> {
        let begins = self.store.begins.lock().expect("no panic under this lock");
        begins.iter().filter(|(path, _)| path.ends_with(&format!("/blobs/{digest}"))).map(|(_, begin)| *begin).collect()
    }

    /// Method and path of each request.
    pub fn requests(&self) -> Vec<String> {
        self.store.requests.lock().expect("no panic under this lock").clone()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// The type of its first record.
const TLS_HANDSHAKE: u8 = 22;

async fn serve(socket: TcpStream, store: Arc<Store>) {
    let mut socket = BufReader::new(socket);
    // a client that disconnects is no failure of the registry
    while one(&mut socket, &store).await.is_ok() {}
}

async fn one(socket: &mut BufReader<TcpStream>, store: &Store) -> Result<()> {
    if socket.fill_buf().await?.first() == Some(&TLS_HANDSHAKE) {
        // as HTTP servers do
        socket.get_mut().write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n").await?;
        anyhow::bail!("TLS on a port without it");
    }
    let mut line = String::new();
    socket.read_line(&mut line).await?;
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().context("a method")?.to_owned(), words.next().context("a path")?.to_owned());
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        socket.read_line(&mut line).await?;
        match line.trim().split_once(':') {
            Some((name, value)) => headers.insert(name.to_ascii_lowercase(), value.trim().to_owned()),
            None => break,
        };
    }
    let mut body = Vec::new();
    if headers.get("transfer-encoding").is_some_and(|kind| kind == "chunked") {
        loop {
            let mut line = String::new();
            socket.read_line(&mut line).await?;
            let size = usize::from_str_radix(line.trim(), 16)?;
            let mut part = vec![0; size + 2];
            socket.read_exact(&mut part).await?;
            if size == 0 {
                break;
            }
            body.extend_from_slice(&part[..size]);
        }
    } else {
        body = vec![0; headers.get("content-length").map_or(Ok(0), |length| length.parse())?];
        socket.read_exact(&mut body).await?;
    }
    store.requests.lock().expect("no panic under this lock").push(format!("{method} {target}"));
    if method == "PUT"
        && let Some((_, digest)) = target.split_once("digest=")
    {
        store.wait_for(&digest.replace("%3A", ":")).await;
    }
    let (mut status, mut more, mut content) = answer(&method, &target, &headers, body, store);
    if method == "GET" && status == "200 OK" {
        let begin = headers.get("range").and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        store.begins.lock().expect("no panic under this lock").push((target.clone(), begin.unwrap_or(0)));
        if let Some(begin) = begin.filter(|begin| *begin < content.len()) {
            status = "206 Partial Content";
            more.push_str(&format!("Content-Range: bytes {begin}-{}/{}\r\n", content.len() - 1, content.len()));
            content.drain(..begin);
        }
    }
    let length = content.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nDocker-Distribution-API-Version: registry/2.0\r\n{more}\r\n");
    socket.get_mut().write_all(head.as_bytes()).await?;
    if method != "HEAD" {
        let name = target.rsplit('/').next().unwrap_or_default();
        let (first, rest) = content.split_at(length / 2);
        socket.get_mut().write_all(first).await?;
        store.wait_for(name).await;
        socket.get_mut().write_all(rest).await?;
    }
    Ok(())
}

fn digest(bytes: &[u8]) -> String {
    use sha2::Digest as _;
    let hex: String = sha2::Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn answer(method: &str, target: &str, headers: &HashMap<String, String>, body: Vec<u8>, store: &Store) -> (&'static str, String, Vec<u8>) {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let is_known = |password: &String| headers.get("authorization").is_some_and(|given| *given == format!("Basic {password}"));
    if store.password.as_ref().is_some_and(|password| !is_known(password)) {
        return ("401 Unauthorized", "WWW-Authenticate: Basic realm=\"test\"\r\n".to_owned(), Vec::new());
    }
    let mut files = store.files.lock().expect("no panic under this lock");
    match method {
        "POST" => ("202 Accepted", format!("Location: {path}upload\r\n"), Vec::new()),
        "PUT" if path.contains("/uploads/") => {
            let digest = query.split('&').find_map(|pair| pair.strip_prefix("digest=")).unwrap_or_default().replace("%3A", ":");
            let name = path.split("/uploads/").next().unwrap_or_default();
            files.insert(format!("{name}/{digest}"), ("application/octet-stream".to_owned(), body));
            ("201 Created", format!("Docker-Content-Digest: {digest}\r\n"), Vec::new())
        }
        "PUT" => {
            let digest = digest(&body);
            let kind = headers.get("content-type").cloned().unwrap_or_default();
            let name = path.rsplit_once('/').map_or(path, |(name, _)| name);
            files.insert(format!("{name}/{digest}"), (kind.clone(), body.clone()));
            files.insert(path.to_owned(), (kind, body));
            ("201 Created", format!("Docker-Content-Digest: {digest}\r\n"), Vec::new())
        }
        _ => match files.get(path) {
            Some((kind, content)) => {
                let digest = digest(content);
                ("200 OK", format!("Content-Type: {kind}\r\nDocker-Content-Digest: {digest}\r\n"), content.clone())
            }
            None => ("404 Not Found", String::new(), Vec::new()),
        },
    }
}
