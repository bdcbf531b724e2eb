//! Which entries of the conformance programme the tests of this crate hold the server to: the table of `conformance.yaml`
//! against the programme's document, and against the tests that there are.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// What needs webhooks, definitions of kinds, policies or a server beside this one.
const BEYOND: [&str; 11] = [
    "AdmissionWebhook",
    "Aggregator",
    "CustomResource",
    "CRDs",
    " a CR ",
    " of a CR",
    " CRD ",
    "Policy should allow",
    "Policy should mutate",
    "Policy should validate",
    "request for CRDs",
];

/// The name of an entry without its tags, but for the first, which says whose it is.
fn plain(codename: &str) -> String {
    let (sig, rest) = codename.split_once("] ").unwrap();
    let words = rest.split(' ').filter(|word| *word == "[DRA]" || !(word.starts_with('[') && word.ends_with(']')));
    format!("{sig}] {}", words.collect::<Vec<_>>().join(" ").trim())
}

#[test]
fn the_entries_of_the_api_are_held_by_tests() {
    let table = apimachinery::yaml::documents(include_str!("conformance.yaml")).unwrap().remove(0);
    let table: BTreeMap<String, Vec<String>> = serde_json::from_value(table).unwrap();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for test in table.keys() {
        let (file, name) = test.split_once(' ').unwrap();
        let source = std::fs::read_to_string(root.join("tests").join(file)).unwrap();
        assert!(source.contains(&format!("async fn {name}()")), "there is no {test}");
    }
    let document = root.join("../../shared/kubernetes-1.36/conformance.yaml");
    let Ok(text) = std::fs::read_to_string(&document) else {
        println!("skipped: {} is not there", document.display());
        return;
    };
    let entries = apimachinery::yaml::documents(&text).unwrap().remove(0);
    let entries: Vec<&str> =
        entries.as_array().unwrap().iter().filter_map(|e| e.get("codename").and_then(Value::as_str)).collect();
    let entries: BTreeSet<String> = entries.into_iter().map(plain).collect();
    let held: BTreeSet<String> = table.into_values().flatten().collect();
    let unknown: Vec<&String> = held.difference(&entries).collect();
    assert!(unknown.is_empty(), "no such entries: {unknown:#?}");
    let missing: Vec<&String> = entries
        .difference(&held)
        .filter(|entry| ["[sig-api-machinery]", "[sig-instrumentation]"].iter().any(|sig| entry.starts_with(sig)))
        .filter(|entry| !BEYOND.iter().any(|what| entry.contains(what)))
        .collect();
    assert!(missing.is_empty(), "no test for {missing:#?}");
}
