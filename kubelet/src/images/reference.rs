//! Image names. `busybox` means `docker.io/library/busybox:latest`; a name may carry a tag, a digest, or both.

/// A parsed image name, complete: the defaults are filled in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageReference {
    /// The registry, with its port: `docker.io`, `registry.example:5000`.
    pub domain: String,
    /// The path within the registry: `library/busybox`.
    pub path: String,
    /// The tag; `latest` where the name has neither tag nor digest.
    pub tag: Option<String>,
    /// `sha256:…`.
    pub digest: Option<String>,
}

/// An image name that is none. A container with it waits with reason `InvalidImageName`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("couldn't parse image name \"{image}\": {cause}")]
pub struct InvalidImageName {
    pub image: String,
    pub cause: &'static str,
}

const DEFAULT_DOMAIN: &str = "docker.io";
const MAX_NAME_CHARS: usize = 255;
const MAX_TAG_CHARS: usize = 128;

// === impl ImageReference ===

impl ImageReference {
    /// Parse an image name as `distribution/reference` does (`ParseNormalizedNamed`), with the default tag.
    pub fn parse(image: &str) -> Result<ImageReference, InvalidImageName> {
        let invalid = |cause| InvalidImageName { image: image.to_owned(), cause };
        const FORMAT: &str = "invalid reference format";
        if is_hex(image, 64) {
            return Err(invalid("cannot specify 64-byte hexadecimal strings"));
        }
        let (name, digest) = match image.split_once('@') {
            Some((name, digest)) if is_digest(digest) => (name, Some(digest.to_owned())),
            Some(_) => return Err(invalid(FORMAT)),
            None => (image, None),
        };
        // A colon after the last slash begins a tag; an earlier one belongs to the registry's port.
        let path_start = name.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match name[path_start..].split_once(':') {
            Some((last, tag)) if is_tag(tag) => (&name[..path_start + last.len()], Some(tag.to_owned())),
            Some(_) => return Err(invalid(FORMAT)),
            None => (name, None),
        };
        let (domain, path) = match name.split_once('/') {
            Some((first, rest))
                if first.contains(['.', ':']) || first == "localhost" || first.to_lowercase() != first =>
            {
                (first.to_owned(), rest.to_owned())
            }
            Some(_) => (DEFAULT_DOMAIN.to_owned(), name.to_owned()),
            None => (DEFAULT_DOMAIN.to_owned(), format!("library/{name}")),
        };
        let domain = if domain == "index.docker.io" { DEFAULT_DOMAIN.to_owned() } else { domain };
        let path = if domain == DEFAULT_DOMAIN && !path.contains('/') { format!("library/{path}") } else { path };
        if name.chars().any(|c| c.is_ascii_uppercase()) && path.to_lowercase() != path {
            return Err(invalid("repository name must be lowercase"));
        }
        if !is_domain(&domain) || !path.split('/').all(is_path_component) {
            return Err(invalid(FORMAT));
        }
        if domain.len() + 1 + path.len() > MAX_NAME_CHARS {
            return Err(invalid("repository name must not be more than 255 characters"));
        }
        let tag = if tag.is_none() && digest.is_none() { Some("latest".to_owned()) } else { tag };
        Ok(ImageReference { domain, path, tag, digest })
    }

    /// The registry and path, against which credentials are matched.
    pub fn repository(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The pull policy that an image has where the pod states none: `Always` for `:latest`, else `IfNotPresent`.
    pub fn default_pull_policy(&self) -> PullPolicy {
        if self.digest.is_none() && self.tag.as_deref() == Some("latest") {
            PullPolicy::Always
        } else {
            PullPolicy::IfNotPresent
        }
    }
}

impl std::fmt::Display for ImageReference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.domain, self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

/// When an image is fetched from its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    Always,
    IfNotPresent,
    Never,
}

// === impl PullPolicy ===

impl PullPolicy {
    /// The policy by its API name; an absent or unknown one is the image's default.
    pub fn of(name: Option<&str>, reference: &ImageReference) -> PullPolicy {
        match name {
            Some("Always") => PullPolicy::Always,
            Some("IfNotPresent") => PullPolicy::IfNotPresent,
            Some("Never") => PullPolicy::Never,
            _ => reference.default_pull_policy(),
        }
    }
}

fn is_hex(text: &str, chars: usize) -> bool {
    text.len() == chars && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_digest(digest: &str) -> bool {
    match digest.split_once(':') {
        Some(("sha256", hex)) => is_hex(hex, 64),
        Some(("sha384", hex)) => is_hex(hex, 96),
        Some(("sha512", hex)) => is_hex(hex, 128),
        _ => false,
    }
}

fn is_tag(tag: &str) -> bool {
    tag.len() <= MAX_TAG_CHARS
        && tag.bytes().next().is_some_and(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
        && tag.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'-'))
}

fn is_domain(domain: &str) -> bool {
    let (host, port) = match domain.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, port)) => {
            if address.parse::<std::net::Ipv6Addr>().is_err() {
                return false;
            }
            (None, port.strip_prefix(':').or(if port.is_empty() { None } else { Some("bad") }))
        }
        None => match domain.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(domain), None),
        },
    };
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    host.is_none_or(|host| host.split('.').all(label))
        && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Lower-case letters and digits, joined by one `.`, one or two `_`, or any number of `-`.
fn is_path_component(component: &str) -> bool {
    let mut separator = String::new();
    let mut last_was_word = false;
    for c in component.chars() {
        if c.is_ascii_lowercase() || c.is_ascii_digit() {
            let joined = separator.is_empty()
                || matches!(separator.as_str(), "." | "_" | "__")
                || separator.chars().all(|c| c == '-');
            if !joined {
                return false;
            }
            separator.clear();
            last_was_word = true;
        } else if matches!(c, '.' | '_' | '-') && last_was_word {
            separator.push(c);
        } else {
            return false;
        }
    }
    last_was_word && separator.is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn names_are_completed() {
        let digest = format!("sha256:{HEX}");
        let cases = [
            ("busybox".to_owned(), "docker.io/library/busybox:latest".to_owned()),
            ("busybox:1.36".into(), "docker.io/library/busybox:1.36".into()),
            ("docker.io/busybox".into(), "docker.io/library/busybox:latest".into()),
            ("index.docker.io/library/busybox".into(), "docker.io/library/busybox:latest".into()),
            ("user/app".into(), "docker.io/user/app:latest".into()),
            ("localhost/app".into(), "localhost/app:latest".into()),
            ("localhost:5000/app:v1".into(), "localhost:5000/app:v1".into()),
            ("registry.k8s.io/pause:3.10".into(), "registry.k8s.io/pause:3.10".into()),
            ("a.b/c/d__e/f-g--h.i".into(), "a.b/c/d__e/f-g--h.i:latest".into()),
            ("[::1]:5000/app".into(), "[::1]:5000/app:latest".into()),
            (format!("busybox@{digest}"), format!("docker.io/library/busybox@{digest}")),
            (format!("r.io/x:1@{digest}"), format!("r.io/x:1@{digest}")),
        ];
        for (image, want) in cases {
            assert_eq!(ImageReference::parse(&image).map(|r| r.to_string()), Ok(want), "{image}");
        }
    }

    #[test]
    fn what_is_no_name_is_refused() {
        let bad = [
            "",
            "Busybox",
            "a//b",
            "a:",
            "a@sha256:12",
            "a b",
            "-a",
            "a/",
            "/a",
            "a:b:c",
            "a..b",
            "a___b",
            "x.io/A",
            HEX,
        ];
        for image in bad {
            assert!(ImageReference::parse(image).is_err(), "{image}");
        }
        assert_eq!(
            ImageReference::parse("Busybox").expect_err("upper case").to_string(),
            "couldn't parse image name \"Busybox\": repository name must be lowercase"
        );
    }

    #[test]
    fn latest_is_always_pulled_by_default() {
        let policy = |image: &str| ImageReference::parse(image).expect("a name").default_pull_policy();
        assert_eq!(policy("a"), PullPolicy::Always);
        assert_eq!(policy("a:latest"), PullPolicy::Always);
        assert_eq!(policy("a:1"), PullPolicy::IfNotPresent);
        assert_eq!(policy(&format!("a@sha256:{HEX}")), PullPolicy::IfNotPresent);
    }

    proptest::proptest! {
        #[test]
        fn any_text_is_a_name_or_refused(text in ".{0,80}") {
            if let Ok(reference) = ImageReference::parse(&text) {
                proptest::prop_assert_eq!(ImageReference::parse(&reference.to_string()), Ok(reference));
            }
        }

        #[test]
        fn a_complete_name_is_its_own(text in "([a-z0-9]{1,5}[.:/_@-]{0,2}){1,6}") {
            if let Ok(reference) = ImageReference::parse(&text) {
                proptest::prop_assert_eq!(ImageReference::parse(&reference.to_string()), Ok(reference));
            }
        }
    }
}
