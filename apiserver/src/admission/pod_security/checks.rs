//! The Pod Security Standards: what `baseline` and `restricted` ask of a pod. Pure; the words are those of
//! `pod-security-admission/policy`.
use apimachinery::pod::SAFE_SYSCTLS;
use serde_json::Value;

use crate::admission::{list, text};
use crate::registry::object::at;

/// A requirement that a pod does not meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    pub reason: &'static str,
    pub detail: String,
}

/// How strict a namespace is, unless it is `privileged`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Baseline,
    Restricted,
}

type Check = fn(&Pod<'_>) -> Option<Violation>;

/// No version replaces it.
const NEVER: u32 = u32::MAX;
/// In the order in which violations are named, each with the minor version in which it came, and that from which `restricted`
/// has a stricter one in its place.
const BASELINE: [(Check, u32, u32); 12] = [
    (app_armor, 0, NEVER),
    (capabilities_baseline, 0, 22),
    (host_namespaces, 0, NEVER),
    (host_path_volumes, 0, 0),
    (host_ports, 0, NEVER),
    (host_probes, 34, NEVER),
    (privileged, 0, NEVER),
    (proc_mount, 0, 35),
    (seccomp_baseline, 19, 19),
    (selinux_options, 0, NEVER),
    (sysctls, 0, NEVER),
    (windows_host_process, 0, NEVER),
];

const RESTRICTED: [(Check, u32); 7] = [
    (allow_privilege_escalation, 8),
    (capabilities_restricted, 22),
    (proc_mount_restricted, 35),
    (restricted_volumes, 0),
    (run_as_non_root, 0),
    (run_as_user, 23),
    (seccomp_restricted, 19),
];
/// Sysctls that became safe later, with the minor version; the others always were.
const LATER_SYSCTLS: [(&str, u32); 7] = [
    ("net.ipv4.ip_local_reserved_ports", 27),
    ("net.ipv4.tcp_fin_timeout", 29),
    ("net.ipv4.tcp_keepalive_intvl", 29),
    ("net.ipv4.tcp_keepalive_probes", 29),
    ("net.ipv4.tcp_keepalive_time", 29),
    ("net.ipv4.tcp_rmem", 32),
    ("net.ipv4.tcp_wmem", 32),
];

const CAPABILITIES: [&str; 13] = [
    "AUDIT_WRITE",
    "CHOWN",
    "DAC_OVERRIDE",
    "FOWNER",
    "FSETID",
    "KILL",
    "MKNOD",
    "NET_BIND_SERVICE",
    "SETFCAP",
    "SETGID",
    "SETPCAP",
    "SETUID",
    "SYS_CHROOT",
];
const SELINUX_TYPES: [&str; 5] = ["", "container_engine_t", "container_init_t", "container_kvm_t", "container_t"];
const VOLUMES: [&str; 8] =
    ["configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"];
const APP_ARMOR_PREFIX: &str = "container.apparmor.security.beta.kubernetes.io/";

/// A pod or a pod template: metadata and spec.
struct Pod<'p> {
    metadata: &'p Value,
    spec: &'p Value,
    containers: Vec<&'p Value>,
    /// The minor version of the standards; the newest is `u32::MAX`.
    minor: u32,
}

/// Everything that a pod (or template) does wrong at a level, by the standards of a minor version.
pub fn violations(level: Level, minor: u32, metadata: &Value, spec: &Value) -> Vec<Violation> {
    let containers = ["/initContainers", "/containers", "/ephemeralContainers"];
    let containers = containers.into_iter().flat_map(|member| list(spec, member)).collect();
    let pod = Pod { metadata, spec, containers, minor };
    let restricted = level == Level::Restricted;
    let replaced = |until: u32| restricted && until <= minor && until != NEVER;
    let baseline = BASELINE.iter().filter(|(_, since, until)| *since <= minor && !replaced(*until));
    let more = RESTRICTED.iter().filter(|(_, since)| restricted && *since <= minor);
    let checks = baseline.map(|(check, ..)| check).chain(more.map(|(check, _)| check));
    checks.filter_map(|check| check(&pod)).collect()
}

/// `reason, reason`.
pub fn reasons(violations: &[Violation]) -> String {
    violations.iter().map(|violation| violation.reason).collect::<Vec<_>>().join(", ")
}

/// `reason (detail), reason (detail)`.
pub fn describe(violations: &[Violation]) -> String {
    let each = violations.iter().map(|violation| match violation.detail.as_str() {
        "" => violation.reason.to_owned(),
        detail => format!("{} ({detail})", violation.reason),
    });
    each.collect::<Vec<_>>().join(", ")
}

// === impl Pod ===

impl Pod<'_> {
    /// The names of containers that fail a test.
    fn failing(&self, bad: impl Fn(&Value) -> bool) -> Vec<String> {
        let bad = self.containers.iter().filter(|container| bad(container));
        bad.map(|container| text(container, "/name").to_owned()).collect()
    }

    fn is_windows(&self) -> bool {
        self.minor >= 25 && text(self.spec, "/os/name") == "windows"
    }

    fn has_own_users(&self) -> bool {
        self.minor >= 35 && self.spec["hostUsers"] == false
    }
}

fn quoted(items: &[String]) -> String {
    items.iter().map(|item| format!("{item:?}")).collect::<Vec<_>>().join(", ")
}

/// `container "a"`, `containers "a", "b"`.
fn containers(names: &[String]) -> String {
    format!("{} {}", if names.len() == 1 { "container" } else { "containers" }, quoted(names))
}

fn violation(reason: &'static str, detail: String) -> Option<Violation> {
    Some(Violation { reason, detail })
}

/// The pod and its containers must not do something: `pod and container "a" must not …`.
fn who(pod_too: bool, names: &[String], joint: &str) -> String {
    match (pod_too, names.is_empty()) {
        (true, true) => "pod".to_owned(),
        (true, false) => format!("pod {joint} {}", containers(names)),
        (false, _) => containers(names),
    }
}

fn distinct(mut items: Vec<String>) -> Vec<String> {
    items.sort();
    items.dedup();
    items
}

fn allow_privilege_escalation(pod: &Pod<'_>) -> Option<Violation> {
    if pod.is_windows() {
        return None;
    }
    let bad = pod.failing(|c| at(c, "/securityContext/allowPrivilegeEscalation") != Some(&Value::Bool(false)));
    if bad.is_empty() {
        return None;
    }
    violation(
        "allowPrivilegeEscalation != false",
        format!("{} must set securityContext.allowPrivilegeEscalation=false", containers(&bad)),
    )
}

fn app_armor(pod: &Pod<'_>) -> Option<Violation> {
    const KIND: &str = "/securityContext/appArmorProfile/type";
    let allowed = |kind: &str| matches!(kind, "" | "RuntimeDefault" | "Localhost");
    let mut details = Vec::new();
    let mut values = Vec::new();
    let of_pod = text(pod.spec, KIND);
    let bad = pod.failing(|c| !allowed(text(c, KIND)));
    let pod_bad = !allowed(of_pod);
    if pod_bad || !bad.is_empty() {
        let kinds = pod.containers.iter().map(|c| text(c, KIND)).chain([of_pod]).filter(|kind| !allowed(kind));
        values.extend(kinds.map(ToOwned::to_owned));
        let kinds = quoted(&distinct(values.clone()));
        details.push(format!("{} must not set AppArmor profile type to {kinds}", who(pod_bad, &bad, "and")));
    }
    let annotations = pod.metadata.get("annotations").and_then(Value::as_object);
    for (key, value) in annotations.into_iter().flatten() {
        let profile = value.as_str().unwrap_or_default();
        let fine = profile.is_empty() || profile == "runtime/default" || profile.starts_with("localhost/");
        if key.starts_with(APP_ARMOR_PREFIX) && !fine {
            details.push(format!("annotation \"{key}={profile}\""));
            values.push(profile.to_owned());
        }
    }
    let reason = if values.len() > 1 { "forbidden AppArmor profiles" } else { "forbidden AppArmor profile" };
    if details.is_empty() { None } else { violation(reason, details.join(", ")) }
}

fn added(container: &Value) -> impl Iterator<Item = &str> {
    list(container, "/securityContext/capabilities/add").iter().filter_map(Value::as_str)
}

fn capabilities_beyond(pod: &Pod<'_>, allowed: &[&str]) -> Option<String> {
    let bad = pod.failing(|c| added(c).any(|capability| !allowed.contains(&capability)));
    if bad.is_empty() {
        return None;
    }
    let which = pod.containers.iter().flat_map(|c| added(c)).filter(|capability| !allowed.contains(capability));
    let which = quoted(&distinct(which.map(ToOwned::to_owned).collect()));
    Some(format!("{} must not include {which} in securityContext.capabilities.add", containers(&bad)))
}

fn capabilities_baseline(pod: &Pod<'_>) -> Option<Violation> {
    violation("non-default capabilities", capabilities_beyond(pod, &CAPABILITIES)?)
}

fn capabilities_restricted(pod: &Pod<'_>) -> Option<Violation> {
    if pod.is_windows() {
        return None;
    }
    let mut details = Vec::new();
    let keeping =
        pod.failing(|c| !list(c, "/securityContext/capabilities/drop").iter().any(|dropped| dropped == "ALL"));
    if !keeping.is_empty() {
        details.push(format!("{} must set securityContext.capabilities.drop=[\"ALL\"]", containers(&keeping)));
    }
    details.extend(capabilities_beyond(pod, &["NET_BIND_SERVICE"]));
    if details.is_empty() { None } else { violation("unrestricted capabilities", details.join("; ")) }
}

fn host_namespaces(pod: &Pod<'_>) -> Option<Violation> {
    let used = ["hostNetwork", "hostPID", "hostIPC"].into_iter().filter(|field| pod.spec[*field] == true);
    let used: Vec<String> = used.map(|field| format!("{field}=true")).collect();
    if used.is_empty() { None } else { violation("host namespaces", used.join(", ")) }
}

fn volumes(names: &[String]) -> String {
    format!("{} {}", if names.len() == 1 { "volume" } else { "volumes" }, quoted(names))
}

fn host_path_volumes(pod: &Pod<'_>) -> Option<Violation> {
    let bad = list(pod.spec, "/volumes").iter().filter(|volume| volume.get("hostPath").is_some_and(|v| !v.is_null()));
    let bad: Vec<String> = bad.map(|volume| text(volume, "/name").to_owned()).collect();
    if bad.is_empty() { None } else { violation("hostPath volumes", volumes(&bad)) }
}

fn host_ports(pod: &Pod<'_>) -> Option<Violation> {
    let ports = |c: &Value| -> Vec<u64> {
        list(c, "/ports").iter().filter_map(|port| port["hostPort"].as_u64()).filter(|port| *port != 0).collect()
    };
    let bad = pod.failing(|c| !ports(c).is_empty());
    let mut used: Vec<String> = pod.containers.iter().flat_map(|c| ports(c)).map(|port| port.to_string()).collect();
    used = distinct(used);
    if bad.is_empty() {
        return None;
    }
    let verb = if bad.len() == 1 { "uses" } else { "use" };
    let noun = if used.len() == 1 { "hostPort" } else { "hostPorts" };
    violation("hostPort", format!("{} {verb} {noun} {}", containers(&bad), used.join(", ")))
}

fn host_probes(pod: &Pod<'_>) -> Option<Violation> {
    const HANDLERS: [&str; 5] =
        ["/livenessProbe", "/readinessProbe", "/startupProbe", "/lifecycle/postStart", "/lifecycle/preStop"];
    let hosts = |c: &Value| -> Vec<String> {
        let all =
            HANDLERS.iter().flat_map(|handler| ["httpGet", "tcpSocket"].map(|kind| format!("{handler}/{kind}/host")));
        all.map(|pointer| text(c, &pointer).to_owned()).filter(|host| !host.is_empty()).collect()
    };
    let bad = pod.failing(|c| !hosts(c).is_empty());
    if bad.is_empty() {
        return None;
    }
    let used = distinct(pod.containers.iter().flat_map(|c| hosts(c)).collect());
    let verb = if bad.len() == 1 { "uses" } else { "use" };
    let noun = if used.len() == 1 { "host" } else { "hosts" };
    violation(
        "probe or lifecycle host",
        format!("{} {verb} probe or lifecycle {noun} {}", containers(&bad), quoted(&used)),
    )
}

fn privileged(pod: &Pod<'_>) -> Option<Violation> {
    let bad = pod.failing(|c| at(c, "/securityContext/privileged") == Some(&Value::Bool(true)));
    if bad.is_empty() {
        return None;
    }
    violation("privileged", format!("{} must not set securityContext.privileged=true", containers(&bad)))
}

fn proc_mount(pod: &Pod<'_>) -> Option<Violation> {
    if pod.has_own_users() { None } else { proc_mount_restricted(pod) }
}

fn proc_mount_restricted(pod: &Pod<'_>) -> Option<Violation> {
    const POINTER: &str = "/securityContext/procMount";
    let allowed = |kind: &str| matches!(kind, "" | "Default");
    let bad = pod.failing(|c| !allowed(text(c, POINTER)));
    if bad.is_empty() {
        return None;
    }
    let kinds = pod.containers.iter().map(|c| text(c, POINTER)).filter(|kind| !allowed(kind));
    let kinds = quoted(&distinct(kinds.map(ToOwned::to_owned).collect()));
    violation("procMount", format!("{} must not set securityContext.procMount to {kinds}", containers(&bad)))
}

fn restricted_volumes(pod: &Pod<'_>) -> Option<Violation> {
    let kind = |volume: &Value| -> Option<String> {
        let members = volume.as_object()?;
        members.iter().find(|(key, value)| *key != "name" && !value.is_null()).map(|(key, _)| key.clone())
    };
    let bad: Vec<(String, String)> = list(pod.spec, "/volumes")
        .iter()
        .filter_map(|volume| Some((text(volume, "/name").to_owned(), kind(volume)?)))
        .filter(|(_, kind)| !VOLUMES.contains(&kind.as_str()))
        .collect();
    if bad.is_empty() {
        return None;
    }
    let (names, kinds): (Vec<String>, Vec<String>) = bad.into_iter().unzip();
    let kinds = distinct(kinds);
    let verb = if names.len() == 1 { "uses" } else { "use" };
    let noun = if kinds.len() == 1 { "type" } else { "types" };
    violation(
        "restricted volume types",
        format!("{} {verb} restricted volume {noun} {}", volumes(&names), quoted(&kinds)),
    )
}

fn run_as_non_root(pod: &Pod<'_>) -> Option<Violation> {
    const POINTER: &str = "/securityContext/runAsNonRoot";
    if pod.has_own_users() {
        return None;
    }
    let of_pod = at(pod.spec, POINTER).and_then(Value::as_bool);
    let says_no = pod.failing(|c| at(c, POINTER) == Some(&Value::Bool(false)));
    let silent = pod.failing(|c| at(c, POINTER).and_then(Value::as_bool).is_none());
    if !says_no.is_empty() {
        let whose = who(of_pod == Some(false) && !silent.is_empty(), &says_no, "and");
        return violation("runAsNonRoot != true", format!("{whose} must not set securityContext.runAsNonRoot=false"));
    }
    match of_pod {
        Some(true) => None,
        _ if silent.is_empty() => None,
        Some(false) => {
            violation("runAsNonRoot != true", "pod must not set securityContext.runAsNonRoot=false".to_owned())
        }
        None => violation(
            "runAsNonRoot != true",
            format!("pod or {} must set securityContext.runAsNonRoot=true", containers(&silent)),
        ),
    }
}

fn run_as_user(pod: &Pod<'_>) -> Option<Violation> {
    let root = |value: &Value| at(value, "/securityContext/runAsUser").and_then(Value::as_i64) == Some(0);
    if pod.has_own_users() {
        return None;
    }
    let (pod_bad, bad) = (root(pod.spec), pod.failing(root));
    if !pod_bad && bad.is_empty() {
        return None;
    }
    violation("runAsUser=0", format!("{} must not set runAsUser=0", who(pod_bad, &bad, "and")))
}

const SECCOMP: &str = "/securityContext/seccompProfile/type";

fn seccomp_baseline(pod: &Pod<'_>) -> Option<Violation> {
    let allowed = |value: &Value| matches!(text(value, SECCOMP), "" | "RuntimeDefault" | "Localhost");
    let (pod_bad, bad) = (!allowed(pod.spec), pod.failing(|c| !allowed(c)));
    if !pod_bad && bad.is_empty() {
        return None;
    }
    let kinds = pod.containers.iter().copied().chain([pod.spec]).filter(|value| !allowed(value));
    let kinds = quoted(&distinct(kinds.map(|value| text(value, SECCOMP).to_owned()).collect()));
    violation(
        "seccompProfile",
        format!("{} must not set securityContext.seccompProfile.type to {kinds}", who(pod_bad, &bad, "and")),
    )
}

fn seccomp_restricted(pod: &Pod<'_>) -> Option<Violation> {
    if pod.is_windows() {
        return None;
    }
    let good = |value: &Value| matches!(text(value, SECCOMP), "RuntimeDefault" | "Localhost");
    let given = |value: &Value| !text(value, SECCOMP).is_empty();
    let pod_bad = given(pod.spec) && !good(pod.spec);
    let bad = pod.failing(|c| given(c) && !good(c));
    let mut details = Vec::new();
    if pod_bad || !bad.is_empty() {
        let kinds = pod.containers.iter().copied().chain([pod.spec]).filter(|value| given(value) && !good(value));
        let kinds = quoted(&distinct(kinds.map(|value| text(value, SECCOMP).to_owned()).collect()));
        let whose = who(pod_bad, &bad, "and");
        details.push(format!("{whose} must not set securityContext.seccompProfile.type to {kinds}"));
    }
    let silent = if given(pod.spec) { Vec::new() } else { pod.failing(|c| !given(c)) };
    if !silent.is_empty() {
        let whose = containers(&silent);
        details.push(format!(
            "pod or {whose} must set securityContext.seccompProfile.type to \"RuntimeDefault\" or \"Localhost\""
        ));
    }
    if details.is_empty() { None } else { violation("seccompProfile", details.join("; ")) }
}

fn selinux_options(pod: &Pod<'_>) -> Option<Violation> {
    const OPTIONS: &str = "/securityContext/seLinuxOptions";
    let part = |value: &Value, name: &str| text(value, &format!("{OPTIONS}/{name}")).to_owned();
    let allowed = |kind: &str| SELINUX_TYPES.contains(&kind) && (kind != "container_engine_t" || pod.minor >= 31);
    let bad_one = |value: &Value| {
        !allowed(&part(value, "type")) || !part(value, "user").is_empty() || !part(value, "role").is_empty()
    };
    let (pod_bad, bad) = (bad_one(pod.spec), pod.failing(bad_one));
    if !pod_bad && bad.is_empty() {
        return None;
    }
    let all = || pod.containers.iter().copied().chain([pod.spec]);
    let types = distinct(all().map(|v| part(v, "type")).filter(|t| !allowed(t)).collect());
    let mut what = Vec::new();
    if !types.is_empty() {
        what.push(format!("{} {}", if types.len() == 1 { "type" } else { "types" }, quoted(&types)));
    }
    for name in ["user", "role"] {
        if all().any(|value| !part(value, name).is_empty()) {
            what.push(format!("{name} may not be set"));
        }
    }
    violation(
        "seLinuxOptions",
        format!("{} set forbidden securityContext.seLinuxOptions: {}", who(pod_bad, &bad, "and"), what.join("; ")),
    )
}

fn sysctls(pod: &Pod<'_>) -> Option<Violation> {
    let names = list(pod.spec, "/securityContext/sysctls").iter().map(|sysctl| text(sysctl, "/name"));
    let later = |name: &str| LATER_SYSCTLS.iter().any(|(later, since)| *later == name && pod.minor < *since);
    let safe = |name: &str| SAFE_SYSCTLS.contains(&name) && !later(name);
    let bad: Vec<String> = names.filter(|name| !safe(name)).map(ToOwned::to_owned).collect();
    if bad.is_empty() { None } else { violation("forbidden sysctls", bad.join(", ")) }
}

fn windows_host_process(pod: &Pod<'_>) -> Option<Violation> {
    let is = |value: &Value| at(value, "/securityContext/windowsOptions/hostProcess") == Some(&Value::Bool(true));
    let (pod_bad, bad) = (is(pod.spec), pod.failing(is));
    if !pod_bad && bad.is_empty() {
        return None;
    }
    violation(
        "hostProcess",
        format!("{} must not set securityContext.windowsOptions.hostProcess=true", who(pod_bad, &bad, "and")),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_reference_pods_pass_and_fail_as_they_should() {
        let root = ["../..", "../../.."]
            .map(|up| format!("{}/{up}/shared/kubernetes-1.36/pod-security", env!("CARGO_MANIFEST_DIR")));
        let Some(root) = root.iter().find(|root| std::path::Path::new(root).exists()) else {
            eprintln!("no reference data: nothing compared");
            return;
        };
        for (level, name) in [(Level::Baseline, "baseline"), (Level::Restricted, "restricted")] {
            for passes in [true, false] {
                let directory = format!("{root}/{name}/{}", if passes { "pass" } else { "fail" });
                for entry in std::fs::read_dir(directory).unwrap() {
                    let path = entry.unwrap().path();
                    let pod =
                        apimachinery::yaml::documents(&std::fs::read_to_string(&path).unwrap()).unwrap().remove(0);
                    let found = violations(level, u32::MAX, &pod["metadata"], &pod["spec"]);
                    assert_eq!(found.is_empty(), passes, "{} {found:?}", path.display());
                }
            }
        }
    }

    #[test]
    fn violations_are_worded_as_kubernetes_words_them() {
        let spec = json!({"hostNetwork": true, "containers": [{"name": "a", "securityContext": {"privileged": true}}, {"name": "b"}]});
        assert_eq!(
            describe(&violations(Level::Baseline, u32::MAX, &json!({}), &spec)),
            r#"host namespaces (hostNetwork=true), privileged (container "a" must not set securityContext.privileged=true)"#
        );
        assert_eq!(
            describe(&violations(Level::Restricted, u32::MAX, &json!({}), &json!({"containers": [{"name": "a"}]}))),
            concat!(
                r#"allowPrivilegeEscalation != false (container "a" must set securityContext.allowPrivilegeEscalation=false), "#,
                r#"unrestricted capabilities (container "a" must set securityContext.capabilities.drop=["ALL"]), "#,
                r#"runAsNonRoot != true (pod or container "a" must set securityContext.runAsNonRoot=true), "#,
                r#"seccompProfile (pod or container "a" must set securityContext.seccompProfile.type to "RuntimeDefault" or "Localhost")"#
            )
        );
    }
    #[test]
    fn older_standards_ask_less() {
        let spec = json!({"securityContext": {"runAsUser": 0, "runAsNonRoot": true, "seccompProfile": {"type": "RuntimeDefault"},
            "sysctls": [{"name": "net.ipv4.tcp_rmem", "value": "1"}]},
            "containers": [{"name": "a", "securityContext": {"allowPrivilegeEscalation": false}}]});
        for (minor, expected) in [
            (7, "forbidden sysctls"),
            (22, "forbidden sysctls, unrestricted capabilities"),
            (31, "forbidden sysctls, unrestricted capabilities, runAsUser=0"),
            (u32::MAX, "unrestricted capabilities, runAsUser=0"),
        ] {
            assert_eq!(reasons(&violations(Level::Restricted, minor, &json!({}), &spec)), expected, "v1.{minor}");
        }
    }
}
