//! Claims and volumes: how they find each other, are made, reclaimed, protected, attached and enlarged. The test plays the
//! provisioner, the attacher, the scheduler and the kubelet.

use crate::common::{Server, eventually};
use crate::start;
use serde_json::{Value, json};

const CLAIMS: &str = "/api/v1/namespaces/t/persistentvolumeclaims";
const PODS: &str = "/api/v1/namespaces/t/pods";
const VOLUMES: &str = "/api/v1/persistentvolumes";
const CLASSES: &str = "/apis/storage.k8s.io/v1/storageclasses";
const ATTACHMENTS: &str = "/apis/storage.k8s.io/v1/volumeattachments";
const NODES: &str = "/api/v1/nodes";

fn claim(name: &str, class: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"storageClassName": class, "accessModes": ["ReadWriteOnce"],
        "resources": {"requests": {"storage": "1Gi"}}}})
}

fn volume(name: &str, class: &str, more: Value) -> Value {
    let mut volume = json!({"metadata": {"name": name}, "spec": {"storageClassName": class, "accessModes": ["ReadWriteOnce"],
        "capacity": {"storage": "2Gi"}, "persistentVolumeReclaimPolicy": "Retain"}});
    let source = json!({"csi": {"driver": "d.example.com", "volumeHandle": name}});
    for (field, value) in source.as_object().into_iter().chain(more.as_object()).flatten() {
        volume["spec"][field] = value.clone();
    }
    volume
}

fn pod(name: &str, node: Option<&str>, claim: &str) -> Value {
    json!({"metadata": {"name": name}, "spec": {"nodeName": node, "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "c", "image": "x"}],
        "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": claim}}]}})
}

async fn class(server: &Server, name: &str, provisioner: &str, mode: &str) {
    let class = json!({"metadata": {"name": name}, "provisioner": provisioner, "volumeBindingMode": mode,
        "allowVolumeExpansion": true});
    server.post(CLASSES, &class).await.unwrap();
}

/// Waits until an object's fields have these values, by JSON pointers.
async fn has(server: &Server, path: &str, wanted: Value) -> Value {
    eventually(&format!("{path} has {wanted}"), async || {
        let object = server.get(path).await.map_err(|error| format!("{error:?}"))?;
        let differs = |(at, value): (&String, &Value)| object.pointer(at).unwrap_or(&Value::Null) != value;
        if wanted.as_object().unwrap().iter().any(differs) { Err(object.to_string()) } else { Ok(object) }
    })
    .await
}

/// Waits until an object has an event of that reason; gives its message.
async fn told(server: &Server, name: &str, reason: &str) -> String {
    eventually(&format!("{name} is told of {reason}"), async || {
        let path = format!("/api/v1/events?fieldSelector=involvedObject.name%3D{name}%2Creason%3D{reason}");
        let list = server.get(&path).await.map_err(|error| format!("{error:?}"))?;
        list["items"][0]["message"].as_str().map(str::to_owned).ok_or_else(|| server.controllers_log())
    })
    .await
}

async fn node(server: &Server, name: &str) {
    let node = json!({"metadata": {"name": name, "labels": {"kubernetes.io/hostname": name},
        "annotations": {"volumes.kubernetes.io/controller-managed-attach-detach": "true"}}});
    server.post(NODES, &node).await.unwrap();
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    server.merge(&format!("{NODES}/{name}/status"), &ready).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn claims_and_volumes_find_each_other_and_part() {
    let Some(server) = start().await else { return };
    // The smallest that fits; what is kept for a claim waits for it; one that is named is checked.
    server.post(VOLUMES, &volume("large", "", json!({"capacity": {"storage": "9Gi"}}))).await.unwrap();
    server.post(VOLUMES, &volume("small", "", json!({}))).await.unwrap();
    let kept = json!({"claimRef": {"namespace": "t", "name": "kept"}, "capacity": {"storage": "5Gi"}});
    server.post(VOLUMES, &volume("kept", "", kept)).await.unwrap();
    has(&server, &format!("{VOLUMES}/small"), json!({"/status/phase": "Available"})).await;
    server.post(CLAIMS, &claim("a", "")).await.unwrap();
    let bound = has(
        &server,
        &format!("{CLAIMS}/a"),
        json!({"/status/phase": "Bound", "/spec/volumeName": "small",
        "/status/capacity/storage": "2Gi", "/status/accessModes": ["ReadWriteOnce"]}),
    )
    .await;
    assert_eq!(bound["metadata"]["annotations"]["pv.kubernetes.io/bind-completed"], "yes");
    let tied = has(&server, &format!("{VOLUMES}/small"), json!({"/status/phase": "Bound"})).await;
    assert_eq!(tied["spec"]["claimRef"]["uid"], bound["metadata"]["uid"]);
    server.post(CLAIMS, &claim("kept", "")).await.unwrap();
    has(&server, &format!("{CLAIMS}/kept"), json!({"/status/phase": "Bound", "/spec/volumeName": "kept"})).await;
    let mut greedy = claim("greedy", "");
    greedy["spec"]["resources"]["requests"]["storage"] = json!("20Gi");
    greedy["spec"]["volumeName"] = json!("large");
    server.post(CLAIMS, &greedy).await.unwrap();
    let message = told(&server, "greedy", "VolumeMismatch").await;
    assert_eq!(message, "Cannot bind to requested volume \"large\": requested PV is too small");
    server
        .post(
            CLAIMS,
            &json!({"metadata": {"name": "none"}, "spec": {"accessModes": ["ReadWriteMany"],
        "storageClassName": "", "resources": {"requests": {"storage": "1Gi"}}}}),
        )
        .await
        .unwrap();
    let message = told(&server, "none", "FailedBinding").await;
    assert_eq!(message, "no persistent volumes available for this claim and no storage class is set");

    // A claim that a scheduled pod has stays until the pod has gone; then its volume is released, and kept.
    server.post(PODS, &pod("user", Some("nowhere"), "a")).await.unwrap();
    server.delete(&format!("{CLAIMS}/a"), &Value::Null).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    let held = server.get(&format!("{CLAIMS}/a")).await.unwrap();
    assert_eq!(held["metadata"]["finalizers"], json!(["kubernetes.io/pvc-protection"]));
    // So does a volume that a claim has.
    server.delete(&format!("{VOLUMES}/kept"), &Value::Null).await.unwrap();
    server.delete(&format!("{PODS}/user"), &json!({"gracePeriodSeconds": 0})).await.unwrap();
    server.gone(&format!("{CLAIMS}/a")).await;
    has(&server, &format!("{VOLUMES}/small"), json!({"/status/phase": "Released"})).await;
    assert!(server.get(&format!("{VOLUMES}/kept")).await.is_ok());
    server.delete(&format!("{CLAIMS}/kept"), &Value::Null).await.unwrap();
    server.gone(&format!("{VOLUMES}/kept")).await;
    // Whoever takes the claim off a volume makes it free.
    server.merge(&format!("{VOLUMES}/small"), &json!({"spec": {"claimRef": null}})).await.unwrap();
    has(&server, &format!("{VOLUMES}/small"), json!({"/status/phase": "Available"})).await;
    // A claim whose volume is taken away is lost.
    server.post(CLAIMS, &claim("b", "")).await.unwrap();
    has(&server, &format!("{CLAIMS}/b"), json!({"/status/phase": "Bound"})).await;
    server.delete(&format!("{VOLUMES}/small"), &Value::Null).await.unwrap();
    server.merge(&format!("{VOLUMES}/small"), &json!({"metadata": {"finalizers": null}})).await.unwrap();
    has(&server, &format!("{CLAIMS}/b"), json!({"/status/phase": "Lost"})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_claims_share_no_volume() {
    const COUNT: usize = 40;
    let Some(server) = start().await else { return };
    let requests = (0..COUNT).map(|n| {
        let server = &server;
        async move {
            server.post(VOLUMES, &volume(&format!("v{n}"), "", json!({}))).await.unwrap();
            server.post(CLAIMS, &claim(&format!("c{n}"), "")).await.unwrap();
        }
    });
    futures::future::join_all(requests).await;
    let names = eventually("all are bound", async || {
        let list = server.get(CLAIMS).await.map_err(|error| format!("{error:?}"))?;
        let bound = list["items"].as_array().unwrap().iter().filter(|c| c["status"]["phase"] == "Bound");
        let names: std::collections::BTreeSet<String> = bound.map(|c| c["spec"]["volumeName"].to_string()).collect();
        if names.len() == COUNT { Ok(names) } else { Err(format!("{}", names.len())) }
    })
    .await;
    assert_eq!(names.len(), COUNT);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn provisioners_are_asked_when_the_class_says_so() {
    let Some(server) = start().await else { return };
    class(&server, "now", "p.example.com", "Immediate").await;
    class(&server, "late", "p.example.com", "WaitForFirstConsumer").await;
    class(&server, "manual", "kubernetes.io/no-provisioner", "Immediate").await;
    for (name, of, reason) in [
        ("now", "now", "ExternalProvisioning"),
        ("late", "late", "WaitForFirstConsumer"),
        ("manual", "manual", "ProvisioningFailed"),
        ("unknown", "unknown", "ProvisioningFailed"),
    ] {
        server.post(CLAIMS, &claim(name, of)).await.unwrap();
        let message = told(&server, name, reason).await;
        let expected = match name {
            "now" => "Waiting for a volume to be created either by the external provisioner 'p.example.com'",
            "late" => "waiting for first consumer to be created before binding",
            "manual" => "no volume plugin matched name: kubernetes.io/no-provisioner",
            _ => "storageclass.storage.k8s.io \"unknown\" not found",
        };
        assert!(message.starts_with(expected), "{message}");
    }
    // The scheduler chooses a node: then the provisioner is asked.
    let chosen = json!({"metadata": {"annotations": {"volume.kubernetes.io/selected-node": "n1"}}});
    server.merge(&format!("{CLAIMS}/late"), &chosen).await.unwrap();
    for name in ["now", "late"] {
        let asked = has(
            &server,
            &format!("{CLAIMS}/{name}"),
            json!({
            "/metadata/annotations/volume.kubernetes.io~1storage-provisioner": "p.example.com",
            "/metadata/annotations/volume.beta.kubernetes.io~1storage-provisioner": "p.example.com"}),
        )
        .await;
        // It makes a volume for the claim.
        let reference = json!({"namespace": "t", "name": name, "uid": asked["metadata"]["uid"]});
        let mut made = volume(
            &format!("made-{name}"),
            name,
            json!({"claimRef": reference, "persistentVolumeReclaimPolicy": "Delete"}),
        );
        made["metadata"]["annotations"] = json!({"pv.kubernetes.io/provisioned-by": "p.example.com"});
        server.post(VOLUMES, &made).await.unwrap();
        has(
            &server,
            &format!("{CLAIMS}/{name}"),
            json!({"/status/phase": "Bound", "/spec/volumeName": format!("made-{name}")}),
        )
        .await;
    }
    // More is another process' matter; so is the deletion.
    let more = json!({"spec": {"resources": {"requests": {"storage": "2Gi"}}}});
    server
        .merge(&format!("{CLAIMS}/now"), &json!({"spec": {"resources": {"requests": {"storage": "3Gi"}}}}))
        .await
        .unwrap();
    assert!(told(&server, "now", "ExternalExpanding").await.contains("waiting for an external controller"));
    drop(more);
    server.delete(&format!("{CLAIMS}/now"), &Value::Null).await.unwrap();
    has(&server, &format!("{VOLUMES}/made-now"), json!({"/status/phase": "Released"})).await;
    // The default class comes after the claim.
    let mut plain = claim("plain", "");
    plain["spec"].as_object_mut().unwrap().remove("storageClassName");
    server.post(CLAIMS, &plain).await.unwrap();
    let default = json!({"metadata": {"annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}});
    server.merge(&format!("{CLASSES}/now"), &default).await.unwrap();
    has(&server, &format!("{CLAIMS}/plain"), json!({"/spec/storageClassName": "now"})).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_claim_gets_a_directory_of_its_node() {
    let Some(server) = start().await else { return };
    node(&server, "n1").await;
    class(&server, "host-path", "pilothouse.dev/host-path", "WaitForFirstConsumer").await;
    let made = server.post(CLAIMS, &claim("c", "host-path")).await.unwrap();
    server.post(PODS, &pod("waiting", None, "c")).await.unwrap();
    let name = format!("pvc-{}", made["metadata"]["uid"].as_str().unwrap());
    let chosen = json!({"metadata": {"annotations": {"volume.kubernetes.io/selected-node": "n1"}}});
    server.merge(&format!("{CLAIMS}/c"), &chosen).await.unwrap();
    let works = async |work: &str| {
        let path = format!("/api/v1/namespaces/kube-system/pods/{work}-{name}");
        let pod = has(&server, &path, json!({"/spec/nodeName": "n1"})).await;
        let command = &pod["spec"]["containers"][0]["command"];
        assert_eq!(*command, json!(["/pause", work, format!("/volumes/{name}")]));
        assert_eq!(pod["spec"]["volumes"][0]["hostPath"]["path"], "/var/lib/pilothouse/volumes");
        server.merge(&format!("{path}/status"), &json!({"status": {"phase": "Succeeded"}})).await.unwrap();
        server.gone(&path).await;
    };
    works("make").await;
    has(&server, &format!("{CLAIMS}/c"), json!({"/status/phase": "Bound", "/spec/volumeName": name})).await;
    let volume = has(&server, &format!("{VOLUMES}/{name}"), json!({"/status/phase": "Bound"})).await;
    assert_eq!(volume["spec"]["local"]["path"], format!("/var/lib/pilothouse/volumes/{name}"));
    let terms = &volume["spec"]["nodeAffinity"]["required"]["nodeSelectorTerms"];
    assert_eq!(terms[0]["matchExpressions"][0]["values"], json!(["n1"]));
    // It grows by asking.
    let more = json!({"spec": {"resources": {"requests": {"storage": "3Gi"}}}});
    server.merge(&format!("{CLAIMS}/c"), &more).await.unwrap();
    has(&server, &format!("{CLAIMS}/c"), json!({"/status/capacity/storage": "3Gi"})).await;
    // The data go before the volume.
    server.delete(&format!("{PODS}/waiting"), &json!({"gracePeriodSeconds": 0})).await.unwrap();
    server.delete(&format!("{CLAIMS}/c"), &Value::Null).await.unwrap();
    has(&server, &format!("{VOLUMES}/{name}"), json!({"/status/phase": "Released"})).await;
    works("remove").await;
    server.gone(&format!("{VOLUMES}/{name}")).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_is_recycled_when_its_policy_says_so() {
    let Some(server) = start().await else { return };
    let mut recycled =
        volume("r", "", json!({"persistentVolumeReclaimPolicy": "Recycle", "hostPath": {"path": "/tmp/r"}}));
    recycled["spec"].as_object_mut().unwrap().remove("csi");
    server.post(VOLUMES, &recycled).await.unwrap();
    server.post(CLAIMS, &claim("c", "")).await.unwrap();
    has(&server, &format!("{CLAIMS}/c"), json!({"/status/phase": "Bound"})).await;
    server.delete(&format!("{CLAIMS}/c"), &Value::Null).await.unwrap();
    let path = "/api/v1/namespaces/kube-system/pods/scrub-r";
    has(&server, path, json!({"/spec/containers/0/command": ["/pause", "scrub", "/volumes"]})).await;
    server.merge(&format!("{path}/status"), &json!({"status": {"phase": "Succeeded"}})).await.unwrap();
    has(&server, &format!("{VOLUMES}/r"), json!({"/status/phase": "Available", "/spec/claimRef": null})).await;
    told(&server, "r", "VolumeRecycled").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_are_attached_where_pods_are_and_detached_when_kubelets_let_go() {
    let Some(server) = start().await else { return };
    node(&server, "n1").await;
    node(&server, "n2").await;
    server.post(VOLUMES, &volume("v", "", json!({}))).await.unwrap();
    server.post(CLAIMS, &claim("c", "")).await.unwrap();
    has(&server, &format!("{CLAIMS}/c"), json!({"/status/phase": "Bound"})).await;
    // Others' attachments are none of ours.
    let foreign = json!({"metadata": {"name": "foreign"}, "spec": {"attacher": "x.example.com", "nodeName": "n1",
        "source": {"persistentVolumeName": "v"}}});
    server.post(ATTACHMENTS, &foreign).await.unwrap();
    server.delete(&format!("{ATTACHMENTS}/foreign"), &Value::Null).await.unwrap();
    server.post(PODS, &pod("p", Some("n1"), "c")).await.unwrap();
    let attached_to = async |node: &str| {
        eventually(&format!("an attachment to {node}"), async || {
            let list = server.get(ATTACHMENTS).await.map_err(|error| format!("{error:?}"))?;
            let found = list["items"].as_array().unwrap().iter().find(|a| a["spec"]["nodeName"] == node).cloned();
            found.ok_or_else(|| format!("{list} {}", server.controllers_log()))
        })
        .await
    };
    let attachment = attached_to("n1").await;
    assert_eq!(attachment["spec"]["source"]["persistentVolumeName"], "v");
    let path = format!("{ATTACHMENTS}/{}", attachment["metadata"]["name"].as_str().unwrap());
    server.merge(&format!("{path}/status"), &json!({"status": {"attached": true}})).await.unwrap();
    let unique = "kubernetes.io/csi/d.example.com^v";
    has(&server, &format!("{NODES}/n1"), json!({"/status/volumesAttached/0/name": unique})).await;
    told(&server, "p", "SuccessfulAttachVolume").await;
    server.merge(&format!("{NODES}/n1/status"), &json!({"status": {"volumesInUse": [unique]}})).await.unwrap();
    // One node at a time; and not before the kubelet has unmounted it.
    server.post(PODS, &pod("q", Some("n2"), "c")).await.unwrap();
    let message = told(&server, "q", "FailedAttachVolume").await;
    assert_eq!(message, "Multi-Attach error for volume \"v\" Volume is already used by pod(s) p");
    server.delete(&format!("{PODS}/p"), &json!({"gracePeriodSeconds": 0})).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert!(server.get(&path).await.is_ok(), "it is still in use");
    server.merge(&format!("{NODES}/n1/status"), &json!({"status": {"volumesInUse": null}})).await.unwrap();
    server.gone(&path).await;
    has(&server, &format!("{NODES}/n1"), json!({"/status/volumesAttached": null})).await;
    let attachment = attached_to("n2").await;
    // A node that is out of service loses it at once.
    let path = format!("{ATTACHMENTS}/{}", attachment["metadata"]["name"].as_str().unwrap());
    server.merge(&format!("{path}/status"), &json!({"status": {"attached": true}})).await.unwrap();
    let down = json!({"status": {"volumesInUse": [unique], "conditions": [{"type": "Ready", "status": "False"}]}});
    server.merge(&format!("{NODES}/n2/status"), &down).await.unwrap();
    let taint = json!({"spec": {"taints": [{"key": "node.kubernetes.io/out-of-service", "effect": "NoExecute"}]}});
    server.merge(&format!("{NODES}/n2"), &taint).await.unwrap();
    server.delete(&format!("{PODS}/q"), &json!({"gracePeriodSeconds": 0})).await.ok();
    server.gone(&path).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn pods_have_claims_of_their_own() {
    let Some(server) = start().await else { return };
    let template = json!({"metadata": {"labels": {"l": "x"}}, "spec": {"accessModes": ["ReadWriteOnce"],
        "storageClassName": "none", "resources": {"requests": {"storage": "1Gi"}}}});
    let mut owner = pod("p", None, "x");
    owner["spec"]["volumes"] = json!([{"name": "v", "ephemeral": {"volumeClaimTemplate": template}}]);
    server.post(PODS, &owner).await.unwrap();
    let made = has(&server, &format!("{CLAIMS}/p-v"), json!({"/metadata/labels/l": "x"})).await;
    assert_eq!(made["metadata"]["ownerReferences"][0]["kind"], "Pod");
    server.delete(&format!("{PODS}/p"), &json!({"gracePeriodSeconds": 0})).await.unwrap();
    server.gone(&format!("{CLAIMS}/p-v")).await;

    // Devices: a claim from a template, which is the pod's; reserved for it if it came past the scheduler.
    let resource = "/apis/resource.k8s.io/v1/namespaces/t";
    let devices = json!({"requests": [{"name": "r", "exactly": {"deviceClassName": "gpu"}}]});
    let template = json!({"metadata": {"name": "t"}, "spec": {"spec": {"devices": devices}}});
    server.post(&format!("{resource}/resourceclaimtemplates"), &template).await.unwrap();
    let mut user = pod("user", None, "x");
    user["spec"]["volumes"] = Value::Null;
    user["spec"]["resourceClaims"] = json!([{"name": "gpu", "resourceClaimTemplateName": "t"}]);
    server.post(PODS, &user).await.unwrap();
    let name = eventually("the pod's status names its claim", async || {
        let pod = server.get(&format!("{PODS}/user")).await.map_err(|error| format!("{error:?}"))?;
        let name = pod["status"]["resourceClaimStatuses"][0]["resourceClaimName"].as_str().map(str::to_owned);
        name.ok_or_else(|| format!("{} {}", pod["status"], server.controllers_log()))
    })
    .await;
    let path = format!("{resource}/resourceclaims/{name}");
    let claim = server.get(&path).await.unwrap();
    assert_eq!(claim["metadata"]["annotations"]["resource.kubernetes.io/pod-claim-name"], "gpu");
    assert_eq!(server.names(&format!("{resource}/resourceclaims")).await.len(), 1, "one, and not two");
    let ended = json!({"status": {"phase": "Succeeded"}});
    server.merge(&format!("{PODS}/user/status"), &ended).await.unwrap();
    server.gone(&path).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_attributes_class_stays_while_a_claim_names_it() {
    let Some(server) = start().await else { return };
    let classes = "/apis/storage.k8s.io/v1/volumeattributesclasses";
    let fast = json!({"metadata": {"name": "fast"}, "driverName": "d.example.com", "parameters": {"a": "b"}});
    server.post(classes, &fast).await.unwrap();
    let path = format!("{classes}/fast");
    has(&server, &path, json!({"/metadata/finalizers": ["kubernetes.io/vac-protection"]})).await;
    let mut user = claim("c", "none");
    user["spec"]["volumeAttributesClassName"] = json!("fast");
    server.post(CLAIMS, &user).await.unwrap();
    server.delete(&path, &Value::Null).await.unwrap();
    tokio::time::sleep(std::time::Duration::from_secs(1)).await;
    assert!(server.get(&path).await.is_ok(), "a claim names it");
    server.delete(&format!("{CLAIMS}/c"), &Value::Null).await.unwrap();
    server.gone(&path).await;
}
