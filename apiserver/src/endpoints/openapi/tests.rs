//! The documents equal Kubernetes' own, for the kinds that are served.

use super::*;
use std::path::Path;

const SHARED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/kubernetes-1.36/openapi");

/// A shared document, or None (said aloud) where the data is absent. Under CI it must be there.
fn shared(name: &str) -> Option<Value> {
    match std::fs::read(Path::new(SHARED).join(name)) {
        Ok(text) => Some(serde_json::from_slice(&text).unwrap()),
        Err(error) => {
            assert!(std::env::var_os("CI").is_none(), "{name}: {error}");
            println!("skipped: {name}: {error}");
            None
        }
    }
}

fn read(write: impl FnOnce(&mut Pen)) -> Value {
    serde_json::from_slice(&Packed::of(write).unpacked()).unwrap()
}

/// Puts what has no order into one, and takes out CBOR, which is not served.
fn normal(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.retain(|key, _| !key.starts_with("application/") || !key.contains("cbor"));
            for (key, value) in map.iter_mut() {
                normal(value);
                if let ("required" | "parameters" | "produces" | "consumes", Value::Array(list)) = (key.as_str(), value)
                {
                    list.retain(|item| item.as_str().is_none_or(|text| !text.contains("cbor")));
                    list.sort_by_key(Value::to_string);
                }
            }
        }
        Value::Array(list) => list.iter_mut().for_each(normal),
        _ => {}
    }
}

/// Where two values differ first.
fn difference(ours: &Value, theirs: &Value, at: &str) -> Option<String> {
    match (ours, theirs) {
        (Value::Object(a), Value::Object(b)) => {
            let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
            keys.into_iter().find_map(|key| match (a.get(key), b.get(key)) {
                (Some(a), Some(b)) => difference(a, b, &format!("{at}.{key}")),
                (a, b) => Some(format!("{at}.{key}: ours {a:?} theirs {b:?}")),
            })
        }
        (Value::Array(a), Value::Array(b)) if a.len() == b.len() => {
            a.iter().zip(b).enumerate().find_map(|(n, (a, b))| difference(a, b, &format!("{at}[{n}]")))
        }
        (a, b) => (a != b).then(|| format!("{at}: ours {a} theirs {b}")),
    }
}

#[test]
fn every_document_of_version_3_equals_kubernetes_own() {
    for path in documents() {
        let file = format!("v3/{}_openapi.json", path.trim_start_matches('.').replace('/', "__"));
        if path.starts_with('.') {
            continue;
        }
        let Some(mut theirs) = shared(&file) else { return };
        let mut ours = read(|pen| v3(&path, pen));
        for document in [&mut ours, &mut theirs] {
            normal(document);
            document["info"]["version"] = Value::Null;
        }
        if let Some(difference) = difference(&ours, &theirs, "") {
            panic!("{path}: {difference}");
        }
    }
}

#[test]
fn version_2_equals_kubernetes_own_in_what_is_served() {
    let Some(mut theirs) = shared("swagger.json") else { return };
    let mut ours = read(v2::json);
    // Theirs names parameters that many operations share; ours writes them out.
    let named = theirs["parameters"].take();
    resolve(&mut theirs["paths"], &named);
    normal(&mut ours);
    normal(&mut theirs);
    for (path, item) in ours["paths"].as_object().unwrap() {
        if let Some(difference) = difference(item, &theirs["paths"][path], path) {
            panic!("{difference}");
        }
    }
    let beta = |path: &str| path.split('/').any(|part| part.contains("alpha") || part.contains("beta"));
    for (path, item) in theirs["paths"].as_object().unwrap() {
        let group_without_versions =
            ["internal.apiserver", "storagemigration", "/logs"].iter().any(|g| path.contains(g));
        assert!(beta(path) || group_without_versions || ours["paths"].get(path).is_some(), "{path}: {item}");
    }
    for (name, ours) in ours["definitions"].as_object().unwrap() {
        let (mut ours, mut theirs) = (ours.clone(), theirs["definitions"][name].clone());
        if name.ends_with(".DeleteOptions") || name.ends_with(".WatchEvent") {
            // They are spoken in the groups that are served.
            ours["x-kubernetes-group-version-kind"].take();
            theirs["x-kubernetes-group-version-kind"].take();
        }
        if let Some(difference) = difference(&ours, &theirs, name) {
            panic!("{difference}");
        }
    }
}

fn resolve(value: &mut Value, named: &Value) {
    match value {
        Value::Object(map) => {
            let name = map.get("$ref").and_then(Value::as_str).and_then(|text| text.strip_prefix("#/parameters/"));
            match name.map(|name| named[name].clone()) {
                Some(parameter) => *value = parameter,
                None => map.values_mut().for_each(|value| resolve(value, named)),
            }
        }
        Value::Array(list) => list.iter_mut().for_each(|value| resolve(value, named)),
        _ => {}
    }
}

fn ask(path: &str, hash: &str, headers: &[(http::HeaderName, &str)]) -> (u16, HeaderMap) {
    let headers = headers.iter().map(|(name, value)| (name.clone(), HeaderValue::from_str(value).unwrap())).collect();
    let response = document(path, hash, &headers).unwrap();
    response.map_or_else(|error| (error.code(), HeaderMap::new()), |r| (r.status().as_u16(), r.headers().clone()))
}

#[test]
fn a_document_with_its_hash_never_changes() {
    let index = index();
    let address = index["paths"]["apis/apps/v1"]["serverRelativeURL"].as_str().unwrap();
    let (path, hash) = address.split_once("?hash=").unwrap();
    let (code, headers) = ask(path, hash, &[]);
    assert_eq!((code, headers[CACHE_CONTROL].to_str().unwrap()), (200, "public, immutable"));
    assert_eq!(headers[ETAG].to_str().unwrap(), format!("\"{hash}\""));
    let etag = format!("\"{hash}\"");
    assert_eq!(ask(path, "", &[(IF_NONE_MATCH, &etag)]).0, 304);
    let (code, headers) = ask(path, "OTHER", &[]);
    assert_eq!((code, headers[LOCATION].to_str().unwrap()), (301, address));
    assert_eq!(ask(path, "", &[(ACCEPT, "text/html")]).0, 406);
    assert!(document("/openapi/v3/apis/none/v1", "", &HeaderMap::new()).is_none());
}

#[test]
fn version_2_comes_as_json_and_as_protobuf() {
    let (code, headers) = ask("/openapi/v2", "", &[(ACCEPT, V2_PROTOBUF[1]), (ACCEPT_ENCODING, "gzip")]);
    assert_eq!((code, headers["content-type"].to_str().unwrap()), (200, V2_PROTOBUF[0]));
    assert_eq!(headers[CONTENT_ENCODING], "gzip");
    assert_eq!(ask("/openapi/v2", "", &[]).1["content-type"], JSON);
    assert_eq!(ask("/openapi/v2", "", &[(ACCEPT, "application/yaml")]).0, 406);
    let definition = gnostic::definition("a", &json!({"type": "string"}));
    assert_eq!(definition, b"J\x12\n\x10\n\x01a\x12\x0b\xb2\x01\x08\n\x06string");
    let head = gnostic::head("2.0", &json!({"title": "K", "version": "v"}), &json!({}));
    assert_eq!(head, b"\n\x032.0\x12\x06\n\x01K\x12\x01vj\0");
}
