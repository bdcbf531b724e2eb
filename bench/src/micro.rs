//! CPU time of the hot pure paths, one thread, by the thread's own clock.
use crate::table;
use apimachinery::{
    decode::{FieldValidation, decode_json},
    facts, labels,
    patch::strategic,
    pod,
    quantity::Quantity,
};
use k8s_openapi::api::core::v1::{Node, Pod};
use nix::time::{ClockId, clock_gettime};
use rand::SeedableRng as _;
use scheduler::{
    cache::{PendingPod, PodFacts, Snapshot},
    decide::{Scratch, decide},
    framework::Profile,
};
use serde_json::{Value, json};
use std::{hint::black_box, sync::Arc, time::Duration};

/// Each path runs for about so long.
const TIME: Duration = Duration::from_millis(500);

/// Prints the table.
pub fn run() -> anyhow::Result<()> {
    let pod_json = sample_pod("web-0").to_string();
    let pod_schema = facts::schema_of("", "v1", "Pod").ok_or_else(|| anyhow::anyhow!("no schema of Pod"))?;
    let typed: Pod = serde_json::from_str(&pod_json)?;
    let spec = typed.spec.clone().unwrap_or_default();
    let selector = labels::Selector::parse("app in (web, api),tier=front,!canary")?;
    let pod_labels = typed.metadata.labels.clone().unwrap_or_default();
    let object: Value = serde_json::from_str(&pod_json)?;
    let patch =
        json!({"spec": {"containers": [{"name": "web", "image": "web:2"}]}, "metadata": {"labels": {"x": "y"}}});

    let mut rows = Vec::new();
    let mut row = |what: &str, work: &mut dyn FnMut()| {
        rows.push(vec![what.to_owned(), format!("{:.2}", nanoseconds(work) / 1e3)]);
    };
    row(&format!("decode a Pod strictly ({} bytes)", pod_json.len()), &mut || {
        black_box(decode_json(pod_json.as_bytes(), pod_schema, FieldValidation::Strict).is_ok());
    });
    row("encode that Pod", &mut || {
        black_box(serde_json::to_vec(&object).map(|v| v.len()).unwrap_or_default());
    });
    row("strategic merge patch of a container", &mut || {
        let mut target = object.clone();
        black_box(strategic(&mut target, &patch, Some(pod_schema)).is_ok());
    });
    row("match a label selector", &mut || {
        black_box(selector.matches(&pod_labels));
    });
    row("read a quantity", &mut || {
        black_box(Quantity::parse(black_box("1536Mi")).is_ok());
    });
    row("sum a pod's requests", &mut || {
        black_box(pod::requests(&spec));
    });
    for nodes in [100, 1000, 5000] {
        let (profile, mut snapshot) = (Profile::default_profile()?, cluster(nodes)?);
        let pending = PendingPod::new(Arc::new(typed.clone()));
        snapshot.prepare_for(&pending);
        let (mut scratch, mut rng) = (Scratch::default(), rand::rngs::StdRng::seed_from_u64(1));
        row(&format!("find a node among {nodes}"), &mut || {
            black_box(decide(&profile, &mut snapshot, &pending, &mut scratch, &mut rng).is_ok());
        });
    }
    table::print(&["path", "CPU µs"], &rows);
    Ok(())
}

/// Per call, after a warm-up.
fn nanoseconds(work: &mut dyn FnMut()) -> f64 {
    let cpu = || clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default();
    let mut calls = 1u32;
    loop {
        let started = cpu();
        (0..calls).for_each(|_| work());
        let spent = cpu().saturating_sub(started);
        if spent > TIME {
            return spent.as_nanos() as f64 / f64::from(calls);
        }
        calls = calls.saturating_mul(if spent < TIME / 10 { 8 } else { 2 });
    }
}

/// With what a web application's pod usually says.
fn sample_pod(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": "default", "labels": {"app": "web", "tier": "front", "pod-template-hash": "6d4cf56db6"},
            "annotations": {"example.com/checksum": "0123456789abcdef0123456789abcdef"}},
        "spec": {
            "terminationGracePeriodSeconds": 30, "restartPolicy": "Always", "serviceAccountName": "default",
            "containers": [{
                "name": "web", "image": "web:1", "imagePullPolicy": "IfNotPresent",
                "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                "env": [{"name": "A", "value": "1"}, {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}],
                "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
                "readinessProbe": {"httpGet": {"path": "/healthz", "port": "http"}, "periodSeconds": 5},
                "volumeMounts": [{"name": "config", "mountPath": "/etc/web"}],
            }],
            "volumes": [{"name": "config", "configMap": {"name": "web"}}],
            "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}],
        },
    })
}

/// Nodes in three zones with ten pods each.
fn cluster(nodes: usize) -> anyhow::Result<Snapshot> {
    let mut snapshot = Snapshot::default();
    for i in 0..nodes {
        let name = format!("node-{i}");
        let node: Node = serde_json::from_value(json!({
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": format!("zone-{}", i % 3)}},
            "spec": {}, "status": {"allocatable": {"cpu": "16", "memory": "64Gi", "pods": "110", "ephemeral-storage": "100Gi"}},
        }))?;
        snapshot.set_node(&node);
        for k in 0..10 {
            let mut object = sample_pod(&format!("web-{i}-{k}"));
            object["metadata"]["uid"] = format!("uid-{i}-{k}").into();
            object["spec"]["nodeName"] = name.clone().into();
            let pod: Pod = serde_json::from_value(object)?;
            snapshot.set_pod(PodFacts::of(&pod), &name);
        }
    }
    Ok(snapshot)
}
