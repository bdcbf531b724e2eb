//! Tables over the states of a pod, and laws that hold in all of them.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use proptest::prelude::*;
use serde_json::json;

use super::*;
use crate::runtime::labels::Annotated;
use crate::runtime::observed::Sandbox;

const SECOND: i64 = 1_000_000_000;

fn pod(spec: serde_json::Value) -> Pod {
    serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": spec})).unwrap()
}

fn sandbox(attempt: u32, ready: bool) -> Sandbox {
    Sandbox {
        id: format!("s{attempt}"),
        attempt,
        ready,
        created_at: i64::from(attempt),
        host_network: false,
        ips: vec!["10.0.0.1".into()],
    }
}

fn seen(name: &str, state: State, exit_code: i32) -> ObservedContainer {
    ObservedContainer {
        id: format!("{name}-0"),
        name: name.into(),
        sandbox_id: "s0".into(),
        state,
        exit_code,
        finished_at: if state == State::Exited { SECOND } else { 0 },
        annotated: Annotated::default(),
        ..Default::default()
    }
}

fn observed(sandboxes: Vec<Sandbox>, containers: Vec<ObservedContainer>) -> ObservedPod {
    ObservedPod { uid: "u".into(), sandboxes, containers, ..Default::default() }
}

fn started(_: &ObservedContainer) -> Health {
    Health { started: true, ..Default::default() }
}

fn run(pod: &Pod, observed: &ObservedPod, health: &dyn Fn(&ObservedContainer) -> Health) -> Actions {
    let backoff = RestartBackoff::new(Duration::from_secs(300));
    plan(&Input { pod, observed, health, backoff: &backoff, now: 2 * SECOND })
}

/// A compact form to compare with: the sandbox, kills and starts.
fn show(actions: &Actions) -> String {
    let sandbox = match &actions.sandbox {
        SandboxAction::Keep(_) => "keep".to_owned(),
        SandboxAction::Create { attempt } => format!("create{attempt}"),
        SandboxAction::Stop => "stop".to_owned(),
    };
    let kills: Vec<_> = actions.kill.iter().map(|k| format!("-{}", k.name)).collect();
    let starts: Vec<_> = actions.start.iter().map(|s| format!("+{}#{}", s.container.name, s.restart_count)).collect();
    let removed: Vec<_> = actions.remove.iter().map(|id| format!("x{id}")).collect();
    [vec![sandbox], kills, starts, removed].concat().join(" ")
}

fn apps(policy: &str) -> serde_json::Value {
    json!({"restartPolicy": policy, "containers": [{"name": "a"}, {"name": "b"}]})
}

fn with_init(policy: &str) -> serde_json::Value {
    json!({"restartPolicy": policy, "initContainers": [{"name": "i"}, {"name": "j"}], "containers": [{"name": "a"}]})
}

fn with_sidecar(policy: &str) -> serde_json::Value {
    json!({"restartPolicy": policy, "initContainers": [{"name": "s", "restartPolicy": "Always"}, {"name": "j"}],
           "containers": [{"name": "a"}]})
}

#[test]
fn steps() {
    use State::{Created, Exited, Running, Unknown};
    let up = || vec![sandbox(0, true)];
    let cases: Vec<(&str, serde_json::Value, ObservedPod, &str)> = vec![
        ("a new pod", apps("Always"), observed(vec![], vec![]), "create0 +a#0 +b#0"),
        ("a new pod with init", with_init("Always"), observed(vec![], vec![]), "create0 +i#0"),
        ("a fresh sandbox", apps("Always"), observed(up(), vec![]), "keep +a#0 +b#0"),
        ("all runs", apps("Always"), observed(up(), vec![seen("a", Running, 0), seen("b", Running, 0)]), "keep"),
        (
            "one ended well, Always",
            apps("Always"),
            observed(up(), vec![seen("a", Exited, 0), seen("b", Running, 0)]),
            "keep +a#1",
        ),
        (
            "one ended well, OnFailure",
            apps("OnFailure"),
            observed(up(), vec![seen("a", Exited, 0), seen("b", Running, 0)]),
            "keep",
        ),
        (
            "one failed, OnFailure",
            apps("OnFailure"),
            observed(up(), vec![seen("a", Exited, 3), seen("b", Running, 0)]),
            "keep +a#1",
        ),
        ("one failed, Never", apps("Never"), observed(up(), vec![seen("a", Exited, 3), seen("b", Running, 0)]), "keep"),
        ("all over, Never", apps("Never"), observed(up(), vec![seen("a", Exited, 3), seen("b", Exited, 0)]), "stop"),
        (
            "all succeeded, OnFailure",
            apps("OnFailure"),
            observed(up(), vec![seen("a", Exited, 0), seen("b", Exited, 0)]),
            "stop",
        ),
        (
            "created but never started",
            apps("Never"),
            observed(up(), vec![seen("a", Created, 0), seen("b", Running, 0)]),
            "keep +a#1",
        ),
        ("unknown", apps("Never"), observed(up(), vec![seen("a", Unknown, 0), seen("b", Running, 0)]), "keep -a +a#1"),
        (
            "the sandbox died, Always",
            apps("Always"),
            observed(vec![sandbox(0, false)], vec![seen("a", Exited, 137), seen("b", Exited, 0)]),
            "create1 +a#1 +b#1",
        ),
        (
            "the sandbox died, OnFailure: what succeeded stays over",
            apps("OnFailure"),
            observed(vec![sandbox(0, false)], vec![seen("a", Exited, 137), seen("b", Exited, 0)]),
            "create1 +a#1",
        ),
        (
            "the sandbox died, Never",
            apps("Never"),
            observed(vec![sandbox(0, false)], vec![seen("a", Exited, 0)]),
            "stop",
        ),
        (
            "the sandbox died after success, OnFailure",
            apps("OnFailure"),
            observed(vec![sandbox(0, false)], vec![seen("a", Exited, 0), seen("b", Exited, 0)]),
            "stop",
        ),
        (
            "two sandboxes are ready",
            apps("Always"),
            observed(vec![sandbox(1, true), sandbox(0, true)], vec![]),
            "create2 +a#0 +b#0",
        ),
        ("init in a fresh sandbox", with_init("Always"), observed(up(), vec![]), "keep +i#0"),
        ("init runs", with_init("Always"), observed(up(), vec![seen("i", Running, 0)]), "keep"),
        ("next init", with_init("Always"), observed(up(), vec![seen("i", Exited, 0)]), "keep +j#0"),
        (
            "init done",
            with_init("Always"),
            observed(up(), vec![seen("j", Exited, 0), seen("i", Exited, 0)]),
            "keep +a#0",
        ),
        ("init failed, Always", with_init("Always"), observed(up(), vec![seen("i", Exited, 1)]), "keep +i#1"),
        ("init failed, Never", with_init("Never"), observed(up(), vec![seen("i", Exited, 1)]), "stop"),
        ("an old init status is gone", with_init("Always"), observed(up(), vec![seen("a", Running, 0)]), "keep"),
        ("a sidecar first", with_sidecar("Always"), observed(up(), vec![]), "keep +s#0"),
        ("then the next init", with_sidecar("Always"), observed(up(), vec![seen("s", Running, 0)]), "keep +j#0"),
        (
            "a sidecar restarts while init goes on",
            with_sidecar("Never"),
            observed(up(), vec![seen("j", Running, 0), seen("s", Exited, 1)]),
            "keep +s#1",
        ),
        (
            "a sidecar restarts beside the app",
            with_sidecar("Never"),
            observed(up(), vec![seen("a", Running, 0), seen("j", Exited, 0), seen("s", Exited, 0)]),
            "keep +s#1",
        ),
        (
            "a sidecar ends with the app",
            with_sidecar("Never"),
            observed(up(), vec![seen("a", Exited, 0), seen("j", Exited, 0), seen("s", Running, 0)]),
            "stop",
        ),
        (
            "an ephemeral container beside the rest",
            json!({"containers": [{"name": "a"}], "ephemeralContainers": [{"name": "e"}]}),
            observed(up(), vec![seen("a", Running, 0)]),
            "keep +e#0",
        ),
        (
            "an ephemeral container does not restart",
            json!({"containers": [{"name": "a"}], "ephemeralContainers": [{"name": "e"}]}),
            observed(up(), vec![seen("a", Running, 0), seen("e", Exited, 1)]),
            "keep",
        ),
    ];
    for (name, spec, observed, want) in cases {
        assert_eq!(show(&run(&pod(spec), &observed, &started)), want, "{name}");
    }
}

#[test]
fn a_sidecar_that_has_not_started_holds_the_next_one() {
    let observed = observed(vec![sandbox(0, true)], vec![seen("s", State::Running, 0)]);
    assert_eq!(show(&run(&pod(with_sidecar("Always")), &observed, &|_| Health::default())), "keep");
}

#[test]
fn a_sandbox_without_an_address_or_with_another_network_is_replaced() {
    let running = || vec![seen("a", State::Running, 0)];
    let spec = json!({"containers": [{"name": "a"}]});
    let no_ip = observed(vec![Sandbox { ips: vec![], ..sandbox(0, true) }], running());
    assert!(show(&run(&pod(spec.clone()), &no_ip, &started)).starts_with("create1"));
    let host = observed(vec![Sandbox { host_network: true, ips: vec![], ..sandbox(0, true) }], running());
    assert!(show(&run(&pod(spec.clone()), &host, &started)).starts_with("create1"));
    let mut on_host = spec;
    on_host["hostNetwork"] = json!(true);
    assert_eq!(show(&run(&pod(on_host), &host, &started)), "keep");
}

#[test]
fn probes_and_changes_kill() {
    let running = observed(vec![sandbox(0, true)], vec![seen("a", State::Running, 0), seen("b", State::Running, 0)]);
    let sick = |which: &'static str| {
        move |c: &ObservedContainer| Health { liveness_failed: c.name == which, started: true, ..Default::default() }
    };
    assert_eq!(show(&run(&pod(apps("Always")), &running, &sick("a"))), "keep -a +a#1");
    assert_eq!(show(&run(&pod(apps("Never")), &running, &sick("a"))), "keep -a");
    let actions = run(&pod(apps("Always")), &running, &sick("b"));
    assert_eq!(actions.kill[0].message, "Container b failed liveness probe, will be restarted");
    let mut changed = running;
    changed.containers[0].annotated.hash = 1;
    assert_eq!(show(&run(&pod(apps("Never")), &changed, &started)), "keep -a +a#1");
}

#[test]
fn a_crashing_container_is_held_back() {
    let pod = pod(json!({"containers": [{"name": "a"}]}));
    let observed = observed(vec![sandbox(0, true)], vec![seen("a", State::Exited, 1)]);
    let mut backoff = RestartBackoff::new(Duration::from_secs(300));
    let hash = container_hash(&pod.spec.as_ref().unwrap().containers[0]);
    backoff.restarted("a", hash, 0, 0);
    let at = |now| plan(&Input { pod: &pod, observed: &observed, health: &started, backoff: &backoff, now });
    let held = at(2 * SECOND);
    assert_eq!(show(&held), "keep");
    assert_eq!(held.wake_at(), Some(11 * SECOND));
    assert_eq!(show(&at(11 * SECOND)), "keep +a#1");
}

#[test]
fn a_container_that_is_killed_again_and_again_is_held_back() {
    let pod = pod(json!({"containers": [{"name": "a"}]}));
    let mut previous = seen("a", State::Exited, 137);
    previous.id = "a-before".into();
    let running = observed(vec![sandbox(0, true)], vec![seen("a", State::Running, 0), previous]);
    let mut backoff = RestartBackoff::new(Duration::from_secs(300));
    let hash = container_hash(&pod.spec.as_ref().unwrap().containers[0]);
    backoff.restarted("a", hash, 0, SECOND);
    let sick = |_: &ObservedContainer| Health { liveness_failed: true, started: true, ..Default::default() };
    let at = |now| plan(&Input { pod: &pod, observed: &running, health: &sick, backoff: &backoff, now });
    assert_eq!(show(&at(3 * SECOND)), "keep -a");
    assert_eq!(show(&at(30 * SECOND)), "keep -a +a#1");
}

#[test]
fn exit_code_rules_restart_what_the_pod_would_not() {
    let spec = json!({"restartPolicy": "Never", "containers": [{"name": "a", "restartPolicy": "Never",
        "restartPolicyRules": [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]}]});
    for (code, want) in [(42, "keep +a#1"), (1, "stop")] {
        let observed = observed(vec![sandbox(0, true)], vec![seen("a", State::Exited, code)]);
        assert_eq!(show(&run(&pod(spec.clone()), &observed, &started)), want, "{code}");
    }
}

#[test]
fn a_rule_can_restart_all_containers() {
    let spec = json!({"restartPolicy": "Never", "initContainers": [{"name": "i"}], "containers": [{"name": "a", "restartPolicy": "Never",
        "restartPolicyRules": [{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]}, {"name": "b"}]});
    let pod = pod(spec);
    let spec = pod.spec.as_ref().unwrap();
    let init = || seen("i", State::Exited, 0);
    let (cause, backoff) = (seen("a", State::Exited, 42), RestartBackoff::new(Duration::from_secs(300)));
    for (containers, want) in [
        (vec![init(), cause.clone(), seen("b", State::Running, 0)], "keep -b"),
        (vec![init(), cause.clone(), seen("b", State::Exited, 137)], "keep xi-0 xb-0 xa-0"),
        (vec![cause.clone()], "keep xa-0"),
        (vec![], "keep +i#0"),
        (vec![init(), seen("a", State::Exited, 1), seen("b", State::Running, 0)], "keep"),
    ] {
        assert_eq!(show(&run(&pod, &observed(vec![sandbox(0, true)], containers), &started)), want);
    }
    let gone = observed(vec![sandbox(0, false)], vec![init(), cause.clone(), seen("b", State::Exited, 0)]);
    assert_eq!(show(&run(&pod, &gone, &started)), "create1 +i#1");
    // The next time it has to wait for its back-off.
    let mut slow = backoff;
    slow.restarted("a", container_hash(&spec.containers[0]), 0, SECOND);
    let ended = observed(vec![sandbox(0, true)], vec![cause]);
    let input = |now| Input { pod: &pod, observed: &ended, health: &started, backoff: &slow, now };
    assert_eq!((plan(&input(2 * SECOND)).held_back.len(), show(&plan(&input(2 * SECOND)))), (1, "keep".to_owned()));
    assert_eq!(show(&plan(&input(30 * SECOND))), "keep xa-0");
}

fn any_container(name: &'static str) -> impl Strategy<Value = Option<ObservedContainer>> {
    let state = prop_oneof![Just(State::Created), Just(State::Running), Just(State::Exited), Just(State::Unknown)];
    prop::option::of((state, 0..3i32).prop_map(move |(state, code)| seen(name, state, code)))
}

proptest! {
    /// Whatever is observed: nothing is started twice, what runs and is healthy is left alone, what runs is not started
    /// without being killed, and the same world gives the same step.
    #[test]
    fn laws(
        containers in (any_container("s"), any_container("j"), any_container("a"), any_container("b")),
        policy in prop_oneof![Just("Always"), Just("OnFailure"), Just("Never")],
        ready in any::<bool>(),
        has_sandbox in any::<bool>(),
    ) {
        let spec = json!({"restartPolicy": policy,
            "initContainers": [{"name": "s", "restartPolicy": "Always"}, {"name": "j"}],
            "containers": [{"name": "a"}, {"name": "b"}]});
        let list: Vec<_> = [containers.0, containers.1, containers.2, containers.3].into_iter().flatten().collect();
        let world = observed(if has_sandbox { vec![sandbox(0, ready)] } else { vec![] }, list);
        let pod = pod(spec);
        let actions = run(&pod, &world, &started);
        prop_assert_eq!(&actions, &run(&pod, &world, &started));
        let mut names: Vec<_> = actions.start.iter().map(|s| s.container.name.clone()).collect();
        names.sort();
        let count = names.len();
        names.dedup();
        prop_assert_eq!(count, names.len());
        if let SandboxAction::Keep(_) = actions.sandbox {
            for container in world.running() {
                prop_assert!(!actions.kill.iter().any(|k| k.id == container.id));
                prop_assert!(!names.contains(&container.name));
            }
            // Apps do not start before init is through.
            let begun = |n: &str| world.latest(n).is_some();
            let apps_start = names.iter().any(|n| n == "a" || n == "b");
            if apps_start && !begun("a") && !begun("b") {
                prop_assert!(world.latest("j").is_some_and(|j| j.state == State::Exited && j.exit_code == 0));
            }
        }
        if !ready || !has_sandbox {
            prop_assert!(!matches!(actions.sandbox, SandboxAction::Keep(_)));
        }
    }
}
