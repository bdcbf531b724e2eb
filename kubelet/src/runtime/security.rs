//! Security contexts: what a pod and a container say, as CRI takes it.

use std::path::Path;

use k8s_openapi::api::core::v1::{
    AppArmorProfile, Container, Pod, PodSecurityContext, SELinuxOptions, SeccompProfile, SecurityContext,
};
use proto::cri as pb;

use super::user_ids::IdRange;
use crate::images::ImageRef;

/// Paths hidden from, and read-only in, unprivileged containers (`procMount: Default`). As `securitycontext`.
const MASKED_PATHS: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
];
const MASKED_MORE: [&str; 2] = ["/sys/firmware", "/sys/devices/virtual/powercap"];
const READONLY_PATHS: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Where Localhost seccomp profiles lie below the kubelet's root directory.
const SECCOMP_DIR: &str = "seccomp";

/// A container asks for something its image or policy forbids (waiting reason CreateContainerConfigError).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecurityError {
    #[error("container has runAsNonRoot and image will run as root (pod: {pod:?}, container: {container})")]
    RunsAsRoot { pod: String, container: String },
    #[error(
        "container has runAsNonRoot and image has non-numeric user ({user}), cannot verify user is non-root (pod: {pod:?}, container: {container})"
    )]
    UnknownUser { user: String, pod: String, container: String },
    #[error("runAsGroup is specified without a runAsUser")]
    GroupWithoutUser,
}

/// Settings of the node that security contexts depend on.
#[derive(Debug, Clone)]
pub struct NodePolicy {
    pub root_dir: std::path::PathBuf,
    pub seccomp_default: bool,
}

/// The namespaces of a pod's containers; `target` is the container whose PID namespace an ephemeral one joins.
pub fn namespaces(pod: &Pod, target: Option<&str>, ids: Option<IdRange>) -> pb::NamespaceOption {
    let spec = pod.spec.clone().unwrap_or_default();
    let mode = |node: Option<bool>| if node == Some(true) { pb::NamespaceMode::Node } else { pb::NamespaceMode::Pod };
    let pid = match target {
        Some(_) if spec.host_pid != Some(true) && spec.share_process_namespace != Some(true) => {
            pb::NamespaceMode::Target
        }
        _ if spec.host_pid == Some(true) => pb::NamespaceMode::Node,
        _ if spec.share_process_namespace == Some(true) => pb::NamespaceMode::Pod,
        _ => pb::NamespaceMode::Container,
    };
    pb::NamespaceOption {
        network: mode(spec.host_network) as i32,
        ipc: mode(spec.host_ipc) as i32,
        pid: pid as i32,
        target_id: if pid == pb::NamespaceMode::Target { target.unwrap_or_default().to_owned() } else { String::new() },
        userns_options: ids.map(IdRange::namespace),
    }
}

/// The security context of a sandbox.
pub fn sandbox(pod: &Pod, ids: Option<IdRange>, policy: &NodePolicy) -> pb::LinuxSandboxSecurityContext {
    let context = pod.spec.as_ref().and_then(|s| s.security_context.clone()).unwrap_or_default();
    pb::LinuxSandboxSecurityContext {
        namespace_options: Some(namespaces(pod, None, ids)),
        selinux_options: context.se_linux_options.as_ref().map(selinux),
        run_as_user: context.run_as_user.map(int64),
        run_as_group: context.run_as_user.and(context.run_as_group).map(int64),
        supplemental_groups: groups(&context),
        supplemental_groups_policy: groups_policy(&context),
        privileged: has_privileged(pod),
        // The pause process is confined by the runtime's own profile, whatever the pod's containers ask for.
        seccomp: Some(seccomp(context.seccomp_profile.as_ref(), policy, true)),
        ..Default::default()
    }
}

/// The security context of a container, checked against the image's user.
pub fn container(
    pod: &Pod,
    container: &Container,
    image: &ImageRef,
    target: Option<&str>,
    ids: Option<IdRange>,
    policy: &NodePolicy,
) -> Result<pb::LinuxContainerSecurityContext, SecurityError> {
    let pod_context = pod.spec.as_ref().and_then(|s| s.security_context.clone()).unwrap_or_default();
    let own = container.security_context.clone().unwrap_or_default();
    let user = own.run_as_user.or(pod_context.run_as_user);
    let group = own.run_as_group.or(pod_context.run_as_group);
    verify_non_root(pod, container, &own, &pod_context, user, image)?;

    let mut out = pb::LinuxContainerSecurityContext {
        privileged: own.privileged == Some(true),
        namespace_options: Some(namespaces(pod, target, ids)),
        selinux_options: own.se_linux_options.as_ref().or(pod_context.se_linux_options.as_ref()).map(selinux),
        readonly_rootfs: own.read_only_root_filesystem == Some(true),
        supplemental_groups: groups(&pod_context),
        supplemental_groups_policy: groups_policy(&pod_context),
        no_new_privs: own.allow_privilege_escalation == Some(false),
        ..Default::default()
    };
    match (user, image.uid, image.username.as_str()) {
        (Some(uid), _, _) => out.run_as_user = Some(int64(uid)),
        (None, Some(uid), _) => out.run_as_user = Some(int64(uid)),
        (None, None, "") => {}
        (None, None, name) => out.run_as_username = name.to_owned(),
    }
    if let Some(gid) = group {
        if out.run_as_user.is_none() && out.run_as_username.is_empty() {
            // The image runs as root by default; the runtime wants the user said together with the group.
            out.run_as_user = Some(int64(0));
        }
        out.run_as_group = Some(int64(gid));
    }
    if let Some(capabilities) = &own.capabilities {
        out.capabilities = Some(pb::Capability {
            add_capabilities: capabilities.add.clone().unwrap_or_default(),
            drop_capabilities: capabilities.drop.clone().unwrap_or_default(),
            add_ambient_capabilities: Vec::new(),
        });
    }
    out.seccomp = Some(if out.privileged {
        profile(pb::security_profile::ProfileType::Unconfined, String::new())
    } else {
        seccomp(own.seccomp_profile.as_ref().or(pod_context.seccomp_profile.as_ref()), policy, false)
    });
    out.apparmor = own.app_armor_profile.as_ref().or(pod_context.app_armor_profile.as_ref()).map(apparmor);
    if !out.privileged && own.proc_mount.as_deref() != Some("Unmasked") {
        out.masked_paths = MASKED_PATHS.iter().chain(MASKED_MORE.iter()).map(|p| (*p).to_owned()).collect();
        out.readonly_paths = READONLY_PATHS.iter().map(|p| (*p).to_owned()).collect();
    }
    Ok(out)
}

/// As `verifyRunAsNonRoot`.
fn verify_non_root(
    pod: &Pod,
    container: &Container,
    own: &SecurityContext,
    pod_context: &PodSecurityContext,
    user: Option<i64>,
    image: &ImageRef,
) -> Result<(), SecurityError> {
    if own.run_as_non_root.or(pod_context.run_as_non_root) != Some(true) {
        return Ok(());
    }
    let named = || (super::pods::full_name(pod), container.name.clone());
    match (user, image.uid, image.username.as_str()) {
        (Some(uid), _, _) if uid != 0 => Ok(()),
        (None, Some(uid), _) if uid != 0 => Ok(()),
        (None, None, name) if !name.is_empty() => {
            let (pod, container) = named();
            Err(SecurityError::UnknownUser { user: name.to_owned(), pod, container })
        }
        _ => {
            let (pod, container) = named();
            Err(SecurityError::RunsAsRoot { pod, container })
        }
    }
}

fn int64(value: i64) -> pb::Int64Value {
    pb::Int64Value { value }
}

fn groups(context: &PodSecurityContext) -> Vec<i64> {
    let mut groups: Vec<i64> = context.fs_group.into_iter().collect();
    groups.extend(context.supplemental_groups.iter().flatten());
    groups
}

fn groups_policy(context: &PodSecurityContext) -> i32 {
    match context.supplemental_groups_policy.as_deref() {
        Some("Strict") => pb::SupplementalGroupsPolicy::Strict as i32,
        _ => pb::SupplementalGroupsPolicy::Merge as i32,
    }
}

fn selinux(options: &SELinuxOptions) -> pb::SeLinuxOption {
    pb::SeLinuxOption {
        user: options.user.clone().unwrap_or_default(),
        role: options.role.clone().unwrap_or_default(),
        r#type: options.type_.clone().unwrap_or_default(),
        level: options.level.clone().unwrap_or_default(),
    }
}

fn profile(kind: pb::security_profile::ProfileType, localhost_ref: String) -> pb::SecurityProfile {
    pb::SecurityProfile { profile_type: kind as i32, localhost_ref }
}

fn seccomp(wanted: Option<&SeccompProfile>, policy: &NodePolicy, for_sandbox: bool) -> pb::SecurityProfile {
    use pb::security_profile::ProfileType::{Localhost, RuntimeDefault, Unconfined};
    match wanted.map(|p| p.type_.as_str()) {
        Some("RuntimeDefault") => profile(RuntimeDefault, String::new()),
        Some("Localhost") if !for_sandbox => {
            let name = wanted.and_then(|p| p.localhost_profile.clone()).unwrap_or_default();
            let path = Path::new(&policy.root_dir).join(SECCOMP_DIR).join(name);
            profile(Localhost, path.display().to_string())
        }
        Some("Localhost") => profile(RuntimeDefault, String::new()),
        None if policy.seccomp_default || for_sandbox => profile(RuntimeDefault, String::new()),
        _ => profile(Unconfined, String::new()),
    }
}

fn apparmor(wanted: &AppArmorProfile) -> pb::SecurityProfile {
    use pb::security_profile::ProfileType::{Localhost, RuntimeDefault, Unconfined};
    match wanted.type_.as_str() {
        "Localhost" => profile(Localhost, wanted.localhost_profile.clone().unwrap_or_default()),
        "Unconfined" => profile(Unconfined, String::new()),
        _ => profile(RuntimeDefault, String::new()),
    }
}

/// Whether any container of the pod is privileged: its sandbox must allow it.
pub fn has_privileged(pod: &Pod) -> bool {
    let Some(spec) = pod.spec.as_ref() else { return false };
    let privileged = |c: &Container| c.security_context.as_ref().and_then(|s| s.privileged).unwrap_or(false);
    spec.containers.iter().chain(spec.init_containers.iter().flatten()).any(privileged)
        || spec
            .ephemeral_containers
            .iter()
            .flatten()
            .any(|c| c.security_context.as_ref().and_then(|s| s.privileged).unwrap_or(false))
}

/// The signal that stops a container, where it chose one (and is allowed to: `spec.os` says linux).
pub fn stop_signal(container: &Container) -> i32 {
    let wanted = container.lifecycle.as_ref().and_then(|l| l.stop_signal.as_deref());
    wanted.and_then(pb::Signal::from_str_name).unwrap_or(pb::Signal::RuntimeDefault) as i32
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn policy() -> NodePolicy {
        NodePolicy { root_dir: "/var/lib/kubelet".into(), seccomp_default: false }
    }

    fn pod(spec: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": {"name": "p", "namespace": "n"}, "spec": spec})).unwrap()
    }

    fn first(pod: &Pod) -> Container {
        pod.spec.as_ref().unwrap().containers[0].clone()
    }

    fn image(uid: Option<i64>, username: &str) -> ImageRef {
        ImageRef { id: "i".into(), uid, username: username.into() }
    }

    #[test]
    fn a_containers_own_words_win_over_the_pods() {
        let pod = pod(json!({
            "securityContext": {"runAsUser": 1000, "runAsGroup": 2000, "fsGroup": 3000, "supplementalGroups": [4000],
                                "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [{"name": "c", "securityContext": {"runAsUser": 5, "readOnlyRootFilesystem": true,
                "allowPrivilegeEscalation": false, "capabilities": {"add": ["NET_ADMIN"], "drop": ["ALL"]},
                "seccompProfile": {"type": "Localhost", "localhostProfile": "a/b.json"}}}]
        }));
        let got = container(&pod, &first(&pod), &image(None, ""), None, None, &policy()).unwrap();
        assert_eq!(got.run_as_user.unwrap().value, 5);
        assert_eq!(got.run_as_group.unwrap().value, 2000);
        assert_eq!(got.supplemental_groups, [3000, 4000]);
        assert!(got.readonly_rootfs && got.no_new_privs);
        let seccomp = got.seccomp.unwrap();
        assert_eq!(seccomp.localhost_ref, "/var/lib/kubelet/seccomp/a/b.json");
        assert_eq!(got.capabilities.unwrap().drop_capabilities, ["ALL"]);
        assert!(!got.masked_paths.is_empty());
    }

    #[test]
    fn privileged_containers_are_neither_masked_nor_filtered() {
        let pod = pod(json!({"containers": [{"name": "c", "securityContext": {"privileged": true}}]}));
        let got = container(&pod, &first(&pod), &image(None, ""), None, None, &policy()).unwrap();
        assert!(got.privileged && got.masked_paths.is_empty());
        assert_eq!(got.seccomp.unwrap().profile_type(), pb::security_profile::ProfileType::Unconfined);
        assert!(has_privileged(&pod));
    }

    #[test]
    fn run_as_non_root_is_checked_against_the_image() {
        let pod = pod(json!({"containers": [{"name": "c", "securityContext": {"runAsNonRoot": true}}]}));
        let check = |image| container(&pod, &first(&pod), &image, None, None, &policy()).map(|_| ());
        assert_eq!(check(image(Some(7), "")), Ok(()));
        for root in [image(Some(0), ""), image(None, "")] {
            let error = check(root).unwrap_err().to_string();
            assert!(error.starts_with("container has runAsNonRoot and image will run as root"), "{error}");
        }
        assert!(check(image(None, "nobody")).unwrap_err().to_string().contains("non-numeric user (nobody)"));
    }

    #[test]
    fn process_namespaces_are_private_unless_shared() {
        for (spec, want) in [
            (json!({"containers": []}), pb::NamespaceMode::Container),
            (json!({"containers": [], "shareProcessNamespace": true}), pb::NamespaceMode::Pod),
            (json!({"containers": [], "hostPID": true}), pb::NamespaceMode::Node),
        ] {
            assert_eq!(namespaces(&pod(spec), None, None).pid(), want);
        }
    }
}
