//! Requests on what is not stored: the endpoints that the registry names, with the generic part (decoding, admission,
//! patching of what they answer) around them.

use super::apply::Configuration;
use super::patch::{APPLY_PATCH, Patch};
use super::write_options::WriteOptions;
use super::{Call, Endpoint, Outcome, Payload};
use crate::admission::{AdmissionRequest, Operation};
use crate::authorization::Attributes;
use crate::server::Context;
use crate::server::negotiation::{content_type, decode};
use crate::server::request_info::RequestInfo;
use apimachinery::facts;
use apimachinery::meta::join_api_version;
use apimachinery::status::StatusError;
use http::HeaderMap;
use serde_json::Value;
use std::sync::Arc;

/// As `patchResource`.
const PATCH_ATTEMPTS: usize = 5;

/// The kind that the endpoint speaks.
struct Spoken {
    api_version: String,
    kind: &'static str,
    schema: Option<&'static facts::TypeFacts>,
}

/// A request on an endpoint, authorized, with its body still to be read.
#[derive(Clone, Copy)]
pub struct VirtualRequest<'a> {
    pub context: &'a Arc<Context>,
    pub info: &'a RequestInfo,
    pub attributes: &'a Attributes,
    pub endpoint: &'a Arc<dyn Endpoint>,
    pub headers: &'a HeaderMap,
    pub body: &'a [u8],
    pub options: WriteOptions,
}

/// Calls an endpoint. A patch is tried again when another write came between its reading and its writing.
pub async fn call(request: VirtualRequest<'_>) -> Result<Outcome, StatusError> {
    let mut left = if request.info.verb == "patch" { PATCH_ATTEMPTS } else { 1 };
    loop {
        left -= 1;
        match call_once(request).await {
            Err(error) if left > 0 && error.reason() == "Conflict" => {}
            outcome => return outcome,
        }
    }
}

async fn call_once(request: VirtualRequest<'_>) -> Result<Outcome, StatusError> {
    let VirtualRequest { context, info, attributes, endpoint, headers, body, options } = request;
    let WriteOptions { field_validation, dry_run } = options;
    let mut spoken = spoken(info).ok_or_else(StatusError::no_such_resource)?;
    let names = |version: &&str| body.windows(version.len()).any(|window| window == version.as_bytes());
    if let Some(version) = endpoint.also_speaks().iter().copied().find(names) {
        spoken.api_version = version.to_owned();
    }
    let resource = context.registry.get(&info.group, &info.version, &info.resource);
    let mut warnings = Vec::new();
    let mut info = std::borrow::Cow::Borrowed(info);
    let mut object = match info.verb {
        "create" | "update" => {
            let incoming = decode(headers, body, spoken.schema, &spoken.api_version, spoken.kind, field_validation)?;
            warnings = incoming.warnings;
            incoming.object
        }
        "patch"
            if content_type(headers) == APPLY_PATCH
                && let Some(schema) = spoken.schema =>
        {
            let config = Configuration::parse(body, &spoken.api_version, spoken.kind, schema, field_validation)?;
            warnings = config.warnings;
            info.to_mut().verb = "apply";
            config.object
        }
        "patch" => {
            let patch = Patch::parse(headers, body, field_validation)?;
            let mut get = info.clone().into_owned();
            get.verb = "get";
            let call = Call { context, info: &get, attributes, body: Value::Null, dry_run };
            let (object, told) = patch.apply(endpoint.call(call).await?.object, spoken.schema)?;
            warnings = told;
            info.to_mut().verb = "update";
            object
        }
        _ => Value::Null,
    };
    let operation = match info.verb {
        "create" => Some(Operation::Create),
        "update" | "apply" => Some(Operation::Update),
        _ => None,
    };
    if let Some(operation) = operation {
        let mut admission = AdmissionRequest {
            attributes,
            resource: resource.map(|r| &**r),
            operation,
            object: Some(&mut object),
            old_object: None,
            options: None,
            dry_run,
            warnings: Vec::new(),
            undo: Vec::new(),
        };
        context.admission.mutate(&mut admission).await?;
        context.admission.validate(&mut admission).await?;
        warnings.extend(std::mem::take(&mut admission.warnings));
    }
    let answer = endpoint.call(Call { context, info: &info, attributes, body: object, dry_run }).await?;
    warnings.extend(answer.warnings);
    Ok(Outcome { code: answer.code, payload: Payload::Object(resource.cloned(), answer.object), warnings })
}

fn spoken(info: &RequestInfo) -> Option<Spoken> {
    let kind = facts::resource(&info.group, &info.version, &info.resource)?;
    let (group, version, name) = match info.subresource.as_str() {
        "" => (kind.group, kind.version, kind.kind),
        subresource => {
            let sub = kind.subresource(subresource)?;
            (sub.group, sub.version, sub.kind)
        }
    };
    Some(Spoken {
        api_version: join_api_version(group, version),
        kind: name,
        schema: facts::schema_of(group, version, name),
    })
}
