//! Says of each ValidatingAdmissionPolicy what in its expressions does not fit the objects that it is for. What does not
//! compile whatever they are the server has refused.
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, gone_is_fine, run};
use apimachinery::cel::{Env, Type};
use apimachinery::facts;
use component_base::informer::Informer;
use k8s_openapi::api::admissionregistration::v1::ValidatingAdmissionPolicy;
use kube::{
    Api, Client, ResourceExt as _,
    api::{Patch, PatchParams},
};
use serde_json::{Value, json};
use std::{collections::BTreeSet, sync::Arc};

/// Kinds of a rule against which expressions are checked.
const KINDS_MAX: usize = 10;
const NAME: &str = "validatingadmissionpolicy-status";

struct Controller {
    client: Client,
    policies: Informer<ValidatingAdmissionPolicy>,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("validatingadmissionpolicy-status-controller").await else { return };
    let policies = context.informers.get::<ValidatingAdmissionPolicy>();
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    policies.on_change(move |change| change.new.into_iter().for_each(|policy| to.add(policy.name_any())));
    policies.synced().await;
    let workers = context.settings.concurrent_validating_admission_policy_status_syncs;
    run(NAME, queue, Arc::new(Controller { client, policies }), workers, context.shutdown.clone()).await;
}

impl Reconcile for Controller {
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Next, SyncError> {
        let Some(policy) = self.policies.get("", name) else { return Ok(Next::Settled) };
        let (generation, uid) = (policy.metadata.generation, policy.metadata.uid.clone());
        if policy.status.as_ref().and_then(|s| s.observed_generation) == generation {
            return Ok(Next::Settled);
        }
        // It takes its time, and all controllers run on one thread.
        let warnings = tokio::task::spawn_blocking(move || warnings(&policy)).await;
        let warnings = warnings.map_err(|error| SyncError::Invalid(format!("the expressions' check: {error}")))?;
        let warnings = Some(warnings).filter(|warnings| !warnings.is_empty());
        let status = json!({"observedGeneration": generation, "typeChecking": {"expressionWarnings": warnings}});
        let patch = Patch::Merge(json!({"metadata": {"uid": uid}, "status": status}));
        let api: Api<ValidatingAdmissionPolicy> = Api::all(self.client.clone());
        gone_is_fine(api.patch_status(name, &PatchParams::default(), &patch).await)?;
        Ok(Next::Settled)
    }
}

/// What does not fit, expression by expression. As `TypeChecker.Check`.
fn warnings(policy: &ValidatingAdmissionPolicy) -> Vec<Value> {
    let Some(spec) = &policy.spec else { return Vec::new() };
    let params = spec.param_kind.as_ref().map(|kind| {
        let api_version = kind.api_version.as_deref().unwrap_or_default();
        let (group, version) = api_version.split_once('/').unwrap_or(("", api_version));
        Type::of_kind(group, version, kind.kind.as_deref().unwrap_or_default()).unwrap_or(Type::Dyn)
    });
    let environments: Vec<(String, Env)> = kinds(policy)
        .into_iter()
        .filter_map(|(group, version, kind)| {
            let mut env = Env::of_requests(&Type::of_kind(group, version, kind)?);
            env.variables.extend(params.clone().map(|params| ("params", params)));
            env = env.and("variables", Type::Variables([].into()));
            for variable in spec.variables.iter().flatten() {
                let kind = env.compile(&variable.expression).unwrap_or(Type::Dyn);
                env.define(&variable.name, &kind);
            }
            Some((format!("{group}/{version}, Kind={kind}"), env))
        })
        .collect();
    let mut found = Vec::new();
    let mut check = |field: String, expression: &str| {
        let told: Vec<String> = environments
            .iter()
            .filter_map(|(kind, env)| Some(format!("{kind}: {}\n", env.compile(expression).err()?)))
            .collect();
        if !told.is_empty() {
            found.push(json!({"fieldRef": field, "warning": told.join("\n")}));
        }
    };
    for (at, validation) in spec.validations.iter().flatten().enumerate() {
        check(format!("spec.validations[{at}].expression"), &validation.expression);
        if let Some(expression) = validation.message_expression.as_deref().filter(|e| !e.is_empty()) {
            check(format!("spec.validations[{at}].messageExpression"), expression);
        }
    }
    found
}

/// The kinds that a policy is for, as far as it names them: group, version and kind. As `typesToCheck`.
fn kinds(policy: &ValidatingAdmissionPolicy) -> BTreeSet<(&'static str, &'static str, &'static str)> {
    let constraints = policy.spec.as_ref().and_then(|spec| spec.match_constraints.as_ref());
    let mut kinds = BTreeSet::new();
    for rule in constraints.and_then(|c| c.resource_rules.as_ref()).into_iter().flatten() {
        let sorted = |names: &Option<Vec<String>>| -> BTreeSet<String> { names.iter().flatten().cloned().collect() };
        let (groups, versions) = (sorted(&rule.api_groups), sorted(&rule.api_versions));
        if groups.iter().chain(&versions).any(|name| name.contains('*')) {
            continue;
        }
        let resources = sorted(&rule.resources);
        let plain = || resources.iter().filter(|resource| !resource.contains(['*', '/']));
        let named = groups.iter().flat_map(|g| versions.iter().flat_map(move |v| plain().map(move |r| (g, v, r))));
        let known = named.filter_map(|(group, version, resource)| facts::resource(group, version, resource));
        kinds.extend(known.take(KINDS_MAX).map(|kind| (kind.group, kind.version, kind.kind)));
    }
    kinds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_that_do_not_fit_the_objects_are_warned_of() {
        let policy = |expressions: &[&str], resources: &[&str]| -> ValidatingAdmissionPolicy {
            let validations: Vec<Value> = expressions.iter().map(|e| json!({"expression": e})).collect();
            let rule = json!({"apiGroups": ["apps"], "apiVersions": ["v1"], "resources": resources});
            serde_json::from_value(
                json!({"spec": {"matchConstraints": {"resourceRules": [rule]}, "validations": validations,
                "variables": [{"name": "replicas", "expression": "object.spec.replicas"}]}}),
            )
            .unwrap()
        };
        let good = ["object.spec.replicas > 1", "variables.replicas < 3 && has(object.metadata.labels)"];
        assert!(warnings(&policy(&good, &["deployments", "deployments/scale"])).is_empty());
        assert!(warnings(&policy(&["object.spec.replicas > '1'"], &["*"])).is_empty(), "of any kind");
        let bad = policy(&["true", "variables.replicas > '1'"], &["deployments", "daemonsets"]);
        let why = "ERROR: <input>:1:20: found no matching overload for '_>_' applied to '(int, string)'\n | variables.replicas > '1'\n | ...................^\n";
        let warning = format!("apps/v1, Kind=Deployment: {why}");
        assert_eq!(warnings(&bad), [json!({"fieldRef": "spec.validations[1].expression", "warning": warning})]);
    }
}
