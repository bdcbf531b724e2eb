//! What a Job's policies say: which failures of pods count, which indexes make it a success, when a pod is replaced. Pure.
use super::indexes;
use apimachinery::pod::phase;
use k8s_openapi::api::{
    batch::v1::{Job, JobSpec, PodFailurePolicyOnExitCodesRequirement},
    core::v1::Pod,
};
use std::collections::BTreeSet;

/// What a failure of a pod means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It counts against the limit.
    Counts,
    Ignored,
    /// Its index has failed for good.
    FailsIndex,
    /// The Job has failed, for that reason.
    FailsJob(String),
}

/// The action of the first rule that fits, and why it does.
fn action<'a>(spec: &'a JobSpec, pod: &Pod) -> Option<(&'a str, String)> {
    let rules = spec.pod_failure_policy.iter().flat_map(|p| &p.rules);
    for (at, rule) in rules.enumerate() {
        let (name, namespace) = (&pod.metadata.name, &pod.metadata.namespace);
        let place = format!("{}/{}", namespace.as_deref().unwrap_or_default(), name.as_deref().unwrap_or_default());
        let matched = match (&rule.on_exit_codes, &rule.on_pod_conditions) {
            (Some(codes), _) => exit_code(codes, pod)
                .map(|(name, code)| format!("Container {name} for pod {place} failed with exit code {code}")),
            (None, patterns) => patterns.iter().flatten().find_map(|pattern| {
                let condition = apimachinery::pod::condition(pod, &pattern.type_)?;
                let same = condition.status == pattern.status.as_deref().unwrap_or("True");
                same.then(|| format!("Pod {place} has condition {}", pattern.type_))
            }),
        };
        if let Some(matched) = matched {
            let action = rule.action.as_str();
            return Some((action, format!("{matched} matching {action} rule at index {at}")));
        }
    }
    None
}

/// The action of a pod's failure, if a rule has one.
pub fn action_of<'a>(spec: &'a JobSpec, pod: &Pod) -> Option<&'a str> {
    action(spec, pod).map(|(action, _)| action)
}

/// As `matchPodFailurePolicy`.
pub fn verdict(spec: &JobSpec, pod: &Pod) -> Verdict {
    match action(spec, pod) {
        Some(("Ignore", _)) => Verdict::Ignored,
        Some(("FailIndex", _)) => Verdict::FailsIndex,
        Some(("FailJob", why)) => Verdict::FailsJob(why),
        _ => Verdict::Counts,
    }
}

/// The container that ended so and its exit code. As `matchOnExitCodes`.
fn exit_code<'a>(rule: &PodFailurePolicyOnExitCodesRequirement, pod: &'a Pod) -> Option<(&'a str, i32)> {
    let status = pod.status.as_ref()?;
    let all = status.container_statuses.iter().flatten().chain(status.init_container_statuses.iter().flatten());
    let named = all.filter(|c| rule.container_name.as_ref().is_none_or(|name| *name == c.name));
    let ended = named.filter_map(|c| Some((c.name.as_str(), c.state.as_ref()?.terminated.as_ref()?.exit_code)));
    ended.filter(|(_, code)| *code != 0).find(|(_, code)| rule.values.contains(code) == (rule.operator == "In"))
}

/// Whether only pods that have ended are replaced, not those that are ending.
fn replaces_failed_only(spec: &JobSpec) -> bool {
    spec.pod_replacement_policy.as_deref() == Some("Failed") || spec.pod_failure_policy.is_some()
}

/// A pod that is being deleted counts as failed at once, unless it is to be replaced only when it has ended.
/// As `isPodFailed`.
pub fn has_failed(spec: &JobSpec, pod: &Pod) -> bool {
    let going = pod.metadata.deletion_timestamp.is_some() && phase(pod) != "Succeeded";
    phase(pod) == "Failed" || (going && !replaces_failed_only(spec))
}

/// Pods that are ending and whose place is not free yet.
pub fn holds_place(spec: &JobSpec, pod: &Pod) -> bool {
    replaces_failed_only(spec) && is_ending(pod)
}

pub fn is_ending(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_some() && !apimachinery::pod::is_terminal(pod)
}

/// The rule of the success policy that is met. As `matchSuccessPolicy`.
pub fn success(job: &Job, done: &BTreeSet<i32>) -> Option<String> {
    let spec = job.spec.as_ref()?;
    let met = spec.success_policy.as_ref()?.rules.iter().position(|rule| {
        let least = rule.succeeded_count.and_then(|c| usize::try_from(c).ok());
        match &rule.succeeded_indexes {
            Some(text) => {
                let wanted = indexes::parse(text, spec.completions.unwrap_or(0));
                wanted.intersection(done).count() >= least.unwrap_or(wanted.len())
            }
            None => least.is_some_and(|least| done.len() >= least),
        }
    });
    met.map(|at| format!("Matched rules at index {at}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn spec(value: Value) -> JobSpec {
        let mut spec = json!({"template": {}});
        value.as_object().into_iter().flatten().for_each(|(k, v)| spec[k] = v.clone());
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn the_first_rule_that_fits_decides() {
        let pod = |code: i32, conditions: Value| -> Pod {
            let ended = json!({"name": "main", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                "state": {"terminated": {"exitCode": code}}});
            let value = json!({"metadata": {"name": "p", "namespace": "ns"},
                "status": {"phase": "Failed", "conditions": conditions, "containerStatuses": [ended]}});
            serde_json::from_value(value).unwrap()
        };
        let on = |action: &str, rule: Value| {
            let mut rule = rule;
            rule["action"] = json!(action);
            rule
        };
        let codes = |operator: &str, values: Value| json!({"onExitCodes": {"operator": operator, "values": values}});
        let disrupted = json!([{"type": "DisruptionTarget", "status": "True"}]);
        let policy = spec(json!({"podFailurePolicy": {"rules": [
            on("Ignore", json!({"onPodConditions": disrupted})),
            on("FailJob", codes("In", json!([42, 43]))),
            on("FailIndex", codes("In", json!([5]))),
            on("Count", codes("In", json!([6]))),
            on("FailJob", codes("NotIn", json!([7]))),
        ]}}));
        let failed = |code, at| {
            Verdict::FailsJob(format!(
                "Container main for pod ns/p failed with exit code {code} matching FailJob rule at index {at}"
            ))
        };
        for (code, conditions, expected) in [
            (42, disrupted, Verdict::Ignored),
            (43, json!([]), failed(43, 1)),
            (5, json!([]), Verdict::FailsIndex),
            (6, json!([]), Verdict::Counts),
            (7, json!([]), Verdict::Counts),
            (8, json!([]), failed(8, 4)),
            (0, json!([]), Verdict::Counts),
        ] {
            assert_eq!(verdict(&policy, &pod(code, conditions)), expected, "{code}");
        }
    }

    #[test]
    fn success_by_indexes_or_number() {
        let job = |rules: Value| Job {
            spec: Some(spec(json!({"completions": 5, "successPolicy": {"rules": rules}}))),
            ..Job::default()
        };
        for (rules, done, expected) in [
            (json!([{"succeededIndexes": "0-4"}]), vec![0, 1, 2, 3], None),
            (json!([{"succeededIndexes": "0,2"}]), vec![0, 2], Some(0)),
            (json!([{"succeededIndexes": "0-2", "succeededCount": 2}]), vec![1, 2], Some(0)),
            (json!([{"succeededIndexes": "0-2", "succeededCount": 2}]), vec![2, 3, 4], None),
            (json!([{"succeededIndexes": "4"}, {"succeededCount": 1}]), vec![3], Some(1)),
        ] {
            let got = success(&job(rules.clone()), &done.into_iter().collect());
            assert_eq!(got, expected.map(|at| format!("Matched rules at index {at}")), "{rules}");
        }
    }
}
