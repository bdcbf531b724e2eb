//! Both ways, over every kind that there is, and over what no client should send.

use super::*;
use crate::decode::{FieldValidation, decode_json, decode_value};
use crate::facts::{self, TypeFacts};
use proptest::prelude::*;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

/// Objects with every field set: name, type, and the paths of JSON, YAML and protobuf.
fn objects() -> Option<Vec<(String, &'static TypeFacts, PathBuf)>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/kubernetes-1.36/objects");
    if !directory.exists() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing", directory.display());
        println!("skipped: there are no objects in {}", directory.display());
        return None;
    }
    let mut objects = Vec::new();
    for file in std::fs::read_dir(directory).unwrap() {
        let path = file.unwrap().path();
        let Some(name) = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.strip_suffix(".pb")) else {
            continue;
        };
        let (rest, kind) = name.rsplit_once('.').unwrap();
        let (group, version) = rest.rsplit_once('.').unwrap();
        let group = if group == "core" { "" } else { group };
        let shared = || group.is_empty().then(|| facts::schema(&format!("meta.v1.{kind}"))).flatten();
        match facts::schema_of(group, version, kind).or_else(shared) {
            Some(facts) => objects.push((name.to_owned(), facts, path.clone())),
            None => println!("not served: {name}"),
        }
    }
    Some(objects)
}

fn json_of(text: &[u8], facts: &'static TypeFacts) -> Value {
    decode_json(text, facts, FieldValidation::Ignore).unwrap().value
}

fn canonical(value: Value, facts: &'static TypeFacts) -> Value {
    decode_value(value, facts, FieldValidation::Ignore).unwrap().value
}

#[test]
fn an_object_is_the_same_in_json_yaml_and_protobuf() {
    let Some(objects) = objects() else { return };
    for (name, facts, path) in &objects {
        let pb = std::fs::read(path).unwrap();
        let text = std::fs::read(path.with_file_name(format!("{name}.json"))).unwrap();
        let yaml = std::fs::read_to_string(path.with_file_name(format!("{name}.yaml"))).unwrap();
        let expected = json_of(&text, facts);
        let decoded = canonical(decode(&envelope(&pb).unwrap(), facts).unwrap(), facts);
        // An event's object is kept as it was sent.
        if !name.ends_with(".WatchEvent") {
            assert_eq!(decoded, expected, "{name}");
        }
        let document = crate::yaml::documents(&yaml).unwrap().remove(0);
        assert_eq!(canonical(document, facts), expected, "{name} from YAML");
        let written = crate::yaml::to_string(&expected).unwrap();
        assert_eq!(crate::yaml::documents(&written).unwrap().first(), Some(&expected), "{name} to YAML");

        let encoded = enclose(
            expected["apiVersion"].as_str().unwrap_or(""),
            expected["kind"].as_str().unwrap_or(""),
            &encode(&expected, facts),
        );
        let again = canonical(decode(&envelope(&encoded).unwrap(), facts).unwrap(), facts);
        assert_eq!(again, expected, "{name} there and back");
    }
    assert!(objects.len() > 70, "only {} kinds were compared", objects.len());
}

#[test]
fn go_and_we_write_the_same_bytes() {
    let Some(objects) = objects() else { return };
    let mut same = 0;
    for (name, facts, path) in &objects {
        let pb = std::fs::read(path).unwrap();
        let value = json_of(&std::fs::read(path.with_file_name(format!("{name}.json"))).unwrap(), facts);
        let message = encode(&value, facts);
        let wanted = envelope(&pb).unwrap();
        // Go writes zeros where its structs are set and their fields are not: these kinds hold such structs.
        if ["CustomResourceDefinition", "WatchEvent"].iter().any(|kind| name.ends_with(kind)) {
            continue;
        }
        if message != wanted.raw {
            let at = message.iter().zip(wanted.raw).take_while(|(a, b)| a == b).count();
            panic!(
                "{name}: differs at {at}: ours {:?} theirs {:?}",
                String::from_utf8_lossy(&message[at.saturating_sub(30)..message.len().min(at + 30)]),
                String::from_utf8_lossy(&wanted.raw[at.saturating_sub(30)..wanted.raw.len().min(at + 30)])
            );
        }
        assert_eq!(enclose(wanted.api_version, wanted.kind, &message), pb, "{name}: the envelope");
        same += 1;
    }
    assert!(same > 70, "only {same} kinds were compared");
}

#[test]
fn pointers_are_sorted() {
    assert!(decode::pointers_are_sorted());
}

#[test]
fn zeros_count_only_behind_pointers() {
    let schema = facts::schema("apps.v1.DeploymentSpec").unwrap();
    // replicas: 0 (pointer), minReadySeconds: 0, paused: false
    let envelope = Envelope { api_version: "", kind: "", raw: &[8, 0, 40, 0, 56, 0] };
    assert_eq!(decode(&envelope, schema).unwrap(), json!({"replicas": 0}));
    let none_unavailable = json!({"rollingUpdate": {"maxUnavailable": 0, "maxSurge": "25%"}});
    let schema = facts::schema("apps.v1.DeploymentStrategy").unwrap();
    let envelope = Envelope { api_version: "", kind: "", raw: &encode(&none_unavailable, schema) };
    assert_eq!(decode(&envelope, schema).unwrap(), none_unavailable);
}

#[test]
fn a_frame_holds_the_object_and_its_message() {
    let facts = facts::schema("core.v1.Pod").unwrap();
    let pod = json!({"metadata": {"name": "x".repeat(200)}, "spec": {"nodeName": "n"}});
    let encoded = Encoded::new("ADDED", "v1", "Pod", &pod, facts);
    assert_eq!(encoded.message(), encode(&pod, facts));
    assert_eq!(encoded.object(), enclose("v1", "Pod", encoded.message()));
    let frame = encoded.frame();
    assert_eq!(u32::from_be_bytes(frame[..4].try_into().unwrap()) as usize, frame.len() - 4);
    let event = Envelope { api_version: "", kind: "", raw: &frame[4..] };
    let event = decode(&event, facts::schema("meta.v1.WatchEvent").unwrap()).unwrap();
    assert_eq!((&event["type"], &event["object"]["spec"]), (&json!("ADDED"), &pod["spec"]));
}

#[test]
fn a_list_is_its_items_one_after_the_other() {
    let (pods, list_facts) = (facts::schema("core.v1.Pod").unwrap(), facts::schema("core.v1.PodList").unwrap());
    let items: Vec<Value> =
        (1..4).map(|n| json!({"metadata": {"name": format!("p{n}"), "uid": "u".repeat(n * 100)}})).collect();
    let messages: Vec<Vec<u8>> = items.iter().map(|item| encode(item, pods)).collect();
    let size = messages.iter().map(|m| list::item_head_size(m.len()) + m.len()).sum();
    let metadata = json!({"resourceVersion": "7"});
    let mut bytes = list::head("v1", "PodList", &metadata, size);
    for message in &messages {
        list::item_head(&mut bytes, message.len());
        bytes.extend_from_slice(message);
    }
    bytes.extend_from_slice(list::END);
    let decoded = decode(&envelope(&bytes).unwrap(), list_facts).unwrap();
    let expected = json!({"kind": "PodList", "apiVersion": "v1", "metadata": metadata, "items": items});
    assert_eq!(decoded, expected);
    assert_eq!(bytes, enclose("v1", "PodList", &encode(&expected, list_facts)));
}

#[test]
fn broken_messages_are_errors() {
    let schema = facts::schema("core.v1.Pod").unwrap();
    for raw in [&[0x0a_u8, 0x05, 0x01][..], &[0xff; 12], &[0x0b]] {
        assert!(decode(&Envelope { api_version: "", kind: "", raw }, schema).is_err(), "{raw:?}");
    }
    assert_eq!(envelope(b"{}").unwrap_err(), ProtobufError::Prefix);
}

#[test]
fn nesting_has_an_end() {
    // A JSON schema within a schema within a schema…
    let schema = facts::schema("apiextensions.v1.JSONSchemaProps").unwrap();
    let not = schema.field("not").unwrap().numbers[0];
    let mut bytes = Vec::new();
    for _ in 0..1000 {
        let mut outer = Vec::new();
        wire::put_bytes(&mut outer, not, &bytes);
        bytes = outer;
    }
    assert!(decode(&Envelope { api_version: "", kind: "", raw: &bytes }, schema).is_err());
}

/// A full pod, to be broken.
fn full_pod() -> Vec<u8> {
    let pod = json!({"metadata": {"name": "a", "labels": {"a": "b"}, "creationTimestamp": "2024-01-01T00:00:00Z",
            "managedFields": [{"manager": "m", "fieldsV1": {"f:a": {}}}]},
        "spec": {"containers": [{"name": "c", "ports": [{"containerPort": 80}], "resources": {"limits": {"cpu": "1"}},
            "livenessProbe": {"httpGet": {"port": "http"}}}], "volumes": [{"name": "v", "emptyDir": {}}]}});
    enclose("v1", "Pod", &encode(&pod, facts::schema("core.v1.Pod").unwrap()))
}

fn read_as(bytes: &[u8], name: &str) {
    if let Ok(envelope) = envelope(bytes) {
        let facts = facts::schema(name).unwrap();
        if let Ok(value) = decode(&envelope, facts) {
            // What can be read can be written.
            encode(&value, facts);
        }
    }
}

proptest! {
    #[test]
    fn nothing_that_is_sent_panics(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        for name in ["core.v1.Pod", "apiextensions.v1.CustomResourceDefinition", "core.v1.Service"] {
            read_as(&bytes, name);
            read_as(&[b"k8s\0", bytes.as_slice()].concat(), name);
            read_as(&enclose("v1", "X", &bytes), name);
        }
    }

    #[test]
    fn a_broken_object_is_an_error_or_another_object(
        cut in 0_usize..400, flips in proptest::collection::vec((0_usize..400, any::<u8>()), 0..6),
    ) {
        let mut bytes = full_pod();
        for (at, byte) in flips {
            if let Some(old) = bytes.get_mut(at) {
                *old = byte;
            }
        }
        bytes.truncate(bytes.len().saturating_sub(cut % 50));
        for name in ["core.v1.Pod", "apps.v1.Deployment", "apiextensions.v1.CustomResourceDefinition"] {
            read_as(&bytes, name);
        }
    }
}
