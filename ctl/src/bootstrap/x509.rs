//! Certificates as data: a [`Subject`] describes one, an [`Authority`] signs it, [`inspect`] reads it back. Nothing here
//! touches a file or a clock that is not handed in.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use sha2::{Digest, Sha256};
use time::OffsetDateTime;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// How long an authority is valid. As kubeadm's `CACertificateValidityPeriod`.
pub(crate) const AUTHORITY_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long any other certificate is valid. As kubeadm's `CertificateValidityPeriod`.
pub(crate) const LEAF_LIFETIME: Duration = Duration::from_secs(365 * 24 * 3600);
/// Clocks of machines differ: certificates are valid from a little before now. As `CertificateBackdate`.
const BACKDATE: Duration = Duration::from_secs(5 * 60);

/// The kind of private keys to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum KeyAlgorithm {
    #[value(name = "ECDSA-P256")]
    EcdsaP256,
    #[value(name = "RSA-2048")]
    Rsa2048,
}

impl KeyAlgorithm {
    /// A new key.
    pub(crate) fn generate(self) -> Result<KeyPair> {
        KeyPair::generate_for(match self {
            KeyAlgorithm::EcdsaP256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            KeyAlgorithm::Rsa2048 => &rcgen::PKCS_RSA_SHA256,
        })
        .context("cannot make a private key")
    }
}

/// Whom a certificate names and what it may be used for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Subject {
    pub(crate) common_name: String,
    pub(crate) organization: Option<String>,
    /// Names and addresses it stands for, in order.
    pub(crate) sans: Vec<String>,
    pub(crate) server: bool,
    pub(crate) client: bool,
}

/// A certificate with its private key, both PEM.
#[derive(Debug, Clone)]
pub(crate) struct Pair {
    pub(crate) certificate: String,
    pub(crate) key: String,
}

/// A certificate authority that can sign.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new self-signed authority.
    pub(crate) fn generate(common_name: &str, algorithm: KeyAlgorithm, now: OffsetDateTime) -> Result<Pair> {
        let mut params = CertificateParams::new(vec![common_name.to_owned()])?;
        params.distinguished_name = distinguished_name(common_name, None);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages =
            vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment, KeyUsagePurpose::KeyCertSign];
        params.not_before = now - BACKDATE;
        params.not_after = now + AUTHORITY_LIFETIME;
        let key = algorithm.generate()?;
        let certificate = params.self_signed(&key)?;
        Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
    }

    /// The authority of an existing pair.
    pub(crate) fn load(pair: &Pair) -> Result<Authority> {
        let key = KeyPair::from_pem(&pair.key).context("cannot read the authority's key")?;
        let issuer =
            Issuer::from_ca_cert_pem(&pair.certificate, key).context("cannot read the authority's certificate")?;
        Ok(Authority { issuer })
    }

    /// A new key and certificate for `subject`.
    pub(crate) fn issue(&self, subject: &Subject, algorithm: KeyAlgorithm, now: OffsetDateTime) -> Result<Pair> {
        let key = algorithm.generate()?;
        let mut params = CertificateParams::new(subject.sans.clone())
            .with_context(|| format!("a subject alternative name of {:?} is malformed", subject.common_name))?;
        params.distinguished_name = distinguished_name(&subject.common_name, subject.organization.as_deref());
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
        if subject.server {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        if subject.client {
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
        }
        params.use_authority_key_identifier_extension = true;
        params.not_before = now - BACKDATE;
        params.not_after = now + LEAF_LIFETIME;
        let certificate = params.signed_by(&key, &self.issuer)?;
        Ok(Pair { certificate: certificate.pem(), key: key.serialize_pem() })
    }
}

/// What a certificate says.
#[derive(Debug, Clone)]
pub(crate) struct Inspected {
    pub(crate) subject: Subject,
    pub(crate) not_after: OffsetDateTime,
    pub(crate) is_authority: bool,
    /// `sha256:` and the digest of the public key, as `--discovery-token-ca-cert-hash` takes it.
    pub(crate) public_key_pin: String,
}

/// Reads the first certificate of a PEM text.
pub(crate) fn inspect(pem: &str) -> Result<Inspected> {
    let (_, block) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).context("no certificate in PEM form")?;
    if block.label != "CERTIFICATE" {
        bail!("expected a certificate in PEM form, found {:?}", block.label);
    }
    let (_, certificate) = X509Certificate::from_der(&block.contents).context("the certificate is malformed")?;
    let first = |mut values: Box<dyn Iterator<Item = &x509_parser::x509::AttributeTypeAndValue<'_>> + '_>| {
        values.next().and_then(|value| value.as_str().ok()).map(str::to_owned)
    };
    let usage = certificate.extended_key_usage().ok().flatten().map(|usage| usage.value);
    let sans = certificate
        .subject_alternative_name()
        .ok()
        .flatten()
        .map(|sans| sans.value.general_names.iter().filter_map(san_text).collect::<Vec<_>>());
    Ok(Inspected {
        subject: Subject {
            common_name: first(Box::new(certificate.subject().iter_common_name())).unwrap_or_default(),
            organization: first(Box::new(certificate.subject().iter_organization())),
            sans: sans.unwrap_or_default(),
            server: usage.is_some_and(|usage| usage.server_auth),
            client: usage.is_some_and(|usage| usage.client_auth),
        },
        not_after: certificate.validity().not_after.to_datetime(),
        is_authority: certificate.is_ca(),
        public_key_pin: format!("sha256:{}", hex(&Sha256::digest(certificate.public_key().raw))),
    })
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn distinguished_name(common_name: &str, organization: Option<&str>) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    if let Some(organization) = organization {
        name.push(DnType::OrganizationName, organization);
    }
    name.push(DnType::CommonName, common_name);
    name
}

fn san_text(name: &GeneralName<'_>) -> Option<String> {
    match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        GeneralName::IPAddress(octets) => match octets.len() {
            4 => <[u8; 4]>::try_from(*octets).ok().map(|octets| IpAddr::from(octets).to_string()),
            16 => <[u8; 16]>::try_from(*octets).ok().map(|octets| IpAddr::from(octets).to_string()),
            _ => None,
        },
        _ => None,
    }
}

/// Whether `san` can stand in a certificate.
pub(crate) fn is_san(san: &str) -> bool {
    san.parse::<IpAddr>().is_ok() || rcgen::string::Ia5String::try_from(san).map(SanType::DnsName).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_issued_reads_back_the_same() -> Result<()> {
        let now = OffsetDateTime::from_unix_timestamp(1_800_000_000)?;
        for algorithm in [KeyAlgorithm::EcdsaP256, KeyAlgorithm::Rsa2048] {
            let pair = Authority::generate("kubernetes", algorithm, now)?;
            let ca = inspect(&pair.certificate)?;
            assert!(ca.is_authority);
            assert_eq!(ca.subject.common_name, "kubernetes");
            assert_eq!(ca.subject.sans, ["kubernetes"]);
            assert_eq!(ca.not_after, now + AUTHORITY_LIFETIME);
            assert!(ca.public_key_pin.starts_with("sha256:") && ca.public_key_pin.len() == 7 + 64);

            let subject = Subject {
                common_name: "system:node:n1".into(),
                organization: Some("system:nodes".into()),
                sans: vec!["n1".into(), "10.0.0.1".into(), "fd00::1".into()],
                server: true,
                client: true,
            };
            let issued = Authority::load(&pair)?.issue(&subject, algorithm, now)?;
            let leaf = inspect(&issued.certificate)?;
            assert_eq!(leaf.subject, subject);
            assert_eq!(leaf.not_after, now + LEAF_LIFETIME);
            assert!(!leaf.is_authority);
        }
        Ok(())
    }

    #[test]
    fn what_is_no_certificate_is_refused() {
        assert!(inspect("").is_err());
        assert!(inspect("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n").is_err());
    }
}
