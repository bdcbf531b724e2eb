//! The keys that sign and prove ServiceAccount tokens, from PEM files as kubeadm and openssl write them.
use std::path::Path;

use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey};
use rustls_pki_types::pem::{PemObject, SectionKind};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use x509_parser::prelude::FromDer;
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

/// Proves signatures.
pub struct VerifyingKey {
    /// As Kubernetes names keys: the SHA-256 of the public key.
    pub id: String,
    pub algorithm: Algorithm,
    pub key: DecodingKey,
    /// Its entry in the key set that the server publishes.
    pub jwk: Value,
}

/// Signs.
pub struct SigningKey {
    pub id: String,
    pub algorithm: Algorithm,
    pub key: EncodingKey,
}

/// Why a key file is of no use.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("cannot read {path}: {source}")]
    Read { path: String, source: std::io::Error },
    #[error("{path}: {reason}; expected RSA or ECDSA (P-256, P-384) keys in PEM form")]
    Content { path: String, reason: String },
}

/// All keys of a file: public ones, or the public halves of private ones. As `PublicKeysFromFile`.
pub fn verifying_keys(path: &Path) -> Result<Vec<VerifyingKey>, KeyError> {
    let sections = read(path)?;
    let keys: Result<Vec<_>, String> = sections.iter().map(|(kind, der)| verifying_key(*kind, der)).collect();
    match keys {
        Ok(keys) if keys.is_empty() => Err(content(path, "holds no key".to_owned())),
        Ok(keys) => Ok(keys),
        Err(reason) => Err(content(path, reason)),
    }
}

/// The private key of a file.
pub fn signing_key(path: &Path) -> Result<SigningKey, KeyError> {
    let sections = read(path)?;
    let private = sections.iter().find(|(kind, _)| {
        matches!(kind, SectionKind::RsaPrivateKey | SectionKind::EcPrivateKey | SectionKind::PrivateKey)
    });
    let (kind, der) = private.ok_or_else(|| content(path, "holds no private key".to_owned()))?;
    let private = PrivateKey::parse(*kind, der).map_err(|reason| content(path, reason))?;
    let public = private.public_der().map_err(|reason| content(path, reason))?;
    let id = key_id(&public);
    Ok(match private {
        PrivateKey::Rsa(_, pkcs1) => {
            SigningKey { id, algorithm: Algorithm::RS256, key: EncodingKey::from_rsa_der(&pkcs1) }
        }
        PrivateKey::Ec(_, algorithm, pkcs8) => SigningKey { id, algorithm, key: EncodingKey::from_ec_der(&pkcs8) },
    })
}

enum PrivateKey {
    /// With its PKCS#1 form.
    Rsa(aws_lc_rs::rsa::KeyPair, Vec<u8>),
    /// With its PKCS#8 form.
    Ec(EcdsaKeyPair, Algorithm, Vec<u8>),
}

// === impl PrivateKey ===

impl PrivateKey {
    fn parse(kind: SectionKind, der: &[u8]) -> Result<Self, String> {
        match kind {
            SectionKind::RsaPrivateKey => {
                let pair = aws_lc_rs::rsa::KeyPair::from_der(der).map_err(|error| error.to_string())?;
                Ok(Self::Rsa(pair, der.to_vec()))
            }
            SectionKind::EcPrivateKey => {
                for (curve, algorithm) in CURVES {
                    if let Ok(pair) = EcdsaKeyPair::from_private_key_der(curve, der) {
                        let pkcs8 = pair.to_pkcs8v1().map_err(|error| error.to_string())?.as_ref().to_vec();
                        return Ok(Self::Ec(pair, algorithm, pkcs8));
                    }
                }
                Err("an EC key of another curve".to_owned())
            }
            _ => {
                if let Ok(pair) = aws_lc_rs::rsa::KeyPair::from_pkcs8(der) {
                    // PKCS#8 of an RSA key wraps the PKCS#1 form in an octet string, its last member.
                    let pkcs1 = pkcs8_content(der).ok_or("a malformed PKCS#8 key")?;
                    return Ok(Self::Rsa(pair, pkcs1));
                }
                for (curve, algorithm) in CURVES {
                    if let Ok(pair) = EcdsaKeyPair::from_pkcs8(curve, der) {
                        return Ok(Self::Ec(pair, algorithm, der.to_vec()));
                    }
                }
                Err("a private key of another kind".to_owned())
            }
        }
    }

    fn public_der(&self) -> Result<Vec<u8>, String> {
        let der: Result<PublicKeyX509Der<'_>, _> = match self {
            Self::Rsa(pair, _) => pair.public_key().as_der(),
            Self::Ec(pair, ..) => pair.public_key().as_der(),
        };
        der.map(|der| der.as_ref().to_vec()).map_err(|error| error.to_string())
    }
}

const CURVES: [(&aws_lc_rs::signature::EcdsaSigningAlgorithm, Algorithm); 2] =
    [(&ECDSA_P256_SHA256_FIXED_SIGNING, Algorithm::ES256), (&ECDSA_P384_SHA384_FIXED_SIGNING, Algorithm::ES384)];

fn pkcs8_content(der: &[u8]) -> Option<Vec<u8>> {
    use x509_parser::der_parser::der::parse_der;
    let (_, object) = parse_der(der).ok()?;
    let members = object.as_sequence().ok()?;
    members.get(2)?.as_slice().ok().map(<[u8]>::to_vec)
}

fn verifying_key(kind: SectionKind, der: &[u8]) -> Result<VerifyingKey, String> {
    match kind {
        SectionKind::PublicKey => from_public(der),
        SectionKind::Certificate => {
            let (_, certificate) =
                x509_parser::certificate::X509Certificate::from_der(der).map_err(|error| error.to_string())?;
            from_public(certificate.public_key().raw)
        }
        SectionKind::RsaPrivateKey | SectionKind::EcPrivateKey | SectionKind::PrivateKey => {
            from_public(&PrivateKey::parse(kind, der)?.public_der()?)
        }
        _ => Err("something that is no key".to_owned()),
    }
}

fn from_public(der: &[u8]) -> Result<VerifyingKey, String> {
    let (_, info) = SubjectPublicKeyInfo::from_der(der).map_err(|error| error.to_string())?;
    let id = key_id(der);
    match info.parsed().map_err(|error| error.to_string())? {
        PublicKey::RSA(rsa) => {
            let strip = |bytes: &[u8]| bytes.iter().copied().skip_while(|byte| *byte == 0).collect::<Vec<u8>>();
            let (modulus, exponent) = (strip(rsa.modulus), strip(rsa.exponent));
            let jwk = json!({
                "use": "sig", "kty": "RSA", "kid": id, "alg": "RS256",
                "n": BASE64.encode(&modulus), "e": BASE64.encode(&exponent),
            });
            let key = DecodingKey::from_rsa_raw_components(&modulus, &exponent);
            Ok(VerifyingKey { id, algorithm: Algorithm::RS256, key, jwk })
        }
        PublicKey::EC(point) => {
            let point = point.data();
            let (algorithm, name, curve) = match point.len() {
                65 => (Algorithm::ES256, "ES256", "P-256"),
                97 => (Algorithm::ES384, "ES384", "P-384"),
                other => return Err(format!("an EC key of another curve (point of {other} bytes)")),
            };
            let (x, y) = point[1..].split_at((point.len() - 1) / 2);
            let jwk = json!({
                "use": "sig", "kty": "EC", "kid": id, "crv": curve, "alg": name,
                "x": BASE64.encode(x), "y": BASE64.encode(y),
            });
            Ok(VerifyingKey { id, algorithm, key: DecodingKey::from_ec_der(point), jwk })
        }
        _ => Err("a public key of another kind".to_owned()),
    }
}

/// As `keyIDFromPublicKey`.
fn key_id(public_der: &[u8]) -> String {
    BASE64.encode(Sha256::digest(public_der))
}

fn read(path: &Path) -> Result<Vec<(SectionKind, Vec<u8>)>, KeyError> {
    let text = std::fs::read(path).map_err(|source| KeyError::Read { path: path.display().to_string(), source })?;
    let sections: Result<Vec<_>, _> = <(SectionKind, Vec<u8>)>::pem_slice_iter(&text).collect();
    sections.map_err(|error| content(path, error.to_string()))
}

fn content(path: &Path, reason: String) -> KeyError {
    KeyError::Content { path: path.display().to_string(), reason }
}

#[cfg(test)]
pub mod test_keys {
    //! Keys made for a test, written where the readers above find them.
    use super::*;

    pub const KINDS: [&str; 3] = ["p256", "p384", "rsa"];

    /// The private key as PKCS#8 PEM in a file of its own.
    pub fn private(kind: &str) -> tempfile::NamedTempFile {
        let der = match kind {
            "p256" => EcdsaKeyPair::generate(CURVES[0].0).unwrap().to_pkcs8v1().unwrap().as_ref().to_vec(),
            "p384" => EcdsaKeyPair::generate(CURVES[1].0).unwrap().to_pkcs8v1().unwrap().as_ref().to_vec(),
            _ => {
                let pair = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
                AsDer::<aws_lc_rs::encoding::Pkcs8V1Der<'_>>::as_der(&pair).unwrap().as_ref().to_vec()
            }
        };
        file("PRIVATE KEY", &der)
    }

    pub fn file(label: &str, der: &[u8]) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        let text = base64::engine::general_purpose::STANDARD.encode(der);
        std::fs::write(file.path(), format!("-----BEGIN {label}-----\n{text}\n-----END {label}-----\n")).unwrap();
        file
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_public_half_of_a_key_proves_what_the_private_half_signed() {
        for kind in test_keys::KINDS {
            let file = test_keys::private(kind);
            let signing = signing_key(file.path()).unwrap();
            let verifying = verifying_keys(file.path()).unwrap();
            assert_eq!(
                (verifying.len(), &verifying[0].id, verifying[0].algorithm),
                (1, &signing.id, signing.algorithm)
            );
            let claims = json!({"exp": 4_000_000_000_u64});
            let token =
                jsonwebtoken::encode(&jsonwebtoken::Header::new(signing.algorithm), &claims, &signing.key).unwrap();
            let validation = jsonwebtoken::Validation::new(signing.algorithm);
            let key = &verifying[0].key;
            assert!(jsonwebtoken::decode::<Value>(&token, key, &validation).is_ok(), "{kind}");
            // The public key alone, as sa.pub has it.
            let private = PrivateKey::parse(SectionKind::PrivateKey, &read(file.path()).unwrap()[0].1).unwrap();
            let public = test_keys::file("PUBLIC KEY", &private.public_der().unwrap());
            let again = verifying_keys(public.path()).unwrap();
            assert_eq!(again[0].id, signing.id);
            assert!(jsonwebtoken::decode::<Value>(&token, &again[0].key, &validation).is_ok(), "{kind}");
            assert_eq!(again[0].jwk["kid"], signing.id.as_str());
        }
    }

    #[test]
    fn a_file_that_holds_no_key_says_so() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "nothing").unwrap();
        let error = verifying_keys(file.path()).err().unwrap().to_string();
        assert!(error.contains("holds no key") && error.contains("PEM"), "{error}");
    }
}
