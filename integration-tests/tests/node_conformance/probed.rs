//! Probes and hooks.
use super::*;

impl Node {
    pub(super) async fn probes_and_hooks(&self) {
        let probe_of = |kind: &str, action: Value| {
            let mut probe = json!({"initialDelaySeconds": 1, "periodSeconds": 1, "failureThreshold": 1});
            merge(&mut probe, action);
            json!({kind: probe})
        };
        // What is to live must not die of a busy machine.
        let lives = |action: Value| {
            let mut probe = json!({"timeoutSeconds": 10, "failureThreshold": 10});
            merge(&mut probe, action);
            probe_of("livenessProbe", probe)
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
        // The host's etcd, which answers questions for its health.
        let etcd = "chroot /host etcd --data-dir /run/probed --listen-client-urls http://0.0.0.0:2379 --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380";
        let healthy = json!({"grpc": {"port": 2379}, "initialDelaySeconds": 8});
        let mut grpc_lives = with("c", etcd, lives(healthy));
        grpc_lives["volumes"] = json!([{"name": "host", "hostPath": {"path": "/"}}]);
        grpc_lives["containers"][0]["volumeMounts"] = json!([{"name": "host", "mountPath": "/host"}]);
        for (name, spec) in [
            (
                "exec-fails",
                with(
                    "c",
                    "echo ok >/tmp/health; sleep 4; rm /tmp/health; sleep 600",
                    probe_of("livenessProbe", exec.clone()),
                ),
            ),
            ("exec-lives", with("c", "echo ok >/tmp/health; sleep 600", lives(exec))),
            ("http-fails", with("c", dies, probe_of("livenessProbe", http("/healthz")))),
            ("http-lives", with("c", serve, lives(http("/healthz")))),
            ("tcp-lives", with("c", dies, lives(json!({"tcpSocket": {"port": 8080}})))),
            ("grpc-fails", with("c", serve, probe_of("livenessProbe", json!({"grpc": {"port": 2333}})))),
            ("grpc-lives", grpc_lives),
            (
                "never-ready",
                with("c", "sleep 600", probe_of("readinessProbe", json!({"exec": {"command": ["false"]}}))),
            ),
            (
                "late-ready",
                with(
                    "c",
                    "sleep 600",
                    probe_of(
                        "readinessProbe",
                        json!({"initialDelaySeconds": 6, "timeoutSeconds": 10, "exec": {"command": ["true"]}}),
                    ),
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
            merge(&mut spec, json!({"terminationGracePeriodSeconds": 20}));
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
        for name in ["exec-lives", "http-lives", "tcp-lives", "grpc-lives", "never-ready", "late-ready"] {
            let is_never = name == "never-ready";
            let pod = if is_never { self.phase(name, "Running").await } else { self.ready(name).await };
            assert_eq!((restarts(&pod), apimachinery::pod::is_ready(&pod)), (0, !is_never), "{name}");
        }
        self.remove(&[
            "exec-fails",
            "exec-lives",
            "http-fails",
            "http-lives",
            "tcp-lives",
            "grpc-fails",
            "grpc-lives",
            "never-ready",
            "late-ready",
            "server",
        ])
        .await;
    }
}
