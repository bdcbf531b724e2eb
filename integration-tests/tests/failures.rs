//! What happens when things die: each component, and a whole host.
use integration_tests::{Cluster, Setup, can_run_hosts, eventually, requests};
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::{
    Api,
    api::{ListParams, PostParams},
};
use serde_json::json;
use std::{net::IpAddr, time::Duration};

/// Longer than anything takes, also where others use the machine.
const PATIENCE: Duration = Duration::from_secs(180);

#[tokio::test]
async fn components_and_hosts_may_die() {
    if !can_run_hosts("components_and_hosts_may_die") {
        return;
    }
    let mut cluster = Cluster::start("failures", Setup::Hosts(2)).await;
    cluster.ctl("run httpd-app --image=httpd-app:1.0 --replicas=2 --port=80").success();
    cluster.ctl("expose deployment httpd-app --port=80").success();
    cluster.ready_pods("app=httpd-app", 2, PATIENCE).await;
    each_component_is_killed(&cluster).await;
    a_host_dies_and_comes_back(&mut cluster).await;
}

/// Each in turn, while the application answers; after each a new Deployment runs, and what was written is there.
async fn each_component_is_killed(cluster: &Cluster) {
    let ip = cluster.ctl("get service httpd-app -o jsonpath={.spec.clusterIP}").success();
    let ip: IpAddr = ip.trim().parse().expect("a cluster IP");
    let load = requests::Load::start(&cluster.hosts[1], ip, 80);
    let written = Api::<ConfigMap>::namespaced(cluster.client(), "default");
    let kills = [
        (0, "etcd"),
        (0, "apiserver"),
        (0, "controller-manager"),
        (0, "scheduler"),
        (0, "kubelet"),
        (1, "kubelet"),
        (0, "kube-proxy"),
        (1, "kube-proxy"),
        (1, "pod-network"),
        (0, "dns"),
        (1, "containerd"),
    ];
    for (round, (host, component)) in kills.into_iter().enumerate() {
        let name = format!("before-{round}");
        let map = serde_json::from_value(json!({"metadata": {"name": name}, "data": {"killed": component}}))
            .expect("a ConfigMap");
        written
            .create(&PostParams::default(), &map)
            .await
            .unwrap_or_else(|e| panic!("writing before {component}: {e}"));
        match component {
            // A pod, which the kubelet starts again.
            "dns" => {
                drop(cluster.hosts[host].exec("timeout 60 sh -c 'until pkill -9 -x dns; do sleep 0.2; done'").success())
            }
            _ => cluster.kill(host, component),
        }
        let app = format!("after-{round}");
        eventually(&format!("{app} is made after {component} was killed"), PATIENCE, || async {
            let made = cluster.ctl(&format!("run {app} --image=httpd-app:1.0 --replicas=1 --labels=app={app}"));
            if made.code == 0 || made.stderr.contains("already exists") { Ok(()) } else { Err(made.stderr) }
        })
        .await;
        cluster.ready_pods(&format!("app={app}"), 1, PATIENCE).await;
        eventually("what was written is there", PATIENCE, || async {
            let map = written.get(&name).await.map_err(|e| e.to_string())?;
            if map.data.is_some_and(|d| d["killed"] == component) { Ok(()) } else { Err("it changed".to_owned()) }
        })
        .await;
        cluster.ctl(&format!("delete deployment {app}")).success();
    }
    let report = load.end();
    assert!(report.failures.is_empty(), "the application failed to answer: {:#?}", report.failures);
    let left = written.list(&ListParams::default()).await.expect("ConfigMaps").items;
    let kept = left.iter().filter(|m| m.metadata.name.as_deref().is_some_and(|n| n.starts_with("before-"))).count();
    assert_eq!(kept, kills.len(), "nothing written is lost");
}

async fn a_host_dies_and_comes_back(cluster: &mut Cluster) {
    // Shortened times: a silent node is given up after 20 seconds (kubelets renew their leases every 10), and its
    // pods leave after 3 more.
    cluster.hosts[0].exec(
        "sed -i 's/$/ --node-monitor-grace-period=20s/' /etc/kubernetes/flags/controller-manager.env && grep -q 20s /etc/kubernetes/flags/controller-manager.env",
    ).success();
    cluster.kill(0, "controller-manager");
    let patch = r#"{"spec":{"template":{"spec":{"tolerations":[
        {"key":"node.kubernetes.io/unreachable","operator":"Exists","effect":"NoExecute","tolerationSeconds":3},
        {"key":"node.kubernetes.io/not-ready","operator":"Exists","effect":"NoExecute","tolerationSeconds":3}]}}}}"#;
    cluster.ctl(&format!("patch deployment httpd-app -p '{}'", patch.replace('\n', " "))).success();
    cluster.ctl("rollout status deployment/httpd-app --timeout=120s").success();
    cluster.ready_pods("app=httpd-app", 2, PATIENCE).await;

    cluster.hosts[1].power_off();
    let nodes = Api::<Node>::all(cluster.client());
    eventually("the node is NotReady", PATIENCE, || async { ready_is(&nodes, "Unknown").await }).await;
    let on_first = |pods: Vec<k8s_openapi::api::core::v1::Pod>| {
        pods.iter()
            .filter(|p| {
                apimachinery::pod::is_ready(p)
                    && p.spec.as_ref().is_some_and(|s| s.node_name.as_deref() == Some("host-1"))
            })
            .count()
    };
    eventually("both pods run on the other host", PATIENCE, || async {
        let count = on_first(cluster.pods("app=httpd-app").await?);
        if count == 2 { Ok(()) } else { Err(format!("{count} on host-1")) }
    })
    .await;

    cluster.hosts[1].power_on();
    // Its address is on a new device; the programs are started as after a boot.
    let again = cluster.bootstrap(1, "start");
    assert_eq!(again.code, 0, "{}\n{}", again.stdout, again.stderr);
    eventually("the node is Ready again", PATIENCE, || async { ready_is(&nodes, "True").await }).await;
    eventually("what it ran before is gone", PATIENCE, || async {
        let left = cluster.hosts[1].exec("pgrep -x httpd").stdout;
        if left.trim().is_empty() { Ok(()) } else { Err(left) }
    })
    .await;
    cluster.ctl("scale deployment httpd-app --replicas=4").success();
    cluster.ready_pods("app=httpd-app", 4, PATIENCE).await;
    eventually("it takes pods again", PATIENCE, || async {
        let count = on_first(cluster.pods("app=httpd-app").await?);
        if count < 4 { Ok(()) } else { Err(format!("{count} of 4 on host-1")) }
    })
    .await;
}

/// And, if it is ready, open to pods: what kept them away goes a moment later.
async fn ready_is(nodes: &Api<Node>, expected: &str) -> Result<(), String> {
    let node = nodes.get("host-2").await.map_err(|e| e.to_string())?;
    let taints = node.spec.and_then(|s| s.taints).unwrap_or_default();
    if expected == "True" && !taints.is_empty() {
        return Err(format!("taints: {taints:?}"));
    }
    let conditions = node.status.and_then(|s| s.conditions).unwrap_or_default();
    let ready = conditions.into_iter().find(|c| c.type_ == "Ready").map(|c| c.status).unwrap_or_default();
    if ready == expected { Ok(()) } else { Err(format!("Ready is {ready}")) }
}
