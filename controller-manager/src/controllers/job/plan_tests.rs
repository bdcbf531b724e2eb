//! Tests of a Job's plan, by playing whole Jobs through a cluster in small.
use super::*;
use serde_json::{Value, json};

/// A Job, its pods, and a clock.
struct World {
    job: Job,
    pods: Vec<Arc<Pod>>,
    clock: Timestamp,
    made: usize,
    events: Vec<String>,
}

impl World {
    fn new(spec: Value) -> Self {
        let mut value = json!({"metadata": {"name": "j", "uid": "j"}, "spec": {"parallelism": 1, "backoffLimit": 6,
            "template": {"spec": {"restartPolicy": "Never", "containers": []}}}});
        spec.as_object().into_iter().flatten().for_each(|(k, v)| value["spec"][k] = v.clone());
        let clock = "2026-01-01T00:00:00Z".parse().unwrap();
        Self { job: serde_json::from_value(value).unwrap(), pods: Vec::new(), clock, made: 0, events: Vec::new() }
    }

    /// One step, carried out.
    fn step(&mut self) -> Plan {
        self.clock += Duration::from_secs(1);
        let plan = plan(&self.job, &self.pods, self.clock);
        self.job.status = Some(plan.status.clone());
        self.events.extend(plan.events.iter().map(|(_, reason, _)| reason.clone()));
        let (released, deleted): (Vec<_>, Vec<_>) =
            (plan.release.iter().map(|p| uid(p)).collect(), plan.delete.iter().map(|p| uid(p)).collect());
        self.pods.retain(|p| !deleted.contains(&uid(p)));
        for pod in &mut self.pods {
            if released.contains(&uid(pod)) {
                Arc::make_mut(pod).metadata.finalizers = None;
            }
        }
        for wanted in &plan.create {
            self.made += 1;
            let labels = wanted.index.map(|i| json!({INDEX: i.to_string()}));
            let annotations = wanted.failures.map(|f| json!({FAILURES: f.counted.to_string()}));
            let value = json!({"metadata": {"name": format!("p{}", self.made), "uid": format!("u{}", self.made),
                "labels": labels, "annotations": annotations, "finalizers": [FINALIZER], "creationTimestamp": self.clock.to_string()},
                "spec": {"containers": []}, "status": {"phase": "Running"}});
            self.pods.push(Arc::new(serde_json::from_value(value).unwrap()));
        }
        plan
    }

    fn steps(&mut self, count: usize) {
        (0..count).for_each(|_| drop(self.step()));
    }

    /// All running pods end so.
    fn end(&mut self, phase: &str) {
        for pod in self.pods.iter_mut().filter(|p| is_active(p)) {
            Arc::make_mut(pod).status.as_mut().unwrap().phase = Some(phase.to_owned());
        }
    }

    /// The running pod of an index ends so, with an exit code.
    fn end_index(&mut self, index: i32, phase: &str, code: i32) {
        let pod = self.pods.iter_mut().find(|p| index_of(p) == Some(index) && is_active(p)).unwrap();
        let ended = json!([{"name": "c", "image": "", "imageID": "", "ready": false, "restartCount": 0,
            "state": {"terminated": {"exitCode": code, "finishedAt": self.clock.to_string()}}}]);
        let status = Arc::make_mut(pod).status.as_mut().unwrap();
        status.phase = Some(phase.to_owned());
        status.container_statuses = serde_json::from_value(ended).unwrap();
    }

    /// Steps, with pauses long enough for every back-off.
    fn steps_slowly(&mut self, count: usize) {
        for _ in 0..count {
            self.clock += LONGEST_BACKOFF;
            self.step();
        }
    }

    fn running(&self) -> usize {
        self.pods.iter().filter(|p| is_active(p)).count()
    }

    fn status(&self) -> JobStatus {
        self.job.status.clone().unwrap()
    }
}

#[test]
fn a_job_runs_to_its_completions() {
    let mut world = World::new(json!({"completions": 3, "parallelism": 2}));
    world.step();
    assert_eq!((world.running(), world.status().start_time.is_some()), (2, true));
    world.end("Succeeded");
    world.steps(2);
    assert_eq!((world.running(), world.status().succeeded), (1, Some(2)));
    world.end("Succeeded");
    world.steps(3);
    let status = world.status();
    assert_eq!((status.succeeded, has_condition(&status, "Complete"), status.active), (Some(3), true, None));
    assert!(status.completion_time.is_some() && has_condition(&status, "SuccessCriteriaMet"));
    assert_eq!((world.made, world.events.as_slice()), (3, ["Completed".to_owned()].as_slice()));
    assert!(world.pods.iter().all(|p| !has_finalizer(p)));
}

#[test]
fn more_successes_than_were_asked_for_are_told() {
    let mut world = World::new(json!({"completions": 1}));
    world.step();
    let mut surplus = (*world.pods[0]).clone();
    (surplus.metadata.name, surplus.metadata.uid) = (Some("more".to_owned()), Some("more".to_owned()));
    world.pods.push(Arc::new(surplus));
    world.end("Succeeded");
    world.steps(3);
    assert_eq!(world.status().succeeded, Some(2));
    assert_eq!(world.events, ["TooManySucceededPods", "Completed"]);
}

#[test]
fn a_pod_is_counted_once_even_if_the_finalizer_is_slow_to_go() {
    let mut world = World::new(json!({"completions": 5}));
    world.step();
    world.end("Succeeded");
    for _ in 0..3 {
        let plan = plan(&world.job, &world.pods, world.clock);
        world.job.status = Some(plan.status);
    }
    assert_eq!(world.status().uncounted_terminated_pods.unwrap().succeeded.unwrap(), ["u1"]);
    assert_eq!(world.status().succeeded, None);
    world.steps(2);
    assert_eq!(world.status().succeeded, Some(1));
}

#[test]
fn failures_back_off_and_then_end_the_job() {
    let mut world = World::new(json!({"completions": 1, "backoffLimit": 1}));
    world.step();
    world.end("Failed");
    world.steps(2);
    assert_eq!((world.running(), world.status().failed), (0, Some(1)));
    let wait = world.step().check_again.unwrap();
    assert!(wait <= Duration::from_secs(10), "{wait:?}");
    world.clock += Duration::from_secs(10);
    world.step();
    assert_eq!(world.running(), 1);
    world.end("Failed");
    world.steps(3);
    let status = world.status();
    assert_eq!((status.failed, has_condition(&status, "Failed")), (Some(2), true));
    assert_eq!(world.events, ["BackoffLimitExceeded"]);
}

#[test]
fn a_deadline_ends_it() {
    let mut world = World::new(json!({"completions": 1, "activeDeadlineSeconds": 30}));
    assert!(world.step().check_again.unwrap() <= Duration::from_secs(31));
    world.clock += Duration::from_secs(40);
    world.steps(3);
    assert_eq!((world.running(), world.events.as_slice()), (0, ["DeadlineExceeded".to_owned()].as_slice()));
    assert_eq!(world.status().failed, Some(1), "what runs when the Job fails has failed");
}

#[test]
fn suspending_takes_the_pods_away() {
    let mut world = World::new(json!({"completions": 2, "parallelism": 2}));
    world.step();
    world.job.spec.as_mut().unwrap().suspend = Some(true);
    world.steps(2);
    assert_eq!((world.running(), world.status().start_time), (0, None));
    world.job.spec.as_mut().unwrap().suspend = Some(false);
    world.steps(1);
    assert_eq!((world.running(), world.status().failed), (2, None));
    assert_eq!(world.events, ["Suspended", "Resumed"]);
}

#[test]
fn indexes_are_done_each_once() {
    let mut world = World::new(json!({"completions": 4, "parallelism": 3, "completionMode": "Indexed"}));
    world.step();
    let indexes: Vec<_> = world.pods.iter().filter_map(|p| index_of(p)).collect();
    assert_eq!(indexes, [0, 1, 2]);
    Arc::make_mut(&mut world.pods[1]).status.as_mut().unwrap().phase = Some("Succeeded".to_owned());
    world.steps(2);
    assert_eq!(world.status().completed_indexes.as_deref(), Some("1"));
    assert_eq!(world.pods.last().and_then(|p| index_of(p)), Some(3));
    world.end("Succeeded");
    world.steps(3);
    assert_eq!(world.status().completed_indexes.as_deref(), Some("0-3"));
    assert!(has_condition(&world.status(), "Complete"));
}

#[test]
fn a_work_queue_ends_with_its_last_pod() {
    let mut world = World::new(json!({"parallelism": 2}));
    world.step();
    Arc::make_mut(&mut world.pods[0]).status.as_mut().unwrap().phase = Some("Succeeded".to_owned());
    world.steps(3);
    assert_eq!((world.running(), has_condition(&world.status(), "Complete")), (1, false));
    world.end("Succeeded");
    world.steps(3);
    assert!(has_condition(&world.status(), "Complete"));
    assert_eq!(world.made, 2);
}

#[test]
fn each_index_has_failures_of_its_own() {
    let mut world = World::new(json!({"completions": 3, "parallelism": 3, "completionMode": "Indexed",
        "backoffLimit": i32::MAX, "backoffLimitPerIndex": 1}));
    world.step();
    world.end_index(1, "Failed", 1);
    world.step();
    assert_eq!((world.running(), world.status().failed), (2, None), "it rests, and is counted when the next is there");
    world.steps_slowly(3);
    assert_eq!((world.running(), world.status().failed), (3, Some(1)));
    world.end_index(1, "Failed", 1);
    world.steps_slowly(2);
    assert_eq!((world.running(), world.status().failed_indexes.as_deref()), (2, Some("1")));
    assert!(!has_condition(&world.status(), "FailureTarget"), "the other indexes go on");
    world.end_index(0, "Succeeded", 0);
    world.end_index(2, "Succeeded", 0);
    world.steps_slowly(3);
    let status = world.status();
    assert_eq!((status.completed_indexes.as_deref(), status.failed), (Some("0,2"), Some(2)));
    assert!(has_condition(&status, "Failed"));
    assert_eq!(world.events, ["FailedIndexes"]);
}

#[test]
fn too_many_failed_indexes_end_the_job() {
    let mut world = World::new(json!({"completions": 4, "parallelism": 4, "completionMode": "Indexed",
        "backoffLimit": i32::MAX, "backoffLimitPerIndex": 0, "maxFailedIndexes": 1}));
    world.step();
    world.end_index(0, "Failed", 1);
    world.steps(2);
    assert_eq!(world.running(), 3);
    world.end_index(3, "Failed", 1);
    world.steps(3);
    let status = world.status();
    assert_eq!((world.running(), world.events.as_slice()), (0, ["MaxFailedIndexesExceeded".to_owned()].as_slice()));
    assert_eq!((status.failed_indexes.as_deref(), status.failed), (Some("0,3"), Some(4)));
}

#[test]
fn failures_count_as_their_policy_says() {
    let rule = |action: &str, code: i32| json!({"action": action, "onExitCodes": {"operator": "In", "values": [code]}});
    let spec = json!({"completions": 2, "parallelism": 2, "completionMode": "Indexed", "backoffLimit": 0,
        "podFailurePolicy": {"rules": [rule("Ignore", 1), rule("FailJob", 2)]}});
    let mut world = World::new(spec);
    world.step();
    world.end_index(0, "Failed", 1);
    world.steps_slowly(3);
    assert_eq!((world.running(), world.status().failed), (2, None), "ignored, and tried again");
    world.end_index(1, "Failed", 2);
    world.steps(3);
    let status = world.status();
    assert_eq!(target(&status, "Failed").and_then(|c| c.reason.as_deref()), Some("PodFailurePolicy"));
    assert_eq!((world.running(), status.failed), (0, Some(2)));

    let mut world = World::new(json!({"completions": 2, "parallelism": 2, "completionMode": "Indexed",
        "backoffLimit": i32::MAX, "backoffLimitPerIndex": 3, "podFailurePolicy": {"rules": [rule("FailIndex", 3)]}}));
    world.step();
    world.end_index(0, "Failed", 3);
    world.steps_slowly(3);
    assert_eq!((world.running(), world.status().failed_indexes.as_deref()), (1, Some("0")));
}

#[test]
fn success_by_policy_ends_the_rest() {
    let mut world = World::new(json!({"completions": 3, "parallelism": 3, "completionMode": "Indexed",
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]}}));
    world.step();
    world.end_index(0, "Succeeded", 0);
    world.steps(3);
    let status = world.status();
    assert_eq!(target(&status, "SuccessCriteriaMet").and_then(|c| c.reason.as_deref()), Some("SuccessPolicy"));
    assert!(has_condition(&status, "Complete"));
    assert_eq!((world.running(), status.succeeded, status.failed), (0, Some(1), None));
}

#[test]
fn an_ending_pod_is_replaced_as_its_policy_says() {
    for (policy, made) in [("TerminatingOrFailed", 2), ("Failed", 1)] {
        let mut world = World::new(json!({"completions": 1, "podReplacementPolicy": policy}));
        world.step();
        Arc::make_mut(&mut world.pods[0]).metadata.deletion_timestamp = Some(Time(world.clock));
        world.steps(2);
        assert_eq!(world.made, made, "{policy}");
    }
}
