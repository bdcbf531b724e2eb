//! Health-check node ports: where a load balancer asks whether this node has endpoints of a Service whose external traffic
//! stays on the node.
use crate::world::Ports;
use apimachinery::meta::NamespacedName;
use component_base::serving::{self, Listening, Request, Response};
use http::{HeaderValue, StatusCode};
use parking_lot::RwLock;
use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv6Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

const MAX_CONNECTIONS: usize = 64;

/// How many endpoints of each Service are here.
type Counts = Arc<RwLock<BTreeMap<NamespacedName, usize>>>;

/// The listeners, one a Service.
#[derive(Default)]
pub struct HealthChecks {
    /// Services that want one, with its port.
    wanted: BTreeMap<NamespacedName, u16>,
    listening: BTreeMap<NamespacedName, (u16, CancellationToken)>,
    counts: Counts,
    /// Whether the rules are as they should be.
    pub proxy_healthy: Arc<AtomicBool>,
}

/// How many endpoints of the Service are on this node, by the ports of all families.
pub fn count<'a>(service: &NamespacedName, families: impl Iterator<Item = &'a Ports>) -> usize {
    let ports = families.flat_map(|ports| crate::world::of_service(ports, service));
    let addresses: BTreeSet<IpAddr> = ports.flat_map(|(_, port)| port.local_endpoints.iter().map(|e| e.ip)).collect();
    addresses.len()
}

impl HealthChecks {
    /// One of the Services has changed; `port` is none where none is wanted any more.
    pub fn set<'a>(&mut self, service: &NamespacedName, port: Option<u16>, families: impl Iterator<Item = &'a Ports>) {
        let Some(port) = port else {
            self.wanted.remove(service);
            self.counts.write().remove(service);
            return;
        };
        self.wanted.insert(service.clone(), port);
        self.counts.write().insert(service.clone(), count(service, families));
    }

    /// Listens for the Services that want it, and for no other.
    pub async fn listen(&mut self) {
        let wanted = &self.wanted;
        self.listening.retain(|key, (port, ending)| {
            let kept = wanted.get(key) == Some(port);
            if !kept {
                ending.cancel();
            }
            kept
        });
        for (key, port) in wanted {
            let (key, port) = (key.clone(), *port);
            if self.listening.contains_key(&key) {
                continue;
            }
            let listener = match TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, port))).await {
                Ok(listener) => listener,
                Err(_) => match TcpListener::bind(SocketAddr::from(([0; 4], port))).await {
                    Ok(listener) => listener,
                    Err(error) => {
                        warn!(service = %key, port, %error, "cannot listen on the health-check node port; load balancers pass this node over");
                        continue;
                    }
                },
            };
            info!(service = %key, port, "health-check node port opened");
            let ending = CancellationToken::new();
            let (counts, healthy, name) = (self.counts.clone(), self.proxy_healthy.clone(), key.clone());
            let listening = Listening { tls: None, max_connections: MAX_CONNECTIONS };
            tokio::spawn(serving::serve(listener, listening, ending.clone(), move |_: Request| {
                let local = counts.read().get(&name).copied().unwrap_or(0);
                let response = answer(&name, local, healthy.load(Ordering::Relaxed));
                async move { response }
            }));
            self.listening.insert(key, (port, ending));
        }
    }
}

fn answer(service: &NamespacedName, local: usize, healthy: bool) -> Response {
    let code = if local > 0 && healthy { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    let body = serde_json::json!({
        "service": {"namespace": service.namespace, "name": service.name},
        "localEndpoints": local,
        "serviceProxyHealthy": healthy,
    });
    let mut response = serving::respond(code, "application/json", body.to_string());
    response.headers_mut().insert("X-Content-Type-Options", HeaderValue::from_static("nosniff"));
    response.headers_mut().insert("X-Load-Balancing-Endpoint-Weight", HeaderValue::from(local));
    response
}

impl Drop for HealthChecks {
    fn drop(&mut self) {
        self.listening.values().for_each(|(_, ending)| ending.cancel());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::gallery;

    #[test]
    fn endpoints_on_this_node_are_counted_once() {
        let ports: Ports = gallery().into_iter().map(|port| (port.id.clone(), Arc::new(port))).collect();
        for (name, expected) in [("c-local", 1), ("f-elsewhere", 0), ("none", 0)] {
            assert_eq!(count(&NamespacedName::new("ns", name), [&ports, &ports].into_iter()), expected, "{name}");
        }
    }

    #[test]
    fn a_node_without_endpoints_or_rules_is_passed_over() {
        let key = NamespacedName::new("ns", "web");
        for (local, healthy, code) in [(2, true, 200), (0, true, 503), (2, false, 503)] {
            let response = answer(&key, local, healthy);
            assert_eq!(response.status(), code);
            assert_eq!(response.headers()["X-Load-Balancing-Endpoint-Weight"], local.to_string());
        }
    }
}
