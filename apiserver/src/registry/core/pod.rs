//! Pods: what a new one looks like, who may change what of it, how long it may take to go, and how it is selected.

use super::{pod_annotations, pod_defaults, pod_row, pod_status, pod_update, pod_validation, pod_warnings};
use crate::registry::field::{Errors, Field};
use crate::registry::object::{at, child, copy_field, flag, int, items_mut, list, remove, set, text};
use crate::registry::rules::Rules;
use crate::storage::object::Path;
use apimachinery::pod::qos_class_of;
use serde_json::{Value, json};

pub const RULES: Rules = Rules {
    generation: true,
    initial_status: Some(initial_status),
    default: pod_defaults::pod,
    prepare_create,
    prepare_status,
    validate: pod_validation::pod,
    validate_metadata: Some(pod_validation::annotations),
    validate_create,
    validate_update: pod_update::validate,
    validate_status: pod_status::validate,
    warnings: |new, old| if old.is_none() { pod_warnings::of_new_pod(new) } else { Vec::new() },
    selectable_names: &KNOWN,
    selectable,
    row: Some(pod_row::row),
    ..Rules::DEFAULT
};

const SELECTABLE: [&str; 8] = [
    "spec.nodeName",
    "spec.restartPolicy",
    "spec.schedulerName",
    "spec.serviceAccountName",
    "spec.hostNetwork",
    "status.phase",
    "status.podIP",
    "status.nominatedNodeName",
];

/// What may be selected by; the last of them no pod has.
const KNOWN: [&str; 9] = {
    let mut known = ["status.podIPs"; 9];
    let mut at = 0;
    while at < SELECTABLE.len() {
        known[at] = SELECTABLE[at];
        at += 1;
    }
    known
};

/// What most of a pod is, and neither its binding nor its deletion looks at.
pub const BULK: [Path; 5] = [
    &["spec", "affinity"],
    &["spec", "containers"],
    &["spec", "initContainers"],
    &["spec", "tolerations"],
    &["spec", "volumes"],
];

/// As `podStrategy.PrepareForCreate`.
fn initial_status(pod: &Value) -> Value {
    let mut status = json!({"phase": "Pending", "qosClass": qos_class_of(&pod["spec"])});
    if !list(pod, "/spec/schedulingGates").is_empty() {
        let gated = json!([{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates"}]);
        set(&mut status, "conditions", gated);
    }
    status
}

fn prepare_create(pod: &mut Value) {
    const TERMS: [&str; 2] =
        ["requiredDuringSchedulingIgnoredDuringExecution", "preferredDuringSchedulingIgnoredDuringExecution"];
    pod_annotations::apply_apparmor(pod);
    // Constraints that are matched by the pod's own labels are written out, as `mutatePodAffinity` and
    // `mutateTopologySpreadConstraints`.
    if at(pod, "/spec/affinity").is_none() && at(pod, "/spec/topologySpreadConstraints").is_none() {
        return;
    }
    let labels = pod.pointer("/metadata/labels").cloned().unwrap_or_default();
    let spec = child(pod, "spec");
    for affinity in ["/affinity/podAffinity", "/affinity/podAntiAffinity"] {
        let Some(affinity) = spec.pointer_mut(affinity) else { continue };
        for term in items_mut(affinity, TERMS[0]) {
            write_out_label_keys(term, &labels);
        }
        for weighted in items_mut(affinity, TERMS[1]) {
            if let Some(term) = weighted.get_mut("podAffinityTerm") {
                write_out_label_keys(term, &labels);
            }
        }
    }
    for constraint in items_mut(spec, "topologySpreadConstraints") {
        write_out_label_keys(constraint, &labels);
    }
}

fn write_out_label_keys(term: &mut Value, labels: &Value) {
    if term.get("labelSelector").is_none_or(Value::is_null) {
        return;
    }
    for (field, operator) in [("matchLabelKeys", "In"), ("mismatchLabelKeys", "NotIn")] {
        let keys: Vec<String> =
            list(term, &format!("/{field}")).iter().filter_map(|k| k.as_str().map(Into::into)).collect();
        for key in keys {
            let Some(value) = labels.get(&key).cloned() else { continue };
            let requirement = json!({"key": key, "operator": operator, "values": [value]});
            let selector = child(term, "labelSelector");
            match selector.get_mut("matchExpressions").and_then(Value::as_array_mut) {
                Some(list) => list.push(requirement),
                None => set(selector, "matchExpressions", json!([requirement])),
            }
        }
    }
}

/// As `podStatusStrategy.PrepareForUpdate`.
fn prepare_status(new: &mut Value, old: &Value) {
    for field in ["ownerReferences", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        copy_field(child(new, "metadata"), &old["metadata"], field);
    }
    // Fields that nodes of before do not write.
    let (status, before) = (child(new, "status"), &old["status"]);
    if status.get("qosClass").is_none_or(|q| q == "") {
        copy_field(status, before, "qosClass");
    }
    if int(status, "/observedGeneration").unwrap_or(0) == 0 {
        copy_field(status, before, "observedGeneration");
    }
    remove(status, "nodeAllocatableResourceClaimStatuses");
    for condition in items_mut(status, "conditions") {
        if int(condition, "/observedGeneration").unwrap_or(0) == 0
            && let Some(known) = list(before, "/conditions").iter().find(|c| c.get("type") == condition.get("type"))
        {
            copy_field(condition, known, "observedGeneration");
        }
    }
}

/// As `ValidatePodCreate`.
fn validate_create(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    if !spec.at("ephemeralContainers").is_empty() {
        errors.forbidden(&spec.at("ephemeralContainers"), "cannot be set on create");
    }
    if !spec.at("nodeName").is_blank() && !spec.at("schedulingGates").is_empty() {
        errors.forbidden(&spec.at("nodeName"), "cannot be set until all schedulingGates have been cleared");
    }
    let meta = root.at("metadata");
    pod_annotations::agree_with_fields(&meta.at("annotations"), &spec, errors);
}

/// How many seconds a pod has from its deletion until it must be gone. As `CheckGracefulDelete`.
pub fn grace_period(pod: &Value, requested: Option<i64>) -> i64 {
    if text(pod, "/spec/nodeName").is_empty() || matches!(text(pod, "/status/phase"), "Failed" | "Succeeded") {
        return 0;
    }
    let period = requested.or_else(|| int(pod, "/spec/terminationGracePeriodSeconds")).unwrap_or(0);
    if period < 0 { 1 } else { period }
}

/// The status of a pod's condition; empty if it has none.
pub fn condition<'v>(pod: &'v Value, kind: &str) -> &'v str {
    list(pod, "/status/conditions").iter().find(|c| text(c, "/type") == kind).map_or("", |c| text(c, "/status"))
}

fn selectable(pod: &Value) -> Vec<(&'static str, String)> {
    let ip = text(pod, "/status/podIPs/0/ip");
    let values = [
        text(pod, "/spec/nodeName"),
        text(pod, "/spec/restartPolicy"),
        text(pod, "/spec/schedulerName"),
        text(pod, "/spec/serviceAccountName"),
        if flag(pod, "/spec/hostNetwork") { "true" } else { "false" },
        text(pod, "/status/phase"),
        if ip.is_empty() { text(pod, "/status/podIP") } else { ip },
        text(pod, "/status/nominatedNodeName"),
    ];
    SELECTABLE.into_iter().zip(values.map(ToOwned::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grace_is_for_pods_that_run_somewhere() {
        let mut pod = json!({"spec": {"terminationGracePeriodSeconds": 30}, "status": {"phase": "Pending"}});
        assert_eq!(grace_period(&pod, Some(10)), 0);
        pod["spec"]["nodeName"] = json!("n");
        assert_eq!((grace_period(&pod, None), grace_period(&pod, Some(0)), grace_period(&pod, Some(-5))), (30, 0, 1));
        pod["status"]["phase"] = json!("Failed");
        assert_eq!(grace_period(&pod, None), 0);
    }

    #[test]
    fn a_gated_pod_says_so_and_label_keys_are_written_out() {
        let mut pod = json!({"metadata": {"labels": {"app": "web"}}, "spec": {"schedulingGates": [{"name": "a"}],
            "topologySpreadConstraints": [{"labelSelector": {}, "matchLabelKeys": ["app", "other"]}]}});
        assert_eq!(initial_status(&pod)["conditions"][0]["reason"], "SchedulingGated");
        prepare_create(&mut pod);
        assert_eq!(
            pod["spec"]["topologySpreadConstraints"][0]["labelSelector"],
            json!({"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]})
        );
    }

    #[test]
    fn a_profile_that_an_annotation_names_becomes_a_field() {
        let key = |name: &str| format!("{}{name}", pod_annotations::APPARMOR);
        let mut pod = json!({"metadata": {"annotations": {key("a"): "localhost/p", key("b"): "runtime/default", key("c"): "?", key("d"): "unconfined"}},
            "spec": {"securityContext": {"appArmorProfile": {"type": "RuntimeDefault"}}, "containers": [{"name": "a"}, {"name": "b"},
                {"name": "c"}, {"name": "d", "securityContext": {"appArmorProfile": {"type": "Unconfined"}}}]}});
        assert_eq!(
            pod_warnings::of_new_pod(&pod).iter().filter(|w| w.contains("use the \"appArmorProfile\" field")).count(),
            2,
            "of the one that differs and the one that is wrong"
        );
        prepare_create(&mut pod);
        let profile = |at: usize| pod["spec"]["containers"][at].pointer("/securityContext/appArmorProfile").cloned();
        assert_eq!(profile(0), Some(json!({"type": "Localhost", "localhostProfile": "p"})));
        assert_eq!((profile(1), profile(2), profile(3)), (None, None, Some(json!({"type": "Unconfined"}))));
    }

    #[test]
    fn an_observed_generation_is_not_lost_by_those_who_do_not_know_of_it() {
        let old = json!({"metadata": {}, "status": {"observedGeneration": 3, "qosClass": "Burstable",
            "conditions": [{"type": "Ready", "observedGeneration": 2}]}});
        let mut new =
            json!({"metadata": {}, "status": {"conditions": [{"type": "Ready", "status": "True"}, {"type": "x"}]}});
        prepare_status(&mut new, &old);
        assert_eq!(
            new["status"],
            json!({"observedGeneration": 3, "qosClass": "Burstable",
                "conditions": [{"type": "Ready", "status": "True", "observedGeneration": 2}, {"type": "x"}]})
        );
    }
}
