//! What a policy means, said plainly, straight from the API's objects; and that the compiled form means the same.

use std::collections::BTreeMap;
use std::net::IpAddr;

use apimachinery::labels::Selector;
use k8s_openapi::api::core::v1::Pod as ApiPod;
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::compile::{Compiled, Direction, Labels, Pod, Policy};
use super::render;

const NODE: &str = "n1";

struct World {
    policies: Vec<NetworkPolicy>,
    pods: Vec<ApiPod>,
    namespaces: BTreeMap<String, Labels>,
}

fn matches(selector: &Option<LabelSelector>, labels: &Labels) -> bool {
    selector.as_ref().is_none_or(|s| Selector::from_label_selector(s).expect("a selector").matches(labels))
}

impl World {
    fn at(&self, ip: IpAddr) -> Option<&ApiPod> {
        self.pods.iter().find(|pod| pod.status.as_ref().and_then(|s| s.pod_ip.as_deref()) == Some(&ip.to_string()))
    }

    /// As the API's documentation has it, one sentence after the other.
    fn allows(&self, direction: Direction, source: IpAddr, destination: IpAddr, protocol: &str, port: u16) -> bool {
        let ingress = direction == Direction::Ingress;
        let (subject, peer) = if ingress { (destination, source) } else { (source, destination) };
        let Some(pod) = self.at(subject) else { return true };
        if source == destination || pod.spec.as_ref().and_then(|s| s.node_name.as_deref()) != Some(NODE) {
            return true;
        }
        let empty = Labels::new();
        let labels = pod.metadata.labels.as_ref().unwrap_or(&empty);
        let mut isolated = false;
        for policy in &self.policies {
            let spec = policy.spec.as_ref().expect("a spec");
            if policy.metadata.namespace != pod.metadata.namespace || !matches(&spec.pod_selector, labels) {
                continue;
            }
            let name = if ingress { "Ingress" } else { "Egress" };
            if !spec.policy_types.iter().flatten().any(|t| t == name) {
                continue;
            }
            isolated = true;
            let rules: Vec<(Option<Vec<NetworkPolicyPeer>>, Option<Vec<NetworkPolicyPort>>)> = if ingress {
                spec.ingress.iter().flatten().map(|rule| (rule.from.clone(), rule.ports.clone())).collect()
            } else {
                spec.egress.iter().flatten().map(|rule| (rule.to.clone(), rule.ports.clone())).collect()
            };
            for (peers, ports) in rules {
                let (peers, ports) = (peers.unwrap_or_default(), ports.unwrap_or_default());
                let namespace = policy.metadata.namespace.as_deref().unwrap_or("");
                let by_peer = peers.is_empty() || peers.iter().any(|p| self.is_peer(p, namespace, peer));
                let by_port = ports.is_empty() || ports.iter().any(|p| self.is_port(p, destination, protocol, port));
                if by_peer && by_port {
                    return true;
                }
            }
        }
        !isolated
    }

    fn is_peer(&self, peer: &NetworkPolicyPeer, own: &str, address: IpAddr) -> bool {
        if let Some(block) = &peer.ip_block {
            let within =
                |range: &String| range.parse::<component_base::cidr::Cidr>().expect("a range").contains(address);
            return within(&block.cidr) && !block.except.iter().flatten().any(within);
        }
        let Some(pod) = self.at(address) else { return false };
        let empty = Labels::new();
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("");
        let in_namespace = match &peer.namespace_selector {
            None => namespace == own,
            some => matches(some, self.namespaces.get(namespace).unwrap_or(&empty)),
        };
        in_namespace && matches(&peer.pod_selector, pod.metadata.labels.as_ref().unwrap_or(&empty))
    }

    fn is_port(&self, wanted: &NetworkPolicyPort, destination: IpAddr, protocol: &str, port: u16) -> bool {
        let same = wanted.protocol.as_deref().unwrap_or("TCP").to_lowercase() == protocol;
        same && match &wanted.port {
            None => true,
            Some(IntOrString::Int(first)) => (*first..=wanted.end_port.unwrap_or(*first)).contains(&i32::from(port)),
            Some(IntOrString::String(name)) => self.at(destination).is_some_and(|pod| {
                let ports = pod.spec.iter().flat_map(|s| s.containers.iter().flat_map(|c| c.ports.iter().flatten()));
                ports.into_iter().any(|p| {
                    let p_protocol = p.protocol.as_deref().unwrap_or("TCP").to_lowercase();
                    p.name.as_ref() == Some(name) && p_protocol == protocol && p.container_port == i32::from(port)
                })
            }),
        }
    }

    fn compiled(&self) -> Compiled {
        let pods: Vec<Pod> = self.pods.iter().filter_map(|pod| Pod::read(pod, NODE)).collect();
        let policies: Vec<Policy> = self.policies.iter().map(Policy::read).collect();
        Compiled::new(&policies, &pods, &self.namespaces, &["10.0.0.0/24".parse().expect("a range")], false)
    }
}

fn object<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("an object")
}

fn pod(namespace: &str, app: &str, ip: &str, node: &str, web: u16) -> ApiPod {
    object(json!({"metadata": {"name": ip, "namespace": namespace, "labels": {"app": app}},
        "spec": {"nodeName": node, "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": web}]}]},
        "status": {"podIP": ip, "phase": "Running"}}))
}

fn policy(name: &str, namespace: &str, spec: Value) -> NetworkPolicy {
    object(json!({"metadata": {"name": name, "namespace": namespace}, "spec": spec}))
}

fn namespaces() -> BTreeMap<String, Labels> {
    ["a", "b"].map(|n| (n.to_owned(), Labels::from([("team".to_owned(), n.to_owned())]))).into()
}

#[test]
fn all_that_a_policy_can_say() {
    let world = World {
        policies: vec![
            policy("deny", "a", json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})),
            policy(
                "web",
                "a",
                json!({"podSelector": {"matchLabels": {"app": "x"}}, "policyTypes": ["Ingress"], "ingress": [
                {"from": [{"podSelector": {"matchLabels": {"app": "y"}}}, {"namespaceSelector": {"matchLabels": {"team": "b"}}}],
                 "ports": [{"port": 80}, {"port": 8000, "endPort": 8080}, {"protocol": "UDP", "port": 53}, {"port": "web"}]},
                {"from": [{"ipBlock": {"cidr": "192.0.2.0/24", "except": ["192.0.2.128/25"]}}]}]}),
            ),
            policy(
                "out",
                "a",
                json!({"podSelector": {"matchLabels": {"app": "x"}}, "policyTypes": ["Egress"],
                "egress": [{"ports": [{"protocol": "UDP"}]}, {"to": [{"namespaceSelector": {}}]}]}),
            ),
        ],
        pods: vec![
            pod("a", "x", "10.0.0.1", NODE, 81),
            pod("a", "y", "10.0.0.2", NODE, 82),
            pod("b", "x", "10.0.0.3", "n2", 83),
        ],
        namespaces: namespaces(),
    };
    let rules = render::render(&[(false, world.compiled()), (true, Compiled::default())]);
    insta::assert_snapshot!(rules.create(render::TABLE));
}

#[test]
fn while_a_pod_of_a_policy_awaits_its_address_nobody_unknown_speaks() {
    let mut world = World {
        policies: vec![policy(
            "deny",
            "a",
            json!({"podSelector": {"matchLabels": {"app": "x"}}, "policyTypes": ["Ingress"]}),
        )],
        pods: vec![pod("a", "y", "10.0.0.2", NODE, 82), pod("a", "x", "", "n2", 81)],
        namespaces: namespaces(),
    };
    let rules = |world: &World| {
        let rules = render::render(&[(false, world.compiled()), (true, Compiled::default())]);
        rules.chains[render::LANDMARK].rules.join("\n")
    };
    assert_eq!(rules(&world), "", "elsewhere");
    world.pods.push(pod("a", "z", "", NODE, 81));
    assert_eq!(rules(&world), "", "no policy speaks of it");
    world.pods.push(pod("a", "x", "", NODE, 81));
    assert!(
        rules(&world).contains("ct reply ip saddr 10.0.0.0/24 ct reply ip saddr != @known drop"),
        "{}",
        rules(&world)
    );
    assert!(!rules(&world).contains("ct original ip saddr 10.0.0.0/24"), "egress is not the policy's");
    assert_eq!(world.compiled().known, ["10.0.0.2".parse().expect("an address")].into());
    world.pods[3] = pod("a", "x", "10.0.0.3", NODE, 81);
    assert!(!rules(&world).contains("@known"));
}

fn selectors() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!({})),
        Just(json!({"matchLabels": {"app": "x"}})),
        Just(json!({"matchExpressions": [{"key": "app", "operator": "NotIn", "values": ["y"]}]})),
    ]
}

fn peers() -> impl Strategy<Value = Value> {
    let team = prop_oneof![Just(json!({})), Just(json!({"matchLabels": {"team": "b"}}))];
    prop_oneof![
        selectors().prop_map(|s| json!({"podSelector": s})),
        team.clone().prop_map(|s| json!({"namespaceSelector": s})),
        (team, selectors()).prop_map(|(n, p)| json!({"namespaceSelector": n, "podSelector": p})),
        Just(json!({"ipBlock": {"cidr": "10.0.0.0/29"}})),
        Just(json!({"ipBlock": {"cidr": "0.0.0.0/0", "except": ["10.0.0.2/31", "10.0.0.5/32"]}})),
        Just(json!({"ipBlock": {"cidr": "fd00::/8"}})),
    ]
}

fn ports() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(json!({"port": 80})),
        Just(json!({"port": 79, "endPort": 81})),
        Just(json!({"port": "web"})),
        Just(json!({"protocol": "UDP"})),
        Just(json!({"protocol": "UDP", "port": 80})),
    ]
}

fn policies() -> impl Strategy<Value = Vec<Value>> {
    let rules = |key: &'static str| {
        let one = (prop::collection::vec(peers(), 0..3), prop::collection::vec(ports(), 0..3));
        prop::collection::vec(one.prop_map(move |(peers, ports)| json!({key: peers, "ports": ports})), 0..3)
    };
    let types = prop::sample::subsequence(vec!["Ingress", "Egress"], 1..=2);
    let one = (selectors(), types, rules("from"), rules("to")).prop_map(|(selector, types, ingress, egress)| {
        json!({"podSelector": selector, "policyTypes": types, "ingress": ingress, "egress": egress})
    });
    prop::collection::vec(one, 0..4)
}

proptest! {
    #[test]
    fn compiled_policies_mean_what_they_say(specs in policies(), split in 0usize..4) {
        let named = |(i, spec): (usize, Value)| policy(&format!("p{i}"), if i < split { "a" } else { "b" }, spec);
        let world = World {
            policies: specs.into_iter().enumerate().map(named).collect(),
            pods: vec![
                pod("a", "x", "10.0.0.1", NODE, 80), pod("a", "y", "10.0.0.2", NODE, 81), pod("b", "x", "10.0.0.3", NODE, 80),
                pod("b", "y", "10.0.0.4", "n2", 80), pod("b", "z", "10.0.0.5", "n2", 81),
            ],
            namespaces: namespaces(),
        };
        let compiled = world.compiled();
        // Five pods, and two addresses outside of the cluster.
        let everybody: Vec<IpAddr> = [1, 2, 3, 4, 5, 7, 99].map(|last| IpAddr::from([10, 0, 0, last])).to_vec();
        for direction in [Direction::Ingress, Direction::Egress] {
            for (source, destination) in everybody.iter().flat_map(|s| everybody.iter().map(move |d| (*s, *d))) {
                for (protocol, port) in [("tcp", 80), ("tcp", 81), ("tcp", 82), ("udp", 80), ("udp", 9)] {
                    prop_assert_eq!(
                        compiled.allows(direction, source, destination, protocol, port),
                        world.allows(direction, source, destination, protocol, port),
                        "{:?} {} {} {} {}", direction, source, destination, protocol, port
                    );
                }
            }
        }
    }
}
