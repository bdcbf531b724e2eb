//! Many pods, faults around them, and what is left when they are gone.
use std::time::Instant;

use futures::TryStreamExt as _;

use super::*;

impl Node {
    /// One pod after another: how long from its creation until a watch shows it ready. Told, not judged: others use the machine.
    pub(super) async fn starts_are_quick(&self) {
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
    pub(super) async fn many_come_and_go(&self, cluster: &Cluster) {
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
        self.nothing_left(cluster).await;
        // What is as it was for longer than it takes to look for what was forgotten stays so.
        let mut before = count();
        let mut since = Instant::now();
        eventually("nothing of the pods before goes any more", MINUTES, || {
            let now = count();
            if now != before {
                (before, since) = (now, Instant::now());
            }
            let settled = since.elapsed() > Duration::from_secs(6);
            std::future::ready(if settled { Ok(()) } else { Err(before.clone()) })
        })
        .await;
        let memory = || {
            let lines = host.exec("grep -E '(VmRSS|RssAnon)' /proc/$(cat /run/pilothouse/kubelet.pid)/status").stdout;
            lines.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        println!("kubelet without pods, in this build: {}", memory());
        // For a long run: PILOTHOUSE_ROUNDS=25 is a thousand pods.
        let rounds = std::env::var("PILOTHOUSE_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
        for round in 0..rounds {
            let begun = Instant::now();
            self.many_come_and_some_faults(cluster, PODS, round).await;
            self.nothing_left(cluster).await;
            println!("round {round}: {PODS} pods came and went in {:?}; kubelet: {}", begun.elapsed(), memory());
            eventually("all is as it was", MINUTES, || async {
                let now = count();
                if now == before { Ok(()) } else { Err(format!("before {before:?}, now {now:?}")) }
            })
            .await;
        }
    }

    /// In even rounds the runtime hangs while pods come; in odd ones it dies when all are there, and the kubelet more than once.
    async fn many_come_and_some_faults(&self, cluster: &Cluster, count: usize, round: usize) {
        let host = &cluster.hosts[0];
        let hangs = round.is_multiple_of(2);
        let mut container = sh("c", "sleep 600");
        let mounts = json!([{"name": "m", "mountPath": "/m"}, {"name": "c", "mountPath": "/c", "subPath": "data-1"}]);
        merge(&mut container, json!({"volumeMounts": mounts}));
        let volumes =
            json!([{"name": "m", "emptyDir": {"medium": "Memory"}}, {"name": "c", "configMap": {"name": "cm"}}]);
        for index in 0..count {
            // A start that the kubelet's death cuts short is none, even for a pod that runs only once.
            let policy = if index.is_multiple_of(2) { "Always" } else { "Never" };
            let mut spec = json!({"restartPolicy": policy, "containers": [container], "volumes": volumes});
            if index.is_multiple_of(5) {
                // Some are in the midst of an init container, a hook or a probe when the kubelet dies.
                let run = |script: &str| json!({"exec": {"command": ["sh", "-c", script]}});
                merge(
                    &mut spec["containers"][0],
                    json!({"readinessProbe": {"periodSeconds": 1, "timeoutSeconds": 10}}),
                );
                merge(&mut spec["containers"][0]["readinessProbe"], run("sleep 0.2"));
                spec["containers"][0]["lifecycle"] =
                    json!({"postStart": run("sleep 0.5"), "preStop": run("sleep 0.5")});
                spec["initContainers"] = json!([sh("i", "sleep 0.5")]);
                spec["terminationGracePeriodSeconds"] = json!(5);
            }
            let mut pod = pod(&format!("many-{index}"), spec);
            pod.metadata.labels = Some([("app".to_owned(), "many".to_owned())].into());
            self.pods.create(&PostParams::default(), &pod).await.expect("made");
        }
        tokio::time::sleep(Duration::from_millis(500)).await;
        if hangs {
            host.exec("kill -STOP $(cat /run/pilothouse/containerd.pid); sleep 4; kill -CONT $(cat /run/pilothouse/containerd.pid)").success();
        }
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
        let mut pods = cluster.ready_pods("app=many", count, MINUTES).await;
        // One that was being made or started when the kubelet died is made anew; one that ran is left alone.
        let untouched = |before: &std::collections::BTreeMap<_, _>, pods: &[Pod]| {
            let runs = running(pods);
            let touched: Vec<_> = before.iter().filter(|(name, id)| runs.get(*name) != Some(*id)).collect();
            assert!(touched.is_empty(), "what hangs and dies around them is none of theirs: {touched:?}");
        };
        untouched(&ran, &pods);
        if !hangs {
            let ran = running(&pods);
            cluster.kill(0, "containerd");
            tokio::time::sleep(Duration::from_secs(3)).await;
            cluster.kubelet_anew(0);
            pods = cluster.ready_pods("app=many", count, MINUTES).await;
            untouched(&ran, &pods);
        }
        self.pods.delete_collection(&DeleteParams::default(), &many).await.expect("deleted");
        for pause in if hangs { [500, 0] } else { [100, 1500] } {
            if pause > 0 {
                tokio::time::sleep(Duration::from_millis(pause)).await;
                cluster.kill(0, "kubelet");
            }
        }
    }

    /// Where pods fill the kubelet's disk, the one that did is evicted, others are refused meanwhile, and then all is as before.
    pub(super) async fn a_full_disk_is_survived(&self, cluster: &Cluster) {
        let host = &cluster.hosts[0];
        let node = self.pods_host().await.0;
        // What pods before left is taken away first, and the kubelet holds still meanwhile: a directory that goes or comes
        // while it is copied fails the copy.
        self.nothing_left(cluster).await;
        host.exec(
            "set -e; kill -STOP $(cat /run/pilothouse/kubelet.pid); root=/var/lib/kubelet; cp -a $root /run/kubelet-root; \
             mount -t tmpfs -o size=64m,mode=755 tmpfs $root; mount --make-rshared $root; \
             cp -a /run/kubelet-root/. $root/; rm -r /run/kubelet-root",
        )
        .success();
        cluster.kubelet_anew(0);
        // Images that nothing uses go first: the one of the pods here must stay.
        self.run("keeps", json!({"restartPolicy": "Always", "containers": [sh("c", "sleep 6000")]})).await;
        self.ready("keeps").await;
        let mut fills = sh("c", "dd if=/dev/zero of=/v/f bs=1M; sleep 600");
        merge(&mut fills, json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}]}));
        self.run("fills", json!({"containers": [fills], "volumes": [{"name": "v", "emptyDir": {}}]})).await;
        let pressed = async |wanted: &str| {
            eventually(&format!("DiskPressure is {wanted}"), MINUTES, || async {
                let nodes = Api::<k8s_openapi::api::core::v1::Node>::all(self.client.clone());
                let status = nodes.get(&node).await.map_err(|e| e.to_string())?.status.unwrap_or_default();
                let found = status.conditions.into_iter().flatten().find(|c| c.type_ == "DiskPressure");
                if found.as_ref().is_some_and(|c| c.status == wanted) { Ok(()) } else { Err(format!("{found:?}")) }
            })
            .await;
        };
        pressed("True").await;
        self.run("refused", json!({"nodeName": node, "containers": [sh("c", "true")]})).await;
        for name in ["fills", "refused"] {
            let over = self.phase(name, "Failed").await;
            assert_eq!(over.status.and_then(|s| s.reason).as_deref(), Some("Evicted"), "{name}");
        }
        pressed("False").await;
        self.run("after", json!({"nodeName": node, "containers": [sh("c", "true")]})).await;
        self.phase("after", "Succeeded").await;
        self.remove(&["fills", "refused", "after", "keeps"]).await;
        self.nothing_left(cluster).await;
        host.exec("umount -R -l /var/lib/kubelet").success();
        cluster.kubelet_anew(0);
    }

    /// Until the pods of the test are gone, and the kubelet keeps nothing of pods that are not in the API.
    async fn nothing_left(&self, cluster: &Cluster) {
        let pods = Api::<Pod>::all(self.client.clone());
        eventually("what the kubelet kept of pods that are gone is gone", MINUTES, || async {
            let pods = pods.list(&kube::api::ListParams::default()).await.map_err(|e| e.to_string())?;
            let ours = pods.iter().filter(|pod| pod.metadata.namespace.as_deref() == Some("default")).count();
            if ours > 0 {
                return Err(format!("{ours} pods"));
            }
            let known: Vec<_> = pods.iter().filter_map(|pod| pod.metadata.uid.clone()).collect();
            let left = cluster.hosts[0].exec("ls /var/lib/kubelet/pods").stdout;
            let left: Vec<_> = left.lines().filter(|uid| !known.iter().any(|known| known == uid)).collect();
            let Some(stranger) = left.first() else { return Ok(()) };
            let said = format!(
                "grep -h {stranger} /var/log/pilothouse/kubelet.log | tail -n 12; grep {stranger} /proc/mounts"
            );
            Err(format!("{left:?}, where known are {known:?}:\n{}", cluster.hosts[0].exec(&said).stdout))
        })
        .await;
    }

    /// Without its control plane a node goes on: what runs runs, what ends begins again, even if the kubelet is new.
    pub(super) async fn nodes_stand_alone(&self, cluster: &Cluster) {
        let host = &cluster.hosts[0];
        self.run("steady", json!({"restartPolicy": "Always", "containers": [sh("c", "sleep 600")]})).await;
        self.run("crashing", json!({"restartPolicy": "Always", "containers": [sh("c", "sleep 5; exit 1")]})).await;
        let steady = self.ready("steady").await;
        self.ready("crashing").await;
        host.exec("kill -STOP $(cat /run/pilothouse/apiserver.pid)").success();
        // It ends, begins again at once, ends, and begins again after its back-off of ten seconds. A long run takes minutes.
        let away = if std::env::var_os("PILOTHOUSE_ROUNDS").is_some() { 180 } else { 25 };
        tokio::time::sleep(Duration::from_secs(away)).await;
        cluster.kill(0, "kubelet");
        tokio::time::sleep(Duration::from_secs(5)).await;
        host.exec("kill -CONT $(cat /run/pilothouse/apiserver.pid)").success();
        let again = |pod: &Pod| restarts(pod) >= 2;
        eventually("the API tells what happened meanwhile", MINUTES, || async {
            let pod = self.pods.get("crashing").await.map_err(|e| e.to_string())?;
            if again(&pod) { Ok(()) } else { Err(format!("{:?}", pod.status)) }
        })
        .await;
        let after = self.ready("steady").await;
        let id = |pod: &Pod| statuses(pod).first().and_then(|s| s.container_id.clone());
        assert_eq!((id(&after), restarts(&after)), (id(&steady), 0));
        self.remove(&["steady", "crashing"]).await;
    }
}
