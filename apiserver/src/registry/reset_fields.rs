//! The fields that a write through some part of a kind cannot set, and so does not come to own. As the strategies'
//! `GetResetFields`.

use super::Resource;
use super::strategy::Part;
use apimachinery::managed_fields::{FieldSet, Ignored};
use std::sync::LazyLock;

static NOTHING: Ignored = Ignored::Nothing;
static STATUS: LazyLock<Ignored> = LazyLock::new(|| except(&["status"]));
static SPEC: LazyLock<Ignored> = LazyLock::new(|| except(&["spec"]));
static SPEC_AND_METADATA: LazyLock<Ignored> = LazyLock::new(|| except(&["spec", "metadata"]));
static SPEC_AND_LABELS: LazyLock<Ignored> = LazyLock::new(|| except(&["spec", "metadata.labels"]));
static POD_STATUS: LazyLock<Ignored> =
    LazyLock::new(|| except(&["spec", "metadata.deletionTimestamp", "metadata.ownerReferences"]));
static REQUEST_STATUS: LazyLock<Ignored> = LazyLock::new(|| except(&["spec", "status.conditions"]));
static APPROVAL: LazyLock<Ignored> = LazyLock::new(|| except(&["spec", "status.certificate"]));
static EPHEMERAL_CONTAINERS: Ignored = Ignored::AllBut(&[&["f:spec", "f:ephemeralContainers"]]);
static RESIZE: Ignored = Ignored::AllBut(&[
    &["f:spec", "f:containers", "*", "f:resources"],
    &["f:spec", "f:containers", "*", "f:resizePolicy"],
    &["f:spec", "f:initContainers", "*", "f:resources"],
    &["f:spec", "f:initContainers", "*", "f:resizePolicy"],
]);

fn except(paths: &[&str]) -> Ignored {
    Ignored::Except(FieldSet::of_fields(paths))
}

pub fn ignored(resource: &Resource, part: Part) -> &'static Ignored {
    match (part, resource.gvr.resource.as_str()) {
        (Part::Main, _) if resource.has_status => &STATUS,
        (Part::Main, _) => &NOTHING,
        (Part::Finalize, _) => &STATUS,
        (Part::EphemeralContainers, _) => &EPHEMERAL_CONTAINERS,
        (Part::Resize, _) => &RESIZE,
        (Part::Approval, _) => &APPROVAL,
        (Part::Status, "pods") => &POD_STATUS,
        (Part::Status, "deployments") => &SPEC_AND_LABELS,
        (Part::Status, "certificatesigningrequests") => &REQUEST_STATUS,
        (
            Part::Status,
            "volumeattachments"
            | "flowschemas"
            | "prioritylevelconfigurations"
            | "customresourcedefinitions"
            | "resourceclaims",
        ) => &SPEC_AND_METADATA,
        (Part::Status, _) => &SPEC,
    }
}
