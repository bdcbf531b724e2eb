//! The pod resources API: who holds what of the node, for monitoring agents.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Container, Pod};
use proto::podresources as pb;
use proto::podresources::pod_resources_lister_server::{PodResourcesLister, PodResourcesListerServer};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::held::{self, Held};
use super::{Allocator, devices};
use crate::dra::Dra;
use crate::metrics::managers;
use crate::runtime::pods::uid_of;

type Pods = Arc<dyn Fn() -> Vec<Arc<Pod>> + Send + Sync>;

struct Lister {
    allocator: Arc<Allocator>,
    dra: Arc<Dra>,
    pods: Pods,
}

pub(super) async fn serve(
    (allocator, dra): (Arc<Allocator>, Arc<Dra>),
    pods: impl Fn() -> Vec<Arc<Pod>> + Send + Sync + 'static,
    directory: PathBuf,
    shutdown: CancellationToken,
) -> std::io::Result<()> {
    std::fs::create_dir_all(&directory)?;
    let socket = directory.join(devices::SOCKET);
    match std::fs::remove_file(&socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = tokio::net::UnixListener::bind(socket)?;
    let lister = Lister { allocator, dra, pods: Arc::new(pods) };
    let server = tonic::transport::Server::builder().add_service(PodResourcesListerServer::new(lister));
    let serving = server.serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown.cancelled_owned());
    serving.await.map_err(std::io::Error::other)
}

fn topology(nodes: &BTreeSet<u32>) -> Option<pb::TopologyInfo> {
    let nodes: Vec<_> = nodes.iter().map(|n| pb::NumaNode { id: i64::from(*n) }).collect();
    (!nodes.is_empty()).then_some(pb::TopologyInfo { nodes })
}

impl Lister {
    fn devices(&self, resource: &str, ids: &BTreeSet<String>) -> Vec<pb::ContainerDevices> {
        let list = self.allocator.devices.list(resource);
        // A device each, since each may be on other nodes.
        ids.iter()
            .map(|id| pb::ContainerDevices {
                resource_name: resource.to_owned(),
                device_ids: vec![id.clone()],
                topology: list.get(id).and_then(|d| topology(&d.nodes)),
            })
            .collect()
    }

    fn memory(held: &Held) -> Vec<pb::ContainerMemory> {
        let of_node = |(node, amounts): (&u32, &std::collections::BTreeMap<String, u64>)| {
            let node = BTreeSet::from([*node]);
            let block = |(kind, size): (&String, &u64)| pb::ContainerMemory {
                memory_type: kind.clone(),
                size: *size,
                topology: topology(&node),
            };
            amounts.iter().map(block).collect::<Vec<_>>()
        };
        held.memory.iter().flat_map(of_node).collect()
    }

    fn claims(&self, pod: &Pod, container: &Container) -> Vec<pb::DynamicResource> {
        let mut claims: Vec<pb::DynamicResource> = Vec::new();
        for (claim, driver, device) in self.dra.claims_of_container(pod, container) {
            let resource = pb::ClaimResource {
                cdi_devices: device.cdi_ids.into_iter().map(|name| pb::CdiDevice { name }).collect(),
                driver_name: driver,
                pool_name: device.pool,
                device_name: device.name,
            };
            let is_it = |c: &&mut pb::DynamicResource| c.claim_name == claim.name;
            match claims.iter_mut().find(is_it) {
                Some(known) if known.claim_resources.contains(&resource) => {}
                Some(known) => known.claim_resources.push(resource),
                None => claims.push(pb::DynamicResource {
                    claim_name: claim.name,
                    claim_namespace: claim.namespace,
                    claim_resources: vec![resource],
                }),
            }
        }
        claims
    }

    fn of(&self, pod: &Pod) -> pb::PodResources {
        let own = self.allocator.held.lock().get(uid_of(pod)).cloned().unwrap_or_default();
        let containers = held::containers(pod).into_iter().filter(|(_, ends)| !ends).map(|(container, _)| {
            let held = own.get(&container.name).cloned().unwrap_or_default();
            pb::ContainerResources {
                name: container.name.clone(),
                devices: held.devices.iter().flat_map(|(name, d)| self.devices(name, &d.ids)).collect(),
                cpu_ids: held.cpus.iter().map(|cpu| i64::from(*cpu)).collect(),
                memory: Self::memory(&held),
                dynamic_resources: self.claims(pod, container),
            }
        });
        pb::PodResources {
            name: pod.metadata.name.clone().unwrap_or_default(),
            namespace: pod.metadata.namespace.clone().unwrap_or_else(|| "default".to_owned()),
            containers: containers.collect(),
        }
    }
}

#[tonic::async_trait]
impl PodResourcesLister for Lister {
    async fn list(
        &self,
        _: Request<pb::ListPodResourcesRequest>,
    ) -> Result<Response<pb::ListPodResourcesResponse>, Status> {
        let active = (self.pods)().into_iter().filter(|pod| !apimachinery::pod::is_terminal(pod));
        let pod_resources = active.map(|pod| self.of(&pod)).collect();
        let answer = Ok(Response::new(pb::ListPodResourcesResponse { pod_resources }));
        managers().asked(&managers().holders_list, &answer);
        answer
    }

    async fn get_allocatable_resources(
        &self,
        _: Request<pb::AllocatableResourcesRequest>,
    ) -> Result<Response<pb::AllocatableResourcesResponse>, Status> {
        let allocator = &self.allocator;
        let resources = allocator.devices.resources();
        let devices = resources.iter().flat_map(|name| {
            let healthy = allocator.devices.list(name).into_iter().filter(|(_, d)| d.healthy).map(|(id, _)| id);
            self.devices(name, &healthy.collect())
        });
        let kept = allocator.policies.static_cpus.clone();
        let cpus =
            allocator.topology.all_cpus().into_iter().filter(|cpu| kept.as_ref().is_some_and(|k| !k.contains(cpu)));
        let memory = allocator.policies.static_memory.as_ref().map(|_| Held {
            memory: allocator
                .topology
                .memory
                .iter()
                .map(|(node, amounts)| {
                    let usable = amounts.keys().map(|kind| (kind.clone(), allocator.usable_memory(*node, kind)));
                    (*node, usable.collect())
                })
                .collect(),
            ..Default::default()
        });
        let answer = Ok(Response::new(pb::AllocatableResourcesResponse {
            devices: devices.collect(),
            cpu_ids: cpus.map(i64::from).collect(),
            memory: memory.as_ref().map(Self::memory).unwrap_or_default(),
        }));
        managers().asked(&managers().holders_allocatable, &answer);
        answer
    }

    async fn get(
        &self,
        request: Request<pb::GetPodResourcesRequest>,
    ) -> Result<Response<pb::GetPodResourcesResponse>, Status> {
        let wanted = request.into_inner();
        let is_it = |pod: &Arc<Pod>| {
            pod.metadata.name.as_ref() == Some(&wanted.pod_name)
                && pod.metadata.namespace.as_deref().unwrap_or("default") == wanted.pod_namespace
        };
        let found = (self.pods)().into_iter().find(is_it);
        let found = found.ok_or_else(|| {
            Status::not_found(format!("pod {} in namespace {} not found", wanted.pod_name, wanted.pod_namespace))
        });
        managers().asked(&managers().holders_get, &found);
        let pod = found?;
        Ok(Response::new(pb::GetPodResourcesResponse { pod_resources: Some(self.of(&pod)) }))
    }
}
