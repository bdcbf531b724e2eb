//! A scheduler so simple that it is plainly right, to hold the real one against: it reads whole objects, recounts everything
//! for every pod, and knows no columns, caches or sampling.

use std::collections::{BTreeMap, BTreeSet};

use apimachinery::labels::Selector;
use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::{Node, Pod, Toleration};
use proptest::prelude::*;

use crate::cache::Snapshot;
use crate::decide::{Scratch, decide, feasible_nodes};
use crate::framework::Profile;
use crate::testing::{NodeBuilder, PodBuilder, node, pending, placed, pod, seeded};

fn amount(map: Option<&BTreeMap<String, k8s_openapi::apimachinery::pkg::api::resource::Quantity>>, name: &str) -> i64 {
    map.and_then(|map| map.get(name)).map_or(0, |quantity| Quantity::from(quantity).milli_value())
}

fn requested(pod: &Pod, resource: &str) -> i64 {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    containers.map(|c| amount(c.resources.as_ref().and_then(|r| r.requests.as_ref()), resource)).sum()
}

fn host_ports(pod: &Pod) -> BTreeSet<i32> {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    containers.flat_map(|c| c.ports.iter().flatten().filter_map(|port| port.host_port)).collect()
}

fn tolerated(tolerations: &[Toleration], key: &str, value: &str, effect: &str) -> bool {
    tolerations.iter().any(|t| {
        let field = |field: &Option<String>| field.clone().unwrap_or_default();
        (field(&t.key).is_empty() || field(&t.key) == key)
            && (field(&t.effect).is_empty() || field(&t.effect) == effect)
            && (field(&t.operator) == "Exists" || field(&t.value) == value)
    })
}

/// The names of the nodes on which the pod can be.
fn feasible(pod: &Pod, nodes: &BTreeMap<String, Node>, placed: &BTreeMap<String, Pod>) -> BTreeSet<String> {
    let spec = pod.spec.as_ref().expect("spec");
    let on = |name: &str| {
        placed
            .values()
            .filter(move |p| p.spec.as_ref().expect("spec").node_name.as_deref() == Some(name))
            .collect::<Vec<_>>()
    };
    let usable = |node: &Node| {
        let labels = node.metadata.labels.clone().unwrap_or_default();
        spec.node_selector.iter().flatten().all(|(key, value)| labels.get(key) == Some(value))
    };
    let mut fits = BTreeSet::new();
    for (name, node) in nodes {
        let tolerations = spec.tolerations.clone().unwrap_or_default();
        let node_spec = node.spec.as_ref().expect("spec");
        let taints = node_spec.taints.iter().flatten().filter(|taint| taint.effect != "PreferNoSchedule");
        let taints_ok =
            taints.clone().all(|t| tolerated(&tolerations, &t.key, t.value.as_deref().unwrap_or_default(), &t.effect));
        let cordon_ok = node_spec.unschedulable != Some(true)
            || tolerated(&tolerations, "node.kubernetes.io/unschedulable", "", "NoSchedule");
        let allocatable = node.status.as_ref().and_then(|status| status.allocatable.as_ref());
        let resources_ok = ["cpu", "memory", "example.com/gpu"].iter().all(|resource| {
            let taken: i64 = on(name).iter().map(|p| requested(p, resource)).sum();
            requested(pod, resource) == 0 || taken + requested(pod, resource) <= amount(allocatable, resource)
        });
        let room = (on(name).len() as i64 + 1) * 1000 <= amount(allocatable, "pods");
        let ports_ok = on(name).iter().all(|p| host_ports(p).is_disjoint(&host_ports(pod)));
        let spread_ok = spec.topology_spread_constraints.iter().flatten().all(|constraint| {
            let label =
                |node: &Node| node.metadata.labels.as_ref().and_then(|l| l.get(&constraint.topology_key)).cloned();
            let Some(own) = label(node) else { return false };
            let selector =
                Selector::from_label_selector(constraint.label_selector.as_ref().expect("selector")).expect("valid");
            let alike = |p: &Pod| p.metadata.labels.as_ref().is_some_and(|labels| selector.matches(labels));
            let mut counts: BTreeMap<String, i64> = BTreeMap::new();
            for (name, other) in nodes.iter().filter(|(_, node)| usable(node)) {
                if let Some(domain) = label(other) {
                    *counts.entry(domain).or_default() += on(name).into_iter().filter(|p| alike(p)).count() as i64;
                }
            }
            let fewest = counts.values().min().copied().unwrap_or(i64::MAX);
            let after = counts.get(&own).copied().unwrap_or(0) + i64::from(alike(pod));
            after.saturating_sub(fewest) <= i64::from(constraint.max_skew)
        });
        if usable(node) && taints_ok && cordon_ok && resources_ok && room && ports_ok && spread_ok {
            fits.insert(name.clone());
        }
    }
    fits
}

/// One change of the cluster.
#[derive(Debug, Clone)]
enum Step {
    SetNode(Node),
    RemoveNode(u8),
    /// Schedules a pod, if it fits anywhere.
    Schedule(Pod),
    RemovePod(u8),
}

fn nodes() -> impl Strategy<Value = Node> {
    (0..6_u8, 1..8_u32, 1..6_u32, 0..3_usize, any::<[bool; 4]>()).prop_map(
        |(number, cpu, pods, zone, [tainted, soft, cordoned, gpu])| {
            let mut builder: NodeBuilder = node(&format!("n{number}"))
                .allocatable(&cpu.to_string(), "4Gi", pods)
                .label("disk", if gpu { "ssd" } else { "hdd" });
            if zone > 0 {
                builder = builder.label("zone", ["", "z1", "z2"][zone]);
            }
            if tainted {
                builder = builder.taint("dedicated", "db", "NoSchedule");
            }
            if soft {
                builder = builder.taint("slow", "", "PreferNoSchedule");
            }
            if cordoned && tainted {
                builder = builder.unschedulable();
            }
            if gpu {
                builder = builder.resource("example.com/gpu", "2");
            }
            builder.build()
        },
    )
}

fn pods() -> impl Strategy<Value = Pod> {
    (0..20_u8, 0..3000_u32, 0..2048_u32, any::<[bool; 6]>()).prop_map(
        |(number, cpu, memory, [tolerant, gpu, port, choosy, spread, web])| {
            let mut builder: PodBuilder = pod(&format!("p{number}"));
            builder = builder.requests(&[("cpu", &format!("{cpu}m")), ("memory", &format!("{memory}Mi"))]);
            if tolerant {
                builder = builder.toleration("dedicated", "Equal", "db", "NoSchedule").toleration("", "Exists", "", "");
            }
            if gpu {
                builder = builder.requests(&[("example.com/gpu", "1")]);
            }
            if port {
                builder = builder.host_port(8000 + u16::from(number % 3));
            }
            if choosy {
                builder = builder.spec(serde_json::json!({"nodeSelector": {"disk": "ssd"}}));
            }
            if web {
                builder = builder.label("app", "web");
            }
            if spread {
                builder = builder.spec(serde_json::json!({"topologySpreadConstraints": [{
                    "maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule",
                    "labelSelector": {"matchLabels": {"app": "web"}}}]}));
            }
            builder.build()
        },
    )
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => nodes().prop_map(Step::SetNode),
        1 => (0..6_u8).prop_map(Step::RemoveNode),
        6 => pods().prop_map(Step::Schedule),
        1 => (0..20_u8).prop_map(Step::RemovePod),
    ];
    prop::collection::vec(step, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn feasible_nodes_are_those_of_the_naive_scheduler(steps in steps()) {
        let profile = Profile::default_profile().expect("default profile");
        let (mut snapshot, mut scratch) = (Snapshot::default(), Scratch::default());
        let (mut all_nodes, mut all_pods) = (BTreeMap::<String, Node>::new(), BTreeMap::<String, Pod>::new());
        let mut rng = seeded(1);
        for step in steps {
            match step {
                Step::SetNode(node) => {
                    snapshot.set_node(&node);
                    all_nodes.insert(node.metadata.name.clone().expect("name"), node);
                }
                Step::RemoveNode(number) => {
                    let name = format!("n{number}");
                    snapshot.remove_node(&name);
                    all_nodes.remove(&name);
                }
                Step::RemovePod(number) => {
                    let name = format!("p{number}");
                    snapshot.remove_pod(&format!("uid-{name}"));
                    all_pods.remove(&name);
                }
                Step::Schedule(mut pod) => {
                    let name = pod.metadata.name.clone().expect("name");
                    if all_pods.contains_key(&name) {
                        continue;
                    }
                    let waiting = pending(pod.clone());
                    snapshot.prepare_for(&waiting);
                    let found: BTreeSet<String> = feasible_nodes(&profile, &mut snapshot, &waiting)
                        .into_iter()
                        .map(|node| snapshot.nodes.name[node.index()].to_string())
                        .collect();
                    prop_assert_eq!(&found, &feasible(&pod, &all_nodes, &all_pods));
                    match decide(&profile, &mut snapshot, &waiting, &mut scratch, &mut rng) {
                        Ok(decision) => {
                            let chosen = snapshot.nodes.name[decision.node.index()].to_string();
                            prop_assert!(found.contains(&chosen));
                            pod.spec.as_mut().expect("spec").node_name = Some(chosen);
                            placed(&mut snapshot, pod.clone());
                            all_pods.insert(name, pod);
                        }
                        Err(_) => prop_assert!(found.is_empty()),
                    }
                }
            }
        }
    }
}
