//! What Services use of addresses and ports: from an apiserver's cache, kept up by parsing only those that changed.

use crate::registry::Resource;
use crate::registry::object::{int, list, text};
use crate::storage::Store;
use serde_json::Value;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;

#[derive(Default)]
pub(super) struct Index {
    /// As of when.
    revision: i64,
    services: HashMap<Arc<str>, (i64, Used)>,
    ips: HashMap<IpAddr, usize>,
    ports: HashMap<u16, Vec<Arc<str>>>,
}

/// What one Service uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) ips: Vec<IpAddr>,
    pub(super) ports: Vec<u16>,
}

/// What a Service says that it has.
pub(super) fn used(service: &Value) -> Used {
    let port = |number: Option<i64>| number.and_then(|n| u16::try_from(n).ok()).filter(|n| *n != 0);
    let mut ports: Vec<u16> = Vec::new();
    if matches!(text(service, "/spec/type"), "NodePort" | "LoadBalancer") {
        ports.extend(list(service, "/spec/ports").iter().filter_map(|p| port(int(p, "/nodePort"))));
        ports.extend(port(int(service, "/spec/healthCheckNodePort")));
    }
    let ips = list(service, "/spec/clusterIPs").iter().filter_map(|ip| ip.as_str()?.parse().ok()).collect();
    Used { ips, ports }
}

// === impl Index ===

impl Index {
    pub(super) fn has_ip(&self, ip: &IpAddr) -> bool {
        self.ips.contains_key(ip)
    }

    /// Does any Service but this one use the port?
    pub(super) fn has_port(&self, number: u16, except: &str) -> bool {
        self.ports.get(&number).is_some_and(|owners| owners.iter().any(|owner| &**owner != except))
    }

    /// Services by their `namespace/name`.
    pub(super) fn services(&self) -> impl Iterator<Item = (&Arc<str>, &Used)> {
        self.services.iter().map(|(key, (_, used))| (key, used))
    }

    pub(super) fn refresh(&mut self, store: &Store, services: &Resource) {
        let Ok(cache) = store.cache(services) else { return };
        let snapshot = cache.snapshot();
        if snapshot.revision == self.revision && snapshot.objects.len() == self.services.len() {
            return;
        }
        self.revision = snapshot.revision;
        for (key, object) in &snapshot.objects {
            if self.services.get(key).is_none_or(|(revision, _)| *revision != object.revision) {
                self.remove(key);
                self.insert(key.clone(), object.revision, used(&object.value()));
            }
        }
        if self.services.len() > snapshot.objects.len() {
            let gone = |key: &&Arc<str>| !snapshot.objects.contains_key(*key);
            let gone: Vec<Arc<str>> = self.services.keys().filter(gone).cloned().collect();
            gone.iter().for_each(|key| self.remove(key));
        }
    }

    fn insert(&mut self, key: Arc<str>, revision: i64, used: Used) {
        for ip in &used.ips {
            *self.ips.entry(*ip).or_default() += 1;
        }
        for port in &used.ports {
            self.ports.entry(*port).or_default().push(key.clone());
        }
        self.services.insert(key, (revision, used));
    }

    fn remove(&mut self, key: &Arc<str>) {
        let Some((_, used)) = self.services.remove(key) else { return };
        for ip in used.ips {
            if let Some(count) = self.ips.get_mut(&ip) {
                *count -= 1;
                if *count == 0 {
                    self.ips.remove(&ip);
                }
            }
        }
        for port in used.ports {
            if let Some(owners) = self.ports.get_mut(&port) {
                owners.retain(|owner| owner != key);
                if owners.is_empty() {
                    self.ports.remove(&port);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_a_service_uses() {
        let service = json!({"spec": {"type": "LoadBalancer", "clusterIPs": ["10.0.0.5"],
            "ports": [{"nodePort": 30001}, {"port": 1}], "healthCheckNodePort": 30002}});
        assert_eq!(used(&service), Used { ips: vec!["10.0.0.5".parse().unwrap()], ports: vec![30001, 30002] });
        assert_eq!(used(&json!({"spec": {"clusterIPs": ["None"]}})), Used::default());
    }

    #[test]
    fn the_index_knows_who_has_what_and_forgets() {
        let mut index = Index::default();
        let (a, b): (Arc<str>, Arc<str>) = ("n/a".into(), "n/b".into());
        let ip: IpAddr = "10.0.0.5".parse().unwrap();
        let both = Used { ips: vec![ip], ports: vec![30001] };
        index.insert(a.clone(), 1, both.clone());
        index.insert(b.clone(), 2, both);
        index.remove(&a);
        assert!(index.has_ip(&ip) && index.has_port(30001, "n/a") && !index.has_port(30001, "n/b"));
        index.remove(&b);
        assert!(!index.has_ip(&ip) && !index.has_port(30001, "") && index.ports.is_empty());
    }
}
