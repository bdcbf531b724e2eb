//! What several kinds say of signers and of requests to them: names, annotations, signatures, keys.

use crate::registry::field::{Errors, Field};
use crate::registry::metadata::ANNOTATIONS_MAX_BYTES;
use apimachinery::names::{is_dns1123_subdomain, is_qualified_name};
use apimachinery::status::FieldError;
use aws_lc_rs::signature::{ECDSA_P521_SHA512_ASN1, UnparsedPublicKey};
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::X509Error;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

const ECDSA_WITH_SHA512: &str = "1.2.840.10045.4.3.4";
const ED25519: &str = "1.3.101.112";
const EC_PUBLIC_KEY: &str = "1.2.840.10045.2.1";
/// A namespace, a dot and a name.
const SIGNER_PATH_MAX: usize = 63 + 1 + 253;

/// Keys that pods may have. As the key types of `PodCertificateProjection`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeyType {
    Ed25519,
    P256,
    P384,
    P521,
    Rsa,
}

/// `domain/path`, with limits that leave room for a namespace and a name in the path. As `ValidateSignerName`.
pub fn signer_name(signer: &Field<'_, '_>, errors: &mut Errors) {
    if !errors.need(signer) {
        return;
    }
    let segments: Vec<&str> = signer.str().split('/').collect();
    let [domain, path] = segments.as_slice() else {
        errors.invalid(signer, "must be a fully qualified domain and path of the form 'example.com/signer-name'");
        return;
    };
    let mut refuse = |value: &str, what: &str| {
        let why = format!("validating {what} segment {value:?}: ");
        for message in is_dns1123_subdomain(value) {
            errors.0.push(FieldError::invalid(signer.path(), value, format!("{why}{message}")));
        }
    };
    refuse(domain, "domain");
    path.split('.').for_each(|part| refuse(part, "label"));
    if !domain.contains('.') {
        errors.invalid(signer, "should be a domain with at least two segments separated by dots");
    }
    if path.len() > SIGNER_PATH_MAX {
        errors.too_long(signer, SIGNER_PATH_MAX);
    }
}

/// `kubernetes.io` and below. As `IsKubernetesSignerName`.
pub fn is_kubernetes_signer(name: &str) -> bool {
    let host = name.split('/').next().unwrap_or(name);
    host == "kubernetes.io" || host.ends_with(".kubernetes.io")
}

/// What pods tell signers: as annotations, but each key has a domain. As `ValidateUserAnnotations`.
pub fn user_annotations(annotations: &Field<'_, '_>, errors: &mut Errors) {
    let mut bytes = 0;
    for (key, value) in annotations.entries() {
        bytes += key.len() + value.str().len();
        let key = key.to_lowercase();
        let messages = is_qualified_name(&key);
        if key.is_empty() {
            errors.required(annotations, "");
        } else if messages.is_empty() && !key.contains('/') {
            errors.invalid_as(annotations, key, "must be a domain-prefixed key (such as \"acme.io/foo\")");
        } else {
            messages.into_iter().for_each(|message| errors.invalid_as(annotations, key.as_str(), message));
        }
    }
    if bytes > ANNOTATIONS_MAX_BYTES {
        errors.too_long(annotations, ANNOTATIONS_MAX_BYTES);
    }
}

/// Who asks has the key.
pub fn check_signature(request: &X509CertificationRequest<'_>) -> Result<(), String> {
    let verified = match request.verify_signature() {
        // The one signature that Go knows and x509-parser does not.
        Err(X509Error::SignatureUnsupportedAlgorithm) if algorithm(request) == ECDSA_WITH_SHA512 => {
            let key = &request.certification_request_info.subject_pki.subject_public_key.data;
            let key = UnparsedPublicKey::new(&ECDSA_P521_SHA512_ASN1, key);
            let (info, signature) = (request.certification_request_info.raw, &request.signature_value.data);
            key.verify(info, signature).map_err(|_| X509Error::SignatureVerificationError)
        }
        verified => verified,
    };
    let failed = |scheme: &str| Err(format!("x509: {scheme} verification failure"));
    match (verified, algorithm(request).as_str()) {
        (Ok(()), _) => Ok(()),
        (Err(X509Error::SignatureVerificationError), oid) if oid.starts_with("1.2.840.10045.") => failed("ECDSA"),
        (Err(X509Error::SignatureVerificationError), "1.3.101.112") => failed("Ed25519"),
        (Err(X509Error::SignatureVerificationError), _) => Err("crypto/rsa: verification error".to_owned()),
        (Err(_), _) => Err("x509: cannot verify signature: algorithm unimplemented".to_owned()),
    }
}

fn algorithm(request: &X509CertificationRequest<'_>) -> String {
    request.signature_algorithm.algorithm.to_id_string()
}

/// Of what type a key is; Err tells what is wrong with it, and what to call it.
pub fn key_type(key: &SubjectPublicKeyInfo<'_>) -> Result<KeyType, (Option<String>, &'static str)> {
    match key.algorithm.algorithm.to_id_string().as_str() {
        ED25519 => return Ok(KeyType::Ed25519),
        EC_PUBLIC_KEY => {
            let curve = key.algorithm.parameters.as_ref().and_then(|parameters| parameters.as_oid().ok());
            return match curve.map(|oid| oid.to_id_string()).unwrap_or_default().as_str() {
                "1.2.840.10045.3.1.7" => Ok(KeyType::P256),
                "1.3.132.0.34" => Ok(KeyType::P384),
                "1.3.132.0.35" => Ok(KeyType::P521),
                // Kubernetes' words leave the third out.
                "1.3.132.0.33" => {
                    Err((Some("curve P-224".to_owned()), "elliptic public keys must use curve P256 or P384"))
                }
                _ => Err((None, "elliptic public keys must use curve P256 or P384")),
            };
        }
        _ => {}
    }
    match key.parsed() {
        Ok(PublicKey::RSA(rsa)) => match rsa.key_size() {
            3072 | 4096 => Ok(KeyType::Rsa),
            bits => Err((Some(format!("{bits}-bit modulus")), "RSA keys must have modulus size 3072 or 4096")),
        },
        _ => Err((None, "unknown public key type; supported types are Ed25519, ECDSA, and RSA")),
    }
}
