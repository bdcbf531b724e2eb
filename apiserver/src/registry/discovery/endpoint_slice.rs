//! EndpointSlices.

use crate::registry::core::endpoints::{endpoint_ip, first_few};
use crate::registry::core::port_name;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{int, items_mut, list, set, text};
use crate::registry::print::{self, Clock, UNSET};
use crate::registry::rules::Rules;
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain};
use serde_json::Value;
use std::collections::HashSet;
use std::net::IpAddr;

const ENDPOINTS_MAX: usize = 1000;
const PORTS_MAX: usize = 20_000;
const ADDRESSES_MAX: usize = 100;

pub const RULES: Rules = Rules {
    generation: true,
    default: |object| {
        for port in items_mut(object, "ports") {
            if port.get("name").is_none() {
                set(port, "name", "");
            }
            if port.get("protocol").is_none() {
                set(port, "protocol", "TCP");
            }
        }
    },
    validate,
    validate_update: |new, old, errors| errors.immutable(&new.at("addressType"), &old.at("addressType")),
    row: Some(row),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let family = root.at("addressType");
    errors.need_one_of(&family, &["FQDN", "IPv4", "IPv6"]);
    let (endpoints, ports) = (root.at("endpoints"), root.at("ports"));
    if endpoints.len() > ENDPOINTS_MAX {
        errors.too_many(&endpoints, ENDPOINTS_MAX);
    }
    for endpoint in endpoints.items() {
        let addresses = endpoint.at("addresses");
        if addresses.is_empty() {
            errors.required(&addresses, "must contain at least 1 address");
        } else if addresses.len() > ADDRESSES_MAX {
            errors.too_many(&addresses, ADDRESSES_MAX);
        }
        for address in addresses.items() {
            self::address(&address, family.str(), errors);
        }
        let host = endpoint.at("hostname");
        if host.is_set() {
            errors.all(&host, is_dns1123_label(host.str()));
        }
        let topology = endpoint.at("deprecatedTopology");
        crate::registry::metadata::labels(&topology, errors);
    }
    if ports.len() > PORTS_MAX {
        errors.too_many(&ports, PORTS_MAX);
    }
    let mut names = HashSet::new();
    for port in ports.items() {
        let name = port.at("name");
        if !name.is_blank() {
            errors.all(&name, port_name_or_label(name.str()));
        }
        if !names.insert(port.value.get("name").and_then(Value::as_str).unwrap_or("")) {
            errors.duplicate(&name);
        }
        errors.need_one_of(&port.at("protocol"), &["SCTP", "TCP", "UDP"]);
        errors.port(&port.at("port"));
    }
}

/// Services' ports are labels, containers' are shorter.
fn port_name_or_label(name: &str) -> Vec<String> {
    if port_name(name).is_empty() { Vec::new() } else { is_dns1123_label(name) }
}

fn address(address: &Field<'_, '_>, family: &str, errors: &mut Errors) {
    match (family, address.str().parse::<IpAddr>()) {
        ("IPv4", Ok(IpAddr::V4(_))) | ("IPv6", Ok(IpAddr::V6(_))) => endpoint_ip(address, errors),
        ("IPv4", _) => errors.invalid(address, "must be an IPv4 address"),
        ("IPv6", _) => errors.invalid(address, "must be an IPv6 address"),
        ("FQDN", _) => errors.all(address, is_dns1123_subdomain(address.str())),
        _ => {}
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let ports: Vec<String> = list(object, "/ports")
        .iter()
        .map(|port| match (int(port, "/port"), text(port, "/name")) {
            (Some(number), _) => number.to_string(),
            (None, "") => "*".to_owned(),
            (None, name) => name.to_owned(),
        })
        .collect();
    let addresses: Vec<String> = list(object, "/endpoints")
        .iter()
        .flat_map(|e| list(e, "/addresses").iter().filter_map(Value::as_str).map(ToOwned::to_owned))
        .collect();
    let shown = |all: &[String]| if all.is_empty() { UNSET.to_owned() } else { first_few(all) };
    vec![
        print::name(object),
        Value::from(text(object, "/addressType")),
        Value::from(shown(&ports)),
        Value::from(shown(&addresses)),
        clock.age(object),
    ]
}
