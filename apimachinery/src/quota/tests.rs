use super::*;
use serde_json::json;

fn at(text: &str) -> Timestamp {
    text.parse().unwrap()
}

fn usage(group: &str, resource: &str, object: &Value) -> BTreeMap<String, String> {
    let measured = measure(group, resource, object, at("2026-01-01T00:00:00Z"));
    measured.usage.into_iter().map(|(name, amount)| (name, amount.to_string())).collect()
}

fn as_json(usage: &BTreeMap<String, String>) -> Value {
    json!(usage)
}

#[test]
fn every_kind_is_measured_by_what_it_uses() {
    let pod = json!({"spec": {"containers": [{"name": "c", "resources": {
        "requests": {"cpu": "100m", "example.com/gpu": "2", "hugepages-2Mi": "4Mi", "kubernetes.io/x": "1"},
        "limits": {"cpu": "1", "memory": "1Gi"}}}]}});
    let ended = json!({"spec": {"containers": []}, "status": {"phase": "Succeeded"}});
    let lost = json!({"metadata": {"deletionTimestamp": "2025-12-31T23:00:00Z", "deletionGracePeriodSeconds": 30},
        "spec": {"containers": []}});
    let service = |kind: &str, allocate: bool| {
        json!({"spec": {"type": kind, "allocateLoadBalancerNodePorts": allocate,
            "ports": [{"port": 1, "nodePort": 30000}, {"port": 2}]}})
    };
    let claim = json!({"spec": {"storageClassName": "gold", "resources": {"requests": {"storage": "1.5"}}},
        "status": {"allocatedResources": {"storage": "1Gi"}}});
    let devices = json!({"spec": {"devices": {"requests": [
        {"name": "a", "exactly": {"deviceClassName": "gpu", "allocationMode": "ExactCount", "count": 2}},
        {"name": "b", "firstAvailable": [{"deviceClassName": "gpu", "allocationMode": "All"},
            {"deviceClassName": "gpu", "count": 3}, {"deviceClassName": "nic"}]}]}}});
    for (group, resource, object, expected) in [
        (
            "",
            "pods",
            pod,
            json!({"count/pods": "1", "pods": "1", "cpu": "100m", "requests.cpu": "100m", "limits.cpu": "1",
                "limits.memory": "1Gi", "hugepages-2Mi": "4Mi", "requests.hugepages-2Mi": "4Mi",
                "requests.example.com/gpu": "2"}),
        ),
        ("", "pods", ended, json!({"count/pods": "1"})),
        ("", "pods", lost, json!({"count/pods": "1"})),
        (
            "",
            "services",
            service("ClusterIP", true),
            json!({"count/services": "1", "services": "1", "services.nodeports": "0", "services.loadbalancers": "0"}),
        ),
        (
            "",
            "services",
            service("LoadBalancer", true),
            json!({"count/services": "1", "services": "1", "services.nodeports": "2", "services.loadbalancers": "1"}),
        ),
        (
            "",
            "services",
            service("LoadBalancer", false),
            json!({"count/services": "1", "services": "1", "services.nodeports": "1", "services.loadbalancers": "1"}),
        ),
        (
            "",
            "persistentvolumeclaims",
            claim,
            json!({"count/persistentvolumeclaims": "1", "persistentvolumeclaims": "1", "requests.storage": "1Gi",
                "gold.storageclass.storage.k8s.io/persistentvolumeclaims": "1",
                "gold.storageclass.storage.k8s.io/requests.storage": "1Gi"}),
        ),
        (
            "resource.k8s.io",
            "resourceclaims",
            devices,
            json!({"count/resourceclaims.resource.k8s.io": "1", "gpu.deviceclass.resource.k8s.io/devices": "34",
                "nic.deviceclass.resource.k8s.io/devices": "1"}),
        ),
        ("", "secrets", json!({}), json!({"count/secrets": "1", "secrets": "1"})),
        ("apps", "deployments", json!({}), json!({"count/deployments.apps": "1"})),
    ] {
        let got = usage(group, resource, &object);
        assert_eq!(as_json(&got), expected, "{group}/{resource} {object}");
        for name in got.keys() {
            assert!(counts(group, resource, name), "{name}");
            assert!(counted(name).contains(&(group.to_owned(), resource.to_owned())), "{name}");
        }
    }
    assert!(counted("requests.kubernetes.io/x").is_empty() && counted("nonsense").is_empty());
    for name in ["requests.example.com/gpu", "requests.deviceclass.resource.kubernetes.io/gpu"] {
        assert_eq!(counted(name).len(), 2, "pods ask for it, and claims");
    }
}

/// As `TestResourceClaimEvaluatorUsage`.
#[test]
fn what_a_pod_is_charged_with_its_claim_is_not() {
    const IMPLICIT: &str = "deviceclass.resource.kubernetes.io/gpu";
    let pod = |requests: &Value, status: Value| {
        json!({"metadata": {"name": "p", "uid": "u"}, "status": status,
            "spec": {"containers": [{"name": "c", "resources": {"requests": requests}}]}})
    };
    let claim = |name: &str, count: i64, of_pod: bool| {
        let mut claim = json!({"metadata": {"name": name, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"devices": {"requests": [{"exactly": {"deviceClassName": "gpu", "count": count}}]}}});
        if of_pod {
            claim["metadata"]["annotations"] = json!({"resource.kubernetes.io/extended-resource-claim": "true"});
            claim["metadata"]["ownerReferences"] =
                json!([{"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": "u", "controller": true}]);
        }
        claim
    };
    let says = json!({"extendedResourceClaimStatus": {"resourceClaimName": "foo"}});
    let both = json!({"example.com/gpu": "1", IMPLICIT: "1"});
    for (claim, pod, others, implicit, explicit) in [
        (claim("foo", 1, false), pod(&both, says.clone()), vec![], 1, 1),
        (claim("foo", 1, true), pod(&json!({IMPLICIT: "1"}), says.clone()), vec![], 0, 1),
        (claim("foo", 1, true), pod(&json!({"example.com/gpu": "1"}), says.clone()), vec![], 1, 0),
        (claim("foo", 2, true), pod(&both, says.clone()), vec![], 1, 1),
        (claim("foo", 2, true), pod(&both, json!({})), vec![], 1, 1),
        (claim("foo-copy", 2, true), pod(&both, json!({})), vec![claim("foo", 2, true)], 2, 2),
        (claim("other", 2, true), pod(&both, says), vec![], 2, 2),
    ] {
        let mut measured = measure("resource.k8s.io", "resourceclaims", &claim, Timestamp::UNIX_EPOCH);
        let pod = charged_pod(&claim, |name| Some(pod.clone()).filter(|_| name == "p"), || others.clone());
        let pod = pod.map(|pod| measure("", "pods", &pod, Timestamp::UNIX_EPOCH));
        name_devices(&mut measured, |class| Some(format!("example.com/{class}")), pod.as_ref());
        let counts = |name: &str| measured.usage.get(name).map_or(0, Quantity::value);
        assert_eq!(counts(&format!("requests.{IMPLICIT}")), implicit, "{claim}");
        assert_eq!(counts("requests.example.com/gpu"), explicit, "{claim}");
    }
}

#[test]
fn scopes_pick_objects() {
    let pod = |spec: Value| {
        let mut spec = spec;
        spec["containers"] = json!([{"name": "c", "resources": spec["r"].take()}]);
        measure("", "pods", &json!({"spec": spec}), Timestamp::UNIX_EPOCH)
    };
    let quota = |scopes: Value, expressions: Value| {
        Quota::of(&json!({"spec": {"scopes": scopes, "scopeSelector": {"matchExpressions": expressions}}}))
    };
    let class = |operator: &str, values: &[&str]| {
        quota(json!([]), json!([{"scopeName": "PriorityClass", "operator": operator, "values": values}]))
    };
    let scope = |name: &str| quota(json!([name]), json!([]));
    let affinity = json!({"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"topologyKey": "z", "namespaceSelector": {}}]}}});
    let requests = json!({"r": {"requests": {"cpu": "1"}}});
    for (quota, spec, expected) in [
        (scope("Terminating"), json!({"activeDeadlineSeconds": 5}), true),
        (scope("Terminating"), json!({}), false),
        (scope("NotTerminating"), json!({}), true),
        (scope("BestEffort"), json!({}), true),
        (scope("BestEffort"), requests.clone(), false),
        (scope("NotBestEffort"), requests, true),
        (scope("CrossNamespacePodAffinity"), affinity, true),
        (scope("CrossNamespacePodAffinity"), json!({}), false),
        (scope("VolumeAttributesClass"), json!({}), false),
        (class("In", &["high"]), json!({"priorityClassName": "high"}), true),
        (class("In", &["high"]), json!({}), false),
        (class("NotIn", &["high"]), json!({"priorityClassName": "low"}), true),
        (class("Exists", &[]), json!({"priorityClassName": "low"}), true),
        (class("DoesNotExist", &[]), json!({"priorityClassName": "low"}), false),
        (class("DoesNotExist", &[]), json!({}), true),
    ] {
        assert_eq!(quota.covers(&pod(spec.clone())), expected, "{quota:?} {spec}");
    }
    let claim = json!({"spec": {"volumeAttributesClassName": "fast"}});
    let claim = measure("", "persistentvolumeclaims", &claim, Timestamp::UNIX_EPOCH);
    let fast = json!([{"scopeName": "VolumeAttributesClass", "operator": "In", "values": ["fast"]}]);
    assert!(quota(json!([]), fast).covers(&claim));
    assert!(!measure("", "secrets", &json!({}), Timestamp::UNIX_EPOCH).scopes.fits(&scope("Terminating").scopes[0]));
}

#[test]
fn what_does_not_fit_is_told_as_kubernetes_tells_it() {
    let quota = |hard: Value, used: Value| {
        Quota::of(&json!({"metadata": {"name": "q"}, "spec": {}, "status": {"hard": hard, "used": used}}))
    };
    let pods = ("", "pods");
    let pod = |resources: Value| {
        let pod =
            json!({"spec": {"containers": [{"name": "c", "resources": resources}], "initContainers": [{"name": "i"}]}});
        measure("", "pods", &pod, Timestamp::UNIX_EPOCH)
    };
    let sized = |cpu: &str| {
        let container = json!({"name": "c", "resources": {"requests": {"cpu": cpu}}});
        measure("", "pods", &json!({"spec": {"containers": [container]}}), Timestamp::UNIX_EPOCH)
    };
    let asked = quota(json!({"pods": "2", "requests.cpu": "1"}), json!({"pods": "1", "requests.cpu": "600m"}));
    assert_eq!(
        asked.charge(pods, &sized("500m"), None, false).unwrap_err(),
        "exceeded quota: q, requested: requests.cpu=500m, used: requests.cpu=600m, limited: requests.cpu=1"
    );
    let added = asked.charge(pods, &sized("400m"), None, false).unwrap();
    assert_eq!(to_value(&added), json!({"pods": "1", "requests.cpu": "400m"}));
    assert_eq!(
        to_value(&asked.charge(pods, &sized("900m"), Some(&sized("500m")), false).unwrap()),
        json!({"requests.cpu": "400m"})
    );
    assert!(asked.charge(pods, &sized("100m"), Some(&sized("500m")), false).unwrap().is_empty());
    assert_eq!(
        to_value(&asked.charge(pods, &sized("5"), None, true).unwrap()),
        json!({"pods": "1", "requests.cpu": "5"})
    );
    assert_eq!(
        quota(json!({"limits.cpu": "1", "memory": "1Gi"}), json!({})).charge(
            pods,
            &pod(json!({"limits": {"cpu": "1"}})),
            None,
            false
        ),
        Err("failed quota: q: must specify limits.cpu for: i; memory for: c,i".to_owned())
    );
    assert_eq!(
        quota(json!({"pods": "1", "count/pods": "1"}), json!({"pods": "0"})).charge(pods, &sized("1"), None, false),
        Err("status unknown for quota: q, resources: count/pods,pods".to_owned())
    );
    assert_eq!(
        quota(json!({"secrets": "0"}), json!({"secrets": "0"})).charge(pods, &sized("1"), None, false),
        Ok(Resources::new())
    );
}

#[test]
fn what_was_added_can_be_released() {
    let mut quota = Quota::of(&json!({"status": {"hard": {"pods": "2"}, "used": {"pods": "1"}}}));
    let added = Resources::from([("pods".to_owned(), Quantity::from_value(1))]);
    quota.add(&added);
    assert_eq!(to_value(&quota.used), json!({"pods": "2"}));
    for left in ["1", "0", "0"] {
        quota.release(&added);
        assert_eq!(to_value(&quota.used), json!({"pods": left}));
    }
}

#[test]
fn what_is_limited_by_default_needs_a_quota() {
    let limited: Vec<Limited> = serde_json::from_value(json!([
        {"resource": "persistentvolumeclaims", "matchContains": [".storageclass.storage.k8s.io/requests.storage"]},
        {"resource": "pods", "matchScopes": [{"scopeName": "PriorityClass", "operator": "In", "values": ["a", "b"]}]},
    ]))
    .unwrap();
    let quota = |hard: &str, selector: Value| {
        Quota::of(&json!({"metadata": {"name": "q"}, "spec": {"scopeSelector": {"matchExpressions": selector}},
            "status": {"hard": {hard: "1"}, "used": {hard: "0"}}}))
    };
    let claim = json!({"spec": {"storageClassName": "gold", "resources": {"requests": {"storage": "1Gi"}}}});
    let plain = json!({"spec": {"resources": {"requests": {"storage": "1Gi"}}}});
    let pod = |class: &str| json!({"spec": {"priorityClassName": class, "containers": []}});
    let in_a = json!([{"scopeName": "PriorityClass", "operator": "In", "values": ["a"]}]);
    let gold = "gold.storageclass.storage.k8s.io/requests.storage";
    let scopes = Some(Uncovered::Scopes("[{PriorityClass In [a b]}]".to_owned()));
    for (resource, object, quotas, expected) in [
        ("persistentvolumeclaims", &claim, vec![], Some(Uncovered::Resources(vec![gold.to_owned()]))),
        ("persistentvolumeclaims", &claim, vec![quota(gold, json!([]))], None),
        ("persistentvolumeclaims", &plain, vec![], None),
        ("pods", &pod("a"), vec![quota("pods", json!([]))], scopes.clone()),
        ("pods", &pod("b"), vec![quota("pods", in_a.clone())], scopes),
        ("pods", &pod("a"), vec![quota("pods", in_a)], None),
        ("pods", &pod("c"), vec![], None),
    ] {
        let measured = measure("", resource, object, at("2026-01-01T00:00:00Z"));
        assert_eq!(measured.uncovered(("", resource), true, &limited, &quotas), expected, "{object}");
        assert_eq!(measured.uncovered(("", resource), measured.exceeds(&measured), &limited, &quotas), None);
    }
}
