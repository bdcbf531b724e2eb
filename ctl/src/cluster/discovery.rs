//! What the server serves, and which of it a word means: `po`, `pod`, `pods`, `Pod`, `deployments.apps`,
//! `deployments.v1.apps`, or a category such as `all`.

use anyhow::{Result, anyhow};
use serde_json::Value;

use super::{Cluster, JSON};

const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json";

/// A kind and where it is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resource {
    pub(crate) group: String,
    pub(crate) version: String,
    pub(crate) kind: String,
    /// The plural name in paths.
    pub(crate) name: String,
    pub(crate) singular: String,
    pub(crate) short_names: Vec<String>,
    pub(crate) categories: Vec<String>,
    pub(crate) namespaced: bool,
    pub(crate) verbs: Vec<String>,
    pub(crate) subresources: Vec<String>,
}

impl Resource {
    /// `v1` or `apps/v1`.
    pub(crate) fn api_version(&self) -> String {
        apimachinery::meta::join_api_version(&self.group, &self.version)
    }

    /// `pods` or `deployments.apps`.
    pub(crate) fn qualified_name(&self) -> String {
        apimachinery::meta::group_resource(&self.group, &self.name)
    }

    /// `pod/x` or `deployment.apps/x`, as kubectl names an object.
    pub(crate) fn reference(&self, object: &str) -> String {
        format!("{}/{object}", self.singular_qualified())
    }

    /// `pod` or `deployment.apps`.
    pub(crate) fn singular_qualified(&self) -> String {
        apimachinery::meta::group_resource(&self.group, &self.kind.to_lowercase())
    }

    fn root(&self) -> String {
        if self.group.is_empty() {
            format!("/api/{}", self.version)
        } else {
            format!("/apis/{}/{}", self.group, self.version)
        }
    }

    /// The path of all objects, in one namespace or (`None`) in all.
    pub(crate) fn collection(&self, namespace: Option<&str>) -> String {
        match namespace.filter(|_| self.namespaced) {
            Some(namespace) => format!("{}/namespaces/{namespace}/{}", self.root(), self.name),
            None => format!("{}/{}", self.root(), self.name),
        }
    }

    /// The path of one object.
    pub(crate) fn object(&self, namespace: &str, name: &str) -> String {
        format!("{}/{name}", self.collection(Some(namespace)))
    }

    pub(crate) fn has_verb(&self, verb: &str) -> bool {
        self.verbs.iter().any(|known| known == verb)
    }
}

/// All that is served, core first, groups and versions in the server's order of preference.
#[derive(Debug, Default)]
pub(crate) struct Discovery {
    pub(crate) resources: Vec<Resource>,
    /// `v1`, `apps/v1`, …
    pub(crate) versions: Vec<String>,
}

impl Discovery {
    /// Asks the server, in two requests if it knows aggregated discovery.
    pub(super) async fn fetch(cluster: &Cluster) -> Result<Discovery> {
        let mut discovery = Discovery::default();
        for root in ["/api", "/apis"] {
            let document = cluster.get_as(root, AGGREGATED).await?;
            match document["kind"].as_str() {
                Some("APIGroupDiscoveryList") => discovery.add_aggregated(&document),
                Some("APIVersions") => {
                    for version in strings(&document["versions"]) {
                        discovery.add_list(cluster, "", &version).await?;
                    }
                }
                _ => {
                    for group in document["groups"].as_array().into_iter().flatten() {
                        let name = group["name"].as_str().unwrap_or_default().to_owned();
                        let preferred = group["preferredVersion"]["version"].as_str().unwrap_or_default();
                        let mut versions: Vec<&str> = group["versions"]
                            .as_array()
                            .into_iter()
                            .flatten()
                            .filter_map(|version| version["version"].as_str())
                            .collect();
                        versions.sort_by_key(|version| *version != preferred);
                        for version in versions {
                            // One group that is down (an aggregated API) must not hide the others.
                            if let Err(error) = discovery.add_list(cluster, &name, version).await {
                                eprintln!("W: couldn't get resource list for {name}/{version}: {error}");
                            }
                        }
                    }
                }
            }
        }
        Ok(discovery)
    }

    fn add_aggregated(&mut self, document: &Value) {
        for group in document["items"].as_array().into_iter().flatten() {
            let group_name = group["metadata"]["name"].as_str().unwrap_or_default();
            for version in group["versions"].as_array().into_iter().flatten() {
                let version_name = version["version"].as_str().unwrap_or_default();
                self.versions.push(apimachinery::meta::join_api_version(group_name, version_name));
                for resource in version["resources"].as_array().into_iter().flatten() {
                    let text = |field: &str| resource[field].as_str().unwrap_or_default().to_owned();
                    self.resources.push(Resource {
                        group: group_name.to_owned(),
                        version: version_name.to_owned(),
                        kind: resource["responseKind"]["kind"].as_str().unwrap_or_default().to_owned(),
                        name: text("resource"),
                        singular: text("singularResource"),
                        short_names: strings(&resource["shortNames"]),
                        categories: strings(&resource["categories"]),
                        namespaced: resource["scope"] == "Namespaced",
                        verbs: strings(&resource["verbs"]),
                        subresources: resource["subresources"]
                            .as_array()
                            .into_iter()
                            .flatten()
                            .filter_map(|subresource| subresource["subresource"].as_str().map(str::to_owned))
                            .collect(),
                    });
                }
            }
        }
    }

    async fn add_list(&mut self, cluster: &Cluster, group: &str, version: &str) -> Result<()> {
        let api_version = apimachinery::meta::join_api_version(group, version);
        let root = if group.is_empty() { "api" } else { "apis" };
        let list = cluster.get_as(&format!("/{root}/{api_version}"), JSON).await?;
        self.versions.push(api_version);
        let first = self.resources.len();
        for resource in list["resources"].as_array().into_iter().flatten() {
            let text = |field: &str| resource[field].as_str().unwrap_or_default().to_owned();
            let name = text("name");
            if let Some((parent, subresource)) = name.split_once('/') {
                if let Some(parent) = self.resources[first..].iter_mut().find(|known| known.name == parent) {
                    parent.subresources.push(subresource.to_owned());
                }
                continue;
            }
            self.resources.push(Resource {
                group: group.to_owned(),
                version: version.to_owned(),
                kind: text("kind"),
                singular: text("singularName"),
                name,
                short_names: strings(&resource["shortNames"]),
                categories: strings(&resource["categories"]),
                namespaced: resource["namespaced"].as_bool().unwrap_or(false),
                verbs: strings(&resource["verbs"]),
                subresources: Vec::new(),
            });
        }
        Ok(())
    }

    /// The resource that a word of the command line means.
    pub(crate) fn resolve(&self, word: &str) -> Result<Resource> {
        let missing = || anyhow!("the server doesn't have a resource type {word:?}");
        let (name, rest) = word.split_once('.').unwrap_or((word, ""));
        let lower = name.to_lowercase();
        let named = |resource: &&Resource| {
            resource.name == lower
                || resource.singular == lower
                || resource.kind.to_lowercase() == lower
                || resource.short_names.contains(&lower)
        };
        // `deployments.v1.apps`, `deployments.apps`; a group may be cut short.
        let (version, group) = rest.split_once('.').unwrap_or((rest, ""));
        let exact = |resource: &&Resource| match rest {
            "" => true,
            _ => resource.group == rest || (resource.version == version && resource.group == group),
        };
        let prefix = |resource: &&Resource| !rest.is_empty() && resource.group.starts_with(rest);
        // The name itself goes before a short name of another resource.
        let by_full_name = |resource: &&Resource| resource.name == lower || resource.singular == lower;
        let found = self
            .resources
            .iter()
            .find(|resource| by_full_name(resource) && exact(resource))
            .or_else(|| self.resources.iter().find(|resource| named(resource) && exact(resource)))
            .or_else(|| self.resources.iter().find(|resource| named(resource) && prefix(resource)));
        found.cloned().ok_or_else(missing)
    }

    /// The resources of a category, such as `all`.
    pub(crate) fn category(&self, word: &str) -> Vec<Resource> {
        let mut found: Vec<Resource> = Vec::new();
        for resource in &self.resources {
            let known = found.iter().any(|other| other.group == resource.group && other.name == resource.name);
            if resource.categories.iter().any(|category| category == word) && !known {
                found.push(resource.clone());
            }
        }
        found
    }

    /// The resource of a kind in a manifest.
    pub(crate) fn resolve_kind(&self, api_version: &str, kind: &str) -> Result<Resource> {
        let (group, version) = apimachinery::meta::split_api_version(api_version);
        let found = self
            .resources
            .iter()
            .find(|resource| resource.group == group && resource.version == version && resource.kind == kind);
        found.cloned().ok_or_else(|| {
            anyhow!("no matches for kind {kind:?} in version {api_version:?}\nensure CRDs are installed first")
        })
    }
}

fn strings(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(|item| item.as_str().map(str::to_owned)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn discovery() -> Discovery {
        let resource = |name: &str, singular: &str, kind: &str, short: &[&str], categories: &[&str]| {
            json!({"resource": name, "singularResource": singular, "responseKind": {"kind": kind}, "scope": "Namespaced",
                "shortNames": short, "categories": categories, "verbs": ["get", "list"]})
        };
        let group = |name: &str, versions: Value| json!({"metadata": {"name": name}, "versions": versions});
        let mut discovery = Discovery::default();
        discovery.add_aggregated(&json!({"items": [
            group("", json!([{"version": "v1", "resources": [
                resource("pods", "pod", "Pod", &["po"], &["all"]),
                resource("events", "event", "Event", &["ev"], &[]),
                resource("services", "service", "Service", &["svc"], &["all"]),
            ]}])),
            group("apps", json!([{"version": "v1", "resources": [
                resource("deployments", "deployment", "Deployment", &["deploy"], &["all"])]}])),
            group("events.k8s.io", json!([{"version": "v1", "resources": [
                resource("events", "event", "Event", &["ev"], &[])]}])),
            group("example.com", json!([
                {"version": "v2", "resources": [resource("widgets", "widget", "Widget", &["po"], &["all"])]},
                {"version": "v1", "resources": [resource("widgets", "widget", "Widget", &["po"], &["all"])]},
            ])),
        ]}));
        discovery
    }

    #[test]
    fn words_mean_resources() {
        let discovery = discovery();
        for (word, expected) in [
            ("pods", "v1 pods"),
            ("po", "v1 pods"),
            ("Pod", "v1 pods"),
            ("deploy", "apps/v1 deployments"),
            ("deployments.apps", "apps/v1 deployments"),
            ("deployments.v1.apps", "apps/v1 deployments"),
            ("deployment.app", "apps/v1 deployments"),
            ("events", "v1 events"),
            ("ev", "v1 events"),
            ("events.events.k8s.io", "events.k8s.io/v1 events"),
            ("widgets", "example.com/v2 widgets"),
            ("widgets.v1.example.com", "example.com/v1 widgets"),
        ] {
            let found = discovery.resolve(word).expect(word);
            assert_eq!(format!("{} {}", found.api_version(), found.name), expected, "{word}");
        }
        assert_eq!(
            discovery.resolve("nonsense").expect_err("nonsense").to_string(),
            "the server doesn't have a resource type \"nonsense\""
        );
    }

    #[test]
    fn categories_hold_each_resource_once() {
        let names: Vec<_> = discovery().category("all").into_iter().map(|r| r.qualified_name()).collect();
        assert_eq!(names, ["pods", "services", "deployments.apps", "widgets.example.com"]);
    }

    #[test]
    fn paths_and_references() {
        let discovery = discovery();
        let deployment = discovery.resolve_kind("apps/v1", "Deployment").expect("Deployment");
        assert_eq!(deployment.object("ns", "x"), "/apis/apps/v1/namespaces/ns/deployments/x");
        assert_eq!(deployment.collection(None), "/apis/apps/v1/deployments");
        assert_eq!(deployment.reference("x"), "deployment.apps/x");
        assert_eq!(discovery.resolve("po").expect("po").reference("x"), "pod/x");
        assert!(discovery.resolve_kind("apps/v1", "Pod").is_err());
    }
}
