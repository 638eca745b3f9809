//! What a reference names, and small documents.

use hyper::body::Bytes;
use hyper::header::{ACCEPT, HeaderMap, HeaderValue};
use hyper::{Method, StatusCode};

use super::attempts::{Task, first_of};
use super::error::{RegistryError, Result, Why};
use super::host::{Answer, Call, Host, Target};
use super::http::Payload;
use super::{DOCUMENT_BYTES, Descriptor, MANIFESTS, Registry, document, is_manifest};
use crate::content::{Algorithm, Digest, Hasher};

impl Registry {
    /// The content that the reference's digest or tag names; `latest` where it has neither.
    pub(crate) async fn resolve(&self) -> Result<Descriptor> {
        let task = Task { op: "resolve", what: self.reference().to_string() };
        let hosts = self.hosts(|host| host.capabilities.resolve);
        first_of(self.limits(), &task, &hosts, self.steady(&hosts), |host| async move { self.resolve_at(&host).await }).await
    }

    /// All of a manifest or another small document, its digest verified; of a manifest also that it is of its descriptor's type.
    pub(crate) async fn fetch_document(&self, content: &Descriptor) -> Result<Bytes> {
        let task = self.fetching(content);
        if content.size > DOCUMENT_BYTES {
            let why = Why::Protocol(format!("it has {} bytes, more than the {DOCUMENT_BYTES} of a document", content.size));
            let attempt = super::Attempt { host: self.reference().host.clone(), times: 1, why };
            return Err(RegistryError::Failed { op: task.op, what: task.what, attempts: vec![attempt] });
        }
        if let Some(body) = self.remembered(&content.digest) {
            return Ok(body);
        }
        let hosts = self.hosts(|host| host.capabilities.pull);
        first_of(self.limits(), &task, &hosts, self.steady(&hosts), |host| async move {
            let (_type, body) = self.document_at(&host, self.content_path(content), content.media_type.clone(), Some(content.size)).await?;
            verified(&content.digest, &body)?;
            if is_manifest(&content.media_type) {
                document::media_type(Some(&content.media_type), &body).map_err(Why::Protocol)?;
            }
            Ok(Bytes::from(body))
        })
        .await
    }

    async fn resolve_at(&self, host: &Host) -> Result<Descriptor, Why> {
        let reference = self.reference();
        let name = reference.digest.as_ref().map(Digest::as_str).or(reference.tag.as_deref()).unwrap_or("latest");
        let path = format!("/{}/manifests/{name}", self.repository());
        let mut answer = self.ask(host, Method::HEAD, &path, &MANIFESTS.join(", ")).await?;
        match answer.response.status {
            StatusCode::OK => {
                if let Some(found) = self.of_head(&answer) {
                    return Ok(found);
                }
            }
            // asking once more would only cost another request
            StatusCode::UNAUTHORIZED | StatusCode::TOO_MANY_REQUESTS if !answer.is_redirected => {
                return Err(answer.refusal().await);
            }
            _refused => {}
        }
        let (named, body) = self.document_at(host, path, MANIFESTS.join(", "), None).await?;
        let digest = match &reference.digest {
            Some(digest) => {
                verified(digest, &body)?;
                digest.clone()
            }
            None => hashed(Algorithm::Sha256, &body),
        };
        let media_type = document::media_type(named.as_deref(), &body).map_err(Why::Protocol)?;
        let found = Descriptor::new(media_type, digest, body.len() as u64);
        self.remember(&found.digest, Bytes::from(body));
        Ok(found)
    }

    /// What the head of an answer says, if it says all of it.
    fn of_head(&self, answer: &Answer) -> Option<Descriptor> {
        let response = &answer.response;
        let digest = Digest::of(response.header("docker-content-digest")?)?;
        if self.reference().digest.as_ref().is_some_and(|wanted| *wanted != digest) {
            return None;
        }
        let media_type = response.header("content-type")?.split(';').next()?.trim();
        let size: u64 = response.header("content-length")?.parse().ok()?;
        let is_usable = is_manifest(media_type) && (1..=DOCUMENT_BYTES).contains(&size);
        is_usable.then(|| Descriptor::new(media_type, digest, size))
    }

    /// A document and the type that its server calls it.
    async fn document_at(&self, host: &Host, path: String, accept: String, size: Option<u64>) -> Result<(Option<String>, Vec<u8>), Why> {
        let answer = self.ask(host, Method::GET, &path, &accept).await?.expect(&[200]).await?;
        let mut response = answer.response;
        plain(&response.headers)?;
        let named = response.header("content-type").map(ToOwned::to_owned);
        let most = usize::try_from(size.unwrap_or(DOCUMENT_BYTES)).unwrap_or(usize::MAX);
        let body = response.body.all(most).await?;
        let body = body.ok_or_else(|| Why::Protocol(format!("it sends a document of more than {most} bytes")))?;
        if size.is_some_and(|size| size != body.len() as u64) {
            return Err(Why::Protocol(format!("it sends {} bytes instead of {most}", body.len())));
        }
        Ok((named, body))
    }

    async fn ask(&self, host: &Host, method: Method, path: &str, accept: &str) -> Result<Answer, Why> {
        let mut headers = HeaderMap::new();
        let accept =
            HeaderValue::from_str(&format!("{accept}, */*")).map_err(|_error| Why::Protocol("its media type cannot be sent".to_owned()))?;
        headers.insert(ACCEPT, accept);
        let namespace = self.namespace(host);
        let target = Target::Path(path, &namespace);
        host.call(&Call { method, target, headers, payload: Payload::None, scopes: &self.pull_scope() }).await
    }
}

/// The bytes of content, and no compression of them: it was not asked for.
pub(super) fn plain(headers: &HeaderMap) -> Result<(), Why> {
    match headers.get("content-encoding").map(|encoding| encoding.as_bytes()) {
        None | Some(b"" | b"identity") => Ok(()),
        Some(_) => Err(Why::Protocol("it compresses what it sends, which it was not asked to".to_owned())),
    }
}

fn hashed(algorithm: Algorithm, body: &[u8]) -> Digest {
    let mut hasher = Hasher::new(algorithm);
    hasher.update(body);
    hasher.digest()
}

fn verified(digest: &Digest, body: &[u8]) -> Result<(), Why> {
    let got = hashed(digest.algorithm(), body);
    if got == *digest { Ok(()) } else { Err(Why::Protocol(format!("it sends {got} instead of {digest}"))) }
}
