//! A connection to a server: directly or through a proxy, with TLS or without.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

use super::dns::{DnsError, Resolver};
use super::proxy::{Proxies, Proxy};
use super::tls;
use crate::error::chain;
use crate::images::registry::hosts::TlsConfig;
use crate::images::registry::thread::on_thread;
use crate::images::registry::url::{Origin, Scheme};

/// Bytes to and from a server.
pub(in crate::images::registry) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection.
pub(in crate::images::registry) struct Connected {
    pub(in crate::images::registry) stream: Box<dyn Stream>,
    /// Whether it ends at a proxy that is sent whole URLs, and what is to authorize that.
    pub(in crate::images::registry) proxied: Option<Option<String>>,
}

/// Why there is no connection.
#[derive(Debug, Clone, thiserror::Error)]
pub(in crate::images::registry) enum ConnectError {
    /// It cannot be expected to work soon: no such host, a certificate that is not trusted, a configuration that cannot be used.
    #[error("{0}")]
    Lasting(String),
    /// It may work later.
    #[error("{0}")]
    Passing(String),
    /// The server has answered with something that is no TLS.
    #[error("{0}")]
    NotTls(String),
}

/// Connects to servers, in the way of one configured host.
#[derive(Debug)]
pub(in crate::images::registry) struct Connector {
    tls: TlsConfig,
    client: OnceLock<Arc<ClientConfig>>,
    limit: Duration,
    resolver: Resolver,
    proxies: Proxies,
}

impl Connector {
    pub(in crate::images::registry) fn new(tls: TlsConfig, limit: Duration, resolver: Resolver, proxies: Proxies) -> Self {
        Self { tls, client: OnceLock::new(), limit, resolver, proxies }
    }

    /// A new connection to a server.
    pub(in crate::images::registry) async fn connect(&self, origin: &Origin) -> Result<Connected, ConnectError> {
        let late = |_elapsed| ConnectError::Passing(format!("no connection within {:?}", self.limit));
        tokio::time::timeout(self.limit, self.connect_unlimited(origin)).await.map_err(late)?
    }

    async fn connect_unlimited(&self, origin: &Origin) -> Result<Connected, ConnectError> {
        let (authority, authorization) = match self.proxies.to(origin) {
            None => {
                let stream = self.dial(origin).await?;
                return Ok(Connected { stream: self.secured(stream, origin).await?, proxied: None });
            }
            Some(Proxy::Unusable(why)) => return Err(ConnectError::Lasting(why.clone())),
            Some(Proxy::At { origin, authorization }) => (origin, authorization),
        };
        let of_proxy = |error: ConnectError| match error {
            ConnectError::Lasting(why) => ConnectError::Lasting(format!("proxy {}: {why}", authority.address())),
            ConnectError::Passing(why) | ConnectError::NotTls(why) => {
                ConnectError::Passing(format!("proxy {}: {why}", authority.address()))
            }
        };
        let stream = self.dial(authority).await.map_err(of_proxy)?;
        let mut stream = self.secured(stream, authority).await.map_err(of_proxy)?;
        if origin.scheme == Scheme::Http {
            return Ok(Connected { stream, proxied: Some(authorization.clone()) });
        }
        tunnel(&mut stream, origin, authorization.as_deref()).await.map_err(of_proxy)?;
        Ok(Connected { stream: self.secured(stream, origin).await?, proxied: None })
    }

    /// Connects to the first of its addresses that answers: the next one is tried too when one is slow.
    async fn dial(&self, origin: &Origin) -> Result<TcpStream, ConnectError> {
        let addresses = self.resolver.addresses(&origin.host).await.map_err(|error| match error {
            DnsError::NotFound => ConnectError::Lasting(format!("look up {}: {error}", origin.host)),
            DnsError::Failed(_) => ConnectError::Passing(format!("look up {}: {error}", origin.host)),
        })?;
        let mut waiting = interleaved(addresses).into_iter();
        let mut under_way = JoinSet::new();
        let mut failure = None;
        loop {
            let next = waiting.next();
            if let Some(address) = next {
                let address = SocketAddr::new(address, origin.port);
                under_way.spawn(async move { TcpStream::connect(address).await.map_err(|error| (address, error)) });
            } else if under_way.is_empty() {
                return Err(failure.unwrap_or_else(|| ConnectError::Passing("no address".to_owned())));
            }
            let step = if waiting.len() == 0 { self.limit } else { STAGGER };
            match tokio::time::timeout(step, under_way.join_next()).await {
                Ok(Some(Ok(Ok(stream)))) => {
                    // requests are written at once: nothing is gained by waiting for more; without it they are slower only
                    let _ = stream.set_nodelay(true);
                    return Ok(stream);
                }
                Ok(Some(Ok(Err((address, error))))) => {
                    failure.get_or_insert_with(|| ConnectError::Passing(format!("connect to {address}: {}", reason(&error))));
                }
                // one has panicked, none is left, or it is slow
                Ok(Some(Err(_)) | None) | Err(_) => {}
            }
        }
    }

    async fn secured(&self, stream: impl Stream + 'static, origin: &Origin) -> Result<Box<dyn Stream>, ConnectError> {
        if origin.scheme == Scheme::Http {
            return Ok(Box::new(stream));
        }
        let client = self.client().await?;
        let name = ServerName::try_from(origin.host.clone())
            .map_err(|_error| ConnectError::Lasting(format!("{} is no name for TLS", origin.host)))?;
        match TlsConnector::from(client).connect(name, stream).await {
            Ok(stream) => Ok(Box::new(stream)),
            Err(error) => Err(of_handshake(&error)),
        }
    }

    /// How TLS is spoken; files are read when it is needed first.
    async fn client(&self) -> Result<Arc<ClientConfig>, ConnectError> {
        if let Some(client) = self.client.get() {
            return Ok(Arc::clone(client));
        }
        let config = self.tls.clone();
        let made = on_thread(move || tls::blocking_config(&config)).await;
        let made = made.map_err(|error| ConnectError::Lasting(error.to_string()))?;
        let made = made.map_err(|error| ConnectError::Lasting(error.to_string()))?;
        Ok(Arc::clone(self.client.get_or_init(|| made)))
    }
}

/// Why a handshake failed.
fn of_handshake(error: &io::Error) -> ConnectError {
    use tokio_rustls::rustls::Error as Tls;
    let source = error.get_ref().and_then(|source| source.downcast_ref::<Tls>());
    let text = format!("TLS: {}", chain(error));
    match source {
        // what it sent is no TLS record
        Some(Tls::InvalidMessage(_)) => ConnectError::NotTls(text),
        Some(Tls::AlertReceived(_) | Tls::InvalidCertificate(_) | Tls::PeerIncompatible(_) | Tls::NoApplicationProtocol) => {
            ConnectError::Lasting(text)
        }
        // also one that has closed the connection: anything on the way can do that, and must not have secrets sent without TLS
        Some(_) | None => ConnectError::Passing(text),
    }
}

/// Asks a proxy for a connection to a server.
async fn tunnel(stream: &mut Box<dyn Stream>, origin: &Origin, authorization: Option<&str>) -> Result<(), ConnectError> {
    let address = origin.address();
    let mut request = format!("CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n");
    if let Some(authorization) = authorization {
        request.push_str(&format!("Proxy-Authorization: {authorization}\r\n"));
    }
    request.push_str("\r\n");
    let broken = |error: io::Error| ConnectError::Passing(format!("CONNECT: {}", reason(&error)));
    stream.write_all(request.as_bytes()).await.map_err(broken)?;
    stream.flush().await.map_err(broken)?;
    // byte by byte: what follows the head belongs to the server
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == HEAD_BYTES {
            return Err(ConnectError::Passing("CONNECT: the answer is too long".to_owned()));
        }
        head.push(stream.read_u8().await.map_err(broken)?);
    }
    let line = String::from_utf8_lossy(head.split(|byte| *byte == b'\r').next().unwrap_or_default());
    let line: String = line.chars().filter(|character| !character.is_control()).take(SHOWN).collect();
    let status = line.split(' ').nth(1).unwrap_or_default();
    match status {
        "200" => Ok(()),
        "403" | "405" | "407" => Err(ConnectError::Lasting(format!("CONNECT {address}: {line}"))),
        _ => Err(ConnectError::Passing(format!("CONNECT {address}: {line}"))),
    }
}

/// Both kinds of addresses by turns, each in its order.
fn interleaved(addresses: Vec<IpAddr>) -> Vec<IpAddr> {
    let (six, four): (Vec<IpAddr>, Vec<IpAddr>) = addresses.into_iter().partition(IpAddr::is_ipv6);
    let (mut six, mut four) = (six.into_iter(), four.into_iter());
    let mut all = Vec::new();
    loop {
        let pair = (six.next(), four.next());
        if pair == (None, None) {
            return all;
        }
        all.extend(pair.0);
        all.extend(pair.1);
    }
}

/// The kernel's words, without its number.
fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => nix::errno::Errno::from_raw(number).desc().to_lowercase(),
        None => error.to_string(),
    }
}

/// After so long another address is tried as well.
const STAGGER: Duration = Duration::from_millis(300);
/// Of a proxy's answer.
const HEAD_BYTES: usize = 16 << 10;
/// Characters of its first line.
const SHOWN: usize = 200;
