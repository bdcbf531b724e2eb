//! A pod's row in `kubectl get`. As `printPod`.

use super::pod::condition;
use crate::registry::object::{flag, int, list, text};
use crate::registry::print::{self, Clock, NONE};
use serde_json::Value;

/// What the containers of a pod add up to. As `printPod`.
struct Summary {
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: String,
    reason: String,
}

pub fn row(pod: &Value, clock: &Clock) -> Vec<Value> {
    let summary = summary(pod);
    let restarts = if summary.restarts != 0 && !summary.last_restart.is_empty() {
        format!("{} ({} ago)", summary.restarts, clock.since(&summary.last_restart))
    } else {
        summary.restarts.to_string()
    };
    let ip = text(pod, "/status/podIPs/0/ip");
    let gates = list(pod, "/spec/readinessGates");
    let passed = gates.iter().filter(|gate| condition(pod, text(gate, "/conditionType")) == "True").count();
    vec![
        print::name(pod),
        Value::from(format!("{}/{}", summary.ready, summary.total)),
        Value::from(summary.reason),
        Value::from(restarts),
        clock.age(pod),
        print::or_none(if ip.is_empty() { text(pod, "/status/podIP") } else { ip }),
        print::or_none(text(pod, "/spec/nodeName")),
        print::or_none(text(pod, "/status/nominatedNodeName")),
        Value::from(if gates.is_empty() { NONE.to_owned() } else { format!("{passed}/{}", gates.len()) }),
    ]
}

fn summary(pod: &Value) -> Summary {
    let init = list(pod, "/spec/initContainers");
    let is_sidecar =
        |name: &str| init.iter().any(|c| text(c, "/name") == name && text(c, "/restartPolicy") == "Always");
    let sidecars = init.iter().filter(|c| text(c, "/restartPolicy") == "Always").count();
    let mut found = Summary {
        ready: 0,
        total: list(pod, "/spec/containers").len() + sidecars,
        restarts: 0,
        last_restart: String::new(),
        reason: first_of([text(pod, "/status/reason"), text(pod, "/status/phase")]),
    };
    let gated = |c: &Value| text(c, "/type") == "PodScheduled" && text(c, "/reason") == "SchedulingGated";
    if list(pod, "/status/conditions").iter().any(gated) {
        found.reason = "SchedulingGated".into();
    }
    let mut sidecar_restarts = (0, String::new());
    let mut initializing = false;
    for (at, status) in list(pod, "/status/initContainerStatuses").iter().enumerate() {
        let sidecar = is_sidecar(text(status, "/name"));
        count_restarts(status, &mut found.restarts, &mut found.last_restart);
        if sidecar {
            count_restarts(status, &mut sidecar_restarts.0, &mut sidecar_restarts.1);
        }
        let terminated = status.pointer("/state/terminated");
        let waiting = text(status, "/state/waiting/reason");
        if terminated.is_some_and(|t| int(t, "/exitCode").unwrap_or(0) == 0) {
            continue;
        }
        if sidecar && flag(status, "/started") {
            found.ready += usize::from(flag(status, "/ready"));
            continue;
        }
        found.reason = match terminated {
            Some(terminated) => format!("Init:{}", end_of(terminated)),
            None if !waiting.is_empty() && waiting != "PodInitializing" => format!("Init:{waiting}"),
            None => format!("Init:{at}/{}", init.len()),
        };
        initializing = true;
        break;
    }
    if !initializing || condition(pod, "Initialized") == "True" {
        (found.restarts, found.last_restart) = sidecar_restarts;
        let mut running = false;
        for status in list(pod, "/status/containerStatuses").iter().rev() {
            count_restarts(status, &mut found.restarts, &mut found.last_restart);
            let waiting = text(status, "/state/waiting/reason");
            if !waiting.is_empty() {
                found.reason = waiting.to_owned();
            } else if let Some(terminated) = status.pointer("/state/terminated") {
                found.reason = end_of(terminated);
            } else if flag(status, "/ready") && status.pointer("/state/running").is_some() {
                running = true;
                found.ready += 1;
            }
        }
        if found.reason == "Completed" && running {
            found.reason = if condition(pod, "Ready") == "True" { "Running" } else { "NotReady" }.into();
        }
    }
    let deleted = pod.pointer("/metadata/deletionTimestamp").is_some();
    if deleted && text(pod, "/status/reason") == "NodeLost" {
        found.reason = "Unknown".into();
    } else if deleted && !matches!(text(pod, "/status/phase"), "Failed" | "Succeeded") {
        found.reason = "Terminating".into();
    }
    found
}

fn first_of<const N: usize>(texts: [&str; N]) -> String {
    texts.into_iter().find(|t| !t.is_empty()).unwrap_or("").to_owned()
}

/// How a container ended: its reason, or else the signal or the exit code.
fn end_of(terminated: &Value) -> String {
    match (text(terminated, "/reason"), int(terminated, "/signal").unwrap_or(0)) {
        ("", 0) => format!("ExitCode:{}", int(terminated, "/exitCode").unwrap_or(0)),
        ("", signal) => format!("Signal:{signal}"),
        (reason, _) => reason.to_owned(),
    }
}

fn count_restarts(status: &Value, restarts: &mut i64, last: &mut String) {
    *restarts += int(status, "/restartCount").unwrap_or(0);
    let finished = text(status, "/lastState/terminated/finishedAt");
    // RFC 3339 in UTC sorts as text.
    if finished > last.as_str() {
        finished.clone_into(last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn cells(pod: &Value) -> Vec<String> {
        let clock = Clock("2024-01-01T01:00:00Z".parse().unwrap());
        row(pod, &clock).iter().take(4).map(|v| v.as_str().unwrap().to_owned()).collect()
    }

    fn pod_of(status: Value) -> Value {
        json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "a"}, {"name": "b"}],
            "initContainers": [{"name": "i"}]}, "status": status})
    }

    #[test]
    fn the_status_column_says_what_ails_a_pod() {
        let waiting = |reason: &str| {
            json!({"name": "a", "restartCount": 3, "state": {"waiting": {"reason": reason}},
            "lastState": {"terminated": {"finishedAt": "2024-01-01T00:59:00Z"}}})
        };
        let running = json!({"name": "b", "ready": true, "restartCount": 0, "state": {"running": {}}});
        let done =
            json!({"name": "a", "restartCount": 0, "state": {"terminated": {"reason": "Completed", "exitCode": 0}}});
        let cases = [
            (json!({"phase": "Pending"}), ["0/2", "Pending", "0"]),
            (
                json!({"phase": "Running", "containerStatuses": [waiting("CrashLoopBackOff"), running]}),
                ["1/2", "CrashLoopBackOff", "3 (60s ago)"],
            ),
            (
                json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "state": {"running": {}}}]}),
                ["0/2", "Init:0/1", "0"],
            ),
            (
                json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "restartCount": 1, "state": {"terminated": {"exitCode": 2}}}]}),
                ["0/2", "Init:ExitCode:2", "1"],
            ),
            (json!({"phase": "Succeeded", "containerStatuses": [done]}), ["0/2", "Completed", "0"]),
            (json!({"phase": "Running", "containerStatuses": [done, running]}), ["1/2", "NotReady", "0"]),
            (json!({"phase": "Failed", "reason": "Evicted"}), ["0/2", "Evicted", "0"]),
        ];
        for (status, expected) in cases {
            assert_eq!(cells(&pod_of(status.clone()))[1..], expected, "{status}");
        }
        let mut deleted = pod_of(json!({"phase": "Running"}));
        deleted["metadata"]["deletionTimestamp"] = json!("2024-01-01T00:00:00Z");
        assert_eq!(cells(&deleted)[2], "Terminating");
    }
}
