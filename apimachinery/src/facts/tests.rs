//! The tables say what Kubernetes' documents say, and every type they name is there.

use super::*;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::PathBuf;

/// A document of the shared data, or None (said aloud) where the data is absent. Under CI it must be there.
fn document(path: &str) -> Option<Value> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared/kubernetes-1.36");
    match std::fs::read(root.join(path)) {
        Ok(text) => Some(serde_json::from_slice(&text).expect("the shared documents are JSON")),
        Err(error) => {
            assert!(std::env::var("CI").is_err_and(|_| true), "{path}: {error}");
            println!("skipped: {path}: {error}");
            None
        }
    }
}

#[test]
fn groups_and_resources_equal_discovery() {
    let Some(apis) = document("discovery/apis.json") else { return };
    let stable = |version: &str| !version.contains("alpha") && !version.contains("beta");
    let mut names = vec![""];
    for group in apis["groups"].as_array().unwrap() {
        let name = group["name"].as_str().unwrap();
        let versions: Vec<&str> =
            group["versions"].as_array().unwrap().iter().map(|v| v["version"].as_str().unwrap()).collect();
        let versions: Vec<&str> = versions.into_iter().filter(|v| stable(v)).collect();
        if versions.is_empty() {
            continue;
        }
        names.push(name);
        let facts = groups().iter().find(|g| g.name == name).unwrap();
        assert_eq!(facts.versions, versions, "{name}");
        for version in versions {
            let listed = document(&format!("discovery/apis__{name}__{version}.json")).unwrap();
            for r in listed["resources"].as_array().unwrap() {
                let path = r["name"].as_str().unwrap();
                let (main, sub) = path.split_once('/').map_or((path, None), |(a, b)| (a, Some(b)));
                let kind = resource(name, version, main).unwrap_or_else(|| panic!("{name}/{version} {main}"));
                let verbs: Vec<&str> = r["verbs"].as_array().unwrap().iter().map(|v| v.as_str().unwrap()).collect();
                match sub {
                    None => {
                        assert_eq!(
                            (kind.kind, kind.namespaced),
                            (r["kind"].as_str().unwrap(), r["namespaced"].as_bool().unwrap())
                        );
                        assert_eq!(kind.verbs, verbs, "{path}");
                        assert_eq!(kind.singular, r["singularName"].as_str().unwrap());
                    }
                    Some(sub) => {
                        let facts = kind.subresource(sub).unwrap_or_else(|| panic!("{path}"));
                        assert_eq!((facts.kind, &facts.verbs), (r["kind"].as_str().unwrap(), &verbs), "{path}");
                    }
                }
            }
        }
    }
    assert_eq!(groups().iter().map(|g| g.name).collect::<Vec<_>>(), names);
}

#[test]
fn what_is_offered_equals_discovery_and_is_not_served() {
    let Some(listed) = document("discovery/apis__certificates.k8s.io__v1beta1.json") else { return };
    let mut names = Vec::new();
    for kind in offered() {
        assert_eq!((kind.group, kind.version), ("certificates.k8s.io", "v1beta1"));
        assert_eq!(resource(kind.group, kind.version, kind.resource), None);
        names.push(kind.resource.to_owned());
        names.extend(kind.subresources.iter().map(|sub| format!("{}/{}", kind.resource, sub.name)));
    }
    let theirs: Vec<&str> =
        listed["resources"].as_array().unwrap().iter().map(|r| r["name"].as_str().unwrap()).collect();
    assert_eq!(names, theirs);
    assert!(versions_off().iter().any(|group| group.name == "resource.k8s.io" && group.versions.contains(&"v1beta2")));
}

#[test]
fn fields_equal_openapi() {
    let Some(swagger) = document("openapi/swagger.json") else { return };
    let mut seen = 0;
    for (name, definition) in swagger["definitions"].as_object().unwrap() {
        let short = [
            "io.k8s.apimachinery.pkg.apis.",
            "io.k8s.apiextensions-apiserver.pkg.apis.",
            "io.k8s.kube-aggregator.pkg.apis.",
            "io.k8s.api.",
        ]
        .iter()
        .find_map(|prefix| name.strip_prefix(prefix));
        let (Some(facts), Some(properties)) = (short.and_then(schema), definition["properties"].as_object()) else {
            continue;
        };
        seen += 1;
        assert_eq!(
            facts.fields.iter().map(|f| f.name).collect::<BTreeSet<_>>(),
            properties.keys().map(String::as_str).collect::<BTreeSet<_>>(),
            "{name}"
        );
        for field in &facts.fields {
            let p = &properties[field.name];
            assert_eq!(field.merge_key, p["x-kubernetes-patch-merge-key"].as_str(), "{name}.{}", field.name);
            let list_type = match p["x-kubernetes-list-type"].as_str() {
                Some("map") => ListType::Map,
                Some("set") => ListType::Set,
                _ => ListType::Atomic,
            };
            assert_eq!(field.list_type, list_type, "{name}.{}", field.name);
            let required = definition["required"].as_array().is_some_and(|r| r.iter().any(|f| f == field.name));
            assert_eq!(field.required, required, "{name}.{}", field.name);
            match p["type"].as_str() {
                Some("array") => assert!(matches!(field.kind, Type::List(_)), "{name}.{}", field.name),
                Some("boolean") => assert_eq!(field.kind, Type::Bool),
                Some("integer") => assert!(matches!(field.kind, Type::Int32 | Type::Int64)),
                _ => {}
            }
        }
    }
    assert!(seen > 500, "{seen}");
}

#[test]
fn columns_equal_the_table() {
    let Some(tables) = document("table-columns.json") else { return };
    for (name, kind, group) in [
        ("api.Pod", "Pod", ""),
        ("apps.Deployment", "Deployment", "apps"),
        ("nodeapi.RuntimeClass", "RuntimeClass", "node.k8s.io"),
    ] {
        let ours = columns(group, kind).unwrap();
        let theirs = tables[name].as_array().unwrap();
        assert_eq!(ours.len(), theirs.len());
        for (a, b) in ours.iter().zip(theirs) {
            assert_eq!(
                (a.name, a.kind, i64::from(a.priority)),
                (b["name"].as_str().unwrap(), b["type"].as_str().unwrap(), b["priority"].as_i64().unwrap())
            );
        }
    }
}

#[test]
fn every_stored_kind_has_a_schema_with_object_meta() {
    for kind in kinds().iter().chain(offered()).filter(|k| k.is_stored()) {
        let facts = schema_of(kind.group, kind.version, kind.kind).unwrap_or_else(|| panic!("{kind:?}"));
        let meta = facts.field("metadata").and_then(|f| f.kind.object()).unwrap();
        assert_eq!(meta.name, "meta.v1.ObjectMeta");
        assert!(schema_of(kind.group, kind.version, &format!("{}List", kind.kind)).is_some(), "{}", kind.kind);
    }
}

#[test]
fn lookups_find_what_they_name() {
    let pods = resource("", "v1", "pods").unwrap();
    assert_eq!((pods.kind, pods.namespaced, pods.storage_prefix), ("Pod", true, "pods"));
    assert_eq!(pods.subresource("eviction").map(|s| (s.group, s.kind)), Some(("policy", "Eviction")));
    assert_eq!(preferred_kind("autoscaling", "HorizontalPodAutoscaler").map(|k| k.version), Some("v2"));
    let ports = schema("core.v1.Container").and_then(|c| c.field("ports")).unwrap();
    assert_eq!((ports.merge_key, ports.list_keys.clone()), (Some("containerPort"), vec!["containerPort", "protocol"]));
    assert_eq!(schema("core.v1.ContainerPort").and_then(|c| c.field("protocol")).unwrap().default, Some("\"TCP\""));
    assert_eq!(schema("core.v1.Volume").and_then(|c| c.field("configMap")).unwrap().numbers, vec![2, 19]);
}
