//! CustomResourceDefinitions: the definition itself. What it defines is served elsewhere.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, list, set, text};
use crate::registry::print::Clock;
use crate::registry::rules::Rules;
use apimachinery::names::{is_dns1035_label, is_dns1123_subdomain};
use serde_json::{Value, json};

pub const RULES: Rules = Rules {
    generation: true,
    status_keeps_metadata: true,
    unconditional_update: false,
    initial_status: Some(initial_status),
    default: defaults,
    validate,
    validate_update: |new, old, errors| {
        let (now, was) = (new.at("spec"), old.at("spec"));
        let established =
            list(old.value, "/status/conditions").iter().any(|c| c["type"] == "Established" && c["status"] == "True");
        if established {
            errors.immutable(&now.at("scope"), &was.at("scope"));
            let (names, before) = (now.at("names"), was.at("names"));
            errors.immutable(&names.at("kind"), &before.at("kind"));
        }
        errors.immutable(&now.at("group"), &was.at("group"));
        let (names, before) = (now.at("names"), was.at("names"));
        errors.immutable(&names.at("plural"), &before.at("plural"));
    },
    row: Some(|object, _: &Clock| {
        vec![Value::from(text(object, "/metadata/name")), Value::from(text(object, "/metadata/creationTimestamp"))]
    }),
    ..Rules::DEFAULT
};

/// The storage version is the first that objects may be stored in.
fn initial_status(object: &Value) -> Value {
    let stored: Vec<Value> = list(object, "/spec/versions")
        .iter()
        .filter(|v| v["storage"] == true)
        .map(|v| Value::from(text(v, "/name")))
        .collect();
    json!({"storedVersions": stored})
}

fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    default(spec, "scope", "Namespaced");
    let names = child(spec, "names");
    let kind = text(names, "/kind").to_owned();
    if !kind.is_empty() {
        default(names, "singular", kind.to_lowercase());
        default(names, "listKind", format!("{kind}List"));
    }
    let conversion = child(spec, "conversion");
    default(conversion, "strategy", "None");
    if let Some(service) = conversion.pointer_mut("/webhook/clientConfig/service")
        && service.get("port").is_none()
    {
        set(service, "port", 443);
    }
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    let (group, names, versions) = (spec.at("group"), spec.at("names"), spec.at("versions"));
    if errors.need(&group) {
        errors.all(&group, is_dns1123_subdomain(group.str()));
        if !group.str().contains('.') {
            errors.invalid(&group, "should be a domain with at least one dot");
        }
    }
    errors.need_one_of(&spec.at("scope"), &["Cluster", "Namespaced"]);
    for required in ["plural", "singular", "kind", "listKind"] {
        let name = names.at(required);
        if errors.need(&name) {
            errors.all(&name, is_dns1035_label(&name.str().to_lowercase()));
        }
    }
    let expected = format!("{}.{}", names.at("plural").str(), group.str());
    let name = meta.at("name");
    if name.str() != expected {
        errors.invalid(&name, "must be spec.names.plural+\".\"+spec.group");
    }
    let mut seen = std::collections::HashSet::new();
    for version in versions.items() {
        let name = version.at("name");
        if !seen.insert(version.value["name"].as_str()) {
            errors.invalid(&versions, "must contain unique version names");
        }
        errors.all(&name, is_dns1035_label(name.str()));
        let schema = version.at("schema").at("openAPIV3Schema").is_set();
        if !schema {
            let schema = version.at("schema");
            errors.required(&schema.at("openAPIV3Schema"), "schemas are required");
        }
    }
    if versions.items().filter(|v| v.at("storage").bool()).count() != 1 {
        errors.invalid(&versions, "must have exactly one version marked as storage version");
    }
    errors.one_of(&spec.at("conversion").at("strategy"), &["None", "Webhook"]);
}
