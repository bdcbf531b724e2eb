//! What is allocated, case by case.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;

use super::*;
use crate::framework::Profile;
use crate::testing::{accepts, cluster, explain, node, pending, pod, scores};

fn plugin() -> DynamicResources {
    DynamicResources::new(None).expect("arguments")
}

fn snapshot() -> Snapshot {
    let mut snapshot = cluster(["a", "b"].map(|name| node(name).build()));
    for (name, expression) in [("gpu", "device.driver == 'gpu.io'"), ("big", "device.attributes['gpu.io'].big")] {
        let class = json!({"metadata": {"name": name}, "spec": {"selectors": [{"cel": {"expression": expression}}]}});
        snapshot.claims.set_class(name, Some(serde_json::from_value(class).expect("a class")));
    }
    // Two small devices on a, one of each on b; those on one board share an attribute.
    slice(&mut snapshot, "a", json!([device("a0", false, 0), device("a1", false, 1)]));
    slice(&mut snapshot, "b", json!([device("b0", false, 0), device("b1", true, 0)]));
    snapshot
}

fn device(name: &str, big: bool, board: i64) -> Value {
    json!({"name": name, "attributes": {"big": {"bool": big}, "board": {"int": board}}})
}

fn slice(snapshot: &mut Snapshot, node: &str, devices: Value) {
    let slice = json!({"metadata": {"name": node}, "spec": {"driver": "gpu.io", "nodeName": node, "devices": devices,
        "pool": {"name": node, "generation": 1, "resourceSliceCount": 1}}});
    snapshot.claims.slices.insert(node.into(), serde_json::from_value(slice).expect("a slice"));
}

fn claim(snapshot: &mut Snapshot, name: &str, devices: Value) {
    let claim = json!({"metadata": {"name": name, "namespace": "default", "uid": name}, "spec": {"devices": devices}});
    snapshot.claims.claims.insert(format!("default/{name}").into(), serde_json::from_value(claim).expect("a claim"));
}

fn user(name: &str, claim: &str) -> Pod {
    pod(name).spec(json!({"resourceClaims": [{"name": "c", "resourceClaimName": claim}]})).build()
}

fn exactly(fields: Value) -> Value {
    let mut request = json!({"deviceClassName": "gpu"});
    for (key, value) in fields.as_object().expect("fields") {
        request[key] = value.clone();
    }
    json!({"requests": [{"name": "r", "exactly": request}]})
}

#[test]
fn nodes_are_judged_by_their_devices() {
    let two_of_a_board = {
        let mut devices = exactly(json!({"count": 2}));
        devices["constraints"] = json!([{"matchAttribute": "gpu.io/board"}]);
        devices
    };
    let two_boards = {
        let mut devices = exactly(json!({"count": 2}));
        devices["constraints"] = json!([{"distinctAttribute": "gpu.io/board"}]);
        devices
    };
    let either = json!({"requests": [{"name": "r", "firstAvailable": [
        {"name": "best", "deviceClassName": "big"}, {"name": "second", "deviceClassName": "gpu", "count": 2}]}]});
    for (what, devices, expected) in [
        ("one", exactly(json!({})), [true, true]),
        ("two", exactly(json!({"count": 2})), [true, true]),
        ("three", exactly(json!({"count": 3})), [false, false]),
        ("all", exactly(json!({"allocationMode": "All"})), [true, true]),
        ("a big one", exactly(json!({"deviceClassName": "big"})), [false, true]),
        (
            "a named one",
            exactly(json!({"selectors": [{"cel": {"expression": "device.attributes['gpu.io'].board == 1"}}]})),
            [true, false],
        ),
        ("two of a board", two_of_a_board, [false, true]),
        ("two boards", two_boards, [true, false]),
        ("either", either, [true, true]),
        ("an absent class", exactly(json!({"deviceClassName": "none"})), [false, false]),
    ] {
        let mut snapshot = snapshot();
        claim(&mut snapshot, "c", devices);
        assert_eq!(accepts(&plugin(), &user("p", "c"), &snapshot), expected, "{what}");
    }
}

#[test]
fn what_is_reserved_is_not_there_for_others() {
    let (plugin, mut snapshot) = (plugin(), snapshot());
    claim(&mut snapshot, "first", exactly(json!({"count": 2})));
    claim(&mut snapshot, "second", exactly(json!({"count": 1})));
    let first = pending(user("p", "first"));
    let node = snapshot.nodes.find("a").expect("a");
    let reserved = plugin.reserve(&first, &mut snapshot, node).expect("reserved");
    let reserved: &Reserved = state_of(&reserved);
    let allocation = reserved.claims[0].1.as_ref().expect("an allocation");
    let results = allocation.devices.as_ref().and_then(|devices| devices.results.as_ref()).expect("results");
    let names: Vec<_> = results.iter().map(|result| result.device.as_str()).collect();
    assert_eq!(names, ["a0", "a1"]);
    assert_eq!(accepts(&plugin, &user("q", "second"), &snapshot), [false, true]);
    // Another user of the same claim goes where it is.
    assert_eq!(accepts(&plugin, &user("r", "first"), &snapshot), [true, false]);
    plugin.unreserve(&first, &mut snapshot);
    assert_eq!(accepts(&plugin, &user("q", "second"), &snapshot), [true, true]);
}

#[test]
fn counters_bound_what_partitions_take_together() {
    let mut snapshot = snapshot();
    let consumes = |amount: &str| json!([{"counterSet": "s", "counters": {"memory": {"value": amount}}}]);
    let mut devices = Vec::new();
    for (name, amount) in [("half-0", "20Gi"), ("half-1", "20Gi"), ("whole", "40Gi")] {
        let mut device = device(name, name == "whole", 0);
        device["consumesCounters"] = consumes(amount);
        devices.push(device);
    }
    slice(&mut snapshot, "a", json!(devices));
    let slice = Arc::make_mut(snapshot.claims.slices.get_mut("a").expect("slice"));
    slice.spec.shared_counters =
        serde_json::from_value(json!([{"name": "s", "counters": {"memory": {"value": "40Gi"}}}])).expect("counters");
    claim(&mut snapshot, "two", exactly(json!({"count": 2})));
    claim(&mut snapshot, "three", exactly(json!({"count": 3})));
    assert_eq!(accepts(&plugin(), &user("p", "two"), &snapshot), [true, true]);
    assert_eq!(accepts(&plugin(), &user("p", "three"), &snapshot), [false, false]);
}

#[test]
fn a_tainted_device_needs_a_toleration() {
    let mut snapshot = snapshot();
    let mut tainted = device("a0", false, 0);
    tainted["taints"] = json!([{"key": "broken", "effect": "NoSchedule"}]);
    slice(&mut snapshot, "a", json!([tainted]));
    claim(&mut snapshot, "plain", exactly(json!({})));
    claim(&mut snapshot, "tolerant", exactly(json!({"tolerations": [{"operator": "Exists"}]})));
    assert_eq!(accepts(&plugin(), &user("p", "plain"), &snapshot), [false, true]);
    assert_eq!(accepts(&plugin(), &user("p", "tolerant"), &snapshot), [true, true]);
}

#[test]
fn parts_of_a_shared_device_are_bounded_by_its_capacity() {
    let mut snapshot = snapshot();
    let mut shared = device("a0", false, 0);
    shared["allowMultipleAllocations"] = json!(true);
    shared["capacity"] = json!({"memory": {"value": "10Gi",
        "requestPolicy": {"default": "1Gi", "validRange": {"min": "1Gi", "step": "2Gi", "max": "9Gi"}}}});
    slice(&mut snapshot, "a", json!([shared]));
    slice(&mut snapshot, "b", json!([]));
    let asks = |memory: &str| exactly(json!({"capacity": {"requests": {"memory": memory}}}));
    for (name, devices) in [
        ("four", asks("4Gi")),
        ("six", asks("6Gi")),
        ("default", exactly(json!({}))),
        ("more", asks("10Gi")),
        ("other", exactly(json!({"capacity": {"requests": {"bandwidth": "1"}}}))),
        ("twice", exactly(json!({"count": 2, "capacity": {"requests": {"memory": "5Gi"}}}))),
        ("thrice", exactly(json!({"count": 3, "capacity": {"requests": {"memory": "5Gi"}}}))),
    ] {
        claim(&mut snapshot, name, devices);
    }
    let fits = |snapshot: &Snapshot, claim: &str| accepts(&plugin(), &user("p", claim), snapshot)[0];
    for (claim, expected) in
        [("four", true), ("six", true), ("more", false), ("other", false), ("twice", true), ("thrice", false)]
    {
        assert_eq!(fits(&snapshot, claim), expected, "{claim}");
    }
    let node = snapshot.nodes.find("a").expect("a");
    let reserved = plugin().reserve(&pending(user("first", "four")), &mut snapshot, node).expect("reserved");
    let reserved: &Reserved = state_of(&reserved);
    let devices = reserved.claims[0].1.as_ref().and_then(|allocation| allocation.devices.as_ref()).expect("devices");
    let result = &devices.results.as_ref().expect("results")[0];
    assert!(result.share_id.is_some());
    // Rounded up to 1 + 2 + 2.
    assert_eq!(json!(result.consumed_capacity), json!({"memory": "5Gi"}));
    for (claim, expected) in [("six", false), ("default", true), ("twice", false)] {
        assert_eq!(fits(&snapshot, claim), expected, "{claim}");
    }
}

#[test]
fn a_claim_whose_devices_will_not_become_ready_is_given_free() {
    let plugin = plugin();
    let told = |conditions: Value, since: &str| -> ResourceClaim {
        let result = json!({"request": "r", "driver": "gpu.io", "pool": "a", "device": "a0",
            "bindingConditions": ["Attached"], "bindingFailureConditions": ["Failed"]});
        let status = json!({"allocation": {"devices": {"results": [result]}, "allocationTimestamp": since},
            "devices": [{"driver": "gpu.io", "pool": "a", "device": "a0", "conditions": conditions}]});
        serde_json::from_value(json!({"metadata": {"name": "c"}, "spec": {}, "status": status})).expect("a claim")
    };
    let condition = |kind: &str| json!([{"type": kind, "status": "True", "reason": "R", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]);
    let now = Timestamp::now().to_string();
    for (conditions, since, ready, broken) in [
        (json!([]), now.as_str(), Some(false), false),
        (json!([]), "2020-01-01T00:00:00Z", Some(false), true),
        (condition("Attached"), "2020-01-01T00:00:00Z", Some(true), false),
        (condition("Failed"), now.as_str(), None, true),
    ] {
        let claim = told(conditions, since);
        assert_eq!(are_ready(&claim).ok(), ready, "{claim:?}");
        let mut snapshot = snapshot();
        snapshot.claims.claims.insert("default/c".into(), Arc::new(claim));
        assert_eq!(accepts(&plugin, &user("p", "c"), &snapshot), [!broken, !broken]);
    }
}

#[test]
fn devices_stand_for_extended_resources_where_the_node_has_none() {
    let mut snapshot = snapshot();
    let mut class = snapshot.claims.class("gpu").cloned().expect("a class");
    Arc::make_mut(&mut class).spec.extended_resource_name = Some("example.com/gpu".to_owned());
    snapshot.claims.set_class("gpu", Some(class));
    snapshot.set_node(&node("c").resource("example.com/gpu", "1").build());
    let asks = |resource: &str, amount: &str| pod("p").requests(&[(resource, amount)]).build();
    let gpu = "example.com/gpu";
    for (resource, amount, expected) in [
        (gpu, "1", [true, true, true]),
        // On c it is NodeResourcesFit's matter.
        (gpu, "3", [false, false, true]),
        ("deviceclass.resource.kubernetes.io/gpu", "2", [true, true, false]),
        ("deviceclass.resource.kubernetes.io/big", "1", [false, true, false]),
        ("example.com/nobodys", "1", [true, true, true]),
    ] {
        assert_eq!(accepts(&plugin(), &asks(resource, amount), &snapshot), expected, "{resource}");
    }
    let fit = crate::plugins::node_resources_fit::NodeResourcesFit::new(None).expect("arguments");
    assert_eq!(accepts(&fit, &asks(gpu, "3"), &snapshot), [true, true, false]);
    assert_eq!(accepts(&fit, &asks("example.com/nobodys", "1"), &snapshot), [false; 3]);
    // What one has reserved is not there for the next.
    let (plugin, first) = (plugin(), pending(asks(gpu, "2")));
    let a = snapshot.nodes.find("a").expect("a");
    let reserved = plugin.reserve(&first, &mut snapshot, a).expect("reserved");
    let (special, allocation) = state_of::<Reserved>(&reserved).special.as_ref().expect("a claim");
    assert_eq!(special.claim.metadata.generate_name.as_deref(), Some("p-extended-resources-"));
    assert_eq!(special.mappings[0].request_name, "container-0-request-0");
    assert_eq!(allocation.devices.as_ref().and_then(|devices| devices.results.as_ref()).map_or(0, Vec::len), 2);
    let mut second = asks(gpu, "1");
    second.metadata.uid = Some("second".to_owned());
    assert_eq!(accepts(&plugin, &second, &snapshot), [false, true, true]);
    plugin.unreserve(&first, &mut snapshot);
    assert_eq!(accepts(&plugin, &second, &snapshot), [true; 3]);
    // The claim of an attempt that failed is in the way.
    snapshot.claims.claims.insert("default/stale".into(), special.claim.clone());
    assert_eq!(accepts(&plugin, &asks(gpu, "1"), &snapshot), [false; 3]);
    assert_eq!(explain(&plugin, &asks(gpu, "1"), &snapshot, "a"), ["cannot schedule extended resource claim"]);
    assert_eq!(accepts(&plugin, &second, &snapshot), [true; 3]);
}

#[test]
fn a_search_ends_in_its_time() {
    let mut snapshot = snapshot();
    // No two are on one board: all pairs are tried, and all threes.
    slice(&mut snapshot, "a", (0..60).map(|board| device(&format!("a{board}"), false, board)).collect());
    let mut devices = exactly(json!({"count": 2}));
    devices["constraints"] = json!([{"matchAttribute": "gpu.io/board"}]);
    claim(&mut snapshot, "c", devices);
    let plugin = |timeout: &str| DynamicResources::new(Some(&json!({"filterTimeout": timeout}))).expect("arguments");
    let told = |timeout: &str| explain(&plugin(timeout), &user("p", "c"), &snapshot, "a");
    assert_eq!(told("1ns"), ["timed out trying to allocate devices"]);
    assert_eq!(told("0s"), ["cannot allocate all claims"]);
    assert_eq!(told("10s"), ["cannot allocate all claims"]);
}

#[test]
fn a_node_with_the_better_alternative_is_preferred() {
    let mut snapshot = snapshot();
    let either = json!({"requests": [{"name": "r", "firstAvailable": [
        {"name": "best", "deviceClassName": "big"}, {"name": "second", "deviceClassName": "gpu", "count": 2}]}]});
    claim(&mut snapshot, "either", either);
    claim(&mut snapshot, "plain", exactly(json!({})));
    // The big one is on b.
    assert_eq!(scores(&plugin(), &user("p", "either"), &snapshot), [87, 100]);
    assert_eq!(scores(&plugin(), &user("p", "plain"), &snapshot), [0, 0]);
}

#[test]
fn a_claim_that_was_made_for_another_pod_is_not_taken() {
    let mut snapshot = snapshot();
    claim(&mut snapshot, "made", exactly(json!({})));
    let mut own = pod("p").spec(json!({"resourceClaims": [{"name": "c", "resourceClaimTemplateName": "t"}]})).build();
    assert_eq!(accepts(&plugin(), &own, &snapshot), [false, false], "it is yet to be made");
    let held = |pod: &Pod, snapshot: &Snapshot| plugin().holds_back(&pending(pod.clone()), snapshot);
    let words = "pod \"default/p\": ResourceClaim not created yet";
    assert_eq!(held(&own, &snapshot).as_deref(), Some(words));
    assert_eq!(held(&user("p", "none"), &snapshot).as_deref(), Some("resourceclaim \"none\" not found"));
    assert_eq!(held(&user("p", "made"), &snapshot), None);
    let profile = Profile::default_profile().expect("default profile");
    let asked = profile.pre_enqueue.iter().map(|place| profile.plugin(*place).name());
    assert_eq!(asked.collect::<Vec<_>>(), ["SchedulingGates", "DynamicResources"]);
    let made = json!({"resourceClaimStatuses": [{"name": "c", "resourceClaimName": "made"}]});
    own.status = serde_json::from_value(made).expect("a status");
    for (owner, expected) in [("uid-q", [false, false]), ("uid-p", [true, true])] {
        let claim = Arc::make_mut(snapshot.claims.claims.get_mut("default/made").expect("the claim"));
        let owners = json!([{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": owner, "controller": true}]);
        claim.metadata.owner_references = serde_json::from_value(owners).expect("owners");
        assert_eq!(accepts(&plugin(), &own, &snapshot), expected, "{owner}");
    }
}
