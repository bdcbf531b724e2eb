//! Ingresses.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{list, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain};
use serde_json::Value;

pub const RULES: Rules = Rules { generation: true, validate, row: Some(row), ..Rules::DEFAULT };

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let (rules, fallback) = (spec.at("rules"), spec.at("defaultBackend"));
    if rules.is_empty() && !fallback.is_set() {
        errors.invalid(&spec, "either `defaultBackend` or `rules` must be specified");
    }
    if fallback.is_set() {
        backend(&fallback, errors);
    }
    for rule in rules.items() {
        let host = rule.at("host");
        hostname(&host, errors);
        let http = rule.at("http");
        let paths = http.at("paths");
        if http.is_set() && paths.is_empty() {
            errors.required(&paths, "");
        }
        for path in paths.items() {
            let (value, kind) = (path.at("path"), path.at("pathType"));
            match kind.str() {
                "" => errors.required(&kind, "pathType must be specified"),
                "ImplementationSpecific" => {}
                "Exact" | "Prefix" if !value.str().starts_with('/') => {
                    errors.invalid(&value, "must be an absolute path");
                }
                "Exact" | "Prefix" => {
                    for bad in ["//", "/./", "/../", "%2f", "%2F"] {
                        if value.str().contains(bad) {
                            errors.invalid(&value, format!("must not contain '{bad}'"));
                        }
                    }
                }
                _ => errors.not_supported(&kind, &["Exact", "ImplementationSpecific", "Prefix"]),
            }
            backend(&path.at("backend"), errors);
        }
    }
    for tls in spec.at("tls").items() {
        for host in tls.at("hosts").items() {
            hostname(&host, errors);
        }
    }
    let class = spec.at("ingressClassName");
    if class.is_set() {
        errors.all(&class, is_dns1123_subdomain(class.str()));
    }
}

fn hostname(host: &Field<'_, '_>, errors: &mut Errors) {
    if host.is_blank() {
        return;
    }
    if host.str().parse::<std::net::IpAddr>().is_ok() {
        errors.invalid(host, "must be a DNS name, not an IP address");
    } else {
        errors.all(host, is_dns1123_subdomain(host.str().strip_prefix("*.").unwrap_or(host.str())));
    }
}

fn backend(backend: &Field<'_, '_>, errors: &mut Errors) {
    let (service, resource) = (backend.at("service"), backend.at("resource"));
    match (service.is_set(), resource.is_set()) {
        (true, true) => errors.invalid(backend, "cannot set both resource and service backends"),
        (false, false) => errors.required(&service, ""),
        (true, false) => {
            let (name, port) = (service.at("name"), service.at("port"));
            if errors.need(&name) {
                errors.all(&name, is_dns1123_label(name.str()));
            }
            match (port.at("number").int().filter(|n| *n != 0), port.at("name").is_blank()) {
                (Some(_), false) => errors.invalid(&port, "cannot set both port name & port number"),
                (None, true) => errors.required(&port, "port name or number is required"),
                (Some(_), true) => errors.port(&port.at("number")),
                (None, false) => errors.all(&port.at("name"), crate::registry::core::port_name(port.at("name").str())),
            }
        }
        (false, true) => {
            errors.need(&resource.at("kind"));
            errors.need(&resource.at("name"));
        }
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let mut hosts: Vec<&str> =
        list(object, "/spec/rules").iter().map(|r| text(r, "/host")).filter(|h| !h.is_empty()).collect();
    let more = hosts.len().saturating_sub(3);
    hosts.truncate(3);
    let hosts = match (hosts.is_empty(), more) {
        (true, _) => "*".to_owned(),
        (false, 0) => hosts.join(","),
        (false, more) => format!("{} + {more} more...", hosts.join(",")),
    };
    let mut addresses: Vec<&str> = list(object, "/status/loadBalancer/ingress")
        .iter()
        .map(|i| if text(i, "/ip").is_empty() { text(i, "/hostname") } else { text(i, "/ip") })
        .collect();
    addresses.sort_unstable();
    let ports = if list(object, "/spec/tls").is_empty() { "80" } else { "80, 443" };
    let class = text(object, "/spec/ingressClassName");
    vec![
        print::name(object),
        Value::from(if class.is_empty() { NONE } else { class }),
        Value::from(hosts),
        Value::from(addresses.join(",")),
        Value::from(ports),
        clock.age(object),
    ]
}
