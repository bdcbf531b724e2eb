//! Tables that say which test holds which entry of the conformance programme, against the programme's document and against the
//! tests that there are.

use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Entries by `FILE TEST`; under `beyond` those that no test holds, for a reason that the table gives.
type Table = BTreeMap<String, Vec<String>>;

fn table(text: &str) -> Table {
    serde_json::from_value(apimachinery::yaml::documents(text).expect("YAML").remove(0)).expect("a table")
}

/// The name of an entry without its tags, but for the first, which says whose it is.
fn plain(codename: &str) -> String {
    let (sig, rest) = codename.split_once("] ").expect("a sig");
    let words = rest.split(' ').filter(|word| *word == "[DRA]" || !(word.starts_with('[') && word.ends_with(']')));
    format!("{sig}] {}", words.collect::<Vec<_>>().join(" ").trim())
}

/// Holds a table (its files are below `base`) against the document: what it lists exists, and nothing that is `asked` is left
/// out, here and in the tables of `others`.
pub fn hold(text: &str, base: &Path, others: &[&str], asked: impl Fn(&str) -> bool) {
    let ours = table(text);
    for test in ours.keys().filter(|test| *test != "beyond") {
        let (file, name) = test.split_once(' ').expect("a file and a test");
        let source = std::fs::read_to_string(base.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
        assert!(source.contains(&format!("fn {name}(")), "there is no {test}");
    }
    let document = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../shared/kubernetes-1.36/conformance.yaml");
    let Ok(text) = std::fs::read_to_string(&document) else {
        assert!(std::env::var_os("CI").is_none(), "{} is not there", document.display());
        println!("skipped: {} is not there", document.display());
        return;
    };
    let entries = apimachinery::yaml::documents(&text).expect("YAML").remove(0);
    let codenames = entries.as_array().into_iter().flatten().filter_map(|e| e.get("codename").and_then(Value::as_str));
    let entries: BTreeSet<String> = codenames.map(plain).collect();
    let listed: Vec<String> = ours.into_values().flatten().collect();
    let held: BTreeSet<String> = listed.iter().cloned().collect();
    assert_eq!(held.len(), listed.len(), "an entry is listed twice");
    let unknown: Vec<&String> = held.difference(&entries).collect();
    assert!(unknown.is_empty(), "no such entries: {unknown:#?}");
    let elsewhere: BTreeSet<String> = others.iter().flat_map(|text| table(text).into_values().flatten()).collect();
    let missing: Vec<&String> =
        entries.difference(&held).filter(|entry| !elsewhere.contains(*entry) && asked(entry)).collect();
    assert!(missing.is_empty(), "no test for {missing:#?}");
}
