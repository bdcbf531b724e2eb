//! Whether nodes are healthy: heartbeats, conditions, taints, zones. Pure.
use k8s_openapi::{
    api::{
        coordination::v1::Lease,
        core::v1::{Node, NodeCondition, Taint},
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use std::time::Duration;
use tokio::time::Instant;

pub const NOT_READY: &str = "node.kubernetes.io/not-ready";
pub const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
pub const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Conditions that a silent kubelet can no longer answer for.
const WATCHED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];
/// Condition, the status at which it taints, the taint.
const NO_SCHEDULE: [(&str, &str, &str); 6] = [
    ("Ready", "False", NOT_READY),
    ("Ready", "Unknown", UNREACHABLE),
    ("MemoryPressure", "True", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "True", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "True", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "True", "node.kubernetes.io/network-unavailable"),
];

/// The Ready condition's status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    NotReady,
    Unknown,
}

/// What is remembered of a node between two looks. Times are this process's: clocks of nodes may be off.
#[derive(Clone, Debug)]
pub struct Record {
    /// The node's.
    pub uid: Option<String>,
    heartbeat: Option<(Option<Timestamp>, Option<Timestamp>)>,
    /// When the heartbeat was last seen to change.
    pub seen: Instant,
    pub readiness: Readiness,
    /// Its pods were told that they are not ready, since the node is not: once, whatever the kubelet says later.
    pub told_pods: bool,
}

/// The outcome of a look at one node.
#[derive(Debug)]
pub struct Assessment {
    pub record: Record,
    /// Conditions to write, if the node fell silent.
    pub conditions: Option<Vec<NodeCondition>>,
    /// The Ready condition afterwards.
    pub readiness: Readiness,
    /// Whether it was ready before.
    pub fell: bool,
    /// Whether its pods are to be told. Of a node that never spoke, and may yet, nothing is known.
    pub tells_pods: bool,
}

pub struct GracePeriods {
    pub monitor: Duration,
    pub startup: Duration,
}

pub fn condition<'a>(node: &'a Node, kind: &str) -> Option<&'a NodeCondition> {
    node.status.iter().flat_map(|s| s.conditions.iter().flatten()).find(|c| c.type_ == kind)
}

pub fn readiness(node: &Node) -> Readiness {
    match condition(node, "Ready").map(|c| c.status.as_str()) {
        Some("True") => Readiness::Ready,
        Some("False") => Readiness::NotReady,
        _ => Readiness::Unknown,
    }
}

/// As `tryUpdateNodeHealth`: a node whose lease and status have not changed for the grace period is unknown.
pub fn assess(
    node: &Node,
    lease: Option<&Lease>,
    former: Option<&Record>,
    grace: &GracePeriods,
    clock: Instant,
    now: Timestamp,
) -> Assessment {
    let ready = condition(node, "Ready");
    let renewed = lease.and_then(|l| l.spec.as_ref()?.renew_time.as_ref().map(|t| t.0));
    let posted = ready.and_then(|c| c.last_heartbeat_time.as_ref().map(|t| t.0));
    let heartbeat = Some((renewed, posted));
    let before = readiness(node);
    let seen = former.filter(|r| r.heartbeat == heartbeat).map_or(clock, |r| r.seen);
    let never_posted = ready.is_none();
    let grace = if never_posted { grace.startup } else { grace.monitor };
    let mut assessment = Assessment {
        record: Record {
            uid: node.metadata.uid.clone(),
            heartbeat,
            seen,
            readiness: before,
            told_pods: former.is_some_and(|r| r.told_pods),
        },
        conditions: None,
        readiness: before,
        fell: false,
        tells_pods: false,
    };
    if clock.saturating_duration_since(seen) > grace {
        let conditions = silent_conditions(node, now);
        if conditions.iter().any(|c| condition(node, &c.type_) != Some(c)) {
            assessment.conditions = Some(conditions);
        }
        assessment.readiness = Readiness::Unknown;
    }
    let was_ready = former.map_or(before, |r| r.readiness) == Readiness::Ready;
    assessment.record.readiness = assessment.readiness;
    assessment.record.told_pods &= assessment.readiness != Readiness::Ready;
    let known = !never_posted || assessment.conditions.is_some();
    assessment.tells_pods = known && assessment.readiness != Readiness::Ready && !assessment.record.told_pods;
    assessment.fell = was_ready && assessment.readiness != Readiness::Ready;
    assessment
}

/// The watched conditions of a node that fell silent.
fn silent_conditions(node: &Node, now: Timestamp) -> Vec<NodeCondition> {
    let created = node.metadata.creation_timestamp.clone();
    WATCHED
        .iter()
        .map(|kind| match condition(node, kind) {
            None => NodeCondition {
                type_: (*kind).to_owned(),
                status: "Unknown".to_owned(),
                reason: Some("NodeStatusNeverUpdated".to_owned()),
                message: Some("Kubelet never posted node status.".to_owned()),
                last_heartbeat_time: created.clone(),
                last_transition_time: Some(Time(now)),
            },
            Some(current) if current.status == "Unknown" => current.clone(),
            Some(current) => NodeCondition {
                status: "Unknown".to_owned(),
                reason: Some("NodeStatusUnknown".to_owned()),
                message: Some("Kubelet stopped posting node status.".to_owned()),
                last_transition_time: Some(Time(now)),
                ..current.clone()
            },
        })
        .collect()
}

/// How a zone fares. As `ComputeZoneState`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ZoneState {
    Normal,
    Partial,
    Full,
}

pub fn zone_state(ready: usize, not_ready: usize, threshold: f64) -> ZoneState {
    let part = not_ready as f64 / (ready + not_ready).max(1) as f64;
    if ready == 0 && not_ready > 0 {
        ZoneState::Full
    } else if not_ready > 2 && part >= threshold {
        ZoneState::Partial
    } else {
        ZoneState::Normal
    }
}

/// `region:\0:zone`, empty if the node has neither. As `GetZoneKey`.
pub fn zone_of(node: &Node) -> String {
    let label = |key: &str| node.metadata.labels.as_ref().and_then(|l| l.get(key)).cloned().unwrap_or_default();
    let (region, zone) = (label("topology.kubernetes.io/region"), label("topology.kubernetes.io/zone"));
    if region.is_empty() && zone.is_empty() { String::new() } else { format!("{region}:\0:{zone}") }
}

fn taints(node: &Node) -> &[Taint] {
    node.spec.as_ref().and_then(|s| s.taints.as_deref()).unwrap_or_default()
}

fn taint(key: &str, effect: &str, now: Timestamp) -> Taint {
    Taint { key: key.to_owned(), effect: effect.to_owned(), value: None, time_added: Some(Time(now)) }
}

/// The node's taints as its conditions ask for; None if they are so. Taints of others are left alone. `evict` says
/// whether an unready node may get the taint that evicts now; one that has it keeps it while it is unready.
pub fn wanted_taints(node: &Node, readiness: Readiness, evict: bool, now: Timestamp) -> Option<Vec<Taint>> {
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    let status = |kind: &str| match (kind, readiness) {
        ("Ready", Readiness::Ready) => "True",
        ("Ready", Readiness::NotReady) => "False",
        ("Ready", Readiness::Unknown) => "Unknown",
        _ => condition(node, kind).map_or("", |c| c.status.as_str()),
    };
    wanted
        .extend(NO_SCHEDULE.iter().filter(|(kind, at, _)| status(kind) == *at).map(|(_, _, key)| (*key, "NoSchedule")));
    if node.spec.as_ref().and_then(|s| s.unschedulable).unwrap_or(false) {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    let evicting = |t: &Taint| t.effect == "NoExecute" && (t.key == NOT_READY || t.key == UNREACHABLE);
    let evicts_already = taints(node).iter().any(evicting);
    if evict || evicts_already {
        match readiness {
            Readiness::NotReady => wanted.push((NOT_READY, "NoExecute")),
            Readiness::Unknown => wanted.push((UNREACHABLE, "NoExecute")),
            Readiness::Ready => {}
        }
    }
    let ours = |t: &Taint| {
        let by_condition = NO_SCHEDULE.iter().any(|(_, _, key)| *key == t.key) || t.key == UNSCHEDULABLE;
        (t.effect == "NoSchedule" && by_condition) || evicting(t)
    };
    let is_wanted = |t: &Taint| wanted.iter().any(|(key, effect)| *key == t.key && *effect == t.effect);
    let mut after: Vec<Taint> = taints(node).iter().filter(|t| !ours(t) || is_wanted(t)).cloned().collect();
    for (key, effect) in &wanted {
        if !after.iter().any(|t| t.key == *key && t.effect == *effect) {
            after.push(taint(key, effect, now));
        }
    }
    (after != taints(node)).then_some(after)
}

/// Whether the node lacks the taint that evicts what does not tolerate an unready node.
pub fn lacks_eviction(node: &Node) -> bool {
    !taints(node).iter().any(|t| t.effect == "NoExecute" && (t.key == NOT_READY || t.key == UNREACHABLE))
}

/// The node's taints without those that evict, for when nearly all nodes seem to have failed.
pub fn without_eviction(node: &Node) -> Option<Vec<Taint>> {
    let evicting = |t: &Taint| t.effect == "NoExecute" && (t.key == NOT_READY || t.key == UNREACHABLE);
    let after: Vec<Taint> = taints(node).iter().filter(|t| !evicting(t)).cloned().collect();
    (after.len() != taints(node).len()).then_some(after)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn node(ready: Option<&str>, spec: Value) -> Node {
        let conditions: Vec<Value> = ready
            .map(|status| json!({"type": "Ready", "status": status, "lastHeartbeatTime": "2026-01-01T00:00:00Z"}))
            .into_iter()
            .collect();
        serde_json::from_value(json!({"metadata": {"name": "n1"}, "spec": spec, "status": {"conditions": conditions}}))
            .unwrap()
    }

    fn lease(renewed: &str) -> Lease {
        serde_json::from_value(json!({"metadata": {}, "spec": {"renewTime": renewed}})).unwrap()
    }

    const GRACE: GracePeriods = GracePeriods { monitor: Duration::from_secs(40), startup: Duration::from_secs(60) };

    #[test]
    fn a_silent_node_becomes_unknown_after_the_grace_period() {
        let start = Instant::now();
        let now = Timestamp::now();
        let node = node(Some("True"), json!({}));
        let at = |s| start + Duration::from_secs(s);
        let first = assess(&node, Some(&lease("2026-01-01T00:00:00.000000Z")), None, &GRACE, at(0), now);
        assert_eq!((first.readiness, first.conditions.is_some()), (Readiness::Ready, false));
        // A lease that is renewed is a heartbeat.
        let renewed = lease("2026-01-01T00:00:10.000000Z");
        let second = assess(&node, Some(&renewed), Some(&first.record), &GRACE, at(10), now);
        let third = assess(&node, Some(&renewed), Some(&second.record), &GRACE, at(45), now);
        assert_eq!((third.readiness, third.fell), (Readiness::Ready, false));
        let fourth = assess(&node, Some(&renewed), Some(&third.record), &GRACE, at(51), now);
        assert_eq!((fourth.readiness, fourth.fell, fourth.tells_pods), (Readiness::Unknown, true, true));
        let conditions = fourth.conditions.unwrap();
        assert_eq!(conditions[0].reason.as_deref(), Some("NodeStatusUnknown"));
        assert_eq!(conditions[1].reason.as_deref(), Some("NodeStatusNeverUpdated"));
        let fifth = assess(&node, Some(&renewed), Some(&fourth.record), &GRACE, at(60), now);
        assert!(!fifth.fell, "it falls once");
    }

    #[test]
    fn a_node_that_never_spoke_has_the_startup_grace() {
        let start = Instant::now();
        let fresh = node(None, json!({}));
        let first = assess(&fresh, None, None, &GRACE, start, Timestamp::now());
        assert!(!first.tells_pods, "it may yet speak");
        let at = |s| start + Duration::from_secs(s);
        assert!(assess(&fresh, None, Some(&first.record), &GRACE, at(50), Timestamp::now()).conditions.is_none());
        assert!(assess(&fresh, None, Some(&first.record), &GRACE, at(61), Timestamp::now()).conditions.is_some());
    }

    #[test]
    fn taints_follow_conditions() {
        let own = json!({"taints": [{"key": "mine", "effect": "NoSchedule"}]});
        let keys = |node: &Node, readiness, evict| {
            wanted_taints(node, readiness, evict, Timestamp::now())
                .map(|t| t.iter().map(|t| format!("{}:{}", t.key, t.effect)).collect::<Vec<_>>())
        };
        let ready = node(Some("True"), own.clone());
        assert_eq!(keys(&ready, Readiness::Ready, true), None);
        let silent = node(Some("Unknown"), own);
        assert_eq!(
            keys(&silent, Readiness::Unknown, false).unwrap(),
            ["mine:NoSchedule", "node.kubernetes.io/unreachable:NoSchedule"]
        );
        assert_eq!(keys(&silent, Readiness::Unknown, true).unwrap().len(), 3);
        // It comes back, but not ready: the evicting taint changes its key without waiting for a turn.
        let tainted = json!({"taints": [{"key": UNREACHABLE, "effect": "NoSchedule"}, {"key": UNREACHABLE, "effect": "NoExecute"}]});
        let back = node(Some("False"), tainted.clone());
        assert_eq!(
            keys(&back, Readiness::NotReady, false).unwrap(),
            ["node.kubernetes.io/not-ready:NoSchedule", "node.kubernetes.io/not-ready:NoExecute"]
        );
        assert_eq!(keys(&node(Some("True"), tainted), Readiness::Ready, false).unwrap(), Vec::<String>::new());
        let cordoned = node(Some("True"), json!({"unschedulable": true}));
        assert_eq!(keys(&cordoned, Readiness::Ready, false).unwrap(), ["node.kubernetes.io/unschedulable:NoSchedule"]);
    }

    #[test]
    fn zones_fail_in_part_or_whole() {
        for (ready, not_ready, expected) in [
            (0, 0, ZoneState::Normal),
            (1, 1, ZoneState::Normal),
            (0, 1, ZoneState::Full),
            (1, 2, ZoneState::Normal),
            (2, 3, ZoneState::Partial),
            (10, 3, ZoneState::Normal),
        ] {
            assert_eq!(zone_state(ready, not_ready, 0.55), expected, "{ready} {not_ready}");
        }
    }
}
