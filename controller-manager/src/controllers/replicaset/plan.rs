//! What a ReplicaSet needs: pods to make, pods to delete and in which order, its status. Pure.
use apimachinery::pod::{condition, is_active, is_ready, is_terminal, phase};
use k8s_openapi::{
    api::{
        apps::v1::{ReplicaSetCondition, ReplicaSetStatus},
        core::v1::{ContainerStatus, Pod},
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use std::{cmp::Ordering, collections::BTreeMap, collections::HashMap, sync::Arc, time::Duration};

/// Pods made or deleted in one step, so that a mistake in an object shows before it fills the cluster.
pub const BURST_REPLICAS: usize = 500;

/// How to make the pods as many as there should be. As `manageReplicas`.
#[derive(Debug, PartialEq)]
pub enum Scaling {
    Enough,
    Create(usize),
    Delete(Vec<Arc<Pod>>),
}

/// `related` gives the pods, of whatever set of the same owner, that tell how crowded a node is.
pub fn scaling(replicas: i32, owned: &[Arc<Pod>], related: impl FnOnce() -> Vec<Arc<Pod>>, now: Timestamp) -> Scaling {
    let count = owned.iter().filter(|p| is_active(p)).count();
    let wanted = usize::try_from(replicas).unwrap_or(0);
    match count.cmp(&wanted) {
        Ordering::Equal => Scaling::Enough,
        Ordering::Less => Scaling::Create((wanted - count).min(BURST_REPLICAS)),
        Ordering::Greater => {
            let active = owned.iter().filter(|p| is_active(p)).cloned().collect();
            Scaling::Delete(victims(active, &related(), (count - wanted).min(BURST_REPLICAS), now))
        }
    }
}

/// The pods that will be missed least. As `getPodsToDelete` with `ActivePodsWithRanks`.
fn victims(mut active: Vec<Arc<Pod>>, related: &[Arc<Pod>], count: usize, now: Timestamp) -> Vec<Arc<Pod>> {
    if count < active.len() {
        let mut on_node: HashMap<&str, usize> = HashMap::new();
        for pod in related.iter().filter(|p| is_active(p)) {
            *on_node.entry(node(pod)).or_default() += 1;
        }
        active.sort_by(|a, b| deletion_order(a, b, &on_node, now));
    }
    active.truncate(count);
    active
}

fn deletion_order(a: &Pod, b: &Pod, on_node: &HashMap<&str, usize>, now: Timestamp) -> Ordering {
    let crowd = |p: &Pod| on_node.get(node(p)).copied().unwrap_or(0);
    // Unassigned before assigned.
    let order = (!node(a).is_empty()).cmp(&!node(b).is_empty());
    let order = order.then_with(|| phase_rank(a).cmp(&phase_rank(b)));
    // Not ready before ready.
    let order = order.then_with(|| is_ready(a).cmp(&is_ready(b)));
    // Cheap before dear.
    let order = order.then_with(|| deletion_cost(a).cmp(&deletion_cost(b)));
    // From crowded nodes before others.
    let order = order.then_with(|| crowd(b).cmp(&crowd(a)));
    // Ready for a short time before ready for long, compared by magnitude.
    let order = order.then_with(|| match (is_ready(a), is_ready(b)) {
        (true, true) => magnitude(ready_since(a), now).cmp(&magnitude(ready_since(b), now)),
        _ => Ordering::Equal,
    });
    // Restarted often before seldom.
    let order = order.then_with(|| restarts(b).cmp(&restarts(a)));
    let order = order.then_with(|| magnitude(created(a), now).cmp(&magnitude(created(b), now)));
    // Within a magnitude by chance. Kubernetes leaves it to chance for pods whose times differ, and goes on for others: then
    // three pods can each come before the next, all around.
    order.then_with(|| a.metadata.uid.cmp(&b.metadata.uid))
}

/// How long ago, as the number of binary digits of the seconds; without a time it is before all others.
fn magnitude(time: Option<Timestamp>, now: Timestamp) -> Option<u32> {
    let seconds = now.duration_since(time?).as_secs();
    Some(if seconds <= 0 { 0 } else { 64 - seconds.leading_zeros() })
}

fn node(pod: &Pod) -> &str {
    pod.spec.as_ref().and_then(|s| s.node_name.as_deref()).unwrap_or("")
}

fn phase_rank(pod: &Pod) -> u8 {
    match phase(pod) {
        "Running" => 2,
        "Unknown" => 1,
        _ => 0,
    }
}

fn deletion_cost(pod: &Pod) -> i32 {
    let annotations = pod.metadata.annotations.as_ref();
    annotations.and_then(|a| a.get("controller.kubernetes.io/pod-deletion-cost")?.parse().ok()).unwrap_or(0)
}

fn ready_since(pod: &Pod) -> Option<Timestamp> {
    condition(pod, "Ready").filter(|c| c.status == "True")?.last_transition_time.as_ref().map(|t| t.0)
}

fn created(pod: &Pod) -> Option<Timestamp> {
    pod.metadata.creation_timestamp.as_ref().map(|t| t.0)
}

/// Of its containers, and among equals of its sidecars: the informer keeps no other init containers' statuses.
/// As `maxContainerRestarts`.
fn restarts(pod: &Pod) -> (i32, i32) {
    let most = |statuses: Option<&Vec<ContainerStatus>>| {
        statuses.into_iter().flatten().map(|s| s.restart_count).max().unwrap_or(0)
    };
    let status = pod.status.as_ref();
    (
        most(status.and_then(|s| s.container_statuses.as_ref())),
        most(status.and_then(|s| s.init_container_statuses.as_ref())),
    )
}

/// Ready for at least `min_ready_seconds`; else how long it takes until then. As `IsPodAvailable`.
pub fn availability(pod: &Pod, min_ready_seconds: i32, now: Timestamp) -> Result<(), Option<Duration>> {
    if !is_ready(pod) {
        return Err(None);
    }
    if min_ready_seconds <= 0 {
        return Ok(());
    }
    let Some(since) = ready_since(pod) else { return Err(None) };
    let ready_for = now.duration_since(since);
    let missing = i64::from(min_ready_seconds) * 1000 - i64::try_from(ready_for.as_millis()).unwrap_or(i64::MAX);
    match u64::try_from(missing) {
        Ok(0) | Err(_) => Ok(()),
        Ok(wait_ms) => Err(Some(Duration::from_millis(wait_ms))),
    }
}

/// What the status is computed from.
pub struct Observed<'a> {
    pub generation: Option<i64>,
    pub template_labels: Option<&'a BTreeMap<String, String>>,
    pub min_ready_seconds: i32,
    pub owned: &'a [Arc<Pod>],
    /// What went wrong in this step: reason and message.
    pub failure: Option<(&'static str, String)>,
}

/// The status, and when to look again because a pod will have been ready for long enough. As `calculateStatus`.
pub fn status(
    observed: &Observed<'_>,
    former: &ReplicaSetStatus,
    now: Timestamp,
) -> (ReplicaSetStatus, Option<Duration>) {
    let (mut labelled, mut ready, mut available, mut wait) = (0, 0, 0, None::<Duration>);
    let active: Vec<_> = observed.owned.iter().filter(|p| is_active(p)).collect();
    for pod in &active {
        let has = |k: &String, v: &String| pod.metadata.labels.as_ref().and_then(|l| l.get(k)) == Some(v);
        labelled += i32::from(observed.template_labels.into_iter().flatten().all(|(k, v)| has(k, v)));
        ready += i32::from(is_ready(pod));
        match availability(pod, observed.min_ready_seconds, now) {
            Ok(()) => available += 1,
            Err(Some(until)) => wait = Some(wait.map_or(until, |w| w.min(until))),
            Err(None) => {}
        }
    }
    let terminating =
        observed.owned.iter().filter(|p| p.metadata.deletion_timestamp.is_some() && !is_terminal(p)).count();
    let status = ReplicaSetStatus {
        replicas: i32::try_from(active.len()).unwrap_or(i32::MAX),
        fully_labeled_replicas: Some(labelled),
        ready_replicas: Some(ready),
        available_replicas: Some(available),
        terminating_replicas: Some(i32::try_from(terminating).unwrap_or(i32::MAX)),
        observed_generation: observed.generation.max(former.observed_generation),
        conditions: failure_condition(observed.failure.as_ref(), former.conditions.as_deref(), now),
    };
    (status, wait)
}

fn failure_condition(
    failure: Option<&(&'static str, String)>,
    former: Option<&[ReplicaSetCondition]>,
    now: Timestamp,
) -> Option<Vec<ReplicaSetCondition>> {
    const TYPE: &str = "ReplicaFailure";
    let mut conditions: Vec<_> = former.unwrap_or_default().to_vec();
    let there = conditions.iter().position(|c| c.type_ == TYPE);
    match (failure, there) {
        (Some((reason, message)), None) => conditions.push(ReplicaSetCondition {
            type_: TYPE.to_owned(),
            status: "True".to_owned(),
            reason: Some((*reason).to_owned()),
            message: Some(message.clone()),
            last_transition_time: Some(Time(now)),
        }),
        (None, Some(at)) => {
            conditions.remove(at);
        }
        _ => {}
    }
    (!conditions.is_empty()).then_some(conditions)
}

/// Whether two statuses say the same (numbers that are absent are zero).
pub fn same_status(a: &ReplicaSetStatus, b: &ReplicaSetStatus) -> bool {
    let numbers = |s: &ReplicaSetStatus| {
        let zero = |n: Option<i32>| n.unwrap_or(0);
        (
            s.replicas,
            zero(s.fully_labeled_replicas),
            zero(s.ready_replicas),
            zero(s.available_replicas),
            zero(s.terminating_replicas),
            s.observed_generation,
        )
    };
    numbers(a) == numbers(b)
        && a.conditions.as_deref().unwrap_or_default() == b.conditions.as_deref().unwrap_or_default()
}

/// Whether there is news of pods that come up and more such news to come, or of nothing but pods that are gone for good: what is
/// complete, what fails and what is lost is told at once.
pub fn can_wait(now: &ReplicaSetStatus, former: &ReplicaSetStatus, replicas: i32) -> bool {
    let zero = |n: Option<i32>| n.unwrap_or(0);
    let (ready, available) = (zero(now.ready_replicas), zero(now.available_replicas));
    let complete = [now.replicas, ready, available] == [replicas; 3];
    let lost = ready < zero(former.ready_replicas) || available < zero(former.available_replicas);
    let conditions = |status: &ReplicaSetStatus| status.conditions.clone().unwrap_or_default();
    let gone = ReplicaSetStatus { terminating_replicas: former.terminating_replicas, ..now.clone() };
    same_status(&gone, former) || !complete && !lost && conditions(now) == conditions(former)
}

/// All that [`status`] and [`scaling`] count a pod by.
pub fn counts(pod: &Pod) -> impl PartialEq {
    let ready_since = is_ready(pod).then(|| ready_since(pod));
    let meta = &pod.metadata;
    (is_terminal(pod), ready_since, meta.deletion_timestamp.is_some(), &meta.labels, &meta.owner_references)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    const NOW: &str = "2026-01-01T12:00:00Z";

    fn now() -> Timestamp {
        NOW.parse().unwrap()
    }

    fn pod(name: &str, parts: Value) -> Arc<Pod> {
        let mut value = json!({"metadata": {"name": name, "uid": name, "creationTimestamp": "2026-01-01T11:00:00Z",
            "labels": {"app": "web"}}, "spec": {"nodeName": "n1", "containers": []}, "status": {"phase": "Running"}});
        merge(&mut value, parts);
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn merge(to: &mut Value, from: Value) {
        match (to, from) {
            (Value::Object(to), Value::Object(from)) => {
                from.into_iter().for_each(|(k, v)| merge(to.entry(k).or_insert(Value::Null), v));
            }
            (to, from) => *to = from,
        }
    }

    fn ready(since: &str) -> Value {
        json!({"status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": since}]}})
    }

    #[test]
    fn as_many_pods_as_replicas() {
        let running = pod("a", json!({}));
        let going = pod("b", json!({"metadata": {"deletionTimestamp": NOW}}));
        let failed = pod("c", json!({"status": {"phase": "Failed"}}));
        let all = [running.clone(), going, failed];
        assert_eq!(scaling(1, &all, || all.to_vec(), now()), Scaling::Enough);
        assert_eq!(scaling(3, &all, || all.to_vec(), now()), Scaling::Create(2));
        assert_eq!(scaling(2000, &all, || all.to_vec(), now()), Scaling::Create(BURST_REPLICAS));
        assert_eq!(scaling(0, &all, || all.to_vec(), now()), Scaling::Delete(vec![running]));
    }

    #[test]
    fn pods_go_in_kubernetes_order() {
        // Each pair: the first goes before the second.
        let early = ready("2026-01-01T11:00:00Z");
        let late = ready("2026-01-01T11:59:00Z");
        let with = |mut a: Value, b: Value| {
            merge(&mut a, b);
            a
        };
        for (name, first, second) in [
            ("unassigned", json!({"spec": {"nodeName": ""}}), json!({})),
            ("pending", json!({"status": {"phase": "Pending"}}), json!({"status": {"phase": "Running"}})),
            ("not ready", json!({}), early.clone()),
            (
                "cheap",
                with(
                    early.clone(),
                    json!({"metadata": {"annotations": {"controller.kubernetes.io/pod-deletion-cost": "-1"}}}),
                ),
                early.clone(),
            ),
            ("crowded", with(early.clone(), json!({"spec": {"nodeName": "crowded"}})), early.clone()),
            ("ready late", late, early.clone()),
            (
                "restarted",
                json!({"status": {"containerStatuses": [
                    {"name": "c", "restartCount": 2, "image": "", "imageID": "", "ready": false}]}}),
                json!({}),
            ),
            ("young", json!({"metadata": {"creationTimestamp": "2026-01-01T11:59:59Z"}}), json!({})),
        ] {
            let (a, b) = (pod("zz-first", first), pod("aa-second", second));
            let mut related = vec![a.clone(), b.clone()];
            related.extend((0..3).map(|i| pod(&format!("r{i}"), json!({"spec": {"nodeName": "crowded"}}))));
            let Scaling::Delete(gone) = scaling(1, &[b, a], || related.clone(), now()) else { panic!("{name}") };
            assert_eq!(gone[0].metadata.name.as_deref(), Some("zz-first"), "{name}");
        }
    }

    #[test]
    fn the_order_of_deletion_is_one_of_all_pods() {
        let times = ["2026-01-01T11:00:00Z", "2026-01-01T11:00:01Z", "2026-01-01T11:00:02Z", "2026-01-01T11:59:50Z"];
        let mut pods = Vec::new();
        for created in times {
            for ready_at in [None, Some(times[0]), Some(times[1])] {
                for uid in ["a", "b", "c"] {
                    let mut parts = ready_at.map_or_else(|| json!({}), ready);
                    merge(&mut parts, json!({"metadata": {"creationTimestamp": created, "uid": uid}}));
                    pods.push(pod("p", parts));
                }
            }
        }
        let order = |a: usize, b: usize| deletion_order(&pods[a], &pods[b], &HashMap::new(), now());
        let mut sorted: Vec<usize> = (0..pods.len()).collect();
        sorted.sort_by(|a, b| order(*a, *b));
        for (at, a) in sorted.iter().enumerate() {
            for b in &sorted[at..] {
                assert_ne!(order(*a, *b), Ordering::Greater, "{:?} {:?}", pods[*a].metadata, pods[*b].metadata);
                assert_eq!(order(*b, *a), order(*a, *b).reverse());
            }
        }
    }

    #[test]
    fn status_counts_and_waits_for_availability() {
        let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
        let owned = [
            pod("old", ready("2026-01-01T11:00:00Z")),
            pod("new", ready("2026-01-01T11:59:55Z")),
            pod("unlabelled", json!({"metadata": {"labels": {"app": "x"}}})),
            pod("going", json!({"metadata": {"deletionTimestamp": NOW}})),
            pod("done", json!({"status": {"phase": "Succeeded"}})),
        ];
        let observed = Observed {
            generation: Some(4),
            template_labels: Some(&labels),
            min_ready_seconds: 10,
            owned: &owned,
            failure: None,
        };
        let (got, wait) = status(&observed, &ReplicaSetStatus::default(), now());
        assert_eq!((got.replicas, got.fully_labeled_replicas), (3, Some(2)));
        assert_eq!((got.ready_replicas, got.available_replicas, got.terminating_replicas), (Some(2), Some(1), Some(1)));
        assert_eq!((got.observed_generation, wait), (Some(4), Some(Duration::from_secs(5))));
    }

    #[test]
    fn news_of_pods_that_come_up_can_wait_and_other_news_cannot() {
        let status = |replicas, ready| ReplicaSetStatus {
            replicas,
            ready_replicas: Some(ready),
            available_replicas: Some(ready),
            ..ReplicaSetStatus::default()
        };
        for (former, now, can) in [
            ((0, 0), (2, 0), true),
            ((3, 0), (3, 1), true),
            ((3, 1), (3, 3), false),
            ((3, 3), (3, 2), false),
            ((5, 5), (3, 3), false),
        ] {
            assert_eq!(can_wait(&status(now.0, now.1), &status(former.0, former.1), 3), can, "{former:?} {now:?}");
        }
        let going = ReplicaSetStatus { terminating_replicas: Some(2), ..status(3, 3) };
        assert!(can_wait(&status(3, 3), &going, 3) && !can_wait(&status(3, 3), &status(3, 2), 3));
        let mut failed = status(2, 2);
        failed.conditions = Some(vec![ReplicaSetCondition::default()]);
        assert!(!can_wait(&failed, &status(2, 2), 3));
        let (waits, placed) = (pod("a", json!({})), pod("a", json!({"spec": {"nodeName": "n2"}})));
        let ready = pod("a", ready(NOW));
        let starts = json!({"status": {"phase": "Pending", "conditions": [{"type": "Ready", "status": "False"}]}});
        assert!([placed, pod("a", starts)].iter().all(|other| counts(&waits) == counts(other)));
        let failed = pod("a", json!({"status": {"phase": "Failed"}}));
        assert!([ready, failed].iter().all(|other| counts(&waits) != counts(other)));
    }

    #[test]
    fn a_failure_is_a_condition_until_it_is_over() {
        let observed = |failure| Observed {
            generation: Some(1),
            template_labels: None,
            min_ready_seconds: 0,
            owned: &[],
            failure,
        };
        let failure = Some(("FailedCreate", "no quota".to_owned()));
        let (failed, _) = status(&observed(failure.clone()), &ReplicaSetStatus::default(), now());
        assert_eq!(failed.conditions.as_ref().unwrap()[0].reason.as_deref(), Some("FailedCreate"));
        let later = now() + Duration::from_secs(60);
        let (again, _) = status(&observed(failure), &failed, later);
        assert!(same_status(&failed, &again), "the condition keeps its time");
        let (cured, _) = status(&observed(None), &again, later);
        assert_eq!(cured.conditions, None);
    }
}
