//! What changes under a running pod.
use std::collections::BTreeMap;

use super::*;

impl Node {
    /// What changes under a running pod: its volumes, labels, generation, deadline, and containers that join it.
    pub(super) async fn changes_are_seen(&self) {
        self.create::<ConfigMap>(json!({"metadata": {"name": "live"}, "data": {"k": "one"}})).await;
        self.create::<Secret>(json!({"metadata": {"name": "live"}, "stringData": {"s": "one"}})).await;
        self.create::<ConfigMap>(json!({"metadata": {"name": "going"}, "data": {"gk": "leaving"}})).await;
        self.create::<Secret>(json!({"metadata": {"name": "going"}, "stringData": {"gs": "leaving"}})).await;
        // All of them in volumes of their own, and all in one that is projected.
        let told = json!({"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
            {"path": "notes", "fieldRef": {"fieldPath": "metadata.annotations['note']"}}]});
        let (mut volumes, mut sources) = (Vec::new(), Vec::new());
        for name in ["live", "late", "going"] {
            volumes.push(json!({"configMap": {"name": name, "optional": true}}));
            volumes.push(json!({"secret": {"secretName": name, "optional": true}}));
            sources.push(json!({"configMap": {"name": name, "optional": true}}));
            sources.push(json!({"secret": {"name": name, "optional": true}}));
        }
        volumes.push(json!({"downwardAPI": told}));
        sources.push(json!({"downwardAPI": told}));
        volumes.push(json!({"projected": {"sources": sources}}));
        let (mut mounts, mut named) = (Vec::new(), Vec::new());
        for (index, mut volume) in volumes.into_iter().enumerate() {
            merge(&mut volume, json!({"name": format!("v{index}")}));
            mounts.push(json!({"name": format!("v{index}"), "mountPath": format!("/v/{index}")}));
            named.push(volume);
        }
        let watcher = "cd /v; while :; do for f in */[a-z]*; do echo -n \"$f=$(cat $f) \"; done; echo; sleep 1; done";
        let mut container = sh("c", watcher);
        merge(&mut container, json!({"volumeMounts": mounts}));
        self.run("live", json!({"restartPolicy": "Always", "containers": [container], "volumes": named})).await;
        let broken = json!([{"name": "c", "image": "busybox:stable", "command": ["sleep", "600"],
            "env": [{"name": "P", "valueFrom": {"fieldRef": {"fieldPath": "metadata.annotations['sub']"}}}],
            "volumeMounts": [{"name": "v", "mountPath": "/v", "subPathExpr": "$(P)"}]}]);
        self.run("mended", json!({"containers": broken, "volumes": [{"name": "v", "emptyDir": {}}]})).await;
        self.run("short", json!({"containers": [sh("c", "sleep 600")]})).await;
        let live = self.ready("live").await;
        let last_line = async || {
            let last = LogParams { container: Some("c".into()), tail_lines: Some(1), ..Default::default() };
            self.pods.logs("live", &last).await.map_err(|e| e.to_string())
        };
        eventually("what will go is there", MINUTES, || async {
            let log = last_line().await?;
            if log.matches("=leaving").count() == 4 { Ok(()) } else { Err(log) }
        })
        .await;
        let gone = &DeleteParams::default();
        Api::<ConfigMap>::namespaced(self.client.clone(), "default").delete("going", gone).await.expect("deleted");
        Api::<Secret>::namespaced(self.client.clone(), "default").delete("going", gone).await.expect("deleted");
        assert_eq!((live.metadata.generation, live.status.and_then(|s| s.observed_generation)), (Some(1), Some(1)));
        let params = PatchParams::default();
        let maps = Api::<ConfigMap>::namespaced(self.client.clone(), "default");
        maps.patch("live", &params, &Patch::Merge(json!({"data": {"k": "two"}}))).await.expect("patched");
        let secrets = Api::<Secret>::namespaced(self.client.clone(), "default");
        secrets.patch("live", &params, &Patch::Merge(json!({"stringData": {"s": "two"}}))).await.expect("patched");
        self.create::<ConfigMap>(json!({"metadata": {"name": "late"}, "data": {"lk": "came"}})).await;
        self.create::<Secret>(json!({"metadata": {"name": "late"}, "stringData": {"ls": "came"}})).await;
        self.patch("live", json!({"metadata": {"labels": {"app": "changed"}, "annotations": {"note": "noted"}}})).await;
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
            let log = last_line().await?;
            let told = ["k=two", "s=two", "lk=came", "ls=came", "labels=app=\"changed\"", "notes=noted"];
            let twice = |what: &str| log.matches(&format!("/{what} ")).count() == 2;
            if told.into_iter().all(twice) && !log.contains("leaving") { Ok(()) } else { Err(log) }
        })
        .await;
        self.until("mended", "runs at last", |pod| apimachinery::pod::phase(pod) == "Running").await;
        self.remove(&["live", "mended", "short"]).await;
    }

    /// A rule restarts all containers of a pod, init containers too, in its sandbox.
    pub(super) async fn all_begin_anew(&self) {
        let mount = json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]});
        let with = |name: &str, script: &str, more: Value| {
            let mut container = sh(name, script);
            merge(&mut container, mount.clone());
            merge(&mut container, more);
            container
        };
        let rules = json!({"restartPolicy": "Never", "restartPolicyRules":
            [{"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [42]}}]});
        self.run("anew", json!({"volumes": [{"name": "v", "emptyDir": {}}],
            "initContainers": [with("i", "echo begun >>/v/log", json!({}))],
            "containers": [with("a", "if [ -e /v/again ]; then sleep 600; fi; touch /v/again; sleep 1; exit 42", rules), with("b", "sleep 600", json!({}))]}))
            .await;
        let anew = |pod: &Pod| {
            let all = statuses(pod);
            all.len() == 2 && all.iter().all(|s| s.restart_count == 1 && s.ready)
        };
        let pod = self.until("anew", "all containers run for the second time", anew).await;
        let inits = pod.status.as_ref().and_then(|s| s.init_container_statuses.clone()).unwrap_or_default();
        assert_eq!(inits.first().map(|s| s.restart_count), Some(1), "{inits:?}");
        let condition = apimachinery::pod::condition(&pod, "AllContainersRestarting").expect("a condition");
        assert_eq!(condition.status, "False");
        self.remove(&["anew"]).await;
    }

    /// Each change of a spec counts, and the kubelet tells how far it is.
    pub(super) async fn generations_are_counted(&self) {
        self.run("counted", json!({"activeDeadlineSeconds": 9000, "terminationGracePeriodSeconds": 5, "containers": [sh("c", "sleep 600")]})).await;
        self.ready("counted").await;
        for turn in 1..500 {
            self.patch("counted", json!({"spec": {"activeDeadlineSeconds": 9000 - turn}})).await;
        }
        let told = |pod: &Pod| (pod.metadata.generation, pod.status.as_ref().and_then(|s| s.observed_generation));
        self.until("counted", "all changes are seen", |pod| told(pod) == (Some(500), Some(500))).await;
        let ending = self.pods.delete("counted", &DeleteParams::default()).await.expect("deleted");
        let generation = ending.left().and_then(|pod| pod.metadata.generation);
        assert_eq!(generation, Some(501), "its end is a change, too");
    }

    /// Whoever may write a pod's status and metadata finds it as written.
    pub(super) async fn others_write_to_a_pod(&self) {
        self.run("written", json!({"restartPolicy": "Always", "containers": [sh("c", "sleep 600")]})).await;
        self.ready("written").await;
        let note = json!({"status": {"message": "patched by a test", "reason": "Test"}});
        let params = PatchParams::default();
        let patched = self.pods.patch_status("written", &params, &Patch::Strategic(note)).await.expect("a patch");
        let status = patched.status.expect("a status");
        assert_eq!((status.message.as_deref(), status.reason.as_deref()), (Some("patched by a test"), Some("Test")));
        self.patch("written", json!({"metadata": {"labels": {"more": "1"}}, "spec": {"containers": [{"name": "c", "image": "busybox:stable"}]}})).await;
        let gate = json!([{"type": "Tested", "status": "True"}, {"type": "Ready", "status": "False"}]);
        let ready_again = |pod: &Pod| {
            let own = apimachinery::pod::condition(pod, "Tested").is_some_and(|c| c.status == "True");
            own && apimachinery::pod::is_ready(pod) && pod.status.as_ref().is_some_and(|s| s.reason.is_none())
        };
        let patch = Patch::Strategic(json!({"status": {"conditions": gate}}));
        self.pods.patch_status("written", &params, &patch).await.expect("a patch");
        // What is the kubelet's to say is said again; what is others' stays.
        let pod = self.until("written", "told anew", ready_again).await;
        assert_eq!(
            (
                pod.metadata.labels.unwrap_or_default().get("more").map(String::as_str),
                restarts(&self.pods.get("written").await.expect("a pod"))
            ),
            (Some("1"), 0)
        );
        let ours = kube::api::ListParams::default().labels("more=1");
        self.pods.delete_collection(&DeleteParams::default(), &ours).await.expect("deleted");
        eventually("it is gone", MINUTES, || async {
            let left = self.pods.list(&ours).await.map_err(|e| e.to_string())?.items;
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
    }

    /// CPU and memory of running containers follow their spec, in the kernel and in the status.
    pub(super) async fn resources_change_in_place(&self, cluster: &Cluster) {
        let amounts = |cpu: &str, memory: &str| {
            let both = json!({"cpu": cpu, "memory": memory});
            json!({"requests": both, "limits": both})
        };
        let lists = |all: &[Value]| -> Vec<Value> {
            let container = |(index, resources): (usize, &Value)| {
                let mut container = sh(&format!("c{index}"), "sleep 600");
                merge(&mut container, json!({"resources": resources}));
                container
            };
            all.iter().enumerate().map(container).collect()
        };
        let guaranteed = |all: [(&str, &str); 3]| all.map(|(cpu, memory)| amounts(cpu, memory)).to_vec();
        let requests = |cpu: &str| json!({"requests": {"cpu": cpu}});
        let both = |cpu: &str, limit: &str| json!({"requests": {"cpu": cpu, "memory": "20Mi"}, "limits": {"cpu": limit, "memory": "40Mi"}});
        // Of each pod what its containers have at first, and what they get one after another.
        let pods = [
            (
                "guaranteed",
                guaranteed([("20m", "20Mi"), ("30m", "30Mi"), ("40m", "40Mi")]),
                vec![
                    guaranteed([("30m", "40Mi"), ("40m", "50Mi"), ("30m", "30Mi")]),
                    guaranteed([("40m", "45Mi"), ("20m", "25Mi"), ("20m", "25Mi")]),
                    guaranteed([("45m", "45Mi"), ("15m", "30Mi"), ("30m", "30Mi")]),
                ],
            ),
            (
                "burstable",
                vec![
                    json!({}),
                    requests("20m"),
                    both("20m", "50m"),
                    both("30m", "60m"),
                    requests("10m"),
                    both("10m", "20m"),
                ],
                vec![vec![
                    both("10m", "20m"),
                    both("30m", "40m"),
                    both("10m", "50m"),
                    both("40m", "70m"),
                    requests("20m"),
                    both("10m", "30m"),
                ]],
            ),
            ("equivalent", vec![requests("2m")], vec![vec![requests("1m")], vec![requests("0.002")]]),
        ];
        for (name, first, turns) in pods {
            self.run(name, json!({"restartPolicy": "Always", "containers": lists(&first)})).await;
            self.ready(name).await;
            for (turn, wanted) in turns.into_iter().enumerate() {
                self.resize(name, turn, lists(&wanted)).await;
                let parsed = |of: &Value| -> BTreeMap<String, i64> {
                    let lists = of.as_object().into_iter().flatten();
                    let amounts = lists.filter_map(|(list, all)| {
                        Some(all.as_object()?.iter().map(move |(n, v)| (format!("{list}.{n}"), v)))
                    });
                    let number = |v: &Value| {
                        apimachinery::quantity::Quantity::parse(v.as_str().unwrap_or_default())
                            .map_or(-1, |q| q.milli_value())
                    };
                    amounts.flatten().map(|(name, value)| (name, number(value))).collect()
                };
                let told = |pod: &Pod| {
                    let of = |name: &str| {
                        statuses(pod)
                            .into_iter()
                            .find(|s| s.name == name)
                            .and_then(|s| serde_json::to_value(s.resources).ok())
                    };
                    wanted
                        .iter()
                        .enumerate()
                        .all(|(i, want)| of(&format!("c{i}")).is_some_and(|has| parsed(&has) == parsed(want)))
                        && apimachinery::pod::condition(pod, "PodResizeInProgress").is_none()
                };
                let pod = self.until(name, "told", told).await;
                assert_eq!(restarts(&pod), 0);
                for (index, want) in wanted.iter().enumerate() {
                    let script = "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/cpu.max /sys/fs/cgroup/cpu/cpu.cfs_quota_us 2>/dev/null";
                    let seen = cluster.ctl(&format!("exec {name} -c c{index} -- sh -c '{script}'")).stdout;
                    let limits = parsed(want);
                    // In thousandths: bytes, and microseconds in a tenth of a second.
                    let bytes = limits.get("limits.memory").map(|milli| milli / 1000);
                    let quota = limits.get("limits.cpu").map(|milli| milli * 100);
                    assert!(
                        bytes.into_iter().chain(quota).all(|n| seen.contains(&n.to_string())),
                        "{name} c{index}: {seen}"
                    );
                }
            }
        }
        let patch =
            Patch::Strategic(json!({"spec": {"containers": [{"name": "c1", "resources": amounts("900", "40Mi")}]}}));
        self.pods.patch_subresource("resize", "guaranteed", &PatchParams::default(), &patch).await.expect("a resize");
        let refused = |pod: &Pod| {
            apimachinery::pod::condition(pod, "PodResizePending")
                .is_some_and(|c| c.reason.as_deref() == Some("Infeasible"))
        };
        self.until("guaranteed", "infeasible", refused).await;
        self.remove(&["guaranteed", "burstable", "equivalent"]).await;
    }

    /// By patches, and each second time by a whole pod.
    async fn resize(&self, name: &str, turn: usize, containers: Vec<Value>) {
        if turn.is_multiple_of(2) {
            let patch = Patch::Strategic(json!({"spec": {"containers": containers}}));
            self.pods.patch_subresource("resize", name, &PatchParams::default(), &patch).await.expect("a resize");
            return;
        }
        eventually("the pod as it is now is replaced", MINUTES, || async {
            let mut pod = self.pods.get(name).await.map_err(|e| e.to_string())?;
            let spec = pod.spec.as_mut().ok_or("a spec")?;
            for (container, wanted) in spec.containers.iter_mut().zip(&containers) {
                container.resources = serde_json::from_value(wanted["resources"].clone()).map_err(|e| e.to_string())?;
            }
            let replaced = self.pods.replace_subresource("resize", name, &PostParams::default(), &pod).await;
            replaced.map(drop).map_err(|e| e.to_string())
        })
        .await;
    }
}
