//! One file a verb, generic over kinds; and the trait of what answers in a way of its own.

use crate::authorization::Attributes;
use crate::server::Context;
use crate::server::request_info::RequestInfo;
use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use serde_json::Value;
use std::sync::Arc;

/// A call on a virtual resource (`tokenreviews`) or on a subresource with a kind of its own (`pods/binding`), decoded and
/// authorized.
pub struct Call<'a> {
    pub context: &'a Arc<Context>,
    pub info: &'a RequestInfo,
    pub attributes: &'a Attributes,
    /// The decoded body; for a patch the result of applying it to what `get` answers. Null without a body.
    pub body: Value,
    pub dry_run: bool,
}

/// What an [`Endpoint`] answers.
pub struct Answer {
    pub code: u16,
    pub object: Value,
    pub warnings: Vec<String>,
}

/// Answers a virtual resource or subresource. `info.verb` says what is asked (`create`, `get`, `update`; a `patch` arrives as
/// a `get` and an `update`).
pub trait Endpoint: Send + Sync + 'static {
    fn call<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Answer, StatusError>>;
}

// === impl Answer ===

impl Answer {
    pub fn ok(object: Value) -> Self {
        Self { code: 200, object, warnings: Vec::new() }
    }

    pub fn created(object: Value) -> Self {
        Self { code: 201, object, warnings: Vec::new() }
    }
}
