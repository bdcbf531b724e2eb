//! Connection tracking remembers where the packets of a UDP flow went. When an endpoint goes, or a Service that had none
//! gets its first, flows that are remembered wrongly must be forgotten, or their packets go nowhere.
use crate::model::{Protocol, ServicePort};
use std::{collections::BTreeMap, net::IpAddr, time::Duration};
use tokio::process::Command;
use tracing::{debug, warn};

const TIMEOUT: Duration = Duration::from_secs(10);

/// Flows to forget: to this address, and if `endpoint` is given only those that went there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stale {
    pub address: IpAddr,
    pub endpoint: Option<IpAddr>,
}

/// What became stale from one model to the next.
pub fn stale(old: &[ServicePort], new: &[ServicePort]) -> Vec<Stale> {
    let udp = |ports: &'_ [ServicePort]| -> BTreeMap<_, _> {
        ports.iter().filter(|p| p.id.protocol == Protocol::Udp).map(|p| (p.id.clone(), p.clone())).collect()
    };
    let (old, new) = (udp(old), udp(new));
    let mut found = Vec::new();
    for (id, former) in &old {
        let now = new.get(id).map(ServicePort::endpoints).unwrap_or_default();
        for endpoint in former.endpoints().difference(&now) {
            for address in addresses(former) {
                found.push(Stale { address, endpoint: Some(endpoint.ip) });
            }
        }
    }
    for (id, port) in &new {
        let was_dead = old.get(id).is_none_or(ServicePort::is_dead);
        if was_dead && !port.is_dead() {
            found.extend(addresses(port).into_iter().map(|address| Stale { address, endpoint: None }));
        }
    }
    found
}

fn addresses(port: &ServicePort) -> Vec<IpAddr> {
    std::iter::once(port.cluster_ip).chain(port.external_ips.iter().copied()).collect()
}

/// Forgets them, one after another. Failing leaves flows to run out by themselves.
pub async fn forget(stale: &[Stale]) {
    for flow in stale {
        let mut command = Command::new("conntrack");
        command.args(["-D", "-p", "udp", "--orig-dst", &flow.address.to_string()]).kill_on_drop(true);
        if let Some(endpoint) = flow.endpoint {
            command.args(["--dst-nat", &endpoint.to_string()]);
        }
        match tokio::time::timeout(TIMEOUT, command.output()).await {
            // conntrack exits with 1 when there was nothing to delete.
            Ok(Ok(output)) => debug!(?flow, code = output.status.code(), "stale flows forgotten"),
            Ok(Err(error)) => warn!(?flow, %error, "cannot run conntrack; stale UDP flows run out by themselves"),
            Err(_) => warn!(?flow, "conntrack did not end; stale UDP flows run out by themselves"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Endpoint, PortId};

    fn dns(endpoints: &[&str]) -> ServicePort {
        ServicePort {
            id: PortId {
                namespace: "kube-system".into(),
                name: "dns".into(),
                protocol: Protocol::Udp,
                port_name: String::new(),
            },
            cluster_ip: "10.96.0.10".parse().unwrap(),
            port: 53,
            node_port: 0,
            external_ips: Vec::new(),
            affinity_seconds: None,
            cluster_endpoints: endpoints
                .iter()
                .map(|ip| Endpoint { ip: ip.parse().unwrap(), port: 53, local: false })
                .collect(),
            external_local_endpoints: None,
        }
    }

    #[test]
    fn flows_to_a_lost_endpoint_and_to_a_service_that_was_dead_are_stale() {
        let address: IpAddr = "10.96.0.10".parse().unwrap();
        let to = |ip: &str| Stale { address, endpoint: Some(ip.parse().unwrap()) };
        for (old, new, expected) in [
            (vec![], vec![], vec![]),
            (vec![dns(&["1.1.1.1"])], vec![dns(&["1.1.1.1", "2.2.2.2"])], vec![]),
            (vec![dns(&["1.1.1.1", "2.2.2.2"])], vec![dns(&["2.2.2.2"])], vec![to("1.1.1.1")]),
            (vec![dns(&["1.1.1.1"])], vec![], vec![to("1.1.1.1")]),
            (vec![dns(&[])], vec![dns(&["1.1.1.1"])], vec![Stale { address, endpoint: None }]),
        ] {
            assert_eq!(stale(&old, &new), expected);
        }
    }
}
