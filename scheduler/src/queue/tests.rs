//! Which pod comes when, by the seconds of a clock of its own.
use super::*;
use crate::testing::{PodBuilder, pending, pod};

struct ByPriority;

impl Policy for ByPriority {
    fn key(&self, pod: &PendingPod, waiting_since_us: i64) -> QueueKey {
        (-i64::from(pod.facts.priority), waiting_since_us)
    }

    fn admits(&self, pod: &PendingPod) -> bool {
        pod.spec().and_then(|spec| spec.scheduling_gates.as_ref()).is_none()
    }
}

struct Fixture {
    queue: Queue<ByPriority>,
    start: Instant,
}

impl Fixture {
    fn new() -> Fixture {
        let (initial_backoff, max_backoff) = (Duration::from_secs(1), Duration::from_secs(10));
        let queue =
            Queue::new(ByPriority, Timing { initial_backoff, max_backoff, unschedulable_flush: UNSCHEDULABLE_FLUSH });
        Fixture { queue, start: Instant::now() }
    }

    fn at(&self, seconds: u64) -> Instant {
        self.start + Duration::from_secs(seconds)
    }

    fn set(&mut self, pod: PodBuilder, seconds: u64) {
        let now = self.at(seconds);
        self.queue.set(Arc::new(pending(pod.build())), now, seconds as i64 * 1_000_000);
    }

    fn pop(&mut self, seconds: u64) -> Option<String> {
        let now = self.at(seconds);
        self.queue.pop(now).map(|(pod, _)| pod.facts.key.name.clone())
    }

    fn refused(&mut self, name: &str, helped_by: Option<EventSet>, seconds: u64) {
        let now = self.at(seconds);
        let refused = helped_by.map(|helped_by| Refused { helped_by, places: Vec::new() });
        self.queue.refused(&format!("uid-{name}"), refused, now);
    }

    fn happened(&mut self, event: EventSet, seconds: u64) {
        let now = self.at(seconds);
        self.queue.happened(event, now, |_, _| true);
    }
}

#[test]
fn pods_come_by_priority_and_then_by_age() {
    let mut fixture = Fixture::new();
    fixture.set(pod("old"), 0);
    fixture.set(pod("new"), 1);
    fixture.set(pod("urgent").priority(5), 2);
    let order: Vec<_> = std::iter::from_fn(|| fixture.pop(3)).collect();
    assert_eq!(order, ["urgent", "old", "new"]);
}

#[test]
fn pods_that_are_held_back_name_who_refused_them() {
    let mut fixture = Fixture::new();
    let gate = serde_json::json!({"schedulingGates": [{"name": "g"}]});
    fixture.set(pod("gated").spec(gate), 0);
    for (name, places) in [("fits", vec![]), ("refused", vec![2, 5])] {
        fixture.set(pod(name), 0);
        let (pod, _) = fixture.queue.pop(fixture.start).expect("a pod");
        let refused = Refused { helped_by: EventSet::NODE_ADD, places };
        fixture.queue.refused(&pod.facts.uid, Some(refused), fixture.start);
    }
    let held = fixture.queue.held_back().map(|(pod, places)| (pod.facts.key.name.clone(), places.to_vec()));
    let held: std::collections::BTreeMap<_, _> = held.collect();
    assert_eq!(held, [("gated".to_owned(), vec![]), ("refused".to_owned(), vec![2, 5])].into());
}

#[test]
fn a_refused_pod_waits_for_an_event_that_can_help_it() {
    let mut fixture = Fixture::new();
    fixture.set(pod("p"), 0);
    assert_eq!(fixture.pop(0).as_deref(), Some("p"));
    fixture.refused("p", Some(EventSet::NODE_TAINT), 0);
    fixture.happened(EventSet::POD_REMOVED, 20);
    assert_eq!(fixture.pop(20), None);
    fixture.happened(EventSet::NODE_TAINT, 20);
    assert_eq!(fixture.pop(20).as_deref(), Some("p"));
}

#[test]
fn an_error_waits_for_the_end_of_the_backoff() {
    let mut fixture = Fixture::new();
    fixture.set(pod("p"), 0);
    for (attempt, backoff) in [(1, 1), (2, 2), (3, 4), (4, 8), (5, 10), (6, 10)] {
        let start = attempt * 100;
        assert_eq!(fixture.pop(start).as_deref(), if attempt == 1 { Some("p") } else { None }, "{attempt}");
        if attempt > 1 {
            fixture.happened(EventSet::NODE_ADD, start);
            assert_eq!(fixture.pop(start).as_deref(), Some("p"));
        }
        fixture.refused("p", None, start);
        assert_eq!(fixture.pop(start + backoff - 1), None, "attempt {attempt}");
        assert_eq!(fixture.queue.depths().backoff, 1);
        assert_eq!(fixture.pop(start + backoff).as_deref(), Some("p"), "attempt {attempt}");
        // Put it back as it was, without counting this attempt.
        fixture.refused("p", Some(EventSet::NODE_ADD), start + backoff);
        let uid: Arc<str> = "uid-p".into();
        fixture.queue.entries.get_mut(&uid).expect("p").errors = attempt as u32;
    }
}

#[test]
fn errors_are_counted_apart_from_refusals() {
    let mut fixture = Fixture::new();
    fixture.set(pod("p"), 0);
    for start in [0, 100, 200, 300] {
        assert_eq!(fixture.pop(start).as_deref(), Some("p"));
        fixture.refused("p", Some(EventSet::NODE_ADD), start);
        fixture.happened(EventSet::NODE_ADD, start + 50);
    }
    assert_eq!(fixture.pop(400).as_deref(), Some("p"));
    fixture.refused("p", None, 400);
    assert_eq!(
        (fixture.pop(400), fixture.pop(401).as_deref()),
        (None, Some("p")),
        "the first error, not the fifth failure"
    );
}

#[test]
fn who_was_tried_comes_behind_who_came_meanwhile() {
    let mut fixture = Fixture::new();
    fixture.set(pod("old"), 0);
    fixture.set(pod("new"), 1);
    assert_eq!(fixture.pop(2).as_deref(), Some("old"));
    fixture.refused("old", Some(EventSet::NODE_ADD), 2);
    fixture.set(pod("newest"), 3);
    fixture.happened(EventSet::NODE_ADD, 9);
    let order: Vec<_> = std::iter::from_fn(|| fixture.pop(9)).collect();
    assert_eq!(order, ["new", "old", "newest"]);
}

#[test]
fn a_pod_that_an_event_helped_waits_out_its_backoff_only_while_others_are_active() {
    let mut fixture = Fixture::new();
    fixture.set(pod("p"), 0);
    fixture.set(pod("urgent").priority(5), 0);
    for name in ["urgent", "p"] {
        assert_eq!(fixture.pop(0).as_deref(), Some(name));
        fixture.refused(name, Some(EventSet::NODE_ADD), 0);
    }
    fixture.happened(EventSet::NODE_ADD, 0);
    assert_eq!(fixture.queue.depths().backoff, 2);
    fixture.set(pod("new"), 0);
    let order: Vec<_> = std::iter::from_fn(|| fixture.pop(0)).collect();
    assert_eq!(order, ["new", "urgent", "p"]);
}

#[test]
fn an_event_during_the_decision_is_not_missed() {
    let mut fixture = Fixture::new();
    fixture.set(pod("p"), 0);
    fixture.pop(0);
    fixture.happened(EventSet::NODE_ADD, 0);
    fixture.refused("p", Some(EventSet::NODE_ADD), 0);
    assert_eq!(fixture.pop(1).as_deref(), Some("p"));
}

#[test]
fn an_error_is_tried_again_after_the_backoff() {
    let mut fixture = Fixture::new();
    fixture.set(pod("p"), 0);
    fixture.pop(0);
    fixture.refused("p", None, 0);
    assert_eq!(fixture.pop(0), None);
    assert_eq!(fixture.pop(1).as_deref(), Some("p"));
}

#[test]
fn without_any_event_a_pod_is_tried_again_in_the_end() {
    let mut fixture = Fixture::new();
    fixture.set(pod("p"), 0);
    fixture.pop(0);
    fixture.refused("p", Some(EventSet::NODE_ADD), 0);
    assert_eq!(fixture.queue.flush(fixture.start), Some(fixture.start + UNSCHEDULABLE_FLUSH));
    assert_eq!(fixture.pop(299), None);
    assert_eq!(fixture.pop(300).as_deref(), Some("p"));
}

#[test]
fn a_gated_pod_comes_when_its_gates_are_lifted() {
    let mut fixture = Fixture::new();
    fixture.set(pod("p").gate("g"), 0);
    assert_eq!(fixture.pop(0), None);
    assert_eq!(fixture.queue.depths().gated, 1);
    fixture.set(pod("p"), 1);
    assert_eq!(fixture.pop(1).as_deref(), Some("p"));
}

#[test]
fn a_pod_that_is_held_was_not_tried() {
    let mut fixture = Fixture::new();
    fixture.set(pod("p"), 0);
    let held = |fixture: &mut Fixture, seconds| {
        let (now, helped_by) = (fixture.at(seconds), EventSet::RESOURCE_CLAIM | EventSet::OWN_CLAIMS);
        fixture.queue.held("uid-p", Refused { helped_by, places: vec![3] }, now);
    };
    assert_eq!(fixture.pop(0).as_deref(), Some("p"));
    held(&mut fixture, 0);
    assert_eq!(fixture.queue.depths(), Depths { gated: 1, ..Depths::default() });
    fixture.happened(EventSet::NODE_ADD, 0);
    assert_eq!(fixture.pop(0), None);
    fixture.happened(EventSet::RESOURCE_CLAIM, 0);
    let (_, attempts) = fixture.queue.pop(fixture.start).expect("at once");
    assert_eq!(attempts, 1);
    fixture.happened(EventSet::RESOURCE_CLAIM, 0);
    held(&mut fixture, 0);
    assert_eq!(fixture.pop(0).as_deref(), Some("p"), "what came meanwhile is not missed");
    held(&mut fixture, 0);
    let claims = serde_json::json!([{"name": "r", "resourceClaimName": "made"}]);
    let mut told = pod("p").build();
    told.status.get_or_insert_default().resource_claim_statuses = serde_json::from_value(claims).expect("claims");
    let now = fixture.at(0);
    fixture.queue.set(Arc::new(pending(told)), now, 0);
    assert_eq!(fixture.pop(0).as_deref(), Some("p"), "its claims were made");
}

#[test]
fn a_changed_pod_is_tried_again_but_not_for_its_status() {
    let mut fixture = Fixture::new();
    fixture.set(pod("p"), 0);
    fixture.pop(0);
    fixture.refused("p", Some(EventSet::NODE_ADD | EventSet::OWN_LABELS), 0);
    fixture.set(pod("p"), 50);
    assert_eq!(fixture.pop(50), None);
    fixture.set(pod("p").label("new", "label"), 50);
    assert_eq!(fixture.pop(50).as_deref(), Some("p"));
    fixture.refused("p", Some(EventSet::NODE_ADD | EventSet::OWN_TOLERATIONS), 50);
    fixture.set(pod("p").label("another", "label"), 99);
    assert_eq!(fixture.pop(99), None, "who refused it does not look at labels");
    fixture.set(pod("p").spec(serde_json::json!({"tolerations": [{"operator": "Exists"}]})), 99);
    assert_eq!(fixture.pop(99).as_deref(), Some("p"));
}

#[test]
fn what_a_pod_changes_of_itself_is_told_apart() {
    let asks = |cpu: &str| pod("p").requests(&[("cpu", cpu), ("example.com/gpu", "2")]);
    let of = |old: PodBuilder, new: PodBuilder| own_changes(&pending(old.build()), &pending(new.build()));
    assert_eq!(of(asks("1"), asks("2")), EventSet::NONE);
    assert_eq!(of(asks("2"), asks("1")), EventSet::OWN_REQUESTS);
    assert_eq!(of(asks("1"), pod("p").requests(&[("cpu", "1")])), EventSet::OWN_REQUESTS);
    assert_eq!(of(pod("p"), pod("p").label("a", "b")), EventSet::OWN_LABELS);
}

#[test]
fn a_removed_pod_does_not_come_back() {
    let mut fixture = Fixture::new();
    fixture.set(pod("p"), 0);
    assert_eq!(fixture.queue.remove("uid-p"), Some(0));
    assert_eq!(fixture.pop(0), None);
    fixture.refused("p", None, 0);
    assert_eq!(fixture.queue.depths(), Depths::default());
}
