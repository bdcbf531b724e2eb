//! ConfigMaps.

use crate::registry::field::{Errors, Field};
use crate::registry::object::map;
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::status::FieldError;
use serde_json::Value;

/// All values together. As `MaxSecretSize`.
pub const DATA_MAX_BYTES: usize = 1024 * 1024;

pub const RULES: Rules = Rules { validate, validate_update, row: Some(row), ..Rules::DEFAULT };

/// As `IsConfigMapKey`.
pub fn config_key(key: &str) -> Vec<String> {
    let mut messages = Vec::new();
    if key.len() > 253 {
        messages.push("must be no more than 253 characters".to_owned());
    }
    if key.is_empty() || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b)) {
        messages.push("a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or 'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')".to_owned());
    }
    if key == "." {
        messages.push("must not be '.'".to_owned());
    } else if key == ".." {
        messages.push("must not be '..'".to_owned());
    } else if key.starts_with("..") {
        messages.push("must not start with '..'".to_owned());
    }
    messages
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let (data, binary) = (root.at("data"), root.at("binaryData"));
    let mut bytes = 0;
    for (key, value) in data.entries() {
        errors.0.extend(config_key(key).into_iter().map(|m| FieldError::invalid(value.path(), key, m)));
        if binary.value.get(key).is_some() {
            errors.0.push(FieldError::invalid(value.path(), key, "duplicate of key present in binaryData"));
        }
        bytes += value.str().len();
    }
    for (key, value) in binary.entries() {
        errors.0.extend(config_key(key).into_iter().map(|m| FieldError::invalid(value.path(), key, m)));
        bytes += decoded_len(value.str());
    }
    if bytes > DATA_MAX_BYTES {
        errors.0.push(FieldError::too_long("", DATA_MAX_BYTES));
    }
}

/// How many bytes base64 stands for.
pub fn decoded_len(base64: &str) -> usize {
    (base64.len() / 4 * 3).saturating_sub(base64.bytes().rev().take_while(|b| *b == b'=').count())
}

fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    immutable(new, old, &["data", "binaryData"], errors);
}

/// What is once marked immutable stays so, with its data. For Secrets too.
pub fn immutable(new: &Field<'_, '_>, old: &Field<'_, '_>, fields: &[&str], errors: &mut Errors) {
    const WHY: &str = "field is immutable when `immutable` is set";
    if !old.at("immutable").bool() {
        return;
    }
    if !new.at("immutable").bool() {
        errors.forbidden(&new.at("immutable"), WHY);
    }
    for field in fields {
        let (now, was) = (new.at(field), old.at(field));
        if !crate::registry::object::semantically_equal(now.value, was.value) {
            errors.forbidden(&now, WHY);
        }
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let count = |pointer| map(object, pointer).map_or(0, serde_json::Map::len);
    // A string, though it is a number: the column says so.
    let count = count("/data") + count("/binaryData");
    vec![print::name(object), Value::from(count), clock.age(object)]
}
