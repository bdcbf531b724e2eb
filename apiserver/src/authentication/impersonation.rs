//! Acting as someone else: `Impersonate-User` and its siblings, each of which needs the verb `impersonate`. As
//! `WithImpersonation`.
use std::collections::BTreeMap;
use std::sync::Arc;

use apimachinery::status::StatusError;
use http::HeaderMap;

use super::request_header::unescape;
use super::{ANONYMOUS, AUTHENTICATED, UNAUTHENTICATED, UserInfo};
use crate::authorization::{Attributes, Authorizer, Decision, forbidden};

const USER: &str = "impersonate-user";
const GROUP: &str = "impersonate-group";
const UID: &str = "impersonate-uid";
const EXTRA: &str = "impersonate-extra-";
const AUTHENTICATION: &str = "authentication.k8s.io";

/// The user to go on as; None if the headers ask for nobody else.
pub async fn impersonate(
    authorizer: &Authorizer,
    user: &Arc<UserInfo>,
    headers: &HeaderMap,
) -> Result<Option<UserInfo>, StatusError> {
    let Some((wanted, questions)) = wanted(user, headers)? else { return Ok(None) };
    for question in questions {
        match authorizer.authorize(&question).await {
            Decision::Allow => {}
            Decision::NoOpinion(reason) => return Err(forbidden(&question, &reason)),
        }
    }
    tracing::debug!(user = user.name, acting_as = wanted.name, "impersonation");
    Ok(Some(wanted))
}

/// Who is meant, and what must be allowed for it.
fn wanted(user: &Arc<UserInfo>, headers: &HeaderMap) -> Result<Option<(UserInfo, Vec<Attributes>)>, StatusError> {
    let values = |name: &str| -> Vec<String> {
        headers.get_all(name).iter().filter_map(|value| value.to_str().ok()).map(ToOwned::to_owned).collect()
    };
    let name = values(USER).into_iter().next().unwrap_or_default();
    let mut groups: Vec<String> = values(GROUP);
    let uid = values(UID).into_iter().next().unwrap_or_default();
    let mut extra: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for header in headers.keys() {
        if let Some(key) = header.as_str().strip_prefix(EXTRA) {
            extra.entry(unescape(key).to_lowercase()).or_default().extend(values(header.as_str()));
        }
    }
    if name.is_empty() {
        if groups.is_empty() && uid.is_empty() && extra.is_empty() {
            return Ok(None);
        }
        return Err(StatusError::internal("requested impersonation without impersonating a user"));
    }
    let ask = |group: &str, resource: &str, subresource: &str, namespace: &str, name: &str| Attributes {
        user: user.clone(),
        verb: "impersonate".to_owned(),
        group: group.to_owned(),
        version: "v1".to_owned(),
        resource: resource.to_owned(),
        subresource: subresource.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
        is_resource: true,
        ..Attributes::default()
    };
    let account = name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    let mut questions = vec![match account {
        Some((namespace, name)) => ask("", "serviceaccounts", "", namespace, name),
        None => ask("", "users", "", "", &name),
    }];
    questions.extend(groups.iter().map(|group| ask("", "groups", "", "", group)));
    if !uid.is_empty() {
        questions.push(ask(AUTHENTICATION, "uids", "", "", &uid));
    }
    for (key, values) in &extra {
        questions.extend(values.iter().map(|value| ask(AUTHENTICATION, "userextras", key, "", value)));
    }
    if let (Some((namespace, _)), true) = (account, groups.is_empty()) {
        groups = vec!["system:serviceaccounts".to_owned(), format!("system:serviceaccounts:{namespace}")];
    }
    let kind = if name == ANONYMOUS { UNAUTHENTICATED } else { AUTHENTICATED };
    if !groups.iter().any(|group| group == AUTHENTICATED || group == UNAUTHENTICATED) {
        groups.push(kind.to_owned());
    }
    Ok(Some((UserInfo { name, uid, groups, extra }, questions)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authorization::lister::fake::Objects;

    fn headers(pairs: &[(&'static str, &'static str)]) -> HeaderMap {
        let mut headers = HeaderMap::new();
        for (name, value) in pairs {
            headers.append(*name, value.parse().unwrap());
        }
        headers
    }

    #[test]
    fn each_header_asks_for_a_right_of_its_own() {
        let user = Arc::new(UserInfo { name: "ann".into(), ..UserInfo::default() });
        let read = |pairs: &[(&'static str, &'static str)]| wanted(&user, &headers(pairs));
        assert_eq!(read(&[]).unwrap(), None);
        assert_eq!(read(&[("impersonate-group", "g")]).unwrap_err().code(), 500);
        let (as_user, questions) =
            read(&[("impersonate-user", "bob"), ("impersonate-group", "g"), ("impersonate-extra-Scopes", "view")])
                .unwrap()
                .unwrap();
        assert_eq!(as_user.groups, ["g", AUTHENTICATED]);
        let asked: Vec<String> =
            questions.iter().map(|q| format!("{}/{}/{} {}", q.group, q.resource, q.subresource, q.name)).collect();
        assert_eq!(asked, ["/users/ bob", "/groups/ g", "authentication.k8s.io/userextras/scopes view"]);
        let (robot, questions) = read(&[("impersonate-user", "system:serviceaccount:a:robot")]).unwrap().unwrap();
        assert_eq!(robot.groups, ["system:serviceaccounts", "system:serviceaccounts:a", AUTHENTICATED]);
        assert_eq!((questions[0].resource.as_str(), questions[0].namespace.as_str()), ("serviceaccounts", "a"));
        let (nobody, _) = read(&[("impersonate-user", ANONYMOUS)]).unwrap().unwrap();
        assert_eq!(nobody.groups, [UNAUTHENTICATED]);
    }

    #[tokio::test]
    async fn who_may_not_impersonate_is_told_so() {
        let authorizer = Authorizer::with(&["RBAC".to_owned()], Objects::of([])).unwrap();
        let user = Arc::new(UserInfo { name: "ann".into(), ..UserInfo::default() });
        let error = impersonate(&authorizer, &user, &headers(&[("impersonate-user", "bob")])).await.unwrap_err();
        assert_eq!(
            error.message(),
            r#"users "bob" is forbidden: User "ann" cannot impersonate resource "users" in API group "" at the cluster scope"#
        );
    }
}
