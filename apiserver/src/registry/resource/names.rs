//! How drivers, pools, requests and attributes are called, and what selects devices: shared by claims and slices.

use crate::registry::checks::{Is, driver_name};
use crate::registry::field::{Errors, Field};
use apimachinery::cel::{Env, Type};
use apimachinery::names::{is_dns1123_subdomain, is_label_value, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::Value;

pub const SELECTORS_MAX: usize = 32;
const EXPRESSION_MAX_BYTES: usize = 10 * 1024;
const COST_MAX: u64 = 1_000_000;
const POOL_NAME_MAX: usize = 253;
const ID_MAX: usize = 32;

/// Subdomains with slashes between.
pub fn pool_name(field: &Field<'_, '_>, errors: &mut Errors) {
    if errors.need(field) {
        Is::Bytes(POOL_NAME_MAX).check(field, errors);
        for part in field.str().split('/') {
            for message in is_dns1123_subdomain(part) {
                errors.0.push(FieldError::invalid(field.path(), part, message));
            }
        }
    }
}

/// `model`, or `gpu.example.com/model`. As `validateQualifiedName`; `field` stands for its key in errors.
pub fn qualified_name(name: &str, field: &Field<'_, '_>, errors: &mut Errors) {
    match name.split('/').collect::<Vec<_>>().as_slice() {
        [id] => c_identifier(id, field, errors),
        [domain, id] => {
            if domain.is_empty() {
                errors.0.push(FieldError::invalid(field.path(), "", "the domain must not be empty"));
            } else {
                driver_name(&field.with(&Value::from(*domain)), errors);
            }
            if id.is_empty() {
                errors.0.push(FieldError::invalid(field.path(), "", "the name must not be empty"));
            } else {
                c_identifier(id, field, errors);
            }
        }
        _ => {}
    }
}

/// One with a domain.
pub fn fully_qualified_name(field: &Field<'_, '_>, errors: &mut Errors) {
    qualified_name(field.str(), field, errors);
    if !field.str().contains('/') {
        errors.invalid(field, "a fully qualified name must be a domain and a name separated by a slash");
    }
}

fn c_identifier(id: &str, field: &Field<'_, '_>, errors: &mut Errors) {
    if id.len() > ID_MAX {
        errors.too_long(field, ID_MAX);
    }
    let start = |b: u8| b.is_ascii_alphabetic() || b == b'_';
    let ok = id.bytes().next().is_some_and(start) && id.bytes().all(|b| start(b) || b.is_ascii_digit());
    if !ok {
        let why = "a valid C identifier must start with alphabetic character or '_', followed by a string of alphanumeric characters or '_' (e.g. 'my_name',  or 'MY_NAME',  or 'MyName', regex used for validation is '[A-Za-z_][A-Za-z0-9_]*')";
        errors.0.push(FieldError::invalid(field.path(), id, why));
    }
}

/// Conditions on devices, as expressions. As `validateCELSelector`. Those that `old` holds are not parsed again.
pub fn selectors(selectors: &Field<'_, '_>, old: Option<&Value>, errors: &mut Errors) {
    Is::AtMost(SELECTORS_MAX).check(selectors, errors);
    if selectors.len() > SELECTORS_MAX || old == Some(selectors.value) {
        return;
    }
    let env = Env::of_devices();
    for selector in selectors.items() {
        let cel = selector.at("cel");
        let expression = cel.at("expression");
        if !cel.is_set() {
            errors.required(&cel, "");
        } else if expression.str().len() > EXPRESSION_MAX_BYTES {
            errors.too_long(&expression, EXPRESSION_MAX_BYTES);
        } else {
            match env.weigh(expression.str()) {
                Err(why) => errors.invalid(&expression, format!("compilation failed: {why}")),
                Ok((Type::Bool | Type::Any, cost)) if cost <= COST_MAX => {}
                Ok((Type::Bool | Type::Any, _)) => errors.forbidden(&expression, "too complex, exceeds cost limit"),
                Ok((kind, _)) => {
                    errors.invalid(&expression, format!("must evaluate to bool or the unknown type, not {kind}"));
                }
            }
        }
    }
}

/// What a driver makes of as it likes: an object of bounded size.
pub fn opaque(config: &Field<'_, '_>, max_bytes: usize, errors: &mut Errors) {
    let opaque = config.at("opaque");
    if opaque.is_set() {
        driver_name(&opaque.at("driver"), errors);
        raw_object(&opaque.at("parameters"), max_bytes, errors);
    } else {
        errors.required(&opaque, "");
    }
}

pub fn raw_object(field: &Field<'_, '_>, max_bytes: usize, errors: &mut Errors) {
    if !field.is_set() {
        errors.required(field, "");
    } else if field.value.to_string().len() > max_bytes {
        errors.too_long(field, max_bytes);
    } else if !field.value.is_object() {
        errors.0.push(FieldError::invalid(field.path(), "<value omitted>", "must be a valid JSON object"));
    }
}

const EFFECTS: [&str; 3] = ["NoExecute", "NoSchedule", "None"];

/// As `validateDeviceTaint`.
pub fn taint(taint: &Field<'_, '_>, errors: &mut Errors) {
    let (key, value) = (taint.at("key"), taint.at("value"));
    errors.all(&key, is_qualified_name(key.str()));
    errors.all(&value, is_label_value(value.str()));
    errors.need_one_of(&taint.at("effect"), &EFFECTS);
}

/// As `validateDeviceToleration`.
pub fn toleration(toleration: &Field<'_, '_>, errors: &mut Errors) {
    let (operator, value, effect) = (toleration.at("operator"), toleration.at("value"), toleration.at("effect"));
    Is::Named(is_qualified_name).check(&toleration.at("key"), errors);
    match operator.str() {
        "Exists" if !value.is_blank() => errors.invalid(&value, "must be empty for operator `Exists`"),
        "Exists" => {}
        "Equal" => errors.all(&value, is_label_value(value.str())),
        "" => errors.required(&operator, ""),
        _ => errors.not_supported(&operator, &["Equal", "Exists"]),
    }
    if !effect.is_blank() {
        errors.one_of(&effect, &EFFECTS);
    }
}

/// Conditions that a device waits for before its pod is bound. As `validateDeviceBindingParameters`.
pub fn binding(device: &Field<'_, '_>, errors: &mut Errors) {
    const CONDITIONS_MAX: usize = 4;
    let (good, bad) = (device.at("bindingConditions"), device.at("bindingFailureConditions"));
    for list in [&good, &bad] {
        if list.len() > CONDITIONS_MAX {
            errors.too_many(list, CONDITIONS_MAX);
        } else {
            list.items().for_each(|name| errors.all(&name, is_qualified_name(name.str())));
        }
        Is::Unique.check(list, errors);
    }
    for name in bad.items().filter(|name| good.items().any(|g| g.str() == name.str())) {
        errors.invalid(&name, "bindingFailureConditions must not overlap with bindingConditions");
    }
    if good.is_empty() != bad.is_empty() {
        let (missing, has) = if good.is_empty() {
            (&good, "bindingConditions are required to use bindingFailureConditions")
        } else {
            (&bad, "bindingFailureConditions are required to use bindingConditions")
        };
        errors.0.push(FieldError::invalid(missing.path(), Value::Null, has));
    }
}
