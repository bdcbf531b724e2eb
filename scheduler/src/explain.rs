//! Why a pod goes where it goes: each node's refusal with the numbers behind it, or each plugin's score. For
//! `/debug/explain`; it runs the functions that decide.

use k8s_openapi::api::core::v1::Pod;
use rand::SeedableRng;
use rand::rngs::StdRng;
use serde_json::{Map, Value, json};

use crate::cache::{NodeId, PendingPod, Snapshot};
use crate::decide::{Scratch, decide, plugin_scores};
use crate::driver::slim;
use crate::framework::{Cycle, Diagnosis, Nomination, Profile};

/// Explains what would become of the pod now. The snapshot is as before afterwards.
pub fn explain(profile: &Profile, snapshot: &mut Snapshot, pod: &PendingPod) -> Value {
    snapshot.prepare_for(pod);
    let mut told = json!({"pod": pod.facts.key.to_string(), "profile": profile.scheduler_name, "nodes": []});
    let mut rng = StdRng::seed_from_u64(0);
    match decide(profile, snapshot, pod, &mut Scratch::default(), &mut rng) {
        Ok(decision) => told["node"] = json!(*snapshot.nodes.name[decision.node.index()]),
        Err(error) => {
            told["message"] = json!(error.message);
            if let Nomination::To { node, victims } = &error.nomination {
                let names = victims.iter().filter_map(|uid| snapshot.facts_of(uid)).map(|facts| facts.key.to_string());
                told["preemption"] = json!({"node": **node, "victims": names.collect::<Vec<_>>()});
            }
        }
    }
    let mut diagnosis = Diagnosis::default();
    let (mut cycle, goes_on) = Cycle::start(profile, snapshot, pod, &mut diagnosis);
    if let Some((place, words)) = diagnosis.pre_filter.filter(|_| !goes_on) {
        told["refusedBy"] = json!(profile.plugin(place).name());
        told["reasons"] = json!([words]);
        return told;
    }
    let (mut nodes, mut fitting): (Vec<Value>, Vec<(usize, NodeId)>) = (Vec::new(), Vec::new());
    for node in snapshot.nodes.iter().collect::<Vec<_>>() {
        let mut line = json!({"name": *snapshot.nodes.name[node.index()]});
        if cycle.only.as_ref().is_some_and(|only| !only.contains(&node)) {
            line["refusedBy"] = json!("PreFilter");
        } else if let Err((place, refusal)) = cycle.filter(snapshot, node) {
            let (plugin, state) = (profile.plugin(place), cycle.state(place));
            let reasons = (0..u64::BITS).filter(|number| refusal.reasons & (1 << number) != 0);
            line["refusedBy"] = json!(plugin.name());
            line["reasons"] = reasons.map(|number| plugin.reason(state, number).into_owned()).collect();
            line["preemptible"] = json!(refusal.resolvable);
            line["numbers"] = plugin.numbers(state, pod, snapshot, node);
        } else {
            fitting.push((nodes.len(), node));
        }
        nodes.push(line);
    }
    let feasible: Vec<NodeId> = fitting.iter().map(|(_, node)| *node).collect();
    let mut scores: Vec<(Map<String, Value>, i64)> = vec![(Map::new(), 0); feasible.len()];
    plugin_scores(profile, snapshot, pod, &feasible, &mut |place, weight, normalized| {
        for ((told, total), score) in scores.iter_mut().zip(normalized) {
            told.insert(profile.plugin(place).name().to_owned(), json!({"score": score, "weight": weight}));
            *total += score * weight;
        }
    });
    for ((line, _), (told, total)) in fitting.iter().zip(scores) {
        nodes[*line]["scores"] = Value::Object(told);
        nodes[*line]["total"] = json!(total);
    }
    told["nodes"] = Value::Array(nodes);
    told
}

/// The pod of a manifest that is not created: a Pod, or the first one that a workload's template makes.
pub fn supposed_pod(manifest: Value) -> Result<Pod, String> {
    let mut pod =
        match manifest.pointer("/spec/template").or_else(|| manifest.pointer("/spec/jobTemplate/spec/template")) {
            Some(template) if manifest["kind"] != "Pod" => {
                let mut pod = template.clone();
                pod["metadata"]["name"] = manifest["metadata"]["name"].clone();
                pod["metadata"]["namespace"] = manifest["metadata"]["namespace"].clone();
                pod
            }
            _ => manifest,
        };
    for (field, value) in [("namespace", "default"), ("name", "what-if"), ("uid", "what-if")] {
        if pod["metadata"][field].is_null() {
            pod["metadata"][field] = json!(value);
        }
    }
    pod.as_object_mut().map(|pod| (pod.remove("kind"), pod.remove("apiVersion")));
    let pod = slim::pod(pod).map_err(|error| error.to_string())?;
    match pod.spec {
        Some(_) => Ok(pod),
        None => Err("spec: Required value".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cluster, node, pending, placed, pod};

    #[test]
    fn each_node_says_what_it_has_against_the_pod_or_for_it() {
        let mut snapshot =
            cluster([node("full").build(), node("tainted").taint("t", "", "NoSchedule").build(), node("fine").build()]);
        placed(&mut snapshot, pod("big").requests(&[("cpu", "4")]).on("full").build());
        let profile = Profile::default_profile().expect("profile");
        let told = explain(&profile, &mut snapshot, &pending(pod("p").requests(&[("cpu", "1")]).build()));
        assert_eq!(told["node"], "fine");
        assert_eq!(told["nodes"][0]["refusedBy"], "NodeResourcesFit");
        assert_eq!(told["nodes"][0]["reasons"], json!(["Insufficient cpu"]));
        let cpu = json!({"requested": 1000, "allocatable": 4000, "used": 4000});
        assert_eq!(told["nodes"][0]["numbers"]["cpuMilli"], cpu);
        assert_eq!(told["nodes"][1]["refusedBy"], "TaintToleration");
        assert_eq!(told["nodes"][2]["scores"]["TaintToleration"], json!({"score": 100, "weight": 3}));
    }

    #[test]
    fn a_manifest_need_not_exist() {
        let deployment = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"},
            "spec": {"template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": []}}}});
        let pod = supposed_pod(deployment).expect("a pod");
        assert_eq!((pod.metadata.name.as_deref(), pod.metadata.namespace.as_deref()), (Some("web"), Some("default")));
        assert!(supposed_pod(json!({"kind": "Pod"})).is_err());
    }
}
