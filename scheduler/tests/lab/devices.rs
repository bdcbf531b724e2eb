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
