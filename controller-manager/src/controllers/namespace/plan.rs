//! What the deletion of a namespace has come to: conditions, and whether anything is left. Pure.
use k8s_openapi::{
    api::core::v1::{Namespace, NamespaceCondition, NamespaceStatus},
    apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time},
    jiff::Timestamp,
};
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
    /// Why kinds could not be asked for.
    pub discovery_failures: Vec<String>,
    /// Why content could not be deleted.
    pub content_failures: Vec<String>,
    /// The longest that what remains may need.
    pub estimate: Duration,
}

impl Findings {
    /// Takes one object in that is still there.
    pub fn remains(&mut self, resource: &str, meta: &ObjectMeta) {
        *self.remaining.entry(resource.to_owned()).or_default() += 1;
        let mut estimate = Duration::ZERO;
        for finalizer in meta.finalizers.iter().flatten() {
            *self.finalizers.entry(finalizer.clone()).or_default() += 1;
            estimate = FINALIZER_ESTIMATE;
        }
        // A pod's grace.
        let grace = meta.deletion_grace_period_seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or(0);
        self.estimate = self.estimate.max(estimate).max(Duration::from_secs(grace));
    }

    pub fn is_clean(&self) -> bool {
        self.remaining.is_empty() && self.discovery_failures.is_empty() && self.content_failures.is_empty()
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
            findings.discovery_failures.first().map(|f| ("DiscoveryFailed", f.clone())),
            ("ResourcesDiscovered", "All resources successfully discovered"),
        ),
        (
            "NamespaceDeletionGroupVersionParsingFailure",
            None,
            ("ParsedGroupVersions", "All legacy kube types successfully parsed"),
        ),
        (
            "NamespaceDeletionContentFailure",
            (!findings.content_failures.is_empty())
                .then(|| ("ContentDeletionFailed", findings.content_failures.join(", "))),
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
        let meta = ObjectMeta { finalizers: Some(vec!["example.com/hold".into()]), ..Default::default() };
        findings.remains("configmaps.", &meta);
        findings.remains("pods.", &ObjectMeta { deletion_grace_period_seconds: Some(30), ..Default::default() });
        assert!(!findings.is_clean());
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
        assert_eq!(done.spec.unwrap().finalizers.unwrap(), ["mine"]);
    }
}
