//! Pods: what a new one looks like, the little that may change, how long it may take to go, and its row in `kubectl get`.

use super::{pod_defaults, pod_validation};
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, copy_field, flag, int, items_mut, list, remove, semantically_equal, set, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use serde_json::{Value, json};

pub const RULES: Rules = Rules {
    generation: true,
    initial_status: Some(initial_status),
    default: pod_defaults::pod,
    prepare_create,
    prepare_update,
    prepare_status,
    validate: |root, errors| pod_validation::spec(&root.at("spec"), errors),
    validate_create: |root, errors| {
        let spec = root.at("spec");
        if !spec.at("ephemeralContainers").is_empty() {
            errors.forbidden(&spec.at("ephemeralContainers"), "cannot be set on create");
        }
    },
    validate_update,
    validate_status,
    selectable_names: &SELECTABLE,
    selectable,
    row: Some(row),
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

/// As `podStrategy.PrepareForCreate`.
fn initial_status(pod: &Value) -> Value {
    let mut status = json!({"phase": "Pending", "qosClass": qos_class(pod)});
    if !list(pod, "/spec/schedulingGates").is_empty() {
        let gated = json!([{"type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates"}]);
        set(&mut status, "conditions", gated);
    }
    status
}

/// `Guaranteed`, `Burstable` or `BestEffort`.
pub fn qos_class(pod: &Value) -> &'static str {
    serde_json::from_value(pod.get("spec").cloned().unwrap_or_default())
        .map_or("BestEffort", |spec| apimachinery::pod::qos_class(&spec))
}

fn prepare_create(pod: &mut Value) {
    // Constraints that are matched by the pod's own labels are written out, as `applyMatchLabelKeysAndMismatchLabelKeys`.
    let labels = pod.pointer("/metadata/labels").cloned().unwrap_or_default();
    let spec = child(pod, "spec");
    for affinity in ["/affinity/podAffinity", "/affinity/podAntiAffinity"] {
        let Some(affinity) = spec.pointer_mut(affinity) else { continue };
        for term in items_mut(affinity, "requiredDuringSchedulingIgnoredDuringExecution") {
            write_out_label_keys(term, &labels);
        }
        for weighted in items_mut(affinity, "preferredDuringSchedulingIgnoredDuringExecution") {
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
                Some(list) if !list.contains(&requirement) => list.push(requirement),
                Some(_) => {}
                None => set(selector, "matchExpressions", json!([requirement])),
            }
        }
    }
}

fn prepare_update(new: &mut Value, old: &Value) {
    // Clients that know nothing of ephemeral containers must not lose them.
    let spec = child(new, "spec");
    copy_field(spec, old.get("spec").unwrap_or(&Value::Null), "ephemeralContainers");
    let gated = !list(old, "/spec/schedulingGates").is_empty();
    if gated && list(new, "/spec/schedulingGates").is_empty() {
        let conditions = child(new, "status").get_mut("conditions").and_then(Value::as_array_mut);
        if let Some(conditions) = conditions {
            conditions.retain(|c| c["type"] != "PodScheduled" || c["reason"] != "SchedulingGated");
        }
    }
}

fn prepare_status(new: &mut Value, old: &Value) {
    copy_field(child(new, "metadata"), &old["metadata"], "ownerReferences");
    copy_field(child(new, "metadata"), &old["metadata"], "deletionTimestamp");
    copy_field(child(new, "metadata"), &old["metadata"], "deletionGracePeriodSeconds");
    // Fields that nodes of before do not write.
    let status = child(new, "status");
    if status.get("qosClass").is_none_or(|q| q == "") {
        copy_field(status, &old["status"], "qosClass");
    }
}

fn validate_status(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("status"), old.at("status"));
    let (class, before) = (now.at("qosClass"), was.at("qosClass"));
    if !before.is_blank() && class.value != before.value {
        errors.invalid(&class, "field is immutable");
    }
    let node = now.at("nominatedNodeName");
    if !node.is_blank() {
        errors.all(&node, apimachinery::names::is_dns1123_subdomain(node.str()));
    }
}

const UPDATABLE: &str = "`spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,\
    `spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it to be set to 1 if it was previously negative)";

/// As `ValidatePodUpdate`: a pod's spec is what it was made with, but for a handful of fields.
fn validate_update(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    for field in ["containers", "initContainers"] {
        let (list, before) = (now.at(field), was.at(field));
        if list.len() != before.len() {
            errors.forbidden(&list, "pod updates may not add or remove containers");
            return;
        }
    }
    deadline(&now, &was, errors);
    let tolerations = now.at("tolerations");
    let kept = was.at("tolerations").items().all(|t| {
        tolerations.items().any(|n| {
            // Only for how long it is tolerated may be said anew.
            let without = |v: &Value| {
                let mut v = v.clone();
                remove(&mut v, "tolerationSeconds");
                v
            };
            without(n.value) == without(t.value)
        })
    });
    if !kept {
        errors.forbidden(&tolerations, "existing toleration can not be modified except its tolerationSeconds");
    }
    let gated = !was.at("schedulingGates").is_empty();
    let gates = now.at("schedulingGates");
    for gate in gates.items() {
        if !was.at("schedulingGates").items().any(|g| g.value == gate.value) {
            errors.forbidden(
                &gates,
                format!("only deletion is allowed, but found new scheduling gate '{}'", gate.at("name").str()),
            );
        }
    }
    let mut expected = was.value.clone();
    for field in ["containers", "initContainers"] {
        for (at, container) in now.at(field).items().enumerate() {
            if let Some(slot) = expected.get_mut(field).and_then(|list| list.get_mut(at)) {
                copy_field(slot, container.value, "image");
            }
        }
    }
    copy_field(&mut expected, now.value, "activeDeadlineSeconds");
    copy_field(&mut expected, now.value, "tolerations");
    copy_field(&mut expected, now.value, "schedulingGates");
    if int(was.value, "/terminationGracePeriodSeconds").is_some_and(|s| s < 0)
        && int(now.value, "/terminationGracePeriodSeconds") == Some(1)
    {
        set(&mut expected, "terminationGracePeriodSeconds", 1);
    }
    if gated {
        copy_field(&mut expected, now.value, "nodeSelector");
        copy_field(&mut expected, now.value, "affinity");
    }
    if !semantically_equal(&expected, now.value) {
        errors.forbidden(&now, format!("pod updates may not change fields other than {UPDATABLE}"));
    }
}

fn deadline(now: &Field<'_, '_>, was: &Field<'_, '_>, errors: &mut Errors) {
    let (field, before) = (now.at("activeDeadlineSeconds"), was.at("activeDeadlineSeconds"));
    match (field.int(), before.int()) {
        (Some(new), Some(old)) if new > old => {
            errors.invalid(&field, format!("must be less than or equal to previous value: {old}"));
        }
        (None, Some(_)) => errors.invalid(&field, "must not update from a positive integer to nil value"),
        _ => {}
    }
}

/// Ephemeral containers come and stay. As `ValidatePodEphemeralContainersUpdate`.
pub fn validate_ephemeral(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let (now, was) = (new.at("spec"), old.at("spec"));
    pod_validation::spec(&now, errors);
    let (list, before) = (now.at("ephemeralContainers"), was.at("ephemeralContainers"));
    for container in before.items() {
        let name = text(container.value, "/name");
        match list.items().find(|c| text(c.value, "/name") == name) {
            None => errors.forbidden(&list, format!("existing ephemeral containers {name:?} may not be removed\n")),
            Some(kept) if !semantically_equal(kept.value, container.value) => {
                errors.forbidden(&list, format!("existing ephemeral containers {name:?} may not be changed\n"));
            }
            Some(_) => {}
        }
    }
}

/// A resize changes the resources of containers and nothing else. As `podResizeStrategy.PrepareForUpdate`.
pub fn prepare_resize(new: &mut Value, old: &Value) {
    let mut result = old.clone();
    for field in ["containers", "initContainers"] {
        for wanted in list(new, &format!("/spec/{field}")) {
            let name = text(wanted, "/name");
            for container in items_mut(child(&mut result, "spec"), field).filter(|c| text(c, "/name") == name) {
                for part in ["resources", "resizePolicy"] {
                    copy_field(container, wanted, part);
                }
            }
        }
    }
    copy_field(child(&mut result, "metadata"), new.get("metadata").unwrap_or(&Value::Null), "resourceVersion");
    *new = result;
}

/// As `ValidatePodResize`: only cpu and memory, and the pod stays in its quality of service.
pub fn validate_resize(new: &Field<'_, '_>, old: &Field<'_, '_>, errors: &mut Errors) {
    let spec = new.at("spec");
    pod_validation::spec(&spec, errors);
    if qos_class(new.value) != qos_class(old.value) {
        let status = new.at("status");
        errors.invalid(&status.at("qosClass"), "Pod QOS Class may not change as a result of resizing");
    }
    for field in ["containers", "initContainers"] {
        for (at, container) in spec.at(field).items().enumerate() {
            let before = old.value.pointer(&format!("/spec/{field}/{at}/resources")).cloned().unwrap_or_default();
            let resources = container.at("resources");
            let others = |resources: &Value| {
                let mut rest = resources.clone();
                for kind in ["limits", "requests"] {
                    for name in ["cpu", "memory"] {
                        if let Some(amounts) = rest.get_mut(kind) {
                            remove(amounts, name);
                        }
                    }
                }
                rest
            };
            if !semantically_equal(&others(resources.value), &others(&before)) {
                errors.forbidden(&spec, "only cpu and memory resources are mutable");
            }
        }
    }
}

/// How many seconds a pod has from its deletion until it must be gone. As `CheckGracefulDelete`.
pub fn grace_period(pod: &Value, requested: Option<i64>) -> i64 {
    if text(pod, "/spec/nodeName").is_empty() || matches!(text(pod, "/status/phase"), "Failed" | "Succeeded") {
        return 0;
    }
    let period = requested.or_else(|| int(pod, "/spec/terminationGracePeriodSeconds")).unwrap_or(0);
    if period < 0 { 1 } else { period }
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

// === its row ===

/// What the containers of a pod add up to. As `printPod`.
struct Summary {
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: String,
    reason: String,
}

fn row(pod: &Value, clock: &Clock) -> Vec<Value> {
    let summary = summary(pod);
    let restarts = if summary.restarts != 0 && !summary.last_restart.is_empty() {
        format!("{} ({} ago)", summary.restarts, clock.since(&summary.last_restart))
    } else {
        summary.restarts.to_string()
    };
    let ip = text(pod, "/status/podIPs/0/ip");
    let gates = list(pod, "/spec/readinessGates");
    let passed = gates.iter().filter(|gate| condition(pod, text(gate, "/conditionType")) == "True").count();
    vec![
        print::name(pod),
        Value::from(format!("{}/{}", summary.ready, summary.total)),
        Value::from(summary.reason),
        Value::from(restarts),
        clock.age(pod),
        print::or_none(if ip.is_empty() { text(pod, "/status/podIP") } else { ip }),
        print::or_none(text(pod, "/spec/nodeName")),
        print::or_none(text(pod, "/status/nominatedNodeName")),
        Value::from(if gates.is_empty() { NONE.to_owned() } else { format!("{passed}/{}", gates.len()) }),
    ]
}

/// The status of a pod's condition; empty if it has none.
pub fn condition<'v>(pod: &'v Value, kind: &str) -> &'v str {
    list(pod, "/status/conditions").iter().find(|c| text(c, "/type") == kind).map_or("", |c| text(c, "/status"))
}

fn summary(pod: &Value) -> Summary {
    let init = list(pod, "/spec/initContainers");
    let is_sidecar =
        |name: &str| init.iter().any(|c| text(c, "/name") == name && text(c, "/restartPolicy") == "Always");
    let sidecars = init.iter().filter(|c| text(c, "/restartPolicy") == "Always").count();
    let mut found = Summary {
        ready: 0,
        total: list(pod, "/spec/containers").len() + sidecars,
        restarts: 0,
        last_restart: String::new(),
        reason: first_of([text(pod, "/status/reason"), text(pod, "/status/phase")]),
    };
    let gated = |c: &Value| text(c, "/type") == "PodScheduled" && text(c, "/reason") == "SchedulingGated";
    if list(pod, "/status/conditions").iter().any(gated) {
        found.reason = "SchedulingGated".into();
    }
    let mut sidecar_restarts = (0, String::new());
    let mut initializing = false;
    for (at, status) in list(pod, "/status/initContainerStatuses").iter().enumerate() {
        let sidecar = is_sidecar(text(status, "/name"));
        count_restarts(status, &mut found.restarts, &mut found.last_restart);
        if sidecar {
            count_restarts(status, &mut sidecar_restarts.0, &mut sidecar_restarts.1);
        }
        let terminated = status.pointer("/state/terminated");
        let waiting = text(status, "/state/waiting/reason");
        if terminated.is_some_and(|t| int(t, "/exitCode").unwrap_or(0) == 0) {
            continue;
        }
        if sidecar && flag(status, "/started") {
            found.ready += usize::from(flag(status, "/ready"));
            continue;
        }
        found.reason = match terminated {
            Some(terminated) => format!("Init:{}", end_of(terminated)),
            None if !waiting.is_empty() && waiting != "PodInitializing" => format!("Init:{waiting}"),
            None => format!("Init:{at}/{}", init.len()),
        };
        initializing = true;
        break;
    }
    if !initializing || condition(pod, "Initialized") == "True" {
        (found.restarts, found.last_restart) = sidecar_restarts;
        let mut running = false;
        for status in list(pod, "/status/containerStatuses").iter().rev() {
            count_restarts(status, &mut found.restarts, &mut found.last_restart);
            let waiting = text(status, "/state/waiting/reason");
            if !waiting.is_empty() {
                found.reason = waiting.to_owned();
            } else if let Some(terminated) = status.pointer("/state/terminated") {
                found.reason = end_of(terminated);
            } else if flag(status, "/ready") && status.pointer("/state/running").is_some() {
                running = true;
                found.ready += 1;
            }
        }
        if found.reason == "Completed" && running {
            found.reason = if condition(pod, "Ready") == "True" { "Running" } else { "NotReady" }.into();
        }
    }
    let deleted = pod.pointer("/metadata/deletionTimestamp").is_some();
    if deleted && text(pod, "/status/reason") == "NodeLost" {
        found.reason = "Unknown".into();
    } else if deleted && !matches!(text(pod, "/status/phase"), "Failed" | "Succeeded") {
        found.reason = "Terminating".into();
    }
    found
}

fn first_of<const N: usize>(texts: [&str; N]) -> String {
    texts.into_iter().find(|t| !t.is_empty()).unwrap_or("").to_owned()
}

/// How a container ended: its reason, or else the signal or the exit code.
fn end_of(terminated: &Value) -> String {
    match (text(terminated, "/reason"), int(terminated, "/signal").unwrap_or(0)) {
        ("", 0) => format!("ExitCode:{}", int(terminated, "/exitCode").unwrap_or(0)),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

fn count_restarts(status: &Value, restarts: &mut i64, last: &mut String) {
    *restarts += int(status, "/restartCount").unwrap_or(0);
    let finished = text(status, "/lastState/terminated/finishedAt");
    // RFC 3339 in UTC sorts as text.
    if finished > last.as_str() {
        finished.clone_into(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cells(pod: &Value) -> Vec<String> {
        let clock = Clock("2024-01-01T01:00:00Z".parse().unwrap());
        row(pod, &clock).iter().take(4).map(|v| v.as_str().unwrap().to_owned()).collect()
    }

    fn pod_of(status: Value) -> Value {
        json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}, {"name": "b"}],
            "initContainers": [{"name": "i"}]}, "status": status})
    }

    #[test]
    fn the_status_column_says_what_ails_a_pod() {
        let waiting = |reason: &str| {
            json!({"name": "a", "restartCount": 3, "state": {"waiting": {"reason": reason}},
            "lastState": {"terminated": {"finishedAt": "2024-01-01T00:59:00Z"}}})
        };
        let running = json!({"name": "b", "ready": true, "restartCount": 0, "state": {"running": {}}});
        let done =
            json!({"name": "a", "restartCount": 0, "state": {"terminated": {"reason": "Completed", "exitCode": 0}}});
        let cases = [
            (json!({"phase": "Pending"}), ["0/2", "Pending", "0"]),
            (
                json!({"phase": "Running", "containerStatuses": [waiting("CrashLoopBackOff"), running]}),
                ["1/2", "CrashLoopBackOff", "3 (60s ago)"],
            ),
            (
                json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"running": {}}}]}),
                ["0/2", "Init:0/1", "0"],
            ),
            (
                json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "restartCount": 1, "state": {"terminated": {"exitCode": 2}}}]}),
                ["0/2", "Init:ExitCode:2", "1"],
            ),
            (json!({"phase": "Succeeded", "containerStatuses": [done]}), ["0/2", "Completed", "0"]),
            (json!({"phase": "Running", "containerStatuses": [done, running]}), ["1/2", "NotReady", "0"]),
            (json!({"phase": "Failed", "reason": "Evicted"}), ["0/2", "Evicted", "0"]),
        ];
        for (status, expected) in cases {
            assert_eq!(cells(&pod_of(status.clone()))[1..], expected, "{status}");
        }
        let mut deleted = pod_of(json!({"phase": "Running"}));
        deleted["metadata"]["deletionTimestamp"] = json!("2024-01-01T00:00:00Z");
        assert_eq!(cells(&deleted)[2], "Terminating");
    }

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
    fn little_of_a_pod_may_change() {
        let old = json!({"spec": {"containers": [{"name": "a", "image": "x:1"}], "tolerations": [{"key": "k", "operator": "Exists"}]}});
        let changed = |change: fn(&mut Value)| {
            let mut new = old.clone();
            change(&mut new["spec"]);
            let mut errors = Errors::default();
            validate_update(&Field::root(&new), &Field::root(&old), &mut errors);
            errors.0.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert!(changed(|s| s["containers"][0]["image"] = json!("x:2")).is_empty());
        assert!(changed(|s| s["activeDeadlineSeconds"] = json!(5)).is_empty());
        assert!(changed(|s| s["tolerations"] = json!([{"key": "k", "operator": "Exists"}, {"key": "l"}])).is_empty());
        assert!(
            changed(|s| s["nodeName"] = json!("n"))[0].starts_with(
                "spec: Forbidden: pod updates may not change fields other than `spec.containers[*].image`"
            )
        );
        assert_eq!(changed(|s| s["tolerations"] = json!([])).len(), 1);
        assert!(changed(|s| s["containers"] = json!([]))[0].contains("may not add or remove containers"));
    }
}
