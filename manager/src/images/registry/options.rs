//! How registries are reached, and where credentials for them come from.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;

use super::net::{Proxies, Resolver};

/// How a registry is reached.
#[derive(Clone)]
pub(crate) struct Options {
    /// Folders with one of hosts.toml, or of certificates, for each registry. The first that knows a registry counts.
    pub(crate) config_path: Vec<PathBuf>,
    /// The scheme of the registry where hosts.toml does not have it.
    pub(crate) plain_http: Option<bool>,
    /// Additional headers of requests to the registry and its mirrors; never to hosts that these redirect to.
    pub(crate) headers: Vec<(String, String)>,
    /// Where credentials come from.
    pub(crate) credentials: Option<Arc<dyn Credentials>>,
    /// How long to wait, and how often to try again.
    pub(crate) limits: Limits,
    pub(crate) proxies: Proxies,
    /// What looks names up.
    pub(crate) resolver: Resolver,
}

/// How long to wait, and how often to try again. No limit is "none": what never ends blocks a pull for ever.
#[derive(Debug, Clone)]
pub(crate) struct Limits {
    /// For a connection.
    pub(crate) connect: Duration,
    /// For the head of an answer.
    pub(crate) head: Duration,
    /// For a credential: a user may be asked.
    pub(crate) credential: Duration,
    /// For the next bytes of a body.
    pub(crate) idle: Duration,
    /// For all of a blob, with `bytes_per_second` as the least speed on top.
    pub(crate) total: Duration,
    /// Slower than this on average, after `total`, a transfer ends.
    pub(crate) bytes_per_second: u64,
    /// Attempts in sequence without any progress.
    pub(crate) attempts: u32,
    /// Before the second attempt; doubled for each that follows.
    pub(crate) pause: Duration,
    /// The longest pause, also where a server asks for a longer one.
    pub(crate) longest_pause: Duration,
}

/// A source of credentials, such as the client of a call.
#[async_trait]
pub(crate) trait Credentials: Send + Sync {
    /// The credential for a host, if there is one. It is waited for as long as [`Limits::credential`] says.
    async fn of(&self, challenge: &Challenge<'_>) -> crate::error::Result<Option<Secret>>;
}

/// A host that asks for credentials.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Challenge<'a> {
    /// With its port, unless it is the scheme's.
    pub(crate) host: &'a str,
    /// The reference that is worked on.
    pub(crate) reference: &'a str,
    /// Its `WWW-Authenticate` headers.
    pub(crate) headers: &'a [String],
}

/// A credential. Its `Debug` prints nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Secret {
    /// A user and a password, or a user and an access token.
    Password { user: String, password: String },
    /// A token with which others are requested.
    RefreshToken(String),
    /// The value of the `Authorization` header.
    Header(String),
}

impl Options {
    /// The folders of a setting: several are joined by `:`.
    pub(crate) fn folders(setting: &str) -> Vec<PathBuf> {
        std::env::split_paths(setting).filter(|folder| folder.as_path() != Path::new("")).collect()
    }
}

impl Default for Options {
    /// Nothing is configured but the proxies of the environment.
    fn default() -> Self {
        Self {
            config_path: Vec::new(),
            plain_http: None,
            headers: Vec::new(),
            credentials: None,
            limits: Limits::default(),
            proxies: Proxies::of_environment(),
            resolver: Resolver::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(30),
            head: Duration::from_secs(60),
            credential: Duration::from_secs(300),
            idle: Duration::from_secs(60),
            total: Duration::from_secs(600),
            bytes_per_second: 10 << 10,
            attempts: 5,
            pause: Duration::from_millis(500),
            longest_pause: Duration::from_secs(30),
        }
    }
}

impl fmt::Debug for Options {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.headers.iter().map(|(name, _secret)| name.as_str()).collect();
        f.debug_struct("Options")
            .field("config_path", &self.config_path)
            .field("plain_http", &self.plain_http)
            .field("headers", &names)
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Password { .. } => "Password",
            Self::RefreshToken(_) => "RefreshToken",
            Self::Header(_) => "Header",
        })
    }
}
