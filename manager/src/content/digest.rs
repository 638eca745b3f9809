//! Digests: names of content, and what computes them.

use std::fmt;

use sha2::{Digest as _, Sha256, Sha384, Sha512};

use crate::error::{Error, Result};

/// A name of content, `ALGORITHM:HEX`. Being one, its parts are safe file names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Digest(String);

/// How content is hashed. All of containerd's.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Algorithm {
    #[default]
    Sha256,
    Sha384,
    Sha512,
}

impl Digest {
    /// Takes a digest as a client writes it.
    pub(crate) fn parse(text: &str) -> Result<Self> {
        Self::of(text).ok_or_else(|| {
            let shown: String = text.chars().take(SHOWN).collect();
            Error::Invalid(format!("{shown:?} failed validation: invalid digest"))
        })
    }

    /// The digest of that text, if it is one.
    pub(crate) fn of(text: &str) -> Option<Self> {
        let (name, hex) = text.split_once(':')?;
        let algorithm = Algorithm::ALL.into_iter().find(|algorithm| algorithm.name() == name)?;
        let is_hex = hex.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'));
        (is_hex && hex.len() == algorithm.digits()).then(|| Self(text.to_owned()))
    }

    /// The one of that hash.
    pub(crate) fn of_sha256(hash: &[u8; 32]) -> Self {
        Self(format!("{}:{}", Algorithm::Sha256.name(), hex(hash)))
    }

    /// The one of these bytes.
    pub(crate) fn of_bytes(bytes: &[u8]) -> Self {
        let mut hasher = Hasher::new(Algorithm::default());
        hasher.update(bytes);
        hasher.digest()
    }

    /// Whether it is the digest of these bytes.
    pub(crate) fn is_of(&self, bytes: &[u8]) -> bool {
        let mut hasher = Hasher::new(self.algorithm());
        hasher.update(bytes);
        hasher.digest() == *self
    }

    /// The one of a text.
    pub(crate) fn of_text(text: &str) -> Self {
        Self::of_bytes(text.as_bytes())
    }

    /// As text.
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// How it is computed.
    pub(crate) fn algorithm(&self) -> Algorithm {
        let name = self.0.split(':').next().unwrap_or_default();
        Algorithm::ALL.into_iter().find(|algorithm| algorithm.name() == name).unwrap_or_default()
    }

    /// Its digits.
    pub(crate) fn hex(&self) -> &str {
        self.0.split_once(':').map_or("", |(_, hex)| hex)
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl Algorithm {
    /// All of them.
    pub(crate) const ALL: [Self; 3] = [Self::Sha256, Self::Sha384, Self::Sha512];

    /// What it is called in digests, and the name of the folder of its blobs.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Sha256 => "sha256",
            Self::Sha384 => "sha384",
            Self::Sha512 => "sha512",
        }
    }

    fn digits(self) -> usize {
        match self {
            Self::Sha256 => 64,
            Self::Sha384 => 96,
            Self::Sha512 => 128,
        }
    }
}

/// Computes a digest from bytes as they come.
#[derive(Debug, Clone)]
pub(crate) enum Hasher {
    Sha256(Sha256),
    Sha384(Sha384),
    Sha512(Sha512),
}

impl Hasher {
    /// One that has seen no bytes.
    pub(crate) fn new(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Sha256 => Self::Sha256(Sha256::new()),
            Algorithm::Sha384 => Self::Sha384(Sha384::new()),
            Algorithm::Sha512 => Self::Sha512(Sha512::new()),
        }
    }

    /// What it computes.
    pub(crate) fn algorithm(&self) -> Algorithm {
        match self {
            Self::Sha256(_) => Algorithm::Sha256,
            Self::Sha384(_) => Algorithm::Sha384,
            Self::Sha512(_) => Algorithm::Sha512,
        }
    }

    /// Takes the next bytes.
    pub(crate) fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hash) => hash.update(bytes),
            Self::Sha384(hash) => hash.update(bytes),
            Self::Sha512(hash) => hash.update(bytes),
        }
    }

    /// The digest of the bytes so far.
    pub(crate) fn digest(&self) -> Digest {
        let hex = match self {
            Self::Sha256(hash) => hex(&hash.clone().finalize()),
            Self::Sha384(hash) => hex(&hash.clone().finalize()),
            Self::Sha512(hash) => hex(&hash.clone().finalize()),
        };
        Digest(format!("{}:{hex}", self.algorithm().name()))
    }
}

fn hex(bytes: &[u8]) -> String {
    let digit = |value: u8| char::from_digit(value.into(), 16).unwrap_or_default();
    bytes.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect()
}

/// Characters of a text that is no digest.
const SHOWN: usize = 200;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_the_tools() {
        for (algorithm, expected) in [
            (Algorithm::Sha256, "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
            (Algorithm::Sha384, "sha384:cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed8086072ba1e7cc2358baeca134c825a7"),
            (
                Algorithm::Sha512,
                "sha512:ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
            ),
        ] {
            let mut hasher = Hasher::new(algorithm);
            hasher.update(b"a");
            hasher.update(b"bc");
            assert_eq!(hasher.digest().as_str(), expected);
            let parsed = Digest::parse(expected).expect("a digest");
            assert_eq!((parsed.algorithm(), parsed.hex()), (algorithm, &expected[7..]));
        }
    }

    #[test]
    fn what_is_no_digest_is_refused() {
        let good = format!("sha256:{}", "0f".repeat(32));
        assert!(Digest::of(&good).is_some());
        for bad in [
            "",
            "sha256:",
            "sha256:1",
            "sha256:../../../../etc/passwd",
            &good.to_uppercase(),
            &good[..good.len() - 1],
            &format!("{good}0"),
            &format!("md5:{}", "0f".repeat(16)),
            &format!("sha512:{}", "0f".repeat(32)),
            &good.replace("sha256", "sha256/.."),
        ] {
            assert_eq!(Digest::parse(bad).expect_err(bad).code(), tonic::Code::InvalidArgument);
        }
        let long = Digest::parse(&"x".repeat(1 << 20)).expect_err("no digest").to_string();
        assert!(long.len() < 400, "{}", long.len());
    }
}
