//! Credential providers: programs of the host's that know how to log in to registries (`--image-credential-provider-config`). Each is
//! asked for the images that it names, and its answer is kept for as long as it says.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::credentials::{Credentials, RegistryPattern};
use super::reference::ImageReference;

const TIMEOUT: Duration = Duration::from_secs(60);
const MAX_ANSWERS: usize = 256;
const MAX_OUTPUT: usize = 1 << 20;
const CONFIG_KIND: &str = "CredentialProviderConfig";

/// Why the providers' configuration cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("credential provider config {}: {reason}", .path.display())]
pub struct ProviderError {
    path: PathBuf,
    reason: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Provider {
    name: String,
    api_version: String,
    match_images: Vec<String>,
    default_cache_duration: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<NameValue>,
}

#[derive(Debug, Deserialize)]
struct NameValue {
    name: String,
    value: String,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Answer {
    #[serde(default)]
    cache_key_type: String,
    cache_duration: Option<String>,
    #[serde(default)]
    auth: BTreeMap<String, Credentials>,
}

struct Kept {
    auth: Vec<(RegistryPattern, Credentials)>,
    until: Instant,
}

/// The providers of this node.
pub struct Providers {
    directory: PathBuf,
    list: Vec<Provider>,
    /// By provider and the key that it chose: the image, its registry, or nothing.
    kept: Mutex<BTreeMap<(String, String), Kept>>,
}

// === impl Providers ===

impl Providers {
    pub fn read(config: &Path, directory: &Path) -> Result<Providers, ProviderError> {
        let failed = |reason: String| ProviderError { path: config.to_owned(), reason };
        let text = std::fs::read_to_string(config).map_err(|e| failed(e.to_string()))?;
        let mut documents = apimachinery::yaml::documents(&text).map_err(|e| failed(e.to_string()))?;
        let Some(document) = documents.pop().filter(|_| documents.is_empty()) else {
            return Err(failed("not one document".to_owned()));
        };
        let group = document["apiVersion"].as_str().unwrap_or_default().split('/').next().unwrap_or_default();
        if document["kind"] != CONFIG_KIND || group != "kubelet.config.k8s.io" {
            return Err(failed(format!("not a {CONFIG_KIND} of kubelet.config.k8s.io")));
        }
        let list: Vec<Provider> =
            serde_json::from_value(document["providers"].clone()).map_err(|e| failed(format!("providers: {e}")))?;
        for provider in &list {
            if provider.name.contains('/') || provider.name.is_empty() || provider.name.starts_with('.') {
                return Err(failed(format!("{:?} is not the name of a program", provider.name)));
            }
            apimachinery::time::parse_duration(&provider.default_cache_duration)
                .map_err(|e| failed(format!("{}: defaultCacheDuration: {e}", provider.name)))?;
        }
        Ok(Providers { directory: directory.to_owned(), list, kept: Mutex::default() })
    }

    /// What the providers know for an image. One that fails is left out: the registry may not ask.
    pub async fn lookup(&self, image: &ImageReference) -> Vec<Credentials> {
        let mut found = Vec::new();
        for provider in &self.list {
            let patterns = provider.match_images.iter().filter_map(|p| RegistryPattern::parse(p));
            if !patterns.into_iter().any(|p| p.matches(image)) {
                continue;
            }
            match self.ask(provider, image).await {
                Ok(credentials) => found.extend(credentials),
                Err(error) => tracing::warn!(provider = provider.name, %image, error, "no credentials from a provider"),
            }
        }
        found
    }

    async fn ask(&self, provider: &Provider, image: &ImageReference) -> Result<Vec<Credentials>, String> {
        let name = image.to_string();
        let keys = [name.clone(), image.domain.clone(), String::new()];
        let fitting = |kept: &Kept| {
            kept.auth.iter().filter(|(pattern, _)| pattern.matches(image)).map(|(_, c)| c.clone()).collect::<Vec<_>>()
        };
        {
            let mut kept = self.kept.lock();
            kept.retain(|_, answer| answer.until > Instant::now());
            let known = keys.iter().find_map(|key| kept.get(&(provider.name.clone(), key.clone())));
            if let Some(known) = known.map(fitting).filter(|known| !known.is_empty()) {
                return Ok(known);
            }
        }
        let request = json!({"apiVersion": provider.api_version, "kind": "CredentialProviderRequest", "image": name});
        let answer = self.run(provider, &request).await?;
        let lasts = answer.cache_duration.as_deref().unwrap_or(&provider.default_cache_duration);
        let lasts = apimachinery::time::parse_duration(lasts).map_err(|e| format!("cacheDuration: {e}"))?;
        let auth = answer.auth.into_iter().filter_map(|(url, c)| Some((RegistryPattern::parse(&url)?, c.complete())));
        let answered = Kept { auth: auth.collect(), until: Instant::now() + lasts };
        let found = fitting(&answered);
        let key = match answer.cache_key_type.as_str() {
            "Global" => String::new(),
            "Registry" => image.domain.clone(),
            _ => name,
        };
        let mut kept = self.kept.lock();
        if kept.len() >= MAX_ANSWERS {
            kept.clear();
        }
        if !lasts.is_zero() {
            kept.insert((provider.name.clone(), key), answered);
        }
        Ok(found)
    }

    async fn run(&self, provider: &Provider, request: &Value) -> Result<Answer, String> {
        let mut command = Command::new(self.directory.join(&provider.name));
        command
            .args(&provider.args)
            .envs(provider.env.iter().map(|e| (&e.name, &e.value)))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let asked = async {
            let mut child = command.spawn()?;
            if let Some(mut input) = child.stdin.take() {
                // One that does not listen says so by its answer.
                let _ = input.write_all(request.to_string().as_bytes()).await;
            }
            child.wait_with_output().await
        };
        let output = tokio::time::timeout(TIMEOUT, asked).await.map_err(|_| "it did not answer in time".to_owned())?;
        let output = output.map_err(|e| e.to_string())?;
        if !output.status.success() {
            return Err(format!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()));
        }
        if output.stdout.len() > MAX_OUTPUT {
            return Err("its answer is too long".to_owned());
        }
        let answer: Value = serde_json::from_slice(&output.stdout).map_err(|e| format!("its answer: {e}"))?;
        if answer["kind"] != "CredentialProviderResponse" || answer["apiVersion"] != request["apiVersion"] {
            return Err(format!("its answer is a {} of {}", answer["kind"], answer["apiVersion"]));
        }
        serde_json::from_value(answer).map_err(|e| format!("its answer: {e}"))
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[tokio::test]
    async fn providers_are_asked_once_for_the_images_that_they_name() {
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("login");
        let script = format!(
            "#!/bin/sh\ngrep -q CredentialProviderRequest && echo asked $1 $WHO >>{}/log\n\
             echo '{{\"apiVersion\":\"credentialprovider.kubelet.k8s.io/v1\",\"kind\":\"CredentialProviderResponse\",\
             \"cacheKeyType\":\"Registry\",\"auth\":{{\"*.cloud.io\":{{\"username\":\"me\",\"password\":\"p\"}}}}}}'\n",
            dir.path().display()
        );
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
        let config = dir.path().join("config.yaml");
        let text = |name: &str| {
            format!(
                "apiVersion: kubelet.config.k8s.io/v1\nkind: CredentialProviderConfig\nproviders:\n- name: {name}\n  \
                 apiVersion: credentialprovider.kubelet.k8s.io/v1\n  matchImages: ['*.cloud.io']\n  \
                 defaultCacheDuration: 10m\n  args: [get]\n  env: [{{name: WHO, value: node}}]\n"
            )
        };
        std::fs::write(&config, text("../login")).unwrap();
        assert!(Providers::read(&config, dir.path()).is_err());
        std::fs::write(&config, text("login")).unwrap();
        let providers = Providers::read(&config, dir.path()).unwrap();
        for (image, want) in [("eu.cloud.io/a:1", 1), ("eu.cloud.io/b:1", 1), ("other.io/a:1", 0)] {
            let found = providers.lookup(&ImageReference::parse(image).unwrap()).await;
            assert_eq!(found.iter().filter(|c| c.username == "me").count(), want, "{image}");
        }
        assert_eq!(std::fs::read_to_string(dir.path().join("log")).unwrap(), "asked get node\n");
    }
}
