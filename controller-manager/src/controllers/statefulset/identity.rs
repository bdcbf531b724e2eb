//! Who the pods of a StatefulSet are: names, labels, claims and whom the claims belong to. Pure.
use crate::controllers::{claim::controller_reference, pod_control::pod_from_template};
use k8s_openapi::{
    api::{
        apps::v1::StatefulSet,
        core::v1::{PersistentVolumeClaim, PersistentVolumeClaimVolumeSource, Pod, PodTemplateSpec, Volume},
    },
    apimachinery::pkg::apis::meta::v1::OwnerReference,
};
use std::collections::BTreeMap;

pub const REVISION_LABEL: &str = "controller-revision-hash";
const POD_NAME_LABEL: &str = "statefulset.kubernetes.io/pod-name";
const INDEX_LABEL: &str = "apps.kubernetes.io/pod-index";

fn name(set: &StatefulSet) -> &str {
    set.metadata.name.as_deref().unwrap_or_default()
}

/// The ordinal of a pod of the set; None if the pod's name is not such. As `getOrdinal` and `isMemberOf`.
pub fn ordinal(set: &StatefulSet, pod: &Pod) -> Option<i32> {
    let digits = pod.metadata.name.as_deref()?.strip_prefix(name(set))?.strip_prefix('-')?;
    digits.bytes().all(|b| b.is_ascii_digit()).then(|| digits.parse().ok()).flatten()
}

pub fn pod_name(set: &StatefulSet, ordinal: i32) -> String {
    format!("{}-{ordinal}", name(set))
}

/// The labels by which Services find one pod. As `updateIdentity`.
pub fn labels(set: &StatefulSet, ordinal: i32) -> [(String, String); 2] {
    [(POD_NAME_LABEL.to_owned(), pod_name(set, ordinal)), (INDEX_LABEL.to_owned(), ordinal.to_string())]
}

/// As `newStatefulSetPod`.
pub fn pod(set: &StatefulSet, template: &PodTemplateSpec, revision: &str, ordinal: i32) -> Pod {
    let mut pod = pod_from_template(template, name(set), &controller_reference(set));
    pod.metadata.generate_name = None;
    pod.metadata.name = Some(pod_name(set, ordinal));
    let own = pod.metadata.labels.get_or_insert_default();
    own.extend(labels(set, ordinal));
    own.insert(REVISION_LABEL.to_owned(), revision.to_owned());
    let (Some(spec), Some(set_spec)) = (&mut pod.spec, &set.spec) else { return pod };
    spec.hostname = Some(pod_name(set, ordinal));
    spec.subdomain = set_spec.service_name.clone().filter(|n| !n.is_empty());
    let templates = set_spec.volume_claim_templates.iter().flatten();
    let mut volumes: Vec<Volume> = templates.map(|claim| volume(set, claim, ordinal)).collect();
    let others = spec.volumes.take().unwrap_or_default();
    volumes.extend(others.into_iter().filter(|v| !volumes.iter().any(|own| own.name == v.name)).collect::<Vec<_>>());
    spec.volumes = (!volumes.is_empty()).then_some(volumes);
    pod
}

fn volume(set: &StatefulSet, template: &PersistentVolumeClaim, ordinal: i32) -> Volume {
    let source = PersistentVolumeClaimVolumeSource { claim_name: claim_name(set, template, ordinal), read_only: None };
    let name = template.metadata.name.clone().unwrap_or_default();
    Volume { name, persistent_volume_claim: Some(source), ..Volume::default() }
}

fn claim_name(set: &StatefulSet, template: &PersistentVolumeClaim, ordinal: i32) -> String {
    format!("{}-{}-{ordinal}", template.metadata.name.as_deref().unwrap_or_default(), name(set))
}

/// The claims of one pod, as they are made. As `getPersistentVolumeClaims`.
pub fn claims(set: &StatefulSet, ordinal: i32) -> Vec<PersistentVolumeClaim> {
    let Some(spec) = &set.spec else { return Vec::new() };
    let made = |template: &PersistentVolumeClaim| {
        let mut claim = template.clone();
        claim.status = None;
        claim.metadata.name = Some(claim_name(set, template, ordinal));
        claim.metadata.namespace.clone_from(&set.metadata.namespace);
        let selected = spec.selector.match_labels.clone().unwrap_or_default();
        claim.metadata.labels.get_or_insert_default().extend(selected);
        claim.metadata.owner_references = owners(set, &claim, None).or(claim.metadata.owner_references);
        claim
    };
    spec.volume_claim_templates.iter().flatten().map(made).collect()
}

/// The owners that a claim should have by the retention policy, if it has others. `condemned` is the pod that scaling
/// down takes away: a claim that goes with it is the pod's, one that goes with the set is the set's. A claim that someone
/// else controls is left alone. As `updateClaimOwnerRefForSetAndPod`.
pub fn owners(
    set: &StatefulSet,
    claim: &PersistentVolumeClaim,
    condemned: Option<&Pod>,
) -> Option<Vec<OwnerReference>> {
    let policy = set.spec.as_ref().and_then(|s| s.persistent_volume_claim_retention_policy.as_ref());
    let deletes = |when: Option<&String>| when.is_some_and(|w| w == "Delete");
    let when_deleted = deletes(policy.and_then(|p| p.when_deleted.as_ref()));
    let when_scaled = deletes(policy.and_then(|p| p.when_scaled.as_ref()));
    let wanted = match condemned {
        Some(pod) if when_scaled => Some(controller_reference(pod)),
        _ => when_deleted.then(|| controller_reference(set)),
    };
    let set_uid = set.metadata.uid.as_deref().unwrap_or_default();
    let ordinal = claim.metadata.name.as_deref().and_then(|n| n.rsplit('-').next()?.parse().ok()).unwrap_or(-1);
    let pod_name = pod_name(set, ordinal);
    let ours = |o: &&OwnerReference| o.uid == set_uid || (o.kind == "Pod" && o.name == pod_name);
    let former = claim.metadata.owner_references.clone().unwrap_or_default();
    if former.iter().any(|o| o.controller == Some(true) && !ours(&o)) {
        return None;
    }
    let same = |o: &OwnerReference| wanted.as_ref().is_some_and(|w| w.uid == o.uid);
    if former.iter().filter(ours).count() == usize::from(wanted.is_some()) && former.iter().filter(ours).all(same) {
        return None;
    }
    let others = former.iter().filter(|o| !ours(o)).cloned();
    Some(others.chain(wanted).collect())
}

/// Whether a claim still goes with a former pod of that name: a new one must wait until it is gone. As `PodClaimIsStale`.
pub fn is_stale(claim: &PersistentVolumeClaim, pod_name: &str) -> bool {
    claim.metadata.deletion_timestamp.is_some()
        || claim.metadata.owner_references.iter().flatten().any(|o| o.kind == "Pod" && o.name == pod_name)
}

/// The labels that a pod lost.
pub fn lost_labels(set: &StatefulSet, pod: &Pod, ordinal: i32) -> BTreeMap<String, String> {
    let has = |k: &String, v: &String| pod.metadata.labels.as_ref().and_then(|l| l.get(k)) == Some(v);
    labels(set, ordinal).into_iter().filter(|(k, v)| !has(k, v)).collect()
}
