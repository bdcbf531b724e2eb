//! `scale`, `binding`, `eviction`, `finalize`, `ephemeralcontainers`, `resize`, `status`, and pods' slow goodbye.

use crate::common::{JSON, Server, has_etcd};
use serde_json::{Value, json};

const PODS: &str = "/api/v1/namespaces/sub/pods";

fn pod(name: &str) -> Value {
    let container = json!({"name": "c", "image": "x:1", "resources": {"requests": {"cpu": "100m"}}});
    json!({"metadata": {"name": name, "labels": {"app": "a"}}, "spec": {"containers": [container]}})
}

async fn bind(server: &Server, name: &str, node: &str) -> Result<Value, (u16, String)> {
    let binding = json!({"metadata": {"name": name}, "target": {"kind": "Node", "name": node}});
    server.post(&format!("{PODS}/{name}/binding"), &binding).await
}

async fn start() -> Option<Server> {
    if !has_etcd() {
        return None;
    }
    let server = Server::start().await;
    server.namespace("sub").await;
    Some(server)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_from_its_creation_to_its_end() {
    let Some(server) = start().await else { return };
    let made = server.post(PODS, &pod("p")).await.unwrap();
    assert_eq!((&made["status"]["phase"], &made["status"]["qosClass"]), (&json!("Pending"), &json!("Burstable")));
    let path = format!("{PODS}/p");

    bind(&server, "p", "n1").await.unwrap();
    let (code, message) = bind(&server, "p", "n2").await.unwrap_err();
    assert!(code == 409 && message.contains("already assigned to node \"n1\""), "{message}");
    let on_node = server.get(&format!("{PODS}?fieldSelector=spec.nodeName%3Dn1")).await.unwrap();
    assert_eq!(on_node["items"][0]["metadata"]["name"], "p");

    let status = json!({"status": {"phase": "Running", "podIP": "10.0.0.9"}, "spec": {"nodeName": "elsewhere"}});
    let running = server.merge(&format!("{path}/status"), &status).await.unwrap();
    assert_eq!(
        (&running["spec"]["nodeName"], &running["status"]["podIPs"][0]["ip"]),
        (&json!("n1"), &json!("10.0.0.9"))
    );
    let kept =
        server.merge(&path, &json!({"status": {"phase": "Failed"}, "metadata": {"labels": {"x": "y"}}})).await.unwrap();
    assert_eq!(kept["status"]["phase"], "Running");
    assert_eq!(kept["metadata"]["generation"], 1);

    let debug = json!({"spec": {"ephemeralContainers": [{"name": "d", "image": "x"}]}});
    assert_eq!(server.merge(&path, &debug).await.unwrap_err().0, 422, "only by its subresource");
    let debugged = server.merge(&format!("{path}/ephemeralcontainers"), &debug).await.unwrap();
    assert_eq!(debugged["metadata"]["generation"], 2);
    let none = json!({"spec": {"ephemeralContainers": []}});
    assert_eq!(server.merge(&format!("{path}/ephemeralcontainers"), &none).await.unwrap_err().0, 422);

    let bigger = json!({"spec": {"containers": [{"name": "c", "resources": {"requests": {"cpu": "200m"}}}]}});
    let resized = server
        .call("PATCH", &format!("{path}/resize"), &bigger, "application/strategic-merge-patch+json")
        .await
        .unwrap();
    assert_eq!(resized["spec"]["containers"][0]["resources"]["requests"]["cpu"], "200m");
    assert_eq!(resized["spec"]["containers"][0]["image"], "x:1");
    let moved = json!({"spec": {"nodeName": "n2"}});
    let (code, message) = server.merge(&path, &moved).await.unwrap_err();
    assert!(code == 422 && message.contains("pod updates may not change fields other than"), "{message}");

    let going = server.delete(&path, &json!({"gracePeriodSeconds": 20})).await.unwrap();
    assert_eq!(going["metadata"]["deletionGracePeriodSeconds"], 20);
    let table = server.table(PODS).await;
    assert_eq!(table["rows"][0]["cells"][2], "Terminating");
    server.delete(&path, &json!({"gracePeriodSeconds": 0})).await.unwrap();
    assert_eq!(server.get(&path).await.unwrap_err().0, 404);

    server.post(PODS, &pod("unbound")).await.unwrap();
    server.delete(&format!("{PODS}/unbound"), &Value::Null).await.unwrap();
    assert_eq!(server.get(&format!("{PODS}/unbound")).await.unwrap_err().0, 404, "nobody else has to see it go");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_eviction_heeds_the_budget() {
    let Some(server) = start().await else { return };
    let budgets = "/apis/policy/v1/namespaces/sub/poddisruptionbudgets";
    let budget =
        json!({"metadata": {"name": "b"}, "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": "a"}}}});
    server.post(budgets, &budget).await.unwrap();
    server.post(PODS, &pod("p")).await.unwrap();
    bind(&server, "p", "n1").await.unwrap();
    let ready = json!({"status": {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}});
    server.merge(&format!("{PODS}/p/status"), &ready).await.unwrap();
    let evict = || async { server.post(&format!("{PODS}/p/eviction"), &json!({"metadata": {"name": "p"}})).await };
    assert_eq!(evict().await.unwrap_err().0, 429, "the budget's status is not known yet");
    let allowed = |n: i64| json!({"status": {"observedGeneration": 1, "disruptionsAllowed": n, "currentHealthy": 1, "desiredHealthy": 1}});
    server.merge(&format!("{budgets}/b/status"), &allowed(0)).await.unwrap();
    let (code, message) = evict().await.unwrap_err();
    assert_eq!((code, message.as_str()), (429, "Cannot evict pod as it would violate the pod's disruption budget."));
    assert_eq!(server.get(&format!("{PODS}/p")).await.unwrap()["metadata"].get("deletionTimestamp"), None);
    server.merge(&format!("{budgets}/b/status"), &allowed(1)).await.unwrap();
    // What only is tried disrupts nothing, in whichever way it is said.
    for (query, options) in [("?dryRun=All", json!({})), ("", json!({"dryRun": ["All"]}))] {
        let eviction = json!({"metadata": {"name": "p"}, "deleteOptions": options});
        server.post(&format!("{PODS}/p/eviction{query}"), &eviction).await.unwrap();
        assert_eq!(server.get(&format!("{PODS}/p")).await.unwrap()["metadata"].get("deletionTimestamp"), None);
        assert_eq!(server.get(&format!("{budgets}/b")).await.unwrap()["status"]["disruptionsAllowed"], 1);
    }
    evict().await.unwrap();
    let gone = server.get(&format!("{PODS}/p")).await.unwrap();
    assert!(gone["metadata"]["deletionTimestamp"].is_string(), "{gone}");
    let spent = server.get(&format!("{budgets}/b")).await.unwrap();
    assert_eq!(spent["status"]["disruptionsAllowed"], 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn scale_is_one_view_of_many_kinds() {
    let Some(server) = start().await else { return };
    let template = json!({"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "c", "image": "x"}]}});
    for (path, selector) in [
        ("/apis/apps/v1/namespaces/sub/deployments", json!({"matchLabels": {"app": "a"}})),
        ("/apis/apps/v1/namespaces/sub/replicasets", json!({"matchLabels": {"app": "a"}})),
        ("/apis/apps/v1/namespaces/sub/statefulsets", json!({"matchLabels": {"app": "a"}})),
        ("/api/v1/namespaces/sub/replicationcontrollers", json!({"app": "a"})),
    ] {
        let spec = json!({"replicas": 2, "selector": selector, "template": template, "serviceName": "s"});
        let mut object = json!({"metadata": {"name": "w"}, "spec": spec});
        if !path.contains("statefulsets") {
            object["spec"].as_object_mut().unwrap().remove("serviceName");
        }
        server.post(path, &object).await.unwrap();
        let scale = format!("{path}/w/scale");
        let read = server.get(&scale).await.unwrap();
        assert_eq!(
            (&read["kind"], &read["spec"]["replicas"], &read["status"]["selector"]),
            (&json!("Scale"), &json!(2), &json!("app=a"))
        );
        let mut wanted = read.clone();
        wanted["spec"]["replicas"] = json!(5);
        assert_eq!(server.call("PUT", &scale, &wanted, JSON).await.unwrap()["spec"]["replicas"], 5);
        assert_eq!(server.call("PUT", &scale, &wanted, JSON).await.unwrap_err().0, 409, "{path}: stale");
        assert_eq!(server.merge(&scale, &json!({"spec": {"replicas": 1}})).await.unwrap()["spec"]["replicas"], 1);
        assert_eq!(server.merge(&scale, &json!({"spec": {"replicas": -1}})).await.unwrap_err().0, 422);
        let object = server.get(&format!("{path}/w")).await.unwrap();
        assert_eq!((&object["spec"]["replicas"], &object["metadata"]["generation"]), (&json!(1), &json!(3)), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namespace_goes_when_it_is_finalized() {
    let Some(server) = start().await else { return };
    let path = "/api/v1/namespaces/sub";
    assert_eq!(server.get(path).await.unwrap()["spec"]["finalizers"], json!(["kubernetes"]));
    server.merge(path, &json!({"spec": {"finalizers": []}})).await.unwrap();
    assert_eq!(
        server.get(path).await.unwrap()["spec"]["finalizers"],
        json!(["kubernetes"]),
        "only finalize takes it away"
    );
    server.delete(path, &Value::Null).await.unwrap();
    let mut going = server.get(path).await.unwrap();
    assert_eq!(going["status"]["phase"], "Terminating");
    going["spec"]["finalizers"] = json!([]);
    server.call("PUT", &format!("{path}/finalize"), &going, JSON).await.unwrap();
    assert_eq!(server.get(path).await.unwrap_err().0, 404);
}
