//! PATCH: JSON patch, merge patch and strategic merge patch, made to the newest object until nobody comes between; and
//! server-side apply, which has a file of its own.

use super::apply::{self, Configuration};
use super::ownership::{self, Ownership};
use super::update::{self, Produce, Produced};
use super::{Outcome, ResourceRequest, metadata};
use crate::registry::Resource;
use crate::server::negotiation::{content_type, typed};
use apimachinery::decode::{DecodeError, FieldValidation, decode_patched, decode_value, parse_noting_duplicates};
use apimachinery::facts::TypeFacts;
use apimachinery::patch::{self as patches, PatchError};
use apimachinery::status::{FieldError, StatusError};
use http::HeaderMap;
use serde_json::{Value, json};

const JSON_PATCH: &str = "application/json-patch+json";
const MERGE_PATCH: &str = "application/merge-patch+json";
const STRATEGIC_PATCH: &str = "application/strategic-merge-patch+json";
pub const APPLY_PATCH: &str = "application/apply-patch+yaml";
const ACCEPTED: [&str; 4] = [JSON_PATCH, MERGE_PATCH, STRATEGIC_PATCH, APPLY_PATCH];
const OPERATION_FIELDS: [&str; 4] = ["op", "path", "from", "value"];

/// How a patch is to be understood.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PatchType {
    Json,
    Merge,
    Strategic,
}

/// A patch, parsed.
#[derive(Debug)]
pub struct Patch {
    pub kind: PatchType,
    pub body: Value,
    /// Keys that repeat, or that no operation has.
    strict: Vec<String>,
    /// Does it speak of managedFields?
    knows_managed_fields: bool,
    mode: FieldValidation,
}

struct Patching<'a> {
    patch: &'a Patch,
    resource: &'a Resource,
    namespace: &'a str,
}

// === impl Patch ===

impl Patch {
    pub fn parse(headers: &HeaderMap, body: &[u8], mode: FieldValidation) -> Result<Self, StatusError> {
        let kind = match content_type(headers) {
            JSON_PATCH => PatchType::Json,
            MERGE_PATCH => PatchType::Merge,
            STRATEGIC_PATCH => PatchType::Strategic,
            _ => return Err(StatusError::unsupported_media_type(&ACCEPTED)),
        };
        let refuse = |why: String| StatusError::bad_request(format!("error decoding patch: {why}"));
        let (body_value, mut strict) = parse_noting_duplicates(body).map_err(|error| refuse(error.to_string()))?;
        match (kind, &body_value) {
            (PatchType::Json, Value::Array(operations)) => {
                strict.iter_mut().for_each(|told| told.insert_str(0, "json patch "));
                for (at, operation) in operations.iter().enumerate() {
                    let keys = operation.as_object().into_iter().flat_map(|o| o.keys());
                    let unknown = keys.filter(|key| !OPERATION_FIELDS.contains(&key.as_str()));
                    strict.extend(unknown.map(|key| format!("json patch unknown field \"[{at}].{key}\"")));
                }
            }
            (PatchType::Merge | PatchType::Strategic, Value::Object(_)) => {}
            _ => return Err(refuse("it has the wrong shape for its type".to_owned())),
        }
        let knows_managed_fields = memchr::memmem::find(body, b"managedFields").is_some();
        Ok(Self { kind, body: body_value, strict, knows_managed_fields, mode })
    }

    /// Patches an object and reads what comes of it anew; gives warnings.
    pub fn apply(
        &self,
        object: Value,
        schema: Option<&'static TypeFacts>,
    ) -> Result<(Value, Vec<String>), StatusError> {
        let mut object = object;
        let result = match self.kind {
            PatchType::Json => patches::json(&mut object, &self.body),
            PatchType::Merge => {
                patches::merge(&mut object, &self.body);
                Ok(())
            }
            PatchType::Strategic => patches::strategic(&mut object, &self.body, schema),
        };
        result.map_err(refusal)?;
        let Some(schema) = schema else { return Ok((object, Vec::new())) };
        let mode = if self.mode == FieldValidation::Ignore { self.mode } else { FieldValidation::Warn };
        let shown = match self.kind {
            PatchType::Strategic => None,
            _ if self.mode == FieldValidation::Strict => Some(object.to_string()),
            _ => None,
        };
        let invalid = |what: String| {
            let value = shown.clone().unwrap_or_else(|| self.body.to_string());
            StatusError::invalid("", "", "", &[FieldError::invalid("patch", value, what)])
        };
        let decoded = match (self.kind, &self.body) {
            (PatchType::Merge | PatchType::Strategic, Value::Object(patch)) => {
                decode_patched(object, patch, schema, mode)
            }
            _ => decode_value(object, schema, mode),
        };
        let decoded = decoded.map_err(|error| invalid(error.to_string()))?;
        let warnings: Vec<String> = self.strict.iter().cloned().chain(decoded.warnings).collect();
        match self.mode {
            FieldValidation::Ignore => Ok((decoded.value, Vec::new())),
            FieldValidation::Strict if !warnings.is_empty() => Err(invalid(DecodeError::Strict(warnings).to_string())),
            _ => Ok((decoded.value, warnings)),
        }
    }
}

/// As the patchers of kube-apiserver say it.
fn refusal(error: PatchError) -> StatusError {
    match error {
        PatchError::TooManyOperations(_) => StatusError::new(413, "RequestEntityTooLarge", error.to_string()),
        PatchError::Unprocessable(_) => {
            StatusError::new(422, "Invalid", "the server rejected our request due to an error in our request")
        }
        PatchError::Malformed(message) => StatusError::bad_request(message),
        PatchError::Failed(message) => StatusError::new(500, "", message),
    }
}

impl Produce for Patching<'_> {
    fn produce(&mut self, old: &Value, managed: &str) -> Result<Produced, StatusError> {
        let (resource, mut object) = (self.resource, old.clone());
        if self.patch.knows_managed_fields {
            ownership::put_list(&mut object, managed);
        }
        let (object, warnings) = self.patch.apply(object, resource.schema)?;
        let mut object = typed(object, &resource.api_version, &resource.kind)?;
        metadata::ensure_namespace(&mut object, self.namespace)?;
        metadata::check_name(&object, metadata::text(old, "name"))?;
        Ok(Produced { object, warnings, ownership: Ownership::OfWriter })
    }

    fn options(&self) -> Value {
        json!({"kind": "PatchOptions", "apiVersion": "meta.k8s.io/v1"})
    }
}

/// Patches an object.
pub async fn patch(
    request: &mut ResourceRequest<'_>,
    headers: &HeaderMap,
    body: &[u8],
    mode: FieldValidation,
) -> Result<Outcome, StatusError> {
    let resource = request.resource;
    if content_type(headers) == APPLY_PATCH
        && let Some(schema) = resource.schema
    {
        let config = Configuration::parse(body, &resource.api_version, &resource.kind, schema, mode)?;
        return apply::apply(request, &config).await;
    }
    let patch = Patch::parse(headers, body, mode)?;
    let current = update::newest(request).await?.ok_or_else(|| request.not_found())?;
    let mut patching = Patching { patch: &patch, resource, namespace: request.namespace() };
    update::replace(request, current, &mut patching).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::header::CONTENT_TYPE;

    #[test]
    fn patches_are_refused_as_kubernetes_refuses_them() {
        let schema = apimachinery::facts::schema("core.v1.Pod");
        let strict = |kind: &str, body: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_TYPE, kind.parse().unwrap());
            let object = json!({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": "a"}});
            Patch::parse(&headers, body.as_bytes(), FieldValidation::Strict)
                .and_then(|patch| patch.apply(object, schema))
                .map(|(object, _)| object)
                .map_err(|error| (error.code(), error.message().to_owned()))
        };
        assert!(strict(MERGE_PATCH, r#"{"metadata":{"labels":{"a":"b"}}}"#).is_ok());
        for (kind, body, code, said) in [
            (
                "text/plain",
                "{}",
                415,
                "json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml",
            ),
            ("application/apply-patch+cbor", "", 415, "application/apply-patch+yaml"),
            (MERGE_PATCH, "[", 400, "error decoding patch"),
            (MERGE_PATCH, "[]", 400, "error decoding patch"),
            (
                MERGE_PATCH,
                r#"{"bogus":1}"#,
                422,
                r#" "" is invalid: patch: Invalid value: "{\"apiVersion\":\"v1\",\"bogus\":1,"#,
            ),
            (MERGE_PATCH, r#"{"bogus":1}"#, 422, r#"strict decoding error: unknown field "bogus""#),
            (
                MERGE_PATCH,
                r#"{"spec":{"nodeName":"a","nodeName":"b"}}"#,
                422,
                r#"strict decoding error: duplicate field "spec.nodeName""#,
            ),
            (STRATEGIC_PATCH, r#"{"spec":{"bogus":1}}"#, 422, r#"strict decoding error: unknown field "spec.bogus""#),
            (STRATEGIC_PATCH, r#"{"spec":{"priority":"x"}}"#, 422, "cannot unmarshal string"),
            (
                STRATEGIC_PATCH,
                r#"{"spec":{"containers":[{"image":"x"}]}}"#,
                500,
                "does not contain declared merge key: name",
            ),
            (
                JSON_PATCH,
                r#"[{"op":"test","path":"/metadata/name","value":"b"}]"#,
                422,
                "the server rejected our request due to an error in our request",
            ),
            (
                JSON_PATCH,
                r#"[{"op":"add","path":"/metadata/labels","value":{},"x":1}]"#,
                422,
                r#"json patch unknown field "[0].x""#,
            ),
            (JSON_PATCH, r#"[{"op":"grow","path":"/a"}]"#, 422, "the server rejected our request"),
        ] {
            let (is, message) = strict(kind, body).unwrap_err();
            assert!(is == code && message.contains(said), "{kind} {body}: {is} {message}");
        }
        let many = format!("[{}]", vec![r#"{"op":"test","path":"/kind","value":"Pod"}"#; 10_001].join(","));
        let (code, message) = strict(JSON_PATCH, &many).unwrap_err();
        assert_eq!(
            (code, message.as_str()),
            (413, "The allowed maximum operations in a JSON patch is 10000, got 10001")
        );
    }
}
