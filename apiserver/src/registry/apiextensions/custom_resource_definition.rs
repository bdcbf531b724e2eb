//! CustomResourceDefinitions: the definition itself. What it defines is served elsewhere.

use super::{schema, structural};
use crate::registry::admissionregistration::webhook::review_versions;
use crate::registry::admissionregistration::webhook_client;
use crate::registry::checks::{fixed, joined, kind_name};
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, flag, list, set, text};
use crate::registry::print::Clock;
use crate::registry::rules::Rules;
use apimachinery::names::{is_dns1035_label, is_dns1123_subdomain};
use apimachinery::status::FieldError;
use serde_json::{Value, json};
use std::collections::{HashMap, HashSet};

const APPROVAL: &str = "api-approved.kubernetes.io";
const SELECTABLE_MAX: usize = 8;
const WARNING_MAX: usize = 256;
const COLUMN_TYPES: &str = "boolean,date,integer,number,string";
const COLUMN_FORMATS: &str = "binary,byte,date,date-time,double,float,int32,int64,password";

pub const RULES: Rules = Rules {
    generation: true,
    status_keeps_metadata: true,
    unconditional_update: false,
    initial_status: Some(|object| {
        let mut status = json!({"acceptedNames": {"kind": "", "plural": ""}, "storedVersions": []});
        note_stored_versions(&mut status, object);
        status
    }),
    default: defaults,
    prepare_update: |new, _| {
        let object = new.clone();
        note_stored_versions(child(new, "status"), &object);
    },
    validate_create: |root, errors| {
        validate(root, None, errors);
        approval(root, None, errors);
        preserves_nothing(root, None, errors);
    },
    validate_update,
    validate_status: |new, _, errors| {
        let status = new.at("status");
        names(&status.at("acceptedNames"), errors);
        stored_versions(new, errors);
    },
    row: Some(|object, _: &Clock| {
        vec![Value::from(text(object, "/metadata/name")), Value::from(text(object, "/metadata/creationTimestamp"))]
    }),
    ..Rules::DEFAULT
};

/// A version once stored is remembered: there may be objects of it.
fn note_stored_versions(status: &mut Value, object: &Value) {
    let mut stored = list(status, "/storedVersions").to_vec();
    for version in list(object, "/spec/versions").iter().filter(|v| v["storage"] == true) {
        let name = Value::from(text(version, "/name"));
        if !stored.contains(&name) {
            stored.push(name);
        }
    }
    set(status, "storedVersions", stored);
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

fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    validate(new, Some(old), errors);
    approval(new, Some(old), errors);
    let established =
        list(old.value, "/status/conditions").iter().any(|c| c["type"] == "Established" && c["status"] == "True");
    if established {
        fixed(new, old, &["spec.scope", "spec.names.kind"], errors);
    }
    fixed(new, old, &["spec.group", "spec.names.plural"], errors);
    preserves_nothing(new, Some(old), errors);
    stored_versions(new, errors);
}

/// As `validatePreserveUnknownFields`.
fn preserves_nothing(root: &Field<'_, '_>, old: Option<&Field<'_, '_>>, errors: &mut Errors) {
    let spec = root.at("spec");
    let field = spec.at("preserveUnknownFields");
    if field.bool() && !old.is_some_and(|old| flag(old.value, "/spec/preserveUnknownFields")) {
        let instead = "set x-kubernetes-preserve-unknown-fields to true in spec.versions[*].schema instead";
        errors.invalid(&field, format!("cannot set to true, {instead}"));
    }
}

/// As `validateCustomResourceDefinitionSpec`.
fn validate(root: &Field<'_, '_>, old: Option<&Field<'_, '_>>, errors: &mut Errors) {
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    let (group, wanted, versions) = (spec.at("group"), spec.at("names"), spec.at("versions"));
    if old.is_none() && meta.at("name").str() != format!("{}.{}", wanted.at("plural").str(), group.str()) {
        errors.invalid(&meta.at("name"), "must be spec.names.plural+\".\"+spec.group");
    }
    if errors.need(&group) {
        if !is_dns1123_subdomain(group.str()).is_empty() {
            joined(&group, is_dns1123_subdomain, errors);
        } else if !group.str().contains('.') {
            errors.invalid(&group, "should be a domain with at least one dot");
        }
    }
    errors.need_one_of(&spec.at("scope"), &["Cluster", "Namespaced"]);
    let mut known = HashSet::new();
    if let Some(old) = old {
        schema::expressions(&old.value["spec"]["versions"], &mut known);
    }
    self::versions(&spec, &versions, &known, errors);
    for required in ["plural", "singular", "kind", "listKind"] {
        errors.need(&wanted.at(required));
    }
    names(&wanted, errors);
    conversion(&spec.at("conversion"), errors);
}

/// What all versions have alike is held against the rules once, and errors name it as a field of the spec.
fn versions(spec: &Field<'_, '_>, versions: &Field<'_, '_>, known: &HashSet<String>, errors: &mut Errors) {
    let shared = |field: &str| {
        let mut all = versions.items().map(|v| v.value.get(field));
        let first = all.next().flatten()?;
        all.all(|other| other == Some(first)).then_some(first)
    };
    let (one_schema, one_sub, one_columns) =
        (shared("schema"), shared("subresources"), shared("additionalPrinterColumns"));
    let mut seen: HashMap<&str, usize> = HashMap::new();
    for version in versions.items() {
        let name = version.at("name");
        *seen.entry(version.value.get("name").and_then(Value::as_str).unwrap_or("")).or_default() += 1;
        if !version.at("schema").at("openAPIV3Schema").is_set() {
            let schema = version.at("schema");
            errors.required(&schema.at("openAPIV3Schema"), "schemas are required");
        }
        joined(&name, is_dns1035_label, errors);
        deprecation(&version, errors);
        let (schema, sub) = (version.at("schema"), version.at("subresources"));
        if one_schema.is_none() {
            schema::validate(&schema, sub.at("status").is_set(), known, errors);
        }
        if one_sub.is_none() {
            subresources(&sub, errors);
        }
        if one_columns.is_none() {
            version.at("additionalPrinterColumns").items().for_each(|c| column(&c, errors));
        }
        selectable(&version, errors);
    }
    if let Some(schema) = one_schema {
        let status = versions.items().any(|v| v.at("subresources").at("status").is_set());
        schema::validate(&spec.at("validation").with(schema), status, known, errors);
    }
    if let Some(sub) = one_sub {
        subresources(&spec.at("subresources").with(sub), errors);
    }
    if let Some(columns) = one_columns {
        spec.at("additionalPrinterColumns").with(columns).items().for_each(|c| column(&c, errors));
    }
    if seen.values().any(|count| *count > 1) {
        errors.invalid(versions, "must contain unique version names");
    }
    if versions.items().filter(|v| v.at("storage").bool()).count() != 1 {
        errors.invalid(versions, "must have exactly one version marked as storage version");
    }
}

fn deprecation(version: &Field<'_, '_>, errors: &mut Errors) {
    let warning = version.at("deprecationWarning");
    if !warning.is_set() {
        return;
    }
    if !version.at("deprecated").bool() {
        errors.invalid(&warning, "can only be set for deprecated versions");
        return;
    }
    if warning.str().len() > WARNING_MAX {
        errors.invalid(&warning, format!("must be <= {WARNING_MAX} characters long"));
    }
    if warning.is_blank() {
        errors.invalid(&warning, "must not be an empty string");
    }
    if let Some((at, _)) = warning.str().char_indices().find(|(_, c)| c.is_control()) {
        let why = "must only contain printable UTF-8 characters; non-printable character found at index";
        errors.invalid(&warning, format!("{why} {at}"));
    }
}

/// As `ValidateCustomResourceDefinitionNames`, of a spec or a status.
fn names(names: &Field<'_, '_>, errors: &mut Errors) {
    for name in ["plural", "singular"] {
        let field = names.at(name);
        if !field.is_blank() {
            joined(&field, is_dns1035_label, errors);
        }
    }
    for name in ["kind", "listKind"] {
        let field = names.at(name);
        if !field.is_blank() {
            kind_name(&field, errors);
        }
    }
    let (kind, list_kind) = (names.at("kind"), names.at("listKind"));
    if !kind.is_blank() && kind.str() == list_kind.str() {
        errors.invalid(&list_kind, "kind and listKind may not be the same");
    }
    for lists in ["shortNames", "categories"] {
        names.at(lists).items().for_each(|name| joined(&name, is_dns1035_label, errors));
    }
}

/// A path such as `.spec.replicas`. As `validateSimpleJSONPath`.
fn simple_path(path: &Field<'_, '_>, text: &str, errors: &mut Errors) -> bool {
    if !text.starts_with('.') {
        errors.0.push(FieldError::invalid(path.path(), text, "must be a simple json path starting with ."));
    }
    text.starts_with('.')
}

fn column(column: &Field<'_, '_>, errors: &mut Errors) {
    errors.need(&column.at("name"));
    let (kind, format, path) = (column.at("type"), column.at("format"), column.at("jsonPath"));
    if kind.is_blank() {
        errors.required(&kind, &format!("must be one of {COLUMN_TYPES}"));
    } else if !COLUMN_TYPES.split(',').any(|t| t == kind.str()) {
        errors.invalid(&kind, format!("must be one of {COLUMN_TYPES}"));
    }
    if !format.is_blank() && !COLUMN_FORMATS.split(',').any(|f| f == format.str()) {
        errors.invalid(&format, format!("must be one of {COLUMN_FORMATS}"));
    }
    // Errors name the field as it was once.
    let shown = column.at("JSONPath");
    if path.is_blank() {
        errors.required(&shown, "");
    } else {
        simple_path(&shown, path.str(), errors);
    }
}

fn subresources(subresources: &Field<'_, '_>, errors: &mut Errors) {
    let scale = subresources.at("scale");
    if !scale.is_set() {
        return;
    }
    for (name, under) in [
        ("specReplicasPath", &[".spec."][..]),
        ("statusReplicasPath", &[".status."]),
        ("labelSelectorPath", &[".spec.", ".status."]),
    ] {
        let path = scale.at(name);
        if path.is_blank() {
            if name != "labelSelectorPath" {
                errors.required(&path, "");
            }
        } else if simple_path(&path, path.str(), errors) && !under.iter().any(|u| path.str().starts_with(u)) {
            let under = if let [one] = under { one.trim_matches('.') } else { "" };
            let why = if under.is_empty() { "either .spec or .status".to_owned() } else { format!(".{under}") };
            errors.invalid(&path, format!("should be a json path under {why}"));
        }
    }
}

/// Fields that a field selector may name.
fn selectable(version: &Field<'_, '_>, errors: &mut Errors) {
    let fields = version.at("selectableFields");
    let schema = version.value.pointer("/schema/openAPIV3Schema").unwrap_or(&Value::Null);
    let mut seen = HashSet::new();
    for field in fields.items() {
        let path = field.at("jsonPath");
        if !errors.need(&path) {
            continue;
        }
        let Some(found) = structural::at_path(schema, path.str()) else {
            errors.invalid(&path, "is an invalid path: does not refer to a valid field");
            continue;
        };
        if path.str().starts_with(".metadata") {
            errors.invalid(&path, "must not point to fields in metadata");
        }
        if !structural::is_selectable(found) {
            errors.invalid(&path, "must point to a field of type string, boolean or integer. Enum string fields and strings with formats are allowed.");
        }
        if !seen.insert(path.str().to_owned()) {
            errors.duplicate(&path);
        }
    }
    if seen.len() > SELECTABLE_MAX {
        errors.too_many(&fields, SELECTABLE_MAX);
    }
}

/// As `validateCustomResourceConversion`: errors name the fields as they were once.
fn conversion(conversion: &Field<'_, '_>, errors: &mut Errors) {
    let strategy = conversion.at("strategy");
    errors.need_one_of(&strategy, &["None", "Webhook"]);
    let webhook = conversion.at("webhook");
    let (client, versions) = (webhook.at("clientConfig"), webhook.at("conversionReviewVersions"));
    let (client_shown, versions_shown) =
        (conversion.at("webhookClientConfig"), conversion.at("conversionReviewVersions"));
    if strategy.str() != "Webhook" {
        if client.is_set() {
            errors.forbidden(&client_shown, "should not be set when strategy is not set to Webhook");
        }
        if !versions.is_empty() {
            errors.forbidden(&versions_shown, "should not be set when strategy is not set to Webhook");
        }
        return;
    }
    if client.is_set() {
        webhook_client(&client_shown.with(client.value), errors);
    } else {
        errors.required(&client_shown, "required when strategy is set to Webhook");
    }
    if versions.is_empty() {
        errors.required(&versions_shown, "");
    } else {
        review_versions(&versions_shown.with(versions.value), errors);
    }
}

/// As `ValidateCustomResourceDefinitionStoredVersions`.
fn stored_versions(root: &Field<'_, '_>, errors: &mut Errors) {
    let status = root.at("status");
    let stored = status.at("storedVersions");
    if stored.is_empty() {
        errors.invalid(&stored, "must have at least one stored version");
        return;
    }
    let versions = list(root.value, "/spec/versions");
    let is_stored = |name: &str| stored.items().any(|v| v.str() == name);
    for version in versions.iter().filter(|v| v["storage"] == true && !is_stored(text(v, "/name"))) {
        errors.invalid(&stored, format!("must have the storage version {}", text(version, "/name")));
    }
    for gone in stored.items().filter(|name| !versions.iter().any(|v| v["name"] == *name.value)) {
        let name = gone.str();
        errors.invalid(
            &gone,
            format!(
                "missing from spec.versions; {name} was previously a storage version, and must remain in spec.versions until a storage migration ensures no data remains persisted in {name} and removes {name} from status.storedVersions"
            ),
        );
    }
}

#[derive(PartialEq, Eq)]
enum Approval {
    Given,
    Missing,
    Wrong,
}

/// Groups of the Kubernetes project need its approval. As `validateAPIApproval`.
fn approval(root: &Field<'_, '_>, old: Option<&Field<'_, '_>>, errors: &mut Errors) {
    let group = text(root.value, "/spec/group");
    if !["k8s.io", "kubernetes.io"].iter().any(|own| group == *own || group.ends_with(&format!(".{own}"))) {
        return;
    }
    let state = |object: &Value| {
        let annotations = object.pointer("/metadata/annotations");
        let annotation = annotations.and_then(|a| a.get(APPROVAL)).and_then(Value::as_str).unwrap_or("");
        let is_url = annotation.parse::<http::Uri>().is_ok_and(|u| u.host().is_some() && u.scheme().is_some());
        match annotation {
            "" => Approval::Missing,
            _ if annotation.starts_with("unapproved") || is_url => Approval::Given,
            _ => Approval::Wrong,
        }
    };
    let now = state(root.value);
    if old.is_some_and(|old| state(old.value) == now) {
        return;
    }
    let meta = root.at("metadata");
    let annotations = meta.at("annotations");
    let field = annotations.key(APPROVAL);
    let why = format!("protected groups must have approval annotation {APPROVAL:?}");
    let see = "see https://github.com/kubernetes/enhancements/pull/1111";
    match now {
        Approval::Given => {}
        Approval::Missing => errors.required(&field, &format!("{why}, {see}")),
        Approval::Wrong => {
            errors.invalid(&field, format!("{why} with either a URL or a reason starting with \"unapproved\", {see}"));
        }
    }
}
