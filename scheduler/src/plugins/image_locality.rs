//! ImageLocality: prefers nodes that have the pod's images, by size, and less so the fewer nodes have them.

use crate::cache::{ImageId, NodeId, PendingPod, Snapshot};
use crate::framework::{MAX_NODE_SCORE, Plugin, Points, PreScore, State, state_of};

const MEGABYTE: i64 = 1024 * 1024;
/// Images that are smaller in sum make no difference.
const THRESHOLD_MIN: i64 = 23 * MEGABYTE;
/// The size of one container's image from which on it counts fully.
const CONTAINER_THRESHOLD_MAX: i64 = 1000 * MEGABYTE;

pub struct ImageLocality;

/// The name with the tag that is meant if none is given. As `normalizedImageName`.
fn with_tag(image: &str) -> String {
    match image.rsplit_once('/').map_or(image, |(_, last)| last).contains([':', '@']) {
        true => image.to_owned(),
        false => format!("{image}:latest"),
    }
}

impl Plugin for ImageLocality {
    fn name(&self) -> &'static str {
        "ImageLocality"
    }

    fn points(&self) -> Points {
        Points::PRE_SCORE.and(Points::SCORE)
    }

    /// The pod's images that are on nodes, with the share of the nodes, and the number of its containers.
    fn pre_score(&self, pod: &PendingPod, snapshot: &Snapshot, _feasible: &[NodeId]) -> PreScore {
        let Some(spec) = pod.spec() else { return PreScore::Skip };
        let total_nodes = snapshot.nodes.len().max(1) as f64;
        let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
        let count = containers.clone().count() as i64;
        let images = containers.filter_map(|container| {
            let (image, nodes) = snapshot.nodes.image(&with_tag(container.image.as_deref().unwrap_or_default()))?;
            Some((image, f64::from(nodes) / total_nodes))
        });
        let images: Vec<(ImageId, f64)> = images.collect();
        if images.is_empty() { PreScore::Skip } else { PreScore::Proceed(Box::new((images, count))) }
    }

    fn score(&self, state: &State, _pod: &PendingPod, snapshot: &Snapshot, node: NodeId) -> i64 {
        let (images, containers): &(Vec<(ImageId, f64)>, i64) = state_of(state);
        let sizes = images.iter().map(|(image, spread)| {
            snapshot.nodes.image_size(node, *image).map_or(0, |size| (size as f64 * spread) as i64)
        });
        points(sizes.sum(), *containers)
    }
}

/// As `calculatePriority`.
fn points(sum: i64, containers: i64) -> i64 {
    let threshold_max = CONTAINER_THRESHOLD_MAX * containers.max(1);
    let sum = sum.clamp(THRESHOLD_MIN, threshold_max);
    MAX_NODE_SCORE * (sum - THRESHOLD_MIN) / (threshold_max - THRESHOLD_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{cluster, node, pod, scores};

    #[test]
    fn a_tag_is_added_where_there_is_none() {
        for (image, expected) in [
            ("nginx", "nginx:latest"),
            ("nginx:1", "nginx:1"),
            ("host:5000/nginx", "host:5000/nginx:latest"),
            ("host:5000/nginx:1", "host:5000/nginx:1"),
            ("nginx@sha256:00", "nginx@sha256:00"),
        ] {
            assert_eq!(with_tag(image), expected);
        }
    }

    #[test]
    fn large_images_that_are_present_count() {
        let snapshot = cluster([
            node("n1").image("large:latest", 1000 * MEGABYTE).build(),
            node("n2").image("small:1", 20 * MEGABYTE).build(),
        ]);
        assert_eq!(scores(&ImageLocality, &pod("p").image("large").build(), &snapshot), [48, 0]);
        assert_eq!(scores(&ImageLocality, &pod("p").image("small:1").build(), &snapshot), [0, 0]);
    }
}
