//! NetworkPolicies with real packets: the pod network as a process over a stand-in for the API server, pods as namespaces.
//! The cases are those of Kubernetes' own tests of network policies. Needs root.

#[allow(dead_code, reason = "shared with other tests")]
mod common;
#[allow(dead_code, reason = "shared with other tests")]
#[path = "common/wires.rs"]
mod wires;

use std::net::{IpAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use common::{FakeApi, Program};
use serde_json::{Value, json};
use wires::{Wire, ask, ask_on_tcp, become_node, is_root, output, run};

const NODES: &str = "/api/v1/nodes";
const POLICIES: &str = "/apis/networking.k8s.io/v1/networkpolicies";
const PODS: &str = "/api/v1/pods";
const NAMESPACES: &str = "/api/v1/namespaces";
const SOON: Duration = Duration::from_secs(20);

/// The address of IPv6 that stands for one of IPv4: pods have both.
fn six(v4: &str) -> IpAddr {
    format!("fd00::{v4}").parse().expect("an address")
}

struct Lab {
    api: FakeApi,
    /// In namespace a: server and client; in b: another.
    server: Wire,
    client: Wire,
    other: Wire,
    outside: Wire,
}

impl Lab {
    fn new() -> Self {
        become_node();
        let [server, client, other] = [("server", "10.244.0.2"), ("client", "10.244.0.3"), ("other", "10.244.0.4")]
            .map(|(name, address)| {
                let pod = Wire::pod(name, address).and_pod(&six(address).to_string());
                [80, 81].into_iter().for_each(|port| pod.serve(name, port));
                pod.serve_at(name, (six(address), 80).into());
                pod
            });
        let [out, node] = ["192.0.2.2", "192.0.2.1"].map(|v4| six(v4).to_string());
        let outside = Wire::machine("outside", "192.0.2.2", "192.0.2.1").and_machine(&out, &node);
        outside.serve("outside", 80);
        let lab = Self { api: FakeApi::start(), server, client, other, outside };
        lab.api.apply(
            NODES,
            json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, 
                "spec": {"podCIDR": "10.244.0.0/24", "podCIDRs": ["10.244.0.0/24", "fd00::10.244.0.0/120"]},
                "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}}),
        );
        lab.namespace("a", json!({"kubernetes.io/metadata.name": "a"}));
        lab.namespace("b", json!({"kubernetes.io/metadata.name": "b", "team": "b"}));
        lab.pod("server", "a", "10.244.0.2", json!({"app": "server"}));
        lab.pod("client", "a", "10.244.0.3", json!({"app": "client"}));
        lab.pod("other", "b", "10.244.0.4", json!({"app": "client"}));
        lab
    }

    fn namespace(&self, name: &str, labels: Value) {
        self.api.apply(
            NAMESPACES,
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}),
        );
    }

    fn pod(&self, name: &str, namespace: &str, ip: &str, labels: Value) {
        self.api.apply(
            PODS,
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": labels},
                "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 80}]}]},
                "status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}, {"ip": six(ip)}]}}),
        );
    }

    /// A pod that is on its way: its address is not in its status yet.
    fn coming(&self, name: &str, namespace: &str, labels: Value) {
        self.api.apply(
            PODS,
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": namespace, "labels": labels},
                "spec": {"nodeName": "n1", "containers": [{"name": "c"}]}, "status": {"phase": "Pending"}}),
        );
    }

    fn policy(&self, name: &str, spec: Value) {
        self.api.apply(
            POLICIES,
            json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": {"name": name, "namespace": "a"}, "spec": spec}),
        );
    }

    fn no_policy(&self, name: &str) {
        self.api.delete(POLICIES, "a", name);
    }

    /// Who reaches the server's ports 80 and 81 over TCP and 80 over UDP, in short: `client 80 81 u80, outside 80`.
    fn reach(&self) -> String {
        let from = [("client", &self.client), ("other", &self.other), ("outside", &self.outside)];
        let ports = [("tcp:10.244.0.2:80", " 80"), ("tcp:10.244.0.2:81", " 81"), ("udp:10.244.0.2:80", " u80")];
        let asked = ask_all(from.iter().flat_map(|(_, wire)| ports.map(|(to, _)| (*wire, to))));
        let mut answers = asked.iter();
        let mut line = |name: &str| {
            let open =
                ports.map(|(_, text)| if answers.next().is_some_and(|a| a.starts_with("server")) { text } else { "" });
            format!("{name}{}", open.concat())
        };
        from.map(|(name, _)| line(name)).join(", ")
    }

    /// Who reaches the server's port 80 over IPv6.
    fn reach_six(&self) -> String {
        let from = [("client", &self.client), ("other", &self.other), ("outside", &self.outside)];
        let asked = ask_all(from.iter().map(|(_, wire)| (*wire, "tcp:[fd00::10.244.0.2]:80")));
        let open = from.iter().zip(asked).filter(|(_, answer)| answer.starts_with("server"));
        open.map(|((name, _), _)| *name).collect::<Vec<_>>().join(" ")
    }

    #[track_caller]
    fn reaches(&self, what: &str, expected: &str) {
        until(what, || self.reach(), expected);
    }
}

/// All at once: who gets no answer takes his time.
fn ask_all<'a>(questions: impl Iterator<Item = (&'a Wire, &'static str)>) -> Vec<String> {
    std::thread::scope(|scope| {
        let asked: Vec<_> = questions.map(|(from, to)| scope.spawn(move || from.ask(to))).collect();
        asked.into_iter().map(|answer| answer.join().expect("an answer")).collect()
    })
}

#[track_caller]
fn until(what: &str, mut ask: impl FnMut() -> String, expected: &str) {
    let started = Instant::now();
    loop {
        let found = ask();
        if found == expected {
            return;
        }
        assert!(started.elapsed() < SOON, "{what}: {found}, not {expected}\n{}", output("nft list ruleset"));
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn policies_hold_for_real_packets() {
    if !is_root() {
        return;
    }
    let lab = Lab::new();
    // A Service in front of the server, as kube-proxy makes it.
    run(
        "nft -f - <<'X'\ntable ip services {\nchain c {\ntype nat hook prerouting priority -100\nip daddr 10.96.0.1 tcp dport 8000 dnat to 10.244.0.2:80\n}\n}\nX",
    );
    let directory = tempfile::tempdir().expect("a directory");
    let kubeconfig = lab.api.kubeconfig(directory.path());
    let command = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_pod-network"));
        let cni = directory.path().join("net.d");
        command.arg(format!("--kubeconfig={}", kubeconfig.display())).arg(format!("--cni-conf-dir={}", cni.display()));
        command.args(["--hostname-override=n1", "--cluster-cidr=10.244.0.0/16"]);
        command
    };
    let program = Program(command().spawn().expect("started"));
    let all = "client 80 81 u80, other 80 81 u80, outside 80 81 u80";
    let server = json!({"matchLabels": {"app": "server"}});
    let client = json!({"podSelector": {"matchLabels": {"app": "client"}}});
    let ingress = |rules: Value| json!({"podSelector": server, "policyTypes": ["Ingress"], "ingress": rules});
    lab.reaches("without policies", all);

    // A connection from before, that a policy ends.
    let mut stream = lab.other.within(|| TcpStream::connect("10.244.0.2:80").expect("connected"));
    assert!(ask_on_tcp(&mut stream).is_ok());
    let nobody = "client, other, outside";
    lab.policy("deny", ingress(json!([])));
    lab.reaches("default deny", nobody);
    let six = || lab.reach_six();
    until("in either family", six, "");
    assert!(ask_on_tcp(&mut stream).is_err(), "a running connection is ended");
    assert!(ask("tcp:10.244.0.2:80").starts_with("server"), "the node reaches its pods: probes must pass");
    assert!(lab.server.ask("tcp:10.244.0.3:80").starts_with("client"), "egress is not the policy's");
    assert!(lab.server.ask("tcp:10.244.0.2:80").starts_with("server"), "a pod reaches itself");

    // Policies add up.
    lab.policy("pods", ingress(json!([{"from": [client]}])));
    lab.reaches("pods of the namespace", "client 80 81 u80, other, outside");
    until("by either address", six, "client");
    assert!(lab.client.ask("tcp:10.96.0.1:8000").starts_with("server"), "by way of a Service");
    assert_ne!(lab.other.ask("tcp:10.96.0.1:8000").split(' ').next(), Some("server"), "not by way of a Service either");
    lab.policy("pods", ingress(json!([{"from": [{"namespaceSelector": {"matchLabels": {"team": "b"}}}]}])));
    lab.reaches("pods of other namespaces", "client, other 80 81 u80, outside");
    lab.namespace("b", json!({"kubernetes.io/metadata.name": "b"}));
    lab.reaches("a namespace that loses its label", nobody);
    lab.namespace("b", json!({"kubernetes.io/metadata.name": "b", "team": "b"}));
    let both =
        json!({"namespaceSelector": {"matchLabels": {"team": "b"}}, "podSelector": {"matchLabels": {"app": "none"}}});
    lab.policy("pods", ingress(json!([{"from": [both]}])));
    lab.reaches("both selectors must match", nobody);
    lab.pod("other", "b", "10.244.0.4", json!({"app": "none"}));
    lab.reaches("a pod that gets the label", "client, other 80 81 u80, outside");

    // Ports.
    lab.policy("pods", ingress(json!([{"ports": [{"port": 81}]}])));
    lab.reaches("one port", "client 81, other 81, outside 81");
    lab.policy("pods", ingress(json!([{"from": [client], "ports": [{"port": "web"}]}])));
    lab.reaches("a named port", "client 80, other, outside");
    until("in either family", six, "client");
    lab.policy(
        "pods",
        ingress(json!([{"from": [client], "ports": [{"port": 79, "endPort": 81}]}, {"ports": [{"protocol": "UDP"}]}])),
    );
    lab.reaches("a range, and a protocol", "client 80 81 u80, other u80, outside u80");

    // Blocks.
    lab.policy(
        "pods",
        ingress(json!([{"from": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.244.0.3/32"]}},
        {"ipBlock": {"cidr": "fd00::/64", "except": ["fd00::10.244.0.0/120"]}}]}])),
    );
    lab.reaches("a block but for one", "client, other 80 81 u80, outside 80 81 u80");
    until("a block of the other family", six, "outside");
    lab.policy("more", ingress(json!([{"from": [{"ipBlock": {"cidr": "10.244.0.3/32"}}], "ports": [{"port": 80}]}])));
    lab.reaches("and a policy for that one", "client 80, other 80 81 u80, outside 80 81 u80");
    lab.no_policy("more");
    lab.no_policy("pods");
    lab.reaches("only the denial is left", nobody);
    lab.no_policy("deny");
    lab.reaches("none is left", all);

    // Egress.
    let goes = || {
        let to = ["tcp:10.244.0.3:80", "tcp:10.244.0.4:80", "tcp:192.0.2.2:80", "udp:10.244.0.3:80"];
        let answers = ask_all(to.into_iter().map(|to| (&lab.server, to)));
        answers.iter().map(|answer| answer.split(' ').next().unwrap_or_default()).collect::<Vec<_>>().join(" ")
    };
    let egress = |rules: Value| json!({"podSelector": server, "policyTypes": ["Egress"], "egress": rules});
    until("without policies", goes, "client other outside client");
    lab.policy("out", egress(json!([])));
    until("no egress at all", goes, "silence silence silence silence");
    lab.reaches("answers still come", all);
    lab.policy("out", egress(json!([{"to": [{"podSelector": {}}], "ports": [{"port": 80}]}])));
    until("to its namespace", goes, "client silence silence silence");
    lab.policy("out", egress(json!([{"to": [{"ipBlock": {"cidr": "192.0.2.0/24"}}, {"namespaceSelector": {"matchLabels": {"team": "b"}}}]}])));
    until("to a block and another namespace", goes, "silence other outside silence");
    lab.policy("out", egress(json!([{"ports": [{"port": "web"}]}])));
    until("to ports by their names", goes, "client other silence silence");

    // A pod has its policies from the first packet on, though its address is told later.
    lab.no_policy("out");
    let late = Wire::pod("late", "10.244.0.9");
    late.serve("late", 80);
    let late_is = || lab.client.ask("tcp:10.244.0.9:80").split(' ').next().unwrap_or_default().to_owned();
    lab.policy("deny", ingress(json!([])));
    lab.reaches("a policy of others", nobody);
    lab.coming("late", "a", json!({"app": "none"}));
    until("no policy speaks of it", late_is, "late");
    lab.coming("late", "a", json!({"app": "server"}));
    until("nobody knows its address yet", late_is, "silence");
    assert!(late.ask("tcp:10.244.0.3:80").starts_with("client"), "egress is not the policy's");
    lab.pod("late", "a", "10.244.0.9", json!({"app": "server"}));
    until("its policy is in force", late_is, "silence");
    lab.policy("pods", ingress(json!([{"from": [client]}])));
    until("and lets the client in", late_is, "late");
    lab.api.delete(PODS, "a", "late");
    lab.no_policy("pods");
    lab.no_policy("deny");
    lab.policy("out", egress(json!([{"ports": [{"port": "web"}]}])));
    until("to ports by their names", goes, "client other silence silence");

    // The rules hold without the API server, for a daemon that starts then as well, and outlive it; who comes when the API is
    // there again repairs what was removed.
    lab.api.go_away(true);
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(goes(), "client other silence silence");
    drop(program);
    let program = Program(command().spawn().expect("started"));
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(goes(), "client other silence silence");
    drop(program);
    lab.api.go_away(false);
    run("nft delete table inet pilothouse-network-policy");
    let program = Program(command().spawn().expect("started"));
    until("after the restart", goes, "client other silence silence");
    lab.no_policy("out");
    until("none is left", goes, "client other outside client");
    drop(program);
    assert!(command().arg("--cleanup").status().expect("started").success());
    assert_eq!(output("nft list tables"), "table ip services");
}
