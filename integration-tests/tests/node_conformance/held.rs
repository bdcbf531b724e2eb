//! Every entry of the conformance programme about nodes and storage has a test.
#[path = "../../../apiserver/tests/common/conformance.rs"]
mod conformance;

use std::path::Path;

#[test]
fn the_entries_of_a_node_are_held_by_tests() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let of_the_api = include_str!("../../../apiserver/tests/live/conformance.yaml");
    conformance::hold(include_str!("conformance.yaml"), &base, &[of_the_api], |entry| {
        ["[sig-node]", "[sig-storage]"].iter().any(|sig| entry.starts_with(sig))
    });
}
