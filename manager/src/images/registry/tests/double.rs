//! A server that answers by script, and records what it was sent.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use super::super::net::Stream;

/// A request.
#[derive(Debug, Clone, Default)]
pub(super) struct Seen {
    pub(super) method: String,
    pub(super) target: String,
    pub(super) headers: Vec<(String, String)>,
    pub(super) body: Vec<u8>,
}

/// An answer.
#[derive(Debug, Clone)]
pub(super) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: Vec<u8>,
    how: How,
}

/// How a body is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum How {
    WithLength,
    Chunked,
    /// So many bytes of it, and the connection is closed.
    Cut(usize),
    /// So many bytes of it, and the connection is reset.
    Reset(usize),
    /// So many bytes of it, and nothing more.
    Silent(usize),
    /// A byte now and then.
    Trickle,
    /// Not even a head.
    Nothing,
    /// Closed without a word.
    Closed,
}

type Script = dyn Fn(&Seen, usize) -> Reply + Send + Sync;

/// A server at a port of its own. It ends with its owner.
pub(super) struct Double {
    pub(super) address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    connections: Arc<AtomicUsize>,
    task: JoinHandle<()>,
}

impl Seen {
    pub(super) fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    pub(super) fn is(&self, method: &str, target: &str) -> bool {
        self.method == method && self.target.split('?').next() == Some(target)
    }

    /// The values of a parameter of its query.
    pub(super) fn query(&self, name: &str) -> Vec<String> {
        let query = self.target.split_once('?').map_or("", |(_, query)| query);
        let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
        pairs.filter(|(key, _)| *key == name).map(|(_, value)| value.replace("%20", " ").replace("%40", "@")).collect()
    }
}

impl Reply {
    pub(super) fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: Vec::new(), how: How::WithLength }
    }

    pub(super) fn body(mut self, body: impl Into<Vec<u8>>) -> Self {
        self.body = body.into();
        self
    }

    pub(super) fn header(mut self, name: &str, value: impl Into<String>) -> Self {
        self.headers.push((name.to_owned(), value.into()));
        self
    }

    pub(super) fn redirect(to: impl Into<String>) -> Self {
        Self::new(307).header("location", to)
    }

    /// A challenge for tokens of a server.
    pub(super) fn bearer(rest: &str) -> Self {
        Self::new(401).header("www-authenticate", format!("Bearer {rest}"))
    }

    pub(super) fn basic() -> Self {
        Self::new(401).header("www-authenticate", "Basic realm=\"x\"")
    }

    pub(super) fn chunked(self) -> Self {
        Self { how: How::Chunked, ..self }
    }

    pub(super) fn cut(self, after: usize) -> Self {
        Self { how: How::Cut(after), ..self }
    }

    pub(super) fn reset(self, after: usize) -> Self {
        Self { how: How::Reset(after), ..self }
    }

    pub(super) fn silent(self, after: usize) -> Self {
        Self { how: How::Silent(after), ..self }
    }

    pub(super) fn trickle(self) -> Self {
        Self { how: How::Trickle, ..self }
    }

    pub(super) fn nothing() -> Self {
        Self { how: How::Nothing, ..Self::new(200) }
    }

    pub(super) fn closed() -> Self {
        Self { how: How::Closed, ..Self::new(200) }
    }
}

impl Double {
    pub(super) async fn http(script: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::serve(None, script).await
    }

    pub(super) async fn tls(acceptor: TlsAcceptor, script: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static) -> Self {
        Self::serve(Some(acceptor), script).await
    }

    async fn serve(acceptor: Option<TlsAcceptor>, script: impl Fn(&Seen, usize) -> Reply + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let (seen, connections) = (Arc::<Mutex<Vec<Seen>>>::default(), Arc::<AtomicUsize>::default());
        let (script, record, count) = (Arc::<Script>::from(Box::new(script) as Box<Script>), Arc::clone(&seen), Arc::clone(&connections));
        let task = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            while let Ok((stream, _peer)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let (script, record, acceptor) = (Arc::clone(&script), Arc::clone(&record), acceptor.clone());
                open.spawn(async move {
                    let raw = std::os::fd::AsFd::as_fd(&stream).try_clone_to_owned().expect("a descriptor");
                    let resets = move || {
                        let raw = TcpStream::from_std(raw.into()).expect("a socket");
                        raw.set_zero_linger().expect("to be reset");
                    };
                    // a client that goes away is what some tests are about
                    let _ = match acceptor {
                        None if is_tls(&stream).await => refuse_tls(stream).await,
                        None => talk(stream, &*script, &record, resets).await,
                        Some(acceptor) => match acceptor.accept(stream).await {
                            Ok(stream) => talk(stream, &*script, &record, resets).await,
                            Err(error) => Err(error),
                        },
                    };
                });
            }
        });
        Self { address, seen, connections, task }
    }

    /// Its port.
    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }

    /// What it was sent so far.
    pub(super) fn seen(&self) -> Vec<Seen> {
        self.seen.lock().expect("no panic").clone()
    }

    /// How many requests of a method, to that path.
    pub(super) fn count(&self, method: &str, target: &str) -> usize {
        self.seen().iter().filter(|seen| seen.is(method, target)).count()
    }

    pub(super) fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Double {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Whether a client begins with TLS.
async fn is_tls(stream: &TcpStream) -> bool {
    let mut first = [0];
    matches!(stream.peek(&mut first).await, Ok(1)) && first[0] == 0x16
}

/// What servers without TLS answer to that. It is read until the client leaves: otherwise the answer would be lost with the connection.
async fn refuse_tls(mut stream: TcpStream) -> std::io::Result<()> {
    stream.write_all(b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTPS request to an HTTP server.\n").await?;
    stream.shutdown().await?;
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.map(drop)
}

async fn talk(stream: impl Stream, script: &Script, record: &Mutex<Vec<Seen>>, resets: impl FnOnce()) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut resets = Some(resets);
    loop {
        let mut seen = Seen::default();
        let mut line = String::new();
        if stream.read_line(&mut line).await? == 0 {
            return Ok(());
        }
        let mut words = line.split_ascii_whitespace();
        seen.method = words.next().unwrap_or_default().to_owned();
        seen.target = words.next().unwrap_or_default().to_owned();
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).await?;
            let Some((name, value)) = line.trim_end().split_once(": ") else { break };
            seen.headers.push((name.to_owned(), value.to_owned()));
        }
        if seen.method == "CONNECT" {
            let target = seen.target.clone();
            let reply = script(&seen, record.lock().expect("no panic").len());
            record.lock().expect("no panic").push(seen);
            stream.write_all(format!("HTTP/1.1 {} x\r\n\r\n", reply.status).as_bytes()).await?;
            stream.flush().await?;
            if reply.status == 200 {
                // all names are this machine's
                let port = target.rsplit_once(':').map_or("0", |(_, port)| port);
                let mut server = TcpStream::connect(format!("127.0.0.1:{port}")).await?;
                tokio::io::copy_bidirectional(&mut stream, &mut server).await?;
            }
            return Ok(());
        }
        let length = seen.header("content-length").map_or(0, |length| length.parse().expect("a length"));
        let mut body = vec![0; length];
        let read = stream.read_exact(&mut body).await;
        seen.body = body;
        let is_head = seen.method == "HEAD";
        let reply = script(&seen, record.lock().expect("no panic").len());
        record.lock().expect("no panic").push(seen);
        read?;
        let mut head = format!("HTTP/1.1 {} x\r\n", reply.status);
        for (name, value) in &reply.headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        let has_length = reply.headers.iter().any(|(name, _)| name == "content-length");
        match reply.how {
            How::Chunked => head.push_str("transfer-encoding: chunked\r\n"),
            _ if !has_length => head.push_str(&format!("content-length: {}\r\n", reply.body.len())),
            _ => {}
        }
        head.push_str("\r\n");
        match reply.how {
            How::Nothing => std::future::pending().await,
            How::Closed => return Ok(()),
            _ => stream.write_all(head.as_bytes()).await?,
        }
        stream.flush().await?;
        if is_head {
            continue;
        }
        match reply.how {
            How::WithLength => stream.write_all(&reply.body).await?,
            How::Chunked => {
                for part in reply.body.chunks(1000) {
                    stream.write_all(format!("{:x}\r\n", part.len()).as_bytes()).await?;
                    stream.write_all(part).await?;
                    stream.write_all(b"\r\n").await?;
                }
                stream.write_all(b"0\r\n\r\n").await?;
            }
            How::Trickle => {
                for byte in &reply.body {
                    stream.write_all(&[*byte]).await?;
                    stream.flush().await?;
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                }
            }
            How::Cut(after) | How::Reset(after) | How::Silent(after) => {
                stream.write_all(&reply.body[..after]).await?;
                stream.flush().await?;
                match reply.how {
                    How::Silent(_) => std::future::pending().await,
                    How::Reset(_) => resets.take().into_iter().for_each(|resets| resets()),
                    _ => {}
                }
                return Ok(());
            }
            How::Nothing | How::Closed => {}
        }
        stream.flush().await?;
    }
}
