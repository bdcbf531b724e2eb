//! admissionregistration.k8s.io/v1.

mod client;
mod matching;
pub mod policy;
pub mod webhook;

pub use client::webhook_client;
