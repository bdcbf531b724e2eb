//! What a Deployment says about its ReplicaSets: which is the new one, revisions, annotations, sizes. Pure.
use apimachinery::names::pod_template_hash;
use k8s_openapi::{
    api::{
        apps::v1::{Deployment, DeploymentSpec, ReplicaSet, ReplicaSetSpec},
        core::v1::PodTemplateSpec,
    },
    apimachinery::pkg::{
        apis::meta::v1::{LabelSelector, ObjectMeta},
        util::intstr::IntOrString,
    },
};
use std::{cmp::Ordering, collections::BTreeMap, sync::Arc};

pub const HASH_LABEL: &str = "pod-template-hash";
pub const REVISION: &str = "deployment.kubernetes.io/revision";
pub const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
pub const DESIRED_REPLICAS: &str = "deployment.kubernetes.io/desired-replicas";
pub const MAX_REPLICAS: &str = "deployment.kubernetes.io/max-replicas";
/// The revision to go back to, 0 for the one before: what was a field of the spec once.
pub const ROLLBACK_TO: &str = "deprecated.deployment.rollback.to";
/// Annotations of a Deployment that are not copied to its sets.
const NOT_COPIED: [&str; 6] = [
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED_REPLICAS,
    MAX_REPLICAS,
    ROLLBACK_TO,
];
/// The history annotation is cut at this length, the oldest first.
const MAX_REVISION_HISTORY: usize = 2000;

pub fn spec(deployment: &Deployment) -> DeploymentSpec {
    deployment.spec.clone().unwrap_or_default()
}

pub fn desired(deployment: &Deployment) -> i32 {
    deployment.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
}

pub fn size(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|s| s.replicas).unwrap_or(1)
}

pub fn available(set: &ReplicaSet) -> i32 {
    set.status.as_ref().and_then(|s| s.available_replicas).unwrap_or(0)
}

pub fn name(set: &ReplicaSet) -> &str {
    set.metadata.name.as_deref().unwrap_or_default()
}

pub fn total_size<'a>(sets: impl IntoIterator<Item = &'a Arc<ReplicaSet>>) -> i32 {
    sets.into_iter().map(|set| size(set)).sum()
}

pub fn is_rolling(deployment: &Deployment) -> bool {
    let kind = deployment.spec.as_ref().and_then(|s| s.strategy.as_ref()?.type_.as_deref());
    kind.unwrap_or("RollingUpdate") == "RollingUpdate"
}

/// Surge and unavailable pods in numbers; percentages of the replicas, up and down. As `ResolveFenceposts`.
pub fn fenceposts(deployment: &Deployment) -> (i32, i32) {
    let rolling = deployment.spec.as_ref().and_then(|s| s.strategy.as_ref()?.rolling_update.as_ref());
    let surge = resolve(rolling.and_then(|r| r.max_surge.as_ref()), desired(deployment), true);
    let unavailable = resolve(rolling.and_then(|r| r.max_unavailable.as_ref()), desired(deployment), false);
    // Both zero would never move: validation forbids it, but percentages may round to it.
    if surge == 0 && unavailable == 0 { (0, 1) } else { (surge, unavailable) }
}

/// Of an absent value: 25 %, the API's default.
fn resolve(value: Option<&IntOrString>, total: i32, up: bool) -> i32 {
    let percent = |p: i64| {
        let scaled = i64::from(total) * p;
        let rounded = if up { (scaled + 99).div_euclid(100) } else { scaled.div_euclid(100) };
        i32::try_from(rounded).unwrap_or(i32::MAX)
    };
    match value {
        None => percent(25),
        Some(IntOrString::Int(number)) => (*number).max(0),
        Some(IntOrString::String(text)) => {
            text.strip_suffix('%').and_then(|n| n.parse::<i64>().ok()).map_or(0, |p| percent(p.max(0)))
        }
    }
}

pub fn max_surge(deployment: &Deployment) -> i32 {
    if is_rolling(deployment) { fenceposts(deployment).0 } else { 0 }
}

/// As `MaxUnavailable`.
pub fn max_unavailable(deployment: &Deployment) -> i32 {
    if !is_rolling(deployment) || desired(deployment) == 0 {
        return 0;
    }
    fenceposts(deployment).1.min(desired(deployment))
}

/// Templates that differ in nothing but the hash label. As `EqualIgnoreHash`.
pub fn same_template(a: &PodTemplateSpec, b: &PodTemplateSpec) -> bool {
    fn labels(t: &PodTemplateSpec) -> BTreeMap<&String, &String> {
        let labels = t.metadata.iter().flat_map(|m| m.labels.iter().flatten());
        labels.filter(|(k, _)| *k != HASH_LABEL).collect()
    }
    fn annotations(t: &PodTemplateSpec) -> BTreeMap<&String, &String> {
        t.metadata.iter().flat_map(|m| m.annotations.iter().flatten()).collect()
    }
    a.spec == b.spec && labels(a) == labels(b) && annotations(a) == annotations(b)
}

pub fn by_creation(a: &ReplicaSet, b: &ReplicaSet) -> Ordering {
    a.metadata.creation_timestamp.cmp(&b.metadata.creation_timestamp).then_with(|| name(a).cmp(name(b)))
}

/// The larger first; among equals the newer first.
pub fn by_size_newer(a: &ReplicaSet, b: &ReplicaSet) -> Ordering {
    size(b).cmp(&size(a)).then_with(|| by_creation(b, a))
}

/// The larger first; among equals the older first.
pub fn by_size_older(a: &ReplicaSet, b: &ReplicaSet) -> Ordering {
    size(b).cmp(&size(a)).then_with(|| by_creation(a, b))
}

pub fn annotation<'a>(meta: &'a ObjectMeta, key: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(key).map(String::as_str)
}

pub fn number(meta: &ObjectMeta, key: &str) -> Option<i32> {
    annotation(meta, key)?.parse().ok()
}

pub fn revision(meta: &ObjectMeta) -> i64 {
    annotation(meta, REVISION).and_then(|r| r.parse().ok()).unwrap_or(0)
}

/// Sets an annotation; true if that changed anything.
pub fn annotate(meta: &mut ObjectMeta, key: &str, value: impl Into<String>) -> bool {
    let value = value.into();
    let annotations = meta.annotations.get_or_insert_default();
    if annotations.get(key) == Some(&value) {
        return false;
    }
    annotations.insert(key.to_owned(), value);
    true
}

/// What a set remembers of how large its Deployment was. As `SetReplicasAnnotations`.
pub fn annotate_sizes(meta: &mut ObjectMeta, deployment: &Deployment) -> bool {
    let (desired, surge) = (desired(deployment), max_surge(deployment));
    let changed = annotate(meta, DESIRED_REPLICAS, desired.to_string());
    annotate(meta, MAX_REPLICAS, (desired + surge).to_string()) || changed
}

/// Brings the new set's annotations up to the Deployment's; true if that changed anything.
/// As `SetNewReplicaSetAnnotations`.
pub fn annotate_new(meta: &mut ObjectMeta, deployment: &Deployment, new_revision: i64, exists: bool) -> bool {
    let mut changed = false;
    for (key, value) in deployment.metadata.annotations.iter().flatten() {
        if !NOT_COPIED.contains(&key.as_str()) {
            changed |= annotate(meta, key, value.clone());
        }
    }
    let old = annotation(meta, REVISION).map(str::to_owned);
    if old.as_deref().and_then(|r| r.parse::<i64>().ok()).unwrap_or(0) < new_revision {
        changed |= annotate(meta, REVISION, new_revision.to_string());
        // A set that comes back remembers the revisions that it was before.
        if let Some(old) = old.filter(|_| exists) {
            let history = annotation(meta, REVISION_HISTORY).unwrap_or_default();
            let mut all: Vec<&str> = history.split(',').filter(|r| !r.is_empty()).collect();
            all.push(&old);
            while all.len() > 1 && all.iter().map(|r| r.len() + 1).sum::<usize>() - 1 > MAX_REVISION_HISTORY {
                all.remove(0);
            }
            let history = all.join(",");
            changed |= annotate(meta, REVISION_HISTORY, history);
        }
    }
    if !exists {
        changed |= annotate_sizes(meta, deployment);
    }
    changed
}

/// As `getRollbackTo`.
pub fn rollback_to(deployment: &Deployment) -> Option<i64> {
    annotation(&deployment.metadata, ROLLBACK_TO)?.parse().ok()
}

/// The Deployment with the template and the annotations of one of its sets. As `SetFromReplicaSetTemplate` and
/// `SetDeploymentAnnotationsTo`.
pub fn restored(deployment: &Deployment, set: &ReplicaSet) -> Deployment {
    let mut updated = deployment.clone();
    let template = set.spec.as_ref().and_then(|s| s.template.clone());
    if let (Some(spec), Some(mut template)) = (&mut updated.spec, template) {
        if let Some(labels) = template.metadata.as_mut().and_then(|m| m.labels.as_mut()) {
            labels.remove(HASH_LABEL);
        }
        spec.template = template;
    }
    let own = |key: &String| NOT_COPIED.contains(&key.as_str());
    let annotations = updated.metadata.annotations.get_or_insert_default();
    annotations.retain(|key, _| own(key));
    let theirs = set.metadata.annotations.iter().flatten().filter(|(key, _)| !own(key));
    annotations.extend(theirs.map(|(key, value)| (key.clone(), value.clone())));
    updated
}

/// The second highest revision. As `LastRevision`.
pub fn last_revision<'a>(sets: impl IntoIterator<Item = &'a ReplicaSet>) -> i64 {
    let (mut highest, mut second) = (0, 0);
    for revision in sets.into_iter().map(|set| revision(&set.metadata)) {
        if revision >= highest {
            (highest, second) = (revision, highest);
        } else {
            second = second.max(revision);
        }
    }
    second
}

/// How large the new set may be now. As `NewRSNewReplicas`.
pub fn new_set_size(deployment: &Deployment, all_size: i32, new_size: i32) -> i32 {
    let wanted = desired(deployment);
    if !is_rolling(deployment) {
        return wanted;
    }
    let limit = wanted + max_surge(deployment);
    if all_size >= limit {
        return new_size;
    }
    new_size + (limit - all_size).min(wanted - new_size)
}

/// The set for the Deployment's template, of size zero. As `getNewReplicaSet`.
pub fn make_new(deployment: &Deployment, collisions: Option<i32>) -> ReplicaSet {
    let spec = spec(deployment);
    let hash = pod_template_hash(&spec.template, collisions);
    let mut template = spec.template;
    let meta = template.metadata.get_or_insert_default();
    meta.labels.get_or_insert_default().insert(HASH_LABEL.to_owned(), hash.clone());
    let labels = meta.labels.clone();
    let mut match_labels = spec.selector.match_labels.unwrap_or_default();
    match_labels.insert(HASH_LABEL.to_owned(), hash.clone());
    let owner = deployment.metadata.name.as_deref().unwrap_or_default();
    ReplicaSet {
        metadata: ObjectMeta {
            name: Some(format!("{owner}-{hash}")),
            namespace: deployment.metadata.namespace.clone(),
            labels,
            owner_references: Some(vec![crate::controllers::claim::controller_reference(deployment)]),
            ..ObjectMeta::default()
        },
        spec: Some(ReplicaSetSpec {
            replicas: Some(0),
            min_ready_seconds: spec.min_ready_seconds,
            selector: LabelSelector {
                match_labels: Some(match_labels),
                match_expressions: spec.selector.match_expressions,
            },
            template: Some(template),
        }),
        status: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn deployment(replicas: i32, strategy: serde_json::Value) -> Deployment {
        serde_json::from_value(json!({"metadata": {"name": "web", "uid": "d"}, "spec": {"replicas": replicas,
            "selector": {"matchLabels": {"app": "web"}}, "template": {"metadata": {"labels": {"app": "web"}}},
            "strategy": strategy}}))
        .unwrap()
    }

    fn rolling(surge: serde_json::Value, unavailable: serde_json::Value) -> serde_json::Value {
        json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}})
    }

    #[test]
    fn fenceposts_round_away_from_standstill() {
        for (replicas, surge, unavailable, expected) in [
            (10, json!(1), json!(1), (1, 1)),
            (10, json!("25%"), json!("25%"), (3, 2)),
            (1, json!("25%"), json!("25%"), (1, 0)),
            (1, json!("0%"), json!("25%"), (0, 1)),
            (0, json!("25%"), json!("25%"), (0, 1)),
            (3, json!("100%"), json!(0), (3, 0)),
        ] {
            let d = deployment(replicas, rolling(surge, unavailable));
            assert_eq!(fenceposts(&d), expected, "{d:?}");
        }
        assert_eq!(max_unavailable(&deployment(2, rolling(json!(0), json!(5)))), 2);
        assert_eq!(max_surge(&deployment(2, json!({"type": "Recreate"}))), 0);
    }

    #[test]
    fn the_new_set_grows_within_the_surge() {
        let d = deployment(10, rolling(json!(2), json!(0)));
        for (all, new, expected) in [(10, 0, 2), (12, 0, 0), (13, 5, 5), (0, 0, 10), (11, 9, 10)] {
            assert_eq!(new_set_size(&d, all, new), expected, "{all} {new}");
        }
        assert_eq!(new_set_size(&deployment(10, json!({"type": "Recreate"})), 10, 0), 10);
    }

    #[test]
    fn templates_are_compared_without_the_hash() {
        let d = deployment(1, json!(null));
        let set = make_new(&d, None);
        let template = set.spec.as_ref().unwrap().template.as_ref().unwrap();
        assert!(same_template(template, &d.spec.as_ref().unwrap().template));
        assert_ne!(make_new(&d, Some(1)).metadata.name, set.metadata.name, "a collision changes the name");
    }

    #[test]
    fn revisions_are_remembered() {
        let mut d = deployment(2, json!(null));
        d.metadata.annotations =
            Some(BTreeMap::from([("note".to_owned(), "x".to_owned()), (NOT_COPIED[0].to_owned(), "{}".to_owned())]));
        let mut set = make_new(&d, None);
        assert!(annotate_new(&mut set.metadata, &d, 1, false));
        let got = |set: &ReplicaSet, key| annotation(&set.metadata, key).map(str::to_owned);
        assert_eq!(got(&set, "note").as_deref(), Some("x"));
        assert_eq!(got(&set, NOT_COPIED[0]), None);
        assert_eq!(got(&set, DESIRED_REPLICAS).as_deref(), Some("2"));
        assert_eq!(got(&set, REVISION).as_deref(), Some("1"));
        assert!(!annotate_new(&mut set.metadata, &d, 1, true), "nothing to change");
        assert!(annotate_new(&mut set.metadata, &d, 3, true));
        assert_eq!(got(&set, REVISION_HISTORY).as_deref(), Some("1"));
        assert_eq!(revision(&set.metadata), 3);
    }
}
