//! `kubelet_volume_stats_*`: how full the volumes of claims are, looked at when somebody asks.

use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::Measured;
use crate::runtime::pods::uid_of;

/// The claims of the pods of this node, as metrics.
pub struct ClaimStats {
    pub pods: Box<dyn Fn() -> Vec<Arc<Pod>> + Send + Sync>,
    /// How full a volume of a pod (its UID) is, if that can be looked at.
    pub of: Box<dyn Fn(&str, &str) -> Option<Measured> + Send + Sync>,
}

impl std::fmt::Debug for ClaimStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClaimStats").finish_non_exhaustive()
    }
}

type Row = (String, String, Measured);

impl ClaimStats {
    /// Namespace and name of each claim, and how full it is.
    fn look(&self) -> Vec<Row> {
        let mut rows: Vec<Row> = Vec::new();
        for pod in (self.pods)() {
            let namespace = pod.metadata.namespace.clone().unwrap_or_default();
            for volume in pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()) {
                let name = pod.metadata.name.as_deref().unwrap_or_default();
                let Some((claim, _)) = apimachinery::volume::claim_of(name, volume) else { continue };
                let known = rows.iter().any(|(n, c, _)| *n == namespace && *c == claim);
                if !known && let Some(measured) = (self.of)(uid_of(&pod), &volume.name) {
                    rows.push((namespace.clone(), claim, measured));
                }
            }
        }
        rows
    }
}

impl Collector for ClaimStats {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let rows = self.look();
        type Read = fn(&Measured) -> Option<u64>;
        let table: [(&str, &str, Read); 7] = [
            ("available_bytes", "Number of available bytes in the volume", |m| Some(m.free.bytes)),
            ("capacity_bytes", "Capacity in bytes of the volume", |m| Some(m.all.bytes)),
            ("used_bytes", "Number of used bytes in the volume", |m| Some(m.used.bytes)),
            ("inodes_free", "Number of free inodes in the volume", |m| Some(m.free.inodes)),
            ("inodes", "Maximum number of inodes in the volume", |m| Some(m.all.inodes)),
            ("inodes_used", "Number of used inodes in the volume", |m| Some(m.used.inodes)),
            (
                "health_status_abnormal",
                "Abnormal volume health status. The count is either 1 or 0. 1 indicates the volume is unhealthy, 0 indicates volume is healthy",
                |m| m.abnormal.map(u64::from),
            ),
        ];
        for (name, help, read) in table {
            let name = format!("kubelet_volume_stats_{name}");
            let mut metric = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
            for (namespace, claim, value) in rows.iter().filter_map(|(n, c, m)| Some((n, c, read(m)?))) {
                let labels = [("namespace", namespace.as_str()), ("persistentvolumeclaim", claim.as_str())];
                #[allow(clippy::cast_precision_loss)]
                ConstGauge::new(value as f64).encode(metric.encode_family(&labels)?)?;
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
    fn claims_are_counted_once_where_they_are_mounted() {
        let root = tempfile::tempdir().unwrap();
        let pod = |uid: &str, claim: &str| -> Arc<Pod> {
            let volumes = json!([{"name": "v", "persistentVolumeClaim": {"claimName": claim}}, {"name": "e", "emptyDir": {}},
                {"name": "own", "ephemeral": {}}, {"name": "raw", "persistentVolumeClaim": {"claimName": "raw"}}]);
            let pod = json!({"metadata": {"name": uid, "namespace": "ns", "uid": uid},
                "spec": {"containers": [], "volumes": volumes}});
            Arc::new(serde_json::from_value(pod).unwrap())
        };
        let pods = vec![pod("u1", "shared"), pod("u2", "shared")];
        let path = root.path().to_owned();
        let of = move |_: &str, volume: &str| Measured::at(&path).filter(|_| volume != "raw");
        let stats = ClaimStats { pods: Box::new(move || pods.clone()), of: Box::new(of) };
        let claims: Vec<_> = stats.look().into_iter().map(|(_, claim, m)| (claim, m.all.bytes > 0)).collect();
        assert_eq!(claims, [("shared".to_owned(), true), ("u1-own".to_owned(), true), ("u2-own".to_owned(), true)]);
    }
}
