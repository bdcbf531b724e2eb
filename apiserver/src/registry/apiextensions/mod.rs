//! apiextensions.k8s.io/v1.

pub mod custom_resource_definition;
mod schema;
mod structural;
