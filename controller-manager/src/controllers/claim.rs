//! Claiming: which objects are an owner's, which it should adopt, which it should let go. As `ControllerRefManager`.
use apimachinery::{labels::Selector, pod::controller_of};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::Resource;
use serde_json::{Value, json};
use std::sync::Arc;

/// The outcome of looking at the candidates.
#[derive(Debug)]
pub struct Claim<K> {
    /// Controlled by the owner and selected by it.
    pub owned: Vec<Arc<K>>,
    /// Selected, and nobody's.
    pub adopt: Vec<Arc<K>>,
    /// Controlled by the owner and no longer selected.
    pub release: Vec<Arc<K>>,
}

/// Sorts the candidates. An owner that is being deleted adopts nothing and releases nothing.
pub fn claim<K: Resource>(
    owner: &ObjectMeta,
    selector: &Selector,
    candidates: impl IntoIterator<Item = Arc<K>>,
) -> Claim<K> {
    let mut claim = Claim { owned: Vec::new(), adopt: Vec::new(), release: Vec::new() };
    let owner_goes = owner.deletion_timestamp.is_some();
    for candidate in candidates {
        let meta = candidate.meta();
        let selected = selector.matches_opt(meta.labels.as_ref());
        match controller_of(meta) {
            Some(reference) if Some(&reference.uid) == owner.uid.as_ref() => {
                if selected {
                    claim.owned.push(candidate);
                } else if !owner_goes {
                    claim.release.push(candidate);
                }
            }
            Some(_) => {}
            None if !owner_goes && selected && meta.deletion_timestamp.is_none() => claim.adopt.push(candidate),
            None => {}
        }
    }
    claim
}

/// The reference by which an owner controls what it makes. As `NewControllerRef`.
pub fn controller_reference<K: Resource<DynamicType = ()>>(owner: &K) -> OwnerReference {
    OwnerReference {
        api_version: K::api_version(&()).into_owned(),
        kind: K::kind(&()).into_owned(),
        name: owner.meta().name.clone().unwrap_or_default(),
        uid: owner.meta().uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// The strategic merge patch that adopts; the UID keeps it off a namesake.
pub fn adoption(reference: &OwnerReference, uid: Option<&str>) -> Value {
    json!({"metadata": {"ownerReferences": [reference], "uid": uid}})
}

/// The strategic merge patch that releases.
pub fn release(owner_uid: Option<&str>, uid: Option<&str>) -> Value {
    json!({"metadata": {"ownerReferences": [{"$patch": "delete", "uid": owner_uid}], "uid": uid}})
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::Pod;

    fn pod(name: &str, label: &str, owner: Option<&str>) -> Arc<Pod> {
        let owners = owner.map(
            |uid| json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "x", "uid": uid, "controller": true}]),
        );
        let value = json!({"metadata": {"name": name, "labels": {"app": label}, "ownerReferences": owners}});
        Arc::new(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn the_selected_are_kept_orphans_adopted_and_the_rest_released() {
        let mut owner = ObjectMeta { uid: Some("u1".into()), ..Default::default() };
        let selector = Selector::parse("app=web").unwrap();
        let all = [
            pod("mine", "web", Some("u1")),
            pod("relabelled", "other", Some("u1")),
            pod("anothers", "web", Some("u2")),
            pod("orphan", "web", None),
            pod("stranger", "other", None),
        ];
        let names = |pods: &[Arc<Pod>]| pods.iter().filter_map(|p| p.metadata.name.clone()).collect::<Vec<_>>();
        let got = claim(&owner, &selector, all.clone());
        assert_eq!(names(&got.owned), ["mine"]);
        assert_eq!(names(&got.adopt), ["orphan"]);
        assert_eq!(names(&got.release), ["relabelled"]);

        owner.deletion_timestamp = Some(apimachinery::time::now());
        let got = claim(&owner, &selector, all);
        assert_eq!((got.owned.len(), got.adopt.len(), got.release.len()), (1, 0, 0));
    }
}
