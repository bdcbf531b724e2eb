//! Volumes of all kinds as pods see them.
use super::*;

/// Says of each file below `/v`: its path, mode and content.
const LIST: &str = "cd /v; for f in $(find . -follow -type f -not -path '*/..*' -not -name bin | sort); do echo $f $(stat -L -c %a $f) $(cat $f); done";

fn named(path: &str) -> Value {
    json!({"path": path, "fieldRef": {"fieldPath": "metadata.name"}})
}

fn amount(resource: &str) -> Value {
    let divisor = if resource.ends_with("cpu") { "1m" } else { "1" };
    json!({"path": "r", "resourceFieldRef": {"containerName": "c", "resource": resource, "divisor": divisor}})
}

/// A pod with all sorts of volumes that are made from objects, each once as a volume of its own kind and once projected. `mode`
/// is what becomes of a file's mode, and `readable` whether the pod's user can read it.
fn many_volumes(entry: &'static str, pod: &str, spec: Value, mode: fn(u32) -> u32, readable: fn(u32) -> bool) -> Case {
    let none = Value::Null;
    let mapped = json!({"key": "data-1", "path": "path/to/data"});
    let with_mode = |item: &Value| {
        let mut item = item.clone();
        merge(&mut item, json!({"mode": 0o400}));
        item
    };
    let name = named("name");
    let mut rows = Vec::new();
    for kind in ["configMap", "secret"] {
        rows.push((kind, none.clone(), none.clone(), "data-1", 0o644, "value-1"));
        rows.push((kind, json!(0o400), none.clone(), "data-1", 0o400, "value-1"));
        rows.push((kind, none.clone(), mapped.clone(), "path/to/data", 0o644, "value-1"));
        rows.push((kind, none.clone(), with_mode(&mapped), "path/to/data", 0o400, "value-1"));
    }
    rows.push(("downwardAPI", none.clone(), name.clone(), "name", 0o644, pod));
    rows.push(("downwardAPI", json!(0o400), name.clone(), "name", 0o400, pod));
    rows.push(("downwardAPI", none.clone(), with_mode(&name), "name", 0o400, pod));
    for (resource, value) in
        [("requests.cpu", "250"), ("limits.cpu", "500"), ("requests.memory", "33554432"), ("limits.memory", "67108864")]
    {
        rows.push(("downwardAPI", none.clone(), amount(resource), "r", 0o644, value));
    }
    let (mut volumes, mut mounts, mut log) = (Vec::new(), Vec::new(), Vec::new());
    for (kind, default_mode, item, path, file_mode, content) in rows {
        let items = if item.is_null() { Value::Null } else { json!([item]) };
        let (own, object) = match kind {
            "configMap" => (json!({"name": "cm"}), json!({"name": "cm"})),
            "secret" => (json!({"secretName": "secret"}), json!({"name": "secret"})),
            _ => (json!({}), json!({})),
        };
        let source = |mut source: Value, more: Value| {
            merge(&mut source, more);
            source
        };
        let of_its_own = json!({kind: source(own, json!({"items": items, "defaultMode": default_mode}))});
        let projection = json!({kind: source(object, json!({"items": items}))});
        for form in [of_its_own, json!({"projected": {"defaultMode": default_mode, "sources": [projection]}})] {
            let name = format!("v{}", volumes.len());
            mounts.push(json!({"name": name, "mountPath": format!("/v/{name}")}));
            let content = if readable(file_mode) { content } else { "" };
            log.push(format!("./{name}/{path} {:o} {content}", mode(file_mode)));
            volumes.push(source(json!({"name": name}), form));
        }
    }
    let resources = json!({"requests": {"cpu": "250m", "memory": "32Mi"}, "limits": {"cpu": "500m", "memory": "64Mi"}});
    let mut spec = spec;
    merge(&mut spec, json!({"volumes": volumes}));
    Case { entry, script: LIST, container: json!({"volumeMounts": mounts, "resources": resources}), spec, log }
}

impl Node {
    pub(super) async fn what_is_mounted(&self) {
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
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) * 1000;
        let memory = self.allocatable_memory().await;
        let modes = "for m in 644 666 777; do echo x >/v/$m && chmod $m /v/$m && stat -c '%a %u' /v/$m; done";
        let projected = |sources: Value| volume(json!({"projected": {"sources": sources}}));
        let all = json!([{"configMap": {"name": "cm", "items": [{"key": "data-1", "path": "cm"}]}},
            {"secret": {"name": "secret", "items": [{"key": "data-1", "path": "secret"}]}},
            {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
            {"serviceAccountToken": {"path": "token"}}]);
        let cm = json!({"configMap": {"name": "cm"}});
        let write = "stat -c %a /v; echo x >/v/f; chmod 0644 /v/f; stat -c '%a %u' /v/f; grep ' /v ' /proc/mounts | cut -d' ' -f3";
        let limits = json!({"items": [amount("limits.cpu"), {"path": "m", "resourceFieldRef": {"containerName": "c", "resource": "limits.memory"}}]});
        let default_limits = [format!("./r 644 {cpus}"), format!("./m 644 {memory}")];
        let default_limits: Vec<&str> = default_limits.iter().map(String::as_str).collect();
        let user = |group: Value| json!({"securityContext": {"runAsUser": 1000, "fsGroup": group}});
        self.all("mounted", vec![
            many_volumes("as root", "mounted-0", json!({}), |mode| mode, |_| true),
            many_volumes("as non-root", "mounted-1", user(Value::Null), |mode| mode, |mode| mode & 4 != 0),
            many_volumes("as non-root with fsGroup", "mounted-2", user(json!(1001)), |mode| mode | 0o440, |_| true),
            case("ConfigMap in volume, with binary data", "cat /v/data-1; echo; od -An -tx1 /v/bin", mount(json!({})), volume(cm.clone()), &["value-1", "de ad ef 00"]),
            case("Downward API volume default limits", LIST, mount(json!({})), volume(json!({"downwardAPI": limits})), &default_limits),
            case("Projected default limits", LIST, mount(json!({})), projected(json!([{"downwardAPI": limits}])), &default_limits),
            case("Projected combined", "cat /v/cm /v/secret /v/name | tr -d '\\n'; test -s /v/token && echo", mount(json!({})), projected(all), &["value-1value-1mounted-6"]),
            case("Optional volumes may be empty", "ls /v | wc -l", mount(json!({})), projected(json!([{"secret": {"name": "none", "optional": true}}, {"configMap": {"name": "none", "optional": true}}])), &["0"]),
            case("EmptyDir root default", write, mount(json!({})), volume(json!({"emptyDir": {}})), &["777", "644 0"]),
            case("EmptyDir root tmpfs", write, mount(json!({})), volume(json!({"emptyDir": {"medium": "Memory"}})), &["777", "644 0", "tmpfs"]),
            case("EmptyDir non-root tmpfs", write, mount(json!({})), as_user(json!({"emptyDir": {"medium": "Memory"}}), 77), &["2777", "644 1000", "tmpfs"]),
            case("Subpath with configmap over an existing file", "cat /etc/passwd", mount(json!({"mountPath": "/etc/passwd", "subPath": "data-1"})), volume(cm.clone()), &["value-1"]),
            case("Subpath with configmap", "cat /v", mount(json!({"subPath": "data-1"})), volume(cm), &["value-1"]),
            case("Subpath with projected", "cat /v", mount(json!({"subPath": "cm/data-1"})), projected(json!([{"configMap": {"name": "cm", "items": [{"key": "data-1", "path": "cm/data-1"}]}}])), &["value-1"]),
            case("Subpath with secret", "cat /v", mount(json!({"subPath": "data-1"})), volume(json!({"secret": {"secretName": "secret"}})), &["value-1"]),
            case("Subpath with downward", "cat /v/name", mount(json!({"subPath": "deep"})), volume(json!({"downwardAPI": {"items": [named("deep/name")]}})), &["mounted-15"]),
            case("Variable Expansion in a volume subpath", "echo x >/v/f; ls /v; ls /all", json!({"env": [{"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}}], "volumeMounts": [{"name": "v", "mountPath": "/v", "subPathExpr": "logs-$(POD)"}, {"name": "v", "mountPath": "/all"}]}), volume(json!({"emptyDir": {}})), &["f", "logs-mounted-16"]),
            case("Environment from a file that an init container wrote", "echo $F", json!({"env": [{"name": "F", "valueFrom": {"fileKeyRef": {"volumeName": "v", "path": "made.env", "key": "KEY"}}}]}), json!({"volumes": [{"name": "v", "emptyDir": {}}], "initContainers": [{"name": "i", "image": "busybox:stable", "command": ["sh", "-c", "echo \"KEY='made before'\" >/v/made.env"], "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}), &["made before"]),
            case("EmptyDir shared between containers", "while ! cat /v/said 2>/dev/null; do sleep 0.1; done", mount(json!({})), json!({"volumes": [{"name": "v", "emptyDir": {}}], "initContainers": [{"name": "s", "image": "busybox:stable", "restartPolicy": "Always", "command": ["sh", "-c", "echo hello >/v/said; sleep 600"], "volumeMounts": [{"name": "v", "mountPath": "/v"}]}]}), &["hello"]),
            case("EmptyDir root modes", modes, mount(json!({})), volume(json!({"emptyDir": {}})), &["644 0", "666 0", "777 0"]),
            case("EmptyDir root tmpfs modes", modes, mount(json!({})), volume(json!({"emptyDir": {"medium": "Memory"}})), &["644 0", "666 0", "777 0"]),
            case("EmptyDir non-root modes", modes, mount(json!({})), as_user(json!({"emptyDir": {}}), 77), &["644 1000", "666 1000", "777 1000"]),
            case("EmptyDir non-root tmpfs modes", modes, mount(json!({})), as_user(json!({"emptyDir": {"medium": "Memory"}}), 77), &["644 1000", "666 1000", "777 1000"]),
        ]).await;
    }

    /// The node's memory for pods, in bytes.
    pub(super) async fn allocatable_memory(&self) -> i64 {
        let nodes = Api::<k8s_openapi::api::core::v1::Node>::all(self.client.clone());
        let node = nodes.get(&self.pods_host().await.0).await.expect("the node");
        let amount = node.status.and_then(|s| s.allocatable).and_then(|a| a.get("memory").cloned()).expect("memory");
        apimachinery::quantity::Quantity::from(&amount).value()
    }

    /// Many volumes of one pod, several pods at once: none waits for another.
    pub(super) async fn many_volumes_at_once(&self) {
        let names: Vec<String> = (0..50).map(|n| format!("wrapped-{n}")).collect();
        for name in &names {
            self.create::<ConfigMap>(json!({"metadata": {"name": name}, "data": {"k": "v"}})).await;
        }
        let volumes: Vec<Value> = names.iter().map(|n| json!({"name": n, "configMap": {"name": n}})).collect();
        let mounts: Vec<Value> = names.iter().map(|n| json!({"name": n, "mountPath": format!("/v/{n}")})).collect();
        let mut container = sh("c", "cat /v/*/k | wc -c; sleep 600");
        merge(&mut container, json!({"volumeMounts": mounts}));
        let pods = ["race-0", "race-1", "race-2", "race-3", "race-4"];
        for pod in pods {
            self.run(pod, json!({"containers": [container], "volumes": volumes})).await;
        }
        for pod in pods {
            self.ready(pod).await;
            eventually("it has read all", MINUTES, || async {
                let log = self.log(pod).await;
                if log.trim() == "50" { Ok(()) } else { Err(log) }
            })
            .await;
        }
        self.remove(&pods).await;
    }

    /// Claims bound to directories of the host, one by path and one local, and a claim of the pod's own.
    pub(super) async fn claims_are_volumes(&self, cluster: &Cluster) {
        cluster.hosts[0].exec("mkdir -p /var/srv/path /var/srv/local && echo kept >/var/srv/local/kept").success();
        let node = self.pods_host().await.0;
        let affinity = json!({"required": {"nodeSelectorTerms": [{"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}]}]}});
        for (name, source) in [
            ("by-path", json!({"hostPath": {"path": "/var/srv/path", "type": "Directory"}})),
            ("local", json!({"local": {"path": "/var/srv/local"}, "nodeAffinity": affinity})),
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
            let left = host.exec("grep -c kubernetes.io~local-volume /proc/mounts; cat /var/srv/path/f /var/srv/local/deep/f /var/srv/local/kept").stdout;
            if left == "0\nwritten\ndeep\nkept\n" { Ok(()) } else { Err(left) }
        })
        .await;
    }
}
