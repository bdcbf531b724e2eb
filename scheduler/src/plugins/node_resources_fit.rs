//! NodeResourcesFit: what the pod requests must be free on the node; the score prefers nodes with much left
//! (LeastAllocated), little left (MostAllocated) or by a given shape (RequestedToCapacityRatio).

use std::borrow::Cow;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use super::arguments;
use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::framework::{EventSet, MAX_NODE_SCORE, Plugin, Points, PreFilter, Refusal, State, Verdict, state_of};

pub struct NodeResourcesFit {
    ignored: Vec<String>,
    ignored_groups: Vec<String>,
    strategy: Strategy,
    resources: Vec<Resource>,
}

/// A resource that counts in a score.
#[derive(Clone, Debug, Deserialize)]
pub struct Resource {
    pub name: String,
    #[serde(default = "one")]
    pub weight: i64,
}

fn one() -> i64 {
    1
}

/// CPU and memory with equal weight.
pub fn default_resources() -> Vec<Resource> {
    ["cpu", "memory"].map(|name| Resource { name: name.to_owned(), weight: 1 }).into()
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Strategy {
    LeastAllocated,
    MostAllocated,
    /// Utilisation in percent and the score (0 to [`MAX_NODE_SCORE`]) there; rising.
    RequestedToCapacityRatio(Vec<(i64, i64)>),
}

/// `NodeResourcesFitArgs`.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default, deny_unknown_fields)]
struct Arguments {
    ignored_resources: Vec<String>,
    ignored_resource_groups: Vec<String>,
    scoring_strategy: Option<ScoringStrategy>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct ScoringStrategy {
    #[serde(rename = "type", default)]
    kind: String,
    #[serde(default)]
    resources: Vec<Resource>,
    requested_to_capacity_ratio: Option<Ratio>,
}

#[derive(Deserialize)]
struct Ratio {
    shape: Vec<ShapePoint>,
}

#[derive(Deserialize)]
struct ShapePoint {
    utilization: i64,
    score: i64,
}

impl NodeResourcesFit {
    /// With the arguments of a profile.
    pub fn new(value: Option<&Value>) -> Result<NodeResourcesFit, String> {
        let arguments: Arguments = arguments(value)?;
        let mut resources = default_resources();
        let mut strategy = Strategy::LeastAllocated;
        if let Some(scoring) = arguments.scoring_strategy {
            strategy = match scoring.kind.as_str() {
                "LeastAllocated" | "MostAllocated" if scoring.requested_to_capacity_ratio.is_some() => {
                    let cause = "must be nil when type is not RequestedToCapacityRatio";
                    return Err(format!("scoringStrategy.requestedToCapacityRatio: Forbidden: {cause}"));
                }
                "LeastAllocated" => Strategy::LeastAllocated,
                "MostAllocated" => Strategy::MostAllocated,
                "RequestedToCapacityRatio" => {
                    Strategy::RequestedToCapacityRatio(shape(scoring.requested_to_capacity_ratio)?)
                }
                other => return Err(format!("scoringStrategy.type: Unsupported value: {other:?}")),
            };
            if !scoring.resources.is_empty() {
                resources = scoring.resources;
            }
        }
        if let Some(group) = arguments.ignored_resource_groups.iter().find(|group| group.contains('/')) {
            return Err(format!("ignoredResourceGroups: {group:?}: resource group name can't contain '/'"));
        }
        if let Some(resource) = resources.iter().find(|resource| !(1..=100).contains(&resource.weight)) {
            return Err(format!("scoringStrategy.resources: weight of {} not in valid range [1-100]", resource.name));
        }
        Ok(NodeResourcesFit {
            ignored: arguments.ignored_resources,
            ignored_groups: arguments.ignored_resource_groups,
            strategy,
            resources,
        })
    }

    fn ignores(&self, resource: &str) -> bool {
        let group = resource.split_once('/').map_or("", |(group, _)| group);
        self.ignored.iter().any(|ignored| ignored == resource)
            || (!group.is_empty() && self.ignored_groups.iter().any(|ignored| ignored == group))
    }
}

fn shape(ratio: Option<Ratio>) -> Result<Vec<(i64, i64)>, String> {
    let points = ratio.map(|ratio| ratio.shape).unwrap_or_default();
    let rising = points.windows(2).all(|pair| pair[0].utilization < pair[1].utilization);
    let in_range = |point: &ShapePoint| (0..=100).contains(&point.utilization) && (0..=10).contains(&point.score);
    if points.is_empty() || !rising || !points.iter().all(in_range) {
        return Err(
            "requestedToCapacityRatio.shape: needs points of rising utilization in [0-100] and score in [0-10]".into(),
        );
    }
    Ok(points.iter().map(|point| (point.utilization, point.score * MAX_NODE_SCORE / 10)).collect())
}

/// The request (pod included) and the capacity of a node for one resource; `None` if it does not count there.
/// CPU and memory are those of containers with defaults for what they leave out, unless `as_requested`.
pub fn requested_and_allocatable(
    pod: &PendingPod,
    snapshot: &Snapshot,
    node: NodeId,
    resource: &str,
    as_requested: bool,
) -> Option<(i64, i64)> {
    let nodes = &snapshot.nodes;
    let index = node.index();
    let requests = &pod.facts.requests;
    let (requested, allocatable) = match resource {
        "cpu" if as_requested => {
            (nodes.requested.cpu_milli[index] + requests.cpu_milli, nodes.allocatable.cpu_milli[index])
        }
        "cpu" => (nodes.nonzero_cpu_milli[index] + requests.nonzero_cpu_milli, nodes.allocatable.cpu_milli[index]),
        "memory" if as_requested => (nodes.requested.memory[index] + requests.memory, nodes.allocatable.memory[index]),
        "memory" => (nodes.nonzero_memory[index] + requests.nonzero_memory, nodes.allocatable.memory[index]),
        "ephemeral-storage" => (
            nodes.requested.ephemeral_storage[index] + requests.ephemeral_storage,
            nodes.allocatable.ephemeral_storage[index],
        ),
        _ => {
            // A resource that the pod does not ask for says nothing about where it should go.
            let (_, wanted) = requests.extended.iter().find(|(name, _)| &**name == resource)?;
            (nodes.requested.extended(node, resource) + wanted, nodes.allocatable.extended(node, resource))
        }
    };
    (allocatable != 0).then_some((requested, allocatable))
}

const PODS_REASON: u32 = 0;
const CPU_REASON: u32 = 1;
const MEMORY_REASON: u32 = 2;
const EPHEMERAL_STORAGE_REASON: u32 = 3;
const FIRST_EXTENDED_REASON: u32 = 4;
const LAST_REASON: u32 = 63;

impl Plugin for NodeResourcesFit {
    fn name(&self) -> &'static str {
        "NodeResourcesFit"
    }

    fn points(&self) -> Points {
        Points::PRE_FILTER.and(Points::FILTER).and(Points::SCORE)
    }

    fn events(&self) -> EventSet {
        EventSet::NODE_ADD.and(EventSet::NODE_ALLOCATABLE).and(EventSet::POD_REMOVED)
    }

    /// The extended resources that count.
    fn pre_filter(&self, pod: &PendingPod, _snapshot: &Snapshot) -> PreFilter {
        let extended = pod.facts.requests.extended.iter().filter(|(name, amount)| *amount > 0 && !self.ignores(name));
        PreFilter::Proceed(Box::new(extended.cloned().collect::<Vec<(Arc<str>, i64)>>()))
    }

    /// As `fitsRequest`.
    fn filter(&self, state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        let extended: &Vec<(Arc<str>, i64)> = state_of(state);
        let (nodes, index) = (&snapshot.nodes, node.index());
        let requests = &pod.facts.requests;
        let mut refusal = Refusal { reasons: 0, resolvable: true };
        let mut need = |wanted: i64, allocatable: i64, taken: i64, reason: u32| {
            if wanted > 0 && wanted > allocatable - taken {
                refusal.reasons |= 1 << reason.min(LAST_REASON);
                refusal.resolvable &= wanted <= allocatable;
            }
        };
        need(requests.cpu_milli, nodes.allocatable.cpu_milli[index], nodes.requested.cpu_milli[index], CPU_REASON);
        need(requests.memory, nodes.allocatable.memory[index], nodes.requested.memory[index], MEMORY_REASON);
        need(
            requests.ephemeral_storage,
            nodes.allocatable.ephemeral_storage[index],
            nodes.requested.ephemeral_storage[index],
            EPHEMERAL_STORAGE_REASON,
        );
        for ((name, wanted), reason) in extended.iter().zip(FIRST_EXTENDED_REASON..) {
            need(*wanted, nodes.allocatable.extended(node, name), nodes.requested.extended(node, name), reason);
        }
        if nodes.requested.pods[index] + 1 > nodes.allocatable.pods[index] {
            refusal.reasons |= 1 << PODS_REASON;
        }
        if refusal.reasons == 0 { Verdict::Accept } else { Verdict::Refuse(refusal) }
    }

    fn reason(&self, state: &State, number: u32) -> Cow<'static, str> {
        match number {
            PODS_REASON => Cow::Borrowed("Too many pods"),
            CPU_REASON => Cow::Borrowed("Insufficient cpu"),
            MEMORY_REASON => Cow::Borrowed("Insufficient memory"),
            EPHEMERAL_STORAGE_REASON => Cow::Borrowed("Insufficient ephemeral-storage"),
            _ => {
                let extended: &Vec<(Arc<str>, i64)> = state_of(state);
                let name =
                    extended.get((number - FIRST_EXTENDED_REASON) as usize).map_or("resources", |(name, _)| name);
                Cow::Owned(format!("Insufficient {name}"))
            }
        }
    }

    fn numbers(&self, state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Value {
        let (nodes, index, requests) = (&snapshot.nodes, node.index(), &pod.facts.requests);
        let (has, used) = (&nodes.allocatable, &nodes.requested);
        let of = |wanted: i64, has: i64, used: i64| json!({"requested": wanted, "allocatable": has, "used": used});
        let mut numbers = json!({
            "cpuMilli": of(requests.cpu_milli, has.cpu_milli[index], used.cpu_milli[index]),
            "memory": of(requests.memory, has.memory[index], used.memory[index]),
            "ephemeralStorage":
                of(requests.ephemeral_storage, has.ephemeral_storage[index], used.ephemeral_storage[index]),
            "pods": of(1, has.pods[index], used.pods[index]),
        });
        let extended = state.downcast_ref::<Vec<(Arc<str>, i64)>>().into_iter().flatten();
        for (name, wanted) in extended {
            numbers[&**name] = of(*wanted, has.extended(node, name), used.extended(node, name));
        }
        numbers
    }

    fn score(&self, _state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> i64 {
        let (mut total, mut weights) = (0, 0);
        for resource in &self.resources {
            let Some((requested, allocatable)) = requested_and_allocatable(pod, snapshot, node, &resource.name, false)
            else {
                continue;
            };
            let score = match &self.strategy {
                Strategy::LeastAllocated if requested > allocatable => 0,
                Strategy::LeastAllocated => (allocatable - requested) * MAX_NODE_SCORE / allocatable,
                Strategy::MostAllocated => requested.min(allocatable) * MAX_NODE_SCORE / allocatable,
                Strategy::RequestedToCapacityRatio(shape) => {
                    let score = interpolate(shape, (requested.min(allocatable)) * 100 / allocatable);
                    if score == 0 {
                        continue;
                    }
                    score
                }
            };
            total += score * resource.weight;
            weights += resource.weight;
        }
        if weights == 0 { 0 } else { total / weights }
    }
}

/// The score at a utilisation, linear between the points. As `buildBrokenLinearFunction`.
fn interpolate(shape: &[(i64, i64)], utilization: i64) -> i64 {
    let Some(next) = shape.iter().position(|(at, _)| utilization <= *at) else {
        return shape.last().map_or(0, |(_, score)| *score);
    };
    if next == 0 {
        return shape[0].1;
    }
    let ((from, low), (to, high)) = (shape[next - 1], shape[next]);
    low + (high - low) * (utilization - from) / (to - from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{accepts, cluster, explain, node, placed, pod, scores};

    fn plugin(arguments: Value) -> NodeResourcesFit {
        NodeResourcesFit::new(Some(&arguments)).expect("arguments")
    }

    fn snapshot() -> Snapshot {
        let mut snapshot = cluster([
            node("n1").allocatable("2", "4Gi", 2).build(),
            node("n2").allocatable("4", "8Gi", 10).resource("example.com/gpu", "1").build(),
        ]);
        placed(&mut snapshot, pod("one").requests(&[("cpu", "1500m"), ("memory", "1Gi")]).on("n1").build());
        snapshot
    }

    #[test]
    fn what_does_not_fit_is_refused_with_every_reason() {
        let cases: [(&[(&str, &str)], [bool; 2], &[&str]); 7] = [
            (&[], [true, true], &[]),
            (&[("cpu", "500m")], [true, true], &[]),
            (&[("cpu", "501m")], [false, true], &["Insufficient cpu"]),
            (&[("cpu", "1"), ("memory", "4Gi")], [false, true], &["Insufficient cpu", "Insufficient memory"]),
            (&[("cpu", "5")], [false, false], &["Insufficient cpu"]),
            (&[("example.com/gpu", "1")], [false, true], &["Insufficient example.com/gpu"]),
            (&[("ephemeral-storage", "1Gi")], [false, false], &["Insufficient ephemeral-storage"]),
        ];
        for (requests, expected, reasons) in cases {
            let pod = pod("p").requests(requests).build();
            assert_eq!(accepts(&plugin(json!({})), &pod, &snapshot()), expected, "{requests:?}");
            assert_eq!(explain(&plugin(json!({})), &pod, &snapshot(), "n1"), reasons, "{requests:?}");
        }
    }

    #[test]
    fn a_node_takes_as_many_pods_as_it_says() {
        let mut snapshot = snapshot();
        placed(&mut snapshot, pod("two").on("n1").build());
        let pod = pod("p").requests(&[("cpu", "1")]).build();
        assert_eq!(explain(&plugin(json!({})), &pod, &snapshot, "n1"), ["Too many pods", "Insufficient cpu"]);
        let bare = cluster([node("bare").allocatable("1", "1Gi", 0).build()]);
        assert_eq!(accepts(&plugin(json!({})), &pod, &bare), [false]);
    }

    #[test]
    fn preemption_helps_only_where_the_node_is_large_enough() {
        let snapshot = snapshot();
        let verdict = |cpu: &str| {
            let pod = crate::testing::pending(pod("p").requests(&[("cpu", cpu)]).build());
            let state: State = Box::<Vec<(Arc<str>, i64)>>::default();
            plugin(json!({})).filter(&state, &pod, &snapshot, NodeId(0))
        };
        assert_eq!(verdict("2"), Verdict::unschedulable(1 << CPU_REASON));
        assert_eq!(verdict("3"), Verdict::unresolvable(1 << CPU_REASON));
    }

    #[test]
    fn ignored_resources_are_not_asked_for() {
        let pod = pod("p").requests(&[("example.com/gpu", "1")]).build();
        assert_eq!(
            accepts(&plugin(json!({"ignoredResourceGroups": ["example.com"]})), &pod, &snapshot()),
            [true, true]
        );
    }

    #[test]
    fn strategies_prefer_more_or_less_used_nodes() {
        let mut snapshot = cluster([
            node("n1").allocatable("4", "10000", 10).build(),
            node("n2").allocatable("6", "10000", 10).build(),
        ]);
        placed(&mut snapshot, pod("one").requests(&[("cpu", "0"), ("memory", "0")]).on("n1").build());
        // As in the upstream table "nothing scheduled, resources requested, differently sized nodes".
        let wants = pod("p").requests(&[("cpu", "3"), ("memory", "5000")]).build();
        assert_eq!(scores(&plugin(json!({})), &wants, &snapshot), [37, 50]);
        assert_eq!(scores(&plugin(json!({"scoringStrategy": {"type": "MostAllocated"}})), &wants, &snapshot), [62, 50]);
        let ratio = json!({"scoringStrategy": {
            "type": "RequestedToCapacityRatio",
            "requestedToCapacityRatio": {"shape": [{"utilization": 0, "score": 0}, {"utilization": 100, "score": 10}]}
        }});
        assert_eq!(scores(&plugin(ratio), &wants, &snapshot), [62, 50]);
    }
}
