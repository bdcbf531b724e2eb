//! Which volumes are to be attached to a node, and which detached. Pure: all that is known is in the API (the attachments,
//! and what the kubelet says it uses), so a restart forgets nothing.
use crate::controllers::volumes::annotation;
use k8s_openapi::{
    api::{
        core::v1::{AttachedVolume, Node},
        storage::v1::{VolumeAttachment, VolumeAttachmentSource, VolumeAttachmentSpec},
    },
    apimachinery::pkg::apis::meta::v1::Time,
    jiff::Timestamp,
};
use sha2::{Digest as _, Sha256};
use std::{collections::BTreeMap, time::Duration};

const MANAGED: &str = "volumes.kubernetes.io/controller-managed-attach-detach";
const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
const CSI_PREFIX: &str = "kubernetes.io/csi/";
/// A driver's attacher that says nothing for so long is told of.
const ATTACHING: Duration = Duration::from_secs(120);

/// A volume that pods of the node have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    pub volume: String,
    pub driver: String,
    pub handle: String,
    /// Only one node may have it.
    pub exclusive: bool,
    /// Other nodes that have it attached, and the pods there that use it.
    pub elsewhere: bool,
    pub used_by: Vec<String>,
    /// The node's pods that want it, by their place in the caller's list.
    pub pods: Vec<usize>,
}

/// A node as this controller sees it; None for one that is gone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NodeState {
    pub managed: bool,
    pub ready: bool,
    pub out_of_service: bool,
    in_use: Vec<String>,
    reported: Vec<AttachedVolume>,
}

/// One attachment of the node that this controller made.
#[derive(Clone, Debug)]
pub struct Attachment<'a> {
    pub object: &'a VolumeAttachment,
    /// As kubelets name the volume; None if the volume is gone.
    pub unique_name: Option<String>,
    /// How long nobody has wanted it.
    pub unwanted_for: Duration,
}

#[derive(Debug, Default, PartialEq)]
pub struct Plan {
    pub attach: Vec<VolumeAttachment>,
    /// `status.volumesAttached`, if it changes; before anything is detached.
    pub report: Option<Vec<AttachedVolume>>,
    pub detach: Vec<String>,
    /// Why some of those are detached though they may be in use, as the metric's label has it.
    pub forced: Vec<&'static str>,
    /// Events of pods: which pod, whether it went well, the reason, the message.
    pub told: Vec<(usize, bool, &'static str, String)>,
    pub again: Option<Duration>,
}

/// When a volume that the kubelet still says it uses is detached all the same, if its node is not healthy.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    pub limit: Duration,
    pub forces: bool,
}

/// As `getAttachmentName`.
pub fn attachment_name(driver: &str, handle: &str, node: &str) -> String {
    let digest = Sha256::digest(format!("{handle}{driver}{node}"));
    digest.iter().fold("csi-".to_owned(), |text, byte| format!("{text}{byte:02x}"))
}

/// As kubelets and `volumesAttached` name a CSI volume.
pub fn unique_name(driver: &str, handle: &str) -> String {
    format!("{CSI_PREFIX}{driver}^{handle}")
}

impl NodeState {
    pub fn of(node: &Node) -> Self {
        let status = node.status.as_ref();
        let conditions = status.iter().flat_map(|s| s.conditions.iter().flatten());
        let taints = node.spec.iter().flat_map(|s| s.taints.iter().flatten());
        Self {
            managed: annotation(&node.metadata, MANAGED) == Some("true"),
            ready: conditions.filter(|c| c.type_ == "Ready").any(|c| c.status == "True"),
            out_of_service: taints.into_iter().any(|t| t.key == OUT_OF_SERVICE),
            in_use: status.and_then(|s| s.volumes_in_use.clone()).unwrap_or_default(),
            reported: status.and_then(|s| s.volumes_attached.clone()).unwrap_or_default(),
        }
    }
}

/// The driver's attacher says so.
pub fn is_attached(attachment: &VolumeAttachment) -> bool {
    attachment.status.as_ref().is_some_and(|s| s.attached)
}

/// As `reconcile` of the attach-detach controller.
pub fn plan(
    node_name: &str,
    node: Option<&NodeState>,
    wanted: &[Wanted],
    attachments: &[Attachment<'_>],
    patience: Patience,
    now: Timestamp,
) -> Plan {
    let mut plan = Plan::default();
    let by_name: BTreeMap<&str, &Attachment<'_>> =
        attachments.iter().filter_map(|a| Some((a.object.metadata.name.as_deref()?, a))).collect();
    let wanted = if node.is_some_and(|n| n.managed) { wanted } else { &[] };
    let mut attached: Vec<(String, Option<&Wanted>)> = Vec::new();
    for one in wanted {
        let name = attachment_name(&one.driver, &one.handle, node_name);
        let tell = |plan: &mut Plan, well, reason, message: &str| {
            plan.told.extend(one.pods.iter().map(|pod| (*pod, well, reason, message.to_owned())));
        };
        match by_name.get(name.as_str()).map(|a| a.object) {
            // It goes; it is made anew then.
            Some(going) if going.metadata.deletion_timestamp.is_some() => {}
            Some(there) if is_attached(there) => attached.push((unique_name(&one.driver, &one.handle), Some(one))),
            Some(there) => {
                let error = there.status.as_ref().and_then(|s| s.attach_error.as_ref()?.message.as_deref());
                let waits = |made: &Time| {
                    let waited = now.duration_since(made.0);
                    ATTACHING.checked_sub(Duration::try_from(waited).unwrap_or_default()).filter(|left| !left.is_zero())
                };
                let error = match (error, there.metadata.creation_timestamp.as_ref().map(waits)) {
                    (Some(error), _) => Some(error.to_owned()),
                    (None, Some(None)) => {
                        plan.again = Some(plan.again.map_or(ATTACHING, |again| again.min(ATTACHING)));
                        let Wanted { driver, handle, .. } = one;
                        Some(format!(
                            "timed out waiting for external-attacher of {driver} CSI driver to attach volume {handle}"
                        ))
                    }
                    (None, Some(Some(left))) => {
                        plan.again = Some(plan.again.map_or(left, |again| again.min(left)));
                        None
                    }
                    (None, None) => None,
                };
                if let Some(error) = error {
                    let message = format!("AttachVolume.Attach failed for volume {:?} : {error}", one.volume);
                    tell(&mut plan, false, "FailedAttachVolume", &message);
                }
            }
            None if one.exclusive && one.elsewhere => {
                let why = if one.used_by.is_empty() {
                    "Volume is already exclusively attached to one node and can't be attached to another".to_owned()
                } else {
                    format!("Volume is already used by pod(s) {}", one.used_by.join(", "))
                };
                let message = format!("Multi-Attach error for volume {:?} {why}", one.volume);
                tell(&mut plan, false, "FailedAttachVolume", &message);
            }
            None => plan.attach.push(new_attachment(name, node_name, one)),
        }
    }
    let names: Vec<String> = wanted.iter().map(|w| attachment_name(&w.driver, &w.handle, node_name)).collect();
    for unwanted in attachments {
        let Some(name) = unwanted.object.metadata.name.as_ref().filter(|n| !names.contains(n)) else { continue };
        if unwanted.object.metadata.deletion_timestamp.is_some() {
            continue;
        }
        // Of a node that is gone nobody knows whether it still writes.
        let used = node.is_none_or(|n| unwanted.unique_name.as_ref().is_some_and(|u| n.in_use.contains(u)));
        let silent = node.is_none_or(|n| !n.ready);
        let timed_out = patience.forces && silent && unwanted.unwanted_for >= patience.limit;
        let out_of_service = node.is_some_and(|n| n.out_of_service);
        if !used || timed_out || out_of_service {
            plan.detach.push(name.clone());
            plan.forced.extend(out_of_service.then_some("out-of-service"));
            plan.forced.extend((used && timed_out).then_some("timeout"));
        } else {
            attached.extend(unwanted.unique_name.clone().filter(|_| is_attached(unwanted.object)).map(|u| (u, None)));
            let left = patience.limit.saturating_sub(unwanted.unwanted_for).max(Duration::from_secs(1));
            plan.again = Some(plan.again.map_or(left, |a| a.min(left)));
        }
    }
    if let Some(node) = node.filter(|n| n.managed) {
        report(node, &attached, &mut plan);
    }
    plan
}

/// What other controllers put there stays.
fn report(node: &NodeState, attached: &[(String, Option<&Wanted>)], plan: &mut Plan) {
    let mut all: Vec<AttachedVolume> =
        node.reported.iter().filter(|v| !v.name.starts_with(CSI_PREFIX)).cloned().collect();
    for (name, wanted) in attached {
        let known = node.reported.iter().find(|v| v.name == *name);
        all.push(known.cloned().unwrap_or_else(|| AttachedVolume { name: name.clone(), device_path: String::new() }));
        if let Some(wanted) = wanted.filter(|_| known.is_none()) {
            let message = format!("AttachVolume.Attach succeeded for volume {:?} ", wanted.volume);
            plan.told.extend(wanted.pods.iter().map(|p| (*p, true, "SuccessfulAttachVolume", message.clone())));
        }
    }
    all.sort_by(|a, b| a.name.cmp(&b.name));
    let mut before = node.reported.clone();
    before.sort_by(|a, b| a.name.cmp(&b.name));
    plan.report = (all != before).then_some(all);
}

fn new_attachment(name: String, node: &str, wanted: &Wanted) -> VolumeAttachment {
    let mut attachment = VolumeAttachment::default();
    attachment.metadata.name = Some(name);
    attachment.spec = VolumeAttachmentSpec {
        attacher: wanted.driver.clone(),
        node_name: node.to_owned(),
        source: VolumeAttachmentSource {
            persistent_volume_name: Some(wanted.volume.clone()),
            ..VolumeAttachmentSource::default()
        },
    };
    attachment
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const PATIENCE: Patience = Patience { limit: Duration::from_secs(360), forces: true };

    fn wanted(elsewhere: bool, used_by: &[&str]) -> Wanted {
        Wanted {
            volume: "pv".into(),
            driver: "d".into(),
            handle: "h".into(),
            exclusive: true,
            elsewhere,
            used_by: used_by.iter().map(|p| (*p).to_owned()).collect(),
            pods: vec![0],
        }
    }

    fn node(ready: bool, taint: bool, in_use: bool, reported: bool) -> NodeState {
        let name = unique_name("d", "h");
        let (used, said) = (if in_use { vec![&name] } else { vec![] }, json!([{"name": name, "devicePath": ""}]));
        NodeState::of(
            &serde_json::from_value(json!({"metadata": {"annotations": {MANAGED: "true"}},
                "spec": {"taints": if taint { json!([{"key": OUT_OF_SERVICE, "effect": "NoExecute"}]) } else { json!([]) }},
                "status": {"conditions": [{"type": "Ready", "status": if ready { "True" } else { "Unknown" }}],
                    "volumesInUse": used, "volumesAttached": if reported { said } else { json!([]) }}}))
            .unwrap(),
        )
    }

    fn attachment(attached: bool, deleting: bool, error: bool) -> VolumeAttachment {
        let mut new = new_attachment(attachment_name("d", "h", "n"), "n", &wanted(false, &[]));
        new.status = serde_json::from_value(json!({"attached": attached,
            "attachError": error.then(|| json!({"message": "no"}))}))
        .unwrap();
        new.metadata.deletion_timestamp = deleting.then(apimachinery::time::now);
        new
    }

    /// Attach, report, detach, events, in short.
    fn go(node: Option<&NodeState>, want: &[Wanted], there: Option<&VolumeAttachment>, unwanted_s: u64) -> String {
        let unwanted_for = Duration::from_secs(unwanted_s);
        let unique_name = Some(unique_name("d", "h"));
        let there: Vec<_> = there
            .into_iter()
            .map(|object| Attachment { object, unique_name: unique_name.clone(), unwanted_for })
            .collect();
        let plan = plan("n", node, want, &there, PATIENCE, "2026-01-01T12:02:00Z".parse().unwrap());
        let mut said = vec!["attach"; plan.attach.len()];
        said.extend(plan.report.iter().map(|r| if r.is_empty() { "report none" } else { "report one" }));
        said.extend(plan.detach.iter().map(|_| "detach"));
        said.extend(plan.forced.iter().copied());
        said.extend(plan.told.iter().map(|(_, _, reason, _)| *reason));
        said.join(", ")
    }

    #[test]
    fn names_are_those_of_kubernetes() {
        // printf %s "hdn" | sha256sum
        assert_eq!(attachment_name("d", "h", "n").len(), 4 + 64);
        assert_eq!(unique_name("ebs.csi.aws.com", "vol-1"), "kubernetes.io/csi/ebs.csi.aws.com^vol-1");
    }

    #[test]
    fn volumes_follow_the_pods() {
        let (healthy, used) = (node(true, false, false, false), node(true, false, true, true));
        let attached = attachment(true, false, false);
        for (why, node, want, there, expected) in [
            ("a pod came", &healthy, vec![wanted(false, &[])], None, "attach"),
            ("not yet", &healthy, vec![wanted(false, &[])], Some(attachment(false, false, false)), ""),
            ("refused", &healthy, vec![wanted(false, &[])], Some(attachment(false, false, true)), "FailedAttachVolume"),
            ("done", &healthy, vec![wanted(false, &[])], Some(attached.clone()), "report one, SuccessfulAttachVolume"),
            ("known", &used, vec![wanted(false, &[])], Some(attached.clone()), ""),
            ("on its way out", &used, vec![wanted(false, &[])], Some(attachment(true, true, false)), "report none"),
            ("another node has it", &healthy, vec![wanted(true, &["p"])], None, "FailedAttachVolume"),
            ("the pod went, the mount is there", &used, vec![], Some(attached.clone()), ""),
            ("all went", &node(true, false, false, true), vec![], Some(attached.clone()), "report none, detach"),
        ] {
            assert_eq!(go(Some(node), &want, there.as_ref(), 0), expected, "{why}");
        }
        let shared = Wanted { exclusive: false, ..wanted(true, &[]) };
        assert_eq!(go(Some(&healthy), &[shared], None, 0), "attach");
    }

    #[test]
    fn a_silent_node_loses_its_volumes_in_time() {
        let attached = attachment(true, false, false);
        for (why, node, seconds, expected) in [
            ("silent for a moment", Some(node(false, false, true, true)), 10, ""),
            ("silent for long", Some(node(false, false, true, true)), 361, "report none, detach, timeout"),
            ("healthy, however long", Some(node(true, false, true, true)), 999, ""),
            ("out of service", Some(node(false, true, true, true)), 0, "report none, detach, out-of-service"),
            (
                "out of service, and still there",
                Some(node(true, true, true, true)),
                0,
                "report none, detach, out-of-service",
            ),
            ("gone", None, 0, ""),
            ("gone for long", None, 361, "detach, timeout"),
        ] {
            assert_eq!(go(node.as_ref(), &[], Some(&attached), seconds), expected, "{why}");
        }
    }

    #[test]
    fn an_attacher_that_says_nothing_is_told_of() {
        let now: Timestamp = "2026-01-01T12:02:00Z".parse().unwrap();
        let healthy = node(true, false, false, false);
        let mut silent = attachment(false, false, false);
        for (made, told, again) in [("11:59:59", true, 120), ("12:00:00", true, 120), ("12:00:10", false, 10)] {
            silent.metadata.creation_timestamp = Some(Time(format!("2026-01-01T{made}Z").parse().unwrap()));
            let there = Attachment { object: &silent, unique_name: None, unwanted_for: Duration::ZERO };
            let got = plan("n", Some(&healthy), &[wanted(false, &[])], &[there], PATIENCE, now);
            let words = "AttachVolume.Attach failed for volume \"pv\" : timed out waiting for external-attacher of d CSI driver \
                         to attach volume h";
            let expected: Vec<_> =
                told.then(|| (0, false, "FailedAttachVolume", words.to_owned())).into_iter().collect();
            assert_eq!((got.told, got.again), (expected, Some(Duration::from_secs(again))), "{made}");
        }
    }
}
