//! TLS: which certificates are trusted, and which are presented.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::client::{ResolvesClientCert, WebPkiServerVerifier};
use tokio_rustls::rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, SignatureScheme};

use super::super::error::{RegistryError, Result};
use super::super::hosts::{TlsConfig, unusable};
use super::super::hosts_file::ClientPair;

/// How TLS is spoken with a host. Blocks.
pub(super) fn blocking_config(config: &TlsConfig) -> Result<Arc<ClientConfig>> {
    let provider = Arc::new(ring::default_provider());
    let builder = ClientConfig::builder_with_provider(Arc::clone(&provider)).with_safe_default_protocol_versions();
    let builder = builder.map_err(|error| refused(Path::new("TLS"), &error.to_string()))?;
    let builder = if config.skip_verify {
        builder.dangerous().with_custom_certificate_verifier(Arc::new(Unverified(Arc::clone(&provider))))
    } else {
        let roots = Arc::new(blocking_roots(config)?);
        let verifier = WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&provider)).build();
        let verifier = verifier.map_err(|_no_roots| {
            refused(Path::new("/etc/ssl/certs"), "no certificate of an authority is installed; install ca-certificates")
        })?;
        builder.dangerous().with_custom_certificate_verifier(verifier)
    };
    let mut keys = Vec::new();
    for pair in &config.client {
        keys.push(Arc::new(blocking_key(pair, &provider)?));
    }
    let mut client = if keys.is_empty() { builder.with_no_client_auth() } else { builder.with_client_cert_resolver(Arc::new(Keys(keys))) };
    client.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(client))
}

/// The system's authorities, and those of the configuration. A certificate of the system that cannot be read is passed over.
fn blocking_roots(config: &TlsConfig) -> Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    for path in &config.ca {
        let mut count = 0;
        for certificate in CertificateDer::pem_slice_iter(&blocking_file(path)?) {
            let certificate = certificate.map_err(|error| refused(path, &error.to_string()))?;
            roots.add(certificate).map_err(|error| refused(path, &error.to_string()))?;
            count += 1;
        }
        if count == 0 {
            return Err(refused(path, "it has no certificate"));
        }
    }
    Ok(roots)
}

fn blocking_key(pair: &ClientPair, provider: &CryptoProvider) -> Result<CertifiedKey> {
    let text = blocking_file(&pair.certificate)?;
    let chain: std::result::Result<Vec<CertificateDer<'static>>, _> = CertificateDer::pem_slice_iter(&text).collect();
    let chain = chain.map_err(|error| refused(&pair.certificate, &error.to_string()))?;
    if chain.is_empty() {
        return Err(refused(&pair.certificate, "it has no certificate"));
    }
    let path = pair.key.as_deref().unwrap_or(&pair.certificate);
    let text = if pair.key.is_some() { blocking_file(path)? } else { text };
    // the errors of keys show nothing of them
    let key = PrivateKeyDer::from_pem_slice(&text).map_err(|_error| refused(path, "it has no private key"))?;
    CertifiedKey::from_der(chain, key, provider).map_err(|error| refused(path, &error.to_string()))
}

fn blocking_file(path: &Path) -> Result<Vec<u8>> {
    let about = fs::metadata(path).map_err(|error| unusable(path, &error))?;
    if !about.is_file() || about.len() > FILE_BYTES {
        return Err(refused(path, "it is no file, or longer than 4 MiB"));
    }
    fs::read(path).map_err(|error| unusable(path, &error))
}

fn refused(path: &Path, why: &str) -> RegistryError {
    RegistryError::Config { path: path.to_owned(), line: None, why: why.to_owned() }
}

/// Certificates of the client. The first is presented that the server's list of authorities names, else the first that it can verify.
#[derive(Debug)]
struct Keys(Vec<Arc<CertifiedKey>>);

impl ResolvesClientCert for Keys {
    fn resolve(&self, authorities: &[&[u8]], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let usable = || self.0.iter().filter(|key| key.key.choose_scheme(schemes).is_some());
        // an issuer's name is a part of the certificate as the server writes it
        let is_issued = |key: &&Arc<CertifiedKey>| {
            key.cert.iter().any(|certificate| {
                authorities.iter().any(|name| !name.is_empty() && certificate.windows(name.len()).any(|part| part == *name))
            })
        };
        usable().find(is_issued).or_else(|| usable().next()).cloned()
    }

    fn has_certs(&self) -> bool {
        !self.0.is_empty()
    }
}

/// `skip_verify`: any certificate is accepted; the server only proves that it has the key of it.
#[derive(Debug)]
struct Unverified(Arc<CryptoProvider>);

impl ServerCertVerifier for Unverified {
    fn verify_server_cert(
        &self,
        _certificate: &CertificateDer<'_>,
        _chain: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> std::result::Result<ServerCertVerified, tokio_rustls::rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, tokio_rustls::rustls::Error> {
        verify_tls12_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> std::result::Result<HandshakeSignatureValid, tokio_rustls::rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }

    fn root_hint_subjects(&self) -> Option<&[DistinguishedName]> {
        None
    }
}

const FILE_BYTES: u64 = 4 << 20;
