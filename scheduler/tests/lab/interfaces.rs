//! LimitRanges and PriorityClasses: what pods get of them, and what may be done to them.

use serde_json::{Value, json};

use super::{Lab, PODS, pod};

const RANGES: &str = "/api/v1/namespaces/t/limitranges";
const CLASSES: &str = "/apis/scheduling.k8s.io/v1/priorityclasses";

fn both(cpu: &str, memory: &str) -> Value {
    json!({"cpu": cpu, "memory": memory})
}

/// LimitRange, resources.
#[tokio::test(flavor = "multi_thread")]
async fn a_limit_range_bounds_pods_and_fills_what_they_leave_out() {
    let Some(lab) = Lab::start("limit range").await else { return };
    lab.node("n1", "4").await;
    let range = |min: Value, max: Value| {
        json!({"metadata": {"name": "r"}, "spec": {"limits": [{"type": "Container", "min": min, "max": max,
            "default": both("500m", "500Mi"), "defaultRequest": both("100m", "200Mi")}]}})
    };
    let made = lab.server.post(RANGES, &range(both("50m", "100Mi"), both("500m", "500Mi"))).await.unwrap();
    let read = lab.server.get(&format!("{RANGES}/r")).await.unwrap();
    assert_eq!(read["spec"], made["spec"]);
    assert_eq!(read["spec"]["limits"][0]["min"], both("50m", "100Mi"));
    let asks = |name: &str, resources: Value| {
        pod(name, json!({}), json!({"containers": [{"name": "c", "image": "i", "resources": resources}]}))
    };
    let post = async |name: &str, resources: Value| lab.server.post(PODS, &asks(name, resources)).await;
    let given = post("plain", json!({})).await.unwrap()["spec"]["containers"][0]["resources"].clone();
    assert_eq!(given, json!({"requests": both("100m", "200Mi"), "limits": both("500m", "500Mi")}));
    let partial = json!({"requests": both("300m", "150Mi"), "limits": {"cpu": "300m"}});
    let given = post("partial", partial).await.unwrap()["spec"]["containers"][0]["resources"].clone();
    assert_eq!(given["requests"], both("300m", "150Mi"));
    assert_eq!(given["limits"], both("300m", "500Mi"));
    for name in ["plain", "partial"] {
        lab.bound(name).await;
    }
    for (name, cpu, words) in [
        ("little", "10m", "minimum cpu usage per Container is 50m"),
        ("much", "600m", "maximum cpu usage per Container is 500m"),
    ] {
        let (code, told) =
            post(name, json!({"requests": both(cpu, "150Mi"), "limits": both(cpu, "150Mi")})).await.unwrap_err();
        assert!(code == 403 && told.contains(words), "{code} {told}");
    }
    // What is changed holds for the next pods.
    let mut changed = read;
    changed["spec"] = range(both("9m", "10Mi"), both("500m", "500Mi"))["spec"].clone();
    let changed = lab.server.put(&format!("{RANGES}/r"), &changed).await.unwrap();
    assert_eq!(changed["spec"]["limits"][0]["min"], both("9m", "10Mi"));
    let small = json!({"requests": both("10m", "50Mi"), "limits": both("10m", "50Mi")});
    post("little", small).await.unwrap();
    lab.bound("little").await;
    let large = json!({"requests": both("600m", "600Mi"), "limits": both("600m", "600Mi")});
    assert_eq!(post("much", large.clone()).await.unwrap_err().0, 403);
    lab.server.delete(&format!("{RANGES}/r"), &json!({})).await.unwrap();
    lab.server.gone(&format!("{RANGES}/r")).await;
    post("much", large).await.unwrap();
    lab.bound("much").await;
}

/// LimitRange, list, patch and delete a LimitRange by collection.
#[tokio::test(flavor = "multi_thread")]
async fn limit_ranges_are_listed_patched_and_deleted_together() {
    let Some(lab) = Lab::start("limit ranges").await else { return };
    lab.server.namespace("u").await;
    for namespace in ["t", "u"] {
        let range = json!({"metadata": {"name": "r", "labels": {"e2e": "one"}},
            "spec": {"limits": [{"type": "Container", "defaultRequest": both("100m", "1Mi")}]}});
        lab.server.post(&format!("/api/v1/namespaces/{namespace}/limitranges"), &range).await.unwrap();
    }
    let all = "/api/v1/limitranges?labelSelector=e2e%3Done";
    assert_eq!(lab.server.names(all).await.len(), 2);
    let patch = json!({"metadata": {"labels": {"r": "patched"}},
        "spec": {"limits": [{"type": "Container", "defaultRequest": both("200m", "2Mi")}]}});
    let patched = lab.server.merge(&format!("{RANGES}/r"), &patch).await.unwrap();
    assert_eq!(patched["metadata"]["labels"]["r"], "patched");
    assert_eq!(patched["spec"]["limits"][0]["defaultRequest"], both("200m", "2Mi"));
    lab.server.delete(&format!("{RANGES}?labelSelector=r%3Dpatched"), &json!({})).await.unwrap();
    assert_eq!(lab.server.names(all).await.len(), 1, "the other one stays");
}

/// Scheduler, Verify PriorityClass endpoints.
#[tokio::test(flavor = "multi_thread")]
async fn what_of_a_priority_class_may_change() {
    let Some(lab) = Lab::start("priority classes").await else { return };
    for (name, value) in [("p1", 1), ("p2", 2)] {
        let class = json!({"metadata": {"name": name, "labels": {"e2e": "yes"}}, "value": value});
        lab.server.post(CLASSES, &class).await.unwrap();
    }
    assert_eq!(lab.server.names(&format!("{CLASSES}?labelSelector=e2e%3Dyes")).await, ["p1", "p2"]);
    for name in ["p1", "p2"] {
        let path = format!("{CLASSES}/{name}");
        let patched = lab.server.merge(&path, &json!({"description": "patched"})).await.unwrap();
        assert_eq!(patched["description"], "patched");
        let (code, told) = lab.server.merge(&path, &json!({"value": 7})).await.unwrap_err();
        assert!(code == 422 && told.contains("may not be changed in an update"), "{code} {told}");
        let mut there = lab.server.get(&path).await.unwrap();
        there["description"] = json!("updated");
        let mut updated = lab.server.put(&path, &there).await.unwrap();
        assert_eq!(updated["description"], "updated");
        updated["value"] = json!(7);
        assert_eq!(lab.server.put(&path, &updated).await.unwrap_err().0, 422);
        assert_ne!(lab.server.get(&path).await.unwrap()["value"], 7);
    }
    lab.server.delete(&format!("{CLASSES}?labelSelector=e2e%3Dyes"), &json!({})).await.unwrap();
    assert!(lab.server.names(&format!("{CLASSES}?labelSelector=e2e%3Dyes")).await.is_empty());
}
