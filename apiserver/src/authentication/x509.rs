//! Client certificates: who a certificate says its bearer is, believed if one of the authorities signed it.
//!
//! The TLS handshake only proves that the client holds the key (`component_base::tls::AnyCertificate`): which authority is believed is
//! decided here, per request, so that a wrong certificate is answered with 401 as Kubernetes does, and so that the front
//! proxy's authority can be told from that of the users. Outcomes are remembered per certificate.
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use rustls_pki_types::{CertificateDer, UnixTime};
use sha2::{Digest, Sha256};
use x509_parser::oid_registry::{OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA};
use x509_parser::prelude::{FromDer as _, X509Certificate, X509Version};

use super::UserInfo;

/// How often the authorities' file is looked at for changes.
const RECHECK_FILE: Duration = Duration::from_secs(10);
/// Chains whose outcome is remembered; all are forgotten at the limit.
const REMEMBERED_MAX: usize = 16_384;
/// So long it is remembered that one is not believed. (Who has a certificate of the users' authority is no front
/// proxy: that is asked with every request.)
const REFUSED_SECONDS: i64 = 30;

/// The certificates of a file that is read anew when it changes.
pub struct Authorities {
    path: PathBuf,
    state: Mutex<State>,
}

struct State {
    checked: Instant,
    modified: Option<SystemTime>,
    verifier: Arc<Verifier>,
    pem: Arc<str>,
    /// By the SHA-256 of a chain: whose it is, or why it is not believed, and the seconds since the epoch until which
    /// that is known to hold.
    remembered: HashMap<[u8; 32], (i64, Result<Identity, String>)>,
}

/// Who may sign.
struct Verifier {
    roots: Vec<CertificateDer<'static>>,
    webpki: Arc<dyn ClientCertVerifier>,
}

/// What a certificate says of its bearer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub common_name: String,
    pub organizations: Vec<String>,
    /// SHA-256 of the certificate, in hexadecimal.
    pub fingerprint: String,
}

// === impl Authorities ===

impl Authorities {
    pub fn load(path: &Path) -> anyhow::Result<Self> {
        let modified = modified(path);
        let (verifier, pem) = read(path)?;
        let state = State { checked: Instant::now(), modified, verifier, pem, remembered: HashMap::new() };
        Ok(Self { path: path.to_owned(), state: Mutex::new(state) })
    }

    /// The text of the file as it was last read well.
    pub fn pem(&self) -> Arc<str> {
        self.refreshed(|state| state.pem.clone())
    }

    /// The identity in the first certificate if the chain, of which this is the SHA-256, leads to one of the authorities.
    pub fn verify(&self, chain: &[CertificateDer<'static>], digest: [u8; 32]) -> Result<Identity, String> {
        let (leaf, intermediates) = chain.split_first().ok_or("no certificate")?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now_seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let verifier = self.refreshed(|state| match state.remembered.get(&digest) {
            Some((until, outcome)) if now_seconds <= *until => Err(outcome.clone()),
            _ => Ok(state.verifier.clone()),
        });
        let verifier = match verifier {
            Ok(verifier) => verifier,
            Err(known) => return known,
        };
        let info = component_base::x509::read_der(leaf).map_err(|error| error.to_string())?;
        let verified = verifier.verify(leaf, intermediates, now);
        let (until, outcome) = match verified {
            Ok(_) => {
                let fingerprint = Sha256::digest(leaf).iter().map(|byte| format!("{byte:02x}")).collect();
                let (common_name, organizations) = (info.common_name, info.organizations);
                (info.not_after, Ok(Identity { common_name, organizations, fingerprint }))
            }
            Err(error) => {
                let why = format!("verifying certificate of {:?}: {error}", info.common_name);
                (now_seconds.saturating_add(REFUSED_SECONDS), Err(why))
            }
        };
        let mut state = self.state.lock();
        // Not if the authorities changed meanwhile.
        if Arc::ptr_eq(&state.verifier, &verifier) {
            if state.remembered.len() >= REMEMBERED_MAX {
                state.remembered.clear();
            }
            state.remembered.insert(digest, (until, outcome.clone()));
        }
        outcome
    }

    fn refreshed<T>(&self, read_state: impl FnOnce(&State) -> T) -> T {
        let mut state = self.state.lock();
        if state.checked.elapsed() >= RECHECK_FILE {
            state.checked = Instant::now();
            let modified = modified(&self.path);
            if modified != state.modified {
                match read(&self.path) {
                    Ok((verifier, pem)) => {
                        tracing::info!(file = %self.path.display(), "read certificate authorities anew");
                        state.verifier = verifier;
                        state.pem = pem;
                        state.modified = modified;
                        state.remembered.clear();
                    }
                    Err(error) => {
                        tracing::warn!(file = %self.path.display(), %error, "cannot read certificate authorities; keeping the old ones")
                    }
                }
            }
        }
        read_state(&state)
    }
}

fn read(path: &Path) -> anyhow::Result<(Arc<Verifier>, Arc<str>)> {
    let roots = component_base::tls::read_certificates(path)?;
    let mut store = rustls::RootCertStore::empty();
    for certificate in &roots {
        store.add(certificate.clone())?;
    }
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let webpki = WebPkiClientVerifier::builder_with_provider(Arc::new(store), provider).build()?;
    Ok((Arc::new(Verifier { roots, webpki }), std::fs::read_to_string(path)?.into()))
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|m| m.modified()).ok()
}

// === impl Verifier ===

impl Verifier {
    /// Whether the chain leads to one of the authorities, for a client, and holds at this time since the epoch.
    fn verify(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: Duration,
    ) -> Result<(), String> {
        match X509Certificate::from_der(leaf) {
            Ok((_, leaf)) if leaf.version() == X509Version::V1 => self.verify_version_1(&leaf, now),
            _ => self
                .webpki
                .verify_client_cert(leaf, intermediates, UnixTime::since_unix_epoch(now))
                .map_or_else(|error| Err(error.to_string()), |_| Ok(())),
        }
    }

    /// A certificate without extensions, as `openssl x509 -req` makes them unless told otherwise. Kubernetes believes them:
    /// they are for any use. Rustls does not read them.
    fn verify_version_1(&self, leaf: &X509Certificate<'_>, now: Duration) -> Result<(), String> {
        let algorithm = &leaf.signature_algorithm.algorithm;
        if [OID_PKCS1_SHA1WITHRSA, OID_SHA1_WITH_RSA].contains(algorithm) {
            return Err("it is signed with SHA-1".to_owned());
        }
        let seconds = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let validity = leaf.validity();
        if !(validity.not_before.timestamp()..=validity.not_after.timestamp()).contains(&seconds) {
            return Err("certificate has expired or is not yet valid".to_owned());
        }
        let signed = self.roots.iter().filter_map(|root| X509Certificate::from_der(root).ok()).any(|(_, root)| {
            root.subject().as_raw() == leaf.issuer().as_raw() && leaf.verify_signature(Some(root.public_key())).is_ok()
        });
        if signed { Ok(()) } else { Err("certificate signed by unknown authority".to_owned()) }
    }
}

// === impl Identity ===

impl Identity {
    /// As `CommonNameUserConversion`.
    pub fn user(self) -> UserInfo {
        let credential = format!("X509SHA256={}", self.fingerprint);
        UserInfo {
            name: self.common_name,
            groups: self.organizations,
            uid: String::new(),
            extra: [(super::CREDENTIAL_ID.to_owned(), vec![credential])].into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
    use rustls_pki_types::pem::PemObject as _;

    /// An authority, and what `openssl x509 -req` made of a request with it: a certificate of version 1.
    const AUTHORITY: &str = "-----BEGIN CERTIFICATE-----
MIIBdTCCARugAwIBAgIUbEMVjxGU2DXELHPg+BjYpjxqj48wCgYIKoZIzj0EAwIw
DzENMAsGA1UEAwwEb3VyczAgFw0yNjExMjExNTA5MzRaGA8yMTI2MTAyODE1MDkz
NFowDzENMAsGA1UEAwwEb3VyczBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABKr1
WwRj4RWJz/LFQmAzaUaGeFbaNiw+IJ2BBUcsySI5FEosdzf+6z0mAClFMFHp/un3
rR7sQYY0LyM8bEqSW3KjUzBRMB0GA1UdDgQWBBRo4ShH3sIqCEik/72Zdtq5yEbP
AjAfBgNVHSMEGDAWgBRo4ShH3sIqCEik/72Zdtq5yEbPAjAPBgNVHRMBAf8EBTAD
AQH/MAoGCCqGSM49BAMCA0gAMEUCIQDYnr3mfN7PFGGLrbFYl7XNHpiFsDyG5b/v
crgfDNI9bgIgQ+BNJi1GwNzCEie2F57geii6jzkAkRoHxnmqcYVniCY=
-----END CERTIFICATE-----\n";
    const VERSION_1: &str = "-----BEGIN CERTIFICATE-----
MIIBKDCBzwIUaaOYoxNdtAsRGmsAs3nw0AIC/XIwCgYIKoZIzj0EAwIwDzENMAsG
A1UEAwwEb3VyczAgFw0yNjExMjExNTA5MzVaGA8yMTI2MTAyODE1MDkzNVowHTEN
MAsGA1UECgwEZGV2czEMMAoGA1UEAwwDYW5uMFkwEwYHKoZIzj0CAQYIKoZIzj0D
AQcDQgAEMC+OGa6KTUqVJrlR3QZHy06yNa9gsyLVcOkEsZ8QjvOdqfmqKg3qmQMa
5cQUUjcCjuimzlnzWYu0CVRYjAeByjAKBggqhkjOPQQDAgNIADBFAiAW7caSF3kL
uL5uSMVeOot4bC1Cs1lwIU9oVG3mJ7kX+gIhAMiyrWOEl7sizKVdcVXQlDmoqsFw
yGMa6kjR+R3NbkhA
-----END CERTIFICATE-----\n";

    fn authority(name: &str) -> (String, Issuer<'static, KeyPair>) {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        (pem, Issuer::new(params, key))
    }

    fn client(
        issuer: &Issuer<'_, KeyPair>,
        purpose: ExtendedKeyUsagePurpose,
        expired: bool,
    ) -> CertificateDer<'static> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name.push(DnType::CommonName, "ann");
        params.distinguished_name.push(DnType::OrganizationName, "devs");
        params.extended_key_usages.push(purpose);
        if expired {
            params.not_after = rcgen::date_time_ymd(2020, 1, 1);
            params.not_before = rcgen::date_time_ymd(2019, 1, 1);
        }
        params.signed_by(&KeyPair::generate().unwrap(), issuer).unwrap().der().clone()
    }

    #[test]
    fn a_certificate_is_believed_if_an_authority_signed_it_for_clients_and_it_has_not_expired() {
        use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
        let (pem, ours) = authority("ours");
        let (_, theirs) = authority("theirs");
        let path = std::env::temp_dir().join(format!("pilothouse-x509-{}.pem", std::process::id()));
        std::fs::write(&path, pem).unwrap();
        let authorities = Authorities::load(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let good = client(&ours, ClientAuth, false);
        for _ in 0..2 {
            let user = authorities.verify(std::slice::from_ref(&good), [1; 32]).unwrap().user();
            assert_eq!((user.name.as_str(), user.groups.as_slice()), ("ann", &["devs".to_owned()][..]));
        }
        for (digest, bad) in (2..).zip([
            client(&theirs, ClientAuth, false),
            client(&ours, ServerAuth, false),
            client(&ours, ClientAuth, true),
        ]) {
            assert!(authorities.verify(&[bad], [digest; 32]).is_err());
        }
        assert!(authorities.verify(&[], [0; 32]).is_err());
    }

    #[test]
    fn a_certificate_without_extensions_is_believed_as_well() {
        let leaf = CertificateDer::from_pem_slice(VERSION_1.as_bytes()).unwrap();
        let verify = |pem: &str, now: u64| {
            let file = tempfile::NamedTempFile::new().unwrap();
            std::fs::write(file.path(), pem).unwrap();
            read(file.path()).unwrap().0.verify(&leaf, &[], Duration::from_secs(now))
        };
        let day = 24 * 3600;
        let made = u64::try_from(component_base::x509::read_der(&leaf).unwrap().not_before).unwrap();
        assert_eq!(verify(AUTHORITY, made + day), Ok(()));
        assert!(verify(AUTHORITY, made - day).unwrap_err().contains("not yet valid"));
        assert!(verify(&authority("ours").0, made + day).unwrap_err().contains("unknown authority"));
    }
}
