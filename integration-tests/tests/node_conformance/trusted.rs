//! Whom pods trust and who they are: trust bundles and certificates in their volumes. Both are off by default, and the cluster is
//! told to have them.

use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use component_base::pem;
use k8s_openapi::api::certificates::v1beta1::{ClusterTrustBundle, PodCertificateRequest};
use k8s_openapi::api::core::v1::Event;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ListParams, PostParams};

use super::*;

const SIGNER: &str = "tests.example.com/signs";
const UNWILLING: &str = "tests.example.com/never-signs";
const GATES: &str = "ClusterTrustBundle ClusterTrustBundleProjection PodCertificateRequest";
const VALID: Duration = Duration::from_secs(7200);

/// An authority of the test's own.
struct Authority {
    certificate: String,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    fn new(name: &str) -> Self {
        let key = rcgen::KeyPair::generate().expect("a key");
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = params.self_signed(&key).expect("a certificate").pem();
        Self { certificate, issuer: rcgen::Issuer::new(params, key) }
    }

    /// A status that issues what was asked for.
    fn issue(&self, request: &PodCertificateRequest) -> Value {
        let asked = request_of(request);
        let text = pem::encode("CERTIFICATE REQUEST", &asked);
        let mut asked = rcgen::CertificateSigningRequestParams::from_pem(&text).expect("a request");
        let now = Timestamp::from_second(Timestamp::now().as_second()).expect("a time");
        let until = now + VALID;
        (asked.params.not_before, asked.params.not_after) =
            (SystemTime::from(now).into(), SystemTime::from(until).into());
        let leaf = asked.signed_by(&self.issuer).expect("a certificate").pem();
        json!({
            "conditions": [verdict("Issued")],
            "certificateChain": format!("of a test\n{leaf}{}", self.certificate),
            "notBefore": now, "notAfter": until, "beginRefreshAt": now + VALID / 2,
        })
    }
}

fn request_of(request: &PodCertificateRequest) -> Vec<u8> {
    let spec = serde_json::to_value(&request.spec).expect("a spec");
    STANDARD.decode(spec["stubPKCS10Request"].as_str().unwrap_or_default()).expect("base64")
}

fn verdict(kind: &str) -> Value {
    json!({"type": kind, "status": "True", "reason": "AsTested", "message": "so it is",
        "lastTransitionTime": apimachinery::time::rfc3339(Timestamp::now())})
}

/// Answers requests until it is dropped: issues what one signer is asked for, and denies the other.
async fn sign(client: Client, authority: Authority) {
    let all = Api::<PodCertificateRequest>::all(client.clone());
    loop {
        let open = all.list(&ListParams::default()).await.map(|list| list.items).unwrap_or_default();
        for request in open.iter().filter(|request| request.status.as_ref().is_none_or(|s| s.conditions.is_none())) {
            let status = match request.spec.signer_name.as_str() {
                SIGNER => authority.issue(request),
                UNWILLING => json!({"conditions": [verdict("Denied")]}),
                _ => continue,
            };
            let namespace = request.metadata.namespace.as_deref().unwrap_or_default();
            let requests = Api::<PodCertificateRequest>::namespaced(client.clone(), namespace);
            let name = request.metadata.name.as_deref().unwrap_or_default();
            // What was not taken is seen again.
            _ = requests.patch_status(name, &PatchParams::default(), &Patch::Merge(json!({"status": status}))).await;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// The rest of a task's life is this value's.
struct Running(tokio::task::JoinHandle<()>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Node {
    /// Must be the last that is done with a cluster: it is another one afterwards.
    pub(super) async fn trust_is_given(&self, cluster: &Cluster) {
        self.switch_on_trust(cluster).await;
        let (one, two, three) = (Authority::new("one"), Authority::new("two"), Authority::new("three"));
        let bundles = Api::<ClusterTrustBundle>::all(self.client.clone());
        let bundle = |name: &str, signer: Option<&str>, text: String| -> ClusterTrustBundle {
            serde_json::from_value(json!({"metadata": {"name": name, "labels": {"of": "test"}},
                "spec": {"signerName": signer, "trustBundle": text}}))
            .expect("a bundle")
        };
        for made in [
            bundle("plain", None, one.certificate.clone()),
            bundle("tests.example.com:signs:one", Some(SIGNER), format!("{}{}", one.certificate, two.certificate)),
            bundle("tests.example.com:signs:two", Some(SIGNER), format!("text\n{}", two.certificate)),
        ] {
            bundles.create(&PostParams::default(), &made).await.expect("made");
        }
        let (updated, second) = (format!("{}{}", one.certificate, two.certificate), three.certificate.clone());
        let _signing = Running(tokio::spawn(sign(self.client.clone(), three)));

        let projected = |sources: Value| json!([{"name": "v", "projected": {"sources": sources}}]);
        let mounted = |script: &str| {
            let mut container = sh("c", script);
            container["volumeMounts"] = json!([{"name": "v", "mountPath": "/v"}]);
            json!([container])
        };
        let certificate = |signer: &str| {
            json!({"podCertificate": {"signerName": signer, "keyType": "ECDSAP256", "credentialBundlePath": "all.pem",
                "keyPath": "key.pem", "certificateChainPath": "chain.pem", "maxExpirationSeconds": 7200,
                "userAnnotations": {"tests.example.com/asks": "for-it"}}})
        };
        let labels = json!({"matchLabels": {"of": "test"}});
        let script = "cd /v; for f in plain.pem signer.pem none.pem chain.pem; do echo $f $(grep -c BEGIN $f); done; \
                      cat key.pem chain.pem | cmp - all.pem && cat all.pem; echo done; \
                      until [ $(grep -c BEGIN plain.pem) = 2 ]; do sleep 1; done; echo updated";
        let sources = json!([
            {"clusterTrustBundle": {"name": "plain", "path": "plain.pem"}},
            {"clusterTrustBundle": {"signerName": SIGNER, "labelSelector": labels, "path": "signer.pem"}},
            {"clusterTrustBundle": {"name": "there-is-none", "optional": true, "path": "none.pem"}},
            certificate(SIGNER),
        ]);
        self.run("trusts", json!({"containers": mounted(script), "volumes": projected(sources)})).await;
        let unwilling = projected(json!([certificate(UNWILLING)]));
        self.run("denied", json!({"containers": mounted("true"), "volumes": unwilling})).await;
        let missing = projected(json!([{"clusterTrustBundle": {"name": "comes-later", "path": "a"}}]));
        self.run("waits", json!({"containers": mounted("cat /v/a"), "volumes": missing})).await;

        self.until("trusts", "running", |pod| matches!(apimachinery::pod::phase(pod), "Running" | "Succeeded")).await;
        let log = eventually("what the pod was given", MINUTES, || async {
            let log = self.log("trusts").await;
            if log.lines().any(|line| line == "done") { Ok(log) } else { Err(log) }
        })
        .await;
        for line in ["plain.pem 1", "signer.pem 2", "none.pem 0", "chain.pem 2"] {
            assert!(log.lines().any(|l| l == line), "{line}: {log}");
        }
        let blocks = pem::blocks(&log);
        let labels: Vec<&str> = blocks.iter().map(|block| block.label.as_str()).collect();
        assert_eq!(labels, ["PRIVATE KEY", "CERTIFICATE", "CERTIFICATE"], "{log}");
        let key = rcgen::KeyPair::from_pem(&pem::encode("PRIVATE KEY", &blocks[0].bytes)).expect("a key");
        let public = key.public_key_raw();
        assert!(blocks[1].bytes.windows(public.len()).any(|part| part == public), "the certificate is the key's");
        assert_eq!(pem::encode(pem::CERTIFICATE, &blocks[2].bytes), second.replace("\r\n", "\n"));

        let requests = Api::<PodCertificateRequest>::namespaced(self.client.clone(), "default");
        let of_pod = ListParams::default().fields("spec.podName=trusts");
        let asked = requests.list(&of_pod).await.expect("requests").items.remove(0);
        let annotations = asked.spec.unverified_user_annotations.unwrap_or_default();
        assert_eq!(annotations.get("tests.example.com/asks").map(String::as_str), Some("for-it"));
        assert_eq!(
            (asked.spec.max_expiration_seconds, asked.spec.service_account_name.as_str()),
            (Some(7200), "default")
        );

        // Bundles that change, and that come, are seen; a refusal is told.
        let change = Patch::Merge(json!({"spec": {"trustBundle": updated}}));
        bundles.patch("plain", &PatchParams::default(), &change).await.expect("changed");
        let later = bundle("comes-later", None, one.certificate.clone());
        bundles.create(&PostParams::default(), &later).await.expect("made");
        self.patch("trusts", json!({"metadata": {"annotations": {"look": "again"}}})).await;
        self.phase("trusts", "Succeeded").await;
        self.phase("waits", "Succeeded").await;
        let events = Api::<Event>::namespaced(self.client.clone(), "default");
        for (reason, part) in [
            ("Denied", "was denied, reason=\"AsTested\", message=\"so it is\""),
            ("FailedMount", "PodCertificateRequest was permanently denied: reason=\"AsTested\" message=\"so it is\""),
        ] {
            let of_pod = ListParams::default().fields(&format!("involvedObject.name=denied,reason={reason}"));
            eventually(&format!("event {reason}"), MINUTES, || async {
                let told = events.list(&of_pod).await.map_err(|e| e.to_string())?.items;
                let messages: Vec<String> = told.into_iter().filter_map(|event| event.message).collect();
                if messages.iter().any(|message| message.contains(part)) {
                    Ok(())
                } else {
                    Err(format!("{messages:?}"))
                }
            })
            .await;
        }
        self.remove(&["trusts", "denied", "waits"]).await;
    }

    /// Has the API server and the kubelet begin anew with the features on.
    async fn switch_on_trust(&self, cluster: &Cluster) {
        let flags: Vec<String> = GATES.split(' ').map(|gate| format!("{gate}=true")).collect();
        let flags = format!("--runtime-config=certificates.k8s.io/v1beta1=true --feature-gates={}", flags.join(","));
        let gates: Vec<String> = GATES.split(' ').map(|gate| format!("\"{gate}\": true")).collect();
        let config = format!(
            "{{\"apiVersion\": \"kubelet.config.k8s.io/v1beta1\", \"kind\": \"KubeletConfiguration\", \"featureGates\": {{{}}}}}",
            gates.join(", ")
        );
        cluster.hosts[0]
            .exec(&format!(
                "set -e; sed -i 's|\"$| {flags}\"|' /etc/kubernetes/flags/apiserver.env; \
                 echo '{config}' >/etc/kubernetes/kubelet.conf.d/trust.conf"
            ))
            .success();
        cluster.kill(0, "apiserver");
        let bundles = Api::<ClusterTrustBundle>::all(self.client.clone());
        eventually("trust bundles are served", MINUTES, || async {
            let ready = http::Request::get("/readyz").body(Vec::new()).expect("a request");
            self.client.request_text(ready).await.map_err(|e| e.to_string())?;
            bundles.list(&ListParams::default()).await.map(|_| ()).map_err(|e| e.to_string())
        })
        .await;
        cluster.kubelet_anew(0);
    }
}
