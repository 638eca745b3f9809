//! Addresses of names, from `/etc/hosts` and the name servers of `/etc/resolv.conf`.
//!
//! The programs are static: the C library's resolver would load the modules of nsswitch.conf, which are made for another build of it. Programs in
//! Go that are static do as this module does.

use std::collections::hash_map::RandomState;
use std::fs::File;
use std::hash::{BuildHasher as _, Hasher as _};
use std::io::{self, Read as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

use crate::images::registry::thread::on_thread;

/// Looks names up.
#[derive(Debug, Clone)]
pub(crate) struct Resolver {
    hosts: PathBuf,
    configuration: PathBuf,
    /// Of the name servers.
    port: u16,
}

/// Why a name has no address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum DnsError {
    /// A name server has answered so.
    #[error("no such host")]
    NotFound,
    /// No name server has answered; perhaps one does later.
    #[error("{0}")]
    Failed(String),
}

impl Default for Resolver {
    fn default() -> Self {
        Self { hosts: "/etc/hosts".into(), configuration: "/etc/resolv.conf".into(), port: 53 }
    }
}

impl Resolver {
    /// One with other files, and name servers at another port.
    #[cfg(test)]
    pub(crate) fn with(hosts: PathBuf, configuration: PathBuf, port: u16) -> Self {
        Self { hosts, configuration, port }
    }

    /// All addresses of a host: at least one.
    pub(super) async fn addresses(&self, host: &str) -> Result<Vec<IpAddr>, DnsError> {
        if let Ok(address) = host.parse() {
            return Ok(vec![address]);
        }
        let name = host.trim_end_matches('.').to_ascii_lowercase();
        let known = listed(&text(&self.hosts).await, &name);
        if !known.is_empty() {
            return Ok(known);
        }
        if name == "localhost" || name.ends_with(".localhost") {
            return Ok(vec![Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()]);
        }
        let configuration = Configuration::parse(&text(&self.configuration).await);
        let mut failure = DnsError::NotFound;
        for candidate in configuration.candidates(host) {
            match self.ask(&configuration, &candidate).await {
                Ok(addresses) => return Ok(addresses),
                Err(DnsError::NotFound) => {}
                Err(failed) => failure = failed,
            }
        }
        Err(failure)
    }

    /// Both kinds of addresses of one name. One kind is enough.
    async fn ask(&self, configuration: &Configuration, name: &str) -> Result<Vec<IpAddr>, DnsError> {
        let (four, six) = tokio::join!(self.ask_all(configuration, name, Kind::A), self.ask_all(configuration, name, Kind::Aaaa));
        match (four, six) {
            (Ok(four), Ok(six)) if four.is_empty() && six.is_empty() => Err(DnsError::NotFound),
            (Ok(four), Ok(six)) => Ok(six.into_iter().chain(four).collect()),
            (Ok(some), Err(_)) | (Err(_), Ok(some)) if !some.is_empty() => Ok(some),
            (Err(error), _) | (_, Err(error)) => Err(error),
        }
    }

    async fn ask_all(&self, configuration: &Configuration, name: &str, kind: Kind) -> Result<Vec<IpAddr>, DnsError> {
        let mut failure = "no name server".to_owned();
        for _attempt in 0..configuration.attempts {
            for server in &configuration.servers {
                let server = SocketAddr::new(*server, self.port);
                let answered = tokio::time::timeout(configuration.limit, exchange(server, name, kind)).await;
                match answered {
                    Ok(Ok(Reply::Addresses(addresses))) => return Ok(addresses),
                    Ok(Ok(Reply::NoSuchName)) => return Err(DnsError::NotFound),
                    Ok(Ok(Reply::Refused(code))) => failure = format!("name server {server} answers with error {code}"),
                    Ok(Ok(Reply::Truncated)) => failure = format!("name server {server} sends half an answer"),
                    Ok(Err(error)) => failure = format!("name server {server}: {error}"),
                    Err(_late) => failure = format!("name server {server} does not answer within {:?}", configuration.limit),
                }
            }
        }
        Err(DnsError::Failed(failure))
    }
}

/// What a name server says.
#[derive(Debug, PartialEq, Eq)]
enum Reply {
    Addresses(Vec<IpAddr>),
    NoSuchName,
    Refused(u8),
    /// It has more than a datagram holds.
    Truncated,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    A = 1,
    Aaaa = 28,
}

async fn exchange(server: SocketAddr, name: &str, kind: Kind) -> io::Result<Reply> {
    let id = random();
    let question = question(id, name, kind).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the name is too long"))?;
    let local: IpAddr = if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((local, 0)).await?;
    socket.connect(server).await?;
    socket.send(&question).await?;
    let mut buffer = [0; DATAGRAM_BYTES];
    loop {
        let length = socket.recv(&mut buffer).await?;
        // another's answer, perhaps forged: the right one may follow
        match reply(&buffer[..length], id, &question, kind) {
            Some(Reply::Truncated) => break,
            Some(reply) => return Ok(reply),
            None => {}
        }
    }
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(question.len()).unwrap_or_default();
    stream.write_all(&[&length.to_be_bytes()[..], &question].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    reply(&answer, id, &question, kind).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "its answer is malformed"))
}

/// A query for one kind of address, with room for longer answers than the first specification's.
fn question(id: u16, name: &str, kind: Kind) -> Option<Vec<u8>> {
    let mut message = Vec::with_capacity(64);
    message.extend(id.to_be_bytes());
    message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 1]);
    let start = message.len();
    for label in name.trim_end_matches('.').split('.') {
        if label.is_empty() || label.len() > 63 {
            return None;
        }
        message.push(u8::try_from(label.len()).ok()?);
        message.extend(label.bytes());
    }
    message.push(0);
    if message.len() - start > 255 {
        return None;
    }
    message.extend([0, kind as u8, 0, 1]);
    let size = u16::try_from(DATAGRAM_BYTES).ok()?.to_be_bytes();
    message.extend([0, 0, 41, size[0], size[1], 0, 0, 0, 0, 0, 0]);
    Some(message)
}

/// Reads an answer to that question; none if it is not one.
fn reply(message: &[u8], id: u16, question: &[u8], kind: Kind) -> Option<Reply> {
    let header = message.get(..12)?;
    let count = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
    let asked = question.get(12..question.len() - 11)?;
    if count(0) != id || header[2] & 0x80 == 0 || count(4) != 1 || !message.get(12..12 + asked.len())?.eq_ignore_ascii_case(asked) {
        return None;
    }
    match header[3] & 0x0f {
        0 => {}
        3 => return Some(Reply::NoSuchName),
        code => return Some(Reply::Refused(code)),
    }
    if header[2] & 0x02 != 0 {
        return Some(Reply::Truncated);
    }
    let mut at = 12 + asked.len();
    let mut addresses = Vec::new();
    for _record in 0..count(6) {
        at = after_name(message, at)?;
        let fixed = message.get(at..at + 10)?;
        let length = usize::from(u16::from_be_bytes([fixed[8], fixed[9]]));
        let data = message.get(at + 10..at + 10 + length)?;
        at += 10 + length;
        if fixed[..4] == [0, kind as u8, 0, 1] && addresses.len() < ADDRESSES {
            match kind {
                Kind::A => addresses.extend(<[u8; 4]>::try_from(data).map(IpAddr::from)),
                Kind::Aaaa => addresses.extend(<[u8; 16]>::try_from(data).map(IpAddr::from)),
            }
        }
    }
    Some(Reply::Addresses(addresses))
}

/// Reads bytes as what follows the question in an answer, and as the files of the system. They begin with the flags and the number of records.
#[cfg(any(test, fuzzing))]
pub(in crate::images::registry) fn fuzz(bytes: &[u8]) {
    if let Some((head, rest)) = bytes.split_at_checked(4) {
        for kind in [Kind::A, Kind::Aaaa] {
            let question = question(7, "r.example", kind).expect("a name");
            let asked = &question[12..question.len() - 11];
            let message = [&[0, 7, head[0] | 0x80, head[1], 0, 1, head[2], head[3], 0, 0, 0, 0], asked, rest].concat();
            if let Some(Reply::Addresses(addresses)) = reply(&message, 7, &question, kind) {
                assert!(addresses.len() <= ADDRESSES);
            }
        }
    }
    let text = String::from_utf8_lossy(bytes);
    assert!(listed(&text, "r.example").len() <= ADDRESSES);
    let configuration = Configuration::parse(&text);
    assert!((1..=SERVERS).contains(&configuration.servers.len()));
    assert!((1..=DOMAINS + 1).contains(&configuration.candidates("r.example").len()));
}

/// Where what follows a name begins. Its pointers need not be followed.
fn after_name(message: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *message.get(at)? {
            0 => return Some(at + 1),
            length if length & 0xc0 == 0xc0 => return Some(at + 2),
            length => at += 1 + usize::from(length),
        }
    }
}

/// What resolv.conf says.
#[derive(Debug, PartialEq, Eq)]
struct Configuration {
    servers: Vec<IpAddr>,
    search: Vec<String>,
    dots: usize,
    attempts: u32,
    limit: Duration,
}

impl Configuration {
    fn parse(text: &str) -> Self {
        let mut parsed = Self { servers: Vec::new(), search: Vec::new(), dots: 1, attempts: 2, limit: Duration::from_secs(5) };
        for line in text.lines() {
            let line = line.split(['#', ';']).next().unwrap_or_default();
            let mut words = line.split_ascii_whitespace();
            match words.next() {
                Some("nameserver") if parsed.servers.len() < SERVERS => {
                    let address = words.next().map(|word| word.split('%').next().unwrap_or_default());
                    parsed.servers.extend(address.and_then(|word| word.parse::<IpAddr>().ok()));
                }
                Some("domain" | "search") => {
                    parsed.search = words.take(DOMAINS).map(|word| word.trim_end_matches('.').to_owned()).collect()
                }
                Some("options") => {
                    for word in words {
                        let number = |name: &str| word.strip_prefix(name).and_then(|value| value.parse::<u64>().ok());
                        if let Some(dots) = number("ndots:") {
                            parsed.dots = usize::try_from(dots.min(15)).unwrap_or(15);
                        } else if let Some(seconds) = number("timeout:") {
                            parsed.limit = Duration::from_secs(seconds.clamp(1, 30));
                        } else if let Some(attempts) = number("attempts:") {
                            parsed.attempts = u32::try_from(attempts.clamp(1, 5)).unwrap_or(5);
                        }
                    }
                }
                _ => {}
            }
        }
        if parsed.servers.is_empty() {
            parsed.servers.push(Ipv4Addr::LOCALHOST.into());
        }
        parsed
    }

    /// The names that a host may mean, the likeliest first.
    fn candidates(&self, host: &str) -> Vec<String> {
        let itself = host.trim_end_matches('.').to_owned();
        if host.ends_with('.') {
            return vec![itself];
        }
        let mut names: Vec<String> =
            self.search.iter().filter(|domain| !domain.is_empty()).map(|domain| format!("{host}.{domain}")).collect();
        if host.matches('.').count() >= self.dots {
            names.insert(0, itself);
        } else {
            names.push(itself);
        }
        names
    }
}

/// The addresses that a file like /etc/hosts has for a name.
fn listed(text: &str, name: &str) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for line in text.lines() {
        let mut words = line.split('#').next().unwrap_or_default().split_ascii_whitespace();
        let address = words.next().and_then(|word| word.parse::<IpAddr>().ok());
        if let Some(address) = address
            && words.any(|word| word.trim_end_matches('.').eq_ignore_ascii_case(name))
            && !found.contains(&address)
            && found.len() < ADDRESSES
        {
            found.push(address);
        }
    }
    found
}

/// The text of a file; none if it cannot be read, which is as if it were not there.
async fn text(path: &Path) -> String {
    let path = path.to_owned();
    let read = move || {
        let mut bytes = Vec::new();
        let read = File::open(path).and_then(|file| file.take(FILE_BYTES).read_to_end(&mut bytes));
        read.map(|_length| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    };
    on_thread(read).await.unwrap_or_default()
}

/// A number that others cannot guess: an answer with another number, or to another port, is forged.
fn random() -> u16 {
    let hash = RandomState::new().build_hasher().finish();
    u16::try_from(hash & 0xffff).unwrap_or_default()
}

/// What passes without fragments.
const DATAGRAM_BYTES: usize = 1232;
const FILE_BYTES: u64 = 4 << 20;
const ADDRESSES: usize = 32;
const SERVERS: usize = 3;
const DOMAINS: usize = 6;

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn files_of_the_system_are_read() {
        let hosts = "127.0.0.1 localhost\n::1 localhost # me\n10.0.0.1\tR.example r\nbad r.example\n";
        assert_eq!(listed(hosts, "localhost"), [address("127.0.0.1"), address("::1")]);
        assert_eq!(listed(hosts, "r.example"), [address("10.0.0.1")]);
        assert!(listed(hosts, "me").is_empty());
        let parsed = Configuration::parse(
            "; x\nnameserver 10.0.0.2\nnameserver fe80::1%eth0\nsearch a.example b.example.\noptions ndots:2 timeout:1 attempts:9 edns0\n",
        );
        assert_eq!(parsed.servers, [address("10.0.0.2"), address("fe80::1")]);
        assert_eq!((parsed.dots, parsed.attempts, parsed.limit), (2, 5, Duration::from_secs(1)));
        assert_eq!(parsed.candidates("r"), ["r.a.example", "r.b.example", "r"]);
        assert_eq!(parsed.candidates("r.x.example"), ["r.x.example", "r.x.example.a.example", "r.x.example.b.example"]);
        assert_eq!(parsed.candidates("r."), ["r"]);
        assert_eq!(Configuration::parse("").servers, [address("127.0.0.1")]);
    }

    /// An answer to a question: flags, then records of type and data whose name is a pointer to the question's.
    fn answer(question: &[u8], flags: [u8; 2], records: &[(u8, &[u8])]) -> Vec<u8> {
        let mut message = question[..question.len() - 11].to_vec();
        message[2..4].copy_from_slice(&flags);
        message[6..8].copy_from_slice(&u16::try_from(records.len()).expect("few").to_be_bytes());
        message[10..12].copy_from_slice(&[0, 0]);
        for (kind, data) in records {
            message.extend([0xc0, 12, 0, *kind, 0, 1, 0, 0, 0, 60]);
            message.extend(u16::try_from(data.len()).expect("short").to_be_bytes());
            message.extend(*data);
        }
        message
    }

    #[test]
    fn an_answer_is_read_and_anothers_is_not() {
        let asked = question(7, "r.example", Kind::A).expect("a question");
        let good = answer(&asked, [0x81, 0x80], &[(5, b"\x01a\x00"), (1, &[10, 0, 0, 1]), (28, &[0; 16]), (1, &[10, 0])]);
        assert_eq!(reply(&good, 7, &asked, Kind::A), Some(Reply::Addresses(vec![address("10.0.0.1")])));
        assert_eq!(reply(&good, 8, &asked, Kind::A), None);
        let other = question(7, "s.example", Kind::A).expect("a question");
        assert_eq!(reply(&good, 7, &other, Kind::A), None);
        assert_eq!(reply(&asked, 7, &asked, Kind::A), None, "a question is no answer");
        assert_eq!(reply(&answer(&asked, [0x81, 0x83], &[]), 7, &asked, Kind::A), Some(Reply::NoSuchName));
        assert_eq!(reply(&answer(&asked, [0x81, 0x82], &[]), 7, &asked, Kind::A), Some(Reply::Refused(2)));
        assert_eq!(reply(&answer(&asked, [0x83, 0x80], &[]), 7, &asked, Kind::A), Some(Reply::Truncated));
        for end in 0..good.len() {
            assert_eq!(reply(&good[..end], 7, &asked, Kind::A), None, "{end}");
        }
        assert_eq!(question(1, &"a".repeat(64), Kind::A), None);
        assert_eq!(question(1, &"a.".repeat(200), Kind::A), None);
    }

    /// A name server with one answer to each question; returns its port.
    async fn server(answer_to: impl Fn(&[u8]) -> Vec<u8> + Send + 'static) -> u16 {
        let socket = UdpSocket::bind("127.0.0.1:0").await.expect("a socket");
        let port = socket.local_addr().expect("an address").port();
        tokio::spawn(async move {
            let mut buffer = [0; 2048];
            while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
                socket.send_to(&answer_to(&buffer[..length]), peer).await.expect("sent");
            }
        });
        port
    }

    #[tokio::test]
    async fn a_name_server_is_asked_for_what_the_files_do_not_have() {
        let scratch = scratch::Folder::new("dns");
        let (hosts, configuration) = (scratch.join("hosts"), scratch.join("resolv.conf"));
        std::fs::write(&hosts, "10.9.9.9 listed.example\n").expect("written");
        std::fs::write(&configuration, "nameserver 127.0.0.1\nsearch x.example\noptions timeout:1 attempts:1\n").expect("written");
        let port = server(|asked| {
            let has = |text: &[u8]| asked.windows(text.len()).any(|part| part == text);
            let is_four = asked[asked.len() - 14] == 1;
            match (has(b"\x04both"), has(b"\x03six"), is_four) {
                (true, _, true) => answer(asked, [0x81, 0x80], &[(1, &[10, 0, 0, 1])]),
                (true, _, false) | (_, true, false) => answer(asked, [0x81, 0x80], &[(28, &[0x20; 16])]),
                (_, true, true) => answer(asked, [0x81, 0x80], &[]),
                _ => answer(asked, [0x81, 0x83], &[]),
            }
        });
        let resolver = Resolver::with(hosts.clone(), configuration.clone(), port.await);
        let six = "2020:2020:2020:2020:2020:2020:2020:2020";
        assert_eq!(resolver.addresses("listed.example").await, Ok(vec![address("10.9.9.9")]));
        assert_eq!(resolver.addresses("both.example").await, Ok(vec![address(six), address("10.0.0.1")]));
        assert_eq!(resolver.addresses("six.example").await, Ok(vec![address(six)]));
        assert_eq!(resolver.addresses("both").await, Ok(vec![address(six), address("10.0.0.1")]));
        assert_eq!(resolver.addresses("none.example").await, Err(DnsError::NotFound));
        assert_eq!(resolver.addresses("10.0.0.5").await, Ok(vec![address("10.0.0.5")]));
        assert_eq!(resolver.addresses("localhost").await.map(|found| found.len()), Ok(2));
        // a port at which nothing listens
        let silent = UdpSocket::bind("127.0.0.1:0").await.expect("a socket").local_addr().expect("an address").port();
        let failed = Resolver::with(hosts, configuration, silent).addresses("both.example").await;
        assert!(matches!(failed, Err(DnsError::Failed(_))), "{failed:?}");
    }
}
