//! Who may approve and sign certificates of a signer, and what a client certificate may not claim.
use std::sync::Arc;

use apimachinery::status::{FieldError, StatusError};
use base64::Engine as _;
use futures::future::BoxFuture;
use rustls_pki_types::CertificateSigningRequestDer;
use rustls_pki_types::pem::PemObject as _;
use serde_json::Value;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer as _;

use super::{AdmissionRequest, Plugin, list, text};
use crate::authorization::{Attributes, Authorizer, Decision};
use crate::registry::certificates::pod_certificate_request::changes_status;

const GROUP: &str = "certificates.k8s.io";
const REQUESTS: &str = "certificatesigningrequests";

/// A write that needs a right on the signer that it concerns.
#[derive(Clone, Copy)]
pub struct OfSigner {
    handles: fn(&AdmissionRequest<'_>) -> bool,
    /// The verb on the signer, and what it is asked for.
    verb: &'static str,
    concern: &'static str,
    /// Whether a write leaves alone what the right is about.
    spares: fn(new: &Value, old: &Value) -> bool,
}

/// One with whom it asks.
pub struct SignerPlugin(OfSigner, Arc<Authorizer>);

/// CertificateApproval: approving needs the verb `approve` on the signer.
pub const ON_APPROVAL: OfSigner = OfSigner {
    handles: |request| request.updates() && request.is(GROUP, REQUESTS, "approval"),
    verb: "approve",
    concern: "approve requests",
    spares: |_, _| false,
};
/// CertificateSigning: signing needs the verb `sign` on the signer.
pub const ON_SIGNING: OfSigner = OfSigner {
    handles: |request| request.updates() && request.is(GROUP, REQUESTS, "status"),
    verb: "sign",
    concern: "sign requests",
    spares: |new, old| {
        let failed = |csr: &Value| list(csr, "/status/conditions").iter().any(|c| text(c, "/type") == "Failed");
        new.pointer("/status/certificate") == old.pointer("/status/certificate") && failed(new) == failed(old)
    },
};
/// ClusterTrustBundleAttest: a bundle of a signer's needs the verb `attest` on it.
pub const ON_ATTESTING: OfSigner = OfSigner {
    handles: |request| request.writes() && request.is(GROUP, "clustertrustbundles", ""),
    verb: "attest",
    concern: "attest",
    spares: |new, old| text(new, "/spec/signerName").is_empty() || new["spec"] == old["spec"],
};

/// Who writes the status of a PodCertificateRequest needs the verb `sign` on its signer, whatever plugins are on: in Kubernetes
/// the strategy sees to it.
pub struct PodCertificateSigning(pub Arc<Authorizer>);

/// CertificateSubjectRestriction: nobody becomes a cluster's master by certificate.
pub struct CertificateSubjectRestriction;

// === impl OfSigner ===

impl OfSigner {
    pub fn with(self, authorizer: &Arc<Authorizer>) -> SignerPlugin {
        SignerPlugin(self, authorizer.clone())
    }
}

impl Plugin for SignerPlugin {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        (self.0.handles)(request)
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(async {
            let Self(OfSigner { verb, concern, spares, .. }, authorizer) = self;
            let (new, old) = (request.new_object(), request.old());
            if spares(new, old) {
                return Ok(());
            }
            let signer = text(if old.is_null() { new } else { old }, "/spec/signerName");
            if may(authorizer, request.attributes, verb, signer).await {
                return Ok(());
            }
            Err(request.forbidden(format!("user not permitted to {concern} with signerName {signer:?}")))
        })
    }
}

impl Plugin for PodCertificateSigning {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.updates() && request.is(GROUP, "podcertificaterequests", "status")
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        Box::pin(async {
            let (new, old) = (request.new_object(), request.old());
            let (asker, signer) = (request.attributes, text(old, "/spec/signerName"));
            if !changes_status(new, old) || may(&self.0, asker, "sign", signer).await {
                return Ok(());
            }
            let why = format!("User {:?} is not permitted to \"sign\" for signer {signer:?}", asker.user.name);
            let fault = FieldError::forbidden("spec.signerName", why);
            Err(StatusError::invalid(GROUP, "PodCertificateRequest", &asker.name, &[fault]))
        })
    }
}

/// Allowed on the signer itself or on all of its domain. As `IsAuthorizedForSignerName`.
async fn may(authorizer: &Authorizer, asker: &Attributes, verb: &str, signer: &str) -> bool {
    let domain = signer.split_once('/').map_or(signer, |(domain, _)| domain);
    for name in [signer.to_owned(), format!("{domain}/*")] {
        let question = Attributes {
            user: asker.user.clone(),
            verb: verb.to_owned(),
            group: GROUP.to_owned(),
            version: "*".to_owned(),
            resource: "signers".to_owned(),
            name,
            is_resource: true,
            ..Attributes::default()
        };
        if authorizer.authorize(&question).await == Decision::Allow {
            return true;
        }
    }
    false
}

impl Plugin for CertificateSubjectRestriction {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        request.creates() && request.is(GROUP, REQUESTS, "")
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        let check = || {
            let signer = text(request.new_object(), "/spec/signerName");
            if signer != "kubernetes.io/kube-apiserver-client" {
                return Ok(());
            }
            let organizations = organizations(text(request.new_object(), "/spec/request"))
                .ok_or_else(|| request.forbidden("failed to parse the CSR"))?;
            if organizations.iter().any(|organization| organization == "system:masters") {
                return Err(
                    request.forbidden(format!("use of {signer} signer with system:masters group is not allowed"))
                );
            }
            Ok(())
        };
        Box::pin(std::future::ready(check()))
    }
}

/// The organizations in the subject of a request, which is PEM in base64.
fn organizations(encoded: &str) -> Option<Vec<String>> {
    let pem = base64::engine::general_purpose::STANDARD.decode(encoded).ok()?;
    let der = CertificateSigningRequestDer::from_pem_slice(&pem).ok()?;
    let (_, request) = X509CertificationRequest::from_der(&der).ok()?;
    let subject = &request.certification_request_info.subject;
    Some(subject.iter_organization().filter_map(|o| o.as_str().ok()).map(ToOwned::to_owned).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Operation;
    use crate::admission::testing::{attributes, create, request};
    use crate::authorization::lister::fake::Objects;
    use crate::authorization::lister::{CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES};
    use serde_json::json;

    fn authorizer() -> Arc<Authorizer> {
        let role = json!({"metadata": {"name": "r"}, "rules": [{"apiGroups": [GROUP], "resources": ["signers"],
            "verbs": ["approve", "sign"], "resourceNames": ["example.com/*", "other.com/one"]}]});
        let binding = json!({"metadata": {"name": "b"}, "roleRef": {"apiGroup": "", "kind": "ClusterRole", "name": "r"},
            "subjects": [{"kind": "User", "name": "ann"}]});
        let objects = Objects::of([(CLUSTER_ROLES, role), (CLUSTER_ROLE_BINDINGS, binding)]);
        Arc::new(Authorizer::with(&["RBAC".to_owned()], objects).unwrap())
    }

    #[tokio::test]
    async fn approving_and_signing_need_the_right_on_the_signer() {
        for (signer, allowed) in [("example.com/x", true), ("other.com/one", true), ("other.com/two", false)] {
            let old = json!({"metadata": {"name": "c"}, "spec": {"signerName": signer}});
            let mut new = old.clone();
            new["status"] = json!({"certificate": "eA=="});
            let approval = attributes("certificates.k8s.io/certificatesigningrequests/approval", "", "ann", &[]);
            let mut approve = request(&approval, Operation::Update, Some(&mut new), Some(&old));
            assert_eq!(ON_APPROVAL.with(&authorizer()).validate(&mut approve).await.is_ok(), allowed, "{signer}");
            let status = attributes("certificates.k8s.io/certificatesigningrequests/status", "", "ann", &[]);
            let mut sign = request(&status, Operation::Update, Some(&mut new), Some(&old));
            assert_eq!(ON_SIGNING.with(&authorizer()).validate(&mut sign).await.is_ok(), allowed, "{signer}");
            let mut same = old.clone();
            let mut touch = request(&status, Operation::Update, Some(&mut same), Some(&old));
            assert!(ON_SIGNING.with(&authorizer()).validate(&mut touch).await.is_ok());
        }
    }

    #[tokio::test]
    async fn a_verdict_on_a_pods_certificate_needs_the_right_on_the_signer() {
        let attributes = attributes("certificates.k8s.io/podcertificaterequests/status", "ns", "ann", &[]);
        for (signer, allowed) in [("example.com/x", true), ("other.com/one", true), ("other.com/two", false)] {
            let old = json!({"metadata": {"name": "r"}, "spec": {"signerName": signer}, "status": {}});
            let mut new = old.clone();
            new["status"] = json!({"conditions": [{"type": "Denied"}]});
            let plugin = PodCertificateSigning(authorizer());
            let outcome =
                plugin.validate(&mut request(&attributes, Operation::Update, Some(&mut new), Some(&old))).await;
            assert_eq!(outcome.is_ok(), allowed, "{signer}");
            if let Err(refusal) = outcome {
                let why = "spec.signerName: Forbidden: User \"ann\" is not permitted to \"sign\" for signer \"other.com/two\"";
                assert_eq!((refusal.code(), refusal.message().contains(why)), (422, true), "{refusal}");
            }
            let mut same = old.clone();
            let mut touch = request(&attributes, Operation::Update, Some(&mut same), Some(&old));
            assert!(plugin.validate(&mut touch).await.is_ok());
        }
    }

    #[tokio::test]
    async fn a_client_certificate_makes_no_masters() {
        let csr = |organization: &str, signer: &str| {
            let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
            params.distinguished_name.push(rcgen::DnType::OrganizationName, organization);
            let pem = params.serialize_request(&rcgen::KeyPair::generate().unwrap()).unwrap().pem().unwrap();
            let encoded = base64::engine::general_purpose::STANDARD.encode(pem);
            json!({"metadata": {"name": "c"}, "spec": {"request": encoded, "signerName": signer}})
        };
        let client = "kubernetes.io/kube-apiserver-client";
        for (mut csr, allowed) in [
            (csr("system:masters", client), false),
            (csr("devs", client), true),
            (csr("system:masters", "example.com/x"), true),
        ] {
            let outcome =
                create(&CertificateSubjectRestriction, "certificates.k8s.io/certificatesigningrequests", "", &mut csr)
                    .await;
            assert_eq!(outcome.is_ok(), allowed);
        }
    }
}
