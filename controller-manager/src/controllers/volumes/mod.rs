//! Volumes: what binds claims to them, makes, attaches, enlarges and protects them. What claims, volumes and
//! pods say of each other is in `apimachinery::volume`.
pub mod attach_detach;
pub mod binder;
pub mod ephemeral;
pub mod expand;
pub mod protection;

pub use apimachinery::volume::*;

/// The provisioner that comes with the cluster.
pub const HOST_PATH: &str = "pilothouse.dev/host-path";
