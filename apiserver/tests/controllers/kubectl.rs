//! The commands of kubectl against a control plane, as the conformance programme's entries for kubectl describe them. There are no
//! nodes: who says that a pod runs is the test.

use crate::common::{Server, eventually, has_kubectl};
use serde_json::{Value, json};
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Stdio};

const RC: &str = "/api/v1/namespaces/t/replicationcontrollers/agnhost-primary";
const PODS: &str = "/api/v1/namespaces/t/pods";
const NODE: &str = "kubectl-node";

/// kubectl's proxy, until it is dropped.
struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        _ = self.0.kill();
        _ = self.0.wait();
    }
}

fn run(server: &Server, args: &[&str]) -> String {
    read(server, args, "")
}

fn read(server: &Server, args: &[&str], manifest: &str) -> String {
    let (ok, said) = server.kubectl(args, manifest);
    assert!(ok, "{args:?}: {said}");
    said
}

/// That all of it is said, in whatever order.
fn tells(said: &str, parts: &[&str]) {
    let squeezed = said.split_whitespace().collect::<Vec<_>>().join(" ");
    for part in parts {
        assert!(squeezed.contains(part), "{part} is not in {said}");
    }
}

/// The pods of the controller, once there are so many, all said to run.
async fn running(server: &Server, count: usize) -> Vec<String> {
    let names = eventually("pods of the controller", async || {
        let list = server.get(&format!("{PODS}?labelSelector=app%3Dagnhost")).await.unwrap();
        let alive =
            list["items"].as_array().unwrap().iter().filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let names: Vec<String> = alive.filter_map(|pod| Some(pod["metadata"]["name"].as_str()?.to_owned())).collect();
        if names.len() == count { Ok(names) } else { Err(format!("{names:?}")) }
    })
    .await;
    for name in &names {
        let ready = json!([{"type": "Ready", "status": "True"}]);
        let container = json!([{"name": "primary", "image": "agnhost", "imageID": "i", "ready": true, "restartCount": 0,
            "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}}}]);
        let status =
            json!({"phase": "Running", "conditions": ready, "containerStatuses": container, "podIP": "10.0.0.9"});
        server.merge(&format!("{PODS}/{name}/status"), &json!({"status": status})).await.unwrap();
    }
    names
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_of_kubectl_work() {
    if !has_kubectl() {
        return;
    }
    let Some(server) = crate::start().await else { return };
    tells(&run(&server, &["api-versions"]), &["apps/v1 ", " v1"]);
    // It may complain about how old it is behind the answer.
    let said = run(&server, &["version", "-o", "json"]);
    let versions = serde_json::Deserializer::from_str(&said).into_iter::<Value>().next().unwrap().unwrap();
    for of in ["clientVersion", "serverVersion"] {
        for part in ["major", "minor", "gitVersion", "gitCommit", "platform"] {
            assert!(versions[of][part].as_str().is_some_and(|text| !text.is_empty()), "{of} {part}: {versions}");
        }
    }
    tells(&run(&server, &["cluster-info"]), &["Kubernetes control plane", "is running at", &server.url]);
    let proxied = [("--port=0", None), ("--unix-socket", Some(tempfile::tempdir().unwrap()))];
    for (flag, directory) in proxied {
        let socket = directory.as_ref().map(|directory| directory.path().join("socket"));
        serves(&server, flag, socket.as_deref());
    }
    a_controller_is_made_described_exposed_and_scaled(&server).await;
    single_pods_are_run_labelled_and_replaced(&server).await;
    a_deployment_is_compared(&server);
}

/// The proxy says where it serves, and there the versions of the API are.
fn serves(server: &Server, flag: &str, socket: Option<&Path>) {
    let flag = socket.map_or_else(|| flag.to_owned(), |socket| format!("{flag}={}", socket.display()));
    let mut command = server.kubectl_command(&["proxy", &flag]);
    let mut proxy = Proxy(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut said = String::new();
    BufReader::new(proxy.0.stdout.take().unwrap()).read_line(&mut said).unwrap();
    let at = said.trim().strip_prefix("Starting to serve on ").unwrap_or_else(|| panic!("{said}"));
    let ask = |stream: &mut dyn ReadWrite| {
        let mut answer = String::new();
        write!(stream, "GET /api/ HTTP/1.0\r\nHost: localhost\r\n\r\n").unwrap();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = match socket {
        Some(socket) => ask(&mut UnixStream::connect(socket).unwrap()),
        None => ask(&mut TcpStream::connect(at).unwrap()),
    };
    assert!(answer.contains("\"versions\"") && answer.contains("\"v1\""), "{answer}");
}

trait ReadWrite: Read + Write {}
impl<T: Read + Write> ReadWrite for T {}

async fn a_controller_is_made_described_exposed_and_scaled(server: &Server) {
    let manifest = json!({"apiVersion": "v1", "kind": "ReplicationController", "metadata": {"name": "agnhost-primary", "namespace": "t"},
        "spec": {"replicas": 2, "selector": {"app": "agnhost", "role": "primary"},
            "template": {"metadata": {"labels": {"app": "agnhost", "role": "primary"}},
                "spec": {"containers": [{"name": "primary", "image": "agnhost", "ports": [{"name": "agnhost-server", "containerPort": 6379}]}]}}}});
    read(server, &["create"], &manifest.to_string());
    let pods = running(server, 2).await;
    let pod = pods[0].as_str();
    tells(
        &run(server, &["-n", "t", "describe", "pod", pod]),
        &[
            &format!("Name: {pod}"),
            "Namespace: t",
            "Labels: app=agnhost role=primary",
            "Status: Running",
            "IP: 10.0.0.9",
            "Controlled By: ReplicationController/agnhost-primary",
            "Image: agnhost",
            "State: Running",
            "QoS Class: BestEffort",
        ],
    );
    let described = || run(server, &["-n", "t", "describe", "rc", "agnhost-primary"]);
    tells(
        &described(),
        &[
            "Name: agnhost-primary",
            "Namespace: t",
            "Selector: app=agnhost,role=primary",
            "Labels: app=agnhost role=primary",
            "Annotations:",
            "Replicas: 2 current / 2 desired",
            "Pods Status: 2 Running / 0 Waiting / 0 Succeeded / 0 Failed",
            "Pod Template:",
            "Image: agnhost",
            "Events:",
        ],
    );
    for (args, port) in [
        (["expose", "rc", "agnhost-primary", "--name=rm2", "--port=1234"], 1234),
        (["expose", "service", "rm2", "--name=rm3", "--port=2345"], 2345),
    ] {
        run(server, &[&["-n", "t"][..], &args, &["--target-port=6379"]].concat());
        let name = args[3].trim_start_matches("--name=");
        let service = server.get(&format!("/api/v1/namespaces/t/services/{name}")).await.unwrap();
        let only = &service["spec"]["ports"];
        assert_eq!((only[0]["port"].clone(), only[0]["targetPort"].clone()), (json!(port), json!(6379)), "{service}");
        eventually("the pods are behind it", async || {
            let endpoints = server.get(&format!("/api/v1/namespaces/t/endpoints/{name}")).await.map_err(|e| e.1)?;
            let ports = &endpoints["subsets"][0]["ports"];
            if ports[0]["port"] == 6379 && ports.as_array().is_some_and(|p| p.len() == 1) {
                Ok(())
            } else {
                Err(endpoints.to_string())
            }
        })
        .await;
    }
    let service = run(server, &["-n", "t", "describe", "service", "rm2"]);
    let parts = [
        "Name: rm2",
        "Namespace: t",
        "Selector: app=agnhost,role=primary",
        "Type: ClusterIP",
        "IP:",
        "Port:",
        "1234/TCP",
        "Session Affinity: None",
    ];
    tells(&service, &parts);
    let node = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE, "labels": {"a": "b"}}});
    read(server, &["create"], &node.to_string());
    let status = json!({"capacity": {"cpu": "2"}, "conditions": [{"type": "Ready", "status": "True"}],
        "addresses": [{"type": "InternalIP", "address": "10.0.0.1"}]});
    server.merge(&format!("/api/v1/nodes/{NODE}/status"), &json!({"status": status})).await.unwrap();
    let parts = [
        "Labels: a=b",
        "Annotations:",
        "CreationTimestamp:",
        "Conditions:",
        "Addresses:",
        "Capacity:",
        "Kubelet Version:",
        "Non-terminated Pods:",
    ];
    tells(&run(server, &["describe", "node", NODE]), &parts);
    let parts = [
        "Name: t",
        "Labels: kubernetes.io/metadata.name=t",
        "Annotations:",
        "Status: Active",
        "No resource quota.",
        "No LimitRange resource.",
    ];
    tells(&run(server, &["describe", "namespace", "t"]), &parts);
    for pod in &pods {
        run(server, &["-n", "t", "patch", "pod", pod, "-p", r#"{"metadata":{"annotations":{"x":"y"}}}"#]);
        assert_eq!(server.get(&format!("{PODS}/{pod}")).await.unwrap()["metadata"]["annotations"]["x"], "y");
    }
    for replicas in [1, 2] {
        run(server, &["-n", "t", "scale", "rc", "agnhost-primary", &format!("--replicas={replicas}"), "--timeout=5m"]);
        running(server, replicas).await;
    }
    run(server, &["-n", "t", "delete", "rc", "agnhost-primary", "--cascade=background"]);
    server.gone(RC).await;
}

async fn single_pods_are_run_labelled_and_replaced(server: &Server) {
    let get = async || server.get(&format!("{PODS}/e2e")).await.unwrap();
    run(server, &["-n", "t", "run", "e2e", "--image=httpd:1", "--restart=Never", "--labels=run=e2e"]);
    let pod = get().await;
    let containers = pod["spec"]["containers"].as_array().unwrap();
    assert_eq!(
        (containers.len(), &containers[0]["image"], &pod["spec"]["restartPolicy"]),
        (1, &json!("httpd:1"), &json!("Never"))
    );
    let labelled = || run(server, &["-n", "t", "get", "pod", "e2e", "-L", "testing-label"]);
    run(server, &["-n", "t", "label", "pods", "e2e", "testing-label=testing-label-value"]);
    assert!(labelled().contains("testing-label-value"), "{}", labelled());
    run(server, &["-n", "t", "label", "pods", "e2e", "testing-label-"]);
    assert!(!labelled().contains("testing-label-value"), "{}", labelled());
    let patch = r#"{"spec":{"containers":[{"name":"e2e","image":"busybox:1"}]}}"#;
    tells(&run(server, &["-n", "t", "patch", "pod", "e2e", "-p", patch, "--dry-run=server"]), &["pod/e2e patched"]);
    assert_eq!(get().await["spec"]["containers"][0]["image"], "httpd:1", "a dry run changes nothing");
    let mut other = get().await;
    other["spec"]["containers"][0]["image"] = json!("busybox:1");
    read(server, &["replace"], &other.to_string());
    let replaced = get().await;
    assert_eq!(
        (&replaced["spec"]["containers"][0]["image"], &replaced["metadata"]["uid"]),
        (&json!("busybox:1"), &pod["metadata"]["uid"])
    );
    for field in ["uid", "resourceVersion", "creationTimestamp"] {
        other["metadata"].as_object_mut().unwrap().remove(field);
    }
    other["spec"]["containers"][0]["image"] = json!("busybox:2");
    read(server, &["replace", "--force", "--grace-period=0"], &other.to_string());
    let anew = get().await;
    assert_eq!(anew["spec"]["containers"][0]["image"], "busybox:2");
    assert_ne!(anew["metadata"]["uid"], pod["metadata"]["uid"], "it was made anew");
}

fn a_deployment_is_compared(server: &Server) {
    let deployment = |image: &str| {
        json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "namespace": "t"},
            "spec": {"selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}},
                "spec": {"containers": [{"name": "c", "image": image}]}}}})
        .to_string()
    };
    read(server, &["create"], &deployment("agnhost:live"));
    let (same, said) = server.kubectl(&["diff"], &deployment("busybox:declared"));
    assert!(!same, "{said}");
    tells(&said, &["- - image: agnhost:live", "+ - image: busybox:declared"]);
}

/// As the programme's test of policies that are checked against the kinds that they are for.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_policy_is_told_what_does_not_fit_its_kinds() {
    let Some(server) = crate::start().await else { return };
    let policies = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies";
    let rule =
        json!({"apiGroups": ["apps"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["deployments"]});
    let spec = json!({"matchConstraints": {"resourceRules": [rule]},
        "validations": [{"expression": "object.spec.replicas > '1'", "messageExpression": "'wants ' + object.spec.replicas"}]});
    server.post(policies, &json!({"metadata": {"name": "types"}, "spec": spec})).await.unwrap();
    let warnings = async |generation: i64| {
        eventually("the policy is looked at", async || {
            let policy = server.get(&format!("{policies}/types")).await.unwrap();
            if policy["status"]["observedGeneration"] == generation {
                Ok(policy["status"]["typeChecking"]["expressionWarnings"].clone())
            } else {
                Err(policy.to_string())
            }
        })
        .await
    };
    let told = warnings(1).await;
    for (at, field, why) in [
        (0, "expression", "found no matching overload for '_>_' applied to '(int, string)'"),
        (1, "messageExpression", "found no matching overload for '_+_' applied to '(string, int)'"),
    ] {
        assert_eq!(told[at]["fieldRef"], format!("spec.validations[0].{field}"));
        let warning = told[at]["warning"].as_str().unwrap();
        assert!(
            warning.starts_with("apps/v1, Kind=Deployment: ERROR: <input>:1:") && warning.contains(why),
            "{warning}"
        );
    }
    let fits = json!({"spec": {"validations": [{"expression": "object.spec.replicas > 1"}]}});
    server.merge(&format!("{policies}/types"), &fits).await.unwrap();
    assert_eq!(warnings(2).await, Value::Null);
}
