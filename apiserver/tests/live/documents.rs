//! What the server says of itself: discovery, OpenAPI, version, health, metrics, keys; read by plain requests, by kubectl, and
//! by the client for Python.

use crate::common::{ISSUER, JSON, Server, has_etcd, has_kubectl};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";
/// A resource that every server has in a group, as the conformance suite names them.
const KNOWN: [(&str, &str); 8] = [
    ("apps", "deployments"),
    ("batch", "cronjobs"),
    ("rbac.authorization.k8s.io", "clusterroles"),
    ("networking.k8s.io", "ingresses"),
    ("admissionregistration.k8s.io", "mutatingwebhookconfigurations"),
    ("apiextensions.k8s.io", "customresourcedefinitions"),
    ("coordination.k8s.io", "leases"),
    ("autoscaling", "horizontalpodautoscalers"),
];

async fn get(server: &Server, path: &str, headers: &[(&str, &str)]) -> (u16, http::HeaderMap, Value) {
    let (code, headers, body) = server.raw("GET", path, headers, Vec::new()).await;
    (code, headers, serde_json::from_slice(&body).unwrap_or_default())
}

/// Conformance: Discovery (preferred versions; a group version and a resource of each group), and the discovery documents of
/// webhooks and definitions.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn discovery_leads_to_every_resource() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    let apis = server.get("/apis").await.unwrap();
    for group in apis["groups"].as_array().unwrap() {
        let versions: Vec<&Value> = group["versions"].as_array().unwrap().iter().collect();
        assert!(versions.contains(&&group["preferredVersion"]), "{group}");
        assert_eq!(
            server.get(&format!("/apis/{}", group["name"].as_str().unwrap())).await.unwrap()["versions"],
            group["versions"]
        );
        for version in versions {
            let group_version = version["groupVersion"].as_str().unwrap();
            let list = server.get(&format!("/apis/{group_version}")).await.unwrap();
            assert_eq!(list["groupVersion"], group_version);
            let names: Vec<&str> =
                list["resources"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
            assert!(!names.is_empty(), "{group_version}");
            for (known, resource) in KNOWN {
                assert!(group["name"] != known || names.contains(&resource), "{group_version}: {resource}");
            }
        }
    }
    let api = server.get("/api").await.unwrap();
    assert_eq!(api["versions"], json!(["v1"]));
    assert!(api["serverAddressByClientCIDRs"][0]["serverAddress"].as_str().unwrap().contains(':'), "{api}");
    let paths = server.get("/").await.unwrap();
    for path in ["/api/v1", "/apis/apps", "/healthz", "/openapi/v3", "/version"] {
        assert!(paths["paths"].as_array().unwrap().contains(&json!(path)), "{path}");
    }
}

/// Conformance: AggregatedDiscovery, the interface and its Accept headers.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn aggregated_discovery_has_every_built_in_resource() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    let mut seen = BTreeSet::new();
    for path in ["/api", "/apis"] {
        let (code, headers, document) = get(&server, path, &[("accept", AGGREGATED)]).await;
        assert_eq!((code, headers["content-type"].to_str().unwrap()), (200, AGGREGATED));
        assert_eq!(document["kind"], "APIGroupDiscoveryList");
        for group in document["items"].as_array().unwrap() {
            for version in group["versions"].as_array().unwrap() {
                for resource in version["resources"].as_array().unwrap() {
                    let text = |value: &Value| value.as_str().unwrap_or("").to_owned();
                    seen.insert((
                        text(&group["metadata"]["name"]),
                        text(&version["version"]),
                        text(&resource["resource"]),
                    ));
                }
            }
        }
        let etag = headers["etag"].to_str().unwrap();
        assert_eq!(get(&server, path, &[("accept", AGGREGATED), ("if-none-match", etag)]).await.0, 304);
    }
    for kind in apimachinery::facts::kinds() {
        let found = (kind.group.to_owned(), kind.version.to_owned(), kind.resource.to_owned());
        assert!(seen.contains(&found), "{found:?}");
    }
    let beta = AGGREGATED.replace("v=v2", "v=v2beta1");
    for (accept, content_type) in [
        (format!("{AGGREGATED},application/json"), AGGREGATED.to_owned()),
        (format!("{beta},application/json"), beta.clone()),
        (
            "application/json;g=apidiscovery.k8s.io;v=v9;as=APIGroupDiscoveryList,application/json".to_owned(),
            JSON.to_owned(),
        ),
        (JSON.to_owned(), JSON.to_owned()),
        ("*/*".to_owned(), JSON.to_owned()),
    ] {
        assert_eq!(get(&server, "/apis", &[("accept", &accept)]).await.1["content-type"], content_type, "{accept}");
    }
}

/// Conformance: "server version should find the server version".
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn version_health_metrics_and_keys_are_told() {
    if !has_etcd() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let key = directory.path().join("sa.key").display().to_string();
    std::fs::write(&key, rcgen::KeyPair::generate().unwrap().serialize_pem()).unwrap();
    let server = Server::start_with(&[
        &format!("--service-account-issuer={ISSUER}"),
        &format!("--service-account-key-file={key}"),
        &format!("--service-account-signing-key-file={key}"),
    ])
    .await;
    let version = server.get("/version").await.unwrap();
    assert!(
        version["major"].as_str().unwrap().parse::<u32>().is_ok()
            && version["minor"].as_str().unwrap().parse::<u32>().is_ok()
    );
    let text = async |path: &str| {
        let (code, _, body) = server.raw("GET", path, &[], Vec::new()).await;
        (code, String::from_utf8(body).unwrap())
    };
    for path in
        ["/livez", "/readyz", "/healthz", "/healthz/etcd", "/livez/ping", "/readyz/poststarthook/rbac/bootstrap-roles"]
    {
        assert_eq!(text(path).await, (200, "ok".to_owned()), "{path}");
    }
    assert_eq!(text("/livez/none").await.0, 404);
    let verbose = text("/readyz?verbose&exclude=etcd").await.1;
    assert!(verbose.contains("[+]etcd excluded: ok") && verbose.ends_with("readyz check passed\n"), "{verbose}");

    let (_, headers, _) = get(&server, "/api/v1/pods", &[("audit-id", "asked-for")]).await;
    assert_eq!(headers["audit-id"], "asked-for");
    let metrics = text("/metrics").await.1;
    for series in [
        "apiserver_request_total{",
        "apiserver_request_duration_seconds_bucket{",
        "apiserver_response_sizes_bucket{",
        "apiserver_storage_objects{",
        "apiserver_admission_step_admission_duration_seconds_bucket{",
    ] {
        assert!(metrics.contains(series), "{series}");
    }
    let checks = text("/metrics/slis").await.1;
    assert!(
        checks.contains("kubernetes_healthcheck{") && checks.contains("kubernetes_healthchecks_total{"),
        "{checks}"
    );
    assert!(text("/configz").await.1.contains("etcd-servers"));
    let (_, headers, configuration) = get(&server, "/.well-known/openid-configuration", &[]).await;
    assert_eq!((headers["content-type"].to_str().unwrap(), &configuration["issuer"]), (JSON, &json!(ISSUER)));
    assert!(configuration["jwks_uri"].as_str().unwrap().ends_with("/openid/v1/jwks"), "{configuration}");
    assert_eq!(configuration["response_types_supported"], json!(["id_token"]));
    let (_, headers, keys) = get(&server, "/openid/v1/jwks", &[]).await;
    assert_eq!(headers["content-type"], "application/jwk-set+json");
    assert_eq!((&keys["keys"][0]["use"], &keys["keys"][0]["kty"]), (&json!("sig"), &json!("EC")), "{keys}");

    let (_, headers, statuses) = get(&server, "/api/v1/componentstatuses", &[]).await;
    assert_eq!(headers["warning"], "299 - \"v1 ComponentStatus is deprecated in v1.19+\"");
    let names: Vec<&str> =
        statuses["items"].as_array().unwrap().iter().map(|s| s["metadata"]["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["controller-manager", "etcd-0", "scheduler"]);
    let etcd = server.get("/api/v1/componentstatuses/etcd-0").await.unwrap();
    assert_eq!(etcd["conditions"][0], json!({"type": "Healthy", "status": "True", "message": "ok"}));
    assert_eq!(
        server.table("/api/v1/componentstatuses").await["rows"][1]["cells"],
        json!(["etcd-0", "Healthy", "ok", ""])
    );
    assert_eq!(server.get("/api/v1/componentstatuses/none").await.unwrap_err().0, 404);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openapi_is_read_by_its_index() {
    if !has_etcd() {
        return;
    }
    let server = Server::start().await;
    let index = server.get("/openapi/v3").await.unwrap();
    for (name, entry) in index["paths"].as_object().unwrap() {
        let address = entry["serverRelativeURL"].as_str().unwrap();
        let (code, headers, document) = get(&server, address, &[]).await;
        assert_eq!((code, headers["cache-control"].to_str().unwrap()), (200, "public, immutable"), "{name}");
        assert_eq!(document["openapi"], "3.0.0", "{name}");
        let etag = headers["etag"].to_str().unwrap();
        assert_eq!(get(&server, address, &[("if-none-match", etag)]).await.0, 304, "{name}");
    }
    let (_, headers, v2) = get(&server, "/openapi/v2", &[]).await;
    assert_eq!((v2["swagger"].as_str().unwrap(), headers["content-type"].to_str().unwrap()), ("2.0", JSON));
    let accept = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf";
    let (code, headers, _) = get(&server, "/openapi/v2", &[("accept", accept)]).await;
    assert_eq!((code, headers["content-type"].to_str().unwrap()), (200, accept.replace('@', ".").as_str()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kubectl_explains_and_checks_before_it_sends() {
    if !has_etcd() || !has_kubectl() {
        return;
    }
    let server = Server::start().await;
    for (arguments, expected) in [
        (vec!["explain", "pod.spec", "--recursive"], "terminationGracePeriodSeconds\t<integer>"),
        (vec!["explain", "deployment.spec.strategy"], "Type of deployment. Can be \"Recreate\" or"),
        (vec!["explain", "hpa.spec.metrics", "--api-version=autoscaling/v2"], "metrics contains the specifications"),
        (
            vec!["explain", "configmap", "-o", "plaintext-openapiv2"],
            "ConfigMap holds configuration data for pods to consume.",
        ),
        (vec!["api-resources", "-o", "wide"], "deletecollection"),
        (vec!["get", "componentstatuses"], "etcd-0"),
        (vec!["get", "namespaces", "-o", "wide"], "kube-system"),
    ] {
        let (ok, text) = server.kubectl(&arguments, "");
        assert!(ok && text.contains(expected), "{arguments:?}: {text}");
    }
    let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\n";
    for command in ["create", "apply"] {
        assert!(server.kubectl(&[command], &format!("{map}data: {{a: b}}\n")).0);
    }
    let (ok, said) = server.kubectl(&["apply"], &format!("{map}data: {{a: c}}\nbogus: 1\n"));
    assert!(!ok && said.contains("unknown field \"bogus\""), "{said}");
}

/// The client for Python does what its users do with it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_python_client_makes_reads_watches_patches_and_deletes() {
    if !has_etcd() {
        return;
    }
    let python = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/python/bin/python");
    if !python.exists() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing: ./test makes it", python.display());
        println!("skipped: there is no Python client in {}", python.display());
        return;
    }
    let server = Server::start().await;
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/live/client.py");
    let home = tempfile::tempdir().unwrap();
    let kubeconfig = home.path().join("kubeconfig");
    std::fs::write(&kubeconfig, server.kubeconfig()).unwrap();
    let output = Command::new(python).arg(script).env("KUBECONFIG", kubeconfig).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && out.contains("all is well"), "{out}{err}");
}
