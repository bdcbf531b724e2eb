//! Which zones' and nodes' clients an endpoint is for: as the Service's `trafficDistribution` asks, or, where its annotation
//! says `Auto`, so that each zone's endpoints are in proportion to its CPUs. Pure.
use apimachinery::quantity::Quantity;
use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::{Endpoint, EndpointHints, ForNode, ForZone},
};
use std::{collections::BTreeMap, sync::Arc};

const MODE: [&str; 2] = ["service.kubernetes.io/topology-aware-hints", "service.kubernetes.io/topology-mode"];
const ZONE_LABEL: &str = "topology.kubernetes.io/zone";
const EXCLUDED: [&str; 2] = ["node-role.kubernetes.io/control-plane", "node-role.kubernetes.io/master"];
/// How much more than its share an endpoint may get.
const OVERLOAD: f64 = 0.2;

/// Each zone's part of the CPUs.
pub type Shares = BTreeMap<String, f64>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distribution {
    Anywhere,
    SameZone,
    SameNode,
    /// By the annotation, which comes before the field.
    Auto,
}

pub fn distribution(service: &Service) -> Distribution {
    let annotations = service.metadata.annotations.as_ref();
    let mode = MODE.iter().find_map(|key| annotations.and_then(|a| a.get(*key))).map(String::as_str);
    if matches!(mode, Some("Auto" | "auto")) {
        return Distribution::Auto;
    }
    match service.spec.as_ref().and_then(|s| s.traffic_distribution.as_deref()) {
        Some("PreferClose" | "PreferSameZone") => Distribution::SameZone,
        Some("PreferSameNode") => Distribution::SameNode,
        _ => Distribution::Anywhere,
    }
}

fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint.conditions.as_ref().and_then(|c| c.ready).unwrap_or(false)
}

fn for_zone(zone: &str) -> Vec<ForZone> {
    vec![ForZone { name: zone.to_owned() }]
}

/// Only endpoints that are ready have hints.
pub fn by_distribution(endpoint: &mut Endpoint, distribution: Distribution) {
    let near = matches!(distribution, Distribution::SameZone | Distribution::SameNode) && is_ready(endpoint);
    let zone = endpoint.zone.as_deref().filter(|_| near);
    let node = endpoint.node_name.as_ref().filter(|_| near && distribution == Distribution::SameNode);
    endpoint.hints = (zone.is_some() || node.is_some()).then(|| EndpointHints {
        for_zones: zone.map(for_zone),
        for_nodes: node.map(|node| vec![ForNode { name: node.clone() }]),
    });
}

/// What a node adds to its zone.
#[derive(Debug, PartialEq, Eq)]
pub enum Part {
    Nothing,
    /// It does not say where it is, or what it has.
    Unknown,
    Millis(String, i64),
}

pub fn part(node: &Node) -> Part {
    let label = |key: &str| node.metadata.labels.as_ref().and_then(|l| l.get(key));
    let status = node.status.as_ref();
    let conditions = status.iter().flat_map(|s| s.conditions.iter().flatten());
    let ready = conditions.into_iter().filter(|c| c.type_ == "Ready").any(|c| c.status == "True");
    if !ready || EXCLUDED.iter().any(|key| label(key).is_some()) {
        return Part::Nothing;
    }
    let cpu = status.and_then(|s| s.allocatable.as_ref()?.get("cpu")).map(|q| Quantity::from(q).milli_value());
    match (label(ZONE_LABEL).filter(|z| !z.is_empty()), cpu.filter(|c| *c > 0)) {
        (Some(zone), Some(cpu)) => Part::Millis(zone.clone(), cpu),
        _ => Part::Unknown,
    }
}

/// The zones' shares; None if a node does not say where it is or what it has, or if there are fewer than two zones.
/// As `SetNodes` of the topology cache.
pub fn shares(nodes: &[Arc<Node>]) -> Option<Shares> {
    let mut millis: BTreeMap<String, i64> = BTreeMap::new();
    for node in nodes {
        match part(node) {
            Part::Nothing => {}
            Part::Unknown => return None,
            Part::Millis(zone, cpu) => *millis.entry(zone).or_default() += cpu,
        }
    }
    let total: i64 = millis.values().sum();
    (millis.len() > 1).then(|| millis.into_iter().map(|(zone, cpu)| (zone, cpu as f64 / total as f64)).collect())
}

/// Gives each ready endpoint the zone whose clients it serves, starting from what it has or where it is; a message if that
/// cannot be done well. As `AddHints`.
pub fn allocate(shares: Option<&Shares>, endpoints: &mut [&mut Endpoint]) -> Result<(), String> {
    endpoints.iter_mut().for_each(|e| {
        if !is_ready(e) {
            e.hints = None
        }
    });
    let mut ready: Vec<&mut &mut Endpoint> = endpoints.iter_mut().filter(|e| is_ready(e)).collect();
    let Some(shares) = shares else {
        return Err(
            "Insufficient Node information: allocatable CPU or zone not specified on one or more nodes".to_owned()
        );
    };
    let count = ready.len();
    let counted = |what: &str| Err(format!("{what} ({count} endpoints, {} zones)", shares.len()));
    if shares.len() > count {
        return counted("Insufficient number of endpoints");
    }
    let least = |share: &f64| (share * count as f64 / (1.0 + OVERLOAD)).ceil();
    if shares.values().map(least).sum::<f64>() > count as f64 {
        return counted("Minimum allocation of required endpoints exceeds overload threshold");
    }
    if ready.iter().any(|e| e.zone.as_deref().unwrap_or_default().is_empty()) {
        return Err("One or more endpoints do not have a zone specified".to_owned());
    }
    // What each zone lacks of its share.
    let mut lacks: BTreeMap<&str, f64> =
        shares.iter().map(|(zone, share)| (zone.as_str(), (share * count as f64).max(least(share)))).collect();
    for endpoint in &mut ready {
        let hinted = endpoint.hints.as_ref().and_then(|h| h.for_zones.as_ref()?.first().map(|z| z.name.clone()));
        let zone =
            hinted.filter(|zone| shares.contains_key(zone)).or_else(|| endpoint.zone.clone()).unwrap_or_default();
        if let Some((_, lack)) = lacks.iter_mut().find(|(known, _)| **known == zone) {
            *lack -= 1.0;
        }
        endpoint.hints = Some(EndpointHints { for_zones: Some(for_zone(&zone)), for_nodes: None });
    }
    loop {
        let order = |a: &(&&str, &f64), b: &(&&str, &f64)| a.1.total_cmp(b.1);
        let (Some((taker, lack)), Some((giver, surplus))) = (lacks.iter().max_by(order), lacks.iter().min_by(order))
        else {
            break;
        };
        let (taker, giver, lack, surplus) = (*taker, *giver, *lack, -*surplus);
        // A zone that is short of a whole endpoint gets it from whoever has more than its share.
        let is_short = lack >= 1.0 && surplus > 0.0;
        if !is_short && (surplus < 1.0 || lack < 0.5) {
            break;
        }
        let hinted = |e: &&mut &mut &mut Endpoint| {
            e.hints.as_ref().and_then(|h| h.for_zones.as_ref()?.first()).is_some_and(|z| z.name == giver)
        };
        let Some(endpoint) = ready.iter_mut().find(hinted) else { break };
        endpoint.hints = Some(EndpointHints { for_zones: Some(for_zone(taker)), for_nodes: None });
        *lacks.entry(taker).or_default() -= 1.0;
        *lacks.entry(giver).or_default() += 1.0;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn endpoint(zone: &str, ready: bool) -> Endpoint {
        serde_json::from_value(json!({"addresses": [], "conditions": {"ready": ready}, "nodeName": "n",
            "zone": if zone.is_empty() { None } else { Some(zone) }}))
        .unwrap()
    }

    fn hinted(endpoints: &[Endpoint]) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for zone in endpoints.iter().flat_map(|e| e.hints.iter().flat_map(|h| h.for_zones.iter().flatten())) {
            *counts.entry(zone.name.clone()).or_default() += 1;
        }
        counts
    }

    fn run(shares: &[(&str, f64)], endpoints: &mut [Endpoint]) -> Result<BTreeMap<String, usize>, String> {
        let shares: Shares = shares.iter().map(|(zone, share)| ((*zone).to_owned(), *share)).collect();
        allocate(Some(&shares), &mut endpoints.iter_mut().collect::<Vec<_>>())?;
        Ok(hinted(endpoints))
    }

    #[test]
    fn zones_get_their_share_or_the_reason_why_not() {
        let half: &[_] = &[("a", 0.5), ("b", 0.5)];
        for (shares, zones, expected) in [
            (half, "ab", Ok(vec![1, 1])),
            (half, "aaaa", Ok(vec![2, 2])),
            (half, "aaab", Ok(vec![2, 2])),
            (&[("a", 0.75), ("b", 0.25)], "aabb", Ok(vec![3, 1])),
            (half, "a", Err("Insufficient number of endpoints (1 endpoints, 2 zones)")),
            (half, "a-", Err("One or more endpoints do not have a zone specified")),
            (
                &[("a", 0.34), ("b", 0.33), ("c", 0.33)],
                "abca",
                Err("Minimum allocation of required endpoints exceeds overload threshold (4 endpoints, 3 zones)"),
            ),
        ] {
            let mut endpoints: Vec<_> =
                zones.chars().map(|z| endpoint(z.to_string().trim_matches('-'), true)).collect();
            let got = run(shares, &mut endpoints).map(|counts| counts.into_values().collect::<Vec<_>>());
            assert_eq!(got, expected.map_err(str::to_owned), "{zones}");
        }
    }

    #[test]
    fn the_field_keeps_traffic_near() {
        for (distribution, ready, zone, zones, nodes) in [
            (Distribution::SameZone, true, "z", 1, 0),
            (Distribution::SameNode, true, "z", 1, 1),
            (Distribution::SameNode, true, "", 0, 1),
            (Distribution::SameZone, true, "", 0, 0),
            (Distribution::SameZone, false, "z", 0, 0),
            (Distribution::Anywhere, true, "z", 0, 0),
        ] {
            let mut endpoint = endpoint(zone, ready);
            by_distribution(&mut endpoint, distribution);
            let hints = endpoint.hints.unwrap_or_default();
            let got = (hints.for_zones.map_or(0, |z| z.len()), hints.for_nodes.map_or(0, |n| n.len()));
            assert_eq!(got, (zones, nodes), "{distribution:?} {ready} {zone}");
        }
    }

    proptest! {
        #[test]
        fn no_zone_is_overloaded_and_nothing_changes_twice(
            weights in prop::collection::vec(1u32..9, 2..5),
            zones in prop::collection::vec(0usize..5, 1..60),
        ) {
            let total: u32 = weights.iter().sum();
            let shares: Shares =
                weights.iter().enumerate().map(|(z, w)| (z.to_string(), f64::from(*w) / f64::from(total))).collect();
            let mut endpoints: Vec<_> = zones.iter().map(|z| endpoint(&(z % weights.len()).to_string(), true)).collect();
            if allocate(Some(&shares), &mut endpoints.iter_mut().collect::<Vec<_>>()).is_ok() {
                let counts = hinted(&endpoints);
                for (zone, share) in &shares {
                    let fair = share * endpoints.len() as f64;
                    let got = counts.get(zone).copied().unwrap_or_default() as f64;
                    prop_assert!(got > 0.0 && fair / got <= 1.7, "zone {} has {} of {}", zone, got, fair);
                }
                let settled = endpoints.clone();
                allocate(Some(&shares), &mut endpoints.iter_mut().collect::<Vec<_>>()).unwrap();
                prop_assert_eq!(settled, endpoints);
            }
        }
    }
}
