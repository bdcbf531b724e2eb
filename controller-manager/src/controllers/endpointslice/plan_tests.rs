//! Which slices a Service gets, case by case.
use super::*;
use serde_json::{Value, json};

fn service(spec: Value) -> Service {
    let mut value = json!({"metadata": {"name": "web", "namespace": "ns", "uid": "s", "labels": {"team": "a"}},
        "spec": {"clusterIP": "10.96.0.5", "selector": {"app": "web"}, "ipFamilies": ["IPv4"],
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]}});
    for (k, v) in spec.as_object().into_iter().flatten() {
        value["spec"][k] = v.clone();
    }
    serde_json::from_value(value).unwrap()
}

fn pod(number: usize, ready: bool, more: Value) -> Arc<Pod> {
    let mut value = json!({"metadata": {"name": format!("p{number}"), "namespace": "ns", "uid": format!("u{number}"),
            "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "containers": []},
        "status": {"phase": "Running", "podIP": format!("10.0.{}.{}", number / 250, number % 250),
            "podIPs": [{"ip": format!("10.0.{}.{}", number / 250, number % 250)}, {"ip": format!("fd00::{number:x}")}],
            "conditions": [{"type": "Ready", "status": if ready {"True"} else {"False"}}]}});
    for (k, v) in more.as_object().into_iter().flatten() {
        for (k2, v2) in v.as_object().into_iter().flatten() {
            value[k][k2] = v2.clone();
        }
    }
    Arc::new(serde_json::from_value(value).unwrap())
}

/// Applies changes as the server would.
fn apply(existing: &[Arc<EndpointSlice>], changes: Changes) -> Vec<Arc<EndpointSlice>> {
    let mut after: Vec<_> = existing
        .iter()
        .filter(|s| !changes.delete.contains(s.metadata.name.as_ref().unwrap()))
        .map(|s| changes.update.iter().find(|u| u.metadata.name == s.metadata.name).unwrap_or(s).clone())
        .collect();
    for mut slice in changes.create {
        slice.metadata.name = Some(format!("web-{}", apimachinery::names::random_suffix(8)));
        after.push(slice);
    }
    after.into_iter().map(Arc::new).collect()
}

fn topology() -> Topology {
    Topology { zones: HashMap::from([("n1".to_owned(), Some("z1".to_owned()))]), shares: None }
}

fn go(service: &Service, pods: &[Arc<Pod>], existing: &[Arc<EndpointSlice>]) -> Vec<Arc<EndpointSlice>> {
    let after = apply(existing, plan(service, pods, &topology(), existing, 100));
    assert_eq!(plan(service, pods, &topology(), &after, 100), Changes::default(), "one step settles it");
    after
}

#[test]
fn an_endpoint_says_where_and_how_it_is() {
    let terminating = json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}});
    for (ready, more, publish, expected) in [
        (true, json!({}), false, (true, true, false)),
        (false, json!({}), false, (false, false, false)),
        (false, json!({}), true, (true, false, false)),
        (true, terminating.clone(), false, (false, true, true)),
        (false, terminating, false, (false, false, true)),
    ] {
        let service = service(json!({"publishNotReadyAddresses": publish}));
        let slices = go(&service, &[pod(1, ready, more)], &[]);
        let endpoint = &slices[0].endpoints.as_ref().unwrap()[0];
        let c = endpoint.conditions.as_ref().unwrap();
        assert_eq!((c.ready.unwrap(), c.serving.unwrap(), c.terminating.unwrap()), expected);
        assert_eq!(endpoint.zone.as_deref(), Some("z1"));
        assert_eq!(endpoint.node_name.as_deref(), Some("n1"));
        assert_eq!(endpoint.target_ref.as_ref().unwrap().uid.as_deref(), Some("u1"));
    }
}

#[test]
fn slices_carry_labels_owner_and_ports() {
    let slices = go(&service(json!({"clusterIP": "None"})), &[pod(1, true, json!({}))], &[]);
    let labels = slices[0].metadata.labels.as_ref().unwrap();
    assert_eq!(labels[SERVICE_LABEL], "web");
    assert_eq!(labels[MANAGED_BY_LABEL], MANAGED_BY);
    assert!(labels.contains_key("team") && labels.contains_key(backends::HEADLESS_LABEL));
    assert_eq!(slices[0].metadata.owner_references.as_ref().unwrap()[0].kind, "Service");
    let port = &slices[0].ports.as_ref().unwrap()[0];
    assert_eq!((port.name.as_deref(), port.port), (Some("http"), Some(8080)));
}

#[test]
fn headless_pods_have_their_hostnames() {
    let named = pod(1, true, json!({"spec": {"hostname": "web-0", "subdomain": "web"}}));
    let other = pod(2, true, json!({"spec": {"hostname": "web-1", "subdomain": "other"}}));
    let slices = go(&service(json!({"clusterIP": "None"})), &[named, other], &[]);
    let hostnames: Vec<_> = slices[0].endpoints.iter().flatten().map(|e| e.hostname.as_deref()).collect();
    assert_eq!(hostnames, [Some("web-0"), None]);
}

#[test]
fn both_families_have_slices_of_their_own() {
    let slices = go(&service(json!({"ipFamilies": ["IPv4", "IPv6"]})), &[pod(1, true, json!({}))], &[]);
    let mut families: Vec<_> = slices.iter().map(|s| s.address_type.as_str()).collect();
    families.sort_unstable();
    assert_eq!(families, ["IPv4", "IPv6"]);
    let back = go(&service(json!({})), &[pod(1, true, json!({}))], &slices);
    assert_eq!(back.len(), 1, "a family that the service lost loses its slices");
}

#[test]
fn a_service_without_pods_has_one_empty_slice() {
    let empty = go(&service(json!({})), &[], &[]);
    assert_eq!((empty.len(), empty[0].endpoints.as_ref().map(Vec::len)), (1, Some(0)));
    let full = go(&service(json!({})), &[pod(1, true, json!({}))], &empty);
    assert_eq!((full.len(), full[0].endpoints.as_ref().map(Vec::len)), (1, Some(1)));
    let gone = json!({"status": {"phase": "Succeeded"}});
    assert_eq!(go(&service(json!({})), &[pod(1, true, gone)], &full)[0].endpoints.as_ref().map(Vec::len), Some(0));
}

#[test]
fn slices_hold_at_most_a_hundred_and_change_little() {
    let pods: Vec<_> = (1..=250).map(|n| pod(n, true, json!({}))).collect();
    let service = service(json!({}));
    let slices = go(&service, &pods, &[]);
    let sizes = |slices: &[Arc<EndpointSlice>]| {
        let mut sizes: Vec<_> = slices.iter().map(|s| s.endpoints.as_ref().map_or(0, Vec::len)).collect();
        sizes.sort_unstable();
        sizes
    };
    assert_eq!(sizes(&slices), [50, 100, 100]);
    // One pod less and two more: as few slices as possible are written.
    let mut later: Vec<_> = pods[1..].to_vec();
    later.extend([pod(300, true, json!({})), pod(301, true, json!({}))]);
    let changes = plan(&service, &later, &topology(), &slices, 100);
    assert!(changes.create.is_empty() && changes.delete.is_empty());
    assert!(changes.update.len() <= 2, "{}", changes.update.len());
    let after = apply(&slices, changes);
    assert_eq!(sizes(&after).iter().sum::<usize>(), 251);
}

#[test]
fn what_new_slices_leave_over_goes_beside_others() {
    let service = service(json!({}));
    let pods: Vec<_> = (1..=190).map(|n| pod(n, true, json!({}))).collect();
    let slices = go(&service, &pods[..40], &[]);
    let changes = plan(&service, &pods, &topology(), &slices, 100);
    assert_eq!((changes.create.len(), changes.update.len()), (1, 1));
    assert_eq!(changes.update[0].endpoints.as_ref().map(Vec::len), Some(90));
}

#[test]
fn another_port_changes_the_slice_and_makes_no_new_one() {
    let slices = go(&service(json!({})), &[pod(1, true, json!({}))], &[]);
    let port = json!([{"name": "http", "port": 80, "targetPort": 9090, "protocol": "TCP"}]);
    let later = service(json!({"ports": port}));
    let changes = plan(&later, &[pod(1, true, json!({}))], &topology(), &slices, 100);
    assert_eq!((changes.create.len(), changes.delete.len(), changes.update.len()), (0, 0, 1));
    let after = apply(&slices, changes);
    assert_eq!(after[0].metadata.name, slices[0].metadata.name);
    assert_eq!(after[0].ports.as_ref().unwrap()[0].port, Some(9090));
    let mut foreign = slices[0].as_ref().clone();
    foreign.metadata.owner_references.as_mut().unwrap()[0].uid = "another".to_owned();
    let changes = plan(&later, &[pod(1, true, json!({}))], &topology(), &[Arc::new(foreign)], 100);
    assert_eq!((changes.create.len(), changes.delete.len()), (1, 1), "of a Service that had the name before");
}

#[test]
fn a_pod_whose_node_is_gone_is_left_out() {
    let lost = pod(1, true, json!({"spec": {"nodeName": "gone"}}));
    let count = |publish: bool| {
        let service = service(json!({"publishNotReadyAddresses": publish}));
        go(&service, std::slice::from_ref(&lost), &[])[0].endpoints.as_ref().map(Vec::len)
    };
    assert_eq!((count(false), count(true)), (Some(0), Some(1)));
}

#[test]
fn hints_come_and_go_with_the_field() {
    let pods = [pod(1, true, json!({}))];
    let near = go(&service(json!({"trafficDistribution": "PreferSameZone"})), &pods, &[]);
    let hints = |slices: &[Arc<EndpointSlice>]| slices[0].endpoints.as_ref().unwrap()[0].hints.clone();
    assert_eq!(hints(&near).unwrap().for_zones.unwrap()[0].name, "z1");
    assert_eq!(hints(&go(&service(json!({})), &pods, &near)), None);
}

#[test]
fn pods_with_other_ports_have_other_slices() {
    let named = service(json!({"ports": [{"name": "http", "port": 80, "targetPort": "web"}]}));
    let with = |n, port| {
        pod(
            n,
            true,
            json!({"spec": {"containers": [{"name": "c", "ports": [{"name": "web", "containerPort": port}]}]}}),
        )
    };
    let slices = go(&named, &[with(1, 8080), with(2, 9090), with(3, 8080)], &[]);
    assert_eq!(slices.len(), 2);
}
