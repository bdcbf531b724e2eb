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
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    process::Command,
    time::{Duration, Instant},
};
use wires::{Wire, ask, ask_on_tcp, ask_on_udp, become_node, has_sctp, is_root, output, run};

const SERVICES: &str = "/api/v1/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
const NODES: &str = "/api/v1/nodes";
/// Rules are made within milliseconds; a busy machine, or one that is emulated, may take longer.
const SOON: Duration = Duration::from_secs(120);

struct Lab {
    api: FakeApi,
    directory: tempfile::TempDir,
    mode: &'static str,
    /// The family of its Services.
    ipv6: bool,
    /// Two pods of this node, one of another, and a machine outside.
    pods: [Wire; 3],
    outside: Wire,
}

const PODS: [&str; 3] = ["10.244.0.2", "10.244.0.3", "10.244.1.4"];

/// The address of IPv6 that stands for one of IPv4, so that one story is told in both.
fn six(v4: &str) -> IpAddr {
    format!("fd00::{v4}").parse().expect("an address")
}

impl Lab {
    fn new(mode: &'static str, ipv6: bool) -> Self {
        become_node();
        let mut names = ["a", "b", "c"].into_iter();
        let pods = PODS.map(|address| {
            let name = names.next().expect("a name");
            let pod = Wire::pod(name, address).and_pod(&six(address).to_string());
            pod.serve(name, 8080);
            pod.serve_at(name, SocketAddr::new(six(address), 8080));
            pod
        });
        let [out, node] = ["192.0.2.2", "192.0.2.1"].map(|v4| six(v4).to_string());
        let outside = Wire::machine("outside", "192.0.2.2", "192.0.2.1").and_machine(&out, &node);
        // The CIDR of Services is not routed in a real cluster either, but for the default route.
        run(&format!("ip route add default via 192.0.2.2; ip route add default via {out}"));
        let lab = Self {
            api: FakeApi::start(),
            directory: tempfile::tempdir().expect("a directory"),
            mode,
            ipv6,
            pods,
            outside,
        };
        lab.node(json!({}));
        lab
    }

    fn node(&self, spec: Value) {
        let address = |ip: String| json!({"type": "InternalIP", "address": ip});
        let addresses = json!([address("192.0.2.1".into()), address(six("192.0.2.1").to_string())]);
        self.api.apply(
            NODES,
            json!({"apiVersion": "v1", "kind": "Node", "spec": spec,
                "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "far"}},
                "status": {"addresses": addresses}}),
        );
    }

    /// An address of the story in the lab's family.
    fn ip(&self, v4: &str) -> IpAddr {
        if self.ipv6 { six(v4) } else { v4.parse().expect("an address") }
    }

    /// Whom to ask, for `wires::ask`.
    fn to(&self, protocol: &str, v4: &str, port: u16) -> String {
        format!("{protocol}:{}", SocketAddr::new(self.ip(v4), port))
    }

    fn start(&self) -> Program {
        let config = self.directory.path().join("config.yaml");
        let text = format!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: {}\n\
             clusterCIDR: 10.244.0.0/16,fd00::10.244.0.0/112\n\
             hostnameOverride: n1\nclientConnection: {{kubeconfig: {}}}\nconntrack: {{maxPerCore: 0}}\n\
             nftables: {{syncPeriod: 1s}}\niptables: {{syncPeriod: 1s}}\nipvs: {{syncPeriod: 1s}}\n",
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
        self.slice(service, protocol, pods, self.ipv6, json!({"ready": true, "serving": true, "terminating": false}));
    }

    fn slice(&self, service: &str, protocol: &str, pods: &[usize], ipv6: bool, conditions: Value) {
        let endpoint = |at: &usize| {
            let address = if ipv6 { six(PODS[*at]).to_string() } else { PODS[*at].to_owned() };
            json!({"addresses": [address], "nodeName": if *at == 2 { "n2" } else { "n1" }, "conditions": conditions})
        };
        let endpoints: Vec<Value> = pods.iter().map(endpoint).collect();
        let family = if ipv6 { "IPv6" } else { "IPv4" };
        self.api.apply(
            SLICES,
            json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": family,
                "metadata": {"name": format!("{service}-{ipv6}"), "namespace": "ns",
                    "labels": {"kubernetes.io/service-name": service}},
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

/// What somebody may do to the rules of a mode, each to a part of them.
const DAMAGES: [(&str, &str); 4] = [
    ("nftables", "nft flush map FAMILY kube-proxy service-ips"),
    ("nftables", "nft flush chain FAMILY kube-proxy slot-0"),
    (
        "iptables",
        "IPTABLES -t nat -F $(IPTABLES-save -t nat | grep -o \"KUBE-SVC-.*ns/balanced\" | cut -d\" \" -f1 | head -n 1)",
    ),
    ("ipvs", "ipvsadm -D -t ADDRESS"),
];

/// One story for every mode, in either family.
fn carries_services(mode: &'static str, ipv6: bool) {
    if !is_root() {
        return;
    }
    let lab = Lab::new(mode, ipv6);
    let in_kernel = mode != "userspace";
    let [a, _, c] = &lab.pods;
    let (outside, node) = (&lab.outside, "192.0.2.1");
    let ip = |v4: &str| lab.ip(v4).to_string();
    let tcp = |v4: &str, port: u16| lab.to("tcp", v4, port);
    let ports = |node_port: u16| json!([{"port": 80, "targetPort": 8080, "nodePort": node_port, "protocol": "TCP"}]);
    lab.service("web", json!({"clusterIP": ip("10.96.0.1"), "type": "NodePort", "ports": ports(30_001)}));
    lab.endpoints("web", "TCP", &[0, 2]);
    lab.service(
        "local",
        json!({"clusterIP": ip("10.96.0.2"), "type": "NodePort", "externalTrafficPolicy": "Local", "ports": ports(30_002)}),
    );
    lab.endpoints("local", "TCP", &[1, 2]);
    let sticky = |seconds: u32| {
        json!({"clusterIP": ip("10.96.0.3"), "sessionAffinity": "ClientIP", "ports": ports(0),
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}})
    };
    lab.service("sticky", sticky(600));
    lab.endpoints("sticky", "TCP", &[0, 1, 2]);
    lab.service("dead", json!({"clusterIP": ip("10.96.0.4"), "type": "NodePort", "ports": ports(30_004)}));
    let mut balanced = service(
        "balanced",
        json!({"clusterIP": ip("10.96.0.5"), "type": "LoadBalancer", "externalIPs": [ip("198.51.100.1")],
            "ports": ports(30_005), "loadBalancerSourceRanges": [format!("{}/{}", ip("192.0.2.2"), if ipv6 { 128 } else { 32 })]}),
    );
    balanced["status"] = json!({"loadBalancer": {"ingress": [{"ip": ip("203.0.113.1"), "ipMode": "VIP"}]}});
    lab.api.apply(SERVICES, balanced.clone());
    lab.endpoints("balanced", "TCP", &[1]);
    let udp = |port: u16| json!([{"port": port, "targetPort": 8080, "protocol": "UDP"}]);
    lab.service("datagrams", json!({"clusterIP": ip("10.96.0.6"), "ports": udp(53)}));
    lab.endpoints("datagrams", "UDP", &[0]);
    lab.service("here", json!({"clusterIP": ip("10.96.0.7"), "internalTrafficPolicy": "Local", "ports": ports(0)}));
    lab.endpoints("here", "TCP", &[0, 2]);
    lab.service("draining", json!({"clusterIP": ip("10.96.0.9"), "ports": ports(0)}));
    lab.slice("draining", "TCP", &[2], ipv6, json!({"ready": false, "serving": true, "terminating": true}));
    let both = [six("10.96.0.10").to_string(), "10.96.0.10".to_owned()];
    lab.service("both", json!({"clusterIP": both[0], "clusterIPs": both, "ports": ports(0)}));
    lab.slice("both", "TCP", &[0], true, json!({"ready": true}));
    lab.slice("both", "TCP", &[1], false, json!({"ready": true}));
    // One number for two protocols; slices of one Service with ports of their own.
    let twin = |protocols: &[&str]| {
        let port = |p: &&str| json!({"name": p.to_lowercase(), "port": 80, "targetPort": 8080, "protocol": p});
        json!({"clusterIP": ip("10.96.0.11"), "ports": protocols.iter().map(port).collect::<Vec<Value>>()})
    };
    lab.service("twin", twin(&["TCP", "UDP"]));
    lab.service("many", json!({"clusterIP": ip("10.96.0.12"), "ports": [{"name": "tcp", "port": 80}]}));
    lab.pods[1].serve_at("b", SocketAddr::new(lab.ip(PODS[1]), 9090));
    lab.pods[0].serve_at("a2", SocketAddr::new(lab.ip(PODS[0]), 9091));
    for (service, slice, pod, ports) in [
        ("twin", "twin-1", 0, json!([["tcp", "TCP", 8080], ["udp", "UDP", 8080]])),
        ("many", "many-1", 0, json!([["tcp", "TCP", 8080]])),
        ("many", "many-2", 1, json!([["tcp", "TCP", 9090]])),
        ("many", "many-3", 0, json!([["tcp", "TCP", 9091]])),
    ] {
        let ports = ports.as_array().into_iter().flatten();
        let ports: Vec<Value> = ports.map(|p| json!({"name": p[0], "protocol": p[1], "port": p[2]})).collect();
        lab.api.apply(
            SLICES,
            json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "addressType": if ipv6 { "IPv6" } else { "IPv4" }, "ports": ports,
                "metadata": {"name": slice, "namespace": "ns", "labels": {"kubernetes.io/service-name": service}},
                "endpoints": [{"addresses": [ip(PODS[pod])], "conditions": {"ready": true}}]}),
        );
    }
    let mut program = lab.start();

    // Every kind of address, from everywhere.
    until("a cluster IP in a pod", || c.ask(&tcp("10.96.0.5", 80)), "b ");
    assert_eq!(names(24, || a.ask(&tcp("10.96.0.1", 80))), set(&["a", "c"]), "itself too");
    assert_eq!(names(24, || ask(&tcp("10.96.0.1", 80))), set(&["a", "c"]), "on the node");
    assert_eq!(names(24, || outside.ask(&tcp(node, 30_001))), set(&["a", "c"]), "a node port");
    assert_eq!(names(24, || a.ask(&tcp(node, 30_001))), set(&["a", "c"]), "a node port in a pod");
    assert_eq!(names(1, || outside.ask(&tcp("198.51.100.1", 80))), set(&["b"]), "an external IP");
    assert_eq!(names(1, || outside.ask(&tcp("203.0.113.1", 80))), set(&["b"]), "a load balancer's address");
    until("a Service of both families in one", || a.ask(&format!("tcp:[{}]:80", both[0])), "a ");
    until("a Service of both families in the other", || a.ask(&format!("tcp:{}:80", both[1])), "b ");
    assert_eq!(names(24, || c.ask(&tcp("10.96.0.12", 80))), set(&["a", "a2", "b"]), "slices with other ports");
    // One number for two protocols, and for either alone.
    for protocols in [&["TCP", "UDP"][..], &["TCP"], &["UDP"]] {
        lab.service("twin", twin(protocols));
        for protocol in ["tcp", "udp"] {
            let wanted = protocols.contains(&protocol.to_uppercase().as_str());
            let ask = || {
                if names(1, || c.ask(&lab.to(protocol, "10.96.0.11", 80))) == set(&["a"]) { "served" } else { "not" }
            };
            until(&format!("{protocol} of {protocols:?}"), || ask().to_owned(), if wanted { "served" } else { "not" });
        }
    }
    // The policies of traffic.
    let client = if in_kernel { format!("b {}", ip("192.0.2.2")) } else { "b ".to_owned() };
    until("only this node's endpoint, with the client's address", || outside.ask(&tcp(node, 30_002)), &client);
    assert_eq!(names(24, || a.ask(&tcp("10.96.0.2", 80))), set(&["b", "c"]), "within the cluster all endpoints");
    if in_kernel {
        // The kernel's balancer has one set of servers for an address, whoever asks: as in Kubernetes, this node's.
        let within = if mode == "ipvs" { set(&["b"]) } else { set(&["b", "c"]) };
        assert_eq!(names(24, || a.ask(&tcp(node, 30_002))), within, "pods are within");
        assert_eq!(c.ask(&tcp("10.96.0.1", 80)).split(' ').count(), 2);
        let own = format!(" {}", ip("10.244.1.4"));
        assert!(c.ask(&tcp("10.96.0.5", 80)).ends_with(&own), "pods keep their address");
    }
    assert_eq!(names(12, || c.ask(&tcp("10.96.0.7", 80))), set(&["a"]), "the internal policy");
    // Hints, where all endpoints have them: this node's, else this zone's, else none holds.
    lab.service("near", json!({"clusterIP": ip("10.96.0.13"), "ports": ports(0)}));
    let host = |name: &str| json!({"forNodes": [{"name": name}], "forZones": [{"name": "far"}]});
    let zone = |name: &str| json!({"forZones": [{"name": name}]});
    for (hints, expected) in [
        ([host("n1"), host("n2")], &["a"][..]),
        ([host("n3"), host("n2")], &["a", "c"]),
        ([zone("near"), zone("far")], &["c"]),
        ([zone("far"), json!({})], &["a", "c"]),
    ] {
        let endpoint = |(pod, hints): (usize, &Value)| json!({"addresses": [ip(PODS[pod])], "hints": hints});
        let endpoints: Vec<Value> = [0, 2].into_iter().zip(&hints).map(endpoint).collect();
        lab.api.apply(
            SLICES,
            json!({"apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "addressType": if ipv6 { "IPv6" } else { "IPv4" },
                "metadata": {"name": "near-1", "namespace": "ns", "labels": {"kubernetes.io/service-name": "near"}},
                "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
                "endpoints": endpoints}),
        );
        let found = || names(24, || lab.pods[1].ask(&tcp("10.96.0.13", 80)));
        until(&format!("hints {hints:?}"), || format!("{:?}", found()), &format!("{:?}", set(expected)));
    }
    assert_eq!(names(2, || a.ask(&tcp("10.96.0.9", 80))), set(&["c"]), "what ends serves where nothing else does");
    // Who may not, and what is not there.
    balanced["spec"]["loadBalancerSourceRanges"] = json!([if ipv6 { "fd99::/64" } else { "198.18.0.0/15" }]);
    lab.api.apply(SERVICES, balanced);
    let shut = if in_kernel { "silence" } else { "" };
    until("the balancer is closed to others", || outside.ask(&tcp("203.0.113.1", 80)), shut);
    assert_eq!(names(1, || outside.ask(&tcp("198.51.100.1", 80))), set(&["b"]), "but not its other addresses");
    for to in [tcp("10.96.0.4", 80), tcp(node, 30_004)] {
        assert_eq!(a.ask(&to), "refused", "{to}");
    }
    assert_eq!(outside.ask(&tcp(node, 30_004)), "refused");
    if mode == "nftables" {
        // As in Kubernetes, in the mode iptables such a packet leaves by the default route.
        assert_eq!(a.ask(&tcp("10.96.0.1", 81)), "refused", "a port that is not served");
        // Once the ranges of Services are known, what goes to others of their addresses does not leave.
        let range = format!("{}/{}", ip("10.96.0.0"), if ipv6 { 108 } else { 12 });
        let of_services = json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
            "spec": {"cidrs": [range]}});
        lab.api.apply("/apis/networking.k8s.io/v1/servicecidrs", of_services);
        let family = if ipv6 { "ip6" } else { "ip" };
        let rule = format!("ct state new {family} daddr {range} drop");
        let list = format!("nft list chain {family} kube-proxy filter-forward");
        until("the ranges of Services", || if output(&list).contains(&rule) { "shut" } else { "open" }.into(), "shut");
        assert_eq!(a.ask(&tcp("10.96.0.99", 80)), "silence");
        assert_eq!(names(24, || a.ask(&tcp("10.96.0.1", 80))), set(&["a", "c"]));
    }
    if mode == "iptables" && !ipv6 {
        assert_eq!(names(24, || ask("tcp:127.0.0.1:30001")), set(&["a", "c"]), "a node port on loopback");
    }
    // Affinity, and its end.
    assert_eq!(names(12, || a.ask(&tcp("10.96.0.3", 80))).len(), 1);
    lab.service("sticky", sticky(1));
    let later = || {
        let before = a.ask(&tcp("10.96.0.3", 80));
        std::thread::sleep(Duration::from_millis(1200));
        if a.ask(&tcp("10.96.0.3", 80)) == before { "as before" } else { "another" }.to_owned()
    };
    // The kernel's balancer remembers a client for as long as it remembers any of its connections.
    if mode != "ipvs" {
        until("a client that was silent is let go", later, "another");
    }

    // A connection goes on where it began when its endpoint gets no new ones.
    let to = SocketAddr::new(lab.ip("10.96.0.5"), 80);
    let mut open = c.within(move || TcpStream::connect(to).expect("a connection"));
    let mut speak = || ask_on_tcp(&mut open).unwrap_or_else(|error| error.to_string());
    assert!(speak().starts_with("b "));
    lab.endpoints("balanced", "TCP", &[0]);
    until("new connections go to the new endpoint", || c.ask(&tcp("10.96.0.5", 80)), "a ");
    assert!(speak().starts_with("b "), "{}", speak());
    lab.endpoints("balanced", "TCP", &[1]);
    until("and back", || c.ask(&tcp("10.96.0.5", 80)), "b ");
    assert!(speak().starts_with("b "), "{}", speak());

    // Changes are followed: a flow of datagrams is not sent to where its endpoint was.
    let at = SocketAddr::new(lab.ip("10.96.0.6"), 53);
    let socket = a.within(move || {
        let any: IpAddr = if at.is_ipv4() { [0; 4].into() } else { [0u16; 8].into() };
        let socket = UdpSocket::bind((any, 0)).expect("a socket");
        socket.connect(at).expect("connected");
        socket
    });
    let speak = || ask_on_udp(&socket).unwrap_or_else(|error| error.to_string());
    until("datagrams", speak, "a ");
    lab.endpoints("datagrams", "UDP", &[2]);
    until("datagrams to the new endpoint", speak, "c ");
    lab.endpoints("dead", "TCP", &[2]);
    until("a Service that comes to life", || a.ask(&tcp("10.96.0.4", 80)), "c ");
    lab.api.delete(SERVICES, "ns", "sticky");
    until(
        "a Service that is gone",
        || if a.ask(&tcp("10.96.0.3", 80)).starts_with(['a', 'b', 'c']) { "served" } else { "gone" }.to_owned(),
        "gone",
    );

    // What is damaged is mended.
    for (of, damage) in DAMAGES.iter().filter(|(of, _)| *of == mode) {
        let (ip, table) = if ipv6 { ("ip6", "ip6tables") } else { ("ip", "iptables") };
        run(&damage.replace("IPTABLES", table).replace("FAMILY", ip).replace("ADDRESS", &to.to_string()));
        until(&format!("after {of}: {damage}"), || c.ask(&tcp("10.96.0.5", 80)), "b ");
    }
    if in_kernel {
        run("nft flush ruleset");
        until("after all rules were flushed", || a.ask(&tcp("10.96.0.6", 53)).replace("refused", "silence"), "silence");
        until("after all rules were flushed", || c.ask(&tcp("10.96.0.5", 80)), "b ");
    }
    if !ipv6 {
        shows_itself(&lab, mode);
    }

    // Without the API server all stays as it was.
    lab.api.go_away(true);
    std::thread::sleep(Duration::from_millis(300));
    assert!(c.ask(&tcp("10.96.0.5", 80)).starts_with("b "));
    // A new configuration is a new process's.
    let config = lab.directory.path().join("config.yaml");
    let text = std::fs::read_to_string(&config).expect("a configuration");
    std::fs::write(&config, text + "# new\n").expect("written");
    eventually("the process ends", || program.0.try_wait().ok().flatten());
    // The rules outlive the process, a successor that knows nothing yet leaves them, one that does takes them over, and
    // --cleanup takes them away.
    drop(program);
    if in_kernel {
        let program = lab.start();
        std::thread::sleep(Duration::from_millis(500));
        assert!(c.ask(&tcp("10.96.0.5", 80)).starts_with("b "));
        drop(program);
    }
    lab.api.go_away(false);
    if in_kernel {
        let program = lab.start();
        lab.endpoints("balanced", "TCP", &[0]);
        until("a change after the restart", || c.ask(&tcp("10.96.0.5", 80)), "a ");
        drop(program);
    }
    let cleanup = Command::new(env!("CARGO_BIN_EXE_kube-proxy")).arg("--cleanup").status().expect("started");
    assert!(cleanup.success());
    let left = output("nft list ruleset | grep -i kube; ip link show | grep kube");
    assert_eq!(left, "", "nothing is left");
}

/// What it tells of itself, and of the node, to whoever asks.
fn shows_itself(lab: &Lab, mode: &str) {
    let at = |port: u16| SocketAddr::from(([127, 0, 0, 1], port));
    assert!(http(at(10249), "/proxyMode").is_some_and(|answer| answer.ends_with(mode)));
    assert!(http(at(10249), "/configz").is_some_and(|answer| answer.contains("\"configSyncPeriod\":\"15m\"")));
    for path in ["/healthz", "/livez"] {
        assert!(http(at(10256), path).is_some_and(|answer| answer.contains("200 OK")), "{path}");
    }
    let metrics = http(at(10249), "/metrics").expect("metrics");
    for name in [
        "sync_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"}",
        "sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv6\"}",
        "sync_proxy_rules_service_changes_total",
        "sync_proxy_rules_no_local_endpoints_total{ip_family=\"IPv4\",traffic_policy=\"internal\"} 0",
        "proxy_healthz_total{code=\"200\"} 1",
    ] {
        assert!(metrics.contains(&format!("kubeproxy_{name}")), "{name}: {metrics}");
    }
    let rules = "kubeproxy_sync_proxy_rules_iptables_total{ip_family=\"IPv4\",table=\"nat\"}";
    for name in [rules, "kubeproxy_iptables_ct_state_invalid_dropped_packets_total"] {
        assert_eq!(metrics.contains(name), mode == "iptables", "{name}: {metrics}");
    }
    let ports = json!([{"port": 80, "targetPort": 8080, "nodePort": 30_008, "protocol": "TCP"}]);
    let mut health = service(
        "checked",
        json!({"clusterIP": "10.96.0.8", "type": "LoadBalancer", "externalTrafficPolicy": "Local",
            "healthCheckNodePort": 30_108, "ports": ports}),
    );
    lab.endpoints("checked", "TCP", &[2]);
    lab.api.apply(SERVICES, health.clone());
    // Where node ports are: some modes have them at the node's own address alone.
    let check = || http(SocketAddr::from(([192, 0, 2, 1], 30_108)), "/").unwrap_or_default();
    eventually("no endpoint here", || check().contains("503").then_some(()));
    lab.endpoints("checked", "TCP", &[0, 2]);
    eventually("an endpoint here", || check().contains("\"localEndpoints\":1").then_some(()));
    health["spec"]["externalTrafficPolicy"] = json!("Cluster");
    lab.api.apply(SERVICES, health);
    eventually("the port is closed", || check().is_empty().then_some(()));
    lab.node(json!({"taints": [{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]}));
    eventually("a node that goes is not eligible", || {
        http(at(10256), "/healthz").filter(|answer| answer.contains("503") && answer.contains("\"nodeEligible\":false"))
    });
    assert!(http(at(10256), "/livez").is_some_and(|answer| answer.contains("200 OK")));
}

#[test]
fn nftables_carries_services() {
    carries_services("nftables", false);
}

#[test]
fn nftables_carries_services_of_ipv6() {
    carries_services("nftables", true);
}

#[test]
fn iptables_carries_services() {
    carries_services("iptables", false);
}

#[test]
fn iptables_carries_services_of_ipv6() {
    carries_services("iptables", true);
}

#[test]
fn userspace_carries_services() {
    carries_services("userspace", false);
}

#[test]
fn userspace_carries_services_of_ipv6() {
    carries_services("userspace", true);
}

fn has_ipvs() -> bool {
    std::path::Path::new("/proc/net/ip_vs").exists()
}

/// Where the kernel has it; `tests/ipvs-emulated` brings such a kernel.
#[test]
fn ipvs_carries_services() {
    if has_ipvs() {
        carries_services("ipvs", false);
    } else {
        eprintln!("left out: this kernel has no IPVS; kube-proxy/tests/ipvs-emulated runs this on one that has");
    }
}

#[test]
fn ipvs_carries_services_of_ipv6() {
    if has_ipvs() {
        carries_services("ipvs", true);
    }
}

/// Streams of SCTP by a cluster IP and a node port, where the kernel speaks it (`tests/ipvs-emulated` brings one that does).
#[test]
fn sctp_is_carried_in_the_kernel() {
    if !is_root() {
        return;
    }
    if !has_sctp() {
        eprintln!("left out: this kernel has no SCTP; kube-proxy/tests/ipvs-emulated runs this on one that has");
        return;
    }
    for mode in ["nftables", "ipvs"].into_iter().filter(|mode| *mode != "ipvs" || has_ipvs()) {
        for ipv6 in [false, true] {
            // Each on a thread of its own, which becomes a node of its own.
            let story = std::thread::spawn(move || {
                let lab = Lab::new(mode, ipv6);
                for (pod, name) in [(0, "a"), (2, "c")] {
                    lab.pods[pod].serve_sctp(name, SocketAddr::new(lab.ip(PODS[pod]), 8080));
                }
                let ports = json!([{"port": 80, "targetPort": 8080, "nodePort": 30_001, "protocol": "SCTP"}]);
                let spec = json!({"clusterIP": lab.ip("10.96.0.1").to_string(), "type": "NodePort", "ports": ports});
                lab.service("streams", spec);
                lab.endpoints("streams", "SCTP", &[0]);
                let _program = lab.start();
                let [_, b, _] = &lab.pods;
                let (inner, outer) = (lab.to("sctp", "10.96.0.1", 80), lab.to("sctp", "192.0.2.1", 30_001));
                until("SCTP by a cluster IP", || b.ask(&inner), "a ");
                until("SCTP by a node port", || lab.outside.ask(&outer), "a ");
                lab.endpoints("streams", "SCTP", &[2]);
                until("SCTP to the new endpoint", || b.ask(&inner), "c ");
            });
            story.join().expect("SCTP is carried");
        }
    }
}

/// This test's machine may have no IPVS; then that must be said, and nothing changed.
#[test]
fn a_mode_that_the_machine_cannot_do_is_refused_with_the_reason() {
    if !is_root() || has_ipvs() {
        return;
    }
    become_node();
    let refused = Command::new(env!("CARGO_BIN_EXE_kube-proxy")).arg("--proxy-mode=ipvs").output().expect("started");
    let said = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(!refused.status.success() && said.contains("can't use the IPVS proxier"), "{said}");
    assert_eq!(output("nft list ruleset"), "");
}
