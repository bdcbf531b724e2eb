//! What kinds the server has: for the controllers that work on all of them. From the aggregated documents (KEP-3352), whose tags
//! make asking again cheap.
use component_base::client::refusal;
use http::header::{ACCEPT, ETAG, HeaderValue, IF_NONE_MATCH};
use kube::{
    Client, Error,
    client::Body,
    core::{ApiResource, GroupVersionKind},
};
use serde::Deserialize;

const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// One resource of the server, in its preferred version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ServerResource {
    pub api: ApiResource,
    pub namespaced: bool,
    pub verbs: Vec<String>,
}

/// What could be found out; `failures` names group versions that could not be asked (an aggregated server that is down).
#[derive(Debug, Default)]
pub struct Discovered {
    pub resources: Vec<ServerResource>,
    pub failures: Vec<(String, String)>,
}

impl ServerResource {
    pub fn can(&self, verb: &str) -> bool {
        self.verbs.iter().any(|v| v == verb)
    }

    /// `deployments.apps`.
    pub fn group_resource(&self) -> String {
        apimachinery::meta::group_resource(&self.api.group, &self.api.plural)
    }
}

/// Asks for the resources of each group's preferred version, and of other versions what the preferred one lacks.
pub async fn discover(client: &Client) -> Result<Discovered, Error> {
    Ok(Discovery::default().ask(client).await?.unwrap_or_default())
}

/// What the server said last, for who asks again and again.
#[derive(Default)]
pub struct Discovery {
    roots: [Root; 2],
    /// A document has changed, which was not told yet.
    changed: bool,
}

/// A document and its tag.
#[derive(Default)]
struct Root {
    tag: Option<HeaderValue>,
    groups: Vec<Group>,
}

impl Discovery {
    /// As [`discover`]; None: nothing has changed since it was asked last.
    pub async fn ask(&mut self, client: &Client) -> Result<Option<Discovered>, Error> {
        for (root, path) in self.roots.iter_mut().zip(["/api", "/apis"]) {
            self.changed |= root.ask(client, path).await?;
        }
        let changed = std::mem::take(&mut self.changed);
        Ok(changed.then(|| preferred(self.roots.iter().flat_map(|root| &root.groups))))
    }
}

impl Root {
    async fn ask(&mut self, client: &Client, path: &str) -> Result<bool, Error> {
        let mut request = http::Request::get(path).header(ACCEPT, AGGREGATED);
        if let Some(tag) = &self.tag {
            request = request.header(IF_NONE_MATCH, tag);
        }
        let request = request.body(Body::empty()).map_err(Error::HttpError)?;
        let answer = client.send(request).await?;
        if answer.status() == http::StatusCode::NOT_MODIFIED {
            return Ok(false);
        }
        let (status, tag) = (answer.status(), answer.headers().get(ETAG).cloned());
        let text = answer.into_body().collect_bytes().await?;
        if !status.is_success() {
            return Err(refusal(status, &text));
        }
        self.groups = serde_json::from_slice::<Groups>(&text).map_err(Error::SerdeError)?.items;
        self.tag = tag;
        Ok(true)
    }
}

#[derive(Deserialize)]
struct Groups {
    items: Vec<Group>,
}

/// `APIGroupDiscovery`, as far as it is read.
#[derive(Deserialize)]
struct Group {
    #[serde(default)]
    metadata: GroupMeta,
    /// The preferred one first.
    #[serde(default)]
    versions: Vec<Version>,
}

#[derive(Default, Deserialize)]
struct GroupMeta {
    #[serde(default)]
    name: String,
}

#[derive(Deserialize)]
struct Version {
    version: String,
    #[serde(default)]
    freshness: String,
    #[serde(default)]
    resources: Vec<Resource>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Resource {
    resource: String,
    /// None: there are subresources of it only.
    response_kind: Option<Kind>,
    scope: String,
    #[serde(default)]
    verbs: Vec<String>,
}

#[derive(Deserialize)]
struct Kind {
    kind: String,
}

/// Each resource once, in the first version that has it.
fn preferred<'a>(groups: impl Iterator<Item = &'a Group>) -> Discovered {
    let mut found = Discovered::default();
    for group in groups {
        let name = &group.metadata.name;
        let first = found.resources.len();
        for version in &group.versions {
            if version.freshness == "Stale" {
                let group_version = apimachinery::meta::join_api_version(name, &version.version);
                let why = format!("stale GroupVersion discovery: {group_version}");
                found.failures.push((group_version, why));
            }
            for resource in &version.resources {
                let Some(Kind { kind }) = &resource.response_kind else { continue };
                if found.resources[first..].iter().any(|known| known.api.plural == resource.resource) {
                    continue;
                }
                let kind = GroupVersionKind::gvk(name, &version.version, kind);
                found.resources.push(ServerResource {
                    api: ApiResource::from_gvk_with_plural(&kind, &resource.resource),
                    namespaced: resource.scope == "Namespaced",
                    verbs: resource.verbs.clone(),
                });
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_resource_is_there_once_in_the_version_that_is_preferred() {
        let resources = |names: &[&str]| {
            let resource = |name: &&str| {
                json!({"resource": name, "responseKind": {"group": "", "version": "", "kind": "K"}, "scope": "Namespaced",
                    "singularResource": "", "verbs": ["list"], "subresources": [{"subresource": "status", "verbs": ["get"]}]})
            };
            names.iter().map(resource).collect::<Vec<_>>()
        };
        let mut nodes = resources(&["nodes", "only-subresources"]);
        nodes[0]["scope"] = json!("Cluster");
        nodes[1].as_object_mut().unwrap().remove("responseKind");
        let document = json!({"kind": "APIGroupDiscoveryList", "items": [
            {"metadata": {}, "versions": [{"version": "v1", "freshness": "Current", "resources": nodes}]},
            {"metadata": {"name": "apps"}, "versions": [
                {"version": "v2", "freshness": "Current", "resources": resources(&["deployments"])},
                {"version": "v1", "freshness": "Current", "resources": resources(&["deployments", "old"])}]},
            {"metadata": {"name": "metrics.k8s.io"}, "versions": [{"version": "v1beta1", "freshness": "Stale"}]}]});
        let groups: Groups = serde_json::from_value(document).unwrap();
        let found = preferred(groups.items.iter());
        let got: Vec<_> =
            found.resources.iter().map(|r| (r.group_resource(), r.api.api_version.as_str(), r.namespaced)).collect();
        let all = [("nodes", "v1", false), ("deployments.apps", "apps/v2", true), ("old.apps", "apps/v1", true)];
        assert_eq!(got, all.map(|(name, version, namespaced)| (name.to_owned(), version, namespaced)));
        assert!(found.resources[0].can("list") && !found.resources[0].can("watch"));
        let stale = ("metrics.k8s.io/v1beta1", "stale GroupVersion discovery: metrics.k8s.io/v1beta1");
        assert_eq!(found.failures, [(stale.0.to_owned(), stale.1.to_owned())]);
    }
}
