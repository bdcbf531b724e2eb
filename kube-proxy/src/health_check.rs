//! Health-check node ports: where a load balancer asks whether this node has endpoints of a Service whose external traffic
//! stays on the node.
use crate::link;
use crate::world::Ports;
use apimachinery::meta::NamespacedName;
use component_base::cidr::Cidr;
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
    /// Where node ports are served (none: everywhere).
    ranges: Vec<Cidr>,
    counts: Counts,
    /// Whether the rules are as they should be.
    pub proxy_healthy: Arc<AtomicBool>,
}

/// How many ready endpoints of the Service are on this node, by the ports of all families: one that ends still serves what
/// comes, but no more shall come. As `LocalReadyEndpoints`.
pub fn count<'a>(service: &NamespacedName, families: impl Iterator<Item = &'a Ports>) -> usize {
    let ports = families.filter_map(|ports| ports.get(service)).flat_map(|ports| ports.iter());
    let ready = ports.filter(|port| port.local_ready);
    let addresses: BTreeSet<IpAddr> = ready.flat_map(|port| port.local_endpoints.iter().map(|e| e.ip)).collect();
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

    /// Listens for the Services that want it, and for no other; at the node's addresses in these ranges (none: at all).
    pub async fn listen(&mut self, ranges: &[Cidr]) {
        if self.ranges != ranges {
            self.end();
            self.ranges = ranges.to_vec();
        }
        let wanted = &self.wanted;
        self.listening.retain(|key, (port, ending)| {
            let kept = wanted.get(key) == Some(port);
            if !kept {
                ending.cancel();
            }
            kept
        });
        let missing: Vec<_> = wanted.iter().filter(|(key, _)| !self.listening.contains_key(*key)).collect();
        if missing.is_empty() {
            return;
        }
        let addresses = addresses(&self.ranges).await;
        for (key, port) in missing {
            let (key, port) = (key.clone(), *port);
            let listeners = match bind(&addresses, port).await {
                Ok(listeners) => listeners,
                Err(error) => {
                    warn!(service = %key, port, %error, "cannot listen on the health-check node port; load balancers pass this node over");
                    continue;
                }
            };
            info!(service = %key, port, "health-check node port opened");
            let ending = CancellationToken::new();
            for listener in listeners {
                let (counts, healthy, name) = (self.counts.clone(), self.proxy_healthy.clone(), key.clone());
                let listening = Listening { tls: None, max_connections: MAX_CONNECTIONS };
                tokio::spawn(serving::serve(listener, listening, ending.clone(), move |_: Request| {
                    let local = counts.read().get(&name).copied().unwrap_or(0);
                    let response = answer(&name, local, healthy.load(Ordering::Relaxed));
                    async move { response }
                }));
            }
            self.listening.insert(key, (port, ending));
        }
    }

    fn end(&mut self) {
        self.listening.values().for_each(|(_, ending)| ending.cancel());
        self.listening.clear();
    }
}

/// The node's addresses in these ranges. None: all, for want of ranges or of a look at the addresses.
async fn addresses(ranges: &[Cidr]) -> Vec<IpAddr> {
    let mut found = Vec::new();
    for ipv6 in [false, true] {
        if ranges.iter().any(|range| range.is_ipv6() == ipv6) {
            match link::node_addresses("", ipv6).await {
                Ok(all) => found.extend(all.into_iter().filter(|ip| ranges.iter().any(|range| range.contains(*ip)))),
                Err(error) => warn!(%error, "addresses of this node not known: health checks are answered at all"),
            }
        }
    }
    found
}

/// At each of these addresses; none: at any, of both families where there are two.
async fn bind(addresses: &[IpAddr], port: u16) -> std::io::Result<Vec<TcpListener>> {
    let mut listeners = Vec::new();
    for address in addresses {
        listeners.push(TcpListener::bind((*address, port)).await?);
    }
    if addresses.is_empty() {
        listeners.push(match TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).await {
            Ok(listener) => listener,
            Err(_) => TcpListener::bind(SocketAddr::from(([0; 4], port))).await?,
        });
    }
    Ok(listeners)
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
        self.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::tests::gallery;

    #[test]
    fn endpoints_on_this_node_are_counted_once() {
        let mut ports = Ports::new();
        for port in gallery() {
            let service = NamespacedName::new(&port.id.namespace, &port.id.name);
            ports.insert(service, [port].into());
        }
        let mut ending = gallery().into_iter().find(|port| port.id.name == "c-local").unwrap();
        (ending.id.name, ending.local_ready) = ("ending".into(), false);
        ports.insert(NamespacedName::new("ns", "ending"), [ending].into());
        for (name, expected) in [("c-local", 1), ("f-elsewhere", 0), ("none", 0), ("ending", 0)] {
            assert_eq!(count(&NamespacedName::new("ns", name), [&ports, &ports].into_iter()), expected, "{name}");
        }
    }

    #[tokio::test]
    async fn node_ports_are_at_the_addresses_that_have_them() {
        let loopback = addresses(&["127.0.0.0/8".parse().unwrap(), "198.51.100.0/24".parse().unwrap()]).await;
        assert_eq!(loopback, [IpAddr::from([127, 0, 0, 1])]);
        let [one] = bind(&loopback, 0).await.unwrap().try_into().unwrap();
        assert!(one.local_addr().unwrap().ip().is_loopback());
        let [any] = bind(&[], 0).await.unwrap().try_into().unwrap();
        assert!(any.local_addr().unwrap().ip().is_unspecified());
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
