//! PersistentVolumes.

use super::persistent_volume_claim::{access_modes, storage_class};
use super::pod_scheduling::{LabelValues, node_selector_term};
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, list, semantically_equal, set, text};
use crate::registry::print::{self, Clock, UNSET};
use crate::registry::rules::Rules;
use apimachinery::names::is_qualified_name;
use apimachinery::quantity::Quantity;
use apimachinery::status::FieldError;
use serde_json::{Value, json};

/// Fields of the spec that say where a volume lies.
const SOURCES: [&str; 21] = [
    "awsElasticBlockStore",
    "azureDisk",
    "azureFile",
    "cephfs",
    "cinder",
    "csi",
    "fc",
    "flexVolume",
    "flocker",
    "gcePersistentDisk",
    "glusterfs",
    "hostPath",
    "iscsi",
    "local",
    "nfs",
    "photonPersistentDisk",
    "portworxVolume",
    "quobyte",
    "rbd",
    "scaleIO",
    "storageos",
];

pub const RULES: Rules = Rules {
    initial_status: Some(|_| json!({"phase": "Pending"})),
    default: defaults,
    validate,
    validate_update,
    row: Some(row),
    ..Rules::DEFAULT
};

fn defaults(object: &mut Value) {
    default(child(object, "status"), "phase", "Pending");
    let spec = child(object, "spec");
    default(spec, "persistentVolumeReclaimPolicy", "Retain");
    default(spec, "volumeMode", "Filesystem");
    if let Some(host_path) = spec.get_mut("hostPath")
        && host_path.get("type").is_none()
    {
        set(host_path, "type", "");
    }
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    access_modes(&spec.at("accessModes"), errors);
    let capacity = spec.at("capacity");
    if capacity.is_empty() {
        errors.required(&capacity, "");
    } else if capacity.value.get("storage").is_none() || capacity.len() > 1 {
        errors.0.push(FieldError::not_supported(capacity.path(), capacity.value.clone(), &["storage"]));
    }
    for (name, amount) in capacity.entries() {
        errors.0.extend(is_qualified_name(name).into_iter().map(|m| FieldError::invalid(amount.path(), name, m)));
        if Quantity::parse(amount.str()).is_ok_and(|q| q <= Quantity::ZERO) {
            errors.invalid(&amount, "must be greater than zero");
        }
    }
    errors.one_of(&spec.at("persistentVolumeReclaimPolicy"), &["Delete", "Recycle", "Retain"]);
    let present: Vec<&str> = SOURCES.into_iter().filter(|source| spec.at(source).is_set()).collect();
    match present.as_slice() {
        [] => errors.required(&spec, "must specify a volume type"),
        ["hostPath"] => {},
        ["local"] => {
            errors.need(&spec.at("local").at("path"));
            if !spec.at("nodeAffinity").is_set() {
                errors.required(&spec.at("nodeAffinity"), "Local volume requires node affinity");
            }
        }
        ["csi"] => {
            let csi = spec.at("csi");
            errors.need(&csi.at("driver"));
            errors.need(&csi.at("volumeHandle"));
        }
        ["nfs"] => {
            let nfs = spec.at("nfs");
            errors.need(&nfs.at("server"));
            errors.need(&nfs.at("path"));
        }
        [_] => {}
        [_, more @ ..] => {
            for source in more {
                errors.forbidden(&spec.at(source), "may not specify more than 1 volume type");
            }
        }
    }
    storage_class(&spec.at("storageClassName"), errors);
    errors.one_of(&spec.at("volumeMode"), &["Block", "Filesystem"]);
    let affinity = spec.at("nodeAffinity");
    if affinity.is_set() {
        let required = affinity.at("required");
        if !required.is_set() {
            errors.required(&required, "must specify required node constraints");
        }
        for term in required.at("nodeSelectorTerms").items() {
            node_selector_term(&term, LabelValues::Checked, errors);
        }
    }
}

fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    let secrets = |source: &Value| {
        let mut source = source.clone();
        for open in ["controllerExpandSecretRef", "nodePublishSecretRef"] {
            crate::registry::object::remove(&mut source, open);
        }
        source
    };
    if SOURCES.iter().any(|s| !semantically_equal(&secrets(now.at(s).value), &secrets(was.at(s).value))) {
        errors.0.push(FieldError::forbidden(
            "spec.persistentvolumesource",
            "spec.persistentvolumesource is immutable after creation",
        ));
    }
    errors.immutable(&now.at("volumeMode"), &was.at("volumeMode"));
    if was.at("nodeAffinity").is_set() {
        errors.immutable(&now.at("nodeAffinity"), &was.at("nodeAffinity"));
    }
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
