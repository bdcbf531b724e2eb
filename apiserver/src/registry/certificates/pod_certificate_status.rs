//! What a signer may write on a PodCertificateRequest: one verdict, once, and with `Issued` a chain that answers what was
//! asked. As `ValidatePodCertificateRequestStatusUpdate`.

use super::pod_certificate_request::requested_key;
use crate::registry::checks;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{list, semantically_equal, text};
use apimachinery::time::format_duration;
use component_base::pem;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};
use std::time::Duration;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::{FromDer as _, X509Certificate};

/// Verdicts; at most one is on a request, and it stays.
pub const TERMINAL: [&str; 3] = ["Issued", "Denied", "Failed"];
/// As `MaxCertificateChainSize`.
const CHAIN_MAX_BYTES: usize = 100 * 1024;
const LIFETIME_MIN_SECONDS: i64 = 3600;
const SKEW: SignedDuration = SignedDuration::from_mins(5);
const REFRESH_MARGIN: SignedDuration = SignedDuration::from_mins(10);

/// Checks a write of the status.
pub fn update(new: &Field<'_, '_>, old: &Field<'_, '_>, now: Timestamp, errors: &mut Errors) {
    let status = new.at("status");
    let conditions = status.at("conditions");
    let mut known = 0;
    for condition in conditions.items() {
        let kind = condition.at("type");
        if !TERMINAL.contains(&kind.str()) {
            errors.not_supported(&kind, &TERMINAL);
            continue;
        }
        known += 1;
        if known > 1 {
            let why = "There may be at most one condition with type \"Issued\", \"Denied\", or \"Failed\"";
            errors.invalid(&kind, why);
        }
        if condition.at("status").str() != "True" {
            errors.not_supported(&condition.at("status"), &["True"]);
        }
    }
    checks::conditions(&conditions, errors);
    if !errors.0.is_empty() {
        return;
    }
    let before = old.at("status");
    if TERMINAL.iter().any(|verdict| has(old.value, verdict)) {
        let why = "immutable after PodCertificateRequest is issued, denied, or failed";
        stays(&status, before.value, why, errors);
    } else if has(new.value, "Denied") || has(new.value, "Failed") {
        let why = "non-condition status fields must be empty when denying or failing the PodCertificateRequest";
        stays(&status, &json!({"conditions": conditions.value}), why, errors);
    } else if has(new.value, "Issued") {
        issued(&status, old.at("spec").value, now, errors);
    } else {
        let why = "status is immutable unless transitioning to \"Issued\", \"Denied\", or \"Failed\"";
        stays(&status, before.value, why, errors);
    }
}

fn has(request: &Value, verdict: &str) -> bool {
    let is = |condition: &Value| text(condition, "/type") == verdict && text(condition, "/status") == "True";
    list(request, "/status/conditions").iter().any(is)
}

fn stays(status: &Field<'_, '_>, as_it_is: &Value, why: &str, errors: &mut Errors) {
    if !semantically_equal(status.value, as_it_is) {
        checks::invalid_without_value(status, why, errors);
    }
}

/// Stops at the first fault, as Kubernetes does.
fn issued(status: &Field<'_, '_>, spec: &Value, now: Timestamp, errors: &mut Errors) {
    let chain = status.at("certificateChain");
    if chain.str().len() > CHAIN_MAX_BYTES {
        errors.too_long(&chain, CHAIN_MAX_BYTES);
        return;
    }
    let blocks = pem::blocks(chain.str());
    let Some(leaf) = blocks.first() else {
        errors.invalid(&chain, "issued certificate chain must contain at least one certificate");
        return;
    };
    if leaf.label != pem::CERTIFICATE {
        errors.invalid(&chain, "issued certificate chain must consist entirely of CERTIFICATE PEM blocks");
        return;
    }
    let leaf = match X509Certificate::from_der(&leaf.bytes) {
        Ok(([], leaf)) => leaf,
        _ => {
            errors.invalid(&chain, "leaf certificate does not parse as valid X.509");
            return;
        }
    };
    names(&chain, &leaf, errors);
    if requested_key(spec).as_deref() != Some(leaf.public_key().raw) {
        errors.invalid(&chain, "leaf certificate was not issued to the requested public key");
        return;
    }
    let [not_before, not_after, refresh] = ["notBefore", "notAfter", "beginRefreshAt"].map(|name| status.at(name));
    for field in [&not_before, &not_after] {
        if field.is_blank() {
            errors.required(field, "must be present and consistent with the issued certificate");
        }
    }
    if refresh.is_blank() {
        errors.required(&refresh, "must be present and in the range [notbefore+10min, notafter-10min]");
    }
    let (Some(from), Some(until), Some(refresh_at)) = (time(&not_before), time(&not_after), time(&refresh)) else {
        return;
    };
    let seconds = |time: x509_parser::time::ASN1Time| time.timestamp();
    let (leaf_from, leaf_until) = (seconds(leaf.validity().not_before), seconds(leaf.validity().not_after));
    let lifetime = leaf_until - leaf_from;
    let shown = || format_duration(Duration::from_secs(u64::try_from(lifetime).unwrap_or(0)));
    let max = spec["maxExpirationSeconds"].as_i64().unwrap_or(0);
    if from.as_second() != leaf_from {
        errors.invalid(&not_before, "must be set to the NotBefore time encoded in the leaf certificate");
    } else if from.duration_since(now).abs() >= SKEW {
        errors.invalid(&not_before, "must be set to within 5 minutes of kube-apiserver's current time");
    } else if until.as_second() != leaf_until {
        errors.invalid(&not_after, "must be set to the NotAfter time encoded in the leaf certificate");
    } else if lifetime < LIFETIME_MIN_SECONDS {
        errors.invalid_as(&chain, shown(), "leaf certificate lifetime must be >= 1 hour");
    } else if lifetime > max {
        let why = format!("leaf certificate lifetime must be <= spec.maxExpirationSeconds ({max})");
        errors.invalid_as(&chain, shown(), why);
    } else if refresh_at.duration_since(from) < REFRESH_MARGIN {
        errors.invalid(&refresh, "must be at least 10 minutes after status.notBefore");
    } else if until.duration_since(refresh_at) < REFRESH_MARGIN {
        errors.invalid(&refresh, "must be at least 10 minutes before status.notAfter");
    } else {
        let after = blocks.iter().skip(1);
        let mut faults = after.filter_map(|block| match X509Certificate::from_der(&block.bytes) {
            _ if block.label != pem::CERTIFICATE => {
                Some("issued certificate chain must consist entirely of CERTFICATE PEM blocks")
            }
            Ok(([], _)) => None,
            _ => Some("intermediate certificate does not parse as valid X.509"),
        });
        if let Some(fault) = faults.next() {
            errors.invalid(&chain, fault);
        }
    }
}

/// Names that no client could do anything with.
fn names(chain: &Field<'_, '_>, leaf: &X509Certificate<'_>, errors: &mut Errors) {
    let names = leaf.subject_alternative_name().ok().flatten();
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        match name {
            GeneralName::DNSName(name) => {
                let whys = [
                    (name.is_empty(), "leaf certificate should not contain empty DNSName"),
                    (name.contains(".."), "leaf certificate's DNSName should not contain '..'"),
                    (
                        name.starts_with('.') || name.ends_with('.'),
                        "leaf certificate's DNSName should not start or end with '.'",
                    ),
                ];
                for (_, why) in whys.iter().filter(|(wrong, _)| *wrong) {
                    errors.invalid_as(chain, *name, *why);
                }
            }
            GeneralName::RFC822Name(name) if !is_address(name) => {
                errors.invalid_as(chain, *name, "leaf certificate should not contain invalid EmailAddress");
            }
            _ => {}
        }
    }
}

/// The plain ones of what `mail.ParseAddress` takes.
fn is_address(text: &str) -> bool {
    let plain = |part: &str| !part.is_empty() && !part.contains(|c: char| c.is_whitespace() || "<>@,;".contains(c));
    text.rsplit_once('@').is_some_and(|(user, host)| plain(user) && plain(host))
}

fn time(field: &Field<'_, '_>) -> Option<Timestamp> {
    field.str().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;

    struct Case {
        request: Value,
        key: rcgen::KeyPair,
        now: Timestamp,
    }

    impl Case {
        fn new() -> Self {
            let key = rcgen::KeyPair::generate().unwrap();
            let stub = rcgen::CertificateParams::default().serialize_request(&key).unwrap();
            let spec = json!({"stubPKCS10Request": STANDARD.encode(stub.der()), "maxExpirationSeconds": 86400});
            let now = Timestamp::from_second(Timestamp::now().as_second()).unwrap();
            Self { request: json!({"spec": spec, "status": {}}), key, now }
        }

        /// A status that issues a certificate for these seconds, counted from now.
        fn issue(&self, from: i64, until: i64, key: &rcgen::KeyPair, names: &[&str]) -> Value {
            let mut params = rcgen::CertificateParams::default();
            let time = |seconds: i64| {
                std::time::SystemTime::UNIX_EPOCH
                    + Duration::from_secs((self.now.as_second() + seconds).try_into().unwrap())
            };
            params.not_before = time(from).into();
            params.not_after = time(until).into();
            let dns = |name: &&str| rcgen::SanType::DnsName((*name).try_into().unwrap());
            params.subject_alt_names = names.iter().map(dns).collect();
            let text = |seconds| apimachinery::time::rfc3339(self.now + SignedDuration::from_secs(seconds));
            json!({
                "conditions": [condition("Issued")],
                "certificateChain": params.self_signed(key).unwrap().pem(),
                "notBefore": text(from), "notAfter": text(until), "beginRefreshAt": text((from + until) / 2),
            })
        }

        fn faults(&self, status: &Value, old: &Value) -> Vec<String> {
            let (mut new, mut before) = (self.request.clone(), self.request.clone());
            new["status"] = status.clone();
            before["status"] = old.clone();
            let mut errors = Errors::default();
            update(&Field::root(&new), &Field::root(&before), self.now, &mut errors);
            errors.0.iter().map(ToString::to_string).collect()
        }
    }

    fn condition(kind: &str) -> Value {
        json!({"type": kind, "status": "True", "reason": "Because", "message": "",
            "lastTransitionTime": "2026-01-01T00:00:00Z"})
    }

    #[test]
    fn one_verdict_is_written_once() {
        let case = Case::new();
        let pending = json!({});
        let denied = json!({"conditions": [condition("Denied")]});
        assert!(case.faults(&denied, &pending).is_empty());
        assert!(case.faults(&denied, &denied).is_empty());
        assert!(case.faults(&pending, &pending).is_empty());
        let of = |why: &str| vec![format!("status: Invalid value: \"\": {why}")];
        assert_eq!(
            case.faults(&pending, &denied),
            of("immutable after PodCertificateRequest is issued, denied, or failed")
        );
        assert_eq!(
            case.faults(&json!({"certificateChain": "x"}), &pending),
            of("status is immutable unless transitioning to \"Issued\", \"Denied\", or \"Failed\"")
        );
        let failed = json!({"conditions": [condition("Failed")], "certificateChain": "x"});
        assert_eq!(
            case.faults(&failed, &pending),
            of("non-condition status fields must be empty when denying or failing the PodCertificateRequest")
        );
        let both = json!({"conditions": [condition("Denied"), condition("Issued")]});
        assert_eq!(
            case.faults(&both, &pending),
            [
                "status.conditions[1].type: Invalid value: \"Issued\": There may be at most one condition with type \"Issued\", \"Denied\", or \"Failed\""
            ]
        );
        let other = json!({"conditions": [condition("Other")]});
        assert_eq!(
            case.faults(&other, &pending),
            [
                "status.conditions[0].type: Unsupported value: \"Other\": supported values: \"Issued\", \"Denied\", \"Failed\""
            ]
        );
        let mut open = denied;
        open["conditions"][0]["status"] = "False".into();
        assert_eq!(
            case.faults(&open, &pending),
            ["status.conditions[0].status: Unsupported value: \"False\": supported values: \"True\""]
        );
    }

    #[test]
    fn a_certificate_answers_the_request() {
        let case = Case::new();
        let pending = json!({});
        let day = 86_400;
        let good = case.issue(0, day, &case.key, &["a.example.com"]);
        assert!(case.faults(&good, &pending).is_empty(), "{:?}", case.faults(&good, &pending));
        let other = rcgen::KeyPair::generate().unwrap();
        for (status, why) in [
            (case.issue(0, day, &other, &[]), "leaf certificate was not issued to the requested public key"),
            (case.issue(-300, day - 300, &case.key, &[]), "must be set to within 5 minutes of kube-apiserver's"),
            (case.issue(0, 3599, &case.key, &[]), "\"59m59s\": leaf certificate lifetime must be >= 1 hour"),
            (case.issue(0, day + 1, &case.key, &[]), "lifetime must be <= spec.maxExpirationSeconds (86400)"),
            (case.issue(0, day, &case.key, &["a..b"]), "DNSName should not contain '..'"),
            (case.issue(0, day, &case.key, &["a."]), "DNSName should not start or end with '.'"),
        ] {
            let faults = case.faults(&status, &pending);
            assert!(faults.len() == 1 && faults[0].contains(why), "{why}: {faults:?}");
        }
        let at = |seconds| apimachinery::time::rfc3339(case.now + SignedDuration::from_secs(seconds));
        for (field, value, why) in [
            ("notBefore", at(1), "must be set to the NotBefore time encoded in the leaf certificate"),
            ("notAfter", at(day + 1), "must be set to the NotAfter time encoded in the leaf certificate"),
            ("beginRefreshAt", at(599), "must be at least 10 minutes after status.notBefore"),
            ("beginRefreshAt", at(day - 599), "must be at least 10 minutes before status.notAfter"),
            ("certificateChain", String::new(), "issued certificate chain must contain at least one certificate"),
            (
                "certificateChain",
                format!("{}{}", text(&good, "/certificateChain"), pem::encode("OTHER", b"x")),
                "issued certificate chain must consist entirely of CERTFICATE PEM blocks",
            ),
            (
                "certificateChain",
                format!("{}{}", text(&good, "/certificateChain"), pem::encode(pem::CERTIFICATE, b"x")),
                "intermediate certificate does not parse as valid X.509",
            ),
            ("notBefore", String::new(), "must be present and consistent with the issued certificate"),
        ] {
            let mut status = good.clone();
            status[field] = value.into();
            let faults = case.faults(&status, &pending);
            assert!(faults.len() == 1 && faults[0].contains(why), "{field} {why}: {faults:?}");
        }
    }
}
