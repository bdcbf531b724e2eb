//! Ingresses.

use crate::registry::checks::{self, Is, check, invalid_without_value};
use crate::registry::core::port_name;
use crate::registry::field::{Errors, Field};
use crate::registry::metadata::{dns1035_label, path_segment};
use crate::registry::object::{list, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use apimachinery::names::is_dns1123_subdomain;
use apimachinery::status::FieldError;
use serde_json::Value;
use std::net::IpAddr;

const CLASS_ANNOTATION: &str = "kubernetes.io/ingress.class";

pub const RULES: Rules = Rules {
    generation: true,
    validate_create,
    validate_update: |new, old, errors| validate(new, Lenient::towards(old.value), errors),
    validate_status: |new, _, errors| {
        let status = new.at("status");
        let balancer = status.at("loadBalancer");
        for ingress in balancer.at("ingress").items() {
            let (ip, name) = (ingress.at("ip"), ingress.at("hostname"));
            if !ip.is_blank() && ip.str().parse::<IpAddr>().is_err() {
                errors.invalid(&ip, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
            }
            Is::Named(is_dns1123_subdomain).check(&name, errors);
            no_address(&name, errors);
        }
    },
    warnings: |new, old| {
        let annotated = new.pointer("/metadata/annotations").is_some_and(|a| a.get(CLASS_ANNOTATION).is_some());
        let warning =
            format!("annotation {CLASS_ANNOTATION:?} is deprecated, please use 'spec.ingressClassName' instead");
        (old.is_none() && annotated).then_some(warning).into_iter().collect()
    },
    row: Some(row),
    ..Rules::DEFAULT
};

/// What an update may leave as it is, wrong as it may be.
#[derive(Clone, Copy, Default)]
struct Lenient {
    secret_names: bool,
    wildcard_rules: bool,
}

impl Lenient {
    fn towards(old: &Value) -> Self {
        let bad_name =
            |tls: &Value| !text(tls, "/secretName").is_empty() && !secret_name(text(tls, "/secretName")).is_empty();
        let bad_rule = |rule: &Value| {
            let mut errors = Errors::default();
            http(&Field::root(rule).at("http"), &mut errors);
            text(rule, "/host").contains('*') && !errors.0.is_empty()
        };
        Self {
            secret_names: list(old, "/spec/tls").iter().any(bad_name),
            wildcard_rules: list(old, "/spec/rules").iter().any(bad_rule),
        }
    }
}

fn secret_name(name: &str) -> Vec<String> {
    is_dns1123_subdomain(name)
}

fn validate_create(root: &Field<'_, '_>, errors: &mut Errors) {
    validate(root, Lenient::default(), errors);
    let class = text(root.value, "/spec/ingressClassName");
    let annotation = root.value.pointer("/metadata/annotations").and_then(|a| a.get(CLASS_ANNOTATION));
    if let Some(named) = annotation.and_then(Value::as_str).filter(|named| !class.is_empty() && *named != class) {
        let path = format!("annotations.{CLASS_ANNOTATION}");
        errors.0.push(FieldError::invalid(path, named, "must match `ingressClassName` when both are specified"));
    }
}

/// As `ValidateIngressSpec`.
fn validate(root: &Field<'_, '_>, lenient: Lenient, errors: &mut Errors) {
    let spec = root.at("spec");
    let (rules, fallback) = (spec.at("rules"), spec.at("defaultBackend"));
    if rules.is_empty() && !fallback.is_set() {
        let why = "either `defaultBackend` or `rules` must be specified";
        errors.0.push(FieldError::invalid(spec.path(), Value::Array(Vec::new()), why));
    }
    if fallback.is_set() {
        backend(&fallback, errors);
    }
    for rule in rules.items() {
        let host = rule.at("host");
        if !host.is_blank() {
            no_address(&host, errors);
            checks::host(&host, errors);
        }
        if !(lenient.wildcard_rules && host.str().contains('*')) {
            http(&rule.at("http"), errors);
        }
    }
    for tls in spec.at("tls").items() {
        tls.at("hosts").items().for_each(|host| checks::host(&host, errors));
        if !lenient.secret_names {
            Is::Named(secret_name).check(&tls.at("secretName"), errors);
        }
    }
    let class = spec.at("ingressClassName");
    if class.is_set() {
        errors.all(&class, is_dns1123_subdomain(class.str()));
    }
}

fn no_address(host: &Field<'_, '_>, errors: &mut Errors) {
    if host.str().parse::<IpAddr>().is_ok() {
        errors.invalid(host, "must be a DNS name, not an IP address");
    }
}

fn http(http: &Field<'_, '_>, errors: &mut Errors) {
    let paths = http.at("paths");
    if http.is_set() && paths.is_empty() {
        errors.required(&paths, "");
    }
    for path in paths.items() {
        let (value, kind) = (path.at("path"), path.at("pathType"));
        if !kind.is_set() {
            errors.required(&kind, "pathType must be specified");
            continue;
        }
        let literal = matches!(kind.str(), "Exact" | "Prefix");
        match kind.str() {
            "Exact" | "Prefix" | "ImplementationSpecific" => {
                if !value.str().starts_with('/') && (literal || !value.is_blank()) {
                    errors.invalid(&value, "must be an absolute path");
                }
            }
            _ => errors.not_supported(&kind, &["Exact", "ImplementationSpecific", "Prefix"]),
        }
        for bad in ["//", "/./", "/../", "%2f", "%2F"].iter().filter(|bad| literal && value.str().contains(**bad)) {
            errors.invalid(&value, format!("must not contain '{bad}'"));
        }
        for bad in ["/..", "/."].iter().filter(|bad| literal && value.str().ends_with(**bad)) {
            errors.invalid(&value, format!("cannot end with '{bad}'"));
        }
        backend(&path.at("backend"), errors);
    }
}

/// As `validateIngressBackend`.
fn backend(backend: &Field<'_, '_>, errors: &mut Errors) {
    let (service, resource) = (backend.at("service"), backend.at("resource"));
    match (service.is_set(), resource.is_set()) {
        (true, true) => invalid_without_value(backend, "cannot set both resource and service backends", errors),
        (false, false) => invalid_without_value(backend, "resource or service backend is required", errors),
        (false, true) => check(&resource, &REFERENCE, errors),
        (true, false) => {
            let port = service.at("port");
            let (name, number) = (port.at("name"), port.at("number"));
            Is::RequiredName(dns1035_label).check(&service.at("name"), errors);
            match (number.int().is_some_and(|n| n != 0), name.is_blank()) {
                (true, false) => invalid_without_value(backend, "cannot set both port name & port number", errors),
                (false, true) => errors.required(backend, "port name or number is required"),
                (true, true) => errors.port(&number),
                (false, false) => errors.all(&name, port_name(name.str())),
            }
        }
    }
}

/// An object of another kind in the same namespace, or of the cluster.
pub const REFERENCE: [(&str, Is); 5] = [
    ("apiGroup", Is::Named(is_dns1123_subdomain)),
    ("kind", Is::Required("kind is required")),
    ("kind", Is::Named(path_segment)),
    ("name", Is::Required("name is required")),
    ("name", Is::Named(path_segment)),
];

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
    addresses.dedup();
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
