//! Metrics of EndpointSlices, with Kubernetes' names.
use super::{
    hints::{Distribution, distribution},
    plan::{Changes, group_of, identity},
};
use apimachinery::meta::NamespacedName;
use component_base::metrics::{Labels, register};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use parking_lot::Mutex;
use prometheus_client::metrics::{
    family::Family,
    gauge::Gauge,
    histogram::{Histogram, exponential_buckets},
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, LazyLock},
};

struct Families {
    added: Histogram,
    removed: Histogram,
    endpoints: Gauge,
    slices: Gauge,
    least: Gauge,
    services: Family<Labels<1>, Gauge>,
}

static FAMILIES: LazyLock<Families> = LazyLock::new(|| {
    let name = |name: &str| format!("endpoint_slice_controller_{name}");
    let per_sync = |of: &str, help: &str| register(&name(of), help, Histogram::new(exponential_buckets(2.0, 2.0, 15)));
    Families {
        added: per_sync("endpoints_added_per_sync", "Number of endpoints added on each Service sync"),
        removed: per_sync("endpoints_removed_per_sync", "Number of endpoints removed on each Service sync"),
        endpoints: register(&name("endpoints_desired"), "Number of endpoints desired", Gauge::default()),
        slices: register(&name("num_endpoint_slices"), "Number of EndpointSlices", Gauge::default()),
        least: register(
            &name("desired_endpoint_slices"),
            "Number of EndpointSlices that would exist with perfect endpoint allocation",
            Gauge::default(),
        ),
        services: register(
            &name("services_count_by_traffic_distribution"),
            "Number of Services using some specific trafficDistribution",
            Family::default(),
        ),
    }
});

/// What a Service has after a step, and what the step changed.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Counted {
    added: usize,
    removed: usize,
    endpoints: usize,
    slices: usize,
    /// So many slices would do.
    least: usize,
    distribution: Option<String>,
}

/// The Services as they were counted last; bounded by the Services there are.
#[derive(Default)]
pub struct Monitor(Mutex<HashMap<NamespacedName, Counted>>);

/// What the changes come to.
pub fn count(service: &Service, existing: &[Arc<EndpointSlice>], changes: &Changes, max: usize) -> Counted {
    let name = |slice: &EndpointSlice| slice.metadata.name.clone().unwrap_or_default();
    let replaced: BTreeSet<String> = changes.update.iter().map(name).chain(changes.delete.iter().cloned()).collect();
    let kept = existing.iter().map(AsRef::as_ref).filter(|slice| !replaced.contains(&name(slice)));
    let after: Vec<&EndpointSlice> = kept.chain(&changes.update).chain(&changes.create).collect();
    let all = |slices: &[&EndpointSlice]| -> BTreeSet<String> {
        slices.iter().flat_map(|slice| slice.endpoints.iter().flatten()).map(identity).collect()
    };
    let (before, now) = (all(&existing.iter().map(AsRef::as_ref).collect::<Vec<_>>()), all(&after));
    let mut groups: BTreeMap<_, usize> = BTreeMap::new();
    for slice in &after {
        *groups.entry(group_of(slice)).or_default() += slice.endpoints.as_ref().map_or(0, Vec::len);
    }
    let asked = service.spec.as_ref().and_then(|spec| spec.traffic_distribution.clone());
    Counted {
        added: now.difference(&before).count(),
        removed: before.difference(&now).count(),
        endpoints: now.len(),
        slices: after.len(),
        least: groups.values().map(|count| count.div_ceil(max.max(1)).max(1)).sum(),
        distribution: asked.filter(|_| distribution(service) != Distribution::Auto),
    }
}

impl Monitor {
    /// A Service is as counted now.
    pub fn note(&self, key: &NamespacedName, counted: Counted) {
        FAMILIES.added.observe(counted.added as f64);
        FAMILIES.removed.observe(counted.removed as f64);
        let mut all = self.0.lock();
        change(&all.remove(key).unwrap_or_default(), -1);
        change(&counted, 1);
        all.insert(key.clone(), counted);
    }

    pub fn forget(&self, key: &NamespacedName) {
        change(&self.0.lock().remove(key).unwrap_or_default(), -1);
    }
}

fn change(counted: &Counted, sign: i64) {
    let numbers = [counted.endpoints, counted.slices, counted.least];
    for (gauge, number) in [&FAMILIES.endpoints, &FAMILIES.slices, &FAMILIES.least].into_iter().zip(numbers) {
        gauge.inc_by(sign * i64::try_from(number).unwrap_or(i64::MAX));
    }
    if let Some(asked) = &counted.distribution {
        let known = ["PreferClose", "PreferSameZone", "PreferSameNode"].contains(&asked.as_str());
        let label = if known { asked.clone() } else { "ImplementationSpecific".to_owned() };
        FAMILIES.services.get_or_create(&[("traffic_distribution", label)]).inc_by(sign);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn slice(name: &str, addresses: &[&str]) -> EndpointSlice {
        let endpoints: Vec<Value> = addresses.iter().map(|address| json!({"addresses": [address]})).collect();
        serde_json::from_value(json!({"metadata": {"name": name}, "addressType": "IPv4", "endpoints": endpoints,
            "ports": [{"port": 80, "protocol": "TCP"}]}))
        .unwrap()
    }

    #[test]
    fn a_service_is_counted_as_its_slices_will_be() {
        let service: Service = serde_json::from_value(json!({"spec": {"trafficDistribution": "PreferClose"}})).unwrap();
        let existing = [slice("a", &["1", "2"]), slice("b", &["3"]), slice("c", &["4"])].map(Arc::new);
        let changes = Changes {
            create: vec![slice("", &["6"])],
            update: vec![slice("b", &["3", "5"])],
            delete: vec!["c".to_owned()],
            told: Vec::new(),
        };
        let counted = count(&service, &existing, &changes, 3);
        let distribution = Some("PreferClose".to_owned());
        let expected = Counted { added: 2, removed: 1, endpoints: 5, slices: 3, least: 2, distribution };
        assert_eq!(counted, expected);
        let (monitor, key) = (Monitor::default(), NamespacedName::new("ns", "web"));
        monitor.note(&key, counted);
        monitor.note(&key, expected);
        let says = |line: &str| {
            let text = component_base::metrics::encode();
            assert!(text.contains(&format!("endpoint_slice_controller_{line}\n")), "{line}\n{text}");
        };
        says("endpoints_added_per_sync_bucket{le=\"2.0\"} 2");
        says("endpoints_desired 5");
        says("num_endpoint_slices 3");
        says("desired_endpoint_slices 2");
        says("services_count_by_traffic_distribution{traffic_distribution=\"PreferClose\"} 1");
        monitor.forget(&key);
        says("num_endpoint_slices 0");
    }
}
