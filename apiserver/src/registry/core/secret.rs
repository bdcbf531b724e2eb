//! Secrets: `stringData` is folded into `data`, and each type has the keys that it needs.

use super::config_key;
use super::config_map::{DATA_MAX_BYTES, decoded_len, immutable};
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, map, remove, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::status::FieldError;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde_json::Value;

pub const RULES: Rules = Rules {
    default: defaults,
    validate,
    validate_update,
    warnings: |new, _| tls_warning(new).into_iter().collect(),
    selectable_names: &["type"],
    selectable: |object| vec![("type", text(object, "/type").to_owned())],
    row: Some(row),
    ..Rules::DEFAULT
};

fn defaults(object: &mut Value) {
    default(object, "type", "Opaque");
    if let Some(Value::Object(plain)) = remove(object, "stringData") {
        let data = child(object, "data");
        for (key, value) in plain {
            set(data, &key, STANDARD.encode(value.as_str().unwrap_or("")));
        }
    }
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let data = root.at("data");
    let mut bytes = 0;
    for (key, value) in data.entries() {
        errors.0.extend(config_key(key).into_iter().map(|m| FieldError::invalid(value.path(), key, m)));
        bytes += decoded_len(value.str());
    }
    if bytes > DATA_MAX_BYTES {
        errors.too_long(&data, DATA_MAX_BYTES);
    }
    match root.at("type").str() {
        "kubernetes.io/service-account-token" => {
            let meta = root.at("metadata");
            let annotations = meta.at("annotations");
            let account = annotations.key("kubernetes.io/service-account.name");
            if account.is_blank() {
                errors.required(&account, "");
            }
        }
        "kubernetes.io/dockercfg" => json_key(&data, ".dockercfg", errors),
        "kubernetes.io/dockerconfigjson" => json_key(&data, ".dockerconfigjson", errors),
        "kubernetes.io/basic-auth" => {
            let (user, password) = (data.key("username"), data.key("password"));
            if !user.is_set() && !password.is_set() {
                errors.required(&user, "");
                errors.required(&password, "");
            }
        }
        "kubernetes.io/ssh-auth" => {
            let key = data.key("ssh-privatekey");
            if key.is_blank() {
                errors.required(&key, "");
            }
        }
        "kubernetes.io/tls" => {
            for key in ["tls.crt", "tls.key"] {
                let key = data.key(key);
                if !key.is_set() {
                    errors.required(&key, "");
                }
            }
        }
        _ => {}
    }
}

fn json_key(data: &Field<'_, '_>, key: &str, errors: &mut Errors) {
    let field = data.key(key);
    if !field.is_set() {
        errors.required(&field, "");
        return;
    }
    let valid = STANDARD
        .decode(field.str())
        .ok()
        .is_some_and(|bytes| serde_json::from_slice::<serde_json::Map<String, Value>>(&bytes).is_ok());
    if !valid {
        errors.0.push(FieldError::invalid(field.path(), "<secret contents redacted>", "must be valid json"));
    }
}

/// A certificate or key that nobody will be able to read. As `warningsForSecret`.
fn tls_warning(secret: &Value) -> Option<String> {
    if text(secret, "/type") != "kubernetes.io/tls" {
        return None;
    }
    let lacks_pem = |key: &str| {
        let bytes = STANDARD.decode(secret.get("data").and_then(|d| d.get(key)?.as_str()).unwrap_or(""));
        !bytes.is_ok_and(|bytes| bytes.windows(11).any(|window| window == b"-----BEGIN "))
    };
    let what = if lacks_pem("tls.crt") {
        "certificate"
    } else if lacks_pem("tls.key") {
        "key"
    } else {
        return None;
    };
    Some(format!("tls: failed to find any PEM data in {what} input"))
}

fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    errors.immutable(&new.at("type"), &old.at("type"));
    immutable(new, old, &["data"], errors);
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let count = map(object, "/data").map_or(0, serde_json::Map::len);
    vec![print::name(object), Value::from(text(object, "/type")), Value::from(count), clock.age(object)]
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn plain_text_is_folded_into_data() {
        let mut secret = json!({"stringData": {"a": "b"}, "data": {"c": "ZA=="}});
        defaults(&mut secret);
        assert_eq!(secret, json!({"type": "Opaque", "data": {"a": "Yg==", "c": "ZA=="}}));
    }

    #[test]
    fn types_have_keys_and_immutable_means_it() {
        let found = |new: &Value, old: Option<&Value>| {
            let mut errors = Errors::default();
            validate(&Field::root(new), &mut errors);
            if let Some(old) = old {
                validate_update(&Field::root(new), &Field::root(old), &mut errors);
            }
            errors.0.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let tls = json!({"type": "kubernetes.io/tls", "data": {"tls.crt": ""}});
        assert_eq!(found(&tls, None), ["data[tls.key]: Required value"]);
        let old = json!({"type": "Opaque", "immutable": true, "data": {"a": "Yg=="}});
        let new = json!({"type": "Opaque", "immutable": true, "data": {"a": "ZA=="}});
        assert_eq!(found(&new, Some(&old)), ["data: Forbidden: field is immutable when `immutable` is set"]);
        let retyped = json!({"type": "x", "immutable": true, "data": {"a": "Yg=="}});
        assert_eq!(found(&retyped, Some(&old)), ["type: Invalid value: \"x\": field is immutable"]);
    }
}
