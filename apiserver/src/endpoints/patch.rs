//! PATCH: JSON patch, merge patch and strategic merge patch, applied to the newest object until nobody comes between.

use super::update::{self, Produce};
use super::{Outcome, ResourceRequest, metadata};
use crate::registry::Resource;
use crate::server::negotiation::{Incoming, content_type, typed};
use apimachinery::decode::{FieldValidation, decode_value};
use apimachinery::facts::TypeFacts;
use apimachinery::patch::{self as patches, PatchError};
use apimachinery::status::StatusError;
use http::HeaderMap;
use serde_json::{Value, json};

const JSON_PATCH: &str = "application/json-patch+json";
const MERGE_PATCH: &str = "application/merge-patch+json";
const STRATEGIC_PATCH: &str = "application/strategic-merge-patch+json";
const ACCEPTED: [&str; 3] = [JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH];

/// How a patch is to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchType {
    Json,
    Merge,
    Strategic,
}

/// A patch, parsed.
pub struct Patch {
    pub kind: PatchType,
    pub body: Value,
}

struct Patching<'a> {
    patch: &'a Patch,
    resource: &'a Resource,
    namespace: &'a str,
    field_validation: FieldValidation,
}

// === impl Patch ===

impl Patch {
    pub fn parse(headers: &HeaderMap, body: &[u8]) -> Result<Self, StatusError> {
        let kind = match content_type(headers) {
            JSON_PATCH => PatchType::Json,
            MERGE_PATCH => PatchType::Merge,
            STRATEGIC_PATCH => PatchType::Strategic,
            _ => return Err(StatusError::unsupported_media_type(&ACCEPTED)),
        };
        let body: Value = serde_json::from_slice(body)
            .map_err(|error| StatusError::bad_request(format!("error decoding patch: {error}")))?;
        match (kind, &body) {
            (PatchType::Json, Value::Array(_)) | (PatchType::Merge | PatchType::Strategic, Value::Object(_)) => {
                Ok(Self { kind, body })
            }
            _ => Err(StatusError::bad_request("error decoding patch: it has the wrong shape for its type")),
        }
    }

    pub fn apply(&self, object: &mut Value, schema: Option<&'static TypeFacts>) -> Result<(), StatusError> {
        let result = match self.kind {
            PatchType::Json => patches::json(object, &self.body),
            PatchType::Merge => {
                patches::merge(object, &self.body);
                Ok(())
            }
            PatchType::Strategic => patches::strategic(object, &self.body, schema),
        };
        result.map_err(|error| match &error {
            PatchError::TooManyOperations(_) => StatusError::new(413, "RequestEntityTooLarge", error.to_string()),
            PatchError::Unprocessable(_) => StatusError::new(
                422,
                "Invalid",
                format!("the server rejected our request due to an error in our request: {error}"),
            ),
            _ => StatusError::bad_request(error.to_string()),
        })
    }
}

impl Produce for Patching<'_> {
    fn produce(&mut self, old: &Value) -> Result<Incoming, StatusError> {
        let (resource, mut object) = (self.resource, old.clone());
        self.patch.apply(&mut object, resource.schema)?;
        let mut object = typed(object, &resource.api_version, &resource.kind)?;
        let mut warnings = Vec::new();
        if let Some(schema) = resource.schema {
            let version = &resource.gvr.version;
            let decoded = decode_value(object, schema, self.field_validation)
                .map_err(|error| StatusError::bad_request(error.message(version, &resource.kind)))?;
            object = decoded.value;
            warnings = decoded.warnings;
        }
        metadata::ensure_namespace(&mut object, self.namespace)?;
        let (name, old_name) = (metadata::text(&object, "name"), metadata::text(old, "name"));
        if name != old_name {
            return Err(StatusError::bad_request(format!(
                "the name of the object ({name}) does not match the name on the URL ({old_name})"
            )));
        }
        Ok(Incoming { object, warnings })
    }

    fn options(&self) -> Value {
        json!({"kind": "PatchOptions", "apiVersion": "meta.k8s.io/v1"})
    }
}

/// Patches an object.
pub async fn patch(
    request: &ResourceRequest<'_>,
    patch: &Patch,
    field_validation: FieldValidation,
) -> Result<Outcome, StatusError> {
    let current = update::newest(request).await?.ok_or_else(|| request.not_found())?;
    let mut patching = Patching { patch, resource: request.resource, namespace: request.namespace(), field_validation };
    update::replace(request, current, &mut patching).await
}
