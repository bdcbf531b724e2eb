//! Tests of the plan: single steps by table, whole rollouts by simulating what the ReplicaSets do.
use super::*;
use proptest::prelude::*;
use serde_json::{Value, json};

const NOW: &str = "2026-01-01T12:00:00Z";

fn now() -> Timestamp {
    NOW.parse().unwrap()
}

fn deployment(replicas: i32, image: &str, spec: Value) -> Deployment {
    let mut value = json!({"metadata": {"name": "web", "namespace": "ns", "uid": "d", "generation": 1},
        "spec": {"replicas": replicas, "selector": {"matchLabels": {"app": "web"}}, "revisionHistoryLimit": 10,
            "progressDeadlineSeconds": 600,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}},
            "template": {"metadata": {"labels": {"app": "web"}},
                "spec": {"containers": [{"name": "c", "image": image}]}}}});
    for (key, part) in spec.as_object().into_iter().flatten() {
        value["spec"][key] = part.clone();
    }
    serde_json::from_value(value).unwrap()
}

/// A cluster in small: the sets, what the Deployment's controller does to them, and a ReplicaSet controller whose pods
/// all become available, or (of `broken` images) never do.
struct World {
    deployment: Deployment,
    sets: Vec<Arc<ReplicaSet>>,
    clock: Timestamp,
    broken: Option<&'static str>,
    told: Vec<Told>,
}

impl World {
    fn new(deployment: Deployment) -> Self {
        Self { deployment, sets: Vec::new(), clock: now(), broken: None, told: Vec::new() }
    }

    /// One step; true if it did anything.
    fn step(&mut self) -> bool {
        self.clock += Duration::from_secs(1);
        let plan = plan(&self.deployment, &self.sets, &[], self.clock);
        let acted = !plan.actions.is_empty();
        for action in plan.actions {
            match action {
                Action::AnnotateRevision(revision) => {
                    if let Some(updated) = with_revision(&self.deployment, &revision) {
                        self.deployment = updated;
                    }
                }
                Action::Create(mut set) => {
                    set.metadata.uid = set.metadata.name.clone();
                    set.metadata.creation_timestamp =
                        Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(self.clock));
                    self.sets.push(Arc::new(*set));
                }
                Action::Update(set) | Action::Scale { set, .. } => {
                    let at = self.sets.iter().position(|s| name(s) == name(&set)).unwrap();
                    self.sets[at] = Arc::new(*set);
                }
                Action::Delete(gone) => self.sets.retain(|s| name(s) != gone),
                Action::RollBack { deployment, event } => {
                    self.deployment = *deployment;
                    self.told.extend(event);
                }
            }
        }
        let changed = self.deployment.status.as_ref().is_none_or(|s| !status::same(s, &plan.status));
        self.deployment.status = Some(plan.status);
        acted || changed
    }

    /// The sets' pods follow the sizes: at most `pace` of them become available.
    fn pods_follow(&mut self, pace: i32) -> bool {
        let mut changed = false;
        for set in &mut self.sets {
            let image = set.spec.as_ref().and_then(|s| s.template.as_ref()?.spec.as_ref()?.containers[0].image.clone());
            let works = image.as_deref() != self.broken;
            let wanted = size(set);
            let target = if works { wanted.min(available(set) + pace) } else { 0 };
            let status = set.status.clone().unwrap_or_default();
            if status.replicas != wanted || status.available_replicas != Some(target) {
                changed = true;
                let mut updated = set.as_ref().clone();
                updated.status = Some(k8s_openapi::api::apps::v1::ReplicaSetStatus {
                    replicas: wanted,
                    ready_replicas: Some(target),
                    available_replicas: Some(target),
                    observed_generation: updated.metadata.generation,
                    ..status
                });
                *set = Arc::new(updated);
            }
        }
        changed
    }

    fn settle(&mut self, mut check: impl FnMut(&Self)) {
        for _ in 0..500 {
            let stepped = self.step();
            check(self);
            let followed = self.pods_follow(1);
            if !stepped && !followed {
                return;
            }
        }
        panic!("the rollout does not settle: {:?}", self.sizes());
    }

    fn sizes(&self) -> Vec<(i32, i32)> {
        self.sets.iter().map(|s| (size(s), available(s))).collect()
    }

    fn reason(&self, kind: &str) -> String {
        let status = self.deployment.status.clone().unwrap_or_default();
        status::condition(&status, kind).and_then(|c| c.reason.clone()).unwrap_or_default()
    }

    fn roll_to(&mut self, image: &str) {
        let generation = self.deployment.metadata.generation;
        self.deployment.metadata.generation = generation.map(|g| g + 1);
        let spec = self.deployment.spec.as_mut().unwrap();
        spec.template.spec.as_mut().unwrap().containers[0].image = Some(image.to_owned());
    }
}

#[test]
fn a_new_deployment_gets_its_set_and_completes() {
    let mut world = World::new(deployment(3, "v1", json!({})));
    world.step();
    assert_eq!(world.sizes(), [(3, 0)]);
    assert_eq!(world.reason("Progressing"), "NewReplicaSetCreated");
    assert_eq!(world.reason("Available"), "MinimumReplicasUnavailable");
    world.settle(|_| {});
    assert_eq!(world.sizes(), [(3, 3)]);
    assert_eq!(world.reason("Progressing"), "NewReplicaSetAvailable");
    assert_eq!(world.reason("Available"), "MinimumReplicasAvailable");
    assert_eq!(revision(&world.deployment.metadata), 1);
    let status = world.deployment.status.unwrap();
    assert_eq!((status.updated_replicas, status.unavailable_replicas), (Some(3), Some(0)));
}

#[test]
fn rolling_back_reuses_the_old_set() {
    let mut world = World::new(deployment(2, "v1", json!({})));
    world.settle(|_| {});
    world.roll_to("v2");
    world.settle(|_| {});
    world.roll_to("v1");
    world.settle(|_| {});
    assert_eq!(world.sizes(), [(2, 2), (0, 0)]);
    assert_eq!(revision(&world.deployment.metadata), 3);
    assert_eq!(sets::annotation(&world.sets[0].metadata, sets::REVISION_HISTORY), Some("1"));
}

#[test]
fn the_annotation_of_old_rolls_back() {
    let mut world = World::new(deployment(2, "v1", json!({})));
    world.deployment.metadata.annotations = Some([("note".to_owned(), "first".to_owned())].into());
    world.settle(|_| {});
    let second = deployment(2, "v2", json!({})).spec;
    world.deployment.spec = second;
    annotate(&mut world.deployment.metadata, "note", "second");
    world.settle(|_| {});
    let mut go = |to: &str| {
        annotate(&mut world.deployment.metadata, sets::ROLLBACK_TO, to);
        world.settle(|_| {});
        assert_eq!(sets::annotation(&world.deployment.metadata, sets::ROLLBACK_TO), None);
        let image = world.deployment.spec.as_ref().unwrap().template.spec.as_ref().unwrap().containers[0].image.clone();
        let note = sets::annotation(&world.deployment.metadata, "note").unwrap_or_default().to_owned();
        let told = world.told.pop().unwrap();
        (image.unwrap(), note, told.reason, told.message)
    };
    let at = |image: &str, note: &str, reason, message: &str| {
        (image.to_owned(), note.to_owned(), reason, message.to_owned())
    };
    let done = "Rolled back deployment \"web\" to revision 1";
    assert_eq!(go("0"), at("v1", "first", "DeploymentRollback", done));
    let none = "Unable to find the revision to rollback to.";
    assert_eq!(go("9"), at("v1", "first", "DeploymentRollbackRevisionNotFound", none));
    let same = "The rollback revision contains the same template as current deployment \"web\"";
    assert_eq!(go("3"), at("v1", "first", "DeploymentRollbackTemplateUnchanged", same));
    assert_eq!(go("2").0, "v2");
    let mut fresh = World::new(deployment(1, "v1", json!({})));
    fresh.settle(|_| {});
    annotate(&mut fresh.deployment.metadata, sets::ROLLBACK_TO, "0");
    fresh.settle(|_| {});
    assert_eq!(fresh.told[0].message, "Unable to find last revision.");
}

#[test]
fn history_is_kept_up_to_its_limit() {
    let mut world = World::new(deployment(1, "v0", json!({"revisionHistoryLimit": 2})));
    for image in ["v1", "v2", "v3", "v4", "v5"] {
        world.settle(|_| {});
        world.roll_to(image);
    }
    world.settle(|_| {});
    assert_eq!(world.sets.len(), 3);
}

#[test]
fn recreate_has_no_two_versions_at_once() {
    let mut world = World::new(deployment(3, "v1", json!({"strategy": {"type": "Recreate"}})));
    world.settle(|_| {});
    world.roll_to("v2");
    world.settle(|world| {
        assert!(world.sets.iter().filter(|s| size(s) > 0).count() <= 1, "{:?}", world.sizes());
    });
    assert_eq!(world.sizes(), [(0, 0), (3, 3)]);
}

#[test]
fn a_broken_image_stalls_and_misses_its_deadline() {
    let mut world = World::new(deployment(4, "v1", json!({})));
    world.settle(|_| {});
    world.broken = Some("v2");
    world.roll_to("v2");
    world.settle(|_| {});
    assert_eq!(world.sizes(), [(3, 3), (2, 0)], "one less, one more");
    let wait = plan(&world.deployment, &world.sets, &[], world.clock).check_again.unwrap();
    assert!(wait <= Duration::from_secs(601), "{wait:?}");
    world.clock += Duration::from_secs(700);
    world.step();
    assert_eq!(world.reason("Progressing"), "ProgressDeadlineExceeded");
    world.broken = None;
    world.settle(|_| {});
    assert_eq!(world.reason("Progressing"), "NewReplicaSetAvailable");
}

#[test]
fn scaling_amid_a_rollout_keeps_the_proportions() {
    let mut world = World::new(deployment(
        10,
        "v1",
        json!({
        "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 3, "maxUnavailable": 2}}}),
    ));
    world.settle(|_| {});
    world.broken = Some("v2");
    world.roll_to("v2");
    world.settle(|_| {});
    assert_eq!(world.sizes(), [(8, 8), (5, 0)]);
    world.deployment.spec.as_mut().unwrap().replicas = Some(15);
    world.step();
    assert_eq!(world.sets.iter().map(|s| size(s)).collect::<Vec<_>>(), [11, 7], "5 more, as documented");
}

#[test]
fn a_paused_deployment_scales_and_does_not_roll() {
    let mut world = World::new(deployment(2, "v1", json!({})));
    world.settle(|_| {});
    world.deployment.spec.as_mut().unwrap().paused = Some(true);
    world.roll_to("v2");
    world.settle(|_| {});
    assert_eq!((world.sizes(), world.reason("Progressing").as_str()), (vec![(2, 2)], "DeploymentPaused"));
    world.deployment.spec.as_mut().unwrap().replicas = Some(4);
    world.settle(|_| {});
    assert_eq!(world.sizes(), [(4, 4)]);
    world.deployment.spec.as_mut().unwrap().paused = Some(false);
    world.settle(|_| {});
    assert_eq!(world.sizes(), [(0, 0), (4, 4)]);
}

#[test]
fn a_deployment_that_is_being_deleted_is_left_alone() {
    let mut d = deployment(2, "v1", json!({}));
    d.metadata.deletion_timestamp = Some(apimachinery::time::now());
    assert_eq!(plan(&d, &[], &[], now()).actions, []);
}

#[test]
fn progress_can_wait_and_what_is_complete_or_lost_cannot() {
    let deployment = deployment(3, "v1", json!({}));
    let status = |available: i32, is_available: &str, reason: &str| -> DeploymentStatus {
        let progressing = if reason == "ProgressDeadlineExceeded" { "False" } else { "True" };
        serde_json::from_value(json!({"observedGeneration": 1, "replicas": 3, "updatedReplicas": 3,
            "availableReplicas": available, "conditions": [
                {"type": "Available", "status": is_available}, {"type": "Progressing", "status": progressing, "reason": reason}]}))
        .unwrap()
    };
    let (created, updated, complete) = ("NewReplicaSetCreated", "ReplicaSetUpdated", "NewReplicaSetAvailable");
    for (former, now, can) in [
        ((0, "False", created), (1, "False", updated), true),
        ((1, "False", updated), (2, "True", updated), true),
        ((2, "True", updated), (3, "True", complete), false),
        ((2, "True", updated), (2, "True", "ProgressDeadlineExceeded"), false),
        ((3, "True", complete), (2, "True", complete), true),
        ((3, "True", complete), (1, "False", complete), false),
    ] {
        let [before, after] = [former, now].map(|(available, is, reason)| status(available, is, reason));
        assert_eq!(status::can_wait(&deployment, &after, &before), can, "{former:?} {now:?}");
    }
    let seen = DeploymentStatus { observed_generation: Some(2), ..status(1, "False", updated) };
    assert!(!status::can_wait(&deployment, &seen, &status(1, "False", updated)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Whatever the numbers: never fewer available than allowed, never more pods than allowed, and it ends.
    #[test]
    fn a_rollout_keeps_its_bounds_and_ends(replicas in 0i32..25, surge in 0i32..8, unavailable in 0i32..8, pace in 1i32..4) {
        prop_assume!(surge + unavailable > 0);
        let strategy = json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": unavailable}});
        let mut world = World::new(deployment(replicas, "v1", json!({"strategy": strategy})));
        world.settle(|_| {});
        world.roll_to("v2");
        for _ in 0..400 {
            let stepped = world.step();
            let total: i32 = world.sets.iter().map(|s| size(s)).sum();
            // A pod that is taken away is not available any more.
            let serving: i32 = world.sets.iter().map(|s| available(s).min(size(s))).sum();
            prop_assert!(total <= replicas + surge, "{:?}", world.sizes());
            prop_assert!(serving >= replicas - unavailable.min(replicas), "{:?}", world.sizes());
            if !world.pods_follow(pace) && !stepped {
                break;
            }
        }
        prop_assert!(status::is_complete(&world.deployment, world.deployment.status.as_ref().unwrap()));
    }
}
