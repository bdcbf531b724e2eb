//! `--admission-control-config-file`: the configuration of each plugin, in the file or in one beside it.
use anyhow::Context as _;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "camelCase")]
struct AdmissionConfiguration {
    api_version: String,
    kind: String,
    #[serde(default)]
    plugins: Vec<PluginConfiguration>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PluginConfiguration {
    name: String,
    #[serde(default)]
    path: PathBuf,
    #[serde(default)]
    configuration: Option<Value>,
}

/// Plugins' configurations by their names.
pub fn read(path: &Path) -> anyhow::Result<BTreeMap<String, Value>> {
    let file: AdmissionConfiguration = serde_json::from_value(document(path)?)
        .with_context(|| format!("--admission-control-config-file: {}", path.display()))?;
    anyhow::ensure!(
        file.api_version == "apiserver.config.k8s.io/v1" && file.kind == "AdmissionConfiguration",
        "--admission-control-config-file: {}: {} {:?} is no AdmissionConfiguration",
        path.display(),
        file.api_version,
        file.kind
    );
    let mut configurations = BTreeMap::new();
    for plugin in file.plugins {
        let configuration = match plugin.configuration {
            Some(configuration) => configuration,
            None if plugin.path.as_os_str().is_empty() => continue,
            // Relative to the file that names it.
            None => document(&path.with_file_name("").join(&plugin.path))?,
        };
        configurations.insert(plugin.name, configuration);
    }
    Ok(configurations)
}

/// The configuration of a plugin; what it is without being told if the file has none.
pub fn take<C: DeserializeOwned + Default>(all: &mut BTreeMap<String, Value>, plugin: &str) -> anyhow::Result<C> {
    let given = all.remove(plugin).map(serde_json::from_value).transpose();
    Ok(given.with_context(|| format!("--admission-control-config-file: {plugin}"))?.unwrap_or_default())
}

fn document(path: &Path) -> anyhow::Result<Value> {
    let text = std::fs::read_to_string(path).with_context(|| format!("{}", path.display()))?;
    let documents =
        apimachinery::yaml::documents(&text).map_err(|error| anyhow::anyhow!("{}: {error}", path.display()))?;
    documents.into_iter().next().with_context(|| format!("{}: there is nothing in it", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn plugins_are_configured_in_the_file_or_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("admission.yaml");
        std::fs::write(directory.path().join("other.yaml"), "a: 1\n").unwrap();
        let text = "apiVersion: apiserver.config.k8s.io/v1\nkind: AdmissionConfiguration\nplugins:\n\
            - name: PodSecurity\n  configuration:\n    defaults: {enforce: baseline}\n- name: Other\n  path: other.yaml\n";
        std::fs::write(&file, text).unwrap();
        let read_back = json!(read(&file).unwrap());
        assert_eq!(read_back, json!({"PodSecurity": {"defaults": {"enforce": "baseline"}}, "Other": {"a": 1}}));
        std::fs::write(&file, "apiVersion: v1\nkind: Pod\n").unwrap();
        assert!(read(&file).is_err());
    }
}
