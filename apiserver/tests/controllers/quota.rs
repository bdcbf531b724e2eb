//! ResourceQuotas: usage is claimed, refused, released, and counted by scope; exactly, whoever asks where.

use crate::common::{Server, eventually};
use crate::start;
use serde_json::{Map, Value, json};

const V1: &str = "/api/v1/namespaces/t";
const QUOTAS: &str = "/api/v1/namespaces/t/resourcequotas";

async fn make(server: &Server, name: &str, spec: Value) {
    server.post(QUOTAS, &json!({"metadata": {"name": name}, "spec": spec})).await.unwrap();
}

/// Waits until a quota's status says so, with the limits of its spec.
async fn says_used(server: &Server, quota: &str, used: Value) {
    eventually(&format!("{quota} says {used}"), async || {
        let object = server.get(&format!("{QUOTAS}/{quota}")).await.map_err(|error| format!("{error:?}"))?;
        let status = &object["status"];
        let said: Map<String, Value> =
            used.as_object().unwrap().keys().map(|name| (name.clone(), status["used"][name].clone())).collect();
        if Value::Object(said) == used && status["hard"] == object["spec"]["hard"] {
            Ok(())
        } else {
            Err(status.to_string())
        }
    })
    .await;
}

fn pod(name: &str, resources: Value) -> Value {
    json!({"metadata": {"name": name}, "spec": {"terminationGracePeriodSeconds": 0,
        "containers": [{"name": "c", "image": "x:1", "resources": resources}]}})
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_captures_the_life_of_what_it_counts() {
    let Some(server) = start().await else { return };
    let selector = json!({"matchLabels": {"a": "b"}});
    let template = json!({"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "x"}]}});
    let hard = json!({"resourcequotas": "1", "services": "3", "services.nodeports": "1", "services.loadbalancers": "1",
        "count/replicasets.apps": "5", "replicationcontrollers": "5", "secrets": "10", "count/secrets": "10",
        "persistentvolumeclaims": "2", "requests.storage": "3Gi", "gold.storageclass.storage.k8s.io/requests.storage": "2Gi",
        "count/leases.coordination.k8s.io": "1", "count/widgets.example.com": "1"});
    make(&server, "q", json!({"hard": hard})).await;
    says_used(
        &server,
        "q",
        json!({"resourcequotas": "1", "services": "0", "secrets": "0", "requests.storage": "0",
            "count/replicasets.apps": "0", "count/leases.coordination.k8s.io": "0", "count/widgets.example.com": null}),
    )
    .await;
    for (path, body, name, taken) in [
        (format!("{V1}/secrets"), json!({}), "secrets", "1"),
        (format!("{V1}/services"), json!({"spec": {"ports": [{"port": 80}]}}), "services", "1"),
        (
            format!("{V1}/services"),
            json!({"spec": {"type": "NodePort", "ports": [{"port": 80}]}}),
            "services.nodeports",
            "1",
        ),
        (
            format!("{V1}/replicationcontrollers"),
            json!({"spec": {"replicas": 0, "selector": {"a": "b"}, "template": template}}),
            "replicationcontrollers",
            "1",
        ),
        (
            "/apis/apps/v1/namespaces/t/replicasets".to_owned(),
            json!({"spec": {"replicas": 0, "selector": selector, "template": template}}),
            "count/replicasets.apps",
            "1",
        ),
        (
            format!("{V1}/persistentvolumeclaims"),
            json!({"spec": {"storageClassName": "gold", "accessModes": ["ReadWriteOnce"],
                "resources": {"requests": {"storage": "1536Mi"}}}}),
            "gold.storageclass.storage.k8s.io/requests.storage",
            "1536Mi",
        ),
        (
            "/apis/coordination.k8s.io/v1/namespaces/t/leases".to_owned(),
            json!({}),
            "count/leases.coordination.k8s.io",
            "1",
        ),
    ] {
        let mut object = body;
        object["metadata"] = json!({"name": "o"});
        server.post(&path, &object).await.unwrap();
        // What is not stored after all is given back.
        let again = server.post(&path, &object).await.map_err(|(code, _)| code);
        assert!(matches!(again, Err(403 | 409)), "{again:?}");
        // At once: what is admitted is claimed.
        let quota = server.get(&format!("{QUOTAS}/q")).await.unwrap();
        assert_eq!(quota["status"]["used"][name], taken, "{name}");
        if path.contains("persistentvolumeclaims") {
            server.merge(&format!("{path}/o"), &json!({"metadata": {"finalizers": null}})).await.unwrap();
        }
        server.delete(&format!("{path}/o"), &Value::Null).await.unwrap();
        says_used(&server, "q", json!({name: "0"})).await;
    }

    // More than there is, of one name or another.
    let (code, message) = server.post(QUOTAS, &json!({"metadata": {"name": "r"}, "spec": {}})).await.unwrap_err();
    assert_eq!(
        (code, message.as_str()),
        (
            403,
            "resourcequotas \"r\" is forbidden: exceeded quota: q, requested: resourcequotas=1, used: resourcequotas=1, limited: resourcequotas=1"
        )
    );
    let two = json!({"metadata": {"name": "s"}, "spec": {"type": "NodePort", "ports": [{"name": "a", "port": 1}, {"name": "b", "port": 2}]}});
    let (code, message) = server.post(&format!("{V1}/services"), &two).await.unwrap_err();
    assert!(
        code == 403 && message.contains("requested: services.nodeports=2, used: services.nodeports=0"),
        "{message}"
    );
    // A service that becomes more is charged the difference, and gives it back.
    let plain = json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 1}]}});
    server.post(&format!("{V1}/services"), &plain).await.unwrap();
    let kind = |kind: &str| json!({"spec": {"type": kind}});
    server.merge(&format!("{V1}/services/s"), &kind("LoadBalancer")).await.unwrap();
    says_used(&server, "q", json!({"services": "1", "services.nodeports": "1", "services.loadbalancers": "1"})).await;
    server.merge(&format!("{V1}/services/s"), &kind("ClusterIP")).await.unwrap();
    says_used(&server, "q", json!({"services": "1", "services.nodeports": "0", "services.loadbalancers": "0"})).await;

    // Changing the limits counts anew; the limits of the status are the controller's.
    server
        .merge(&format!("{QUOTAS}/q"), &json!({"spec": {"hard": {"secrets": "2", "configmaps": "9"}}}))
        .await
        .unwrap();
    says_used(&server, "q", json!({"secrets": "0", "configmaps": "1"})).await;
    let status = json!({"status": {"hard": {"secrets": "77"}}});
    let patched = server.merge(&format!("{QUOTAS}/q/status"), &status).await.unwrap();
    assert_eq!(
        (&patched["spec"]["hard"]["secrets"], &patched["status"]["hard"]["secrets"]),
        (&json!("2"), &json!("77"))
    );
    says_used(&server, "q", json!({"secrets": "0"})).await;
    server.merge(&format!("{QUOTAS}/q"), &json!({"metadata": {"labels": {"l": "x"}}})).await.unwrap();
    assert_eq!(server.names("/api/v1/resourcequotas?labelSelector=l%3Dx").await, ["q"]);
    server.delete(&format!("{QUOTAS}?labelSelector=l%3Dx"), &Value::Null).await.unwrap();
    server.gone(&format!("{QUOTAS}/q")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_captures_the_life_of_a_pod() {
    let Some(server) = start().await else { return };
    let hard = json!({"pods": "5", "cpu": "1", "memory": "500Mi", "requests.ephemeral-storage": "50Gi", "count/pods": "5",
        "requests.example.com/dongle": "3"});
    make(&server, "q", json!({"hard": hard})).await;
    says_used(&server, "q", json!({"pods": "0", "cpu": "0", "requests.example.com/dongle": "0"})).await;
    let pods = format!("{V1}/pods");
    let asks = |cpu: &str, dongles: &str| {
        json!({"requests": {"cpu": cpu, "memory": "252Mi", "ephemeral-storage": "30Gi", "example.com/dongle": dongles},
            "limits": {"example.com/dongle": dongles}})
    };
    server.post(&pods, &pod("p", asks("500m", "2"))).await.unwrap();
    let used = json!({"pods": "1", "cpu": "500m", "memory": "252Mi", "requests.ephemeral-storage": "30Gi", "count/pods": "1",
        "requests.example.com/dongle": "2"});
    says_used(&server, "q", used.clone()).await;
    for (name, resources, why) in [
        (
            "big",
            asks("600m", "1"),
            "exceeded quota: q, requested: cpu=600m,memory=252Mi,requests.ephemeral-storage=30Gi, used: cpu=500m,memory=252Mi,requests.ephemeral-storage=30Gi, limited: cpu=1,memory=500Mi,requests.ephemeral-storage=50Gi",
        ),
        ("silent", json!({}), "failed quota: q: must specify cpu for: c; memory for: c"),
        (
            "greedy",
            json!({"requests": {"cpu": "1m", "memory": "1Mi", "example.com/dongle": "2"}, "limits": {"example.com/dongle": "2"}}),
            "exceeded quota: q, requested: requests.example.com/dongle=2, used: requests.example.com/dongle=2, limited: requests.example.com/dongle=3",
        ),
    ] {
        let (code, message) = server.post(&pods, &pod(name, resources)).await.unwrap_err();
        assert_eq!((code, message), (403, format!("pods \"{name}\" is forbidden: {why}")));
    }
    let grown = json!({"spec": {"containers": [{"name": "c", "image": "x:1", "resources": asks("600m", "2")}]}});
    assert_eq!(server.merge(&format!("{pods}/p"), &grown).await.unwrap_err().0, 422);
    says_used(&server, "q", used).await;
    // A pod that has ended uses nothing any more, but is there.
    server.merge(&format!("{pods}/p/status"), &json!({"status": {"phase": "Succeeded"}})).await.unwrap();
    says_used(&server, "q", json!({"pods": "0", "cpu": "0", "count/pods": "1"})).await;
    server.delete(&format!("{pods}/p"), &Value::Null).await.unwrap();
    says_used(
        &server,
        "q",
        json!({"pods": "0", "cpu": "0", "memory": "0", "count/pods": "0", "requests.example.com/dongle": "0"}),
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_quota_with_scopes_counts_what_falls_under_them() {
    let Some(server) = start().await else { return };
    for scope in ["BestEffort", "NotBestEffort", "Terminating", "NotTerminating"] {
        make(&server, &scope.to_lowercase(), json!({"hard": {"pods": "5"}, "scopes": [scope]})).await;
    }
    let classes = "/apis/scheduling.k8s.io/v1/priorityclasses";
    server.post(classes, &json!({"metadata": {"name": "gold"}, "value": 10})).await.unwrap();
    let gold = json!([{"scopeName": "PriorityClass", "operator": "In", "values": ["gold"]}]);
    make(&server, "gold", json!({"hard": {"pods": "1"}, "scopeSelector": {"matchExpressions": gold}})).await;
    let quotas = ["besteffort", "notbesteffort", "terminating", "notterminating", "gold"];
    for quota in quotas {
        says_used(&server, quota, json!({"pods": "0"})).await;
    }
    let bound = json!({"requests": {"cpu": "10m", "memory": "1Mi"}, "limits": {"cpu": "20m", "memory": "2Mi"}});
    let mut ends = pod("p", bound.clone());
    ends["spec"]["activeDeadlineSeconds"] = json!(3600);
    let mut important = pod("p", bound.clone());
    important["spec"]["priorityClassName"] = json!("gold");
    for (object, counted) in [
        (pod("p", json!({})), vec!["besteffort", "notterminating"]),
        (pod("p", bound), vec!["notbesteffort", "notterminating"]),
        (ends, vec!["notbesteffort", "terminating"]),
        (important.clone(), vec!["notbesteffort", "notterminating", "gold"]),
    ] {
        server.post(&format!("{V1}/pods"), &object).await.unwrap();
        for quota in quotas {
            says_used(&server, quota, json!({"pods": if counted.contains(&quota) { "1" } else { "0" }})).await;
        }
        if counted.contains(&"gold") {
            important["metadata"]["name"] = json!("another");
            let (code, message) = server.post(&format!("{V1}/pods"), &important).await.unwrap_err();
            assert!(code == 403 && message.contains("exceeded quota: gold, requested: pods=1"), "{message}");
        }
        server.delete(&format!("{V1}/pods/p"), &Value::Null).await.unwrap();
        for quota in quotas {
            says_used(&server, quota, json!({"pods": "0"})).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn two_servers_grant_no_more_than_there_is() {
    const HARD: usize = 40;
    let Some(server) = start().await else { return };
    let sibling = server.sibling().await;
    make(&server, "q", json!({"hard": {"secrets": HARD.to_string()}})).await;
    make(&server, "another", json!({"hard": {"count/secrets": (HARD + 5).to_string()}})).await;
    says_used(&server, "q", json!({"secrets": "0"})).await;
    says_used(&server, "another", json!({"count/secrets": "0"})).await;
    let secrets = format!("{V1}/secrets");
    let requests = (0..2 * HARD).map(|n| {
        let asked = if n % 2 == 0 { &server } else { &sibling };
        let secrets = &secrets;
        async move { asked.post(secrets, &json!({"metadata": {"name": format!("s{n}")}})).await }
    });
    let answers = futures::future::join_all(requests).await;
    let granted = answers.iter().filter(|answer| answer.is_ok()).count();
    assert_eq!((granted, server.names(&secrets).await.len()), (HARD, HARD));
    for (code, message) in answers.into_iter().filter_map(Result::err) {
        assert!(code == 403 && message.contains("exceeded quota: "), "{message}");
    }
    says_used(&server, "q", json!({"secrets": "40"})).await;
    says_used(&sibling, "another", json!({"count/secrets": "40"})).await;
    server.delete(&secrets, &Value::Null).await.unwrap();
    says_used(&server, "q", json!({"secrets": "0"})).await;
    says_used(&server, "another", json!({"count/secrets": "0"})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_comes_and_goes_never_is_more_than_there_may_be() {
    const HARD: usize = 8;
    let Some(server) = start().await else { return };
    let sibling = server.sibling().await;
    make(&server, "q", json!({"hard": {"secrets": HARD.to_string()}})).await;
    says_used(&server, "q", json!({"secrets": "0"})).await;
    let secrets = format!("{V1}/secrets");
    let churn = (0..12).map(|n| {
        let (asked, secrets) = (if n % 2 == 0 { &server } else { &sibling }, &secrets);
        async move {
            let mut made = 0;
            for _ in 0..40 {
                let name = format!("s{n}");
                if asked.post(secrets, &json!({"metadata": {"name": name}})).await.is_ok() {
                    made += 1;
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    asked.delete(&format!("{secrets}/{name}"), &Value::Null).await.unwrap();
                } else {
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
                let there = asked.names(secrets).await.len();
                assert!(there <= HARD, "{there} of {HARD}");
            }
            made
        }
    });
    let made: usize = futures::future::join_all(churn).await.into_iter().sum();
    assert!(made > 2 * HARD, "what went made room: {made}");
    says_used(&server, "q", json!({"secrets": "0"})).await;
}

/// Whoever asks for devices: a container by a resource's name, or a claim by their class.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn devices_count_by_the_name_that_their_class_gives_them() {
    const NAME: &str = "requests.example.com/gpu";
    const CLASS: &str = "requests.deviceclass.resource.kubernetes.io/gpu";
    let Some(server) = start().await else { return };
    let class = json!({"metadata": {"name": "gpu"}, "spec": {"extendedResourceName": "example.com/gpu"}});
    server.post("/apis/resource.k8s.io/v1/deviceclasses", &class).await.unwrap();
    make(&server, "q", json!({"hard": {NAME: "4", CLASS: "9"}})).await;
    says_used(&server, "q", json!({NAME: "0", CLASS: "0"})).await;
    let amount = json!({"example.com/gpu": "1"});
    server.post(&format!("{V1}/pods"), &pod("p", json!({"requests": amount, "limits": amount}))).await.unwrap();
    says_used(&server, "q", json!({NAME: "1", CLASS: "0"})).await;
    let claims = "/apis/resource.k8s.io/v1/namespaces/t/resourceclaims";
    let claim = |name: &str| {
        let request = json!({"name": "r", "exactly": {"deviceClassName": "gpu", "count": 2}});
        json!({"metadata": {"name": name}, "spec": {"devices": {"requests": [request]}}})
    };
    server.post(claims, &claim("a")).await.unwrap();
    says_used(&server, "q", json!({NAME: "3", CLASS: "2"})).await;
    let (code, why) = server.post(claims, &claim("b")).await.unwrap_err();
    let told = format!("exceeded quota: q, requested: {NAME}=2, used: {NAME}=3, limited: {NAME}=4");
    assert!(code == 403 && why.ends_with(&told), "{code}: {why}");
    // What is counted anew is what was claimed.
    server.delete(&format!("{V1}/pods/p"), &Value::Null).await.unwrap();
    says_used(&server, "q", json!({NAME: "2", CLASS: "2"})).await;
    server.delete(&format!("{claims}/a"), &Value::Null).await.unwrap();
    says_used(&server, "q", json!({NAME: "0", CLASS: "0"})).await;
}
