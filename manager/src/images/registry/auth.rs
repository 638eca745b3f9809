//! How this client authenticates to one host: with a password, or with tokens for scopes.
//!
//! ```text
//! 401 with a challenge ─▶ credential asked for once ─▶ Basic: sent from then on
//!                                                  └▶ Bearer: a token for each set of scopes, requested again when it expires or is refused
//! ```
//! **Invariants:** a password goes to its host and to the realm that this host names, and never without TLS from a host that has it. Nothing of it
//! is in an error or a log.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hyper::body::Bytes;
use hyper::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Method, StatusCode};
use serde::Deserialize;
use tokio::sync::Semaphore;

use super::challenge::{self, Challenge};
use super::error::Why;
use super::http::{Client, Payload, Request, authorize};
use super::message;
use super::options::{self, Credentials, Secret};
use super::text::base64;
use super::url::{Scheme, Url, form};

/// What a request needs to be allowed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Scope {
    pub(super) repository: String,
    pub(super) push: bool,
}

/// The credentials and tokens of one host.
pub(super) struct Auth {
    /// The source of the credential.
    credentials: Option<Arc<dyn Credentials>>,
    host: String,
    scheme: Scheme,
    reference: String,
    /// For an answer of that source.
    limit: Duration,
    state: Mutex<State>,
    /// One request for a token at a time: others want the same, most of the time.
    turn: Semaphore,
}

#[derive(Default)]
struct State {
    /// What the host asks for, when it has asked.
    challenge: Option<Challenge>,
    /// What that source has answered.
    secret: Option<Option<Secret>>,
    tokens: HashMap<String, Token>,
    /// A token server that takes scopes in one way only.
    form: ScopeForm,
}

struct Token {
    value: String,
    ends: Instant,
}

/// How several scopes are requested. Each server takes the first two; some do not.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum ScopeForm {
    #[default]
    Repeated,
    Joined,
    First,
}

/// A token server's answer.
#[derive(Deserialize)]
struct Answer {
    token: Option<String>,
    access_token: Option<String>,
    refresh_token: Option<String>,
    expires_in: Option<f64>,
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Auth").field("host", &self.host).finish_non_exhaustive()
    }
}

impl Auth {
    pub(super) fn new(credentials: Option<Arc<dyn Credentials>>, host: String, scheme: Scheme, reference: String, limit: Duration) -> Self {
        Self { credentials, host, scheme, reference, limit, state: Mutex::default(), turn: Semaphore::new(1) }
    }

    /// The `Authorization` for a request, if the host is known to want one.
    pub(super) async fn authorization(&self, client: &Arc<Client>, scopes: &[Scope]) -> Result<Option<String>, Why> {
        let (challenge, secret) = {
            let state = self.state();
            (state.challenge.clone(), state.secret.clone().flatten())
        };
        match (challenge, secret) {
            (None, _) => Ok(None),
            (Some(_), Some(Secret::Header(value))) => Ok(Some(value)),
            (Some(Challenge::Basic), Some(Secret::Password { user, password })) => {
                Ok(Some(format!("Basic {}", base64(format!("{user}:{password}").as_bytes()))))
            }
            (Some(Challenge::Basic), _) => Ok(None),
            (Some(Challenge::Bearer { realm, service, scopes: asked, .. }), secret) => {
                let token = self.token(client, &realm, service.as_deref(), joined(&asked, scopes), secret).await?;
                Ok(Some(format!("Bearer {token}")))
            }
        }
    }

    /// Takes a challenge up. `used` is the `Authorization` of the request that was refused. Fails if there is nothing to answer it with.
    pub(super) async fn challenged(&self, headers: &HeaderMap, used: Option<&str>) -> Result<(), Why> {
        let values: Vec<String> =
            headers.get_all("www-authenticate").iter().filter_map(|value| value.to_str().ok()).map(ToOwned::to_owned).collect();
        let known = challenge::parse(values.iter().map(String::as_str));
        if known.is_empty() {
            return Err(Why::Unauthorized("401 unauthorized, and asks for no way to authenticate that is known".to_owned()));
        }
        let is_asked = self.state().secret.is_some();
        if !is_asked {
            let secret = match &self.credentials {
                None => None,
                Some(credentials) => {
                    let challenge = options::Challenge { host: &self.host, reference: &self.reference, headers: &values };
                    let late = |_elapsed| Why::Unauthorized(format!("no credentials within {:?}", self.limit));
                    let found = tokio::time::timeout(self.limit, credentials.of(&challenge)).await.map_err(late)?;
                    found.map_err(|error| Why::Unauthorized(format!("ask for credentials: {}", error.chain())))?
                }
            };
            self.state().secret.get_or_insert(secret);
        }
        let mut state = self.state();
        let has_password = matches!(state.secret, Some(Some(Secret::Password { .. })));
        let is_header = matches!(state.secret, Some(Some(Secret::Header(_))));
        let chosen = known.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
        let chosen = chosen.or_else(|| known.iter().find(|_basic| has_password || is_header));
        let Some(chosen) = chosen else {
            return Err(Why::Unauthorized("401 unauthorized, and no credential is known for it".to_owned()));
        };
        if let Some(used) = used {
            state.tokens.retain(|_scopes, token| used.strip_prefix("Bearer ") != Some(token.value.as_str()));
        }
        state.challenge = Some(chosen.clone());
        Ok(())
    }

    /// A token that is good for these scopes.
    async fn token(
        &self,
        client: &Arc<Client>,
        realm: &str,
        service: Option<&str>,
        scopes: Vec<String>,
        secret: Option<Secret>,
    ) -> Result<String, Why> {
        let key = scopes.join(" ");
        let known = || self.state().tokens.get(&key).filter(|token| token.ends > Instant::now()).map(|token| token.value.clone());
        if let Some(token) = known() {
            return Ok(token);
        }
        let _turn = self.turn.acquire().await.map_err(|_closed| Why::Broken("no token".to_owned()))?;
        if let Some(token) = known() {
            return Ok(token);
        }
        let url = Url::parse(realm).map_err(|why| Why::Unauthorized(format!("its realm cannot be used: {why}")))?;
        if secret.is_some() && self.scheme == Scheme::Https && url.origin.scheme == Scheme::Http && !url.origin.is_loopback() {
            return Err(Why::Unauthorized(format!("its realm {url} is without TLS: no credential is sent there")));
        }
        let mut form = self.state().form;
        loop {
            match request(client, &url, service, &scopes, form, secret.as_ref()).await {
                Ok(answer) => {
                    let lasts = Duration::try_from_secs_f64(answer.expires_in.unwrap_or(LIFETIME).max(0.0)).unwrap_or(LONGEST).min(LONGEST);
                    let value = [answer.access_token, answer.token].into_iter().flatten().find(|token| !token.is_empty());
                    let value = value.ok_or_else(|| Why::Unauthorized(format!("{url} answers without a token")))?;
                    let mut state = self.state();
                    state.form = form;
                    if let (Some(refresh), Some(Some(Secret::RefreshToken(kept)))) = (answer.refresh_token, &mut state.secret) {
                        *kept = refresh;
                    }
                    state.tokens.retain(|_scopes, token| token.ends > Instant::now());
                    // before its end: it has to arrive yet
                    let ends = Instant::now() + lasts - (lasts / 10).min(MARGIN);
                    state.tokens.insert(key, Token { value: value.clone(), ends });
                    return Ok(value);
                }
                Err(why) => {
                    let is_refused = why.status().is_some_and(|status| status.is_client_error() && status != StatusCode::TOO_MANY_REQUESTS);
                    form = match form {
                        ScopeForm::Repeated if is_refused && scopes.len() > 1 => ScopeForm::Joined,
                        ScopeForm::Joined if is_refused && scopes.len() > 1 => ScopeForm::First,
                        _ => return Err(of_realm(&url, why)),
                    };
                }
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One request for a token.
async fn request(
    client: &Arc<Client>,
    realm: &Url,
    service: Option<&str>,
    scopes: &[String],
    how: ScopeForm,
    secret: Option<&Secret>,
) -> Result<Answer, Why> {
    let all = scopes.join(" ");
    let scopes: Vec<&str> = match how {
        ScopeForm::Repeated => scopes.iter().map(String::as_str).collect(),
        ScopeForm::Joined => vec![all.as_str()],
        ScopeForm::First => scopes.iter().take(1).map(String::as_str).collect(),
    };
    let posted = |fields: &[(&str, &str)]| {
        let joined = scopes.join(" ");
        let mut all = vec![("client_id", CLIENT)];
        all.extend(service.map(|service| ("service", service)));
        all.extend((!joined.is_empty()).then_some(("scope", joined.as_str())));
        all.extend(fields);
        form(&all)
    };
    let post = |fields: String| {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/x-www-form-urlencoded"));
        Request { method: Method::POST, url: realm.clone(), headers, payload: Payload::Whole(Bytes::from(fields)) }
    };
    match secret {
        Some(Secret::RefreshToken(token)) => {
            exchange(client, post(posted(&[("grant_type", "refresh_token"), ("refresh_token", token)]))).await
        }
        Some(Secret::Password { user, password }) => {
            let mut got = get(realm, service, &scopes);
            authorize(&mut got.headers, &format!("Basic {}", base64(format!("{user}:{password}").as_bytes())))?;
            match exchange(client, got).await {
                // a server of OAuth only
                Err(why)
                    if matches!(
                        why.status(),
                        Some(StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED | StatusCode::NOT_IMPLEMENTED)
                    ) =>
                {
                    exchange(client, post(posted(&[("grant_type", "password"), ("username", user), ("password", password)]))).await
                }
                answered => answered,
            }
        }
        Some(Secret::Header(_)) | None => exchange(client, get(realm, service, &scopes)).await,
    }
}

fn get(realm: &Url, service: Option<&str>, scopes: &[&str]) -> Request<'static> {
    let mut url = realm.clone();
    if let Some(service) = service {
        url = url.with("service", service);
    }
    for scope in scopes {
        url = url.with("scope", scope);
    }
    Request { method: Method::GET, url, headers: HeaderMap::new(), payload: Payload::None }
}

/// Sends a request for a token; a redirect of it is followed without its credential.
async fn exchange(client: &Arc<Client>, mut request: Request<'_>) -> Result<Answer, Why> {
    request.headers.insert(ACCEPT, HeaderValue::from_static("application/json"));
    for _redirect in 0..REDIRECTS {
        let mut response = client.send(&request).await.map_err(super::http::SendError::into_why)?;
        if response.status.is_redirection() && request.method == Method::GET {
            let location = response.header("location").unwrap_or_default();
            let next = request.url.join(location).map_err(|why| Why::Protocol(format!("it redirects to no URL: {why}")))?;
            if next.origin != request.url.origin {
                request.headers.remove(hyper::header::AUTHORIZATION);
            }
            request.url = next;
            continue;
        }
        if !response.status.is_success() {
            return Err(message::refusal(&mut response).await);
        }
        let body = response.body.all(TOKEN_BYTES).await?;
        let body = body.ok_or_else(|| Why::Protocol(format!("its answer is longer than {TOKEN_BYTES} bytes")))?;
        // what is wrong with it is not shown: it may hold a token
        return serde_json::from_slice(&body).map_err(|_error| Why::Protocol("its answer is no JSON of a token".to_owned()));
    }
    Err(Why::Protocol(format!("it redirects more than {REDIRECTS} times")))
}

/// Names the token server. That it refuses is the end; that it is out of order is not.
fn of_realm(realm: &Url, why: Why) -> Why {
    let text = format!("request a token from {realm}: {why}");
    match why {
        why if why.is_passing() => Why::Broken(text),
        Why::Unreachable(_) => Why::Unreachable(text),
        _ => Why::Unauthorized(text),
    }
}

/// Scopes as they are requested: those that a request needs and those that a host has asked for, one for each resource.
fn joined(asked: &[String], needed: &[Scope]) -> Vec<String> {
    let mut all: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    let mut order = Vec::new();
    let own: Vec<String> = needed.iter().map(|scope| format!("repository:{}", scope.repository)).collect();
    for (resource, scope) in own.iter().zip(needed) {
        order.push(resource.as_str());
        all.entry(resource).or_default().extend(if scope.push { &["pull", "push"][..] } else { &["pull"][..] });
    }
    for scope in asked.iter().take(SCOPES) {
        // TYPE:NAME:ACTIONS, where a name may have a port
        let (resource, actions) = scope.rsplit_once(':').unwrap_or((scope, ""));
        order.push(resource);
        all.entry(resource).or_default().extend(actions.split(',').filter(|action| !action.is_empty()));
    }
    let mut seen = BTreeSet::new();
    order.retain(|resource| seen.insert(*resource));
    let line = |resource: &&str| {
        let actions: Vec<&str> = all.get(resource).into_iter().flatten().copied().collect();
        if actions.is_empty() { (*resource).to_owned() } else { format!("{resource}:{}", actions.join(",")) }
    };
    order.iter().map(line).collect()
}

/// What OAuth servers know this client as.
const CLIENT: &str = "x-manager";
/// Of a token whose server does not say so, in seconds.
const LIFETIME: f64 = 60.0;
const LONGEST: Duration = Duration::from_secs(24 * 3600);
/// A token is not used in the last part of its life.
const MARGIN: Duration = Duration::from_secs(10);
const TOKEN_BYTES: usize = 64 << 10;
const REDIRECTS: u32 = 5;
/// Of one challenge.
const SCOPES: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scopes_of_one_resource_are_one() {
        let need = |repository: &str, push| Scope { repository: repository.to_owned(), push };
        let strings = |texts: &[&str]| texts.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        for (asked, needed, expected) in [
            (vec![], vec![need("a/b", false)], vec!["repository:a/b:pull"]),
            (vec!["repository:a/b:pull"], vec![need("a/b", true)], vec!["repository:a/b:pull,push"]),
            (vec!["repository:a/b:delete,pull"], vec![need("a/b", false)], vec!["repository:a/b:delete,pull"]),
            (vec!["repository:proxy/a:pull"], vec![need("a", false)], vec!["repository:a:pull", "repository:proxy/a:pull"]),
            (vec!["registry:catalog:*", "x"], vec![need("a", false)], vec!["repository:a:pull", "registry:catalog:*", "x"]),
            (vec![], vec![need("a", true), need("b", false)], vec!["repository:a:pull,push", "repository:b:pull"]),
        ] {
            assert_eq!(joined(&strings(&asked), &needed), expected);
        }
    }
}
