//! kube-proxy as a process over a stand-in for the API server, in each mode that the kernel has, with real packets between
//! namespaces. Needs root.

#[path = "../../addons/tests/common/mod.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod common;
#[path = "../../addons/tests/common/wires.rs"]
#[allow(dead_code, reason = "shared with other tests")]
mod wires;

use common::{FakeApi, Program, eventually, http};
use serde_json::{Value, json};
use std::{
    collections::BTreeSet,
    net::UdpSocket,
    process::Command,
    time::{Duration, Instant},
};
use wires::{Wire, ask, ask_on_udp, become_node, is_root, output, run};

const SERVICES: &str = "/api/v1/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
const NODES: &str = "/api/v1/nodes";
/// Rules are made within milliseconds; a busy machine may take longer.
const SOON: Duration = Duration::from_secs(20);

struct Lab {
    api: FakeApi,
    directory: tempfile::TempDir,
    mode: &'static str,
    /// Two pods of this node, one of another, and a machine outside.
    pods: [Wire; 3],
    outside: Wire,
}

impl Lab {
    fn new(mode: &'static str) -> Self {
        become_node();
        let pods = [("a", "10.244.0.2"), ("b", "10.244.0.3"), ("c", "10.244.1.4")].map(|(name, address)| {
            let pod = Wire::pod(name, address);
            pod.serve(name, 8080);
            pod
        });
        let outside = Wire::machine("outside", "192.0.2.2", "192.0.2.1");
        // The CIDR of Services is not routed in a real cluster either, but for the default route.
        run("ip route add default via 192.0.2.2");
        let api = FakeApi::start();
        api.apply(
            NODES,
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"},
                "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}),
        );
        Self { api, directory: tempfile::tempdir().expect("a directory"), mode, pods, outside }
    }

    fn start(&self) -> Program {
        let config = self.directory.path().join("config.yaml");
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: {}\nclusterCIDR: 10.244.0.0/16\n\
             hostnameOverride: n1\nclientConnection: {{kubeconfig: {}}}\nconntrack: {{maxPerCore: 0}}\n\
             nftables: {{syncPeriod: 1s}}\niptables: {{syncPeriod: 1s}}\n",
            self.mode,
            self.api.kubeconfig(self.directory.path()).display()
        );
        std::fs::write(&config, text).expect("written");
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-proxy"));
        Program(command.arg(format!("--config={}", config.display())).spawn().expect("started"))
    }

    fn service(&self, name: &str, spec: Value) {
        self.api.apply(SERVICES, service(name, spec));
    }

    /// Pods by their place in `pods`.
    fn endpoints(&self, service: &str, protocol: &str, pods: &[usize]) {
        let endpoint = |at: &usize| {
            json!({"addresses": [self.pods[*at].address], "nodeName": if *at == 2 { "n2" } else { "n1" },
                "conditions": {"ready": true, "serving": true, "terminating": false}})
        };
        let endpoints: Vec<Value> = pods.iter().map(endpoint).collect();
        self.api.apply(
            SLICES,
            json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
                "metadata": {"name": service, "namespace": "ns", "labels": {"kubernetes.io/service-name": service}},
                "ports": [{"name": "", "port": 8080, "protocol": protocol}], "endpoints": endpoints}),
        );
    }
}

fn service(name: &str, spec: Value) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "ns"}, "spec": spec})
}

/// The first words of so many answers.
fn names(times: usize, mut ask: impl FnMut() -> String) -> BTreeSet<String> {
    (0..times).map(|_| ask().split(' ').next().unwrap_or_default().to_owned()).collect()
}

fn until(what: &str, mut ask: impl FnMut() -> String, expected: &str) {
    let started = Instant::now();
    loop {
        let found = ask();
        if found.starts_with(expected) {
            return;
        }
        assert!(
            started.elapsed() < SOON,
            "{what}: {found}, not {expected}\n{}",
            output("nft list ruleset | head -150")
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn carries_services(mode: &'static str) {
    if !is_root() {
        return;
    }
    let lab = Lab::new(mode);
    let in_kernel = mode != "userspace";
    let [a, _, c] = &lab.pods;
    let ports = |node_port: u16| json!([{"port": 80, "targetPort": 8080, "nodePort": node_port, "protocol": "TCP"}]);
    lab.service("web", json!({"clusterIP": "10.96.0.1", "type": "NodePort", "ports": ports(30_001)}));
    lab.endpoints("web", "TCP", &[0, 2]);
    lab.service(
        "local",
        json!({"clusterIP": "10.96.0.2", "type": "NodePort", "externalTrafficPolicy": "Local", "ports": ports(30_002)}),
    );
    lab.endpoints("local", "TCP", &[1, 2]);
    lab.service("sticky", json!({"clusterIP": "10.96.0.3", "sessionAffinity": "ClientIP", "ports": ports(0)}));
    lab.endpoints("sticky", "TCP", &[0, 1, 2]);
    lab.service("dead", json!({"clusterIP": "10.96.0.4", "type": "NodePort", "ports": ports(30_004)}));
    let mut balanced = service(
        "balanced",
        json!({"clusterIP": "10.96.0.5", "type": "LoadBalancer", "externalIPs": ["198.51.100.1"], "ports": ports(30_005),
            "loadBalancerSourceRanges": ["192.0.2.2/32"]}),
    );
    balanced["status"] = json!({"loadBalancer": {"ingress": [{"ip": "203.0.113.1", "ipMode": "VIP"}]}});
    lab.api.apply(SERVICES, balanced.clone());
    lab.endpoints("balanced", "TCP", &[1]);
    let udp = |port: u16| json!([{"port": port, "targetPort": 8080, "protocol": "UDP"}]);
    lab.service("datagrams", json!({"clusterIP": "10.96.0.6", "ports": udp(53)}));
    lab.endpoints("datagrams", "UDP", &[0]);
    lab.service("here", json!({"clusterIP": "10.96.0.7", "internalTrafficPolicy": "Local", "ports": ports(0)}));
    lab.endpoints("here", "TCP", &[0, 2]);
    let program = lab.start();

    // Every kind of address, from everywhere.
    until("a cluster IP in a pod", || c.ask("tcp:10.96.0.1:80"), "");
    assert_eq!(names(24, || a.ask("tcp:10.96.0.1:80")), set(&["a", "c"]), "itself too");
    assert_eq!(names(24, || ask("tcp:10.96.0.1:80")), set(&["a", "c"]), "on the node");
    assert_eq!(names(24, || lab.outside.ask("tcp:192.0.2.1:30001")), set(&["a", "c"]), "a node port");
    assert_eq!(names(24, || a.ask("tcp:192.0.2.1:30001")), set(&["a", "c"]), "a node port in a pod");
    assert_eq!(lab.outside.ask("tcp:198.51.100.1:80").split(' ').next(), Some("b"), "an external IP");
    assert_eq!(lab.outside.ask("tcp:203.0.113.1:80").split(' ').next(), Some("b"), "a load balancer's address");
    // The policies of traffic.
    let client = if in_kernel { "b 192.0.2.2" } else { "b " };
    until("only this node's endpoint, with the client's address", || lab.outside.ask("tcp:192.0.2.1:30002"), client);
    assert_eq!(names(24, || a.ask("tcp:10.96.0.2:80")), set(&["b", "c"]), "within the cluster all endpoints");
    if in_kernel {
        assert_eq!(names(24, || a.ask("tcp:192.0.2.1:30002")), set(&["b", "c"]), "pods are within");
        assert_eq!(c.ask("tcp:10.96.0.1:80").split(' ').count(), 2);
        assert!(c.ask("tcp:10.96.0.5:80").ends_with(" 10.244.1.4"), "pods keep their address");
    }
    assert_eq!(names(12, || c.ask("tcp:10.96.0.7:80")), set(&["a"]), "the internal policy");
    // Who may not, and what is not there.
    balanced["spec"]["loadBalancerSourceRanges"] = json!(["198.18.0.0/15"]);
    lab.api.apply(SERVICES, balanced);
    let shut = if in_kernel { "silence" } else { "" };
    until("the balancer is closed to others", || lab.outside.ask("tcp:203.0.113.1:80"), shut);
    assert_eq!(lab.outside.ask("tcp:198.51.100.1:80").split(' ').next(), Some("b"), "but not its other addresses");
    for to in ["tcp:10.96.0.4:80", "tcp:192.0.2.1:30004"] {
        assert_eq!(a.ask(to), "refused", "{to}");
    }
    assert_eq!(lab.outside.ask("tcp:192.0.2.1:30004"), "refused");
    if mode == "nftables" {
        // As in Kubernetes, in the mode iptables such a packet leaves by the default route.
        assert_eq!(a.ask("tcp:10.96.0.1:81"), "refused", "a port that is not served");
    }
    // Affinity.
    assert_eq!(names(12, || a.ask("tcp:10.96.0.3:80")).len(), 1);

    // Changes are followed: a flow of datagrams is not sent to where its endpoint was.
    let socket = a.within(|| {
        let socket = UdpSocket::bind("0.0.0.0:0").expect("a socket");
        socket.connect("10.96.0.6:53").expect("connected");
        socket
    });
    let speak = || ask_on_udp(&socket).unwrap_or_else(|error| error.to_string());
    until("datagrams", speak, "a ");
    lab.endpoints("datagrams", "UDP", &[2]);
    until("datagrams to the new endpoint", speak, "c ");
    lab.endpoints("dead", "TCP", &[2]);
    until("a Service that comes to life", || a.ask("tcp:10.96.0.4:80"), "c ");
    lab.api.delete(SERVICES, "ns", "sticky");
    until(
        "a Service that is gone",
        || if a.ask("tcp:10.96.0.3:80").starts_with(['a', 'b', 'c']) { "served" } else { "gone" }.to_owned(),
        "gone",
    );

    // What is damaged is mended.
    if in_kernel {
        run("nft flush ruleset");
        until("after all rules were flushed", || a.ask("tcp:10.96.0.6:53").replace("refused", "silence"), "silence");
        until("after all rules were flushed", || c.ask("tcp:10.96.0.5:80"), "b ");
    }

    // How it shows itself.
    let at = |port: u16| std::net::SocketAddr::from(([127, 0, 0, 1], port));
    assert!(http(at(10249), "/proxyMode").is_some_and(|answer| answer.ends_with(mode)));
    for path in ["/healthz", "/livez"] {
        assert!(http(at(10256), path).is_some_and(|answer| answer.contains("200 OK")), "{path}");
    }
    let metrics = http(at(10249), "/metrics").expect("metrics");
    for name in [
        "sync_proxy_rules_duration_seconds_count",
        "sync_proxy_rules_service_changes_total",
        "proxy_healthz_total{code=\"200\"} 1",
    ] {
        assert!(metrics.contains(&format!("kubeproxy_{name}")), "{name}: {metrics}");
    }
    let mut health = service(
        "checked",
        json!({"clusterIP": "10.96.0.8", "type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30_108,
            "ports": ports(30_008)}),
    );
    lab.endpoints("checked", "TCP", &[2]);
    lab.api.apply(SERVICES, health.clone());
    let check = || http(at(30_108), "/").unwrap_or_default();
    eventually("no endpoint here", || check().contains("503").then_some(()));
    lab.endpoints("checked", "TCP", &[0, 2]);
    eventually("an endpoint here", || check().contains("\"localEndpoints\":1").then_some(()));
    health["spec"]["externalTrafficPolicy"] = json!("Cluster");
    lab.api.apply(SERVICES, health);
    eventually("the port is closed", || check().is_empty().then_some(()));
    lab.api.apply(
        NODES,
        json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"},
            "spec": {"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}),
    );
    eventually("a node that goes is not eligible", || {
        http(at(10256), "/healthz").filter(|answer| answer.contains("503") && answer.contains("\"nodeEligible\":false"))
    });
    assert!(http(at(10256), "/livez").is_some_and(|answer| answer.contains("200 OK")));

    // The rules outlive the process, its successor takes them over, and --cleanup takes them away.
    drop(program);
    if in_kernel {
        assert!(c.ask("tcp:10.96.0.5:80").starts_with("b "));
        let program = lab.start();
        lab.endpoints("balanced", "TCP", &[0]);
        until("a change after the restart", || c.ask("tcp:10.96.0.5:80"), "a ");
        drop(program);
    }
    let cleanup = Command::new(env!("CARGO_BIN_EXE_kube-proxy")).arg("--cleanup").status().expect("started");
    assert!(cleanup.success());
    let left = output("nft list ruleset | grep -i kube; ip link show | grep kube");
    assert_eq!(left, "", "nothing is left");
}

#[test]
fn nftables_carries_services() {
    carries_services("nftables");
}

#[test]
fn iptables_carries_services() {
    carries_services("iptables");
}

#[test]
fn userspace_carries_services() {
    carries_services("userspace");
}

/// This test's machine may have no IPVS; then that must be said, and nothing changed.
#[test]
fn a_mode_that_the_machine_cannot_do_is_refused_with_the_reason() {
    if !is_root() || std::path::Path::new("/proc/net/ip_vs").exists() {
        return;
    }
    become_node();
    let refused = Command::new(env!("CARGO_BIN_EXE_kube-proxy")).arg("--proxy-mode=ipvs").output().expect("started");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("can't use the IPVS proxier"), "{said}");
    assert_eq!(output("nft list ruleset"), "");
}
