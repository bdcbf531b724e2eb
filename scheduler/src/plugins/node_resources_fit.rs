//! NodeResourcesFit: what the pod requests must be free on the node; the score prefers nodes with much left
//! (LeastAllocated), little left (MostAllocated) or by a given shape (RequestedToCapacityRatio).

use std::borrow::Cow;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Value, json};

use super::dynamic_resources::{Offered, Selectors};
use super::{BadArguments, arguments};
use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::config::Faults;
use crate::framework::{
    EventSet, MAX_NODE_SCORE, Plugin, Points, PreFilter, PreScore, Refusal, State, Verdict, state_of,
};
use apimachinery::status::FieldError;

pub struct NodeResourcesFit {
    ignored: Vec<String>,
    ignored_groups: Vec<String>,
    strategy: Strategy,
    resources: Vec<Resource>,
    selectors: Selectors,
}

/// A resource that counts in a score.
#[derive(Clone, Debug, Deserialize)]
pub struct Resource {
    pub name: String,
    /// 1 stands for none.
    #[serde(default = "one", deserialize_with = "weight")]
    pub weight: i64,
}

fn one() -> i64 {
    1
}

fn weight<'de, D: serde::Deserializer<'de>>(from: D) -> Result<i64, D::Error> {
    i64::deserialize(from).map(|weight| if weight == 0 { 1 } else { weight })
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

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Ratio {
    shape: Vec<ShapePoint>,
}

#[derive(Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ShapePoint {
    utilization: i64,
    score: i64,
}

impl NodeResourcesFit {
    /// With the arguments of a profile.
    pub fn new(value: Option<&Value>) -> Result<NodeResourcesFit, BadArguments> {
        let arguments: Arguments = arguments(value)?;
        let mut faults = Faults::default();
        let mut resources = default_resources();
        let mut strategy = Strategy::LeastAllocated;
        for (at, name) in arguments.ignored_resources.iter().enumerate() {
            faults.label_name(&format!("ignoredResources[{at}]"), name);
        }
        for (at, group) in arguments.ignored_resource_groups.iter().enumerate() {
            let field = format!("ignoredResourceGroups[{at}]");
            if group.contains('/') {
                faults.invalid(field.as_str(), group.as_str(), "resource group name can't contain '/'");
            }
            faults.label_name(&field, group);
        }
        if let Some(scoring) = arguments.scoring_strategy {
            const STRATEGIES: [&str; 3] = ["LeastAllocated", "MostAllocated", "RequestedToCapacityRatio"];
            let points = scoring.requested_to_capacity_ratio.map(|ratio| ratio.shape);
            strategy = match scoring.kind.as_str() {
                "LeastAllocated" => Strategy::LeastAllocated,
                "MostAllocated" => Strategy::MostAllocated,
                "RequestedToCapacityRatio" => {
                    Strategy::RequestedToCapacityRatio(shape(points.as_deref().unwrap_or(&[])))
                }
                other => {
                    faults.add(FieldError::not_supported("scoringStrategy.type", other, &STRATEGIES));
                    Strategy::LeastAllocated
                }
            };
            for (at, Resource { name, weight }) in scoring.resources.iter().enumerate() {
                if !(1..=100).contains(weight) {
                    let why = format!("resource weight of {name} not in valid range (0, 100]");
                    faults.invalid(format!("scoringStrategy.resources[{at}].weight"), *weight, &why);
                }
            }
            // It is checked whether or not it is asked for.
            if points.is_some() || matches!(strategy, Strategy::RequestedToCapacityRatio(_)) {
                check_shape(&mut faults, points.as_deref().unwrap_or(&[]));
            }
            if !scoring.resources.is_empty() {
                resources = scoring.resources;
            }
        }
        faults.check()?;
        Ok(NodeResourcesFit {
            ignored: arguments.ignored_resources,
            ignored_groups: arguments.ignored_resource_groups,
            strategy,
            resources,
            selectors: Selectors::default(),
        })
    }

    fn ignores(&self, resource: &str) -> bool {
        let group = resource.split_once('/').map_or("", |(group, _)| group);
        self.ignored.iter().any(|ignored| ignored == resource)
            || (!group.is_empty() && self.ignored_groups.iter().any(|ignored| ignored == group))
    }
}

/// As `validateFunctionShape`.
fn check_shape(faults: &mut Faults, points: &[ShapePoint]) {
    if points.is_empty() {
        faults.add(FieldError::required("scoringStrategy.shape", "at least one point must be specified"));
    }
    let field = |at: usize, name: &str| format!("scoringStrategy.shape[{at}].{name}");
    if let Some(at) = (1..points.len()).find(|at| points[at - 1].utilization >= points[*at].utilization) {
        let why = "values must be sorted in increasing order";
        faults.invalid(field(at, "utilization"), points[at].utilization, why);
    }
    for (at, point) in points.iter().enumerate() {
        for (name, value, most) in [("utilization", point.utilization, 100), ("score", point.score, 10)] {
            if !(0..=most).contains(&value) {
                faults.invalid(field(at, name), value, &format!("not in valid range [0, {most}]"));
            }
        }
    }
}

/// Utilization and points of a shape that holds.
fn shape(points: &[ShapePoint]) -> Vec<(i64, i64)> {
    points.iter().map(|point| (point.utilization, point.score * MAX_NODE_SCORE / 10)).collect()
}

/// The request (pod included) and the capacity of a node for one resource; `None` if it does not count there.
/// CPU and memory are those of containers with defaults for what they leave out, unless `as_requested`. Where the node has
/// nothing of an extended resource, the devices that are `offered` stand for it. As `calculateResourceAllocatableRequest`.
pub fn requested_and_allocatable(
    pod: &PendingPod,
    snapshot: &Snapshot,
    node: NodeId,
    resource: &str,
    as_requested: bool,
    offered: &Offered,
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
            let (allocatable, taken) = match nodes.allocatable.extended(node, resource) {
                0 => offered.on(snapshot, node, resource)?,
                has => (has, nodes.requested.extended(node, resource)),
            };
            (taken + wanted, allocatable)
        }
    };
    (allocatable != 0).then_some((requested, allocatable))
}

/// The extended resources that a pod asks for, how much of them, and whether devices may stand for them.
type Extended = Vec<(Arc<str>, i64, bool)>;

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
        Points::PRE_FILTER.and(Points::FILTER).and(Points::PRE_SCORE).and(Points::SCORE)
    }

    fn events(&self) -> EventSet {
        EventSet::NODE_ADD
            .and(EventSet::NODE_ALLOCATABLE)
            .and(EventSet::POD_REMOVED)
            .and(EventSet::DEVICE_CLASS)
            .and(EventSet::OWN_REQUESTS)
    }

    /// The extended resources that count.
    fn pre_filter(&self, pod: &PendingPod, snapshot: &Snapshot) -> PreFilter {
        let extended = pod.facts.requests.extended.iter().filter(|(name, amount)| *amount > 0 && !self.ignores(name));
        let delegable = |name: &str| snapshot.claims.class_for(name).is_some();
        let extended = extended.map(|(name, amount)| (name.clone(), *amount, delegable(name)));
        PreFilter::Proceed(Box::new(extended.collect::<Extended>()))
    }

    /// As `fitsRequest`.
    fn filter(&self, state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> Verdict {
        let extended: &Extended = state_of(state);
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
        for ((name, wanted, delegable), reason) in extended.iter().zip(FIRST_EXTENDED_REASON..) {
            let has = nodes.allocatable.extended(node, name);
            // DynamicResources looks for devices in its place. As `shouldDelegateResourceToDRA`.
            if has > 0 || !delegable {
                need(*wanted, has, nodes.requested.extended(node, name), reason);
            }
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
                let extended: &Extended = state_of(state);
                let name =
                    extended.get((number - FIRST_EXTENDED_REASON) as usize).map_or("resources", |(name, ..)| name);
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
        let extended = state.downcast_ref::<Extended>().into_iter().flatten();
        for (name, wanted, _) in extended {
            numbers[&**name] = of(*wanted, has.extended(node, name), used.extended(node, name));
        }
        numbers
    }

    fn pre_score(&self, pod: &PendingPod, snapshot: &Snapshot, _feasible: &[NodeId]) -> PreScore {
        let resources = self.resources.iter().map(|resource| resource.name.as_str());
        PreScore::Proceed(Box::new(Offered::to(pod, snapshot, resources, &self.selectors)))
    }

    fn score(&self, state: &State, pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> i64 {
        let offered: &Offered = state_of(state);
        let (mut total, mut weights) = (0, 0);
        for resource in &self.resources {
            let amounts = requested_and_allocatable(pod, snapshot, node, &resource.name, false, offered);
            let Some((requested, allocatable)) = amounts else { continue };
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
            let state: State = Box::<Extended>::default();
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

    #[test]
    fn devices_count_where_they_stand_for_a_resource() {
        let mut snapshot = cluster(["n1", "n2", "n3"].map(|name| node(name).allocatable("4", "10000", 10).build()));
        let class = json!({"metadata": {"name": "gpu"}, "spec": {"extendedResourceName": "example.com/gpu",
            "selectors": [{"cel": {"expression": "device.driver == 'gpu.io'"}}]}});
        snapshot.claims.set_class("gpu", Some(serde_json::from_value(class).expect("a class")));
        let mut slice = |name: &str, driver: &str, place: Value, count: usize| {
            let devices: Vec<Value> = (0..count).map(|at| json!({"name": format!("d{at}")})).collect();
            let mut spec = json!({"driver": driver, "devices": devices,
                "pool": {"name": name, "generation": 1, "resourceSliceCount": 1}});
            spec.as_object_mut().expect("a map").extend(place.as_object().expect("a map").clone());
            let slice = json!({"metadata": {"name": name}, "spec": spec});
            snapshot.claims.slices.insert(name.into(), serde_json::from_value(slice).expect("a slice"));
        };
        slice("on-n1", "gpu.io", json!({"nodeName": "n1"}), 4);
        slice(
            "on-n2",
            "gpu.io",
            json!({"nodeSelector": {"nodeSelectorTerms": [{"matchFields": [
            {"key": "metadata.name", "operator": "In", "values": ["n2"]}]}]}}),
            2,
        );
        slice("others", "other.io", json!({"allNodes": true}), 8);
        let taken = json!({"metadata": {"name": "c"}, "spec": {}, "status": {"allocation": {"devices": {"results": [
            {"request": "r", "driver": "gpu.io", "pool": "on-n1", "device": "d0"}]}}}});
        snapshot.claims.claims.insert("default/c".into(), serde_json::from_value(taken).expect("a claim"));
        let wants = pod("p").requests(&[("example.com/gpu", "1")]).build();
        let by_gpu = |kind: &str| {
            let resources = json!([{"name": "example.com/gpu", "weight": 1}]);
            scores(&plugin(json!({"scoringStrategy": {"type": kind, "resources": resources}})), &wants, &snapshot)
        };
        assert_eq!(by_gpu("LeastAllocated"), [50, 50, 0]);
        assert_eq!(by_gpu("MostAllocated"), [50, 50, 0]);
        let two = pod("p").requests(&[("example.com/gpu", "2")]).build();
        let most = json!({"scoringStrategy": {"type": "MostAllocated", "resources": [{"name": "example.com/gpu", "weight": 1}]}});
        assert_eq!(scores(&plugin(most), &two, &snapshot), [75, 100, 0]);
    }
}
