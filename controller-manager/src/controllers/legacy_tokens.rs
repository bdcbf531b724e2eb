//! Token Secrets that were once made for every ServiceAccount: those that nobody has used for a long time are first marked
//! invalid, and after as long again deleted. Nothing happens where the API server does not track their use.
use super::serviceaccount_token::{ACCOUNT_NAME, ACCOUNT_UID, TYPE};
use crate::runtime::{Context, api_in, gone_is_fine, is_code};
use apimachinery::references::references;
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
    Mark,
    Goes,
}

fn date(text: &str) -> Option<Date> {
    text.parse().ok()
}

fn day(at: Timestamp) -> Date {
    at.to_zoned(TimeZone::UTC).date()
}

/// Whether the use of tokens was noted for long enough. `since` is the day on which the API server began, which counts from
/// its end. As `latestPossibleTrackedSinceTime`.
fn is_known(since: Date, period: Duration, now: Timestamp) -> bool {
    let begun = since.tomorrow().and_then(|day| day.to_zoned(TimeZone::UTC));
    begun.is_ok_and(|begun| begun.timestamp() + period <= now)
}

/// As `evaluateSATokens`, of one.
fn judge(secret: &Secret, mounted: bool, period: Duration, now: Timestamp) -> Verdict {
    let label = |key: &str| secret.metadata.labels.as_ref().and_then(|l| l.get(key)).map(String::as_str);
    let long_ago = now - period;
    let is_new = secret.metadata.creation_timestamp.as_ref().is_none_or(|created| created.0 >= long_ago);
    // Of a day that cannot be read nothing is known.
    let is_used = label(LAST_USED).is_some_and(|used| date(used).is_none_or(|used| used >= day(long_ago)));
    if is_new || is_used || mounted || secret.metadata.deletion_timestamp.is_some() {
        return Verdict::Stays;
    }
    match label(INVALID_SINCE).and_then(date) {
        None => Verdict::Mark,
        Some(since) if since >= day(long_ago) => Verdict::Stays,
        Some(_) => Verdict::Goes,
    }
}

/// Whether an account names a Secret: then it was made by itself, not by a person.
fn is_listed(secret: &Secret, accounts: &[ServiceAccount]) -> bool {
    let annotation =
        |key: &str| secret.metadata.annotations.as_ref().and_then(|a| a.get(key)).filter(|v| !v.is_empty());
    let uid = annotation(ACCOUNT_UID);
    accounts.iter().any(|account| {
        account.metadata.namespace == secret.metadata.namespace
            && annotation(ACCOUNT_NAME).is_some_and(|name| Some(name) == account.metadata.name.as_ref())
            && uid.is_none_or(|uid| Some(uid) == account.metadata.uid.as_ref())
            && account.secrets.iter().flatten().any(|named| named.name == secret.metadata.name)
    })
}

async fn look(own: &Client, client: &Client, period: Duration) -> Result<(), kube::Error> {
    let tracking = api_in::<ConfigMap>(client, "kube-system").get_opt(TRACKING).await?;
    let Some(since) = tracking.and_then(|t| date(t.data?.get("since")?)) else { return Ok(()) };
    let now = Timestamp::now();
    if !is_known(since, period, now) {
        return Ok(());
    }
    let tokens = ListParams::default().fields(&format!("type={TYPE}"));
    let secrets = Api::<Secret>::all(own.clone()).list(&tokens).await?;
    if secrets.items.is_empty() {
        return Ok(());
    }
    let accounts = Api::<ServiceAccount>::all(own.clone()).list(&ListParams::default()).await?.items;
    let pods = Api::<Pod>::all(own.clone()).list(&ListParams::default()).await?;
    let mounted: BTreeSet<(String, String)> = pods
        .iter()
        .flat_map(|pod| references(pod).secrets.into_iter().map(|name| (pod.namespace().unwrap_or_default(), name)))
        .collect();
    for secret in &secrets {
        let key = (secret.namespace().unwrap_or_default(), secret.name_any());
        if !is_listed(secret, &accounts) {
            continue;
        }
        let api = api_in::<Secret>(client, &key.0);
        match judge(secret, mounted.contains(&key), period, now) {
            Verdict::Stays => {}
            Verdict::Mark => {
                let labels = json!({INVALID_SINCE: day(now).to_string()});
                let mark = Patch::Merge(json!({"metadata": {"uid": secret.metadata.uid, "labels": labels}}));
                gone_is_fine(api.patch_metadata(&key.1, &PatchParams::default(), &mark).await)?;
                info!(secret = format!("{}/{}", key.0, key.1), "unused token marked invalid");
            }
            Verdict::Goes => {
                let only_this = Preconditions {
                    uid: secret.metadata.uid.clone(),
                    resource_version: secret.metadata.resource_version.clone(),
                };
                let parameters = DeleteParams { preconditions: Some(only_this), ..DeleteParams::default() };
                match gone_is_fine(api.delete(&key.1, &parameters).await) {
                    // It was used or changed just now.
                    Err(error) if is_code(&error, 409) => continue,
                    outcome => outcome?,
                };
                info!(secret = format!("{}/{}", key.0, key.1), "unused token deleted");
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use std::collections::BTreeMap;

    #[test]
    fn unused_tokens_are_marked_and_then_deleted() {
        let now: Timestamp = "2026-06-01T12:00:00Z".parse().unwrap();
        let month = Duration::from_secs(30 * 86400);
        let secret = |used: Option<&str>, invalid: Option<&str>| -> Secret {
            let labels = [(LAST_USED, used), (INVALID_SINCE, invalid)];
            let labels = labels.into_iter().filter_map(|(key, value)| Some((key, value?))).collect::<BTreeMap<_, _>>();
            serde_json::from_value(json!({"metadata": {"creationTimestamp": "2020-01-01T00:00:00Z", "labels": labels}}))
                .unwrap()
        };
        for (why, secret, mounted, expected) in [
            ("unused", secret(None, None), false, Verdict::Mark),
            ("used lately", secret(Some("2026-05-20"), None), false, Verdict::Stays),
            ("used a month ago, to the day", secret(Some("2026-05-02"), None), false, Verdict::Stays),
            ("used long ago", secret(Some("2026-05-01"), None), false, Verdict::Mark),
            ("used on a day that nobody knows", secret(Some("never"), None), false, Verdict::Stays),
            ("mounted", secret(None, None), true, Verdict::Stays),
            ("mounted, though marked", secret(None, Some("2026-02-01")), true, Verdict::Stays),
            ("marked lately", secret(None, Some("2026-05-20")), false, Verdict::Stays),
            ("marked long ago", secret(None, Some("2026-02-01")), false, Verdict::Goes),
            ("marked with what is no day", secret(None, Some("long-ago")), false, Verdict::Mark),
            ("marked, and used since", secret(Some("2026-05-20"), Some("2026-02-01")), false, Verdict::Stays),
        ] {
            assert_eq!(judge(&secret, mounted, month, now), expected, "{why}");
        }
        let mut new = secret(None, None);
        new.metadata.creation_timestamp = Some(Time("2026-05-31T00:00:00Z".parse().unwrap()));
        assert_eq!(judge(&new, false, month, now), Verdict::Stays, "new");
        let known = ["2026-05-01", "2026-05-02"].map(|since| is_known(date(since).unwrap(), month, now));
        assert_eq!(known, [true, false]);
    }

    #[test]
    fn only_tokens_that_their_own_account_names_were_made_by_itself() {
        let account: ServiceAccount = serde_json::from_value(json!({"secrets": [{"name": "t"}],
            "metadata": {"name": "robot", "namespace": "ns", "uid": "u1"}}))
        .unwrap();
        let secret = |name: &str, namespace: &str, annotations: serde_json::Value| -> Secret {
            let metadata = json!({"name": name, "namespace": namespace, "annotations": annotations});
            serde_json::from_value(json!({"metadata": metadata})).unwrap()
        };
        for (why, secret, expected) in [
            ("named", secret("t", "ns", json!({ACCOUNT_NAME: "robot", ACCOUNT_UID: "u1"})), true),
            ("named, without the account's uid", secret("t", "ns", json!({ACCOUNT_NAME: "robot"})), true),
            ("a namesake's", secret("t", "ns", json!({ACCOUNT_NAME: "robot", ACCOUNT_UID: "u0"})), false),
            ("another's", secret("t", "ns", json!({ACCOUNT_NAME: "other"})), false),
            ("made by a person", secret("x", "ns", json!({ACCOUNT_NAME: "robot"})), false),
            ("elsewhere", secret("t", "default", json!({ACCOUNT_NAME: "robot"})), false),
        ] {
            assert_eq!(is_listed(&secret, std::slice::from_ref(&account)), expected, "{why}");
        }
    }
}
