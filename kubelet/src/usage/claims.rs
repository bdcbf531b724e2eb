//! `kubelet_volume_stats_*`: how full the volumes of claims are, looked at when somebody asks.

use std::path::PathBuf;
use std::sync::Arc;

use k8s_openapi::api::core::v1::Pod;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::DiskUsage;
use crate::runtime::pods::uid_of;

/// The claims of the pods of this node, as metrics.
pub struct ClaimStats {
    pub pods: Box<dyn Fn() -> Vec<Arc<Pod>> + Send + Sync>,
    /// Where a pod (its UID) has a volume, if that can be looked at.
    pub at: Box<dyn Fn(&str, &str) -> Option<PathBuf> + Send + Sync>,
}

impl std::fmt::Debug for ClaimStats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClaimStats").finish_non_exhaustive()
    }
}

type Row = (String, String, DiskUsage, DiskUsage);

impl ClaimStats {
    /// Namespace and name of each claim, what is free of it, and all there is.
    fn look(&self) -> Vec<Row> {
        let mut rows: Vec<Row> = Vec::new();
        for pod in (self.pods)() {
            let namespace = pod.metadata.namespace.clone().unwrap_or_default();
            for volume in pod.spec.iter().flat_map(|s| s.volumes.iter().flatten()) {
                let name = pod.metadata.name.as_deref().unwrap_or_default();
                let Some((claim, _)) = apimachinery::volume::claim_of(name, volume) else { continue };
                let known = rows.iter().any(|(n, c, _, _)| *n == namespace && *c == claim);
                let path = if known { None } else { (self.at)(uid_of(&pod), &volume.name) };
                if let Some((free, all)) = path.and_then(|path| super::file_system(&path)) {
                    rows.push((namespace.clone(), claim, free, all));
                }
            }
        }
        rows
    }
}

impl Collector for ClaimStats {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let rows = self.look();
        type Read = fn(&DiskUsage, &DiskUsage) -> u64;
        let table: [(&str, &str, Read); 6] = [
            ("available_bytes", "Number of available bytes in the volume", |free, _| free.bytes),
            ("capacity_bytes", "Capacity in bytes of the volume", |_, all| all.bytes),
            ("used_bytes", "Number of used bytes in the volume", |free, all| all.bytes.saturating_sub(free.bytes)),
            ("inodes_free", "Number of free inodes in the volume", |free, _| free.inodes),
            ("inodes", "Maximum number of inodes in the volume", |_, all| all.inodes),
            ("inodes_used", "Number of used inodes in the volume", |free, all| all.inodes.saturating_sub(free.inodes)),
        ];
        for (name, help, read) in table {
            let name = format!("kubelet_volume_stats_{name}");
            let mut metric = encoder.encode_descriptor(&name, help, None, MetricType::Gauge)?;
            for (namespace, claim, free, all) in &rows {
                let labels = [("namespace", namespace.as_str()), ("persistentvolumeclaim", claim.as_str())];
                #[allow(clippy::cast_precision_loss)]
                ConstGauge::new(read(free, all) as f64).encode(metric.encode_family(&labels)?)?;
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
        let at = move |_: &str, volume: &str| (volume != "raw").then(|| path.clone());
        let stats = ClaimStats { pods: Box::new(move || pods.clone()), at: Box::new(at) };
        let claims: Vec<_> = stats.look().into_iter().map(|(_, claim, _, all)| (claim, all.bytes > 0)).collect();
        assert_eq!(claims, [("shared".to_owned(), true), ("u1-own".to_owned(), true), ("u2-own".to_owned(), true)]);
    }
}
