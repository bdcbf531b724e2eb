//! Who may do what: RBAC and the node authorizer over the watch cache. (Being filled.)

use crate::authentication::UserInfo;
use crate::endpoints::Endpoint;
use crate::options::Options;
use crate::storage::Store;
use apimachinery::meta::Gvr;
use std::sync::Arc;

/// What a request does, as authorizers and admission see it. Absent parts are empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    pub user: Arc<UserInfo>,
    /// `get list watch create update patch delete deletecollection` …; the lower-case method for a path that is no resource.
    pub verb: String,
    pub group: String,
    pub version: String,
    pub resource: String,
    pub subresource: String,
    pub namespace: String,
    pub name: String,
    pub path: String,
    /// False for paths such as `/healthz`.
    pub is_resource: bool,
    /// The raw selectors of list, watch and deletecollection.
    pub field_selector: String,
    pub label_selector: String,
}

/// An authorizer's word.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Allow,
    /// Refused for good; no later authorizer is asked.
    Deny(String),
    NoOpinion(String),
}

/// The chain of authorizers that `--authorization-mode` names.
pub struct Authorizer {}

// === impl Authorizer ===

impl Authorizer {
    pub fn new(_options: &Options, _store: Arc<Store>) -> anyhow::Result<Self> {
        Ok(Self {})
    }

    pub async fn authorize(&self, _attributes: &Attributes) -> Decision {
        Decision::Allow
    }
}

/// The access reviews: (resource, subresource, endpoint).
pub fn endpoints() -> Vec<(Gvr, &'static str, Arc<dyn Endpoint>)> {
    Vec::new()
}
