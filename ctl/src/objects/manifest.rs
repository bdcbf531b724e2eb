//! Manifests: files, directories and standard input, YAML or JSON, one document or many, lists taken apart.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use serde_json::Value;

use super::{Target, api_version, kind, name, namespace, set, targets};
use crate::cluster::{Cluster, Resource};

/// Larger files are no manifests.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// `-f` and `-R`.
#[derive(Debug, Clone, Default, Args)]
pub(crate) struct FileFlags {
    /// Files, directories or - (standard input) that hold the objects
    #[arg(short = 'f', long = "filename", value_name = "FILE", value_delimiter = ',')]
    pub(crate) filename: Vec<String>,
    /// Take the files of subdirectories as well
    #[arg(short = 'R', long, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          default_value_t = false, action = clap::ArgAction::Set)]
    pub(crate) recursive: bool,
}

/// An object and where it was read.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Manifest {
    pub(crate) source: String,
    pub(crate) object: Value,
}

impl FileFlags {
    pub(crate) fn is_empty(&self) -> bool {
        self.filename.is_empty()
    }

    /// What a command is about: the objects in the files, each in its own namespace, or else those that the words name.
    pub(crate) async fn or_named(&self, cluster: &Cluster, words: &[String]) -> Result<Vec<Target>> {
        if self.is_empty() {
            return targets(cluster, words).await;
        }
        let mut wanted = Vec::new();
        for mut manifest in self.read()? {
            let resource = manifest.locate(cluster).await?;
            let (namespace, names) = (namespace(&manifest.object).to_owned(), vec![name(&manifest.object).to_owned()]);
            wanted.push(Target { resource, namespace, names });
        }
        Ok(wanted)
    }

    /// Reads all objects, in order.
    pub(crate) fn read(&self) -> Result<Vec<Manifest>> {
        let mut manifests = Vec::new();
        for name in &self.filename {
            if name == "-" {
                let mut text = String::new();
                std::io::stdin().take(FILE_BYTES_MAX).read_to_string(&mut text).context("standard input")?;
                manifests.extend(parse("STDIN", &text)?);
                continue;
            }
            if name.starts_with("http://") || name.starts_with("https://") {
                bail!("{name}: reading manifests from URLs is not supported; fetch the file first");
            }
            let path = Path::new(name);
            if !path.exists() {
                bail!("the path {name:?} does not exist");
            }
            for file in files(path, self.recursive)? {
                let shown = file.display().to_string();
                let text = std::fs::read_to_string(&file).with_context(|| format!("error reading {shown:?}"))?;
                manifests.extend(parse(&shown, &text)?);
            }
        }
        if manifests.is_empty() {
            bail!("no objects passed to apply");
        }
        Ok(manifests)
    }
}

fn files(path: &Path, recursive: bool) -> Result<Vec<PathBuf>> {
    if !path.is_dir() {
        return Ok(vec![path.to_owned()]);
    }
    let mut entries: Vec<PathBuf> = std::fs::read_dir(path)
        .with_context(|| format!("error reading {path:?}"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    entries.sort();
    let mut found = Vec::new();
    for entry in entries {
        if entry.is_dir() {
            if recursive {
                found.extend(files(&entry, recursive)?);
            }
        } else if entry
            .extension()
            .is_some_and(|extension| extension == "yaml" || extension == "yml" || extension == "json")
        {
            found.push(entry);
        }
    }
    Ok(found)
}

/// The objects of a text; those of a list one by one.
pub(crate) fn parse(source: &str, text: &str) -> Result<Vec<Manifest>> {
    let documents = apimachinery::yaml::documents(text).map_err(|error| anyhow!("error parsing {source}: {error}"))?;
    let mut manifests = Vec::new();
    for document in documents {
        take(source, document, &mut manifests)?;
    }
    Ok(manifests)
}

fn take(source: &str, mut object: Value, manifests: &mut Vec<Manifest>) -> Result<()> {
    if kind(&object).ends_with("List") && object.get("items").is_some_and(Value::is_array) {
        if let Value::Array(items) = object["items"].take() {
            for item in items {
                take(source, item, manifests)?;
            }
        }
        return Ok(());
    }
    let missing: Vec<&str> = [("apiVersion", api_version(&object)), ("kind", kind(&object))]
        .iter()
        .filter(|(_, v)| v.is_empty())
        .map(|(k, _)| *k)
        .collect();
    if !missing.is_empty() {
        bail!(
            "error validating {source:?}: error validating data: [{}]; if you choose to ignore these errors, turn validation off with --validate=false",
            missing.iter().map(|field| format!("{field} not set")).collect::<Vec<_>>().join(", ")
        );
    }
    manifests.push(Manifest { source: source.to_owned(), object });
    Ok(())
}

impl Manifest {
    /// The object's resource; its namespace is filled in, or held against the one on the command line.
    pub(crate) async fn locate(&mut self, cluster: &Cluster) -> Result<Resource> {
        let resource = cluster
            .resource_of_kind(api_version(&self.object), kind(&self.object))
            .await
            .with_context(|| format!("unable to recognize {:?}", self.source))?;
        if resource.namespaced {
            let own = namespace(&self.object);
            if own.is_empty() {
                set(&mut self.object, &["metadata", "namespace"], cluster.namespace.clone().into());
            } else if cluster.namespace_given && own != cluster.namespace {
                bail!(
                    "the namespace from the provided object {own:?} does not match the namespace {:?}. You must pass '--namespace={own}' to perform this operation.",
                    cluster.namespace
                );
            }
        }
        Ok(resource)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::objects::name;

    #[test]
    fn documents_and_lists_are_taken_apart() {
        let text = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\n# nothing\n---\napiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Pod, metadata: {name: b}}\n- {apiVersion: v1, kind: Pod, metadata: {name: c}}\n";
        let names: Vec<String> =
            parse("f", text).expect("manifests").iter().map(|m| name(&m.object).to_owned()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        let json = r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "j"}}"#;
        assert_eq!(parse("f", json).expect("json").len(), 1);
    }

    #[test]
    fn an_object_without_a_kind_is_named() {
        let error = parse("f.yaml", "metadata: {name: a}").expect_err("no kind").to_string();
        assert!(
            error.contains("error validating \"f.yaml\"") && error.contains("[apiVersion not set, kind not set]"),
            "{error}"
        );
        assert!(parse("f.yaml", "a: [").is_err());
    }

    #[test]
    fn directories_are_read_in_order() {
        let directory = tempfile::tempdir().expect("directory");
        let write = |name: &str| {
            let path = directory.path().join(name);
            std::fs::create_dir_all(path.parent().expect("parent")).expect("directories");
            std::fs::write(path, format!("{{apiVersion: v1, kind: Pod, metadata: {{name: \"{name}\"}}}}"))
                .expect("file");
        };
        ["b.yaml", "a.json", "c.txt", "d/e.yml"].iter().for_each(|name| write(name));
        let read = |recursive| {
            let flags = FileFlags { filename: vec![directory.path().display().to_string()], recursive };
            flags.read().expect("manifests").iter().map(|m| name(&m.object).to_owned()).collect::<Vec<_>>()
        };
        assert_eq!(read(false), ["a.json", "b.yaml"]);
        assert_eq!(read(true), ["a.json", "b.yaml", "d/e.yml"]);
    }
}
