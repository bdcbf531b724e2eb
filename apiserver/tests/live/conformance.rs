//! Which entries of the conformance programme the tests hold the server, and the network of a cluster, to: the table of
//! `conformance.yaml` against the programme's document, and against the tests that there are.

use crate::common::conformance::hold;
use std::path::Path;

/// What needs webhooks, custom resources, policies that are enforced, a server beside this one, or an image of its own.
const BEYOND: [&str; 19] = [
    "AdmissionWebhook listing",
    "AdmissionWebhook patching",
    "AdmissionWebhook should be able to deny",
    "AdmissionWebhook should deny",
    "AdmissionWebhook should honor",
    "AdmissionWebhook should mutate",
    "AdmissionWebhook should not",
    "AdmissionWebhook should unconditionally",
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
    "Guestbook application",
];
const SIGS: [&str; 6] =
    ["[sig-api-machinery]", "[sig-architecture]", "[sig-auth]", "[sig-cli]", "[sig-instrumentation]", "[sig-network]"];

#[test]
fn the_entries_of_the_api_are_held_by_tests() {
    let base = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    hold(include_str!("conformance.yaml"), &base, &[], |entry| {
        SIGS.iter().any(|sig| entry.starts_with(sig)) && !BEYOND.iter().any(|what| entry.contains(what))
    });
}
