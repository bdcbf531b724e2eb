//! Where objects lie in etcd, as Kubernetes lays them out: `/registry/<prefix>/<namespace>/<name>`.

/// The key of an object below its resource's prefix: `ns/name`, or `name` where there is no namespace.
pub fn object_key(namespace: &str, name: &str) -> String {
    if namespace.is_empty() { name.to_owned() } else { [namespace, "/", name].concat() }
}

/// The full key of an object.
pub fn full_key(root: &str, prefix: &str, key: &str) -> String {
    [root, "/", prefix, "/", key].concat()
}

/// Takes a full key apart into the resource's prefix and the object's key. `known` says which prefixes there are; they have
/// one segment (`pods`) or two (`services/specs`).
pub fn split<'k>(root: &str, full: &'k str, known: impl Fn(&str) -> bool) -> Option<(&'k str, &'k str)> {
    let rest = full.strip_prefix(root)?.strip_prefix('/')?;
    let first = rest.find('/')?;
    if let Some(second) = rest[first + 1..].find('/').map(|at| first + 1 + at)
        && known(&rest[..second])
    {
        return Some((&rest[..second], &rest[second + 1..]));
    }
    known(&rest[..first]).then(|| (&rest[..first], &rest[first + 1..]))
}

/// The range that holds all keys with a prefix ends here (exclusive).
pub fn range_end(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.last_mut() {
        if *last < 0xff {
            *last += 1;
            return end;
        }
        end.pop();
    }
    vec![0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_taken_apart_by_known_prefixes() {
        let known = |p: &str| ["pods", "minions", "services/specs", "apiregistration.k8s.io/apiservices"].contains(&p);
        for (full, expected) in [
            ("/registry/pods/default/a", Some(("pods", "default/a"))),
            ("/registry/minions/n1", Some(("minions", "n1"))),
            ("/registry/services/specs/default/web", Some(("services/specs", "default/web"))),
            ("/registry/apiregistration.k8s.io/apiservices/v1.", Some(("apiregistration.k8s.io/apiservices", "v1."))),
            ("/registry/unknown/a", None),
            ("/registry/pods", None),
            ("/elsewhere/pods/a/b", None),
        ] {
            assert_eq!(split("/registry", full, known), expected, "{full}");
        }
    }

    #[test]
    fn a_range_ends_behind_its_last_key() {
        assert_eq!(range_end("/registry/"), b"/registry0");
    }
}
