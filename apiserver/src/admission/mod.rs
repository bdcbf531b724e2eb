//! What a request must pass after authorization and before the store: mutating, then validating. (Being filled.)

use crate::authorization::{Attributes, Authorizer};
use crate::options::Options;
use crate::registry::Resource;
use crate::storage::Store;
use apimachinery::status::StatusError;
use serde_json::Value;
use std::sync::Arc;

/// What is being done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    Create,
    Update,
    Delete,
    Connect,
}

/// One request as admission sees it.
pub struct AdmissionRequest<'a> {
    pub attributes: &'a Attributes,
    /// None for virtual resources.
    pub resource: Option<&'a Resource>,
    pub operation: Operation,
    /// The new object; None for deletes. Mutators change it in place.
    pub object: Option<&'a mut Value>,
    pub old_object: Option<&'a Value>,
    /// CreateOptions, UpdateOptions, DeleteOptions.
    pub options: Option<&'a Value>,
    pub dry_run: bool,
    /// Warnings for the client.
    pub warnings: Vec<String>,
}

/// The admission plugins that are on, in Kubernetes' order.
pub struct AdmissionChain {}

// === impl AdmissionChain ===

impl AdmissionChain {
    pub fn new(_options: &Options, _store: Arc<Store>, _authorizer: Arc<Authorizer>) -> anyhow::Result<Self> {
        Ok(Self {})
    }

    pub async fn mutate(&self, _request: &mut AdmissionRequest<'_>) -> Result<(), StatusError> {
        Ok(())
    }

    pub async fn validate(&self, _request: &mut AdmissionRequest<'_>) -> Result<(), StatusError> {
        Ok(())
    }
}
