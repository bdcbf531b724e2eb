//! ResourceSlices: the devices of a pool, and on which nodes they are.

use super::claim::{node_selector, unique_items};
use super::names::{binding, pool_name, qualified_name, taint};
use crate::registry::checks::{Is, driver_name, fixed};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata::label;
use crate::registry::object::{child, drop_disabled, items_mut, list, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::names::is_dns1123_subdomain;
use apimachinery::quantity::Quantity;
use apimachinery::status::FieldError;
use serde_json::{Value, json};

const DEVICES_MAX: usize = 128;
/// Where devices have taints or consume counters.
const INVOLVED_DEVICES_MAX: usize = 64;
const COUNTER_SETS_MAX: usize = 8;
const COUNTERS_MAX: usize = 32;
const CONSUMPTIONS_MAX: usize = 2;
const ATTRIBUTES_MAX: usize = 32;
const VALUE_MAX: usize = 64;
const TAINTS_MAX: usize = 16;
const OPTIONS_MAX: usize = 10;
/// What a feature that is off reads of an attribute.
const LIST_ATTRIBUTES: [&str; 4] = ["ints", "bools", "strings", "versions"];

pub const RULES: Rules = Rules {
    generation: true,
    default: |object| {
        for device in items_mut(child(object, "spec"), "devices") {
            // A taint that does not say since when is from now on; set once, it stays.
            for taint in items_mut(device, "taints") {
                if taint.get("timeAdded").is_none() {
                    let now = apimachinery::time::rfc3339(jiff::Timestamp::now());
                    crate::registry::object::set(taint, "timeAdded", now);
                }
            }
        }
    },
    prepare_create: |object| drop_list_attributes(object, None),
    prepare_update: |new, old| drop_list_attributes(new, Some(old)),
    validate,
    validate_update: |new, old, errors| {
        fixed(new, old, &["spec.pool.name", "spec.driver", "spec.nodeName"], errors);
    },
    selectable_names: &["spec.nodeName", "spec.driver"],
    selectable: |object| {
        vec![
            ("spec.nodeName", text(object, "/spec/nodeName").to_owned()),
            ("spec.driver", text(object, "/spec/driver").to_owned()),
        ]
    },
    row: Some(|object, clock: &Clock| {
        vec![
            print::name(object),
            print::or(text(object, "/spec/nodeName"), "<unset>"),
            Value::from(text(object, "/spec/driver")),
            Value::from(text(object, "/spec/pool/name")),
            clock.age(object),
        ]
    }),
    ..Rules::DEFAULT
};

fn drop_list_attributes(object: &mut Value, old: Option<&Value>) {
    let places: Vec<String> = list(object, "/spec/devices")
        .iter()
        .enumerate()
        .flat_map(|(at, device)| {
            let names = device.get("attributes").and_then(Value::as_object).into_iter().flatten();
            names.map(move |(name, _)| {
                format!("/spec/devices/{at}/attributes/{}", name.replace('~', "~0").replace('/', "~1"))
            })
        })
        .collect();
    for place in places {
        drop_disabled(object, old, &place, &LIST_ATTRIBUTES);
    }
}

/// As `validateResourceSliceSpec`.
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    driver_name(&spec.at("driver"), errors);
    let pool = spec.at("pool");
    pool_name(&pool.at("name"), errors);
    for (name, least, why) in [
        ("resourceSliceCount", 1, "must be greater than zero"),
        ("generation", 0, "must be greater than or equal to zero"),
    ] {
        let (field, value) = (pool.at(name), pool.at(name).int().unwrap_or(0));
        if value < least {
            errors.0.push(FieldError::invalid(field.path(), value, why));
        }
    }
    let per_device = spec.at("perDeviceNodeSelection");
    let all = "exactly one of `nodeName`, `nodeSelector`, `allNodes`, `perDeviceNodeSelection` is required";
    let fields = ["nodeName", "nodeSelector", "allNodes", "perDeviceNodeSelection"];
    let several = format!("{all}, but multiple fields are set");
    place(&spec, &fields, ("must be either unset or set to a non-empty string", all, &several), errors);
    let terms = spec.at("nodeSelector");
    if terms.is_set() && terms.at("nodeSelectorTerms").len() != 1 {
        errors.invalid(&terms.at("nodeSelectorTerms"), "must have exactly one node selector term");
    }
    let (devices, counters) = (spec.at("devices"), spec.at("sharedCounters"));
    if counters.is_set() && devices.is_set() {
        errors.0.push(FieldError::invalid(spec.path(), "", "only one of `sharedCounters` or `devices` is allowed"));
    }
    let involved = devices.items().any(|d| !d.at("taints").is_empty() || !d.at("consumesCounters").is_empty());
    let max = if involved { INVOLVED_DEVICES_MAX } else { DEVICES_MAX };
    if devices.len() > max {
        errors.too_many(&devices, max);
    } else {
        devices.items().for_each(|item| device(&item, per_device.bool(), errors));
        unique_items(&devices, |d| text(d, "/name").to_owned(), errors);
    }
    if counters.len() > COUNTER_SETS_MAX {
        errors.too_many(&counters, COUNTER_SETS_MAX);
    } else {
        counters.items().for_each(|set| self::counters(&set, "name", errors));
        unique_items(&counters, |c| text(c, "/name").to_owned(), errors);
    }
}

/// Where devices are: one of several fields says it. The messages are for an empty name, for none, and for several.
fn place(on: &Field<'_, '_>, fields: &[&'static str], why: (&str, &str, &str), errors: &mut Errors) {
    let (empty, none, several) = why;
    let mut said = Vec::new();
    for name in fields {
        let field = on.at(name);
        match field.value {
            Value::Null => continue,
            Value::String(node) if node.is_empty() => {
                errors.invalid(&field, empty);
                continue;
            }
            Value::String(node) => errors.all(&field, is_dns1123_subdomain(node)),
            Value::Bool(false) => {
                errors.invalid(&field, "must be either unset or set to true");
                continue;
            }
            Value::Object(_) => node_selector(&field, errors),
            _ => {}
        }
        said.push(format!("`{name}`"));
    }
    match said.len() {
        0 => errors.required(on, none),
        1 => {}
        _ => errors.0.push(FieldError::invalid(on.path(), format!("{{{}}}", said.join(", ")), several)),
    }
}

/// A named set of counters, or what a device consumes of one.
fn counters(set: &Field<'_, '_>, name: &str, errors: &mut Errors) {
    Is::RequiredName(label).check(&set.at(name), errors);
    let counters = set.at("counters");
    if counters.is_empty() {
        errors.required(&counters, "");
    } else if counters.len() > COUNTERS_MAX {
        errors.too_many(&counters, COUNTERS_MAX);
    } else {
        for (name, counter) in counters.entries() {
            for message in label(name) {
                errors.0.push(FieldError::invalid(counter.path(), name, message));
            }
        }
    }
}

/// As `validateDevice`.
fn device(device: &Field<'_, '_>, per_device: bool, errors: &mut Errors) {
    let (name, attributes, capacity) = (device.at("name"), device.at("attributes"), device.at("capacity"));
    errors.all(&name, label(name.str()));
    let count = attributes.len() + capacity.len();
    if count > ATTRIBUTES_MAX {
        let why = format!("the total number of attributes and capacities must not exceed {ATTRIBUTES_MAX}");
        errors.0.push(FieldError::invalid(device.path(), count, why));
    }
    for (name, value) in attributes.entries() {
        qualified_name(name, &value, errors);
        attribute(&value, errors);
    }
    let shared = device.at("allowMultipleAllocations").bool();
    for (name, value) in capacity.entries() {
        qualified_name(name, &value, errors);
        let policy = value.at("requestPolicy");
        if policy.is_set() && !shared {
            errors.forbidden(&policy, "allowMultipleAllocations must be true");
        } else if policy.is_set() {
            request_policy(&policy, &value.at("value"), errors);
        }
    }
    let (taints, consumed) = (device.at("taints"), device.at("consumesCounters"));
    if taints.len() > TAINTS_MAX {
        errors.too_many(&taints, TAINTS_MAX);
    } else {
        taints.items().for_each(|item| taint(&item, errors));
    }
    if consumed.len() > CONSUMPTIONS_MAX {
        errors.too_many(&consumed, CONSUMPTIONS_MAX);
    } else {
        consumed.items().for_each(|item| counters(&item, "counterSet", errors));
        unique_items(&consumed, |c| text(c, "/counterSet").to_owned(), errors);
    }
    let fields = ["nodeName", "nodeSelector", "allNodes"];
    if per_device {
        let why = "exactly one of `nodeName`, `nodeSelector`, or `allNodes` is required when `perDeviceNodeSelection` is set to true in the ResourceSlice spec";
        place(device, &fields, ("must not be empty", why, why), errors);
    } else if fields.iter().any(|field| device.at(field).is_set()) {
        let why = "`nodeName`, `nodeSelector` and `allNodes` can only be set if `perDeviceNodeSelection` is set to true in the ResourceSlice spec";
        errors.0.push(FieldError::invalid(device.path(), Value::Null, why));
    }
    binding(device, errors);
}

fn attribute(attribute: &Field<'_, '_>, errors: &mut Errors) {
    let (string, version) = (attribute.at("string"), attribute.at("version"));
    Is::Bytes(VALUE_MAX).check(&string, errors);
    if version.is_set() && !is_semver(version.str()) {
        errors.invalid(&version, "must be a string compatible with semver.org spec 2.0.0");
    }
    Is::Bytes(VALUE_MAX).check(&version, errors);
    let values = ["bool", "int", "string", "version"].iter().filter(|kind| attribute.at(kind).is_set()).count();
    if values != 1 {
        let shown = if values == 0 { json!("") } else { attribute.value.clone() };
        errors.0.push(FieldError::invalid(attribute.path(), shown, "exactly one value must be specified"));
    }
}

/// `1.2.3-rc.1+build`. As semver.org has it.
fn is_semver(text: &str) -> bool {
    let number = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()) && (part == "0" || !part.starts_with('0'))
    };
    let words = |list: &str, numbers_are_numbers: bool| {
        list.split('.').all(|word| {
            !word.is_empty()
                && word.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && (!numbers_are_numbers || !word.bytes().all(|b| b.is_ascii_digit()) || number(word))
        })
    };
    let (rest, build) = text.split_once('+').map_or((text, None), |(rest, build)| (rest, Some(build)));
    let (core, pre) = rest.split_once('-').map_or((rest, None), |(core, pre)| (core, Some(pre)));
    let core: Vec<&str> = core.split('.').collect();
    core.len() == 3
        && core.iter().all(|part| number(part))
        && pre.is_none_or(|pre| words(pre, true))
        && build.is_none_or(|build| words(build, false))
}

/// How much of a shared device's capacity may be asked for. As `validateRequestPolicy`.
fn request_policy(policy: &Field<'_, '_>, capacity: &Field<'_, '_>, errors: &mut Errors) {
    let (values, range, fallback) = (policy.at("validValues"), policy.at("validRange"), policy.at("default"));
    if !values.is_empty() && range.is_set() {
        let why =
            r#"exactly one policy can be specified, cannot specify "validValues" and "validRange" at the same time"#;
        errors.forbidden(policy, why);
        return;
    }
    let amount = |field: &Field<'_, '_>| Quantity::parse(field.str()).ok();
    let Some(all) = amount(capacity) else { return };
    let kind = if values.is_empty() { "validRange" } else { "validValues" };
    let Some(usual) = amount(&fallback) else {
        if !values.is_empty() || range.is_set() {
            errors.required(&fallback, &format!("required when {kind} is defined"));
        }
        return;
    };
    let larger = |what: &str| format!("{what} is larger than capacity value: {}", capacity.str());
    if !values.is_empty() {
        if values.len() > OPTIONS_MAX {
            errors.too_many(&values, OPTIONS_MAX);
            return;
        }
        let mut before: Option<Quantity> = None;
        for value in values.items() {
            let Some(option) = amount(&value) else { continue };
            if before.is_some_and(|before| before > option) {
                errors.invalid(&value, "values must be sorted in ascending order");
            }
            if option > all {
                errors.invalid(&value, larger("option"));
            }
            before = Some(option);
        }
        unique_items(&values, |v| v.as_str().unwrap_or("").to_owned(), errors);
        if !values.items().any(|value| amount(&value) == Some(usual)) {
            let why = "default value is not valid according to the requestPolicy";
            errors.0.push(FieldError::invalid(values.path(), fallback.str(), why));
        }
        return;
    }
    if !range.is_set() {
        return;
    }
    let (low, high, step) = (range.at("min"), range.at("max"), range.at("step"));
    let Some(least) = amount(&low) else {
        errors.required(&low, "required when validRange is defined");
        return;
    };
    if least > all {
        errors.invalid(&low, larger("min"));
    }
    if usual < least {
        errors.0.push(FieldError::invalid(
            low.path(),
            fallback.str(),
            format!("default is less than min: {}", low.str()),
        ));
    }
    let most = amount(&high);
    if let Some(most) = most {
        if least > most {
            errors.0.push(FieldError::invalid(
                high.path(),
                low.str(),
                format!("min is larger than max: {}", high.str()),
            ));
        }
        if most > all {
            errors.invalid(&high, larger("max"));
        }
        if usual > most {
            let why = format!("default is more than max: {}", high.str());
            errors.0.push(FieldError::invalid(high.path(), fallback.str(), why));
        }
    }
    let Some(by) = amount(&step).map(|step| step.value()).filter(|by| *by != 0) else { return };
    if least.value().saturating_add(by) > all.value() {
        let why =
            format!("one step {} is larger than capacity value: {}", least.value().saturating_add(by), capacity.str());
        errors.invalid(&step, why);
    }
    for (value, shown) in [(Some(usual), &fallback), (most, &high)] {
        if value.is_some_and(|value| (value.value().saturating_sub(least.value())) % by != 0) {
            let why = format!("value is not a multiple of a given step ({}) from ({})", step.str(), low.str());
            errors.0.push(FieldError::invalid(step.path(), shown.str(), why));
        }
    }
}
