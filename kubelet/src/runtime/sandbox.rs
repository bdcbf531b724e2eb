//! A pod's spec as the configuration of its sandbox. Pure.

use k8s_openapi::api::core::v1::{Container, Pod};
use proto::cri as pb;

use super::NodeSettings;
use super::pods::{host_network, init_containers, is_sidecar, uid_of};
use super::user_ids::IdRange;
use super::{dns, labels, logs, resources, security};

/// The sandbox of `pod` for its `attempt`; `cgroup_parent` is the pod's cgroup (empty: the runtime's default), `ids` its own
/// users.
pub fn config(
    pod: &Pod,
    attempt: u32,
    cgroup_parent: String,
    ids: Option<IdRange>,
    node: &NodeSettings,
) -> pb::PodSandboxConfig {
    let on_host = host_network(pod);
    let (mut hostname, domain) = dns::hostname_and_domain(pod, &node.dns.cluster_domain);
    if pod.spec.as_ref().and_then(|s| s.set_hostname_as_fqdn) == Some(true) && !domain.is_empty() {
        hostname = format!("{hostname}.{domain}");
    }
    if on_host {
        hostname.clear();
    }
    let overhead = pod.spec.as_ref().and_then(|s| s.overhead.as_ref()).filter(|o| !o.is_empty());
    let pod_resources = resources::pod(pod, &node.kernel);
    pb::PodSandboxConfig {
        metadata: Some(pb::PodSandboxMetadata {
            name: pod.metadata.name.clone().unwrap_or_default(),
            uid: uid_of(pod).to_owned(),
            namespace: pod.metadata.namespace.clone().unwrap_or_default(),
            attempt,
        }),
        hostname,
        log_directory: logs::pod_dir(&node.pod_logs_dir, pod).display().to_string(),
        dns_config: Some(dns::pod_dns(pod, &node.dns)),
        port_mappings: if on_host { Vec::new() } else { port_mappings(pod) },
        labels: labels::sandbox_labels(pod),
        annotations: pod.metadata.annotations.clone().unwrap_or_default(),
        linux: Some(pb::LinuxPodSandboxConfig {
            cgroup_parent,
            security_context: Some(security::sandbox(pod, ids, &node.policy)),
            sysctls: dns::sysctls(pod),
            overhead: overhead.map(|o| pb::LinuxContainerResources {
                cpu_shares: o
                    .get("cpu")
                    .map_or(0, |q| resources::shares(apimachinery::quantity::Quantity::from(q).milli_value())),
                memory_limit_in_bytes: o.get("memory").map_or(0, |q| apimachinery::quantity::Quantity::from(q).value()),
                ..Default::default()
            }),
            resources: Some(pod_resources),
        }),
    }
}

/// The pod's host ports (and plain container ports: the runtime ignores those without a host port).
fn port_mappings(pod: &Pod) -> Vec<pb::PortMapping> {
    let Some(spec) = pod.spec.as_ref() else { return Vec::new() };
    let lasting = init_containers(spec).iter().filter(|c| is_sidecar(c));
    let ports = |c: &Container| c.ports.clone().unwrap_or_default();
    spec.containers
        .iter()
        .chain(lasting)
        .flat_map(ports)
        .map(|port| pb::PortMapping {
            protocol: match port.protocol.as_deref() {
                Some("UDP") => pb::Protocol::Udp,
                Some("SCTP") => pb::Protocol::Sctp,
                _ => pb::Protocol::Tcp,
            } as i32,
            container_port: port.container_port,
            host_port: port.host_port.unwrap_or(0),
            host_ip: port.host_ip.unwrap_or_default(),
        })
        .collect()
}
