//! EndpointSlices.

use crate::registry::core::endpoints::{endpoint_ip, first_few};
use crate::registry::field::{Errors, Field};
use crate::registry::object::{count_change, int, items_mut, list, remove, semantically_equal, set, text};
use crate::registry::print::{self, Clock, UNSET};
use crate::registry::rules::Rules;
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain, is_label_value, is_qualified_name};
use serde_json::Value;
use std::collections::HashSet;
use std::net::IpAddr;

const ENDPOINTS_MAX: usize = 1000;
const PORTS_MAX: usize = 20_000;
const ADDRESSES_MAX: usize = 100;
const TOPOLOGY_MAX: usize = 16;
const HINTS_MAX: usize = 8;

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
    prepare_create: |object| drop_topology(object, None),
    // Labels say whose slice it is.
    prepare_update: |new, old| {
        drop_topology(new, Some(old));
        let labels = |object: &Value| object.pointer("/metadata/labels").cloned().unwrap_or_default();
        let changed = !semantically_equal(&labels(new), &labels(old));
        count_change(new, old, changed);
    },
    validate_update: |new, old, errors| errors.immutable(&new.at("addressType"), &old.at("addressType")),
    warnings: |new, _| {
        let deprecated = text(new, "/addressType") == "FQDN";
        deprecated.then(|| "addressType: FQDN endpoints are deprecated".to_owned()).into_iter().collect()
    },
    row: Some(row),
    ..Rules::DEFAULT
};

/// Topology is of a version that is no more. A node that was told there alone is told as it is today. As `dropTopologyOnV1`.
fn drop_topology(new: &mut Value, old: Option<&Value>) {
    let host = |endpoint: &Value| {
        endpoint.get("deprecatedTopology").and_then(|t| t.get("kubernetes.io/hostname")?.as_str().map(str::to_owned))
    };
    let before = old.map_or(&[][..], |old| list(old, "/endpoints"));
    if old.is_some() && list(new, "/endpoints") == before {
        return;
    }
    for endpoint in items_mut(new, "endpoints").filter(|endpoint| endpoint.get("deprecatedTopology").is_some()) {
        let node = host(endpoint).filter(|_| endpoint.get("nodeName").is_none_or(Value::is_null));
        if let Some(node) = node.filter(|node| before.iter().any(|e| host(e).as_ref() == Some(node))) {
            set(endpoint, "nodeName", node);
        }
        remove(endpoint, "deprecatedTopology");
    }
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let family = root.at("addressType");
    errors.need_one_of(&family, &["FQDN", "IPv4", "IPv6"]);
    let (endpoints, ports) = (root.at("endpoints"), root.at("ports"));
    if endpoints.len() > ENDPOINTS_MAX {
        errors.too_many(&endpoints, ENDPOINTS_MAX);
    } else {
        endpoints.items().for_each(|endpoint| self::endpoint(&endpoint, family.str(), errors));
    }
    if ports.len() > PORTS_MAX {
        errors.too_many(&ports, PORTS_MAX);
        return;
    }
    let mut names = HashSet::new();
    for port in ports.items() {
        let name = port.at("name");
        if !name.is_blank() {
            errors.all(&name, is_dns1123_label(name.str()));
        }
        if !names.insert(port.value.get("name").and_then(Value::as_str).unwrap_or("")) {
            errors.duplicate(&name);
        }
        let protocol = port.at("protocol");
        if !protocol.is_set() {
            errors.required(&protocol, "");
        }
        errors.one_of(&protocol, &["SCTP", "TCP", "UDP"]);
        errors.port(&port.at("port"));
        let application = port.at("appProtocol");
        if application.is_set() {
            errors.all(&application, is_qualified_name(application.str()));
        }
    }
}

fn endpoint(endpoint: &Field<'_, '_>, family: &str, errors: &mut Errors) {
    let addresses = endpoint.at("addresses");
    match addresses.len() {
        0 => errors.required(&addresses, "must contain at least 1 address"),
        1..=ADDRESSES_MAX => addresses.items().for_each(|address| self::address(&address, family, errors)),
        _ => errors.too_many(&addresses, ADDRESSES_MAX),
    }
    let (node, topology, host) = (endpoint.at("nodeName"), endpoint.at("deprecatedTopology"), endpoint.at("hostname"));
    if node.is_set() {
        errors.all(&node, is_dns1123_subdomain(node.str()));
    }
    if topology.len() > TOPOLOGY_MAX {
        errors.too_many(&topology, TOPOLOGY_MAX);
    }
    crate::registry::metadata::labels(&topology, errors);
    if topology.value.get("kubernetes.io/hostname").is_some() {
        let why = "must not be specified; use `nodeName` instead";
        errors.forbidden(&topology.key("kubernetes.io/hostname"), why);
    }
    if host.is_set() {
        errors.all(&host, is_dns1123_label(host.str()));
    }
    let hints = endpoint.at("hints");
    for (list, what) in [("forZones", "zone"), ("forNodes", "node")] {
        let named = hints.at(list);
        if named.len() > HINTS_MAX {
            errors.too_many(&named, HINTS_MAX);
            continue;
        }
        let mut seen = HashSet::new();
        for item in named.items() {
            let name = item.at("name");
            if what == "zone" && name.is_blank() {
                errors.required(&name, "");
            }
            if !seen.insert(name.str()) {
                errors.duplicate(&name);
            }
            errors
                .all(&name, if what == "zone" { is_label_value(name.str()) } else { is_dns1123_subdomain(name.str()) });
        }
    }
}

fn address(address: &Field<'_, '_>, family: &str, errors: &mut Errors) {
    match (family, address.str().parse::<IpAddr>()) {
        ("IPv4", Ok(IpAddr::V4(_))) | ("IPv6", Ok(IpAddr::V6(_))) => endpoint_ip(address, errors),
        ("IPv4", Ok(_)) => errors.invalid(address, "must be an IPv4 address"),
        ("IPv6", Ok(_)) => errors.invalid(address, "must be an IPv6 address"),
        ("IPv4" | "IPv6", Err(_)) => {
            errors.invalid(address, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
        }
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
