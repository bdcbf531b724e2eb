//! Where Services and IPAddresses disagree, and what puts them right. Pure: a plan from what there is. As
//! `RepairIPAddress` and the repair of node ports.

use super::index::Used;
use super::{family_of, is_managed};
use crate::registry::object::text;
use serde_json::{Value, json};
use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;

/// An IPAddress this young may belong to a Service that is being written.
const GRACE_SECONDS: i64 = 60;

/// An IPAddress as it is stored.
pub(super) struct Address {
    pub(super) name: String,
    pub(super) revision: i64,
    pub(super) value: Value,
}

/// What is wrong, for people to read.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Notice {
    /// `namespace/name` of the Service that it is about.
    pub(super) service: String,
    pub(super) reason: &'static str,
    pub(super) action: &'static str,
    pub(super) note: String,
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Repair {
    /// A Service has an address without an IPAddress.
    Create(IpAddr, String, Notice),
    /// An IPAddress that has been tampered with, by name and revision: it is made anew.
    Renew(String, i64, String, Notice),
    /// Nobody has this one any more.
    Delete(String, i64, Notice),
    /// Only people can help.
    Tell(Notice),
}

/// `contains` says whether an address lies in any ServiceCIDR.
pub(super) fn plan(
    services: &[(&Arc<str>, &Used)],
    addresses: &[Address],
    contains: impl Fn(IpAddr) -> bool,
    node_ports: &RangeInclusive<u16>,
    now_seconds: i64,
) -> Vec<Repair> {
    let by_name: HashMap<&str, &Address> = addresses.iter().map(|address| (address.name.as_str(), address)).collect();
    let used: HashMap<&str, &Used> = services.iter().map(|(key, used)| (&***key, *used)).collect();
    let mut repairs = Vec::new();
    let mut ports: HashMap<u16, &str> = HashMap::new();
    for &(key, own) in services {
        for ip in &own.ips {
            let address = by_name.get(ip.to_string().as_str()).copied();
            repairs.extend(of_service(key, *ip, address, &contains, &used));
        }
        for port in &own.ports {
            let notice = |reason, note| {
                let service = key.to_string();
                Repair::Tell(Notice { service, reason, action: "PortAllocation", note })
            };
            if !node_ports.contains(port) {
                let range = format!("{}-{}", node_ports.start(), node_ports.end());
                let note = format!("Port {port} is not within the port range {range}; please recreate service");
                repairs.push(notice("PortOutOfRange", note));
            } else if ports.insert(*port, key).is_some_and(|other| other != &**key) {
                let note = format!("Port {port} was assigned to multiple services; please recreate service");
                repairs.push(notice("PortAlreadyAllocated", note));
            }
        }
    }
    for address in addresses.iter().filter(|address| is_managed(&address.value)) {
        repairs.extend(of_address(address, &used, now_seconds));
    }
    repairs
}

/// `namespace/name` of the Service that an IPAddress says to belong to; None if it is none.
fn parent(address: &Value) -> Option<String> {
    let part = |field: &str| text(address, &format!("/spec/parentRef/{field}"));
    (part("group").is_empty() && part("resource") == "services")
        .then(|| format!("{}/{}", part("namespace"), part("name")))
}

fn of_service(
    key: &str,
    ip: IpAddr,
    address: Option<&Address>,
    contains: &impl Fn(IpAddr) -> bool,
    used: &HashMap<&str, &Used>,
) -> Option<Repair> {
    let family = family_of(ip);
    let notice = |reason, note| Notice { service: key.to_owned(), reason, action: "ClusterIPAllocation", note };
    if !contains(ip) {
        let note =
            format!("Cluster IP [{family}]: {ip} is not within any configured Service CIDR; please recreate service");
        return Some(Repair::Tell(notice("ClusterIPOutOfRange", note)));
    }
    let Some(address) = address else {
        let note = format!("Cluster IP [{family}]: {ip} is not allocated; repairing");
        return Some(Repair::Create(ip, key.to_owned(), notice("ClusterIPNotAllocated", note)));
    };
    let owner = parent(&address.value);
    if owner.as_deref() != Some(key) {
        let others = owner.and_then(|owner| used.get(owner.as_str())).is_some_and(|used| used.ips.contains(&ip));
        if others {
            let note = format!("Cluster IP [{family}]:{ip} was assigned to multiple services; please recreate service");
            return Some(Repair::Tell(notice("ClusterIPAlreadyAllocated", note)));
        }
    } else if is_managed(&address.value) && label(&address.value, "ip-family") == family {
        return None;
    }
    let note = format!("the ClusterIP [{family}]: {ip} for Service {key} has a wrong reference; repairing");
    let (name, revision) = (address.name.clone(), address.revision);
    Some(Repair::Renew(name, revision, key.to_owned(), notice("ClusterIPNotAllocated", note)))
}

fn of_address(address: &Address, used: &HashMap<&str, &Used>, now_seconds: i64) -> Option<Repair> {
    let (name, revision) = (address.name.clone(), address.revision);
    let delete = |service: String, reason, note| {
        Some(Repair::Delete(name.clone(), revision, Notice { service, reason, action: "IPAddressAllocation", note }))
    };
    let Some(owner) = parent(&address.value) else {
        let note = format!("IPAddress {name} appears to have been modified, not referencing a Service: cleaning up");
        return delete(String::new(), "IPAddressNotAllocated", note);
    };
    match used.get(owner.as_str()) {
        Some(used) if used.ips.iter().any(|ip| ip.to_string() == name) => None,
        Some(_) => {
            let note = format!("IPAddress: {name} for Service {owner} has a wrong reference; cleaning up");
            old_enough(address, now_seconds).then(|| delete(owner, "IPAddressWrongReference", note))?
        }
        None => {
            let note = format!("IPAddress: {name} for Service {owner} appears to have leaked: cleaning up");
            old_enough(address, now_seconds).then(|| delete(owner, "IPAddressNotAllocated", note))?
        }
    }
}

fn old_enough(address: &Address, now_seconds: i64) -> bool {
    let made = text(&address.value, "/metadata/creationTimestamp").parse::<jiff::Timestamp>();
    made.is_ok_and(|made| now_seconds - made.as_second() > GRACE_SECONDS)
}

fn label<'v>(address: &'v Value, name: &str) -> &'v str {
    let labels = address.pointer("/metadata/labels");
    labels.and_then(|labels| labels.get(format!("ipaddress.kubernetes.io/{name}"))?.as_str()).unwrap_or("")
}

/// The Event that tells it. Told again it has the same name, so that there is one.
pub(super) fn event(notice: &Notice, now: &str) -> Option<Value> {
    let (namespace, name) = notice.service.split_once('/')?;
    let mark = notice
        .note
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, b| (hash ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    Some(json!({
        "kind": "Event", "apiVersion": "v1",
        "metadata": {"name": format!("{name}.{mark:x}"), "namespace": namespace, "creationTimestamp": now,
            "uid": uuid::Uuid::new_v4().to_string()},
        "involvedObject": {"kind": "Service", "apiVersion": "v1", "namespace": namespace, "name": name},
        "type": "Warning", "reason": notice.reason, "action": notice.action, "message": notice.note,
        "eventTime": now.replace('Z', ".000000Z"), "source": {}, "firstTimestamp": null, "lastTimestamp": null,
        "reportingComponent": "ipallocator-repair-controller", "reportingInstance": "ipallocator-repair-controller",
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(name: &str, owner: &str, created: &str) -> Address {
        let mut value = super::super::claims::address_object(name.parse().unwrap(), owner);
        value["metadata"]["creationTimestamp"] = json!(created);
        Address { name: name.to_owned(), revision: 7, value }
    }

    #[test]
    fn services_and_addresses_are_brought_to_agree() {
        const OLD: &str = "2024-01-01T00:00:00Z";
        const YOUNG: &str = "2024-01-01T00:59:30Z";
        let now = "2024-01-01T01:00:00Z".parse::<jiff::Timestamp>().unwrap().as_second();
        let of = |ips: &[&str], ports: &[u16]| Used {
            ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
            ports: ports.to_vec(),
        };
        let services: Vec<(Arc<str>, Used)> = vec![
            ("n/fine".into(), of(&["10.0.0.1"], &[30000])),
            ("n/lost".into(), of(&["10.0.0.2"], &[])),
            ("n/outside".into(), of(&["10.1.0.1"], &[80])),
            ("n/twice".into(), of(&["10.0.0.1"], &[30000])),
            ("n/taken".into(), of(&["10.0.0.5"], &[])),
        ];
        let addresses = [
            address("10.0.0.1", "n/fine", OLD),
            address("10.0.0.3", "n/gone", OLD),
            address("10.0.0.4", "n/coming", YOUNG),
            address("10.0.0.5", "n/nobody", YOUNG),
            address("10.0.0.6", "n/fine", OLD),
        ];
        let inside = |ip: IpAddr| ip.to_string().starts_with("10.0.0.");
        let services: Vec<(&Arc<str>, &Used)> = services.iter().map(|(key, used)| (key, used)).collect();
        let found = plan(&services, &addresses, inside, &(30000..=32767), now);
        let short: Vec<String> = found
            .iter()
            .map(|repair| match repair {
                Repair::Create(ip, owner, notice) => format!("create {ip} {owner} {}", notice.reason),
                Repair::Renew(name, _, owner, notice) => format!("renew {name} {owner} {}", notice.reason),
                Repair::Delete(name, _, notice) => format!("delete {name} {}", notice.reason),
                Repair::Tell(notice) => format!("tell {} {}", notice.service, notice.reason),
            })
            .collect();
        assert_eq!(
            short,
            [
                "create 10.0.0.2 n/lost ClusterIPNotAllocated",
                "tell n/outside ClusterIPOutOfRange",
                "tell n/outside PortOutOfRange",
                "tell n/twice ClusterIPAlreadyAllocated",
                "tell n/twice PortAlreadyAllocated",
                "renew 10.0.0.5 n/taken ClusterIPNotAllocated",
                "delete 10.0.0.3 IPAddressNotAllocated",
                "delete 10.0.0.6 IPAddressWrongReference",
            ]
        );
    }
}
