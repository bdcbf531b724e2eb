//! Bootstrap tokens: `<id>.<secret>`, kept in Secrets of kube-system, with which machines join. As `plugin/pkg/auth/authenticator/token/bootstrap`.
use crate::authorization::lister::{Lister, SECRETS, deletion_time};

use super::UserInfo;
use super::service_account::secret_value;

const GROUP: &str = "system:bootstrappers";

/// Who holds the token. None for what is no bootstrap token or not a good one (the log says why).
pub fn verify(lister: &dyn Lister, token: &str, now: i64) -> Option<UserInfo> {
    let (id, secret) = parse(token)?;
    let name = format!("bootstrap-token-{id}");
    let object = lister.get(SECRETS, "kube-system", &name)?;
    let refuse = |why: &str| {
        tracing::debug!(secret = name, why, "bootstrap token refused");
        None
    };
    if deletion_time(&object).is_some() {
        return refuse("its secret is being deleted");
    }
    let value = object.value();
    if value.get("type").and_then(serde_json::Value::as_str) != Some("bootstrap.kubernetes.io/token") {
        return refuse("its secret is of another type");
    }
    let entry = |key: &str| secret_value(&value, key).unwrap_or_default();
    let same = aws_lc_rs::constant_time::verify_slices_are_equal(entry("token-secret").as_bytes(), secret.as_bytes());
    if same.is_err() || entry("token-id") != id {
        return refuse("wrong secret");
    }
    let expiration = entry("expiration");
    if !expiration.is_empty() {
        match expiration.parse::<jiff::Timestamp>() {
            Ok(at) if now < at.as_second() => {}
            Ok(_) => return refuse("it has expired"),
            Err(_) => return refuse("its expiration is no time"),
        }
    }
    if entry("usage-bootstrap-authentication") != "true" {
        return refuse("it is not for authentication");
    }
    let mut groups = vec![GROUP.to_owned()];
    for group in entry("auth-extra-groups").split(',').map(str::trim).filter(|group| !group.is_empty()) {
        if !is_extra_group(group) {
            return refuse("a group of it is not allowed");
        }
        groups.push(group.to_owned());
    }
    groups.sort();
    groups.dedup();
    Some(UserInfo { name: format!("system:bootstrap:{id}"), groups, ..UserInfo::default() })
}

/// `[a-z0-9]{6}.[a-z0-9]{16}`
fn parse(token: &str) -> Option<(&str, &str)> {
    let plain = |text: &str| text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let (id, secret) = token.split_once('.')?;
    (id.len() == 6 && secret.len() == 16 && plain(id) && plain(secret)).then_some((id, secret))
}

/// `system:bootstrappers:[a-z0-9:-]{0,255}[a-z0-9]`
fn is_extra_group(group: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    group.strip_prefix("system:bootstrappers:").is_some_and(|rest| {
        rest.len() <= 256
            && rest.bytes().all(|b| plain(b) || b == b':' || b == b'-')
            && rest.bytes().last().is_some_and(plain)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::authorization::lister::fake::Objects;
    use base64::Engine as _;
    use serde_json::{Value, json};

    fn secret(changes: &[(&str, &str)]) -> Value {
        let mut data = serde_json::Map::new();
        let entries = [
            ("token-id", "abcdef"),
            ("token-secret", "0123456789abcdef"),
            ("usage-bootstrap-authentication", "true"),
            ("auth-extra-groups", "system:bootstrappers:kubeadm:default-node-token"),
            ("expiration", "2030-01-01T00:00:00Z"),
        ];
        for (key, value) in entries.iter().chain(changes) {
            let encoded = base64::engine::general_purpose::STANDARD.encode(value);
            data.insert((*key).to_owned(), encoded.into());
        }
        json!({"metadata": {"name": "bootstrap-token-abcdef", "namespace": "kube-system"},
            "type": "bootstrap.kubernetes.io/token", "data": data})
    }

    #[test]
    fn a_token_is_what_its_secret_says() {
        let now = 1_800_000_000;
        let verify = |token: &str, changes: &[(&str, &str)]| {
            super::verify(Objects::of([(SECRETS, secret(changes))]).as_ref(), token, now)
        };
        let user = verify("abcdef.0123456789abcdef", &[]).unwrap();
        assert_eq!(user.name, "system:bootstrap:abcdef");
        assert_eq!(user.groups, [GROUP, "system:bootstrappers:kubeadm:default-node-token"]);
        for (token, changes) in [
            ("abcdef.0123456789abcdeX", &[][..]),
            ("abcdef.0123456789abcdee", &[]),
            ("abcdee.0123456789abcdef", &[]),
            ("abcdef", &[]),
            ("abcdef.0123456789abcdef", &[("expiration", "2020-01-01T00:00:00Z")]),
            ("abcdef.0123456789abcdef", &[("expiration", "never")]),
            ("abcdef.0123456789abcdef", &[("usage-bootstrap-authentication", "false")]),
            ("abcdef.0123456789abcdef", &[("auth-extra-groups", "system:masters")]),
            ("abcdef.0123456789abcdef", &[("token-id", "abcdex")]),
        ] {
            assert_eq!(verify(token, changes), None, "{token} {changes:?}");
        }
        assert!(verify("abcdef.0123456789abcdef", &[("expiration", "")]).is_some());
    }
}
