//! Requests that go on to someone else: a kubelet's log, exec, attach and port-forward; nodes, pods and services by proxy.
//! (Being filled.)

use crate::authentication::UserInfo;
use crate::options::Options;
use crate::server::Context;
use crate::server::body::Body;
use crate::server::request_info::RequestInfo;
use apimachinery::status::StatusError;
use http::{Request, Response};
use hyper::body::Incoming;
use std::sync::Arc;

/// Connections to kubelets and what lies behind the API.
pub struct Proxy {}

// === impl Proxy ===

impl Proxy {
    pub fn new(_options: &Options) -> anyhow::Result<Self> {
        Ok(Self {})
    }

    /// Is this resource and subresource one of ours (`pods/log`, `pods/exec`, `nodes/proxy`, …)?
    pub fn serves(&self, _resource: &str, _subresource: &str) -> bool {
        false
    }

    /// Carries the request out. It is authorized; admission (`Connect`) is ours to ask.
    pub async fn connect(
        &self,
        _context: &Arc<Context>,
        _info: &RequestInfo,
        _user: &Arc<UserInfo>,
        _request: Request<Incoming>,
    ) -> Result<Response<Body>, StatusError> {
        Err(StatusError::no_such_resource())
    }
}
