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
    verifier: Arc<dyn ClientCertVerifier>,
    pem: Arc<str>,
    /// By the SHA-256 of a chain: whose it is, or why it is not believed, and the seconds since the epoch until which
    /// that is known to hold.
    remembered: HashMap<[u8; 32], (i64, Result<Identity, String>)>,
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
        let verified = verifier.verify_client_cert(leaf, intermediates, UnixTime::since_unix_epoch(now));
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

fn read(path: &Path) -> anyhow::Result<(Arc<dyn ClientCertVerifier>, Arc<str>)> {
    let mut roots = rustls::RootCertStore::empty();
    for certificate in component_base::tls::read_certificates(path)? {
        roots.add(certificate)?;
    }
    let verifier = WebPkiClientVerifier::builder_with_provider(
        Arc::new(roots),
        Arc::new(rustls::crypto::aws_lc_rs::default_provider()),
    )
    .build()?;
    Ok((verifier, std::fs::read_to_string(path)?.into()))
}

fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|m| m.modified()).ok()
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
}
