//! A front proxy that has authenticated the user says so in headers; it proves itself with a client certificate of an
//! authority of its own. As `x-remote-user` and its siblings.
use std::collections::BTreeMap;
use std::sync::Arc;

use component_base::serving::Peer;
use http::HeaderMap;
use percent_encoding::percent_decode_str;

use super::UserInfo;
use super::x509::Authorities;
use crate::options::Options;

/// Which proxy is believed and how it says who the user is.
pub struct RequestHeaders {
    ca: Authorities,
    allowed_names: Vec<String>,
    names: Names,
}

/// Lower-case names of headers.
struct Names {
    user: Vec<String>,
    uid: Vec<String>,
    group: Vec<String>,
    extra_prefix: Vec<String>,
}

// === impl RequestHeaders ===

impl RequestHeaders {
    pub fn from_options(options: &Options) -> anyhow::Result<Option<Self>> {
        let Some(ca_file) = &options.requestheader_client_ca_file else { return Ok(None) };
        let lower = |names: &[String]| names.iter().map(|name| name.to_lowercase()).collect();
        Ok(Some(Self {
            ca: Authorities::load(ca_file)?,
            allowed_names: options.requestheader_allowed_names.iter().filter(|n| !n.is_empty()).cloned().collect(),
            names: Names {
                user: lower(&options.requestheader_username_headers),
                uid: lower(&options.requestheader_uid_headers),
                group: lower(&options.requestheader_group_headers),
                extra_prefix: lower(&options.requestheader_extra_headers_prefix),
            },
        }))
    }

    /// Is there a header that may name a user?
    pub fn may_name(&self, headers: &HeaderMap) -> bool {
        self.names.user.iter().any(|name| headers.contains_key(name))
    }

    /// The user that the proxy names; None if it names none; why not if the proxy is not to be believed.
    pub fn user(&self, headers: &HeaderMap, peer: &Peer) -> Result<Option<UserInfo>, String> {
        let proxy = self.ca.verify(&peer.certificates, peer.digest)?;
        if !self.allowed_names.is_empty() && !self.allowed_names.contains(&proxy.common_name) {
            return Err(format!("x509: subject with cn={} is not in the allowed list", proxy.common_name));
        }
        Ok(self.names.read(headers))
    }

    pub fn ca_text(&self) -> Arc<str> {
        self.ca.pem()
    }
}

// === impl Names ===

impl Names {
    fn read(&self, headers: &HeaderMap) -> Option<UserInfo> {
        let values = |name: &str| -> Vec<String> {
            headers.get_all(name).iter().filter_map(|v| v.to_str().ok()).map(ToOwned::to_owned).collect()
        };
        let name = self.user.iter().flat_map(|header| values(header)).find(|value| !value.trim().is_empty())?;
        let uid = self.uid.iter().flat_map(|header| values(header)).next().unwrap_or_default();
        let groups = self.group.iter().flat_map(|header| values(header)).collect();
        let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for header in headers.keys() {
            for prefix in self.extra_prefix.iter().filter(|prefix| !prefix.is_empty()) {
                if let Some(key) = header.as_str().strip_prefix(prefix.as_str()) {
                    extra.entry(unescape(key)).or_default().extend(values(header.as_str()));
                }
            }
        }
        Some(UserInfo { name, uid, groups, extra })
    }
}

/// Keys of extra are percent-encoded where a header's name could not hold them.
pub fn unescape(key: &str) -> String {
    percent_decode_str(key).decode_utf8_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_read_from_headers() {
        let names = Names {
            user: vec!["x-remote-user".into()],
            uid: vec!["x-remote-uid".into()],
            group: vec!["x-remote-group".into()],
            extra_prefix: vec!["x-remote-extra-".into()],
        };
        let mut headers = HeaderMap::new();
        assert_eq!(names.read(&headers), None);
        headers.append("x-remote-user", "ann".parse().unwrap());
        headers.append("x-remote-uid", "7".parse().unwrap());
        headers.append("x-remote-group", "a".parse().unwrap());
        headers.append("x-remote-group", "b".parse().unwrap());
        headers.append("x-remote-extra-example.com%2fscope", "read".parse().unwrap());
        let user = names.read(&headers).unwrap();
        assert_eq!(
            (user.name.as_str(), user.uid.as_str(), user.groups),
            ("ann", "7", vec!["a".to_owned(), "b".to_owned()])
        );
        assert_eq!(user.extra["example.com/scope"], ["read"]);
    }
}
