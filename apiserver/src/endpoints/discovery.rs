//! What the server serves, for clients to find out: `/api`, `/apis` and below, and the aggregated form of it in one document.

use crate::server::body::Body;
use crate::server::respond;
use apimachinery::facts::{self, GroupFacts, KindFacts};
use bytes::Bytes;
use http::header::{ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH, VARY};
use http::{Response, header::ACCEPT};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::sync::LazyLock;

/// Documents by path, encoded once.
static DOCUMENTS: LazyLock<HashMap<String, Bytes>> = LazyLock::new(documents);
static AGGREGATED_CORE: LazyLock<Aggregated> = LazyLock::new(|| aggregated(|group| group.name.is_empty()));
static AGGREGATED_GROUPS: LazyLock<Aggregated> = LazyLock::new(|| aggregated(|group| !group.name.is_empty()));

const AGGREGATED_TYPE: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

struct Aggregated {
    bytes: Bytes,
    etag: String,
}

/// The discovery document at a path; None if there is none.
pub fn document(path: &str, headers: &HeaderMap) -> Option<Response<Body>> {
    let path = path.trim_end_matches('/');
    if matches!(path, "/api" | "/apis") && wants_aggregated(headers) {
        let document = if path == "/api" { &AGGREGATED_CORE } else { &AGGREGATED_GROUPS };
        return Some(aggregated_response(document, headers));
    }
    let bytes = DOCUMENTS.get(path)?;
    let mut response = respond::plain(200, "application/json", Body::Full(bytes.clone()));
    response.headers_mut().insert(VARY, HeaderValue::from_static("Accept"));
    Some(response)
}

/// All paths of the index at `/`.
pub fn paths() -> Vec<&'static str> {
    let mut paths: Vec<&'static str> = DOCUMENTS.keys().map(String::as_str).collect();
    paths.sort_unstable();
    paths
}

fn wants_aggregated(headers: &HeaderMap) -> bool {
    let accept = headers.get(ACCEPT).and_then(|v| v.to_str().ok()).unwrap_or("");
    let first = accept.split(',').find(|item| {
        let item = item.trim();
        item.starts_with("application/json") && (!item.contains("as=") || is_aggregated(item))
    });
    first.is_some_and(is_aggregated)
}

fn is_aggregated(item: &str) -> bool {
    let has = |part: &str| item.split(';').any(|p| p.trim() == part);
    has("as=APIGroupDiscoveryList") && has("g=apidiscovery.k8s.io") && has("v=v2")
}

fn aggregated_response(document: &Aggregated, headers: &HeaderMap) -> Response<Body> {
    let known = headers.get(IF_NONE_MATCH).and_then(|v| v.to_str().ok());
    let mut response = if known == Some(document.etag.as_str()) {
        respond::plain(304, AGGREGATED_TYPE, Body::Empty)
    } else {
        respond::plain(200, AGGREGATED_TYPE, Body::Full(document.bytes.clone()))
    };
    if let Ok(etag) = HeaderValue::from_str(&document.etag) {
        response.headers_mut().insert(ETAG, etag);
    }
    response.headers_mut().insert(VARY, HeaderValue::from_static("Accept"));
    response
}

fn kinds_of<'g>(group: &'g GroupFacts, version: &'g str) -> impl Iterator<Item = &'static KindFacts> + 'g {
    facts::kinds().iter().filter(move |kind| kind.group == group.name && kind.version == version)
}

fn documents() -> HashMap<String, Bytes> {
    let mut documents = HashMap::new();
    let mut add = |path: String, document: Value| documents.insert(path, Bytes::from(document.to_string()));
    add("/api".to_owned(), json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []}));
    let mut groups = Vec::new();
    for group in facts::groups() {
        for version in &group.versions {
            let path = match group.name {
                "" => format!("/api/{version}"),
                name => format!("/apis/{name}/{version}"),
            };
            add(path, resource_list(group, version));
        }
        if !group.name.is_empty() {
            let description = group_description(group);
            let mut own = json!({"kind": "APIGroup", "apiVersion": "v1"});
            if let (Some(own), Some(description)) = (own.as_object_mut(), description.as_object()) {
                own.extend(description.clone());
            }
            add(format!("/apis/{}", group.name), own);
            groups.push(description);
        }
    }
    add("/apis".to_owned(), json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}));
    documents
}

fn group_description(group: &GroupFacts) -> Value {
    let version = |v: &str| json!({"groupVersion": format!("{}/{v}", group.name), "version": v});
    json!({
        "name": group.name,
        "versions": group.versions.iter().map(|v| version(v)).collect::<Vec<_>>(),
        "preferredVersion": group.versions.first().map(|v| version(v)),
    })
}

fn resource_list(group: &GroupFacts, version: &str) -> Value {
    let mut resources = Vec::new();
    for kind in kinds_of(group, version) {
        let mut resource = json!({
            "name": kind.resource,
            "singularName": kind.singular,
            "namespaced": kind.namespaced,
            "kind": kind.kind,
            "verbs": kind.verbs,
        });
        if !kind.short_names.is_empty() {
            resource["shortNames"] = json!(kind.short_names);
        }
        if !kind.categories.is_empty() {
            resource["categories"] = json!(kind.categories);
        }
        if !kind.storage_version_hash.is_empty() {
            resource["storageVersionHash"] = kind.storage_version_hash.into();
        }
        resources.push(resource);
        for sub in &kind.subresources {
            let mut resource = json!({
                "name": format!("{}/{}", kind.resource, sub.name),
                "singularName": "",
                "namespaced": kind.namespaced,
                "kind": sub.kind,
                "verbs": sub.verbs,
            });
            if (sub.group, sub.version) != (kind.group, kind.version) {
                resource["group"] = sub.group.into();
                resource["version"] = sub.version.into();
            }
            resources.push(resource);
        }
    }
    let group_version = apimachinery::meta::join_api_version(group.name, version);
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources})
}

fn aggregated(wanted: impl Fn(&GroupFacts) -> bool) -> Aggregated {
    let items: Vec<Value> = facts::groups().iter().filter(|group| wanted(group)).map(aggregated_group).collect();
    let document = json!({
        "kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": {}, "items": items,
    });
    let bytes = Bytes::from(document.to_string());
    let hash: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02X}")).collect();
    Aggregated { bytes, etag: format!("\"{hash}\"") }
}

fn aggregated_group(group: &GroupFacts) -> Value {
    let versions: Vec<Value> = group
        .versions
        .iter()
        .map(|version| {
            let resources: Vec<Value> = kinds_of(group, version).map(aggregated_resource).collect();
            json!({"version": version, "freshness": "Current", "resources": resources})
        })
        .collect();
    let mut metadata = json!({"creationTimestamp": null});
    if !group.name.is_empty() {
        metadata["name"] = group.name.into();
    }
    json!({"metadata": metadata, "versions": versions})
}

fn aggregated_resource(kind: &'static KindFacts) -> Value {
    let response_kind =
        |group: &str, version: &str, kind: &str| json!({"group": group, "version": version, "kind": kind});
    let mut resource = json!({
        "resource": kind.resource,
        "responseKind": response_kind(kind.group, kind.version, kind.kind),
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": kind.singular,
        "verbs": kind.verbs,
    });
    if !kind.short_names.is_empty() {
        resource["shortNames"] = json!(kind.short_names);
    }
    if !kind.categories.is_empty() {
        resource["categories"] = json!(kind.categories);
    }
    if !kind.subresources.is_empty() {
        let subresources: Vec<Value> = kind
            .subresources
            .iter()
            .map(|sub| {
                json!({
                    "subresource": sub.name,
                    "responseKind": response_kind(sub.group, sub.version, sub.kind),
                    "verbs": sub.verbs,
                })
            })
            .collect();
        resource["subresources"] = subresources.into();
    }
    resource
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_group_and_version_has_its_document() {
        let headers = HeaderMap::new();
        for path in ["/api", "/api/v1", "/apis", "/apis/apps", "/apis/apps/v1", "/apis/apps/v1/"] {
            assert_eq!(document(path, &headers).unwrap().status(), 200, "{path}");
        }
        assert!(document("/apis/none", &headers).is_none());
    }

    #[test]
    fn the_aggregated_document_is_sent_to_who_prefers_it_and_once() {
        let mut headers = HeaderMap::new();
        let accept = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";
        headers.insert(ACCEPT, accept.parse().unwrap());
        let response = document("/apis", &headers).unwrap();
        assert_eq!(response.headers()["content-type"], AGGREGATED_TYPE);
        headers.insert(IF_NONE_MATCH, response.headers()["etag"].clone());
        assert_eq!(document("/apis", &headers).unwrap().status(), 304);
        headers.insert(ACCEPT, "application/json".parse().unwrap());
        assert_eq!(document("/apis", &headers).unwrap().headers()["content-type"], "application/json");
    }
}
