//! The decision alone: CPU time per pod, by the thread's own clock, while a cluster fills.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use k8s_openapi::api::core::v1::{Node, Pod};
use nix::time::{ClockId, clock_gettime};
use rand::SeedableRng as _;
use scheduler::cache::{PendingPod, PodFacts, Snapshot};
use scheduler::decide::{Scratch, decide};
use scheduler::framework::{Nomination, Profile};
use serde_json::json;

use super::{Load, node};
use crate::table;

const PODS: usize = 10_000;
const PREEMPTORS: usize = 500;

/// Prints the table.
pub fn run() -> anyhow::Result<()> {
    let mut rows = Vec::new();
    for load in Load::ALL {
        for nodes in [1000, 5000] {
            let (placed, spent) = fill(load, nodes)?;
            rows.push(vec![
                load.name().to_owned(),
                nodes.to_string(),
                placed.to_string(),
                format!("{:.1}", spent.as_secs_f64() * 1e6 / placed.max(1) as f64),
            ]);
        }
    }
    table::print(&["decision", "nodes", "pods", "CPU µs per pod"], &rows);
    Ok(())
}

fn cpu() -> Duration {
    clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).map(Duration::from).unwrap_or_default()
}

fn pending(load: Load, number: usize) -> anyhow::Result<PendingPod> {
    let mut pod = load.pod(number);
    pod["metadata"]["uid"] = json!(format!("{load:?}-{number}"));
    let pod: Pod = serde_json::from_value(pod)?;
    Ok(PendingPod::new(Arc::new(pod)))
}

/// How many pods were placed, and the CPU time of all decisions.
fn fill(load: Load, nodes: usize) -> anyhow::Result<(usize, Duration)> {
    let profile = Profile::default_profile()?;
    let mut snapshot = Snapshot::default();
    for number in 0..nodes {
        let node: Node = serde_json::from_value(node(number))?;
        snapshot.set_node(&node);
    }
    let count = if load == Load::Preemption { PREEMPTORS } else { PODS };
    if load == Load::Preemption {
        for number in 0..nodes * 4 {
            let mut pod = Load::Plain.pod(number);
            pod["metadata"]["uid"] = json!(format!("victim-{number}"));
            pod["spec"]["containers"][0]["resources"]["requests"]["cpu"] = json!("1");
            let pod: Pod = serde_json::from_value(pod)?;
            snapshot.set_pod(PodFacts::of(&pod), &format!("node-{}", number % nodes));
        }
    }
    let (mut scratch, mut rng) = (Scratch::default(), rand::rngs::StdRng::seed_from_u64(1));
    let pods: Vec<PendingPod> = (0..count).map(|number| pending(load, number)).collect::<anyhow::Result<_>>()?;
    let started = cpu();
    for pod in &pods {
        snapshot.prepare_for(pod);
        match decide(&profile, &mut snapshot, pod, &mut scratch, &mut rng) {
            Ok(decision) => snapshot.assume(pod.facts.clone(), decision.node),
            Err(error) => match error.nomination {
                Nomination::To { node, victims } => {
                    for uid in &victims {
                        snapshot.remove_pod(uid);
                    }
                    let node = snapshot.nodes.find(&node).context("the nominated node")?;
                    snapshot.assume(pod.facts.clone(), node);
                }
                _ => anyhow::bail!("{load:?}: {error}"),
            },
        }
    }
    Ok((count, cpu().saturating_sub(started)))
}
