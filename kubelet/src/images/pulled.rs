//! Which images this kubelet fetched, and with whose credentials: what one pod's secret fetched is no other pod's to use only
//! because it is there. As Kubernetes' image pull manager (`imagePullCredentialsVerificationPolicy`), whose files these are:
//! `image_manager/pulled` has a record an image, `image_manager/pulling` the names of fetches that were begun.

use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::credentials::Credentials;
use super::reference::ImageReference;

/// Secrets that are remembered for one name of an image.
const MAX_SECRETS: usize = 100;
/// A record of an image that is not there is kept so long: the image may just have come.
const PRUNE_AFTER: Duration = Duration::from_secs(600);

/// Of which images pods must show that they may have them.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Verification {
    Never,
    /// Of those that a kubelet fetched.
    #[default]
    NotPreloaded,
    /// Of all but these repositories; one that ends in `/*` means all below it.
    NotListed(Vec<String>),
    Always,
}

/// A secret that opened a registry.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SecretSource {
    pub uid: String,
    pub namespace: String,
    pub name: String,
    pub credential_hash: String,
}

/// Who may use an image that is present.
#[derive(Debug, PartialEq, Eq)]
pub enum Access {
    All,
    /// Pods that have one of these secrets.
    Secrets(Vec<SecretSource>),
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Record {
    kind: String,
    api_version: String,
    last_updated_time: String,
    image_ref: String,
    /// By repository.
    credential_mapping: BTreeMap<String, Mapping>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Mapping {
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kubernetes_secrets: Vec<SecretSource>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    node_pods_accessible: bool,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    preloaded: bool,
}

/// The records, as files.
#[derive(Debug)]
pub struct PulledRecords {
    directory: PathBuf,
    verification: Verification,
}

// === impl Verification ===

impl Verification {
    /// By the setting's word; None: there is no such policy.
    pub fn parse(policy: &str, allowed: Vec<String>) -> Option<Verification> {
        match policy {
            "NeverVerify" => Some(Verification::Never),
            "" | "NeverVerifyPreloadedImages" => Some(Verification::NotPreloaded),
            "NeverVerifyAllowlistedImages" => Some(Verification::NotListed(allowed)),
            "AlwaysVerify" => Some(Verification::Always),
            _ => None,
        }
    }

    fn applies(&self, repository: &str, pulled_by_us: bool) -> bool {
        let below = |listed: &String| match listed.strip_suffix("/*") {
            Some(parent) => repository.strip_prefix(parent).is_some_and(|rest| rest.starts_with('/')),
            None => repository == listed,
        };
        match self {
            Verification::Never => false,
            Verification::NotPreloaded => pulled_by_us,
            Verification::NotListed(listed) => !listed.iter().any(below),
            Verification::Always => true,
        }
    }
}

// === impl SecretSource ===

impl SecretSource {
    /// Whether this is the same secret, or has the same credentials.
    fn is(&self, other: &SecretSource) -> bool {
        let same_hash = !self.credential_hash.is_empty() && self.credential_hash == other.credential_hash;
        same_hash || (&self.uid, &self.namespace, &self.name) == (&other.uid, &other.namespace, &other.name)
    }
}

// === impl PulledRecords ===

impl PulledRecords {
    /// Below the kubelet's root directory.
    pub fn new(root_dir: &Path, verification: Verification) -> io::Result<PulledRecords> {
        let directory = root_dir.join("image_manager");
        for part in ["pulling", "pulled"] {
            std::fs::create_dir_all(directory.join(part))?;
        }
        Ok(PulledRecords { directory, verification })
    }

    /// A fetch begins: if the kubelet dies before it has ended, the image is known to be fetched all the same.
    pub fn begun(&self, image: &str) {
        let intent = serde_json::json!({"kind": "ImagePullIntent", "apiVersion": "kubelet.config.k8s.io/v1beta1", "image": image});
        self.told(write(&self.file("pulling", image), &intent.to_string()));
    }

    /// A fetch is over, well or not.
    pub fn ended(&self, image: &str) {
        match std::fs::remove_file(self.file("pulling", image)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => self.told(Err(error)),
            _ => {}
        }
    }

    /// An image was fetched, or found to be open to a secret; None: to anybody's.
    pub fn opened(&self, reference: &ImageReference, id: &str, by: Option<&SecretSource>) {
        let mut record = self.read(id).and_then(Result::ok).unwrap_or_default();
        let mapping = record.credential_mapping.entry(reference.repository()).or_default();
        let before = mapping.clone();
        mapping.preloaded = false;
        match by {
            None => *mapping = Mapping { node_pods_accessible: true, ..Default::default() },
            Some(_) if mapping.node_pods_accessible => {}
            Some(secret) if mapping.kubernetes_secrets.contains(secret) => {}
            Some(secret) => {
                mapping.kubernetes_secrets.retain(|known| known.uid != secret.uid || known.name != secret.name);
                mapping.kubernetes_secrets.truncate(MAX_SECRETS - 1);
                mapping.kubernetes_secrets.push(secret.clone());
            }
        }
        if *mapping == before && !record.image_ref.is_empty() {
            return;
        }
        record.kind = "ImagePulledRecord".to_owned();
        record.api_version = "kubelet.config.k8s.io/v1beta1".to_owned();
        record.last_updated_time = apimachinery::time::rfc3339(jiff::Timestamp::now());
        record.image_ref = id.to_owned();
        let text = serde_json::to_string(&record).map_err(io::Error::other);
        self.told(text.and_then(|text| write(&self.file("pulled", id), &text)));
    }

    /// Who may use an image that is there. As `MustAttemptImagePull`.
    pub fn access(&self, reference: &ImageReference, id: &str) -> Access {
        let repository = reference.repository();
        let record = self.read(id);
        let ours = match &record {
            Some(Ok(record)) => match record.credential_mapping.get(&repository) {
                Some(mapping) => !mapping.preloaded,
                None => record.credential_mapping.values().any(|mapping| !mapping.preloaded),
            },
            Some(Err(_)) => true,
            None => false,
        };
        let ours = ours || self.file("pulling", &reference.to_string()).exists();
        if !self.verification.applies(&repository, ours) {
            return Access::All;
        }
        let mut record = record.and_then(Result::ok).unwrap_or_default();
        match record.credential_mapping.remove(&repository) {
            Some(mapping) if mapping.node_pods_accessible => Access::All,
            mapping => Access::Secrets(mapping.unwrap_or_default().kubernetes_secrets),
        }
    }

    /// Forgets images that the runtime no longer has.
    pub fn prune(&self, present: &HashSet<String>) {
        for entry in std::fs::read_dir(self.directory.join("pulled")).into_iter().flatten().flatten() {
            let age = entry.metadata().and_then(|meta| meta.modified()).map(|at| at.elapsed().unwrap_or_default());
            let record = std::fs::read(entry.path()).ok().and_then(|text| serde_json::from_slice::<Record>(&text).ok());
            let known = record.is_some_and(|record| present.contains(&record.image_ref));
            if !known && age.is_ok_and(|age| age > PRUNE_AFTER) {
                self.told(std::fs::remove_file(entry.path()));
            }
        }
    }

    /// None: there is no record. An error: there is one that cannot be read.
    fn read(&self, id: &str) -> Option<Result<Record, ()>> {
        match std::fs::read(self.file("pulled", id)) {
            Ok(text) => Some(serde_json::from_slice(&text).map_err(|_| ())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(_) => Some(Err(())),
        }
    }

    fn file(&self, part: &str, name: &str) -> PathBuf {
        self.directory.join(part).join(format!("sha256-{}", hash(name)))
    }

    fn told(&self, done: io::Result<()>) {
        if let Err(error) = done {
            tracing::warn!(directory = %self.directory.display(), %error, "image pull records not kept");
        }
    }
}

/// The pod's secret that is among those with access.
pub fn admitted<'c>(own: &'c [Credentials], access: &[SecretSource]) -> Option<&'c SecretSource> {
    own.iter().filter_map(|own| own.source.as_ref()).find(|own| access.iter().any(|known| known.is(own)))
}

/// SHA-256, in hexadecimal.
pub(super) fn hash(text: &str) -> String {
    Sha256::digest(text.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn write(path: &Path, text: &str) -> io::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::rename(new, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(name: &str, hash: &str) -> SecretSource {
        SecretSource { uid: name.into(), namespace: "ns".into(), name: name.into(), credential_hash: hash.into() }
    }

    #[test]
    fn what_a_secret_fetched_is_for_that_secret() {
        let root = tempfile::tempdir().expect("a directory");
        let records = PulledRecords::new(root.path(), Verification::default()).expect("directories");
        let image = ImageReference::parse("r.example/private:1").expect("a name");
        assert_eq!(records.access(&image, "sha256:1"), Access::All, "it was there before");
        records.begun(&image.to_string());
        assert_eq!(records.access(&image, "sha256:1"), Access::Secrets(vec![]), "who knows how far it came");
        records.opened(&image, "sha256:1", Some(&secret("a", "h")));
        records.ended(&image.to_string());
        let Access::Secrets(known) = records.access(&image, "sha256:1") else { panic!("open to all") };
        let own = |s: SecretSource| [Credentials { source: Some(s), ..Default::default() }];
        for (own, fine) in [
            (own(secret("a", "changed")), true),
            (own(secret("b", "h")), true),
            (own(secret("b", "other")), false),
            ([Credentials::default()], false),
        ] {
            assert_eq!(admitted(&own, &known).is_some(), fine, "{own:?}");
        }
        // Another name of the same image says nothing of this one.
        let other = ImageReference::parse("r.example/other:1").expect("a name");
        assert_eq!(records.access(&other, "sha256:1"), Access::Secrets(vec![]));
        records.opened(&image, "sha256:1", None);
        assert_eq!(records.access(&image, "sha256:1"), Access::All);
        std::fs::write(records.file("pulled", "sha256:1"), "{").expect("damaged");
        assert_eq!(records.access(&image, "sha256:1"), Access::Secrets(vec![]));
    }

    #[test]
    fn policies_say_what_is_verified() {
        let listed = || vec!["r.example/base/*".to_owned(), "r.example/app".to_owned()];
        for (policy, repository, ours, want) in [
            ("NeverVerify", "r.example/x", true, false),
            ("NeverVerifyPreloadedImages", "r.example/x", false, false),
            ("NeverVerifyPreloadedImages", "r.example/x", true, true),
            ("NeverVerifyAllowlistedImages", "r.example/base/os", true, false),
            ("NeverVerifyAllowlistedImages", "r.example/app", true, false),
            ("NeverVerifyAllowlistedImages", "r.example/apple", false, true),
            ("AlwaysVerify", "r.example/x", false, true),
        ] {
            let policy = Verification::parse(policy, listed()).expect("a policy");
            assert_eq!(policy.applies(repository, ours), want, "{policy:?} {repository}");
        }
        assert_eq!(Verification::parse("Sometimes", vec![]), None);
    }
}
