//! Who tells when something that a quota counts has gone, ended or changed. Pods and Services are watched by others in this
//! process anyway; of other kinds the metadata is watched, once a quota counts them.
use super::{GATHER, Kind, kinds_of};
use crate::runtime::{Context, ServerResource, WorkQueue};
use apimachinery::{meta::NamespacedName, quota};
use component_base::informer::{Change, Informer};
use k8s_openapi::{
    api::core::v1::{Pod, ResourceQuota, Service},
    jiff::Timestamp,
};
use kube::{
    Api, ResourceExt as _,
    api::WatchParams,
    core::{DynamicObject, PartialObjectMeta},
};
use parking_lot::Mutex;
use std::{collections::HashMap, sync::Arc};
use tracing::info;

type Metadata = Informer<PartialObjectMeta<DynamicObject>>;

pub struct Watches {
    context: Arc<Context>,
    quotas: Informer<ResourceQuota>,
    queue: Arc<WorkQueue<NamespacedName>>,
    metadata: Mutex<HashMap<Kind, Metadata>>,
}

impl Watches {
    pub fn new(context: Arc<Context>, quotas: Informer<ResourceQuota>, queue: Arc<WorkQueue<NamespacedName>>) -> Self {
        let watches = Self { context, quotas, queue, metadata: Mutex::default() };
        let tell = watches.teller("", "pods");
        watches.context.informers.get::<Pod>().on_change(move |change| {
            if frees(&change) {
                tell(&change.latest().and_then(|pod| pod.namespace()).unwrap_or_default());
            }
        });
        let tell = watches.teller("", "services");
        watches.context.informers.get::<Service>().on_change(move |change: Change<'_, Service>| {
            if change.old.is_some_and(|old| change.new.is_none_or(|new| new.spec != old.spec)) {
                tell(&change.latest().and_then(|service| service.namespace()).unwrap_or_default());
            }
        });
        watches
    }

    /// Watches a kind from now on; returns once the watch has begun.
    pub async fn ensure(&self, kind: &Kind, resource: &ServerResource) {
        let (group, plural) = (kind.0.as_str(), kind.1.as_str());
        if matches!((group, plural), ("", "pods" | "services")) || !resource.can("watch") {
            return;
        }
        let informer = {
            let mut metadata = self.metadata.lock();
            self.forget_uncounted(&mut metadata, kind);
            metadata.entry(kind.clone()).or_insert_with(|| self.start(kind, resource)).clone()
        };
        informer.synced().await;
    }

    fn start(&self, kind: &Kind, resource: &ServerResource) -> Metadata {
        info!(resource = resource.group_resource(), "watching what a quota counts");
        let api: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(self.context.client.clone(), &resource.api);
        let config = WatchParams::default();
        let informer = Informer::start_slim(api, config, |object: &mut PartialObjectMeta<DynamicObject>| {
            object.metadata.labels = None;
            object.metadata.annotations = None;
            object.metadata.owner_references = None;
        });
        let tell = self.teller(&kind.0, &kind.1);
        let by_content = quota::is_measured(&kind.0, &kind.1);
        informer.on_change(move |change| {
            if let Some(old) = change.old
                && (change.new.is_none() || by_content)
            {
                tell(&old.metadata.namespace.clone().unwrap_or_default());
            }
        });
        informer
    }

    fn forget_uncounted(&self, metadata: &mut HashMap<Kind, Metadata>, but: &Kind) {
        if metadata.contains_key(but) {
            return;
        }
        let quotas = self.quotas.list();
        let counted: std::collections::BTreeSet<Kind> = quotas.iter().flat_map(|quota| kinds_of(quota)).collect();
        metadata.retain(|kind, _| counted.contains(kind));
    }

    /// Has those quotas of a namespace counted anew that count a kind.
    fn teller(&self, group: &str, resource: &str) -> impl Fn(&str) + Send + Sync + 'static {
        let (quotas, queue) = (self.quotas.clone(), self.queue.clone());
        let (group, resource) = (group.to_owned(), resource.to_owned());
        move |namespace| {
            for counting in quotas.list_in(namespace) {
                let mut hard = counting.spec.iter().filter_map(|s| s.hard.as_ref()).flatten();
                if hard.any(|(name, _)| quota::counts(&group, &resource, name)) {
                    queue.add_after(NamespacedName::new(namespace, counting.name_any()), GATHER);
                }
            }
        }
    }
}

/// Whether a pod uses less than before: it is gone, or has ended, or was resized.
fn frees(change: &Change<'_, Pod>) -> bool {
    let Some(old) = change.old else { return false };
    let now = Timestamp::now();
    change.new.is_none_or(|new| {
        (quota::is_charged(old, now) && !quota::is_charged(new, now))
            || old.metadata.generation != new.metadata.generation && new.metadata.deletion_timestamp.is_none()
    })
}
