//! What a DaemonSet needs: one pod on each node that fits, the newest template everywhere in the end. Pure.
use super::fit::{Fit, fit, node_of};
use crate::controllers::replicaset::plan::availability;
use apimachinery::pod::{is_ready, is_terminal, phase};
use k8s_openapi::{
    api::{
        apps::v1::{DaemonSet, DaemonSetStatus},
        core::v1::{Node, Pod},
    },
    apimachinery::pkg::util::intstr::IntOrString,
    jiff::Timestamp,
};
use std::{
    collections::{BTreeMap, HashSet},
    sync::Arc,
    time::Duration,
};

pub const HASH_LABEL: &str = "controller-revision-hash";

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
    for pod in owned {
        if let Some(node) = node_of(pod) {
            on_node.entry(node).or_default().push(pod.clone());
        }
    }
    on_node
        .values_mut()
        .for_each(|pods| pods.sort_by_key(|p| (p.metadata.creation_timestamp.clone(), p.metadata.name.clone())));
    let fits: BTreeMap<&str, Fit> =
        nodes.iter().map(|n| (n.metadata.name.as_deref().unwrap_or_default(), fit(&spec.template, n))).collect();
    let min_ready = spec.min_ready_seconds.unwrap_or(0);
    let mut wait: Option<Duration> = None;
    let mut is_available = |pod: &Pod| match availability(pod, min_ready, now) {
        Ok(()) => true,
        Err(until) => {
            wait = match (wait, until) {
                (Some(a), Some(b)) => Some(a.min(b)),
                (a, b) => a.or(b),
            };
            false
        }
    };
    let desired = fits.values().filter(|f| **f == Fit::Runs).count();
    let (surge, unavailable) = budget(set, desired);
    let mut plan = Plan::default();
    let mut status = DaemonSetStatus {
        desired_number_scheduled: count(desired),
        observed_generation: set.metadata.generation,
        collision_count: set.status.as_ref().and_then(|s| s.collision_count),
        conditions: set.status.as_ref().and_then(|s| s.conditions.clone()),
        ..DaemonSetStatus::default()
    };
    let (mut ready, mut available, mut updated) = (0, 0, 0);
    // Old pods that may be replaced: those that do not work at once, the others as the budget allows.
    let (mut replace_now, mut replace_in_turn, mut busy, mut surging) = (Vec::new(), Vec::new(), 0, 0);
    let none = Vec::new();
    for (node, fit) in &fits {
        let all = on_node.get(*node).unwrap_or(&none);
        let living: Vec<&Arc<Pod>> = all.iter().filter(|p| p.metadata.deletion_timestamp.is_none()).collect();
        let (ended, working): (Vec<&Arc<Pod>>, Vec<&Arc<Pod>>) = living.into_iter().partition(|p| is_terminal(p));
        if *fit != Fit::Runs {
            status.number_misscheduled += i32::from(!all.is_empty());
            if *fit == Fit::No {
                plan.delete.extend(working.into_iter().chain(ended).cloned());
            }
            continue;
        }
        let rests = |p: &&&Arc<Pod>| phase(p) == "Failed" && resting.contains(*node);
        plan.ended.extend(ended.iter().filter(|p| !rests(p)).map(|p| ((*node).to_owned(), (*p).clone())));
        status.current_number_scheduled += i32::from(!all.is_empty());
        if let Some(oldest) = all.first() {
            let newest = all.iter().rev().find(|p| is_current(p, hash)).unwrap_or(oldest);
            ready += i32::from(is_ready(newest) && newest.metadata.deletion_timestamp.is_none());
            available += i32::from(newest.metadata.deletion_timestamp.is_none() && is_available(newest));
            updated += i32::from(is_current(newest, hash));
        }
        if all.is_empty() {
            plan.create.push((*node).to_owned());
            busy += 1;
            continue;
        }
        let new: Vec<&&Arc<Pod>> = working.iter().filter(|p| is_current(p, hash)).collect();
        let old: Vec<&&Arc<Pod>> = working.iter().filter(|p| !is_current(p, hash)).collect();
        // Of each kind the oldest stays; without a surge one of both kinds.
        let extra = new.iter().skip(1).chain(old.iter().skip(1)).map(|p| (**p).clone());
        plan.delete.extend(extra);
        match (new.first(), old.first()) {
            (Some(new), Some(old)) => {
                if surge == 0 {
                    // Both are there because someone made one by hand: the older stays.
                    plan.delete.push(if new.metadata.creation_timestamp < old.metadata.creation_timestamp {
                        (**old).clone()
                    } else {
                        (**new).clone()
                    });
                    busy += 1;
                } else if is_available(new) {
                    plan.delete.push((**old).clone());
                } else {
                    surging += 1;
                }
            }
            (Some(new), None) => busy += usize::from(!is_available(new)),
            (None, Some(old)) => {
                if is_available(old) {
                    replace_in_turn.push(((*node).to_owned(), (**old).clone()));
                } else {
                    busy += 1;
                    replace_now.push(((*node).to_owned(), (**old).clone()));
                }
            }
            (None, None) => busy += 1,
        }
    }
    // Pods of nodes that are gone are the pod garbage collector's.
    if rolls(set) {
        let room = if surge > 0 { surge.saturating_sub(surging) } else { unavailable.saturating_sub(busy) };
        let next = replace_now.into_iter().chain(replace_in_turn.into_iter().take(room));
        for (node, old) in next {
            if surge > 0 { plan.create.push(node) } else { plan.delete.push(old) }
        }
    }
    status.number_ready = ready;
    let some = |n: i32| (n != 0).then_some(n);
    status.number_available = some(available);
    status.number_unavailable = some(count(desired) - available);
    status.updated_number_scheduled = some(updated);
    plan.status = status;
    plan.check_again = wait;
    plan
}

fn count(n: usize) -> i32 {
    i32::try_from(n).unwrap_or(i32::MAX)
}

fn is_current(pod: &Pod, hash: &str) -> bool {
    pod.metadata.labels.as_ref().and_then(|l| l.get(HASH_LABEL)).map(String::as_str) == Some(hash)
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
    fn a_surge_makes_the_new_pod_first() {
        let surging = set(json!({"rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}}));
        let old = |n: &str| pod(n, "old", true, json!({}));
        let new = |n: &str, ready| pod(n, "new", ready, json!({}));
        let (create, delete, _) = go(&surging, &nodes(2), &[old("n1"), old("n2")]);
        assert_eq!((create, delete.len()), (vec!["n1".to_owned()], 0));
        let (create, delete, _) = go(&surging, &nodes(2), &[old("n1"), new("n1", false), old("n2")]);
        assert_eq!((create.len(), delete.len()), (0, 0));
        let (create, delete, _) = go(&surging, &nodes(2), &[old("n1"), new("n1", true), old("n2")]);
        assert_eq!((create, delete), (vec!["n2".to_owned()], vec!["n1-old".to_owned()]));
    }
}
