//! Devices that are claimed: a driver of the test's own, whose devices a pod gets by a claim, and another by the name of a resource.
use std::sync::Arc;
use std::sync::Mutex;

use k8s_openapi::api::resource::v1::{DeviceClass, ResourceClaim, ResourceClaimTemplate, ResourceSlice};
use kube::api::ListParams;
use proto::dra as pb;
use proto::dra::dra_plugin_server::{DraPlugin, DraPluginServer};
use proto::podresources::ListPodResourcesRequest;
use proto::podresources::pod_resources_lister_client::PodResourcesListerClient;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

use super::csi::Serving;
use super::*;

const NAME: &str = "noting.dra.example";

/// A driver that takes notes.
#[derive(Clone, Default)]
struct Driver(Arc<Mutex<Vec<String>>>);

impl Driver {
    fn note(&self, call: &str, claims: &[pb::Claim]) {
        let mut notes = self.0.lock().expect("nobody panics with it");
        notes.extend(claims.iter().map(|claim| format!("{call} {}", claim.uid)));
    }
}

#[tonic::async_trait]
impl DraPlugin for Driver {
    async fn node_prepare_resources(
        &self,
        request: Request<pb::NodePrepareResourcesRequest>,
    ) -> Result<Response<pb::NodePrepareResourcesResponse>, Status> {
        let claims = request.into_inner().claims;
        self.note("prepare", &claims);
        let device = || pb::Device {
            pool_name: "pool".into(),
            device_name: "some".into(),
            cdi_device_ids: vec!["dra.example/thing=some".into()],
            ..Default::default()
        };
        let answer = || pb::NodePrepareResourceResponse { devices: vec![device()], ..Default::default() };
        let claims = claims.into_iter().map(|claim| (claim.uid, answer())).collect();
        Ok(Response::new(pb::NodePrepareResourcesResponse { claims }))
    }
    async fn node_unprepare_resources(
        &self,
        request: Request<pb::NodeUnprepareResourcesRequest>,
    ) -> Result<Response<pb::NodeUnprepareResourcesResponse>, Status> {
        let claims = request.into_inner().claims;
        self.note("unprepare", &claims);
        let claims = claims.into_iter().map(|claim| (claim.uid, Default::default())).collect();
        Ok(Response::new(pb::NodeUnprepareResourcesResponse { claims }))
    }
}

impl Node {
    /// The claims of pods that are listed here, with their UIDs.
    async fn claims(&self) -> Vec<(String, String)> {
        let claims = Api::<ResourceClaim>::namespaced(self.client.clone(), "default");
        let all = claims.list(&ListParams::default()).await.expect("claims").items;
        let meta = |claim: ResourceClaim| claim.metadata.name.zip(claim.metadata.uid);
        all.into_iter().filter_map(meta).collect()
    }

    /// Devices of a driver on this node go to pods, once by a claim and once by the name of a resource, over the death of a kubelet,
    /// and are taken back.
    pub(super) async fn devices_are_claimed(&self, cluster: &Cluster) {
        let host = &cluster.hosts[0];
        let node = self.pods_host().await.0;
        let driver = Driver::default();
        let plugin = Server::builder().add_service(DraPluginServer::new(driver.clone()));
        let serving = Serving::start(host, "DRAPlugin", NAME, "v1.DRAPlugin", plugin);

        let made = PostParams::default();
        let class: DeviceClass = serde_json::from_value(json!({"metadata": {"name": NAME}, "spec": {
            "extendedResourceName": "dra.example/thing",
            "selectors": [{"cel": {"expression": format!("device.driver == {NAME:?}")}}]}}))
        .expect("a class");
        let classes = Api::<DeviceClass>::all(self.client.clone());
        classes.create(&made, &class).await.expect("made");
        let slices = Api::<ResourceSlice>::all(self.client.clone());
        let slice: ResourceSlice = serde_json::from_value(json!({"metadata": {"name": "noting"}, "spec": {
            "driver": NAME, "nodeName": node, "pool": {"name": "pool", "generation": 1, "resourceSliceCount": 1},
            "devices": [{"name": "some"}, {"name": "other"}]}}))
        .expect("a slice");
        slices.create(&made, &slice).await.expect("made");
        self.create::<ResourceClaimTemplate>(json!({"metadata": {"name": "one"}, "spec": {"spec": {
            "devices": {"requests": [{"name": "r", "exactly": {"deviceClassName": NAME}}]}}}}))
            .await;
        // As a driver does for runtimes that know CDI: those say what they lack, others let the device pass.
        let spec = json!({"cdiVersion": "0.5.0", "kind": "dra.example/thing",
            "devices": [{"name": "some", "containerEdits": {"env": ["THING=some"]}}]});
        host.exec(&format!("mkdir -p /etc/cdi && echo '{spec}' >/etc/cdi/thing.json")).success();
        let lives = |more: Value| {
            let mut container = sh("c", "sleep 600");
            merge(&mut container, more);
            json!({"restartPolicy": "Always", "containers": [container]})
        };
        let mut by_claim = lives(json!({"resources": {"claims": [{"name": "mine"}]}}));
        by_claim["resourceClaims"] = json!([{"name": "mine", "resourceClaimTemplateName": "one"}]);
        self.run("by-claim", by_claim).await;
        self.run("by-name", lives(json!({"resources": {"limits": {"dra.example/thing": "1"}}}))).await;
        let pods = ["by-claim", "by-name"];
        let mut containers = Vec::new();
        for pod in pods {
            containers.push(statuses(&self.ready(pod).await)[0].container_id.clone());
        }
        let claims = self.claims().await;
        assert_eq!(claims.len(), 2, "{claims:?}");
        let has = |notes: &[String], call: &str| {
            claims.iter().all(|(_, uid)| notes.iter().filter(|note| **note == format!("{call} {uid}")).count() == 1)
        };
        let notes = || driver.0.lock().expect("nobody panics with it").clone();
        assert!(has(&notes(), "prepare"), "{:?} of {claims:?}", notes());

        // A kubelet that is new knows what is prepared, and does not believe that a driver still offers what it did.
        cluster.kill(0, "kubelet");
        eventually("what a driver offered is withdrawn", MINUTES, || async {
            let left = slices.list(&ListParams::default()).await.map_err(|e| e.to_string())?.items;
            if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
        })
        .await;
        eventually("who has what is told", MINUTES, || async {
            let socket = host.inside("/var/lib/kubelet/pod-resources/kubelet.sock");
            let endpoint = tonic::transport::Endpoint::from_shared(format!("unix://{}", socket.display()));
            let mut lister = PodResourcesListerClient::new(endpoint.expect("an address").connect_lazy());
            let listed = lister.list(ListPodResourcesRequest {}).await.map_err(|e| e.to_string())?.into_inner();
            let containers = listed.pod_resources.iter().filter(|p| pods.contains(&p.name.as_str()));
            let containers: Vec<_> = containers.flat_map(|p| &p.containers).collect();
            let is_told = |c: &&proto::podresources::ContainerResources| {
                c.dynamic_resources.iter().any(|r| {
                    let devices = r.claim_resources.iter().flat_map(|d| &d.cdi_devices);
                    claims.iter().any(|(name, _)| *name == r.claim_name)
                        && devices.map(|d| d.name.as_str()).eq(["dra.example/thing=some"])
                })
            };
            if containers.iter().filter(|c| is_told(c)).count() == 2 { Ok(()) } else { Err(format!("{containers:?}")) }
        })
        .await;
        for (pod, before) in pods.iter().zip(&containers) {
            assert_eq!(statuses(&self.ready(pod).await)[0].container_id, *before, "{pod} is left alone");
        }
        assert!(has(&notes(), "prepare") && !has(&notes(), "unprepare"), "{:?}", notes());
        self.remove(&pods).await;
        eventually("all is taken back", MINUTES, || async {
            let left = self.claims().await;
            if has(&notes(), "unprepare") && left.is_empty() { Ok(()) } else { Err(format!("{:?} {left:?}", notes())) }
        })
        .await;
        serving.end();
        classes.delete(NAME, &DeleteParams::default()).await.expect("deleted");
    }
}
