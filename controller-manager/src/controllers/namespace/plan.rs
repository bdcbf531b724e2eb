//! What the deletion of a namespace has come to: conditions, and whether anything is left. Pure.
use k8s_openapi::{
    api::core::v1::{Namespace, NamespaceCondition, NamespaceStatus},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
use kube::core::ApiResource;
use std::{collections::BTreeMap, time::Duration};

/// How long an object that has finalizers is expected to need.
const FINALIZER_ESTIMATE: Duration = Duration::from_secs(15);

/// Between two passes.
const LONGEST_WAIT: Duration = Duration::from_secs(2);

/// What a pass over the namespace's content found.
#[derive(Debug, Default, PartialEq)]
pub struct Findings {
    /// Objects left, by resource.
    pub remaining: BTreeMap<String, usize>,
    /// Objects left that have it, by finalizer.
    pub finalizers: BTreeMap<String, usize>,
    /// Why kinds could not be asked for, by group version.
    pub discovery_failures: BTreeMap<String, String>,
    /// Why content could not be deleted.
    pub content_failures: Vec<String>,
    /// What should be gone and is not.
    pub unexpected: Vec<String>,
    /// Only pods were looked for: it is too early for all else, for so long.
    pub early: Option<Duration>,
    /// The longest that what remains may need.
    pub estimate: Duration,
}

impl Findings {
    /// Takes the objects of one kind in that are still there, `going_for` after the namespace was deleted. That there are any is
    /// a failure, unless they have finalizers or are pods in their grace. As `deleteAllContentForGroupVersionResource`.
    pub fn remain(&mut self, namespace: &str, resource: &ApiResource, left: &[ObjectMeta], going_for: Duration) {
        if left.is_empty() {
            return;
        }
        let name = format!("{}.{}", resource.plural, resource.group);
        *self.remaining.entry(name).or_default() += left.len();
        for finalizer in left.iter().flat_map(|meta| meta.finalizers.iter().flatten()) {
            *self.finalizers.entry(finalizer.clone()).or_default() += 1;
        }
        let graces = left.iter().filter_map(|meta| u64::try_from(meta.deletion_grace_period_seconds?).ok());
        let grace = graces.max().map(Duration::from_secs).filter(|grace| going_for < *grace);
        let held = left.iter().any(|meta| meta.finalizers.iter().flatten().next().is_some());
        match grace.or(held.then_some(FINALIZER_ESTIMATE)) {
            Some(estimate) => self.estimate = self.estimate.max(estimate),
            None => {
                let ApiResource { group, version, plural, .. } = resource;
                let what = format!("{group}/{version}, Resource={plural}");
                let text = format!("unexpected items still remain in namespace: {namespace} for gvr: {what}");
                self.unexpected.push(text);
            }
        }
    }

    pub fn is_clean(&self) -> bool {
        self.remaining.is_empty() && !self.has_failed() && self.early.is_none()
    }

    /// Whether there is nothing to wait for but that somebody mends it.
    pub fn has_failed(&self) -> bool {
        !self.discovery_failures.is_empty() || !self.content_failures.is_empty()
    }

    /// When to look again. A pass that waits for pods costs two requests, so they are not given all their grace.
    pub fn look_again(&self) -> Duration {
        (self.estimate / 2).clamp(Duration::from_secs(1), LONGEST_WAIT)
    }
}

/// Whether this controller still has to let the namespace go.
pub fn has_our_finalizer(namespace: &Namespace) -> bool {
    namespace.spec.iter().flat_map(|s| s.finalizers.iter().flatten()).any(|f| f == "kubernetes")
}

/// Whether the namespace stays when this controller has let it go: others hold it too.
pub fn is_held_by_others(namespace: &Namespace) -> bool {
    let mut finalizers = namespace.spec.iter().flat_map(|s| s.finalizers.iter().flatten());
    finalizers.any(|f| f != "kubernetes") || namespace.metadata.finalizers.iter().flatten().next().is_some()
}

/// The namespace without this controller's finalizer.
pub fn finalized(namespace: &Namespace) -> Namespace {
    let mut updated = namespace.clone();
    if let Some(finalizers) = updated.spec.as_mut().and_then(|s| s.finalizers.as_mut()) {
        finalizers.retain(|f| f != "kubernetes");
    }
    updated
}

/// The status during a deletion; conditions keep their times where they say the same.
/// As `namespaceConditionUpdater`.
pub fn status(namespace: &Namespace, findings: &Findings, now: Timestamp) -> NamespaceStatus {
    let mut status = namespace.status.clone().unwrap_or_default();
    status.phase = Some("Terminating".to_owned());
    let list = |counts: &BTreeMap<String, usize>, what: &str| {
        counts.iter().map(|(name, n)| format!("{name} {what} {n} resource instances")).collect::<Vec<_>>().join(", ")
    };
    let table = [
        (
            "NamespaceDeletionDiscoveryFailure",
            (!findings.discovery_failures.is_empty())
                .then(|| ("DiscoveryFailed", discovery_failed(&findings.discovery_failures))),
            ("ResourcesDiscovered", "All resources successfully discovered"),
        ),
        (
            "NamespaceDeletionGroupVersionParsingFailure",
            None,
            ("ParsedGroupVersions", "All legacy kube types successfully parsed"),
        ),
        (
            "NamespaceDeletionContentFailure",
            deletion_failed(findings).map(|message| ("ContentDeletionFailed", message)),
            ("ContentDeleted", "All content successfully deleted, may be waiting on finalization"),
        ),
        (
            "NamespaceContentRemaining",
            (!findings.remaining.is_empty()).then(|| {
                ("SomeResourcesRemain", format!("Some resources are remaining: {}", list(&findings.remaining, "has")))
            }),
            ("ContentRemoved", "All content successfully removed"),
        ),
        (
            "NamespaceFinalizersRemaining",
            (!findings.finalizers.is_empty()).then(|| {
                let text = list(&findings.finalizers, "in");
                ("SomeFinalizersRemain", format!("Some content in the namespace has finalizers remaining: {text}"))
            }),
            ("ContentHasNoFinalizers", "All content-preserving finalizers finished"),
        ),
    ];
    let conditions = status.conditions.get_or_insert_default();
    for (kind, problem, (good_reason, good_message)) in table {
        let (value, reason, message) = match problem {
            Some((reason, message)) => ("True", reason, message),
            None => ("False", good_reason, good_message.to_owned()),
        };
        set(conditions, kind, value, reason, message, now);
    }
    status
}

/// As `ErrGroupDiscoveryFailed`, in the words of `ProcessDiscoverResourcesErr`.
fn discovery_failed(failures: &BTreeMap<String, String>) -> String {
    let all: Vec<String> = failures.iter().map(|(group_version, error)| format!("{group_version}: {error}")).collect();
    format!(
        "Discovery failed for some groups, {} failing: unable to retrieve the complete list of server APIs: {}",
        all.len(),
        all.join(", ")
    )
}

/// As `makeDeleteContentCondition`.
fn deletion_failed(findings: &Findings) -> Option<String> {
    let mut all: Vec<&str> = findings.content_failures.iter().chain(&findings.unexpected).map(String::as_str).collect();
    all.sort_unstable();
    let text = || format!("Failed to delete all resource types, {} remaining: {}", all.len(), all.join(", "));
    (!all.is_empty()).then(text)
}

fn set(
    conditions: &mut Vec<NamespaceCondition>,
    kind: &str,
    value: &str,
    reason: &str,
    message: String,
    now: Timestamp,
) {
    let new = NamespaceCondition {
        type_: kind.to_owned(),
        status: value.to_owned(),
        reason: Some(reason.to_owned()),
        message: Some(message),
        last_transition_time: Some(Time(now)),
    };
    match conditions.iter_mut().find(|c| c.type_ == kind) {
        Some(there) => {
            let time = if there.status == value {
                there.last_transition_time.clone()
            } else {
                new.last_transition_time.clone()
            };
            *there = NamespaceCondition { last_transition_time: time, ..new };
        }
        None => conditions.push(new),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::{
        apps::v1::Deployment,
        core::v1::{ConfigMap, Pod},
    };
    use serde_json::json;

    fn namespace() -> Namespace {
        serde_json::from_value(json!({"metadata": {"name": "ns"}, "spec": {"finalizers": ["kubernetes", "mine"]}}))
            .unwrap()
    }

    fn said(status: &NamespaceStatus, kind: &str) -> (String, String, String) {
        let c = status.conditions.iter().flatten().find(|c| c.type_ == kind).unwrap();
        (c.status.clone(), c.reason.clone().unwrap(), c.message.clone().unwrap())
    }

    #[test]
    fn what_remains_is_told() {
        let now = Timestamp::now();
        let mut findings = Findings::default();
        let held = ObjectMeta { finalizers: Some(vec!["example.com/hold".into()]), ..Default::default() };
        let ending = ObjectMeta { deletion_grace_period_seconds: Some(30), ..Default::default() };
        let seconds = Duration::from_secs;
        findings.remain("ns", &ApiResource::erase::<ConfigMap>(&()), std::slice::from_ref(&held), seconds(60));
        findings.remain("ns", &ApiResource::erase::<Pod>(&()), std::slice::from_ref(&ending), seconds(29));
        assert!(!findings.is_clean() && !findings.has_failed());
        assert_eq!(findings.look_again(), LONGEST_WAIT);
        let got = status(&namespace(), &findings, now);
        assert_eq!(got.phase.as_deref(), Some("Terminating"));
        let (value, reason, message) = said(&got, "NamespaceContentRemaining");
        assert_eq!((value.as_str(), reason.as_str()), ("True", "SomeResourcesRemain"));
        assert_eq!(
            message,
            "Some resources are remaining: configmaps. has 1 resource instances, pods. has 1 resource instances"
        );
        let (_, _, message) = said(&got, "NamespaceFinalizersRemaining");
        assert_eq!(
            message,
            "Some content in the namespace has finalizers remaining: example.com/hold in 1 resource instances"
        );
        assert_eq!(said(&got, "NamespaceDeletionDiscoveryFailure").1, "ResourcesDiscovered");

        findings.remain("ns", &ApiResource::erase::<Pod>(&()), &[ending], seconds(30));
        findings.remain("ns", &ApiResource::erase::<Deployment>(&()), &[ObjectMeta::default()], seconds(1));
        let failed = |group: &str| (group.to_owned(), format!("stale GroupVersion discovery: {group}"));
        findings.discovery_failures = [failed("metrics.k8s.io/v1beta1"), failed("a.example.com/v1")].into();
        let got = status(&namespace(), &findings, now);
        assert!(findings.has_failed() && findings.unexpected.len() == 2);
        assert_eq!(
            said(&got, "NamespaceDeletionContentFailure"),
            (
                "True".to_owned(),
                "ContentDeletionFailed".to_owned(),
                "Failed to delete all resource types, 2 remaining: unexpected items still remain in namespace: ns for gvr: \
                 /v1, Resource=pods, unexpected items still remain in namespace: ns for gvr: apps/v1, Resource=deployments"
                    .to_owned()
            )
        );
        assert_eq!(
            said(&got, "NamespaceDeletionDiscoveryFailure").2,
            "Discovery failed for some groups, 2 failing: unable to retrieve the complete list of server APIs: \
             a.example.com/v1: stale GroupVersion discovery: a.example.com/v1, \
             metrics.k8s.io/v1beta1: stale GroupVersion discovery: metrics.k8s.io/v1beta1"
        );
    }

    #[test]
    fn conditions_keep_their_time_while_they_say_the_same() {
        let early: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let first = status(&namespace(), &Findings::default(), early);
        let mut ns = namespace();
        ns.status = Some(first.clone());
        assert_eq!(status(&ns, &Findings::default(), Timestamp::now()), first);
    }

    #[test]
    fn only_our_finalizer_goes() {
        let done = finalized(&namespace());
        assert!(has_our_finalizer(&namespace()) && !has_our_finalizer(&done));
        assert!(is_held_by_others(&namespace()));
        let ours: Namespace = serde_json::from_value(json!({"spec": {"finalizers": ["kubernetes"]}})).unwrap();
        assert!(!is_held_by_others(&ours));
        assert_eq!(done.spec.unwrap().finalizers.unwrap(), ["mine"]);
    }
}
