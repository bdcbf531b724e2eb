//! `bench scheduler`: what a decision costs (pure, in this process), and what the scheduler does in a cluster of hollow nodes.

mod decisions;
mod loads;

pub use decisions::run as decisions;
pub use loads::{Options, run};

use serde_json::{Value, json};

/// What is asked of the scheduler.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Load {
    /// Pods with requests, and nothing else.
    Plain,
    /// Spread over zones (hard) and hosts (soft).
    Spread,
    /// Away from others of their group, by host.
    AntiAffinity,
    /// Important pods on full nodes.
    Preemption,
}

impl Load {
    const ALL: [Load; 4] = [Load::Plain, Load::Spread, Load::AntiAffinity, Load::Preemption];

    fn name(self) -> &'static str {
        match self {
            Load::Plain => "plain",
            Load::Spread => "spread over zones and hosts",
            Load::AntiAffinity => "anti-affinity by host",
            Load::Preemption => "preemption",
        }
    }

    /// The pod with this number; without a node.
    fn pod(self, number: usize) -> Value {
        // As many groups as there must be for none to have more pods than there are nodes.
        let group = format!("group-{}", number % 20);
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": format!("pod-{number}"), "namespace": "default", "labels": {"app": group}},
            "spec": {"containers": [{"name": "c", "image": "registry.k8s.io/pause:3.10",
                "resources": {"requests": {"cpu": "100m", "memory": "100Mi"}}}], "terminationGracePeriodSeconds": 0},
        });
        let selector = json!({"matchLabels": {"app": group}});
        match self {
            Load::Plain => {}
            Load::Spread => {
                let over = |key: &str, action: &str| json!({"maxSkew": 5, "topologyKey": key, "whenUnsatisfiable": action, "labelSelector": selector});
                pod["spec"]["topologySpreadConstraints"] = json!([
                    over("topology.kubernetes.io/zone", "DoNotSchedule"),
                    over("kubernetes.io/hostname", "ScheduleAnyway"),
                ]);
            }
            Load::AntiAffinity => {
                pod["spec"]["affinity"] = json!({"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
                    {"topologyKey": "kubernetes.io/hostname", "labelSelector": selector}]}});
            }
            Load::Preemption => {
                pod["spec"]["priority"] = json!(1000);
                pod["spec"]["containers"][0]["resources"]["requests"] = json!({"cpu": "3", "memory": "1Gi"});
            }
        }
        pod
    }
}

/// The node with this number, in one of three zones.
fn node(number: usize) -> Value {
    let name = format!("node-{number}");
    let amounts = json!({"cpu": "4", "memory": "32Gi", "pods": "110"});
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "topology.kubernetes.io/zone": format!("zone-{}", number % 3)}},
        "spec": {}, "status": {"allocatable": amounts, "capacity": amounts,
            "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "hollow"}]},
    })
}
