//! Objects as this controller wrote them last, until the cache shows that or something newer: for a controller that
//! decides over several objects at once, and must not decide twice because its cache lags.
use apimachinery::meta::NamespacedName;
use component_base::informer::Informer;
use kube::Resource;
use parking_lot::Mutex;
use serde::de::DeserializeOwned;
use std::{
    collections::HashMap,
    fmt::Debug,
    sync::Arc,
    time::{Duration, Instant},
};

/// What the cache has not shown by then it never will: the object was deleted meanwhile.
const EXPIRES: Duration = Duration::from_secs(60);

/// An informer with one's own writes laid over it. Bounded by the writes of [`EXPIRES`].
pub struct Fresh<K> {
    informer: Informer<K>,
    written: Arc<Mutex<HashMap<NamespacedName, (Instant, Arc<K>)>>>,
}

// === impl Fresh ===

impl<K> Fresh<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static,
{
    pub fn new(informer: Informer<K>) -> Self {
        let written: Arc<Mutex<HashMap<NamespacedName, (Instant, Arc<K>)>>> = Arc::default();
        let overlay = written.clone();
        informer.on_change(move |change| {
            let Some(object) = change.latest() else { return };
            let mut overlay = overlay.lock();
            let key = NamespacedName::of(object.as_ref());
            if overlay.get(&key).is_some_and(|(_, own)| change.new.is_none() || version(object) >= version(own)) {
                overlay.remove(&key);
            }
        });
        Self { informer, written }
    }

    pub fn get(&self, namespace: &str, name: &str) -> Option<Arc<K>> {
        let own = self.written.lock().get(&NamespacedName::new(namespace, name)).cloned();
        let cached = self.informer.get(namespace, name);
        match (own.filter(|(at, _)| at.elapsed() < EXPIRES), cached) {
            (Some((_, own)), Some(cached)) => Some(if version(&cached) >= version(&own) { cached } else { own }),
            (Some((_, own)), None) => Some(own),
            (None, cached) => cached,
        }
    }

    pub fn list(&self) -> Vec<Arc<K>> {
        self.over(self.informer.list(), |_| true)
    }

    pub fn list_in(&self, namespace: &str) -> Vec<Arc<K>> {
        self.over(self.informer.list_in(namespace), |key| key.namespace == namespace)
    }

    fn over(&self, cached: Vec<Arc<K>>, concerns: impl Fn(&NamespacedName) -> bool) -> Vec<Arc<K>> {
        let mut written = self.written.lock();
        written.retain(|_, (at, _)| at.elapsed() < EXPIRES);
        if written.is_empty() {
            return cached;
        }
        let mut own: HashMap<_, _> =
            written.iter().filter(|(key, _)| concerns(key)).map(|(key, (_, own))| (key.clone(), own.clone())).collect();
        drop(written);
        let mut all: Vec<Arc<K>> = cached
            .into_iter()
            .map(|object| match own.remove(&NamespacedName::of(object.as_ref())) {
                Some(own) if version(&own) > version(&object) => own,
                _ => object,
            })
            .collect();
        all.extend(own.into_values());
        all
    }

    /// What the server answered to a write.
    pub fn put(&self, object: K) -> Arc<K> {
        let object = Arc::new(object);
        self.written.lock().insert(NamespacedName::of(object.as_ref()), (Instant::now(), object.clone()));
        object
    }

    /// An object was deleted at once.
    pub fn forget(&self, namespace: &str, name: &str) {
        self.written.lock().remove(&NamespacedName::new(namespace, name));
    }

    pub fn informer(&self) -> &Informer<K> {
        &self.informer
    }
}

/// Versions of one kind grow. As `getObjVersion` of the volume binder.
fn version<K: Resource>(object: &Arc<K>) -> u64 {
    object.meta().resource_version.as_deref().and_then(|v| v.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ConfigMap;

    fn object(name: &str, version: u32) -> ConfigMap {
        let mut object = ConfigMap::default();
        object.metadata.name = Some(name.into());
        object.metadata.resource_version = Some(version.to_string());
        object
    }

    #[test]
    fn the_newer_of_the_cache_and_ones_own_writes_counts() {
        let fresh = Fresh::new(Informer::fixed([object("a", 5), object("b", 5)]));
        fresh.put(object("a", 7));
        fresh.put(object("b", 4));
        fresh.put(object("c", 6));
        let version = |name: &str| fresh.get("", name).and_then(|o| o.metadata.resource_version.clone());
        assert_eq!(["a", "b", "c", "d"].map(version), [Some("7".into()), Some("5".into()), Some("6".into()), None]);
        let mut listed: Vec<_> = fresh.list().iter().map(super::version).collect();
        listed.sort_unstable();
        assert_eq!(listed, [5, 6, 7]);
        fresh.forget("", "a");
        assert_eq!(version("a"), Some("5".into()));
    }
}
