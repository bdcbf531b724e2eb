//! Leader election over a Lease: of several instances of a component one works, the others wait.
//!
//! A holder renews its lease; whoever sees a lease unchanged for its whole duration, by its own clock, takes it. A holder
//! that could not renew within the renew deadline stops working at once. As client-go's `leaderelection`.
use crate::events::{Recorder, Type};
use apimachinery::time::now_micro;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::ObjectReference;
use kube::{Api, Client, api::PostParams};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

/// Whose lease, and how it is kept. [`Config::new`] has Kubernetes' times.
#[derive(Clone, Debug)]
pub struct Config {
    pub namespace: String,
    /// Of the Lease: `kube-scheduler`.
    pub name: String,
    /// Unique to this process.
    pub identity: String,
    /// How long others wait for a holder that is silent.
    pub lease_duration: Duration,
    /// How long a holder tries to renew before it gives up.
    pub renew_deadline: Duration,
    /// Between tries.
    pub retry_period: Duration,
}

/// Leadership ended other than by a shutdown. The process should end; its supervisor starts it anew.
#[derive(Debug, thiserror::Error)]
#[error("leader election lost: lease {lease} was not renewed in time or was taken by another")]
pub struct Lost {
    lease: String,
}

impl Config {
    pub fn new(name: &str) -> Self {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        Self {
            namespace: "kube-system".to_owned(),
            name: name.to_owned(),
            identity: format!("{}_{}", host.trim(), apimachinery::names::random_suffix(12)),
            lease_duration: Duration::from_secs(15),
            renew_deadline: Duration::from_secs(10),
            retry_period: Duration::from_secs(2),
        }
    }

    /// Tells people who leads, as client-go's elections do: an event of the component about the Lease.
    pub fn tell(&self, client: Client, component: &str) {
        let lease = ObjectReference {
            api_version: Some("coordination.k8s.io/v1".to_owned()),
            kind: Some("Lease".to_owned()),
            namespace: Some(self.namespace.clone()),
            name: Some(self.name.clone()),
            ..ObjectReference::default()
        };
        let message = format!("{} became leader", self.identity);
        Recorder::new(client, component, "").event(&lease, Type::Normal, "LeaderElection", "", message);
    }
}

/// Waits for leadership, then runs `work`, which must end when its token is cancelled. Ends when `work` ends, with
/// [`Lost`] when leadership is lost; on shutdown the lease is released so that another need not wait.
pub async fn run<F, Fut>(client: Client, config: Config, shutdown: CancellationToken, work: F) -> anyhow::Result<()>
where
    F: FnOnce(CancellationToken) -> Fut,
    Fut: Future<Output = anyhow::Result<()>>,
{
    let mut elector = Elector::new(client, config);
    loop {
        match elector.attempt().await {
            Ok(true) => break,
            Ok(false) => {}
            Err(error) => debug!(lease = elector.config.name, %error, "lease not acquired"),
        }
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = tokio::time::sleep(elector.config.retry_period) => {}
        }
    }
    info!(lease = elector.config.name, identity = elector.config.identity, "became leader");

    let stop = shutdown.child_token();
    let work = work(stop.clone());
    tokio::pin!(work);
    let lost = Lost { lease: format!("{}/{}", elector.config.namespace, elector.config.name) };
    let outcome = tokio::select! {
        // The work ended by itself, well or badly.
        outcome = &mut work => outcome,
        // Leadership was lost: whatever the work still does may collide with the new leader.
        () = elector.renew_until_lost() => {
            stop.cancel();
            return Err(lost.into());
        }
        // Asked to end: the work gets its chance to.
        () = shutdown.cancelled() => work.await,
    };
    elector.release().await;
    outcome
}

struct Elector {
    api: Api<Lease>,
    config: Config,
    /// The lease as last seen, and when it was seen to change, by our clock.
    observed: Option<(Lease, Instant)>,
}

/// What to do about a lease.
#[derive(Debug, PartialEq)]
enum Step {
    Wait,
    Take,
}

impl Elector {
    fn new(client: Client, config: Config) -> Self {
        Self { api: Api::namespaced(client, &config.namespace), config, observed: None }
    }

    /// One try to take or renew the lease: true if it is ours now.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let Some(lease) = self.api.get_opt(&self.config.name).await? else {
            let mut lease = Lease::default();
            lease.metadata.name = Some(self.config.name.clone());
            lease.spec = Some(self.spec_for(None));
            let created = self.api.create(&PostParams::default(), &lease).await?;
            self.observe(created);
            return Ok(true);
        };
        self.observe(lease);
        let Some((lease, seen)) = &self.observed else { return Ok(false) };
        if step(lease.spec.as_ref(), seen.elapsed(), &self.config.identity) == Step::Wait {
            return Ok(false);
        }
        let mut lease = lease.clone();
        lease.spec = Some(self.spec_for(lease.spec.as_ref()));
        // The resourceVersion that we read makes this fail if another was quicker.
        let replaced = self.api.replace(&self.config.name, &PostParams::default(), &lease).await?;
        self.observe(replaced);
        Ok(true)
    }

    fn observe(&mut self, lease: Lease) {
        let same = |old: &Lease| old.spec == lease.spec;
        let seen = self.observed.as_ref().filter(|(old, _)| same(old)).map_or_else(Instant::now, |(_, seen)| *seen);
        self.observed = Some((lease, seen));
    }

    fn spec_for(&self, former: Option<&LeaseSpec>) -> LeaseSpec {
        let ours = former.and_then(|s| s.holder_identity.as_ref()) == Some(&self.config.identity);
        let transitions = former.and_then(|s| s.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.config.identity.clone()),
            lease_duration_seconds: i32::try_from(self.config.lease_duration.as_secs()).ok(),
            acquire_time: if ours { former.and_then(|s| s.acquire_time.clone()) } else { Some(now_micro()) },
            renew_time: Some(now_micro()),
            lease_transitions: Some(if ours || former.is_none() { transitions } else { transitions + 1 }),
            ..LeaseSpec::default()
        }
    }

    async fn renew_until_lost(&mut self) {
        let mut renewed = Instant::now();
        while renewed.elapsed() < self.config.renew_deadline {
            tokio::time::sleep(self.config.retry_period).await;
            let left = self.config.renew_deadline.saturating_sub(renewed.elapsed());
            match tokio::time::timeout(left, self.attempt()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => return,
                Ok(Err(error)) => warn!(lease = self.config.name, %error, "lease not renewed"),
                Err(_) => return,
            }
        }
    }

    async fn release(&mut self) {
        let Some((mut lease, _)) = self.observed.take() else { return };
        let mut spec = self.spec_for(lease.spec.as_ref());
        spec.holder_identity = Some(String::new());
        spec.lease_duration_seconds = Some(1);
        lease.spec = Some(spec);
        let parameters = PostParams::default();
        let replace = self.api.replace(&self.config.name, &parameters, &lease);
        match tokio::time::timeout(self.config.retry_period, replace).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                debug!(lease = self.config.name, %error, "lease not released; others wait until it runs out")
            }
            Err(_) => debug!(lease = self.config.name, "lease not released in time; others wait until it runs out"),
        }
    }
}

/// Take a lease that is ours, nobody's, or has not changed for as long as it lasts.
fn step(spec: Option<&LeaseSpec>, unchanged_for: Duration, identity: &str) -> Step {
    let Some(spec) = spec else { return Step::Take };
    let holder = spec.holder_identity.as_deref().unwrap_or("");
    let lasts = Duration::from_secs(spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or(0));
    if holder.is_empty() || holder == identity || unchanged_for > lasts { Step::Take } else { Step::Wait }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_taken_when_free_ours_or_run_out() {
        let lease = |holder: &str| LeaseSpec {
            holder_identity: Some(holder.to_owned()),
            lease_duration_seconds: Some(15),
            ..LeaseSpec::default()
        };
        for (spec, seconds, expected) in [
            (None, 0, Step::Take),
            (Some(lease("")), 0, Step::Take),
            (Some(lease("me")), 0, Step::Take),
            (Some(lease("other")), 14, Step::Wait),
            (Some(lease("other")), 16, Step::Take),
        ] {
            assert_eq!(step(spec.as_ref(), Duration::from_secs(seconds), "me"), expected, "{spec:?} {seconds}");
        }
    }
}
