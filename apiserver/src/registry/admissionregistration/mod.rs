//! admissionregistration.k8s.io/v1.

pub mod policy;
pub mod webhook;
