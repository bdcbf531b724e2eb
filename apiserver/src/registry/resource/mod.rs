//! resource.k8s.io/v1: devices by claim.

mod allocation;
pub mod claim;
mod names;
pub mod slice;
