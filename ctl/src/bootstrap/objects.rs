//! The objects that make a running control plane a cluster others can join: kubeadm's ConfigMaps and roles by kubeadm's
//! names, the identities of kube-proxy, the pod network and DNS with the least they need, and cluster DNS.

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::config::DNS_IMAGE;
use super::layout::{ClusterFlags, Layout};
use super::token::NODE_GROUP;

/// The version of Kubernetes that this is.
pub(crate) const KUBERNETES_VERSION: &str = "v1.36.0";
/// The ports at which a DNS server shows its metrics and its health.
const DNS_METRICS_PORT: u16 = 9153;
const DNS_HEALTH_PORT: u16 = 8080;
const DNS_READY_PORT: u16 = 8181;

const RBAC: &str = "rbac.authorization.k8s.io/v1";
const RBAC_GROUP: &str = "rbac.authorization.k8s.io";

/// Who is bound to a role.
enum To<'a> {
    Group(&'a str),
    User(&'a str),
    /// A ServiceAccount of kube-system.
    Account(&'a str),
}

impl To<'_> {
    fn subject(&self) -> Value {
        match self {
            To::Group(name) => json!({"apiGroup": RBAC_GROUP, "kind": "Group", "name": name}),
            To::User(name) => json!({"apiGroup": RBAC_GROUP, "kind": "User", "name": name}),
            To::Account(name) => json!({"kind": "ServiceAccount", "name": name, "namespace": "kube-system"}),
        }
    }
}

/// What lets `admin.conf` do anything; the first object, written as super-admin.
pub(crate) fn admin_binding() -> Value {
    cluster_binding("kubeadm:cluster-admins", "cluster-admin", &[To::Group("kubeadm:cluster-admins")])
}

/// Everything else. `kubelet_config` and `kube_proxy_config` are the YAML texts of this node's configurations,
/// `cluster_info` the anonymous kubeconfig.
pub(crate) fn all(
    layout: &Layout,
    cluster: &ClusterFlags,
    kubelet_config: &str,
    kube_proxy_config: &str,
    cluster_info: &str,
) -> Result<Vec<Value>> {
    let mut objects = Vec::new();
    objects.extend(configuration(layout, cluster, kubelet_config)?);
    objects.extend(joining());
    objects.extend(discovery(cluster_info));
    objects.extend(kube_proxy(kube_proxy_config));
    objects.extend(pod_network());
    objects.extend(dns(cluster)?);
    objects.push(storage_class());
    Ok(objects)
}

/// What a claim that names no class gets: a directory of the node that its first pod runs on, which the
/// controller-manager has made there.
fn storage_class() -> Value {
    json!({
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {
            "name": "host-path",
            "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
        },
        "provisioner": "pilothouse.dev/host-path",
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "WaitForFirstConsumer",
        "allowVolumeExpansion": true,
    })
}

/// `kubeadm-config` and `kubelet-config`, and who may read them.
fn configuration(layout: &Layout, cluster: &ClusterFlags, kubelet_config: &str) -> Result<Vec<Value>> {
    let mut configuration = json!({
        "apiVersion": "kubeadm.k8s.io/v1beta4",
        "kind": "ClusterConfiguration",
        "certificatesDir": layout.pki(),
        "clusterName": "kubernetes",
        "etcd": {"local": {"dataDir": layout.etcd()}},
        "kubernetesVersion": KUBERNETES_VERSION,
        "networking": {
            "dnsDomain": cluster.service_dns_domain,
            "podSubnet": cluster.pod_network_cidr.to_string(),
            "serviceSubnet": cluster.service_cidr.to_string(),
        },
    });
    if let Some(endpoint) = &cluster.control_plane_endpoint {
        configuration["controlPlaneEndpoint"] = json!(endpoint);
    }
    let readers = [To::Group("system:nodes"), To::Group(NODE_GROUP)];
    let get = |name: &str| json!([rule(&[""], &["configmaps"], &[name], &["get"])]);
    Ok(vec![
        config_map(
            "kube-system",
            "kubeadm-config",
            json!({"ClusterConfiguration": apimachinery::yaml::to_string(&configuration)?}),
        ),
        config_map("kube-system", "kubelet-config", json!({"kubelet": kubelet_config})),
        role("kube-system", "kubeadm:nodes-kubeadm-config", get("kubeadm-config")),
        binding("kube-system", "kubeadm:nodes-kubeadm-config", "kubeadm:nodes-kubeadm-config", &readers),
        role("kube-system", "kubeadm:kubelet-config", get("kubelet-config")),
        binding("kube-system", "kubeadm:kubelet-config", "kubeadm:kubelet-config", &readers),
    ])
}

/// What whoever holds a token may do: ask for a node's certificate, look whether a name is taken, and get the tokens of
/// the node's own programs.
fn joining() -> Vec<Value> {
    let accounts = ["kube-proxy", "pod-network"];
    let token = |names: &[&str]| json!([rule(&[""], &["serviceaccounts/token"], names, &["create"])]);
    let mut objects = vec![
        cluster_binding("kubeadm:kubelet-bootstrap", "system:node-bootstrapper", &[To::Group(NODE_GROUP)]),
        cluster_binding(
            "kubeadm:node-autoapprove-bootstrap",
            "system:certificates.k8s.io:certificatesigningrequests:nodeclient",
            &[To::Group(NODE_GROUP)],
        ),
        cluster_binding(
            "kubeadm:node-autoapprove-certificate-rotation",
            "system:certificates.k8s.io:certificatesigningrequests:selfnodeclient",
            &[To::Group("system:nodes")],
        ),
        cluster_role("kubeadm:get-nodes", json!([rule(&[""], &["nodes"], &[], &["get"])])),
        cluster_binding("kubeadm:get-nodes", "kubeadm:get-nodes", &[To::Group(NODE_GROUP)]),
        role("kube-system", "pilothouse:node-program-tokens", token(&accounts)),
        binding(
            "kube-system",
            "pilothouse:node-program-tokens",
            "pilothouse:node-program-tokens",
            &[To::Group(NODE_GROUP)],
        ),
    ];
    for account in accounts {
        // Each may get a successor of its own token before that expires.
        let name = format!("pilothouse:{account}-token");
        objects.push(service_account(account));
        objects.push(role("kube-system", &name, token(&[account])));
        objects.push(binding("kube-system", &name, &name, &[To::Account(account)]));
    }
    objects
}

/// `cluster-info`, which anybody may read.
fn discovery(cluster_info: &str) -> Vec<Value> {
    let name = "kubeadm:bootstrap-signer-clusterinfo";
    vec![
        config_map("kube-public", "cluster-info", json!({"kubeconfig": cluster_info})),
        role("kube-public", name, json!([rule(&[""], &["configmaps"], &["cluster-info"], &["get"])])),
        binding("kube-public", name, name, &[To::User("system:anonymous")]),
    ]
}

/// kube-proxy's configuration and rights on nodes that have no certificate for it.
fn kube_proxy(configuration: &str) -> Vec<Value> {
    vec![
        config_map("kube-system", "kube-proxy", json!({"config.conf": configuration})),
        role("kube-system", "kube-proxy", json!([rule(&[""], &["configmaps"], &["kube-proxy"], &["get"])])),
        binding("kube-system", "kube-proxy", "kube-proxy", &[To::Group(NODE_GROUP)]),
        cluster_binding("kubeadm:node-proxier", "system:node-proxier", &[To::Account("kube-proxy")]),
    ]
}

/// The pod network reads nodes, and what network policies speak of, and says on its own node that the network is there.
fn pod_network() -> Vec<Value> {
    let name = "system:pod-network";
    let who = [To::User(name), To::Account("pod-network")];
    vec![
        cluster_role(
            name,
            json!([
                rule(&[""], &["nodes", "pods", "namespaces"], &[], &["get", "list", "watch"]),
                rule(&["networking.k8s.io"], &["networkpolicies"], &[], &["get", "list", "watch"]),
                rule(&[""], &["nodes/status"], &[], &["patch"]),
            ]),
        ),
        cluster_binding(name, name, &who),
    ]
}

/// Cluster DNS, by the names that kubeadm gives CoreDNS: a Deployment of two, each on a node of its own (the second waits
/// for the second node), and the Service.
fn dns(cluster: &ClusterFlags) -> Result<Vec<Value>> {
    let (name, role) = ("coredns", "system:coredns");
    let service_address = cluster.service_cidr.dns_service().context("the service range is too small for DNS")?;
    let ports = |target: bool| -> Value {
        let all = [("dns", "UDP", 53), ("dns-tcp", "TCP", 53), ("metrics", "TCP", DNS_METRICS_PORT)];
        let one = |(name, protocol, number): (&str, &str, u16)| match target {
            false => json!({"name": name, "protocol": protocol, "containerPort": number}),
            true => json!({"name": name, "protocol": protocol, "port": number, "targetPort": number}),
        };
        all.map(one).to_vec().into()
    };
    let labels = json!({"k8s-app": "kube-dns"});
    let probe = |path: &str, port: u16, delay: u16| json!({"httpGet": {"path": path, "port": port}, "initialDelaySeconds": delay, "periodSeconds": 5, "failureThreshold": 5});
    Ok(vec![
        service_account(name),
        cluster_role(
            role,
            json!([
                rule(&[""], &["services", "namespaces"], &[], &["list", "watch"]),
                rule(&["discovery.k8s.io"], &["endpointslices"], &[], &["list", "watch"]),
            ]),
        ),
        cluster_binding(role, role, &[To::Account(name)]),
        json!({
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {
                "name": "kube-dns",
                "namespace": "kube-system",
                "annotations": {"prometheus.io/port": DNS_METRICS_PORT.to_string(), "prometheus.io/scrape": "true"},
                "labels": {"k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"},
            },
            "spec": {"clusterIP": service_address, "ports": ports(true), "selector": labels},
        }),
        json!({
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": name, "namespace": "kube-system", "labels": labels},
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": labels},
                "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "serviceAccountName": name,
                        "priorityClassName": "system-cluster-critical",
                        "dnsPolicy": "Default",
                        "nodeSelector": {"kubernetes.io/os": "linux"},
                        "tolerations": [
                            {"key": "CriticalAddonsOnly", "operator": "Exists"},
                            {"key": "node-role.kubernetes.io/control-plane", "effect": "NoSchedule"},
                        ],
                        "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [{
                            "weight": 100,
                            "podAffinityTerm": {"labelSelector": {"matchLabels": labels}, "topologyKey": "kubernetes.io/hostname"},
                        }]}},
                        "containers": [{
                            "name": name,
                            "image": DNS_IMAGE,
                            "imagePullPolicy": "IfNotPresent",
                            "args": [
                                format!("--cluster-domain={}", cluster.service_dns_domain),
                                format!("--health-bind-address=0.0.0.0:{DNS_HEALTH_PORT}"),
                                format!("--ready-bind-address=0.0.0.0:{DNS_READY_PORT}"),
                            ],
                            "ports": ports(false),
                            "livenessProbe": probe("/health", DNS_HEALTH_PORT, 10),
                            "readinessProbe": {"httpGet": {"path": "/ready", "port": DNS_READY_PORT}, "periodSeconds": 1},
                            "resources": {"limits": {"memory": "170Mi"}, "requests": {"cpu": "100m", "memory": "30Mi"}},
                            "securityContext": {
                                "allowPrivilegeEscalation": false,
                                "capabilities": {"add": ["NET_BIND_SERVICE"], "drop": ["ALL"]},
                                "readOnlyRootFilesystem": true,
                            },
                        }],
                    },
                },
            },
        }),
    ])
}

/// The patch that marks a node as one of the control plane; `taint` keeps ordinary pods away. As `MarkControlPlane`.
pub(crate) fn control_plane_mark(taint: bool) -> Value {
    let key = "node-role.kubernetes.io/control-plane";
    let mut patch =
        json!({"metadata": {"labels": {key: "", "node.kubernetes.io/exclude-from-external-load-balancers": ""}}});
    if taint {
        patch["spec"] = json!({"taints": [{"key": key, "effect": "NoSchedule"}]});
    }
    patch
}

fn config_map(namespace: &str, name: &str, data: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace}, "data": data})
}

fn service_account(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": "kube-system"}})
}

fn cluster_role(name: &str, rules: Value) -> Value {
    json!({"apiVersion": RBAC, "kind": "ClusterRole", "metadata": {"name": name}, "rules": rules})
}

fn role(namespace: &str, name: &str, rules: Value) -> Value {
    json!({"apiVersion": RBAC, "kind": "Role", "metadata": {"name": name, "namespace": namespace}, "rules": rules})
}

fn cluster_binding(name: &str, role: &str, to: &[To<'_>]) -> Value {
    json!({
        "apiVersion": RBAC, "kind": "ClusterRoleBinding", "metadata": {"name": name},
        "roleRef": {"apiGroup": RBAC_GROUP, "kind": "ClusterRole", "name": role},
        "subjects": to.iter().map(To::subject).collect::<Vec<_>>(),
    })
}

fn binding(namespace: &str, name: &str, role: &str, to: &[To<'_>]) -> Value {
    json!({
        "apiVersion": RBAC, "kind": "RoleBinding", "metadata": {"name": name, "namespace": namespace},
        "roleRef": {"apiGroup": RBAC_GROUP, "kind": "Role", "name": role},
        "subjects": to.iter().map(To::subject).collect::<Vec<_>>(),
    })
}

fn rule(groups: &[&str], resources: &[&str], names: &[&str], verbs: &[&str]) -> Value {
    let mut rule = json!({"apiGroups": groups, "resources": resources, "verbs": verbs});
    if !names.is_empty() {
        rule["resourceNames"] = json!(names);
    }
    rule
}

#[cfg(test)]
mod tests {
    use super::super::layout::tests::flags;
    use super::*;

    #[test]
    fn bindings_name_roles_that_exist() -> Result<()> {
        let layout = Layout::below(std::path::Path::new("/"));
        let objects = all(&layout, &flags(), "kubelet", "proxy", "info")?;
        let made = |kind: &str, namespace: &Value, name: &Value| {
            objects.iter().any(|object| {
                object["kind"] == kind
                    && &object["metadata"]["name"] == name
                    && &object["metadata"]["namespace"] == namespace
            })
        };
        for object in
            objects.iter().filter(|object| object["kind"].as_str().is_some_and(|kind| kind.ends_with("Binding")))
        {
            let role = &object["roleRef"];
            let built_in = ["system:node-", "system:certificates.k8s.io:", "cluster-admin"]
                .iter()
                .any(|prefix| role["name"].as_str().is_some_and(|name| name.starts_with(prefix)));
            let kind = role["kind"].as_str().unwrap_or_default();
            assert!(built_in || made(kind, &object["metadata"]["namespace"], &role["name"]), "{object}");
            for subject in object["subjects"].as_array().into_iter().flatten().filter(|s| s["kind"] == "ServiceAccount")
            {
                assert!(made("ServiceAccount", &subject["namespace"], &subject["name"]), "{object}");
            }
        }
        Ok(())
    }

    #[test]
    fn the_dns_service_names_the_ports_of_its_pods() -> Result<()> {
        let objects = dns(&flags())?;
        let (service, deployment) = (&objects[3], &objects[4]);
        assert_eq!(service["spec"]["clusterIP"], "10.96.0.10");
        let template = &deployment["spec"]["template"];
        assert_eq!(service["spec"]["selector"], template["metadata"]["labels"]);
        let served = template["spec"]["containers"][0]["ports"].as_array().into_iter().flatten();
        for (port, container) in service["spec"]["ports"].as_array().into_iter().flatten().zip(served) {
            assert_eq!(
                (&port["name"], &port["protocol"], &port["targetPort"]),
                (&container["name"], &container["protocol"], &container["containerPort"])
            );
        }
        Ok(())
    }
}
