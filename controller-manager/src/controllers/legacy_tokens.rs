//! Token Secrets that were once made for every ServiceAccount: those that nobody has used for a long time are first marked
//! invalid, and after as long again deleted. Nothing happens where the API server does not track their use.
use super::serviceaccount_token::TYPE;
use crate::runtime::{Context, api_in, gone_is_fine};
use apimachinery::pod::is_terminal;
use k8s_openapi::{
    api::core::v1::{ConfigMap, Pod, Secret, ServiceAccount},
    jiff::{Timestamp, civil::Date, tz::TimeZone},
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, ListParams, Patch, PatchParams, Preconditions},
};
use serde_json::json;
use std::{collections::BTreeSet, sync::Arc, time::Duration};
use tracing::{info, warn};

const SYNC_PERIOD: Duration = Duration::from_secs(24 * 3600);
const TRACKING: &str = "kube-apiserver-legacy-service-account-token-tracking";
const LAST_USED: &str = "kubernetes.io/legacy-token-last-used";
const INVALID_SINCE: &str = "kubernetes.io/legacy-token-invalid-since";

/// Runs until shutdown.
pub async fn start(context: Arc<Context>) {
    let Some(client) = context.client_for("legacy-service-account-token-cleaner").await else { return };
    let period = context.settings.legacy_service_account_token_clean_up_period;
    let mut ticks = tokio::time::interval(SYNC_PERIOD.min(period));
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = context.shutdown.cancelled() => return,
        }
        if let Err(error) = look(&context.client, &client, period).await {
            warn!(%error, "unused token Secrets not looked at; will retry");
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Stays,
    /// It was used after all.
    Revive,
    Mark,
    Goes,
}

fn date(text: Option<&str>) -> Option<Timestamp> {
    let date: Date = text?.parse().ok()?;
    Some(date.to_zoned(TimeZone::UTC).ok()?.timestamp())
}

/// `since` is when the API server began to note who is used. As `evaluateSATokens`.
fn judge(secret: &Secret, mounted: bool, since: Timestamp, period: Duration, now: Timestamp) -> Verdict {
    let label = |key: &str| secret.metadata.labels.as_ref().and_then(|l| l.get(key)).map(String::as_str);
    let created = secret.metadata.creation_timestamp.as_ref().map_or(now, |t| t.0);
    let used = date(label(LAST_USED)).unwrap_or(created).max(since).max(created);
    let long_ago = |at: Timestamp| at + period < now;
    let marked = label(INVALID_SINCE);
    match (mounted || !long_ago(used), marked) {
        (true, Some(_)) => Verdict::Revive,
        (true, None) => Verdict::Stays,
        (false, Some(since)) if date(Some(since)).is_some_and(long_ago) => Verdict::Goes,
        (false, Some(_)) => Verdict::Stays,
        (false, None) => Verdict::Mark,
    }
}

async fn look(own: &Client, client: &Client, period: Duration) -> Result<(), kube::Error> {
    let tracking = api_in::<ConfigMap>(client, "kube-system").get_opt(TRACKING).await?;
    let Some(since) = tracking.and_then(|t| date(t.data?.get("since").map(String::as_str))) else { return Ok(()) };
    let now = Timestamp::now();
    let tokens = ListParams::default().fields(&format!("type={TYPE}"));
    let secrets = Api::<Secret>::all(own.clone()).list(&tokens).await?;
    if secrets.items.is_empty() {
        return Ok(());
    }
    // Only those that an account names were made by itself.
    let accounts = Api::<ServiceAccount>::all(own.clone()).list(&ListParams::default()).await?;
    let listed: BTreeSet<(String, String)> = accounts
        .iter()
        .flat_map(|a| {
            a.secrets.iter().flatten().map(|s| (a.namespace().unwrap_or_default(), s.name.clone().unwrap_or_default()))
        })
        .collect();
    let pods = Api::<Pod>::all(own.clone()).list(&ListParams::default()).await?;
    let mounted: BTreeSet<(String, String)> = pods
        .iter()
        .filter(|p| !is_terminal(p))
        .flat_map(|p| {
            let volumes = p.spec.iter().flat_map(|s| s.volumes.iter().flatten());
            volumes.filter_map(|v| Some((p.namespace().unwrap_or_default(), v.secret.as_ref()?.secret_name.clone()?)))
        })
        .collect();
    for secret in &secrets {
        let key = (secret.namespace().unwrap_or_default(), secret.name_any());
        if !listed.contains(&key) {
            continue;
        }
        let api = api_in::<Secret>(client, &key.0);
        let mark = |value: Option<String>| {
            Patch::Merge(json!({"metadata": {"uid": secret.metadata.uid, "labels": {INVALID_SINCE: value}}}))
        };
        match judge(secret, mounted.contains(&key), since, period, now) {
            Verdict::Stays => {}
            Verdict::Revive => {
                _ = gone_is_fine(api.patch_metadata(&key.1, &PatchParams::default(), &mark(None)).await)?
            }
            Verdict::Mark => {
                let today = now.to_zoned(TimeZone::UTC).date().to_string();
                gone_is_fine(api.patch_metadata(&key.1, &PatchParams::default(), &mark(Some(today))).await)?;
                info!(secret = format!("{}/{}", key.0, key.1), "unused token marked invalid");
            }
            Verdict::Goes => {
                let only_this = Preconditions {
                    uid: secret.metadata.uid.clone(),
                    resource_version: secret.metadata.resource_version.clone(),
                };
                let parameters = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
                gone_is_fine(api.delete(&key.1, &parameters).await)?;
                info!(secret = format!("{}/{}", key.0, key.1), "unused token deleted");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unused_tokens_are_marked_and_then_deleted() {
        let now: Timestamp = "2026-06-01T00:00:00Z".parse().unwrap();
        let since: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let month = Duration::from_secs(30 * 86400);
        let secret = |used: Option<&str>, invalid: Option<&str>| -> Secret {
            serde_json::from_value(json!({"metadata": {"creationTimestamp": "2020-01-01T00:00:00Z",
                "labels": json!({LAST_USED: used.unwrap_or("never"), INVALID_SINCE: invalid})
                    .as_object().unwrap().iter().filter(|(_, v)| !v.is_null())
                    .map(|(k, v)| (k.clone(), v.clone())).collect::<serde_json::Map<_, _>>()}}))
            .unwrap()
        };
        for (why, secret, mounted, expected) in [
            ("unused", secret(None, None), false, Verdict::Mark),
            ("used lately", secret(Some("2026-05-20"), None), false, Verdict::Stays),
            ("used long ago", secret(Some("2026-02-01"), None), false, Verdict::Mark),
            ("mounted", secret(None, None), true, Verdict::Stays),
            ("marked lately", secret(None, Some("2026-05-20")), false, Verdict::Stays),
            ("marked long ago", secret(None, Some("2026-02-01")), false, Verdict::Goes),
            ("marked, and used since", secret(Some("2026-05-20"), Some("2026-02-01")), false, Verdict::Revive),
        ] {
            assert_eq!(judge(&secret, mounted, since, month, now), expected, "{why}");
        }
        assert_eq!(judge(&secret(None, None), false, now, month, now), Verdict::Stays, "tracking began just now");
    }
}
