//! Endpoints that a person or another program keeps, for a Service without a selector, as EndpointSlices: one for each
//! set of ports and each family.
use super::plan::{Group, MANAGED_BY_LABEL, SERVICE_LABEL, group_of};
use crate::{
    controllers::claim::controller_reference,
    runtime::{
        Context, Expectations, Next, Reconcile, SyncError, WorkQueue, api_in, gone_is_fine, is_terminating, run,
    },
};
use apimachinery::meta::NamespacedName;
use component_base::{
    events::{Recorder, Type, reference},
    informer::Informer,
};
use k8s_openapi::api::{
    core::v1::{EndpointAddress, EndpointSubset, Endpoints, Service},
    discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice},
};
use kube::{
    Client,
    api::{DeleteParams, PostParams},
};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc, time::Duration};

const NAME: &str = "endpoint_slice_mirroring";
const MANAGED_BY: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
const ENDPOINTS_MANAGED_BY: &str = "endpoints.kubernetes.io/managed-by";
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
const NOT_COPIED: [&str; 2] =
    ["endpoints.kubernetes.io/last-change-trigger-time", "kubectl.kubernetes.io/last-applied-configuration"];
const CACHE_LAG: Duration = Duration::from_secs(5);

struct Controller {
    client: Client,
    recorder: Recorder,
    endpoints: Informer<Endpoints>,
    services: Informer<Service>,
    slices: Informer<EndpointSlice>,
    expectations: Arc<Expectations>,
    max_per_subset: usize,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("endpointslicemirroring-controller").await else { return };
    let controller = Arc::new(Controller {
        recorder: context.recorder(&client, "endpoint-slice-mirroring-controller"),
        client,
        endpoints: context.informers.get(),
        services: context.informers.get(),
        slices: context.informers.get(),
        expectations: Arc::default(),
        max_per_subset: context.settings.mirroring_max_endpoints_per_subset,
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let gathered =
        Gathered { queue: queue.clone(), period: context.settings.mirroring_endpointslice_updates_batch_period };
    let to = gathered.clone();
    controller.endpoints.on_change(move |change| {
        let ours = |e: &&Arc<Endpoints>| is_mirrored(e);
        if let Some(one) =
            change.latest().filter(|_| change.old.filter(ours).is_some() || change.new.filter(ours).is_some())
        {
            to.add(NamespacedName::of(one.as_ref()));
        }
    });
    let (to, endpoints) = (gathered.clone(), controller.endpoints.clone());
    controller.services.on_change(move |change| {
        let Some(service) = change.latest() else { return };
        let key = NamespacedName::of(service.as_ref());
        let mirrored = |s: Option<&Arc<Service>>| s.map(|s| has_no_selector(s));
        if mirrored(change.old) != mirrored(change.new) && endpoints.get(&key.namespace, &key.name).is_some() {
            to.add(key);
        }
    });
    let (to, expectations) = (gathered, controller.expectations.clone());
    controller.slices.on_change(move |change| {
        let Some(key) = change.latest().and_then(|s| mirrored_by(s)) else { return };
        if change.old.is_none() {
            expectations.creation_observed(&key);
        }
        to.add(key);
    });
    controller.endpoints.synced().await;
    controller.services.synced().await;
    controller.slices.synced().await;
    let workers = context.settings.mirroring_concurrent_service_endpoint_syncs;
    run(NAME, queue, controller, workers, context.shutdown.clone()).await;
}

/// Where changes wait for others of the same Endpoints, whatever tells of them, for
/// `--mirroring-endpointslice-updates-batch-period`. As `queueEndpoints`.
#[derive(Clone)]
struct Gathered {
    queue: Arc<WorkQueue<NamespacedName>>,
    period: Duration,
}

impl Gathered {
    fn add(&self, key: NamespacedName) {
        self.queue.add_after(key, self.period);
    }
}

/// The Endpoints behind a slice of this controller's.
fn mirrored_by(slice: &EndpointSlice) -> Option<NamespacedName> {
    let labels = slice.metadata.labels.as_ref()?;
    let ours = labels.get(MANAGED_BY_LABEL).is_some_and(|by| by == MANAGED_BY);
    Some(NamespacedName::new(slice.metadata.namespace.clone()?, labels.get(SERVICE_LABEL).filter(|_| ours)?))
}

fn has_no_selector(service: &Service) -> bool {
    service.spec.as_ref().is_some_and(|s| s.selector.as_ref().is_none_or(BTreeMap::is_empty))
}

/// As `shouldMirror`.
fn is_mirrored(endpoints: &Endpoints) -> bool {
    let (labels, annotations) = (endpoints.metadata.labels.as_ref(), endpoints.metadata.annotations.as_ref());
    let label = |key: &str| labels.and_then(|l| l.get(key)).map(String::as_str);
    label(SKIP) != Some("true")
        && label(ENDPOINTS_MANAGED_BY) != Some("endpoint-controller")
        && annotations.is_none_or(|a| !a.contains_key(LEADER))
}

#[derive(Debug, Default, PartialEq)]
struct Plan {
    create: Vec<EndpointSlice>,
    update: Vec<EndpointSlice>,
    delete: Vec<String>,
    /// Addresses that are none, and addresses beyond the limit.
    invalid: usize,
    beyond: usize,
}

/// As `reconcile` of the mirroring controller.
fn plan(endpoints: &Endpoints, existing: &[Arc<EndpointSlice>], max: usize) -> Plan {
    let mut plan = Plan::default();
    let mut wanted: BTreeMap<Group, Vec<Endpoint>> = BTreeMap::new();
    for subset in endpoints.subsets.iter().flatten() {
        let ports = ports(subset);
        let ready = subset.addresses.iter().flatten().map(|a| (a, true));
        let not_ready = subset.not_ready_addresses.iter().flatten().map(|a| (a, false));
        let mut taken = 0;
        for (address, ready) in ready.chain(not_ready) {
            let Ok(ip) = address.ip.parse::<IpAddr>() else {
                plan.invalid += 1;
                continue;
            };
            if taken == max {
                plan.beyond += 1;
                continue;
            }
            taken += 1;
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" }.to_owned();
            let all = wanted.entry(Group { family, ports: ports.clone() }).or_default();
            if all.len() < max {
                all.push(endpoint(address, ip, ready));
            }
        }
    }
    let mut spare: Vec<&EndpointSlice> = Vec::new();
    let mut by_group: BTreeMap<Group, &EndpointSlice> = BTreeMap::new();
    for slice in existing.iter().filter(|s| s.metadata.deletion_timestamp.is_none()) {
        let group = group_of(slice);
        if wanted.contains_key(&group) && !by_group.contains_key(&group) {
            by_group.insert(group, slice);
        } else {
            spare.push(slice);
        }
    }
    for (group, mut all) in wanted {
        all.sort_by(|a, b| a.addresses.cmp(&b.addresses));
        match by_group.get(&group) {
            Some(slice) => {
                let updated = filled(endpoints, (*slice).clone(), &group, all);
                plan.update.extend((updated != **slice).then_some(updated));
            }
            None => {
                // One that nobody needs any more serves; its family cannot change.
                let reused = spare.iter().position(|s| s.address_type == group.family).map(|at| spare.remove(at));
                match reused {
                    Some(slice) => plan.update.push(filled(endpoints, slice.clone(), &group, all)),
                    None => plan.create.push(filled(endpoints, new_slice(endpoints, &group), &group, all)),
                }
            }
        }
    }
    plan.delete.extend(spare.iter().filter_map(|s| s.metadata.name.clone()));
    plan
}

fn ports(subset: &EndpointSubset) -> Vec<(String, String, i32, Option<String>)> {
    let mut ports: Vec<_> = subset
        .ports
        .iter()
        .flatten()
        .map(|p| {
            let protocol = p.protocol.clone().unwrap_or_else(|| "TCP".to_owned());
            (p.name.clone().unwrap_or_default(), protocol, p.port, p.app_protocol.clone())
        })
        .collect();
    ports.sort();
    ports
}

fn endpoint(address: &EndpointAddress, ip: IpAddr, ready: bool) -> Endpoint {
    Endpoint {
        addresses: vec![ip.to_string()],
        conditions: Some(EndpointConditions { ready: Some(ready), ..EndpointConditions::default() }),
        hostname: address.hostname.clone().filter(|h| !h.is_empty()),
        node_name: address.node_name.clone(),
        target_ref: address.target_ref.clone(),
        ..Endpoint::default()
    }
}

fn new_slice(endpoints: &Endpoints, group: &Group) -> EndpointSlice {
    let mut slice = EndpointSlice { address_type: group.family.clone(), ..EndpointSlice::default() };
    slice.metadata.generate_name = Some(format!("{}-", endpoints.metadata.name.as_deref().unwrap_or_default()));
    slice.metadata.namespace.clone_from(&endpoints.metadata.namespace);
    slice.metadata.owner_references = Some(vec![controller_reference(endpoints)]);
    slice
}

fn filled(endpoints: &Endpoints, mut slice: EndpointSlice, group: &Group, all: Vec<Endpoint>) -> EndpointSlice {
    let mut labels = endpoints.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_LABEL.to_owned(), endpoints.metadata.name.clone().unwrap_or_default());
    labels.insert(MANAGED_BY_LABEL.to_owned(), MANAGED_BY.to_owned());
    slice.metadata.labels = Some(labels);
    let mut annotations = endpoints.metadata.annotations.clone().unwrap_or_default();
    annotations.retain(|key, _| !NOT_COPIED.contains(&key.as_str()));
    slice.metadata.annotations = (!annotations.is_empty()).then_some(annotations);
    if group_of(&slice) != *group || slice.ports.is_none() {
        slice.ports = Some(group.ports.iter().map(port).collect());
    }
    slice.endpoints = Some(all);
    slice
}

fn port((name, protocol, port, app_protocol): &(String, String, i32, Option<String>)) -> EndpointPort {
    EndpointPort {
        name: Some(name.clone()),
        protocol: Some(protocol.clone()),
        port: Some(*port),
        app_protocol: app_protocol.clone(),
    }
}

impl Controller {
    async fn carry_out(&self, key: &NamespacedName, plan: Plan) -> Result<(), kube::Error> {
        let api = api_in::<EndpointSlice>(&self.client, &key.namespace);
        if !plan.create.is_empty() {
            self.expectations.expect_creations(key, plan.create.len());
        }
        for (done, slice) in plan.create.iter().enumerate() {
            if let Err(error) = api.create(&PostParams::default(), slice).await {
                (done..plan.create.len()).for_each(|_| self.expectations.creation_observed(key));
                return if is_terminating(&error) { Ok(()) } else { Err(error) };
            }
        }
        for slice in &plan.update {
            api.replace(slice.metadata.name.as_deref().unwrap_or_default(), &PostParams::default(), slice).await?;
        }
        for name in &plan.delete {
            gone_is_fine(api.delete(name, &DeleteParams::default()).await)?;
        }
        Ok(())
    }
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        if !self.expectations.satisfied(key) {
            return Ok(Next::After(CACHE_LAG));
        }
        let mut existing = self.slices.list_in(&key.namespace);
        existing.retain(|s| mirrored_by(s).as_ref() == Some(key));
        let service = self.services.get(&key.namespace, &key.name);
        let endpoints = self.endpoints.get(&key.namespace, &key.name).filter(|e| is_mirrored(e));
        let (Some(endpoints), true) = (endpoints, service.is_some_and(|s| has_no_selector(&s))) else {
            let delete = existing.iter().filter_map(|s| s.metadata.name.clone()).collect();
            self.carry_out(key, Plan { delete, ..Plan::default() }).await?;
            self.expectations.forget(key);
            return Ok(Next::Settled);
        };
        let plan = plan(&endpoints, &existing, self.max_per_subset);
        let about = reference(endpoints.as_ref());
        let tell = |reason, message: String| self.recorder.event(&about, Type::Warning, reason, "", message);
        if plan.invalid > 0 {
            let message = format!("Skipped {} invalid IP addresses when mirroring to EndpointSlices", plan.invalid);
            tell("InvalidIPAddress", message);
        }
        if plan.beyond > 0 {
            let message = format!(
                "A max of {} addresses can be mirrored to EndpointSlices per Endpoints subset. {} addresses were skipped",
                self.max_per_subset, plan.beyond
            );
            tell("TooManyAddressesToMirror", message);
        }
        self.carry_out(key, plan).await?;
        Ok(Next::Settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn endpoints(subsets: Value) -> Endpoints {
        serde_json::from_value(json!({"metadata": {"name": "e", "namespace": "ns", "uid": "u", "labels": {"l": "x"},
            "annotations": {NOT_COPIED[1]: "y", "a": "b"}}, "subsets": subsets}))
        .unwrap()
    }

    fn settle(endpoints: &Endpoints, existing: &[Arc<EndpointSlice>]) -> Vec<Arc<EndpointSlice>> {
        let got = plan(endpoints, existing, 3);
        let mut after: Vec<EndpointSlice> = existing
            .iter()
            .filter(|s| !got.delete.contains(s.metadata.name.as_ref().unwrap()))
            .map(|s| got.update.iter().find(|u| u.metadata.name == s.metadata.name).unwrap_or(s).clone())
            .collect();
        for (at, mut slice) in got.create.into_iter().enumerate() {
            slice.metadata.name = Some(format!("e-{at}-{}", existing.len()));
            after.push(slice);
        }
        let after: Vec<_> = after.into_iter().map(Arc::new).collect();
        let again = plan(endpoints, &after, 3);
        assert!(again.create.is_empty() && again.update.is_empty() && again.delete.is_empty(), "it settles");
        after
    }

    #[test]
    fn each_family_and_set_of_ports_has_a_slice() {
        let both = endpoints(json!([{"addresses": [{"ip": "10.0.0.1", "hostname": "h"}, {"ip": "fd00::1"}],
            "notReadyAddresses": [{"ip": "10.0.0.2"}], "ports": [{"name": "p", "port": 80}]}]));
        let first = settle(&both, &[]);
        assert_eq!(first.iter().map(|s| s.address_type.as_str()).collect::<Vec<_>>(), ["IPv4", "IPv6"]);
        let v4 = first[0].endpoints.as_ref().unwrap();
        let ready: Vec<_> = v4.iter().map(|e| e.conditions.as_ref().unwrap().ready.unwrap()).collect();
        assert_eq!((ready, v4[0].hostname.as_deref()), (vec![true, false], Some("h")));
        let meta = &first[0].metadata;
        assert_eq!(meta.annotations.as_ref().unwrap().keys().collect::<Vec<_>>(), ["a"]);
        assert_eq!(meta.labels.as_ref().unwrap()[SERVICE_LABEL], "e");
        // Other ports: the slice is written anew, not made anew.
        let moved = endpoints(json!([{"addresses": [{"ip": "10.0.0.1"}], "ports": [{"name": "p", "port": 81}]}]));
        let second = settle(&moved, &first);
        assert_eq!((second.len(), &second[0].metadata.name), (1, &first[0].metadata.name));
        assert_eq!(second[0].ports.as_ref().unwrap()[0].port, Some(81));
        assert_eq!(settle(&endpoints(Value::Null), &second).len(), 0);
    }

    /// Time passes by itself here where nothing else can be done.
    #[tokio::test(start_paused = true)]
    async fn changes_within_the_batch_period_are_mirrored_together() {
        let began = tokio::time::Instant::now();
        let seconds = Duration::from_secs;
        let gathered = Gathered { queue: Arc::new(WorkQueue::new("test_mirroring")), period: seconds(10) };
        let (one, other) = (NamespacedName::new("ns", "one"), NamespacedName::new("ns", "other"));
        gathered.add(one.clone());
        tokio::time::sleep(seconds(4)).await;
        gathered.add(other.clone());
        gathered.add(one.clone());
        let mut told = Vec::new();
        for _ in 0..2 {
            let key = gathered.queue.next().await;
            gathered.queue.done(&key, Duration::ZERO);
            told.push((key, began.elapsed().as_secs()));
        }
        // The later change of the first neither came alone nor kept it waiting longer.
        assert_eq!(told, [(one.clone(), 10), (other, 14)]);
        assert!(tokio::time::timeout(seconds(60), gathered.queue.next()).await.is_err(), "nothing is told twice");
        let at_once = Gathered { period: Duration::ZERO, ..gathered };
        at_once.add(one.clone());
        let (began, key) = (tokio::time::Instant::now(), at_once.queue.next().await);
        assert_eq!((key, began.elapsed()), (one, Duration::ZERO));
    }

    #[test]
    fn what_is_left_out_is_counted() {
        let addresses: Vec<_> =
            (1..6).map(|n| json!({"ip": format!("10.0.0.{n}")})).chain([json!({"ip": "x"})]).collect();
        let got = plan(&endpoints(json!([{"addresses": addresses, "ports": [{"port": 1}]}])), &[], 3);
        assert_eq!((got.beyond, got.invalid, got.create[0].endpoints.as_ref().unwrap().len()), (2, 1, 3));
        for (meta, expected) in [
            (json!({}), true),
            (json!({"labels": {SKIP: "true"}}), false),
            (json!({"annotations": {LEADER: "{}"}}), false),
            (json!({"labels": {ENDPOINTS_MANAGED_BY: "endpoint-controller"}}), false),
        ] {
            assert_eq!(is_mirrored(&serde_json::from_value(json!({"metadata": meta})).unwrap()), expected, "{meta}");
        }
    }
}
