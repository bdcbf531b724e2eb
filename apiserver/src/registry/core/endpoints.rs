//! Endpoints.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, int, items_mut, list, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use apimachinery::names::is_dns1123_label;
use serde_json::Value;
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
    validate,
    row: Some(|object, clock: &Clock| vec![print::name(object), Value::from(shown(object)), clock.age(object)]),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    for subset in root.at("subsets").items() {
        let (ready, unready, ports) = (subset.at("addresses"), subset.at("notReadyAddresses"), subset.at("ports"));
        if ready.is_empty() && unready.is_empty() {
            errors.required(&subset, "must specify `addresses` or `notReadyAddresses`");
        }
        for address in ready.items().chain(unready.items()) {
            let ip = address.at("ip");
            endpoint_ip(&ip, errors);
            let host = address.at("hostname");
            if !host.is_blank() {
                errors.all(&host, is_dns1123_label(host.str()));
            }
        }
        let named = ports.len() > 1;
        for port in ports.items() {
            let name = port.at("name");
            if named && name.is_blank() {
                errors.required(&name, "");
            } else if !name.is_blank() {
                errors.all(&name, is_dns1123_label(name.str()));
            }
            errors.port(&port.at("port"));
            errors.need_one_of(&port.at("protocol"), &["SCTP", "TCP", "UDP"]);
        }
    }
}

/// An address that another host can reach. As `ValidateEndpointIP`.
pub fn endpoint_ip(field: &Field<'_, '_>, errors: &mut Errors) {
    let Ok(ip) = field.str().parse::<IpAddr>() else {
        errors.invalid(field, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
        return;
    };
    let link_local = match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.segments()[0] & 0xffc0 == 0xfe80,
    };
    if ip.is_unspecified() {
        errors.invalid(field, format!("may not be unspecified ({ip})"));
    }
    if ip.is_loopback() {
        errors.invalid(field, "may not be in the loopback range (127.0.0.0/8, ::1/128)");
    }
    if link_local {
        errors.invalid(field, "may not be in the link-local range (169.254.0.0/16, fe80::/10)");
    }
    if ip.is_multicast() {
        errors.invalid(field, "may not be in the multicast range (224.0.0.0/4, ff00::/8)");
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
