//! Schedulers that end in the middle, and two that hand over: every pod is bound once, and no node holds too much.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use super::{Lab, PODS, common::clock::Clock, common::eventually, end, pod};

const NODES: usize = 5;
const PER_NODE: usize = 20;

async fn per_node(lab: &Lab) -> BTreeMap<String, usize> {
    let list = lab.server.get(PODS).await.unwrap_or_default();
    let mut counts = BTreeMap::new();
    for node in list["items"].as_array().into_iter().flatten().filter_map(|pod| pod["spec"]["nodeName"].as_str()) {
        *counts.entry(node.to_owned()).or_default() += 1;
    }
    counts
}

#[tokio::test(flavor = "multi_thread")]
async fn no_node_is_overcommitted_whoever_schedules_and_whenever_it_ends() {
    let Some(mut lab) = Lab::without_scheduler("hand-over", false).await else { return };
    let flags = [
        "--secure-port=0",
        "--leader-elect-lease-duration=2s",
        "--leader-elect-renew-deadline=1500ms",
        "--leader-elect-retry-period=300ms",
    ];
    lab.scheduler(&flags);
    lab.scheduler(&flags);
    for number in 0..NODES {
        lab.node(&format!("n{number}"), &PER_NODE.to_string()).await;
    }
    // More than fit: the nodes must be full, and no more than full.
    let wanted = NODES * PER_NODE + 10;
    for number in 0..wanted {
        let pod: Value = pod(&format!("p{number}"), json!({}), json!({"cpu": "1"}));
        lab.server.post(PODS, &pod).await.unwrap();
        // Whoever leads dies in the middle; a third comes.
        if number == wanted / 3 {
            end(&mut lab.schedulers[0]);
            lab.scheduler(&flags);
        }
        if number == 2 * wanted / 3 {
            end(&mut lab.schedulers[1]);
        }
    }
    eventually("all nodes are full", async || {
        let counts = per_node(&lab).await;
        assert!(counts.values().all(|count| *count <= PER_NODE), "{counts:?}");
        if counts.values().sum::<usize>() == NODES * PER_NODE { Ok(()) } else { Err(format!("{counts:?}")) }
    })
    .await;
    // And when some go, others come, and no more than that.
    let list = lab.server.get(PODS).await.unwrap();
    let bound = list["items"].as_array().unwrap().iter().filter(|pod| pod["spec"]["nodeName"].is_string());
    for name in bound.filter_map(|pod| pod["metadata"]["name"].as_str()).take(5) {
        lab.server.delete(&format!("{PODS}/{name}"), &json!({})).await.unwrap();
    }
    eventually("they are full again", async || {
        let names = lab.server.names(PODS).await.len();
        let counts = per_node(&lab).await;
        assert!(counts.values().all(|count| *count <= PER_NODE), "{counts:?}");
        if names == wanted - 5 && counts.values().sum::<usize>() == NODES * PER_NODE {
            Ok(())
        } else {
            Err(format!("{names} {counts:?}"))
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clock_that_jumps_holds_no_pod_back() {
    let (Some(clock), Some(mut lab)) = (Clock::new(), Lab::without_scheduler("clock", false).await) else { return };
    let flags = ["--secure-port=0", "--leader-elect-lease-duration=6s", "--leader-elect-renew-deadline=4s"];
    lab.scheduler_in(&clock.environment(), &flags);
    lab.node("n0", "1").await;
    let lease = "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/kube-scheduler";
    lab.pod("first", json!({"cpu": "1"})).await;
    lab.bound("first").await;
    let leader = lab.server.get(lease).await.unwrap()["spec"]["holderIdentity"].clone();
    for (number, offset) in [(1, 3600), (2, -3600), (3, 0)] {
        let name = format!("p{number}");
        lab.pod(&name, json!({"cpu": "1"})).await;
        lab.refused(&name).await;
        clock.jump(offset);
        tokio::time::sleep(std::time::Duration::from_secs(3)).await;
        lab.node(&format!("n{number}"), "1").await;
        assert_eq!(lab.bound(&name).await, format!("n{number}"));
        assert_eq!(lab.server.get(lease).await.unwrap()["spec"]["holderIdentity"], leader, "{offset}");
    }
}
