//! The server around the endpoints: what all requests share, the listener, and the pipeline.

pub mod body;
pub mod request_info;

use crate::admission::AdmissionChain;
use crate::authentication::Authenticator;
use crate::authorization::Authorizer;
use crate::options::Options;
use crate::proxy::Proxy;
use crate::registry::Registry;
use crate::storage::Store;
use std::sync::Arc;

/// What every request may use.
pub struct Context {
    pub options: Options,
    pub registry: Registry,
    pub store: Arc<Store>,
    pub authenticator: Authenticator,
    pub authorizer: Arc<Authorizer>,
    pub admission: AdmissionChain,
    pub proxy: Proxy,
}
