//! Tests of a StatefulSet's plan, by playing sets through a cluster in small.
use super::*;
use apimachinery::pod::is_active;
use serde_json::{Value, json};

/// A set, its pods and claims.
struct World {
    set: StatefulSet,
    pods: Vec<Arc<Pod>>,
    claims: BTreeMap<String, Arc<PersistentVolumeClaim>>,
    made: usize,
    /// Pods of this revision never get ready.
    broken: &'static str,
    current: Revision,
    update: Revision,
}

fn revision_named(name: &str) -> Revision {
    let template = PodTemplateSpec { spec: Some(Default::default()), ..Default::default() };
    Revision { name: name.to_owned(), template }
}

impl World {
    fn new(spec: Value) -> Self {
        let mut value = json!({"metadata": {"name": "s", "namespace": "ns", "uid": "s"},
            "spec": {"replicas": 3, "selector": {"matchLabels": {"a": "b"}}, "template": {"spec": {"containers": []}}}});
        spec.as_object().into_iter().flatten().for_each(|(k, v)| value["spec"][k] = v.clone());
        let (current, update) = (revision_named("r1"), revision_named("r1"));
        let set = serde_json::from_value(value).unwrap();
        Self { set, pods: Vec::new(), claims: BTreeMap::new(), made: 0, broken: "", current, update }
    }

    fn plan(&self) -> Plan {
        let claims = |name: &str| self.claims.get(name).cloned();
        let now = Timestamp::now();
        let World { set, pods, current, update, .. } = self;
        plan(&Observed { set, pods, current, update, claims: &claims, now })
    }

    fn names(pods: &[Arc<Pod>]) -> Vec<&str> {
        pods.iter().filter_map(|p| p.metadata.name.as_deref()).collect()
    }

    /// One step, carried out; what was made and deleted.
    fn step(&mut self) -> Vec<String> {
        let plan = self.plan();
        let mut did = Vec::new();
        for action in plan.actions {
            match action {
                Action::OwnClaim(claim, owners) => {
                    let mut claim = claim.as_ref().clone();
                    claim.metadata.owner_references = Some(owners);
                    self.claims.insert(claim.metadata.name.clone().unwrap(), Arc::new(claim));
                }
                Action::MakeClaims(claims, _) => self.add_claims(claims),
                Action::Create(mut pod, claims) => {
                    self.add_claims(claims);
                    self.made += 1;
                    pod.metadata.uid = Some(format!("u{}", self.made));
                    pod.status = serde_json::from_value(json!({"phase": "Pending"})).unwrap();
                    did.push(format!("+{}", pod.metadata.name.as_deref().unwrap_or_default()));
                    self.pods.push(Arc::new(*pod));
                }
                Action::Label(..) => {}
                Action::Delete(pod) | Action::Recreate(pod) => {
                    did.push(format!("-{}", pod.metadata.name.as_deref().unwrap_or_default()));
                    self.pods.retain(|p| p.metadata.uid != pod.metadata.uid);
                    // A claim that goes with its pod.
                    let uid = pod.metadata.uid.as_deref();
                    self.claims.retain(|_, c| {
                        !c.metadata.owner_references.iter().flatten().any(|o| Some(o.uid.as_str()) == uid)
                    });
                }
            }
        }
        self.current.name = plan.status.current_revision.clone().unwrap();
        self.set.status = Some(plan.status);
        did
    }

    fn add_claims(&mut self, claims: Vec<PersistentVolumeClaim>) {
        self.claims.extend(claims.into_iter().map(|c| (c.metadata.name.clone().unwrap(), Arc::new(c))));
    }

    fn run(&mut self) {
        let broken = self.broken;
        for pod in self.pods.iter_mut().filter(|p| is_active(p)) {
            let ready = if revision(pod) == broken { "False" } else { "True" };
            Arc::make_mut(pod).status = serde_json::from_value(json!({"phase": "Running", "conditions": [
                {"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T00:00:00Z"}]}))
            .unwrap();
        }
    }

    /// Steps until nothing happens; what was done in each.
    fn settle(&mut self) -> Vec<String> {
        let mut log = Vec::new();
        for _ in 0..50 {
            let did = self.step();
            self.run();
            if did.is_empty() {
                break;
            }
            log.push(did.join(" "));
        }
        self.step();
        log
    }

    fn scale(&mut self, replicas: i32) {
        self.set.spec.as_mut().unwrap().replicas = Some(replicas);
    }

    fn revisions(&self) -> Vec<&str> {
        let mut pods: Vec<_> = self.pods.iter().collect();
        pods.sort_by_key(|p| identity::ordinal(&self.set, p));
        pods.into_iter().map(|p| revision(p)).collect()
    }
}

#[test]
fn pods_come_and_go_in_order() {
    let mut world = World::new(json!({}));
    assert_eq!(world.step(), ["+s-0"]);
    assert_eq!(world.step(), [""; 0], "the first is not ready");
    world.run();
    assert_eq!(world.settle(), ["+s-1", "+s-2"]);
    let status = world.set.status.clone().unwrap();
    assert_eq!((status.replicas, status.ready_replicas, status.current_replicas), (3, Some(3), Some(3)));
    world.scale(1);
    assert_eq!(world.settle(), ["-s-2", "-s-1"]);
    assert_eq!(World::names(&world.pods), ["s-0"]);
}

#[test]
fn a_sick_pod_halts_it() {
    let mut world = World::new(json!({}));
    world.settle();
    for at in [1, 2] {
        Arc::make_mut(&mut world.pods[at]).status = serde_json::from_value(json!({"phase": "Running"})).unwrap();
    }
    world.scale(5);
    assert_eq!(world.step(), [""; 0]);
    world.scale(1);
    assert_eq!(world.step(), [""; 0], "s-2 must wait for s-1");
    world.run();
    assert_eq!(world.settle(), ["-s-2", "-s-1"]);
}

#[test]
fn in_parallel_all_come_and_go_at_once() {
    let mut world = World::new(json!({"podManagementPolicy": "Parallel", "ordinals": {"start": 5}}));
    assert_eq!(world.settle(), ["+s-5 +s-6 +s-7"]);
    world.scale(0);
    assert_eq!(world.settle(), ["-s-7 -s-6 -s-5"]);
}

#[test]
fn what_ended_is_made_anew() {
    let mut world = World::new(json!({}));
    world.settle();
    Arc::make_mut(&mut world.pods[1]).status = serde_json::from_value(json!({"phase": "Failed"})).unwrap();
    assert_eq!(world.settle(), ["-s-1", "+s-1"]);
}

#[test]
fn updates_go_from_the_last_down_to_the_partition() {
    let mut world = World::new(json!({"updateStrategy": {"rollingUpdate": {"partition": 1}}}));
    world.settle();
    world.update = revision_named("r2");
    assert_eq!(world.settle(), ["-s-2", "+s-2", "-s-1", "+s-1"]);
    assert_eq!(world.revisions(), ["r1", "r2", "r2"]);
    let status = world.set.status.clone().unwrap();
    assert_eq!((status.current_replicas, status.updated_replicas), (Some(1), Some(2)));
    // A pod below the partition comes back as it was.
    world.pods.retain(|p| p.metadata.name.as_deref() != Some("s-0"));
    assert_eq!(world.settle(), ["+s-0"]);
    assert_eq!(world.revisions(), ["r1", "r2", "r2"]);
    world.set.spec.as_mut().unwrap().update_strategy = None;
    assert_eq!(world.settle(), ["-s-0", "+s-0"]);
    let status = world.set.status.clone().unwrap();
    assert_eq!((status.current_revision.as_deref(), status.current_replicas), (Some("r2"), Some(3)));
}

#[test]
fn several_may_be_unavailable_at_once() {
    let strategy = json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "50%"}});
    let mut world = World::new(json!({"replicas": 4, "podManagementPolicy": "Parallel", "updateStrategy": strategy}));
    world.settle();
    world.update = revision_named("r2");
    assert_eq!(world.settle(), ["-s-3 -s-2", "+s-2 +s-3", "-s-1 -s-0", "+s-0 +s-1"]);
    world.set.spec.as_mut().unwrap().update_strategy = serde_json::from_value(json!({"type": "OnDelete"})).unwrap();
    world.update = revision_named("r3");
    assert_eq!(world.settle(), [""; 0]);
}

#[test]
fn a_broken_update_is_rolled_back() {
    for policy in ["OrderedReady", "Parallel"] {
        let mut world = World::new(json!({"podManagementPolicy": policy}));
        world.settle();
        (world.update, world.broken) = (revision_named("bad"), "bad");
        world.settle();
        assert_eq!(world.revisions(), ["r1", "r1", "bad"], "{policy}: it goes no further");
        world.update = revision_named("r1");
        assert_eq!(world.settle(), ["-s-2", "+s-2"], "{policy}");
        assert_eq!(world.revisions(), ["r1"; 3]);
        // Nor does it stand in the way of the next.
        world.update = revision_named("bad");
        world.settle();
        world.update = revision_named("good");
        world.settle();
        assert_eq!(world.revisions(), ["good"; 3], "{policy}");
    }
}

#[test]
fn claims_stay_or_go_with_pod_and_set() {
    for (scaled, deleted, left, owner) in
        [("Retain", "Retain", 3, None), ("Delete", "Retain", 1, None), ("Delete", "Delete", 1, Some("s"))]
    {
        let mut world = World::new(json!({"volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {}}],
            "persistentVolumeClaimRetentionPolicy": {"whenScaled": scaled, "whenDeleted": deleted}}));
        world.settle();
        assert_eq!(world.claims.keys().collect::<Vec<_>>(), ["data-s-0", "data-s-1", "data-s-2"]);
        let volume = &world.pods[0].spec.as_ref().unwrap().volumes.as_ref().unwrap()[0];
        assert_eq!(volume.persistent_volume_claim.as_ref().unwrap().claim_name, "data-s-0");
        world.scale(1);
        world.settle();
        assert_eq!(world.claims.len(), left, "{scaled} {deleted}");
        let owners = world.claims["data-s-0"].metadata.owner_references.as_ref();
        assert_eq!(owners.and_then(|o| o.first()).map(|o| o.uid.as_str()), owner, "{scaled} {deleted}");
    }
}

#[test]
fn a_claim_of_a_former_pod_is_waited_for() {
    let mut world = World::new(json!({"volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": {}}]}));
    let owner = json!([{"apiVersion": "v1", "kind": "Pod", "name": "s-0", "uid": "old"}]);
    let claim = json!({"metadata": {"name": "data-s-0", "ownerReferences": owner}});
    world.add_claims(vec![serde_json::from_value(claim).unwrap()]);
    assert_eq!(world.step(), [""; 0]);
    world.claims.clear();
    assert_eq!(world.step(), ["+s-0"]);
}
