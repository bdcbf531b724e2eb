//! Server-side apply: a configuration merged into the object as far as its author owns it or nobody disagrees; a missing object
//! is made of it.

use super::ownership::{self, Ownership};
use super::update::{self, Produce, Produced};
use super::{Outcome, ResourceRequest, create, metadata};
use crate::registry::Resource;
use crate::registry::reset_fields::ignored;
use crate::registry::strategy::Part;
use apimachinery::decode::{DecodeError, FieldValidation, decode_value};
use apimachinery::facts::TypeFacts;
use apimachinery::managed_fields::{self, ApplyError, Conflict, Place};
use apimachinery::meta::{Gvk, split_api_version};
use apimachinery::status::StatusError;
use serde_json::{Value, json};

/// An object that appears or goes while it is applied to is looked at anew so often.
const ATTEMPTS: usize = 5;

/// A configuration that somebody applies, parsed.
pub struct Configuration {
    pub object: Value,
    /// Keys that repeat.
    pub warnings: Vec<String>,
}

/// Applies a configuration to whatever stands there.
pub struct Applying<'a> {
    request: &'a ResourceRequest<'a>,
    config: &'a Configuration,
}

// === impl Configuration ===

impl Configuration {
    /// Reads YAML, or JSON, which is YAML. It must be of the kind and fit its type.
    pub fn parse(
        body: &[u8],
        api_version: &str,
        kind: &str,
        schema: &'static TypeFacts,
        mode: FieldValidation,
    ) -> Result<Self, StatusError> {
        let (object, duplicates) = parse(body)?;
        let text = |field: &str| object.get(field).and_then(Value::as_str).unwrap_or("");
        if (text("apiVersion"), text("kind")) != (api_version, kind) {
            let (group, version) = split_api_version(text("apiVersion"));
            let what = format!("{group}/{version}, Kind={}", text("kind"));
            return Err(StatusError::bad_request(format!("invalid object type: {what}")));
        }
        if object.pointer("/metadata/managedFields").is_some_and(|fields| !fields.is_null()) {
            return Err(StatusError::bad_request("metadata.managedFields must be nil"));
        }
        let mistakes = managed_fields::mistakes(Place::Struct(schema), &object);
        if !mistakes.is_empty() {
            let list = match mistakes.as_slice() {
                [one] => one.clone(),
                many => format!("errors:\n  {}", many.join("\n  ")),
            };
            let (namespace, name) = (metadata::text(&object, "namespace"), metadata::text(&object, "name"));
            let gvk = Gvk::from_api_version(api_version, kind);
            let what = format!("{namespace}/{name}; {}/{}, Kind={kind}", gvk.group, gvk.version);
            // Kubernetes has no better word for it than this.
            return Err(StatusError::new(500, "", format!("failed to create typed patch object ({what}): {list}")));
        }
        match (duplicates, mode) {
            (Some(told), FieldValidation::Strict) => {
                let what = format!("error strict decoding YAML: error converting YAML to JSON: {told}");
                Err(StatusError::bad_request(what))
            }
            (Some(told), FieldValidation::Warn) => {
                Ok(Self { object, warnings: vec![format!("error converting YAML to JSON: {told}")] })
            }
            _ => Ok(Self { object, warnings: Vec::new() }),
        }
    }
}

fn parse(body: &[u8]) -> Result<(Value, Option<String>), StatusError> {
    // Most clients send JSON.
    if let Ok((object, duplicates)) = apimachinery::decode::parse_noting_duplicates(body)
        && duplicates.is_empty()
    {
        return Ok((object, None));
    }
    let refuse = |error: &str| StatusError::bad_request(format!("error decoding YAML: {error}"));
    let text = std::str::from_utf8(body).map_err(|_| refuse("it is not UTF-8"))?;
    let (object, duplicates) = apimachinery::yaml::document(text).map_err(|error| refuse(&error.to_string()))?;
    if object.is_object() { Ok((object, duplicates)) } else { Err(refuse("it is no object")) }
}

// === impl Applying ===

impl<'a> Applying<'a> {
    pub fn new(request: &'a ResourceRequest<'a>, config: &'a Configuration) -> Self {
        Self { request, config }
    }

    fn apply(&self, live: &Value, exists: bool, managed: &str) -> Result<Produced, StatusError> {
        let (request, resource) = (self.request, self.request.resource);
        let convert = |object: &Value, from: &str, to: &str| ownership::converted(request, object, from, to);
        let schema = resource.schema.ok_or_else(StatusError::no_such_resource)?;
        let finish = |merged| decode_value(merged, schema, FieldValidation::Ignore).map(|decoded| decoded.value);
        let applied = managed_fields::apply(
            Place::Struct(schema),
            live,
            exists,
            &self.config.object,
            ownership::parse(managed),
            &ownership::writer(request),
            request.info.query.flag("force"),
            ignored(resource, request.part),
            &ownership::now(),
            Some(&convert),
            finish,
        );
        let applied = applied.map_err(|error| refusal(error, resource))?;
        let mut object = applied.object;
        metadata::ensure_namespace(&mut object, request.namespace())?;
        let warnings = self.config.warnings.clone();
        Ok(Produced { object, warnings, ownership: Ownership::Given(applied.managed.write()) })
    }
}

impl Produce for Applying<'_> {
    fn produce(&mut self, old: &Value, managed: &str) -> Result<Produced, StatusError> {
        let produced = self.apply(old, true, managed)?;
        metadata::check_name(&produced.object, metadata::text(old, "name"))?;
        Ok(produced)
    }

    fn options(&self) -> Value {
        json!({"kind": "PatchOptions", "apiVersion": "meta.k8s.io/v1"})
    }
}

fn refusal(error: ApplyError<DecodeError>, resource: &Resource) -> StatusError {
    let message = error.to_string();
    match error {
        ApplyError::Conflicts(conflicts) => {
            let conflict = StatusError::new(409, "Conflict", message);
            conflicts.iter().fold(conflict, |error, Conflict { manager, path }| {
                error.with_cause("FieldManagerConflict", &format!("conflict with {manager}"), Some(path))
            })
        }
        ApplyError::Invalid(error) => StatusError::bad_request(error.message(&resource.gvr.version, &resource.kind)),
    }
}

/// Applies a configuration to the object, or creates it.
pub async fn apply(request: &mut ResourceRequest<'_>, config: &Configuration) -> Result<Outcome, StatusError> {
    for _ in 0..ATTEMPTS {
        if let Some(current) = update::newest(request).await? {
            let request = &*request;
            match update::replace(request, current, &mut Applying::new(request, config)).await {
                // It has gone: make it.
                Err(error) if error.code() == 404 && request.part == Part::Main => {}
                result => return result,
            }
        }
        if request.part != Part::Main {
            return Err(request.not_found());
        }
        match create_from(request, config).await {
            // Somebody else was quicker: apply to what is there.
            Err(error) if error.reason() == "AlreadyExists" => {}
            result => return result,
        }
    }
    Err(request.stale())
}

async fn create_from(request: &mut ResourceRequest<'_>, config: &Configuration) -> Result<Outcome, StatusError> {
    let name = request.info.name.clone();
    let given = metadata::text(&config.object, "uid");
    if !given.is_empty() {
        let cause =
            format!("uid mismatch: the provided object specified uid {given}, and no existing object was found");
        return Err(StatusError::conflict(&request.info.group, &request.info.resource, &name, &cause));
    }
    create::authorize(request).await?;
    let nothing = json!({"apiVersion": request.resource.api_version, "kind": request.resource.kind});
    let mut produced = Applying::new(request, config).apply(&nothing, false, "")?;
    metadata::check_name(&produced.object, &name)?;
    metadata::of(&mut produced.object).remove("resourceVersion");
    create::create_owned(request, produced).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use apimachinery::facts;

    #[test]
    fn a_configuration_must_fit() {
        let schema = facts::schema("apps.v1.Deployment").unwrap();
        let parse = |body: &str, mode| {
            let parsed = Configuration::parse(body.as_bytes(), "apps/v1", "Deployment", schema, mode);
            parsed.map(|c| c.warnings).map_err(|e| (e.code(), e.message().to_owned()))
        };
        let head = r#""apiVersion":"apps/v1","kind":"Deployment","metadata":{"name":"web","namespace":"n"}"#;
        for (body, expected) in [
            (format!("{{{head}}}"), Ok(vec![])),
            ("apiVersion: apps/v1\nkind: Deployment\nspec: {replicas: 1}\n".to_owned(), Ok(vec![])),
            (r#"{"kind":"Pod","apiVersion":"v1"}"#.to_owned(), Err((400, "invalid object type: /v1, Kind=Pod"))),
            (
                format!("{{{head},\"spec\":{{\"bogus\":1}}}}"),
                Err((
                    500,
                    "failed to create typed patch object (n/web; apps/v1, Kind=Deployment): .spec.bogus: field not declared in schema",
                )),
            ),
            (
                r#"{"apiVersion":"apps/v1","kind":"Deployment","metadata":{"managedFields":[]}}"#.to_owned(),
                Err((400, "metadata.managedFields must be nil")),
            ),
            (
                "apiVersion: apps/v1\nkind: Deployment\nkind: Deployment\n".to_owned(),
                Err((
                    400,
                    "error strict decoding YAML: error converting YAML to JSON: yaml: unmarshal errors:\n  line 3: key \"kind\" already set in map",
                )),
            ),
        ] {
            let expected = expected.map_err(|(code, message)| (code, message.to_owned()));
            assert_eq!(parse(&body, FieldValidation::Strict), expected, "{body}");
        }
        for body in ["[", "1", "", "\u{0}"] {
            assert_eq!(parse(body, FieldValidation::Warn).unwrap_err().0, 400, "{body:?}");
        }
        assert_eq!(parse(&format!("{{{head},\"kind\":\"Deployment\"}}"), FieldValidation::Warn).unwrap().len(), 1);
        assert_eq!(parse(&format!("{{{head},\"kind\":\"Deployment\"}}"), FieldValidation::Ignore).unwrap().len(), 0);
    }
}
