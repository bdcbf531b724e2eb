//! The resources of kinds by name, and the scale of those that have one: what PodDisruptionBudgets and autoscalers ask of
//! the kinds of others.
use crate::runtime::is_code;
use apimachinery::meta::group_resource;
use k8s_openapi::{api::autoscaling::v1::Scale, apimachinery::pkg::apis::meta::v1::APIResourceList};
use kube::{
    Api, Client,
    api::PostParams,
    core::{ApiResource, DynamicObject, GroupVersionKind},
};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// Kinds that are remembered; beyond that all are asked for anew.
const REMEMBERED: usize = 256;
/// A kind may come, or change its resource.
const FORGET_AFTER: Duration = Duration::from_secs(60);

/// Finds the resources of kinds and reads and writes their scale.
pub struct Scales {
    client: Client,
    known: Mutex<HashMap<GroupVersionKind, (Option<Found>, Instant)>>,
}

/// A kind's resource, and whether it can be scaled.
#[derive(Clone)]
struct Found {
    resource: ApiResource,
    scales: bool,
}

impl Scales {
    pub fn new(client: Client) -> Self {
        Self { client, known: Mutex::default() }
    }

    async fn find(&self, api_version: &str, kind: &str) -> Result<Option<Found>, kube::Error> {
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        let wanted = GroupVersionKind::gvk(group, version, kind);
        if let Some((found, asked)) = self.known.lock().get(&wanted)
            && asked.elapsed() < FORGET_AFTER
        {
            return Ok(found.clone());
        }
        let list = match group {
            "" => self.client.list_core_api_resources(version).await,
            _ => self.client.list_api_group_resources(api_version).await,
        };
        let found = match list {
            Ok(list) => find_in(&list, &wanted),
            Err(error) if is_code(&error, 404) => None,
            Err(error) => return Err(error),
        };
        let mut known = self.known.lock();
        if known.len() >= REMEMBERED {
            known.clear();
        }
        known.insert(wanted, (found.clone(), Instant::now()));
        Ok(found)
    }

    /// The resource of a kind, if it can be scaled.
    async fn resource(&self, api_version: &str, kind: &str) -> Result<Option<ApiResource>, kube::Error> {
        Ok(self.find(api_version, kind).await?.filter(|f| f.scales).map(|f| f.resource))
    }

    /// `ingresses.networking.k8s.io`, of a kind that is there.
    pub async fn group_resource(&self, api_version: &str, kind: &str) -> Result<Option<String>, kube::Error> {
        let name = |f: Found| group_resource(&f.resource.group, &f.resource.plural);
        Ok(self.find(api_version, kind).await?.map(name))
    }

    /// As [`Scales::group_resource`], of a kind that cannot be scaled.
    pub async fn unscalable(&self, api_version: &str, kind: &str) -> Result<Option<String>, kube::Error> {
        let found = self.find(api_version, kind).await?.filter(|f| !f.scales);
        Ok(found.map(|f| group_resource(&f.resource.group, &f.resource.plural)))
    }

    fn api(&self, namespace: &str, resource: &ApiResource) -> Api<DynamicObject> {
        Api::namespaced_with(self.client.clone(), namespace, resource)
    }

    /// None if there is no such kind, or nothing to scale about it.
    pub async fn get(
        &self,
        namespace: &str,
        api_version: &str,
        kind: &str,
        name: &str,
    ) -> Result<Option<Scale>, kube::Error> {
        let Some(resource) = self.resource(api_version, kind).await? else { return Ok(None) };
        self.api(namespace, &resource).get_scale(name).await.map(Some)
    }

    /// Asks for another size.
    pub async fn set(&self, namespace: &str, api_version: &str, kind: &str, scale: &Scale) -> Result<(), kube::Error> {
        let Some(resource) = self.resource(api_version, kind).await? else { return Ok(()) };
        let name = scale.metadata.name.as_deref().unwrap_or_default();
        self.api(namespace, &resource).replace_scale(name, &PostParams::default(), scale).await.map(|_| ())
    }
}

fn find_in(list: &APIResourceList, wanted: &GroupVersionKind) -> Option<Found> {
    let resource = list.resources.iter().find(|r| r.kind == wanted.kind && !r.name.contains('/'))?;
    let scale = format!("{}/scale", resource.name);
    let scales = list.resources.iter().any(|r| r.name == scale);
    Some(Found { resource: ApiResource::from_gvk_with_plural(wanted, &resource.name), scales })
}
