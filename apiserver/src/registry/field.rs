//! A cursor over an object that knows its own path: validation walks with it and reports where it stands. Nothing is
//! allocated until there is an error to report.

use apimachinery::status::{FieldError, FieldErrorKind};
use serde_json::Value;
use std::fmt::Write as _;
use std::net::IpAddr;

static NULL: Value = Value::Null;

/// A value within an object and the path to it. A field that is absent is null.
#[derive(Clone, Copy)]
pub struct Field<'p, 'v> {
    pub value: &'v Value,
    step: Step<'p>,
    parent: Option<&'p Field<'p, 'v>>,
}

#[derive(Clone, Copy)]
enum Step<'p> {
    Root,
    Name(&'p str),
    Index(usize),
    Key(&'p str),
}

/// The errors found so far.
#[derive(Default)]
pub struct Errors(pub Vec<FieldError>);

// === impl Field ===

impl<'p, 'v> Field<'p, 'v> {
    pub fn root(value: &'v Value) -> Self {
        Field { value, step: Step::Root, parent: None }
    }

    /// `.name`
    pub fn at<'b>(&'b self, name: &'b str) -> Field<'b, 'v>
    where
        'p: 'b,
    {
        Field { value: self.value.get(name).unwrap_or(&NULL), step: Step::Name(name), parent: Some(self) }
    }

    /// Another value in the same place.
    pub fn with<'w>(&self, value: &'w Value) -> Field<'p, 'w>
    where
        'v: 'w,
    {
        Field { value, step: self.step, parent: self.parent }
    }

    /// `[name]` of a map.
    pub fn key<'b>(&'b self, name: &'b str) -> Field<'b, 'v>
    where
        'p: 'b,
    {
        Field { value: self.value.get(name).unwrap_or(&NULL), step: Step::Key(name), parent: Some(self) }
    }

    /// The items of a list; none if there is no list.
    pub fn items<'b>(&'b self) -> impl Iterator<Item = Field<'b, 'v>>
    where
        'p: 'b,
        'v: 'b,
    {
        let list = self.value.as_array().map(Vec::as_slice).unwrap_or_default();
        list.iter().enumerate().map(move |(at, value)| Field { value, step: Step::Index(at), parent: Some(self) })
    }

    /// The entries of a map.
    pub fn entries<'b>(&'b self) -> impl Iterator<Item = (&'v str, Field<'b, 'v>)>
    where
        'p: 'b,
        'v: 'b,
    {
        self.value
            .as_object()
            .into_iter()
            .flatten()
            .map(move |(key, value)| (key.as_str(), Field { value, step: Step::Key(key), parent: Some(self) }))
    }

    pub fn is_set(&self) -> bool {
        !self.value.is_null()
    }

    /// The text, or nothing: absent and empty are alike to most rules.
    pub fn str(&self) -> &'v str {
        self.value.as_str().unwrap_or("")
    }

    pub fn is_blank(&self) -> bool {
        self.str().is_empty()
    }

    pub fn int(&self) -> Option<i64> {
        self.value.as_i64()
    }

    pub fn bool(&self) -> bool {
        self.value.as_bool().unwrap_or(false)
    }

    pub fn len(&self) -> usize {
        match self.value {
            Value::Array(list) => list.len(),
            Value::Object(map) => map.len(),
            _ => 0,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// `spec.containers[0].name`
    pub fn path(&self) -> String {
        let mut text = String::new();
        self.write_path(&mut text);
        text
    }

    fn write_path(&self, text: &mut String) {
        if let Some(parent) = self.parent {
            parent.write_path(text);
        }
        match self.step {
            Step::Root => {}
            Step::Name(name) => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(name);
            }
            Step::Index(at) => _ = write!(text, "[{at}]"),
            Step::Key(key) => _ = write!(text, "[{key}]"),
        }
    }
}

/// An address, or what is wrong with it.
fn parse_ip(text: &str) -> Result<IpAddr, &'static str> {
    let without_zeros = |part: &str| match part.trim_start_matches('0') {
        "" => "0".to_owned(),
        rest => rest.to_owned(),
    };
    match text.parse() {
        Ok(IpAddr::V6(ip)) if ip.to_ipv4_mapped().is_some() => Err("must not be an IPv4-mapped IPv6 address"),
        Ok(ip) => Ok(ip),
        Err(_) if text.split('.').map(without_zeros).collect::<Vec<_>>().join(".").parse::<IpAddr>().is_ok() => {
            Err("must not have leading 0s")
        }
        Err(_) => Err("must be a valid IP address, (e.g. 10.9.8.7 or 2001:db8::ffff)"),
    }
}

/// Go shows an absent text as an empty one.
fn shown(field: &Field<'_, '_>) -> Value {
    if field.value.is_null() { Value::from("") } else { field.value.clone() }
}

// === impl Errors ===

impl Errors {
    pub fn invalid(&mut self, field: &Field<'_, '_>, detail: impl Into<String>) {
        self.0.push(FieldError::invalid(field.path(), shown(field), detail));
    }

    pub fn required(&mut self, field: &Field<'_, '_>, detail: &str) {
        self.0.push(FieldError::required(field.path(), detail));
    }

    pub fn forbidden(&mut self, field: &Field<'_, '_>, detail: impl Into<String>) {
        self.0.push(FieldError::forbidden(field.path(), detail));
    }

    pub fn duplicate(&mut self, field: &Field<'_, '_>) {
        self.0.push(FieldError::duplicate(field.path(), field.value.clone()));
    }

    pub fn not_found(&mut self, field: &Field<'_, '_>) {
        self.0.push(FieldError::not_found(field.path(), field.value.clone()));
    }

    pub fn not_supported(&mut self, field: &Field<'_, '_>, supported: &[&str]) {
        self.0.push(FieldError::not_supported(field.path(), shown(field), supported));
    }

    pub fn too_long(&mut self, field: &Field<'_, '_>, max_bytes: usize) {
        self.0.push(FieldError::too_long(field.path(), max_bytes));
    }

    pub fn too_many(&mut self, field: &Field<'_, '_>, max: usize) {
        self.0.push(FieldError::new(
            FieldErrorKind::TooMany,
            field.path(),
            field.len(),
            format!("must have at most {max} items"),
        ));
    }

    /// Invalid, but another value than the field's is shown.
    pub fn invalid_as(&mut self, field: &Field<'_, '_>, value: impl Into<Value>, detail: impl Into<String>) {
        self.0.push(FieldError::invalid(field.path(), value, detail));
    }

    /// Every message of a check such as `is_dns1123_label`.
    pub fn all(&mut self, field: &Field<'_, '_>, messages: Vec<String>) {
        for message in messages {
            self.invalid(field, message);
        }
    }

    // === rules that many kinds share ===

    /// A field that must not be blank. True if it is there.
    pub fn need(&mut self, field: &Field<'_, '_>) -> bool {
        if field.is_blank() {
            self.required(field, "");
            return false;
        }
        true
    }

    /// A blank field is required to have a value, another must be among `supported`.
    pub fn need_one_of(&mut self, field: &Field<'_, '_>, supported: &[&str]) {
        if self.need(field) {
            self.one_of(field, supported);
        }
    }

    /// A field that, where it is set, must be among `supported`.
    pub fn one_of(&mut self, field: &Field<'_, '_>, supported: &[&str]) {
        if field.is_set() && !supported.contains(&field.str()) {
            self.not_supported(field, supported);
        }
    }

    /// A name of this form, where there is one.
    pub fn named(&mut self, field: &Field<'_, '_>, rule: fn(&str) -> Vec<String>) {
        if !field.is_blank() {
            self.all(field, rule(field.str()));
        }
    }

    /// A name of this form, which must be there.
    pub fn need_named(&mut self, field: &Field<'_, '_>, rule: fn(&str) -> Vec<String>) {
        if self.need(field) {
            self.all(field, rule(field.str()));
        }
    }

    /// As `IsValidIP`.
    pub fn ip(&mut self, field: &Field<'_, '_>) -> Option<IpAddr> {
        match parse_ip(field.str()) {
            Ok(ip) => Some(ip),
            Err(message) => {
                self.invalid(field, message);
                None
            }
        }
    }

    /// A number that must be above zero; absent counts as zero.
    pub fn above_zero(&mut self, field: &Field<'_, '_>) {
        let number = field.int().unwrap_or(0);
        if number <= 0 {
            self.invalid_as(field, number, "must be greater than zero");
        }
    }

    /// As `ValidateNonnegativeField`.
    pub fn not_negative(&mut self, field: &Field<'_, '_>) {
        if field.int().is_some_and(|n| n < 0) {
            self.invalid(field, "must be greater than or equal to 0");
        }
    }

    /// As `ValidatePositiveField`.
    pub fn positive(&mut self, field: &Field<'_, '_>) {
        if field.int().is_some_and(|n| n <= 0) {
            self.invalid(field, "must be greater than 0");
        }
    }

    /// As `IsInRange`.
    pub fn in_range(&mut self, field: &Field<'_, '_>, low: i64, high: i64) {
        if field.int().is_some_and(|n| !(low..=high).contains(&n)) {
            self.invalid(field, format!("must be between {low} and {high}, inclusive"));
        }
    }

    pub fn port(&mut self, field: &Field<'_, '_>) {
        self.in_range(field, 1, 65535);
    }

    /// As `ValidateImmutableField`.
    pub fn immutable(&mut self, new: &Field<'_, '_>, old: &Field<'_, '_>) {
        if !super::object::semantically_equal(new.value, old.value) {
            self.invalid(new, "field is immutable");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_path_is_written_as_kubernetes_writes_it() {
        let object = json!({"spec": {"containers": [{"name": "a", "resources": {"limits": {"cpu": "1"}}}]}});
        let root = Field::root(&object);
        let spec = root.at("spec");
        let containers = spec.at("containers");
        let first = containers.items().next().unwrap();
        assert_eq!(first.at("name").path(), "spec.containers[0].name");
        let resources = first.at("resources");
        let limits = resources.at("limits");
        let (name, cpu) = limits.entries().next().unwrap();
        assert_eq!((name, cpu.path().as_str(), cpu.str()), ("cpu", "spec.containers[0].resources.limits[cpu]", "1"));
        let mut errors = Errors::default();
        errors.required(&first.at("image"), "");
        assert_eq!(errors.0[0].to_string(), "spec.containers[0].image: Required value");
    }
}
