//! What the kubelet does with pods on a real node: their whole life, their failures, and its own death.
use component_base::client;
use integration_tests::{Cluster, Setup, can_run_hosts, eventually};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use kube::Api;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Longer than anything takes, also where others use the machine.
const PATIENCE: Duration = Duration::from_secs(180);

#[tokio::test]
async fn pods_live_and_die_on_a_node() {
    if !can_run_hosts("pods_live_and_die_on_a_node") {
        return;
    }
    let cluster = Cluster::start("pods", Setup::Hosts(1)).await;
    a_pod_with_everything(&cluster).await;
    ends_are_told(&cluster).await;
    what_cannot_start_says_why(&cluster).await;
    a_claim_works_out_of_the_box(&cluster).await;
    a_kubelet_that_dies_touches_nothing(&cluster).await;
    manifests_are_pods(&cluster).await;
    nothing_is_left(&cluster).await;
}

/// Applies YAML on the host.
#[track_caller]
fn apply(cluster: &Cluster, yaml: &str) {
    cluster.hosts[0].exec(&format!("/usr/local/lib/pilothouse/ctl apply -f - <<'END'\n{yaml}\nEND\n")).success();
}

async fn get(cluster: &Cluster, name: &str) -> Result<Pod, String> {
    Api::<Pod>::namespaced(cluster.client(), "default").get(name).await.map_err(|e| e.to_string())
}

async fn phase(cluster: &Cluster, name: &str, wanted: &str) -> Pod {
    eventually(&format!("{name} is {wanted}"), PATIENCE, || async {
        let pod = get(cluster, name).await?;
        if apimachinery::pod::phase(&pod) == wanted { Ok(pod) } else { Err(format!("{:?}", pod.status)) }
    })
    .await
}

fn container(pod: &Pod) -> ContainerStatus {
    let statuses = pod.status.as_ref().and_then(|s| s.container_statuses.clone()).unwrap_or_default();
    // One that the kubelet has not told of yet says nothing.
    statuses.into_iter().next().unwrap_or_default()
}

/// Init containers, a sidecar, probes, hooks, a security context, names and addresses, and streams in and out.
async fn a_pod_with_everything(cluster: &Cluster) {
    apply(
        cluster,
        r#"
apiVersion: v1
kind: Pod
metadata: {name: all, labels: {app: all}}
spec:
  hostname: harbour
  subdomain: boats
  terminationGracePeriodSeconds: 5
  hostAliases: [{ip: 192.0.2.7, hostnames: [lighthouse]}]
  securityContext: {runAsUser: 1000, runAsGroup: 2000, fsGroup: 3000, seccompProfile: {type: RuntimeDefault}}
  initContainers:
  - {name: first, image: "busybox:stable", command: [sh, -c, "echo first >/shared/log"], volumeMounts: [{name: shared, mountPath: /shared}]}
  - name: side
    image: busybox:stable
    restartPolicy: Always
    command: [sh, -c, "echo side >>/shared/log; trap 'exit 0' TERM; while :; do sleep 0.1; done"]
    startupProbe: {exec: {command: [grep, -q, side, /shared/log]}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 60}
    volumeMounts: [{name: shared, mountPath: /shared}]
  containers:
  - name: web
    image: busybox:stable
    command: [sh, -c, "echo web >>/shared/log; echo served; httpd -f -p 8080 -h /shared & trap 'kill $!; exit 0' TERM; wait"]
    ports: [{name: web, containerPort: 8080}]
    resources: {requests: {cpu: 10m, memory: 16Mi}, limits: {cpu: 200m, memory: 64Mi}}
    securityContext: {readOnlyRootFilesystem: true, allowPrivilegeEscalation: false, capabilities: {drop: [ALL]}}
    readinessProbe: {httpGet: {path: /log, port: web}, periodSeconds: 1}
    livenessProbe: {tcpSocket: {port: web}, periodSeconds: 1, timeoutSeconds: 10, failureThreshold: 10}
    lifecycle: {postStart: {exec: {command: [sh, -c, "echo hook >>/shared/log"]}}, preStop: {sleep: {seconds: 1}}}
    volumeMounts: [{name: shared, mountPath: /shared}]
  volumes: [{name: shared, emptyDir: {}}]
"#,
    );
    let pod = cluster.ready_pods("app=all", 1, PATIENCE).await.remove(0);
    let status = pod.status.as_ref().expect("a status");
    assert_eq!(status.qos_class.as_deref(), Some("Burstable"));
    assert!(status.pod_ip.is_some() && status.host_ip.is_some());
    assert!(container(&pod).started == Some(true) && container(&pod).restart_count == 0);

    let run = |script: &str| cluster.ctl(&format!("exec all -c web -- sh -c '{script}'"));
    assert_eq!(run("id -u; id -g; hostname").success(), "1000\n2000\nharbour\n");
    let log = run("cat /shared/log").success();
    assert!(log.starts_with("first\nside\n"), "{log}");
    let hosts = run("cat /etc/hosts").success();
    assert!(hosts.contains("harbour.boats.default.svc.cluster.local") && hosts.contains("lighthouse"), "{hosts}");
    assert!(run("cat /etc/resolv.conf").success().contains("default.svc.cluster.local"));
    assert_ne!(run("touch /mine").code, 0, "the root file system is read-only");
    assert_eq!(run("exit 7").code, 7);
    let fed = cluster.hosts[0].exec("echo fed | /usr/local/lib/pilothouse/ctl exec -i all -c web -- cat");
    assert_eq!(fed.success(), "fed\n");
    assert_eq!(cluster.ctl("logs all -c web").success(), "served\n");
    logs_come_over_a_web_socket(cluster);
    assert!(through_a_forwarded_port(cluster).await.contains("first\nside\n"));
    cluster.ctl("delete pod all").success();
}

/// In messages of bytes, after a handshake.
fn logs_come_over_a_web_socket(cluster: &Cluster) {
    let host = &cluster.hosts[0];
    let own = "--cacert /etc/kubernetes/pki/ca.crt --cert /etc/kubernetes/pki/apiserver-kubelet-client.crt --key /etc/kubernetes/pki/apiserver-kubelet-client.key";
    let handshake = "-H 'Connection: Upgrade' -H 'Upgrade: websocket' -H 'Sec-WebSocket-Version: 13' -H 'Sec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==' -H 'Sec-WebSocket-Protocol: binary.k8s.io'";
    let url = format!("https://{}:6443/api/v1/namespaces/default/pods/all/log?container=web", host.address());
    let heard = host.exec(&format!("timeout 30 curl -siN --http1.1 {own} {handshake} '{url}' | tr -d '\\0'")).stdout;
    assert!(heard.starts_with("HTTP/1.1 101") && heard.contains("served\n"), "{heard}");
}

/// What the web server says to a client that reaches it through the API server and the kubelet.
async fn through_a_forwarded_port(cluster: &Cluster) -> String {
    let config = client::load(Some(&cluster.hosts[0].file("/etc/kubernetes/admin.conf"))).await.expect("admin.conf");
    let client = client::connect_h1(config, "integration-tests").expect("a client");
    let pods = Api::<Pod>::namespaced(client, "default");
    let mut forwarder = pods.portforward("all", &[8080]).await.expect("a forwarder");
    let mut stream = forwarder.take_stream(8080).expect("a stream");
    stream.write_all(b"GET /log HTTP/1.0\r\n\r\n").await.expect("sent");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.expect("received");
    answer
}

async fn ends_are_told(cluster: &Cluster) {
    let pod = |name: &str, script: &str, more: &str| {
        format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 1\n  {more}\n  \
             containers: [{{name: c, image: \"busybox:stable\", terminationMessagePolicy: FallbackToLogsOnError, \
             command: [sh, -c, \"{script}\"]}}]\n---\n"
        )
    };
    apply(
        cluster,
        &[
            pod("well", "echo done >/dev/termination-log", "restartPolicy: Never"),
            pod("badly", "echo why; exit 9", "restartPolicy: Never"),
            pod("again", "exit 3", "restartPolicy: Always"),
            pod("late", "sleep 100", "activeDeadlineSeconds: 2"),
        ]
        .concat(),
    );
    let ended = |pod: &Pod| container(pod).state.and_then(|s| s.terminated).expect("a terminated container");
    let well = ended(&phase(cluster, "well", "Succeeded").await);
    assert_eq!(
        (well.exit_code, well.message.as_deref(), well.reason.as_deref()),
        (0, Some("done\n"), Some("Completed"))
    );
    let badly = ended(&phase(cluster, "badly", "Failed").await);
    assert_eq!((badly.exit_code, badly.message.as_deref(), badly.reason.as_deref()), (9, Some("why\n"), Some("Error")));
    let late = phase(cluster, "late", "Failed").await;
    assert_eq!(late.status.and_then(|s| s.reason).as_deref(), Some("DeadlineExceeded"));
    let again = eventually("a crashing container waits", PATIENCE, || async {
        let again = container(&get(cluster, "again").await?);
        let waiting = again.state.clone().and_then(|s| s.waiting).and_then(|w| w.reason);
        if waiting.as_deref() == Some("CrashLoopBackOff") { Ok(again) } else { Err(format!("{again:?}")) }
    })
    .await;
    assert!(again.restart_count >= 1);
    assert_eq!(again.last_state.and_then(|s| s.terminated).map(|t| t.exit_code), Some(3));
    cluster.ctl("delete pod well badly again late").success();
}

async fn what_cannot_start_says_why(cluster: &Cluster) {
    apply(
        cluster,
        r#"
apiVersion: v1
kind: Pod
metadata: {name: never}
spec: {containers: [{name: c, image: "nowhere.invalid/nothing:1", imagePullPolicy: Never}]}
---
apiVersion: v1
kind: Pod
metadata: {name: rooted}
spec: {securityContext: {runAsNonRoot: true}, containers: [{name: c, image: "busybox:stable", command: [sleep, "9"]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: unset}
spec: {containers: [{name: c, image: "busybox:stable", env: [{name: A, valueFrom: {configMapKeyRef: {name: none, key: a}}}]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: missing}
spec: {containers: [{name: c, image: "busybox:stable", command: [/no/such/program]}]}
---
apiVersion: v1
kind: Pod
metadata: {name: tuned}
spec:
  securityContext: {sysctls: [{name: kernel.msgmax, value: "9999"}]}
  containers: [{name: c, image: "busybox:stable", command: [sleep, "9"]}]
---
apiVersion: v1
kind: Pod
metadata: {name: elsewhere}
spec: {nodeName: host-1, nodeSelector: {zone: nowhere}, containers: [{name: c, image: "busybox:stable"}]}
"#,
    );
    for (name, reasons) in [
        ("never", ["ErrImageNeverPull", "ErrImageNeverPull"]),
        ("rooted", ["CreateContainerConfigError", "CreateContainerConfigError"]),
        ("unset", ["CreateContainerConfigError", "CreateContainerConfigError"]),
        ("missing", ["RunContainerError", "CrashLoopBackOff"]),
    ] {
        eventually(&format!("{name} waits for {reasons:?}"), PATIENCE, || async {
            let status = container(&get(cluster, name).await?);
            let reason = status.state.clone().and_then(|s| s.waiting).and_then(|w| w.reason).unwrap_or_default();
            if reasons.contains(&reason.as_str()) { Ok(()) } else { Err(format!("{status:?}")) }
        })
        .await;
    }
    for (name, reason) in [("tuned", "SysctlForbidden"), ("elsewhere", "NodeAffinity")] {
        let rejected = phase(cluster, name, "Failed").await;
        assert_eq!(rejected.status.and_then(|s| s.reason).as_deref(), Some(reason));
    }
    cluster.ctl("delete pod never rooted unset missing tuned elsewhere").success();
}

/// A claim that names no class gets a directory, whoever the pod's user is; the data outlive pods, not the claim.
async fn a_claim_works_out_of_the_box(cluster: &Cluster) {
    let pod = |name: &str, script: &str| {
        format!(
            r#"
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  restartPolicy: Never
  terminationGracePeriodSeconds: 1
  securityContext: {{runAsUser: 1000}}
  volumes: [{{name: v, persistentVolumeClaim: {{claimName: data}}}}]
  containers: [{{name: c, image: "busybox:stable", command: [sh, -ec, "{script}"], volumeMounts: [{{name: v, mountPath: /v}}]}}]
"#
        )
    };
    let claim = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {name: data}\n\
                 spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Mi}}}";
    apply(cluster, &format!("{claim}\n---{}", pod("writes", "echo kept >/v/f")));
    let host = &cluster.hosts[0];
    eventually("it has written", PATIENCE, || async {
        let pod = get(cluster, "writes").await?;
        if apimachinery::pod::phase(&pod) == "Succeeded" {
            return Ok(());
        }
        let told =
            host.exec("/usr/local/lib/pilothouse/ctl describe pvc data; /usr/local/lib/pilothouse/ctl get pods -A");
        Err(format!("{:?} {}", pod.status, told.stdout))
    })
    .await;
    apply(cluster, &pod("reads", "grep -x kept /v/f"));
    phase(cluster, "reads", "Succeeded").await;
    cluster.ctl("delete pod writes reads");
    cluster.ctl("delete pvc data");
    eventually("volume and data are gone", PATIENCE, || async {
        let left = host.exec("/usr/local/lib/pilothouse/ctl get pv -o name; ls /var/lib/pilothouse/volumes").stdout;
        if left.trim().is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
}

/// The same containers go on, and the pod is ready all the while.
async fn a_kubelet_that_dies_touches_nothing(cluster: &Cluster) {
    apply(
        cluster,
        r#"
apiVersion: v1
kind: Pod
metadata: {name: steady, labels: {app: steady}}
spec:
  terminationGracePeriodSeconds: 1
  containers:
  - {name: c, image: "busybox:stable", command: [sleep, "1000"], readinessProbe: {exec: {command: ["true"]}, periodSeconds: 1, timeoutSeconds: 10}}
"#,
    );
    let before = cluster.ready_pods("app=steady", 1, PATIENCE).await.remove(0);
    let since = |pod: &Pod| {
        apimachinery::pod::condition(pod, "Ready").and_then(|c| c.last_transition_time.clone()).expect("a ready pod")
    };
    cluster.kubelet_anew(0);
    tokio::time::sleep(Duration::from_secs(5)).await;
    let after = cluster.ready_pods("app=steady", 1, PATIENCE).await.remove(0);
    assert_eq!(container(&after).container_id, container(&before).container_id);
    assert_eq!((container(&after).restart_count, since(&after)), (0, since(&before)));
    cluster.ctl("delete pod steady").success();
}

/// A manifest on disk is a pod with a mirror in the API; without the manifest, both are gone.
async fn manifests_are_pods(cluster: &Cluster) {
    let host = &cluster.hosts[0];
    let name = format!("fixed-{}", host.name());
    host.exec(
        "mkdir -p /etc/kubernetes/manifests; cat >/etc/kubernetes/manifests/fixed.yaml <<'END'\n\
         apiVersion: v1\nkind: Pod\nmetadata: {name: fixed}\nspec:\n  terminationGracePeriodSeconds: 1\n  \
         containers: [{name: c, image: \"busybox:stable\", command: [sleep, \"1000\"]}]\nEND\n",
    )
    .success();
    phase(cluster, &name, "Running").await;
    cluster.ctl(&format!("delete pod {name}")).success();
    let mirror = phase(cluster, &name, "Running").await;
    assert_eq!(container(&mirror).restart_count, 0, "only its picture was deleted");
    host.exec("rm /etc/kubernetes/manifests/fixed.yaml").success();
    eventually("the mirror is gone", PATIENCE, || async {
        match get(cluster, &name).await {
            Ok(pod) => Err(format!("{:?}", pod.status)),
            Err(_) => Ok(()),
        }
    })
    .await;
}

/// No directories, logs or cgroups of the pods that were.
async fn nothing_is_left(cluster: &Cluster) {
    let host = &cluster.hosts[0];
    eventually("nothing is left of the pods", PATIENCE, || async {
        let cgroups = format!("find /sys/fs/cgroup -path '*{}*' -type d -name 'pod*-*'", host.cgroup());
        let all = host.exec(&format!("ls /var/lib/kubelet/pods /var/log/pods | grep -v : ; {cgroups}")).stdout;
        // But the cluster's own: its DNS.
        let own = cluster.ctl("get pods -n kube-system -o jsonpath={.items[*].metadata.uid}").success();
        let is_own = |line: &&str| own.split_whitespace().any(|uid| line.contains(uid));
        let left: String = all.lines().filter(|line| !line.trim().is_empty() && !is_own(line)).collect();
        if left.is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
}
