//! Rules of `metadata` that hold for every kind: names, labels, annotations, owners, finalizers, and what an update
//! must leave alone. As `ValidateObjectMeta` and `ValidateObjectMetaUpdate`.

use super::field::{Errors, Field};
use apimachinery::names::{is_dns1123_label, is_label_value, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::Value;
use std::collections::BTreeSet;

/// Keys and values of all annotations together.
pub const ANNOTATIONS_MAX_BYTES: usize = 256 * 1024;

/// What is wrong with a name; an empty list says that it may be used.
pub type NameRule = fn(&str) -> Vec<String>;

/// Of a new object; [`validate_content`] holds as well.
pub fn validate_identity(meta: &Field<'_, '_>, namespaced: bool, name_rule: NameRule, errors: &mut Errors) {
    let generate_name = meta.at("generateName");
    if !generate_name.is_blank() {
        // The suffix will stand in the place of a trailing dash.
        let stem = generate_name.str();
        let cut = stem.strip_suffix('-').filter(|stem| !stem.is_empty());
        let probe = cut.map_or_else(|| stem.to_owned(), |s| format!("{s}a"));
        errors.all(&generate_name, name_rule(&probe));
    }
    let name = meta.at("name");
    if name.is_blank() {
        errors.required(&name, "name or generateName is required");
    } else {
        errors.all(&name, name_rule(name.str()));
    }
    let namespace = meta.at("namespace");
    if namespaced {
        if namespace.is_blank() {
            errors.required(&namespace, "");
        } else {
            errors.all(&namespace, is_dns1123_label(namespace.str()));
        }
    } else if !namespace.is_blank() {
        errors.forbidden(&namespace, "not allowed on this type");
    }
}

/// What of metadata has rules whether it is new or not.
pub fn validate_content(meta: &Field<'_, '_>, errors: &mut Errors) {
    errors.not_negative(&meta.at("generation"));
    labels(&meta.at("labels"), errors);
    annotations(&meta.at("annotations"), errors);
    owner_references(&meta.at("ownerReferences"), errors);
    finalizers(&meta.at("finalizers"), errors);
}

/// Of a template of a claim. As `ValidateTemplateObjectMeta`.
pub fn template(meta: &Field<'_, '_>, errors: &mut Errors) {
    annotations(&meta.at("annotations"), errors);
    labels(&meta.at("labels"), errors);
    for (name, field) in meta.entries().filter(|(name, _)| !matches!(*name, "annotations" | "labels")) {
        let unset = field.value.is_null() || (name == "creationTimestamp" && field.is_blank());
        if !unset {
            errors.forbidden(&meta.at(name), "cannot be set");
        }
    }
}

/// As `ValidateLabels`.
pub fn labels(labels: &Field<'_, '_>, errors: &mut Errors) {
    for (key, value) in labels.entries() {
        for message in is_qualified_name(key) {
            errors.0.push(FieldError::invalid(labels.path(), key, message));
        }
        for message in is_label_value(value.str()) {
            errors.0.push(FieldError::invalid(labels.path(), value.str(), message));
        }
    }
}

/// As `ValidateAnnotations`: keys are qualified names in any case, and the whole is bounded.
pub fn annotations(annotations: &Field<'_, '_>, errors: &mut Errors) {
    let mut bytes = 0;
    for (key, value) in annotations.entries() {
        bytes += key.len() + value.str().len();
        for message in is_qualified_name(&key.to_lowercase()) {
            errors.0.push(FieldError::invalid(annotations.path(), key, message));
        }
    }
    if bytes > ANNOTATIONS_MAX_BYTES {
        errors.too_long(annotations, ANNOTATIONS_MAX_BYTES);
    }
}

fn owner_references(owners: &Field<'_, '_>, errors: &mut Errors) {
    let mut controllers: Vec<&str> = Vec::new();
    for owner in owners.items() {
        for required in ["apiVersion", "kind", "name", "uid"] {
            let field = owner.at(required);
            if field.is_blank() {
                let detail = match required {
                    "apiVersion" => "version must not be empty",
                    "kind" => "kind must not be empty",
                    "name" => "name must not be empty",
                    _ => "uid must not be empty",
                };
                errors.invalid(&field, detail);
            }
        }
        if owner.at("kind").str() == "Event" && owner.at("apiVersion").str() == "v1" {
            errors.invalid(&owner, "/v1, Kind=Event is disallowed from being an owner");
        }
        if owner.at("controller").bool() {
            controllers.push(owner.at("name").str());
        }
    }
    if let [first, second, ..] = controllers.as_slice() {
        errors.invalid(
            owners,
            format!(
                "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {second}"
            ),
        );
    }
}

fn finalizers(finalizers: &Field<'_, '_>, errors: &mut Errors) {
    // Names with a dot stand on their own in some groups: `customresourcecleanup.apiextensions.k8s.io`.
    let mut propagation = Vec::new();
    for finalizer in finalizers.items() {
        let name = finalizer.str();
        for message in is_qualified_name(name) {
            errors.0.push(FieldError::invalid(finalizers.path(), name, message));
        }
        if matches!(name, "orphan" | "foregroundDeletion") {
            propagation.push(name);
        } else if !name.contains(['/', '.']) && name != "kubernetes" && is_qualified_name(name).is_empty() {
            errors.0.push(FieldError::invalid(
                finalizer.path(),
                name,
                "name is neither a standard finalizer name nor is it fully qualified",
            ));
        }
    }
    if propagation.contains(&"orphan") && propagation.contains(&"foregroundDeletion") {
        errors.invalid(finalizers, "finalizer orphan and foregroundDeletion cannot be both set");
    }
}

/// What an update must leave as it was.
pub fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let finalizers = |meta: &Field<'_, '_>| -> BTreeSet<String> {
        meta.at("finalizers").items().map(|finalizer| finalizer.str().to_owned()).collect()
    };
    let had = finalizers(old);
    let added: Vec<String> = finalizers(new).difference(&had).map(|name| format!("{name:?}")).collect();
    if old.at("deletionTimestamp").is_set() && !added.is_empty() {
        let why = "no new finalizers can be added if the object is being deleted, found new finalizers";
        errors.forbidden(&new.at("finalizers"), format!("{why} []string{{{}}}", added.join(", ")));
    }
    if new.at("resourceVersion").is_blank() {
        errors.invalid(&new.at("resourceVersion"), "must be specified for an update");
    }
    let generation = |meta: &Field<'_, '_>| meta.at("generation").int().unwrap_or(0);
    if generation(new) < generation(old) {
        errors.invalid(&new.at("generation"), "must not be decremented");
    }
    for fixed in ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        let (now, was) = (new.at(fixed), old.at(fixed));
        if now.value != was.value && !(now.is_blank() && was.is_blank() && now.int() == was.int()) {
            errors.invalid(&now, "field is immutable");
        }
    }
}

/// Name rule of kinds whose names may be anything that fits in a path.
pub fn path_segment(name: &str) -> Vec<String> {
    apimachinery::names::is_path_segment(name)
}

pub fn subdomain(name: &str) -> Vec<String> {
    apimachinery::names::is_dns1123_subdomain(name)
}

pub fn label(name: &str) -> Vec<String> {
    is_dns1123_label(name)
}

pub fn dns1035_label(name: &str) -> Vec<String> {
    apimachinery::names::is_dns1035_label(name)
}

/// As `ValidateLabelSelector`.
pub fn label_selector(selector: &Field<'_, '_>, errors: &mut Errors) {
    labels(&selector.at("matchLabels"), errors);
    for requirement in selector.at("matchExpressions").items() {
        self::requirement(&requirement, &[], LabelValues::Checked, errors);
    }
}

/// Wrong label values in a selector are an error, or go through since they select nothing.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum LabelValues {
    Checked,
    Any,
}

/// One requirement of a selector, of labels or (with `comparing` operators) of nodes. As `ValidateLabelSelectorRequirement`
/// and `ValidateNodeSelectorRequirement`.
pub fn requirement(requirement: &Field<'_, '_>, comparing: &[&str], label_values: LabelValues, errors: &mut Errors) {
    let (known, values) = (operator(requirement, errors), requirement.at("values"));
    let operator = requirement.at("operator");
    if comparing.contains(&operator.str()) {
        if values.len() != 1 {
            errors.required(&values, "must be specified single value when `operator` is 'Lt' or 'Gt'");
        }
    } else if !known {
        errors.invalid(&operator, "not a valid selector operator");
    }
    key_and_values(requirement, label_values, errors);
}

/// Values go with the operators that take some. True for an operator that all selectors have.
pub fn operator(requirement: &Field<'_, '_>, errors: &mut Errors) -> bool {
    let (operator, values) = (requirement.at("operator"), requirement.at("values"));
    match operator.str() {
        "In" | "NotIn" if values.is_empty() => {
            errors.required(&values, "must be specified when `operator` is 'In' or 'NotIn'");
        }
        "Exists" | "DoesNotExist" if !values.is_empty() => {
            errors.forbidden(&values, "may not be specified when `operator` is 'Exists' or 'DoesNotExist'");
        }
        other => return matches!(other, "In" | "NotIn" | "Exists" | "DoesNotExist"),
    }
    true
}

/// The key of a requirement on a label, and its values.
pub fn key_and_values(requirement: &Field<'_, '_>, label_values: LabelValues, errors: &mut Errors) {
    let (key, values) = (requirement.at("key"), requirement.at("values"));
    errors.all(&key, is_qualified_name(key.str()));
    if label_values == LabelValues::Checked {
        for value in values.items() {
            errors.all(&value, is_label_value(value.str()));
        }
    }
}

/// True for a selector that selects everything.
pub fn selector_is_empty(selector: &Value) -> bool {
    let none = |field: &str| match selector.get(field) {
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        _ => true,
    };
    none("matchLabels") && none("matchExpressions")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn found(meta: Value) -> Vec<String> {
        let object = json!({ "metadata": meta });
        let mut errors = Errors::default();
        validate_identity(&Field::root(&object).at("metadata"), true, subdomain, &mut errors);
        validate_content(&Field::root(&object).at("metadata"), &mut errors);
        errors.0.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn metadata_is_checked_for_every_kind() {
        assert_eq!(
            found(json!({"name": "a", "namespace": "b", "labels": {"x/y": "z"}, "finalizers": ["a.b/c"]})),
            Vec::<String>::new()
        );
        assert_eq!(
            found(json!({"namespace": "b"})),
            ["metadata.name: Required value: name or generateName is required"]
        );
        let cases = [
            (
                json!({"name": "A", "namespace": "b"}),
                r#"metadata.name: Invalid value: "A": a lowercase RFC 1123 subdomain"#,
            ),
            (json!({"name": "a"}), "metadata.namespace: Required value"),
            (
                json!({"name": "a", "namespace": "b", "labels": {"a": "b c"}}),
                r#"metadata.labels: Invalid value: "b c": a valid label must be"#,
            ),
            (
                json!({"name": "a", "namespace": "b", "finalizers": ["mine"]}),
                r#"metadata.finalizers[0]: Invalid value: "mine": name is neither"#,
            ),
            (
                json!({"name": "a", "namespace": "b", "ownerReferences": [{"apiVersion": "v1", "kind": "Pod", "name": "x"}]}),
                r#"metadata.ownerReferences[0].uid: Invalid value: "": uid must not be empty"#,
            ),
            (
                json!({"name": "a", "namespace": "b", "annotations": {"a": "x".repeat(300_000)}}),
                "metadata.annotations: Too long: may not be more than 262144 bytes",
            ),
        ];
        for (meta, start) in cases {
            let errors = found(meta);
            assert!(errors.len() == 1 && errors[0].starts_with(start), "{errors:?}");
        }
    }

    #[test]
    fn an_update_leaves_the_identity_alone() {
        let old = json!({"name": "a", "uid": "1", "resourceVersion": "5", "deletionTimestamp": "2024-01-01T00:00:00Z"});
        let mut new = old.clone();
        new["uid"] = json!("2");
        new["finalizers"] = json!(["a.b/c"]);
        let mut errors = Errors::default();
        validate_update(&Field::root(&new), &Field::root(&old), &mut errors);
        assert_eq!(errors.0.len(), 2);
        assert_eq!(errors.0[1].to_string(), r#"uid: Invalid value: "2": field is immutable"#);
    }
}
