//! Pods go where the devices are that they claim.

use serde_json::{Value, json};

use super::{Lab, common::eventually};

const GROUP: &str = "/apis/resource.k8s.io/v1";

fn user(claim: &str) -> Value {
    json!({"resourceClaims": [{"name": "gpu", "resourceClaimName": claim}]})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_is_allocated_and_reserved_for_its_pod() {
    let Some(lab) = Lab::start("devices").await else { return };
    lab.node("n1", "2").await;
    lab.node("n2", "2").await;
    let class = json!({"metadata": {"name": "gpu"}, "spec": {"selectors": [{"cel": {"expression": "device.driver == 'gpu.io'"}}]}});
    lab.server.post(&format!("{GROUP}/deviceclasses"), &class).await.unwrap();
    for name in ["first", "second"] {
        let claim = json!({"metadata": {"name": name}, "spec": {"devices": {"requests": [
            {"name": "r", "exactly": {"deviceClassName": "gpu", "selectors": [
                {"cel": {"expression": "device.capacity['gpu.io'].memory.compareTo(quantity('10Gi')) >= 0"}}]}}]}}});
        lab.server.post(&format!("{GROUP}/namespaces/t/resourceclaims"), &claim).await.unwrap();
        lab.pod(name, user(name)).await;
    }
    let told = lab.refused("first").await;
    assert!(told.starts_with("0/2 nodes are available: 2 cannot allocate all claims."), "{told}");
    let slice = |name: &str, memory: &str| {
        json!({"metadata": {"name": name}, "spec": {"driver": "gpu.io", "nodeName": name,
            "pool": {"name": name, "generation": 1, "resourceSliceCount": 1},
            "devices": [{"name": "gpu-0", "capacity": {"memory": {"value": memory}}}]}})
    };
    lab.server.post(&format!("{GROUP}/resourceslices"), &slice("n1", "5Gi")).await.unwrap();
    lab.server.post(&format!("{GROUP}/resourceslices"), &slice("n2", "20Gi")).await.unwrap();
    let winner = eventually("one of the pods has the device", async || {
        for name in ["first", "second"] {
            if lab.get(name).await["spec"]["nodeName"] == "n2" {
                return Ok(name);
            }
        }
        Err(lab.log())
    })
    .await;
    let claim = lab.server.get(&format!("{GROUP}/namespaces/t/resourceclaims/{winner}")).await.unwrap();
    let pod = lab.get(winner).await;
    assert_eq!(claim["status"]["reservedFor"][0]["uid"], pod["metadata"]["uid"], "{claim}");
    let result = &claim["status"]["allocation"]["devices"]["results"][0];
    assert_eq!(
        (&result["device"], &result["pool"], &result["driver"]),
        (&json!("gpu-0"), &json!("n2"), &json!("gpu.io"))
    );
    assert_eq!(claim["metadata"]["finalizers"], json!(["resource.kubernetes.io/delete-protection"]));
    let loser = if winner == "first" { "second" } else { "first" };
    let told = lab.refused(loser).await;
    assert!(told.contains("2 cannot allocate all claims"), "{told}");
    // Another user of the allocated claim goes to the same node.
    lab.pod("third", user(winner)).await;
    assert_eq!(lab.bound("third").await, "n2");
}

/// An extended resource that no node has, and for which a class of devices stands.
#[tokio::test(flavor = "multi_thread")]
async fn a_pod_gets_devices_by_the_name_of_a_resource() {
    let Some(lab) = Lab::start("extended resources").await else { return };
    lab.node("n1", "2").await;
    let class = json!({"metadata": {"name": "gpu"}, "spec": {"extendedResourceName": "example.com/gpu",
        "selectors": [{"cel": {"expression": "device.driver == 'gpu.io'"}}]}});
    lab.server.post(&format!("{GROUP}/deviceclasses"), &class).await.unwrap();
    let slice = json!({"metadata": {"name": "n1"}, "spec": {"driver": "gpu.io", "nodeName": "n1",
        "pool": {"name": "n1", "generation": 1, "resourceSliceCount": 1},
        "devices": [{"name": "gpu-0", "bindingConditions": ["Attached"], "bindingFailureConditions": ["Failed"]}]}});
    lab.server.post(&format!("{GROUP}/resourceslices"), &slice).await.unwrap();
    let amounts = json!({"example.com/gpu": "1"});
    let container = json!({"name": "c", "image": "i", "resources": {"requests": amounts, "limits": amounts}});
    lab.pod("first", json!({"containers": [container]})).await;
    // It waits for the device to be attached, and says so.
    let events =
        "/api/v1/namespaces/t/events?fieldSelector=involvedObject.name%3Dfirst,reason%3DBindingConditionsPending";
    eventually("the event", async || {
        let list = lab.server.get(events).await.map_err(|error| format!("{error:?}"))?;
        let words = "waiting for binding conditions for device on node n1";
        if list["items"][0]["message"] == words { Ok(()) } else { Err(format!("{list} {}", lab.log())) }
    })
    .await;
    let pod = lab.get("first").await;
    let told = &pod["status"]["extendedResourceClaimStatus"];
    let mapping =
        json!([{"containerName": "c", "resourceName": "example.com/gpu", "requestName": "container-0-request-0"}]);
    assert_eq!(told["requestMappings"], mapping, "{pod}");
    let path = format!("{GROUP}/namespaces/t/resourceclaims/{}", told["resourceClaimName"].as_str().unwrap());
    let claim = lab.server.get(&path).await.unwrap();
    assert_eq!(claim["metadata"]["annotations"]["resource.kubernetes.io/extended-resource-claim"], "true");
    assert_eq!(claim["metadata"]["ownerReferences"][0]["uid"], pod["metadata"]["uid"]);
    assert_eq!(claim["status"]["reservedFor"][0]["uid"], pod["metadata"]["uid"]);
    assert_eq!(claim["status"]["allocation"]["devices"]["results"][0]["device"], "gpu-0");
    let attached = json!({"status": {"devices": [{"driver": "gpu.io", "pool": "n1", "device": "gpu-0", "conditions": [
        {"type": "Attached", "status": "True", "reason": "Done", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]}]}});
    lab.server.merge(&format!("{path}/status"), &attached).await.unwrap();
    assert_eq!(lab.bound("first").await, "n1");
    lab.pod("second", json!({"containers": [container]})).await;
    let told = lab.refused("second").await;
    assert!(told.starts_with("0/1 nodes are available: 1 cannot allocate all claims."), "{told}");
}
