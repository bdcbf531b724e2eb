//! What kinds the server has: for the controllers that work on all of them.
use k8s_openapi::apimachinery::pkg::apis::meta::v1::APIResourceList;
use kube::{
    Client,
    core::{ApiResource, GroupVersionKind},
};

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
pub async fn discover(client: &Client) -> Result<Discovered, kube::Error> {
    let mut found = Discovered::default();
    add(&mut found.resources, &client.list_core_api_resources("v1").await?, "", "v1");
    for group in client.list_api_groups().await?.groups {
        let preferred = group.preferred_version.as_ref().map(|v| v.version.clone());
        let mut versions: Vec<_> = group.versions.iter().map(|v| v.version.clone()).collect();
        versions.sort_by_key(|v| Some(v) != preferred.as_ref());
        for version in versions {
            let group_version = format!("{}/{version}", group.name);
            match client.list_api_group_resources(&group_version).await {
                Ok(list) => add(&mut found.resources, &list, &group.name, &version),
                Err(error) => found.failures.push((group_version, error.to_string())),
            }
        }
    }
    Ok(found)
}

/// Takes over what is no subresource and not there yet in another version.
fn add(resources: &mut Vec<ServerResource>, list: &APIResourceList, group: &str, version: &str) {
    for resource in list.resources.iter().filter(|r| !r.name.contains('/')) {
        if resources.iter().any(|r| r.api.group == group && r.api.plural == resource.name) {
            continue;
        }
        let kind = GroupVersionKind::gvk(group, version, &resource.kind);
        resources.push(ServerResource {
            api: ApiResource::from_gvk_with_plural(&kind, &resource.name),
            namespaced: resource.namespaced,
            verbs: resource.verbs.clone(),
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn subresources_and_older_versions_are_left_out() {
        let list = |names: &[&str]| -> APIResourceList {
            let resources: Vec<_> = names
                .iter()
                .map(|n| json!({"name": n, "singularName": "", "namespaced": true, "kind": "K", "verbs": ["list"]}))
                .collect();
            serde_json::from_value(json!({"groupVersion": "apps/v1", "resources": resources})).unwrap()
        };
        let mut found = Vec::new();
        add(&mut found, &list(&["deployments", "deployments/status"]), "apps", "v2");
        add(&mut found, &list(&["deployments", "old"]), "apps", "v1");
        let got: Vec<_> = found.iter().map(|r| (r.api.plural.as_str(), r.api.version.as_str())).collect();
        assert_eq!(got, [("deployments", "v2"), ("old", "v1")]);
        assert_eq!(found[0].group_resource(), "deployments.apps");
    }
}
