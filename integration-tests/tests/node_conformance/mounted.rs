//! Volumes of all kinds as pods see them.
use super::*;

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
        let list = "cd /v; for f in $(find . -follow -type f -not -path '*/..*' | sort); do echo $f $(stat -L -c %a $f) $(cat $f); done";
        let items = json!([{"key": "data-1", "path": "path/to/data", "mode": 256}]);
        let downward = |items: Value| volume(json!({"downwardAPI": {"items": items}}));
        let file = |path: &str, field: &str| json!({"path": path, "fieldRef": {"fieldPath": field}});
        let amount = |name: &str| json!({"path": "r", "resourceFieldRef": {"containerName": "c", "resource": name, "divisor": "1m"}});
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get) * 1000;
        let resources = json!({"resources": {"requests": {"cpu": "250m", "memory": "32Mi"}, "limits": {"cpu": "500m", "memory": "64Mi"}}});
        let bytes = |name: &str| json!({"path": "r", "resourceFieldRef": {"containerName": "c", "resource": name}});
        let memory = self.allocatable_memory().await;
        let modes = "for m in 644 666 777; do echo x >/v/$m && chmod $m /v/$m && stat -c '%a %u' /v/$m; done";
        let twice = json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}, {"name": "w", "mountPath": "/w"}, {"name": "x", "mountPath": "/x"}]});
        let both = json!({"volumes": [{"name": "v", "secret": {"secretName": "secret"}}, {"name": "w", "configMap": {"name": "cm"}}, {"name": "x", "secret": {"secretName": "secret", "items": [{"key": "data-1", "path": "mapped", "mode": 256}]}}]});
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
            case("Downward API volume cpu limit", list, measured(resources.clone()), downward(json!([amount("limits.cpu")])), &["./r 644 500"]),
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
            case("Downward API volume memory request", list, measured(resources.clone()), downward(json!([bytes("requests.memory")])), &["./r 644 33554432"]),
            case("Downward API volume memory limit", list, measured(resources), downward(json!([bytes("limits.memory")])), &["./r 644 67108864"]),
            case("Downward API volume default memory limit", list, mount(json!({})), downward(json!([bytes("limits.memory")])), &[&format!("./r 644 {memory}")]),
            case("Downward API volume with defaultMode", list, mount(json!({})), volume(json!({"downwardAPI": {"defaultMode": 256, "items": [file("name", "metadata.name")]}})), &["./name 400 mounted-21"]),
            case("Projected with defaultMode, as non-root with fsGroup", list, mount(json!({})), as_user(json!({"projected": {"defaultMode": 256, "sources": [{"secret": {"name": "secret"}}]}}), 1001), &["./data-1 440 value-1"]),
            case("Secrets and ConfigMaps in multiple volumes", "cat /v/data-1; echo; cat /w/data-1; echo; stat -L -c %a /v/data-1 /w/data-1 /x/mapped", twice, both, &["value-1", "644", "400"]),
            case("Subpath with secret", "cat /v", mount(json!({"subPath": "data-1"})), volume(json!({"secret": {"secretName": "secret"}})), &["value-1"]),
            case("Subpath with downward", "cat /v/name", mount(json!({"subPath": "deep"})), downward(json!([file("deep/name", "metadata.name")])), &["mounted-25"]),
            case("EmptyDir root modes", modes, mount(json!({})), volume(json!({"emptyDir": {}})), &["644 0", "666 0", "777 0"]),
            case("EmptyDir root tmpfs modes", modes, mount(json!({})), volume(json!({"emptyDir": {"medium": "Memory"}})), &["644 0", "666 0", "777 0"]),
            case("EmptyDir non-root modes", modes, mount(json!({})), as_user(json!({"emptyDir": {}}), 77), &["644 1000", "666 1000", "777 1000"]),
            case("EmptyDir non-root tmpfs modes", modes, mount(json!({})), as_user(json!({"emptyDir": {"medium": "Memory"}}), 77), &["644 1000", "666 1000", "777 1000"]),
        ]).await;
    }

    /// The node's memory for pods, in bytes.
    async fn allocatable_memory(&self) -> i64 {
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
}
