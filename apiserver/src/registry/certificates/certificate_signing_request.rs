//! CertificateSigningRequests: who asks is noted on creation, and what was asked stays.

use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{child, copy_field, int, items_mut, list, set, text};
use crate::registry::print::{self, Clock, NONE, human_duration};
use crate::registry::rules::Rules;
use apimachinery::status::FieldError;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

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
    validate_status: |new, old, errors| conditions(new, old, false, errors),
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
    let usages = spec.at("usages");
    if usages.is_empty() {
        errors.required(&usages, "usages must be provided");
    }
    for usage in usages.items() {
        errors.one_of(&usage, &USAGES);
    }
    let signer = spec.at("signerName");
    if errors.need(&signer) {
        match signer.str().split_once('/') {
            Some((domain, path)) if !path.is_empty() && domain.contains('.') => {}
            _ => errors
                .invalid(&signer, "must be a fully qualified domain and path of the form 'example.com/signer-name'"),
        }
    }
    let seconds = spec.at("expirationSeconds");
    if seconds.int().is_some_and(|s| s < EXPIRATION_MIN_SECONDS) {
        errors.invalid(&seconds, "may not specify a duration less than 600 seconds (10 minutes)");
    }
}

/// Base64 of the PEM of a PKCS#10 request whose signature holds.
fn parse_request(text: &str) -> Result<(), String> {
    use x509_parser::prelude::FromDer as _;
    let pem = STANDARD.decode(text).unwrap_or_default();
    let (_, pem) =
        x509_parser::pem::parse_x509_pem(&pem).map_err(|_| "PEM block type must be CERTIFICATE REQUEST".to_owned())?;
    if pem.label != "CERTIFICATE REQUEST" {
        return Err("PEM block type must be CERTIFICATE REQUEST".to_owned());
    }
    x509_parser::certification_request::X509CertificationRequest::from_der(&pem.contents)
        .map(|_| ())
        .map_err(|error| error.to_string())
}

/// Verdicts exclude each other and stay. As `validateConditions`.
pub fn conditions(new: &Field<'_, '_>, old: &Field<'_, '_>, approval: bool, errors: &mut Errors) {
    let status = new.at("status");
    let field = status.at("conditions");
    let has = |object: &Value, kind: &str| list(object, "/status/conditions").iter().any(|c| c["type"] == kind);
    if has(new.value, "Approved") && has(new.value, "Denied") {
        errors.invalid(&field, "Approved and Denied conditions are mutually exclusive");
    }
    for condition in field.items() {
        errors.need(&condition.at("type"));
        let value = condition.at("status");
        if errors.need(&value) {
            match condition.at("type").str() {
                "Approved" | "Denied" | "Failed" => errors.one_of(&value, &["True"]),
                _ => errors.one_of(&value, &["False", "True", "Unknown"]),
            }
        }
    }
    for kind in ["Approved", "Denied", "Failed"] {
        if has(old.value, kind) && !has(new.value, kind) {
            errors.forbidden(&field, format!("updates may not remove a condition of type {kind:?}"));
        }
        if !approval && kind != "Failed" && !has(old.value, kind) && has(new.value, kind) {
            errors.forbidden(&field, format!("updates may not add a condition of type {kind:?}"));
        }
    }
    let certificate = status.at("certificate");
    let before = text(old.value, "/status/certificate");
    if !before.is_empty() && certificate.str() != before {
        errors.forbidden(&certificate, "updates may not change certificate once issued");
    }
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
