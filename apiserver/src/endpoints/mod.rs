//! One file a verb, generic over kinds; and the trait of what answers in a way of its own.

pub mod apply;
pub mod component_status;
pub mod create;
pub mod delete;
pub mod discovery;
pub mod get;
pub mod health;
pub mod list;
mod list_body;
pub mod metadata;
pub mod openapi;
pub mod ownership;
pub mod patch;
pub mod subresources;
pub mod table;
pub mod update;
pub mod virtual_resource;
pub mod watch;
pub mod write_options;

use crate::admission::{AdmissionRequest, Operation, Undo};
use crate::authorization::Attributes;
use crate::registry::Resource;
use crate::registry::strategy::Part;
use crate::server::Context;
use crate::server::body::Body;
use crate::server::request_info::RequestInfo;
use crate::storage::StoredObject;
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
/// a `get` and an `update`, one that is to be applied as an `apply`).
pub trait Endpoint: Send + Sync + 'static {
    fn call<'a>(&'a self, call: Call<'a>) -> BoxFuture<'a, Result<Answer, StatusError>>;

    /// Versions of its kind, of the same shape, that bodies may be written in beside its own.
    fn also_speaks(&self) -> &'static [&'static str] {
        &[]
    }
}

/// How a request ended well; rendered as the client wants it.
pub struct Outcome {
    pub code: u16,
    pub payload: Payload,
    pub warnings: Vec<String>,
}

/// What there is to send.
pub enum Payload {
    /// An object of a stored resource.
    Stored(Arc<Resource>, Arc<StoredObject>),
    /// An object that is not (yet) stored so: a dry run, a deleted one, a virtual one.
    Object(Option<Arc<Resource>>, Value),
    /// What has been rendered already: lists, watches, proxied answers.
    Response(http::Response<Body>),
}

/// What admission says of a write that it lets pass.
pub struct Admitted {
    pub warnings: Vec<String>,
    undo: Vec<Undo>,
}

/// A request on a resource, past authorization.
pub struct ResourceRequest<'a> {
    pub context: &'a Arc<Context>,
    pub info: &'a RequestInfo,
    pub attributes: Attributes,
    pub resource: &'a Arc<Resource>,
    pub part: Part,
    pub dry_run: bool,
}

// === impl Outcome ===

impl Outcome {
    pub fn object(code: u16, resource: &Arc<Resource>, object: Value) -> Self {
        Self { code, payload: Payload::Object(Some(resource.clone()), object), warnings: Vec::new() }
    }

    pub fn stored(code: u16, resource: &Arc<Resource>, object: Arc<StoredObject>) -> Self {
        Self { code, payload: Payload::Stored(resource.clone(), object), warnings: Vec::new() }
    }

    pub fn with_warnings(mut self, warnings: Vec<String>) -> Self {
        self.warnings.extend(warnings);
        self
    }
}

// === impl ResourceRequest ===

impl ResourceRequest<'_> {
    pub fn not_found(&self) -> StatusError {
        StatusError::not_found(&self.info.group, &self.info.resource, &self.info.name)
    }

    pub fn stale(&self) -> StatusError {
        StatusError::stale(&self.info.group, &self.info.resource, &self.info.name)
    }

    /// Asks admission about one of its two steps; gives its warnings, and how to take back what it did.
    pub async fn admit(
        &self,
        operation: Operation,
        object: Option<&mut Value>,
        old_object: Option<&Value>,
        options: &Value,
        mutating: bool,
    ) -> Result<Admitted, StatusError> {
        let mut admission = self.admission(operation, object, old_object, Some(options));
        let chain = &self.context.admission;
        if mutating {
            chain.mutate(&mut admission).await?
        } else {
            chain.validate(&mut admission).await?
        }
        Ok(Admitted { warnings: admission.warnings, undo: admission.undo })
    }

    /// Has any plugin of admission to do with the deletion of an object?
    pub fn concerns_admission_of_deletion(&self) -> bool {
        self.context.admission.concerns(&self.admission(Operation::Delete, None, None, None))
    }

    fn admission<'a>(
        &'a self,
        operation: Operation,
        object: Option<&'a mut Value>,
        old_object: Option<&'a Value>,
        options: Option<&'a Value>,
    ) -> AdmissionRequest<'a> {
        AdmissionRequest {
            attributes: &self.attributes,
            resource: Some(self.resource),
            operation,
            object,
            old_object,
            options,
            dry_run: self.dry_run,
            warnings: Vec::new(),
            undo: Vec::new(),
        }
    }

    /// The namespace that objects of this request lie in; empty for cluster-scoped resources.
    pub fn namespace(&self) -> &str {
        if self.resource.namespaced { &self.info.namespace } else { "" }
    }
}

// === impl Admitted ===

impl Admitted {
    /// What was admitted did not come to be.
    pub async fn take_back(self) {
        for undo in self.undo {
            undo().await;
        }
    }
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
