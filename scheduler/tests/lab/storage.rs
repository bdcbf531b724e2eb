//! Pods go where their volumes are, or can be.

use serde_json::{Value, json};

use super::{Lab, common::eventually};

fn with_claim(name: &str) -> Value {
    json!({"volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": name}}]})
}

async fn claim(lab: &Lab, name: &str, class: &str, mode: &str) {
    let claim = json!({"metadata": {"name": name}, "spec": {"storageClassName": class, "accessModes": [mode],
        "resources": {"requests": {"storage": "1Gi"}}}});
    lab.server.post("/api/v1/namespaces/t/persistentvolumeclaims", &claim).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_that_waits_for_its_consumer_takes_a_volume_where_the_pod_can_be() {
    let Some(mut lab) = Lab::without_scheduler("volumes", true).await else { return };
    lab.scheduler(&["--leader-elect=false", "--secure-port=0"]);
    lab.node("n1", "2").await;
    lab.node("n2", "2").await;
    let class = json!({"metadata": {"name": "local"}, "provisioner": "kubernetes.io/no-provisioner",
        "volumeBindingMode": "WaitForFirstConsumer"});
    lab.server.post("/apis/storage.k8s.io/v1/storageclasses", &class).await.unwrap();
    claim(&lab, "c", "local", "ReadWriteOncePod").await;
    lab.pod("p", with_claim("c")).await;
    let told = lab.refused("p").await;
    assert!(told.contains("2 node(s) didn't find available persistent volumes to bind."), "{told}");
    let volume = json!({"metadata": {"name": "v"}, "spec": {"storageClassName": "local", "accessModes": ["ReadWriteOncePod"],
        "capacity": {"storage": "2Gi"}, "local": {"path": "/mnt"}, "persistentVolumeReclaimPolicy": "Retain",
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [
            {"key": "kubernetes.io/hostname", "operator": "In", "values": ["n2"]}]}]}}}});
    lab.server.post("/api/v1/persistentvolumes", &volume).await.unwrap();
    assert_eq!(lab.bound("p").await, "n2");
    let bound = lab.server.get("/api/v1/namespaces/t/persistentvolumeclaims/c").await.unwrap();
    assert_eq!((&bound["spec"]["volumeName"], &bound["status"]["phase"]), (&json!("v"), &json!("Bound")), "{bound}");
    // The claim is for one pod.
    lab.pod("second", with_claim("c")).await;
    let told = lab.refused("second").await;
    assert!(
        told.contains("node has pod using PersistentVolumeClaim with the same name and ReadWriteOncePod access mode"),
        "{told}"
    );
    lab.server.delete("/api/v1/namespaces/t/pods/p", &json!({})).await.unwrap();
    assert_eq!(lab.bound("second").await, "n2");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_provisioner_is_told_the_node_and_the_pod_waits_for_it() {
    let Some(lab) = Lab::start("provisioning").await else { return };
    lab.node("n1", "2").await;
    let class = json!({"metadata": {"name": "made"}, "provisioner": "example.com/p",
        "volumeBindingMode": "WaitForFirstConsumer"});
    lab.server.post("/apis/storage.k8s.io/v1/storageclasses", &class).await.unwrap();
    claim(&lab, "c", "made", "ReadWriteOnce").await;
    lab.pod("p", with_claim("c")).await;
    let path = "/api/v1/namespaces/t/persistentvolumeclaims/c";
    eventually("the node is selected", async || {
        let claim = lab.server.get(path).await.map_err(|error| format!("{error:?}"))?;
        let selected = &claim["metadata"]["annotations"]["volume.kubernetes.io/selected-node"];
        if selected == "n1" { Ok(()) } else { Err(format!("{claim} {}", lab.log())) }
    })
    .await;
    assert!(lab.get("p").await["spec"]["nodeName"].is_null());
    // As the provisioner and the controller would.
    let volume = json!({"metadata": {"name": "v"}, "spec": {"storageClassName": "made", "accessModes": ["ReadWriteOnce"],
        "capacity": {"storage": "1Gi"}, "csi": {"driver": "p.example.com", "volumeHandle": "h"},
        "claimRef": {"namespace": "t", "name": "c"}}});
    lab.server.post("/api/v1/persistentvolumes", &volume).await.unwrap();
    let bound =
        json!({"metadata": {"annotations": {"pv.kubernetes.io/bind-completed": "yes"}}, "spec": {"volumeName": "v"}});
    lab.server.merge(path, &bound).await.unwrap();
    assert_eq!(lab.bound("p").await, "n1");
}
