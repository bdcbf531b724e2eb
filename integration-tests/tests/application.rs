//! The first example of every Kubernetes course, on two hosts: an application runs, is reached every way there is, is
//! updated and scaled without a failed request, and mends itself.
use integration_tests::{Cluster, Host, Setup, can_run_hosts, eventually, requests};
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::{Api, api::DeleteParams};
use serde_json::json;
use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

/// Longer than anything takes, also where others use the machine.
const PATIENCE: Duration = Duration::from_secs(180);
const SELECTOR: &str = "app=httpd-app";

#[tokio::test]
async fn an_application_runs_on_two_hosts() {
    if !can_run_hosts("an_application_runs_on_two_hosts") {
        return;
    }
    let cluster = Cluster::start("application", Setup::Hosts(2)).await;
    cluster.ctl("run httpd-app --image=httpd-app:1.0 --replicas=2 --port=80").success();
    cluster.ctl("expose deployment httpd-app --port=80 --type=NodePort").success();
    let pods = cluster.ready_pods(SELECTOR, 2, PATIENCE).await;

    let nodes: BTreeSet<_> = pods.iter().map(node_of).collect();
    assert_eq!(nodes.len(), 2, "one pod on each host: {nodes:?}");
    let service = Api::<Service>::namespaced(cluster.client(), "default").get("httpd-app").await.expect("the Service");
    let spec = service.spec.expect("its spec");
    let cluster_ip: IpAddr = spec.cluster_ip.as_deref().and_then(|ip| ip.parse().ok()).expect("a cluster IP");
    let node_port = spec.ports.iter().flatten().find_map(|p| p.node_port).expect("a node port") as u16;

    for pod in &pods {
        let other = cluster.hosts.iter().find(|h| h.name() != node_of(pod)).expect("another host");
        answers(other, SocketAddr::new(ip_of(pod), 80), "httpd-app 1.0").await;
    }
    for host in &cluster.hosts {
        answers(host, SocketAddr::new(cluster_ip, 80), "httpd-app 1.0").await;
        let at_node = SocketAddr::new(host.address().into(), node_port);
        eventually("the node port answers", PATIENCE, || async { requests::get(at_node).map(drop) }).await;
    }
    by_name(&cluster, cluster_ip).await;
    every_replica_serves(&cluster).await;

    rolls_and_scales(&cluster, cluster_ip, node_port).await;
    mends_itself(&cluster).await;
}

/// By its DNS name, asked in a pod, and asked through the cluster's DNS by a program with the system's resolver. (Debian's static
/// busybox resolves names with `nslookup` alone.)
async fn by_name(cluster: &Cluster, cluster_ip: IpAddr) {
    cluster.ctl("run client --image=busybox:stable --restart=Never --command -- sleep 3600").success();
    cluster.ready_pods("run=client", 1, PATIENCE).await;
    let name = "httpd-app.default.svc.cluster.local";
    eventually("the name is resolved in a pod", PATIENCE, || async {
        let found = cluster.ctl(&format!("exec client -- nslookup {name}"));
        if found.code == 0 && found.stdout.contains(&cluster_ip.to_string()) {
            Ok(())
        } else {
            Err(format!("{found:?}"))
        }
    })
    .await;
    cluster.ctl("delete pod client --grace-period=1").success();

    let resolver =
        "nameserver 10.96.0.10\nsearch default.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n";
    cluster.hosts[1].exec(&format!("printf '{resolver}' >/etc/resolv.conf")).success();
    for name in ["httpd-app", "httpd-app.default", name] {
        let page = cluster.hosts[1].exec(&format!("curl -s -m 10 http://{name}/")).success();
        assert!(page.contains("httpd-app 1.0"), "{name}: {page}");
    }
}

/// Without a Deployment above them.
async fn every_replica_serves(cluster: &Cluster) {
    for (version, kind, app) in [("apps/v1", "ReplicaSet", "rs"), ("v1", "ReplicationController", "rc")] {
        let labels = json!({"app": app});
        let selector = if app == "rs" { json!({"matchLabels": labels}) } else { labels.clone() };
        let containers = json!([{"name": "c", "image": "httpd-app:1.0"}]);
        let manifest = json!({"apiVersion": version, "kind": kind, "metadata": {"name": app}, "spec": {"replicas": 2,
            "selector": selector, "template": {"metadata": {"labels": labels}, "spec": {"containers": containers}}}});
        cluster.ctl(&format!("apply -f - <<'END'\n{manifest}\nEND")).success();
        for pod in cluster.ready_pods(&format!("app={app}"), 2, PATIENCE).await {
            answers(&cluster.hosts[0], SocketAddr::new(ip_of(&pod), 80), "httpd-app 1.0").await;
        }
        cluster.ctl(&format!("delete {kind} {app}")).success();
    }
}

async fn rolls_and_scales(cluster: &Cluster, cluster_ip: IpAddr, node_port: u16) {
    let loads = [
        requests::Load::start(&cluster.hosts[0], cluster_ip, 80),
        requests::Load::start(&cluster.hosts[1], cluster_ip, 80),
        requests::Load::start(&cluster.hosts[0], cluster.hosts[1].address().into(), node_port),
    ];
    cluster.ctl("set image deployment/httpd-app *=httpd-app:2.0").success();
    cluster.ctl("rollout status deployment/httpd-app --timeout=120s").success();
    cluster.ready_pods(SELECTOR, 2, PATIENCE).await;
    answers(&cluster.hosts[1], SocketAddr::new(cluster_ip, 80), "httpd-app 2.0").await;
    cluster.ctl("scale deployment httpd-app --replicas=5").success();
    cluster.ready_pods(SELECTOR, 5, PATIENCE).await;
    cluster.ctl("scale deployment httpd-app --replicas=2").success();
    cluster.ready_pods(SELECTOR, 2, PATIENCE).await;
    for load in loads {
        let report = load.end();
        assert!(report.failures.is_empty(), "failed requests while rolling and scaling: {:#?}", report.failures);
        assert!(report.answered > 50, "{report:?}");
    }
}

async fn mends_itself(cluster: &Cluster) {
    // A container that is killed is started again in the same pod.
    let pods = cluster.ready_pods(SELECTOR, 2, PATIENCE).await;
    let (name, node) = (pods[0].metadata.name.clone().unwrap_or_default(), node_of(&pods[0]));
    let host = cluster.hosts.iter().find(|h| h.name() == node).expect("its host");
    host.exec("kill -9 $(pgrep -x httpd | head -n 1)").success();
    let api = Api::<Pod>::namespaced(cluster.client(), "default");
    eventually("the container is started again", PATIENCE, || async {
        let pods = cluster.pods(SELECTOR).await?;
        let restarts: i32 = pods.iter().map(restarts).sum();
        if restarts > 0 { Ok(()) } else { Err("no restart counted".to_owned()) }
    })
    .await;
    cluster.ready_pods(SELECTOR, 2, PATIENCE).await;

    // A pod that is deleted is replaced.
    api.delete(&name, &DeleteParams::default()).await.expect("deleting the pod");
    let pods = cluster.ready_pods(SELECTOR, 2, PATIENCE).await;
    assert!(pods.iter().all(|p| p.metadata.name.as_ref() != Some(&name)));
}

async fn answers(from: &Host, address: SocketAddr, expected: &'static str) {
    eventually(&format!("{address} answers {} with {expected}", from.name()), PATIENCE, || async {
        let page = from.in_network(move || requests::get(address)).join().expect("the request's thread")?;
        if page.contains(expected) { Ok(()) } else { Err(page) }
    })
    .await;
}

fn node_of(pod: &Pod) -> String {
    pod.spec.as_ref().and_then(|s| s.node_name.clone()).unwrap_or_default()
}

fn ip_of(pod: &Pod) -> IpAddr {
    let ip = pod.status.as_ref().and_then(|s| s.pod_ip.as_deref());
    ip.and_then(|ip| ip.parse().ok()).expect("a pod IP")
}

fn restarts(pod: &Pod) -> i32 {
    pod.status.iter().flat_map(|s| s.container_statuses.iter().flatten()).map(|c| c.restart_count).sum()
}
