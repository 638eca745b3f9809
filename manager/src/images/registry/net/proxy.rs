//! Which proxy stands between, by the environment: `HTTPS_PROXY`, `HTTP_PROXY` and `NO_PROXY`, as Go's programs read them.

use std::fmt;
use std::net::IpAddr;

use super::super::text::base64;
use super::super::url::{Origin, Scheme, Url};

/// The proxies of this process.
#[derive(Debug, Clone, Default)]
pub(crate) struct Proxies {
    http: Option<Proxy>,
    https: Option<Proxy>,
    exceptions: Vec<Exception>,
}

/// A proxy, or why that of the environment cannot be used.
#[derive(Clone)]
pub(super) enum Proxy {
    At { origin: Origin, authorization: Option<String> },
    Unusable(String),
}

/// What is reached without a proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Exception {
    All,
    Address {
        address: IpAddr,
        bits: u8,
        port: Option<u16>,
    },
    /// All below a name, and where `is_itself` that host too.
    Domain {
        name: String,
        is_itself: bool,
        port: Option<u16>,
    },
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::At { origin, .. } => write!(f, "{}", origin.address()),
            Self::Unusable(why) => f.write_str(why),
        }
    }
}

impl Proxies {
    /// Those of the process's environment.
    pub(crate) fn of_environment() -> Self {
        Self::of(|name| std::env::var(name).ok())
    }

    /// Those of an environment: the name in capitals, else in small letters.
    pub(crate) fn of(variable: impl Fn(&str) -> Option<String>) -> Self {
        let either = |name: &str| variable(name).filter(|value| !value.is_empty()).or_else(|| variable(&name.to_ascii_lowercase()));
        let proxy = |name: &str| either(name).filter(|value| !value.is_empty()).map(|value| Proxy::parse(name, &value));
        let exceptions = either("NO_PROXY").unwrap_or_default();
        Self {
            http: proxy("HTTP_PROXY"),
            https: proxy("HTTPS_PROXY"),
            exceptions: exceptions.split(',').filter_map(|entry| Exception::parse(entry.trim())).collect(),
        }
    }

    /// The proxy to a server. This machine is always reached directly.
    pub(super) fn to(&self, origin: &Origin) -> Option<&Proxy> {
        let proxy = match origin.scheme {
            Scheme::Http => self.http.as_ref(),
            Scheme::Https => self.https.as_ref(),
        }?;
        let is_exempt = origin.is_loopback() || self.exceptions.iter().any(|exception| exception.holds(origin));
        (!is_exempt).then_some(proxy)
    }
}

impl Proxy {
    fn parse(name: &str, text: &str) -> Self {
        let full = if text.contains("://") { text.to_owned() } else { format!("http://{text}") };
        let Some((scheme, rest)) = full.split_once("://") else { return Self::Unusable(format!("{name} is no URL")) };
        let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
        let (user, host) = authority.rsplit_once('@').map_or((None, authority), |(user, host)| (Some(user), host));
        // the value may hold a password: errors name the variable only
        match Url::parse(&format!("{scheme}://{host}")) {
            Ok(url) => {
                let authorization = user.map(|user| {
                    let (user, password) = user.split_once(':').unwrap_or((user, ""));
                    let mut both = decoded(user);
                    both.push(b':');
                    both.extend(decoded(password));
                    format!("Basic {}", base64(&both))
                });
                Self::At { origin: url.origin, authorization }
            }
            Err(why) => Self::Unusable(format!("the proxy in {name} cannot be used: {why}")),
        }
    }
}

impl Exception {
    fn parse(entry: &str) -> Option<Self> {
        if entry.is_empty() {
            return None;
        }
        if entry == "*" {
            return Some(Self::All);
        }
        let entry = entry.to_ascii_lowercase();
        if let Some((address, bits)) = entry.split_once('/') {
            let (address, bits) = (address.parse::<IpAddr>().ok()?, bits.parse::<u8>().ok()?);
            let most = if address.is_ipv4() { 32 } else { 128 };
            return (bits <= most).then_some(Self::Address { address, bits, port: None });
        }
        let bare = |text: &str| text.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok();
        let whole = |address: IpAddr, port| Self::Address { address, bits: if address.is_ipv4() { 32 } else { 128 }, port };
        if let Some(address) = bare(&entry) {
            return Some(whole(address, None));
        }
        let (host, port) = match entry.rsplit_once(':') {
            Some((host, port)) => (host, Some(port.parse().ok()?)),
            None => (entry.as_str(), None),
        };
        if let Some(address) = bare(host) {
            return Some(whole(address, port));
        }
        let below = host.strip_prefix("*.").or_else(|| host.strip_prefix('.'));
        Some(Self::Domain { name: below.unwrap_or(host).to_owned(), is_itself: below.is_none(), port })
    }

    fn holds(&self, origin: &Origin) -> bool {
        let is_port = |port: &Option<u16>| port.is_none_or(|port| port == origin.port);
        match self {
            Self::All => true,
            Self::Address { address, bits, port } => is_port(port) && origin.host.parse().is_ok_and(|other| shares(*address, other, *bits)),
            Self::Domain { name, is_itself, port } => {
                let is_below = origin.host.strip_suffix(name.as_str()).is_some_and(|rest| rest.ends_with('.'));
                is_port(port) && (is_below || *is_itself && origin.host == *name)
            }
        }
    }
}

/// Whether two addresses agree in the first bits.
fn shares(one: IpAddr, other: IpAddr, bits: u8) -> bool {
    let number = |address: IpAddr| match address {
        IpAddr::V4(address) => (u128::from(u32::from(address)) << 96, true),
        IpAddr::V6(address) => (u128::from(address), false),
    };
    let ((one, one_is_v4), (other, other_is_v4)) = (number(one), number(other));
    one_is_v4 == other_is_v4 && (bits == 0 || (one ^ other) >> (128 - u32::from(bits)) == 0)
}

/// Takes percent-encoding away.
fn decoded(text: &str) -> Vec<u8> {
    let mut rest = text.as_bytes();
    let mut decoded = Vec::with_capacity(rest.len());
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..2).filter(|_| first == b'%').and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
            Some(byte) => {
                decoded.push(byte);
                rest = &after[2..];
            }
            None => {
                decoded.push(first);
                rest = after;
            }
        }
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proxies(variables: &[(&str, &str)]) -> Proxies {
        let variables: Vec<(String, String)> = variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        Proxies::of(move |name| variables.iter().find(|(key, _)| key == name).map(|(_, value)| value.clone()))
    }

    fn to(proxies: &Proxies, url: &str) -> Option<String> {
        proxies.to(&Url::parse(url).expect("a URL").origin).map(|proxy| format!("{proxy:?}"))
    }

    #[test]
    fn each_scheme_has_its_proxy_and_this_machine_has_none() {
        let both = proxies(&[("HTTPS_PROXY", "http://p.example:3128"), ("http_proxy", "q.example:81")]);
        assert_eq!(to(&both, "https://r.example"), Some("p.example:3128".to_owned()));
        assert_eq!(to(&both, "http://r.example"), Some("q.example:81".to_owned()));
        for url in ["http://localhost:5000", "https://127.0.0.1", "https://[::1]:5000"] {
            assert_eq!(to(&both, url), None, "{url}");
        }
        assert_eq!(to(&proxies(&[]), "https://r.example"), None);
        assert_eq!(to(&proxies(&[("HTTPS_PROXY", "")]), "https://r.example"), None);
        let unusable = to(&proxies(&[("HTTPS_PROXY", "socks5://user:secret@p.example")]), "https://r.example").expect("a proxy");
        assert!(unusable.contains("HTTPS_PROXY") && !unusable.contains("secret"), "{unusable}");
    }

    #[test]
    fn no_proxy_is_by_host_suffix_port_address_and_network() {
        for (exceptions, url, is_direct) in [
            ("r.example", "https://r.example", true),
            ("r.example", "https://a.r.example", true),
            ("r.example", "https://ar.example", false),
            (".r.example", "https://r.example", false),
            (".r.example", "https://a.r.example", true),
            ("*.r.example", "https://a.r.example", true),
            ("R.EXAMPLE", "https://r.example", true),
            ("x, r.example:5000", "https://r.example:5000", true),
            ("r.example:5000", "https://r.example", false),
            ("10.0.0.0/8", "https://10.1.2.3", true),
            ("10.0.0.0/8", "https://11.1.2.3", false),
            ("10.1.2.3", "https://10.1.2.3:5000", true),
            ("10.1.2.3:443", "https://10.1.2.3:5000", false),
            ("0.0.0.0/0", "https://10.1.2.3", true),
            ("0.0.0.0/0", "https://[2001:db8::1]", false),
            ("2001:db8::/32", "https://[2001:db8::1]:5000", true),
            ("2001:db8::/32", "https://[2001:db9::1]", false),
            ("[2001:db8::1]:5000", "https://[2001:db8::1]:5000", true),
            ("2001:db8::1", "https://[2001:db8::1]", true),
            ("*", "https://r.example", true),
            ("10.0.0.0/99,/,:", "https://10.1.2.3", false),
        ] {
            let proxies = proxies(&[("HTTPS_PROXY", "p:1"), ("NO_PROXY", exceptions)]);
            assert_eq!(to(&proxies, url).is_none(), is_direct, "{exceptions} {url}");
        }
    }

    #[test]
    fn a_proxys_password_is_decoded_and_not_shown() {
        let proxies = proxies(&[("HTTPS_PROXY", "http://user:p%40ss%zz@p.example:3128/")]);
        let Some(Proxy::At { origin, authorization }) = &proxies.https else { panic!("a proxy") };
        assert_eq!(origin.address(), "p.example:3128");
        assert_eq!(authorization.as_deref(), Some(format!("Basic {}", base64(b"user:p@ss%zz")).as_str()));
        assert!(!format!("{proxies:?}").contains("p@ss"));
    }
}
