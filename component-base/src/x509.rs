//! Certificates: what several components read from them and ask for.
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PKCS_ECDSA_P256_SHA256, SanType};
use std::net::IpAddr;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// What cannot be read or made; the message says what and why.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct X509Error(pub String);

/// Whom a certificate names and how long it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateInfo {
    pub common_name: String,
    /// Kubernetes reads them as groups.
    pub organizations: Vec<String>,
    /// Seconds since the epoch.
    pub not_before: i64,
    pub not_after: i64,
    pub dns_names: Vec<String>,
    pub ip_addresses: Vec<IpAddr>,
}

/// Reads one certificate in DER form.
pub fn read_der(der: &[u8]) -> Result<CertificateInfo, X509Error> {
    use x509_parser::extensions::GeneralName;
    let (_, certificate) = X509Certificate::from_der(der).map_err(|e| X509Error(format!("certificate: {e}")))?;
    let text = |a: &x509_parser::x509::AttributeTypeAndValue<'_>| a.as_str().unwrap_or_default().to_owned();
    let subject = certificate.subject();
    let mut info = CertificateInfo {
        common_name: subject.iter_common_name().next().map(text).unwrap_or_default(),
        organizations: subject.iter_organization().map(text).collect(),
        not_before: certificate.validity().not_before.timestamp(),
        not_after: certificate.validity().not_after.timestamp(),
        dns_names: Vec::new(),
        ip_addresses: Vec::new(),
    };
    for name in certificate.subject_alternative_name().ok().flatten().iter().flat_map(|e| &e.value.general_names) {
        match name {
            GeneralName::DNSName(dns) => info.dns_names.push((*dns).to_owned()),
            GeneralName::IPAddress(bytes) => info.ip_addresses.extend(ip_of(bytes)),
            _ => {}
        }
    }
    Ok(info)
}

/// Reads the first certificate of a PEM text.
pub fn read_pem(pem: &[u8]) -> Result<CertificateInfo, X509Error> {
    use rustls_pki_types::{CertificateDer, pem::PemObject as _};
    let der = CertificateDer::from_pem_slice(pem).map_err(|e| X509Error(format!("no certificate in PEM form: {e}")))?;
    read_der(&der)
}

/// A new ECDSA P-256 key.
pub fn new_key() -> Result<KeyPair, X509Error> {
    KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).map_err(|e| X509Error(format!("cannot make a key: {e}")))
}

/// A certificate request in PEM form.
pub fn request(
    key: &KeyPair,
    common_name: &str,
    organizations: &[&str],
    dns_names: &[String],
    ip_addresses: &[IpAddr],
) -> Result<String, X509Error> {
    let error = |e: rcgen::Error| X509Error(format!("certificate request for {common_name}: {e}"));
    let mut params = CertificateParams::new(dns_names.to_vec()).map_err(error)?;
    params.subject_alt_names.extend(ip_addresses.iter().copied().map(SanType::IpAddress));
    params.distinguished_name = distinguished_name(common_name, organizations);
    params.serialize_request(key).and_then(|r| r.pem()).map_err(error)
}

/// `O=…,CN=…`.
pub fn distinguished_name(common_name: &str, organizations: &[&str]) -> DistinguishedName {
    let mut name = DistinguishedName::new();
    for organization in organizations {
        name.push(DnType::OrganizationName, *organization);
    }
    name.push(DnType::CommonName, common_name);
    name
}

/// A self-signed serving certificate of a year with its key, both PEM: what a server uses that was given none.
pub fn self_signed(
    common_name: &str,
    dns_names: &[String],
    ip_addresses: &[IpAddr],
) -> Result<(String, String), X509Error> {
    let error = |e: rcgen::Error| X509Error(format!("self-signed certificate for {common_name}: {e}"));
    let key = new_key()?;
    let mut params = CertificateParams::new(dns_names.to_vec()).map_err(error)?;
    params.subject_alt_names.extend(ip_addresses.iter().copied().map(SanType::IpAddress));
    params.distinguished_name = distinguished_name(common_name, &[]);
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let now = std::time::SystemTime::now();
    params.not_before = (now - std::time::Duration::from_secs(3600)).into();
    params.not_after = (now + std::time::Duration::from_secs(365 * 24 * 3600)).into();
    let certificate = params.self_signed(&key).map_err(error)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

fn ip_of(bytes: &[u8]) -> Option<IpAddr> {
    <[u8; 4]>::try_from(bytes).map(IpAddr::from).or_else(|_| <[u8; 16]>::try_from(bytes).map(IpAddr::from)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_certificate_says_is_read_back() {
        let ip: IpAddr = "10.0.0.1".parse().unwrap();
        let (certificate, _) = self_signed("node-1", &["node-1".to_owned()], &[ip]).unwrap();
        let info = read_pem(certificate.as_bytes()).unwrap();
        assert_eq!(
            (info.common_name.as_str(), info.dns_names, info.ip_addresses),
            ("node-1", vec!["node-1".into()], vec![ip])
        );
        assert!(info.not_after > info.not_before);
        assert!(read_pem(b"nonsense").is_err());
    }

    #[test]
    fn a_request_carries_its_subject() {
        let pem = request(&new_key().unwrap(), "system:node:n1", &["system:nodes"], &[], &[]).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(pem.as_bytes()).unwrap();
        let (_, request) =
            x509_parser::certification_request::X509CertificationRequest::from_der(&pem.contents).unwrap();
        let subject = request.certification_request_info.subject.to_string();
        assert_eq!(subject, "O=system:nodes, CN=system:node:n1");
    }
}
