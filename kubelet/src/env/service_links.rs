//! The variables that describe Services to a container: `<NAME>_SERVICE_HOST` and the docker-link style ones.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Service;

/// The Services whose variables a container of `namespace` gets: those of its namespace when it wants service links, and
/// always `kubernetes` of namespace `default`. Services without a cluster IP have none. As `getServiceEnvVarMap`.
pub fn visible<'s, S: AsRef<Service> + 's>(
    services: impl IntoIterator<Item = &'s S>,
    namespace: &str,
    enable_service_links: bool,
) -> Vec<&'s Service> {
    let mut by_name: BTreeMap<&str, &Service> = BTreeMap::new();
    for service in services {
        let service = service.as_ref();
        let (Some(name), Some(home)) = (service.metadata.name.as_deref(), service.metadata.namespace.as_deref()) else {
            continue;
        };
        if cluster_ip(service).is_none() {
            continue;
        }
        let master = home == "default" && name == "kubernetes";
        if home == namespace && enable_service_links {
            by_name.insert(name, service);
        } else if master {
            by_name.entry(name).or_insert(service);
        }
    }
    by_name.into_values().collect()
}

fn cluster_ip(service: &Service) -> Option<&str> {
    let spec = service.spec.as_ref()?;
    if spec.type_.as_deref() == Some("ExternalName") {
        return None;
    }
    spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty() && *ip != "None")
}

/// The variables of `services`. As `envvars.FromServices`.
pub fn variables(services: &[&Service]) -> Vec<(String, String)> {
    let mut variables = Vec::new();
    for service in services {
        let (Some(name), Some(ip), Some(spec)) =
            (service.metadata.name.as_deref(), cluster_ip(service), service.spec.as_ref())
        else {
            continue;
        };
        let prefix = variable_name(name);
        let ports = spec.ports.as_deref().unwrap_or_default();
        let Some(first) = ports.first() else { continue };
        variables.push((format!("{prefix}_SERVICE_HOST"), ip.to_owned()));
        variables.push((format!("{prefix}_SERVICE_PORT"), first.port.to_string()));
        for port in ports {
            if let Some(port_name) = port.name.as_deref().filter(|name| !name.is_empty()) {
                variables.push((format!("{prefix}_SERVICE_PORT_{}", variable_name(port_name)), port.port.to_string()));
            }
        }
        for (index, port) in ports.iter().enumerate() {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let lower = protocol.to_lowercase();
            let url = format!("{lower}://{}", join_host_port(ip, port.port));
            if index == 0 {
                variables.push((format!("{prefix}_PORT"), url.clone()));
            }
            let link = format!("{prefix}_PORT_{}_{}", port.port, protocol.to_uppercase());
            variables.push((link.clone(), url));
            variables.push((format!("{link}_PROTO"), lower));
            variables.push((format!("{link}_PORT"), port.port.to_string()));
            variables.push((format!("{link}_ADDR"), ip.to_owned()));
        }
    }
    variables
}

fn variable_name(name: &str) -> String {
    name.to_uppercase().replace('-', "_")
}

fn join_host_port(host: &str, port: i32) -> String {
    if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use serde_json::json;

    use super::*;

    fn service(namespace: &str, name: &str, ip: &str, ports: serde_json::Value) -> Arc<Service> {
        Arc::new(
            serde_json::from_value(json!({"metadata": {"namespace": namespace, "name": name},
                "spec": {"clusterIP": ip, "ports": ports}}))
            .expect("a service"),
        )
    }

    #[test]
    fn each_service_gives_host_port_and_links() {
        let redis =
            service("ns", "redis-primary", "10.0.0.11", json!([{"port": 6379, "protocol": "TCP", "name": "db"}]));
        let got = variables(&[&redis]);
        let want = [
            ("REDIS_PRIMARY_SERVICE_HOST", "10.0.0.11"),
            ("REDIS_PRIMARY_SERVICE_PORT", "6379"),
            ("REDIS_PRIMARY_SERVICE_PORT_DB", "6379"),
            ("REDIS_PRIMARY_PORT", "tcp://10.0.0.11:6379"),
            ("REDIS_PRIMARY_PORT_6379_TCP", "tcp://10.0.0.11:6379"),
            ("REDIS_PRIMARY_PORT_6379_TCP_PROTO", "tcp"),
            ("REDIS_PRIMARY_PORT_6379_TCP_PORT", "6379"),
            ("REDIS_PRIMARY_PORT_6379_TCP_ADDR", "10.0.0.11"),
        ];
        assert_eq!(got.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect::<Vec<_>>(), want);
    }

    #[test]
    fn only_services_in_sight_count() {
        let ports = json!([{"port": 80}]);
        let all = [
            service("default", "kubernetes", "10.96.0.1", ports.clone()),
            service("default", "other", "10.96.0.2", ports.clone()),
            service("ns", "web", "10.96.0.3", ports.clone()),
            service("ns", "headless", "None", ports.clone()),
            service("ns", "pending", "", ports),
        ];
        let names = |namespace: &str, links| {
            visible(&all, namespace, links).iter().filter_map(|s| s.metadata.name.clone()).collect::<Vec<_>>()
        };
        assert_eq!(names("ns", true), ["kubernetes", "web"]);
        assert_eq!(names("ns", false), ["kubernetes"]);
        assert_eq!(names("default", true), ["kubernetes", "other"]);
    }

    #[test]
    fn a_service_of_the_namespace_hides_the_master_of_the_same_name() {
        let ports = json!([{"port": 80}]);
        let all = [
            service("ns", "kubernetes", "10.96.0.9", ports.clone()),
            service("default", "kubernetes", "10.96.0.1", ports),
        ];
        assert_eq!(variables(&visible(&all, "ns", true))[0].1, "10.96.0.9");
    }
}
