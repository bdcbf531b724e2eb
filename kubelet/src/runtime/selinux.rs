//! SELinux, on hosts that have it: which context a pod's volumes get, by a mount option or by the runtime, file by file. Hosts
//! without it are asked for nothing, as upstream (`selinux.GetEnabled`).

use std::path::Path;
use std::sync::LazyLock;

use k8s_openapi::api::core::v1::{Pod, SELinuxOptions};

/// Where policies keep what containers and their files get.
const CONTEXTS: [&str; 3] = ["targeted", "minimum", "mls"];

static FILE_CONTEXT: LazyLock<Option<String>> = LazyLock::new(|| {
    if !Path::new("/sys/fs/selinux/enforce").exists() {
        return None;
    }
    let read = |policy: &str| std::fs::read_to_string(format!("/etc/selinux/{policy}/contexts/lxc_contexts")).ok();
    let found = CONTEXTS.into_iter().find_map(|policy| of_files(&read(policy)?));
    Some(found.unwrap_or_else(|| "system_u:object_r:container_file_t:s0".to_owned()))
});

/// Whether this host has it.
pub fn is_enabled() -> bool {
    FILE_CONTEXT.is_some()
}

/// The context with which a volume that only this pod has is mounted. None: not on this host, not by the pod's wish
/// (`seLinuxChangePolicy: Recursive`), or its containers do not agree on one.
pub fn volume_context(pod: &Pod, volume: &str) -> Option<String> {
    context_of(FILE_CONTEXT.as_deref()?, pod, volume)
}

fn context_of(files: &str, pod: &Pod, volume: &str) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let of_pod = spec.security_context.as_ref();
    if of_pod.and_then(|context| context.se_linux_change_policy.as_deref()) == Some("Recursive") {
        return None;
    }
    let containers = spec.init_containers.iter().flatten().chain(&spec.containers);
    let uses = containers.filter(|c| c.volume_mounts.iter().flatten().any(|mount| mount.name == volume));
    let mut contexts = uses.map(|container| {
        let own = container.security_context.as_ref().and_then(|context| context.se_linux_options.as_ref());
        own.or(of_pod.and_then(|context| context.se_linux_options.as_ref())).and_then(|options| label(files, options))
    });
    let first = contexts.next()??;
    contexts.all(|context| context.as_ref() == Some(&first)).then_some(first)
}

/// What files get of a container with these options: user and level are the container's. As `InitLabels`.
fn label(files: &str, options: &SELinuxOptions) -> Option<String> {
    let said = |part: &Option<String>| part.clone().filter(|part| !part.is_empty());
    let (user, level) = (said(&options.user), said(&options.level));
    if user.is_none() && level.is_none() && said(&options.role).is_none() && said(&options.type_).is_none() {
        return None;
    }
    let mut parts = files.splitn(4, ':').map(str::to_owned);
    let (of_user, role, kind) = (parts.next()?, parts.next()?, parts.next()?);
    let of_level = parts.next().unwrap_or_default();
    Some(format!("{}:{role}:{kind}:{}", user.unwrap_or(of_user), level.unwrap_or(of_level)))
}

/// The context of files, of a policy's `lxc_contexts`.
fn of_files(contexts: &str) -> Option<String> {
    let line = contexts.lines().filter_map(|line| line.split_once('=')).find(|(key, _)| key.trim() == "file")?;
    Some(line.1.trim().trim_matches('"').to_owned()).filter(|context| !context.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    #[test]
    fn a_volume_has_the_context_that_its_containers_agree_on() {
        let contexts =
            "process = \"system_u:system_r:container_t:s0\"\nfile = \"system_u:object_r:container_file_t:s0\"\n";
        let files = of_files(contexts).unwrap();
        let level = |level: &str| json!({"seLinuxOptions": {"level": level}});
        let uses = |name: &str, context: Value| json!({"name": name, "volumeMounts": [{"name": "v", "mountPath": "/v"}], "securityContext": context});
        let one = "system_u:object_r:container_file_t:s0:c1,c2";
        for (of_pod, containers, want) in [
            (level("s0:c1,c2"), json!([uses("a", json!({}))]), Some(one)),
            (json!({}), json!([uses("a", level("s0:c1,c2")), uses("b", level("s0:c1,c2"))]), Some(one)),
            (level("s0:c9"), json!([uses("a", level("s0:c1,c2")), {"name": "b"}]), Some(one)),
            (level("s0:c9"), json!([uses("a", level("s0:c1,c2")), uses("b", json!({}))]), None),
            (json!({}), json!([uses("a", json!({}))]), None),
            (
                json!({"seLinuxChangePolicy": "Recursive", "seLinuxOptions": {"level": "s0:c1"}}),
                json!([uses("a", json!({}))]),
                None,
            ),
            (
                json!({"seLinuxOptions": {"user": "u", "type": "t"}}),
                json!([uses("a", json!({}))]),
                Some("u:object_r:container_file_t:s0"),
            ),
        ] {
            let pod = json!({"metadata": {"name": "p"}, "spec": {"securityContext": of_pod, "containers": containers}});
            let pod: Pod = serde_json::from_value(pod).unwrap();
            assert_eq!(context_of(&files, &pod, "v").as_deref(), want, "{of_pod} {containers}");
        }
    }
}
