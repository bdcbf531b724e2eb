//! Services: their many defaults, what their types allow, and their row. Cluster IPs and node ports are given by
//! `registry::allocation`.

use super::service_validation::{self, is_external, needs_health_check};
use crate::registry::metadata;
use crate::registry::object::{child, copy_field, default, int, items_mut, list, map, remove, set, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use serde_json::{Value, json};

/// A `clusterIP` of this value asks for none.
pub const HEADLESS: &str = "None";
const CLIENT_IP_TIMEOUT_SECONDS: i64 = 10_800;

pub const RULES: Rules = Rules {
    name: metadata::dns1035_label,
    create_on_update: true,
    default: defaults,
    prepare_update: |new, old| {
        drop_type_dependent(new, old);
        keep_allocated(new, old);
        normalize_cluster_ips(new, old);
    },
    validate: service_validation::validate,
    validate_update: service_validation::validate_update,
    validate_status: service_validation::validate_status,
    warnings: service_validation::warnings,
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
pub fn has_cluster_ip(kind: &str) -> bool {
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
    if list(spec, "/clusterIPs").is_empty()
        && let Some(ip) = spec.get("clusterIP").cloned()
    {
        set(spec, "clusterIPs", json!([ip]));
    }
}

/// What a client that knows `clusterIP` alone, or `clusterIPs` alone, did to it, the other follows. As `normalizeClusterIPs`.
fn normalize_cluster_ips(new: &mut Value, old: &Value) {
    let spec = child(new, "spec");
    let (one, before) = (text(spec, "/clusterIP").to_owned(), text(old, "/spec/clusterIP"));
    let same = list(spec, "/clusterIPs") == list(old, "/spec/clusterIPs");
    if one != before && same {
        if one.is_empty() {
            remove(spec, "clusterIPs");
        } else {
            let mut ips = vec![Value::from(one)];
            ips.extend(list(spec, "/clusterIPs").iter().skip(1).cloned());
            set(spec, "clusterIPs", ips);
        }
    } else if one == before && !one.is_empty() && !same && list(spec, "/clusterIPs").is_empty() {
        remove(spec, "clusterIP");
    }
}

fn needs_node_ports(service: &Value) -> bool {
    matches!(text(service, "/spec/type"), "NodePort" | "LoadBalancer")
}

/// An update that leaves out what was allocated keeps it. As `patchAllocatedValues`.
fn keep_allocated(new: &mut Value, old: &Value) {
    let both = |needs: &dyn Fn(&Value) -> bool, new: &Value| needs(new) && needs(old);
    if both(&|service| has_cluster_ip(text(service, "/spec/type")), new) {
        let spec = child(new, "spec");
        if text(spec, "/clusterIP").is_empty() {
            copy_field(spec, &old["spec"], "clusterIP");
        }
        if list(spec, "/clusterIPs").is_empty() && spec.get("clusterIP") == old["spec"].get("clusterIP") {
            copy_field(spec, &old["spec"], "clusterIPs");
        }
        // Who names the addresses, or leaves them, has said the families: as `initIPFamilyFields` finds them.
        if list(spec, "/ipFamilies").is_empty() && spec.get("clusterIPs") == old["spec"].get("clusterIPs") {
            copy_field(spec, &old["spec"], "ipFamilies");
        }
    }
    if both(&needs_node_ports, new) {
        let spec = child(new, "spec");
        let mut used: Vec<i64> = list(spec, "/ports").iter().filter_map(|port| int(port, "/nodePort")).collect();
        for port in items_mut(spec, "ports").filter(|port| int(port, "/nodePort").unwrap_or(0) == 0) {
            let same = |p: &&Value| p["port"] == port["port"] && p["protocol"] == port["protocol"];
            let number = list(old, "/spec/ports").iter().find(same).and_then(|p| int(p, "/nodePort"));
            if let Some(number) = number.filter(|number| *number != 0 && !used.contains(number)) {
                used.push(number);
                set(port, "nodePort", number);
            }
        }
    }
    if both(&needs_health_check, new) && int(new, "/spec/healthCheckNodePort").unwrap_or(0) == 0 {
        copy_field(child(new, "spec"), &old["spec"], "healthCheckNodePort");
    }
}

/// What belongs to the old type goes with it, unless it was changed by hand. As `dropTypeDependentFields`.
fn drop_type_dependent(new: &mut Value, old: &Value) {
    let kinds = (text(new, "/spec/type").to_owned(), text(old, "/spec/type"));
    let (node_ports, external, check) = (needs_node_ports(new), is_external(new), needs_health_check(new));
    let spec = child(new, "spec");
    let mut lost: Vec<&str> = Vec::new();
    if has_cluster_ip(kinds.1) && !has_cluster_ip(&kinds.0) {
        lost.extend(["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"]);
    }
    if needs_node_ports(old) && !node_ports {
        let numbers =
            |ports: &[Value]| ports.iter().map(|port| int(port, "/nodePort").unwrap_or(0)).collect::<Vec<_>>();
        if numbers(list(spec, "/ports")) == numbers(list(old, "/spec/ports")) {
            items_mut(spec, "ports").for_each(|port| _ = remove(port, "nodePort"));
        }
    }
    if needs_health_check(old) && !check {
        lost.push("healthCheckNodePort");
    }
    if is_external(old) && !external {
        lost.push("externalTrafficPolicy");
    }
    if kinds.1 == "LoadBalancer" && kinds.0 != "LoadBalancer" {
        lost.extend(["allocateLoadBalancerNodePorts", "loadBalancerClass"]);
    }
    if kinds.1 == "ExternalName" && kinds.0 != "ExternalName" {
        lost.push("externalName");
    }
    for field in lost {
        if spec.get(field) == old["spec"].get(field) {
            remove(spec, field);
        }
    }
    if kinds.1 == "LoadBalancer" && kinds.0 != "LoadBalancer" {
        set(child(new, "status"), "loadBalancer", json!({}));
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
    use crate::registry::field::{Errors, Field};

    fn errors_of(object: &Value) -> Vec<String> {
        let mut errors = Errors::default();
        service_validation::validate(&Field::root(object), &mut errors);
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
        drop_type_dependent(&mut new, &old);
        assert_eq!(new["spec"]["ports"][0].get("nodePort"), None);
        assert_eq!(new["spec"].get("externalTrafficPolicy"), None);
        let mut new = old.clone();
        new["spec"]["clusterIPs"] = json!(["10.0.0.8"]);
        let mut errors = Errors::default();
        service_validation::validate_update(&Field::root(&new), &Field::root(&old), &mut errors);
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
