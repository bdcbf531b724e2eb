//! Claims and volumes in every state of their tie, and what becomes of them.
use super::*;
use serde_json::{Value, json};

fn volume(owner: Value, more: Value) -> Arc<PersistentVolume> {
    let mut value = json!({"metadata": {"name": "v", "annotations": {}}, "status": {"phase": "Available"},
        "spec": {"capacity": {"storage": "5Gi"}, "accessModes": ["ReadWriteOnce"], "claimRef": owner,
            "persistentVolumeReclaimPolicy": "Retain"}});
    for (path, field) in more.as_object().into_iter().flatten() {
        *value.pointer_mut(path.rsplit_once('/').unwrap().0).unwrap() = {
            let (parent, key) = path.rsplit_once('/').unwrap();
            let mut parent = value.pointer(parent).unwrap().clone();
            parent[key.replace("~1", "/")] = field.clone();
            parent
        };
    }
    Arc::new(serde_json::from_value(value).unwrap())
}

fn claim(named: Option<&str>, completed: bool, class: Option<&str>) -> PersistentVolumeClaim {
    let annotations = if completed { json!({BIND_COMPLETED: "yes"}) } else { json!({}) };
    serde_json::from_value(json!({"metadata": {"name": "c", "namespace": "ns", "uid": "u", "annotations": annotations},
        "spec": {"volumeName": named, "storageClassName": class, "accessModes": ["ReadWriteOnce"],
            "resources": {"requests": {"storage": "5Gi"}}}}))
    .unwrap()
}

fn class(name: &str, mode: &str, default: bool) -> Arc<StorageClass> {
    Arc::new(
        serde_json::from_value(json!({"metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z",
                "annotations": {DEFAULT_CLASS[0]: default.to_string()}},
            "provisioner": "example.com/p", "volumeBindingMode": mode}))
        .unwrap(),
    )
}

fn go(claim: &PersistentVolumeClaim, volume: Option<&Arc<PersistentVolume>>, classes: &[Arc<StorageClass>]) -> String {
    let volumes = volume.map(std::slice::from_ref).unwrap_or_default();
    let plan = plan_claim(claim, &World { volumes, classes, unscheduled_pods: &|| vec!["p".to_owned()] });
    match plan {
        ClaimPlan::Bind(volume) => format!("bind {}", volume.metadata.name.as_deref().unwrap()),
        ClaimPlan::Pending(told) => format!("pending {}", told.map(|t| t.reason).unwrap_or_default()),
        ClaimPlan::Lost(told) => format!("lost {}", told.reason),
        ClaimPlan::Classify(name) => format!("class {name}"),
        ClaimPlan::Provision => "provision".to_owned(),
    }
}

#[test]
fn claims_find_wait_or_have_volumes_made() {
    let free = volume(Value::Null, json!({}));
    let mine = volume(json!({"name": "c", "namespace": "ns", "uid": "u"}), json!({}));
    let kept = volume(json!({"name": "c", "namespace": "ns"}), json!({}));
    let taken = volume(json!({"name": "d", "namespace": "ns", "uid": "x"}), json!({}));
    let small = volume(Value::Null, json!({"/spec/capacity": {"storage": "1Gi"}}));
    let now = class("now", "Immediate", false);
    let late = class("late", "WaitForFirstConsumer", false);
    let default = class("default", "Immediate", true);
    let none: Option<&Arc<PersistentVolume>> = None;
    for (claim, volumes, expected) in [
        (claim(None, false, Some("")), Some(&free), "bind v"),
        (claim(None, false, Some("")), none, "pending FailedBinding"),
        (claim(None, false, Some("now")), none, "provision"),
        (claim(None, false, Some("unknown")), none, "provision"),
        (claim(None, false, Some("late")), none, "pending WaitForPodScheduled"),
        (claim(None, false, Some("late")), Some(&kept), "bind v"),
        (claim(Some("v"), false, Some("")), none, "pending "),
        (claim(Some("v"), false, Some("")), Some(&free), "bind v"),
        (claim(Some("v"), false, Some("")), Some(&kept), "bind v"),
        (claim(Some("v"), false, Some("")), Some(&taken), "pending FailedBinding"),
        (claim(Some("v"), false, Some("")), Some(&small), "pending VolumeMismatch"),
        (claim(Some("v"), true, Some("")), Some(&mine), "bind v"),
        (claim(Some("v"), true, Some("")), Some(&free), "bind v"),
        (claim(Some("v"), true, Some("")), Some(&taken), "lost ClaimMisbound"),
        (claim(Some("v"), true, Some("")), none, "lost ClaimLost"),
        (claim(None, true, Some("")), none, "lost ClaimLost"),
    ] {
        assert_eq!(go(&claim, volumes, &[now.clone(), late.clone()]), expected, "{claim:?}");
    }
    assert_eq!(go(&claim(None, false, None), none, std::slice::from_ref(&now)), "pending FailedBinding");
    assert_eq!(go(&claim(None, false, None), none, &[now, default]), "class default");
    let mut chosen = claim(None, false, Some("late"));
    annotate(&mut chosen.metadata.annotations, SELECTED_NODE, "n1");
    assert_eq!(go(&chosen, none, &[late]), "provision", "the scheduler has chosen a node");
}

#[test]
fn two_are_tied_step_by_step_and_nothing_is_written_twice() {
    let (free, loose) = (volume(Value::Null, json!({})), claim(None, false, Some("")));
    let tied = bound_volume(&free, &loose).unwrap();
    assert_eq!(annotation(&tied.metadata, BOUND_BY_CONTROLLER), Some("yes"));
    assert_eq!(tied.spec.as_ref().unwrap().claim_ref.as_ref().unwrap().uid.as_deref(), Some("u"));
    assert_eq!(bound_volume(&tied, &loose), None);
    let bound = bound_claim(&loose, &tied).unwrap();
    assert_eq!((volume_name(&bound), annotation(&bound.metadata, BIND_COMPLETED)), (Some("v"), Some("yes")));
    assert_eq!(bound_claim(&bound, &tied), None);
    let done = claim_in_phase(&bound, "Bound", Some(&tied)).unwrap();
    assert_eq!(done.status.as_ref().unwrap().capacity.as_ref().unwrap()["storage"].0, "5Gi");
    assert_eq!(claim_in_phase(&done, "Bound", Some(&tied)), None);
    // What its author kept for a claim stays kept when the tie is undone.
    assert_eq!(unbound_volume(&tied).spec.unwrap().claim_ref, None);
    let kept =
        volume(json!({"name": "c", "namespace": "ns", "kind": "PersistentVolumeClaim", "apiVersion": "v1"}), json!({}));
    let tied = bound_volume(&kept, &loose).unwrap();
    assert_eq!(annotation(&tied.metadata, BOUND_BY_CONTROLLER), None);
    assert_eq!(unbound_volume(&tied).spec.unwrap().claim_ref, kept.spec.as_ref().unwrap().claim_ref);
}

#[test]
fn volumes_follow_their_claims() {
    let owner = json!({"name": "c", "namespace": "ns", "uid": "u"});
    let made = |policy: &str| {
        volume(
            owner.clone(),
            json!({"/metadata/annotations": {PROVISIONED_BY: "example.com/p"},
            "/spec/persistentVolumeReclaimPolicy": policy}),
        )
    };
    let ours = |finalizers: Value| {
        volume(
            owner.clone(),
            json!({"/metadata/annotations": {PROVISIONED_BY: HOST_PATH},
            "/metadata/finalizers": finalizers, "/spec/persistentVolumeReclaimPolicy": "Delete"}),
        )
    };
    let (mine, other, free) = (claim(Some("v"), true, None), claim(Some("w"), true, None), claim(None, false, None));
    let mut namesake = mine.clone();
    namesake.metadata.uid = Some("x".to_owned());
    for (volume, claim, expected) in [
        (volume(Value::Null, json!({})), None, VolumePlan::Become("Available")),
        (volume(json!({"name": "c", "namespace": "ns"}), json!({})), Some(&mine), VolumePlan::Become("Available")),
        (volume(owner.clone(), json!({})), Some(&mine), VolumePlan::Become("Bound")),
        (volume(owner.clone(), json!({})), Some(&free), VolumePlan::Ask(NamespacedName::new("ns", "c"))),
        (volume(owner.clone(), json!({})), None, VolumePlan::Reclaim),
        (volume(owner.clone(), json!({})), Some(&namesake), VolumePlan::Reclaim),
        (volume(owner.clone(), json!({})), Some(&other), VolumePlan::Unbind),
        (made("Delete"), Some(&other), VolumePlan::Reclaim),
        (made("Retain"), Some(&other), VolumePlan::Unbind),
        (ours(json!([])), Some(&mine), VolumePlan::Guard(true)),
        (ours(json!([FINALIZER])), Some(&mine), VolumePlan::Become("Bound")),
    ] {
        assert_eq!(plan_volume(&volume, claim), expected, "{volume:?}");
    }
    let block = volume(owner.clone(), json!({"/spec/volumeMode": "Block"}));
    assert!(matches!(plan_volume(&block, Some(&free)), VolumePlan::Refuse(told) if told.reason == "VolumeMismatch"));
}

#[test]
fn policies_say_what_becomes_of_the_data() {
    let of = |policy: &str, by: &str, source: Value| {
        let annotations = if by.is_empty() { json!({}) } else { json!({PROVISIONED_BY: by}) };
        let kind = source.as_object().and_then(|s| s.keys().next().cloned()).unwrap_or_default();
        let mut more = json!({"/spec/persistentVolumeReclaimPolicy": policy, "/metadata/annotations": annotations});
        if !kind.is_empty() {
            more[format!("/spec/{kind}")] = source[&kind].clone();
        }
        match reclaim(&volume(Value::Null, more)) {
            Reclaim::Fail(told) => told.reason.to_owned(),
            other => format!("{other:?}"),
        }
    };
    let (host, local) = (json!({"hostPath": {"path": "/x"}}), json!({"local": {"path": "/x"}}));
    for (policy, by, source, expected) in [
        ("Retain", "", host.clone(), "Keep"),
        ("Delete", "example.com/p", json!({}), "Elsewhere"),
        ("Delete", HOST_PATH, local, "Delete"),
        ("Delete", "", host.clone(), "VolumeFailedDelete"),
        ("Delete", "kubernetes.io/gone", json!({}), "VolumeFailedDelete"),
        ("Recycle", "", host, "Scrub"),
        ("Recycle", "", json!({"csi": {"driver": "d", "volumeHandle": "h"}}), "VolumeFailedRecycle"),
    ] {
        assert_eq!(of(policy, by, source.clone()), expected, "{policy} {by} {source}");
    }
}
