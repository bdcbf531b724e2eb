//! What a certificate request asks for, and which rules its signer has. Pure.
use super::subject;
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
const COMMON_NAME: &str = "2.5.4.3";
const ORGANIZATION: &str = "2.5.4.10";

/// The parts of a PKCS#10 request that rules look at.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Request {
    pub common_name: String,
    pub organizations: Vec<String>,
    pub dns_names: Vec<String>,
    pub ip_addresses: Vec<IpAddr>,
    pub emails: Vec<String>,
    pub uris: Vec<String>,
    /// The subject as a certificate has it: what Go's `pkix.Name` knows of it, in Go's order. DER.
    pub subject: Vec<u8>,
    /// SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
    /// Who asks has the key.
    pub is_proven: bool,
}

/// Reads the PEM block of a request.
pub fn read(pem: &[u8]) -> Result<Request, String> {
    let (_, block) = x509_parser::pem::parse_x509_pem(pem).map_err(|e| format!("request is not in PEM form: {e}"))?;
    if block.label != "CERTIFICATE REQUEST" && block.label != "NEW CERTIFICATE REQUEST" {
        return Err("PEM block type must be CERTIFICATE REQUEST".to_owned());
    }
    let (_, parsed) = X509CertificationRequest::from_der(&block.contents).map_err(|e| format!("request: {e}"))?;
    let info = &parsed.certification_request_info;
    let text = |a: &x509_parser::x509::AttributeTypeAndValue<'_>| a.as_str().unwrap_or_default().to_owned();
    let of = |oid: &str| -> Vec<String> {
        info.subject.iter_attributes().filter(|a| a.attr_type().to_id_string() == oid).map(text).collect()
    };
    let mut request = Request {
        common_name: of(COMMON_NAME).pop().unwrap_or_default(),
        organizations: of(ORGANIZATION),
        subject: subject::encode(of),
        public_key: info.subject_pki.raw.to_vec(),
        is_proven: parsed.verify_signature().is_ok(),
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
                        Err(_) => return Err(format!("x509: cannot parse IP address of length {}", bytes.len())),
                    }
                }
                GeneralName::RFC822Name(mail) => request.emails.push((*mail).to_owned()),
                GeneralName::URI(uri) => request.uris.push((*uri).to_owned()),
                _ => {}
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
const NO_EMAIL: &str = "Email subjectAltNames are not allowed";
const NO_URI: &str = "URI subjectAltNames are not allowed";
const OF_A_NODE: &str = "subject common name does not begin with system:node:";

/// As `ValidateKubeletClientCSR`.
pub fn check_kubelet_client(request: &Request, spec: &CertificateSigningRequestSpec) -> Result<(), &'static str> {
    let allowed = ["digital signature", "key encipherment", "client auth"];
    keeps(&[
        (request.organizations == [NODES_GROUP], OF_NODES),
        (request.dns_names.is_empty(), "DNS subjectAltNames are not allowed"),
        (request.emails.is_empty(), NO_EMAIL),
        (request.ip_addresses.is_empty(), "IP subjectAltNames are not allowed"),
        (request.uris.is_empty(), NO_URI),
        (request.common_name.starts_with(NODE_PREFIX), OF_A_NODE),
        (
            usages_are(spec, &allowed, &["digital signature", "client auth"]),
            "usages did not match [client auth digital signature key encipherment]",
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
        (request.emails.is_empty(), NO_EMAIL),
        (request.uris.is_empty(), NO_URI),
        (
            usages_are(spec, &allowed, &["digital signature", "server auth"]),
            "usages did not match [digital signature key encipherment server auth]",
        ),
        (request.common_name.starts_with(NODE_PREFIX), OF_A_NODE),
    ])
}

/// As `validAPIServerClientUsages`.
fn check_api_client(spec: &CertificateSigningRequestSpec) -> Result<(), String> {
    let allowed = ["digital signature", "key encipherment", "client auth"];
    let usages = spec.usages.as_deref().unwrap_or_default();
    if let Some(other) = usages.iter().find(|usage| !allowed.contains(&usage.as_str())) {
        return Err(format!("invalid usage for client certificate: {other}"));
    }
    if !usages.iter().any(|usage| usage == "client auth") {
        return Err("missing required usage for client certificate: client auth".to_owned());
    }
    Ok(())
}

/// Whether the request keeps the rules of its signer.
pub fn check_for_signer(request: &Request, spec: &CertificateSigningRequestSpec) -> Result<(), String> {
    match spec.signer_name.as_str() {
        KUBELET_CLIENT => check_kubelet_client(request, spec).map_err(str::to_owned),
        KUBELET_SERVING => check_kubelet_serving(request, spec).map_err(str::to_owned),
        API_CLIENT => check_api_client(spec),
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

/// Whether a request has served its time. As `CSRCleanerController.handle`.
pub fn is_stale(csr: &CertificateSigningRequest, expires: Option<i64>, now: Timestamp) -> bool {
    let older = |t: Option<&Time>, age: i64| t.is_some_and(|t| now.as_second() - t.0.as_second() > age);
    let old = |kind: &str, age: i64| {
        conditions(csr).iter().any(|c| c.type_ == kind && older(c.last_update_time.as_ref(), age))
    };
    let is_pending = conditions(csr).is_empty();
    if certificate(csr).is_some() {
        let expired = has_condition(csr, "Approved") && expires.is_some_and(|at| at < now.as_second());
        return expired || old("Approved", HOUR) || old("Denied", HOUR) || old("Failed", HOUR);
    }
    old("Denied", HOUR)
        || old("Failed", HOUR)
        || old("Approved", 24 * HOUR)
        || (is_pending && older(csr.metadata.creation_timestamp.as_ref(), 24 * HOUR))
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

    /// Two organizations, an address for mail in the subject, names of all kinds, and a wish to be an authority.
    const JANE: &str = include_str!("jane.csr.pem");
    const CLIENT: [&str; 2] = ["digital signature", "client auth"];

    #[test]
    fn a_request_is_read() {
        let got = request("system:node:n1", &["system:nodes"], &["n1"]);
        assert_eq!((got.common_name.as_str(), got.organizations), ("system:node:n1", vec!["system:nodes".to_owned()]));
        assert_eq!((got.dns_names, got.is_proven), (vec!["n1".to_owned()], true));
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
        let person = request("jane", &["developers"], &[]);
        let all = read(JANE.as_bytes()).unwrap();
        let node = Request { organizations: vec![NODES_GROUP.to_owned()], ..all };
        let mail = Request { ip_addresses: Vec::new(), dns_names: Vec::new(), ..node };
        let uri = Request { emails: Vec::new(), ..mail.clone() };
        let client = spec(KUBELET_CLIENT, "jane", &CLIENT);
        let broad = spec(KUBELET_CLIENT, "jane", &["client auth"]);
        for (request, spec, words) in [
            (&nameless, &serving, "DNS or IP subjectAltName is required"),
            (&person, &serving, OF_NODES),
            (
                &named,
                &spec(KUBELET_SERVING, "n", &["server auth"]),
                "usages did not match [digital signature key encipherment server auth]",
            ),
            (&named, &client, "DNS subjectAltNames are not allowed"),
            (&mail, &client, NO_EMAIL),
            (&uri, &client, NO_URI),
            (&nameless, &broad, "usages did not match [client auth digital signature key encipherment]"),
            (
                &person,
                &spec(API_CLIENT, "jane", &["client auth", "server auth"]),
                "invalid usage for client certificate: server auth",
            ),
            (
                &person,
                &spec(API_CLIENT, "jane", &["digital signature"]),
                "missing required usage for client certificate: client auth",
            ),
        ] {
            assert_eq!(check_for_signer(request, spec), Err(words.to_owned()));
        }
        assert_eq!(check_for_signer(&person, &spec(API_CLIENT, "jane", &["client auth"])), Ok(()));
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
            (
                "approved, waits for another's signer",
                csr(early, Some(("Approved", "2026-01-02T12:00:00Z")), None),
                None,
                false,
            ),
            ("approved, nobody signed for days", csr(early, Some(("Approved", early)), None), None, true),
            ("failed long ago", csr(early, Some(("Failed", early)), None), None, true),
            ("denied long ago", csr(early, Some(("Denied", early)), None), None, true),
            ("expired", csr(early, Some(("Approved", late)), Some("eA==")), Some(now.as_second() - 9), true),
        ] {
            assert_eq!(is_stale(&csr, expires, now), expected, "{name}");
        }
    }
}
