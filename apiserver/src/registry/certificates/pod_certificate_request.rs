//! PodCertificateRequests: a kubelet asks a signer for a pod's certificate. What was asked stays; the answer is written once.

use super::pod_certificate_status as status;
use super::signers::{self, KeyType};
use crate::registry::field::{Errors, Field};
use crate::registry::object::{copy_field, list, map, semantically_equal, text};
use crate::registry::print;
use crate::registry::rules::Rules;
use apimachinery::names::is_dns1123_subdomain;
use apimachinery::status::FieldError;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P384_SHA256_ASN1, ECDSA_P521_SHA256_ASN1, ED25519, RSA_PSS_2048_8192_SHA256,
    UnparsedPublicKey, VerificationAlgorithm,
};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::SubjectPublicKeyInfo;

const UID_MAX_BYTES: usize = 128;
/// As `MaxPKIXPublicKeySize`, `MaxProofOfPossessionSize` and `MaxStubPKCS10RequestSize`.
const KEY_MAX_BYTES: usize = 10 * 1024;
const EXPIRATION_MIN_SECONDS: i64 = 3600;
const EXPIRATION_MAX_SECONDS: i64 = 91 * 24 * 3600;
/// Of Kubernetes' own signers.
const KUBERNETES_EXPIRATION_MAX_SECONDS: i64 = 24 * 3600;
const NOT_A_KEY: &str = "must be a valid PKIX-serialized public key";

pub const RULES: Rules = Rules {
    status_keeps_metadata: true,
    prepare_status: |new, old| copy_field(new, old, "spec"),
    validate_create: create,
    // As `ValidatePodCertificateRequestUpdate`.
    validate_update: |new, old, errors| errors.immutable(&new.at("spec"), &old.at("spec")),
    validate_status: |new, old, errors| status::update(new, old, jiff::Timestamp::now(), errors),
    unconditional_update: false,
    selectable_names: &["spec.nodeName", "spec.podName", "spec.signerName"],
    selectable: |object| {
        ["spec.nodeName", "spec.podName", "spec.signerName"]
            .map(|name| (name, text(object, &format!("/{}", name.replace('.', "/"))).to_owned()))
            .to_vec()
    },
    row: Some(|object, _| {
        let text = |pointer| Value::from(text(object, pointer));
        vec![
            print::name(object),
            text("/spec/podName"),
            text("/spec/serviceAccountName"),
            text("/spec/nodeName"),
            text("/spec/signerName"),
            Value::from(state(object)),
            Value::from(print::labels(map(object, "/spec/unverifiedUserAnnotations"))),
        ]
    }),
    ..Rules::DEFAULT
};

/// What has become of a request.
fn state(object: &Value) -> &str {
    let known = |condition: &Value| status::TERMINAL.into_iter().find(|kind| text(condition, "/type") == *kind);
    list(object, "/status/conditions").iter().rev().find_map(known).unwrap_or("Pending")
}

/// As `ValidatePodCertificateRequestCreate`.
fn create(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    signers::signer_name(&spec.at("signerName"), errors);
    signers::user_annotations(&spec.at("unverifiedUserAnnotations"), errors);
    for (name, uid) in [("podName", "podUID"), ("serviceAccountName", "serviceAccountUID"), ("nodeName", "nodeUID")] {
        let (name, uid) = (spec.at(name), spec.at(uid));
        errors.all(&name, is_dns1123_subdomain(name.str()));
        if uid.str().is_empty() {
            errors.invalid(&uid, "must not be empty");
        }
        if uid.str().len() > UID_MAX_BYTES {
            errors.too_long(&uid, UID_MAX_BYTES);
        }
    }
    let seconds = spec.at("maxExpirationSeconds");
    let Some(asked) = seconds.int() else {
        errors.required(&seconds, "must be set");
        return;
    };
    let max = if signers::is_kubernetes_signer(spec.at("signerName").str()) {
        KUBERNETES_EXPIRATION_MAX_SECONDS
    } else {
        EXPIRATION_MAX_SECONDS
    };
    if !(EXPIRATION_MIN_SECONDS..=max).contains(&asked) {
        errors.invalid(&seconds, format!("must be in the range [{EXPIRATION_MIN_SECONDS}, {max}]"));
    }
    key(&spec, errors);
}

/// That the kubelet has the key that it asks a certificate for: by a PKCS#10 request, or, as v1.35 does, by a signature.
fn key(spec: &Field<'_, '_>, errors: &mut Errors) {
    let (stub, pkix, proof) = (spec.at("stubPKCS10Request"), spec.at("pkixPublicKey"), spec.at("proofOfPossession"));
    for field in [&stub, &pkix, &proof] {
        if bytes(field).len() > KEY_MAX_BYTES {
            errors.too_long(field, KEY_MAX_BYTES);
            return;
        }
    }
    let there = |field: &Field<'_, '_>| !field.str().is_empty();
    match (there(&stub), there(&pkix), there(&proof)) {
        (true, false, false) => {
            let der = bytes(&stub);
            let Ok((_, request)) = X509CertificationRequest::from_der(&der) else {
                errors.invalid(&stub, "must be a valid PKCS#10 CSR");
                return;
            };
            if usable(&stub, &request.certification_request_info.subject_pki, errors).is_some()
                && let Err(why) = signers::check_signature(&request)
            {
                errors.invalid(&stub, why);
            }
        }
        (false, true, true) => {
            let der = bytes(&pkix);
            let Ok((_, key)) = SubjectPublicKeyInfo::from_der(&der) else {
                errors.invalid(&pkix, NOT_A_KEY);
                return;
            };
            let Some(kind) = usable(&pkix, &key, errors) else { return };
            let algorithm: &dyn VerificationAlgorithm = match kind {
                KeyType::Ed25519 => &ED25519,
                KeyType::P256 => &ECDSA_P256_SHA256_ASN1,
                KeyType::P384 => &ECDSA_P384_SHA256_ASN1,
                KeyType::P521 => &ECDSA_P521_SHA256_ASN1,
                KeyType::Rsa => &RSA_PSS_2048_8192_SHA256,
            };
            let (uid, signature) = (spec.at("podUID").str(), bytes(&proof));
            let verifier = UnparsedPublicKey::new(algorithm, &key.subject_public_key.data);
            if verifier.verify(uid.as_bytes(), &signature).is_err() {
                errors.invalid_as(&proof, "", "could not verify proof-of-possession signature");
            }
        }
        _ => {
            let why = "exactly one of (stubPKCS10Request) or (pkixPublicKey, proofOfPossession) must be set";
            errors.0.push(FieldError::invalid(spec.path(), "", why));
        }
    }
}

fn usable(field: &Field<'_, '_>, key: &SubjectPublicKeyInfo<'_>, errors: &mut Errors) -> Option<KeyType> {
    match signers::key_type(key) {
        Ok(kind) => Some(kind),
        Err((shown, why)) => {
            errors.invalid_as(field, shown.unwrap_or_else(|| field.str().to_owned()), why);
            None
        }
    }
}

fn bytes(field: &Field<'_, '_>) -> Vec<u8> {
    STANDARD.decode(field.str()).unwrap_or_default()
}

/// The key that a request is about, as it stands in certificates.
pub fn requested_key(spec: &Value) -> Option<Vec<u8>> {
    let decoded = |pointer: &str| STANDARD.decode(text(spec, pointer)).unwrap_or_default();
    let stub = decoded("/stubPKCS10Request");
    if stub.is_empty() {
        let der = decoded("/pkixPublicKey");
        return SubjectPublicKeyInfo::from_der(&der).ok().map(|(_, key)| key.raw.to_vec());
    }
    let (_, request) = X509CertificationRequest::from_der(&stub).ok()?;
    Some(request.certification_request_info.subject_pki.raw.to_vec())
}

/// Whether a write of the status changes it, and so needs the right to sign.
pub fn changes_status(new: &Value, old: &Value) -> bool {
    !semantically_equal(&new["status"], &old["status"])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::registry::object::set;
    use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair as _};
    use serde_json::json;

    fn stub(algorithm: &'static rcgen::SignatureAlgorithm) -> String {
        let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        STANDARD.encode(params.serialize_request(&key).unwrap().der())
    }

    fn request() -> Value {
        json!({"metadata": {"name": "r", "namespace": "ns"}, "spec": {
            "signerName": "example.com/foo", "podName": "p", "podUID": "u", "serviceAccountName": "sa",
            "serviceAccountUID": "su", "nodeName": "n", "nodeUID": "nu", "maxExpirationSeconds": 86400,
            "stubPKCS10Request": stub(&rcgen::PKCS_ED25519)}})
    }

    fn faults(object: &Value) -> Vec<String> {
        let mut errors = Errors::default();
        (RULES.validate_create)(&Field::root(object), &mut errors);
        errors.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_field_is_checked() {
        let long = "u".repeat(129);
        for (field, value, fault) in [
            ("podName", json!("p"), None),
            ("podUID", json!(""), Some("spec.podUID: Invalid value: \"\": must not be empty")),
            ("nodeUID", json!(long), Some("spec.nodeUID: Too long: may not be more than 128 bytes")),
            ("maxExpirationSeconds", json!(3600), None),
            ("maxExpirationSeconds", json!(7_862_400), None),
            (
                "maxExpirationSeconds",
                json!(3599),
                Some("spec.maxExpirationSeconds: Invalid value: 3599: must be in the range [3600, 7862400]"),
            ),
            ("maxExpirationSeconds", Value::Null, Some("spec.maxExpirationSeconds: Required value: must be set")),
            ("signerName", json!("kubernetes.io/x"), None),
            ("unverifiedUserAnnotations", json!({"example.com/a": "b"}), None),
            (
                "unverifiedUserAnnotations",
                json!({"a": "b"}),
                Some(
                    "spec.unverifiedUserAnnotations: Invalid value: \"a\": must be a domain-prefixed key (such as \"acme.io/foo\")",
                ),
            ),
            (
                "stubPKCS10Request",
                json!("bm9uZQ=="),
                Some("spec.stubPKCS10Request: Invalid value: \"bm9uZQ==\": must be a valid PKCS#10 CSR"),
            ),
            (
                "stubPKCS10Request",
                json!(""),
                Some(
                    "spec: Invalid value: \"\": exactly one of (stubPKCS10Request) or (pkixPublicKey, proofOfPossession) must be set",
                ),
            ),
        ] {
            let mut object = request();
            set(&mut object["spec"], field, value);
            assert_eq!(faults(&object), fault.into_iter().collect::<Vec<_>>(), "{field}");
        }
        let mut object = request();
        set(&mut object["spec"], "nodeName", "N");
        assert!(faults(&object)[0].starts_with("spec.nodeName: Invalid value: \"N\": a lowercase RFC 1123 subdomain"));
        set(&mut object, "spec", request()["spec"].clone());
        set(&mut object["spec"], "signerName", "kubernetes.io/x");
        set(&mut object["spec"], "maxExpirationSeconds", 86_401);
        assert_eq!(
            faults(&object),
            ["spec.maxExpirationSeconds: Invalid value: 86401: must be in the range [3600, 86400]"]
        );
    }

    #[test]
    fn all_curves_are_taken_and_the_key_must_be_the_askers() {
        for algorithm in [
            &rcgen::PKCS_ED25519,
            &rcgen::PKCS_ECDSA_P256_SHA256,
            &rcgen::PKCS_ECDSA_P384_SHA384,
            &rcgen::PKCS_ECDSA_P521_SHA512,
        ] {
            let mut object = request();
            set(&mut object["spec"], "stubPKCS10Request", stub(algorithm));
            assert!(faults(&object).is_empty(), "{algorithm:?}: {:?}", faults(&object));
            let mut der = STANDARD.decode(text(&object, "/spec/stubPKCS10Request")).unwrap();
            *der.last_mut().unwrap() ^= 1;
            set(&mut object["spec"], "stubPKCS10Request", STANDARD.encode(der));
            assert!(faults(&object)[0].ends_with("verification failure"), "{:?}", faults(&object));
        }
        let mut object = request();
        set(&mut object["spec"], "stubPKCS10Request", stub(&rcgen::PKCS_RSA_SHA256));
        assert_eq!(
            faults(&object),
            [
                "spec.stubPKCS10Request: Invalid value: \"2048-bit modulus\": RSA keys must have modulus size 3072 or 4096"
            ]
        );
    }

    #[test]
    fn the_proof_of_older_kubelets_is_a_signature_of_the_pods_uid() {
        let pair = Ed25519KeyPair::generate().unwrap();
        let mut pkix = vec![0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
        pkix.extend(pair.public_key().as_ref());
        let mut object = request();
        crate::registry::object::remove(&mut object["spec"], "stubPKCS10Request");
        set(&mut object["spec"], "pkixPublicKey", STANDARD.encode(&pkix));
        set(&mut object["spec"], "proofOfPossession", STANDARD.encode(pair.sign(b"u").as_ref()));
        assert!(faults(&object).is_empty(), "{:?}", faults(&object));
        assert_eq!(requested_key(&object["spec"]), Some(pkix));
        set(&mut object["spec"], "podUID", "other");
        assert_eq!(
            faults(&object),
            ["spec.proofOfPossession: Invalid value: \"\": could not verify proof-of-possession signature"]
        );
    }

    #[test]
    fn a_row_tells_the_state() {
        let mut object = request();
        assert_eq!(state(&object), "Pending");
        object["status"] = json!({"conditions": [{"type": "Denied", "status": "True"}]});
        assert_eq!(state(&object), "Denied");
    }
}
