//! Asking the API for a certificate: a CertificateSigningRequest, and waiting for its answer.

use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::Api;
use kube::api::{ObjectMeta, PostParams};
use rcgen::KeyPair;
use sha2::{Digest, Sha256};

use crate::objects::explain;

/// What is asked of whom.
#[derive(Debug, Clone)]
pub(super) struct Wish {
    /// `kubernetes.io/kube-apiserver-client-kubelet`, `kubernetes.io/kubelet-serving`.
    pub signer: &'static str,
    pub usages: &'static [&'static str],
    pub node_name: String,
    pub dns_names: Vec<String>,
    pub ip_addresses: Vec<std::net::IpAddr>,
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub(super) enum CsrError {
    /// The request was denied, or the signer failed it: another must be made, with another key.
    #[error("certificate signing request {name} was refused: {reason}")]
    Refused { name: String, reason: String },
    #[error("certificate signing request {name} was not approved and signed within {}s", PATIENCE.as_secs())]
    Unanswered { name: String },
    #[error("{0}")]
    Other(String),
}

/// How long an approver and a signer may take. As upstream.
const PATIENCE: Duration = Duration::from_secs(15 * 60);
const POLL_FIRST: Duration = Duration::from_millis(200);
const POLL_MAX: Duration = Duration::from_secs(5);

pub(super) const CLIENT_SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
pub(super) const SERVING_SIGNER: &str = "kubernetes.io/kubelet-serving";
pub(super) const CLIENT_USAGES: &[&str] = &["digital signature", "client auth"];
pub(super) const SERVING_USAGES: &[&str] = &["digital signature", "server auth"];

/// Ask, wait, and give the certificate's PEM text.
pub(super) async fn ask(client: &kube::Client, key: &KeyPair, wish: &Wish) -> Result<String, CsrError> {
    let api = Api::<CertificateSigningRequest>::all(client.clone());
    let request = new_request(key, wish)?;
    let name = request.metadata.name.clone().unwrap_or_default();
    match api.create(&PostParams::default(), &request).await {
        Ok(_) => tracing::info!(csr = name, signer = wish.signer, "certificate requested"),
        // Asked before a restart, with the same key.
        Err(kube::Error::Api(status)) if status.code == 409 => {
            tracing::info!(csr = name, "waiting for an earlier request")
        }
        Err(error) => {
            return Err(CsrError::Other(format!("creating certificate signing request: {}", explain(&error))));
        }
    }
    let deadline = tokio::time::Instant::now() + PATIENCE;
    let mut pause = POLL_FIRST;
    while tokio::time::Instant::now() < deadline {
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(POLL_MAX);
        match api.get_opt(&name).await {
            Ok(Some(found)) => match answer(&found) {
                Some(Ok(certificate)) => return Ok(certificate),
                Some(Err(reason)) => return Err(CsrError::Refused { name, reason }),
                None => {}
            },
            Ok(None) => return Err(CsrError::Refused { name, reason: "it was deleted".into() }),
            Err(error) => {
                tracing::warn!(csr = name, error = explain(&error), "certificate signing request cannot be read");
            }
        }
    }
    Err(CsrError::Unanswered { name })
}

/// The request; its name is made of what it asks for, so that asking again finds the same one.
fn new_request(key: &KeyPair, wish: &Wish) -> Result<CertificateSigningRequest, CsrError> {
    let user = format!("system:node:{}", wish.node_name);
    let pem = component_base::x509::request(key, &user, &["system:nodes"], &wish.dns_names, &wish.ip_addresses)
        .map_err(|error| CsrError::Other(error.to_string()))?;
    let mut hash = Sha256::new();
    for part in [wish.signer.as_bytes(), user.as_bytes(), key.public_key_raw()] {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    for address in &wish.ip_addresses {
        hash.update(address.to_string());
    }
    let digest: String = hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect();
    Ok(CertificateSigningRequest {
        metadata: ObjectMeta { name: Some(format!("node-csr-{digest}")), ..Default::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: wish.signer.to_owned(),
            usages: Some(wish.usages.iter().map(|usage| (*usage).to_owned()).collect()),
            ..Default::default()
        },
        ..Default::default()
    })
}

/// The certificate, or the reason of a refusal; `None` while the request waits.
fn answer(request: &CertificateSigningRequest) -> Option<Result<String, String>> {
    let status = request.status.as_ref()?;
    let refused =
        status.conditions.iter().flatten().find(|condition| matches!(condition.type_.as_str(), "Denied" | "Failed"));
    if let Some(condition) = refused {
        let parts = [
            condition.type_.as_str(),
            condition.reason.as_deref().unwrap_or_default(),
            condition.message.as_deref().unwrap_or_default(),
        ];
        let reason: Vec<&str> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        return Some(Err(reason.join(": ")));
    }
    let certificate = status.certificate.as_ref().filter(|certificate| !certificate.0.is_empty())?;
    Some(String::from_utf8(certificate.0.clone()).map_err(|_| "the certificate is no PEM text".to_owned()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn requests_are_named_by_what_they_ask() {
        let wish = |node: &str| Wish {
            signer: CLIENT_SIGNER,
            usages: CLIENT_USAGES,
            node_name: node.into(),
            dns_names: vec![],
            ip_addresses: vec![],
        };
        let key = component_base::x509::new_key().expect("a key");
        let name = |node: &str, key: &KeyPair| new_request(key, &wish(node)).expect("a request").metadata.name;
        assert_eq!(name("n1", &key), name("n1", &key));
        assert_ne!(name("n1", &key), name("n2", &key));
        assert_ne!(name("n1", &key), name("n1", &component_base::x509::new_key().expect("a key")));
    }

    #[test]
    fn answers_are_read() {
        let request = |status: serde_json::Value| -> CertificateSigningRequest {
            serde_json::from_value(
                json!({"metadata": {"name": "x"}, "spec": {"request": "", "signerName": "s"}, "status": status}),
            )
            .expect("a request")
        };
        assert_eq!(answer(&request(json!({}))), None);
        assert_eq!(answer(&request(json!({"conditions": [{"type": "Approved", "status": "True"}]}))), None);
        assert_eq!(answer(&request(json!({"certificate": "UEVN"}))), Some(Ok("PEM".into())));
        let denied =
            json!({"conditions": [{"type": "Denied", "status": "True", "reason": "No", "message": "unknown node"}]});
        assert_eq!(answer(&request(denied)), Some(Err("Denied: No: unknown node".into())));
    }
}
