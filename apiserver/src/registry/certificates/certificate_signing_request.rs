//! CertificateSigningRequests: who asks is noted on creation, and what was asked stays.

use super::signers;
use crate::registry::checks::{Is, check};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{child, copy_field, int, items_mut, list, set, text};
use crate::registry::print::{self, Clock, NONE, human_duration};
use crate::registry::rules::Rules;
use crate::registry::strategy::Part;
use apimachinery::status::FieldError;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer as _;

const USAGES: [&str; 23] = [
    "any",
    "cert sign",
    "client auth",
    "code signing",
    "content commitment",
    "crl sign",
    "data encipherment",
    "decipher only",
    "digital signature",
    "email protection",
    "encipher only",
    "ipsec end system",
    "ipsec tunnel",
    "ipsec user",
    "key agreement",
    "key encipherment",
    "microsoft sgc",
    "netscape sgc",
    "ocsp signing",
    "s/mime",
    "server auth",
    "signing",
    "timestamping",
];
const EXPIRATION_MIN_SECONDS: i64 = 600;

pub const RULES: Rules = Rules {
    // Kubelets name theirs by a digest in base64.
    name: metadata::path_segment,
    prepare_update: |new, old| copy_field(new, old, "spec"),
    prepare_status: prepare_conditions,
    validate,
    validate_update: |new, old, errors| update(new, old, Part::Main, errors),
    validate_status: |new, old, errors| update(new, old, Part::Status, errors),
    selectable_names: &["spec.signerName"],
    selectable: |object| vec![("spec.signerName", text(object, "/spec/signerName").to_owned())],
    row: Some(row),
    ..Rules::DEFAULT
};

/// Times of conditions that their writer left out. As `populateConditionTimestamps`.
pub fn prepare_conditions(new: &mut Value, old: &Value) {
    copy_field(new, old, "spec");
    let now = apimachinery::time::rfc3339(jiff::Timestamp::now());
    let before = list(old, "/status/conditions").to_vec();
    for condition in items_mut(child(new, "status"), "conditions") {
        if condition.get("lastUpdateTime").is_none() {
            set(condition, "lastUpdateTime", now.as_str());
        }
        if condition.get("lastTransitionTime").is_none() {
            let same = |c: &&Value| c["type"] == condition["type"] && c["status"] == condition["status"];
            let time = before.iter().find(same).map_or("", |c| text(c, "/lastTransitionTime")).to_owned();
            set(condition, "lastTransitionTime", if time.is_empty() { now.clone() } else { time });
        }
    }
}

/// An approval changes the conditions and nothing else of the status.
pub fn prepare_approval(new: &mut Value, old: &Value) {
    prepare_conditions(new, old);
    let status = child(new, "status");
    copy_field(status, old.get("status").unwrap_or(&Value::Null), "certificate");
}

/// Notes who asks: `user` is a UserInfo of authentication.k8s.io/v1.
pub fn set_requestor(object: &mut Value, username: &str, uid: &str, groups: &[String], extra: Value) {
    let spec = child(object, "spec");
    for field in ["username", "uid", "groups", "extra"] {
        crate::registry::object::remove(spec, field);
    }
    set(spec, "username", username);
    if !uid.is_empty() {
        set(spec, "uid", uid);
    }
    set(spec, "groups", groups.to_vec());
    if extra.as_object().is_some_and(|e| !e.is_empty()) {
        set(spec, "extra", extra);
    }
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let request = spec.at("request");
    if let Err(why) = parse_request(request.str()) {
        errors.0.push(FieldError::invalid(request.path(), request.str(), why));
    }
    check(
        &spec,
        &[
            ("usages", Is::Required("")),
            ("usages[]", Is::OneOf(&USAGES)),
            ("usages", Is::Unique),
            ("signerName", Is::By(signer_name)),
        ],
        errors,
    );
    let seconds = spec.at("expirationSeconds");
    if seconds.int().is_some_and(|s| s < EXPIRATION_MIN_SECONDS) {
        errors.invalid(&seconds, "may not specify a duration less than 600 seconds (10 minutes)");
    }
}

/// As `ValidateSignerName`, but for one that is no more.
fn signer_name(signer: &Field<'_, '_>, errors: &mut Errors) {
    if signer.str() == "kubernetes.io/legacy-unknown" {
        errors.invalid(signer, "the legacy signerName is not allowed via this API version");
        return;
    }
    signers::signer_name(signer, errors);
}

/// Base64 of the PEM of a PKCS#10 request whose signature holds: who asks has the key. As `validateCSR`.
fn parse_request(text: &str) -> Result<(), String> {
    let pem = STANDARD.decode(text).unwrap_or_default();
    let (_, pem) =
        x509_parser::pem::parse_x509_pem(&pem).map_err(|_| "PEM block type must be CERTIFICATE REQUEST".to_owned())?;
    if pem.label != "CERTIFICATE REQUEST" {
        return Err("PEM block type must be CERTIFICATE REQUEST".to_owned());
    }
    let (_, request) = X509CertificationRequest::from_der(&pem.contents).map_err(|error| error.to_string())?;
    signers::check_signature(&request)
}

/// What an update may write, by the way it comes: verdicts exclude each other and stay, and come by approval only; a
/// certificate is written once, with the status. As `validateCertificateSigningRequestUpdate`.
pub fn update(new: &Field<'_, '_>, old: &Field<'_, '_>, part: Part, errors: &mut Errors) {
    let status = new.at("status");
    let field = status.at("conditions");
    let of = |object: &Value, kind: &str| -> Vec<Value> {
        list(object, "/status/conditions").iter().filter(|c| c["type"] == kind).cloned().collect()
    };
    let both = |object: &Value| !of(object, "Approved").is_empty() && !of(object, "Denied").is_empty();
    let mut seen: Vec<&str> = Vec::new();
    for condition in field.items() {
        let (kind, value) = (condition.at("type"), condition.at("status"));
        errors.need(&kind);
        if errors.need(&value) {
            match kind.str() {
                "Approved" | "Denied" | "Failed" => errors.one_of(&value, &["True"]),
                _ => errors.one_of(&value, &["False", "True", "Unknown"]),
            }
        }
        let other = [("Approved", "Denied"), ("Denied", "Approved")].iter().find(|(one, _)| *one == kind.str());
        if other.is_some_and(|(_, other)| seen.contains(other)) && !both(old.value) {
            let why = "Approved and Denied conditions are mutually exclusive";
            errors.0.push(FieldError::invalid(field.path(), kind.str(), why));
        }
        let had_twice = of(old.value, kind.str()).len() > 1;
        if seen.contains(&kind.str()) && !had_twice {
            errors.duplicate(&kind);
        }
        seen.push(condition.value.get("type").and_then(Value::as_str).unwrap_or(""));
    }
    for kind in ["Approved", "Denied", "Failed"] {
        let (now, was) = (of(new.value, kind), of(old.value, kind));
        let verb = match now.len().cmp(&was.len()) {
            std::cmp::Ordering::Less => "remove",
            _ if part == Part::Approval || kind == "Failed" => continue,
            std::cmp::Ordering::Greater => "add",
            std::cmp::Ordering::Equal if now != was => "modify",
            std::cmp::Ordering::Equal => continue,
        };
        errors.forbidden(&field, format!("updates may not {verb} a condition of type {kind:?}"));
    }
    let certificate = status.at("certificate");
    let before = text(old.value, "/status/certificate");
    if certificate.str() == before {
        return;
    }
    if part != Part::Status {
        errors.forbidden(&certificate, "updates may not set certificate content");
    } else if !before.is_empty() {
        errors.forbidden(&certificate, "updates may not modify existing certificate content");
    } else if let Err(why) = check_certificates(certificate.str()) {
        errors.0.push(FieldError::invalid(certificate.path(), "<certificate data>", why));
    }
}

/// As `validateCertificate`: base64 of PEM blocks that are all certificates.
fn check_certificates(text: &str) -> Result<(), String> {
    let pem = STANDARD.decode(text).map_err(|error| error.to_string())?;
    let mut blocks = 0;
    for block in x509_parser::pem::Pem::iter_from_buffer(&pem).map_while(Result::ok) {
        if block.label != "CERTIFICATE" {
            return Err(format!("only CERTIFICATE PEM blocks are allowed, found {:?}", block.label));
        }
        block.parse_x509().map_err(|error| error.to_string())?;
        blocks += 1;
    }
    if blocks == 0 { Err("must contain at least one CERTIFICATE PEM block".to_owned()) } else { Ok(()) }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let has = |kind: &str| list(object, "/status/conditions").iter().any(|c| c["type"] == kind);
    let mut condition = if has("Denied") {
        "Denied"
    } else if has("Approved") {
        "Approved"
    } else {
        "Pending"
    }
    .to_owned();
    if has("Failed") {
        condition.push_str(",Failed");
    }
    if !text(object, "/status/certificate").is_empty() {
        condition.push_str(",Issued");
    }
    vec![
        print::name(object),
        clock.age(object),
        print::or(text(object, "/spec/signerName"), NONE),
        Value::from(text(object, "/spec/username")),
        Value::from(int(object, "/spec/expirationSeconds").map_or(NONE.to_owned(), human_duration)),
        Value::from(condition),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_asks_has_the_key() {
        for (algorithm, refusal) in [
            (&rcgen::PKCS_ECDSA_P256_SHA256, "x509: ECDSA verification failure"),
            (&rcgen::PKCS_ECDSA_P384_SHA384, "x509: ECDSA verification failure"),
            (&rcgen::PKCS_ECDSA_P521_SHA512, "x509: ECDSA verification failure"),
            (&rcgen::PKCS_ED25519, "x509: Ed25519 verification failure"),
            (&rcgen::PKCS_RSA_SHA256, "crypto/rsa: verification error"),
        ] {
            let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
            let mut params = rcgen::CertificateParams::default();
            params.distinguished_name.push(rcgen::DnType::CommonName, "ann");
            let request = params.serialize_request(&key).unwrap();
            let encoded = |der: &[u8]| {
                let body = STANDARD.encode(der);
                STANDARD
                    .encode(format!("-----BEGIN CERTIFICATE REQUEST-----\n{body}\n-----END CERTIFICATE REQUEST-----\n"))
            };
            assert_eq!(parse_request(&encoded(request.der())), Ok(()), "{algorithm:?}");
            let at = request.der().windows(3).position(|window| window == b"ann").unwrap();
            let mut forged = request.der().to_vec();
            forged[at..at + 3].copy_from_slice(b"bob");
            assert_eq!(parse_request(&encoded(&forged)), Err(refusal.to_owned()));
        }
    }
}
