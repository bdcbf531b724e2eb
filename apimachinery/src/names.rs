//! Names: which are valid (with Kubernetes' messages), and how new ones are made.
use k8s_openapi::api::core::v1::PodTemplateSpec;
use rand::RngExt as _;

/// The longest DNS label, and the longest label value or name part of a qualified name.
pub const LABEL_MAX_LENGTH: usize = 63;
/// The longest DNS subdomain.
pub const SUBDOMAIN_MAX_LENGTH: usize = 253;
/// Characters of a generated suffix: no vowels or look-alikes, so that no words come about.
const SUFFIX_ALPHABET: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LENGTH: usize = 5;

const LABEL_MESSAGE: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN_MESSAGE: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const DNS1035_MESSAGE: &str = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')";
const QUALIFIED_MESSAGE: &str = "must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')";
const LABEL_VALUE_MESSAGE: &str = "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')";

// === validity: an empty list says valid ===

/// As `IsDNS1123Label`.
pub fn is_dns1123_label(value: &str) -> Vec<String> {
    let mut errors = too_long(value, LABEL_MAX_LENGTH);
    if !is_label(value) {
        // Upstream says so when only the dots are the matter, since people write host names here.
        let dotted = value.contains('.') && is_subdomain(value);
        errors.push(if dotted { "must not contain dots".to_owned() } else { LABEL_MESSAGE.to_owned() });
    }
    errors
}

/// As `IsDNS1123Subdomain`.
pub fn is_dns1123_subdomain(value: &str) -> Vec<String> {
    let mut errors = too_long(value, SUBDOMAIN_MAX_LENGTH);
    if !is_subdomain(value) {
        errors.push(SUBDOMAIN_MESSAGE.to_owned());
    }
    errors
}

/// As `IsDNS1035Label`.
pub fn is_dns1035_label(value: &str) -> Vec<String> {
    let mut errors = too_long(value, LABEL_MAX_LENGTH);
    if !(is_label(value) && value.starts_with(|c: char| c.is_ascii_lowercase())) {
        errors.push(DNS1035_MESSAGE.to_owned());
    }
    errors
}

/// A label or annotation key: `name`, or `prefix/name` with a DNS subdomain before the slash. As `IsQualifiedName`.
pub fn is_qualified_name(value: &str) -> Vec<String> {
    let mut errors = Vec::new();
    let mut parts = value.split('/');
    let name = match (parts.next(), parts.next(), parts.next()) {
        (Some(name), None, _) => name,
        (Some(prefix), Some(name), None) => {
            if prefix.is_empty() {
                errors.push("prefix part must be non-empty".to_owned());
            } else {
                errors.extend(is_dns1123_subdomain(prefix).into_iter().map(|e| format!("prefix part {e}")));
            }
            name
        }
        _ => {
            return vec![format!(
                "a qualified name {QUALIFIED_MESSAGE} with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
            )];
        }
    };
    if name.is_empty() {
        errors.push("name part must be non-empty".to_owned());
    }
    errors.extend(too_long(name, LABEL_MAX_LENGTH).into_iter().map(|e| format!("name part {e}")));
    if !is_qualified_part(name) {
        errors.push(format!("name part {QUALIFIED_MESSAGE}"));
    }
    errors
}

/// As `IsValidLabelValue`.
pub fn is_label_value(value: &str) -> Vec<String> {
    let mut errors = too_long(value, LABEL_MAX_LENGTH);
    if !value.is_empty() && !is_qualified_part(value) {
        errors.push(LABEL_VALUE_MESSAGE.to_owned());
    }
    errors
}

/// Names that may stand in a path of the API. As `IsValidPathSegmentName`.
pub fn is_path_segment(value: &str) -> Vec<String> {
    if value == "." || value == ".." {
        return vec![format!("may not be '{value}'")];
    }
    ["/", "%"].iter().filter(|c| value.contains(**c)).map(|c| format!("may not contain '{c}'")).collect()
}

fn too_long(value: &str, limit: usize) -> Vec<String> {
    if value.len() > limit { vec![format!("must be no more than {limit} characters")] } else { Vec::new() }
}

fn is_label(value: &str) -> bool {
    let alphanumeric = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = value.as_bytes();
    matches!((bytes.first(), bytes.last()), (Some(a), Some(z)) if alphanumeric(a) && alphanumeric(z))
        && bytes.iter().all(|b| alphanumeric(b) || *b == b'-')
}

fn is_subdomain(value: &str) -> bool {
    value.split('.').all(is_label)
}

fn is_qualified_part(value: &str) -> bool {
    let bytes = value.as_bytes();
    matches!((bytes.first(), bytes.last()), (Some(a), Some(z)) if a.is_ascii_alphanumeric() && z.is_ascii_alphanumeric())
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(b))
}

// === new names ===

/// `prefix` and five random characters, cut so that the whole is a valid label. As `SimpleNameGenerator`.
pub fn generate_name(prefix: &str) -> String {
    let mut end = prefix.len().min(LABEL_MAX_LENGTH - SUFFIX_LENGTH);
    while !prefix.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}{}", &prefix[..end], random_suffix(SUFFIX_LENGTH))
}

/// Random characters of the suffix alphabet. As `rand.String`.
pub fn random_suffix(length: usize) -> String {
    let mut rng = rand::rng();
    (0..length).map(|_| char::from(SUFFIX_ALPHABET[rng.random_range(0..SUFFIX_ALPHABET.len())])).collect()
}

/// Maps digits to characters that make no words. As `rand.SafeEncodeString`.
pub fn safe_encode(text: &str) -> String {
    text.bytes().map(|b| char::from(SUFFIX_ALPHABET[usize::from(b) % SUFFIX_ALPHABET.len()])).collect()
}

/// The hash that names a ReplicaSet after its template. It need only tell templates apart: an existing set is found by
/// comparing templates, so it need not equal upstream's. As `ComputeHash`.
pub fn pod_template_hash(template: &PodTemplateSpec, collision_count: Option<i32>) -> String {
    // A template that does not serialise cannot exist: it came from JSON.
    let text = serde_json::to_vec(template).unwrap_or_default();
    let mut hash = fnv1a_32(0x811c_9dc5, &text);
    if let Some(count) = collision_count {
        hash = fnv1a_32(hash, &count.to_le_bytes());
    }
    safe_encode(&hash.to_string())
}

fn fnv1a_32(seed: u32, bytes: &[u8]) -> u32 {
    bytes.iter().fold(seed, |hash, b| (hash ^ u32::from(*b)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn validity() {
        let long = "a".repeat(64);
        for (check, good, bad) in [
            (
                is_dns1123_label as fn(&str) -> Vec<String>,
                vec!["a", "web-1", "1a"],
                vec!["", "A", "-a", "a-", "a.b", "a_b", &long],
            ),
            (is_dns1123_subdomain, vec!["a", "a.b", "1.2.example"], vec!["", "a..b", ".a", "A.b", "a-.b"]),
            (is_dns1035_label, vec!["a", "a-1"], vec!["", "1a", "a-", "A"]),
            (is_qualified_name, vec!["app", "example.com/App_1.x"], vec!["", "/a", "a/", "a/b/c", "-a", "Ex/a", "a b"]),
            (is_label_value, vec!["", "a", "A_b.c-1"], vec!["-a", "a/b", "a b", &long]),
            (is_path_segment, vec!["a", "a:b"], vec![".", "..", "a/b", "a%b"]),
        ] {
            for value in good {
                assert!(check(value).is_empty(), "{value}: {:?}", check(value));
            }
            for value in bad {
                assert!(!check(value).is_empty(), "{value}");
            }
        }
    }

    #[test]
    fn generated_names_are_labels() {
        for prefix in ["a-", &"x".repeat(80)] {
            let name = generate_name(prefix);
            assert!(is_dns1123_label(&name).is_empty(), "{name}");
        }
    }

    #[test]
    fn a_template_hash_depends_on_template_and_collisions() {
        let mut template = PodTemplateSpec::default();
        let first = pod_template_hash(&template, None);
        assert_eq!(first, pod_template_hash(&template, None));
        assert_ne!(first, pod_template_hash(&template, Some(1)));
        template.spec.get_or_insert_default().host_network = Some(true);
        assert_ne!(first, pod_template_hash(&template, None));
    }
}
