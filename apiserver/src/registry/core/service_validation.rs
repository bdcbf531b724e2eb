//! What a Service may say, and what may change of it. As `ValidateService` and `ValidateServiceUpdate`.

use super::PROTOCOLS;
use super::container_validation::port_or_name;
use super::endpoints::endpoint_ip;
use super::service::{HEADLESS, has_cluster_ip, is_headless};
use crate::registry::checks::legacy_cidr;
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::list;
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::{Value, json};
use std::net::IpAddr;

const CLIENT_IP_TIMEOUT_MAX: i64 = 86_400;
const SOURCE_RANGES: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
const FOR_BALANCERS: &str = "may only be used when `type` is 'LoadBalancer'";
const HINTS: &str = "service.kubernetes.io/topology-aware-hints";
const MODE: &str = "service.kubernetes.io/topology-mode";

pub fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    let annotations = meta.at("annotations");
    let (hints, mode) = (annotations.key(HINTS), annotations.key(MODE));
    if hints.is_set() && mode.is_set() && hints.value != mode.value {
        errors.invalid(&mode, format!("must match annotations[{HINTS}] when both are specified"));
    }
    let kind = spec.at("type");
    let (ports, headless) = (spec.at("ports"), is_headless(root.value));
    if ports.is_empty() && !headless && kind.str() != "ExternalName" {
        errors.required(&ports, "");
    }
    match kind.str() {
        "LoadBalancer" | "NodePort" if headless => errors.0.push(FieldError::invalid(
            format!("{}[0]", spec.at("clusterIPs").path()),
            HEADLESS,
            format!("may not be set to 'None' for {} services", kind.str()),
        )),
        "ExternalName" => external_name(&spec, errors),
        _ => {}
    }
    let named = ports.len() > 1;
    for (at, port) in ports.items().enumerate() {
        let name = port.at("name");
        if named && name.is_blank() {
            errors.required(&name, "");
        } else if !name.is_blank() {
            errors.all(&name, is_dns1123_label(name.str()));
            if ports.items().take(at).any(|p| p.at("name").str() == name.str()) {
                errors.duplicate(&name);
            }
        }
        self::port(&port, errors);
    }
    metadata::labels(&spec.at("selector"), errors);
    affinity(&spec, errors);
    cluster_ips(&spec, errors);
    for ip in spec.at("externalIPs").items() {
        if errors.ip(&ip).is_some() {
            endpoint_ip(&ip, errors);
        }
    }
    errors.need_one_of(&kind, &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
    port_numbers(&ports, kind.str(), errors);
    source_ranges(&spec, &annotations, errors);
    let (allocate, class) = (spec.at("allocateLoadBalancerNodePorts"), spec.at("loadBalancerClass"));
    if kind.str() == "LoadBalancer" {
        if !allocate.is_set() {
            errors.0.push(FieldError::required("allocateLoadBalancerNodePorts", ""));
        }
        if class.is_set() {
            errors.all(&class, is_qualified_name(class.str()));
        }
    } else {
        for field in [&allocate, &class] {
            if field.is_set() {
                errors.forbidden(field, FOR_BALANCERS);
            }
        }
    }
    traffic(root.value, &spec, errors);
}

fn external_name(spec: &Field<'_, '_>, errors: &mut Errors) {
    for name in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        let field = spec.at(name);
        if field.is_set() && !(field.value.is_array() && field.is_empty()) {
            errors.forbidden(&field, "may not be set for ExternalName services");
        }
    }
    let name = spec.at("externalName");
    // A trailing dot makes a name absolute.
    let bare = name.str().strip_suffix('.').unwrap_or(name.str());
    if bare.is_empty() {
        errors.required(&name, "");
    }
    for message in if bare.is_empty() { Vec::new() } else { is_dns1123_subdomain(bare) } {
        errors.invalid_as(&name, bare, message);
    }
}

/// As `validateServicePort`.
fn port(port: &Field<'_, '_>, errors: &mut Errors) {
    let (number, app) = (port.at("port"), port.at("appProtocol"));
    if !(1..=65535).contains(&number.int().unwrap_or(0)) {
        errors.invalid_as(&number, number.int().unwrap_or(0), "must be between 1 and 65535, inclusive");
    }
    errors.need_one_of(&port.at("protocol"), &PROTOCOLS);
    port_or_name(&port.at("targetPort"), errors);
    if app.is_set() {
        errors.all(&app, is_qualified_name(app.str()));
    }
}

/// Pairs of number and protocol come once.
fn port_numbers(ports: &Field<'_, '_>, kind: &str, errors: &mut Errors) {
    let alike = |a: &Field<'_, '_>, b: &Field<'_, '_>, field: &str| {
        a.value.get(field) == b.value.get(field) && a.value.get("protocol") == b.value.get("protocol")
    };
    for (at, port) in ports.items().enumerate() {
        let node = port.at("nodePort");
        if node.int().unwrap_or(0) == 0 {
            continue;
        }
        if kind == "ClusterIP" {
            errors.forbidden(&node, "may not be used when `type` is 'ClusterIP'");
        }
        if ports.items().take(at).any(|other| alike(&other, &port, "nodePort")) {
            errors.duplicate(&node);
        }
    }
    for (at, port) in ports.items().enumerate() {
        if ports.items().take(at).any(|other| alike(&other, &port, "port")) {
            let shown = json!({"protocol": port.at("protocol").value, "port": port.at("port").value, "targetPort": 0});
            errors.0.push(FieldError::duplicate(port.path(), shown));
        }
    }
}

fn affinity(spec: &Field<'_, '_>, errors: &mut Errors) {
    let (affinity, config) = (spec.at("sessionAffinity"), spec.at("sessionAffinityConfig"));
    errors.need_one_of(&affinity, &["ClientIP", "None"]);
    match affinity.str() {
        "None" if config.is_set() => errors.forbidden(&config, "must not be set when session affinity is None"),
        "ClientIP" => {
            let client = config.at("clientIP");
            let seconds = client.at("timeoutSeconds");
            let missing = [&config, &client, &seconds].into_iter().find(|field| !field.is_set());
            if let Some(missing) = missing {
                errors.required(missing, "when session affinity type is ClientIP");
            } else if seconds.int().is_none_or(|s| s <= 0 || s > CLIENT_IP_TIMEOUT_MAX) {
                errors.invalid(&seconds, format!("must be greater than 0 and less than {CLIENT_IP_TIMEOUT_MAX}"));
            }
        }
        _ => {}
    }
}

fn source_ranges(spec: &Field<'_, '_>, annotations: &Field<'_, '_>, errors: &mut Errors) {
    let balancer = spec.at("type").str() == "LoadBalancer";
    let ranges = spec.at("loadBalancerSourceRanges");
    // Kubernetes writes it in capitals.
    let shown = spec.at("LoadBalancerSourceRanges").with(ranges.value);
    let trimmed = |text: &str| Value::from(text.trim());
    if !ranges.is_empty() {
        if !balancer {
            errors.forbidden(&shown, FOR_BALANCERS);
        }
        for range in shown.items() {
            legacy_cidr(&range.with(&trimmed(range.str())), errors);
        }
        return;
    }
    let annotation = annotations.key(SOURCE_RANGES);
    if annotation.is_set() {
        if !balancer {
            errors.forbidden(&annotation, FOR_BALANCERS);
        }
        for range in annotation.str().split(',').filter(|_| !annotation.str().trim().is_empty()) {
            legacy_cidr(&annotation.with(&trimmed(range)), errors);
        }
    }
}

/// Does anybody from outside reach it? As `ExternallyAccessible`.
pub fn is_external(service: &Value) -> bool {
    match service.pointer("/spec/type").and_then(Value::as_str) {
        Some("LoadBalancer" | "NodePort") => true,
        Some("ClusterIP") => !list(service, "/spec/externalIPs").is_empty(),
        _ => false,
    }
}

/// As `NeedsHealthCheck`.
pub fn needs_health_check(service: &Value) -> bool {
    let text = |pointer| service.pointer(pointer).and_then(Value::as_str);
    text("/spec/type") == Some("LoadBalancer") && text("/spec/externalTrafficPolicy") == Some("Local")
}

fn traffic(service: &Value, spec: &Field<'_, '_>, errors: &mut Errors) {
    let (external, internal) = (spec.at("externalTrafficPolicy"), spec.at("internalTrafficPolicy"));
    if is_external(service) {
        errors.need_one_of(&external, &["Cluster", "Local"]);
    } else if !external.is_blank() {
        errors.invalid(&external, "may only be set for externally-accessible services");
    }
    let check = spec.at("healthCheckNodePort");
    let number = check.int().unwrap_or(0);
    if number != 0 && !needs_health_check(service) {
        errors.invalid(&check, "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'");
    } else if number != 0 {
        errors.port(&check);
    }
    if has_cluster_ip(spec.at("type").str()) && !internal.is_set() {
        errors.required(&internal, "");
    }
    errors.one_of(&internal, &["Cluster", "Local"]);
    errors.one_of(&spec.at("trafficDistribution"), &["PreferClose", "PreferSameNode", "PreferSameZone"]);
}

// === addresses ===

/// As `ValidateServiceClusterIPsRelatedFields`.
fn cluster_ips(spec: &Field<'_, '_>, errors: &mut Errors) {
    if spec.at("type").str() == "ExternalName" {
        return;
    }
    let (one, many, families) = (spec.at("clusterIP"), spec.at("clusterIPs"), spec.at("ipFamilies"));
    match (one.is_blank(), many.items().next().map(|first| first.str() == one.str())) {
        (false, None) => errors.required(&many, ""),
        (false, Some(false)) => errors.invalid(&many, "first value must match `clusterIP`"),
        (true, Some(_)) => errors.invalid(&many, "must be empty when `clusterIP` is not specified"),
        _ => {}
    }
    for (at, family) in families.items().enumerate() {
        errors.one_of(&family, &["IPv4", "IPv6"]);
        if families.items().take(at).any(|other| other.str() == family.str()) {
            errors.duplicate(&family);
        }
    }
    errors.one_of(&spec.at("ipFamilyPolicy"), &["PreferDualStack", "RequireDualStack", "SingleStack"]);
    let mut wrong = false;
    let mut ips: Vec<Option<IpAddr>> = Vec::new();
    for (at, ip) in many.items().enumerate() {
        if at == 0 && ip.str() == HEADLESS {
            if many.len() > 1 {
                wrong = true;
                errors.invalid(&many, "'None' must be the first and only value");
            }
            ips.push(None);
            continue;
        }
        let parsed = errors.ip(&ip);
        wrong |= parsed.is_none();
        ips.push(parsed);
    }
    if many.len() > 2 {
        errors.invalid(&many, "may only hold up to 2 values");
    }
    if wrong {
        return;
    }
    if many.len() > 1 {
        let v6 = ips.iter().flatten().filter(|ip| ip.is_ipv6()).count();
        if v6 == 0 || v6 == ips.len() {
            errors.invalid(&many, "may specify no more than one IP for each IP family");
        }
    }
    for (at, (ip, family)) in many.items().zip(families.items()).enumerate() {
        let (Some(parsed), expected) = (ips[at], family.str()) else { continue };
        if matches!(expected, "IPv4" | "IPv6") && (expected == "IPv6") != parsed.is_ipv6() {
            errors.invalid(&ip, format!("expected an {expected} value as indicated by `ipFamilies[{at}]`"));
        }
    }
}

pub fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    let (kind, before) = (now.at("type").str(), was.at("type").str());
    if kind != "ExternalName" && before != "ExternalName" {
        let (headless, was_headless) = (is_headless(new.value), is_headless(old.value));
        if !(headless && was_headless) {
            kept(&now, &was, "clusterIPs", "clusterIP", errors);
        }
        if !headless && !was_headless {
            kept(&now, &was, "ipFamilies", "ipFamily", errors);
        }
    }
    let (class, before_class) = (now.at("loadBalancerClass"), was.at("loadBalancerClass"));
    if kind == "LoadBalancer" && before == "LoadBalancer" && class.value != before_class.value {
        errors.invalid(&class, "may not change once set");
    }
    let check = now.at("healthCheckNodePort");
    if needs_health_check(new.value)
        && needs_health_check(old.value)
        && check.int().unwrap_or(0) != was.at("healthCheckNodePort").int().unwrap_or(0)
    {
        errors.forbidden(&check, "field is immutable");
    }
}

/// The first stays; a second one comes, or goes if the policy says so. As `validateUpgradeDowngradeClusterIPs` and
/// `validateUpgradeDowngradeIPFamilies`.
fn kept(now: &Field<'_, '_>, was: &Field<'_, '_>, name: &str, one: &str, errors: &mut Errors) {
    let (list, before) = (now.at(name), was.at(name));
    let (now_list, before_list) =
        (self::list(now.value, &format!("/{name}")), self::list(was.value, &format!("/{name}")));
    let shown = if list.is_set() { list.value.clone() } else { Value::Null };
    let at = |index: usize| format!("{}[{index}]", list.path());
    let changed = |index: usize| FieldError::invalid(at(index), shown.clone(), "may not change once set");
    if now_list.len() == before_list.len() {
        for (index, (new, old)) in now_list.iter().zip(before_list).enumerate() {
            if new != old {
                errors.0.push(changed(if one == "ipFamily" { 0 } else { index }));
            }
        }
        return;
    }
    if now_list.is_empty() {
        errors.0.push(FieldError::invalid(at(0), shown.clone(), format!("primary {one} can not be unset")));
    } else if !before_list.is_empty() && now_list[0] != before_list[0] {
        errors.0.push(changed(0));
    }
    let policy = now.at("ipFamilyPolicy");
    if before.len() > now_list.len() && now_list.len() == 1 && policy.str() != "SingleStack" {
        errors.invalid(&policy, format!("must be set to 'SingleStack' when releasing the secondary {one}"));
    }
}

// === status ===

/// As `ValidateLoadBalancerStatus`.
pub fn validate_status(new: &Field<'_, '_>, _old: &Field<'_, '_>, errors: &mut Errors) {
    let (spec, status) = (new.at("spec"), new.at("status"));
    crate::registry::checks::conditions(&status.at("conditions"), errors);
    let balancer = status.at("loadBalancer");
    let ingresses = balancer.at("ingress");
    if spec.at("type").str() != "LoadBalancer" && !ingresses.is_empty() {
        errors.forbidden(&ingresses, "may only be used when `spec.type` is 'LoadBalancer'");
        return;
    }
    for ingress in ingresses.items() {
        let (ip, mode, host) = (ingress.at("ip"), ingress.at("ipMode"), ingress.at("hostname"));
        if !ip.is_blank() {
            errors.ip(&ip);
        }
        match (mode.is_set(), ip.is_blank()) {
            (false, false) => errors.required(&mode, "must be specified when `ip` is set"),
            (true, true) => errors.forbidden(&mode, "may not be specified when `ip` is not set"),
            _ => errors.one_of(&mode, &["Proxy", "VIP"]),
        }
        errors.named(&host, is_dns1123_subdomain);
        if host.str().parse::<IpAddr>().is_ok() {
            errors.invalid(&host, "must be a DNS name, not an IP address");
        }
    }
}

// === warnings ===

/// As `GetWarningsForService`.
pub fn warnings(new: &Value, old: Option<&Value>) -> Vec<String> {
    let root = Field::root(new);
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    let mut warnings = Vec::new();
    if meta.at("annotations").key(HINTS).is_set() {
        warnings.push(format!("metadata.annotations[{HINTS}]: please use {MODE} instead"));
    }
    let kind = spec.at("type").str();
    if kind == "ClusterIP" && spec.at("clusterIP").str() == HEADLESS {
        let ignored = [
            (!spec.at("loadBalancerIP").is_blank(), "spec.loadBalancerIP"),
            (!spec.at("externalIPs").is_empty(), "spec.externalIPs"),
            (spec.at("sessionAffinity").str() == "ClientIP", "spec.SessionAffinity"),
        ];
        warnings.extend(
            ignored
                .iter()
                .filter(|(set, _)| *set)
                .map(|(_, field)| format!("{field} is ignored for headless services")),
        );
    }
    for (list, name) in [("clusterIPs", "spec.clusterIPs"), ("externalIPs", "spec.externalIPs")] {
        for (at, ip) in spec.at(list).items().enumerate() {
            warnings.extend(canonical(ip.str()).map(|w| format!("{name}[{at}]: {w}")));
        }
    }
    if kind == "ExternalName" && !spec.at("externalIPs").is_empty() {
        warnings.push("spec.externalIPs is ignored when spec.type is \"ExternalName\"".to_owned());
    }
    if kind != "ExternalName" && !spec.at("externalName").is_blank() {
        warnings.push("spec.externalName is ignored when spec.type is not \"ExternalName\"".to_owned());
    }
    let distribution = spec.at("trafficDistribution").str();
    if distribution == "PreferClose"
        && old.is_none_or(|old| old.pointer("/spec/trafficDistribution") != Some(&json!("PreferClose")))
    {
        warnings.push("spec.trafficDistribution: \"PreferClose\" is deprecated; use \"PreferSameZone\"".to_owned());
    }
    warnings
}

/// Is an address written as it should be? As `GetWarningsForIP`.
fn canonical(text: &str) -> Option<String> {
    let ip: IpAddr = text.parse().ok()?;
    (ip.is_ipv6() && ip.to_string() != text)
        .then(|| format!("IPv6 address {text:?} should be in RFC 5952 canonical format ({:?})", ip.to_string()))
}
