//! Endpoints.

use super::PROTOCOLS;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, int, items_mut, list, set, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain, is_qualified_name};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::IpAddr;

const SHOWN_MAX: usize = 3;

pub const RULES: Rules = Rules {
    default: |object| {
        child(object, "metadata");
        for subset in items_mut(object, "subsets") {
            for port in items_mut(subset, "ports") {
                default(port, "protocol", "TCP");
            }
        }
    },
    create_on_update: true,
    canonicalize: repack,
    validate,
    warnings: |_, _| vec!["v1 Endpoints is deprecated in v1.33+; use discovery.k8s.io/v1 EndpointSlice".to_owned()],
    row: Some(|object, clock: &Clock| vec![print::name(object), Value::from(shown(object)), clock.age(object)]),
    ..Rules::DEFAULT
};

/// Each address once with each port, those with the same ports together; one that is not ready anywhere is so everywhere.
/// As `RepackSubsets`, but for the order of the subsets.
fn repack(object: &mut Value) {
    /// By address and the uid of what has it, as ports name them: the address, and is it ready?
    type Addresses = BTreeMap<(String, String), (Value, bool)>;
    let mut by_port: Vec<(Value, Addresses)> = Vec::new();
    let mut known: BTreeMap<(String, String), Value> = BTreeMap::new();
    for subset in list(object, "/subsets") {
        // What has no ports is kept as if it had one of its own.
        let ports = Some(list(subset, "/ports")).filter(|ports| !ports.is_empty()).unwrap_or(&[Value::Null]);
        for port in ports {
            let at = by_port.iter().position(|(other, _)| other == port).unwrap_or_else(|| {
                by_port.push((port.clone(), Addresses::new()));
                by_port.len() - 1
            });
            for (field, ready) in [("/addresses", true), ("/notReadyAddresses", false)] {
                for address in list(subset, field) {
                    let key = (text(address, "/ip").to_owned(), text(address, "/targetRef/uid").to_owned());
                    let address = known.entry(key.clone()).or_insert_with(|| address.clone()).clone();
                    by_port[at].1.entry(key).and_modify(|(_, was)| *was &= ready).or_insert((address, ready));
                }
            }
        }
    }
    let mut subsets: Vec<(Addresses, Vec<Value>)> = Vec::new();
    for (port, addresses) in by_port.into_iter().filter(|(_, addresses)| !addresses.is_empty()) {
        let ports = Some(port).filter(|port| !port.is_null());
        match subsets.iter_mut().find(|(other, _)| *other == addresses) {
            Some((_, others)) => others.extend(ports),
            None => subsets.push((addresses, ports.into_iter().collect())),
        }
    }
    let subsets: Vec<Value> = subsets
        .into_iter()
        .map(|(addresses, ports)| {
            let (ready, unready): (Vec<_>, Vec<_>) = addresses.into_values().partition(|(_, ready)| *ready);
            let mut subset = json!({});
            for (field, list) in [("addresses", ready), ("notReadyAddresses", unready)] {
                if !list.is_empty() {
                    set(&mut subset, field, list.into_iter().map(|(address, _)| address).collect::<Vec<_>>());
                }
            }
            if !ports.is_empty() {
                set(&mut subset, "ports", ports);
            }
            subset
        })
        .collect();
    if list(object, "/subsets") != subsets.as_slice() {
        set(object, "subsets", subsets);
    }
}

/// As `validateEndpointSubsets`.
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    for subset in root.at("subsets").items() {
        let (ready, unready, ports) = (subset.at("addresses"), subset.at("notReadyAddresses"), subset.at("ports"));
        if ready.is_empty() && unready.is_empty() {
            errors.required(&subset, "must specify `addresses` or `notReadyAddresses`");
        }
        for address in ready.items().chain(unready.items()) {
            let (ip, node) = (address.at("ip"), address.at("nodeName"));
            errors.ip(&ip);
            errors.named(&address.at("hostname"), is_dns1123_label);
            if node.is_set() {
                errors.all(&node, is_dns1123_subdomain(node.str()));
            }
            endpoint_ip(&ip, errors);
        }
        let named = ports.len() > 1;
        for port in ports.items() {
            let (name, number) = (port.at("name"), port.at("port"));
            if named {
                errors.need_named(&name, is_dns1123_label);
            } else {
                errors.named(&name, is_dns1123_label);
            }
            if !(1..=65535).contains(&number.int().unwrap_or(0)) {
                errors.invalid_as(&number, number.int().unwrap_or(0), "must be between 1 and 65535, inclusive");
            }
            errors.need_one_of(&port.at("protocol"), &PROTOCOLS);
            let app = port.at("appProtocol");
            if app.is_set() {
                errors.all(&app, is_qualified_name(app.str()));
            }
        }
    }
}

/// An address that another host can reach. As `ValidateNonSpecialIP`.
pub fn endpoint_ip(field: &Field<'_, '_>, errors: &mut Errors) {
    let Ok(ip) = field.str().parse::<IpAddr>() else {
        errors.invalid(field, "must be a valid IP address");
        return;
    };
    let (link_local, link_multicast) = match ip {
        IpAddr::V4(ip) => (ip.is_link_local(), ip.octets()[..3] == [224, 0, 0]),
        IpAddr::V6(ip) => (ip.segments()[0] & 0xffc0 == 0xfe80, ip.segments()[0] & 0xff0f == 0xff02),
    };
    if ip.is_unspecified() {
        errors.invalid(field, format!("may not be unspecified ({})", field.str()));
    }
    if ip.is_loopback() {
        errors.invalid(field, "may not be in the loopback range (127.0.0.0/8, ::1/128)");
    }
    if link_local {
        errors.invalid(field, "may not be in the link-local range (169.254.0.0/16, fe80::/10)");
    }
    if link_multicast {
        errors.invalid(field, "may not be in the link-local multicast range (224.0.0.0/24, ff02::/10)");
    }
}

/// As `formatEndpoints`.
fn shown(object: &Value) -> String {
    let mut all = Vec::new();
    for subset in list(object, "/subsets") {
        let addresses = list(subset, "/addresses");
        let ports = list(subset, "/ports");
        if ports.is_empty() {
            all.extend(addresses.iter().map(|a| text(a, "/ip").to_owned()));
        }
        for port in ports {
            let number = int(port, "/port").unwrap_or(0);
            all.extend(addresses.iter().map(|a| host_port(text(a, "/ip"), number)));
        }
    }
    if all.is_empty() { NONE.to_owned() } else { first_few(&all) }
}

fn host_port(ip: &str, port: i64) -> String {
    if ip.contains(':') { format!("[{ip}]:{port}") } else { format!("{ip}:{port}") }
}

/// Three, and how many more there are.
pub fn first_few(all: &[String]) -> String {
    let text = all[..all.len().min(SHOWN_MAX)].join(",");
    if all.len() > SHOWN_MAX { format!("{text} + {} more...", all.len() - SHOWN_MAX) } else { text }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_with_the_same_ports_are_told_together() {
        let (a, b) = (json!({"ip": "10.0.0.1"}), json!({"ip": "10.0.0.2"}));
        let (http, dns) = (json!({"port": 80}), json!({"port": 53}));
        for (subsets, packed) in [
            (json!([{"addresses": [a], "ports": [http]}]), None),
            (json!([{"addresses": [b, a, b], "ports": [http]}]), Some(json!([{"addresses": [a, b], "ports": [http]}]))),
            (
                json!([{"addresses": [a], "ports": [http]}, {"addresses": [a], "ports": [dns]}]),
                Some(json!([{"addresses": [a], "ports": [http, dns]}])),
            ),
            (
                json!([{"addresses": [a, b], "ports": [http]}, {"notReadyAddresses": [b], "ports": [http]}]),
                Some(json!([{"addresses": [a], "notReadyAddresses": [b], "ports": [http]}])),
            ),
            (json!([{"addresses": [a]}]), None),
        ] {
            let mut object = json!({"subsets": subsets});
            repack(&mut object);
            assert_eq!(object["subsets"], packed.unwrap_or(subsets));
        }
    }
}
