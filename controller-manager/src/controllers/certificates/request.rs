//! What a certificate request asks for, and which rules its signer has. Pure.
use k8s_openapi::{
    api::certificates::v1::{
        CertificateSigningRequest, CertificateSigningRequestCondition, CertificateSigningRequestSpec,
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use std::net::IpAddr;
use x509_parser::{
    certification_request::X509CertificationRequest,
    extensions::{GeneralName, ParsedExtension},
    prelude::FromDer as _,
};

pub const KUBELET_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
pub const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";
pub const API_CLIENT: &str = "kubernetes.io/kube-apiserver-client";
const NODES_GROUP: &str = "system:nodes";
const NODE_PREFIX: &str = "system:node:";

/// The parts of a PKCS#10 request that rules look at.
#[derive(Debug, Default, PartialEq)]
pub struct Request {
    pub common_name: String,
    pub organizations: Vec<String>,
    pub dns_names: Vec<String>,
    pub ip_addresses: Vec<IpAddr>,
    /// Names of other kinds: mail addresses, URIs.
    pub other_names: usize,
    /// Attributes come one to a part of the name, and none twice: what we can put into a certificate as it is.
    pub plain_subject: bool,
}

/// Reads the PEM block of a request.
pub fn read(pem: &[u8]) -> Result<Request, String> {
    let (_, block) = x509_parser::pem::parse_x509_pem(pem).map_err(|e| format!("request is not in PEM form: {e}"))?;
    if block.label != "CERTIFICATE REQUEST" && block.label != "NEW CERTIFICATE REQUEST" {
        return Err("PEM block type must be CERTIFICATE REQUEST".to_owned());
    }
    let (_, parsed) = X509CertificationRequest::from_der(&block.contents).map_err(|e| format!("request: {e}"))?;
    let subject = &parsed.certification_request_info.subject;
    let text = |a: &x509_parser::x509::AttributeTypeAndValue<'_>| a.as_str().unwrap_or_default().to_owned();
    let mut types: Vec<String> = subject.iter_attributes().map(|a| a.attr_type().to_id_string()).collect();
    let parts = types.len();
    types.sort_unstable();
    types.dedup();
    let single = subject.iter_rdn().all(|rdn| rdn.iter().count() == 1);
    let mut request = Request {
        common_name: subject.iter_common_name().next().map(text).unwrap_or_default(),
        organizations: subject.iter_organization().map(text).collect(),
        plain_subject: single && types.len() == parts,
        ..Request::default()
    };
    for extension in parsed.requested_extensions().into_iter().flatten() {
        let ParsedExtension::SubjectAlternativeName(names) = extension else { continue };
        for name in &names.general_names {
            match name {
                GeneralName::DNSName(dns) => request.dns_names.push((*dns).to_owned()),
                GeneralName::IPAddress(bytes) => {
                    let v4 = <[u8; 4]>::try_from(*bytes).map(IpAddr::from);
                    match v4.or_else(|_| <[u8; 16]>::try_from(*bytes).map(IpAddr::from)) {
                        Ok(ip) => request.ip_addresses.push(ip),
                        Err(_) => request.other_names += 1,
                    }
                }
                _ => request.other_names += 1,
            }
        }
    }
    Ok(request)
}

fn usages_are(spec: &CertificateSigningRequestSpec, allowed: &[&str], required: &[&str]) -> bool {
    let usages: Vec<&str> = spec.usages.iter().flatten().map(String::as_str).collect();
    usages.iter().all(|u| allowed.contains(u)) && required.iter().all(|u| usages.contains(u))
}

/// The words of the first rule that is not kept.
fn keeps(rules: &[(bool, &'static str)]) -> Result<(), &'static str> {
    rules.iter().find(|(kept, _)| !kept).map_or(Ok(()), |(_, words)| Err(words))
}

const OF_NODES: &str = "subject organization is not system:nodes";
const OTHER_NAMES: &str = "Email and URI subjectAltNames are not allowed";
const OF_A_NODE: &str = "subject common name does not begin with system:node:";

/// As `ValidateKubeletClientCSR`.
pub fn check_kubelet_client(request: &Request, spec: &CertificateSigningRequestSpec) -> Result<(), &'static str> {
    let allowed = ["digital signature", "key encipherment", "client auth"];
    keeps(&[
        (request.organizations == [NODES_GROUP], OF_NODES),
        (request.dns_names.is_empty(), "DNS subjectAltNames are not allowed"),
        (request.ip_addresses.is_empty(), "IP subjectAltNames are not allowed"),
        (request.other_names == 0, OTHER_NAMES),
        (request.common_name.starts_with(NODE_PREFIX), OF_A_NODE),
        (
            usages_are(spec, &allowed, &["digital signature", "client auth"]),
            "usages did not match [digital signature, client auth] or [digital signature, key encipherment, client auth]",
        ),
    ])
}

/// As `ValidateKubeletServingCSR`.
pub fn check_kubelet_serving(request: &Request, spec: &CertificateSigningRequestSpec) -> Result<(), &'static str> {
    let allowed = ["digital signature", "key encipherment", "server auth"];
    let named = !request.dns_names.is_empty() || !request.ip_addresses.is_empty();
    keeps(&[
        (request.organizations == [NODES_GROUP], OF_NODES),
        (named, "DNS or IP subjectAltName is required"),
        (request.other_names == 0, OTHER_NAMES),
        (request.common_name.starts_with(NODE_PREFIX), OF_A_NODE),
        (
            usages_are(spec, &allowed, &["digital signature", "server auth"]),
            "usages did not match [digital signature, server auth] or [digital signature, key encipherment, server auth]",
        ),
    ])
}

/// Whether the request keeps the rules of its signer.
pub fn check_for_signer(request: &Request, spec: &CertificateSigningRequestSpec) -> Result<(), &'static str> {
    match spec.signer_name.as_str() {
        KUBELET_CLIENT => check_kubelet_client(request, spec),
        KUBELET_SERVING => check_kubelet_serving(request, spec),
        API_CLIENT => {
            let allowed = ["digital signature", "key encipherment", "client auth"];
            if !usages_are(spec, &allowed, &["client auth"]) {
                return Err("usages did not match [digital signature, key encipherment, client auth]");
            }
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Who may be approved without a person, and what right says so. As the recognizers of the approver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recognized {
    pub subresource: &'static str,
    pub message: &'static str,
}

/// A node's own renewal comes before a bootstrapping node's first request.
pub fn recognize(request: &Request, spec: &CertificateSigningRequestSpec) -> Vec<Recognized> {
    if spec.signer_name != KUBELET_CLIENT || check_kubelet_client(request, spec).is_err() {
        return Vec::new();
    }
    let mut recognized = Vec::new();
    if spec.username.as_deref() == Some(request.common_name.as_str()) {
        recognized.push(Recognized {
            subresource: "selfnodeclient",
            message: "Auto approving self kubelet client certificate after SubjectAccessReview.",
        });
    }
    recognized.push(Recognized {
        subresource: "nodeclient",
        message: "Auto approving kubelet client certificate after SubjectAccessReview.",
    });
    recognized
}

pub fn has_condition(csr: &CertificateSigningRequest, kind: &str) -> bool {
    conditions(csr).iter().any(|c| c.type_ == kind)
}

pub fn conditions(csr: &CertificateSigningRequest) -> &[CertificateSigningRequestCondition] {
    csr.status.as_ref().and_then(|s| s.conditions.as_deref()).unwrap_or_default()
}

pub fn certificate(csr: &CertificateSigningRequest) -> Option<&[u8]> {
    csr.status.as_ref()?.certificate.as_ref().map(|c| c.0.as_slice()).filter(|c| !c.is_empty())
}

/// The request with one condition more.
pub fn with_condition(
    csr: &CertificateSigningRequest,
    kind: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> CertificateSigningRequest {
    let mut updated = csr.clone();
    let condition = CertificateSigningRequestCondition {
        type_: kind.to_owned(),
        status: "True".to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message.to_owned()),
        last_update_time: Some(Time(now)),
        last_transition_time: Some(Time(now)),
    };
    updated.status.get_or_insert_default().conditions.get_or_insert_default().push(condition);
    updated
}

const HOUR: i64 = 3600;

/// Whether a request has served its time. As `csrcleaner`.
pub fn is_stale(csr: &CertificateSigningRequest, expires: Option<i64>, now: Timestamp) -> bool {
    let age = |t: Option<&Time>| t.map_or(0, |t| now.as_second() - t.0.as_second());
    let since = |kind: &str| {
        let condition = conditions(csr).iter().find(|c| c.type_ == kind)?;
        Some(age(condition.last_update_time.as_ref().or(condition.last_transition_time.as_ref())))
    };
    let old = |kind: &str| since(kind).is_some_and(|age| age > HOUR);
    let issued = certificate(csr).is_some();
    if issued && expires.is_some_and(|at| at < now.as_second()) {
        return true;
    }
    if old("Denied") || old("Failed") || old("Approved") {
        return true;
    }
    conditions(csr).is_empty() && !issued && age(csr.metadata.creation_timestamp.as_ref()) > 24 * HOUR
}

#[cfg(test)]
mod tests {
    use super::*;
    use component_base::x509;
    use serde_json::json;

    fn spec(signer: &str, user: &str, usages: &[&str]) -> CertificateSigningRequestSpec {
        serde_json::from_value(json!({"signerName": signer, "username": user, "usages": usages, "request": ""}))
            .unwrap()
    }

    fn request(name: &str, organizations: &[&str], dns: &[&str]) -> Request {
        let dns: Vec<String> = dns.iter().map(|d| (*d).to_owned()).collect();
        let pem = x509::request(&x509::new_key().unwrap(), name, organizations, &dns, &[]).unwrap();
        read(pem.as_bytes()).unwrap()
    }

    const CLIENT: [&str; 2] = ["digital signature", "client auth"];

    #[test]
    fn a_request_is_read() {
        let got = request("system:node:n1", &["system:nodes"], &["n1"]);
        assert_eq!((got.common_name.as_str(), got.organizations), ("system:node:n1", vec!["system:nodes".to_owned()]));
        assert_eq!((got.dns_names, got.plain_subject), (vec!["n1".to_owned()], true));
        assert!(read(b"nonsense").is_err());
    }

    #[test]
    fn only_kubelets_are_approved_without_a_person() {
        let node = request("system:node:n1", &["system:nodes"], &[]);
        let subresources = |request: &Request, spec: &CertificateSigningRequestSpec| {
            recognize(request, spec).iter().map(|r| r.subresource).collect::<Vec<_>>()
        };
        let bootstrap = spec(KUBELET_CLIENT, "system:bootstrap:abcdef", &CLIENT);
        assert_eq!(subresources(&node, &bootstrap), ["nodeclient"]);
        let renewal = spec(KUBELET_CLIENT, "system:node:n1", &CLIENT);
        assert_eq!(subresources(&node, &renewal), ["selfnodeclient", "nodeclient"]);
        for (why, request, spec) in [
            ("another signer", &node, spec(API_CLIENT, "x", &CLIENT)),
            ("server auth", &node, spec(KUBELET_CLIENT, "x", &["digital signature", "server auth"])),
            ("more usages", &node, spec(KUBELET_CLIENT, "x", &["digital signature", "client auth", "server auth"])),
            ("a name", &request("system:node:n1", &["system:nodes"], &["n1"]), bootstrap.clone()),
            ("masters", &request("system:node:n1", &["system:masters"], &[]), bootstrap.clone()),
            ("no node", &request("admin", &["system:nodes"], &[]), bootstrap.clone()),
        ] {
            assert!(recognize(request, &spec).is_empty(), "{why}");
        }
    }

    #[test]
    fn signers_have_rules() {
        let serving = spec(KUBELET_SERVING, "system:node:n1", &["digital signature", "server auth"]);
        let named = request("system:node:n1", &["system:nodes"], &["n1"]);
        assert_eq!(check_for_signer(&named, &serving), Ok(()));
        let nameless = request("system:node:n1", &["system:nodes"], &[]);
        assert!(check_for_signer(&nameless, &serving).is_err());
        let person = request("jane", &["developers"], &[]);
        assert_eq!(check_for_signer(&person, &spec(API_CLIENT, "jane", &["client auth"])), Ok(()));
        assert!(check_for_signer(&person, &spec(API_CLIENT, "jane", &["client auth", "server auth"])).is_err());
    }

    #[test]
    fn requests_are_kept_for_a_time() {
        let now: Timestamp = "2026-01-03T00:00:00Z".parse().unwrap();
        let csr = |created: &str, kind: Option<(&str, &str)>, certificate: Option<&str>| -> CertificateSigningRequest {
            let conditions: Vec<_> =
                kind.iter().map(|(k, at)| json!({"type": k, "status": "True", "lastUpdateTime": at})).collect();
            serde_json::from_value(json!({"metadata": {"creationTimestamp": created},
                "spec": {"signerName": "x", "request": ""},
                "status": {"conditions": conditions, "certificate": certificate}}))
            .unwrap()
        };
        let (early, late) = ("2026-01-01T00:00:00Z", "2026-01-02T23:30:00Z");
        for (name, csr, expires, expected) in [
            ("pending", csr(late, None, None), None, false),
            ("pending for days", csr(early, None, None), None, true),
            ("just approved", csr(early, Some(("Approved", late)), Some("eA==")), Some(now.as_second() + 9), false),
            ("approved long ago", csr(early, Some(("Approved", early)), Some("eA==")), Some(now.as_second() + 9), true),
            ("denied long ago", csr(early, Some(("Denied", early)), None), None, true),
            ("expired", csr(early, Some(("Approved", late)), Some("eA==")), Some(now.as_second() - 9), true),
        ] {
            assert_eq!(is_stale(&csr, expires, now), expected, "{name}");
        }
    }
}
