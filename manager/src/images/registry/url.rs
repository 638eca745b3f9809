//! URLs of registries, and of where they redirect to.

use std::fmt;
use std::net::Ipv6Addr;

use hyper::Uri;

/// How a host is talked to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Scheme {
    Http,
    Https,
}

impl Scheme {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }

    pub(super) fn port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// Which server a URL belongs to. What is secret stays within one origin.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Origin {
    pub(super) scheme: Scheme,
    /// In lower case; an IPv6 address is without brackets.
    pub(super) host: String,
    pub(super) port: u16,
}

/// An absolute URL without user information and fragment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Url {
    pub(super) origin: Origin,
    /// Begins with `/`.
    pub(super) path: String,
    /// What follows `?`.
    pub(super) query: Option<String>,
}

impl Origin {
    /// The host, with its port unless it is the scheme's.
    pub(super) fn authority(&self) -> String {
        let name = self.name();
        if self.port == self.scheme.port() { name } else { format!("{name}:{}", self.port) }
    }

    /// The same with the port in any case.
    pub(super) fn address(&self) -> String {
        format!("{}:{}", self.name(), self.port)
    }

    fn name(&self) -> String {
        if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() }
    }

    /// Whether it is this machine, by its name.
    pub(super) fn is_loopback(&self) -> bool {
        self.host == "localhost" || self.host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// The origin of that host, which may have a port.
    pub(super) fn of(scheme: Scheme, authority: &str) -> Result<Self, &'static str> {
        Ok(Url::parse(&format!("{}://{authority}", scheme.name()))?.origin)
    }
}

impl Url {
    /// Parses an absolute URL.
    pub(super) fn parse(text: &str) -> Result<Self, &'static str> {
        let text = text.split('#').next().unwrap_or_default();
        let uri: Uri = encoded(text).parse().map_err(|_error| "it is no URL")?;
        let scheme = match uri.scheme_str() {
            Some("http") => Scheme::Http,
            Some("https") => Scheme::Https,
            Some(_) => return Err("its scheme is neither http nor https"),
            None => return Err("it has no scheme"),
        };
        let authority = uri.authority().ok_or("it has no host")?;
        if authority.as_str().contains('@') {
            return Err("it has a user name");
        }
        let host = match authority.host().strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(address) if address.parse::<Ipv6Addr>().is_ok() => address,
            None if !authority.host().contains(['[', ']']) => authority.host(),
            _ => return Err("its host is malformed"),
        };
        if host.is_empty() {
            return Err("it has no host");
        }
        let host = host.to_ascii_lowercase();
        let port = match authority.as_str().rsplit_once(']').map_or(authority.as_str(), |(_address, rest)| rest).rsplit_once(':') {
            None | Some((_, "")) => scheme.port(),
            Some((_, port)) => port.parse().map_err(|_error| "its port is none")?,
        };
        let path = if uri.path().is_empty() { "/" } else { uri.path() };
        Ok(Self { origin: Origin { scheme, host, port }, path: path.to_owned(), query: uri.query().map(ToOwned::to_owned) })
    }

    /// Where a `Location` header of an answer from here leads.
    pub(super) fn join(&self, location: &str) -> Result<Self, &'static str> {
        let base = |path: &str| Self::parse(&format!("{}://{}{path}", self.origin.scheme.name(), self.origin.authority()));
        if location.is_empty() {
            Err("it is empty")
        } else if location.starts_with("//") {
            Self::parse(&format!("{}:{location}", self.origin.scheme.name()))
        } else if location.starts_with('/') {
            base(location)
        } else if location.starts_with('?') {
            base(&format!("{}{location}", self.path))
        } else if location.split(['/', '?', '#']).next().is_some_and(|first| first.contains(':')) {
            Self::parse(location)
        } else {
            let folder = self.path.rsplit_once('/').map_or("", |(folder, _file)| folder);
            base(&format!("{folder}/{location}"))
        }
    }

    /// Adds a parameter to its query.
    pub(super) fn with(mut self, name: &str, value: &str) -> Self {
        let added = format!("{name}={}", component(value));
        self.query = Some(match self.query.filter(|query| !query.is_empty()) {
            Some(query) => format!("{query}&{added}"),
            None => added,
        });
        self
    }

    /// Path and query, as requests have it.
    pub(super) fn target(&self) -> String {
        match &self.query {
            Some(query) => format!("{}?{query}", self.path),
            None => self.path.clone(),
        }
    }
}

/// Without its query, which may be signed and so secret.
impl fmt::Display for Url {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}{}", self.origin.scheme.name(), self.origin.authority(), self.path)
    }
}

/// Percent-encodes what may not be in a component of a query.
pub(super) fn component(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b':' | b'/' | b',') {
            encoded.push(byte.into());
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

/// A form as it is posted.
pub(super) fn form(fields: &[(&str, &str)]) -> String {
    let pairs: Vec<String> = fields.iter().map(|(name, value)| format!("{name}={}", component(value))).collect();
    pairs.join("&")
}

/// Percent-encodes what no URL has: servers send it nevertheless.
fn encoded(text: &str) -> String {
    let mut encoded = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_graphic() && !matches!(byte, b'"' | b'<' | b'>' | b'\\' | b'^' | b'`' | b'{' | b'|' | b'}') {
            encoded.push(byte.into());
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> Url {
        Url::parse(text).unwrap_or_else(|why| panic!("{text}: {why}"))
    }

    #[test]
    fn a_location_is_relative_to_the_request() {
        let base = parsed("https://r.example:5000/v2/a/blobs/uploads/?mount=1");
        for (location, expected) in [
            ("/v2/a/blobs/uploads/1?_state=x%3D", "https://r.example:5000/v2/a/blobs/uploads/1?_state=x%3D"),
            ("//b.example/x", "https://b.example/x"),
            ("http://b.example:81/x?y=z#w", "http://b.example:81/x?y=z"),
            ("HTTPS://B.example/X", "https://b.example/X"),
            ("1?x=y", "https://r.example:5000/v2/a/blobs/uploads/1?x=y"),
            ("?x=y", "https://r.example:5000/v2/a/blobs/uploads/?x=y"),
            ("/a b/ü", "https://r.example:5000/a%20b/%C3%BC"),
            ("https://[2001:DB8::1]:444/x", "https://[2001:db8::1]:444/x"),
            ("https://b.example", "https://b.example/"),
            ("https://b.example:/?q", "https://b.example/?q"),
        ] {
            let joined = base.join(location).unwrap_or_else(|why| panic!("{location}: {why}"));
            let shown = format!("{}://{}{}", joined.origin.scheme.name(), joined.origin.authority(), joined.target());
            assert_eq!(shown, expected, "{location}");
        }
        for location in [
            "",
            "ftp://b.example/",
            "file:///etc/passwd",
            "https://",
            "http://user:password@b.example/",
            "https://b.example:x/",
            "https://b[::1]:5000/",
            "https://[b.example]/",
        ] {
            assert!(base.join(location).is_err(), "{location}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let same = |a: &str, b: &str| parsed(a).origin == parsed(b).origin;
        assert!(same("https://a.example", "https://A.example:443/x"));
        assert!(!same("https://a.example", "http://a.example"));
        assert!(!same("https://a.example", "https://a.example:5000"));
        assert!(!same("https://a.example", "https://sub.a.example"));
        for (host, is_loopback) in
            [("localhost", true), ("127.8.0.1", true), ("[::1]", true), ("localhost.example", false), ("10.0.0.1", false)]
        {
            assert_eq!(parsed(&format!("http://{host}:1/")).origin.is_loopback(), is_loopback, "{host}");
        }
    }

    #[test]
    fn a_query_is_encoded_and_never_shown() {
        let url = parsed("https://t.example/token?a=b").with("scope", "repository:a/b:pull push").with("service", "x&y=z");
        assert_eq!(url.target(), "/token?a=b&scope=repository:a/b:pull%20push&service=x%26y%3Dz");
        assert_eq!(url.to_string(), "https://t.example/token");
    }
}
