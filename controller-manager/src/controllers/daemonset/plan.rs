//! What a DaemonSet needs: one pod on each node that fits, the newest template everywhere in the end. Pure.
use super::fit::{Fit, fit, node_of};
use crate::controllers::replicaset::plan::availability;
use apimachinery::pod::{is_ready, is_terminal, phase};
use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, DaemonSetStatus},
        core::v1::{Node, Pod},
    },
    apimachinery::pkg::{apis::meta::v1::Time, util::intstr::IntOrString},
    jiff::Timestamp,
};
use std::{
    cell::Cell,
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

pub const HASH_LABEL: &str = "controller-revision-hash";
pub const GENERATION_LABEL: &str = "pod-template-generation";

/// What to do and what to say of it.
#[derive(Debug, Default)]
pub struct Plan {
    /// Nodes that get a pod.
    pub create: Vec<String>,
    pub delete: Vec<Arc<Pod>>,
    /// Pods that have ended, by their nodes: they are deleted too, and it is told.
    pub ended: Vec<(String, Arc<Pod>)>,
    pub status: DaemonSetStatus,
    pub check_again: Option<Duration>,
}

/// The pods of one node that are to stay, of each template the oldest.
#[derive(Default)]
struct Staying {
    new: Option<Arc<Pod>>,
    old: Option<Arc<Pod>>,
}

/// As `manage`, `rollingUpdate` and `updateDaemonSetStatus`. `resting` are nodes where a pod failed a moment ago.
pub fn plan(
    set: &DaemonSet,
    hash: &str,
    nodes: &[Arc<Node>],
    owned: &[Arc<Pod>],
    resting: &HashSet<String>,
    now: Timestamp,
) -> Plan {
    let Some(spec) = &set.spec else { return Plan::default() };
    let mut on_node: BTreeMap<String, Vec<Arc<Pod>>> = BTreeMap::new();
    // One that has ended and is being deleted is the kubelet's alone.
    for pod in owned.iter().filter(|p| p.metadata.deletion_timestamp.is_none() || !is_terminal(p)) {
        if let Some(node) = node_of(pod) {
            on_node.entry(node).or_default().push(pod.clone());
        }
    }
    on_node.values_mut().for_each(|pods| pods.sort_by_key(|p| age(p)));
    let fits: BTreeMap<&str, Fit> =
        nodes.iter().map(|n| (n.metadata.name.as_deref().unwrap_or_default(), fit(&spec.template, n))).collect();
    let min_ready = spec.min_ready_seconds.unwrap_or(0);
    let wait = Cell::new(None::<Duration>);
    let is_available = |pod: &Pod| match availability(pod, min_ready, now) {
        Ok(()) => true,
        Err(until) => {
            wait.set([wait.get(), until].into_iter().flatten().min());
            false
        }
    };
    let desired = fits.values().filter(|f| **f == Fit::Runs).count();
    let (surge, unavailable) = budget(set, desired);
    let current = Current { hash, generation: template_generation(set) };
    let mut plan = Plan::default();
    let mut status = DaemonSetStatus {
        desired_number_scheduled: count(desired),
        observed_generation: set.metadata.generation,
        collision_count: set.status.as_ref().and_then(|s| s.collision_count),
        conditions: set.status.as_ref().and_then(|s| s.conditions.clone()),
        ..DaemonSetStatus::default()
    };
    let (mut ready, mut available, mut updated) = (0, 0, 0);
    let mut rolling: Vec<(&str, Fit, Option<Staying>)> = Vec::new();
    let none = Vec::new();
    for (node, fit) in &fits {
        let all = on_node.get(*node).unwrap_or(&none);
        if *fit == Fit::Runs {
            status.current_number_scheduled += i32::from(!all.is_empty());
            updated += i32::from(all.first().is_some_and(|p| current.has(p)));
            if let Some(oldest) = all.first().filter(|p| is_ready(p)) {
                ready += 1;
                available += i32::from(is_available(oldest));
            }
        } else {
            status.number_misscheduled += i32::from(!all.is_empty());
        }
        let living = all.iter().filter(|p| p.metadata.deletion_timestamp.is_none());
        if *fit == Fit::No {
            plan.delete.extend(living.cloned());
            // As long as they are there, those that go are not available.
            rolling.extend((!all.is_empty()).then(|| (*node, *fit, Some(Staying::default()))));
            continue;
        }
        if all.is_empty() {
            if *fit == Fit::Runs {
                plan.create.push((*node).to_owned());
                rolling.push((node, *fit, Some(Staying::default())));
            }
            continue;
        }
        let (ended, working): (Vec<&Arc<Pod>>, Vec<&Arc<Pod>>) = living.partition(|p| is_terminal(p));
        let rests = |p: &&&Arc<Pod>| phase(p) == "Failed" && resting.contains(*node);
        plan.ended.extend(ended.iter().filter(|p| !rests(p)).map(|p| ((*node).to_owned(), (*p).clone())));
        let excess = excess(&working, &current, surge > 0, &is_available);
        let stays = |p: &&&Arc<Pod>| !excess.iter().any(|gone| Arc::ptr_eq(gone, p));
        let (new, old): (Vec<&&Arc<Pod>>, Vec<&&Arc<Pod>>) = working.iter().filter(stays).partition(|p| current.has(p));
        // Where one too many goes, what is left is looked at in the next step.
        let staying = excess
            .is_empty()
            .then(|| Staying { new: new.first().map(|p| (**p).clone()), old: old.first().map(|p| (**p).clone()) });
        rolling.push((node, *fit, staying));
        plan.delete.extend(excess);
    }
    // Pods on nodes that are gone are the pod garbage collector's, but nobody else knows those that wait for such a node.
    // As `getUnscheduledPodsWithoutNode`.
    let waits = |p: &&Arc<Pod>| {
        p.metadata.deletion_timestamp.is_none()
            && p.spec.as_ref().is_none_or(|s| s.node_name.as_deref().unwrap_or_default().is_empty())
    };
    let lost = on_node.iter().filter(|(node, _)| !fits.contains_key(node.as_str()));
    plan.delete.extend(lost.flat_map(|(_, pods)| pods.iter().filter(waits).cloned()));
    if rolls(set) {
        if surge > 0 {
            surge_over(&mut plan, &rolling, desired, surge, &is_available);
        } else {
            replace(&mut plan, &rolling, unavailable, &is_available);
        }
    }
    status.number_ready = ready;
    let some = |n: i32| (n != 0).then_some(n);
    status.number_available = some(available);
    status.number_unavailable = some(count(desired) - available);
    status.updated_number_scheduled = some(updated);
    plan.status = status;
    plan.check_again = wait.get();
    plan
}

/// Those that are placed first, then by age. As `podByCreationTimestampAndPhase`.
fn age(pod: &Pod) -> (bool, Option<Time>, Option<String>) {
    let placed = pod.spec.as_ref().is_some_and(|s| s.node_name.as_deref().is_some_and(|n| !n.is_empty()));
    (!placed, pod.metadata.creation_timestamp.clone(), pod.metadata.name.clone())
}

/// Which of a node's pods, the oldest first, are too many: all but one, with a surge all but one of each template as long as the
/// old one works and the new one does not yet. As `podsShouldBeOnNode`.
fn excess(
    working: &[&Arc<Pod>],
    current: &Current<'_>,
    surges: bool,
    is_available: &impl Fn(&Pod) -> bool,
) -> Vec<Arc<Pod>> {
    if !surges {
        return working.iter().skip(1).map(|p| (*p).clone()).collect();
    }
    let (new, old): (Vec<&Arc<Pod>>, Vec<&Arc<Pod>>) = working.iter().copied().partition(|p| current.has(p));
    let mut excess: Vec<Arc<Pod>> = new.iter().skip(1).chain(old.iter().skip(1)).map(|p| (*p).clone()).collect();
    if let (Some(new), Some(old)) = (new.first(), old.first())
        && (!is_ready(old) || is_available(new))
    {
        excess.push((*old).clone());
    }
    excess
}

/// Old pods that do not work go at once, the others as the budget allows.
fn replace(
    plan: &mut Plan,
    nodes: &[(&str, Fit, Option<Staying>)],
    budget: usize,
    is_available: &impl Fn(&Pod) -> bool,
) {
    let (mut busy, mut in_turn) = (0, Vec::new());
    for (_, _, staying) in nodes {
        match staying.as_ref().map(|s| (&s.new, &s.old)) {
            Some((Some(new), None)) => busy += usize::from(!is_available(new)),
            Some((None, Some(old))) if is_available(old) => in_turn.push(old.clone()),
            Some((None, Some(old))) => {
                busy += 1;
                plan.delete.push(old.clone());
            }
            _ => busy += 1,
        }
    }
    plan.delete.extend(in_turn.into_iter().take(budget.saturating_sub(busy)));
}

/// New pods are made beside old ones; what may only stay goes once enough others work.
fn surge_over(
    plan: &mut Plan,
    nodes: &[(&str, Fit, Option<Staying>)],
    desired: usize,
    surge: usize,
    is_available: &impl Fn(&Pod) -> bool,
) {
    let (mut surging, mut working, mut in_turn, mut leaving) = (0, 0, Vec::new(), Vec::new());
    for (node, fit, staying) in nodes {
        let Some(Staying { new, old }) = staying else {
            surging += 1;
            continue;
        };
        working += usize::from(old.as_ref().or(new.as_ref()).is_some_and(|p| is_available(p)));
        match (new, old) {
            (_, None) => {}
            // Else it would be one too many.
            (Some(_), Some(_)) => surging += 1,
            (None, Some(old)) => match (is_available(old), fit) {
                (false, Fit::Runs) => plan.create.push((*node).to_owned()),
                (false, _) => plan.delete.push(old.clone()),
                (true, Fit::Runs) => in_turn.push((*node).to_owned()),
                (true, _) => leaving.push(old.clone()),
            },
        }
    }
    plan.create.extend(in_turn.into_iter().take(surge.saturating_sub(surging)));
    plan.delete.extend(leaving.into_iter().take(working.saturating_sub(desired)));
}

/// What pods of the newest template say of it.
struct Current<'a> {
    hash: &'a str,
    generation: Option<&'a str>,
}

impl Current<'_> {
    /// As `IsPodUpdated`.
    fn has(&self, pod: &Pod) -> bool {
        let label = |key: &str| pod.metadata.labels.as_ref().and_then(|l| l.get(key)).map(String::as_str);
        label(HASH_LABEL) == Some(self.hash)
            || self.generation.is_some_and(|generation| label(GENERATION_LABEL) == Some(generation))
    }
}

/// How many templates there have been, as the API server counts them. As `GetTemplateGeneration`.
pub fn template_generation(set: &DaemonSet) -> Option<&str> {
    let counted = set.metadata.annotations.as_ref()?.get("deprecated.daemonset.template.generation")?;
    counted.parse::<i64>().is_ok().then_some(counted.as_str())
}

fn count(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

fn rolls(set: &DaemonSet) -> bool {
    let kind = set.spec.as_ref().and_then(|s| s.update_strategy.as_ref()?.type_.as_deref());
    kind.unwrap_or("RollingUpdate") == "RollingUpdate"
}

/// Surge and unavailable pods in numbers: percentages of the desired ones, up.
fn budget(set: &DaemonSet, desired: usize) -> (usize, usize) {
    let rolling = set.spec.as_ref().and_then(|s| s.update_strategy.as_ref()?.rolling_update.as_ref());
    let resolve = |value: Option<&IntOrString>, default: usize| match value {
        None => default,
        Some(IntOrString::Int(n)) => usize::try_from(*n).unwrap_or(0),
        Some(IntOrString::String(text)) => {
            let percent = text.strip_suffix('%').and_then(|p| p.parse::<usize>().ok()).unwrap_or(0);
            (desired * percent).div_ceil(100)
        }
    };
    let surge = resolve(rolling.and_then(|r| r.max_surge.as_ref()), 0);
    let unavailable = resolve(rolling.and_then(|r| r.max_unavailable.as_ref()), 1);
    // Both zero would never move.
    (surge, if surge == 0 { unavailable.max(1) } else { unavailable })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn set(strategy: Value) -> DaemonSet {
        serde_json::from_value(json!({"metadata": {"name": "d", "generation": 2}, "spec": {
            "selector": {}, "template": {"spec": {"containers": []}}, "updateStrategy": strategy}}))
        .unwrap()
    }

    fn nodes(count: usize) -> Vec<Arc<Node>> {
        let node = |n| json!({"metadata": {"name": format!("n{n}")}});
        (1..=count).map(|n| Arc::new(serde_json::from_value(node(n)).unwrap())).collect()
    }

    fn pod(node: &str, hash: &str, ready: bool, more: Value) -> Arc<Pod> {
        let mut value = json!({"metadata": {"name": format!("{node}-{hash}"), "labels": {"controller-revision-hash": hash}},
            "spec": {"nodeName": node, "containers": []},
            "status": {"phase": "Running", "conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"}}]}});
        for (k, v) in more.as_object().into_iter().flatten() {
            for (k2, v2) in v.as_object().into_iter().flatten() {
                value[k][k2] = v2.clone();
            }
        }
        Arc::new(serde_json::from_value(value).unwrap())
    }

    fn go(set: &DaemonSet, nodes: &[Arc<Node>], pods: &[Arc<Pod>]) -> (Vec<String>, Vec<String>, DaemonSetStatus) {
        let plan = plan(set, "new", nodes, pods, &HashSet::new(), Timestamp::now());
        let deleted = plan.delete.iter().chain(plan.ended.iter().map(|(_, p)| p));
        (plan.create, deleted.filter_map(|p| p.metadata.name.clone()).collect(), plan.status)
    }

    #[test]
    fn each_node_has_one_pod() {
        let rolling = set(json!(null));
        let (create, delete, status) = go(&rolling, &nodes(3), &[pod("n1", "new", true, json!({}))]);
        assert_eq!((create.len(), delete.len()), (2, 0));
        assert_eq!((status.desired_number_scheduled, status.current_number_scheduled, status.number_ready), (3, 1, 1));
        assert_eq!((status.number_unavailable, status.updated_number_scheduled), (Some(2), Some(1)));
        let ending = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
        assert_eq!(go(&rolling, &nodes(1), &[pod("n1", "new", true, ending)]).0.len(), 0, "first it goes");
        for phase in ["Failed", "Succeeded"] {
            let ended = pod("n1", "new", false, json!({"status": {"phase": phase}}));
            assert_eq!(go(&rolling, &nodes(1), std::slice::from_ref(&ended)).1, ["n1-new"], "{phase}");
            let resting = HashSet::from(["n1".to_owned()]);
            let plan = plan(&rolling, "new", &nodes(1), &[ended], &resting, Timestamp::now());
            assert_eq!(plan.ended.is_empty(), phase == "Failed", "one that failed a moment ago stays a while");
        }
    }

    #[test]
    fn old_pods_are_replaced_within_the_budget() {
        let rolling = set(json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 2}}));
        let old = |n: &str, ready| pod(n, "old", ready, json!({}));
        let all = [old("n1", true), old("n2", true), old("n3", true)];
        assert_eq!(go(&rolling, &nodes(3), &all).1.len(), 2);
        let one_broken = [old("n1", false), old("n2", true), old("n3", true)];
        assert_eq!(go(&rolling, &nodes(3), &one_broken).1, ["n1-old", "n2-old"]);
        let under_way = [pod("n1", "new", false, json!({})), pod("n2", "new", false, json!({})), old("n3", true)];
        assert_eq!(go(&rolling, &nodes(3), &under_way).1.len(), 0);
        let by_hand = set(json!({"type": "OnDelete"}));
        assert_eq!(go(&by_hand, &nodes(3), &all).1.len(), 0);
    }

    #[test]
    fn nodes_that_only_keep_their_pods_take_part_and_waiting_pods_of_none_go() {
        let tainted = |name: &str| {
            let taint = json!([{"key": "mine", "effect": "NoSchedule"}]);
            Arc::new(serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"taints": taint}})).unwrap())
        };
        let rolling = set(json!({"rollingUpdate": {"maxUnavailable": 1}}));
        let old = |n: &str, ready| pod(n, "old", ready, json!({}));
        let new = |n: &str, ready| pod(n, "new", ready, json!({}));
        let kept = [tainted("t1")];
        assert_eq!(go(&rolling, &kept, &[old("t1", true)]).1, ["t1-old"], "it is of no use there any more");
        assert_eq!(go(&rolling, &kept, &[new("t1", true)]).1.len(), 0);
        let failed = pod("t1", "new", false, json!({"status": {"phase": "Failed"}}));
        assert_eq!(go(&rolling, &kept, &[failed]).1, ["t1-new"]);

        let evicting = Arc::new(
            serde_json::from_value(json!({"metadata": {"name": "e1"},
            "spec": {"taints": [{"key": "mine", "effect": "NoExecute"}]}}))
            .unwrap(),
        );
        let and_one = [evicting, nodes(1).remove(0)];
        assert_eq!(go(&rolling, &and_one, &[old("e1", true), old("n1", true)]).1, ["e1-old"], "one at a time");

        let surging = set(json!({"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}));
        let both = [nodes(1).remove(0), tainted("t1")];
        assert_eq!(go(&surging, &both, &[new("n1", false), old("t1", true)]).1.len(), 0, "the only one that works");
        assert_eq!(go(&surging, &both, &[new("n1", true), old("t1", true)]).1, ["t1-old"]);
        assert_eq!(go(&surging, &both, &[new("n1", false), old("t1", false)]).1, ["t1-old"]);

        let term = json!({"nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["gone"]}]}]});
        let meant = json!({"spec": {"nodeName": "", "affinity": {"nodeAffinity":
            {"requiredDuringSchedulingIgnoredDuringExecution": term}}}});
        assert_eq!(go(&rolling, &[], &[pod("gone", "new", false, meant)]).1, ["gone-new"]);
        assert_eq!(go(&rolling, &[], &[new("gone", false)]).1.len(), 0, "the pod garbage collector's");
    }

    #[test]
    fn the_count_of_templates_tells_a_pod_of_the_newest_as_well() {
        let mut counted = set(json!({"rollingUpdate": {"maxUnavailable": 1}}));
        let labelled =
            |n: &str| pod("n1", "of-another-controller", true, json!({"metadata": {"labels": {GENERATION_LABEL: n}}}));
        assert_eq!(go(&counted, &nodes(1), &[labelled("2")]).1.len(), 1);
        let generation = ("deprecated.daemonset.template.generation".to_owned(), "2".to_owned());
        counted.metadata.annotations = Some([generation].into());
        assert_eq!(go(&counted, &nodes(1), &[labelled("2")]).1.len(), 0);
        assert_eq!(go(&counted, &nodes(1), &[labelled("1")]).1.len(), 1);
    }

    #[test]
    fn a_surge_makes_the_new_pod_first() {
        let surging = set(json!({"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}));
        let old = |n: &str| pod(n, "old", true, json!({}));
        let new = |n: &str, ready| pod(n, "new", ready, json!({}));
        let (create, delete, _) = go(&surging, &nodes(2), &[old("n1"), old("n2")]);
        assert_eq!((create, delete.len()), (vec!["n1".to_owned()], 0));
        let (create, delete, _) = go(&surging, &nodes(2), &[old("n1"), new("n1", false), old("n2")]);
        assert_eq!((create.len(), delete.len()), (0, 0));
        let (create, delete, _) = go(&surging, &nodes(2), &[old("n1"), new("n1", true), old("n2")]);
        // What surges is counted anew once the old one is gone.
        assert_eq!((create.len(), delete), (0, vec!["n1-old".to_owned()]));
        let (create, delete, _) = go(&surging, &nodes(2), &[new("n1", true), old("n2")]);
        assert_eq!((create, delete.len()), (vec!["n2".to_owned()], 0));
        let broken = pod("n1", "old", false, json!({}));
        assert_eq!(go(&surging, &nodes(1), &[broken, new("n1", false)]).1, ["n1-old"], "neither works");
    }
}
