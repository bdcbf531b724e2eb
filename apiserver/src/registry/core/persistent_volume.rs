//! PersistentVolumes.

use super::persistent_volume_claim::{access_modes, class_annotation};
use super::pod_scheduling::node_selector;
use super::pod_warnings;
use super::volume_sources::{PERSISTENT, the_source};
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, copy_field, default, differences, list, semantically_equal, set, text};
use crate::registry::print::{self, Clock, UNSET};
use crate::registry::rules::Rules;
use apimachinery::names::is_dns1123_subdomain;
use apimachinery::quantity::Quantity;
use apimachinery::status::FieldError;
use serde_json::{Value, json};

const TRANSITION: &str = "lastPhaseTransitionTime";
/// The longest name of a volume and its portal together.
const PORTAL_MAX: usize = 64;

pub const RULES: Rules = Rules {
    initial_status: Some(|_| json!({"phase": "Pending", "lastPhaseTransitionTime": now()})),
    default: defaults,
    prepare_status: |new, old| {
        let (status, before) = (child(new, "status"), old.get("status").unwrap_or(&Value::Null));
        if status.get("phase") == before.get("phase") {
            if status.get(TRANSITION).is_none() {
                copy_field(status, before, TRANSITION);
            }
        } else if status.get(TRANSITION) == before.get(TRANSITION) {
            set(status, TRANSITION, now());
        }
    },
    validate,
    validate_update,
    warnings,
    row: Some(row),
    ..Rules::DEFAULT
};

fn now() -> String {
    apimachinery::time::rfc3339(jiff::Timestamp::now())
}

fn defaults(object: &mut Value) {
    default(child(object, "status"), "phase", "Pending");
    let spec = child(object, "spec");
    default(spec, "persistentVolumeReclaimPolicy", "Retain");
    default(spec, "volumeMode", "Filesystem");
    source_defaults(spec);
}

/// What kinds of sources take for granted, in a pod's volume as well.
pub fn source_defaults(volume: &mut Value) {
    const GIVEN: [(&str, &str, &str); 10] = [
        ("hostPath", "type", ""),
        ("iscsi", "iscsiInterface", "default"),
        ("rbd", "pool", "rbd"),
        ("rbd", "user", "admin"),
        ("rbd", "keyring", "/etc/ceph/keyring"),
        ("scaleIO", "storageMode", "ThinProvisioned"),
        ("scaleIO", "fsType", "xfs"),
        ("azureDisk", "cachingMode", "ReadWrite"),
        ("azureDisk", "kind", "Shared"),
        ("azureDisk", "fsType", "ext4"),
    ];
    for (source, field, value) in GIVEN {
        if let Some(source) = volume.get_mut(source).filter(|source| source.is_object())
            && source.get(field).is_none_or(Value::is_null)
        {
            set(source, field, value);
        }
    }
}

/// As `ValidatePersistentVolumeSpec`.
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    if spec.at("accessModes").is_empty() {
        errors.required(&spec.at("accessModes"), "");
    }
    access_modes(&spec.at("accessModes"), errors);
    let capacity = spec.at("capacity");
    if capacity.is_empty() {
        errors.required(&capacity, "");
    }
    if !capacity.key("storage").is_set() || capacity.len() > 1 {
        let shown = if capacity.is_set() { capacity.value.clone() } else { Value::Null };
        errors.0.push(FieldError::not_supported(capacity.path(), shown, &["storage"]));
    }
    for (_, amount) in capacity.entries() {
        if Quantity::parse(amount.str()).is_ok_and(|q| q <= Quantity::ZERO) {
            errors.invalid(&amount, "must be greater than zero");
        }
    }
    errors.one_of(&spec.at("persistentVolumeReclaimPolicy"), &["Delete", "Recycle", "Retain"]);
    let affinity = spec.at("nodeAffinity");
    if affinity.is_set() {
        let required = affinity.at("required");
        if required.is_set() {
            node_selector(&required, errors);
        } else {
            errors.required(&required, "must specify required node constraints");
        }
    }
    let kind = the_source(&spec, PERSISTENT, errors);
    let source = spec.at(kind);
    match kind {
        "local" if !affinity.is_set() => errors.required(&affinity, "Local volume requires node affinity"),
        "iscsi" if source.at("initiatorName").is_set() => {
            let portal = source.at("targetPortal");
            if meta.at("name").str().len() + 1 + portal.str().len() > PORTAL_MAX {
                errors.invalid(
                    &source.at("targetportal").with(portal.value),
                    "Total length of <volume name>:<iscsi.targetPortal> must be under 64 characters if iscsi.initiatorName is specified.",
                );
            }
        }
        "hostPath" => {
            let root_path = source.at("path").str().split('/').all(|step| matches!(step, "" | "."));
            let policy = spec.at("persistentVolumeReclaimPolicy");
            if root_path && !source.at("path").is_blank() && policy.str() == "Recycle" {
                errors.forbidden(&policy, "may not be 'recycle' for a hostPath mount of '/'");
            }
        }
        _ => {}
    }
    errors.named(&spec.at("storageClassName"), is_dns1123_subdomain);
    errors.one_of(&spec.at("volumeMode"), &["Block", "Filesystem"]);
    let attributes = spec.at("volumeAttributesClassName");
    if attributes.is_set() {
        if attributes.is_blank() {
            errors.required(&attributes, "an empty string is disallowed");
        }
        errors.named(&attributes, is_dns1123_subdomain);
        if kind != "csi" {
            errors.required(&spec.at("csi"), "has to be specified when using volumeAttributesClassName");
        }
    }
}

/// As `ValidatePersistentVolumeUpdate`.
fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    const EXPAND: &str = "controllerExpandSecretRef";
    let (now, was) = (new.at("spec"), old.at("spec"));
    let source = |spec: &Value| {
        let sources =
            PERSISTENT.iter().filter_map(|source| Some((source.kind.to_owned(), spec.get(source.kind)?.clone())));
        Value::Object(sources.collect())
    };
    let (mut wanted, had) = (source(now.value), source(was.value));
    if had.get("csi").is_some_and(|csi| csi.get(EXPAND).is_none())
        && let Some(csi) = wanted.get_mut("csi")
    {
        crate::registry::object::remove(csi, EXPAND);
    }
    if !semantically_equal(&wanted, &had) {
        let diff = differences(&had, &wanted);
        let why = format!("spec.persistentvolumesource is immutable after creation\n{diff}");
        errors.0.push(FieldError::forbidden("spec.persistentvolumesource", why));
    }
    let nothing = Field::root(&Value::Null);
    errors.immutable(&nothing.at("volumeMode").with(now.at("volumeMode").value), &was.at("volumeMode"));
    let (affinity, before) = (now.at("nodeAffinity"), was.at("nodeAffinity"));
    if before.is_set() && !semantically_equal(affinity.value, &renewed_labels(before.value, affinity.value)) {
        let why = "field is immutable, except for updating from beta label to GA";
        errors.invalid(&nothing.at("nodeAffinity").with(affinity.value), why);
    }
    let (attributes, before) = (now.at("volumeAttributesClassName"), was.at("volumeAttributesClassName"));
    if before.is_set() && !attributes.is_set() {
        errors.forbidden(&attributes, "update from non-nil value to nil is forbidden");
    }
}

/// The affinity of before, with the labels of today where the new one has them: those may be brought up to date.
fn renewed_labels(old: &Value, new: &Value) -> Value {
    const RENAMED: [(&str, &str); 5] = [
        ("failure-domain.beta.kubernetes.io/zone", "topology.kubernetes.io/zone"),
        ("failure-domain.beta.kubernetes.io/region", "topology.kubernetes.io/region"),
        ("beta.kubernetes.io/os", "kubernetes.io/os"),
        ("beta.kubernetes.io/arch", "kubernetes.io/arch"),
        ("beta.kubernetes.io/instance-type", "node.kubernetes.io/instance-type"),
    ];
    let mut renewed = old.clone();
    let terms = renewed.pointer_mut("/required/nodeSelectorTerms").and_then(Value::as_array_mut);
    for (at, term) in terms.into_iter().flatten().enumerate() {
        for (index, expression) in crate::registry::object::items_mut(term, "matchExpressions").enumerate() {
            let key = new.pointer(&format!("/required/nodeSelectorTerms/{at}/matchExpressions/{index}/key"));
            let (was, now) = (text(expression, "/key").to_owned(), key.and_then(Value::as_str).unwrap_or(""));
            if RENAMED.contains(&(&was, now)) {
                set(expression, "key", now);
            }
        }
    }
    renewed
}

/// As `GetWarningsForPersistentVolume`.
fn warnings(new: &Value, _old: Option<&Value>) -> Vec<String> {
    let root = Field::root(new);
    let spec = root.at("spec");
    let mut warnings = class_annotation(&root);
    let affinity = spec.at("nodeAffinity");
    let required = affinity.at("required");
    for term in required.at("nodeSelectorTerms").items() {
        pod_warnings::node_term(&term, &mut warnings);
    }
    if spec.at("persistentVolumeReclaimPolicy").str() == "Recycle" {
        warnings.push("spec.persistentVolumeReclaimPolicy: The Recycle reclaim policy is deprecated. Instead, the recommended approach is to use dynamic provisioning.".to_owned());
    }
    pod_warnings::old_volumes(&spec, &mut warnings);
    pod_warnings::fractional(&spec.at("capacity"), &["storage"], &mut warnings);
    warnings
}

/// As `printPersistentVolume`.
fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let claim = object
        .pointer("/spec/claimRef")
        .map(|claim| format!("{}/{}", text(claim, "/namespace"), text(claim, "/name")))
        .unwrap_or_default();
    let phase = match object.pointer("/metadata/deletionTimestamp") {
        Some(_) => "Terminating",
        None => text(object, "/status/phase"),
    };
    vec![
        print::name(object),
        Value::from(text(object, "/spec/capacity/storage")),
        Value::from(print::access_modes(list(object, "/spec/accessModes"))),
        Value::from(text(object, "/spec/persistentVolumeReclaimPolicy")),
        Value::from(phase),
        Value::from(claim),
        Value::from(text(object, "/spec/storageClassName")),
        print::or(text(object, "/spec/volumeAttributesClassName"), UNSET),
        Value::from(text(object, "/status/reason")),
        clock.age(object),
        print::or(text(object, "/spec/volumeMode"), UNSET),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> Value {
        json!({"metadata": {"name": "v"}, "spec": {"accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"},
            "persistentVolumeReclaimPolicy": "Retain", "volumeMode": "Filesystem", "csi": {"driver": "d.example.com", "volumeHandle": "h"}}})
    }

    #[test]
    fn mistakes_are_named() {
        type Change = fn(&mut Value);
        let cases: [(Change, &str); 9] = [
            (|s| s["accessModes"] = json!([]), "spec.accessModes: Required value"),
            (|s| s["capacity"] = json!({}), "spec.capacity: Required value"),
            (
                |s| s["capacity"] = json!({"storage": "0"}),
                "spec.capacity[storage]: Invalid value: \"0\": must be greater than zero",
            ),
            (|s| s["csi"] = json!({"driver": "d"}), "spec.csi.volumeHandle: Required value"),
            (|s| _ = s.as_object_mut().unwrap().remove("csi"), "spec: Required value: must specify a volume type"),
            (|s| s["nfs"] = json!({}), "spec.csi: Forbidden: may not specify more than 1 volume type"),
            (
                |s| s["volumeAttributesClassName"] = json!(""),
                "spec.volumeAttributesClassName: Required value: an empty string is disallowed",
            ),
            (
                |s| {
                    s.as_object_mut().unwrap().remove("csi");
                    s["gcePersistentDisk"] = json!({"partition": 300});
                },
                "spec.persistentDisk.pdName: Required value",
            ),
            (
                |s| {
                    s.as_object_mut().unwrap().remove("csi");
                    s["local"] = json!({"path": "/a"});
                },
                "spec.nodeAffinity: Required value: Local volume requires node affinity",
            ),
        ];
        for (change, error) in cases {
            let mut object = volume();
            change(&mut object["spec"]);
            let mut errors = Errors::default();
            validate(&Field::root(&object), &mut errors);
            assert!(errors.0.iter().any(|e| e.to_string() == error), "{error}: {:?}", errors.0);
        }
        let mut errors = Errors::default();
        validate(&Field::root(&volume()), &mut errors);
        assert!(errors.0.is_empty(), "{:?}", errors.0);
    }

    #[test]
    fn where_a_volume_lies_stays() {
        let found = |change: fn(&mut Value)| {
            let mut new = volume();
            change(&mut new["spec"]);
            let mut errors = Errors::default();
            validate_update(&Field::root(&new), &Field::root(&volume()), &mut errors);
            errors.0.iter().map(|e| e.field.clone()).collect::<Vec<_>>()
        };
        assert_eq!(found(|s| s["csi"]["volumeHandle"] = json!("i")), ["spec.persistentvolumesource"]);
        assert_eq!(found(|s| s["volumeMode"] = json!("Block")), ["volumeMode"]);
        assert!(found(|s| s["csi"]["controllerExpandSecretRef"] = json!({"name": "n", "namespace": "m"})).is_empty());
        assert!(found(|s| s["persistentVolumeReclaimPolicy"] = json!("Delete")).is_empty());
        let before = json!({"required": {"nodeSelectorTerms": [{"matchExpressions": [{"key": "failure-domain.beta.kubernetes.io/zone"}]}]}});
        let after = json!({"required": {"nodeSelectorTerms": [{"matchExpressions": [{"key": "topology.kubernetes.io/zone"}]}]}});
        assert_eq!(renewed_labels(&before, &after), after);
    }
}
