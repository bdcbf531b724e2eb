//! Deployments, and what keeps a number of pods: ReplicaSets, StatefulSets, DaemonSets, ReplicationControllers.

use serde_json::Value;

use super::{Description, annotation_lines, conditions, controlled_by, date, map_lines, pod_phases, selector_line};
use crate::objects::{items, kind, name, namespace, number, text};
use crate::output::jsonpath::plain;

const REVISION: &str = "/metadata/annotations/deployment.kubernetes.io~1revision";

pub(super) fn deployment(deployment: &Value, replica_sets: &[Value], out: &mut Description) {
    let strategy = text(deployment, "/spec/strategy/type");
    let count = |field: &str| number(deployment, &format!("/status/{field}"));
    let mut pairs = vec![
        ("Name", name(deployment).to_owned()),
        ("Namespace", namespace(deployment).to_owned()),
        ("CreationTimestamp", date(text(deployment, "/metadata/creationTimestamp"))),
        ("Labels", map_lines(deployment.pointer("/metadata/labels"), 0)),
        ("Annotations", annotation_lines(deployment)),
        ("Selector", selector_line(deployment)),
        (
            "Replicas",
            format!(
                "{} desired | {} updated | {} total | {} available | {} unavailable",
                number(deployment, "/spec/replicas"),
                count("updatedReplicas"),
                count("replicas"),
                count("availableReplicas"),
                count("unavailableReplicas")
            ),
        ),
        ("StrategyType", strategy.to_owned()),
        ("MinReadySeconds", number(deployment, "/spec/minReadySeconds").to_string()),
    ];
    if let Some(rolling) = deployment.pointer("/spec/strategy/rollingUpdate") {
        let words =
            format!("{} max unavailable, {} max surge", plain(&rolling["maxUnavailable"]), plain(&rolling["maxSurge"]));
        pairs.push(("RollingUpdateStrategy", words));
    }
    out.pairs(0, &pairs);
    out.line("Pod Template:");
    out.text.push_str(&super::pod_template(&deployment["spec"]["template"]));
    conditions(deployment, out);

    let uid = text(deployment, "/metadata/uid");
    let owned = |set: &&Value| items(set, "/metadata/ownerReferences").iter().any(|owner| owner["uid"] == uid);
    let newest = text(deployment, REVISION);
    let (mut new, mut old) = (Vec::new(), Vec::new());
    for set in replica_sets.iter().filter(owned) {
        let shown = format!(
            "{} ({}/{} replicas created)",
            name(set),
            number(set, "/status/replicas"),
            number(set, "/spec/replicas")
        );
        if text(set, REVISION) == newest && !newest.is_empty() {
            new.push(shown);
        } else {
            old.push(shown);
        }
    }
    let list = |sets: Vec<String>| if sets.is_empty() { "<none>".to_owned() } else { sets.join(", ") };
    out.pairs(0, &[("OldReplicaSets", list(old)), ("NewReplicaSet", list(new))]);
}

pub(super) fn replicas(object: &Value, pods: &[Value], out: &mut Description) {
    let uid = text(object, "/metadata/uid");
    let owned = |pod: &&Value| items(pod, "/metadata/ownerReferences").iter().any(|owner| owner["uid"] == uid);
    let pods: Vec<Value> = pods.iter().filter(owned).cloned().collect();
    let count = |field: &str| number(object, &format!("/status/{field}"));
    let mut pairs = vec![
        ("Name", name(object).to_owned()),
        ("Namespace", namespace(object).to_owned()),
        ("Selector", selector_line(object)),
        ("Labels", map_lines(object.pointer("/metadata/labels"), 0)),
        ("Annotations", annotation_lines(object)),
    ];
    if let Some(owner) = controlled_by(object) {
        pairs.push(("Controlled By", owner));
    }
    if kind(object) == "DaemonSet" {
        pairs.extend([
            ("Desired Number of Nodes Scheduled", count("desiredNumberScheduled").to_string()),
            ("Current Number of Nodes Scheduled", count("currentNumberScheduled").to_string()),
            ("Number of Nodes Scheduled with Up-to-date Pods", count("updatedNumberScheduled").to_string()),
            ("Number of Nodes Scheduled with Available Pods", count("numberAvailable").to_string()),
            ("Number of Nodes Misscheduled", count("numberMisscheduled").to_string()),
        ]);
    } else {
        let wanted = number(object, "/spec/replicas");
        pairs.push(("Replicas", format!("{} current / {wanted} desired", count("replicas"))));
    }
    pairs.push(("Pods Status", pod_phases(&pods)));
    out.pairs(0, &pairs);
    out.line("Pod Template:");
    out.text.push_str(&super::pod_template(&object["spec"]["template"]));
    conditions(object, out);
}
