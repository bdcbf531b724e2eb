//! What the conformance programme asks of a node's agent (`[sig-node]`, `[sig-storage]`), on one node: most entries are a pod that
//! runs to its end and says what it saw, all of them at once; the others watch a pod change while it runs.
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use futures::TryStreamExt as _;
use integration_tests::{Cluster, Setup, can_run_hosts, eventually};
use k8s_openapi::api::core::v1::{
    ConfigMap, ContainerStatus, PersistentVolume, PersistentVolumeClaim, Pod, Secret, Service,
};
use k8s_openapi::api::node::v1::RuntimeClass;
use kube::api::{DeleteParams, LogParams, Patch, PatchParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};

const MINUTES: Duration = Duration::from_secs(180);

#[tokio::test]
async fn a_node_conforms() {
    if !can_run_hosts("a_node_conforms") {
        return;
    }
    let cluster = Cluster::start("node", Setup::Hosts(1)).await;
    let node = Node::new(&cluster).await;
    node.prepare().await;
    node.what_pods_see().await;
    node.what_is_mounted().await;
    node.ends_and_restarts().await;
    node.changes_are_seen().await;
    node.probes_and_hooks().await;
    node.resources_change_in_place(&cluster).await;
    node.claims_are_volumes(&cluster).await;
    node.starts_are_quick().await;
    node.many_come_and_go(&cluster).await;
}

struct Node {
    client: Client,
    pods: Api<Pod>,
}

/// A pod of busybox that runs to its end: a script, what its container and its spec have besides, and what its log must hold.
struct Case {
    /// As in the conformance document.
    entry: &'static str,
    script: &'static str,
    container: Value,
    spec: Value,
    log: Vec<String>,
}

fn case(entry: &'static str, script: &'static str, container: Value, spec: Value, log: &[&str]) -> Case {
    Case { entry, script, container, spec, log: log.iter().map(|l| (*l).to_owned()).collect() }
}

fn merge(base: &mut Value, over: Value) {
    match (base, over) {
        (Value::Object(base), Value::Object(over)) => {
            for (key, value) in over {
                merge(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (base, over) => *base = over,
    }
}

fn sh(name: &str, script: &str) -> Value {
    json!({"name": name, "image": "busybox:stable", "command": ["sh", "-c", script]})
}

fn pod(name: &str, spec: Value) -> Pod {
    let mut whole = json!({"metadata": {"name": name, "labels": {"app": name}, "annotations": {"made": "by-a-test"}},
        "spec": {"terminationGracePeriodSeconds": 1, "restartPolicy": "Never"}});
    merge(&mut whole["spec"], spec);
    serde_json::from_value(whole).expect("a pod")
}

fn statuses(pod: &Pod) -> Vec<ContainerStatus> {
    pod.status.as_ref().and_then(|s| s.container_statuses.clone()).unwrap_or_default()
}

fn restarts(pod: &Pod) -> i32 {
    statuses(pod).iter().map(|s| s.restart_count).sum()
}

impl Node {
    async fn new(cluster: &Cluster) -> Node {
        let client = cluster.client();
        Node { pods: Api::namespaced(client.clone(), "default"), client }
    }

    async fn create<K>(&self, value: Value)
    where
        K: kube::Resource<Scope = k8s_openapi::NamespaceResourceScope, DynamicType = ()>
            + serde::Serialize
            + serde::de::DeserializeOwned
            + Clone
            + std::fmt::Debug,
    {
        let object: K = serde_json::from_value(value).expect("an object");
        Api::<K>::namespaced(self.client.clone(), "default")
            .create(&PostParams::default(), &object)
            .await
            .expect("made");
    }

    async fn run(&self, name: &str, spec: Value) {
        self.pods.create(&PostParams::default(), &pod(name, spec)).await.unwrap_or_else(|e| panic!("{name}: {e}"));
    }

    async fn until(&self, name: &str, what: &str, done: impl Fn(&Pod) -> bool) -> Pod {
        eventually(&format!("{name}: {what}"), MINUTES, || async {
            let pod = self.pods.get(name).await.map_err(|e| e.to_string())?;
            if done(&pod) { Ok(pod) } else { Err(format!("{:?}", pod.status)) }
        })
        .await
    }

    async fn phase(&self, name: &str, phase: &str) -> Pod {
        self.until(name, phase, |pod| apimachinery::pod::phase(pod) == phase).await
    }

    async fn ready(&self, name: &str) -> Pod {
        self.until(name, "ready", apimachinery::pod::is_ready).await
    }

    async fn log(&self, name: &str) -> String {
        self.pods.logs(name, &LogParams::default()).await.unwrap_or_else(|e| panic!("{name}: {e}"))
    }

    async fn patch(&self, name: &str, patch: Value) {
        let patch = Patch::Strategic(patch);
        self.pods.patch(name, &PatchParams::default(), &patch).await.unwrap_or_else(|e| panic!("{name}: {e}"));
    }

    async fn remove(&self, names: &[&str]) {
        for name in names {
            self.pods.delete(name, &DeleteParams::default()).await.expect("deleted");
        }
    }

    /// Runs all cases at once; each must succeed and have said what is expected.
    async fn all(&self, group: &str, cases: Vec<Case>) {
        for (index, case) in cases.iter().enumerate() {
            let mut container = sh("c", case.script);
            merge(&mut container, case.container.clone());
            let mut spec = json!({"containers": [container]});
            merge(&mut spec, case.spec.clone());
            self.run(&format!("{group}-{index}"), spec).await;
        }
        let mut wrong = Vec::new();
        for (index, case) in cases.iter().enumerate() {
            let name = format!("{group}-{index}");
            let pod = self
                .until(&name, case.entry, |pod| matches!(apimachinery::pod::phase(pod), "Succeeded" | "Failed"))
                .await;
            let log = self.log(&name).await;
            let missing: Vec<_> =
                case.log.iter().filter(|line| !log.lines().any(|l| l.trim() == line.trim())).collect();
            if apimachinery::pod::phase(&pod) != "Succeeded" || !missing.is_empty() {
                wrong.push(format!("{}: {} lacks {missing:?} in {log:?}", case.entry, apimachinery::pod::phase(&pod)));
            }
            self.remove(&[&name]).await;
        }
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }

    async fn prepare(&self) {
        self.create::<ConfigMap>(
            json!({"metadata": {"name": "cm"}, "data": {"data-1": "value-1", "data_2": "value-2"},
            "binaryData": {"bin": "3q3vAA=="}}),
        )
        .await;
        self.create::<Secret>(json!({"metadata": {"name": "secret"}, "stringData": {"data-1": "value-1"}})).await;
        self.create::<Service>(json!({"metadata": {"name": "fooservice"},
            "spec": {"selector": {"app": "none"}, "ports": [{"port": 8765, "targetPort": 8080}]}}))
            .await;
        let class: RuntimeClass = serde_json::from_value(json!({"metadata": {"name": "costly"}, "handler": "runc",
            "overhead": {"podFixed": {"cpu": "10m", "memory": "1Mi"}}}))
        .expect("a class");
        Api::<RuntimeClass>::all(self.client.clone()).create(&PostParams::default(), &class).await.expect("made");
    }

    /// Environment, command lines, names, users, and what the node says of itself.
    async fn what_pods_see(&self) {
        let env = |list: Value| json!({"env": list});
        let field = |path: &str| json!({"name": "F", "valueFrom": {"fieldRef": {"fieldPath": path}}});
        let resource = |name: &str| json!({"name": "R", "valueFrom": {"resourceFieldRef": {"resource": name}}});
        let limits =
            json!({"requests": {"cpu": "250m", "memory": "32Mi"}, "limits": {"cpu": "1250m", "memory": "64Mi"}});
        let with = |list: Value| json!({"env": list, "resources": limits});
        let node = self.pods_host().await;
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let print = "echo \"$F\"; echo \"$R\"";
        let mut cases = vec![
            case(
                "ConfigMap via environment variable",
                "echo $A",
                env(json!([{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "cm", "key": "data-1"}}}])),
                json!({}),
                &["value-1"],
            ),
            case(
                "ConfigMap via the environment, with prefixes",
                "",
                json!({"command": ["env"], "envFrom": [{"configMapRef": {"name": "cm"}}, {"prefix": "p-", "configMapRef": {"name": "cm"}}, {"prefix": "1#", "configMapRef": {"name": "cm"}}]}),
                json!({}),
                &["data_2=value-2", "p-data-1=value-1", "1#data-1=value-1"],
            ),
            case(
                "Secrets in env vars and via the environment",
                "",
                json!({"command": ["env"], "env": [{"name": "S", "valueFrom": {"secretKeyRef": {"name": "secret", "key": "data-1"}}}], "envFrom": [{"prefix": "s_", "secretRef": {"name": "secret"}}]}),
                json!({}),
                &["S=value-1", "s_data-1=value-1"],
            ),
            case(
                "Variable Expansion composes env vars",
                "echo $FOOBAR",
                env(
                    json!([{"name": "FOO", "value": "foo"}, {"name": "BAR", "value": "bar"}, {"name": "FOOBAR", "value": "$(FOO);;$(BAR)"}]),
                ),
                json!({}),
                &["foo;;bar"],
            ),
            case(
                "Variable Expansion in command and args",
                "",
                json!({"env": [{"name": "T", "value": "test"}], "command": ["sh", "-c"], "args": ["echo \"args $(T)\"; echo \"$$(T)\""]}),
                json!({}),
                &["args test", ""],
            ),
            case(
                "Containers override args and command",
                "",
                json!({"command": ["/bin/echo"], "args": ["override", "both"]}),
                json!({}),
                &["override both"],
            ),
            case(
                "Downward API pod name and UID",
                "echo $A $B $C",
                env(
                    json!([{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "metadata.namespace"}}}, {"name": "B", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}, {"name": "C", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}}]),
                ),
                json!({}),
                &[&format!("default {} see-6", node.0)],
            ),
            case("Downward API host IP", print, env(json!([field("status.hostIP")])), json!({}), &[&node.1]),
            case("Downward API host IPs", print, env(json!([field("status.hostIPs")])), json!({}), &[&node.1]),
            case(
                "Downward API pod IP",
                "test -n \"$F\" && ip addr | grep -q \" $F/\" && echo mine",
                env(json!([field("status.podIP")])),
                json!({}),
                &["mine"],
            ),
            case("Downward API limits.cpu", print, with(json!([resource("limits.cpu")])), json!({}), &["2"]),
            case(
                "Downward API requests.memory",
                print,
                with(json!([resource("requests.memory")])),
                json!({}),
                &["33554432"],
            ),
            case(
                "Downward API default limits from node allocatable",
                print,
                env(json!([resource("limits.cpu")])),
                json!({}),
                &[&cpus.to_string()],
            ),
            case(
                "Pods contain environment variables for services",
                "env",
                json!({}),
                json!({}),
                &["FOOSERVICE_SERVICE_PORT=8765", "FOOSERVICE_PORT_8765_TCP_PROTO=tcp"],
            ),
            case(
                "Kubelet writes hostAliases to /etc/hosts",
                "cat /etc/hosts",
                json!({}),
                json!({"hostAliases": [{"ip": "123.45.67.89", "hostnames": ["foo", "bar"]}]}),
                &["# Kubernetes-managed hosts file.", "123.45.67.89\tfoo\tbar"],
            ),
            case(
                "KubeletManagedEtcHosts in the host's network",
                "head -1 /etc/hosts",
                json!({}),
                json!({"hostNetwork": true}),
                &["# Kubernetes-managed hosts file (host network)."],
            ),
            case(
                "Security Context runAsUser 65534",
                "id -u",
                json!({"securityContext": {"runAsUser": 65534}}),
                json!({}),
                &["65534"],
            ),
            case(
                "Security Context of pod and container",
                "id -u; id -g; id -G",
                json!({"securityContext": {"runAsUser": 1001}}),
                json!({"securityContext": {"runAsUser": 5, "runAsGroup": 2002, "fsGroup": 3003, "supplementalGroups": [4004]}}),
                &["1001", "2002"],
            ),
            case(
                "Security Context unprivileged",
                "ip link add dummy0 type dummy || echo refused",
                json!({"securityContext": {"privileged": false}}),
                json!({}),
                &["refused"],
            ),
            case(
                "Security Context readOnlyRootFilesystem",
                "echo x >/file || echo refused",
                json!({"securityContext": {"readOnlyRootFilesystem": true}}),
                json!({}),
                &["refused"],
            ),
            case(
                "Security Context AllowPrivilegeEscalation",
                "grep NoNewPrivs /proc/self/status",
                json!({"securityContext": {"allowPrivilegeEscalation": false, "runAsUser": 1000}}),
                json!({}),
                &["NoNewPrivs:\t1"],
            ),
            case(
                "Sysctls",
                "cat /proc/sys/kernel/shm_rmid_forced",
                json!({}),
                json!({"securityContext": {"sysctls": [{"name": "kernel.shm_rmid_forced", "value": "1"}]}}),
                &["1"],
            ),
            case("RuntimeClass with overhead", "echo ran", json!({}), json!({"runtimeClassName": "costly"}), &["ran"]),
        ];
        // An image's own command: the shell, which ends at once without input.
        let mut image = case("Containers use the image's defaults", "", json!({"command": null}), json!({}), &[]);
        image.log.clear();
        cases.push(image);
        self.all("see", cases).await;
    }

    /// The node's name and address.
    async fn pods_host(&self) -> (String, String) {
        let nodes = Api::<k8s_openapi::api::core::v1::Node>::all(self.client.clone());
        let node = nodes.list(&kube::api::ListParams::default()).await.expect("nodes").items.remove(0);
        let addresses = node.status.and_then(|s| s.addresses).unwrap_or_default();
        let address = addresses.into_iter().find(|a| a.type_ == "InternalIP").expect("an address").address;
        (node.metadata.name.expect("a name"), address)
    }

    async fn what_is_mounted(&self) {
        let mount = |more: Value| {
            let mut mount = json!({"name": "v", "mountPath": "/v"});
            merge(&mut mount, more);
            json!({"volumeMounts": [mount]})
        };
        let volume = |source: Value| {
            let mut volume = json!({"name": "v"});
            merge(&mut volume, source);
            json!({"volumes": [volume]})
        };
        let as_user = |source: Value, group: i64| {
            let mut spec = volume(source);
            merge(&mut spec, json!({"securityContext": {"runAsUser": 1000, "fsGroup": group}}));
            spec
        };
        let list = "cd /v; for f in $(find . -follow -type f -not -path '*/..*' | sort); do echo $f $(stat -L -c %a $f) $(cat $f); done";
        let items = json!([{"key": "data-1", "path": "path/to/data", "mode": 256}]);
        let downward = |items: Value| volume(json!({"downwardAPI": {"items": items}}));
        let file = |path: &str, field: &str| json!({"path": path, "fieldRef": {"fieldPath": field}});
        let amount = |name: &str| json!({"path": "r", "resourceFieldRef": {"containerName": "c", "resource": name, "divisor": "1m"}});
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) * 1000;
        let resources = json!({"resources": {"requests": {"cpu": "250m"}, "limits": {"cpu": "500m"}}});
        let measured = |more: Value| {
            let mut container = mount(json!({}));
            merge(&mut container, more);
            container
        };
        let projected = |sources: Value| volume(json!({"projected": {"sources": sources}}));
        let all = json!([{"configMap": {"name": "cm", "items": [{"key": "data-1", "path": "cm"}]}},
            {"secret": {"name": "secret", "items": [{"key": "data-1", "path": "secret"}]}},
            {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
            {"serviceAccountToken": {"path": "token"}}]);
        let cm = json!({"configMap": {"name": "cm"}});
        let secret = json!({"secret": {"secretName": "secret", "defaultMode": 288}});
        let write = "stat -c %a /v; echo x >/v/f; chmod 0644 /v/f; stat -c '%a %u' /v/f; grep ' /v ' /proc/mounts | cut -d' ' -f3";
        self.all("mounted", vec![
            case("ConfigMap in volume, with binary data", "cat /v/data-1; echo; od -An -tx1 /v/bin", mount(json!({})), volume(cm.clone()), &["value-1", "de ad ef 00"]),
            case("ConfigMap with mappings and item mode", list, mount(json!({})), volume(json!({"configMap": {"name": "cm", "items": items}})), &["./path/to/data 400 value-1"]),
            case("ConfigMap as non-root with defaultMode", list, mount(json!({})), as_user(json!({"configMap": {"name": "cm", "defaultMode": 288, "items": [{"key": "data-1", "path": "a"}]}}), 1001), &["./a 440 value-1"]),
            case("Secret with defaultMode and fsGroup", list, mount(json!({})), as_user(secret, 1001), &["./data-1 440 value-1"]),
            case("Downward API volume podname, labels, mode", list, mount(json!({})), downward(json!([file("name", "metadata.name"), {"path": "made", "mode": 256, "fieldRef": {"fieldPath": "metadata.annotations['made']"}}])), &["./name 644 mounted-4", "./made 400 by-a-test"]),
            case("Downward API volume cpu request", list, measured(resources.clone()), downward(json!([amount("requests.cpu")])), &["./r 644 250"]),
            case("Downward API volume cpu limit", list, measured(resources), downward(json!([amount("limits.cpu")])), &["./r 644 500"]),
            case("Downward API volume default cpu limit", list, mount(json!({})), downward(json!([amount("limits.cpu")])), &[&format!("./r 644 {cpus}")]),
            case("Projected combined", "cat /v/cm /v/secret /v/name | tr -d '\\n'; test -s /v/token && echo", mount(json!({})), projected(all), &["value-1value-1mounted-8"]),
            case("Optional volumes may be empty", "ls /v | wc -l", mount(json!({})), projected(json!([{"secret": {"name": "none", "optional": true}}, {"configMap": {"name": "none", "optional": true}}])), &["0"]),
            case("EmptyDir root default", write, mount(json!({})), volume(json!({"emptyDir": {}})), &["777", "644 0"]),
            case("EmptyDir root tmpfs", write, mount(json!({})), volume(json!({"emptyDir": {"medium": "Memory"}})), &["777", "644 0", "tmpfs"]),
            case("EmptyDir non-root tmpfs", write, mount(json!({})), as_user(json!({"emptyDir": {"medium": "Memory"}}), 77), &["2777", "644 1000", "tmpfs"]),
            case("Subpath with configmap over an existing file", "cat /etc/passwd", mount(json!({"mountPath": "/etc/passwd", "subPath": "data-1"})), volume(cm.clone()), &["value-1"]),
            case("Subpath with projected", "cat /v", mount(json!({"subPath": "cm/data-1"})), projected(json!([{"configMap": {"name": "cm", "items": [{"key": "data-1", "path": "cm/data-1"}]}}])), &["value-1"]),
            case("Variable Expansion in a volume subpath", "echo x >/v/f; ls /v; ls /all", json!({"env": [{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}], "volumeMounts": [{"name": "v", "mountPath": "/v", "subPathExpr": "logs-$(POD)"}, {"name": "v", "mountPath": "/all"}]}), volume(json!({"emptyDir": {}})), &["f", "logs-mounted-15"]),
            case("Environment from a file that an init container wrote", "echo $F", json!({"env": [{"name": "F", "valueFrom": {"fileKeyRef": {"volumeName": "v", "path": "made.env", "key": "KEY"}}}]}), json!({"volumes": [{"name": "v", "emptyDir": {}}], "initContainers": [{"name": "i", "image": "busybox:stable", "command": ["sh", "-c", "echo \"KEY='made before'\" >/v/made.env"], "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}), &["made before"]),
            case("EmptyDir shared between containers", "while ! cat /v/said 2>/dev/null; do sleep 0.1; done", mount(json!({})), json!({"volumes": [{"name": "v", "emptyDir": {}}], "initContainers": [{"name": "s", "image": "busybox:stable", "restartPolicy": "Always", "command": ["sh", "-c", "echo hello >/v/said; sleep 600"], "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}), &["hello"]),
        ]).await;
    }

    /// How pods end, and when they begin again.
    async fn ends_and_restarts(&self) {
        let with = |script: &str, more: Value| {
            let mut container = sh("c", script);
            merge(&mut container, more);
            json!([container])
        };
        let message =
            |policy: &str, path: &str| json!({"terminationMessagePolicy": policy, "terminationMessagePath": path});
        let log = "/dev/termination-log";
        for (name, spec) in [
            (
                "log-on-error",
                json!({"containers": with("echo -n DONE; exit 1", message("FallbackToLogsOnError", log))}),
            ),
            ("log-on-success", json!({"containers": with("echo DONE", message("FallbackToLogsOnError", log))})),
            (
                "file-on-success",
                json!({"containers": with("echo -n OK >/dev/termination-log", message("FallbackToLogsOnError", log))}),
            ),
            (
                "custom-path",
                json!({"securityContext": {"runAsUser": 1000}, "containers": with("echo -n DONE >/dev/custom", message("File", "/dev/custom"))}),
            ),
            (
                "init-fails",
                json!({"initContainers": [sh("i1", "exit 1"), sh("i2", "true")], "containers": [sh("c", "true")]}),
            ),
            (
                "init-runs",
                json!({"initContainers": [sh("i1", "true"), sh("i2", "true")], "containers": [sh("c", "true")]}),
            ),
            (
                "init-loops",
                json!({"restartPolicy": "Always", "initContainers": [sh("i1", "exit 1"), sh("i2", "true")], "containers": [sh("c", "sleep 600")]}),
            ),
            ("always", json!({"restartPolicy": "Always", "containers": [sh("c", "exit 0")]})),
            (
                "on-failure",
                json!({"restartPolicy": "OnFailure", "containers": with("if [ -e /v/again ]; then exit 0; fi; touch /v/again; exit 1", json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]})), "volumes": [{"name": "v", "emptyDir": {}}]}),
            ),
            (
                "absolute",
                json!({"containers": with("true", json!({"env": [{"name": "P", "value": "/tmp"}], "volumeMounts": [{"name": "v", "mountPath": "/v", "subPathExpr": "$(P)"}]})), "volumes": [{"name": "v", "emptyDir": {}}]}),
            ),
            (
                "guaranteed",
                json!({"containers": with("true", json!({"resources": {"requests": {"cpu": "10m", "memory": "16Mi"}, "limits": {"cpu": "10m", "memory": "16Mi"}}}))}),
            ),
            (
                "invalid-sysctl",
                json!({"securityContext": {"sysctls": [{"name": "kernel.msgmax", "value": "1"}]}, "containers": [sh("c", "true")]}),
            ),
        ] {
            self.run(name, spec).await;
        }
        for (name, phase, want) in [
            ("log-on-error", "Failed", Some("DONE")),
            ("log-on-success", "Succeeded", None),
            ("file-on-success", "Succeeded", Some("OK")),
            ("custom-path", "Succeeded", Some("DONE")),
        ] {
            let pod = self.phase(name, phase).await;
            let ended = statuses(&pod)[0].state.clone().and_then(|s| s.terminated).expect("an end");
            assert_eq!(ended.message.as_deref(), want, "{name}");
        }
        let failed = self.phase("init-fails", "Failed").await;
        assert!(statuses(&failed)[0].state.as_ref().is_some_and(|s| s.waiting.is_some()), "{failed:?}");
        let ran = self.phase("init-runs", "Succeeded").await;
        let inits = ran.status.as_ref().and_then(|s| s.init_container_statuses.clone()).unwrap_or_default();
        assert!(inits.len() == 2 && inits.iter().all(|s| s.ready), "{inits:?}");
        let looping = |pod: &Pod| {
            let inits = pod.status.as_ref().and_then(|s| s.init_container_statuses.clone()).unwrap_or_default();
            inits.first().is_some_and(|s| s.restart_count >= 2)
        };
        let init = self.until("init-loops", "restarts", looping).await;
        assert_eq!(apimachinery::pod::phase(&init), "Pending");
        self.until("always", "restarts", |pod| restarts(pod) >= 2).await;
        assert_eq!(restarts(&self.phase("on-failure", "Succeeded").await), 1);
        let waits = |pod: &Pod| {
            let waiting = statuses(pod).first().and_then(|s| s.state.clone()?.waiting);
            waiting.is_some_and(|w| w.message.unwrap_or_default().contains("must not be an absolute path"))
        };
        self.until("absolute", "waits", waits).await;
        let pod = self.phase("guaranteed", "Succeeded").await;
        assert_eq!(pod.status.and_then(|s| s.qos_class).as_deref(), Some("Guaranteed"));
        assert_eq!(
            self.phase("invalid-sysctl", "Failed").await.status.and_then(|s| s.reason).as_deref(),
            Some("SysctlForbidden")
        );
        let names = [
            "log-on-error",
            "log-on-success",
            "file-on-success",
            "custom-path",
            "init-fails",
            "init-runs",
            "init-loops",
            "always",
            "on-failure",
            "absolute",
            "guaranteed",
            "invalid-sysctl",
        ];
        self.remove(&names).await;
        for name in names {
            eventually(&format!("{name} is gone"), MINUTES, || async {
                if self.pods.get_opt(name).await.map_err(|e| e.to_string())?.is_none() {
                    Ok(())
                } else {
                    Err(String::new())
                }
            })
            .await;
        }
    }

    /// What changes under a running pod: its volumes, labels, generation, deadline, and containers that join it.
    async fn changes_are_seen(&self) {
        self.create::<ConfigMap>(json!({"metadata": {"name": "live"}, "data": {"k": "one"}})).await;
        let volumes = json!([{"name": "v", "projected": {"sources": [{"configMap": {"name": "live"}}, {"secret": {"name": "late", "optional": true}},
            {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}}]}}]);
        let watcher = "while :; do cat /v/k /v/s /v/labels 2>/dev/null | tr '\\n' ' '; echo; sleep 1; done";
        let mut container = sh("c", watcher);
        merge(&mut container, json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}));
        self.run("live", json!({"restartPolicy": "Always", "containers": [container], "volumes": volumes})).await;
        let broken = json!([{"name": "c", "image": "busybox:stable", "command": ["sleep", "600"],
            "env": [{"name": "P", "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['sub']"}}}],
            "volumeMounts": [{"name": "v", "mountPath": "/v", "subPathExpr": "$(P)"}]}]);
        self.run("mended", json!({"containers": broken, "volumes": [{"name": "v", "emptyDir": {}}]})).await;
        self.run("short", json!({"containers": [sh("c", "sleep 600")]})).await;
        let live = self.ready("live").await;
        assert_eq!((live.metadata.generation, live.status.and_then(|s| s.observed_generation)), (Some(1), Some(1)));
        Api::<ConfigMap>::namespaced(self.client.clone(), "default")
            .patch("live", &PatchParams::default(), &Patch::Merge(json!({"data": {"k": "two"}})))
            .await
            .expect("patched");
        self.create::<Secret>(json!({"metadata": {"name": "late"}, "stringData": {"s": "came"}})).await;
        self.patch("live", json!({"metadata": {"labels": {"app": "changed"}}})).await;
        self.patch("mended", json!({"metadata": {"annotations": {"sub": "there"}}})).await;
        self.ready("short").await;
        self.patch("short", json!({"spec": {"activeDeadlineSeconds": 1}})).await;
        let short = self.phase("short", "Failed").await;
        assert_eq!(short.status.and_then(|s| s.reason).as_deref(), Some("DeadlineExceeded"));

        for (index, name) in ["debug-1", "debug-2"].into_iter().enumerate() {
            let mut ephemeral = sh(name, "echo here; sleep 600");
            merge(&mut ephemeral, json!({"targetContainerName": "c"}));
            let patch = json!({"spec": {"ephemeralContainers": [ephemeral]}});
            self.pods
                .patch_subresource("ephemeralcontainers", "live", &PatchParams::default(), &Patch::Strategic(patch))
                .await
                .expect("an ephemeral container");
            let running = |pod: &Pod| {
                let all = pod.status.as_ref().and_then(|s| s.ephemeral_container_statuses.clone()).unwrap_or_default();
                all.iter().filter(|s| s.state.as_ref().is_some_and(|s| s.running.is_some())).count() == index + 1
            };
            self.until("live", name, running).await;
        }
        let observed = |pod: &Pod| pod.status.as_ref().and_then(|s| s.observed_generation) == pod.metadata.generation;
        assert!(self.until("live", "observed", observed).await.metadata.generation >= Some(3));
        eventually("the volume follows", MINUTES, || async {
            let last = LogParams { container: Some("c".into()), tail_lines: Some(1), ..Default::default() };
            let log = self.pods.logs("live", &last).await.map_err(|e| e.to_string())?;
            if log.contains("twocameapp=\"changed\"") { Ok(()) } else { Err(log) }
        })
        .await;
        self.until("mended", "runs at last", |pod| apimachinery::pod::phase(pod) == "Running").await;
        self.remove(&["live", "mended", "short"]).await;
    }

    async fn probes_and_hooks(&self) {
        let probe = |kind: &str, action: Value| {
            let mut probe = json!({"initialDelaySeconds": 1, "periodSeconds": 1, "failureThreshold": 1});
            merge(&mut probe, action);
            json!({kind: probe})
        };
        let with = |name: &str, script: &str, more: Value| {
            let mut container = sh(name, script);
            merge(&mut container, more);
            json!({"restartPolicy": "Always", "containers": [container]})
        };
        let serve = "mkdir /w; echo fine >/w/healthz; httpd -f -p 8080 -h /w & sleep 4; rm -f /w/gone; wait";
        let dies = "mkdir /w; echo fine >/w/healthz; httpd -f -p 8080 -h /w & sleep 4; rm /w/healthz; wait";
        let http = |path: &str| json!({"httpGet": {"path": path, "port": 8080}});
        let exec = json!({"exec": {"command": ["cat", "/tmp/health"]}});
        for (name, spec) in [
            (
                "exec-fails",
                with(
                    "c",
                    "echo ok >/tmp/health; sleep 4; rm /tmp/health; sleep 600",
                    probe("livenessProbe", exec.clone()),
                ),
            ),
            ("exec-lives", with("c", "echo ok >/tmp/health; sleep 600", probe("livenessProbe", exec))),
            ("http-fails", with("c", dies, probe("livenessProbe", http("/healthz")))),
            ("http-lives", with("c", serve, probe("livenessProbe", http("/healthz")))),
            ("tcp-lives", with("c", dies, probe("livenessProbe", json!({"tcpSocket": {"port": 8080}})))),
            ("grpc-fails", with("c", serve, probe("livenessProbe", json!({"grpc": {"port": 2333}})))),
            ("never-ready", with("c", "sleep 600", probe("readinessProbe", json!({"exec": {"command": ["false"]}})))),
            (
                "late-ready",
                with(
                    "c",
                    "sleep 600",
                    probe("readinessProbe", json!({"initialDelaySeconds": 6, "exec": {"command": ["true"]}})),
                ),
            ),
            // Says whatever it is asked for.
            ("server", with("c", "mkdir /w; echo x >/w/echo; httpd -f -v -p 8080 -h /w 2>&1", json!({}))),
        ] {
            self.run(name, spec).await;
        }
        let address = self.ready("server").await.status.and_then(|s| s.pod_ip).expect("an address");
        let get = |path: &str| format!("wget -q -O- http://{address}:8080/echo?{path}");
        let hook = |kind: &str, action: Value| json!({"lifecycle": {kind: action}});
        let by_exec = |path: &str| json!({"exec": {"command": ["sh", "-c", get(path)]}});
        let by_http = |path: &str| json!({"httpGet": {"host": address, "port": 8080, "path": format!("/echo?{path}")}});
        let hooks = ["post-exec", "post-http", "pre-exec", "pre-http"];
        for name in hooks {
            let action = if name.ends_with("exec") { by_exec(name) } else { by_http(name) };
            let kind = if name.starts_with("post") { "postStart" } else { "preStop" };
            let mut spec = with("c", "sleep 600", hook(kind, action));
            merge(&mut spec, json!({"terminationGracePeriodSeconds": 5}));
            self.run(name, spec).await;
        }
        for name in hooks {
            self.ready(name).await;
        }
        let asked = async || self.log("server").await.matches("response:200").count();
        eventually("hooks after the start have asked", MINUTES, || async {
            let count = asked().await;
            if count >= 2 { Ok(()) } else { Err(self.log("server").await) }
        })
        .await;
        self.remove(&hooks).await;
        eventually("hooks before the end have asked", MINUTES, || async {
            let count = asked().await;
            if count >= 4 { Ok(()) } else { Err(self.log("server").await) }
        })
        .await;

        for name in ["exec-fails", "http-fails", "grpc-fails"] {
            self.until(name, "restarts", |pod| restarts(pod) >= 1).await;
        }
        let late = self.ready("late-ready").await;
        let at = |pod: &Pod, kind: &str| {
            apimachinery::pod::condition(pod, kind).and_then(|c| c.last_transition_time.clone()).expect("a time").0
        };
        let began = statuses(&late)[0].state.clone().and_then(|s| s.running?.started_at).expect("a start").0;
        assert!(at(&late, "Ready").as_second() - began.as_second() >= 5, "ready after its initial delay");
        for name in ["exec-lives", "http-lives", "tcp-lives", "never-ready", "late-ready"] {
            let pod = self.pods.get(name).await.expect("a pod");
            assert_eq!(restarts(&pod), 0, "{name}");
            assert_eq!(apimachinery::pod::is_ready(&pod), name != "never-ready", "{name}");
        }
        self.remove(&[
            "exec-fails",
            "exec-lives",
            "http-fails",
            "http-lives",
            "tcp-lives",
            "grpc-fails",
            "never-ready",
            "late-ready",
            "server",
        ])
        .await;
    }

    /// CPU and memory of running containers follow their spec, in the kernel and in the status.
    async fn resources_change_in_place(&self, cluster: &Cluster) {
        let amounts = |cpu: &str, memory: &str| {
            let both = json!({"cpu": cpu, "memory": memory});
            json!({"requests": both, "limits": both})
        };
        let container = |name: &str, cpu: &str, memory: &str| {
            let mut container = sh(name, "sleep 600");
            merge(&mut container, json!({"resources": amounts(cpu, memory)}));
            container
        };
        let before = [("c1", "20m", "20Mi"), ("c2", "30m", "30Mi"), ("c3", "40m", "40Mi")];
        let after = [("c1", "30m", "40Mi"), ("c2", "20m", "25Mi"), ("c3", "60m", "30Mi")];
        let list = |all: &[(&str, &str, &str)]| all.iter().map(|(n, c, m)| container(n, c, m)).collect::<Vec<_>>();
        self.run("resized", json!({"restartPolicy": "Always", "containers": list(&before)})).await;
        self.ready("resized").await;
        let patch: Vec<Value> = after.iter().map(|(n, c, m)| json!({"name": n, "resources": amounts(c, m)})).collect();
        let patch = Patch::Strategic(json!({"spec": {"containers": patch}}));
        self.pods.patch_subresource("resize", "resized", &PatchParams::default(), &patch).await.expect("a resize");
        let done = |pod: &Pod| {
            let told: BTreeMap<String, Value> = statuses(pod)
                .into_iter()
                .map(|s| (s.name, serde_json::to_value(s.resources).unwrap_or_default()))
                .collect();
            after.iter().all(|(name, cpu, memory)| told.get(*name) == Some(&amounts(cpu, memory)))
                && apimachinery::pod::condition(pod, "PodResizeInProgress").is_none()
        };
        let pod = self.until("resized", "told", done).await;
        assert_eq!(restarts(&pod), 0);
        for (name, cpu, memory) in after {
            let bytes = apimachinery::quantity::Quantity::parse(memory).expect("an amount").value();
            let quota = apimachinery::quantity::Quantity::parse(cpu).expect("an amount").milli_value() * 100;
            let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null";
            let seen = cluster.ctl(&format!("exec resized -c {name} -- sh -c '{script}'")).stdout;
            assert!(seen.contains(&bytes.to_string()) && seen.contains(&quota.to_string()), "{name}: {seen}");
        }
        let patch =
            Patch::Strategic(json!({"spec": {"containers": [{"name": "c1", "resources": amounts("900", "40Mi")}]}}));
        self.pods.patch_subresource("resize", "resized", &PatchParams::default(), &patch).await.expect("a resize");
        let refused = |pod: &Pod| {
            apimachinery::pod::condition(pod, "PodResizePending")
                .is_some_and(|c| c.reason.as_deref() == Some("Infeasible"))
        };
        self.until("resized", "infeasible", refused).await;
        self.remove(&["resized"]).await;
    }

    /// Claims bound to directories of the host, one by path and one local, and a claim of the pod's own.
    async fn claims_are_volumes(&self, cluster: &Cluster) {
        cluster.hosts[0].exec("mkdir -p /srv/path /srv/local && echo kept >/srv/local/kept").success();
        let node = self.pods_host().await.0;
        let affinity = json!({"required": {"nodeSelectorTerms": [{"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}]}});
        for (name, source) in [
            ("by-path", json!({"hostPath": {"path": "/srv/path", "type": "Directory"}})),
            ("local", json!({"local": {"path": "/srv/local"}, "nodeAffinity": affinity})),
        ] {
            let mut spec = json!({"capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"], "storageClassName": "",
                "claimRef": {"namespace": "default", "name": name}, "persistentVolumeReclaimPolicy": "Retain"});
            merge(&mut spec, source);
            let volume: PersistentVolume =
                serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).expect("a volume");
            let volumes = Api::<PersistentVolume>::all(self.client.clone());
            let volume = volumes.create(&PostParams::default(), &volume).await.expect("made");
            self.create::<PersistentVolumeClaim>(
                json!({"metadata": {"name": name}, "spec": {"accessModes": ["ReadWriteOnce"],
                "storageClassName": "", "volumeName": name, "resources": {"requests": {"storage": "1Gi"}}}}),
            )
            .await;
            self.bind(name, &volume).await;
        }
        let mounts = json!([{"name": "a", "mountPath": "/a"}, {"name": "b", "mountPath": "/b", "subPath": "deep"}]);
        let mut container = sh("c", "echo written >/a/f; cat /a/f; echo deep >/b/f; stat -c %g /b/f; sleep 600");
        merge(&mut container, json!({"volumeMounts": mounts}));
        let claim = |name: &str| json!({"claimName": name});
        self.run("claims", json!({"securityContext": {"fsGroup": 4242}, "containers": [container], "volumes": [
            {"name": "a", "persistentVolumeClaim": claim("by-path")}, {"name": "b", "persistentVolumeClaim": claim("local")}]}))
            .await;
        self.ready("claims").await;
        eventually("the claims are written to", MINUTES, || async {
            let log = self.log("claims").await;
            if log == "written\n4242\n" { Ok(()) } else { Err(log) }
        })
        .await;
        self.remove(&["claims"]).await;
        let host = &cluster.hosts[0];
        eventually("its mounts are gone, its data is not", MINUTES, || async {
            let left = host.exec("grep -c kubernetes.io~local-volume /proc/mounts; cat /srv/path/f /srv/local/deep/f /srv/local/kept").stdout;
            if left == "0\nwritten\ndeep\nkept\n" { Ok(()) } else { Err(left) }
        })
        .await;
    }

    /// One pod after another: how long from its creation until a watch shows it ready. Told, not judged: others use the machine.
    async fn starts_are_quick(&self) {
        let mut took = Vec::new();
        for index in 0..15 {
            let name = format!("quick-{index}");
            let params = kube::api::WatchParams::default().fields(&format!("metadata.name={name}"));
            let events = self.pods.watch(&params, "0").await.expect("a watch");
            let mut events = std::pin::pin!(events);
            let begun = Instant::now();
            self.run(&name, json!({"restartPolicy": "Always", "containers": [sh("c", "sleep 600")]})).await;
            while let Ok(Some(event)) = events.try_next().await {
                if let kube::api::WatchEvent::Modified(pod) | kube::api::WatchEvent::Added(pod) = event
                    && apimachinery::pod::is_ready(&pod)
                {
                    break;
                }
            }
            took.push(begun.elapsed().as_millis());
            self.remove(&[&name]).await;
        }
        took.sort_unstable();
        println!("pod start, created to ready, ms: p50 {}, all {took:?}", took[took.len() / 2]);
    }

    /// Many pods at once, while the runtime hangs for a moment and the kubelet dies: all run, and when they are gone, nothing is
    /// left of them.
    async fn many_come_and_go(&self, cluster: &Cluster) {
        const PODS: usize = 40;
        let host = &cluster.hosts[0];
        // Not the runtime's own processes: one whose caller dies while it makes a sandbox may forget a shim.
        let count = || {
            let cgroups = format!("find /sys/fs/cgroup -path '*{}*' -type d -name 'pod*-*' | wc -l", host.cgroup());
            let parts = [
                "ls /run/netns | wc -l",
                "ip -o link show type veth | wc -l",
                "grep -c 'io.containerd\\|kubelet/pods' /proc/mounts",
                "ls /var/lib/kubelet/pods /var/log/pods | wc -l",
                "ls /var/lib/cni/networks/* /var/lib/cni/results 2>/dev/null | wc -l",
                &cgroups,
            ];
            host.exec(&parts.join("; ")).stdout
        };
        let all_gone = async || {
            eventually("no pods", MINUTES, || async {
                let pods = self.pods.list(&kube::api::ListParams::default()).await.map_err(|e| e.to_string())?.items;
                if pods.is_empty() { Ok(()) } else { Err(format!("{} pods", pods.len())) }
            })
            .await;
        };
        all_gone().await;
        eventually("the traces of pods before are gone", MINUTES, || async {
            let left = host.exec("ls /var/lib/kubelet/pods").stdout;
            // The pods of the cluster's DNS stay.
            if left.lines().count() <= 2 { Ok(()) } else { Err(left) }
        })
        .await;
        let before = count();
        let memory = || {
            let lines = host.exec("grep -E '(VmRSS|RssAnon)' /proc/$(cat /run/pilothouse/kubelet.pid)/status").stdout;
            lines.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        println!("kubelet without pods, in this build: {}", memory());
        let begun = Instant::now();
        let mut container = sh("c", "sleep 600");
        let mounts = json!([{"name": "m", "mountPath": "/m"}, {"name": "c", "mountPath": "/c", "subPath": "data-1"}]);
        merge(&mut container, json!({"volumeMounts": mounts}));
        let volumes =
            json!([{"name": "m", "emptyDir": {"medium": "Memory"}}, {"name": "c", "configMap": {"name": "cm"}}]);
        for index in 0..PODS {
            let mut pod = pod(&format!("many-{index}"), json!({"containers": [container], "volumes": volumes}));
            pod.metadata.labels = Some([("app".to_owned(), "many".to_owned())].into());
            self.pods.create(&PostParams::default(), &pod).await.expect("made");
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        host.exec("kill -STOP $(cat /run/pilothouse/containerd.pid); sleep 4; kill -CONT $(cat /run/pilothouse/containerd.pid)").success();
        let many = kube::api::ListParams::default().labels("app=many");
        let running = |pods: &[Pod]| -> std::collections::BTreeMap<Option<String>, Option<String>> {
            let runs = |pod: &Pod| {
                let status = statuses(pod).first()?.clone();
                status.state?.running.map(|_| (pod.metadata.name.clone(), status.container_id))
            };
            pods.iter().filter_map(runs).collect()
        };
        let ran = running(&self.pods.list(&many).await.expect("pods").items);
        cluster.kill(0, "kubelet");
        let pods = cluster.ready_pods("app=many", PODS, MINUTES).await;
        // One that was being made or started when the kubelet died is made anew; one that ran is left alone.
        let runs = running(&pods);
        let touched: Vec<_> = ran.iter().filter(|(name, id)| runs.get(*name) != Some(*id)).collect();
        assert!(touched.is_empty(), "what hangs and dies around them is none of theirs: {touched:?}");
        println!("{PODS} pods ready {:?} after the first was made, faults included", begun.elapsed());
        println!("kubelet with {PODS} pods, in this build: {}", memory());
        self.pods.delete_collection(&DeleteParams::default(), &many).await.expect("deleted");
        tokio::time::sleep(Duration::from_millis(500)).await;
        cluster.kill(0, "kubelet");
        all_gone().await;
        eventually("all is as it was", MINUTES, || async {
            let now = count();
            if now == before { Ok(()) } else { Err(format!("before {before:?}, now {now:?}")) }
        })
        .await;
    }

    /// Binds a claim to its volume, where no controller does.
    async fn bind(&self, name: &str, volume: &PersistentVolume) {
        let claims = Api::<PersistentVolumeClaim>::namespaced(self.client.clone(), "default");
        let claim = claims.get(name).await.expect("a claim");
        let uid = claim.metadata.uid.clone().expect("a UID");
        let volumes = Api::<PersistentVolume>::all(self.client.clone());
        let name_of = volume.metadata.name.as_deref().expect("a name");
        volumes
            .patch(name_of, &PatchParams::default(), &Patch::Merge(json!({"spec": {"claimRef": {"uid": uid}}})))
            .await
            .expect("bound");
        let status =
            json!({"status": {"phase": "Bound", "capacity": {"storage": "1Gi"}, "accessModes": ["ReadWriteOnce"]}});
        claims.patch_status(name, &PatchParams::default(), &Patch::Merge(status)).await.expect("bound");
    }
}
