//! Services, with the endpoints behind each port.

use serde_json::Value;

use super::{Description, annotation_lines, map_lines, or_none, selector_line};
use crate::objects::{items, name, namespace, number, text};
use crate::output::jsonpath::plain;

pub(super) fn describe(service: &Value, slices: &[Value], out: &mut Description) {
    let list = |path: &str| items(service, path).iter().map(plain).collect::<Vec<_>>().join(",");
    let mut pairs = vec![
        ("Name", name(service).to_owned()),
        ("Namespace", namespace(service).to_owned()),
        ("Labels", map_lines(service.pointer("/metadata/labels"), 0)),
        ("Annotations", annotation_lines(service)),
        ("Selector", selector_line(service)),
        ("Type", text(service, "/spec/type").to_owned()),
    ];
    for (title, path) in [("IP Family Policy", "/spec/ipFamilyPolicy"), ("External Name", "/spec/externalName")] {
        if !text(service, path).is_empty() {
            pairs.push((title, text(service, path).to_owned()));
        }
    }
    pairs.push(("IP Families", or_none(list("/spec/ipFamilies"))));
    pairs.push(("IP", or_none(text(service, "/spec/clusterIP"))));
    pairs.push(("IPs", or_none(list("/spec/clusterIPs"))));
    if !items(service, "/spec/externalIPs").is_empty() {
        pairs.push(("External IPs", list("/spec/externalIPs")));
    }
    let ports: Vec<(String, String, String, Option<String>)> = items(service, "/spec/ports")
        .iter()
        .map(|port| {
            let port_name = or_unset(text(port, "/name"));
            let protocol = port["protocol"].as_str().unwrap_or("TCP");
            let node_port = port["nodePort"].as_i64().map(|node_port| format!("{port_name}\t{node_port}/{protocol}"));
            (
                format!("{port_name}\t{}/{protocol}", number(port, "/port")),
                format!("{}/{protocol}", plain(&port["targetPort"])),
                endpoints(slices, text(port, "/name")),
                node_port,
            )
        })
        .collect();
    for (port, target, endpoints, node_port) in &ports {
        pairs.push(("Port", port.clone()));
        pairs.push(("TargetPort", target.clone()));
        if let Some(node_port) = node_port {
            pairs.push(("NodePort", node_port.clone()));
        }
        pairs.push(("Endpoints", endpoints.clone()));
    }
    pairs.push(("Session Affinity", text(service, "/spec/sessionAffinity").to_owned()));
    for (title, path) in [
        ("External Traffic Policy", "/spec/externalTrafficPolicy"),
        ("Internal Traffic Policy", "/spec/internalTrafficPolicy"),
    ] {
        if !text(service, path).is_empty() {
            pairs.push((title, text(service, path).to_owned()));
        }
    }
    out.pairs(0, &pairs);
}

fn or_unset(name: &str) -> &str {
    if name.is_empty() { "<unset>" } else { name }
}

/// `1.2.3.4:80,1.2.3.5:80 + 3 more...`, of the endpoints that are ready.
fn endpoints(slices: &[Value], port_name: &str) -> String {
    const SHOWN_MAX: usize = 3;
    let mut all = Vec::new();
    for slice in slices {
        for port in items(slice, "/ports").iter().filter(|port| text(port, "/name") == port_name) {
            for endpoint in
                items(slice, "/endpoints").iter().filter(|endpoint| endpoint["conditions"]["ready"] != false)
            {
                for address in items(endpoint, "/addresses") {
                    all.push(format!("{}:{}", plain(address), number(port, "/port")));
                }
            }
        }
    }
    match all.len() {
        0 => String::new(),
        count if count > SHOWN_MAX => format!("{} + {} more...", all[..SHOWN_MAX].join(","), count - SHOWN_MAX),
        _ => all.join(","),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn endpoints_are_listed_by_port() {
        let slice = json!({
            "ports": [{"name": "http", "port": 8080}, {"name": "other", "port": 1}],
            "endpoints": [
                {"addresses": ["10.0.0.1"], "conditions": {"ready": true}},
                {"addresses": ["10.0.0.2"], "conditions": {"ready": false}},
                {"addresses": ["10.0.0.3"]}, {"addresses": ["10.0.0.4"]}, {"addresses": ["10.0.0.5"]}]
        });
        assert_eq!(endpoints(&[slice], "http"), "10.0.0.1:8080,10.0.0.3:8080,10.0.0.4:8080 + 1 more...");
        assert_eq!(endpoints(&[], "http"), "");
    }
}
