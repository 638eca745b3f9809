//! Blobs: bodies that resume.
//!
//! ```text
//! open ─▶ bytes ─▶ bytes ─▶ end
//!  ▲         │ broken, silent
//!  └─ pause ─┘ from the offset reached; a few times without progress, then it fails
//! ```
//! **Invariants:** no byte twice, none beyond the size. A server's range is believed only if it names the offset; else what was had is passed over.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use hyper::Method;
use hyper::body::Bytes;
use hyper::header::{ACCEPT, HeaderMap, HeaderValue, RANGE};
use log::debug;

use super::attempts::{Task, first_of, pause};
use super::error::{Attempt, RegistryError, Result, Why};
use super::host::{Call, Host, Target};
use super::http::{Body, Payload};
use super::resolve::plain;
use super::url::Url;
use super::{Descriptor, Registry};

/// The bytes of a blob as they arrive: as many as its descriptor says. Their digest is not verified here.
pub(crate) struct Blob {
    registry: Registry,
    content: Descriptor,
    /// Of the next byte.
    offset: u64,
    /// The hosts that are asked, the one in use first.
    places: Vec<Arc<Host>>,
    /// Which of them is asked several times: the one in use, or at first the registry itself.
    steady: usize,
    /// Servers whose ranges are not to be believed.
    ignores_ranges: Arc<AtomicBool>,
    open: Option<Open>,
    /// Attempts in sequence that brought nothing.
    stalled: u32,
    /// For how long this was waited for the server.
    waited: Duration,
    received: u64,
}

/// A body under way.
struct Open {
    body: Body,
    /// Bytes that are passed over first.
    skip: u64,
    host: Arc<Host>,
}

impl fmt::Debug for Blob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blob").field("digest", &self.content.digest).field("offset", &self.offset).finish_non_exhaustive()
    }
}

impl Registry {
    /// Content from that offset on.
    pub(crate) async fn fetch(&self, content: &Descriptor, offset: u64) -> Result<Blob> {
        let mut places = self.hosts(|host| host.capabilities.pull);
        places.sort_by_key(|host| host.is_distrusted());
        for url in content.urls.iter().take(URLS) {
            match Url::parse(url) {
                Ok(url) => places.push(Arc::new(Host::foreign(&url, self.options()))),
                Err(why) => debug!(digest:% = content.digest, error = why; "the URL of a layer cannot be used"),
            }
        }
        let mut blob = Blob {
            registry: self.clone(),
            content: content.clone(),
            offset: offset.min(content.size),
            steady: self.steady(&places),
            places,
            ignores_ranges: Arc::default(),
            open: None,
            stalled: 0,
            waited: Duration::ZERO,
            received: 0,
        };
        if blob.left() > 0 {
            blob.reopen().await?;
        }
        Ok(blob)
    }

    /// One body of content, from that offset or from the start.
    async fn open_at(&self, host: &Arc<Host>, content: &Descriptor, offset: u64, ignores_ranges: &AtomicBool) -> Result<Open, Why> {
        let path = self.content_path(content);
        let namespace = self.namespace(host);
        loop {
            let with_range = offset > 0 && !ignores_ranges.load(Ordering::Relaxed);
            let mut headers = HeaderMap::new();
            let value =
                |text: String| HeaderValue::from_str(&text).map_err(|_error| Why::Protocol("its media type cannot be sent".to_owned()));
            headers.insert(ACCEPT, value(format!("{}, */*", content.media_type))?);
            if with_range {
                headers.insert(RANGE, value(format!("bytes={offset}-"))?);
            }
            let target = match host.only() {
                Some(url) => Target::Url(url),
                None => Target::Path(&path, &namespace),
            };
            let call = Call { method: Method::GET, target, headers, payload: Payload::None, scopes: &self.pull_scope() };
            let answer = host.call(&call).await?;
            if with_range && answer.response.status.as_u16() == 416 {
                ignores_ranges.store(true, Ordering::Relaxed);
                continue;
            }
            let response = answer.expect(if with_range { &[200, 206] } else { &[200] }).await?.response;
            plain(&response.headers)?;
            let is_part = response.status.as_u16() == 206;
            if is_part && !response.header("content-range").is_some_and(|range| is_range(range, offset, content.size)) {
                debug!(host:% = host.name(), digest:% = content.digest; "the registry sends another range than it was asked for");
                ignores_ranges.store(true, Ordering::Relaxed);
                continue;
            }
            let (skip, expected) = if is_part { (0, content.size - offset) } else { (offset, content.size) };
            match response.body.announced() {
                Some(length) if !is_part && length != expected || length > expected => {
                    return Err(Why::Protocol(format!("it sends {length} bytes instead of {expected}")));
                }
                _ => return Ok(Open { body: response.body, skip, host: Arc::clone(host) }),
            }
        }
    }
}

impl Blob {
    /// The next bytes; none at the end. After an error there are no more.
    ///
    /// It may be dropped and called again: no byte is lost.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
        while self.left() > 0 {
            let left = usize::try_from(self.left()).unwrap_or(usize::MAX);
            let Some(open) = &mut self.open else {
                let since = Instant::now();
                let reopened = self.reopen().await;
                // a server that sends a byte and breaks off makes a client wait for this most of the time
                self.waited += since.elapsed();
                reopened?;
                continue;
            };
            let since = Instant::now();
            let arrived = open.body.next().await;
            self.waited += since.elapsed();
            let why = match arrived {
                Ok(Some(mut bytes)) => {
                    let skipped = open.skip.min(bytes.len() as u64);
                    // what it sends once more earns it no time
                    self.received += bytes.len() as u64 - skipped;
                    open.skip -= skipped;
                    // both are no more than the length
                    let _passed_over = bytes.split_to(usize::try_from(skipped).unwrap_or(bytes.len()));
                    bytes.truncate(left);
                    let host = Arc::clone(&open.host);
                    if self.is_too_slow() {
                        let host = host.name();
                        let speed = self.registry.limits().bytes_per_second;
                        return Err(self.failed(host, Why::Protocol(format!("it sends less than {speed} bytes per second"))));
                    }
                    if bytes.is_empty() {
                        continue;
                    }
                    self.stalled = 0;
                    self.offset += bytes.len() as u64;
                    if self.left() == 0 {
                        self.open = None;
                    }
                    return Ok(Some(bytes));
                }
                Ok(None) => Why::Broken(format!("the body ended at {} of {} bytes", self.offset, self.content.size)),
                Err(why) => why,
            };
            let host = open.host.name();
            self.open = None;
            self.stalled += 1;
            debug!(host:%, digest:% = self.content.digest, offset = self.offset, error:% = why; "a blob is resumed");
            if self.stalled >= self.registry.limits().attempts {
                return Err(self.failed(host, why));
            }
            let pause = pause(self.registry.limits(), self.stalled, None);
            tokio::time::sleep(pause).await;
            self.waited += pause;
        }
        Ok(None)
    }

    /// How many bytes are left.
    pub(crate) fn left(&self) -> u64 {
        self.content.size - self.offset
    }

    /// Reports that the bytes were not the content: others are asked first from now on.
    pub(crate) fn distrust(self) {
        if let Some(host) = self.places.first() {
            host.distrust();
        }
    }

    /// Opens a body at the offset, at the host in use or another.
    async fn reopen(&mut self) -> Result<()> {
        let task = self.registry.fetching(&self.content);
        let (registry, content, offset, ranges) = (&self.registry, &self.content, self.offset, &self.ignores_ranges);
        let opened = first_of(registry.limits(), &task, &self.places, self.steady, |host| async move {
            registry.open_at(&host, content, offset, ranges).await
        });
        let opened = opened.await?;
        if let Some(at) = self.places.iter().position(|host| Arc::ptr_eq(host, &opened.host)) {
            self.places[..=at].rotate_right(1);
            self.steady = 0;
        }
        self.open = Some(opened);
        Ok(())
    }

    /// Whether the server has been waited for longer than any connection needs. Time between two calls does not count.
    fn is_too_slow(&self) -> bool {
        let limits = self.registry.limits();
        let allowed = limits.total + Duration::from_secs(self.received / limits.bytes_per_second.max(1));
        self.waited > allowed
    }

    fn failed(&self, host: String, why: Why) -> RegistryError {
        let Task { op, what } = self.registry.fetching(&self.content);
        RegistryError::Failed { op, what, attempts: vec![Attempt { host, times: self.stalled.max(1), why }] }
    }
}

/// Whether a `Content-Range` begins at an offset of content of that size.
fn is_range(value: &str, offset: u64, size: u64) -> bool {
    let parsed = || {
        let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
        let (start, end) = range.split_once('-')?;
        let (start, end): (u64, u64) = (start.trim().parse().ok()?, end.trim().parse().ok()?);
        let is_total = total == "*" || total.parse() == Ok(size);
        Some(start == offset && (start..size).contains(&end) && is_total)
    };
    parsed().unwrap_or(false)
}

/// Of one layer.
const URLS: usize = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_believed_only_if_it_is_the_one_asked_for() {
        for (value, expected) in [
            ("bytes 5-9/10", true),
            ("bytes 5-9/*", true),
            ("bytes 5-7/10", true),
            ("bytes 0-9/10", false),
            ("bytes 4-9/10", false),
            ("bytes 5-10/10", false),
            ("bytes 5-9/11", false),
            ("bytes 5-4/10", false),
            ("bytes */10", false),
            ("5-9/10", false),
            ("bytes 5-9", false),
            ("", false),
        ] {
            assert_eq!(is_range(value, 5, 10), expected, "{value}");
        }
    }
}
