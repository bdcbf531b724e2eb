//! What the server serves, for clients to find out: `/api`, `/apis` and below, and the aggregated form of it in one document.

use crate::server::body::Body;
use crate::server::negotiation::{Encoding, Wanted, aggregated_version};
use crate::server::respond;
use apimachinery::facts::{self, GroupFacts, KindFacts};
use apimachinery::status::StatusError;
use bytes::Bytes;
use http::Response;
use http::header::{ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH, VARY};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::sync::LazyLock;

/// Documents by path, encoded once; but for `/api`, which tells the server's own address.
static DOCUMENTS: LazyLock<HashMap<String, Bytes>> = LazyLock::new(documents);
/// The aggregated documents of `/api` and `/apis`, in both versions.
static AGGREGATED: LazyLock<Vec<Aggregated>> = LazyLock::new(|| {
    let all = AGGREGATED_TYPES.iter().flat_map(|(version, kind)| {
        ["/api", "/apis"].map(|path| aggregated(path, version, kind, |group| group.name.is_empty() == (path == "/api")))
    });
    all.collect()
});

const AGGREGATED_TYPES: [(&str, &str); 2] = [
    ("v2", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"),
    ("v2beta1", "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList"),
];

struct Aggregated {
    path: &'static str,
    version: &'static str,
    content_type: &'static str,
    bytes: Bytes,
    etag: String,
}

/// The discovery document at a path; None if there is none. `address` is where the server is reached.
pub fn document(
    path: &str,
    headers: &HeaderMap,
    wanted: Result<Wanted, StatusError>,
    address: &str,
) -> Option<Result<Response<Body>, StatusError>> {
    let path = path.trim_end_matches('/');
    if matches!(path, "/api" | "/apis")
        && let Some(version) = aggregated_version(headers)
    {
        let document = AGGREGATED.iter().find(|document| document.path == path && document.version == version)?;
        return Some(Ok(aggregated_response(document, headers)));
    }
    let bytes = if path == "/api" { api_versions(address) } else { DOCUMENTS.get(path)?.clone() };
    let wanted = match wanted {
        Ok(wanted) => wanted,
        Err(error) => return Some(Err(error)),
    };
    let mut response = match wanted.encoding {
        Encoding::Json => respond::plain(200, wanted.content_type(), Body::Full(bytes)),
        _ => respond::value(wanted, 200, &serde_json::from_slice(&bytes).unwrap_or_default()),
    };
    response.headers_mut().insert(VARY, HeaderValue::from_static("Accept"));
    Some(Ok(response))
}

/// Is there a group of this name?
pub fn has_group(group: &str) -> bool {
    group.is_empty() || facts::groups().iter().any(|known| known.name == group)
}

/// Is it the path of a group that lacks such a version?
pub fn lacks_version(path: &str) -> bool {
    let mut parts = path.trim_matches('/').split('/');
    match (parts.next(), parts.next(), parts.next()) {
        (Some("api"), Some(_), _) => true,
        (Some("apis"), Some(group), Some(_)) => has_group(group),
        _ => false,
    }
}

/// All paths of the index at `/`.
pub fn paths() -> Vec<&'static str> {
    DOCUMENTS.keys().map(String::as_str).chain(["/api"]).collect()
}

fn aggregated_response(document: &Aggregated, headers: &HeaderMap) -> Response<Body> {
    let known = headers.get(IF_NONE_MATCH).and_then(|v| v.to_str().ok());
    let mut response = if known == Some(document.etag.as_str()) {
        respond::plain(304, document.content_type, Body::Empty)
    } else {
        respond::plain(200, document.content_type, Body::Full(document.bytes.clone()))
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

fn api_versions(address: &str) -> Bytes {
    let server = json!({"clientCIDR": "0.0.0.0/0", "serverAddress": address});
    json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": [server]}).to_string().into()
}

fn documents() -> HashMap<String, Bytes> {
    let mut documents = HashMap::new();
    let mut add = |path: String, document: Value| documents.insert(path, Bytes::from(document.to_string()));
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
        name_it(&mut resource, kind);
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
                if !sub.group.is_empty() {
                    resource["group"] = sub.group.into();
                }
                resource["version"] = sub.version.into();
            }
            resources.push(resource);
        }
    }
    let group_version = apimachinery::meta::join_api_version(group.name, version);
    json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": resources})
}

/// Short names and categories, where a kind has any.
fn name_it(resource: &mut Value, kind: &KindFacts) {
    for (field, names) in [("shortNames", &kind.short_names), ("categories", &kind.categories)] {
        if !names.is_empty() {
            resource[field] = json!(names);
        }
    }
}

fn aggregated(
    path: &'static str,
    version: &'static str,
    content_type: &'static str,
    wanted: impl Fn(&GroupFacts) -> bool,
) -> Aggregated {
    let items: Vec<Value> = facts::groups().iter().filter(|group| wanted(group)).map(aggregated_group).collect();
    let api_version = format!("apidiscovery.k8s.io/{version}");
    let document = json!({"kind": "APIGroupDiscoveryList", "apiVersion": api_version, "metadata": {}, "items": items});
    let bytes = Bytes::from(document.to_string());
    let hash: String = Sha256::digest(&bytes).iter().map(|byte| format!("{byte:02X}")).collect();
    Aggregated { path, version, content_type, bytes, etag: format!("\"{hash}\"") }
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
    let metadata = if group.name.is_empty() { json!({}) } else { json!({"name": group.name}) };
    json!({"metadata": metadata, "versions": versions})
}

fn aggregated_resource(kind: &'static KindFacts) -> Value {
    // The group and version that the resource is in are not said again.
    let response_kind = |group: &str, version: &str, name: &str| {
        let (group, version) = if (group, version) == (kind.group, kind.version) { ("", "") } else { (group, version) };
        json!({"group": group, "version": version, "kind": name})
    };
    let mut resource = json!({
        "resource": kind.resource,
        "responseKind": response_kind(kind.group, kind.version, kind.kind),
        "scope": if kind.namespaced { "Namespaced" } else { "Cluster" },
        "singularResource": kind.singular,
        "verbs": kind.verbs,
    });
    name_it(&mut resource, kind);
    if !kind.subresources.is_empty() {
        let subresources = kind.subresources.iter().map(|sub| {
            json!({
                "subresource": sub.name,
                "responseKind": response_kind(sub.group, sub.version, sub.kind),
                "verbs": sub.verbs,
            })
        });
        resource["subresources"] = subresources.collect();
    }
    resource
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::header::ACCEPT;

    fn shared(name: &str) -> Option<Value> {
        let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/kubernetes-1.36/discovery");
        match std::fs::read(std::path::Path::new(root).join(name)) {
            Ok(text) => Some(serde_json::from_slice(&text).unwrap()),
            Err(error) => {
                assert!(std::env::var_os("CI").is_none(), "{name}: {error}");
                println!("skipped: {name}: {error}");
                None
            }
        }
    }

    fn stable(version: &Value) -> bool {
        !version["version"].as_str().unwrap().contains(['a', 'b'])
    }

    /// Keeps what is generally available: betas are off.
    fn keep_stable(groups: &mut Value) {
        let groups = groups.as_array_mut().unwrap();
        for group in groups.iter_mut() {
            group["versions"].as_array_mut().unwrap().retain(stable);
        }
        groups.retain(|group| !group["versions"].as_array().unwrap().is_empty());
    }

    fn parsed(bytes: &Bytes) -> Value {
        serde_json::from_slice(bytes).unwrap()
    }

    #[test]
    fn the_documents_equal_kubernetes_own() {
        let Some(mut apis) = shared("apis.json") else { return };
        keep_stable(&mut apis["groups"]);
        assert_eq!(parsed(&DOCUMENTS["/apis"]), apis);
        let mut compared = 0;
        for (path, bytes) in &*DOCUMENTS {
            let file = format!("{}.json", path.trim_start_matches('/').replace('/', "__"));
            let mut theirs = shared(&file).unwrap();
            let mut ours = parsed(bytes);
            if path == "/apis" {
                continue;
            }
            for document in [&mut ours, &mut theirs] {
                if let Some(versions) = document["versions"].as_array_mut() {
                    versions.retain(stable);
                }
                if document["kind"] == "APIResourceList" {
                    document["apiVersion"].take();
                }
            }
            assert_eq!(ours, theirs, "{path}");
            compared += 1;
        }
        assert!(compared > 40, "{compared}");
    }

    #[test]
    fn the_aggregated_document_equals_kubernetes_own() {
        let Some(mut theirs) = shared("aggregated_v2.json") else { return };
        keep_stable(&mut theirs["items"]);
        let ours = AGGREGATED.iter().find(|document| document.path == "/apis" && document.version == "v2").unwrap();
        assert_eq!(parsed(&ours.bytes)["items"], theirs["items"]);
    }

    fn ask(path: &str, headers: &HeaderMap) -> Option<(u16, HeaderMap)> {
        let response = document(path, headers, Wanted::of(headers, "", true), "10.0.0.1:6443")?;
        Some(response.map_or_else(
            |error| (error.code(), HeaderMap::new()),
            |response| (response.status().as_u16(), response.headers().clone()),
        ))
    }

    #[test]
    fn every_group_and_version_has_its_document() {
        let mut headers = HeaderMap::new();
        for path in ["/api", "/api/v1", "/apis", "/apis/apps", "/apis/apps/v1", "/apis/apps/v1/"] {
            assert_eq!(ask(path, &headers).unwrap().0, 200, "{path}");
        }
        assert!(ask("/apis/none", &headers).is_none());
        for kind in ["application/vnd.kubernetes.protobuf", "application/yaml"] {
            headers.insert(ACCEPT, kind.parse().unwrap());
            for path in ["/api", "/api/v1", "/apis", "/apis/apps"] {
                assert_eq!(ask(path, &headers).unwrap().1["content-type"], kind, "{path}");
            }
        }
        headers.insert(ACCEPT, "text/html".parse().unwrap());
        assert_eq!(ask("/apis", &headers).unwrap().0, 406);
    }

    #[test]
    fn the_aggregated_document_is_sent_to_who_prefers_it_and_once() {
        let mut headers = HeaderMap::new();
        let of = |version: &str| format!("application/json;g=apidiscovery.k8s.io;v={version};as=APIGroupDiscoveryList");
        for (accept, expected) in [
            (format!("{},application/json", of("v2")), of("v2")),
            (format!("{},application/json", of("v2beta1")), of("v2beta1")),
            (format!("{},{}", of("v3"), of("v2")), of("v2")),
            (format!("application/json,{}", of("v2")), "application/json".to_owned()),
            (format!("{};q=0.1,application/json;q=0.9", of("v2")), "application/json".to_owned()),
        ] {
            headers.insert(ACCEPT, accept.parse().unwrap());
            assert_eq!(ask("/apis", &headers).unwrap().1["content-type"], expected, "{accept}");
        }
        headers.insert(ACCEPT, of("v2").parse().unwrap());
        let etag = ask("/apis", &headers).unwrap().1["etag"].clone();
        headers.insert(IF_NONE_MATCH, etag);
        assert_eq!(ask("/apis", &headers).unwrap().0, 304);
        assert_eq!(ask("/api", &headers).unwrap().0, 200);
    }
}
