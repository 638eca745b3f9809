//! Requests to one host: authorized, redirected, refused.
//!
//! **Invariants:** credentials and configured headers go to the host itself only, not to where it redirects. A request is sent at most three
//! times for the sake of authentication.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use hyper::header::{ACCEPT_ENCODING, HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, StatusCode};
use log::debug;

use super::auth::{Auth, Scope};
use super::error::Why;
use super::hosts::HostConfig;
use super::hosts_file::Capabilities;
use super::http::{Client, Payload, Request, Response, SendError, authorize};
use super::message;
use super::net::Connector;
use super::options::Options;
use super::url::{Origin, Scheme, Url};

/// A registry, a mirror, or where a layer's URL leads.
#[derive(Debug)]
pub(super) struct Host {
    origin: Origin,
    prefix: String,
    headers: HeaderMap,
    pub(super) capabilities: Capabilities,
    pub(super) is_mirror: bool,
    falls_back_to_http: bool,
    /// It was found not to speak TLS.
    is_plain: AtomicBool,
    /// It has answered.
    is_reached: AtomicBool,
    /// It was asked, and has never answered.
    is_down: AtomicBool,
    /// It has sent a blob that was not the one asked for.
    is_distrusted: AtomicBool,
    client: Arc<Client>,
    /// None for a host that is no registry: it gets no credential.
    auth: Option<Auth>,
    pause: Duration,
    /// Of a host that is no registry.
    only: Option<Url>,
}

/// What a host is asked.
pub(super) struct Call<'a> {
    pub(super) method: Method,
    pub(super) target: Target<'a>,
    pub(super) headers: HeaderMap,
    pub(super) payload: Payload<'a>,
    pub(super) scopes: &'a [Scope],
}

/// Where a call goes.
pub(super) enum Target<'a> {
    /// What follows the prefix of the host.
    Path(&'a str, &'a [(&'a str, &'a str)]),
    /// Somewhere that the host has named.
    Url(&'a Url),
}

/// An answer that is no redirect, and the URL that gave it.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) response: Response,
    pub(super) url: Url,
    /// Whether it comes from elsewhere.
    pub(super) is_redirected: bool,
}

impl Host {
    pub(super) fn new(config: HostConfig, options: &Options, reference: &str) -> Result<Self, Why> {
        let mut headers = HeaderMap::new();
        // a caller's credential is meant for the registry that it names
        let is_meant = |name: &str| !config.is_mirror || !["authorization", "cookie"].contains(&name.to_ascii_lowercase().as_str());
        let given = options.headers.iter().filter(|(name, _value)| is_meant(name));
        for (name, value) in config.headers.iter().chain(given) {
            let name =
                HeaderName::from_bytes(name.as_bytes()).map_err(|_error| Why::Protocol(format!("{name:?} is no name of a header")))?;
            let mut value =
                HeaderValue::from_str(value).map_err(|_error| Why::Protocol(format!("the value of header {name} cannot be sent")))?;
            value.set_sensitive(true);
            headers.append(name, value);
        }
        let limit = config.dial_timeout.filter(|limit| !limit.is_zero()).unwrap_or(options.limits.connect);
        let connector = Connector::new(config.tls, limit, options.resolver.clone(), options.proxies.clone());
        let auth = Auth::new(
            options.credentials.clone(),
            config.origin.authority(),
            config.origin.scheme,
            reference.to_owned(),
            options.limits.credential,
        );
        Ok(Self {
            prefix: config.prefix,
            headers,
            capabilities: config.capabilities,
            is_mirror: config.is_mirror,
            falls_back_to_http: config.falls_back_to_http,
            is_plain: AtomicBool::new(false),
            is_reached: AtomicBool::new(false),
            is_down: AtomicBool::new(false),
            is_distrusted: AtomicBool::new(false),
            client: Client::new(connector, options.limits.clone()),
            auth: Some(auth),
            pause: options.limits.pause,
            only: None,
            origin: config.origin,
        })
    }

    /// A host that a descriptor names. Nothing is configured for it, and it gets nothing that is.
    pub(super) fn foreign(url: &Url, options: &Options) -> Self {
        let connector =
            Connector::new(super::hosts::TlsConfig::default(), options.limits.connect, options.resolver.clone(), options.proxies.clone());
        Self {
            origin: url.origin.clone(),
            prefix: String::new(),
            headers: HeaderMap::new(),
            capabilities: Capabilities { pull: true, resolve: false, push: false },
            is_mirror: false,
            falls_back_to_http: false,
            is_plain: AtomicBool::new(false),
            is_reached: AtomicBool::new(false),
            is_down: AtomicBool::new(false),
            is_distrusted: AtomicBool::new(false),
            client: Client::new(connector, options.limits.clone()),
            auth: None,
            pause: options.limits.pause,
            only: Some(url.clone()),
        }
    }

    /// As errors name it.
    pub(super) fn name(&self) -> String {
        self.origin.authority()
    }

    /// The only URL that it is asked for, if it is no registry.
    pub(super) fn only(&self) -> Option<&Url> {
        self.only.as_ref()
    }

    /// Whether it has ever answered.
    pub(super) fn is_reached(&self) -> bool {
        self.is_reached.load(Ordering::Relaxed)
    }

    /// Whether others are to be asked first: each request would wait for this one again.
    pub(super) fn is_down(&self) -> bool {
        self.is_down.load(Ordering::Relaxed)
    }

    /// Whether others are to be asked for blobs.
    pub(super) fn is_distrusted(&self) -> bool {
        self.is_distrusted.load(Ordering::Relaxed)
    }

    pub(super) fn distrust(&self) {
        self.is_distrusted.store(true, Ordering::Relaxed);
    }

    /// Sends a call, follows redirects and answers challenges. A status that is no success is an answer too.
    pub(super) async fn call(&self, call: &Call<'_>) -> Result<Answer, Why> {
        let mut tries = 0;
        loop {
            tries += 1;
            let url = self.url(&call.target)?;
            let is_own = url.origin == self.origin();
            let authorization = match &self.auth {
                Some(auth) if is_own => auth.authorization(&self.client, call.scopes).await?,
                _ => None,
            };
            let mut answer = match self.follow(call, url, is_own, authorization.as_deref()).await {
                Ok(answer) => answer,
                Err(SendError::NotTls(why)) if self.falls_back_to_http && !self.is_plain.load(Ordering::Relaxed) => {
                    debug!(host:% = self.name(), error:% = why; "the registry does not speak TLS; HTTP is used");
                    self.is_plain.store(true, Ordering::Relaxed);
                    tries -= 1;
                    continue;
                }
                Err(error) => {
                    self.is_down.store(!self.is_reached(), Ordering::Relaxed);
                    return Err(error.into_why());
                }
            };
            self.is_reached.store(true, Ordering::Relaxed);
            self.is_down.store(false, Ordering::Relaxed);
            let is_challenge = answer.response.status == StatusCode::UNAUTHORIZED && is_own && !answer.is_redirected;
            let Some(auth) = self.auth.as_ref().filter(|_| is_challenge && tries < AUTH_TRIES) else { return Ok(answer) };
            auth.challenged(&answer.response.headers, authorization.as_deref()).await?;
            if matches!(call.payload, Payload::Source { .. }) {
                // a part of it may have arrived: the caller starts another upload, with a token
                return Ok(answer);
            }
            answer.response.body.pass_over().await;
            if tries > 1 {
                // a new token was refused: the host's clock may be behind that of the token server
                tokio::time::sleep(self.pause).await;
            }
        }
    }

    async fn follow(&self, call: &Call<'_>, url: Url, is_own: bool, authorization: Option<&str>) -> Result<Answer, SendError> {
        let mut headers = call.headers.clone();
        headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        let mut request = Request { method: call.method.clone(), url, headers: headers.clone(), payload: call.payload.clone() };
        if is_own {
            request.headers.extend(self.headers.clone());
            if let Some(authorization) = authorization {
                authorize(&mut request.headers, authorization).map_err(SendError::Other)?;
            }
        }
        let start = request.url.origin.clone();
        for _redirect in 0..=REDIRECTS {
            let mut response = self.client.send(&request).await?;
            let is_read = matches!(request.method, Method::GET | Method::HEAD);
            let follows = match response.status.as_u16() {
                301..=303 => is_read,
                307 | 308 => true,
                _ => false,
            };
            if !follows {
                let is_redirected = request.url.origin != start;
                return Ok(Answer { response, url: request.url, is_redirected });
            }
            let location =
                response.header("location").ok_or_else(|| SendError::Other(Why::Protocol("it redirects to nowhere".to_owned())))?;
            let next =
                request.url.join(location).map_err(|why| SendError::Other(Why::Protocol(format!("it redirects to no URL: {why}"))))?;
            if next.origin != request.url.origin {
                // nothing that is secret goes along; nor does it return when a later redirect leads back
                request.headers = headers.clone();
            }
            request.url = next;
            response.body.pass_over().await;
        }
        Err(SendError::Other(Why::Protocol(format!("it redirects more than {REDIRECTS} times"))))
    }

    fn url(&self, target: &Target<'_>) -> Result<Url, Why> {
        match target {
            Target::Url(url) => Ok((*url).clone()),
            Target::Path(path, query) => {
                let mut url = Url { origin: self.origin(), path: format!("{}{path}", self.prefix), query: None };
                for (name, value) in *query {
                    url = url.with(name, value);
                }
                Ok(url)
            }
        }
    }

    fn origin(&self) -> Origin {
        let mut origin = self.origin.clone();
        if self.is_plain.load(Ordering::Relaxed) {
            // the port is configured: it stays
            origin.scheme = Scheme::Http;
        }
        origin
    }
}

impl Answer {
    /// The answer, if its status is among those.
    pub(super) async fn expect(mut self, statuses: &[u16]) -> Result<Self, Why> {
        if statuses.contains(&self.response.status.as_u16()) {
            return Ok(self);
        }
        Err(self.refusal().await)
    }

    /// The answer as an error.
    pub(super) async fn refusal(&mut self) -> Why {
        message::refusal(&mut self.response).await
    }
}

/// How often a request is sent for the sake of authentication.
const AUTH_TRIES: u32 = 3;
const REDIRECTS: u32 = 10;
