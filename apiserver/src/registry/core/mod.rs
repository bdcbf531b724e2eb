//! The core group.

pub mod component_status;
pub mod config_map;
mod container_env;
mod container_validation;
pub mod endpoints;
pub mod event;
pub mod limit_range;
pub mod namespace;
pub mod node;
pub mod persistent_volume;
pub mod persistent_volume_claim;
pub mod pod;
pub mod pod_annotations;
pub mod pod_defaults;
mod pod_row;
pub mod pod_scheduling;
mod pod_security;
mod pod_status;
pub mod pod_template;
#[cfg(test)]
mod pod_tests;
pub mod pod_update;
pub mod pod_validation;
pub mod pod_warnings;
mod projections;
pub mod replication_controller;
pub mod resource_quota;
pub mod resources;
pub mod secret;
pub mod service;
pub mod service_account;
pub mod service_validation;
mod volume_sources;
mod volume_validation;

pub use config_map::config_key;
pub use container_validation::{PROTOCOLS, port_name, port_or_name};

/// A resource that containers may ask for, and its amount.
pub fn amount(name: &str, field: &super::field::Field<'_, '_>, errors: &mut super::field::Errors) {
    resources::container_name(field, name, errors);
    resources::amount(name, field, errors);
}
