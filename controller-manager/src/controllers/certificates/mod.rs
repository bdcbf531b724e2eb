//! Certificate requests: kubelets' are approved, approved ones are signed, old ones are removed.
mod authority;
pub mod pod_requests;
mod request;
mod subject;

use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, gone_is_fine, run};
use authority::Authority;
use component_base::informer::Informer;
use k8s_openapi::{
    ByteString,
    api::{
        authorization::v1::{ResourceAttributes, SubjectAccessReview, SubjectAccessReviewSpec},
        certificates::v1::CertificateSigningRequest,
    },
    jiff::Timestamp,
};
use kube::{
    Api, Client, ResourceExt as _,
    api::{DeleteParams, PostParams},
};
use std::{collections::BTreeMap, sync::Arc, time::Duration};
use tracing::{error, info, warn};

const ACCOUNT: &str = "certificate-controller";
const CLEANING_PERIOD: Duration = Duration::from_secs(3600);

fn wake_on_change(requests: &Informer<CertificateSigningRequest>, queue: &Arc<WorkQueue<String>>) {
    let to = queue.clone();
    requests.on_change(move |change| change.new.into_iter().for_each(|csr| to.add(csr.name_any())));
}

// === approving ===

struct Approver {
    client: Client,
    requests: Informer<CertificateSigningRequest>,
}

/// Approves what nodes ask for; runs until shutdown.
pub async fn start_approving(context: Arc<Context>) {
    let Some(client) = context.client_for(ACCOUNT).await else { return };
    let requests = context.informers.get::<CertificateSigningRequest>();
    let queue = Arc::new(WorkQueue::new("certificate"));
    wake_on_change(&requests, &queue);
    requests.synced().await;
    run("csrapproving", queue, Arc::new(Approver { client, requests }), 5, context.shutdown.clone()).await;
}

impl Approver {
    /// Whether the one who asks may have such a certificate.
    async fn is_allowed(&self, csr: &CertificateSigningRequest, subresource: &str) -> Result<bool, kube::Error> {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: csr.spec.username.clone(),
                uid: csr.spec.uid.clone(),
                groups: csr.spec.groups.clone(),
                extra: csr.spec.extra.clone(),
                resource_attributes: Some(ResourceAttributes {
                    group: Some("certificates.k8s.io".to_owned()),
                    resource: Some("certificatesigningrequests".to_owned()),
                    verb: Some("create".to_owned()),
                    subresource: Some(subresource.to_owned()),
                    version: Some("*".to_owned()),
                    ..ResourceAttributes::default()
                }),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let answer =
            Api::<SubjectAccessReview>::all(self.client.clone()).create(&PostParams::default(), &review).await?;
        Ok(answer.status.is_some_and(|s| s.allowed))
    }
}

impl Reconcile for Approver {
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Next, SyncError> {
        let Some(csr) = self.requests.get("", name) else { return Ok(Next::Settled) };
        let decided = request::has_condition(&csr, "Approved") || request::has_condition(&csr, "Denied");
        if decided || request::certificate(&csr).is_some() {
            return Ok(Next::Settled);
        }
        let Ok(asked) = request::read(&csr.spec.request.0) else { return Ok(Next::Settled) };
        let recognized = request::recognize(&asked, &csr.spec);
        for one in &recognized {
            if self.is_allowed(&csr, one.subresource).await? {
                let updated = request::with_condition(&csr, "Approved", "AutoApproved", one.message, Timestamp::now());
                let api: Api<CertificateSigningRequest> = Api::all(self.client.clone());
                gone_is_fine(api.replace_subresource("approval", name, &PostParams::default(), &updated).await)?;
                info!(csr = %name, user = csr.spec.username, subject = asked.common_name, "approved");
                return Ok(Next::Settled);
            }
        }
        if recognized.is_empty() {
            return Ok(Next::Settled);
        }
        // The right may be given a moment later: bindings are made while nodes join already.
        Err(SyncError::Waiting(format!(
            "{} to be allowed to ask for a node's certificate",
            csr.spec.username.clone().unwrap_or_default()
        )))
    }
}

// === signing ===

struct Signer {
    client: Client,
    requests: Informer<CertificateSigningRequest>,
    authorities: BTreeMap<&'static str, Authority>,
}

/// Signs what was approved; runs until shutdown, for the signers that have `--cluster-signing-*-file`s.
pub async fn start_signing(context: Arc<Context>) {
    let files = match context.settings.authorities() {
        Ok(files) => files,
        Err(why) => {
            error!(why, "no certificates are signed");
            return;
        }
    };
    if files.is_empty() {
        return;
    }
    let longest = context.settings.cluster_signing_duration;
    let authority = |(signer, certificate, key)| (signer, Authority { certificate, key, longest });
    let authorities = files.into_iter().map(authority).collect();
    let Some(client) = context.client_for(ACCOUNT).await else { return };
    let requests = context.informers.get::<CertificateSigningRequest>();
    let queue = Arc::new(WorkQueue::new("certificate"));
    wake_on_change(&requests, &queue);
    requests.synced().await;
    run("csrsigning", queue, Arc::new(Signer { client, requests, authorities }), 5, context.shutdown.clone()).await;
}

impl Signer {
    async fn write(&self, csr: &CertificateSigningRequest) -> Result<(), kube::Error> {
        let api: Api<CertificateSigningRequest> = Api::all(self.client.clone());
        gone_is_fine(api.replace_status(&csr.name_any(), &PostParams::default(), csr).await)?;
        Ok(())
    }

    async fn fail(&self, csr: &CertificateSigningRequest, reason: &str, message: &str) -> Result<Next, SyncError> {
        warn!(csr = csr.name_any(), reason, message, "request failed");
        self.write(&request::with_condition(csr, "Failed", reason, message, Timestamp::now())).await?;
        Ok(Next::Settled)
    }
}

impl Reconcile for Signer {
    type Key = String;

    async fn reconcile(&self, name: &String) -> Result<Next, SyncError> {
        let Some(csr) = self.requests.get("", name) else { return Ok(Next::Settled) };
        let approved = request::has_condition(&csr, "Approved") && !request::has_condition(&csr, "Denied");
        let Some(authority) = self.authorities.get(csr.spec.signer_name.as_str()) else { return Ok(Next::Settled) };
        if !approved || request::has_condition(&csr, "Failed") || request::certificate(&csr).is_some() {
            return Ok(Next::Settled);
        }
        let asked = match request::read(&csr.spec.request.0) {
            Ok(asked) => asked,
            Err(why) => return Err(SyncError::Invalid(format!("unable to parse csr {name:?}: {why}"))),
        };
        if let Err(message) = request::check_for_signer(&asked, &csr.spec) {
            return self.fail(&csr, "SignerValidationFailure", &message).await;
        }
        match authority.sign(&asked, &csr.spec, time::OffsetDateTime::now_utc()).await {
            Ok(certificate) => {
                let mut updated = csr.as_ref().clone();
                updated.status.get_or_insert_default().certificate = Some(ByteString(certificate.into_bytes()));
                self.write(&updated).await?;
                info!(csr = %name, signer = csr.spec.signer_name, subject = asked.common_name, "signed");
                Ok(Next::Settled)
            }
            Err(error) => Err(SyncError::Invalid(format!("error auto signing csr: {error}"))),
        }
    }
}

// === cleaning ===

/// Removes requests that have served their time; runs until shutdown.
pub async fn start_cleaning(context: Arc<Context>) {
    let Some(client) = context.client_for(ACCOUNT).await else { return };
    let requests = context.informers.get::<CertificateSigningRequest>();
    requests.synced().await;
    let api: Api<CertificateSigningRequest> = Api::all(client);
    let mut ticks = tokio::time::interval(CLEANING_PERIOD);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = context.shutdown.cancelled() => return,
        }
        for csr in requests.list() {
            let expires = request::certificate(&csr).and_then(|pem| component_base::x509::read_pem(pem).ok());
            if request::is_stale(&csr, expires.map(|e| e.not_after), Timestamp::now())
                && let Err(error) = gone_is_fine(api.delete(&csr.name_any(), &DeleteParams::default()).await)
            {
                warn!(csr = csr.name_any(), %error, "old request not removed; will retry");
            }
        }
    }
}
