//! What a PodDisruptionBudget says: how many pods it counts on, how many are healthy, how many may go. Pure.
use apimachinery::pod::is_ready;
use k8s_openapi::{
    api::{
        core::v1::Pod,
        policy::v1::{PodDisruptionBudget, PodDisruptionBudgetSpec, PodDisruptionBudgetStatus},
    },
    apimachinery::pkg::{
        apis::meta::v1::{Condition, Time},
        util::intstr::IntOrString,
    },
    jiff::{SignedDuration, Timestamp},
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};

/// A pod whose eviction was granted and that is still there after this will not go.
const DELETION_TIMEOUT: SignedDuration = SignedDuration::from_secs(120);
const CONDITION: &str = "DisruptionAllowed";

/// What the pods' owners want.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Expected {
    /// Nothing was asked: the number of pods themselves counts.
    Pods,
    /// The sum of their owners' replicas.
    Scale(i32),
}

/// Whether the owners' scale must be known. As `getExpectedPodCount`.
pub fn needs_scale(spec: &PodDisruptionBudgetSpec) -> bool {
    spec.max_unavailable.is_some() || matches!(spec.min_available, Some(IntOrString::String(_)))
}

/// How many pods there should be and how many of them must be healthy.
fn desired(spec: &PodDisruptionBudgetSpec, pods: usize, expected: Expected) -> (i32, i32) {
    let count = match expected {
        Expected::Pods => i32::try_from(pods).unwrap_or(i32::MAX),
        Expected::Scale(scale) => scale,
    };
    let resolve = |value: &IntOrString| match value {
        IntOrString::Int(n) => *n,
        IntOrString::String(text) => {
            let percent = text.strip_suffix('%').and_then(|p| p.parse::<i64>().ok()).unwrap_or(0);
            i32::try_from((i64::from(count) * percent + 99).div_euclid(100)).unwrap_or(i32::MAX)
        }
    };
    match (&spec.max_unavailable, &spec.min_available) {
        (Some(most), _) => (count, count.saturating_sub(resolve(most)).max(0)),
        (None, Some(least)) => (count, resolve(least)),
        (None, None) => (count, 0),
    }
}

/// The status; the names of pods that should have gone by now; and when to look again. As `trySync`.
pub fn status(
    budget: &PodDisruptionBudget,
    pods: &[Arc<Pod>],
    expected: Expected,
    now: Timestamp,
) -> (PodDisruptionBudgetStatus, Vec<String>, Option<Duration>) {
    let Some(spec) = &budget.spec else { return Default::default() };
    let former = budget.status.clone().unwrap_or_default();
    let granted = former.disrupted_pods.unwrap_or_default();
    let (mut disrupted, mut stayed, mut wait) = (BTreeMap::new(), Vec::new(), None::<Duration>);
    for pod in pods.iter().filter(|p| p.metadata.deletion_timestamp.is_none()) {
        let name = pod.metadata.name.clone().unwrap_or_default();
        let Some(since) = granted.get(&name) else { continue };
        let left = DELETION_TIMEOUT - now.duration_since(since.0);
        match Duration::try_from(left) {
            Ok(left) => {
                wait = Some(wait.map_or(left, |w| w.min(left)));
                disrupted.insert(name, since.clone());
            }
            Err(_) => stayed.push(name),
        }
    }
    let is_healthy = |p: &&Arc<Pod>| {
        let goes = p.metadata.name.as_ref().is_some_and(|n| disrupted.contains_key(n));
        p.metadata.deletion_timestamp.is_none() && !goes && is_ready(p)
    };
    let healthy = i32::try_from(pods.iter().filter(is_healthy).count()).unwrap_or(i32::MAX);
    let (expected, desired) = desired(spec, pods.len(), expected);
    let allowed = if expected <= 0 { 0 } else { (healthy - desired).max(0) };
    let (value, reason) = if allowed > 0 { ("True", "SufficientPods") } else { ("False", "InsufficientPods") };
    let status = PodDisruptionBudgetStatus {
        current_healthy: Some(healthy),
        desired_healthy: Some(desired),
        expected_pods: Some(expected),
        disruptions_allowed: Some(allowed),
        disrupted_pods: (!disrupted.is_empty()).then_some(disrupted),
        observed_generation: budget.metadata.generation,
        conditions: former.conditions,
    };
    (with_condition(status, budget.metadata.generation, value, reason, "", now), stayed, wait)
}

/// When the owners cannot be asked nothing may go. As `failSafe`.
pub fn fail_safe(budget: &PodDisruptionBudget, why: &str, now: Timestamp) -> PodDisruptionBudgetStatus {
    let mut status = budget.status.clone().unwrap_or_default();
    status.disruptions_allowed = Some(0);
    with_condition(status, budget.metadata.generation, "False", "SyncFailed", why, now)
}

fn with_condition(
    mut status: PodDisruptionBudgetStatus,
    generation: Option<i64>,
    value: &str,
    reason: &str,
    message: &str,
    now: Timestamp,
) -> PodDisruptionBudgetStatus {
    let conditions = status.conditions.get_or_insert_default();
    let former = conditions.iter().position(|c| c.type_ == CONDITION).map(|at| conditions.remove(at));
    let since = former.filter(|c| c.status == value).map(|c| c.last_transition_time);
    conditions.push(Condition {
        type_: CONDITION.to_owned(),
        status: value.to_owned(),
        reason: reason.to_owned(),
        message: message.to_owned(),
        observed_generation: generation,
        last_transition_time: since.unwrap_or(Time(now)),
    });
    status
}

/// The condition of a pod that was to be disrupted and was not; or how long it may still be. As `syncStalePodDisruption`.
pub fn stale_disruption(pod: &Pod, now: Timestamp) -> Option<Result<(), Duration>> {
    let target = apimachinery::pod::condition(pod, "DisruptionTarget").filter(|c| c.status == "True")?;
    if pod.metadata.deletion_timestamp.is_some() || apimachinery::pod::is_terminal(pod) {
        return None;
    }
    let left = DELETION_TIMEOUT - now.duration_since(target.last_transition_time.as_ref()?.0);
    Some(Duration::try_from(left).ok().filter(|l| !l.is_zero()).map_or(Ok(()), Err))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn budget(spec: Value, status: Value) -> PodDisruptionBudget {
        let value = json!({"metadata": {"name": "b", "generation": 3}, "spec": spec, "status": status});
        serde_json::from_value(value).unwrap()
    }

    fn pods(ready: usize, not: usize) -> Vec<Arc<Pod>> {
        let pod = |at: usize| {
            json!({"metadata": {"name": format!("p{at}")}, "status": {"conditions":
            [{"type": "Ready", "status": if at < ready { "True" } else { "False" }}]}})
        };
        (0..ready + not).map(|at| Arc::new(serde_json::from_value(pod(at)).unwrap())).collect()
    }

    #[test]
    fn budgets_allow_what_is_left() {
        let scale = Expected::Scale;
        for (spec, ready, not, expected, (count, desired, allowed)) in [
            (json!({"minAvailable": 2}), 3, 0, Expected::Pods, (3, 2, 1)),
            (json!({"minAvailable": 2}), 1, 2, Expected::Pods, (3, 2, 0)),
            (json!({"minAvailable": "50%"}), 5, 0, scale(5), (5, 3, 2)),
            (json!({"maxUnavailable": 1}), 5, 0, scale(5), (5, 4, 1)),
            (json!({"maxUnavailable": 1}), 4, 1, scale(5), (5, 4, 0)),
            (json!({"maxUnavailable": "30%"}), 5, 0, scale(5), (5, 3, 2)),
            (json!({"maxUnavailable": 7}), 5, 0, scale(5), (5, 0, 5)),
            (json!({"minAvailable": 0}), 0, 0, Expected::Pods, (0, 0, 0)),
        ] {
            let made = budget(spec.clone(), json!({}));
            assert_eq!(needs_scale(made.spec.as_ref().unwrap()), expected != Expected::Pods, "{spec}");
            let (got, ..) = status(&made, &pods(ready, not), expected, Timestamp::now());
            let numbers = (got.expected_pods, got.desired_healthy, got.disruptions_allowed);
            assert_eq!(numbers, (Some(count), Some(desired), Some(allowed)), "{spec}");
            let condition = &got.conditions.unwrap()[0];
            assert_eq!(condition.reason, if allowed > 0 { "SufficientPods" } else { "InsufficientPods" });
        }
    }

    #[test]
    fn granted_evictions_are_waited_for() {
        let granted = json!({"disruptedPods": {"p0": "2026-01-01T11:59:00Z", "p1": "2026-01-01T11:50:00Z",
            "gone": "2026-01-01T11:59:59Z"}});
        let made = budget(json!({"minAvailable": 1}), granted);
        let (got, stayed, wait) = status(&made, &pods(3, 0), Expected::Pods, "2026-01-01T12:00:00Z".parse().unwrap());
        assert_eq!((got.current_healthy, got.disruptions_allowed), (Some(2), Some(1)));
        assert_eq!(got.disrupted_pods.unwrap().into_keys().collect::<Vec<_>>(), ["p0"]);
        assert_eq!((stayed.as_slice(), wait), (["p1".to_owned()].as_slice(), Some(Duration::from_secs(60))));
    }

    #[test]
    fn a_condition_of_a_disruption_that_never_was_grows_old() {
        let now: Timestamp = "2026-01-01T12:00:00Z".parse().unwrap();
        let pod = |since: &str, phase: &str| -> Pod {
            serde_json::from_value(json!({"status": {"phase": phase, "conditions":
                [{"type": "DisruptionTarget", "status": "True", "lastTransitionTime": since}]}}))
            .unwrap()
        };
        assert_eq!(stale_disruption(&pod("2026-01-01T11:57:00Z", "Running"), now), Some(Ok(())));
        let young = pod("2026-01-01T11:59:00Z", "Running");
        assert_eq!(stale_disruption(&young, now), Some(Err(Duration::from_secs(60))));
        assert_eq!(stale_disruption(&pod("2026-01-01T11:57:00Z", "Failed"), now), None);
        assert_eq!(stale_disruption(&Pod::default(), now), None);
    }
}
