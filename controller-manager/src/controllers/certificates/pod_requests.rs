//! Pods' certificates are asked for anew each time: requests that have served are removed. As `PCRCleanerController`.
use crate::runtime::{Context, gone_is_fine};
use k8s_openapi::api::certificates::v1beta1::PodCertificateRequest;
use k8s_openapi::jiff::{SignedDuration, Timestamp};
use kube::api::{DeleteParams, ListParams, Preconditions};
use kube::{Api, Client, ResourceExt as _};
use std::{sync::Arc, time::Duration};
use tracing::warn;

const ACCOUNT: &str = "podcertificaterequestcleaner";
const PERIOD: Duration = Duration::from_secs(5 * 60);
/// All that has to do with a request is over by then.
const THRESHOLD: SignedDuration = SignedDuration::from_mins(15);
/// Requests of a list's page.
const PAGE: u32 = 500;

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for(ACCOUNT).await else { return };
    let mut ticks = tokio::time::interval(PERIOD);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = context.shutdown.cancelled() => return,
        }
        if let Err(error) = clean(&client).await {
            warn!(%error, "old requests of pods not removed; will retry");
        }
    }
}

fn is_old(created: Option<Timestamp>, now: Timestamp) -> bool {
    created.is_some_and(|created| now.duration_since(created) >= THRESHOLD)
}

async fn clean(client: &Client) -> Result<(), kube::Error> {
    let all = Api::<PodCertificateRequest>::all(client.clone());
    let mut page = ListParams::default().limit(PAGE);
    loop {
        let listed = all.list_metadata(&page).await?;
        for request in &listed.items {
            if !is_old(request.creation_timestamp().map(|time| time.0), Timestamp::now()) {
                continue;
            }
            let of_namespace =
                Api::<PodCertificateRequest>::namespaced(client.clone(), &request.namespace().unwrap_or_default());
            let this = Preconditions { uid: request.uid(), ..Preconditions::default() };
            let params = DeleteParams { preconditions: Some(this), ..DeleteParams::default() };
            gone_is_fine(of_namespace.delete(&request.name_any(), &params).await)?;
        }
        match listed.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => page.continue_token = Some(token),
            None => return Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_old_after_a_quarter_of_an_hour() {
        let now = Timestamp::from_second(1_800_000_000).unwrap();
        assert!(!is_old(Some(now - SignedDuration::from_secs(899)), now));
        assert!(is_old(Some(now - SignedDuration::from_secs(900)), now));
        assert!(!is_old(None, now));
    }
}
