//! Builders and short cuts for tests.

use k8s_openapi::api::core::v1::{Node, Pod};
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Value, json};

use crate::cache::{NodeId, PendingPod, PodFacts, Snapshot};
use crate::framework::{Plugin, Points, PreFilter, PreScore, State, Verdict};

/// A pod under construction.
#[derive(Clone)]
pub(crate) struct PodBuilder(Value);

/// A pod in `default`, with one container.
pub(crate) fn pod(name: &str) -> PodBuilder {
    PodBuilder(json!({
        "metadata": {"name": name, "namespace": "default", "uid": format!("uid-{name}")},
        "spec": {"containers": [{"name": "c", "image": "image"}]}
    }))
}

impl PodBuilder {
    fn container(&mut self) -> &mut Value {
        &mut self.0["spec"]["containers"][0]
    }

    pub(crate) fn requests(mut self, requests: &[(&str, &str)]) -> Self {
        for (resource, amount) in requests {
            self.container()["resources"]["requests"][*resource] = json!(amount);
        }
        self
    }

    pub(crate) fn host_port(mut self, port: u16) -> Self {
        self.container()["ports"] = json!([{"containerPort": port, "hostPort": port, "protocol": "TCP"}]);
        self
    }

    pub(crate) fn image(mut self, image: &str) -> Self {
        self.container()["image"] = json!(image);
        self
    }

    pub(crate) fn label(mut self, key: &str, value: &str) -> Self {
        self.0["metadata"]["labels"][key] = json!(value);
        self
    }

    pub(crate) fn namespace(mut self, namespace: &str) -> Self {
        self.0["metadata"]["namespace"] = json!(namespace);
        self
    }

    pub(crate) fn terminating(mut self) -> Self {
        self.0["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
        self
    }

    pub(crate) fn priority(mut self, priority: i32) -> Self {
        self.0["spec"]["priority"] = json!(priority);
        self
    }

    pub(crate) fn on(mut self, node: &str) -> Self {
        self.0["spec"]["nodeName"] = json!(node);
        self
    }

    pub(crate) fn claim(mut self, claim: &str) -> Self {
        let volume = json!({"name": claim, "persistentVolumeClaim": {"claimName": claim}});
        push(&mut self.0["spec"]["volumes"], volume);
        self
    }

    pub(crate) fn gate(mut self, gate: &str) -> Self {
        push(&mut self.0["spec"]["schedulingGates"], json!({"name": gate}));
        self
    }

    pub(crate) fn toleration(mut self, key: &str, operator: &str, value: &str, effect: &str) -> Self {
        let toleration = json!({"key": key, "operator": operator, "value": value, "effect": effect});
        push(&mut self.0["spec"]["tolerations"], toleration);
        self
    }

    /// Sets fields of the spec.
    pub(crate) fn spec(mut self, fields: Value) -> Self {
        for (field, value) in fields.as_object().expect("an object") {
            self.0["spec"][field] = value.clone();
        }
        self
    }

    pub(crate) fn build(self) -> Pod {
        serde_json::from_value(self.0).expect("a pod")
    }
}

/// A node under construction.
#[derive(Clone)]
pub(crate) struct NodeBuilder(Value);

/// A node with 4 CPUs, 32 GiB and room for 110 pods.
pub(crate) fn node(name: &str) -> NodeBuilder {
    NodeBuilder(json!({"metadata": {"name": name}, "spec": {}, "status": {}})).allocatable("4", "32Gi", 110)
}

impl NodeBuilder {
    pub(crate) fn allocatable(mut self, cpu: &str, memory: &str, pods: u32) -> Self {
        for (resource, amount) in [("cpu", cpu), ("memory", memory), ("pods", &pods.to_string())] {
            self.0["status"]["allocatable"][resource] = json!(amount);
        }
        self
    }

    pub(crate) fn resource(mut self, resource: &str, amount: &str) -> Self {
        self.0["status"]["allocatable"][resource] = json!(amount);
        self
    }

    pub(crate) fn label(mut self, key: &str, value: &str) -> Self {
        self.0["metadata"]["labels"][key] = json!(value);
        self
    }

    pub(crate) fn taint(mut self, key: &str, value: &str, effect: &str) -> Self {
        push(&mut self.0["spec"]["taints"], json!({"key": key, "value": value, "effect": effect}));
        self
    }

    pub(crate) fn unschedulable(mut self) -> Self {
        self.0["spec"]["unschedulable"] = json!(true);
        self
    }

    pub(crate) fn image(mut self, name: &str, size: i64) -> Self {
        push(&mut self.0["status"]["images"], json!({"names": [name], "sizeBytes": size}));
        self
    }

    pub(crate) fn build(self) -> Node {
        serde_json::from_value(self.0).expect("a node")
    }
}

fn push(list: &mut Value, item: Value) {
    match list.as_array_mut() {
        Some(list) => list.push(item),
        None => *list = json!([item]),
    }
}

pub(crate) fn pending(pod: Pod) -> PendingPod {
    PendingPod::new(std::sync::Arc::new(pod))
}

pub(crate) fn cluster(nodes: impl IntoIterator<Item = Node>) -> Snapshot {
    let mut snapshot = Snapshot::default();
    for node in nodes {
        snapshot.set_node(&node);
    }
    snapshot
}

/// Makes a PersistentVolumeClaim in `default`.
pub(crate) fn claim(snapshot: &mut Snapshot, name: &str, spec: Value) {
    let object = json!({"metadata": {"name": name, "namespace": "default", "uid": name}, "spec": spec});
    let key = format!("default/{name}").into();
    snapshot.volumes.claims.insert(key, serde_json::from_value(object).expect("a claim"));
}

/// Makes a PersistentVolume.
pub(crate) fn volume(snapshot: &mut Snapshot, name: &str, spec: Value) {
    let object = json!({"metadata": {"name": name}, "spec": spec, "status": {"phase": "Available"}});
    snapshot.volumes.volumes.insert(name.into(), serde_json::from_value(object).expect("a volume"));
}

/// Makes a StorageClass.
pub(crate) fn class(snapshot: &mut Snapshot, name: &str, mut object: Value) {
    object["metadata"] = json!({"name": name});
    snapshot.volumes.classes.insert(name.into(), serde_json::from_value(object).expect("a class"));
}

/// Puts a pod on the node that it names.
pub(crate) fn placed(snapshot: &mut Snapshot, pod: Pod) {
    let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).expect("a node name");
    snapshot.set_pod(PodFacts::of(&pod), &node);
}

fn prepared(plugin: &dyn Plugin, pod: &PendingPod, snapshot: &Snapshot) -> PreFilter {
    if plugin.points().contains(Points::PRE_FILTER) {
        plugin.pre_filter(pod, snapshot)
    } else {
        PreFilter::Proceed(Box::new(()))
    }
}

fn verdict(plugin: &dyn Plugin, pod: &Pod, snapshot: &Snapshot, node: NodeId) -> (Verdict, State) {
    let pod = pending(pod.clone());
    match prepared(plugin, &pod, snapshot) {
        PreFilter::Skip => (Verdict::Accept, Box::new(())),
        PreFilter::Only(_, nodes) if !nodes.contains(&node) => (Verdict::unresolvable(1), Box::new(())),
        PreFilter::Proceed(state) | PreFilter::Only(state, _) => (plugin.filter(&state, &pod, snapshot, node), state),
        PreFilter::Refuse(_) => (Verdict::unresolvable(1), Box::new(())),
    }
}

/// Which nodes a plugin's filter accepts, in their order.
pub(crate) fn accepts(plugin: &dyn Plugin, pod: &Pod, snapshot: &Snapshot) -> Vec<bool> {
    snapshot.nodes.iter().map(|node| verdict(plugin, pod, snapshot, node).0.is_accept()).collect()
}

/// A plugin's reasons against a node.
pub(crate) fn explain(plugin: &dyn Plugin, pod: &Pod, snapshot: &Snapshot, node: &str) -> Vec<String> {
    let node = snapshot.nodes.find(node).expect("the node");
    match verdict(plugin, pod, snapshot, node) {
        (Verdict::Accept, _) => Vec::new(),
        (Verdict::Refuse(refusal), state) => (0..64)
            .filter(|number| refusal.reasons & (1 << number) != 0)
            .map(|number| plugin.reason(&state, number).into_owned())
            .collect(),
    }
}

/// A plugin's normalised scores, in the order of the nodes; zeros if it has nothing to say.
pub(crate) fn scores(plugin: &dyn Plugin, pod: &Pod, snapshot: &Snapshot) -> Vec<i64> {
    let pod = pending(pod.clone());
    let nodes: Vec<NodeId> = snapshot.nodes.iter().collect();
    let state: State = if plugin.points().contains(Points::PRE_SCORE) {
        match plugin.pre_score(&pod, snapshot, &nodes) {
            PreScore::Skip => return vec![0; nodes.len()],
            PreScore::Proceed(state) => state,
        }
    } else {
        Box::new(())
    };
    let mut scores: Vec<i64> = nodes.iter().map(|node| plugin.score(&state, &pod, snapshot, *node)).collect();
    plugin.normalize(&state, &mut scores);
    scores
}

pub(crate) fn seeded(seed: u64) -> StdRng {
    StdRng::seed_from_u64(seed)
}
