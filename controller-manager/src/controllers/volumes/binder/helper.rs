//! Work on a directory of a node, done by a pod there: it is made, emptied or removed by the `pause` image's program,
//! which every node has.
use crate::runtime::{api_in, gone_is_fine, is_code};
use apimachinery::pod::phase;
use k8s_openapi::api::core::v1::{Pod, Volume};
use kube::{
    Client, ResourceExt as _,
    api::{DeleteParams, PostParams},
};
use serde_json::json;

pub const NAMESPACE: &str = "kube-system";
const LABEL: (&str, &str) = ("app.kubernetes.io/managed-by", "persistent-volume-binder");
const MOUNT: &str = "/volumes";
const DEADLINE_SECONDS: u32 = 300;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// A new directory that anybody may write to.
    Make,
    /// The directory goes.
    Remove,
    /// What is in it goes.
    Scrub,
}

/// Where the directory is: a node (any, if none is said), what to mount, and the path within.
#[derive(Debug, PartialEq)]
pub struct Place {
    pub node: Option<String>,
    pub mount: Volume,
    pub path: String,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Progress {
    Working,
    Done,
    Failed(String),
}

pub struct Helper {
    client: Client,
    image: String,
}

impl Work {
    pub const ALL: [Self; 3] = [Self::Make, Self::Remove, Self::Scrub];

    fn verb(self) -> &'static str {
        match self {
            Self::Make => "make",
            Self::Remove => "remove",
            Self::Scrub => "scrub",
        }
    }

    /// The name of the pod that does it.
    pub fn pod(self, volume: &str) -> String {
        format!("{}-{volume}", self.verb())
    }
}

/// The volume that a helper's pod works for.
pub fn volume_of(pod: &Pod) -> Option<String> {
    let ours = pod.metadata.labels.as_ref()?.get(LABEL.0).is_some_and(|v| v == LABEL.1);
    let name = pod.metadata.name.as_deref().filter(|_| ours && pod.metadata.namespace.as_deref() == Some(NAMESPACE))?;
    Work::ALL.iter().find_map(|work| name.strip_prefix(work.verb())?.strip_prefix('-')).map(str::to_owned)
}

impl Helper {
    pub fn new(client: Client, image: &str) -> Self {
        Self { client, image: image.to_owned() }
    }

    /// How the work stands; begins it if it has not begun. A pod that failed is removed, so that the next try is another.
    pub async fn work(&self, work: Work, volume: &str, place: &Place) -> Result<Progress, kube::Error> {
        let api = api_in::<Pod>(&self.client, NAMESPACE);
        let Some(pod) = api.get_opt(&work.pod(volume)).await? else {
            return match api.create(&PostParams::default(), &self.pod(work, volume, place)).await {
                Err(error) if !is_code(&error, 409) => Err(error),
                _ => Ok(Progress::Working),
            };
        };
        match phase(&pod) {
            "Succeeded" => Ok(Progress::Done),
            "Failed" => {
                self.dismiss(work, volume).await?;
                let said = pod.status.as_ref().and_then(|s| s.message.clone()).unwrap_or_default();
                Ok(Progress::Failed(format!("pod {NAMESPACE}/{} failed: {said}", pod.name_any())))
            }
            _ => Ok(Progress::Working),
        }
    }

    /// The pod has served.
    pub async fn dismiss(&self, work: Work, volume: &str) -> Result<(), kube::Error> {
        let api = api_in::<Pod>(&self.client, NAMESPACE);
        gone_is_fine(api.delete(&work.pod(volume), &DeleteParams::default().grace_period(0)).await).map(|_| ())
    }

    fn pod(&self, work: Work, volume: &str, place: &Place) -> Pod {
        let path = format!("{MOUNT}/{}", place.path);
        let mut mount = place.mount.clone();
        "directory".clone_into(&mut mount.name);
        // The fields are right by construction; a pod that is not is refused by the server.
        serde_json::from_value(json!({
            "metadata": {"name": work.pod(volume), "namespace": NAMESPACE, "labels": {LABEL.0: LABEL.1}},
            "spec": {
                "nodeName": place.node,
                "restartPolicy": "Never",
                "activeDeadlineSeconds": DEADLINE_SECONDS,
                "automountServiceAccountToken": false,
                "enableServiceLinks": false,
                "tolerations": [{"operator": "Exists"}],
                "volumes": [mount],
                "containers": [{
                    "name": work.verb(),
                    "image": self.image,
                    "imagePullPolicy": "IfNotPresent",
                    "command": ["/pause", work.verb(), path.trim_end_matches('/')],
                    "securityContext": {"runAsUser": 0, "runAsGroup": 0},
                    "terminationMessagePolicy": "FallbackToLogsOnError",
                    "volumeMounts": [{"name": "directory", "mountPath": MOUNT}],
                }],
            },
        }))
        .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_helper_mounts_what_it_works_on_and_is_known_by_its_name() {
        component_base::daemon::init(0);
        let service = tower::service_fn(|_: http::Request<kube::client::Body>| async {
            Ok::<_, tower::BoxError>(http::Response::new(kube::client::Body::empty()))
        });
        let helper = Helper::new(Client::new(service, "default"), "pause:1");
        let mount = serde_json::from_value(json!({"name": "", "hostPath": {"path": "/var/lib/v"}})).unwrap();
        let place = Place { node: Some("n1".into()), mount, path: "pvc-1".into() };
        let pod = helper.pod(Work::Make, "pvc-1", &place);
        let spec = pod.spec.as_ref().unwrap();
        assert_eq!(spec.node_name.as_deref(), Some("n1"));
        assert_eq!(spec.containers[0].command.as_ref().unwrap()[1..], ["make", "/volumes/pvc-1"]);
        assert_eq!(spec.volumes.as_ref().unwrap()[0].host_path.as_ref().unwrap().path, "/var/lib/v");
        assert_eq!(volume_of(&pod).as_deref(), Some("pvc-1"));
        let mut other = pod.clone();
        other.metadata.labels = None;
        assert_eq!(volume_of(&other), None);
    }
}
