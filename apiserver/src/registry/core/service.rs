//! Services: their many defaults, what their types allow, and their row. Cluster IPs and node ports are given by
//! `registry::allocation`.

use super::port_or_name;
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{child, copy_field, default, int, items_mut, list, map, remove, set, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use apimachinery::names::{is_dns1123_label, is_dns1123_subdomain};
use apimachinery::status::FieldError;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::net::IpAddr;

/// A `clusterIP` of this value asks for none.
pub const HEADLESS: &str = "None";
const CLIENT_IP_TIMEOUT_SECONDS: i64 = 10_800;
const CLIENT_IP_TIMEOUT_MAX: i64 = 86_400;

pub const RULES: Rules = Rules {
    name: metadata::dns1035_label,
    default: defaults,
    prepare_create: |object| drop_type_dependent(object, None),
    prepare_update: |new, old| {
        normalize_cluster_ips(new, old);
        keep_allocated(new, old);
        drop_type_dependent(new, Some(old));
    },
    validate,
    validate_update,
    selectable_names: &["spec.clusterIP", "spec.type"],
    selectable: |object| {
        vec![
            ("spec.clusterIP", text(object, "/spec/clusterIP").to_owned()),
            ("spec.type", text(object, "/spec/type").to_owned()),
        ]
    },
    row: Some(row),
    ..Rules::DEFAULT
};

/// Service types that have a cluster IP.
fn has_cluster_ip(kind: &str) -> bool {
    matches!(kind, "ClusterIP" | "NodePort" | "LoadBalancer")
}

pub fn has_node_ports(object: &Value) -> bool {
    match text(object, "/spec/type") {
        "NodePort" => true,
        "LoadBalancer" => object.pointer("/spec/allocateLoadBalancerNodePorts") != Some(&Value::Bool(false)),
        _ => false,
    }
}

/// True for a service that is reached through its own address only by name.
pub fn is_headless(object: &Value) -> bool {
    text(object, "/spec/clusterIP") == HEADLESS
        || list(object, "/spec/clusterIPs").first().is_some_and(|ip| ip == HEADLESS)
}

/// As `SetDefaults_Service`.
fn defaults(object: &mut Value) {
    let balancer = child(child(object, "status"), "loadBalancer");
    for ingress in items_mut(balancer, "ingress").filter(|ingress| ingress.get("ip").is_some()) {
        default(ingress, "ipMode", "VIP");
    }
    let spec = child(object, "spec");
    default(spec, "sessionAffinity", "None");
    if spec["sessionAffinity"] == "None" {
        remove(spec, "sessionAffinityConfig");
    } else {
        let client_ip = child(child(spec, "sessionAffinityConfig"), "clientIP");
        default(client_ip, "timeoutSeconds", CLIENT_IP_TIMEOUT_SECONDS);
    }
    default(spec, "type", "ClusterIP");
    for port in items_mut(spec, "ports") {
        default(port, "protocol", "TCP");
        let unset = match port.get("targetPort") {
            None | Some(Value::Null) => true,
            Some(Value::Number(n)) => n.as_i64() == Some(0),
            Some(Value::String(name)) => name.is_empty(),
            Some(_) => false,
        };
        if let Some(number) = port.get("port").cloned().filter(|_| unset) {
            set(port, "targetPort", number);
        }
    }
    let kind = spec["type"].as_str().unwrap_or("").to_owned();
    let external = !list(spec, "/externalIPs").is_empty();
    if matches!(kind.as_str(), "NodePort" | "LoadBalancer") || (kind == "ClusterIP" && external) {
        default(spec, "externalTrafficPolicy", "Cluster");
    }
    if has_cluster_ip(&kind) {
        default(spec, "internalTrafficPolicy", "Cluster");
    }
    if kind == "LoadBalancer" && spec.get("allocateLoadBalancerNodePorts").is_none() {
        set(spec, "allocateLoadBalancerNodePorts", true);
    }
    for blank in ["externalName", "loadBalancerIP", "clusterIP"] {
        if spec.get(blank).is_some_and(|value| value == "") {
            remove(spec, blank);
        }
    }
    // One and the same thing, told twice.
    let (one, many) = (spec.get("clusterIP").cloned(), list(spec, "/clusterIPs").to_vec());
    match (one.as_ref().and_then(Value::as_str).unwrap_or(""), many.is_empty()) {
        ("", _) => {}
        (ip, true) => set(spec, "clusterIPs", json!([ip])),
        (_, false) => {}
    }
    if one.is_none_or(|ip| ip == "") && !many.is_empty() && spec["type"] != "ExternalName" {
        set(spec, "clusterIP", many[0].clone());
    }
}

/// Clients that know `clusterIP` alone change it alone: `clusterIPs` follows. As `NormalizeClusterIPs`.
fn normalize_cluster_ips(new: &mut Value, old: &Value) {
    let spec = child(new, "spec");
    let (one, before) = (text(spec, "/clusterIP").to_owned(), text(old, "/spec/clusterIP"));
    if one != before && spec.get("clusterIPs") == old.pointer("/spec/clusterIPs") {
        if one.is_empty() {
            remove(spec, "clusterIPs");
        } else {
            let mut ips = list(spec, "/clusterIPs").to_vec();
            ips.drain(..ips.len().min(1));
            ips.insert(0, Value::from(one));
            set(spec, "clusterIPs", ips);
        }
    }
}

/// An update that leaves out what was allocated keeps it. As `patchAllocatedValues`.
fn keep_allocated(new: &mut Value, old: &Value) {
    let (kind, before) = (text(new, "/spec/type").to_owned(), text(old, "/spec/type"));
    let spec = child(new, "spec");
    if has_cluster_ip(&kind) && has_cluster_ip(before) {
        if text(spec, "/clusterIP").is_empty() {
            copy_field(spec, &old["spec"], "clusterIP");
            if list(spec, "/clusterIPs").is_empty() {
                copy_field(spec, &old["spec"], "clusterIPs");
            }
        }
        for field in ["ipFamilies", "ipFamilyPolicy"] {
            if spec.get(field).is_none() {
                copy_field(spec, &old["spec"], field);
            }
        }
    }
    let ports = ["NodePort", "LoadBalancer"];
    if ports.contains(&kind.as_str()) && ports.contains(&before) {
        for port in items_mut(spec, "ports").filter(|port| int(port, "/nodePort").unwrap_or(0) == 0) {
            let same = |p: &&Value| p["port"] == port["port"] && p["protocol"] == port["protocol"];
            if let Some(number) = list(old, "/spec/ports").iter().find(same).and_then(|p| int(p, "/nodePort")) {
                set(port, "nodePort", number);
            }
        }
    }
    if kind == "LoadBalancer" && before == "LoadBalancer" && int(spec, "/healthCheckNodePort").unwrap_or(0) == 0 {
        copy_field(spec, &old["spec"], "healthCheckNodePort");
    }
}

/// What belongs to the old type goes with it, unless it was changed by hand. As `dropTypeDependentFields`.
fn drop_type_dependent(new: &mut Value, old: Option<&Value>) {
    let Some(old) = old else { return };
    let (kind, before) = (text(new, "/spec/type").to_owned(), text(old, "/spec/type").to_owned());
    if kind == before {
        return;
    }
    let spec = child(new, "spec");
    let same = |spec: &Value, field: &str| spec.get(field) == old["spec"].get(field);
    if kind == "ExternalName" {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"] {
            if same(spec, field) || field == "internalTrafficPolicy" {
                remove(spec, field);
            }
        }
    } else if before == "ExternalName" && same(spec, "externalName") {
        remove(spec, "externalName");
    }
    if !matches!(kind.as_str(), "NodePort" | "LoadBalancer") {
        for (at, port) in items_mut(spec, "ports").enumerate() {
            let was = old.pointer(&format!("/spec/ports/{at}/nodePort"));
            if port.get("nodePort") == was {
                remove(port, "nodePort");
            }
        }
        if list(spec, "/externalIPs").is_empty() && same(spec, "externalTrafficPolicy") {
            remove(spec, "externalTrafficPolicy");
        }
    }
    if kind != "LoadBalancer" {
        for field in ["allocateLoadBalancerNodePorts", "loadBalancerClass", "healthCheckNodePort"] {
            if same(spec, field) {
                remove(spec, field);
            }
        }
        set(new, "status", json!({"loadBalancer": {}}));
    }
}

/// As `ValidateService`.
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let kind = spec.at("type");
    errors.need_one_of(&kind, &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"]);
    let ports = spec.at("ports");
    if ports.is_empty() && !is_headless(root.value) && kind.str() != "ExternalName" {
        errors.required(&ports, "");
    }
    if kind.str() == "LoadBalancer" && is_headless(root.value) {
        let ips = spec.at("clusterIPs");
        errors.invalid(&ips, "may not be set to 'None' for LoadBalancer services");
    }
    if kind.str() == "ExternalName" {
        external_name(&spec, errors);
    }
    self::ports(&ports, kind.str(), errors);
    metadata::labels(&spec.at("selector"), errors);
    affinity(&spec, errors);
    cluster_ips(&spec, errors);
    for ip in spec.at("externalIPs").items() {
        super::endpoints::endpoint_ip(&ip, errors);
    }
    let external = spec.at("externalTrafficPolicy");
    let can = matches!(kind.str(), "NodePort" | "LoadBalancer")
        || (kind.str() == "ClusterIP" && !spec.at("externalIPs").is_empty());
    if can {
        errors.need_one_of(&external, &["Cluster", "Local"]);
    } else if external.is_set() {
        errors.invalid(&external, "may only be set for externally-accessible services");
    }
    let internal = spec.at("internalTrafficPolicy");
    if has_cluster_ip(kind.str()) {
        errors.need_one_of(&internal, &["Cluster", "Local"]);
    }
    for range in spec.at("loadBalancerSourceRanges").items() {
        if !super::node::is_cidr(range.str().trim()) {
            errors.invalid(&range, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)");
        }
    }
    let class = spec.at("loadBalancerClass");
    if class.is_set() && kind.str() != "LoadBalancer" {
        errors.forbidden(&class, "may only be used when `type` is 'LoadBalancer'");
    }
    let allocate = spec.at("allocateLoadBalancerNodePorts");
    if allocate.is_set() && kind.str() != "LoadBalancer" {
        errors.forbidden(&allocate, "may only be used when `type` is 'LoadBalancer'");
    }
    errors.one_of(&spec.at("trafficDistribution"), &["PreferClose", "PreferSameZone", "PreferSameNode"]);
}

fn external_name(spec: &Field<'_, '_>, errors: &mut Errors) {
    for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        let field = spec.at(field);
        if !field.is_blank() || !field.is_empty() {
            errors.forbidden(&field, "may not be set for ExternalName services");
        }
    }
    let name = spec.at("externalName");
    // A trailing dot makes a name absolute.
    let bare = name.str().strip_suffix('.').unwrap_or(name.str());
    if bare.is_empty() {
        errors.required(&name, "");
    } else {
        errors.all(&name, is_dns1123_subdomain(bare));
    }
}

fn ports(ports: &Field<'_, '_>, kind: &str, errors: &mut Errors) {
    let named = ports.len() > 1;
    let (mut names, mut numbers, mut node_ports) = (HashSet::new(), HashSet::new(), HashSet::new());
    for port in ports.items() {
        let (name, number, target) = (port.at("name"), port.at("port"), port.at("targetPort"));
        let (protocol, node) = (port.at("protocol"), port.at("nodePort"));
        if named && name.is_blank() {
            errors.required(&name, "");
        } else if !name.is_blank() {
            errors.all(&name, is_dns1123_label(name.str()));
            if !names.insert(port.value["name"].as_str()) {
                errors.duplicate(&name);
            }
        }
        if number.int().is_none_or(|n| !(1..=65535).contains(&n)) {
            let shown = number.int().unwrap_or(0);
            errors.0.push(FieldError::invalid(number.path(), shown, "must be between 1 and 65535, inclusive"));
        }
        errors.need_one_of(&protocol, &["SCTP", "TCP", "UDP"]);
        port_or_name(&target, errors);
        if !numbers.insert((port.value["port"].as_i64(), port.value["protocol"].as_str())) {
            let shown = json!({"protocol": protocol.value, "port": number.value});
            errors.0.push(FieldError::duplicate(port.path(), shown));
        }
        if let Some(wanted) = node.int().filter(|n| *n != 0) {
            if !matches!(kind, "NodePort" | "LoadBalancer") {
                errors.forbidden(&node, format!("may not be used when `type` is '{kind}'"));
            } else if !node_ports.insert((wanted, port.value["protocol"].as_str())) {
                errors.duplicate(&node);
            }
        }
        let app = port.at("appProtocol");
        if app.is_set() {
            errors.all(&app, apimachinery::names::is_qualified_name(app.str()));
        }
    }
}

fn affinity(spec: &Field<'_, '_>, errors: &mut Errors) {
    let affinity = spec.at("sessionAffinity");
    errors.need_one_of(&affinity, &["ClientIP", "None"]);
    let config = spec.at("sessionAffinityConfig");
    if affinity.str() == "None" && config.is_set() {
        errors.forbidden(&config, "must not be set when session affinity is None");
    } else if affinity.str() == "ClientIP" {
        let client = config.at("clientIP");
        let seconds = client.at("timeoutSeconds");
        if seconds.int().is_none_or(|s| s <= 0 || s > CLIENT_IP_TIMEOUT_MAX) {
            errors.invalid(&seconds, format!("must be greater than 0 and less than {CLIENT_IP_TIMEOUT_MAX}"));
        }
    }
}

fn cluster_ips(spec: &Field<'_, '_>, errors: &mut Errors) {
    let (one, many) = (spec.at("clusterIP"), spec.at("clusterIPs"));
    if many.len() > 2 {
        errors.invalid(&many, "may only hold up to 2 values");
    }
    if !one.is_blank() && !many.is_empty() && many.items().next().is_some_and(|first| first.str() != one.str()) {
        errors.invalid(&many, "first value must match `clusterIP`");
    }
    for (at, ip) in many.items().enumerate() {
        if ip.str() == HEADLESS {
            if at > 0 {
                errors.invalid(&ip, "'None' must be the first and only value");
            }
        } else if ip.str().parse::<IpAddr>().is_err() {
            errors.invalid(&ip, "must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)");
        }
    }
    for family in spec.at("ipFamilies").items() {
        errors.one_of(&family, &["IPv4", "IPv6"]);
    }
    errors.one_of(&spec.at("ipFamilyPolicy"), &["SingleStack", "PreferDualStack", "RequireDualStack"]);
}

/// A cluster IP stays for as long as the type has one. As `ValidateServiceClusterIPsRelatedFields` on update.
fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    if !has_cluster_ip(now.at("type").str()) || !has_cluster_ip(was.at("type").str()) {
        return;
    }
    let (ips, before) = (now.at("clusterIPs"), was.at("clusterIPs"));
    let first = |ips: &Field<'_, '_>| ips.value.get(0).and_then(Value::as_str).unwrap_or("").to_owned();
    let (primary, earlier) = (first(&ips), first(&before));
    if earlier.is_empty() || primary == earlier {
        return;
    }
    if primary.is_empty() {
        errors.invalid(&ips, "primary clusterIP can not be unset");
    } else {
        errors.0.push(FieldError::invalid(format!("{}[0]", ips.path()), ips.value.clone(), "may not change once set"));
    }
}

/// As `printService`.
fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let ip = list(object, "/spec/clusterIPs").first().and_then(Value::as_str).unwrap_or("");
    vec![
        print::name(object),
        Value::from(text(object, "/spec/type")),
        print::or_none(if ip.is_empty() { text(object, "/spec/clusterIP") } else { ip }),
        Value::from(external_ips(object)),
        Value::from(ports_text(object)),
        clock.age(object),
        Value::from(print::labels(map(object, "/spec/selector"))),
    ]
}

fn external_ips(object: &Value) -> String {
    let own: Vec<&str> = list(object, "/spec/externalIPs").iter().filter_map(Value::as_str).collect();
    match text(object, "/spec/type") {
        "ExternalName" => text(object, "/spec/externalName").to_owned(),
        "LoadBalancer" => {
            let ingress = list(object, "/status/loadBalancer/ingress").iter();
            let balanced = ingress.map(|i| match text(i, "/ip") {
                "" => text(i, "/hostname"),
                ip => ip,
            });
            let mut all: Vec<&str> = balanced.filter(|a| !a.is_empty()).collect();
            all.sort_unstable();
            all.extend(own);
            if all.is_empty() { "<pending>".to_owned() } else { all.join(",") }
        }
        _ if own.is_empty() => NONE.to_owned(),
        _ => own.join(","),
    }
}

fn ports_text(object: &Value) -> String {
    let port = |port: &Value| {
        let (number, protocol) = (int(port, "/port").unwrap_or(0), text(port, "/protocol"));
        match int(port, "/nodePort").unwrap_or(0) {
            0 => format!("{number}/{protocol}"),
            node => format!("{number}:{node}/{protocol}"),
        }
    };
    let texts: Vec<String> = list(object, "/spec/ports").iter().map(port).collect();
    if texts.is_empty() { NONE.to_owned() } else { texts.join(",") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn errors_of(object: &Value) -> Vec<String> {
        let mut errors = Errors::default();
        validate(&Field::root(object), &mut errors);
        errors.0.iter().map(ToString::to_string).collect()
    }

    fn service(spec: Value) -> Value {
        let mut object = json!({"metadata": {"name": "s"}, "spec": spec});
        defaults(&mut object);
        object
    }

    #[test]
    fn defaults_are_those_of_the_type() {
        let plain = service(json!({"ports": [{"port": 80}]}));
        assert_eq!(
            plain["spec"],
            json!({"type": "ClusterIP", "sessionAffinity": "None", "internalTrafficPolicy": "Cluster",
                "ports": [{"port": 80, "protocol": "TCP", "targetPort": 80}]})
        );
        let balanced = service(json!({"type": "LoadBalancer", "ports": [{"port": 80, "targetPort": "web"}]}));
        assert_eq!(balanced["spec"]["externalTrafficPolicy"], "Cluster");
        assert_eq!(balanced["spec"]["allocateLoadBalancerNodePorts"], true);
        assert!(errors_of(&plain).is_empty() && errors_of(&balanced).is_empty());
        let headless = service(json!({"clusterIP": "None"}));
        assert_eq!(headless["spec"]["clusterIPs"], json!(["None"]));
        assert!(errors_of(&headless).is_empty(), "{:?}", errors_of(&headless));
    }

    #[test]
    fn mistakes_are_named() {
        for (spec, message) in [
            (json!({}), "spec.ports: Required value"),
            (
                json!({"ports": [{"port": 0}]}),
                "spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive",
            ),
            (json!({"ports": [{"port": 1, "name": "a"}, {"port": 2}]}), "spec.ports[1].name: Required value"),
            (
                json!({"ports": [{"port": 1, "nodePort": 30000}]}),
                "spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'",
            ),
            (json!({"type": "ExternalName"}), "spec.externalName: Required value"),
            (
                json!({"type": "X", "ports": [{"port": 1}]}),
                "spec.type: Unsupported value: \"X\": supported values: \"ClusterIP\", \"ExternalName\", \"LoadBalancer\", \"NodePort\"",
            ),
        ] {
            let errors = errors_of(&service(spec));
            assert!(errors.first().is_some_and(|e| e == message), "{errors:?}");
        }
    }

    #[test]
    fn an_update_keeps_what_was_allocated_and_drops_what_the_type_no_longer_has() {
        let mut old = service(json!({"type": "NodePort", "ports": [{"port": 80}]}));
        old["spec"]["clusterIP"] = json!("10.0.0.9");
        old["spec"]["clusterIPs"] = json!(["10.0.0.9"]);
        old["spec"]["ports"][0]["nodePort"] = json!(30001);
        let mut new = service(json!({"type": "NodePort", "ports": [{"port": 80}]}));
        keep_allocated(&mut new, &old);
        assert_eq!(
            (&new["spec"]["clusterIP"], &new["spec"]["ports"][0]["nodePort"]),
            (&json!("10.0.0.9"), &json!(30001))
        );
        let mut new = old.clone();
        new["spec"]["type"] = json!("ClusterIP");
        drop_type_dependent(&mut new, Some(&old));
        assert_eq!(new["spec"]["ports"][0].get("nodePort"), None);
        assert_eq!(new["spec"].get("externalTrafficPolicy"), None);
        let mut new = old.clone();
        new["spec"]["clusterIPs"] = json!(["10.0.0.8"]);
        let mut errors = Errors::default();
        validate_update(&Field::root(&new), &Field::root(&old), &mut errors);
        assert_eq!(
            errors.0[0].to_string(),
            "spec.clusterIPs[0]: Invalid value: [\"10.0.0.8\"]: may not change once set"
        );
    }

    #[test]
    fn a_service_s_row() {
        let mut object = service(json!({"type": "LoadBalancer", "clusterIPs": ["10.0.0.1"], "selector": {"a": "b"},
            "ports": [{"port": 80, "nodePort": 30080}, {"port": 53, "protocol": "UDP"}]}));
        let cells = row(&object, &Clock::now());
        assert_eq!(
            cells[1..5],
            [json!("LoadBalancer"), json!("10.0.0.1"), json!("<pending>"), json!("80:30080/TCP,53/UDP")]
        );
        assert_eq!(cells[6], "a=b");
        object["status"]["loadBalancer"]["ingress"] = json!([{"hostname": "h"}, {"ip": "1.2.3.4"}]);
        assert_eq!(row(&object, &Clock::now())[3], "1.2.3.4,h");
    }
}
