//! ServiceCIDRs that are made and unmade while Services have addresses of them.

use crate::common::eventually;
use crate::start;
use serde_json::{Value, json};

const RANGES: &str = "/apis/networking.k8s.io/v1/servicecidrs";
const SERVICES: &str = "/api/v1/namespaces/t/services";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_range_is_told_ready_and_stays_while_an_address_of_it_is_in_use() {
    let Some(server) = start().await else { return };
    let path = format!("{RANGES}/more");
    server.post(RANGES, &json!({"metadata": {"name": "more"}, "spec": {"cidrs": ["10.98.0.0/28"]}})).await.unwrap();
    let says = async |status: &str, reason: &str| {
        eventually("the condition", async || {
            let range = server.get(&path).await.map_err(|error| format!("{error:?}"))?;
            let condition = &range["status"]["conditions"][0];
            let told = (&condition["type"], &condition["status"], &condition["reason"]);
            if told == (&json!("Ready"), &json!(status), &json!(reason)) { Ok(range) } else { Err(range.to_string()) }
        })
        .await
    };
    let range = says("True", "").await;
    assert_eq!(range["metadata"]["finalizers"], json!(["networking.k8s.io/service-cidr-finalizer"]));
    let service = json!({"metadata": {"name": "s"}, "spec": {"clusterIP": "10.98.0.9", "ports": [{"port": 80}]}});
    eventually("an address of it", async || {
        server.post(SERVICES, &service).await.map_err(|error| format!("{error:?}"))
    })
    .await;
    server.delete(&path, &Value::Null).await.unwrap();
    says("False", "Terminating").await;
    // Nothing is given of it any more.
    let mut other = service.clone();
    (other["metadata"]["name"], other["spec"]["clusterIP"]) = (json!("o"), json!("10.98.0.8"));
    assert_eq!(server.post(SERVICES, &other).await.unwrap_err().0, 422);
    server.delete(&format!("{SERVICES}/s"), &Value::Null).await.unwrap();
    server.gone(&path).await;
}
