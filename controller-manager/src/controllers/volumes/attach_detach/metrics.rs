//! Metrics of attached volumes, with Kubernetes' names: counted when they are read.
use super::{Controller, NodeState, claims_of, node_name, plan};
use component_base::metrics::{Labels, register, registry};
use k8s_openapi::api::storage::v1::VolumeAttachment;
use kube::ResourceExt as _;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric as _},
    metrics::{MetricType, family::Family, gauge::ConstGauge, gauge::Gauge},
};
use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock, Weak},
};

/// A count; a gauge, since counters' names end in `_total` here and upstream's does not.
static FORCED: LazyLock<Family<Labels<1>, Gauge>> = LazyLock::new(|| {
    let help = "Number of times the A/D Controller performed a forced detach";
    register("attachdetach_controller_forced_detaches", help, Family::default())
});

/// A volume is detached though it may be in use.
pub fn forced(reason: &str) {
    FORCED.get_or_create(&[("reason", reason.to_owned())]).inc();
}

/// Numbers by two labels.
type Counts = BTreeMap<(String, String), i64>;

#[derive(Debug, Default, PartialEq)]
struct Volumes {
    /// By node and plugin.
    in_use: Counts,
    /// By plugin and state.
    total: Counts,
}

impl Volumes {
    fn used(&mut self, node: &str, driver: &str) {
        *self.in_use.entry((node.to_owned(), plugin(driver))).or_default() += 1;
    }

    fn wanted(&mut self, driver: &str) {
        *self.total.entry((plugin(driver), "desired_state_of_world".to_owned())).or_default() += 1;
    }

    fn attached(&mut self, attachment: &VolumeAttachment) {
        if plan::is_attached(attachment) {
            let counted = (plugin(&attachment.spec.attacher), "actual_state_of_world".to_owned());
            *self.total.entry(counted).or_default() += 1;
        }
    }
}

/// As `GetFullQualifiedPluginNameForVolume`.
fn plugin(driver: &str) -> String {
    format!("kubernetes.io/csi:{driver}")
}

/// Counts while the controller is there.
pub fn watch(controller: &Arc<Controller>) {
    registry().register_collector(Box::new(State(Arc::downgrade(controller))));
}

struct State(Weak<Controller>);

impl std::fmt::Debug for State {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("attached volumes")
    }
}

impl State {
    fn count(&self) -> Volumes {
        let mut volumes = Volumes::default();
        let Some(controller) = self.0.upgrade() else { return volumes };
        for node in controller.nodes.list() {
            let (name, managed) = (node.name_any(), NodeState::of(&node).managed);
            let pods = controller.on_node.get(&name);
            for wanted in controller.wanted(&name, &pods).iter().filter(|_| managed) {
                volumes.wanted(&wanted.driver);
            }
            controller.attachments.get(&name).iter().for_each(|attachment| volumes.attached(attachment));
        }
        for pod in controller.pods.list() {
            let Some(node) = node_name(&pod) else { continue };
            let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
            for (claim, _) in claims_of(&pod) {
                let volume = controller.volume(namespace, &claim);
                if let Some(csi) = volume.as_ref().and_then(|v| v.spec.as_ref()?.csi.as_ref()) {
                    volumes.used(&node, &csi.driver);
                }
            }
        }
        volumes
    }
}

impl Collector for State {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let volumes = self.count();
        for (name, help, labels, counts) in [
            (
                "storage_count_attachable_volumes_in_use",
                "Measure number of volumes in use",
                ["node", "volume_plugin"],
                volumes.in_use,
            ),
            (
                "attachdetach_controller_total_volumes",
                "Number of volumes in A/D Controller",
                ["plugin_name", "state"],
                volumes.total,
            ),
        ] {
            let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            for ((first, second), count) in &counts {
                let labels = [(labels[0], first.as_str()), (labels[1], second.as_str())];
                ConstGauge::new(*count).encode(metric.encode_family(&labels)?)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn volumes_are_counted_by_plugin_state_and_node() {
        let mut volumes = Volumes::default();
        volumes.used("n1", "d");
        volumes.used("n1", "d");
        volumes.wanted("d");
        for attached in [true, false] {
            let spec = json!({"attacher": "d", "nodeName": "n1", "source": {}});
            let made = json!({"metadata": {}, "spec": spec, "status": {"attached": attached}});
            volumes.attached(&serde_json::from_value(made).unwrap());
        }
        let key = |first: &str, second: &str| (first.to_owned(), second.to_owned());
        let csi = "kubernetes.io/csi:d";
        assert_eq!(volumes.in_use, [(key("n1", csi), 2)].into());
        let total = [(key(csi, "desired_state_of_world"), 1), (key(csi, "actual_state_of_world"), 1)];
        assert_eq!(volumes.total, total.into());
    }
}
