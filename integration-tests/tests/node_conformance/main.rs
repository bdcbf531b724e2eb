//! What the conformance programme asks of a node's agent (`[sig-node]`, `[sig-storage]`), on one node: most entries are a pod that
//! runs to its end and says what it saw, all of them at once; the others watch a pod change while it runs.
mod csi;
mod dra;
mod ends;
mod faults;
mod held;
mod live;
mod mounted;
mod probed;
mod seen;
mod served;
mod trusted;

use std::time::{Duration, Instant};

use integration_tests::{Cluster, Setup, can_run_hosts, eventually};
use k8s_openapi::api::core::v1::{
    ConfigMap, ContainerStatus, Namespace, PersistentVolume, PersistentVolumeClaim, Pod, Secret, Service,
};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::api::{DeleteParams, LogParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};

const MINUTES: Duration = Duration::from_secs(180);

#[tokio::test]
async fn pods_on_a_node_conform() {
    let Some((cluster, node)) = Node::start("pods_on_a_node_conform").await else { return };
    node.what_pods_see().await;
    node.what_is_mounted().await;
    node.many_volumes_at_once().await;
    node.ends_and_restarts().await;
    node.changes_are_seen().await;
    node.all_begin_anew().await;
    node.others_write_to_a_pod().await;
    node.generations_are_counted().await;
    node.what_is_served().await;
    node.probes_and_hooks().await;
    node.resources_change_in_place(&cluster).await;
    node.starts_are_quick().await;
}

#[tokio::test]
async fn a_node_gives_what_others_make() {
    let Some((cluster, node)) = Node::start("a_node_gives_what_others_make").await else { return };
    node.claims_are_volumes(&cluster).await;
    node.drivers_make_volumes_for_pods(&cluster).await;
    node.devices_are_claimed(&cluster).await;
    node.huge_pages_are_a_volume(&cluster).await;
    node.trust_is_given(&cluster).await;
}

#[tokio::test]
async fn a_node_bears_faults() {
    let Some((cluster, node)) = Node::start("a_node_bears_faults").await else { return };
    node.nodes_stand_alone(&cluster).await;
    node.a_full_disk_is_survived(&cluster).await;
    node.many_come_and_go(&cluster).await;
}

struct Node {
    client: Client,
    pods: Api<Pod>,
}

/// A pod of busybox that runs to its end: a script, what its container and its spec have besides, and what its log must hold.
struct Case {
    /// As in the conformance document.
    entry: &'static str,
    script: &'static str,
    container: Value,
    spec: Value,
    log: Vec<String>,
}

fn case(entry: &'static str, script: &'static str, container: Value, spec: Value, log: &[&str]) -> Case {
    Case { entry, script, container, spec, log: log.iter().map(|l| (*l).to_owned()).collect() }
}

fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}

fn sh(name: &str, script: &str) -> Value {
    json!({"name": name, "image": "busybox:stable", "command": ["sh", "-c", script]})
}

fn pod(name: &str, spec: Value) -> Pod {
    let mut whole = json!({"metadata": {"name": name, "labels": {"app": name}, "annotations": {"made": "by-a-test"}},
        "spec": {"terminationGracePeriodSeconds": 1, "restartPolicy": "Never"}});
    merge(&mut whole["spec"], spec);
    serde_json::from_value(whole).expect("a pod")
}

fn statuses(pod: &Pod) -> Vec<ContainerStatus> {
    pod.status.as_ref().and_then(|s| s.container_statuses.clone()).unwrap_or_default()
}

fn restarts(pod: &Pod) -> i32 {
    statuses(pod).iter().map(|s| s.restart_count).sum()
}

impl Node {
    /// A cluster of one node with what pods refer to, where hosts can be made.
    async fn start(test: &str) -> Option<(Cluster, Node)> {
        if !can_run_hosts(test) {
            return None;
        }
        let cluster = Cluster::start("node", Setup::Hosts(1)).await;
        let client = cluster.client();
        let node = Node { pods: Api::namespaced(client.clone(), "default"), client };
        node.prepare().await;
        Some((cluster, node))
    }

    async fn create<K>(&self, value: Value)
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + serde::Serialize
            + serde::de::DeserializeOwned
            + Clone
            + std::fmt::Debug,
    {
        let object: K = serde_json::from_value(value).expect("an object");
        Api::<K>::namespaced(self.client.clone(), "default")
            .create(&PostParams::default(), &object)
            .await
            .expect("made");
    }

    async fn run(&self, name: &str, spec: Value) {
        self.pods.create(&PostParams::default(), &pod(name, spec)).await.unwrap_or_else(|e| panic!("{name}: {e}"));
    }

    async fn until(&self, name: &str, what: &str, done: impl Fn(&Pod) -> bool) -> Pod {
        eventually(&format!("{name}: {what}"), MINUTES, || async {
            let pod = self.pods.get(name).await.map_err(|e| e.to_string())?;
            if done(&pod) { Ok(pod) } else { Err(format!("{:?}", pod.status)) }
        })
        .await
    }

    async fn phase(&self, name: &str, phase: &str) -> Pod {
        self.until(name, phase, |pod| apimachinery::pod::phase(pod) == phase).await
    }

    async fn ready(&self, name: &str) -> Pod {
        self.until(name, "ready", apimachinery::pod::is_ready).await
    }

    async fn log(&self, name: &str) -> String {
        self.pods.logs(name, &LogParams::default()).await.unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    async fn patch(&self, name: &str, patch: Value) {
        let patch = Patch::Strategic(patch);
        self.pods.patch(name, &PatchParams::default(), &patch).await.unwrap_or_else(|e| panic!("{name}: {e}"));
    }

    async fn remove(&self, names: &[&str]) {
        for name in names {
            self.pods.delete(name, &DeleteParams::default()).await.expect("deleted");
        }
    }

    /// Runs all cases at once; each must succeed and have said what is expected.
    async fn all(&self, group: &str, cases: Vec<Case>) {
        for (index, case) in cases.iter().enumerate() {
            let mut container = sh("c", case.script);
            merge(&mut container, case.container.clone());
            let mut spec = json!({"containers": [container]});
            merge(&mut spec, case.spec.clone());
            self.run(&format!("{group}-{index}"), spec).await;
        }
        let mut wrong = Vec::new();
        for (index, case) in cases.iter().enumerate() {
            let name = format!("{group}-{index}");
            let pod = self
                .until(&name, case.entry, |pod| matches!(apimachinery::pod::phase(pod), "Succeeded" | "Failed"))
                .await;
            // What a container said last is in its log a moment after its end.
            let ended = Instant::now();
            let (log, missing) = loop {
                let log = self.log(&name).await;
                let is_said = |line: &&String| log.lines().any(|l| l.trim() == line.trim());
                let missing: Vec<_> = case.log.iter().filter(|line| !is_said(line)).collect();
                if missing.is_empty() || ended.elapsed() > Duration::from_secs(10) {
                    break (log, missing);
                }
                tokio::time::sleep(Duration::from_millis(200)).await;
            };
            if apimachinery::pod::phase(&pod) != "Succeeded" || !missing.is_empty() {
                wrong.push(format!("{}: {} lacks {missing:?} in {log:?}", case.entry, apimachinery::pod::phase(&pod)));
            }
            self.remove(&[&name]).await;
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    async fn prepare(&self) {
        self.create::<ConfigMap>(
            json!({"metadata": {"name": "cm"}, "data": {"data-1": "value-1", "data_2": "value-2"},
            "binaryData": {"bin": "3q3vAA=="}}),
        )
        .await;
        self.create::<Secret>(json!({"metadata": {"name": "secret"}, "stringData": {"data-1": "value-1"}})).await;
        // Of the same name elsewhere, which no pod here may see.
        let other: Namespace = serde_json::from_value(json!({"metadata": {"name": "other"}})).expect("a namespace");
        Api::<Namespace>::all(self.client.clone()).create(&PostParams::default(), &other).await.expect("made");
        let foreign =
            serde_json::from_value(json!({"metadata": {"name": "secret"}, "stringData": {"data-1": "foreign"}}));
        let secrets = Api::<Secret>::namespaced(self.client.clone(), "other");
        secrets.create(&PostParams::default(), &foreign.expect("a secret")).await.expect("made");
        self.create::<Service>(json!({"metadata": {"name": "fooservice"},
            "spec": {"selector": {"app": "none"}, "ports": [{"port": 8765, "targetPort": 8080}]}}))
            .await;
        let class: RuntimeClass = serde_json::from_value(json!({"metadata": {"name": "costly"}, "handler": "runc",
            "overhead": {"podFixed": {"cpu": "10m", "memory": "1Mi"}}}))
        .expect("a class");
        let classes = Api::<RuntimeClass>::all(self.client.clone());
        classes.create(&PostParams::default(), &class).await.expect("made");
        for name in ["plain", "deleted"] {
            let metadata = kube::api::ObjectMeta { name: Some(name.into()), ..Default::default() };
            let class = RuntimeClass { metadata, overhead: None, ..class.clone() };
            classes.create(&PostParams::default(), &class).await.expect("made");
        }
        classes.delete("deleted", &DeleteParams::default()).await.expect("deleted");
        let made = async |class: Value| {
            let pod = pod("of-a-class", json!({"runtimeClassName": class, "containers": [sh("c", "true")]}));
            let dry = PostParams { dry_run: true, ..Default::default() };
            self.pods.create(&dry, &pod).await.map(drop).map_err(|e| e.to_string())
        };
        // The namespace has its account, and the classes are known.
        for class in [Value::Null, json!("plain"), json!("costly")] {
            eventually("a pod may be made", MINUTES, || made(class.clone())).await;
        }
        for class in ["deleted", "never-there"] {
            eventually("a pod of a class that is not there is refused", MINUTES, || async {
                made(json!(class)).await.map_or(Ok(()), |()| Err("it was taken".to_owned()))
            })
            .await;
        }
    }

    /// The node's name and address.
    async fn pods_host(&self) -> (String, String) {
        let nodes = Api::<k8s_openapi::api::core::v1::Node>::all(self.client.clone());
        let node = nodes.list(&kube::api::ListParams::default()).await.expect("nodes").items.remove(0);
        let addresses = node.status.and_then(|s| s.addresses).unwrap_or_default();
        let address = addresses.into_iter().find(|a| a.type_ == "InternalIP").expect("an address").address;
        (node.metadata.name.expect("a name"), address)
    }

    /// Binds a claim to its volume, where no controller does.
    async fn bind(&self, name: &str, volume: &PersistentVolume) {
        let claims = Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), "default");
        let claim = claims.get(name).await.expect("a claim");
        let uid = claim.metadata.uid.clone().expect("a UID");
        let volumes = Api::<PersistentVolume>::all(self.client.clone());
        let name_of = volume.metadata.name.as_deref().expect("a name");
        volumes
            .patch(name_of, &PatchParams::default(), &Patch::Merge(json!({"spec": {"claimRef": {"uid": uid}}})))
            .await
            .expect("bound");
        let status =
            json!({"status": {"phase": "Bound", "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"]}});
        claims.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.expect("bound");
    }
}
