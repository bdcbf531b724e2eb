//! ResourceClaims and their templates, and DeviceClasses.

use super::allocation;
use super::names::{fully_qualified_name, opaque, selectors, toleration};
use crate::registry::checks::{Is, Table, check};
use crate::registry::core::pod_scheduling;
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{default, items_mut, list, set, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::Value;
use std::collections::{HashMap, HashSet};

const REQUESTS_MAX: usize = 32;
const CONSTRAINTS_MAX: usize = 32;
pub const CONFIGS_MAX: usize = 32;
const ALTERNATIVES_MAX: usize = 8;
pub const PARAMETERS_MAX_BYTES: usize = 10 * 1024;

pub const CLAIM: Rules = Rules {
    default: |object| {
        if let Some(devices) = object.pointer_mut("/spec/devices") {
            device_defaults(devices);
        }
    },
    status_keeps_metadata: true,
    prepare_status: allocation::prepare_status,
    validate_create: |root, errors| claim_spec(&root.at("spec"), errors),
    validate_update: |new, old, errors| errors.immutable(&new.at("spec"), &old.at("spec")),
    validate_status: allocation::validate_status,
    row: Some(|object, clock: &Clock| vec![print::name(object), Value::from(state(object)), clock.age(object)]),
    ..Rules::DEFAULT
};

pub const TEMPLATE: Rules = Rules {
    default: |object| {
        if let Some(devices) = object.pointer_mut("/spec/spec/devices") {
            device_defaults(devices);
        }
    },
    validate_create: |root, errors| {
        let spec = root.at("spec");
        metadata::template(&spec.at("metadata"), errors);
        claim_spec(&spec.at("spec"), errors);
    },
    validate_update: |new, old, errors| errors.immutable(&new.at("spec"), &old.at("spec")),
    row: None,
    ..Rules::DEFAULT
};

pub const DEVICE_CLASS: Rules = Rules {
    generation: true,
    validate_create: |root, errors| class(root, None, errors),
    validate_update: |new, old, errors| class(new, Some(old), errors),
    ..Rules::DEFAULT
};

/// As `validateDeviceClassSpec`.
fn class(root: &Field<'_, '_>, old: Option<&Field<'_, '_>>, errors: &mut Errors) {
    let spec = root.at("spec");
    selectors(&spec.at("selectors"), old.and_then(|old| old.value.pointer("/spec/selectors")), errors);
    let config = spec.at("config");
    if config.len() > CONFIGS_MAX {
        errors.too_many(&config, CONFIGS_MAX);
    } else if old.is_none_or(|old| old.value.pointer("/spec/config") != Some(config.value)) {
        config.items().for_each(|config| opaque(&config, PARAMETERS_MAX_BYTES, errors));
    }
    let extended = spec.at("extendedResourceName");
    if extended.is_set() {
        let name = extended.str();
        let native = !name.contains('/') || name.contains("kubernetes.io/") || name.starts_with("requests.");
        if native || !is_qualified_name(&format!("requests.{name}")).is_empty() {
            errors.invalid(&extended, "must be a valid extended resource name");
        }
    }
}

fn device_defaults(devices: &mut Value) {
    for request in items_mut(devices, "requests") {
        if let Some(exactly) = request.get_mut("exactly") {
            count_defaults(exactly);
        }
        items_mut(request, "firstAvailable").for_each(count_defaults);
    }
}

fn count_defaults(request: &mut Value) {
    default(request, "allocationMode", "ExactCount");
    if request["allocationMode"] == "ExactCount" && request.get("count").is_none() {
        set(request, "count", 1);
    }
    for toleration in items_mut(request, "tolerations") {
        default(toleration, "operator", "Equal");
    }
}

/// The requests of a claim, and those that each may be met by instead.
pub struct Requests<'v>(HashMap<&'v str, HashSet<&'v str>>);

impl<'v> Requests<'v> {
    /// Of `spec.devices`.
    pub fn of(devices: &'v Value) -> Self {
        let named = |request: &'v Value| {
            let alternatives = list(request, "/firstAvailable").iter().map(|sub| text(sub, "/name")).collect();
            (text(request, "/name"), alternatives)
        };
        Self(list(devices, "/requests").iter().map(named).collect())
    }

    /// `request`, or `request/alternative`. As `validateRequestNameRef`.
    pub fn check(&self, reference: &Field<'_, '_>, errors: &mut Errors) {
        let why =
            "must be the name of a request in the claim or the name of a request and a subrequest separated by '/'";
        let (name, sub) = reference.str().split_once('/').map_or((reference.str(), None), |(n, s)| (n, Some(s)));
        if sub.is_some_and(|sub| sub.contains('/')) {
            errors.invalid(reference, why);
            return;
        }
        for part in [Some(name), sub].into_iter().flatten() {
            for message in is_dns1123_label(part) {
                errors.0.push(FieldError::invalid(reference.path(), part, message));
            }
        }
        if !self.0.get(name).is_some_and(|known| sub.is_none_or(|sub| known.contains(sub))) {
            errors.invalid(reference, why);
        }
    }

    /// A list of such references, none twice.
    pub fn check_all(&self, references: &Field<'_, '_>, errors: &mut Errors) {
        if references.len() > REQUESTS_MAX {
            errors.too_many(references, REQUESTS_MAX);
            return;
        }
        references.items().for_each(|reference| self.check(&reference, errors));
        Is::Unique.check(references, errors);
    }
}

/// Items of a list that are named each their own way: the duplicate is the item.
pub fn unique_items(items: &Field<'_, '_>, key: fn(&Value) -> String, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for item in items.items() {
        let key = key(item.value);
        if !seen.insert(key.clone()) {
            errors.duplicate(&item.with(&Value::from(key)));
        }
    }
}

/// As `validateDeviceClaim`.
fn claim_spec(spec: &Field<'_, '_>, errors: &mut Errors) {
    let devices = spec.at("devices");
    let (requests, constraints, config) = (devices.at("requests"), devices.at("constraints"), devices.at("config"));
    let known = Requests::of(devices.value);
    if requests.len() > REQUESTS_MAX {
        errors.too_many(&requests, REQUESTS_MAX);
    } else {
        requests.items().for_each(|item| request(&item, errors));
        unique_items(&requests, |r| text(r, "/name").to_owned(), errors);
    }
    if constraints.len() > CONSTRAINTS_MAX {
        errors.too_many(&constraints, CONSTRAINTS_MAX);
    } else {
        for constraint in constraints.items() {
            known.check_all(&constraint.at("requests"), errors);
            let (matching, distinct) = (constraint.at("matchAttribute"), constraint.at("distinctAttribute"));
            if matching.is_set() {
                fully_qualified_name(&matching, errors);
            } else if distinct.is_set() {
                fully_qualified_name(&distinct, errors);
            } else {
                let why = r#"exactly one of "matchAttribute" or "distinctAttribute" is required, but multiple fields are set"#;
                errors.required(&constraint, why);
            }
        }
    }
    if config.len() > CONFIGS_MAX {
        errors.too_many(&config, CONFIGS_MAX);
    } else {
        for config in config.items() {
            known.check_all(&config.at("requests"), errors);
            opaque(&config, PARAMETERS_MAX_BYTES, errors);
        }
    }
}

fn request(request: &Field<'_, '_>, errors: &mut Errors) {
    let (name, exactly, first) = (request.at("name"), request.at("exactly"), request.at("firstAvailable"));
    errors.all(&name, is_dns1123_label(name.str()));
    match (exactly.is_set(), !first.is_empty()) {
        (false, false) => errors.required(request, "exactly one of `exactly` or `firstAvailable` is required"),
        (true, true) => {
            let why = "exactly one of `exactly` or `firstAvailable` is required, but multiple fields are set";
            errors.0.push(FieldError::invalid(request.path(), Value::Null, why));
        }
        (true, false) => wanted(&exactly, errors),
        (false, true) if first.len() > ALTERNATIVES_MAX => errors.too_many(&first, ALTERNATIVES_MAX),
        (false, true) => {
            for alternative in first.items() {
                let name = alternative.at("name");
                errors.all(&name, is_dns1123_label(name.str()));
                wanted(&alternative, errors);
            }
            unique_items(&first, |r| text(r, "/name").to_owned(), errors);
        }
    }
}

/// What is wanted: which class, which devices of it, how many, and which taints do not matter.
fn wanted(request: &Field<'_, '_>, errors: &mut Errors) {
    const TABLE: Table = &[("deviceClassName", Is::RequiredName(is_dns1123_subdomain))];
    check(request, TABLE, errors);
    selectors(&request.at("selectors"), None, errors);
    let (mode, count) = (request.at("allocationMode"), request.at("count"));
    match mode.str() {
        "All" if count.int().unwrap_or(0) != 0 => {
            errors.invalid(&count, "must not be specified when allocationMode is 'All'");
        }
        "ExactCount" if count.int().unwrap_or(0) <= 0 => errors.invalid(&count, "must be greater than zero"),
        "All" | "ExactCount" => {}
        _ => errors.not_supported(&mode, &["All", "ExactCount"]),
    }
    request.at("tolerations").items().for_each(|item| toleration(&item, errors));
}

/// As `ValidateNodeSelector`.
pub fn node_selector(selector: &Field<'_, '_>, errors: &mut Errors) {
    if selector.is_set() {
        pod_scheduling::node_selector(selector, errors);
    }
}

fn state(object: &Value) -> String {
    let deleted = object.pointer("/metadata/deletionTimestamp").is_some();
    let mut states = Vec::new();
    if deleted {
        states.push("deleted");
    }
    if object.pointer("/status/allocation").is_none() {
        if !deleted {
            states.push("pending");
        }
    } else {
        states.push("allocated");
        if !list(object, "/status/reservedFor").is_empty() {
            states.push("reserved");
        }
    }
    states.join(",")
}
