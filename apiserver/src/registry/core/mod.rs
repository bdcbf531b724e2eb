//! The core group.

pub mod component_status;
pub mod config_map;
mod container_validation;
pub mod endpoints;
pub mod event;
pub mod limit_range;
pub mod namespace;
pub mod node;
pub mod persistent_volume;
pub mod persistent_volume_claim;
pub mod pod;
pub mod pod_defaults;
pub mod pod_template;
#[cfg(test)]
mod pod_tests;
pub mod pod_validation;
pub mod replication_controller;
pub mod resource_quota;
pub mod secret;
pub mod service;
pub mod service_account;
mod volume_validation;

pub use container_validation::{amount, config_key, port_name, port_or_name};
