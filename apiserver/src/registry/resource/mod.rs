//! resource.k8s.io/v1: devices by claim.

pub mod claim;
pub mod slice;
