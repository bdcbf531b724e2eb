//! What the kubelet itself serves, as the API server's clients see it.
use super::*;

impl Node {
    /// The body of an answer of this node's kubelet, through the API server.
    async fn ask(&self, method: &str, path: &str) -> Result<String, String> {
        let url = format!("/api/v1/nodes/{}/proxy/{path}", self.pods_host().await.0);
        let request = http::Request::builder().method(method).uri(url).body(Vec::new()).map_err(|e| e.to_string())?;
        self.client.request_text(request).await.map_err(|e| e.to_string())
    }

    pub(super) async fn what_is_served(&self) {
        let script =
            "echo said; dd if=/dev/zero of=/v/block bs=1024 count=1024; while :; do md5sum /v/block; sleep 0.1; done";
        let mut container = sh("c", script);
        merge(
            &mut container,
            json!({"volumeMounts": [{"name": "v", "mountPath": "/v"}], "resources": {"limits": {"cpu": "300m", "memory": "64Mi"}},
                "readinessProbe": {"exec": {"command": ["true"]}, "periodSeconds": 1, "timeoutSeconds": 10}}),
        );
        self.run("served", json!({"containers": [container], "volumes": [{"name": "v", "emptyDir": {}}]})).await;
        self.ready("served").await;
        // Rates need two looks; the runtime looks every ten seconds.
        let summary = eventually("statistics of the pod and the node", MINUTES, || async {
            let summary: Value =
                serde_json::from_str(&self.ask("GET", "stats/summary").await?).map_err(|e| e.to_string())?;
            let pods = summary["pods"].as_array().cloned().unwrap_or_default();
            let pod = pods.into_iter().find(|p| p["podRef"]["name"] == "served").ok_or("no such pod")?;
            let number = |of: &Value, path: &str| of.pointer(path).and_then(Value::as_u64).unwrap_or(0);
            for (of, path, least, most) in [
                (&summary, "/node/cpu/usageNanoCores", 1, 1 << 40),
                (&summary, "/node/memory/workingSetBytes", 1 << 20, 1 << 44),
                (&summary, "/node/memory/availableBytes", 1 << 20, 1 << 44),
                (&summary, "/node/fs/capacityBytes", 1 << 20, 1 << 50),
                (&summary, "/node/fs/inodesFree", 1, 1 << 50),
                (&summary, "/node/network/rxBytes", 1, 1 << 50),
                (&summary, "/node/runtime/imageFs/usedBytes", 1, 1 << 50),
                (&summary, "/node/rlimit/maxpid", 100, 1 << 30),
                // It uses some of what it may: give or take what a busy machine makes of that.
                (&pod, "/cpu/usageNanoCores", 1_000_000, 500_000_000),
                (&pod, "/cpu/usageCoreNanoSeconds", 1_000_000, 1 << 50),
                (&pod, "/memory/workingSetBytes", 4096, 64 << 20),
                (&pod, "/network/rxBytes", 1, 1 << 40),
                (&pod, "/process_stats/process_count", 1, 50),
                (&pod, "/ephemeral-storage/usedBytes", 1 << 20, 64 << 20),
                (&pod, "/containers/0/cpu/usageNanoCores", 1_000_000, 500_000_000),
                (&pod, "/containers/0/memory/workingSetBytes", 4096, 64 << 20),
                (&pod, "/containers/0/logs/usedBytes", 1, 1 << 20),
                (&pod, "/containers/0/rootfs/capacityBytes", 1 << 20, 1 << 50),
                (&pod, "/volume/0/usedBytes", 1 << 20, 16 << 20),
            ] {
                let found = number(of, path);
                if !(least..=most).contains(&found) {
                    return Err(format!("{path} is {found}, not {least} to {most}: {of}"));
                }
            }
            Ok(summary)
        })
        .await;
        assert_eq!(summary["node"]["nodeName"], json!(self.pods_host().await.0));

        for (path, parts) in [
            ("metrics", &["kubelet_running_pods", "process_resident_memory_bytes"][..]),
            (
                "metrics/resource",
                &["container_cpu_usage_seconds_total{", "node_memory_working_set_bytes", "resource_scrape_error 0"],
            ),
            (
                "metrics/cadvisor",
                &[
                    "container_memory_working_set_bytes{container=\"c\"",
                    "container_network_receive_bytes_total{",
                    "pod=\"served\"",
                ],
            ),
            ("metrics/probes", &["prober_probe_total{container=\"c\",namespace=\"default\",pod=\"served\""]),
            ("configz", &["\"syncFrequency\":\"1m0s\"", "\"cgroupDriver\":\"cgroupfs\"", "\"eventBurst\":100"]),
            ("healthz", &["ok"]),
            ("pods", &["\"name\":\"served\"", "\"phase\":\"Running\""]),
            ("runningpods/", &["\"name\":\"served\""]),
            ("logs/", &["<a href=\"pods/\">pods/</a>"]),
            ("containerLogs/default/served/c", &["said"]),
        ] {
            let body = self.ask("GET", path).await.unwrap_or_else(|e| panic!("{path}: {e}"));
            assert!(parts.iter().all(|part| body.contains(part)), "{path} lacks one of {parts:?}: {body}");
        }
        let logs = self.ask("GET", "logs/pods/").await.expect("a directory");
        assert!(logs.contains("default_served_"), "{logs}");
        assert_eq!(self.ask("POST", "run/default/served/c?cmd=echo%20ran").await.as_deref(), Ok("ran\n"));
        // This runtime cannot: it must say so, and not hang.
        let refused = self.ask("POST", "checkpoint/default/served/c").await.expect_err("no checkpoints here");
        assert!(refused.contains("checkpoint"), "{refused}");
        for path in ["logs/../etc/passwd", "logs/none", "containerLogs/default/none/c", "nowhere"] {
            self.ask("GET", path).await.expect_err(path);
        }
        self.remove(&["served"]).await;
    }
}
