//! A scheduler so simple that it is plainly right, to hold the real one against: it reads whole objects, recounts everything
//! for every pod, and knows no columns, caches or sampling.

use std::collections::{BTreeMap, BTreeSet};

use apimachinery::labels::Selector;
use apimachinery::quantity::Quantity;
use k8s_openapi::api::core::v1::{Node, Pod, Toleration};
use proptest::prelude::*;

use crate::cache::Snapshot;
use crate::decide::{Scratch, decide, feasible_nodes, plugin_scores};
use crate::framework::{Nomination, Profile};
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

fn node_of(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()).unwrap_or_default()
}

fn has_label(pod: &Pod, app: &str) -> bool {
    pod.metadata.labels.as_ref().and_then(|labels| labels.get("app")).is_some_and(|value| value == app)
}

/// The required terms of a kind: topology key and `app`.
fn affinity_terms(pod: &Pod, kind: &str) -> Vec<(String, String)> {
    let affinity = serde_json::to_value(pod.spec.as_ref().and_then(|spec| spec.affinity.clone())).expect("affinity");
    let terms =
        affinity[kind]["requiredDuringSchedulingIgnoredDuringExecution"].as_array().cloned().unwrap_or_default();
    let text = |value: &serde_json::Value| value.as_str().expect("text").to_owned();
    terms.iter().map(|term| (text(&term["topologyKey"]), text(&term["labelSelector"]["matchLabels"]["app"]))).collect()
}

/// The normalised scores of the nodes, of the plugins that are simple enough to be said again.
fn scores(
    pod: &Pod,
    names: &[String],
    nodes: &BTreeMap<String, Node>,
    placed: &BTreeMap<String, Pod>,
) -> BTreeMap<&'static str, Vec<i64>> {
    let on = |name: &str| placed.values().filter(|p| node_of(p) == name).collect::<Vec<_>>();
    let of = |name: &str, resource: &str| {
        let allocatable = nodes[name].status.as_ref().and_then(|status| status.allocatable.as_ref());
        let taken: i64 = on(name).iter().map(|p| requested(p, resource)).sum();
        (taken, amount(allocatable, resource))
    };
    let fit = |name: &String| {
        let free = ["cpu", "memory"].map(|resource| {
            let (taken, has) = of(name, resource);
            (has - (taken + requested(pod, resource)).min(has)) * 100 / has
        });
        free.iter().sum::<i64>() / 2
    };
    let balance = |name: &String, with: bool| {
        let [one, other] = ["cpu", "memory"].map(|resource| {
            let (taken, has) = of(name, resource);
            ((taken + if with { requested(pod, resource) } else { 0 }) as f64 / has as f64).min(1.0)
        });
        ((1.0 - ((one - other) / 2.0).abs()) * 100.0) as i64
    };
    let soft = |name: &String| {
        let spec = pod.spec.as_ref().expect("spec");
        let taints = nodes[name].spec.iter().flat_map(|spec| spec.taints.iter().flatten());
        let soft = taints.filter(|taint| taint.effect == "PreferNoSchedule");
        let tolerations = spec.tolerations.clone().unwrap_or_default();
        soft.filter(|t| !tolerated(&tolerations, &t.key, t.value.as_deref().unwrap_or_default(), &t.effect)).count()
            as i64
    };
    let worst = names.iter().map(soft).max().unwrap_or(0);
    BTreeMap::from([
        ("NodeResourcesFit", names.iter().map(fit).collect()),
        (
            "NodeResourcesBalancedAllocation",
            names.iter().map(|name| 50 + (50 + balance(name, true) - balance(name, false)) / 2).collect(),
        ),
        (
            "TaintToleration",
            names.iter().map(|name| if worst == 0 { 100 } else { 100 - 100 * soft(name) / worst }).collect(),
        ),
    ])
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
        let label = |name: &str, key: &str| nodes.get(name).and_then(|n| n.metadata.labels.as_ref()?.get(key)).cloned();
        let company_ok = {
            let anti = |pod: &Pod| affinity_terms(pod, "podAntiAffinity");
            let same = |key: &str, other: &str| label(name, key).is_some() && label(name, key) == label(other, key);
            let shuns = |one: &Pod, other: &Pod, other_node: &str| {
                anti(one).iter().any(|(key, app)| has_label(other, app) && same(key, other_node))
            };
            let near = affinity_terms(pod, "podAffinity");
            let any = |key: &str, app: &str, here: bool| {
                let alike = |p: &&Pod| {
                    has_label(p, app) && label(node_of(p), key).is_some() && (!here || same(key, node_of(p)))
                };
                placed.values().filter(alike).count() > 0
            };
            placed.values().all(|p| !shuns(p, pod, node_of(p)) && !shuns(pod, p, node_of(p)))
                && near.iter().all(|(key, app)| {
                    label(name, key).is_some()
                        && (any(key, app, true) || (has_label(pod, app) && !any(key, app, false)))
                })
        };
        if company_ok && usable(node) && taints_ok && cordon_ok && resources_ok && room && ports_ok && spread_ok {
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
    (0..20_u8, 1..3000_u32, 1..2048_u32, 0..3_i32, 0..6_u8, any::<[bool; 6]>()).prop_map(
        |(number, cpu, memory, priority, company, [tolerant, gpu, port, choosy, spread, web])| {
            let mut builder: PodBuilder = pod(&format!("p{number}")).priority(priority);
            let kind = match company {
                0 => Some("podAffinity"),
                1 | 2 => Some("podAntiAffinity"),
                _ => None,
            };
            if let Some(kind) = kind {
                builder = builder
                    .spec(serde_json::json!({"affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": [
                    {"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "web"}}}]}}}));
            }
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

/// If a node is nominated the pod fits there without the victims, who are all less important; if not, no node would fit
/// without all of its less important pods.
fn check_preemption(
    pod: &Pod,
    nomination: &Nomination,
    nodes: &BTreeMap<String, Node>,
    placed: &BTreeMap<String, Pod>,
) -> Result<(), TestCaseError> {
    let priority = |pod: &Pod| pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0);
    let without = |gone: &dyn Fn(&Pod) -> bool| -> BTreeMap<String, Pod> {
        placed.iter().filter(|(_, p)| !gone(p)).map(|(name, p)| (name.clone(), p.clone())).collect()
    };
    if let Nomination::To { node, victims } = nomination {
        let is_victim = |p: &Pod| victims.iter().any(|uid| p.metadata.uid.as_deref() == Some(&**uid));
        prop_assert!(
            placed.values().filter(|p| is_victim(p)).all(|p| priority(p) < priority(pod) && node_of(p) == &**node)
        );
        prop_assert!(
            feasible(pod, nodes, &without(&is_victim)).contains(&**node),
            "the pod fits where the victims were"
        );
        return Ok(());
    }
    for name in nodes.keys() {
        let lower = |p: &Pod| priority(p) < priority(pod) && node_of(p) == name;
        if placed.values().any(lower) {
            prop_assert!(!feasible(pod, nodes, &without(&lower)).contains(name), "{} could have been made free", name);
        }
    }
    Ok(())
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
                    let names: Vec<String> = found.iter().cloned().collect();
                    let ids: Vec<_> = names.iter().map(|name| snapshot.nodes.find(name).expect("a node")).collect();
                    let expected = scores(&pod, &names, &all_nodes, &all_pods);
                    let mut told = BTreeMap::new();
                    plugin_scores(&profile, &snapshot, &waiting, &ids, &mut |place, _, scores| {
                        told.insert(profile.plugin(place).name(), scores.to_vec());
                    });
                    for (plugin, scores) in expected {
                        prop_assert_eq!(told.get(plugin), Some(&scores), "{}", plugin);
                    }
                    match decide(&profile, &mut snapshot, &waiting, &mut scratch, &mut rng) {
                        Ok(decision) => {
                            let chosen = snapshot.nodes.name[decision.node.index()].to_string();
                            prop_assert!(found.contains(&chosen));
                            pod.spec.as_mut().expect("spec").node_name = Some(chosen);
                            placed(&mut snapshot, pod.clone());
                            all_pods.insert(name, pod);
                        }
                        Err(error) => {
                            prop_assert!(found.is_empty());
                            check_preemption(&pod, &error.nomination, &all_nodes, &all_pods)?;
                        }
                    }
                }
            }
        }
    }
}
