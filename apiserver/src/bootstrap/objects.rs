//! The objects of the system beside RBAC. Pure: from options to objects.

use crate::options::Options;
use crate::registry::allocation::Allocator;
use serde_json::{Value, json};
use std::net::IpAddr;

const NAMESPACES: [&str; 4] = ["kube-system", "kube-public", "kube-node-lease", "default"];
const SERVICE: &str = "kubernetes";
const PORT: u16 = 443;

pub fn namespaces() -> Vec<Value> {
    NAMESPACES.map(|name| json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})).to_vec()
}

/// As `SystemPriorityClasses`.
pub fn priority_classes() -> Vec<Value> {
    let class = |name: &str, value: i32, description: &str| {
        json!({
            "apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name},
            "value": value, "description": description, "preemptionPolicy": "PreemptLowerPriority",
        })
    };
    vec![
        class(
            "system-node-critical",
            2_000_001_000,
            "Used for system critical pods that must not be moved from their current node.",
        ),
        class(
            "system-cluster-critical",
            2_000_000_000,
            "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary.",
        ),
    ]
}

/// The Service by which pods reach us, at the first address of the range.
pub fn kubernetes_service(options: &Options) -> Result<Value, String> {
    let address = Allocator::new(&options.service_cluster_ip_range, &options.service_node_port_range)?.first_address();
    Ok(json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": SERVICE, "namespace": "default", "labels": {"component": "apiserver", "provider": "kubernetes"},
        },
        "spec": {
            "type": "ClusterIP", "clusterIP": address.to_string(), "ipFamilyPolicy": "SingleStack",
            "sessionAffinity": "None",
            "ports": [{"name": "https", "protocol": "TCP", "port": PORT, "targetPort": options.secure_port}],
        },
    }))
}

/// What a server says of itself to the others: an Endpoints object, as kube-apiserver writes it.
pub fn lease(address: &str) -> Value {
    json!({"kind": "Endpoints", "apiVersion": "v1", "metadata": {}, "subsets": [{"addresses": [{"ip": address}]}]})
}

/// Endpoints and EndpointSlice of that Service: the addresses of the servers that are there, ours among them.
pub fn kubernetes_endpoints(options: &Options, servers: &[String]) -> [Value; 2] {
    let ours = options.public_address();
    let ports = json!([{"name": "https", "protocol": "TCP", "port": options.secure_port}]);
    let family = if matches!(ours, IpAddr::V4(_)) { "IPv4" } else { "IPv6" };
    let parsed = servers.iter().filter_map(|server| server.parse::<IpAddr>().ok());
    let mut addresses: Vec<IpAddr> = parsed.filter(|a| a.is_ipv4() == ours.is_ipv4()).collect();
    if addresses.is_empty() {
        addresses.push(ours);
    }
    addresses.sort();
    addresses.dedup();
    let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
    let endpoints = json!({
        "apiVersion": "v1", "kind": "Endpoints",
        "metadata": {
            "name": SERVICE, "namespace": "default", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"},
        },
        "subsets": [{
            "addresses": addresses.iter().map(|address| json!({"ip": address})).collect::<Vec<_>>(), "ports": ports,
        }],
    });
    let each = addresses.iter().map(|address| json!({"addresses": [address], "conditions": {"ready": true}}));
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": SERVICE, "namespace": "default", "labels": {"kubernetes.io/service-name": SERVICE},
        },
        "addressType": family,
        "endpoints": each.collect::<Vec<_>>(),
        "ports": ports,
    });
    [endpoints, slice]
}

/// Whether Endpoints or an EndpointSlice say what they should.
pub fn same_endpoints(current: &Value, wanted: &Value) -> bool {
    ["subsets", "endpoints", "ports", "addressType"].iter().all(|part| current.get(*part) == wanted.get(*part))
        && current.pointer("/metadata/labels") == wanted.pointer("/metadata/labels")
}

/// How aggregated servers find out who is asking: `extension-apiserver-authentication`.
pub fn authentication_config(options: &Options, client_ca: Option<&str>, request_header_ca: Option<&str>) -> Value {
    let mut data = serde_json::Map::new();
    if let Some(ca) = client_ca {
        data.insert("client-ca-file".into(), ca.into());
    }
    if let Some(ca) = request_header_ca {
        data.insert("requestheader-client-ca-file".into(), ca.into());
        for (key, list) in [
            ("requestheader-username-headers", &options.requestheader_username_headers),
            ("requestheader-group-headers", &options.requestheader_group_headers),
            ("requestheader-extra-headers-prefix", &options.requestheader_extra_headers_prefix),
            ("requestheader-allowed-names", &options.requestheader_allowed_names),
        ] {
            data.insert(key.into(), json!(list).to_string().into());
        }
        if !options.requestheader_uid_headers.is_empty() {
            let list = json!(options.requestheader_uid_headers).to_string();
            data.insert("requestheader-uid-headers".into(), list.into());
        }
    }
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "extension-apiserver-authentication", "namespace": "kube-system"},
        "data": data,
    })
}

/// Since when the use of tokens in Secrets is noted. As the controller `legacytokentracking`.
pub fn token_tracking(today: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "ConfigMap",
        "metadata": {"name": "kube-apiserver-legacy-service-account-token-tracking", "namespace": "kube-system"},
        "data": {"since": today},
    })
}

/// Whether it says a day, whichever.
pub fn tracks_tokens(current: &Value, _wanted: &Value) -> bool {
    current["data"]["since"].as_str().is_some_and(|day| day.parse::<jiff::civil::Date>().is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser as _;

    fn options(more: &[&str]) -> Options {
        Options::parse_from(["apiserver", "--etcd-servers=http://127.0.0.1:1"].iter().chain(more))
    }

    #[test]
    fn the_service_has_the_first_address_and_the_advertised_endpoint() {
        let options = options(&[
            "--service-cluster-ip-range=10.96.0.0/12",
            "--advertise-address=192.0.2.7",
            "--secure-port=7443",
        ]);
        let service = kubernetes_service(&options).unwrap();
        assert_eq!(service["spec"]["clusterIP"], "10.96.0.1");
        assert_eq!(service["spec"]["ports"][0]["targetPort"], 7443);
        let [endpoints, slice] = kubernetes_endpoints(&options, &[]);
        assert_eq!(endpoints["subsets"][0]["addresses"][0]["ip"], "192.0.2.7");
        assert_eq!(
            (&slice["addressType"], &slice["endpoints"][0]["addresses"]),
            (&json!("IPv4"), &json!(["192.0.2.7"]))
        );
        let others = ["192.0.2.9".to_owned(), "192.0.2.7".to_owned(), "fd00::1".to_owned()];
        let [endpoints, _] = kubernetes_endpoints(&options, &others);
        assert_eq!(endpoints["subsets"][0]["addresses"], json!([{"ip": "192.0.2.7"}, {"ip": "192.0.2.9"}]));
        assert!(same_endpoints(&slice, &slice));
        let mut other = slice.clone();
        other["endpoints"][0]["addresses"] = json!(["192.0.2.8"]);
        assert!(!same_endpoints(&other, &slice));
    }

    #[test]
    fn the_front_proxys_terms_are_published_as_lists() {
        let options = options(&["--requestheader-username-headers=X-Remote-User", "--requestheader-allowed-names=a,b"]);
        let config = authentication_config(&options, Some("ca"), Some("proxy"));
        assert_eq!(config["data"]["client-ca-file"], "ca");
        assert_eq!(config["data"]["requestheader-allowed-names"], r#"["a","b"]"#);
        let config = authentication_config(&options, None, None);
        assert_eq!(config["data"], json!({}));
    }
}
