//! JSON (or a parsed document) to a clean `Value` of a known type, as Kubernetes' decoder does it: unknown and duplicate
//! fields are found (an error, a warning or nothing), wrong types are refused in Go's words, nulls and empty lists are
//! dropped, and quantities and times take their canonical form. One pass over the text, guided by the schema facts.

mod duplicates;

pub(crate) use duplicates::{Duplicate, Noted};

use crate::facts::{FieldFacts, Type, TypeFacts, schema};
use crate::quantity::Quantity;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::de::{DeserializeSeed, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use std::borrow::Cow;
use std::cell::RefCell;
use std::fmt;

/// How many unknown or duplicate fields are told apart before the rest goes unmentioned.
const STRICT_ERRORS_MAX: usize = 100;

const MANAGED_FIELDS: &str = "managedFields";

/// What becomes of unknown and duplicate fields: the `fieldValidation` parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FieldValidation {
    Ignore,
    /// Dropped, each with a warning to the client.
    #[default]
    Warn,
    Strict,
}

/// A decoded object and what the client should be warned of.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    pub value: Value,
    pub warnings: Vec<String>,
}

/// Why a document is no object of its type. Every one is the client's fault: 400.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    #[error("couldn't get version/kind; json parse error: {0}")]
    Syntax(String),
    /// A value of the wrong type, in the words of Go's encoding/json.
    #[error("{0}")]
    Type(String),
    #[error("{0}")]
    Yaml(String),
    /// With `fieldValidation=Strict`.
    #[error("strict decoding error: {}", .0.join(", "))]
    Strict(Vec<String>),
}

// === impl FieldValidation ===

impl FieldValidation {
    /// The value of the query parameter; None for one that does not exist.
    pub fn parse(text: &str) -> Option<FieldValidation> {
        match text {
            "Ignore" => Some(FieldValidation::Ignore),
            "" | "Warn" => Some(FieldValidation::Warn),
            "Strict" => Some(FieldValidation::Strict),
            _ => None,
        }
    }
}

// === impl DecodeError ===

impl DecodeError {
    /// The message of the 400 that answers a body that cannot be decoded.
    pub fn message(&self, version: &str, kind: &str) -> String {
        match self {
            DecodeError::Syntax(_) => format!("the object provided is unrecognized (must be of type {kind}): {self}"),
            _ => format!("{kind} in version \"{version}\" cannot be handled as a {kind}: {self}"),
        }
    }
}

/// Decodes JSON text.
pub fn decode_json(text: &[u8], facts: &'static TypeFacts, mode: FieldValidation) -> Result<Decoded, DecodeError> {
    decode_text(text, facts, mode, Context::default())
}

fn decode_text(
    text: &[u8],
    facts: &'static TypeFacts,
    mode: FieldValidation,
    context: Context,
) -> Result<Decoded, DecodeError> {
    let seed = Seed { kind: Shape::Struct(facts), context: &context, owner: "" };
    // What is UTF-8 as a whole need not be looked at text by text.
    let value = match std::str::from_utf8(text) {
        Ok(text) => read(seed, serde_json::Deserializer::from_str(text)),
        Err(_) => read(seed, serde_json::Deserializer::from_slice(text)),
    };
    let value = value.map_err(|error| DecodeError::Syntax(error.to_string()))?;
    context.finish(value, mode)
}

fn read<'de, R: serde_json::de::Read<'de>>(
    seed: Seed<'_>,
    mut text: serde_json::Deserializer<R>,
) -> Result<Option<Value>, serde_json::Error> {
    let value = seed.deserialize(&mut text)?;
    text.end().map(|()| value)
}

/// As [`decode_json`], of what a client has sent to be stored: managedFields stay text (a JSON string of it), since most
/// writes hand them on as they are.
pub fn decode_sent(text: &[u8], facts: &'static TypeFacts, mode: FieldValidation) -> Result<Decoded, DecodeError> {
    let context = Context { managed_fields_as_text: true, ..Context::default() };
    decode_text(text, facts, mode, context)
}

/// Decodes YAML text.
pub fn decode_yaml(text: &str, facts: &'static TypeFacts, mode: FieldValidation) -> Result<Decoded, DecodeError> {
    let (document, duplicates) = crate::yaml::document(text).map_err(|error| DecodeError::Yaml(error.to_string()))?;
    let mut context = Context { managed_fields_as_text: true, ..Context::default() };
    context.strict.get_mut().extend(duplicates);
    decode_document(document, facts, mode, context)
}

/// Parses JSON text of no particular type; names the fields that stand in it more than once: `duplicate field "spec.a"`.
pub fn parse_noting_duplicates(text: &[u8]) -> Result<(Value, Vec<String>), serde_json::Error> {
    let noted: Noted<String> = serde_json::from_slice(text)?;
    let told = noted.duplicates.iter().map(|duplicate| format!("duplicate field \"{}\"", duplicate.path));
    Ok((noted.value, told.collect()))
}

/// Decodes a document that was parsed before (from YAML, or the result of a patch): duplicate fields are gone by then.
pub fn decode_value(document: Value, facts: &'static TypeFacts, mode: FieldValidation) -> Result<Decoded, DecodeError> {
    decode_document(document, facts, mode, Context::default())
}

/// Decodes an object anew that was decoded before and has been changed by a merge patch since: those of its fields that the
/// patch names.
pub fn decode_patched(
    object: Value,
    patch: &Map<String, Value>,
    facts: &'static TypeFacts,
    mode: FieldValidation,
) -> Result<Decoded, DecodeError> {
    let Value::Object(mut object) = object else { return decode_value(object, facts, mode) };
    let context = Context::default();
    let seed = Seed { kind: Shape::Struct(facts), context: &context, owner: "" };
    seed.fields_of(&mut object, patch, facts).map_err(|error| DecodeError::Syntax(error.to_string()))?;
    context.finish(Some(Value::Object(object)), mode)
}

/// The directives of a strategic merge patch that name a field beside it.
const NAMING_DIRECTIVES: [&str; 2] = ["$setElementOrder/", "$deleteFromPrimitiveList/"];

fn decode_document(
    document: Value,
    facts: &'static TypeFacts,
    mode: FieldValidation,
    context: Context,
) -> Result<Decoded, DecodeError> {
    let seed = Seed { kind: Shape::Struct(facts), context: &context, owner: "" };
    let value = seed.deserialize(document).map_err(|error| DecodeError::Syntax(error.to_string()))?;
    context.finish(value, mode)
}

/// Where the decoder stands and what it found so far.
#[derive(Default)]
struct Context {
    path: RefCell<Vec<Segment>>,
    strict: RefCell<Vec<String>>,
    mistake: RefCell<Option<String>>,
    managed_fields_as_text: bool,
}

enum Segment {
    Field(Cow<'static, str>),
    Index(usize),
}

// === impl Context ===

impl Context {
    fn finish(self, value: Option<Value>, mode: FieldValidation) -> Result<Decoded, DecodeError> {
        if let Some(mistake) = self.mistake.into_inner() {
            return Err(DecodeError::Type(mistake));
        }
        let strict = self.strict.into_inner();
        if mode == FieldValidation::Strict && !strict.is_empty() {
            return Err(DecodeError::Strict(strict));
        }
        let warnings = if mode == FieldValidation::Warn { strict } else { Vec::new() };
        Ok(Decoded { value: value.unwrap_or_else(|| Value::Object(Map::new())), warnings })
    }

    fn enter<T>(&self, segment: Segment, inside: impl FnOnce() -> T) -> T {
        self.path.borrow_mut().push(segment);
        let result = inside();
        self.path.borrow_mut().pop();
        result
    }

    /// `spec.containers[0].image`, as strict errors write it.
    fn path_with(&self, field: &str) -> String {
        let mut text = String::new();
        for segment in self.path.borrow().iter() {
            match segment {
                Segment::Field(name) if text.is_empty() => text.push_str(name),
                Segment::Field(name) => {
                    text.push('.');
                    text.push_str(name);
                }
                Segment::Index(at) => text.push_str(&format!("[{at}]")),
            }
        }
        if !text.is_empty() {
            text.push('.');
        }
        text + field
    }

    fn note_field(&self, what: &str, field: &str) {
        let text = format!("{what} field \"{}\"", self.path_with(field));
        let mut strict = self.strict.borrow_mut();
        if strict.len() < STRICT_ERRORS_MAX && !strict.contains(&text) {
            strict.push(text);
        }
    }

    fn note_mistake(&self, text: String) {
        self.mistake.borrow_mut().get_or_insert(text);
    }

    /// As encoding/json's UnmarshalTypeError: the innermost struct, the path of names without indexes.
    fn wrong_type(&self, found: &str, owner: &str, wanted: &str) {
        let path: Vec<String> = self
            .path
            .borrow()
            .iter()
            .filter_map(|segment| match segment {
                Segment::Field(name) => Some(name.to_string()),
                Segment::Index(_) => None,
            })
            .collect();
        self.note_mistake(if path.is_empty() {
            format!("json: cannot unmarshal {found} into Go value of type {wanted}")
        } else {
            format!("json: cannot unmarshal {found} into Go struct field {owner}.{} of type {wanted}", path.join("."))
        });
    }
}

/// What a value must be.
#[derive(Clone, Copy)]
enum Shape {
    Struct(&'static TypeFacts),
    Value(&'static Type),
}

/// One value to be decoded: null gives None.
#[derive(Clone, Copy)]
struct Seed<'a> {
    kind: Shape,
    context: &'a Context,
    /// The Go struct that holds the value.
    owner: &'static str,
}

// === impl Shape ===

impl Shape {
    fn of(kind: &'static Type) -> Shape {
        match kind {
            Type::Object(id) => Shape::Struct(id.facts()),
            other => Shape::Value(other),
        }
    }

    /// The Go type, as its decoder names it.
    fn go_name(self) -> String {
        match self {
            Shape::Struct(facts) => go_struct(facts),
            Shape::Value(kind) => match kind {
                Type::Bool => "bool".into(),
                Type::Int32 => "int32".into(),
                Type::Int64 => "int64".into(),
                Type::Double => "float64".into(),
                Type::Bytes => "[]uint8".into(),
                Type::Object(id) => go_struct(id.facts()),
                Type::List(item) => format!("[]{}", Shape::of(item).go_name()),
                Type::Map(item) => format!("map[string]{}", Shape::of(item).go_name()),
                Type::Quantity => "resource.Quantity".into(),
                _ => "string".into(),
            },
        }
    }

    /// What null becomes where a value must stand (in a list or a map): Go's zero value.
    fn zero(self) -> Value {
        match self {
            Shape::Struct(_) => Value::Object(Map::new()),
            Shape::Value(kind) => match kind {
                Type::Bool => Value::Bool(false),
                Type::Int32 | Type::Int64 | Type::Double | Type::IntOrString => Value::from(0),
                Type::Quantity => Value::from("0"),
                Type::String | Type::Bytes => Value::from(""),
                Type::List(_) => Value::Array(Vec::new()),
                Type::Map(_) | Type::Object(_) => Value::Object(Map::new()),
                _ => Value::Null,
            },
        }
    }
}

/// `core.v1.PodSpec` is `v1.PodSpec` to Go.
fn go_struct(facts: &TypeFacts) -> String {
    facts.name.split_once('.').map_or(facts.name, |(_, rest)| rest).to_owned()
}

fn schema_props() -> Option<&'static TypeFacts> {
    schema("apiextensions.v1.JSONSchemaProps")
}

// === impl Seed ===

impl<'de> DeserializeSeed<'de> for Seed<'_> {
    type Value = Option<Value>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        match self.kind {
            Shape::Value(Type::Json | Type::Raw | Type::Fields) => {
                let value: Value = serde::Deserialize::deserialize(deserializer)?;
                if !value.is_null() && !value.is_object() && !matches!(self.kind, Shape::Value(Type::Json)) {
                    self.wrong(found_in(&value));
                    return Ok(None);
                }
                Ok(Some(value).filter(|v| !v.is_null()))
            }
            _ => deserializer.deserialize_any(self),
        }
    }
}

fn found_in(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "bool",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

impl Seed<'_> {
    fn wrong(&self, found: &str) {
        self.context.wrong_type(found, self.owner, &self.kind.go_name());
    }

    fn with(&self, kind: Shape) -> Self {
        Seed { kind, ..*self }
    }

    fn integer(&self, number: i128) -> Option<Value> {
        match self.kind {
            Shape::Value(Type::Int32 | Type::IntOrString) => {
                if i32::try_from(number).is_err() {
                    self.wrong(&format!("number {number}"));
                    return None;
                }
            }
            Shape::Value(Type::Int64) => {
                if i64::try_from(number).is_err() {
                    self.wrong(&format!("number {number}"));
                    return None;
                }
            }
            Shape::Value(Type::Double) => {}
            Shape::Value(Type::Quantity) => return self.quantity(&number.to_string()),
            _ => {
                self.wrong("number");
                return None;
            }
        }
        i64::try_from(number).map(Value::from).or_else(|_| u64::try_from(number).map(Value::from)).ok()
    }

    fn quantity(&self, text: &str) -> Option<Value> {
        match Quantity::parse(text) {
            Ok(quantity) => Some(Value::String(quantity.to_string())),
            Err(_) => {
                self.context.note_mistake(
                    "quantities must match the regular expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'"
                        .into(),
                );
                None
            }
        }
    }

    fn string(&self, text: &str) -> Option<Value> {
        let Shape::Value(kind) = self.kind else {
            self.wrong("string");
            return None;
        };
        match kind {
            Type::String | Type::IntOrString => Some(Value::from(text)),
            Type::Quantity => self.quantity(text),
            Type::Bytes => self.bytes(text),
            Type::Time | Type::MicroTime => self.time(text, matches!(kind, Type::MicroTime)),
            _ => {
                self.wrong("string");
                None
            }
        }
    }

    /// Go ignores line breaks in base64; what is kept is the canonical text.
    fn bytes(&self, text: &str) -> Option<Value> {
        if !text.contains(['\n', '\r']) && STANDARD.decode(text).is_ok() {
            return Some(Value::from(text));
        }
        let clean: String = text.chars().filter(|c| !matches!(c, '\n' | '\r')).collect();
        match STANDARD.decode(&clean) {
            Ok(_) => Some(Value::from(clean)),
            Err(error) => {
                let at = match error {
                    base64::DecodeError::InvalidByte(at, _)
                    | base64::DecodeError::InvalidLastSymbol { offset: at, .. } => at,
                    _ => clean.len(),
                };
                self.context.note_mistake(format!("illegal base64 data at input byte {at}"));
                None
            }
        }
    }

    fn time(&self, text: &str, micro: bool) -> Option<Value> {
        if text.is_empty() {
            return None;
        }
        match text.parse::<jiff::Timestamp>() {
            Ok(time) if micro => Some(Value::from(time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string())),
            Ok(time) => Some(Value::from(time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string())),
            Err(_) => {
                let layout = if micro { "2006-01-02T15:04:05.000000Z07:00" } else { "2006-01-02T15:04:05Z07:00" };
                self.context
                    .note_mistake(format!("parsing time {text:?} as {layout:?}: cannot parse {text:?} as \"2006\""));
                None
            }
        }
    }

    fn object<'de, A: MapAccess<'de>>(&self, facts: &'static TypeFacts, mut map: A) -> Result<Option<Value>, A::Error> {
        let (mut object, owner) = (Map::new(), facts.struct_name());
        // The fields that have been read: those of the first places as bits.
        let mut read = 0_u64;
        while let Some(key) = map.next_key_seed(FieldName(facts))? {
            match key {
                Ok(at) => {
                    let field = &facts.fields[at];
                    let bit = 1_u64.checked_shl(at as u32).unwrap_or(0);
                    if read & bit != 0 || (bit == 0 && object.contains_key(field.name)) {
                        self.context.note_field("duplicate", field.name);
                    }
                    read |= bit;
                    let seed = Seed { kind: Shape::of(&field.kind), context: self.context, owner };
                    let mut value = None;
                    self.context.enter(Segment::Field(Cow::Borrowed(field.name)), || {
                        value = if self.context.managed_fields_as_text && field.name == MANAGED_FIELDS {
                            let text = map.next_value::<Box<RawValue>>()?;
                            Some(Value::from(text.get())).filter(|text| text != "null")
                        } else {
                            map.next_value_seed(seed)?
                        };
                        Ok(())
                    })?;
                    if let Some(value) = value.filter(|value| field.required || !is_empty(field, value)) {
                        object.insert(field.name.to_owned(), value);
                    }
                }
                Err(unknown) => {
                    self.context.note_field("unknown", &unknown);
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(Some(Value::Object(object)))
    }

    /// Decodes the fields of an object that a patch names.
    fn fields_of(
        &self,
        object: &mut Map<String, Value>,
        patch: &Map<String, Value>,
        facts: &'static TypeFacts,
    ) -> Result<(), serde_json::Error> {
        for (key, change) in patch {
            let beside = NAMING_DIRECTIVES.iter().find_map(|directive| key.strip_prefix(directive));
            let name = beside.unwrap_or(key);
            let Some(mut value) = object.remove(name) else { continue };
            let Some(field) = facts.field(name) else {
                self.context.note_field("unknown", name);
                continue;
            };
            let seed = Seed { kind: Shape::of(&field.kind), context: self.context, owner: facts.struct_name() };
            let decoded = self.context.enter(Segment::Field(Cow::Borrowed(field.name)), || {
                if let (Shape::Struct(inner), Value::Object(map), Value::Object(change)) =
                    (seed.kind, &mut value, change)
                {
                    return seed.fields_of(map, change, inner).map(|()| Some(value));
                }
                seed.deserialize(value)
            })?;
            if let Some(value) = decoded.filter(|value| field.required || !is_empty(field, value)) {
                object.insert(field.name.to_owned(), value);
            }
        }
        Ok(())
    }

    fn free_map<'de, A: MapAccess<'de>>(&self, item: Shape, mut map: A) -> Result<Option<Value>, A::Error> {
        let mut object = Map::new();
        while let Some(key) = map.next_key::<String>()? {
            if object.contains_key(&key) {
                self.context.note_field("duplicate", &key);
            }
            let mut value = None;
            self.context.enter(Segment::Field(Cow::Owned(key.clone())), || {
                value = map.next_value_seed(self.with(item))?;
                Ok(())
            })?;
            object.insert(key, value.unwrap_or_else(|| item.zero()));
        }
        Ok(Some(Value::Object(object)))
    }

    fn list<'de, A: SeqAccess<'de>>(&self, item: Shape, mut seq: A) -> Result<Option<Value>, A::Error> {
        let mut list = Vec::new();
        loop {
            let mut next = None;
            self.context.enter(Segment::Index(list.len()), || {
                next = seq.next_element_seed(self.with(item))?;
                Ok(())
            })?;
            match next {
                Some(value) => list.push(value.unwrap_or_else(|| item.zero())),
                None => return Ok(Some(Value::Array(list))),
            }
        }
    }
}

/// Go's `omitempty` drops empty lists and maps. A struct that is empty says something (`emptyDir: {}`) and stays.
fn is_empty(field: &FieldFacts, value: &Value) -> bool {
    match (&field.kind, value) {
        (Type::List(_), Value::Array(list)) => list.is_empty(),
        (Type::Map(_), Value::Object(map)) => map.is_empty(),
        _ => false,
    }
}

impl<'de> Visitor<'de> for Seed<'_> {
    type Value = Option<Value>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.kind.go_name())
    }

    fn visit_unit<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_none<E>(self) -> Result<Self::Value, E> {
        Ok(None)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        if matches!(self.kind, Shape::Value(Type::Bool | Type::SchemaOrBool)) {
            return Ok(Some(Value::Bool(value)));
        }
        self.wrong("bool");
        Ok(None)
    }

    fn visit_i64<E>(self, value: i64) -> Result<Self::Value, E> {
        Ok(self.integer(i128::from(value)))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Self::Value, E> {
        Ok(self.integer(i128::from(value)))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Self::Value, E> {
        match self.kind {
            Shape::Value(Type::Double) => return Ok(Some(Value::from(value))),
            Shape::Value(Type::Quantity) => return Ok(self.quantity(&value.to_string())),
            Shape::Value(Type::Int32 | Type::Int64 | Type::IntOrString) => self.wrong(&format!("number {value:?}")),
            _ => self.wrong("number"),
        }
        Ok(None)
    }

    fn visit_str<E>(self, value: &str) -> Result<Self::Value, E> {
        Ok(self.string(value))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        match self.kind {
            Shape::Struct(facts) => return self.object(facts, map),
            Shape::Value(Type::Map(item)) => return self.free_map(Shape::of(item), map),
            Shape::Value(Type::SchemaOrList | Type::SchemaOrBool | Type::SchemaOrStrings) => {
                if let Some(facts) = schema_props() {
                    return self.object(facts, map);
                }
            }
            _ => {}
        }
        self.wrong("object");
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(None)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Self::Value, A::Error> {
        match self.kind {
            Shape::Value(Type::List(item)) => return self.list(Shape::of(item), seq),
            Shape::Value(Type::SchemaOrStrings) => return self.list(Shape::Value(&Type::String), seq),
            Shape::Value(Type::SchemaOrList) => {
                if let Some(facts) = schema_props() {
                    return self.list(Shape::Struct(facts), seq);
                }
            }
            _ => {}
        }
        self.wrong("array");
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(None)
    }
}

/// A key of an object of known type: the place of its field, or the unknown name.
struct FieldName(&'static TypeFacts);

impl<'de> DeserializeSeed<'de> for FieldName {
    type Value = Result<usize, String>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_str(self)
    }
}

impl Visitor<'_> for FieldName {
    type Value = Result<usize, String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a field name")
    }

    fn visit_str<E>(self, name: &str) -> Result<Self::Value, E> {
        Ok(self.0.position(name).ok_or_else(|| name.to_owned()))
    }
}

#[cfg(test)]
mod tests;
