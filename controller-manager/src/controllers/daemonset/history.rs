//! A DaemonSet's history: a ControllerRevision for each template that it has had. Pure.
use crate::controllers::claim::controller_reference;
use apimachinery::names::pod_template_hash;
use k8s_openapi::{
    api::apps::v1::{ControllerRevision, DaemonSet},
    apimachinery::pkg::runtime::RawExtension,
};
use serde_json::{Value, json};
use std::sync::Arc;

use super::plan::HASH_LABEL;

/// What is to be done about the history.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// The newest revision is the template's; its hash.
    Current(String),
    /// An older revision is the template's: it becomes the newest.
    Renumber(Box<ControllerRevision>),
    /// The template is new.
    Create(Box<ControllerRevision>),
}

/// As `constructHistory`: `owned` are the set's revisions.
pub fn step(set: &DaemonSet, owned: &[Arc<ControllerRevision>]) -> Step {
    let data = snapshot(set);
    let newest = owned.iter().map(|r| r.revision).max().unwrap_or(0);
    let mut fitting: Vec<_> = owned.iter().filter(|r| r.data.as_ref().map(|d| &d.0) == Some(&data)).collect();
    fitting.sort_by_key(|r| r.revision);
    if let Some(found) = fitting.last() {
        if found.revision == newest {
            return Step::Current(hash_of(found));
        }
        let mut updated = found.as_ref().clone();
        updated.revision = newest + 1;
        return Step::Renumber(Box::new(updated));
    }
    Step::Create(Box::new(revision(set, data, newest + 1)))
}

pub fn hash_of(revision: &ControllerRevision) -> String {
    revision.metadata.labels.as_ref().and_then(|l| l.get(HASH_LABEL)).cloned().unwrap_or_default()
}

/// Revisions beyond the limit that no pod has, the oldest first. As `cleanupHistory`.
pub fn surplus(set: &DaemonSet, owned: &[Arc<ControllerRevision>], in_use: &[String]) -> Vec<String> {
    let limit =
        set.spec.as_ref().and_then(|s| s.revision_history_limit).and_then(|l| usize::try_from(l).ok()).unwrap_or(10);
    let current = snapshot(set);
    let mut unused: Vec<_> = owned
        .iter()
        .filter(|r| r.data.as_ref().map(|d| &d.0) != Some(&current) && !in_use.contains(&hash_of(r)))
        .collect();
    unused.sort_by_key(|r| r.revision);
    let count = unused.len().saturating_sub(limit);
    unused.into_iter().take(count).filter_map(|r| r.metadata.name.clone()).collect()
}

/// The part of the spec that a revision remembers: a patch that brings it back. As `getPatch`.
fn snapshot(set: &DaemonSet) -> Value {
    // A template that does not serialise cannot exist: it came from JSON.
    let mut template = set.spec.as_ref().map(|s| json!(s.template)).unwrap_or_default();
    template["$patch"] = json!("replace");
    json!({"spec": {"template": template}})
}

fn revision(set: &DaemonSet, data: Value, number: i64) -> ControllerRevision {
    let template = set.spec.as_ref().map(|s| s.template.clone()).unwrap_or_default();
    let collisions = set.status.as_ref().and_then(|s| s.collision_count);
    let hash = pod_template_hash(&template, collisions);
    let mut revision = ControllerRevision { revision: number, data: Some(RawExtension(data)), ..Default::default() };
    let name = set.metadata.name.as_deref().unwrap_or_default();
    revision.metadata.name = Some(format!("{name}-{hash}"));
    revision.metadata.namespace.clone_from(&set.metadata.namespace);
    revision.metadata.annotations.clone_from(&set.metadata.annotations);
    revision.metadata.owner_references = Some(vec![controller_reference(set)]);
    let mut labels = template.metadata.and_then(|m| m.labels).unwrap_or_default();
    labels.insert(HASH_LABEL.to_owned(), hash);
    revision.metadata.labels = Some(labels);
    revision
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(image: &str) -> DaemonSet {
        serde_json::from_value(json!({"metadata": {"name": "d", "uid": "u"}, "spec": {"selector": {},
            "revisionHistoryLimit": 1,
            "template": {"metadata": {"labels": {"app": "d"}}, "spec": {"containers": [{"name": "c", "image": image}]}}}}))
        .unwrap()
    }

    fn made(set: &DaemonSet, owned: &[Arc<ControllerRevision>]) -> Arc<ControllerRevision> {
        let Step::Create(revision) = step(set, owned) else { panic!("not new") };
        Arc::new(*revision)
    }

    #[test]
    fn templates_are_remembered_and_come_back() {
        let first = made(&set("v1"), &[]);
        assert_eq!(
            (first.revision, step(&set("v1"), std::slice::from_ref(&first))),
            (1, Step::Current(hash_of(&first)))
        );
        let second = made(&set("v2"), std::slice::from_ref(&first));
        assert_eq!(second.revision, 2);
        let Step::Renumber(back) = step(&set("v1"), &[first.clone(), second.clone()]) else { panic!("not found") };
        assert_eq!((back.revision, back.metadata.name.clone()), (3, first.metadata.name.clone()));
    }

    #[test]
    fn the_oldest_that_nobody_has_go() {
        let mut all = Vec::new();
        for image in ["v1", "v2", "v3", "v4"] {
            all.push(made(&set(image), &all));
        }
        assert_eq!(
            surplus(&set("v4"), &all, &[]),
            [all[0].metadata.name.clone().unwrap(), all[1].metadata.name.clone().unwrap()]
        );
        assert_eq!(surplus(&set("v4"), &all, &[hash_of(&all[0])]), [all[1].metadata.name.clone().unwrap()]);
    }
}
