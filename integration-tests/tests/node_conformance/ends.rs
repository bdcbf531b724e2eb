//! How pods end, and when they begin again.
use super::*;

impl Node {
    /// How pods end, and when they begin again.
    pub(super) async fn ends_and_restarts(&self) {
        let with = |script: &str, more: Value| {
            let mut container = sh("c", script);
            merge(&mut container, more);
            json!([container])
        };
        let expanded = |path: &str| {
            json!({"volumes": [{"name": "v", "emptyDir": {}}],
                "containers": with("true", json!({"env": [{"name": "P", "value": path}],
                    "volumeMounts": [{"name": "v", "mountPath": "/v", "subPathExpr": "$(P)"}]}))})
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
            ("absolute", expanded("/tmp")),
            ("outside", expanded("..")),
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
        for (name, why) in [("absolute", "must not be an absolute path"), ("outside", "must not contain '..'")] {
            let waits = |pod: &Pod| {
                let waiting = statuses(pod).first().and_then(|s| s.state.clone()?.waiting);
                waiting.is_some_and(|w| w.message.unwrap_or_default().contains(why))
            };
            self.until(name, "waits", waits).await;
        }
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
            "outside",
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
}
