//! The status of a ResourceClaim: what was allocated, who uses it, and what drivers say of the devices.
//! As `validateResourceClaimStatusUpdate`.

use super::claim::{CONFIGS_MAX, PARAMETERS_MAX_BYTES, Requests, node_selector, unique_items};
use super::names::{binding, opaque, pool_name, raw_object};
use crate::registry::checks::{Is, Table, check, driver_name};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata::label;
use crate::registry::object::{child, list, remove, set, text};
use serde_json::Value;
use std::collections::HashSet;

const CONSUMERS_MAX: usize = 256;
const RESULTS_MAX: usize = 32;
const CONDITIONS_MAX: usize = 8;
const INTERFACE_NAME_MAX: usize = 256;
const HARDWARE_ADDRESS_MAX: usize = 128;
const ADDRESSES_MAX: usize = 16;

/// A device, by driver, pool and name, and the share of it.
fn device_id(device: &Value) -> String {
    let id = format!("{}/{}/{}", text(device, "/driver"), text(device, "/pool"), text(device, "/device"));
    match text(device, "/shareID") {
        "" => id,
        share => format!("{id}/{share}"),
    }
}

/// What drivers said of a device goes with its allocation. As `dropDeallocatedStatusDevices`.
pub fn prepare_status(new: &mut Value, old: &Value) {
    let allocated = |claim: &Value| -> HashSet<String> {
        list(claim, "/status/allocation/devices/results").iter().map(device_id).collect()
    };
    let (before, now) = (allocated(old), allocated(new));
    let gone: HashSet<&String> = before.difference(&now).collect();
    let status = child(new, "status");
    if gone.is_empty() || status.get("devices").is_none() {
        return;
    }
    let mut left = list(status, "/devices").to_vec();
    left.retain(|device| !gone.contains(&device_id(device)));
    if left.is_empty() { _ = remove(status, "devices") } else { set(status, "devices", left) }
}

pub fn validate_status(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let status = new.at("status");
    let (reserved, allocation, devices) = (status.at("reservedFor"), status.at("allocation"), status.at("devices"));
    if reserved.len() > CONSUMERS_MAX {
        errors.too_many(&reserved, CONSUMERS_MAX);
    } else {
        const CONSUMER: Table =
            &[("resource", Is::Required("")), ("name", Is::Required("")), ("uid", Is::Required(""))];
        reserved.items().for_each(|consumer| check(&consumer, CONSUMER, errors));
        unique_items(&reserved, |c| text(c, "/uid").to_owned(), errors);
    }
    let allocated: HashSet<String> = list(allocation.value, "/devices/results").iter().map(device_id).collect();
    devices.items().for_each(|item| device(&item, &allocated, errors));
    unique_items(&devices, device_id, errors);
    if !reserved.is_empty() && !allocation.is_set() {
        errors.forbidden(&reserved, "may not be specified when `allocated` is not set");
    } else if new.value.pointer("/metadata/deletionTimestamp").is_some() {
        let before = list(old.value, "/status/reservedFor");
        if reserved.items().any(|consumer| !before.contains(consumer.value)) {
            let why = "new entries may not be added while `deallocationRequested` or `deletionTimestamp` are set";
            errors.forbidden(&reserved, why);
        }
    }
    let was = old.at("status");
    if was.at("allocation").is_set() && allocation.is_set() {
        errors.immutable(&allocation, &was.at("allocation"));
    } else if allocation.is_set() {
        let spec = new.at("spec");
        result(&allocation, &Requests::of(spec.at("devices").value), errors);
    }
}

fn result(allocation: &Field<'_, '_>, requests: &Requests<'_>, errors: &mut Errors) {
    let devices = allocation.at("devices");
    let (results, config) = (devices.at("results"), devices.at("config"));
    if results.len() > RESULTS_MAX {
        errors.too_many(&results, RESULTS_MAX);
    } else {
        for result in results.items() {
            requests.check(&result.at("request"), errors);
            named(&result, errors);
            binding(&result, errors);
        }
    }
    if config.len() > 2 * CONFIGS_MAX {
        errors.too_many(&config, 2 * CONFIGS_MAX);
    } else {
        for config in config.items() {
            errors.need_one_of(&config.at("source"), &["FromClaim", "FromClass"]);
            requests.check_all(&config.at("requests"), errors);
            opaque(&config, PARAMETERS_MAX_BYTES, errors);
        }
    }
    node_selector(&allocation.at("nodeSelector"), errors);
}

/// Driver, pool, device and share.
fn named(device: &Field<'_, '_>, errors: &mut Errors) {
    let (name, share) = (device.at("device"), device.at("shareID"));
    driver_name(&device.at("driver"), errors);
    pool_name(&device.at("pool"), errors);
    errors.all(&name, label(name.str()));
    if share.is_set() {
        let canonical = uuid::Uuid::parse_str(share.str()).map(|id| id.hyphenated().to_string());
        match canonical {
            Err(error) => errors.invalid(&share, format!("error validating uid: {error}")),
            Ok(canonical) if canonical != share.str() => errors.invalid(
                &share,
                "uid must be in RFC 4122 normalized form, `xxxxxxxx-xxxx-xxxx-xxxx-xxxxxxxxxxxx` with lowercase hexadecimal characters",
            ),
            Ok(_) => {}
        }
    }
}

/// What a driver says of an allocated device.
fn device(device: &Field<'_, '_>, allocated: &HashSet<String>, errors: &mut Errors) {
    named(device, errors);
    let id = device_id(device.value);
    if !allocated.contains(&id) {
        errors.invalid(&device.with(&Value::from(id)), "must be an allocated device in the claim");
    }
    Is::AtMost(CONDITIONS_MAX).check(&device.at("conditions"), errors);
    Is::Conditions.check(&device.at("conditions"), errors);
    if device.at("data").is_set() {
        raw_object(&device.at("data"), PARAMETERS_MAX_BYTES, errors);
    }
    let network = device.at("networkData");
    Is::Bytes(INTERFACE_NAME_MAX).check(&network.at("interfaceName"), errors);
    Is::Bytes(HARDWARE_ADDRESS_MAX).check(&network.at("hardwareAddress"), errors);
    let ips = network.at("ips");
    if ips.len() > ADDRESSES_MAX {
        errors.too_many(&ips, ADDRESSES_MAX);
        return;
    }
    for ip in ips.items() {
        match crate::registry::checks::parse_cidr(ip.str()) {
            None => errors.invalid(&ip, "must be a valid address in CIDR form, (e.g. 10.9.8.7/24 or 2001:db8::1/64)"),
            Some((address, bits)) if format!("{address}/{bits}") != ip.str() => {
                errors.invalid(&ip, format!("must be in canonical form ({:?})", format!("{address}/{bits}")));
            }
            Some(_) => {}
        }
    }
    Is::Unique.check(&ips, errors);
}
