//! TLS material from files, read again when the files change, so that certificates rotate without a restart.
use parking_lot::RwLock;
use rustls::{
    DigitallySignedStruct, DistinguishedName, ServerConfig, SignatureScheme,
    client::{
        ResolvesClientCert,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature_with_raw_key},
    server::{
        ClientHello, ResolvesServerCert, WebPkiClientVerifier,
        danger::{ClientCertVerified, ClientCertVerifier},
    },
    sign::CertifiedKey,
};
use rustls_pki_types::{
    CertificateDer, PrivateKeyDer, ServerName, SubjectPublicKeyInfoDer, UnixTime, pem::PemObject as _,
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use tracing::warn;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// How often a handshake may look at the files.
const RECHECK: Duration = Duration::from_secs(1);

/// TLS material that cannot be used; the message names the file and says why.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("{path}: {reason}")]
    File { path: PathBuf, reason: String },
    #[error("TLS configuration: {0}")]
    Config(String),
}

/// A certificate chain and its key, for either side of a handshake. A pair that became unreadable is kept as it was.
#[derive(Debug)]
pub struct ReloadingKeyPair {
    certificate: PathBuf,
    key: PathBuf,
    state: RwLock<KeyPairState>,
}

#[derive(Debug)]
struct KeyPairState {
    pair: Arc<CertifiedKey>,
    modified: [Option<SystemTime>; 2],
    checked: Instant,
}

/// How a server shows itself and whom it knows.
#[derive(Clone, Debug)]
pub struct ServerTls {
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Clients may show a certificate of these authorities; those who show none are let in as anonymous.
    pub client_ca: Option<PathBuf>,
}

// === impl ReloadingKeyPair ===

impl ReloadingKeyPair {
    /// Both may be the same file, as the kubelet's `kubelet-client-current.pem` is.
    pub fn load(certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Result<Self, TlsError> {
        let (certificate, key) = (certificate.into(), key.into());
        let modified = [modified(&certificate), modified(&key)];
        let pair = Arc::new(read_pair(&certificate, &key)?);
        let state = RwLock::new(KeyPairState { pair, modified, checked: Instant::now() });
        Ok(Self { certificate, key, state })
    }

    /// The newest pair.
    pub fn current(&self) -> Arc<CertifiedKey> {
        {
            let state = self.state.read();
            if state.checked.elapsed() < RECHECK {
                return state.pair.clone();
            }
        }
        let mut state = self.state.write();
        state.checked = Instant::now();
        let now = [modified(&self.certificate), modified(&self.key)];
        if now != state.modified {
            match read_pair(&self.certificate, &self.key) {
                Ok(pair) => {
                    state.pair = Arc::new(pair);
                    state.modified = now;
                }
                Err(error) => warn!(%error, "certificate changed but cannot be read; the former one stays in use"),
            }
        }
        state.pair.clone()
    }
}

impl ResolvesServerCert for ReloadingKeyPair {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }
}

impl ResolvesClientCert for ReloadingKeyPair {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.current())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

// === impl ServerTls ===

impl ServerTls {
    /// For rustls, offering HTTP/2 and HTTP/1.1.
    pub fn server_config(&self) -> Result<ServerConfig, TlsError> {
        let pair = ReloadingKeyPair::load(&self.certificate, &self.key)?;
        let builder = match &self.client_ca {
            Some(path) => ServerConfig::builder().with_client_cert_verifier(client_verifier(path)?),
            None => ServerConfig::builder().with_no_client_auth(),
        };
        let mut config = builder.with_cert_resolver(Arc::new(pair));
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        Ok(config)
    }
}

/// With a certificate that is made now, names `name` and is never stored: what a server has that was given no files.
pub fn self_signed_config(name: &str, client_ca: Option<&Path>) -> Result<ServerConfig, TlsError> {
    let made = |e: &dyn std::fmt::Display| TlsError::Config(format!("self-signed certificate: {e}"));
    let loopback = [std::net::IpAddr::from([127, 0, 0, 1])];
    let (certificate, key) =
        crate::x509::self_signed(name, &["localhost".to_owned()], &loopback).map_err(|e| made(&e))?;
    let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).map_err(|e| made(&e))?;
    let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).map_err(|e| made(&e))?;
    let builder = match client_ca {
        Some(path) => ServerConfig::builder().with_client_cert_verifier(client_verifier(path)?),
        None => ServerConfig::builder().with_no_client_auth(),
    };
    let mut config = builder.with_single_cert(vec![certificate], key).map_err(|e| made(&e))?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// A verifier that asks for a certificate of these authorities, and takes none for an answer.
pub fn client_verifier(ca_file: &Path) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in read_certificates(ca_file)? {
        roots.add(certificate).map_err(|e| file_error(ca_file, e))?;
    }
    WebPkiClientVerifier::builder(Arc::new(roots))
        .allow_unauthenticated()
        .build()
        .map_err(|e| TlsError::Config(format!("client CA {}: {e}", ca_file.display())))
}

/// All certificates of a PEM file, which must hold one at least.
pub fn read_certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Vec<_> =
        CertificateDer::pem_file_iter(path).and_then(Iterator::collect).map_err(|e| file_error(path, e))?;
    if certificates.is_empty() {
        return Err(file_error(path, "holds no certificate in PEM form"));
    }
    Ok(certificates)
}

fn read_pair(certificate: &Path, key: &Path) -> Result<CertifiedKey, TlsError> {
    let chain = read_certificates(certificate)?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(|e| file_error(key, e))?;
    let signing = rustls::crypto::aws_lc_rs::sign::any_supported_type(&private).map_err(|e| file_error(key, e))?;
    let pair = CertifiedKey::new(chain, signing);
    match pair.keys_match() {
        Ok(()) | Err(rustls::Error::InconsistentKeys(rustls::InconsistentKeys::Unknown)) => Ok(pair),
        Err(e) => Err(file_error(key, format!("is not the key of {}: {e}", certificate.display()))),
    }
}

/// Believes any certificate whose key the other side holds: for those who ask later whose word it is worth, or not at all.
#[derive(Debug)]
pub struct AnyCertificate {
    algorithms: WebPkiSupportedAlgorithms,
}

// === impl AnyCertificate ===

impl AnyCertificate {
    pub fn new() -> Arc<Self> {
        let provider = rustls::crypto::aws_lc_rs::default_provider();
        Arc::new(Self { algorithms: provider.signature_verification_algorithms })
    }
}

/// What both sides of a handshake check: that the other one holds the key.
macro_rules! verifies_signatures {
    () => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            verify_tls12_signature(message, certificate, signature, &self.algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, rustls::Error> {
            // By the key alone: what the certificate's version is does not matter here.
            let unreadable = |_| rustls::Error::InvalidCertificate(rustls::CertificateError::BadEncoding);
            let (_, parsed) = X509Certificate::from_der(certificate).map_err(unreadable)?;
            let key = SubjectPublicKeyInfoDer::from(parsed.public_key().raw);
            verify_tls13_signature_with_raw_key(message, &key, signature, &self.algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    verifies_signatures!();
}

/// A client may also show none.
impl ClientCertVerifier for AnyCertificate {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    verifies_signatures!();
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|m| m.modified()).ok()
}

fn file_error(path: &Path, reason: impl ToString) -> TlsError {
    TlsError::File { path: path.to_owned(), reason: reason.to_string() }
}
