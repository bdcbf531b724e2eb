//! A ClusterTrustBundle tells by whom the API server's serving certificate is signed. Only where the feature is on.
use crate::runtime::{Context, Next, Reconcile, SyncError, WorkQueue, gone_is_fine, run};
use component_base::informer::Informer;
use k8s_openapi::api::certificates::v1beta1::{ClusterTrustBundle, ClusterTrustBundleSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{DeleteParams, PostParams, WatchParams};
use kube::{Api, ResourceExt as _};
use sha2::{Digest as _, Sha256};
use std::sync::Arc;
use tracing::info;

const NAME: &str = "ca_cert_publisher_cluster_trust_bundles";
const ACCOUNT: &str = "kube-apiserver-serving-clustertrustbundle-publisher";
const SIGNER: &str = "kubernetes.io/kube-apiserver-serving";
/// So much of its digest is in a bundle's name.
const DIGEST_BYTES: usize = 12;

struct Publisher {
    bundles: Api<ClusterTrustBundle>,
    known: Informer<ClusterTrustBundle>,
    certificate: String,
}

/// Runs until shutdown, if there is a `--root-ca-file`.
pub async fn start(context: Arc<Context>) {
    let what = "there will be no trust bundle of it";
    let Some(certificate) = context.settings.root_ca(what).await else { return };
    let Some(client) = context.client_for(ACCOUNT).await else { return };
    let bundles = Api::<ClusterTrustBundle>::all(client);
    let ours = WatchParams::default().fields(&format!("spec.signerName={SIGNER}"));
    let known = Informer::start(bundles.clone(), ours);
    let queue = Arc::new(WorkQueue::new(NAME));
    let to = queue.clone();
    known.on_change(move |_| to.add(String::new()));
    known.synced().await;
    queue.add(String::new());
    run(NAME, queue, Arc::new(Publisher { bundles, known, certificate }), 1, context.shutdown.clone()).await;
}

/// What is to be done about the signer's bundles. As `syncClusterTrustBundle`.
#[derive(Debug, Default, PartialEq)]
struct Plan {
    create: Option<ClusterTrustBundle>,
    update: Option<ClusterTrustBundle>,
    delete: Vec<String>,
}

fn plan<'b>(certificate: &str, existing: impl Iterator<Item = &'b ClusterTrustBundle>) -> Plan {
    let name = name_of(certificate);
    let mut plan = Plan::default();
    let mut found = false;
    for bundle in existing {
        if bundle.name_any() != name {
            plan.delete.push(bundle.name_any());
            continue;
        }
        found = true;
        if bundle.spec.trust_bundle != certificate {
            let mut wanted = bundle.clone();
            certificate.clone_into(&mut wanted.spec.trust_bundle);
            plan.update = Some(wanted);
        }
    }
    if !found {
        plan.create = Some(ClusterTrustBundle {
            metadata: ObjectMeta { name: Some(name), ..ObjectMeta::default() },
            spec: ClusterTrustBundleSpec { signer_name: Some(SIGNER.to_owned()), trust_bundle: certificate.to_owned() },
        });
    }
    plan
}

/// As `constructBundleName`.
fn name_of(certificate: &str) -> String {
    let digest = Sha256::digest(certificate.as_bytes());
    let digest: String = digest.iter().take(DIGEST_BYTES).map(|byte| format!("{byte:02x}")).collect();
    format!("{}:{digest}", SIGNER.replace('/', ":"))
}

impl Reconcile for Publisher {
    type Key = String;

    async fn reconcile(&self, _: &String) -> Result<Next, SyncError> {
        let known = self.known.list();
        let plan = plan(&self.certificate, known.iter().map(AsRef::as_ref));
        if let Some(bundle) = &plan.create {
            self.bundles.create(&PostParams::default(), bundle).await?;
            info!(bundle = bundle.name_any(), "published");
        }
        if let Some(bundle) = &plan.update {
            self.bundles.replace(&bundle.name_any(), &PostParams::default(), bundle).await?;
        }
        for old in &plan.delete {
            gone_is_fine(self.bundles.delete(old, &DeleteParams::default()).await)?;
        }
        Ok(Next::Settled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_is_one_bundle_and_it_is_right() {
        let made = plan("cert", std::iter::empty()).create.unwrap();
        // The digest is of the text: `printf cert | sha256sum`.
        assert_eq!(made.name_any(), "kubernetes.io:kube-apiserver-serving:06298432e8066b29e2223bcc");
        assert_eq!((made.spec.signer_name.as_deref(), made.spec.trust_bundle.as_str()), (Some(SIGNER), "cert"));
        assert_eq!(plan("cert", [&made].into_iter()), Plan::default());
        let mut tampered = made.clone();
        tampered.spec.trust_bundle = "other".to_owned();
        assert_eq!(plan("cert", [&tampered].into_iter()).update, Some(made.clone()));
        let renewed = plan("renewed", [&made].into_iter());
        assert_eq!(renewed.delete, [made.name_any()]);
        assert_ne!(renewed.create.unwrap().name_any(), made.name_any());
    }
}
