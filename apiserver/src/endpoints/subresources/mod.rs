//! Subresources that speak a kind of their own: `scale`, `binding`, `eviction`. The others (`status`, `finalize`, `approval`,
//! `ephemeralcontainers`, `resize`) are parts of their object, written by the ordinary verbs.

mod binding;
mod eviction;
mod scale;

use super::{Endpoint, ResourceRequest};
use crate::authorization::Attributes;
use crate::registry::Resource;
use crate::registry::strategy::Part;
use crate::server::Context;
use crate::server::request_info::RequestInfo;
use apimachinery::meta::Gvr;
use apimachinery::status::StatusError;
use serde_json::{Value, json};
use std::sync::Arc;

/// Which endpoint answers at which resource and subresource.
pub fn endpoints() -> Vec<(Gvr, &'static str, Arc<dyn Endpoint>)> {
    let mut all: Vec<(Gvr, &'static str, Arc<dyn Endpoint>)> = vec![
        (Gvr::new("", "v1", "pods"), "binding", Arc::new(binding::Binding)),
        (Gvr::new("", "v1", "bindings"), "", Arc::new(binding::Binding)),
        (Gvr::new("", "v1", "pods"), "eviction", Arc::new(eviction::Eviction)),
    ];
    for (group, resource) in
        [("", "replicationcontrollers"), ("apps", "deployments"), ("apps", "replicasets"), ("apps", "statefulsets")]
    {
        all.push((Gvr::new(group, "v1", resource), "scale", Arc::new(scale::Scale)));
    }
    all
}

/// A request on the object itself, by the same user.
struct OnObject<'a> {
    context: &'a Arc<Context>,
    info: RequestInfo,
    attributes: Attributes,
    resource: Arc<Resource>,
    dry_run: bool,
}

// === impl OnObject ===

impl<'a> OnObject<'a> {
    fn new(
        call: &super::Call<'a>,
        group: &str,
        version: &str,
        resource: &str,
        name: &str,
    ) -> Result<Self, StatusError> {
        let context = call.context;
        let info = RequestInfo {
            group: group.to_owned(),
            version: version.to_owned(),
            resource: resource.to_owned(),
            name: name.to_owned(),
            subresource: String::new(),
            ..call.info.clone()
        };
        let attributes = Attributes { name: name.to_owned(), ..call.attributes.clone() };
        let resource =
            context.registry.get(group, version, resource).ok_or_else(StatusError::no_such_resource)?.clone();
        Ok(Self { context, info, attributes, resource, dry_run: call.dry_run })
    }

    fn request(&self) -> ResourceRequest<'_> {
        ResourceRequest {
            context: self.context,
            info: &self.info,
            attributes: self.attributes.clone(),
            resource: &self.resource,
            part: Part::Main,
            dry_run: self.dry_run,
        }
    }
}

/// `Status` of a deed done.
fn success(code: u16) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": code})
}

/// The name in a body must be that of the path, where both say one.
fn agree(body: &Value, name: &str) -> Result<(), StatusError> {
    let given = super::metadata::text(body, "name");
    if !given.is_empty() && !name.is_empty() && given != name {
        return Err(StatusError::bad_request(format!(
            "the name of the object ({given}) does not match the name on the URL ({name})"
        )));
    }
    Ok(())
}
