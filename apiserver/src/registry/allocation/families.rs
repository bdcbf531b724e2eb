//! Which IP families a Service has: from what its author says, what it had, and what the cluster has. Pure. As
//! `initIPFamilyFields`.

use crate::registry::core::service::{HEADLESS, has_cluster_ip};
use crate::registry::object::{child, list, map, set, text};
use apimachinery::status::FieldError;
use serde_json::Value;
use std::net::IpAddr;

const POLICY: &str = "spec.ipFamilyPolicy";

/// Writes policy and families into a Service, or says why not. `configured` are the cluster's families, the primary first.
pub(super) fn settle(new: &mut Value, old: Option<&Value>, configured: &[&str]) -> Result<(), Vec<FieldError>> {
    if text(new, "/spec/type") == "ExternalName" || old.is_some_and(|old| prefers_what_it_has(new, old)) {
        return Ok(());
    }
    let selectorless = map(new, "/spec/selector").is_none_or(serde_json::Map::is_empty);
    let headless = text(new, "/spec/clusterIP") == HEADLESS;
    let policy = match (text(new, "/spec/ipFamilyPolicy"), old.map_or("", |old| text(old, "/spec/ipFamilyPolicy"))) {
        ("", "") if headless && selectorless => "RequireDualStack".to_owned(),
        ("", "") => "SingleStack".to_owned(),
        ("", before) => before.to_owned(),
        (given, _) => given.to_owned(),
    };
    let spec = child(new, "spec");
    set(spec, "ipFamilyPolicy", policy.as_str());
    let mut ips = strings(spec, "/clusterIPs");
    let mut families = strings(spec, "/ipFamilies");
    let single = policy == "SingleStack";
    let mut errors = Vec::new();
    let mut refuse = |why: &str| errors.push(FieldError::invalid(POLICY, policy.as_str(), why));
    if let Some(old) = old {
        let (had, old_families) = (strings(old, "/spec/clusterIPs"), strings(old, "/spec/ipFamilies"));
        if single {
            // What is kept is the first; who asks for one, and changed nothing else, means that.
            if had == ips {
                ips.truncate(1);
            }
            if old_families == families {
                families.truncate(1);
            }
        } else {
            if reduced(&had, &ips) {
                refuse("must be 'SingleStack' to release the secondary cluster IP");
            }
            if reduced(&old_families, &families) {
                refuse("must be 'SingleStack' to release the secondary IP family");
            }
        }
    }
    if single && ips.len() == 2 {
        refuse("must be 'RequireDualStack' or 'PreferDualStack' when multiple cluster IPs are specified");
    }
    if single && families.len() == 2 {
        refuse("must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified");
    }
    for (at, ip) in ips.iter().enumerate().skip(families.len()).take_while(|(_, ip)| *ip != HEADLESS) {
        let Ok(ip) = ip.parse::<IpAddr>() else { continue };
        let family = super::family_of(ip);
        if configured.contains(&family) {
            families.push(family.to_owned());
        } else {
            let why = format!("{family} is not configured on this cluster");
            errors.push(FieldError::invalid(format!("spec.clusterIPs[{at}]"), ips.clone(), why));
        }
    }
    if !errors.is_empty() {
        return Err(errors);
    }
    // Nobody gives a headless Service without a selector its addresses but its author: it may say what it likes.
    let free = headless && selectorless;
    if !free {
        if policy == "RequireDualStack" && configured.len() < 2 {
            let why = "this cluster is not configured for dual-stack services";
            errors.push(FieldError::invalid(POLICY, policy.as_str(), why));
        }
        for (at, family) in families.iter().enumerate().filter(|(_, family)| !configured.contains(&family.as_str())) {
            let path = format!("spec.ipFamilies[{at}]");
            errors.push(FieldError::invalid(path, family.as_str(), "not configured on this cluster"));
        }
        if !errors.is_empty() {
            return Err(errors);
        }
    }
    if families.is_empty() {
        families.extend(configured.first().map(ToString::to_string));
    }
    if !single && families.len() == 1 && (free || configured.len() == 2) {
        families.push(if families[0] == "IPv4" { "IPv6" } else { "IPv4" }.to_owned());
    }
    set(spec, "ipFamilies", families);
    if !ips.is_empty() {
        set(spec, "clusterIPs", ips);
    }
    Ok(())
}

/// A Service that prefers two stacks is not changed in passing because the cluster was. As
/// `isMatchingPreferDualStackClusterIPFields`.
fn prefers_what_it_has(new: &Value, old: &Value) -> bool {
    let prefers = |service: &Value| text(service, "/spec/ipFamilyPolicy") == "PreferDualStack";
    let same = |pointer: &str| new.pointer(pointer) == old.pointer(pointer);
    prefers(new)
        && prefers(old)
        && same("/spec/type")
        && has_cluster_ip(text(new, "/spec/type"))
        && same("/spec/clusterIPs")
        && same("/spec/ipFamilies")
}

fn reduced(old: &[String], new: &[String]) -> bool {
    !new.is_empty() && new.len() < old.len()
}

fn strings(object: &Value, pointer: &str) -> Vec<String> {
    list(object, pointer).iter().filter_map(|value| value.as_str().map(ToOwned::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const SINGLE: &[&str] = &["IPv4"];
    const DUAL: &[&str] = &["IPv4", "IPv6"];

    fn settled(spec: &Value, old: Option<&Value>, configured: &[&str]) -> Result<Value, String> {
        let mut new = json!({ "spec": spec });
        let old = old.map(|spec| json!({ "spec": spec }));
        match settle(&mut new, old.as_ref(), configured) {
            Ok(()) => Ok(json!([new["spec"]["ipFamilyPolicy"], new["spec"]["ipFamilies"], new["spec"]["clusterIPs"]])),
            Err(errors) => Err(errors[0].to_string()),
        }
    }

    #[test]
    fn a_new_service_has_the_families_of_its_policy_and_cluster() {
        let none = json!(["None"]);
        let cases = [
            (json!({"selector": {"a": "b"}}), SINGLE, Ok(json!(["SingleStack", ["IPv4"], null]))),
            (json!({"ipFamilyPolicy": "PreferDualStack"}), SINGLE, Ok(json!(["PreferDualStack", ["IPv4"], null]))),
            (
                json!({"ipFamilyPolicy": "PreferDualStack"}),
                DUAL,
                Ok(json!(["PreferDualStack", ["IPv4", "IPv6"], null])),
            ),
            (
                json!({"ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv6"]}),
                DUAL,
                Ok(json!(["RequireDualStack", ["IPv6", "IPv4"], null])),
            ),
            (
                json!({"ipFamilyPolicy": "RequireDualStack"}),
                SINGLE,
                Err(
                    "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services",
                ),
            ),
            (
                json!({"ipFamilies": ["IPv6"]}),
                SINGLE,
                Err("spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster"),
            ),
            (
                json!({"clusterIP": "None", "clusterIPs": none}),
                SINGLE,
                Ok(json!(["RequireDualStack", ["IPv4", "IPv6"], ["None"]])),
            ),
            (
                json!({"clusterIP": "None", "clusterIPs": none, "selector": {"a": "b"}}),
                SINGLE,
                Ok(json!(["SingleStack", ["IPv4"], ["None"]])),
            ),
            (
                json!({"clusterIP": "fd00::5", "clusterIPs": ["fd00::5"]}),
                DUAL,
                Ok(json!(["SingleStack", ["IPv6"], ["fd00::5"]])),
            ),
            (
                json!({"clusterIP": "fd00::5", "clusterIPs": ["fd00::5"]}),
                SINGLE,
                Err("spec.clusterIPs[0]: Invalid value: [\"fd00::5\"]: IPv6 is not configured on this cluster"),
            ),
            (
                json!({"ipFamilies": ["IPv4", "IPv6"]}),
                DUAL,
                Err(
                    "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified",
                ),
            ),
        ];
        for (spec, configured, expected) in cases {
            assert_eq!(settled(&spec, None, configured), expected.map_err(ToOwned::to_owned), "{spec}");
        }
    }

    #[test]
    fn an_update_adds_a_family_or_gives_one_back() {
        let one = json!({"type": "ClusterIP", "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"], "clusterIP": "10.0.0.5", "clusterIPs": ["10.0.0.5"]});
        let two = json!({"type": "ClusterIP", "ipFamilyPolicy": "RequireDualStack", "ipFamilies": ["IPv4", "IPv6"], "clusterIP": "10.0.0.5", "clusterIPs": ["10.0.0.5", "fd00::5"]});
        let with = |spec: &Value, field: &str, value: Value| {
            let mut spec = spec.clone();
            spec[field] = value;
            spec
        };
        let cases = [
            (
                with(&one, "ipFamilyPolicy", json!("PreferDualStack")),
                &one,
                Ok(json!(["PreferDualStack", ["IPv4", "IPv6"], ["10.0.0.5"]])),
            ),
            (
                with(&two, "ipFamilyPolicy", json!("SingleStack")),
                &two,
                Ok(json!(["SingleStack", ["IPv4"], ["10.0.0.5"]])),
            ),
            (
                with(&two, "clusterIPs", json!(["10.0.0.5"])),
                &two,
                Err(
                    "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": must be 'SingleStack' to release the secondary cluster IP",
                ),
            ),
            (json!({"type": "ClusterIP"}), &two, Ok(json!(["RequireDualStack", ["IPv4", "IPv6"], null]))),
        ];
        for (new, old, expected) in cases {
            assert_eq!(settled(&new, Some(old), DUAL), expected.map_err(ToOwned::to_owned), "{new}");
        }
        let prefers = with(&one, "ipFamilyPolicy", json!("PreferDualStack"));
        assert_eq!(settled(&prefers, Some(&prefers), DUAL).unwrap()[1], json!(["IPv4"]), "not upgraded in passing");
    }
}
