//! The certificate authority behind the signers: the cluster's own certificate and key, read anew when they change.
use super::{request::Request, subject};
use base64::{Engine as _, prelude::BASE64_STANDARD as STANDARD};
use k8s_openapi::api::certificates::v1::CertificateSigningRequestSpec;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose as Extended, IsCa, Issuer, KeyPair,
    KeyUsagePurpose as Usage, SanType, SigningKey as _, SubjectPublicKeyInfo,
};
use std::{path::PathBuf, time::Duration};
use time::OffsetDateTime;
use x509_parser::{certificate::X509Certificate, prelude::FromDer as _};

/// Clocks of nodes may be behind.
const BACKDATE: Duration = Duration::from_secs(300);
/// What holds for less ends as asked; what holds for longer is backdated at both ends.
const SHORT: Duration = Duration::from_secs(8 * 3600);
/// Nobody gets a certificate that holds for less.
const SHORTEST: Duration = Duration::from_secs(600);

/// Where the authority's files are, and how long what it signs may hold.
pub struct Authority {
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub longest: Duration,
}

/// Why nothing was signed; it is tried again.
#[derive(Debug, thiserror::Error)]
pub enum SigningError {
    /// The operator's to mend.
    #[error("certificate authority {file}: {cause}")]
    Authority { file: String, cause: String },
    #[error("{0}")]
    Request(String),
    #[error("refusing to sign a certificate that expired in the past: NotAfter={0}")]
    Expired(OffsetDateTime),
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

/// As `CertificateAuthority.Sign` with the `PermissiveSigningPolicy`.
fn sign_with(
    issuer: &Issuer<'_, KeyPair>,
    request: &Request,
    spec: &CertificateSigningRequestSpec,
    longest: Duration,
    limit: OffsetDateTime,
    now: OffsetDateTime,
) -> Result<String, SigningError> {
    if !request.is_proven {
        return Err(SigningError::Request("unable to verify certificate request signature".to_owned()));
    }
    if now >= limit {
        return Err(SigningError::Expired(limit));
    }
    let failed = |e: rcgen::Error| SigningError::Request(format!("failed to sign certificate: {e}"));
    // The request's key, subject and names; everything else is ours to say.
    let key = SubjectPublicKeyInfo::from_der(&request.public_key).map_err(failed)?;
    let lifetime = lifetime(spec.expiration_seconds, longest);
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = names(request).map_err(failed)?;
    params.not_before = now - BACKDATE;
    params.not_after = (now + if lifetime < SHORT { lifetime } else { lifetime - BACKDATE }).min(limit);
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    for usage in spec.usages.iter().flatten() {
        match part_of(usage) {
            Some(Part::Key(usage)) if !params.key_usages.contains(&usage) => params.key_usages.push(usage),
            Some(Part::Extended(usage)) if !params.extended_key_usages.contains(&usage) => {
                params.extended_key_usages.push(usage);
            }
            Some(_) => {}
            None => return Err(SigningError::Request(format!("unrecognized usage values: [{usage:?}]"))),
        }
    }
    if request.subject == subject::encode(|_| Vec::new()) {
        return params.signed_by(&key, issuer).map(|c| c.pem()).map_err(failed);
    }
    // `DistinguishedName` holds one value of a kind, requests for several groups have more: the subject is put in afterwards.
    params.distinguished_name.push(DnType::CommonName, "pilothouse.dev/subject-to-come");
    let certificate = params.signed_by(&key, issuer).map_err(failed)?;
    with_subject(certificate.der(), &request.subject, issuer.key())
        .ok_or_else(|| SigningError::Request("failed to sign certificate: its subject has no place".to_owned()))
}

/// The certificate with another subject, in PEM form.
fn with_subject(der: &[u8], subject: &[u8], key: &KeyPair) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(der).ok()?;
    let to_sign = subject::exchange(parsed.tbs_certificate.as_ref(), parsed.subject().as_raw(), subject)?;
    let signature = key.sign(&to_sign).ok()?;
    let algorithm = subject::after(der, parsed.tbs_certificate.as_ref().len())?;
    let der = subject::signed(&to_sign, algorithm, &signature);
    Some(pem(&der))
}

/// In lines of 64, as everywhere.
fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let (mut lines, mut rest) = (String::new(), text.as_str());
    while !rest.is_empty() {
        let (line, next) = rest.split_at(rest.len().min(64));
        lines = lines + line + "\n";
        rest = next;
    }
    format!("-----BEGIN CERTIFICATE-----\n{lines}-----END CERTIFICATE-----\n")
}

fn names(request: &Request) -> Result<Vec<SanType>, rcgen::Error> {
    let mut names = Vec::new();
    for name in &request.dns_names {
        names.push(SanType::DnsName(name.as_str().try_into()?));
    }
    for mail in &request.emails {
        names.push(SanType::Rfc822Name(mail.as_str().try_into()?));
    }
    names.extend(request.ip_addresses.iter().copied().map(SanType::IpAddress));
    for uri in &request.uris {
        names.push(SanType::URI(uri.as_str().try_into()?));
    }
    Ok(names)
}

/// Where a usage stands in a certificate.
enum Part {
    Key(Usage),
    Extended(Extended),
}

/// As `keyUsageDict` and `extKeyUsageDict`. Who may sign certificates is still no authority: that is said in a place of its own.
fn part_of(usage: &str) -> Option<Part> {
    let pkix = |last: u64| Extended::Other(vec![1, 3, 6, 1, 5, 5, 7, 3, last]);
    Some(match usage {
        "signing" | "digital signature" => Part::Key(Usage::DigitalSignature),
        "content commitment" => Part::Key(Usage::ContentCommitment),
        "key encipherment" => Part::Key(Usage::KeyEncipherment),
        "key agreement" => Part::Key(Usage::KeyAgreement),
        "data encipherment" => Part::Key(Usage::DataEncipherment),
        "cert sign" => Part::Key(Usage::KeyCertSign),
        "crl sign" => Part::Key(Usage::CrlSign),
        "encipher only" => Part::Key(Usage::EncipherOnly),
        "decipher only" => Part::Key(Usage::DecipherOnly),
        "any" => Part::Extended(Extended::Any),
        "server auth" => Part::Extended(Extended::ServerAuth),
        "client auth" => Part::Extended(Extended::ClientAuth),
        "code signing" => Part::Extended(Extended::CodeSigning),
        "email protection" | "s/mime" => Part::Extended(Extended::EmailProtection),
        "ipsec end system" => Part::Extended(pkix(5)),
        "ipsec tunnel" => Part::Extended(pkix(6)),
        "ipsec user" => Part::Extended(pkix(7)),
        "timestamping" => Part::Extended(Extended::TimeStamping),
        "ocsp signing" => Part::Extended(Extended::OcspSigning),
        "microsoft sgc" => Part::Extended(Extended::Other(vec![1, 3, 6, 1, 4, 1, 311, 10, 3, 3])),
        "netscape sgc" => Part::Extended(Extended::Other(vec![2, 16, 840, 1, 113730, 4, 1])),
        _ => return None,
    })
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
    fn what_a_request_wishes_to_be_is_not_handed_on_but_all_its_groups_and_names_are() {
        let (certificate, key) = authority();
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).unwrap();
        let pem = include_str!("jane.csr.pem");
        let request = request::read(pem.as_bytes()).unwrap();
        let now = OffsetDateTime::now_utc();
        let year = Duration::from_secs(365 * 86400);
        let usages = ["cert sign", "client auth", "s/mime", "email protection", "ipsec user"];
        let sign = |usages: &[&str], limit| sign_with(&issuer, &request, &spec(pem, usages, None), year, limit, now);
        let signed = sign(&usages, now + 2 * year).unwrap();
        let info = x509::read_pem(signed.as_bytes()).unwrap();
        assert_eq!(info.not_after - now.unix_timestamp(), year.as_secs() as i64 - 300);
        let (_, block) = x509_parser::pem::parse_x509_pem(signed.as_bytes()).unwrap();
        let read = block.parse_x509().unwrap();
        assert_eq!(read.subject().to_string(), "O=operators + O=developers, OU=one, CN=jane");
        assert!(!read.is_ca() && read.key_usage().unwrap().unwrap().value.key_cert_sign());
        assert_eq!(read.subject_alternative_name().unwrap().unwrap().value.general_names.len(), 4);
        let (_, authority) = x509_parser::pem::parse_x509_pem(certificate.as_bytes()).unwrap();
        let authority = authority.parse_x509().unwrap();
        assert!(read.verify_signature(Some(authority.public_key())).is_ok());
        assert!(matches!(sign(&["flying"], now + year), Err(SigningError::Request(_))));
        assert!(matches!(sign(&usages, now), Err(SigningError::Expired(_))));
    }
}
