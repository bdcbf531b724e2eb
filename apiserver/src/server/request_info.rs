//! What a request is about, read off its method, path and query alone. As `RequestInfoFactory`.

use crate::authentication::UserInfo;
use crate::authorization::Attributes;
use http::Method;
use percent_encoding::percent_decode_str;
use std::sync::Arc;

/// The parts of a path such as `/apis/apps/v1/namespaces/default/deployments/web/status`, and the verb.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RequestInfo {
    pub is_resource: bool,
    /// Of Kubernetes, in lower case; the HTTP method for paths that are no resource.
    pub verb: &'static str,
    pub group: String,
    pub version: String,
    pub namespace: String,
    pub resource: String,
    pub name: String,
    pub subresource: String,
    /// What follows the subresource (a proxied path), without a leading slash.
    pub rest: String,
    pub path: String,
    pub query: Query,
    /// As whom the client's writes are noted in managedFields. Not read here: it may be named by a header.
    pub manager: String,
}

/// Query parameters in their order, decoded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Query(Vec<(String, String)>);

/// Namespaced subresources that are not resources of a namespace: `namespaces/x/status` and `/finalize`.
const NAMESPACE_SUBRESOURCES: [&str; 2] = ["status", "finalize"];

// === impl Query ===

impl Query {
    pub fn parse(query: &str) -> Self {
        Self(url::form_urlencoded::parse(query.as_bytes()).into_owned().collect())
    }

    /// The first value of a parameter; empty if it is absent.
    pub fn get(&self, name: &str) -> &str {
        self.0.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str())
    }

    pub fn all<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a str> {
        self.0.iter().filter(move |(key, _)| key == name).map(|(_, value)| value.as_str())
    }

    /// As Go's strconv.ParseBool of what is there; absent, and what is no boolean, is false, save that an empty or other
    /// value of a parameter that is there counts as true (as Kubernetes' conversion has it).
    pub fn flag(&self, name: &str) -> bool {
        match self.0.iter().find(|(key, _)| key == name) {
            None => false,
            Some((_, value)) => !matches!(value.to_ascii_lowercase().as_str(), "false" | "0"),
        }
    }

    pub fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(key, _)| key == name)
    }
}

// === impl RequestInfo ===

impl RequestInfo {
    pub fn parse(method: &Method, raw_path: &str, raw_query: &str) -> Self {
        let path = percent_decode_str(raw_path).decode_utf8_lossy().into_owned();
        let query = Query::parse(raw_query);
        let mut info = Self { path, query, verb: lower_method(method), ..Self::default() };
        let path = info.path.clone();
        let mut segments = path.trim_matches('/').split('/');
        match segments.next() {
            Some("api") => {}
            Some("apis") => match segments.next() {
                Some(group) if !group.is_empty() => info.group = group.to_owned(),
                _ => return info,
            },
            _ => return info,
        }
        let Some(version) = segments.next().filter(|v| !v.is_empty()) else {
            info.group.clear();
            return info;
        };
        let mut parts: Vec<&str> = segments.collect();
        if parts.first().is_none_or(|p| p.is_empty()) {
            info.group.clear();
            return info;
        }
        info.version = version.to_owned();
        info.is_resource = true;
        info.verb = match *method {
            Method::POST => "create",
            Method::GET | Method::HEAD => "get",
            Method::PUT => "update",
            Method::PATCH => "patch",
            Method::DELETE => "delete",
            _ => lower_method(method),
        };
        let mut watch_prefix = false;
        if matches!(parts[0], "watch" | "proxy") && parts.len() > 1 {
            watch_prefix = parts[0] == "watch";
            if parts[0] == "proxy" {
                info.verb = "proxy";
            }
            parts.remove(0);
        }
        if parts[0] == "namespaces" && parts.len() > 1 {
            info.namespace = parts[1].to_owned();
            // A path below a namespace names a resource in it, unless it is a subresource of the namespace itself.
            if parts.len() > 2 && !NAMESPACE_SUBRESOURCES.contains(&parts[2]) {
                parts.drain(..2);
            }
        }
        info.resource = parts[0].to_owned();
        if let Some(name) = parts.get(1) {
            info.name = (*name).to_owned();
        }
        if let Some(subresource) = parts.get(2) {
            info.subresource = (*subresource).to_owned();
        }
        if parts.len() > 3 {
            info.rest = parts[3..].join("/");
        }
        if info.verb == "get" && info.name.is_empty() {
            info.verb = if watch_prefix || info.query.flag("watch") { "watch" } else { "list" };
        } else if watch_prefix {
            info.verb = "watch";
        } else if info.verb == "delete" && info.name.is_empty() {
            info.verb = "deletecollection";
        }
        info
    }

    /// As authorizers see it. `patch` stays `patch`; a watch or list of one name (by field selector) names it.
    pub fn attributes(&self, user: Arc<UserInfo>) -> Attributes {
        let selecting = matches!(self.verb, "list" | "watch" | "deletecollection");
        let name = if self.name.is_empty() && selecting { self.selected_name() } else { self.name.clone() };
        let selector = |parameter| if selecting { self.query.get(parameter).to_owned() } else { String::new() };
        Attributes {
            user,
            verb: self.verb.to_owned(),
            group: self.group.clone(),
            version: self.version.clone(),
            resource: self.resource.clone(),
            subresource: self.subresource.clone(),
            namespace: self.namespace.clone(),
            name,
            path: self.path.clone(),
            is_resource: self.is_resource,
            field_selector: selector("fieldSelector"),
            label_selector: selector("labelSelector"),
        }
    }

    fn selected_name(&self) -> String {
        let text = self.query.get("fieldSelector");
        if text.is_empty() {
            return String::new();
        }
        apimachinery::fields::FieldSelector::parse(text)
            .ok()
            .and_then(|selector| selector.required_value("metadata.name").map(ToOwned::to_owned))
            .unwrap_or_default()
    }

    /// Requests that may last as long as they like and do not count against the requests in flight.
    pub fn is_long_running(&self) -> bool {
        self.verb == "watch"
            || self.verb == "proxy"
            || matches!(self.subresource.as_str(), "proxy" | "exec" | "attach" | "portforward")
            || (self.subresource == "log" && self.query.flag("follow"))
    }
}

fn lower_method(method: &Method) -> &'static str {
    match *method {
        Method::GET => "get",
        Method::HEAD => "head",
        Method::POST => "post",
        Method::PUT => "put",
        Method::PATCH => "patch",
        Method::DELETE => "delete",
        Method::OPTIONS => "options",
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_read_off_method_path_and_query() {
        // method, path?query -> verb group/version ns resource name subresource
        let cases = [
            ("GET", "/api/v1/pods", "list /v1 - pods - -"),
            ("GET", "/api/v1/pods?watch=true", "watch /v1 - pods - -"),
            ("GET", "/api/v1/pods?watch=false", "list /v1 - pods - -"),
            ("GET", "/api/v1/watch/namespaces/a/pods", "watch /v1 a pods - -"),
            ("GET", "/api/v1/namespaces", "list /v1 - namespaces - -"),
            ("GET", "/api/v1/namespaces/a", "get /v1 a namespaces a -"),
            ("PUT", "/api/v1/namespaces/a/finalize", "update /v1 a namespaces a finalize"),
            ("POST", "/api/v1/namespaces/a/pods", "create /v1 a pods - -"),
            ("POST", "/api/v1/namespaces/a/pods/p/binding", "create /v1 a pods p binding"),
            ("DELETE", "/apis/apps/v1/namespaces/a/deployments", "deletecollection apps/v1 a deployments - -"),
            ("PATCH", "/apis/apps/v1/namespaces/a/deployments/d/scale", "patch apps/v1 a deployments d scale"),
            ("GET", "/healthz", "get / - - - -"),
            ("POST", "/apis/apps/v1", "post / - - - -"),
            ("GET", "/api/v1/nodes/n%20x", "get /v1 - nodes n x -"),
        ];
        for (method, target, expected) in cases {
            let (path, query) = target.split_once('?').unwrap_or((target, ""));
            let info = RequestInfo::parse(&method.parse().unwrap(), path, query);
            let dash = |s: &str| if s.is_empty() { "-".to_owned() } else { s.to_owned() };
            let got = format!(
                "{} {}/{} {} {} {} {}",
                info.verb,
                info.group,
                info.version,
                dash(&info.namespace),
                dash(&info.resource),
                dash(&info.name),
                dash(&info.subresource)
            );
            assert_eq!(got, expected, "{method} {target}");
        }
    }

    #[test]
    fn a_selected_name_is_authorized_as_a_name() {
        let info =
            RequestInfo::parse(&Method::GET, "/api/v1/namespaces/a/secrets", "watch=1&fieldSelector=metadata.name%3Dx");
        let attributes = info.attributes(Arc::default());
        assert_eq!((attributes.verb.as_str(), attributes.name.as_str()), ("watch", "x"));
        assert_eq!(attributes.field_selector, "metadata.name=x");
    }

    #[test]
    fn what_follows_a_subresource_is_the_rest() {
        let info = RequestInfo::parse(&Method::GET, "/api/v1/nodes/n/proxy/metrics/cadvisor", "");
        assert_eq!((info.subresource.as_str(), info.rest.as_str()), ("proxy", "metrics/cadvisor"));
        assert!(info.is_long_running());
    }
}
