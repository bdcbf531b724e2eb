//! What changes under a running pod.
use std::collections::BTreeMap;

use super::*;

impl Node {
    /// What changes under a running pod: its volumes, labels, generation, deadline, and containers that join it.
    pub(super) async fn changes_are_seen(&self) {
        self.create::<ConfigMap>(json!({"metadata": {"name": "live"}, "data": {"k": "one"}})).await;
        let volumes = json!([{"name": "v", "projected": {"sources": [{"configMap": {"name": "live"}}, {"secret": {"name": "late", "optional": true}},
            {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}, {"path": "notes", "fieldRef": {"fieldPath": "metadata.annotations['note']"}}]}}]}},
            {"name": "g", "configMap": {"name": "going", "optional": true}}, {"name": "h", "secret": {"secretName": "going", "optional": true}},
            {"name": "p", "projected": {"sources": [{"configMap": {"name": "going", "optional": true}}, {"secret": {"name": "going", "optional": true, "items": [{"key": "k", "path": "deep/k"}]}}]}}]);
        self.create::<ConfigMap>(json!({"metadata": {"name": "going"}, "data": {"k": "leaving"}})).await;
        self.create::<Secret>(json!({"metadata": {"name": "going"}, "stringData": {"k": "leaving"}})).await;
        let watcher = "while :; do cat /v/k /v/s /v/labels /v/notes /g/k /h/k /p/k /p/deep/k 2>/dev/null | tr '\\n' ' '; echo; sleep 1; done";
        let mut container = sh("c", watcher);
        merge(
            &mut container,
            json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}, {"name": "g", "mountPath": "/g"}, {"name": "h", "mountPath": "/h"}, {"name": "p", "mountPath": "/p"}]}),
        );
        self.run("live", json!({"restartPolicy": "Always", "containers": [container], "volumes": volumes})).await;
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
            if log.matches("leaving").count() == 4 { Ok(()) } else { Err(log) }
        })
        .await;
        let gone = &DeleteParams::default();
        Api::<ConfigMap>::namespaced(self.client.clone(), "default").delete("going", gone).await.expect("deleted");
        Api::<Secret>::namespaced(self.client.clone(), "default").delete("going", gone).await.expect("deleted");
        assert_eq!((live.metadata.generation, live.status.and_then(|s| s.observed_generation)), (Some(1), Some(1)));
        Api::<ConfigMap>::namespaced(self.client.clone(), "default")
            .patch("live", &PatchParams::default(), &Patch::Merge(json!({"data": {"k": "two"}})))
            .await
            .expect("patched");
        self.create::<Secret>(json!({"metadata": {"name": "late"}, "stringData": {"s": "came"}})).await;
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
            if log.contains("twocameapp=\"changed\"") && log.contains("noted") && !log.contains("leaving") {
                Ok(())
            } else {
                Err(log)
            }
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
        self.remove(&["counted"]).await;
        let ending = self.pods.get("counted").await.expect("a pod that ends");
        assert_eq!(ending.metadata.generation, Some(501), "its end is a change, too");
    }

    /// CPU and memory of running containers follow their spec, in the kernel and in the status.
    pub(super) async fn resources_change_in_place(&self, cluster: &Cluster) {
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
}
