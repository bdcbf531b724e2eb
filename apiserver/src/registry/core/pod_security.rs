//! What pods and containers may be on their node: ids, profiles, sysctls, and what has no meaning on an operating system.

use super::volume_sources::relative_path;
use crate::registry::field::{Errors, Field};
use apimachinery::names::is_dns1123_subdomain;
use serde_json::Value;

const INT32_MAX: i64 = i32::MAX as i64;
const SYSCTL_MESSAGE: &str = "must have at most 253 characters and match regex ^([a-z0-9]([-_a-z0-9]*[a-z0-9])?[\\./])*[a-z0-9]([-_a-z0-9]*[a-z0-9])?$";
/// PATH_MAX, less one.
const PROFILE_PATH_MAX: usize = 4095;
const NOT_ON_WINDOWS: &str = "cannot be set for a windows pod";

/// Fields that hold containers, in the order in which they are visited.
pub const CONTAINER_FIELDS: [&str; 3] = ["initContainers", "containers", "ephemeralContainers"];

/// As `validatePodSpecSecurityContext`.
pub fn pod(spec: &Field<'_, '_>, errors: &mut Errors) {
    let context = spec.at("securityContext");
    if context.is_empty() && !spec.at("shareProcessNamespace").bool() {
        return;
    }
    for id in ["fsGroup", "runAsUser", "runAsGroup"] {
        errors.in_range(&context.at(id), 0, INT32_MAX);
    }
    for group in context.at("supplementalGroups").items() {
        errors.in_range(&group, 0, INT32_MAX);
    }
    let share = spec.at("shareProcessNamespace");
    if spec.at("hostPID").bool() && share.bool() {
        errors.invalid_as(
            &context.at("shareProcessNamespace"),
            true,
            "ShareProcessNamespace and HostPID cannot both be enabled",
        );
    }
    sysctls(spec, &context.at("sysctls"), errors);
    errors.one_of(&context.at("fsGroupChangePolicy"), &["Always", "OnRootMismatch"]);
    seccomp(&context.at("seccompProfile"), errors);
    windows_options(&context.at("windowsOptions"), errors);
    apparmor(&context.at("appArmorProfile"), errors);
    errors.one_of(&context.at("supplementalGroupsPolicy"), &["Merge", "Strict"]);
    errors.one_of(&context.at("seLinuxChangePolicy"), &["MountOption", "Recursive"]);
}

fn sysctls(spec: &Field<'_, '_>, sysctls: &Field<'_, '_>, errors: &mut Errors) {
    let mut names: Vec<&str> = Vec::new();
    for sysctl in sysctls.items() {
        let name = sysctl.at("name");
        if name.is_blank() {
            errors.required(&name, "");
        } else if !is_sysctl(name.str()) {
            errors.invalid(&name, SYSCTL_MESSAGE);
        } else if names.contains(&name.str()) {
            errors.duplicate(&name);
        }
        match sysctl_namespace(name.str()) {
            "net" if spec.at("hostNetwork").bool() => {
                errors.invalid(&name, "may not be specified when 'hostNetwork' is true");
            }
            "ipc" if spec.at("hostIPC").bool() => {
                errors.invalid(&name, "may not be specified when 'hostIPC' is true");
            }
            _ => {}
        }
        names.push(name.str());
    }
}

/// As `IsValidSysctlName`.
fn is_sysctl(name: &str) -> bool {
    let part = |p: &str| {
        let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
        let bytes = p.as_bytes();
        matches!((bytes.first(), bytes.last()), (Some(a), Some(z)) if ok(*a) && ok(*z))
            && bytes.iter().all(|b| ok(*b) || *b == b'-' || *b == b'_')
    };
    name.len() <= 253 && name.split(['.', '/']).all(part)
}

fn sysctl_namespace(name: &str) -> &'static str {
    let name = name.replace('/', ".");
    if name == "kernel.sem" || ["kernel.shm", "kernel.msg", "fs.mqueue."].iter().any(|p| name.starts_with(p)) {
        "ipc"
    } else if name.starts_with("net.") {
        "net"
    } else {
        ""
    }
}

/// As `ValidateSecurityContext`.
pub fn container(context: &Field<'_, '_>, host_users: bool, errors: &mut Errors) {
    if !context.is_set() {
        return;
    }
    for id in ["runAsUser", "runAsGroup"] {
        errors.in_range(&context.at(id), 0, INT32_MAX);
    }
    let mount = context.at("procMount");
    errors.one_of(&mount, &["Default", "Unmasked"]);
    if host_users && mount.str() == "Unmasked" {
        errors.invalid(&mount, "`hostUsers` must be false to use `Unmasked`");
    }
    seccomp(&context.at("seccompProfile"), errors);
    if context.at("allowPrivilegeEscalation").value == &Value::Bool(false) {
        if context.at("privileged").bool() {
            errors.invalid(context, "cannot set `allowPrivilegeEscalation` to false and `privileged` to true");
        }
        let capabilities = context.at("capabilities");
        for _ in capabilities.at("add").items().filter(|c| c.str() == "CAP_SYS_ADMIN") {
            errors.invalid(
                context,
                "cannot set `allowPrivilegeEscalation` to false and `capabilities.Add` CAP_SYS_ADMIN",
            );
        }
    }
    windows_options(&context.at("windowsOptions"), errors);
    apparmor(&context.at("appArmorProfile"), errors);
}

/// As `validateSeccompProfileField`.
fn seccomp(profile: &Field<'_, '_>, errors: &mut Errors) {
    if !profile.is_set() {
        return;
    }
    let (kind, local) = (profile.at("type"), profile.at("localhostProfile"));
    if kind.is_blank() {
        errors.required(&kind, "type is required when seccompProfile is set");
    } else {
        errors.one_of(&kind, &["Localhost", "RuntimeDefault", "Unconfined"]);
    }
    match (kind.str() == "Localhost", local.is_set()) {
        (true, false) => errors.required(&local, "must be set when seccomp type is Localhost"),
        (true, true) => relative_path(&local, errors),
        (false, true) => {
            errors.invalid_as(&local, profile.value.clone(), "can only be set when seccomp type is Localhost");
        }
        (false, false) => {}
    }
}

/// As `ValidateAppArmorProfileField`.
fn apparmor(profile: &Field<'_, '_>, errors: &mut Errors) {
    if !profile.is_set() {
        return;
    }
    let (kind, local) = (profile.at("type"), profile.at("localhostProfile"));
    match kind.str() {
        "Localhost" if local.str().trim().is_empty() && local.str().is_empty() => {
            errors.required(&local, "must be set when AppArmor type is Localhost");
        }
        "Localhost" => {
            if local.str().trim() != local.str() {
                errors.invalid(&local, "must not be padded with whitespace");
            }
            if local.str().len() > PROFILE_PATH_MAX {
                errors.too_long(&local, PROFILE_PATH_MAX);
            }
        }
        "RuntimeDefault" | "Unconfined" if local.is_set() => {
            errors.invalid(&local, "can only be set when AppArmor type is Localhost");
        }
        "RuntimeDefault" | "Unconfined" => {}
        "" => errors.required(&kind, "type is required when appArmorProfile is set"),
        _ => errors.not_supported(&kind, &["Localhost", "RuntimeDefault", "Unconfined"]),
    }
}

// === operating systems ===

/// What the operating system that a pod names does not know. As `validateOS`, `validateLinux` and `validateWindows`.
pub fn operating_system(spec: &Field<'_, '_>, errors: &mut Errors) {
    let os = spec.at("os");
    if !os.is_set() {
        return;
    }
    match os.at("name").str() {
        "" => errors.required(&os.at("name"), "cannot be empty"),
        "linux" => contexts(spec, |context| {
            let options = context.at("windowsOptions");
            if options.is_set() {
                errors.forbidden(&options, "windows options cannot be set for a linux pod");
            }
        }),
        "windows" => {
            let context = spec.at("securityContext");
            let on_pod = [
                "appArmorProfile",
                "seLinuxOptions",
                "seccompProfile",
                "fsGroup",
                "fsGroupChangePolicy",
                "sysctls",
                "runAsUser",
                "runAsGroup",
                "supplementalGroups",
                "supplementalGroupsPolicy",
                "seLinuxChangePolicy",
            ];
            forbid(&context, &on_pod, errors);
            let truthy = ["hostPID", "hostIPC"].into_iter().filter(|flag| spec.at(flag).bool());
            let set = ["hostUsers", "shareProcessNamespace"].into_iter().filter(|field| spec.at(field).is_set());
            for field in truthy.chain(set) {
                errors.forbidden(&spec.at(field), NOT_ON_WINDOWS);
            }
            let on_container = [
                "appArmorProfile",
                "seLinuxOptions",
                "seccompProfile",
                "capabilities",
                "readOnlyRootFilesystem",
                "privileged",
                "allowPrivilegeEscalation",
                "procMount",
                "runAsUser",
                "runAsGroup",
            ];
            each_container(spec, |container| forbid(&container.at("securityContext"), &on_container, errors));
        }
        name => errors.0.push(apimachinery::status::FieldError::not_supported(os.path(), name, &["linux", "windows"])),
    }
}

fn forbid(context: &Field<'_, '_>, fields: &[&str], errors: &mut Errors) {
    for field in fields.iter().map(|name| context.at(name)).filter(Field::is_set) {
        errors.forbidden(&field, NOT_ON_WINDOWS);
    }
}

/// Every container of a spec.
pub fn each_container(spec: &Field<'_, '_>, mut visit: impl FnMut(&Field<'_, '_>)) {
    for field in CONTAINER_FIELDS {
        spec.at(field).items().for_each(|container| visit(&container));
    }
}

/// The pod's security context and every container's.
fn contexts(spec: &Field<'_, '_>, mut visit: impl FnMut(&Field<'_, '_>)) {
    visit(&spec.at("securityContext"));
    each_container(spec, |container| visit(&container.at("securityContext")));
}

/// As `validateHostUsers`: a pod with a user namespace of its own shares no other namespace with its host.
pub fn host_users(spec: &Field<'_, '_>, errors: &mut Errors) {
    if spec.at("hostUsers").value != &Value::Bool(false) {
        return;
    }
    for (field, shown) in [("hostNetwork", "hostNetwork"), ("hostPID", "HostPID"), ("hostIPC", "HostIPC")] {
        if spec.at(field).bool() {
            errors.forbidden(&spec.at(shown), "when `pod.Spec.HostUsers` is false");
        }
    }
    each_container(spec, |container| {
        let devices = container.at("volumeDevices");
        if !devices.is_empty() {
            errors.forbidden(&devices, "when `pod.Spec.HostUsers` is false");
        }
    });
}

/// As `validateWindowsHostProcessPod`.
pub fn host_process(spec: &Field<'_, '_>, errors: &mut Errors) {
    let of = |context: Option<&Value>| context.and_then(|c| c.pointer("/windowsOptions/hostProcess")?.as_bool());
    let pod = of(spec.value.get("securityContext"));
    let (mut all, mut host) = (0, 0);
    each_container(spec, |container| {
        all += 1;
        let own = of(container.value.get("securityContext"));
        if let (Some(pod), Some(own)) = (pod, own)
            && pod != own
        {
            let context = container.at("securityContext");
            let options = context.at("windowsOptions");
            errors.invalid(
                &options.at("hostProcess"),
                format!("pod hostProcess value must be identical if both are specified, was {pod}"),
            );
        }
        host += usize::from(own.or(pod) == Some(true));
    });
    if host == 0 {
        return;
    }
    if host != all {
        let why = "If pod contains any hostProcess containers then all containers must be HostProcess containers";
        errors.invalid_as(spec, "", why);
    }
    if !spec.at("hostNetwork").bool() {
        let why = "hostNetwork must be true if pod contains any hostProcess containers";
        errors.invalid_as(&spec.at("hostNetwork"), false, why);
    }
}

/// As `validateWindowsSecurityContextOptions`.
fn windows_options(options: &Field<'_, '_>, errors: &mut Errors) {
    if !options.is_set() {
        return;
    }
    let name = options.at("gmsaCredentialSpecName");
    if name.is_set() {
        errors.all(&name, is_dns1123_subdomain(name.str()));
    }
    let credential = options.at("gmsaCredentialSpec");
    if credential.is_set() {
        match credential.str().len() {
            0 => errors.invalid(&credential, "gmsaCredentialSpec cannot be an empty string"),
            length if length > 64 * 1024 => {
                errors.invalid(&credential, "gmsaCredentialSpec size must be under 64 KiB");
            }
            _ => {}
        }
    }
    let user = options.at("runAsUserName");
    if user.is_set() {
        for message in windows_user(user.str()) {
            errors.invalid(&user, message);
        }
    }
}

fn windows_user(name: &str) -> Vec<&'static str> {
    if name.is_empty() {
        return vec!["runAsUserName cannot be an empty string"];
    }
    if name.chars().any(|c| c.is_ascii_control()) {
        return vec!["runAsUserName cannot contain control characters"];
    }
    let parts: Vec<&str> = name.split('\\').collect();
    let (domain, user) = match parts.as_slice() {
        [user] => (None, *user),
        [domain, user] => (Some(*domain), *user),
        _ => return vec!["runAsUserName cannot contain more than one backslash"],
    };
    let mut messages = Vec::new();
    if domain.is_some_and(|domain| domain.len() >= 256) {
        messages.push("runAsUserName's Domain length must be under 256 characters");
    }
    if domain.is_some_and(|domain| !is_net_bios(domain) && !is_windows_dns(domain)) {
        messages.push("runAsUserName's Domain doesn't match the NetBios nor the DNS format");
    }
    if user.is_empty() {
        messages.push("runAsUserName's User cannot be empty");
    } else if user.len() > 104 {
        messages.push("runAsUserName's User length must not be longer than 104 characters");
    }
    if !user.is_empty() && user.chars().all(|c| matches!(c, '.' | ' ')) {
        messages.push("runAsUserName's User cannot contain only periods or spaces");
    }
    if user.contains(['"', '/', '\\', ':', ';', '|', '=', ',', '+', '*', '?', '<', '>', '@', '[', ']']) {
        messages.push("runAsUserName's User cannot contain the following characters: \"/\\:;|=,+*?<>@[]");
    }
    messages
}

fn is_net_bios(domain: &str) -> bool {
    (1..=15).contains(&domain.chars().count())
        && !domain.starts_with('.')
        && !domain.contains(['\\', '/', ':', '*', '?', '"', '<', '>', '|'])
}

fn is_windows_dns(domain: &str) -> bool {
    domain.split('.').all(|label| {
        let alphanumeric = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
        label.len() <= 63
            && alphanumeric(label.chars().next())
            && alphanumeric(label.chars().last())
            && label.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
    })
}
