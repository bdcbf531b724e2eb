//! Cluster IPs and node ports: given out without double use by any number of apiservers, and without leak.
//!
//! What is in use is what stored Services say; every apiserver has them in its cache. A cluster IP in use has an IPAddress
//! object as well, made by compare-and-swap before the Service is written: only one writer can have made it. A node port is
//! claimed by a key of its own for as long as the write takes. Whoever gets a claim first looks at the Services as of that
//! claim's revision: whatever was written under an earlier claim is among them. A claim that outlives its writer's death
//! lapses with its lease; IPAddresses without a Service, and Services without theirs, are put right now and then.

use super::Resource;
mod cidr;

use super::core::service::{HEADLESS, has_node_ports};
use super::object::{child, int, items_mut, list, set, text};
use super::strategy::{HookContext, Plain, Reservation};
use crate::storage::{Put, Store};
use apimachinery::facts;
use apimachinery::status::{FieldError, StatusError};
use cidr::Cidr;
use parking_lot::Mutex;
use rand::RngExt as _;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Random picks before the range is gone through in order.
const RANDOM_ATTEMPTS: usize = 32;
/// A claim of a node port lapses after this if its writer dies.
const CLAIM_SECONDS: i64 = 120;
/// How often IPAddresses are compared with Services.
const REPAIR_INTERVAL: Duration = Duration::from_secs(180);
/// An IPAddress this young may belong to a Service that is being written.
const REPAIR_GRACE_SECONDS: i64 = 60;

/// Gives out cluster IPs and node ports.
pub struct Allocator {
    /// The primary family's range first.
    ranges: Vec<Cidr>,
    node_ports: RangeInclusive<u16>,
    index: Mutex<Index>,
    services: Arc<Resource>,
    addresses: Arc<Resource>,
    cidrs: Arc<Resource>,
}

/// What the Services of the cache use, kept up by parsing only those that changed.
#[derive(Default)]
struct Index {
    services: HashMap<Arc<str>, (i64, Used)>,
}

/// What one Service uses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Used {
    ips: Vec<IpAddr>,
    ports: Vec<u16>,
}

/// What one write has claimed; given back when dropped.
struct Claims {
    store: Arc<Store>,
    addresses: Arc<Resource>,
    /// IPAddresses made for this write.
    ips: Vec<IpAddr>,
    /// Keys of claimed ports.
    ports: Vec<(u16, i64)>,
    /// IPAddresses that the Service no longer needs once it is written.
    freed: Vec<IpAddr>,
    owner: String,
    committed: bool,
}

// === impl Allocator ===

impl Allocator {
    /// From `--service-cluster-ip-range` and `--service-node-port-range`.
    pub fn new(ranges: &[String], node_ports: &str) -> Result<Allocator, String> {
        let ranges = ranges.iter().map(|text| Cidr::parse(text)).collect::<Result<Vec<_>, _>>()?;
        if ranges.is_empty() || ranges.len() > 2 {
            return Err("--service-cluster-ip-range takes one range, or one for each IP family".to_owned());
        }
        let resource = |group, version, plural| {
            let facts = facts::resource(group, version, plural).ok_or_else(|| format!("no facts of {plural}"))?;
            Ok::<_, String>(Arc::new(Resource::of(facts, Arc::new(Plain))))
        };
        Ok(Allocator {
            ranges,
            node_ports: parse_ports(node_ports)?,
            index: Mutex::default(),
            services: resource("", "v1", "services")?,
            addresses: resource("networking.k8s.io", "v1", "ipaddresses")?,
            cidrs: resource("networking.k8s.io", "v1", "servicecidrs")?,
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
        let mut claims = Claims {
            store: context.store.clone(),
            addresses: self.addresses.clone(),
            ips: Vec::new(),
            ports: Vec::new(),
            freed: Vec::new(),
            owner: owner_of(new),
            committed: context.dry_run,
        };
        self.families(new)?;
        self.reserve_ips(&mut claims, new, old, context.dry_run).await?;
        self.reserve_ports(&mut claims, new, old, context.dry_run).await?;
        Ok(Some(Box::new(claims)))
    }

    /// Gives back what a Service had that is gone.
    pub async fn release(&self, context: HookContext<'_>, old: &Value) {
        if !context.dry_run {
            for ip in used(old).ips {
                release_ip(context.store, &self.addresses, ip, &owner_of(old)).await;
            }
        }
    }

    /// Fills in the IP families, as `initIPFamilyFields`.
    fn families(&self, object: &mut Value) -> Result<(), StatusError> {
        if text(object, "/spec/type") == "ExternalName" {
            return Ok(());
        }
        let name = text(object, "/metadata/name").to_owned();
        let invalid = |error: FieldError| StatusError::invalid("", "Service", &name, &[error]);
        let selectorless = object.pointer("/spec/selector").is_none();
        let spec = child(object, "spec");
        let ips: Vec<String> = list(spec, "/clusterIPs").iter().filter_map(|v| v.as_str().map(Into::into)).collect();
        let headless = ips.first().is_some_and(|ip| ip == HEADLESS);
        let policy = match text(spec, "/ipFamilyPolicy") {
            "" if headless && selectorless => "RequireDualStack".to_owned(),
            "" if list(spec, "/ipFamilies").len() > 1 || ips.len() > 1 => "RequireDualStack".to_owned(),
            "" => "SingleStack".to_owned(),
            given => given.to_owned(),
        };
        let configured: Vec<&str> = self.ranges.iter().map(Cidr::family).collect();
        let mut families: Vec<String> =
            list(spec, "/ipFamilies").iter().filter_map(|v| v.as_str().map(Into::into)).collect();
        for (at, family) in families.iter().enumerate() {
            let anything_goes = headless && selectorless;
            if !anything_goes && !configured.contains(&family.as_str()) {
                let path = format!("spec.ipFamilies[{at}]");
                return Err(invalid(FieldError::invalid(path, family.as_str(), "not configured on this cluster")));
            }
        }
        if families.is_empty() {
            families = ips.iter().filter_map(|ip| ip.parse().ok()).map(|ip: IpAddr| family_of(ip).to_owned()).collect();
        }
        if families.is_empty() {
            families.push(configured[0].to_owned());
        }
        let other = if families[0] == "IPv4" { "IPv6" } else { "IPv4" };
        match policy.as_str() {
            "RequireDualStack" if !(headless && selectorless) && configured.len() < 2 => {
                let why = "this cluster is not configured for dual-stack services";
                return Err(invalid(FieldError::invalid("spec.ipFamilyPolicy", policy, why)));
            }
            "RequireDualStack" if families.len() < 2 => families.push(other.to_owned()),
            "PreferDualStack" if families.len() < 2 && configured.len() > 1 => families.push(other.to_owned()),
            "SingleStack" if families.len() > 1 => {
                let why = "may only be RequireDualStack or PreferDualStack when more than one IP family is specified";
                return Err(invalid(FieldError::invalid("spec.ipFamilyPolicy", policy, why)));
            }
            _ => {}
        }
        set(spec, "ipFamilyPolicy", policy);
        set(spec, "ipFamilies", families);
        Ok(())
    }

    async fn reserve_ips(
        &self,
        claims: &mut Claims,
        new: &mut Value,
        old: Option<&Value>,
        dry_run: bool,
    ) -> Result<(), StatusError> {
        let had = old.map(used).unwrap_or_default().ips;
        if text(new, "/spec/type") == "ExternalName" {
            claims.freed = had;
            return Ok(());
        }
        let given: Vec<String> =
            list(new, "/spec/clusterIPs").iter().filter_map(|v| v.as_str().map(Into::into)).collect();
        if given.first().is_some_and(|ip| ip == HEADLESS) {
            set(child(new, "spec"), "clusterIP", HEADLESS);
            return Ok(());
        }
        let name = text(new, "/metadata/name").to_owned();
        let families: Vec<String> =
            list(new, "/spec/ipFamilies").iter().filter_map(|v| v.as_str().map(Into::into)).collect();
        let mut ips = Vec::new();
        for (at, family) in families.iter().enumerate() {
            let Some(range) = self.ranges.iter().find(|r| r.family() == family) else { continue };
            let ip = match given.get(at).and_then(|ip| ip.parse::<IpAddr>().ok()) {
                Some(ip) if had.contains(&ip) => ip,
                Some(ip) => {
                    let invalid = |why: String| {
                        let error = FieldError::invalid(
                            "spec.clusterIPs",
                            given.clone(),
                            format!("failed to allocate IP {ip}: {why}"),
                        );
                        StatusError::invalid("", "Service", &name, &[error])
                    };
                    if !range.contains(ip) {
                        return Err(invalid(format!(
                            "the provided IP ({ip}) is not in the valid range. The range of valid IPs is {range}"
                        )));
                    }
                    if self.is_ip_used(&claims.store, ip) || !(dry_run || claims.take_ip(ip).await?) {
                        return Err(invalid("provided IP is already allocated".to_owned()));
                    }
                    ip
                }
                None => self.any_ip(claims, range, dry_run).await?,
            };
            ips.push(ip);
        }
        claims.freed = had.into_iter().filter(|ip| !ips.contains(ip)).collect();
        let texts: Vec<String> = ips.iter().map(ToString::to_string).collect();
        let spec = child(new, "spec");
        if let Some(first) = texts.first() {
            set(spec, "clusterIP", first.as_str());
            set(spec, "clusterIPs", texts);
        }
        Ok(())
    }

    /// A free address: at random from the upper part of the range, since people choose from the lower.
    async fn any_ip(&self, claims: &mut Claims, range: &Cidr, dry_run: bool) -> Result<IpAddr, StatusError> {
        let size = range.usable();
        let low = static_band(size, 16, 16, 256);
        let random = (0..RANDOM_ATTEMPTS).map(|_| {
            if low + 1 < size { rand::rng().random_range(low + 1..=size) } else { rand::rng().random_range(1..=size) }
        });
        // The first address is that of the `kubernetes` Service.
        let in_order = (low + 1..=size).chain(2..=low).take(1 << 16);
        for offset in random.chain(in_order) {
            let ip = range.at(offset);
            if offset > 1 && !self.is_ip_used(&claims.store, ip) && (dry_run || claims.take_ip(ip).await?) {
                return Ok(ip);
            }
        }
        Err(StatusError::internal("failed to allocate a serviceIP: range is full"))
    }

    async fn reserve_ports(
        &self,
        claims: &mut Claims,
        new: &mut Value,
        old: Option<&Value>,
        dry_run: bool,
    ) -> Result<(), StatusError> {
        let had = old.map(used).unwrap_or_default().ports;
        let name = text(new, "/metadata/name").to_owned();
        let key = cache_key(new);
        let mut own: BTreeMap<u16, ()> = BTreeMap::new();
        let wanted: Vec<i64> = list(new, "/spec/ports").iter().map(|p| int(p, "/nodePort").unwrap_or(0)).collect();
        let needs = has_node_ports(new);
        let mut numbers = Vec::new();
        for (at, port) in wanted.into_iter().enumerate() {
            let path = format!("spec.ports[{at}].nodePort");
            let number = match u16::try_from(port).unwrap_or(0) {
                0 if !needs => continue,
                0 => self.any_port(claims, &had, &own, &key, dry_run).await?,
                number if had.contains(&number) || own.contains_key(&number) => number,
                number => {
                    let invalid = |why: String| {
                        StatusError::invalid("", "Service", &name, &[FieldError::invalid(path, port, why)])
                    };
                    if !self.node_ports.contains(&number) {
                        let (low, high) = (self.node_ports.start(), self.node_ports.end());
                        return Err(invalid(format!(
                            "provided port is not in the valid range. The range of valid ports is {low}-{high}"
                        )));
                    }
                    if !self.take_port(claims, number, &key, dry_run).await? {
                        return Err(invalid("provided port is already allocated".to_owned()));
                    }
                    number
                }
            };
            own.insert(number, ());
            numbers.push((at, number));
        }
        for (at, port) in items_mut(child(new, "spec"), "ports").enumerate() {
            if let Some((_, number)) = numbers.iter().find(|(index, _)| *index == at) {
                set(port, "nodePort", *number);
            }
        }
        let checked = text(new, "/spec/type") == "LoadBalancer" && text(new, "/spec/externalTrafficPolicy") == "Local";
        if checked && int(new, "/spec/healthCheckNodePort").unwrap_or(0) == 0 {
            let number = self.any_port(claims, &had, &own, &key, dry_run).await?;
            set(child(new, "spec"), "healthCheckNodePort", number);
        }
        Ok(())
    }

    async fn any_port(
        &self,
        claims: &mut Claims,
        had: &[u16],
        own: &BTreeMap<u16, ()>,
        key: &str,
        dry_run: bool,
    ) -> Result<u16, StatusError> {
        let (first, last) = (*self.node_ports.start(), *self.node_ports.end());
        let band = static_band(u128::from(last - first) + 1, 32, 16, 128);
        let upper = first.saturating_add(u16::try_from(band).unwrap_or(0)).min(last);
        let random = (0..RANDOM_ATTEMPTS).map(|_| rand::rng().random_range(upper..=last));
        for number in random.chain(upper..=last).chain(first..upper) {
            let mine = had.contains(&number) || own.contains_key(&number);
            if !mine && self.take_port(claims, number, key, dry_run).await? {
                return Ok(number);
            }
        }
        Err(StatusError::internal("failed to allocate a nodePort: range is full"))
    }

    /// True if the port is ours from here on.
    async fn take_port(&self, claims: &mut Claims, number: u16, key: &str, dry_run: bool) -> Result<bool, StatusError> {
        if self.is_port_used(&claims.store, number, key) {
            return Ok(false);
        }
        if dry_run {
            return Ok(true);
        }
        let Some(revision) = claims.store.claim(&port_claim(number), &claims.owner, CLAIM_SECONDS).await? else {
            return Ok(false);
        };
        claims.ports.push((number, revision));
        // Whoever had the claim before us has written by now: look again.
        claims.store.wait_for(Some(revision)).await?;
        Ok(!self.is_port_used(&claims.store, number, key))
    }

    fn is_port_used(&self, store: &Store, number: u16, except: &str) -> bool {
        let mut index = self.index.lock();
        index.refresh(store, &self.services);
        index.services.iter().any(|(key, (_, used))| &**key != except && used.ports.contains(&number))
    }

    fn is_ip_used(&self, store: &Store, ip: IpAddr) -> bool {
        if store.get_cached(&self.addresses, "", &ip.to_string()).is_ok() {
            return true;
        }
        let mut index = self.index.lock();
        index.refresh(store, &self.services);
        index.services.values().any(|(_, used)| used.ips.contains(&ip))
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
        self.default_range(store).await?;
        let owners: HashMap<IpAddr, String> = {
            let mut index = self.index.lock();
            index.refresh(store, &self.services);
            let of = |(key, (_, used)): (&Arc<str>, &(i64, Used))| {
                used.ips.iter().map(|ip| (*ip, key.to_string())).collect::<Vec<_>>()
            };
            index.services.iter().flat_map(of).collect()
        };
        let snapshot = store.cache(&self.addresses)?.snapshot();
        let known: HashSet<IpAddr> = snapshot.objects.values().filter_map(|o| o.identity.name.parse().ok()).collect();
        for (ip, owner) in owners.iter().filter(|(ip, _)| !known.contains(ip)) {
            store.create(&self.addresses, &address_object(*ip, owner)).await?;
        }
        let now = jiff::Timestamp::now().as_second();
        for object in snapshot.objects.values() {
            let value = object.value();
            let made = text(&value, "/metadata/creationTimestamp").parse::<jiff::Timestamp>();
            let young = made.is_ok_and(|made| now - made.as_second() < REPAIR_GRACE_SECONDS);
            let ours = text(&value, "/metadata/labels/ipaddress.kubernetes.io~1managed-by") == MANAGED_BY;
            let orphan = object.identity.name.parse().is_ok_and(|ip: IpAddr| !owners.contains_key(&ip));
            if orphan && ours && !young {
                tracing::info!(ip = %object.identity.name, "released a cluster IP without a Service");
                _ = store.delete(&self.addresses, "", &object.identity.name, object.revision).await?;
            }
        }
        Ok(())
    }

    /// The ServiceCIDR `kubernetes` says what the command line said.
    async fn default_range(&self, store: &Store) -> Result<(), StatusError> {
        if store.get_cached(&self.cidrs, "", "kubernetes").is_ok() {
            return Ok(());
        }
        let now = apimachinery::time::rfc3339(jiff::Timestamp::now());
        let cidrs: Vec<String> = self.ranges.iter().map(ToString::to_string).collect();
        let object = json!({
            "kind": "ServiceCIDR", "apiVersion": "networking.k8s.io/v1",
            "metadata": {"name": "kubernetes", "uid": uuid::Uuid::new_v4().to_string(), "creationTimestamp": now,
                "finalizers": ["networking.k8s.io/service-cidr-finalizer"], "generation": 1},
            "spec": {"cidrs": cidrs},
            "status": {"conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now, "reason": "",
                "message": "Kubernetes Service CIDR is ready"}]},
        });
        store.create(&self.cidrs, &object).await.map(|_| ())
    }
}

const MANAGED_BY: &str = "ipallocator.k8s.io";

/// The lower part of a range is left to those who choose for themselves. As `calculateRangeOffset`.
fn static_band(size: u128, divisor: u128, least: u128, most: u128) -> u128 {
    let band = (size / divisor).clamp(least, most);
    if band * 2 > size { 0 } else { band }
}

fn family_of(ip: IpAddr) -> &'static str {
    if ip.is_ipv4() { "IPv4" } else { "IPv6" }
}

fn port_claim(number: u16) -> String {
    format!("nodeports/{number}")
}

/// `namespace/name`, as in the caches.
fn cache_key(object: &Value) -> String {
    format!("{}/{}", text(object, "/metadata/namespace"), text(object, "/metadata/name"))
}

fn owner_of(object: &Value) -> String {
    cache_key(object)
}

fn parse_ports(text: &str) -> Result<RangeInclusive<u16>, String> {
    let error = || format!("--service-node-port-range {text:?}: write it like 30000-32767");
    let (first, last) = text.split_once('-').ok_or_else(error)?;
    let (first, last) = (first.trim().parse().map_err(|_| error())?, last.trim().parse().map_err(|_| error())?);
    if first == 0 || first > last { Err(error()) } else { Ok(first..=last) }
}

fn used(service: &Value) -> Used {
    let ips = list(service, "/spec/clusterIPs").iter().filter_map(|ip| ip.as_str()?.parse().ok()).collect();
    let mut ports: Vec<u16> = list(service, "/spec/ports")
        .iter()
        .filter_map(|port| u16::try_from(int(port, "/nodePort")?).ok())
        .filter(|number| *number != 0)
        .collect();
    ports.extend(int(service, "/spec/healthCheckNodePort").and_then(|n| u16::try_from(n).ok()).filter(|n| *n != 0));
    Used { ips, ports }
}

fn address_object(ip: IpAddr, owner: &str) -> Value {
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
async fn release_ip(store: &Store, addresses: &Resource, ip: IpAddr, owner: &str) {
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

// === impl Index ===

impl Index {
    fn refresh(&mut self, store: &Store, services: &Resource) {
        let Ok(cache) = store.cache(services) else { return };
        let snapshot = cache.snapshot();
        for (key, object) in &snapshot.objects {
            if self.services.get(key).is_none_or(|(revision, _)| *revision != object.revision) {
                self.services.insert(key.clone(), (object.revision, used(&object.value())));
            }
        }
        if self.services.len() > snapshot.objects.len() {
            self.services.retain(|key, _| snapshot.objects.contains_key(key));
        }
    }
}

// === impl Claims ===

impl Claims {
    /// Makes the IPAddress; false if somebody has it.
    async fn take_ip(&mut self, ip: IpAddr) -> Result<bool, StatusError> {
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
        if ips.is_empty() && ports.is_empty() {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_its_first_and_its_last() {
        let range = Cidr::parse("10.96.0.7/24").unwrap();
        assert_eq!((range.to_string().as_str(), range.usable()), ("10.96.0.0/24", 254));
        for (ip, inside) in [
            ("10.96.0.1", true),
            ("10.96.0.254", true),
            ("10.96.0.0", false),
            ("10.96.0.255", false),
            ("10.97.0.1", false),
            ("::1", false),
        ] {
            assert_eq!(range.contains(ip.parse().unwrap()), inside, "{ip}");
        }
        assert_eq!(Cidr::parse("fd00::/108").unwrap().at(1), "fd00::1".parse::<IpAddr>().unwrap());
        assert!(Cidr::parse("10.0.0.0").is_err() && Cidr::parse("10.0.0.0/31").is_err());
    }

    #[test]
    fn families_follow_the_policy_and_the_cluster() {
        let single = Allocator::new(&["10.0.0.0/24".into()], "30000-32767").unwrap();
        let dual = Allocator::new(&["10.0.0.0/24".into(), "fd00::/108".into()], "30000-32767").unwrap();
        let cases = [
            (&single, json!({"selector": {"a": "b"}}), Ok(("SingleStack", json!(["IPv4"])))),
            (&single, json!({"ipFamilyPolicy": "PreferDualStack"}), Ok(("PreferDualStack", json!(["IPv4"])))),
            (&single, json!({"ipFamilyPolicy": "RequireDualStack"}), Err(422)),
            (&single, json!({"ipFamilies": ["IPv6"]}), Err(422)),
            (&single, json!({"clusterIPs": ["None"]}), Ok(("RequireDualStack", json!(["IPv4", "IPv6"])))),
            (&dual, json!({"ipFamilyPolicy": "PreferDualStack"}), Ok(("PreferDualStack", json!(["IPv4", "IPv6"])))),
            (&dual, json!({"clusterIPs": ["fd00::5"]}), Ok(("SingleStack", json!(["IPv6"])))),
        ];
        for (allocator, spec, expected) in cases {
            let mut object = json!({"spec": spec});
            let result = allocator.families(&mut object).map_err(|e| e.code());
            let found = result.map(|()| (text(&object, "/spec/ipFamilyPolicy"), object["spec"]["ipFamilies"].clone()));
            assert_eq!(found, expected, "{spec}");
        }
    }

    #[test]
    fn the_lower_band_is_for_those_who_choose() {
        assert_eq!(
            (static_band(254, 16, 16, 256), static_band(1 << 20, 16, 16, 256), static_band(14, 16, 16, 256)),
            (16, 256, 0)
        );
        assert_eq!(parse_ports("30000-32767"), Ok(30000..=32767));
        assert!(parse_ports("5-1").is_err() && parse_ports("x").is_err());
    }

    #[test]
    fn what_a_service_uses() {
        let service = json!({"spec": {"clusterIPs": ["10.0.0.5"], "ports": [{"nodePort": 30001}, {"port": 1}], "healthCheckNodePort": 30002}});
        assert_eq!(used(&service), Used { ips: vec!["10.0.0.5".parse().unwrap()], ports: vec![30001, 30002] });
        assert_eq!(used(&json!({"spec": {"clusterIPs": ["None"]}})), Used::default());
    }
}
