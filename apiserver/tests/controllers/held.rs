//! Every entry of the conformance programme about workloads and scheduling has a test.

use crate::common::conformance::hold;
use std::path::Path;

#[test]
fn the_entries_of_workloads_and_scheduling_are_held_by_tests() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let of_the_api = include_str!("../live/conformance.yaml");
    hold(include_str!("conformance.yaml"), &base, &[of_the_api], |entry| {
        entry.starts_with("[sig-apps]") || entry.starts_with("[sig-scheduling]")
    });
}
