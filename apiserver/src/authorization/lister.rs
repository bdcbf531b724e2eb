//! What authentication, authorization and admission read: the current objects of the watch caches. A trait, so that the
//! rules above it are tested over a handful of objects in memory.
use std::sync::Arc;

use apimachinery::status::StatusError;
use futures::future::BoxFuture;
use serde::de::DeserializeOwned;

use crate::storage::cache::{Cache, Objects};
use crate::storage::{Store, StoredObject};

/// A stored resource: group, version and plural name.
pub type ResourceId = (&'static str, &'static str, &'static str);

pub const CLUSTER_ROLES: ResourceId = ("rbac.authorization.k8s.io", "v1", "clusterroles");
pub const CLUSTER_ROLE_BINDINGS: ResourceId = ("rbac.authorization.k8s.io", "v1", "clusterrolebindings");
pub const ROLES: ResourceId = ("rbac.authorization.k8s.io", "v1", "roles");
pub const ROLE_BINDINGS: ResourceId = ("rbac.authorization.k8s.io", "v1", "rolebindings");
pub const CSI_DRIVERS: ResourceId = ("storage.k8s.io", "v1", "csidrivers");
pub const DEVICE_CLASSES: ResourceId = ("resource.k8s.io", "v1", "deviceclasses");
pub const INGRESS_CLASSES: ResourceId = ("networking.k8s.io", "v1", "ingressclasses");
pub const LIMIT_RANGES: ResourceId = ("", "v1", "limitranges");
pub const NAMESPACES: ResourceId = ("", "v1", "namespaces");
pub const NODES: ResourceId = ("", "v1", "nodes");
pub const PERSISTENT_VOLUMES: ResourceId = ("", "v1", "persistentvolumes");
pub const PERSISTENT_VOLUME_CLAIMS: ResourceId = ("", "v1", "persistentvolumeclaims");
pub const POD_CERTIFICATE_REQUESTS: ResourceId = ("certificates.k8s.io", "v1beta1", "podcertificaterequests");
pub const PODS: ResourceId = ("", "v1", "pods");
pub const PRIORITY_CLASSES: ResourceId = ("scheduling.k8s.io", "v1", "priorityclasses");
pub const RESOURCE_CLAIMS: ResourceId = ("resource.k8s.io", "v1", "resourceclaims");
pub const RESOURCE_QUOTAS: ResourceId = ("", "v1", "resourcequotas");
pub const RUNTIME_CLASSES: ResourceId = ("node.k8s.io", "v1", "runtimeclasses");
pub const SECRETS: ResourceId = ("", "v1", "secrets");
pub const SERVICE_ACCOUNTS: ResourceId = ("", "v1", "serviceaccounts");
pub const STORAGE_CLASSES: ResourceId = ("storage.k8s.io", "v1", "storageclasses");
pub const VOLUME_ATTACHMENTS: ResourceId = ("storage.k8s.io", "v1", "volumeattachments");

/// Reads current objects, without waiting.
pub trait Lister: Send + Sync + 'static {
    /// `namespace` is empty for cluster-scoped resources.
    fn get(&self, resource: ResourceId, namespace: &str, name: &str) -> Option<Arc<StoredObject>>;

    /// All objects, or those of one namespace.
    fn list(&self, resource: ResourceId, namespace: Option<&str>) -> Vec<Arc<StoredObject>>;

    /// All objects by their keys, as a snapshot that shares what it can with others.
    fn objects(&self, resource: ResourceId) -> Objects;

    /// A number that changes whenever an object of the resource does.
    fn revision(&self, resource: ResourceId) -> i64;

    /// Waits until what was written before this call can be read.
    fn refresh(&self) -> BoxFuture<'_, Result<(), StatusError>>;
}

impl Lister for Store {
    fn get(&self, resource: ResourceId, namespace: &str, name: &str) -> Option<Arc<StoredObject>> {
        self.cache_of(resource.0, resource.2)?.get(namespace, name)
    }

    fn list(&self, resource: ResourceId, namespace: Option<&str>) -> Vec<Arc<StoredObject>> {
        self.cache_of(resource.0, resource.2).map(|cache| cache.list(namespace.unwrap_or_default())).unwrap_or_default()
    }

    fn objects(&self, resource: ResourceId) -> Objects {
        self.cache_of(resource.0, resource.2).map(|cache| cache.snapshot().objects.clone()).unwrap_or_default()
    }

    fn revision(&self, resource: ResourceId) -> i64 {
        self.cache_of(resource.0, resource.2).map_or(0, Cache::revision)
    }

    fn refresh(&self) -> BoxFuture<'_, Result<(), StatusError>> {
        Box::pin(async { self.wait_for(None).await.map(|_| ()) })
    }
}

/// An object as its type. None for what is not of that type, which the log is told.
pub fn typed<K: DeserializeOwned>(object: &StoredObject) -> Option<K> {
    serde_json::from_slice(&object.json())
        .inspect_err(|error| {
            tracing::warn!(namespace = %object.identity.namespace, name = %object.identity.name, %error, "stored object cannot be read");
        })
        .ok()
}

/// When its deletion was asked for, in seconds since the epoch. The text is searched before anything is parsed.
pub fn deletion_time(object: &StoredObject) -> Option<i64> {
    object.mentions("\"deletionTimestamp\"").then_some(())?;
    let value: serde_json::Value = serde_json::from_slice(&object.json()).ok()?;
    let text = value.pointer("/metadata/deletionTimestamp")?.as_str()?;
    text.parse::<jiff::Timestamp>().ok().map(jiff::Timestamp::as_second)
}

#[cfg(test)]
pub mod fake {
    //! Objects in memory for the tests of rules.
    use std::collections::HashMap;

    use parking_lot::Mutex;
    use serde_json::Value;

    use super::*;
    use crate::storage::cache;
    use crate::storage::keys::object_key;
    use crate::storage::object::{Identity, StoredObject, encode};

    /// The last revision, and what there is.
    #[derive(Default)]
    pub struct Objects(Mutex<(i64, HashMap<ResourceId, cache::Objects>)>);

    impl Objects {
        pub fn of(objects: impl IntoIterator<Item = (ResourceId, Value)>) -> Arc<Self> {
            let all = Arc::new(Self::default());
            for (resource, object) in objects {
                all.put(resource, object);
            }
            all
        }

        pub fn put(&self, resource: ResourceId, object: Value) {
            let fields = match resource {
                PODS => vec![("spec.nodeName", object["spec"]["nodeName"].as_str().unwrap_or("").to_owned())],
                _ => Vec::new(),
            };
            let identity = Identity::of(&object, fields);
            let key = object_key(&identity.namespace, &identity.name);
            let mut inner = self.0.lock();
            inner.0 += 1;
            let stored = StoredObject::new(identity, &encode(&object), inner.0, true);
            inner.1.entry(resource).or_default().insert(key.into(), Arc::new(stored));
        }

        pub fn remove(&self, resource: ResourceId, namespace: &str, name: &str) {
            let mut inner = self.0.lock();
            inner.0 += 1;
            inner.1.entry(resource).or_default().remove(object_key(namespace, name).as_str());
        }
    }

    impl Lister for Objects {
        fn get(&self, resource: ResourceId, namespace: &str, name: &str) -> Option<Arc<StoredObject>> {
            self.objects(resource).get(object_key(namespace, name).as_str()).cloned()
        }

        fn list(&self, resource: ResourceId, namespace: Option<&str>) -> Vec<Arc<StoredObject>> {
            let objects = self.objects(resource);
            let all = cache::in_namespace(&objects, namespace.unwrap_or_default());
            all.map(|(_, object)| object.clone()).collect()
        }

        fn objects(&self, resource: ResourceId) -> cache::Objects {
            self.0.lock().1.get(&resource).cloned().unwrap_or_default()
        }

        fn revision(&self, _resource: ResourceId) -> i64 {
            self.0.lock().0
        }

        fn refresh(&self) -> BoxFuture<'_, Result<(), StatusError>> {
            Box::pin(std::future::ready(Ok(())))
        }
    }
}
