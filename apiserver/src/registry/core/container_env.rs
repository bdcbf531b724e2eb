//! Validation of a container's environment. As `ValidateEnv` and `ValidateEnvFrom`.

use super::config_map::config_key;
use super::projections::{Shown, field_ref, resource_ref};
use super::volume_sources::unreserved_path;
use super::volume_validation::Volumes;
use crate::registry::field::{Errors, Field};
use apimachinery::names::is_dns1123_subdomain;

const SOURCES: [&str; 5] = ["fieldRef", "resourceFieldRef", "configMapKeyRef", "secretKeyRef", "fileKeyRef"];

/// As `IsRelaxedEnvVarName`.
fn env_name(name: &str) -> Vec<String> {
    if !name.is_empty() && name.bytes().all(|b| (b' '..=b'~').contains(&b) && b != b'=') {
        return Vec::new();
    }
    vec!["a valid environment variable name must consist only of printable ASCII characters other than '='".to_owned()]
}

pub fn env(env: &Field<'_, '_>, volumes: &Volumes<'_>, errors: &mut Errors) {
    for variable in env.items() {
        let (name, source) = (variable.at("name"), variable.at("valueFrom"));
        errors.need_named(&name, env_name);
        if source.is_set() {
            value_from(&variable, &source, volumes, errors);
        }
    }
}

/// As `validateEnvVarValueFrom`.
fn value_from(variable: &Field<'_, '_>, source: &Field<'_, '_>, volumes: &Volumes<'_>, errors: &mut Errors) {
    let [field, resource, config_map, secret, file] =
        SOURCES.map(|kind| source.value.get(kind).filter(|v| !v.is_null()));
    if let Some(value) = field {
        field_ref(&source.at("fieldRef").with(value), Shown::InEnvironment, errors);
    }
    if let Some(value) = resource {
        resource_ref(&source.at("resourceFieldRef").with(value), Shown::InEnvironment, errors);
    }
    for kind in ["configMapKeyRef", "secretKeyRef"] {
        let reference = source.at(kind);
        if reference.is_set() {
            errors.all(&reference.at("name"), is_dns1123_subdomain(reference.at("name").str()));
            errors.need_named(&reference.at("key"), config_key);
        }
    }
    if file.is_some() {
        let file = source.at("fileKeyRef");
        errors.need_named(&file.at("key"), env_name);
        let volume = file.at("volumeName");
        if errors.need(&volume) && volumes.kind(volume.str()).is_none() {
            errors.not_found(&volume);
        }
        let path = file.at("path");
        if errors.need(&path) {
            unreserved_path(&path, errors);
        }
    }
    let count = [field, resource, config_map, secret, file].iter().flatten().count();
    if count == 0 {
        let why =
            "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`";
        errors.invalid_as(source, "", why);
    } else if !variable.at("value").is_blank() {
        errors.invalid_as(source, "", "may not be specified when `value` is not empty");
    } else if count > 1 {
        errors.invalid_as(source, "", "may not have more than one field specified at a time");
    }
}

pub fn env_from(sources: &Field<'_, '_>, errors: &mut Errors) {
    for source in sources.items() {
        errors.named(&source.at("prefix"), env_name);
        let mut count = 0;
        for kind in ["configMapRef", "secretRef"] {
            let reference = source.at(kind);
            if reference.is_set() {
                count += 1;
                errors.need_named(&reference.at("name"), is_dns1123_subdomain);
            }
        }
        match count {
            0 => errors.invalid_as(sources, "", "must specify one of: `configMapRef` or `secretRef`"),
            1 => {}
            _ => errors.invalid_as(sources, "", "may not have more than one field specified at a time"),
        }
    }
}
