//! References of images: `HOST/REPOSITORY[:TAG][@DIGEST]`, with Docker's grammar.

use std::fmt;

use super::error::{RegistryError, Result};
use crate::content::Digest;

/// The name of an image in a registry. Being one, its parts are safe in paths of URLs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Reference {
    /// With its port, if it has one.
    pub(crate) host: String,
    /// Its path in the registry.
    pub(crate) repository: String,
    pub(crate) tag: Option<String>,
    pub(crate) digest: Option<Digest>,
}

impl Reference {
    /// Parses a fully qualified name: the first part is a host.
    pub(crate) fn parse(name: &str) -> Result<Self> {
        parse(name).map_err(|why| RegistryError::Reference { name: name.chars().take(SHOWN).collect(), why })
    }

    /// Its host and repository.
    pub(crate) fn locator(&self) -> String {
        format!("{}/{}", self.host, self.repository)
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.host, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

fn parse(name: &str) -> Result<Reference, &'static str> {
    if name.is_empty() {
        return Err("it is empty");
    }
    if name.contains("://") {
        return Err("a reference has no scheme");
    }
    let (rest, digest) = match name.split_once('@') {
        Some((rest, digest)) => (rest, Some(Digest::of(digest).ok_or("its digest is none that is supported, or malformed")?)),
        None => (name, None),
    };
    let (host, path) = rest.split_once('/').ok_or("it has no host; a full name is like docker.io/library/busybox:latest")?;
    // as Docker decides whether the first part is a host; what it would complete is not a full name
    if !(host.contains(['.', ':']) || host == "localhost" || host.bytes().any(|byte| byte.is_ascii_uppercase())) {
        return Err("its first part is no host; a full name is like docker.io/library/busybox:latest");
    }
    check_host(host)?;
    let (repository, tag) = match path.split_once(':') {
        Some((repository, tag)) => (repository, Some(tag)),
        None => (path, None),
    };
    if repository.len() > REPOSITORY_BYTES {
        return Err("its repository is longer than 255 characters");
    }
    if !repository.split('/').all(is_component) {
        return Err(if repository.bytes().any(|byte| byte.is_ascii_uppercase()) {
            "a repository is in lower case"
        } else {
            "its repository is malformed"
        });
    }
    if tag.is_some_and(|tag| !is_tag(tag)) {
        return Err("its tag is malformed");
    }
    Ok(Reference { host: host.to_owned(), repository: repository.to_owned(), tag: tag.map(ToOwned::to_owned), digest })
}

/// A host name, an IPv4 address, or an IPv6 address in brackets; a port may follow.
fn check_host(host: &str) -> Result<(), &'static str> {
    if host.len() > HOST_BYTES {
        return Err("its host is longer than 255 characters");
    }
    let (name, port) = match host.strip_prefix('[').and_then(|inner| inner.split_once(']')) {
        Some((address, rest)) => {
            if address.is_empty() || !address.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b':') {
                return Err("the IPv6 address of its host is malformed");
            }
            (None, if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or("its host is malformed")?) })
        }
        None => match host.split_once(':') {
            Some((name, port)) => (Some(name), Some(port)),
            None => (Some(host), None),
        },
    };
    let is_label = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if name.is_some_and(|name| !name.split('.').all(is_label)) {
        return Err("its host is malformed");
    }
    match port {
        Some(port) if port.is_empty() || !port.bytes().all(|byte| byte.is_ascii_digit()) || port.parse::<u16>().is_err() => {
            Err("the port of its host is malformed")
        }
        _ => Ok(()),
    }
}

/// Letters and digits, with one `.`, one or two `_`, or any number of `-` between them.
fn is_component(text: &str) -> bool {
    let bytes = text.as_bytes();
    let is_word = |byte: &u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if !bytes.first().is_some_and(is_word) || !bytes.last().is_some_and(is_word) {
        return false;
    }
    bytes.split(is_word).all(|separator| matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|byte| *byte == b'-'))
}

fn is_tag(text: &str) -> bool {
    let is_word = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
    (1..=TAG_BYTES).contains(&text.len())
        && text.bytes().next().is_some_and(is_word)
        && text.bytes().all(|byte| is_word(byte) || byte == b'.' || byte == b'-')
}

/// Of all components together.
const REPOSITORY_BYTES: usize = 255;
const HOST_BYTES: usize = 255;
const TAG_BYTES: usize = 128;
/// Characters of a name that is no reference.
const SHOWN: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f0f";

    #[test]
    fn a_full_name_is_taken_apart_as_docker_does() {
        let both = format!("docker.io/library/busybox:1.36@sha256:{HEX}");
        let digest = format!("r.example:5000/a/b__c/d-e--f.g@sha256:{HEX}");
        let sha256 = format!("sha256:{HEX}");
        let long = format!("sha512:{HEX}{HEX}");
        let sha512 = format!("r.example/a@{long}");
        for (name, host, repository, tag, digest) in [
            ("docker.io/library/busybox:latest", "docker.io", "library/busybox", Some("latest"), None),
            ("docker.io/busybox", "docker.io", "busybox", None, None),
            ("localhost/x", "localhost", "x", None, None),
            ("localhost:5000/x:T_1.a-b", "localhost:5000", "x", Some("T_1.a-b"), None),
            ("host:5000/x", "host:5000", "x", None, None),
            ("HOST/x", "HOST", "x", None, None),
            ("127.0.0.1:80/x/y/z", "127.0.0.1:80", "x/y/z", None, None),
            ("[2001:db8::1]:5000/x", "[2001:db8::1]:5000", "x", None, None),
            ("[::1]/x:y", "[::1]", "x", Some("y"), None),
            (&both, "docker.io", "library/busybox", Some("1.36"), Some(sha256.as_str())),
            (&digest, "r.example:5000", "a/b__c/d-e--f.g", None, Some(sha256.as_str())),
            (&sha512, "r.example", "a", None, Some(long.as_str())),
        ] {
            let parsed = Reference::parse(name).unwrap_or_else(|error| panic!("{error}"));
            assert_eq!((parsed.host.as_str(), parsed.repository.as_str()), (host, repository), "{name}");
            assert_eq!((parsed.tag.as_deref(), parsed.digest.as_ref().map(Digest::as_str)), (tag, digest), "{name}");
            assert_eq!(parsed.to_string(), name);
        }
    }

    #[test]
    fn what_is_no_full_name_is_refused_with_the_reason() {
        let digest = format!("sha256:{HEX}");
        for (name, why) in [
            (String::new(), "empty"),
            ("busybox".to_owned(), "no host"),
            (HEX.to_owned(), "no host"),
            ("library/busybox".to_owned(), "no host"),
            ("https://docker.io/library/busybox".to_owned(), "scheme"),
            ("docker.io/Library/busybox".to_owned(), "lower case"),
            ("docker.io/".to_owned(), "repository"),
            ("docker.io//x".to_owned(), "repository"),
            ("docker.io/x/".to_owned(), "repository"),
            ("docker.io/a/../b".to_owned(), "repository"),
            ("docker.io/a/..".to_owned(), "repository"),
            ("docker.io/a___b".to_owned(), "repository"),
            ("docker.io/a..b".to_owned(), "repository"),
            ("docker.io/-a".to_owned(), "repository"),
            ("docker.io/a?b".to_owned(), "repository"),
            ("docker.io/a%2fb".to_owned(), "repository"),
            (format!("docker.io/{}", "a".repeat(256)), "255"),
            ("docker.io/x:".to_owned(), "tag"),
            ("docker.io/x:-a".to_owned(), "tag"),
            ("docker.io/x:a:b".to_owned(), "tag"),
            ("docker.io/x:a/b".to_owned(), "tag"),
            (format!("docker.io/x:{}", "a".repeat(129)), "tag"),
            ("docker.io/x@sha256:../../etc".to_owned(), "digest"),
            ("docker.io/x@sha256:1".to_owned(), "digest"),
            (format!("docker.io/x@md5:{HEX}"), "digest"),
            (format!("docker.io/x@{}", digest.to_uppercase()), "digest"),
            (format!("docker.io/x@{digest}@{digest}"), "digest"),
            ("docker.io:/x".to_owned(), "port"),
            ("docker.io:65536/x".to_owned(), "port"),
            ("docker.io:+1/x".to_owned(), "port"),
            ("docker..io/x".to_owned(), "host"),
            ("user:password@docker.io/x".to_owned(), "digest"),
            ("[::1/x".to_owned(), "host"),
            ("[/etc]/x".to_owned(), "host"),
            ("-docker.io/x".to_owned(), "host"),
        ] {
            let error = Reference::parse(&name).expect_err(&name).to_string();
            assert!(error.contains(why), "{name}: {error}");
        }
    }
}
