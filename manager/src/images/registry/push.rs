//! What a registry is sent.
//!
//! ```text
//! blob: HEAD ─▶ there: Exists
//!         └▶ POST ?mount=&from= ─▶ 201: Mounted
//!                     └▶ refused: POST ─▶ Location ─▶ PUT ?digest= ─▶ Uploaded
//!                                                      └▶ broken: GET ─▶ Range: 0-N ─▶ PATCH, from N + 1 on ─▶ PUT ?digest=
//! ```
//! An upload that breaks goes on behind what the registry has kept of it, if it says so, and else begins again. Only the first host that may be
//! pushed to is.

use std::sync::Arc;

use hyper::Method;
use hyper::body::Bytes;
use hyper::header::{ACCEPT, CONTENT_RANGE, CONTENT_TYPE, HeaderMap, HeaderValue};
use log::debug;

use super::attempts::{Task, first_of};
use super::auth::Scope;
use super::error::{Result, Why};
use super::host::{Answer, Call, Host, Target};
use super::http::Payload;
use super::url::Url;
use super::{Descriptor, Progress, Pushed, Registry, Source};
use crate::content::Digest;

impl Registry {
    /// Pushes a blob. `mount_from` are repositories of the same registry that may have it, the likeliest first.
    pub(crate) async fn push(
        &self,
        content: &Descriptor,
        mount_from: &[String],
        source: &dyn Source,
        progress: Progress<'_>,
    ) -> Result<Pushed> {
        let hosts = self.push_host();
        first_of(self.limits(), &self.pushing(content, None), &hosts, 0, |host| async move {
            let path = format!("/{}/blobs/{}", self.repository(), content.digest);
            if self.exists(&host, &path, content).await?.is_some() {
                return Ok(Pushed::Exists);
            }
            let location = match self.mount(&host, content, mount_from).await? {
                Mount::Done => return Ok(Pushed::Mounted),
                Mount::Upload(location) => location,
                Mount::Refused => self.begin(&host, &[], &[self.own_scope()]).await?.1?,
            };
            self.upload(&host, location, content, source, progress).await?;
            Ok(Pushed::Uploaded)
        })
        .await
    }

    /// Pushes a manifest or an index, under its digest, or under a tag as well.
    pub(crate) async fn push_manifest(&self, content: &Descriptor, body: Bytes, tag: Option<&str>) -> Result<Pushed> {
        let hosts = self.push_host();
        let body = &body;
        first_of(self.limits(), &self.pushing(content, tag), &hosts, 0, |host| async move {
            let name = tag.unwrap_or(content.digest.as_str());
            let path = format!("/{}/manifests/{name}", self.repository());
            // a tag may be there and lead to something else
            let there = self.exists(&host, &path, content).await?;
            if there.is_some_and(|digest| digest.as_ref().map_or(tag.is_none(), |digest| *digest == content.digest)) {
                return Ok(Pushed::Exists);
            }
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, value(&content.media_type)?);
            let (target, scopes) = (Target::Path(&path, &[]), [self.own_scope()]);
            let call = Call { method: Method::PUT, target, headers, payload: Payload::Whole(body.clone()), scopes: &scopes };
            let answer = host.call(&call).await?.expect(&STORED).await?;
            is_same(&answer, &content.digest)?;
            Ok(Pushed::Uploaded)
        })
        .await
    }

    /// Whether a host has that: some with the digest that it reports, if it does.
    async fn exists(&self, host: &Host, path: &str, content: &Descriptor) -> Result<Option<Option<Digest>>, Why> {
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, value(&format!("{}, */*", content.media_type))?);
        let (target, scopes) = (Target::Path(path, &[]), [self.own_scope()]);
        let answer = host.call(&Call { method: Method::HEAD, target, headers, payload: Payload::None, scopes: &scopes }).await?;
        match answer.response.status.as_u16() {
            200 => Ok(Some(answer.response.header("docker-content-digest").and_then(Digest::of))),
            // that it cannot be known is no reason not to push
            400 | 403 | 404 | 405 => Ok(None),
            401 if answer.is_redirected => Ok(None),
            _ => Err(answer.expect(&[200]).await.map_or_else(|why| why, |_answer| Why::Protocol("it answers strangely".to_owned()))),
        }
    }

    /// Asks for content of other repositories. Whatever a host has against it, the content can still be sent.
    async fn mount(&self, host: &Host, content: &Descriptor, from: &[String]) -> Result<Mount, Why> {
        for repository in from.iter().filter(|from| *from != self.repository()).take(MOUNTS) {
            let scopes = [self.own_scope(), Scope { repository: repository.clone(), push: false }];
            let query = [("mount", content.digest.as_str()), ("from", repository.as_str())];
            match self.begin(host, &query, &scopes).await {
                Ok((201, _none)) => return Ok(Mount::Done),
                Ok((_, Ok(location))) => return Ok(Mount::Upload(location)),
                Ok((_, Err(why))) | Err(why) => {
                    debug!(host:% = host.name(), from = repository.as_str(), digest:% = content.digest, error:% = why; "a blob cannot be mounted");
                }
            }
        }
        Ok(Mount::Refused)
    }

    /// Begins an upload, or mounts. Returns the status, and where to send to.
    async fn begin(&self, host: &Host, query: &[(&str, &str)], scopes: &[Scope]) -> Result<(u16, Result<Url, Why>), Why> {
        let path = format!("/{}/blobs/uploads/", self.repository());
        let call =
            Call { method: Method::POST, target: Target::Path(&path, query), headers: HeaderMap::new(), payload: Payload::None, scopes };
        let answer = host.call(&call).await?;
        let status = answer.response.status.as_u16();
        if !BEGUN.contains(&status) {
            let mut answer = answer;
            return Ok((status, Err(answer.refusal().await)));
        }
        let location = answer.response.header("location").unwrap_or_default();
        let location = answer.url.join(location).map_err(|why| Why::Protocol(format!("its location for an upload is no URL: {why}")));
        Ok((status, location))
    }

    async fn upload(
        &self,
        host: &Host,
        location: Url,
        content: &Descriptor,
        source: &dyn Source,
        progress: Progress<'_>,
    ) -> Result<(), Why> {
        let payload = match content.size {
            0 => Payload::None,
            size => Payload::Source { source, offset: 0, size, progress },
        };
        let (mut sent, mut at, mut offset) = (self.finish(host, &location, content, payload).await, location, 0);
        let mut small_steps = 0;
        while let Err(Why::Broken(_)) = sent {
            match self.received(host, &at, content).await {
                Ok(Some((kept, next))) if kept > offset && small_steps < self.limits().attempts => {
                    // one that keeps a byte of each attempt would be asked as often as the blob has bytes
                    small_steps += u32::from(kept - offset < STEP_BYTES);
                    (offset, at) = (kept, next);
                }
                // nothing of it, no more than before, or too little too often
                _ => return sent,
            }
            debug!(host:% = host.name(), digest:% = content.digest, offset; "an upload is resumed");
            let rest = async {
                let mut at = at.clone();
                if offset < content.size {
                    let payload = Payload::Source { source, offset, size: content.size, progress };
                    at = self.append(host, &at, content, offset, payload).await?;
                }
                self.finish(host, &at, content, Payload::None).await
            };
            // what is against the rest may not be against a new upload
            sent = rest.await.map_err(|why| match why {
                Why::Source(error) => Why::Source(error),
                why => Why::Broken(format!("it does not take the rest of the upload: {why}")),
            });
        }
        sent
    }

    /// How much of an upload a host has kept, and where the rest is to be sent; none if it does not say so.
    async fn received(&self, host: &Host, location: &Url, content: &Descriptor) -> Result<Option<(u64, Url)>, Why> {
        let scopes = [self.own_scope()];
        let (target, headers) = (Target::Url(location), HeaderMap::new());
        let answer = host.call(&Call { method: Method::GET, target, headers, payload: Payload::None, scopes: &scopes }).await?;
        if !matches!(answer.response.status.as_u16(), 202 | 204) {
            return Ok(None);
        }
        let kept = answer.response.header("range").and_then(kept_of).filter(|kept| *kept <= content.size);
        let next = next_location(&answer, location);
        Ok(kept.zip(next))
    }

    /// Sends the rest of an upload, and returns where it is to be finished.
    async fn append(&self, host: &Host, location: &Url, content: &Descriptor, offset: u64, payload: Payload<'_>) -> Result<Url, Why> {
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(CONTENT_RANGE, value(&format!("{offset}-{}", content.size.saturating_sub(1)))?);
        let scopes = [self.own_scope()];
        let answer = host.call(&Call { method: Method::PATCH, target: Target::Url(location), headers, payload, scopes: &scopes }).await?;
        let answer = answer.expect(&BEGUN).await?;
        next_location(&answer, location).ok_or_else(|| Why::Protocol("its location for an upload is no URL".to_owned()))
    }

    /// Sends a payload, with which an upload is complete.
    async fn finish(&self, host: &Host, location: &Url, content: &Descriptor, payload: Payload<'_>) -> Result<(), Why> {
        let url = location.clone().with("digest", content.digest.as_str());
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        let scopes = [self.own_scope()];
        let answer = host.call(&Call { method: Method::PUT, target: Target::Url(&url), headers, payload, scopes: &scopes }).await?;
        if answer.response.status.as_u16() == 401 && !answer.is_redirected {
            // the token has ended meanwhile; the next attempt has another
            let mut answer = answer;
            return Err(Why::Broken(format!("it ended the upload: {}", answer.refusal().await)));
        }
        is_same(&answer.expect(&STORED).await?, &content.digest)
    }

    /// The first host that may be pushed to, in the order of the configuration: all parts of an image go to one.
    fn push_host(&self) -> Vec<Arc<Host>> {
        self.inner.hosts.iter().find(|host| host.capabilities.push).cloned().into_iter().collect()
    }

    fn pushing(&self, content: &Descriptor, tag: Option<&str>) -> Task {
        let locator = self.reference().locator();
        Task { op: "push", what: tag.map_or_else(|| format!("{locator}@{}", content.digest), |tag| format!("{locator}:{tag}")) }
    }

    fn own_scope(&self) -> Scope {
        Scope { repository: self.repository().to_owned(), push: true }
    }
}

enum Mount {
    Done,
    /// It was not mounted, but an upload has begun.
    Upload(Url),
    Refused,
}

/// Where an upload goes on: where it was, unless the host names another place.
fn next_location(answer: &Answer, location: &Url) -> Option<Url> {
    match answer.response.header("location") {
        Some(next) => answer.url.join(next).ok(),
        None => Some(location.clone()),
    }
}

/// The number of bytes in a `Range` of an upload, which is that of its first and last byte.
fn kept_of(range: &str) -> Option<u64> {
    let last = range.trim().trim_start_matches("bytes=").strip_prefix("0-")?;
    last.parse::<u64>().ok()?.checked_add(1)
}

fn value(text: &str) -> Result<HeaderValue, Why> {
    HeaderValue::from_str(text).map_err(|_error| Why::Protocol("its media type cannot be sent".to_owned()))
}

/// What a host has stored is what it was sent, as far as it says.
fn is_same(answer: &Answer, digest: &Digest) -> Result<(), Why> {
    let got = answer.response.header("docker-content-digest").and_then(Digest::of);
    match got {
        Some(got) if got != *digest && got.algorithm() == digest.algorithm() => {
            Err(Why::Protocol(format!("it has stored {got} instead of {digest}")))
        }
        _ => Ok(()),
    }
}

/// Statuses of something that is stored: 201, and what some registries send instead.
const STORED: [u16; 4] = [200, 201, 202, 204];
/// Of an upload that has begun, or of a mount.
const BEGUN: [u16; 4] = [200, 201, 202, 204];
/// Of an upload that is resumed: what is worth another attempt, however often that happens.
const STEP_BYTES: u64 = 1 << 20;
/// Repositories that a blob is asked for.
const MOUNTS: usize = 3;
