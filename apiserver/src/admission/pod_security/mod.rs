//! PodSecurity: a namespace says by labels how strict it is; pods beyond that are refused (`enforce`) or warned about (`warn`),
//! as are the templates of workloads. Who makes a namespace stricter hears which of its pods would not come in any more.
mod checks;
mod policy;

use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::status::StatusError;
use futures::future::BoxFuture;
pub use policy::Configuration;
use policy::{Exemptions, Policy, Rule};
use serde_json::Value;

use super::{AdmissionRequest, Plugin, list, text};
use crate::authorization::lister::{Lister, NAMESPACES, PODS};
use crate::registry::workload::template_pointer;

/// Pods of a namespace that are judged when it becomes stricter.
const PODS_MAX: usize = 3000;
const APP_ARMOR: &str = "container.apparmor.security.beta.kubernetes.io/";

pub struct PodSecurity {
    lister: Arc<dyn Lister>,
    defaults: Policy,
    exemptions: Exemptions,
}

// === impl PodSecurity ===

impl PodSecurity {
    pub fn new(lister: Arc<dyn Lister>, configuration: Configuration) -> anyhow::Result<Self> {
        Ok(Self { lister, defaults: configuration.defaults()?, exemptions: configuration.exemptions })
    }

    /// A pod or the template of one.
    fn check_pod(&self, request: &mut AdmissionRequest<'_>) -> Result<(), StatusError> {
        let a = request.attributes;
        let is_pod = a.group.is_empty() && a.resource == "pods";
        if self.exemptions.namespaces.contains(&a.namespace) || self.exemptions.usernames.contains(&a.user.name) {
            return Ok(());
        }
        let Some(namespace) = self.lister.get(NAMESPACES, "", request.namespace()) else { return Ok(()) };
        let (policy, _) = Policy::of(|key| namespace.identity.label(key), self.defaults);
        if (policy.enforce.level.is_none() || !is_pod) && policy.warn.level.is_none() {
            return Ok(());
        }
        if is_pod && request.updates() && !is_significant(request.new_object(), request.old()) {
            return Ok(());
        }
        let Some((metadata, spec)) = template(request) else { return Ok(()) };
        if self.exemptions.runtime_classes.iter().any(|class| class == text(spec, "/runtimeClassName")) {
            return Ok(());
        }
        let found = |rule: Rule| {
            let violations = judge(rule, metadata, spec);
            (!violations.is_empty()).then(|| format!("PodSecurity \"{rule}\": {}", checks::describe(&violations)))
        };
        if is_pod && let Some(what) = found(policy.enforce) {
            return Err(request.forbidden(format!("violates {what}")));
        }
        if let Some(what) = found(policy.warn) {
            request.warnings.push(format!("would violate {what}"));
        }
        Ok(())
    }

    /// As `ValidateNamespace`.
    fn check_namespace(&self, request: &mut AdmissionRequest<'_>) -> Result<(), StatusError> {
        let policy_of = |object: &Value| {
            let labels = object.pointer("/metadata/labels").cloned().unwrap_or_default();
            Policy::of(|key| labels.get(key).and_then(Value::as_str), self.defaults)
        };
        let (new, errors) = policy_of(request.new_object());
        let (old, old_errors) = if request.creates() { (new, Vec::new()) } else { policy_of(request.old()) };
        if !errors.is_empty() && errors != old_errors {
            return Err(StatusError::invalid("", "Namespace", request.name(), &errors));
        }
        let relaxed = new.enforce.minor == old.enforce.minor && new.enforce.level <= old.enforce.level;
        let name = request.name().to_owned();
        if relaxed || new.enforce.level.is_none() || self.exemptions.namespaces.contains(&name) {
            return Ok(());
        }
        let warnings = self.existing(&name, new.enforce);
        request.warnings.extend(warnings);
        Ok(())
    }

    /// Which pods of a namespace a rule would refuse. As `EvaluatePodsInNamespace`.
    fn existing(&self, namespace: &str, rule: Rule) -> Vec<String> {
        let pods = self.lister.list(PODS, Some(namespace));
        // What is wrong with how many pods, and the first of them.
        let mut wrong: BTreeMap<String, (String, usize)> = BTreeMap::new();
        for pod in pods.iter().take(PODS_MAX).map(|pod| pod.value()) {
            let (metadata, spec) = (&pod["metadata"], &pod["spec"]);
            if self.exemptions.runtime_classes.iter().any(|class| class == text(spec, "/runtimeClassName")) {
                continue;
            }
            let violations = judge(rule, metadata, spec);
            if !violations.is_empty() {
                let first = text(metadata, "/name").to_owned();
                wrong.entry(checks::reasons(&violations)).or_insert((first, 0)).1 += 1;
            }
        }
        let mut warnings = Vec::new();
        if pods.len() > PODS_MAX {
            let all = pods.len();
            warnings.push(format!(
                "new PodSecurity enforce level only checked against the first {PODS_MAX} of {all} existing pods"
            ));
        }
        if !wrong.is_empty() {
            warnings.push(format!(
                "existing pods in namespace {namespace:?} violate the new PodSecurity enforce level \"{rule}\""
            ));
        }
        let mut each: Vec<String> = wrong
            .into_iter()
            .map(|(why, (first, count))| match count {
                1 => format!("{first}: {why}"),
                2 => format!("{first} (and 1 other pod): {why}"),
                _ => format!("{first} (and {} other pods): {why}", count - 1),
            })
            .collect();
        each.sort();
        warnings.extend(each);
        warnings
    }
}

impl Plugin for PodSecurity {
    fn handles(&self, request: &AdmissionRequest<'_>) -> bool {
        let a = request.attributes;
        request.writes()
            && match a.subresource.as_str() {
                "" => template_pointer(&a.group, &a.resource).is_some() || request.is("", "namespaces", ""),
                "ephemeralcontainers" | "resize" => a.resource == "pods",
                _ => false,
            }
    }

    fn validate<'a>(&'a self, request: &'a mut AdmissionRequest<'_>) -> BoxFuture<'a, Result<(), StatusError>> {
        let outcome =
            if request.is("", "namespaces", "") { self.check_namespace(request) } else { self.check_pod(request) };
        Box::pin(std::future::ready(outcome))
    }
}

fn judge(rule: Rule, metadata: &Value, spec: &Value) -> Vec<checks::Violation> {
    let minor = rule.minor.unwrap_or(u32::MAX);
    rule.level.map(|level| checks::violations(level, minor, metadata, spec)).unwrap_or_default()
}

fn template<'r>(request: &'r AdmissionRequest<'_>) -> Option<(&'r Value, &'r Value)> {
    let pointer = template_pointer(&request.attributes.group, &request.attributes.resource)?;
    let template = request.new_object().pointer(pointer)?;
    Some((&template["metadata"], &template["spec"]))
}

/// Of what can change on a pod, only images, AppArmor profiles and new containers can make it less safe. As
/// `isSignificantPodUpdate`.
fn is_significant(new: &Value, old: &Value) -> bool {
    let profile = |pod: &Value, container: &Value| {
        let annotations = pod.pointer("/metadata/annotations")?;
        annotations.get(format!("{APP_ARMOR}{}", text(container, "/name"))).cloned()
    };
    let differs =
        |now: &Value, was: &Value| text(now, "/image") != text(was, "/image") || profile(new, now) != profile(old, was);
    let fixed = ["/spec/containers", "/spec/initContainers"].iter().any(|containers| {
        let (now, was) = (list(new, containers), list(old, containers));
        now.len() != was.len() || now.iter().zip(was).any(|(now, was)| differs(now, was))
    });
    let before = list(old, "/spec/ephemeralContainers");
    fixed
        || list(new, "/spec/ephemeralContainers").iter().any(|now| {
            let was = before.iter().find(|was| text(was, "/name") == text(now, "/name"));
            was.is_none_or(|was| differs(now, was))
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admission::Operation;
    use crate::admission::testing::{attributes, request};
    use crate::authorization::lister::fake::Objects;
    use serde_json::json;

    fn plugin() -> PodSecurity {
        let namespace = |name: &str, labels: Value| (NAMESPACES, json!({"metadata": {"name": name, "labels": labels}}));
        let pod =
            |name: &str| (PODS, json!({"metadata": {"name": name, "namespace": "free"}, "spec": {"hostPID": true}}));
        let objects = Objects::of([
            namespace("strict", json!({"pod-security.kubernetes.io/enforce": "baseline"})),
            namespace(
                "warned",
                json!({"pod-security.kubernetes.io/warn": "baseline", "pod-security.kubernetes.io/warn-version": "v1.30"}),
            ),
            namespace("free", json!({})),
            pod("b"),
            pod("a"),
            pod("c"),
        ]);
        let exempt = r#"{"exemptions": {"runtimeClasses": ["vm"], "usernames": ["root"]}}"#;
        PodSecurity::new(objects, serde_json::from_str(exempt).unwrap()).unwrap()
    }

    fn write(
        what: &str,
        namespace: &str,
        user: &str,
        mut object: Value,
        old: Option<&Value>,
    ) -> (Result<(), String>, Vec<String>) {
        let attributes = attributes(what, namespace, user, &[]);
        let operation = if old.is_some() { Operation::Update } else { Operation::Create };
        let mut request = request(&attributes, operation, Some(&mut object), old);
        let plugin = plugin();
        assert!(plugin.handles(&request));
        let outcome = futures::executor::block_on(plugin.validate(&mut request));
        (outcome.map_err(|error| error.message().to_owned()), std::mem::take(&mut request.warnings))
    }

    #[test]
    fn a_namespace_says_what_is_refused_and_what_is_warned_about() {
        let pod = || json!({"metadata": {"name": "p"}, "spec": {"hostPID": true, "containers": []}});
        let deployment = || json!({"metadata": {"name": "d"}, "spec": {"template": pod()}});
        let refusal =
            r#"pods "p" is forbidden: violates PodSecurity "baseline:latest": host namespaces (hostPID=true)"#;
        let warning =
            |rule: &str| vec![format!(r#"would violate PodSecurity "{rule}": host namespaces (hostPID=true)"#)];
        let mut virtual_machine = pod();
        virtual_machine["spec"]["runtimeClassName"] = json!("vm");
        for (what, namespace, user, object, refused, warnings) in [
            ("/pods", "strict", "ann", pod(), Err(refusal.to_owned()), vec![]),
            ("/pods", "strict", "root", pod(), Ok(()), vec![]),
            ("/pods", "strict", "ann", virtual_machine, Ok(()), vec![]),
            ("/pods", "warned", "ann", pod(), Ok(()), warning("baseline:v1.30")),
            ("/pods", "free", "ann", pod(), Ok(()), vec![]),
            ("apps/deployments", "strict", "ann", deployment(), Ok(()), warning("baseline:latest")),
            ("apps/deployments", "warned", "ann", deployment(), Ok(()), warning("baseline:v1.30")),
        ] {
            assert_eq!(write(what, namespace, user, object, None), (refused, warnings), "{what} {namespace} {user}");
        }
    }

    #[test]
    fn an_update_is_judged_where_it_can_do_harm() {
        let pod = |image: &str, labels: Value| json!({"metadata": {"name": "p", "labels": labels}, "spec": {"hostPID": true, "containers": [{"name": "c", "image": image}]}});
        let old = pod("a", json!({}));
        assert!(write("/pods", "strict", "ann", pod("a", json!({"x": "y"})), Some(&old)).0.is_ok());
        assert!(write("/pods", "strict", "ann", pod("b", json!({})), Some(&old)).0.is_err());
    }

    #[test]
    fn who_makes_a_namespace_stricter_hears_of_its_pods() {
        let namespace = |level: &str| json!({"metadata": {"name": "free", "labels": {"pod-security.kubernetes.io/enforce": level}}});
        let old = json!({"metadata": {"name": "free"}});
        let warnings = vec![
            r#"existing pods in namespace "free" violate the new PodSecurity enforce level "baseline:latest""#
                .to_owned(),
            "a (and 2 other pods): host namespaces".to_owned(),
        ];
        assert_eq!(write("/namespaces", "free", "ann", namespace("baseline"), Some(&old)), (Ok(()), warnings));
        assert_eq!(write("/namespaces", "free", "ann", namespace("privileged"), Some(&old)), (Ok(()), vec![]));
        assert_eq!(
            write("/namespaces", "free", "ann", namespace("none"), None).0.unwrap_err(),
            r#"Namespace "free" is invalid: metadata.labels[pod-security.kubernetes.io/enforce]: Invalid value: "none": must be one of privileged, baseline, restricted"#
        );
    }
}
