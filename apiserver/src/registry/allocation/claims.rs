//! What a write of a Service has claimed, and how it is given back.

use super::super::Resource;
use super::super::object::text;
use super::super::strategy::Reservation;
use super::{MANAGED_BY, family_of};
use crate::storage::{Put, Store};
use apimachinery::status::StatusError;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::sync::Arc;

/// What one write has claimed; given back when dropped.
pub struct Claims {
    pub(super) store: Arc<Store>,
    pub(super) addresses: Arc<Resource>,
    /// `namespace/name` of the Service.
    pub(super) owner: String,
    /// Nothing is claimed, it is only looked at what would be.
    pub(super) dry_run: bool,
    /// IPAddresses made for this write.
    pub(super) ips: Vec<IpAddr>,
    /// Claimed ports and the revisions of their claims.
    pub(super) ports: Vec<(u16, i64)>,
    /// IPAddresses that the Service no longer needs once it is written.
    pub(super) freed: Vec<IpAddr>,
    pub(super) committed: bool,
}

pub fn port_claim(number: u16) -> String {
    format!("nodeports/{number}")
}

pub fn address_object(ip: IpAddr, owner: &str) -> Value {
    let (namespace, name) = owner.split_once('/').unwrap_or(("", owner));
    json!({
        "kind": "IPAddress", "apiVersion": "networking.k8s.io/v1",
        "metadata": {"name": ip.to_string(), "uid": uuid::Uuid::new_v4().to_string(), "generation": 1,
            "creationTimestamp": apimachinery::time::rfc3339(jiff::Timestamp::now()),
            "labels": {"ipaddress.kubernetes.io/ip-family": family_of(ip), "ipaddress.kubernetes.io/managed-by": MANAGED_BY}},
        "spec": {"parentRef": {"group": "", "resource": "services", "namespace": namespace, "name": name}},
    })
}

/// Deletes an IPAddress if it is that Service's.
pub async fn release_ip(store: &Store, addresses: &Resource, ip: IpAddr, owner: &str) {
    let name = ip.to_string();
    let found = match store.get_uncached(addresses, "", &name).await {
        Ok(Some(found)) => found,
        Ok(None) => return,
        Err(error) => return tracing::warn!(%ip, %error, "cannot release a cluster IP; the next repair will"),
    };
    let value = found.value();
    let parent = format!("{}/{}", text(&value, "/spec/parentRef/namespace"), text(&value, "/spec/parentRef/name"));
    if parent == owner
        && let Err(error) = store.delete(addresses, "", &name, found.revision).await
    {
        tracing::warn!(%ip, %error, "cannot release a cluster IP; the next repair will");
    }
}

// === impl Claims ===

impl Claims {
    /// Makes the IPAddress; false if somebody has it.
    pub(super) async fn take_ip(&mut self, ip: IpAddr) -> Result<bool, StatusError> {
        if self.dry_run {
            return Ok(true);
        }
        match self.store.create(&self.addresses, &address_object(ip, &self.owner)).await? {
            Put::Written(_) => {
                self.ips.push(ip);
                Ok(true)
            }
            Put::Conflict(_) => Ok(false),
        }
    }
}

impl Reservation for Claims {
    fn commit(mut self: Box<Self>) {
        self.committed = true;
    }
}

impl Drop for Claims {
    /// Port claims have done their work either way; of the IPAddresses those go that nobody needs.
    fn drop(&mut self) {
        let ips = std::mem::take(if self.committed { &mut self.freed } else { &mut self.ips });
        let ports = std::mem::take(&mut self.ports);
        if self.dry_run || (ips.is_empty() && ports.is_empty()) {
            return;
        }
        let (store, addresses, owner) = (self.store.clone(), self.addresses.clone(), self.owner.clone());
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            for (number, revision) in ports {
                if let Err(error) = store.unclaim(&port_claim(number), revision).await {
                    tracing::warn!(port = number, %error, "cannot give back the claim of a node port; it will lapse");
                }
            }
            for ip in ips {
                release_ip(&store, &addresses, ip, &owner).await;
            }
        });
    }
}
