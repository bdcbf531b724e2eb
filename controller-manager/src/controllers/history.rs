//! The history of a DaemonSet or StatefulSet: a ControllerRevision for each template that it has had.
//!
//! What to do about it ([`step`], [`surplus`]) is pure; [`History`] carries it out.
use super::{
    claim::{adoption, claim, controller_reference},
    pod_control::PodOwner,
};
use crate::runtime::{Index, SyncError, api_in, gone_is_fine, is_code, orphans_of, put_status};
use apimachinery::{labels::Selector, meta::NamespacedName, names::pod_template_hash};
use k8s_openapi::{
    api::{apps::v1::ControllerRevision, core::v1::PodTemplateSpec},
    apimachinery::pkg::runtime::RawExtension,
};
use kube::{
    Client,
    api::{DeleteParams, Patch, PatchParams, PostParams},
};
use serde::{Deserialize as _, Serialize};
use serde_json::json;
use std::sync::Arc;

/// What has a history of templates.
pub trait Historic: PodOwner + Serialize {
    /// The label of a revision that holds its hash.
    const HASH_LABEL: &'static str;
    /// Whether revisions that pods still have count against the limit.
    const LIVE_COUNT: bool = false;

    fn template(&self) -> Option<&PodTemplateSpec>;
    fn history_limit(&self) -> Option<i32>;
    /// How often a revision's name was taken: part of the hash.
    fn collision_count(&mut self) -> &mut Option<i32>;
}

/// What is to be done about the history.
#[derive(Debug, PartialEq)]
pub enum Step {
    /// The newest revision is the template's.
    Current(Arc<ControllerRevision>),
    /// An older revision is the template's: it becomes the newest.
    Renumber(Box<ControllerRevision>),
    /// The template is new.
    Create(Box<ControllerRevision>),
}

/// As `constructHistory` and `getStatefulSetRevisions`: `owned` are the set's revisions.
pub fn step<K: Historic>(set: &K, owned: &[Arc<ControllerRevision>]) -> Step {
    let newest = owned.iter().map(|r| r.revision).max().unwrap_or(0);
    let fitting = owned.iter().filter(|r| template_of(r).as_ref() == set.template());
    match fitting.max_by_key(|r| r.revision) {
        Some(found) if found.revision == newest => Step::Current(found.clone()),
        Some(found) => {
            let mut updated = found.as_ref().clone();
            updated.revision = newest + 1;
            Step::Renumber(Box::new(updated))
        }
        None => Step::Create(Box::new(revision(set, newest + 1))),
    }
}

pub fn hash_of<K: Historic>(revision: &ControllerRevision) -> String {
    revision.metadata.labels.as_ref().and_then(|l| l.get(K::HASH_LABEL)).cloned().unwrap_or_default()
}

/// The template that a revision brings back. As `ApplyRevision`.
pub fn template_of(revision: &ControllerRevision) -> Option<PodTemplateSpec> {
    PodTemplateSpec::deserialize(revision.data.as_ref()?.0.pointer("/spec/template")?).ok()
}

/// Revisions beyond the limit that nobody has, the oldest first; `counted` others count against the limit. As `cleanupHistory` and `truncateHistory`.
fn surplus(
    limit: Option<i32>,
    owned: &[Arc<ControllerRevision>],
    live: impl Fn(&ControllerRevision) -> bool,
    counted: usize,
) -> Vec<&str> {
    let Ok(limit) = usize::try_from(limit.unwrap_or(10)) else { return Vec::new() };
    let mut unused: Vec<_> = owned.iter().filter(|r| !live(r)).collect();
    unused.sort_by_key(|r| r.revision);
    let count = (unused.len() + counted).saturating_sub(limit);
    unused.into_iter().take(count).filter_map(|r| r.metadata.name.as_deref()).collect()
}

fn revision<K: Historic>(set: &K, number: i64) -> ControllerRevision {
    let template = set.template().cloned().unwrap_or_default();
    // A patch that brings the template back. As `getPatch`. One that does not serialise cannot exist: it came from JSON.
    let mut data = json!(template);
    data["$patch"] = json!("replace");
    let data = json!({"spec": {"template": data}});
    let hash = pod_template_hash(&template, *set.clone().collision_count());
    let mut revision = ControllerRevision { revision: number, data: Some(RawExtension(data)), ..Default::default() };
    let meta = set.meta();
    let name = meta.name.as_deref().unwrap_or_default();
    revision.metadata.name = Some(format!("{name}-{hash}"));
    revision.metadata.namespace.clone_from(&meta.namespace);
    revision.metadata.annotations.clone_from(&meta.annotations);
    revision.metadata.owner_references = Some(vec![controller_reference(set)]);
    let mut labels = template.metadata.and_then(|m| m.labels).unwrap_or_default();
    labels.insert(K::HASH_LABEL.to_owned(), hash);
    revision.metadata.labels = Some(labels);
    revision
}

/// The revisions of sets, and the right to write them.
pub struct History {
    pub client: Client,
    pub revisions: Arc<Index<ControllerRevision>>,
}

/// A set's revisions, and the one of its template among them.
pub struct Revisions {
    pub all: Vec<Arc<ControllerRevision>>,
    pub update: Arc<ControllerRevision>,
}

impl History {
    /// Sees to it that the newest revision is the template's.
    pub async fn sync<K: Historic>(&self, set: &K, selector: &Selector) -> Result<Revisions, SyncError> {
        let key = NamespacedName::of(set);
        let api = api_in::<ControllerRevision>(&self.client, &key.namespace);
        let mut candidates = self.revisions.get(set.meta().uid.as_deref().unwrap_or_default());
        candidates.extend(self.revisions.get(&orphans_of(&key.namespace)));
        let claimed = claim(set.meta(), selector, candidates);
        for orphan in &claimed.adopt {
            let patch = Patch::Strategic(adoption(&controller_reference(set), orphan.metadata.uid.as_deref()));
            let name = orphan.metadata.name.as_deref().unwrap_or_default();
            gone_is_fine(api.patch_metadata(name, &PatchParams::default(), &patch).await)?;
        }
        if !claimed.adopt.is_empty() {
            return Err(SyncError::Waiting("adopted revisions".to_owned()));
        }
        let all = claimed.owned;
        let update = match step(set, &all) {
            Step::Current(revision) => revision,
            Step::Renumber(revision) => {
                let name = revision.metadata.name.clone().unwrap_or_default();
                Arc::new(api.replace(&name, &PostParams::default(), &revision).await?)
            }
            Step::Create(revision) => match api.create(&PostParams::default(), &revision).await {
                Ok(created) => Arc::new(created),
                Err(error) if is_code(&error, 409) => {
                    let name = revision.metadata.name.clone().unwrap_or_default();
                    let there = api.get(&name).await?;
                    if template_of(&there) != template_of(&revision) {
                        return Err(self.another_name(set.clone()).await);
                    }
                    Arc::new(there)
                }
                Err(error) => return Err(error.into()),
            },
        };
        Ok(Revisions { all, update })
    }

    /// Another template has the name: the next hash differs.
    async fn another_name<K: Historic>(&self, mut set: K) -> SyncError {
        let count = set.collision_count();
        *count = Some(count.unwrap_or(0) + 1);
        match put_status(&self.client, &set).await {
            Ok(()) => SyncError::Waiting("a revision name that is free".to_owned()),
            Err(error) => error.into(),
        }
    }

    /// Deletes what is beyond the limit and not `live`.
    pub async fn clean_up<K: Historic>(
        &self,
        set: &K,
        revisions: &Revisions,
        live: impl Fn(&ControllerRevision) -> bool,
    ) -> Result<(), SyncError> {
        let namespace = set.meta().namespace.as_deref().unwrap_or_default();
        let api = api_in::<ControllerRevision>(&self.client, namespace);
        let update = revisions.update.metadata.uid.as_ref();
        let is_update = |r: &ControllerRevision| r.metadata.uid.as_ref() == update;
        let kept = revisions.all.iter().filter(|r| K::LIVE_COUNT && !is_update(r) && live(r)).count();
        for name in surplus(set.history_limit(), &revisions.all, |r| is_update(r) || live(r), kept) {
            gone_is_fine(api.delete(name, &DeleteParams::default()).await)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::apps::v1::DaemonSet;

    fn set(image: &str) -> DaemonSet {
        let value = json!({"metadata": {"name": "d", "uid": "u"}, "spec": {"selector": {},
            "template": {"metadata": {"labels": {"app": "d"}}, "spec": {"containers": [{"name": "c", "image": image}]}}}});
        serde_json::from_value(value).unwrap()
    }

    fn made(set: &DaemonSet, owned: &[Arc<ControllerRevision>]) -> Arc<ControllerRevision> {
        let Step::Create(revision) = step(set, owned) else { panic!("not new") };
        Arc::new(*revision)
    }

    #[test]
    fn templates_are_remembered_and_come_back() {
        let first = made(&set("v1"), &[]);
        assert_eq!(first.revision, 1);
        assert_eq!(step(&set("v1"), std::slice::from_ref(&first)), Step::Current(first.clone()));
        assert_eq!(template_of(&first).as_ref(), set("v1").template());
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
        let name = |at: usize| all[at].metadata.name.clone().unwrap();
        assert_eq!(surplus(Some(1), &all, |r| r.revision == 4, 0), [name(0), name(1)]);
        assert_eq!(surplus(Some(1), &all, |r| [1, 4].contains(&r.revision), 0), [name(1)]);
        assert_eq!(surplus(Some(1), &all, |r| [1, 4].contains(&r.revision), 1), [name(1), name(2)], "DaemonSets'");
        assert_eq!(surplus(None, &all, |_| false, 0), Vec::<&str>::new());
    }
}
