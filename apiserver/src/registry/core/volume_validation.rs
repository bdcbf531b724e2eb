//! Validation of a pod's volumes. As `ValidateVolumes`.

use super::container_validation::{config_key, field_ref};
use crate::registry::field::{Errors, Field};
use apimachinery::names::is_dns1123_label;
use apimachinery::quantity::Quantity;
use std::collections::HashSet;

const DOWNWARD_FIELDS: [&str; 5] =
    ["metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid"];
const HOST_PATH_TYPES: [&str; 8] =
    ["", "BlockDevice", "CharDevice", "Directory", "DirectoryOrCreate", "File", "FileOrCreate", "Socket"];

/// Checks each volume; answers the names by which containers may mount them.
pub fn volumes<'v>(volumes: &Field<'_, 'v>, errors: &mut Errors) -> HashSet<&'v str> {
    let mut names = HashSet::new();
    for volume in volumes.items() {
        let name = volume.at("name");
        if errors.need(&name) {
            errors.all(&name, is_dns1123_label(name.str()));
            if !names.insert(volume.value.get("name").and_then(|n| n.as_str()).unwrap_or("")) {
                errors.duplicate(&name);
            }
        }
        let kinds: Vec<&str> =
            volume.value.as_object().into_iter().flatten().map(|(k, _)| k.as_str()).filter(|k| *k != "name").collect();
        match kinds.as_slice() {
            [] => errors.required(&volume, "must specify a volume type"),
            [kind] => source(kind, &volume.at(kind), errors),
            [_, rest @ ..] => {
                for kind in rest {
                    errors.forbidden(&volume.at(kind), "may not specify more than 1 volume type");
                }
            }
        }
    }
    names
}

fn source(kind: &str, source: &Field<'_, '_>, errors: &mut Errors) {
    match kind {
        "emptyDir" => {
            let limit = source.at("sizeLimit");
            if Quantity::parse(limit.str()).is_ok_and(|q| q < Quantity::ZERO) {
                errors.forbidden(&limit, "SizeLimit field must be a valid resource quantity");
            }
        }
        "hostPath" => {
            host_path(source, errors);
        }
        "secret" => {
            errors.need(&source.at("secretName"));
            modes_and_items(source, errors);
        }
        "configMap" => {
            errors.need(&source.at("name"));
            modes_and_items(source, errors);
        }
        "downwardAPI" => {
            mode(&source.at("defaultMode"), errors);
            downward(source, errors);
        }
        "persistentVolumeClaim" => {
            errors.need(&source.at("claimName"));
        }
        "projected" => {
            mode(&source.at("defaultMode"), errors);
            projected(source, errors);
        }
        "nfs" => {
            errors.need(&source.at("server"));
            let path = source.at("path");
            if errors.need(&path) && !path.str().starts_with('/') {
                errors.invalid(&path, "must be an absolute path");
            }
        }
        "csi" => {
            errors.need(&source.at("driver"));
        }
        "image" => {
            errors.need(&source.at("reference"));
            errors.one_of(&source.at("pullPolicy"), &["Always", "IfNotPresent", "Never"]);
        }
        "ephemeral" => {
            let template = source.at("volumeClaimTemplate");
            if template.is_set() {
                super::persistent_volume_claim::spec(&template.at("spec"), errors);
            } else {
                errors.required(&template, "");
            }
        }
        _ => {}
    }
}

/// As `validateHostPathVolumeSource`.
pub fn host_path(source: &Field<'_, '_>, errors: &mut Errors) {
    let path = source.at("path");
    if errors.need(&path) && path.str().split('/').any(|step| step == "..") {
        errors.invalid(&path, "must not contain '..'");
    }
    errors.one_of(&source.at("type"), &HOST_PATH_TYPES);
}

fn mode(mode: &Field<'_, '_>, errors: &mut Errors) {
    if mode.int().is_some_and(|m| !(0..=0o777).contains(&m)) {
        errors.invalid(mode, "must be a number between 0 and 0777 (octal), both inclusive");
    }
}

fn modes_and_items(source: &Field<'_, '_>, errors: &mut Errors) {
    mode(&source.at("defaultMode"), errors);
    for item in source.at("items").items() {
        if errors.need(&item.at("key")) {
            errors.all(&item.at("key"), config_key(item.at("key").str()));
        }
        let path = item.at("path");
        if errors.need(&path) {
            relative_path(&path, errors);
        }
        mode(&item.at("mode"), errors);
    }
}

fn downward(source: &Field<'_, '_>, errors: &mut Errors) {
    for item in source.at("items").items() {
        let (path, field, resource) = (item.at("path"), item.at("fieldRef"), item.at("resourceFieldRef"));
        if errors.need(&path) {
            relative_path(&path, errors);
        }
        match (field.is_set(), resource.is_set()) {
            (true, true) => {
                errors.invalid(&item, "fieldRef and resourceFieldRef can not be specified simultaneously");
            }
            (true, false) => field_ref(&field, &DOWNWARD_FIELDS, errors),
            (false, true) => {
                if resource.at("containerName").is_blank() {
                    errors.required(&resource.at("containerName"), "");
                }
                errors.need(&resource.at("resource"));
            }
            (false, false) => errors.required(&item, "one of fieldRef and resourceFieldRef is required"),
        }
        mode(&item.at("mode"), errors);
    }
}

fn projected(source: &Field<'_, '_>, errors: &mut Errors) {
    for part in source.at("sources").items() {
        if part.len() > 1 {
            errors.forbidden(&part, "may not specify more than 1 volume type");
        }
        for kind in ["secret", "configMap"] {
            let inner = part.at(kind);
            if inner.is_set() {
                errors.need(&inner.at("name"));
                modes_and_items(&inner, errors);
            }
        }
        let api = part.at("downwardAPI");
        if api.is_set() {
            downward(&api, errors);
        }
        let token = part.at("serviceAccountToken");
        if token.is_set() {
            let seconds = token.at("expirationSeconds");
            if seconds.int().is_some_and(|s| s < 600) {
                errors.invalid(&seconds, "may not specify a duration less than 10 minutes");
            }
            if seconds.int().is_some_and(|s| s > 1 << 32) {
                errors.invalid(&seconds, "may not specify a duration larger than 2^32 seconds");
            }
            if errors.need(&token.at("path")) {
                relative_path(&token.at("path"), errors);
            }
        }
    }
}

/// As `validateLocalDescendingPath`: inside, wherever it is put.
pub fn relative_path(path: &Field<'_, '_>, errors: &mut Errors) {
    if path.str().starts_with('/') {
        errors.invalid(path, "must be a relative path");
    }
    if path.str().split('/').any(|step| step == "..") {
        errors.invalid(path, "must not contain '..'");
    }
}
