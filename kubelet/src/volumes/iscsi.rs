//! Disks of iSCSI targets, by the host's `iscsiadm`: a session to the target is begun where there is none, the disk that then
//! appears is mounted, and the session ends with the last volume on this node that is of that target. Which those are is
//! remembered in a file of each, in the pod's directory.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{blocking, host, mounts};

/// Beside the volumes of a pod: a directory a volume, with the file below.
const PLUGIN: &str = "plugins/kubernetes.io~iscsi";
const SESSION: &str = "session.json";
/// How long the disk of a session is waited for.
const DISK_PATIENCE: Duration = Duration::from_secs(10);
const DISK_POLL: Duration = Duration::from_millis(100);
/// `iscsiadm`: there is such a session; there is none (any more).
const SESSION_EXISTS: i32 = 15;
const NOTHING_THERE: i32 = 21;

/// What a volume asks for: the fields of both the pod's and the PersistentVolume's source.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Target {
    target_portal: String,
    portals: Vec<String>,
    iqn: String,
    lun: i32,
    iscsi_interface: String,
    initiator_name: Option<String>,
    pub fs_type: Option<String>,
    pub read_only: bool,
    #[serde(rename = "chapAuthDiscovery")]
    chap_discovery: bool,
    #[serde(rename = "chapAuthSession")]
    chap_session: bool,
    pub secret_ref: Option<SecretRef>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(super) struct SecretRef {
    pub name: String,
    pub namespace: Option<String>,
}

/// A step of `iscsiadm`: its arguments, and the exit code that is as good as success.
type Step = (Vec<String>, i32);

// === impl Target ===

impl Target {
    /// From a volume source of the API.
    pub(super) fn of(source: &impl Serialize) -> Result<Target, String> {
        let target: Target =
            serde_json::to_value(source).and_then(serde_json::from_value).map_err(|error| error.to_string())?;
        match &target.initiator_name {
            // It would need an interface of its own on the host.
            Some(name) if !name.is_empty() => Err(format!("initiatorName {name:?}: set it on the host, by iscsiadm")),
            _ => Ok(target),
        }
    }

    fn portals(&self) -> Vec<String> {
        let with_port = |portal: &String| match portal.rsplit_once(':') {
            Some((_, port)) if port.parse::<u16>().is_ok() => portal.clone(),
            _ => format!("{portal}:3260"),
        };
        std::iter::once(&self.target_portal).chain(&self.portals).map(with_port).collect()
    }

    fn interface(&self) -> &str {
        if self.iscsi_interface.is_empty() { "default" } else { &self.iscsi_interface }
    }

    /// The disk, when there is a session by this portal.
    fn disk(&self, portal: &str) -> PathBuf {
        format!("/dev/disk/by-path/ip-{portal}-iscsi-{}-lun-{}", self.iqn, self.lun).into()
    }

    /// What begins a session. As `attachISCSI`.
    fn login(&self, portal: &str, secret: &BTreeMap<String, String>) -> Vec<Step> {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let database = words(&format!("-m discoverydb -t sendtargets -p {portal} -I {}", self.interface()));
        let node = words(&format!("-m node -p {portal} -T {} -I {}", self.iqn, self.interface()));
        let with = |base: &[String], more: &[&str]| {
            let all: Vec<String> = base.iter().cloned().chain(more.iter().map(|m| (*m).to_owned())).collect();
            (all, 0)
        };
        let mut steps = vec![with(&database, &["-o", "new"])];
        let chap = |steps: &mut Vec<Step>, base: &[String], prefix: &str| {
            steps.push(with(base, &["-o", "update", "-n", &format!("{prefix}authmethod"), "-v", "CHAP"]));
            for (key, value) in secret.iter().filter(|(key, _)| key.starts_with(prefix)) {
                steps.push(with(base, &["-o", "update", "-n", key, "-v", value]));
            }
        };
        if self.chap_discovery {
            chap(&mut steps, &database, "discovery.sendtargets.auth.");
        }
        steps.push(with(&database, &["--discover"]));
        if self.chap_session {
            chap(&mut steps, &node, "node.session.auth.");
        }
        // The kubelet logs in when the volume is wanted; the host need not at its start.
        steps.push(with(&node, &["-o", "update", "-n", "node.startup", "-v", "manual"]));
        steps.push((with(&node, &["--login"]).0, SESSION_EXISTS));
        steps
    }

    fn logout(&self) -> Vec<Step> {
        let step = |portal: &String, verb: &[&str]| {
            let base = ["-m", "node", "-p", portal, "-T", &self.iqn, "-I", self.interface()];
            (base.iter().chain(verb).map(|word| (*word).to_owned()).collect(), NOTHING_THERE)
        };
        self.portals()
            .iter()
            .flat_map(|portal| [step(portal, &["--logout"]), step(portal, &["-o", "delete"])])
            .collect()
    }
}

/// The disk of a target, for the volume `name` of a pod.
pub(super) async fn attach(
    target: &Target,
    secret: &BTreeMap<String, String>,
    pod_dir: &Path,
    name: &str,
) -> Result<PathBuf, String> {
    // First, so that what is begun here is ended, whatever comes between.
    let (file, text) = (pod_dir.join(PLUGIN).join(name), serde_json::to_string(target).map_err(|e| e.to_string())?);
    blocking(move || fs::create_dir_all(&file).and_then(|()| fs::write(file.join(SESSION), text))).await?;
    let mut why = String::new();
    for portal in target.portals() {
        match carry_out(target.login(&portal, secret)).await {
            Ok(()) => {}
            Err(error) => {
                why = error;
                continue;
            }
        }
        let (disk, begun) = (target.disk(&portal), tokio::time::Instant::now());
        while begun.elapsed() < DISK_PATIENCE {
            if tokio::fs::try_exists(&disk).await.unwrap_or(false) {
                return Ok(disk);
            }
            tokio::time::sleep(DISK_POLL).await;
        }
        why = format!("disk {} did not appear", disk.display());
    }
    Err(format!("failed to get any path for iscsi disk: {why}"))
}

/// Mounts the disk of a target.
pub(super) async fn mount(
    target: &Target,
    secret: &BTreeMap<String, String>,
    options: &[String],
    pod_dir: &Path,
    (name, at): (&str, &Path),
) -> Result<(), String> {
    let volume = at.to_owned();
    let present = blocking(move || fs::create_dir_all(&volume).and_then(|()| mounts::is_mount_point(&volume))).await?;
    if present {
        return Ok(());
    }
    let disk = attach(target, secret, pod_dir, name).await?;
    host::format_and_mount(&disk, target.fs_type.as_deref().unwrap_or("ext4"), options, at).await
}

/// Ends the sessions that only this pod's volumes, unmounted by now, needed.
pub(super) async fn end_sessions(pod_dir: &Path) -> Result<(), String> {
    let own = sessions(pod_dir);
    if own.is_empty() {
        return Ok(());
    }
    let own_dir = pod_dir.to_owned();
    let unneeded = blocking(move || {
        let pods = own_dir.parent().map(fs::read_dir).transpose()?.into_iter().flatten().flatten();
        let others: Vec<Target> =
            pods.map(|pod| pod.path()).filter(|pod| *pod != own_dir).flat_map(|pod| sessions(&pod)).collect();
        let needed = |own: &Target| others.iter().any(|o| o.iqn == own.iqn && o.target_portal == own.target_portal);
        Ok::<_, io::Error>(own.into_iter().filter(|own| !needed(own)).collect::<Vec<_>>())
    });
    for target in unneeded.await? {
        carry_out(target.logout()).await?;
    }
    Ok(())
}

fn sessions(pod_dir: &Path) -> Vec<Target> {
    let volumes = fs::read_dir(pod_dir.join(PLUGIN)).into_iter().flatten().flatten();
    let read = |volume: fs::DirEntry| serde_json::from_slice(&fs::read(volume.path().join(SESSION)).ok()?).ok();
    volumes.filter_map(read).collect()
}

async fn carry_out(steps: Vec<Step>) -> Result<(), String> {
    for (arguments, also_fine) in steps {
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let (code, output) = host::run("iscsiadm", &arguments).await?;
        if code != 0 && code != also_fine {
            // Not the arguments: there may be passwords among them.
            return Err(format!("iscsi: {} {}: exit status {code}: {output}", arguments[1], arguments[3]));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ISCSIVolumeSource;

    #[test]
    fn sessions_begin_and_end_by_the_host_s_program() {
        let source: ISCSIVolumeSource =
            serde_json::from_value(serde_json::json!({"targetPortal": "10.0.0.1", "portals": ["10.0.0.2:3261"],
            "iqn": "iqn.2026-01.example:disk", "lun": 2, "chapAuthSession": true, "secretRef": {"name": "chap"}}))
            .expect("a source");
        let target = Target::of(&source).expect("a target");
        assert_eq!(target.portals(), ["10.0.0.1:3260", "10.0.0.2:3261"]);
        assert_eq!(
            target.disk("10.0.0.1:3260"),
            Path::new("/dev/disk/by-path/ip-10.0.0.1:3260-iscsi-iqn.2026-01.example:disk-lun-2")
        );
        let secret = [("node.session.auth.username".to_owned(), "u".to_owned()), ("other".to_owned(), "x".to_owned())];
        let lines = |steps: Vec<Step>| steps.into_iter().map(|(step, _)| step.join(" ")).collect::<Vec<_>>();
        let node = "-m node -p 10.0.0.1:3260 -T iqn.2026-01.example:disk -I default";
        let database = "-m discoverydb -t sendtargets -p 10.0.0.1:3260 -I default";
        assert_eq!(
            lines(target.login("10.0.0.1:3260", &secret.into())),
            [
                format!("{database} -o new"),
                format!("{database} --discover"),
                format!("{node} -o update -n node.session.auth.authmethod -v CHAP"),
                format!("{node} -o update -n node.session.auth.username -v u"),
                format!("{node} -o update -n node.startup -v manual"),
                format!("{node} --login"),
            ]
        );
        assert_eq!(lines(target.logout())[0], format!("{node} --logout"));
    }

    #[tokio::test]
    async fn a_session_that_another_pod_needs_goes_on() {
        let root = tempfile::tempdir().expect("a directory");
        let target = Target { target_portal: "p".into(), iqn: "i".into(), ..Default::default() };
        for pod in ["a", "b"] {
            let volume = root.path().join(pod).join(PLUGIN).join("v");
            fs::create_dir_all(&volume).expect("a directory");
            fs::write(volume.join(SESSION), serde_json::to_string(&target).expect("JSON")).expect("a file");
        }
        assert_eq!(sessions(&root.path().join("a")), [target]);
        // No program is called: neither is it there.
        end_sessions(&root.path().join("a")).await.expect("nothing to end");
    }
}
