//! Which cluster, as whom: kubeconfig files as kubectl reads them (`--kubeconfig`, the list in `$KUBECONFIG`,
//! `~/.kube/config`), the ServiceAccount inside a pod, and the flags that override them.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use kube::config::{AuthInfo, KubeConfigOptions, Kubeconfig};
use serde_json::json;

use crate::flags::GlobalFlags;

/// Where kubectl looks if there is nothing else.
const FALLBACK_SERVER: &str = "http://localhost:8080";

/// The files that make up the kubeconfig, in order of precedence; the last resort may not exist.
pub(crate) fn kubeconfig_paths(flags: &GlobalFlags) -> Vec<PathBuf> {
    if let Some(path) = &flags.kubeconfig {
        return vec![path.clone()];
    }
    if let Some(list) = std::env::var_os("KUBECONFIG").filter(|list| !list.is_empty()) {
        return std::env::split_paths(&list).filter(|path| !path.as_os_str().is_empty()).collect();
    }
    let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    vec![home.join(".kube").join("config")]
}

/// What the files say.
pub(crate) struct Source {
    pub(crate) kubeconfig: Option<Kubeconfig>,
}

impl Source {
    /// Reads and merges the files.
    pub(crate) fn read(flags: &GlobalFlags) -> Result<Source> {
        let explicit = flags.kubeconfig.is_some();
        let mut merged: Option<Kubeconfig> = None;
        for path in kubeconfig_paths(flags) {
            if !path.exists() {
                if explicit {
                    bail!("stat {}: no such file or directory", path.display());
                }
                continue;
            }
            if path.metadata().is_ok_and(|meta| meta.len() == 0) {
                continue;
            }
            let next = Kubeconfig::read_from(&path)
                .with_context(|| format!("error loading config file \"{}\"", path.display()))?;
            merged = Some(match merged {
                Some(former) => former.merge(next)?,
                None => next,
            });
        }
        Ok(Source { kubeconfig: merged })
    }

    /// The connection that the files and the flags describe.
    pub(crate) async fn client_config(self, flags: &GlobalFlags) -> Result<kube::Config> {
        let options = KubeConfigOptions {
            context: flags.context.clone(),
            cluster: flags.cluster.clone(),
            user: flags.user.clone(),
        };
        let usable = self.kubeconfig.filter(|kubeconfig| {
            options.context.is_some()
                || options.cluster.is_some()
                || kubeconfig.current_context.as_ref().is_some_and(|name| !name.is_empty())
        });
        let mut config = match usable {
            Some(kubeconfig) => {
                let contexts = &kubeconfig.contexts;
                if let Some(name) = &options.context
                    && !contexts.iter().any(|context| context.name == *name)
                {
                    bail!("context {name:?} does not exist");
                }
                kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.context("invalid configuration")?
            }
            None => match kube::Config::incluster() {
                Ok(config) => config,
                Err(_) => kube::Config::new(FALLBACK_SERVER.parse()?),
            },
        };
        override_with(&mut config, flags)?;
        Ok(config)
    }
}

fn override_with(config: &mut kube::Config, flags: &GlobalFlags) -> Result<()> {
    if let Some(server) = &flags.server {
        let url = if server.contains("://") { server.clone() } else { format!("http://{server}") };
        config.cluster_url = url.parse().with_context(|| format!("--server {server}"))?;
    }
    if let Some(token) = &flags.token {
        let with_token: AuthInfo = serde_json::from_value(json!({"token": token}))?;
        config.auth_info.token = with_token.token;
        config.auth_info.token_file = None;
    }
    if let Some(path) = &flags.certificate_authority {
        config.root_cert = None;
        config.root_cert_file = Some(path.clone());
    }
    let text = |path: &PathBuf| path.display().to_string();
    if let Some(path) = &flags.client_certificate {
        config.auth_info.client_certificate = Some(text(path));
        config.auth_info.client_certificate_data = None;
    }
    if let Some(path) = &flags.client_key {
        config.auth_info.client_key = Some(text(path));
        config.auth_info.client_key_data = None;
    }
    if flags.insecure_skip_tls_verify {
        config.accept_invalid_certs = true;
    }
    if let Some(name) = &flags.tls_server_name {
        config.tls_server_name = Some(name.clone());
    }
    if let Some(user) = &flags.impersonate_user {
        config.auth_info.impersonate = Some(user.clone());
    }
    if !flags.impersonate_groups.is_empty() {
        config.auth_info.impersonate_groups = Some(flags.impersonate_groups.clone());
    }
    Ok(())
}
