//! certificates.k8s.io/v1, and v1beta1 where it is switched on.

pub mod certificate_signing_request;
pub mod cluster_trust_bundle;
pub mod pod_certificate_request;
mod pod_certificate_status;
pub mod signers;
