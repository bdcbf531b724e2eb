//! Messages to JSON values. Go writes every field that is no pointer, be it zero or not; such zeros are dropped again, as
//! JSON's `omitempty` does. The wire does not tell which zeros stand behind a pointer and mean something, so fields that are
//! pointers are listed by name.

use super::wire::{Reader, Wire, utf8};
use super::{Envelope, ProtobufError, envelope, is_protobuf};
use crate::facts::{self, FieldFacts, Type, TypeFacts};
use crate::meta::split_api_version;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Map, Number, Value};

/// Messages nest no deeper than this.
const DEPTH_MAX: usize = 64;
/// Structs that Go inlines nest no deeper than this.
const PATH_MAX: usize = 4;

/// Scalars that Go holds by pointer, by their JSON names: a zero there has been written on purpose.
const POINTERS: [&str; 96] = [
    "activeDeadlineSeconds",
    "adminAccess",
    "allNodes",
    "allocateLoadBalancerNodePorts",
    "allowPrivilegeEscalation",
    "allowVolumeExpansion",
    "attachRequired",
    "automountServiceAccountToken",
    "averageUtilization",
    "backoffLimit",
    "backoffLimitPerIndex",
    "blockOwnerDeletion",
    "borrowingLimitPercent",
    "collisionCount",
    "completions",
    "controller",
    "currentCPUUtilizationPercentage",
    "defaultMode",
    "deletionGracePeriodSeconds",
    "enableServiceLinks",
    "endPort",
    "exitCode",
    "expirationSeconds",
    "failedJobsHistoryLimit",
    "fsGroup",
    "gracePeriodSeconds",
    "healthCheckNodePort",
    "hostProcess",
    "hostUsers",
    "immutable",
    "leaseDurationSeconds",
    "leaseTransitions",
    "lendablePercent",
    "limit",
    "managedBy",
    "manualSelector",
    "maxFailedIndexes",
    "maxItems",
    "maxLength",
    "maxProperties",
    "maximum",
    "minDomains",
    "minItems",
    "minLength",
    "minProperties",
    "minReplicas",
    "minimum",
    "mode",
    "multipleOf",
    "nominalConcurrencyShares",
    "optional",
    "orphanDependents",
    "parallelism",
    "partition",
    "podInfoOnMount",
    "preemptionPolicy",
    "priority",
    "privileged",
    "probe",
    "procMount",
    "progressDeadlineSeconds",
    "readOnly",
    "readOnlyRootFilesystem",
    "ready",
    "recursiveReadOnly",
    "recursiveReadOnlyMounts",
    "remainingItemCount",
    "replicas",
    "requiresRepublish",
    "revisionHistoryLimit",
    "runAsGroup",
    "runAsNonRoot",
    "runAsUser",
    "runtimeClassName",
    "seLinuxMount",
    "serving",
    "setHostnameAsFQDN",
    "shareProcessNamespace",
    "stabilizationWindowSeconds",
    "started",
    "startingDeadlineSeconds",
    "storageCapacity",
    "storageClassName",
    "succeeded",
    "successfulJobsHistoryLimit",
    "supplementalGroupsPolicy",
    "suspend",
    "terminating",
    "terminatingReplicas",
    "terminationGracePeriodSeconds",
    "timeoutSeconds",
    "tolerationSeconds",
    "ttlSecondsAfterFinished",
    "userNamespaces",
    "volumeAttributesClassName",
    "x-kubernetes-preserve-unknown-fields",
];

/// Pointers in these types alone: (struct, field).
const ONLY_POINTERS: [(&str, &str); 2] = [("VolumeNodeResources", "count"), ("PodDNSConfigOption", "value")];

/// Pointers in most types, but plain in these: (struct, field).
const PLAIN: [(&str, &str); 6] = [
    ("Probe", "timeoutSeconds"),
    ("ContainerStatus", "ready"),
    ("ContainerStateTerminated", "exitCode"),
    ("PersistentVolumeClaimVolumeSource", "readOnly"),
    ("VolumeMount", "readOnly"),
    ("ResourceStatus", "ready"),
];

/// Decodes the message in an envelope; `apiVersion` and `kind` are those of the envelope.
pub fn decode(envelope: &Envelope<'_>, facts: &'static TypeFacts) -> Result<Value, ProtobufError> {
    object(envelope, facts, 0)
}

fn object(envelope: &Envelope<'_>, facts: &'static TypeFacts, depth: usize) -> Result<Value, ProtobufError> {
    let mut object = Map::new();
    message(envelope.raw, facts, &[], &mut object, depth)?;
    for (field, text) in [("apiVersion", envelope.api_version), ("kind", envelope.kind)] {
        if !text.is_empty() {
            object.insert(field.to_owned(), text.into());
        }
    }
    Ok(Value::Object(object))
}

/// Decodes a message of a type into `object`. `path` leads to a struct that Go inlines in JSON: its fields belong to the same
/// object.
fn message(
    bytes: &[u8],
    facts: &'static TypeFacts,
    path: &[u32],
    object: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), ProtobufError> {
    if depth > DEPTH_MAX {
        return Err(ProtobufError::Malformed("it is nested too deep"));
    }
    let mut at = [0; PATH_MAX];
    let length = path.len() + 1;
    let at = at.get_mut(..length).ok_or(ProtobufError::Malformed("it is nested too deep"))?;
    at[..length - 1].copy_from_slice(path);
    let mut reader = Reader(bytes);
    while let Some((number, wire)) = reader.field()? {
        at[length - 1] = number;
        match (facts.field_at(at), wire) {
            (Some(field), wire) if field.numbers.len() == length => add(field, facts, wire, object, depth)?,
            (Some(_), Wire::Bytes(inner)) => message(inner, facts, at, object, depth + 1)?,
            _ => {}
        }
    }
    Ok(())
}

/// Puts one occurrence of a field into the object.
fn add(
    field: &'static FieldFacts,
    owner: &'static TypeFacts,
    wire: Wire<'_>,
    object: &mut Map<String, Value>,
    depth: usize,
) -> Result<(), ProtobufError> {
    match &field.kind {
        Type::List(item) => {
            let items = match wire {
                // Numbers may come packed.
                Wire::Bytes(packed) if matches!(**item, Type::Int32 | Type::Int64 | Type::Bool) => {
                    let mut reader = Reader(packed);
                    let mut items = Vec::new();
                    while !reader.0.is_empty() {
                        items.push(value(item, Wire::Varint(reader.varint()?), depth)?);
                    }
                    items
                }
                wire => vec![value(item, wire, depth)?],
            };
            let list = object.entry(field.name).or_insert_with(|| Value::Array(Vec::new()));
            if let Value::Array(list) = list {
                list.extend(items);
            }
        }
        Type::Map(item) => {
            let Wire::Bytes(entry) = wire else { return Err(ProtobufError::Malformed("a map entry is no message")) };
            let mut reader = Reader(entry);
            let (mut key, mut content) = (String::new(), None);
            while let Some((number, wire)) = reader.field()? {
                match (number, wire) {
                    (1, Wire::Bytes(text)) => key = utf8(text)?.to_owned(),
                    (2, wire) => content = Some(map_value(item, wire, depth)?),
                    _ => {}
                }
            }
            let content = content.unwrap_or_else(|| empty(item));
            let map = object.entry(field.name).or_insert_with(|| Value::Object(Map::new()));
            if let Value::Object(map) = map {
                map.insert(key, content);
            }
        }
        kind => {
            let decoded = value(kind, wire, depth)?;
            let keep = !is_zero(field, &decoded) || field.required || is_pointer(field, owner);
            if keep && !decoded.is_null() {
                object.insert(field.name.to_owned(), decoded);
            }
        }
    }
    Ok(())
}

fn is_pointer(field: &FieldFacts, owner: &TypeFacts) -> bool {
    let at = (owner.struct_name(), field.name);
    (POINTERS.binary_search(&field.name).is_ok() && !PLAIN.contains(&at)) || ONLY_POINTERS.contains(&at)
}

/// Zeros that Go writes though nobody has set them. Of the numbers that may be texts, all but one are pointers.
fn is_zero(field: &FieldFacts, value: &Value) -> bool {
    match value {
        Value::Number(_) if field.kind == Type::IntOrString && field.name != "targetPort" => false,
        Value::Null => true,
        Value::Bool(flag) => !flag,
        Value::Number(number) => number.as_f64() == Some(0.0),
        Value::String(text) => text.is_empty(),
        // An empty object may be all that there is to say: `emptyDir: {}`.
        Value::Array(_) | Value::Object(_) => false,
    }
}

/// What a map holds: where it holds lists, they are wrapped in a message.
fn map_value(kind: &Type, wire: Wire<'_>, depth: usize) -> Result<Value, ProtobufError> {
    let (Type::List(item), Wire::Bytes(inner)) = (kind, wire) else { return value(kind, wire, depth) };
    let mut reader = Reader(inner);
    let mut items = Vec::new();
    while let Some((number, wire)) = reader.field()? {
        if number == 1 {
            items.push(value(item, wire, depth)?);
        }
    }
    Ok(Value::Array(items))
}

fn empty(kind: &Type) -> Value {
    match kind {
        Type::List(_) => Value::Array(Vec::new()),
        Type::Object(_) | Type::Map(_) => Value::Object(Map::new()),
        Type::Int32 | Type::Int64 => 0.into(),
        _ => "".into(),
    }
}

fn value(kind: &Type, wire: Wire<'_>, depth: usize) -> Result<Value, ProtobufError> {
    Ok(match (kind, wire) {
        (Type::String, Wire::Bytes(text)) => utf8(text)?.into(),
        (Type::Bool, Wire::Varint(number)) => (number != 0).into(),
        // Negative numbers come in two's complement, 64 bits wide.
        (Type::Int32 | Type::Int64, Wire::Varint(number)) => (number as i64).into(),
        (Type::Double, Wire::Fixed64(bits)) => {
            Number::from_f64(f64::from_bits(bits)).map_or(Value::Null, Value::Number)
        }
        (Type::Bytes, Wire::Bytes(bytes)) => STANDARD.encode(bytes).into(),
        (Type::Quantity, Wire::Bytes(inner)) => text_in(inner, 1)?.into(),
        (Type::IntOrString, Wire::Bytes(inner)) => int_or_string(inner)?,
        (Type::Time | Type::MicroTime, Wire::Bytes(inner)) => time(inner, matches!(kind, Type::MicroTime))?,
        (Type::Raw | Type::Json | Type::Fields, Wire::Bytes(inner)) => {
            let mut reader = Reader(inner);
            let mut json = Value::Null;
            while let Some((number, wire)) = reader.field()? {
                if let (1, Wire::Bytes(text)) = (number, wire) {
                    json = wrapped(text, depth)?;
                }
            }
            json
        }
        (Type::SchemaOrList | Type::SchemaOrBool | Type::SchemaOrStrings, Wire::Bytes(inner)) => {
            schema_or(kind, inner, depth)?
        }
        (Type::Object(id), Wire::Bytes(inner)) => {
            let mut object = Map::new();
            message(inner, id.facts(), &[], &mut object, depth + 1)?;
            Value::Object(object)
        }
        _ => return Err(ProtobufError::Malformed("a field has another wire type than its type")),
    })
}

/// JSON inside a message; or an object, encoded as this one is.
fn wrapped(bytes: &[u8], depth: usize) -> Result<Value, ProtobufError> {
    if !is_protobuf(bytes) {
        return serde_json::from_slice(bytes).map_err(|_| ProtobufError::Malformed("wrapped JSON is none"));
    }
    let envelope = envelope(bytes)?;
    let (group, version) = split_api_version(envelope.api_version);
    let facts = facts::schema_of(group, version, envelope.kind)
        .ok_or(ProtobufError::Malformed("a wrapped object is of no known kind"))?;
    object(&envelope, facts, depth + 1)
}

fn text_in(bytes: &[u8], wanted: u32) -> Result<&str, ProtobufError> {
    let mut reader = Reader(bytes);
    let mut found = "";
    while let Some((number, wire)) = reader.field()? {
        if let (true, Wire::Bytes(text)) = (number == wanted, wire) {
            found = utf8(text)?;
        }
    }
    Ok(found)
}

fn int_or_string(bytes: &[u8]) -> Result<Value, ProtobufError> {
    let mut reader = Reader(bytes);
    let (mut is_text, mut number, mut text) = (false, 0_i64, "");
    while let Some((field, wire)) = reader.field()? {
        match (field, wire) {
            (1, Wire::Varint(kind)) => is_text = kind == 1,
            (2, Wire::Varint(value)) => number = value as i64,
            (3, Wire::Bytes(value)) => text = utf8(value)?,
            _ => {}
        }
    }
    Ok(if is_text { text.into() } else { number.into() })
}

/// An empty message is Go's zero time: nothing.
fn time(bytes: &[u8], micro: bool) -> Result<Value, ProtobufError> {
    if bytes.is_empty() {
        return Ok(Value::Null);
    }
    let mut reader = Reader(bytes);
    let (mut seconds, mut nanos) = (0_i64, 0_i64);
    while let Some((number, wire)) = reader.field()? {
        match (number, wire) {
            (1, Wire::Varint(value)) => seconds = value as i64,
            (2, Wire::Varint(value)) => nanos = value as i64,
            _ => {}
        }
    }
    let nanos = i32::try_from(nanos).map_err(|_| ProtobufError::Malformed("a time is out of range"))?;
    let at = jiff::Timestamp::new(seconds, nanos).map_err(|_| ProtobufError::Malformed("a time is out of range"))?;
    Ok(if micro { format!("{at:.6}").into() } else { crate::time::rfc3339(at).into() })
}

/// The schema types of custom resource definitions that are a schema, or something else.
fn schema_or(kind: &Type, bytes: &[u8], depth: usize) -> Result<Value, ProtobufError> {
    let facts = facts::schema("apiextensions.v1.JSONSchemaProps")
        .ok_or(ProtobufError::Malformed("its schema type is not known"))?;
    let props = |inner: &[u8]| {
        let mut object = Map::new();
        message(inner, facts, &[], &mut object, depth + 1).map(|()| Value::Object(object))
    };
    let mut reader = Reader(bytes);
    let (mut schema, mut list, mut allows) = (None, Vec::new(), false);
    while let Some((number, wire)) = reader.field()? {
        match (kind, number, wire) {
            (Type::SchemaOrBool, 1, Wire::Varint(value)) => allows = value != 0,
            (Type::SchemaOrBool, 2, Wire::Bytes(inner))
            | (Type::SchemaOrList | Type::SchemaOrStrings, 1, Wire::Bytes(inner)) => {
                schema = Some(props(inner)?);
            }
            (Type::SchemaOrList, 2, Wire::Bytes(inner)) => list.push(props(inner)?),
            (Type::SchemaOrStrings, 2, Wire::Bytes(text)) => list.push(utf8(text)?.into()),
            _ => {}
        }
    }
    Ok(match (kind, schema) {
        (_, Some(schema)) => schema,
        (Type::SchemaOrBool, None) => allows.into(),
        (_, None) => Value::Array(list),
    })
}

#[cfg(test)]
pub(super) fn pointers_are_sorted() -> bool {
    POINTERS.is_sorted()
}
