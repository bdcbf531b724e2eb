//! PersistentVolumeClaims.

use super::{pod_warnings, resources};
use crate::registry::checks::Is;
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{child, copy_field, default, differences, list, remove, semantically_equal, set, text};
use crate::registry::print::{self, Clock, UNSET};
use crate::registry::rules::Rules;
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain, is_qualified_name};
use apimachinery::quantity::Quantity;
use serde_json::{Value, json};

const ACCESS_MODES: [&str; 4] = ["ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod"];
/// How classes were named before there was a field for them.
pub const CLASS_ANNOTATION: &str = "volume.beta.kubernetes.io/storage-class";
const RESIZE_STATUSES: [&str; 5] = [
    "ControllerResizeInProgress",
    "ControllerResizeInfeasible",
    "NodeResizeInProgress",
    "NodeResizeInfeasible",
    "NodeResizePending",
];

pub const RULES: Rules = Rules {
    initial_status: Some(|_| json!({"phase": "Pending"})),
    default: |object| {
        default(child(object, "status"), "phase", "Pending");
        let spec = child(object, "spec");
        default(spec, "volumeMode", "Filesystem");
        if let Some(reference) = spec.get_mut("dataSourceRef") {
            // Across namespaces is a feature that is off.
            remove(reference, "namespace");
        }
    },
    prepare_create: |object| data_sources(child(object, "spec"), None),
    prepare_update: |new, old| data_sources(child(new, "spec"), Some(old)),
    validate: |root, errors| spec(&root.at("spec"), errors),
    validate_update,
    validate_status,
    warnings: |new, old| {
        let root = Field::root(new);
        let mut warnings = class_annotation(&root);
        if old.is_none() {
            let spec = root.at("spec");
            let resources = spec.at("resources");
            pod_warnings::fractional(&resources.at("requests"), &["storage"], &mut warnings);
        }
        warnings
    },
    row: Some(row),
    ..Rules::DEFAULT
};

/// What names a class in the way of before. For PersistentVolumes too.
pub fn class_annotation(root: &Field<'_, '_>) -> Vec<String> {
    let meta = root.at("metadata");
    let used = meta.at("annotations").key(CLASS_ANNOTATION).is_set();
    let what = "deprecated since v1.8; use \"storageClassName\" attribute instead";
    if used { vec![format!("metadata.annotations[{CLASS_ANNOTATION}]: {what}")] } else { Vec::new() }
}

/// Two fields that say the same: one follows the other. As `EnforceDataSourceBackwardsCompatibility` and
/// `NormalizeDataSources`.
fn data_sources(spec: &mut Value, old: Option<&Value>) {
    let old_source = old.and_then(|old| old.pointer("/spec/dataSource")).filter(|source| !source.is_null());
    let known = spec.get("dataSource").is_some_and(|source| {
        matches!(
            (text(source, "/apiGroup"), text(source, "/kind")),
            ("", "PersistentVolumeClaim") | ("snapshot.storage.k8s.io", "VolumeSnapshot")
        )
    });
    if !known && old_source.is_none() {
        remove(spec, "dataSource");
    }
    match (spec.get("dataSource").cloned(), spec.get("dataSourceRef").cloned()) {
        (Some(source), None) => set(spec, "dataSourceRef", source),
        (None, Some(reference)) if text(&reference, "/namespace").is_empty() => set(spec, "dataSource", reference),
        _ => {}
    }
}

/// In a volume of a pod: `{metadata, spec}`. As `ValidatePersistentVolumeClaimTemplate`.
pub fn template(template: &Field<'_, '_>, errors: &mut Errors) {
    metadata::template(&template.at("metadata"), errors);
    spec(&template.at("spec"), errors);
}

/// As `ValidatePersistentVolumeClaimSpec`.
pub fn spec(spec: &Field<'_, '_>, errors: &mut Errors) {
    if spec.at("accessModes").is_empty() {
        errors.required(&spec.at("accessModes"), "at least 1 access mode is required");
    }
    metadata::label_selector(&spec.at("selector"), errors);
    access_modes(&spec.at("accessModes"), errors);
    let resources = spec.at("resources");
    // Kubernetes leaves out that it is a request.
    let storage = resources.key("storage").with(resources.at("requests").key("storage").value);
    if !storage.is_set() {
        errors.required(&storage, "");
    } else if Quantity::parse(storage.str()).is_ok_and(|q| q <= Quantity::ZERO) {
        errors.invalid(&storage, "must be greater than zero");
    }
    errors.named(&spec.at("storageClassName"), is_dns1123_subdomain);
    Is::OneOf(&["Block", "Filesystem"]).check(&spec.at("volumeMode"), errors);
    let (source, reference) = (spec.at("dataSource"), spec.at("dataSourceRef"));
    for field in [&source, &reference] {
        if field.is_set() {
            data_source(field, errors);
        }
    }
    if source.is_set() && reference.is_set() {
        let part = |field: &Field<'_, '_>, name: &str| field.at(name).str().to_owned();
        if ["apiGroup", "kind", "name"].iter().any(|name| part(&source, name) != part(&reference, name)) {
            errors.invalid_as(spec, source.path(), "must match dataSourceRef");
        }
    }
    errors.named(&spec.at("volumeAttributesClassName"), is_dns1123_subdomain);
}

fn data_source(source: &Field<'_, '_>, errors: &mut Errors) {
    errors.need(&source.at("name"));
    errors.need(&source.at("kind"));
    let (group, kind) = (source.at("apiGroup"), source.at("kind"));
    if group.is_blank() && kind.str() != "PersistentVolumeClaim" {
        let why = "must be 'PersistentVolumeClaim' when referencing the default apiGroup";
        errors.invalid_as(source, kind.str(), why);
    }
    errors.named(&group, is_dns1123_subdomain);
    errors.named(&source.at("namespace"), is_dns1123_label);
}

/// Which modes there are, and which do not go together.
pub fn access_modes(modes: &Field<'_, '_>, errors: &mut Errors) {
    let known = |mode: &Field<'_, '_>| ACCESS_MODES.contains(&mode.str());
    for mode in modes.items().filter(|mode| !known(mode)) {
        errors.0.push(apimachinery::status::FieldError::not_supported(modes.path(), mode.value.clone(), &ACCESS_MODES));
    }
    let once = modes.items().any(|mode| mode.str() == "ReadWriteOncePod");
    if once && modes.items().any(|mode| known(&mode) && mode.str() != "ReadWriteOncePod") {
        errors.forbidden(modes, "may not use ReadWriteOncePod with other access modes");
    }
}

/// As `ValidatePersistentVolumeClaimUpdate`.
fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    let annotation = |claim: &Field<'_, '_>| {
        let annotations = claim.value.pointer("/metadata/annotations");
        annotations.and_then(|a| a.get(CLASS_ANNOTATION)?.as_str()).map(ToOwned::to_owned)
    };
    let (class, before) = (now.at("storageClassName"), was.at("storageClassName"));
    let (annotated, annotated_before) = (annotation(new), annotation(old));
    let mut rest = now.value.clone();
    if was.at("volumeName").is_blank() {
        copy_field(&mut rest, was.value, "volumeName");
    }
    // The annotation may become the field; a claim without a class may be given one.
    let named = |class: &Field<'_, '_>, name: &Option<String>| name.as_deref().is_none_or(|name| class.str() == name);
    let upgrade = annotated_before.is_some()
        && !before.is_set()
        && class.is_set()
        && named(&class, &annotated_before)
        && (annotated.is_none() || annotated == annotated_before);
    if !upgrade && annotated.clone().unwrap_or_default() != annotated_before.clone().unwrap_or_default() {
        let meta = new.at("metadata");
        let annotations = meta.at("annotations");
        errors.invalid_as(&annotations.at(CLASS_ANNOTATION), annotated.unwrap_or_default(), "field is immutable");
    }
    if class.is_set() && !before.is_set() && named(&class, &annotated_before) {
        remove(&mut rest, "storageClassName");
    }
    if text(new.value, "/status/phase") == "Bound" {
        let storage = was.value.pointer("/resources/requests/storage").cloned();
        if let (Some(storage), Some(requests)) = (storage, rest.pointer_mut("/resources/requests")) {
            set(requests, "storage", storage);
        }
        if now.at("volumeAttributesClassName").is_set() {
            copy_field(&mut rest, was.value, "volumeAttributesClassName");
        }
    }
    if !semantically_equal(&rest, was.value) {
        let diff = differences(was.value, &rest);
        let why =
            "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims";
        errors.forbidden(&now, format!("{why}\n{diff}"));
    }
    let amount = |claim: &Value, pointer: &str| Quantity::parse(text(claim, pointer)).unwrap_or_default();
    let wanted = amount(new.value, "/spec/resources/requests/storage");
    let before = amount(old.value, "/spec/resources/requests/storage");
    if wanted < before && wanted <= amount(old.value, "/status/capacity/storage") {
        let resources = now.at("resources");
        let requests = resources.at("requests");
        errors.forbidden(&requests.at("storage"), "field can not be less than status.capacity");
    }
    // Kubernetes names it as if it stood by itself.
    errors
        .immutable(&Field::root(&Value::Null).at("volumeMode").with(now.at("volumeMode").value), &was.at("volumeMode"));
    let (attributes, before) = (now.at("volumeAttributesClassName"), was.at("volumeAttributesClassName"));
    if before.is_set() && !attributes.is_set() {
        errors.forbidden(&attributes, "update from non-nil value to nil is forbidden");
    } else if before.is_set() && attributes.is_blank() && !before.is_blank() {
        errors.forbidden(&attributes, "update from non-nil value to an empty string is forbidden");
    }
}

/// As `ValidatePersistentVolumeClaimStatusUpdate`.
fn validate_status(new: &Field<'_, '_>, _old: &Field<'_, '_>, errors: &mut Errors) {
    let status = new.at("status");
    for (_, amount) in status.at("capacity").entries() {
        not_below_zero(&amount, errors);
    }
    let statuses = status.at("allocatedResourceStatuses");
    let shown = status.at("allocatedResourceStatus");
    for (name, value) in statuses.entries() {
        resource_key(&shown, name, errors);
        if !RESIZE_STATUSES.contains(&value.str()) {
            errors.not_supported(&shown.with(&Value::from(name)), &RESIZE_STATUSES);
        }
    }
    let allocated = status.at("allocatedResources");
    for (name, amount) in allocated.entries() {
        resource_key(&allocated, name, errors);
        not_below_zero(&amount, errors);
        resources::amount("storage", &amount, errors);
    }
}

fn not_below_zero(amount: &Field<'_, '_>, errors: &mut Errors) {
    if let Ok(quantity) = Quantity::parse(amount.str())
        && quantity.value() < 0
    {
        errors.invalid_as(amount, quantity.value(), "must be a valid resource quantity");
    }
}

/// As `validatePersistentVolumeClaimResourceKey`.
fn resource_key(place: &Field<'_, '_>, name: &str, errors: &mut Errors) {
    let messages = is_qualified_name(name);
    let native = !name.contains('/') || name.contains("kubernetes.io/");
    if messages.is_empty() && native && name != "storage" {
        errors.not_supported(&place.with(&Value::from(name)), &["storage"]);
    }
    for message in messages {
        errors.invalid_as(place, name, message);
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let phase = match object.pointer("/metadata/deletionTimestamp") {
        Some(_) => "Terminating",
        None => text(object, "/status/phase"),
    };
    let volume = text(object, "/spec/volumeName");
    let (modes, capacity) = if volume.is_empty() {
        (String::new(), "")
    } else {
        (print::access_modes(list(object, "/status/accessModes")), text(object, "/status/capacity/storage"))
    };
    vec![
        print::name(object),
        Value::from(phase),
        Value::from(volume),
        Value::from(capacity),
        Value::from(modes),
        Value::from(text(object, "/spec/storageClassName")),
        print::or(text(object, "/spec/volumeAttributesClassName"), UNSET),
        clock.age(object),
        print::or(text(object, "/spec/volumeMode"), UNSET),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn claim() -> Value {
        json!({"metadata": {"name": "c"}, "spec": {"accessModes": ["ReadWriteOnce"], "volumeMode": "Filesystem",
            "storageClassName": "fast", "resources": {"requests": {"storage": "5Gi"}}},
            "status": {"phase": "Bound", "capacity": {"storage": "5Gi"}}})
    }

    fn put(pointer: &str, value: Value) -> Value {
        let mut object = claim();
        let (parent, field) = pointer.rsplit_once('/').unwrap();
        set(object.pointer_mut(parent).unwrap(), field, value);
        object
    }

    #[test]
    fn mistakes_are_named() {
        for (pointer, value, error) in [
            ("/spec/accessModes", json!([]), "spec.accessModes: Required value: at least 1 access mode is required"),
            (
                "/spec/accessModes",
                json!(["ReadWriteOncePod", "ReadWriteMany"]),
                "spec.accessModes: Forbidden: may not use ReadWriteOncePod with other access modes",
            ),
            ("/spec/resources", json!({}), "spec.resources[storage]: Required value"),
            (
                "/spec/resources",
                json!({"requests": {"storage": "0"}}),
                "spec.resources[storage]: Invalid value: \"0\": must be greater than zero",
            ),
            (
                "/spec/dataSource",
                json!({"name": "x", "kind": "Foo"}),
                "spec.dataSource: Invalid value: \"Foo\": must be 'PersistentVolumeClaim' when referencing the default apiGroup",
            ),
            (
                "/spec/volumeMode",
                json!("x"),
                "spec.volumeMode: Unsupported value: \"x\": supported values: \"Block\", \"Filesystem\"",
            ),
        ] {
            let mut errors = Errors::default();
            spec(&Field::root(&put(pointer, value)).at("spec"), &mut errors);
            assert!(errors.0.iter().any(|e| e.to_string() == error), "{error}: {:?}", errors.0);
        }
    }

    #[test]
    fn a_bound_claim_grows_and_no_more() {
        let found = |new: &Value| {
            let mut errors = Errors::default();
            validate_update(&Field::root(new), &Field::root(&claim()), &mut errors);
            errors.0.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(found(&put("/spec/resources/requests/storage", json!("6Gi"))).is_empty());
        assert_eq!(
            found(&put("/spec/resources/requests/storage", json!("4Gi"))),
            ["spec.resources.requests.storage: Forbidden: field can not be less than status.capacity"]
        );
        let changed = found(&put("/spec/storageClassName", json!("slow")));
        assert!(changed[0].starts_with("spec: Forbidden: spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims"), "{changed:?}");
        let moded = found(&put("/spec/volumeMode", json!("Block")));
        assert!(moded.contains(&"volumeMode: Invalid value: \"Block\": field is immutable".to_owned()), "{moded:?}");
    }

    #[test]
    fn sources_of_data_say_the_same() {
        let snapshot = json!({"apiGroup": "snapshot.storage.k8s.io", "kind": "VolumeSnapshot", "name": "s"});
        let other = json!({"apiGroup": "example.com", "kind": "Disk", "name": "d"});
        for (given, expected) in [
            (json!({"dataSource": snapshot}), json!({"dataSource": snapshot, "dataSourceRef": snapshot})),
            (json!({"dataSourceRef": other}), json!({"dataSource": other, "dataSourceRef": other})),
            (json!({"dataSource": other}), json!({})),
        ] {
            let mut spec = given.clone();
            data_sources(&mut spec, None);
            assert_eq!(spec, expected, "{given}");
        }
    }
}
