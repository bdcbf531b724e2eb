//! StatefulSets: pods with names, in their order, each with claims of its own.
mod identity;
mod plan;

use super::{
    history::{Historic, History, Revisions, template_of},
    pod_control::{PodControl, PodOwner, in_batches, pod_changed, slow_start},
};
use crate::runtime::{
    Context, Expectations, Index, Next, Reconcile, SyncError, WorkQueue, api_in, cause, gone_is_fine, is_code,
    is_terminating, put_status, run,
};
use apimachinery::{labels::Selector, meta::NamespacedName, pod::phase};
use component_base::{
    events::{Type, reference},
    informer::Informer,
};
use futures::FutureExt as _;
use identity::REVISION_LABEL;
use k8s_openapi::{
    api::{
        apps::v1::{ControllerRevision, StatefulSet},
        core::v1::{ObjectReference, PersistentVolumeClaim, Pod, PodTemplateSpec},
    },
    jiff::Timestamp,
};
use kube::{
    ResourceExt as _,
    api::{DeleteParams, PostParams, Preconditions},
};
use plan::{Action, Observed, Revision};
use serde_json::json;
use std::sync::Arc;

const NAME: &str = "statefulset";

struct Controller {
    sets: Informer<StatefulSet>,
    pods: Arc<Index<Pod>>,
    claims: Informer<PersistentVolumeClaim>,
    history: History,
    expectations: Arc<Expectations>,
    control: PodControl,
}

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("statefulset-controller").await else { return };
    let (sets, pods) = (context.informers.get::<StatefulSet>(), context.informers.get::<Pod>());
    let claims = context.informers.get::<PersistentVolumeClaim>();
    let revisions = context.informers.get::<ControllerRevision>();
    let controller = Arc::new(Controller {
        sets: sets.clone(),
        pods: context.pods_by_controller(),
        claims: claims.clone(),
        history: History { client: client.clone(), revisions: context.revisions_by_controller() },
        expectations: Arc::default(),
        control: PodControl::new(client.clone(), context.recorder(&client, "statefulset-controller")),
    });
    let queue = Arc::new(WorkQueue::new(NAME));
    let (to, expectations) = (queue.clone(), controller.expectations.clone());
    sets.on_change(move |change| {
        let Some(set) = change.latest() else { return };
        let key = NamespacedName::of(set.as_ref());
        if change.new.is_none() {
            expectations.forget(&key);
        }
        to.add(key);
    });
    let (to, all, expectations) = (queue.clone(), sets.clone(), controller.expectations.clone());
    pods.on_change(move |change| pod_changed(change, &all, &expectations, &to));
    sets.synced().await;
    pods.synced().await;
    claims.synced().await;
    revisions.synced().await;
    run(NAME, queue, controller, context.settings.concurrent_statefulset_syncs, context.shutdown.clone()).await;
}

impl PodOwner for StatefulSet {
    fn selector(&self) -> Result<Selector, SyncError> {
        Selector::from_label_selector_opt(self.spec.as_ref().map(|s| &s.selector))
            .map_err(|e| SyncError::Invalid(format!("selector: {e}")))
    }

    fn can_use(&self, orphan: &Pod) -> bool {
        identity::ordinal(self, orphan).is_some()
    }
}

impl Historic for StatefulSet {
    const HASH_LABEL: &'static str = "controller.kubernetes.io/hash";

    fn template(&self) -> Option<&PodTemplateSpec> {
        self.spec.as_ref().map(|s| &s.template)
    }

    fn history_limit(&self) -> Option<i32> {
        self.spec.as_ref()?.revision_history_limit
    }

    fn collision_count(&mut self) -> &mut Option<i32> {
        &mut self.status.get_or_insert_default().collision_count
    }
}

/// The revision that pods below the partition have, and the newest. As `getStatefulSetRevisions`.
fn current_and_update(set: &StatefulSet, revisions: &Revisions) -> (Revision, Revision) {
    let named = |r: &ControllerRevision| Revision {
        name: r.metadata.name.clone().unwrap_or_default(),
        template: template_of(r).unwrap_or_default(),
    };
    let current = set.status.as_ref().and_then(|s| s.current_revision.as_ref());
    let current = revisions.all.iter().find(|r| current.is_some() && r.metadata.name.as_ref() == current);
    let update = named(&revisions.update);
    (current.map_or_else(|| update.clone(), |r| named(r)), update)
}

impl Controller {
    fn tell(&self, set: &ObjectReference, verb: &str, what: &str, outcome: Result<(), &kube::Error>) {
        let capital = verb[..1].to_uppercase() + &verb[1..];
        let of = format!("{what} in StatefulSet {}", set.name.as_deref().unwrap_or_default());
        let (kind, reason, message) = match outcome {
            Ok(()) if what.starts_with("Claim") => {
                (Type::Normal, format!("Successful{capital}"), format!("{verb} {of} success"))
            }
            Ok(()) => (Type::Normal, format!("Successful{capital}"), format!("{verb} {of} successful")),
            Err(error) => {
                (Type::Warning, format!("Failed{capital}"), format!("{verb} {of} failed error: {}", cause(error)))
            }
        };
        self.control.recorder.event(set, kind, &reason, "", message);
    }

    async fn make_claims(
        &self,
        about: &ObjectReference,
        namespace: &str,
        claims: &[PersistentVolumeClaim],
        pod: &str,
    ) -> Result<(), kube::Error> {
        let api = api_in::<PersistentVolumeClaim>(&self.control.client, namespace);
        for claim in claims {
            let outcome = match api.create(&PostParams::default(), claim).await {
                Err(error) if is_code(&error, 409) => continue,
                Err(error) if is_terminating(&error) => return Err(error),
                outcome => outcome.map(|_| ()),
            };
            let of = if outcome.is_ok() { "Pod" } else { "for Pod" };
            let what = format!("Claim {} {of} {pod}", claim.name_any());
            self.tell(about, "create", &what, outcome.as_ref().copied());
            outcome?;
        }
        Ok(())
    }

    /// Says why a pod is made anew that has ended.
    fn tell_recreation(&self, key: &NamespacedName, about: &ObjectReference, pod: &Pod) {
        let (kind, reason, how) = match phase(pod) {
            "Failed" => (Type::Warning, "RecreatingFailedPod", "failed"),
            "Succeeded" => (Type::Normal, "RecreatingTerminatedPod", "terminated"),
            _ => return,
        };
        let message = format!("StatefulSet {key} is recreating {how} Pod {}", pod.name_any());
        self.control.recorder.event(about, kind, reason, "", message);
    }

    async fn carry_out(
        &self,
        key: &NamespacedName,
        about: &ObjectReference,
        action: &Action,
    ) -> Result<(), kube::Error> {
        let pods = api_in::<Pod>(&self.control.client, &key.namespace);
        let pod_is = |pod: &Pod| format!("Pod {}", pod.name_any());
        match action {
            Action::OwnClaim(claim, owners) => {
                let mut claim = claim.as_ref().clone();
                claim.metadata.owner_references = (!owners.is_empty()).then(|| owners.clone());
                let api = api_in::<PersistentVolumeClaim>(&self.control.client, &key.namespace);
                api.replace(&claim.name_any(), &PostParams::default(), &claim).await.map(|_| ())
            }
            Action::MakeClaims(claims, pod) => self.make_claims(about, &key.namespace, claims, &pod.name_any()).await,
            Action::Create(pod, claims) => {
                let made = async {
                    self.make_claims(about, &key.namespace, claims, &pod.name_any()).await?;
                    pods.create(&PostParams::default(), pod).await.map(|_| ())
                };
                let outcome = made.await.inspect_err(|_| self.expectations.creation_observed(key));
                if !outcome.as_ref().is_err_and(|e| is_code(e, 409) || is_terminating(e)) {
                    self.tell(about, "create", &pod_is(pod), outcome.as_ref().copied());
                }
                outcome
            }
            Action::Label(pod, labels) => {
                let patch = json!({"metadata": {"uid": pod.metadata.uid, "labels": labels}});
                let outcome = self.control.patch(&pod.metadata, patch).await;
                self.tell(about, "update", &pod_is(pod), outcome.as_ref().copied());
                outcome
            }
            Action::Delete(pod) | Action::Recreate(pod) => {
                if matches!(action, Action::Recreate(_)) {
                    self.tell_recreation(key, about, pod);
                }
                let only_this = Preconditions { uid: pod.metadata.uid.clone(), resource_version: None };
                let parameters = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
                let outcome = gone_is_fine(pods.delete(&pod.name_any(), &parameters).await).map(|_| ());
                if outcome.is_err() {
                    let uid = pod.metadata.uid.as_deref().unwrap_or_default();
                    self.expectations.deletion_observed(key, uid);
                }
                self.tell(about, "delete", &pod_is(pod), outcome.as_ref().copied());
                outcome
            }
        }
    }

    async fn act(&self, key: &NamespacedName, set: &StatefulSet, actions: &[Action]) -> Result<(), SyncError> {
        let about = &reference(set);
        let creations = actions.iter().filter(|a| matches!(a, Action::Create(..))).count();
        let deletions = actions.iter().filter_map(|a| match a {
            Action::Delete(pod) | Action::Recreate(pod) => pod.metadata.uid.clone(),
            _ => None,
        });
        self.expectations.expect(key, creations, deletions);
        // Whom a claim belongs to must be said before its pod goes.
        let (first, rest): (Vec<_>, Vec<_>) = actions.iter().partition(|a| matches!(a, Action::OwnClaim(..)));
        let mut outcome = Ok(());
        for (actions, batches) in [(&first, vec![first.len()]), (&rest, slow_start(rest.len(), 1))] {
            if outcome.is_ok() {
                let writes = actions.iter().map(|action| self.carry_out(key, about, action).boxed()).collect();
                outcome = in_batches(writes, batches).await;
            }
        }
        outcome.map_err(|(_, error)| {
            // What was not tried will not be seen.
            self.expectations.forget(key);
            error.into()
        })
    }
}

impl Reconcile for Controller {
    type Key = NamespacedName;

    async fn reconcile(&self, key: &NamespacedName) -> Result<Next, SyncError> {
        let Some(set) = self.sets.get(&key.namespace, &key.name) else { return Ok(Next::Settled) };
        let selector = set.selector()?;
        let ready_to_act = self.expectations.satisfied(key);
        let revisions = self.history.sync(set.as_ref(), &selector).await?;
        let pods = self.control.claim_pods(&self.pods, set.as_ref(), &selector).await?;
        let (current, update) = current_and_update(&set, &revisions);
        let plan = plan::plan(&Observed {
            set: &set,
            pods: &pods,
            current: &current,
            update: &update,
            claims: &|name| self.claims.get(&key.namespace, name),
            now: Timestamp::now(),
        });
        let outcome = if ready_to_act { self.act(key, &set, &plan.actions).await } else { Ok(()) };
        if set.status.as_ref() != Some(&plan.status) {
            let mut updated = set.as_ref().clone();
            updated.status = Some(plan.status);
            put_status(&self.control.client, &updated).await?;
        }
        outcome?;
        let in_use: Vec<&String> = pods
            .iter()
            .filter_map(|p| p.metadata.labels.as_ref()?.get(REVISION_LABEL))
            .chain([&current.name])
            .collect();
        let live = |r: &ControllerRevision| r.metadata.name.as_ref().is_some_and(|n| in_use.contains(&n));
        self.history.clean_up(set.as_ref(), &revisions, live).await?;
        Ok(Next::after(plan.check_again))
    }
}
