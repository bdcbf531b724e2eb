//! Important pods make room for themselves.

use serde_json::{Value, json};

use super::{Lab, PODS, common::eventually, condition};

/// Two nodes, each full of pods of low and medium priority.
async fn full(lab: &Lab) {
    for (name, value) in [("low", 1), ("medium", 100), ("high", 1000)] {
        lab.priority(name, value).await;
    }
    lab.node("n1", "1").await;
    lab.node("n2", "1").await;
    lab.pod("low", json!({"cpu": "1", "priorityClassName": "low"})).await;
    lab.bound("low").await;
    lab.pod("medium", json!({"cpu": "1", "priorityClassName": "medium"})).await;
    lab.bound("medium").await;
}

/// Scheduler, Basic Preemption.
#[tokio::test(flavor = "multi_thread")]
async fn the_least_important_pod_makes_room() {
    let Some(lab) = Lab::start("basic preemption").await else { return };
    full(&lab).await;
    let place = lab.bound("low").await;
    lab.pod("high", json!({"cpu": "1", "priorityClassName": "high"})).await;
    assert_eq!(lab.bound("high").await, place);
    lab.gone("low").await;
    assert!(lab.get("medium").await["metadata"]["deletionTimestamp"].is_null());
    let events = "/api/v1/namespaces/t/events?fieldSelector=involvedObject.name%3Dlow,reason%3DPreempted";
    eventually("the event", async || {
        let list = lab.server.get(events).await.map_err(|error| format!("{error:?}"))?;
        let words = list["items"][0]["message"].as_str().unwrap_or_default();
        let high = lab.get("high").await;
        let expected = format!("Preempted by pod {} on node {place}", high["metadata"]["uid"].as_str().unwrap());
        if words == expected { Ok(()) } else { Err(list.to_string()) }
    })
    .await;
    // One that may not preempt waits.
    let never = json!({"metadata": {"name": "never"}, "value": 2000, "preemptionPolicy": "Never"});
    lab.server.post("/apis/scheduling.k8s.io/v1/priorityclasses", &never).await.unwrap();
    lab.pod("polite", json!({"cpu": "1", "priorityClassName": "never"})).await;
    let told = lab.refused("polite").await;
    assert!(told.ends_with("preemption: not eligible due to preemptionPolicy=Never."), "{told}");
}

/// Scheduler, Preemption for critical pod.
#[tokio::test(flavor = "multi_thread")]
async fn a_critical_pod_makes_room() {
    let Some(lab) = Lab::start("critical pod").await else { return };
    full(&lab).await;
    let pods = "/api/v1/namespaces/kube-system/pods";
    let critical =
        super::pod("critical", json!({}), json!({"cpu": "1", "priorityClassName": "system-cluster-critical"}));
    lab.server.post(pods, &critical).await.unwrap();
    eventually("the critical pod has a node", async || {
        let pod = lab.server.get(&format!("{pods}/critical")).await.map_err(|error| format!("{error:?}"))?;
        pod["spec"]["nodeName"].as_str().map(drop).ok_or_else(|| format!("{} {}", pod["status"], lab.log()))
    })
    .await;
    lab.gone("low").await;
    assert!(lab.get("medium").await["metadata"]["deletionTimestamp"].is_null());
}

/// Verify the DisruptionTarget condition is added to the preempted pod.
#[tokio::test(flavor = "multi_thread")]
async fn a_preempted_pod_says_why_it_ends() {
    let Some(lab) = Lab::start("disruption condition").await else { return };
    lab.priority("high", 1000).await;
    lab.node("n1", "1").await;
    let mut victim = super::pod("victim", json!({}), json!({"cpu": "1"}));
    victim["metadata"]["finalizers"] = json!(["example.com/test-finalizer"]);
    lab.server.post(PODS, &victim).await.unwrap();
    lab.bound("victim").await;
    lab.pod("high", json!({"cpu": "1", "priorityClassName": "high"})).await;
    let victim = eventually("the victim is deleted", async || {
        let victim = lab.get("victim").await;
        if victim["metadata"]["deletionTimestamp"].is_null() { Err(lab.log()) } else { Ok(victim) }
    })
    .await;
    let target = condition(&victim, "DisruptionTarget");
    assert_eq!((&target["status"], &target["reason"]), (&json!("True"), &json!("PreemptionByScheduler")));
    assert_eq!(target["message"], "default-scheduler: preempting to accommodate a higher priority pod");
    eventually("the node is meant for the pod", async || {
        let high = lab.get("high").await;
        if high["status"]["nominatedNodeName"] == "n1" { Ok(()) } else { Err(high["status"].to_string()) }
    })
    .await;
    // The node is kept for it: a pod of no importance that would fit in the meantime does not get it.
    lab.server.merge(&format!("{PODS}/victim"), &json!({"metadata": {"finalizers": null}})).await.unwrap();
    assert_eq!(lab.bound("high").await, "n1");
    assert!(lab.get("high").await["status"]["nominatedNodeName"].is_null());
}

/// Pod preemption verification: four levels of ReplicaSets.
#[tokio::test(flavor = "multi_thread")]
async fn replica_sets_of_higher_priority_displace_those_of_lower() {
    let Some(mut lab) = Lab::without_scheduler("replica sets", true).await else { return };
    lab.scheduler(&["--leader-elect=false", "--secure-port=0"]);
    lab.node("n1", "1").await;
    for level in 1..=4 {
        lab.priority(&format!("p{level}"), level).await;
    }
    let replica_set = |level: usize, replicas: usize, cpu: &str| {
        let name = format!("rs-pod{level}");
        let template =
            super::pod("", json!({"name": name}), json!({"cpu": cpu, "priorityClassName": format!("p{level}")}));
        json!({"metadata": {"name": name}, "spec": {"replicas": replicas, "selector": {"matchLabels": {"name": name}},
            "template": {"metadata": {"labels": {"name": name}}, "spec": template["spec"]}}})
    };
    let sets = "/apis/apps/v1/namespaces/t/replicasets";
    let placed = async |level: usize| -> usize {
        let list = lab.server.get(&format!("{PODS}?labelSelector=name%3Drs-pod{level}")).await.unwrap_or_default();
        let live = |pod: &&Value| pod["spec"]["nodeName"].is_string() && pod["metadata"]["deletionTimestamp"].is_null();
        list["items"].as_array().map_or(0, |pods| pods.iter().filter(live).count())
    };
    let wait = async |level: usize, count: usize| {
        eventually(&format!("{count} pods of level {level}"), async || match placed(level).await {
            now if now == count => Ok(()),
            now => Err(format!("{now}: {}", lab.log())),
        })
        .await;
    };
    for (level, replicas, cpu) in [(1, 5, "50m"), (2, 4, "100m"), (3, 4, "80m")] {
        lab.server.post(sets, &replica_set(level, replicas, cpu)).await.unwrap();
        wait(level, replicas).await;
    }
    // 30 of 1000 are left, 300 are wanted: whoever need not go stays, the most important first.
    lab.server.post(sets, &replica_set(4, 1, "300m")).await.unwrap();
    wait(4, 1).await;
    wait(3, 4).await;
    wait(2, 3).await;
    wait(1, 1).await;
}
