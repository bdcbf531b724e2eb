//! The certificate authority behind the signers: the cluster's own certificate and key, read anew when they change.
use super::request::Request;
use k8s_openapi::api::certificates::v1::CertificateSigningRequestSpec;
use rcgen::{
    CertificateSigningRequestParams, ExtendedKeyUsagePurpose as Extended, IsCa, Issuer, KeyPair,
    KeyUsagePurpose as Usage,
};
use std::{path::PathBuf, time::Duration};
use time::OffsetDateTime;

/// Clocks of nodes may be behind.
const BACKDATE: Duration = Duration::from_secs(300);
/// Nobody gets a certificate that holds for less.
const SHORTEST: Duration = Duration::from_secs(600);

/// Where the authority's files are, and how long what it signs may hold.
pub struct Authority {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub longest: Duration,
}

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// The operator's to mend; the request waits.
    #[error("certificate authority {file}: {cause}")]
    Authority { file: String, cause: String },
    /// The request's own fault; it fails for good.
    #[error("{0}")]
    Request(String),
}

impl Authority {
    /// The certificate in PEM form.
    pub async fn sign(
        &self,
        request: &Request,
        spec: &CertificateSigningRequestSpec,
        now: OffsetDateTime,
    ) -> Result<String, SigningError> {
        let read = async |path: &PathBuf| {
            let error = |cause: std::io::Error| SigningError::Authority {
                file: path.display().to_string(),
                cause: cause.to_string(),
            };
            tokio::fs::read_to_string(path).await.map_err(error)
        };
        let (certificate, key) = (read(&self.certificate).await?, read(&self.key).await?);
        let broken =
            |file: &PathBuf, cause: String| SigningError::Authority { file: file.display().to_string(), cause };
        let expires = component_base::x509::read_pem(certificate.as_bytes())
            .map_err(|e| broken(&self.certificate, e.to_string()))?
            .not_after;
        let key = KeyPair::from_pem(&key).map_err(|e| broken(&self.key, e.to_string()))?;
        let issuer =
            Issuer::from_ca_cert_pem(&certificate, key).map_err(|e| broken(&self.certificate, e.to_string()))?;
        let limit = OffsetDateTime::from_unix_timestamp(expires).unwrap_or(now);
        sign_with(&issuer, request, spec, self.longest, limit, now)
    }
}

/// How long a certificate holds: as asked, but within bounds. As `duration` of the signer.
fn lifetime(asked_seconds: Option<i32>, longest: Duration) -> Duration {
    match asked_seconds.and_then(|s| u64::try_from(s).ok()) {
        Some(seconds) => Duration::from_secs(seconds).clamp(SHORTEST.min(longest), longest),
        None => longest,
    }
}

fn sign_with(
    issuer: &Issuer<'_, KeyPair>,
    request: &Request,
    spec: &CertificateSigningRequestSpec,
    longest: Duration,
    limit: OffsetDateTime,
    now: OffsetDateTime,
) -> Result<String, SigningError> {
    if !request.plain_subject {
        // What would be lost on the way into the certificate might be a group.
        let text = "the subject has several values of one kind, which this signer cannot represent";
        return Err(SigningError::Request(text.to_owned()));
    }
    let refused = |e: rcgen::Error| SigningError::Request(format!("unable to parse csr: {e}"));
    let pem = String::from_utf8_lossy(&spec.request.0);
    let mut asked = CertificateSigningRequestParams::from_pem(&pem).map_err(refused)?;
    // The request's key, subject and names; everything else is ours to say.
    let params = &mut asked.params;
    params.not_before = now - BACKDATE;
    params.not_after = (now + lifetime(spec.expiration_seconds, longest)).min(limit);
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    params.key_usages = Vec::new();
    params.extended_key_usages = Vec::new();
    for usage in spec.usages.iter().flatten() {
        match usage.as_str() {
            "digital signature" | "signing" => params.key_usages.push(Usage::DigitalSignature),
            "content commitment" => params.key_usages.push(Usage::ContentCommitment),
            "key encipherment" => params.key_usages.push(Usage::KeyEncipherment),
            "key agreement" => params.key_usages.push(Usage::KeyAgreement),
            "data encipherment" => params.key_usages.push(Usage::DataEncipherment),
            "server auth" => params.extended_key_usages.push(Extended::ServerAuth),
            "client auth" => params.extended_key_usages.push(Extended::ClientAuth),
            "code signing" => params.extended_key_usages.push(Extended::CodeSigning),
            "email protection" => params.extended_key_usages.push(Extended::EmailProtection),
            "timestamping" => params.extended_key_usages.push(Extended::TimeStamping),
            "ocsp signing" => params.extended_key_usages.push(Extended::OcspSigning),
            // Above all: nobody becomes an authority by asking.
            other => return Err(SigningError::Request(format!("unsupported key usage: {other:?}"))),
        }
    }
    params.key_usages.dedup();
    asked.signed_by(issuer).map(|c| c.pem()).map_err(refused)
}

#[cfg(test)]
mod tests {
    use super::super::request::{self, KUBELET_CLIENT};
    use super::*;
    use component_base::x509;
    use rcgen::{BasicConstraints, CertificateParams};
    use serde_json::json;

    fn authority() -> (String, KeyPair) {
        let key = x509::new_key().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.distinguished_name = x509::distinguished_name("kubernetes", &[]);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        (params.self_signed(&key).unwrap().pem(), key)
    }

    fn spec(pem: &str, usages: &[&str], seconds: Option<i32>) -> CertificateSigningRequestSpec {
        let mut spec: CertificateSigningRequestSpec = serde_json::from_value(
            json!({"signerName": KUBELET_CLIENT, "usages": usages, "request": "", "expirationSeconds": seconds}),
        )
        .unwrap();
        spec.request.0 = pem.as_bytes().to_vec();
        spec
    }

    #[test]
    fn a_certificate_has_the_requests_subject_and_our_limits() {
        let (certificate, key) = authority();
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).unwrap();
        let pem = x509::request(&x509::new_key().unwrap(), "system:node:n1", &["system:nodes"], &[], &[]).unwrap();
        let request = request::read(pem.as_bytes()).unwrap();
        let now = OffsetDateTime::now_utc();
        let year = Duration::from_secs(365 * 86400);
        let sign = |seconds, limit| {
            let spec = spec(&pem, &["digital signature", "client auth"], seconds);
            let signed = sign_with(&issuer, &request, &spec, year, limit, now).unwrap();
            x509::read_pem(signed.as_bytes()).unwrap()
        };
        let far = now + Duration::from_secs(10 * 365 * 86400);
        let info = sign(Some(3600), far);
        assert_eq!(
            (info.common_name.as_str(), info.organizations),
            ("system:node:n1", vec!["system:nodes".to_owned()])
        );
        assert_eq!(info.not_after - now.unix_timestamp(), 3600);
        assert_eq!(now.unix_timestamp() - info.not_before, 300);
        assert_eq!(sign(Some(1), far).not_after - now.unix_timestamp(), 600);
        assert_eq!(
            sign(None, now + Duration::from_secs(900)).not_after - now.unix_timestamp(),
            900,
            "not beyond the authority"
        );
    }

    #[test]
    fn usages_that_make_an_authority_are_refused() {
        let (certificate, key) = authority();
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).unwrap();
        let pem = x509::request(&x509::new_key().unwrap(), "x", &[], &[], &[]).unwrap();
        let request = request::read(pem.as_bytes()).unwrap();
        let now = OffsetDateTime::now_utc();
        let spec = spec(&pem, &["cert sign"], None);
        let outcome = sign_with(&issuer, &request, &spec, Duration::from_secs(3600), now, now);
        assert!(matches!(outcome, Err(SigningError::Request(_))));
    }
}
