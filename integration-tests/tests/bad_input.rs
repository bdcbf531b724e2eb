//! What the API server says to what is wrong: Kubernetes' status code, and a message that names the field or the cause.
//! Nothing of it is stored.
use integration_tests::{Cluster, Setup, can_run_hosts, eventually};
use serde_json::{Value, json};
use std::time::Duration;

const HEADERS: &str = "-H 'Content-Type: application/json'";

#[tokio::test]
async fn bad_input_is_refused_and_explained() {
    if !can_run_hosts("bad_input_is_refused_and_explained") {
        return;
    }
    let cluster = Cluster::start("bad-input", Setup::Hosts(1)).await;
    let maps = "/api/v1/namespaces/default/configmaps";
    let deployments = "/apis/apps/v1/namespaces/default/deployments";
    let deployment = |change: &dyn Fn(&mut Value)| {
        let mut object = json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "bad"}, "spec": {
            "replicas": 1, "selector": {"matchLabels": {"app": "bad"}}, "template": {"metadata": {"labels": {"app": "bad"}},
            "spec": {"containers": [{"name": "c", "image": "i"}]}}}});
        change(&mut object);
        object.to_string()
    };
    let map = |name: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}}).to_string();
    for (what, path, body, code, says) in [
        (
            "an unknown field", format!("{deployments}?fieldValidation=Strict"),
            deployment(&|d| d["spec"]["replicaz"] = 3.into()), 400, r#"unknown field "spec.replicaz""#,
        ),
        (
            "a wrong type", deployments.to_owned(),
            deployment(&|d| d["spec"]["replicas"] = "two".into()), 400, "cannot unmarshal string into Go struct field",
        ),
        ("an invalid name", maps.to_owned(), map("Bad_Name"), 422, "metadata.name: Invalid value"),
        ("no name", maps.to_owned(), r#"{"apiVersion":"v1","kind":"ConfigMap"}"#.to_owned(), 422, "name or generateName is required"),
        (
            "a selector that does not fit", deployments.to_owned(),
            deployment(&|d| d["spec"]["selector"]["matchLabels"]["app"] = "other".into()), 422, "`selector` does not match template `labels`",
        ),
        ("no containers", deployments.to_owned(), deployment(&|d| d["spec"]["template"]["spec"]["containers"] = json!([])), 422, "spec.template.spec.containers: Required value"),
        ("broken JSON", maps.to_owned(), "{\"apiVersion\":".to_owned(), 400, "json parse error"),
        ("another kind", maps.to_owned(), deployment(&|_| {}), 400, "does not match the expected API version"),
        ("another namespace", maps.to_owned(), json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "other"}}).to_string(), 400, "does not match the namespace"),
        ("an unknown resource", "/api/v1/namespaces/default/podz".to_owned(), map("a"), 404, "could not find the requested resource"),
        ("a namespace that is not there", "/api/v1/namespaces/nowhere/configmaps".to_owned(), map("a"), 404, r#"namespaces "nowhere" not found"#),
        ("a body too large", maps.to_owned(), json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "big"}, "data": {"x": "y".repeat(4 << 20)}}).to_string(), 413, "too large"),
    ] {
        let (status, answer) = post(&cluster, &path, &body);
        assert_eq!(status, code, "{what}: {answer}");
        let parsed: Value = serde_json::from_str(&answer).unwrap_or_else(|e| panic!("{what}: {e}: {answer}"));
        assert_eq!((parsed["kind"].as_str(), parsed["code"].as_i64()), (Some("Status"), Some(i64::from(code))), "{what}");
        assert!(parsed["message"].as_str().is_some_and(|m| m.contains(says)), "{what}: {answer}");
    }
    let stored = cluster.ctl("get configmaps,deployments -o name").success();
    assert_eq!(stored.lines().filter(|l| !l.contains("kube-root-ca.crt")).count(), 0, "nothing is stored: {stored}");

    stale_writes_conflict(&cluster);
    strangers_are_turned_away(&cluster);
    a_manifest_in_error_names_the_file(&cluster);
    a_missing_image_is_told(&cluster).await;
}

fn stale_writes_conflict(cluster: &Cluster) {
    cluster.ctl("create configmap once --from-literal=a=1").success();
    let old = cluster.ctl("get configmap once -o json").success();
    cluster.ctl("label configmap once x=y").success();
    cluster.hosts[0].exec(&format!("cat >/root/old.json <<'END'\n{old}\nEND")).success();
    let (status, answer) = request(cluster, "PUT", "/api/v1/namespaces/default/configmaps/once", "/root/old.json", "");
    assert_eq!(status, 409, "{answer}");
    assert!(answer.contains("the object has been modified"), "{answer}");
}

fn strangers_are_turned_away(cluster: &Cluster) {
    let curl = |options: &str| {
        let line = format!(
            "curl -s -k -w '\\n%{{http_code}}' {options} https://127.0.0.1:6443/api/v1/namespaces/kube-system/secrets"
        );
        split_code(&cluster.hosts[0].exec(&line).success())
    };
    let (code, answer) = curl("");
    assert_eq!(code, 403, "nobody: {answer}");
    assert!(answer.contains(r#"User \"system:anonymous\" cannot list resource \"secrets\""#), "{answer}");
    let (code, answer) = curl("-H 'Authorization: Bearer nonsense'");
    assert_eq!(code, 401, "a wrong token: {answer}");
    cluster.hosts[0].exec("openssl req -x509 -newkey rsa:2048 -nodes -subj /O=system:masters/CN=me -keyout /root/me.key -out /root/me.crt -days 1").success();
    // A certificate of a stranger ends the handshake, or counts for nothing.
    let output = cluster.hosts[0].exec(
        "curl -s -k -w '\\n%{http_code}' --cert /root/me.crt --key /root/me.key https://127.0.0.1:6443/api/v1/secrets",
    );
    let code = split_code(&output.stdout).0;
    assert!(output.code != 0 || code == 401 || code == 403, "a wrong certificate: {output:?}");
}

fn a_manifest_in_error_names_the_file(cluster: &Cluster) {
    cluster.hosts[0].exec("printf 'apiVersion: v1\\nkind: ConfigMap\\n  metadata: {' >/root/broken.yaml").success();
    let error = cluster.ctl("apply -f /root/broken.yaml").failure();
    assert!(error.contains("broken.yaml"), "{error}");
}

async fn a_missing_image_is_told(cluster: &Cluster) {
    cluster.ctl("run missing --image=registry.invalid/nothing:1 --restart=Never").success();
    eventually("the pod says that its image cannot be had", Duration::from_secs(90), || async {
        let reason =
            cluster.ctl("get pod missing -o jsonpath={.status.containerStatuses[0].state.waiting.reason}").stdout;
        if matches!(reason.trim(), "ErrImagePull" | "ImagePullBackOff") { Ok(()) } else { Err(reason) }
    })
    .await;
}

fn post(cluster: &Cluster, path: &str, body: &str) -> (u16, String) {
    let file = cluster.hosts[0].scratch().join("body.json");
    std::fs::write(&file, body).expect("a body");
    request(cluster, "POST", path, &file.display().to_string(), HEADERS)
}

/// With curl, as administrator, so that nothing is checked before it is sent.
fn request(cluster: &Cluster, method: &str, path: &str, file: &str, headers: &str) -> (u16, String) {
    let pki = "--cacert /etc/kubernetes/pki/ca.crt --cert /root/admin.crt --key /root/admin.key";
    let unpack = "test -e /root/admin.key || { sed -n 's/.*client-certificate-data: //p' /etc/kubernetes/admin.conf | tr -d '\"' | base64 -d >/root/admin.crt; \
        sed -n 's/.*client-key-data: //p' /etc/kubernetes/admin.conf | tr -d '\"' | base64 -d >/root/admin.key; }";
    let host = cluster.hosts[0].address();
    let headers = if headers.is_empty() { HEADERS } else { headers };
    let line = format!(
        "{unpack}; curl -s -w '\\n%{{http_code}}' {pki} {headers} -X {method} --data-binary @{file} 'https://{host}:6443{path}'"
    );
    split_code(&cluster.hosts[0].exec(&line).success())
}

fn split_code(output: &str) -> (u16, String) {
    let (answer, code) = output.rsplit_once('\n').unwrap_or(("", output));
    (code.trim().parse().unwrap_or(0), answer.to_owned())
}
