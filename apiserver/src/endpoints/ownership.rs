//! `metadata.managedFields` on the way through a write: apart from the object, as text, until the object is stored.
//!
//! Most writes change what their author owns already. So the entries of the stored object are lifted out of its bytes unparsed,
//! looked at only where the write changes something, and put back as text. In an object that is about to be encoded
//! `metadata.managedFields` may be a JSON string: the text of the list.

use super::{ResourceRequest, metadata};
use crate::registry::reset_fields::ignored;
use apimachinery::managed_fields::{ManagedFields, Place, Writer};
use http::HeaderMap;
use http::header::USER_AGENT;
use serde_json::{Value, json};

const MANAGED_FIELDS: &str = "managedFields";
/// As `FieldManagerMaxLength`.
pub const MANAGER_BYTES_MAX: usize = 128;

/// Whose the fields of a new version of an object are.
pub enum Ownership {
    /// The writer's, as far as it changes them.
    OfWriter,
    /// This text says it.
    Given(String),
}

/// The name of a writer who gives none: what its user agent begins with. As `prefixFromUserAgent`.
pub fn manager_of(field_manager: &str, headers: &HeaderMap) -> String {
    if !field_manager.is_empty() {
        return field_manager.to_owned();
    }
    let agent = headers.get(USER_AGENT).and_then(|v| v.to_str().ok()).unwrap_or("");
    let mut name = String::new();
    for c in agent.split('/').next().unwrap_or("").chars().filter(|c| is_printable(*c)) {
        if name.len() + c.len_utf8() > MANAGER_BYTES_MAX {
            break;
        }
        name.push(c);
    }
    name
}

/// As Go's `unicode.IsPrint`, nearly.
pub fn is_printable(c: char) -> bool {
    let invisible = matches!(c, '\u{ad}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}'
        | '\u{e000}'..='\u{f8ff}' | '\u{feff}');
    c == ' ' || !(c.is_control() || c.is_whitespace() || invisible)
}

/// Takes managedFields out of an object that somebody has sent.
pub fn take(object: &mut Value) -> Option<String> {
    match object.get_mut("metadata")?.as_object_mut()?.remove(MANAGED_FIELDS)? {
        Value::Null => None,
        Value::String(text) => Some(text),
        list => Some(list.to_string()),
    }
}

/// Puts the text into an object that is about to be encoded.
pub fn put(object: &mut Value, managed: &str) {
    if !managed.is_empty() {
        metadata::of(object).insert(MANAGED_FIELDS.to_owned(), managed.into());
    }
}

/// Puts the entries into an object that is handed out without being stored.
pub fn put_list(object: &mut Value, managed: &str) {
    if let Ok(list @ Value::Array(_)) = serde_json::from_str(managed) {
        metadata::of(object).insert(MANAGED_FIELDS.to_owned(), list);
    }
}

/// The entries after the request has made `new` of `old`. `stored` are those of before, `sent` those that came with `new`.
/// As `FieldManager.Update`.
pub fn updated(request: &ResourceRequest<'_>, old: &Value, stored: &str, new: &Value, sent: Option<String>) -> String {
    let Some(schema) = request.resource.schema else { return stored.to_owned() };
    let (mut managed, mut changed) = base(request, stored, sent);
    // Who does not track fields is not made to, except by an apply.
    if managed.is_empty() && !metadata::text(old, "uid").is_empty() {
        return String::new();
    }
    let ignored = ignored(request.resource, request.part);
    let convert = |object: &Value, from: &str, to: &str| converted(request, object, from, to);
    let (at, writer) = (Place::Struct(schema), writer(request));
    changed |= managed.update(at, old, new, &writer, ignored, &now(), Some(&convert));
    if changed { managed.write() } else { stored.to_owned() }
}

/// The entries to start from, and whether they are others than the stored ones. As `decodeLiveOrNew`.
fn base(request: &ResourceRequest<'_>, stored: &str, sent: Option<String>) -> (ManagedFields, bool) {
    // A subresource has no say in it.
    if let Some(sent) = sent.filter(|sent| sent != stored && request.attributes.subresource.is_empty()) {
        if serde_json::from_str::<Value>(&sent).is_ok_and(|sent| sent == json!([{}])) {
            return (ManagedFields::default(), true);
        }
        if let Ok(sent) = ManagedFields::parse_sent(&sent)
            && !sent.is_empty()
        {
            return (sent, true);
        }
    }
    (parse(stored), false)
}

/// Reads stored entries; what cannot be read counts as nothing.
pub fn parse(stored: &str) -> ManagedFields {
    ManagedFields::parse(stored).unwrap_or_default()
}

/// Do two texts say the same, but for the times?
pub fn equal_but_for_times(a: &str, b: &str) -> bool {
    a == b || parse(a).equals_but_for_times(&parse(b))
}

/// An object of the request's resource, of one version, in another.
pub fn converted(request: &ResourceRequest<'_>, object: &Value, from: &str, to: &str) -> Option<(Place, Value)> {
    let versions = || request.context.registry.versions_of(request.resource);
    let (from, to) = (versions().find(|v| v.api_version == from)?, versions().find(|v| v.api_version == to)?);
    let mut object = object.clone();
    from.strategy.to_stored(&mut object);
    to.strategy.from_stored(&mut object);
    Some((Place::Struct(to.schema?), object))
}

/// Who writes by this request.
pub fn writer<'a>(request: &'a ResourceRequest<'_>) -> Writer<'a> {
    Writer {
        manager: &request.info.manager,
        api_version: &request.resource.api_version,
        subresource: &request.attributes.subresource,
    }
}

pub fn now() -> String {
    apimachinery::time::rfc3339(apimachinery::time::now().0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::object::split;

    #[test]
    fn managed_fields_are_lifted_out_and_put_back() {
        let text = r#"{"kind":"X","metadata":{"name":"a","managedFields":[{"manager":"m"}],"uid":"u"},"spec":{"metadata":{"managedFields":[]}}}"#;
        let (mut object, managed) = split(text.as_bytes(), &[]);
        assert_eq!(managed, r#"[{"manager":"m"}]"#);
        assert_eq!(
            object,
            json!({"kind": "X", "metadata": {"name": "a", "uid": "u"}, "spec": {"metadata": {"managedFields": []}}})
        );
        put_list(&mut object, &managed);
        assert_eq!(object, serde_json::from_str::<Value>(text).unwrap());
        assert_eq!(take(&mut object), Some(managed));
        put(&mut object, "[]");
        assert_eq!((take(&mut object), take(&mut object)), (Some("[]".to_owned()), None));
    }

    #[test]
    fn a_writer_without_a_name_is_called_after_its_user_agent() {
        let mut headers = HeaderMap::new();
        assert_eq!(manager_of("", &headers), "");
        headers.insert(USER_AGENT, "kubectl/v1.36.0 (linux/amd64)".parse().unwrap());
        assert_eq!(manager_of("", &headers), "kubectl");
        assert_eq!(manager_of("me", &headers), "me");
        headers.insert(USER_AGENT, "x".repeat(200).parse().unwrap());
        assert_eq!(manager_of("", &headers).len(), MANAGER_BYTES_MAX);
    }
}
