//! Cluster IPs and node ports: given out without double use by any number of apiservers, and without leak.
//!
//! What is in use is what stored Services say; every apiserver has them in its cache (`index.rs`). A cluster IP in use has an
//! IPAddress object as well, made by compare-and-swap before the Service is written: only one writer can have made it. A node
//! port is claimed by a key of its own for as long as the write takes. Whoever gets a claim first looks at the Services as of
//! that claim's revision: whatever was written under an earlier claim is among them. A claim that outlives its writer's death
//! lapses with its lease; IPAddresses without a Service, and Services without theirs, are put right now and then (`repair.rs`).
//!
//! Addresses come from the ServiceCIDRs that are there and ready; the one called `kubernetes` says what the command line said.

mod cidr;
mod claims;
mod families;
mod index;
mod repair;

use super::Resource;
use super::core::service::{HEADLESS, has_node_ports};
use super::core::service_validation::needs_health_check;
use super::object::{child, int, items_mut, list, set, text};
use super::strategy::{HookContext, Plain, Reservation, Strategy};
use crate::storage::Store;
use apimachinery::facts;
use apimachinery::status::{FieldError, StatusError};
use cidr::Cidr;
use claims::{Claims, address_object, port_claim, release_ip};
use index::{Index, used};
use parking_lot::Mutex;
use rand::RngExt as _;
use repair::{Address, Notice, Repair};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Random picks before the range is gone through in order.
const RANDOM_ATTEMPTS: usize = 32;
/// Addresses looked at in order, at most: no cluster has more Services.
const IN_ORDER_MAX: usize = 1 << 16;
/// A claim of a node port lapses after this if its writer dies.
const CLAIM_SECONDS: i64 = 120;
/// How often IPAddresses are compared with Services.
const REPAIR_INTERVAL: Duration = Duration::from_secs(180);
/// How long what was found wrong is told.
const EVENT_SECONDS: i64 = 3600;
const MANAGED_BY: &str = "ipallocator.k8s.io";
const DEFAULT_CIDR: &str = "kubernetes";

/// Gives out cluster IPs and node ports.
pub struct Allocator {
    /// Of the command line; the primary family's range first.
    ranges: Vec<Cidr>,
    node_ports: RangeInclusive<u16>,
    index: Mutex<Index>,
    services: Arc<Resource>,
    addresses: Arc<Resource>,
    cidrs: Arc<Resource>,
    events: Arc<Resource>,
}

/// Events that go by themselves.
struct Passing;

impl Strategy for Passing {
    fn time_to_live(&self, _object: &Value) -> Option<i64> {
        Some(EVENT_SECONDS)
    }
}

/// Why an address or a port that was asked for is not given.
enum Refusal {
    Invalid(String),
    Failed(StatusError),
}

impl From<StatusError> for Refusal {
    fn from(error: StatusError) -> Self {
        Refusal::Failed(error)
    }
}

// === impl Allocator ===

impl Allocator {
    /// From `--service-cluster-ip-range` and `--service-node-port-range`.
    pub fn new(ranges: &[String], node_ports: &str) -> Result<Allocator, String> {
        let ranges = ranges.iter().map(|text| Cidr::parse(text)).collect::<Result<Vec<_>, _>>()?;
        match ranges.as_slice() {
            [_] => {}
            [first, second] if first.family() != second.family() => {}
            _ => return Err("--service-cluster-ip-range takes one range, or one for each IP family".to_owned()),
        }
        let resource = |group, version, plural, strategy: Arc<dyn Strategy>| {
            let facts = facts::resource(group, version, plural).ok_or_else(|| format!("no facts of {plural}"))?;
            Ok::<_, String>(Arc::new(Resource::of(facts, strategy)))
        };
        Ok(Allocator {
            ranges,
            node_ports: parse_ports(node_ports)?,
            index: Mutex::default(),
            services: resource("", "v1", "services", Arc::new(Plain))?,
            addresses: resource("networking.k8s.io", "v1", "ipaddresses", Arc::new(Plain))?,
            cidrs: resource("networking.k8s.io", "v1", "servicecidrs", Arc::new(Plain))?,
            events: resource("", "v1", "events", Arc::new(Passing))?,
        })
    }

    /// The first address of the primary range: that of the `kubernetes` Service.
    pub fn first_address(&self) -> IpAddr {
        self.ranges[0].at(1)
    }

    /// Reserves what a new or changed Service needs and writes it into the object.
    pub async fn reserve(
        &self,
        context: HookContext<'_>,
        new: &mut Value,
        old: Option<&Value>,
    ) -> Result<Option<Box<dyn Reservation>>, StatusError> {
        let configured: Vec<&str> = self.ranges.iter().map(Cidr::family).collect();
        let name = text(new, "/metadata/name").to_owned();
        families::settle(new, old, &configured)
            .map_err(|errors| StatusError::invalid("", "Service", &name, &errors))?;
        let mut claims = Claims {
            store: context.store.clone(),
            addresses: self.addresses.clone(),
            owner: cache_key(new),
            dry_run: context.dry_run,
            ips: Vec::new(),
            ports: Vec::new(),
            freed: Vec::new(),
            committed: false,
        };
        self.reserve_ips(&mut claims, new, old).await?;
        self.reserve_ports(&mut claims, new, old).await?;
        Ok(Some(Box::new(claims)))
    }

    /// Gives back what a Service had that is gone.
    pub async fn release(&self, context: HookContext<'_>, old: &Value) {
        if !context.dry_run {
            for ip in used(old).ips {
                release_ip(context.store, &self.addresses, ip, &cache_key(old)).await;
            }
        }
    }

    // === addresses ===

    async fn reserve_ips(&self, claims: &mut Claims, new: &mut Value, old: Option<&Value>) -> Result<(), StatusError> {
        let had = old.map(used).unwrap_or_default().ips;
        if text(new, "/spec/type") == "ExternalName" {
            claims.freed = had;
            return Ok(());
        }
        let strings = |pointer: &str| -> Vec<String> {
            list(new, pointer).iter().filter_map(|value| value.as_str().map(Into::into)).collect()
        };
        let (given, families) = (strings("/spec/clusterIPs"), strings("/spec/ipFamilies"));
        if given.first().is_some_and(|ip| ip == HEADLESS) {
            return Ok(());
        }
        let name = text(new, "/metadata/name").to_owned();
        let mut ips = Vec::new();
        for (at, family) in families.iter().enumerate() {
            let asked = given.get(at).and_then(|ip| ip.parse::<IpAddr>().ok());
            let ip = match asked {
                Some(ip) if had.contains(&ip) => ip,
                Some(ip) => match self.this_ip(claims, ip).await {
                    Ok(()) => ip,
                    Err(Refusal::Failed(error)) => return Err(error),
                    Err(Refusal::Invalid(why)) => {
                        let why = format!("failed to allocate IP {ip}: {why}");
                        let error = FieldError::invalid("spec.clusterIPs", given.clone(), why);
                        return Err(StatusError::invalid("", "Service", &name, &[error]));
                    }
                },
                None => self.any_ip(claims, family).await?,
            };
            ips.push(ip);
        }
        claims.freed = had.into_iter().filter(|ip| !ips.contains(ip)).collect();
        let texts: Vec<String> = ips.iter().map(ToString::to_string).collect();
        if let Some(first) = texts.first() {
            let spec = child(new, "spec");
            set(spec, "clusterIP", first.as_str());
            set(spec, "clusterIPs", texts);
        }
        Ok(())
    }

    async fn this_ip(&self, claims: &mut Claims, ip: IpAddr) -> Result<(), Refusal> {
        let ranges = self.ready_ranges(&claims.store);
        let Some(range) = ranges.iter().find(|range| range.covers(ip)) else {
            return Err(Refusal::Invalid("the provided network does not match the current range".to_owned()));
        };
        if !range.contains(ip) {
            return Err(Refusal::Invalid(format!(
                "the provided IP ({ip}) is not in the valid range. The range of valid IPs is {range}"
            )));
        }
        if self.is_ip_used(&claims.store, ip) || !claims.take_ip(ip).await? {
            return Err(Refusal::Invalid("provided IP is already allocated".to_owned()));
        }
        Ok(())
    }

    /// A free address: at random from the upper part of a range, since people choose from the lower.
    async fn any_ip(&self, claims: &mut Claims, family: &str) -> Result<IpAddr, StatusError> {
        // The first address of the command line's ranges is for the `kubernetes` Service.
        let ours = self.first_address();
        for range in self.ready_ranges(&claims.store).iter().filter(|range| range.family() == family) {
            let size = range.usable();
            let low = static_band(range.size(), 16, 16, 256);
            let random = (0..RANDOM_ATTEMPTS).map(|_| rand::rng().random_range(low + 1..=size));
            for offset in random.chain(low + 1..=size).chain(1..=low).take(IN_ORDER_MAX) {
                let ip = range.at(offset);
                if ip != ours && !self.is_ip_used(&claims.store, ip) && claims.take_ip(ip).await? {
                    return Ok(ip);
                }
            }
        }
        Err(StatusError::internal("failed to allocate a serviceIP: range is full"))
    }

    /// Of the ServiceCIDRs that are ready and stay; of the command line as long as there are none.
    fn ready_ranges(&self, store: &Store) -> Vec<Cidr> {
        let found = self.cidrs_of(store, |cidr| {
            let ready = list(cidr, "/status/conditions").iter().find(|c| text(c, "/type") == "Ready");
            cidr.pointer("/metadata/deletionTimestamp").is_none() && ready.is_none_or(|c| text(c, "/status") == "True")
        });
        if found.is_empty() { self.ranges.clone() } else { found }
    }

    fn cidrs_of(&self, store: &Store, wanted: impl Fn(&Value) -> bool) -> Vec<Cidr> {
        let Ok(cache) = store.cache(&self.cidrs) else { return Vec::new() };
        let snapshot = cache.snapshot();
        let values = snapshot.objects.values().map(|object| object.value()).filter(|value| wanted(value));
        values
            .flat_map(|value| {
                let cidrs = list(&value, "/spec/cidrs").iter().filter_map(|cidr| Cidr::parse(cidr.as_str()?).ok());
                cidrs.collect::<Vec<_>>()
            })
            .collect()
    }

    fn is_ip_used(&self, store: &Store, ip: IpAddr) -> bool {
        if store.get_cached(&self.addresses, "", &ip.to_string()).is_ok() {
            return true;
        }
        let mut index = self.index.lock();
        index.refresh(store, &self.services);
        index.has_ip(&ip)
    }

    // === ports ===

    async fn reserve_ports(
        &self,
        claims: &mut Claims,
        new: &mut Value,
        old: Option<&Value>,
    ) -> Result<(), StatusError> {
        let had = old.map(used).unwrap_or_default().ports;
        let name = text(new, "/metadata/name").to_owned();
        let mut own: Vec<u16> = Vec::new();
        if matches!(text(new, "/spec/type"), "NodePort" | "LoadBalancer") {
            let wanted: Vec<(i64, u16)> = list(new, "/spec/ports")
                .iter()
                .map(|p| {
                    (int(p, "/port").unwrap_or(0), int(p, "/nodePort").and_then(|n| u16::try_from(n).ok()).unwrap_or(0))
                })
                .collect();
            // Of a new Service, ports of one number share a node port: 53 for UDP and for TCP.
            let mut shared: HashMap<i64, u16> = HashMap::new();
            for (number, node) in wanted.iter().filter(|(_, node)| old.is_none() && *node != 0) {
                shared.entry(*number).or_insert(*node);
            }
            let mut numbers = Vec::new();
            for (at, (number, node)) in wanted.into_iter().enumerate() {
                let asked = if node == 0 { shared.get(&number).copied().unwrap_or(0) } else { node };
                let given = match asked {
                    0 if !has_node_ports(new) => 0,
                    0 => self.any_port(claims, &had, &own).await?,
                    asked if had.contains(&asked) || own.contains(&asked) => asked,
                    asked => match self.this_port(claims, asked).await {
                        Ok(()) => asked,
                        Err(Refusal::Failed(error)) => return Err(error),
                        Err(Refusal::Invalid(why)) => {
                            let error = FieldError::invalid(format!("spec.ports[{at}].nodePort"), asked, why);
                            return Err(StatusError::invalid("", "Service", &name, &[error]));
                        }
                    },
                };
                if given != 0 && old.is_none() {
                    shared.entry(number).or_insert(given);
                }
                own.push(given);
                numbers.push(given);
            }
            for (port, number) in items_mut(child(new, "spec"), "ports").zip(numbers).filter(|(_, number)| *number != 0)
            {
                set(port, "nodePort", number);
            }
        }
        if !needs_health_check(new) {
            return Ok(());
        }
        let number = match int(new, "/spec/healthCheckNodePort").and_then(|n| u16::try_from(n).ok()).unwrap_or(0) {
            0 => self.any_port(claims, &had, &own).await?,
            asked if had.contains(&asked) => asked,
            asked => match self.this_port(claims, asked).await {
                Ok(()) => asked,
                Err(Refusal::Failed(error)) => return Err(error),
                Err(Refusal::Invalid(why)) => {
                    let why = format!("failed to allocate requested HealthCheck NodePort {asked}: {why}");
                    return Err(StatusError::internal(why));
                }
            },
        };
        set(child(new, "spec"), "healthCheckNodePort", number);
        Ok(())
    }

    async fn this_port(&self, claims: &mut Claims, number: u16) -> Result<(), Refusal> {
        if !self.node_ports.contains(&number) {
            let (low, high) = (self.node_ports.start(), self.node_ports.end());
            let why = format!("provided port is not in the valid range. The range of valid ports is {low}-{high}");
            return Err(Refusal::Invalid(why));
        }
        if !self.take_port(claims, number).await? {
            return Err(Refusal::Invalid("provided port is already allocated".to_owned()));
        }
        Ok(())
    }

    async fn any_port(&self, claims: &mut Claims, had: &[u16], own: &[u16]) -> Result<u16, StatusError> {
        let (first, last) = (*self.node_ports.start(), *self.node_ports.end());
        let band = static_band(u128::from(last - first) + 1, 32, 16, 128);
        let upper = first.saturating_add(u16::try_from(band).unwrap_or(0)).min(last);
        let random = (0..RANDOM_ATTEMPTS).map(|_| rand::rng().random_range(upper..=last));
        for number in random.chain(upper..=last).chain(first..upper) {
            let mine = had.contains(&number) || own.contains(&number);
            if !mine && self.take_port(claims, number).await? {
                return Ok(number);
            }
        }
        Err(StatusError::internal("failed to allocate a nodePort: range is full"))
    }

    /// True if the port is ours from here on.
    async fn take_port(&self, claims: &mut Claims, number: u16) -> Result<bool, StatusError> {
        if self.is_port_used(&claims.store, number, &claims.owner) {
            return Ok(false);
        }
        if claims.dry_run {
            return Ok(true);
        }
        let Some(revision) = claims.store.claim(&port_claim(number), &claims.owner, CLAIM_SECONDS).await? else {
            return Ok(false);
        };
        claims.ports.push((number, revision));
        // Whoever had the claim before us has written by now: look again.
        claims.store.wait_for(Some(revision)).await?;
        Ok(!self.is_port_used(&claims.store, number, &claims.owner))
    }

    fn is_port_used(&self, store: &Store, number: u16, except: &str) -> bool {
        let mut index = self.index.lock();
        index.refresh(store, &self.services);
        index.has_port(number, except)
    }

    // === upkeep ===

    /// Keeps IPAddresses and Services in agreement until `shutdown`.
    pub async fn run(&self, store: Arc<Store>, shutdown: CancellationToken) {
        loop {
            if let Err(error) = self.repair(&store).await {
                tracing::warn!(%error, "cannot compare IPAddresses with Services");
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = tokio::time::sleep(REPAIR_INTERVAL) => {}
            }
        }
    }

    async fn repair(&self, store: &Arc<Store>) -> Result<(), StatusError> {
        store.wait_for(None).await?;
        self.default_cidr(store).await?;
        let ranges = self.cidrs_of(store, |_| true);
        let contains = |ip| ranges.is_empty() || ranges.iter().any(|range| range.covers(ip));
        let snapshot = store.cache(&self.addresses)?.snapshot();
        let addresses: Vec<Address> = snapshot
            .objects
            .values()
            .map(|object| Address {
                name: object.identity.name.to_string(),
                revision: object.revision,
                value: object.value(),
            })
            .collect();
        let repairs = {
            let mut index = self.index.lock();
            index.refresh(store, &self.services);
            let now = jiff::Timestamp::now().as_second();
            let mut services: Vec<_> = index.services().collect();
            services.sort_by_key(|(key, _)| (*key).clone());
            repair::plan(&services, &addresses, contains, &self.node_ports, now)
        };
        for repair in repairs {
            match repair {
                Repair::Create(ip, owner, notice) => {
                    store.create(&self.addresses, &address_object(ip, &owner)).await?;
                    self.tell(store, &notice).await;
                }
                Repair::Renew(name, revision, owner, notice) => {
                    let gone = store.delete(&self.addresses, "", &name, revision).await?.is_ok();
                    if let (true, Ok(ip)) = (gone, name.parse()) {
                        store.create(&self.addresses, &address_object(ip, &owner)).await?;
                    }
                    self.tell(store, &notice).await;
                }
                Repair::Delete(name, revision, notice) => {
                    _ = store.delete(&self.addresses, "", &name, revision).await?;
                    self.tell(store, &notice).await;
                }
                Repair::Tell(notice) => self.tell(store, &notice).await,
            }
        }
        Ok(())
    }

    /// An Event for people; that it cannot be written is no reason to stop.
    async fn tell(&self, store: &Store, notice: &Notice) {
        tracing::warn!(service = %notice.service, reason = notice.reason, "{}", notice.note);
        let now = apimachinery::time::rfc3339(jiff::Timestamp::now());
        if let Some(event) = repair::event(notice, &now)
            && let Err(error) = store.create(&self.events, &event).await
        {
            tracing::warn!(%error, "cannot write an event");
        }
    }

    /// The ServiceCIDR `kubernetes` says what the command line said; a second family is added to it.
    async fn default_cidr(&self, store: &Store) -> Result<(), StatusError> {
        let cidrs: Vec<String> = self.ranges.iter().map(ToString::to_string).collect();
        let now = apimachinery::time::rfc3339(jiff::Timestamp::now());
        let Ok(current) = store.get_cached(&self.cidrs, "", DEFAULT_CIDR) else {
            let object = json!({
                "kind": "ServiceCIDR", "apiVersion": "networking.k8s.io/v1",
                "metadata": {"name": DEFAULT_CIDR, "uid": uuid::Uuid::new_v4().to_string(), "creationTimestamp": now,
                    "finalizers": ["networking.k8s.io/service-cidr-finalizer"], "generation": 1},
                "spec": {"cidrs": cidrs},
                "status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now, "reason": "",
                    "message": "Kubernetes Service CIDR is ready"}]},
            });
            return store.create(&self.cidrs, &object).await.map(|_| ());
        };
        let known = list(&current.value(), "/spec/cidrs").to_vec();
        if known == cidrs {
            return Ok(());
        }
        if known.len() != 1 || cidrs.len() != 2 || known[0] != cidrs[0] {
            tracing::warn!(
                ?known,
                ?cidrs,
                "the ServiceCIDR kubernetes does not say what --service-cluster-ip-range says"
            );
            return Ok(());
        }
        let change = |cidr: &mut Value| {
            set(child(cidr, "spec"), "cidrs", cidrs.clone());
            Ok(true)
        };
        store.guaranteed_update(&self.cidrs, "", DEFAULT_CIDR, change).await.map(|_| ())
    }
}

/// The lower part of a range is left to those who choose for themselves. As `calculateRangeOffset`.
fn static_band(size: u128, divisor: u128, least: u128, most: u128) -> u128 {
    if size <= least { 0 } else { (size / divisor).clamp(least, most) }
}

fn family_of(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn is_managed(address: &Value) -> bool {
    text(address, "/metadata/labels/ipaddress.kubernetes.io~1managed-by") == MANAGED_BY
}

/// `namespace/name`, as in the caches.
fn cache_key(object: &Value) -> String {
    format!("{}/{}", text(object, "/metadata/namespace"), text(object, "/metadata/name"))
}

/// `30000-32767`, or `30000+2767`.
fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let error = || format!("--service-node-port-range {text:?}: write it like 30000-32767");
    let number = |text: &str| text.trim().parse::<u16>().map_err(|_| error());
    let (first, last) = match (text.split_once('-'), text.split_once('+')) {
        (Some((first, last)), _) => (number(first)?, number(last)?),
        (None, Some((first, more))) => (number(first)?, number(first)?.saturating_add(number(more)?)),
        (None, None) => return Err(error()),
    };
    if first == 0 || first > last { Err(error()) } else { Ok(first..=last) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_its_first_and_its_last() {
        let range = Cidr::parse("10.96.0.7/24").unwrap();
        assert_eq!((range.to_string().as_str(), range.usable()), ("10.96.0.0/24", 254));
        for (ip, inside, covered) in [
            ("10.96.0.1", true, true),
            ("10.96.0.254", true, true),
            ("10.96.0.0", false, true),
            ("10.96.0.255", false, true),
            ("10.97.0.1", false, false),
            ("::1", false, false),
        ] {
            let ip = ip.parse().unwrap();
            assert_eq!((range.contains(ip), range.covers(ip)), (inside, covered), "{ip}");
        }
        assert_eq!(Cidr::parse("fd00::/108").unwrap().at(1), "fd00::1".parse::<IpAddr>().unwrap());
        assert!(Cidr::parse("10.0.0.0").is_err() && Cidr::parse("10.0.0.0/31").is_err());
        let twice = ["10.0.0.0/24".to_owned(), "10.1.0.0/24".to_owned()];
        assert!(Allocator::new(&twice, "30000-32767").is_err());
    }

    #[test]
    fn the_lower_band_is_for_those_who_choose() {
        assert_eq!(
            [16, 17, 32, 256, 4096, 1 << 20].map(|size| static_band(size, 16, 16, 256)),
            [0, 16, 16, 16, 256, 256]
        );
        assert_eq!([16, 18, 2768, 1 << 16].map(|size| static_band(size, 32, 16, 128)), [0, 16, 86, 128]);
        assert_eq!(parse_ports("30000-32767"), Ok(30000..=32767));
        assert_eq!(parse_ports("30000+10"), Ok(30000..=30010));
        assert!(parse_ports("5-1").is_err() && parse_ports("x").is_err());
    }
}
