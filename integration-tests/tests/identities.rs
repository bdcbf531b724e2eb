//! What a pod finds of its identity: a token that the API server knows it by, the authority, its namespace; streams in and
//! out of it in both dialects of kubectl; and quotas and evictions of pods that run.
use base64::Engine as _;
use integration_tests::{Cluster, Setup, can_run_hosts, eventually};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// Longer than anything takes, also where others use the machine.
const PATIENCE: Duration = Duration::from_secs(180);
const MOUNTED: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

#[tokio::test]
async fn pods_know_who_they_are() {
    if !can_run_hosts("pods_know_who_they_are") {
        return;
    }
    let cluster = Cluster::start("identities", Setup::Hosts(1)).await;
    tokens_are_mounted(&cluster).await;
    let pong = "(while true; do echo pong | nc -l -p 7000; done) >/dev/null 2>&1 &";
    cluster.ctl(&format!("exec who -c a -- sh -c '{pong}'")).success();
    the_python_client_streams(&cluster);
    streams_run_in_every_dialect(&cluster);
    logs_are_filtered(&cluster).await;
    a_budget_is_heeded_and_a_quota_released(&cluster).await;
}

/// Applies a manifest on the host.
#[track_caller]
fn apply(cluster: &Cluster, manifest: &Value) {
    cluster.hosts[0].exec(&format!("/usr/local/lib/pilothouse/ctl apply -f - <<'END'\n{manifest}\nEND\n")).success();
}

/// A request of the administrator's: what is answered, or the failure's code and message.
async fn call(cluster: &Cluster, method: &str, path: &str, body: &Value) -> Result<Value, (u16, String)> {
    let body = if body.is_null() { Vec::new() } else { body.to_string().into_bytes() };
    let content_type = if method == "PATCH" { "application/merge-patch+json" } else { "application/json" };
    let request = http::Request::builder().method(method).uri(path).header("content-type", content_type).body(body);
    cluster.client().request::<Value>(request.expect("a request")).await.map_err(|error| match error {
        kube::Error::Api(status) => (status.code, status.message.clone()),
        other => (0, other.to_string()),
    })
}

async fn tokens_are_mounted(cluster: &Cluster) {
    let sleeps = |name: &str| json!({"name": name, "image": "busybox:stable", "command": ["sleep", "600"]});
    let mut projected = sleeps("b");
    projected["volumeMounts"] = json!([{"name": "vault", "mountPath": "/vault"}]);
    let token = json!({"serviceAccountToken": {"path": "token", "audience": "vault", "expirationSeconds": 7200}});
    let spec = json!({"terminationGracePeriodSeconds": 0, "containers": [sleeps("a"), projected],
        "volumes": [{"name": "vault", "projected": {"sources": [token]}}]});
    apply(
        cluster,
        &json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "who", "labels": {"app": "who"}}, "spec": spec}),
    );
    cluster.ready_pods("app=who", 1, PATIENCE).await;
    let read = |container: &str, file: &str| cluster.ctl(&format!("exec who -c {container} -- cat {file}")).success();
    for container in ["a", "b"] {
        assert_eq!(read(container, &format!("{MOUNTED}/namespace")), "default");
        assert!(read(container, &format!("{MOUNTED}/ca.crt")).contains("BEGIN CERTIFICATE"));
    }
    let keys = call(cluster, "GET", "/openid/v1/jwks", &Value::Null).await.expect("the keys");
    let issuer = call(cluster, "GET", "/.well-known/openid-configuration", &Value::Null).await.expect("the issuer");
    for (token, audience) in
        [(read("a", &format!("{MOUNTED}/token")), None), (read("b", "/vault/token"), Some("vault"))]
    {
        let review = json!({"spec": {"token": token.trim(), "audiences": audience.map(|audience| vec![audience])}});
        let review =
            call(cluster, "POST", "/apis/authentication.k8s.io/v1/tokenreviews", &review).await.expect("a review");
        let user = &review["status"]["user"];
        assert_eq!(user["username"], "system:serviceaccount:default:default", "{review}");
        assert_eq!(user["extra"]["authentication.kubernetes.io/pod-name"], json!(["who"]));
        // Whoever asks the issuer's documents can check it, too.
        let part = |at: usize| -> Value {
            let text = token.trim().split('.').nth(at).expect("a part of a token");
            let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(text).expect("base64");
            serde_json::from_slice(&bytes).expect("JSON")
        };
        assert_eq!(part(1)["iss"], issuer["issuer"]);
        assert!(
            keys["keys"].as_array().is_some_and(|keys| keys.iter().any(|key| key["kid"] == part(0)["kid"])),
            "{keys}"
        );
    }
}

/// Over WebSocket, with stdin half closed, and over SPDY.
fn streams_run_in_every_dialect(cluster: &Cluster) {
    let host = &cluster.hosts[0];
    if host.exec("command -v kubectl").code != 0 {
        println!("left out: there is no kubectl on this machine");
        return;
    }
    for websockets in [true, false] {
        let kubectl = format!(
            "KUBECTL_REMOTE_COMMAND_WEBSOCKETS={websockets} kubectl --kubeconfig /etc/kubernetes/admin.conf exec who -c a"
        );
        assert_eq!(host.exec(&format!("echo fed | {kubectl} -i -- sh -c 'cat; echo ended'")).success(), "fed\nended\n");
        let all = host.exec(&format!("{kubectl} -- head -c 3000000 /dev/zero | wc -c")).success();
        assert_eq!(all.trim(), "3000000", "websockets={websockets}");
        assert_eq!(host.exec(&format!("{kubectl} -- sh -c 'exit 7'")).code, 7);
        let forwarded = host.exec(&format!(
            "KUBECTL_PORT_FORWARD_WEBSOCKETS={websockets} kubectl --kubeconfig /etc/kubernetes/admin.conf port-forward pod/who 7001:7000 &\n\
             forwarder=$!; trap 'kill $forwarder' EXIT\n\
             for attempt in $(seq 60); do exec 3<>/dev/tcp/127.0.0.1/7001 && read -r -t 5 heard <&3 && break; sleep 1; done\n\
             echo heard: $heard"
        ));
        assert!(forwarded.stdout.contains("heard: pong"), "websockets={websockets}: {forwarded:?}");
    }
}

/// As the conformance programme's entry for `kubectl logs`.
async fn logs_are_filtered(cluster: &Cluster) {
    let host = &cluster.hosts[0];
    if host.exec("command -v kubectl").code != 0 {
        return;
    }
    let says = "for i in $(seq 100); do echo line $i; sleep 0.1; done; sleep 600";
    let container = json!({"name": "a", "image": "busybox:stable", "command": ["sh", "-c", says]});
    let spec = json!({"terminationGracePeriodSeconds": 0, "containers": [container]});
    let metadata = json!({"name": "says", "labels": {"app": "says"}});
    apply(cluster, &json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}));
    cluster.ready_pods("app=says", 1, PATIENCE).await;
    let logs =
        |options: &str| host.exec(&format!("kubectl --kubeconfig /etc/kubernetes/admin.conf logs says -c a {options}"));
    eventually("all is said", PATIENCE, || async {
        let said = logs("").success();
        if said.ends_with("line 100\n") { Ok(()) } else { Err(said) }
    })
    .await;
    assert_eq!(logs("--tail=1").success(), "line 100\n");
    assert_eq!(logs("--limit-bytes=1").success(), "l");
    let stamped = logs("--tail=1 --timestamps").success();
    let (time, line) = stamped.split_once(' ').expect("a time and a line");
    assert!(time.parse::<k8s_openapi::jiff::Timestamp>().is_ok() && line == "line 100\n", "{stamped}");
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(logs("--since=1s").success(), "", "nothing was said lately");
    assert_eq!(logs("--since=24h").success().lines().count(), 100);
    cluster.ctl("delete pod says").success();
}

/// Commands and a port, by WebSocket.
fn the_python_client_streams(cluster: &Cluster) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (python, script) = (root.join("../target/python/bin/python"), root.join("tests/identities/streams.py"));
    if !python.exists() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing: ./test makes it", python.display());
        println!("left out: there is no Python client in {}", python.display());
        return;
    }
    let command = format!("KUBECONFIG=/etc/kubernetes/admin.conf {} {}", python.display(), script.display());
    assert_eq!(cluster.hosts[0].exec(&command).success(), "all is well\n");
}

/// A pod that runs is evicted as far as its budget goes; what it used is free when it has gone.
async fn a_budget_is_heeded_and_a_quota_released(cluster: &Cluster) {
    let default = "/api/v1/namespaces/default";
    apply(
        cluster,
        &json!({"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "q"}, "spec": {"hard": {"count/pods": "2"}}}),
    );
    let used = async |wanted: &'static str| {
        eventually(&format!("{wanted} pods count"), PATIENCE, || async {
            let quota = call(cluster, "GET", &format!("{default}/resourcequotas/q"), &Value::Null).await;
            let quota = quota.map_err(|error| format!("{error:?}"))?;
            if quota["status"]["used"]["count/pods"] == wanted { Ok(()) } else { Err(quota["status"].to_string()) }
        })
        .await;
    };
    used("1").await;
    let budgets = "/apis/policy/v1/namespaces/default/poddisruptionbudgets";
    // What the disruption controller says of a budget, for where there is none.
    for (needed, allowed, code) in [(1, 0, Some(429)), (0, 1, None)] {
        let budget = json!({"apiVersion": "policy/v1", "kind": "PodDisruptionBudget", "metadata": {"name": "b"},
            "spec": {"minAvailable": needed, "selector": {"matchLabels": {"app": "who"}}}});
        apply(cluster, &budget);
        let current = call(cluster, "GET", &format!("{budgets}/b"), &Value::Null).await.expect("the budget");
        let status = json!({"status": {"observedGeneration": current["metadata"]["generation"], "disruptionsAllowed": allowed,
            "currentHealthy": 1, "desiredHealthy": needed, "expectedPods": 1}});
        call(cluster, "PATCH", &format!("{budgets}/b/status"), &status).await.expect("its status");
        let eviction = json!({"apiVersion": "policy/v1beta1", "kind": "Eviction", "metadata": {"name": "who"}});
        let answer = call(cluster, "POST", &format!("{default}/pods/who/eviction"), &eviction).await;
        assert_eq!(answer.err().map(|(code, _)| code), code);
    }
    used("0").await;
}
