//! autoscaling/v2, and v1 as a view of it.

pub mod horizontal_pod_autoscaler;
pub mod v1;
