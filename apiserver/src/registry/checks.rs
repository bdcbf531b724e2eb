//! Checks as tables: where a value stands and what must hold for it. A kind's file lists its fields here; only what depends
//! on several of them is code. And the forms of values that several groups share.

use super::field::{Errors, Field};
use super::metadata::{self, NameRule};
use super::object::semantically_equal;
use super::rules::Check;
use apimachinery::names::{is_dns1035_label, is_dns1123_subdomain, is_qualified_name};
use apimachinery::quantity::Quantity;
use apimachinery::status::{FieldError, FieldErrorKind};
use std::collections::HashSet;
use std::net::IpAddr;

/// Where: names with dots between; `[]` for each item of a list, `{}` for each entry of a map, and `?` where an absent
/// parent ends it: `spec.tls[].hosts[]`, `spec.parameters?.kind`.
pub type Table = &'static [(&'static str, Is)];

/// What must hold.
#[derive(Clone, Copy)]
pub enum Is {
    /// Neither absent nor empty; with what the error says further.
    Required(&'static str),
    /// Among these, where it is set.
    OneOf(&'static [&'static str]),
    /// There, and among these.
    RequiredOneOf(&'static [&'static str]),
    NotNegative,
    Positive,
    /// A name of this form, where it is not blank.
    Named(NameRule),
    RequiredName(NameRule),
    LabelSelector,
    Conditions,
    /// So many items at most; the list is not looked into any further if there are more.
    AtMost(usize),
    /// So many bytes at most.
    Bytes(usize),
    /// A list, no item twice.
    Unique,
    /// A list, no two items alike in this field.
    UniqueBy(&'static str),
    /// Not to be set, and why.
    Forbidden(&'static str),
    By(Check),
}

/// Holds a value against a table.
pub fn check(root: &Field<'_, '_>, table: Table, errors: &mut Errors) {
    for (path, is) in table {
        each(root, path, &mut |field| is.check(field, errors));
    }
}

/// Fields that stay as they are once made.
pub fn fixed(new: &Field<'_, '_>, old: &Field<'_, '_>, paths: &[&'static str], errors: &mut Errors) {
    for path in paths {
        each(new, path, &mut |now| {
            if !semantically_equal(now.value, at(old, path)) {
                errors.invalid(now, "field is immutable");
            }
        });
    }
}

/// Fields that may not be written again, as some kinds say it.
pub fn forbid_updates(new: &Field<'_, '_>, old: &Field<'_, '_>, fields: &[&'static str], errors: &mut Errors) {
    for name in fields {
        if !semantically_equal(new.at(name).value, old.at(name).value) {
            errors.forbidden(&new.at(name), format!("updates to {name} are forbidden."));
        }
    }
}

fn at<'v>(root: &Field<'_, 'v>, path: &str) -> &'v serde_json::Value {
    path.split('.').fold(root.value, |value, name| value.get(name).unwrap_or(&serde_json::Value::Null))
}

/// Walks a path as a table has it.
pub fn each(field: &Field<'_, '_>, path: &str, run: &mut dyn FnMut(&Field<'_, '_>)) {
    let (step, rest) = path.split_once('.').unwrap_or((path, ""));
    if let Some(name) = step.strip_suffix("[]") {
        field.at(name).items().for_each(|item| go_on(&item, rest, run));
    } else if let Some(name) = step.strip_suffix("{}") {
        field.at(name).entries().for_each(|(_, entry)| go_on(&entry, rest, run));
    } else if let Some(name) = step.strip_suffix('?') {
        let child = field.at(name);
        if child.is_set() {
            go_on(&child, rest, run);
        }
    } else {
        go_on(&field.at(step), rest, run);
    }
}

fn go_on(field: &Field<'_, '_>, rest: &str, run: &mut dyn FnMut(&Field<'_, '_>)) {
    if rest.is_empty() { run(field) } else { each(field, rest, run) }
}

// === impl Is ===

impl Is {
    pub fn check(self, field: &Field<'_, '_>, errors: &mut Errors) {
        match self {
            Is::Required(detail) => {
                let blank = match field.value {
                    serde_json::Value::Null => true,
                    serde_json::Value::String(text) => text.is_empty(),
                    serde_json::Value::Array(list) => list.is_empty(),
                    _ => false,
                };
                if blank {
                    errors.required(field, detail);
                }
            }
            Is::OneOf(values) => errors.one_of(field, values),
            Is::RequiredOneOf(values) => errors.need_one_of(field, values),
            Is::NotNegative => errors.not_negative(field),
            Is::Positive => errors.positive(field),
            Is::Named(rule) => {
                if !field.is_blank() {
                    errors.all(field, rule(field.str()));
                }
            }
            Is::RequiredName(rule) => {
                if errors.need(field) {
                    errors.all(field, rule(field.str()));
                }
            }
            Is::LabelSelector => metadata::label_selector(field, errors),
            Is::Conditions => conditions(field, errors),
            Is::AtMost(max) => {
                if field.len() > max {
                    errors.too_many(field, max);
                }
            }
            Is::Bytes(max) => {
                if field.str().len() > max {
                    errors.too_long(field, max);
                }
            }
            Is::Unique => {
                let mut seen = HashSet::new();
                for item in field.items().filter(|item| !seen.insert(item.str())) {
                    errors.duplicate(&item);
                }
            }
            Is::UniqueBy(name) => {
                let mut seen = HashSet::new();
                for item in field.items() {
                    let key = item.at(name);
                    if !key.is_blank() && !seen.insert(key.str()) {
                        errors.duplicate(&key);
                    }
                }
            }
            Is::Forbidden(why) => {
                if field.is_set() {
                    errors.forbidden(field, why);
                }
            }
            Is::By(check) => check(field, errors),
        }
    }
}

// === forms that several groups share ===

/// As `metav1validation.ValidateConditions`.
pub fn conditions(conditions: &Field<'_, '_>, errors: &mut Errors) {
    const REASON_MAX: usize = 1024;
    const MESSAGE_MAX: usize = 32 * 1024;
    let mut seen = HashSet::new();
    for condition in conditions.items() {
        let (kind, reason, message) = (condition.at("type"), condition.at("reason"), condition.at("message"));
        if !seen.insert(kind.str()) {
            errors.duplicate(&kind);
        }
        errors.all(&kind, is_qualified_name(kind.str()));
        let status = condition.at("status");
        if !matches!(status.str(), "False" | "True" | "Unknown") {
            errors.not_supported(&status, &["False", "True", "Unknown"]);
        }
        let generation = condition.at("observedGeneration");
        if generation.int().is_some_and(|n| n < 0) {
            errors.invalid(&generation, "must be greater than or equal to zero");
        }
        for needed in ["lastTransitionTime", "reason"] {
            if condition.at(needed).is_blank() {
                errors.required(&condition.at(needed), "must be set");
            }
        }
        if !reason.is_blank() && !is_condition_reason(reason.str()) {
            errors.invalid(
                &reason,
                "a condition reason must start with alphabetic character, optionally followed by a string of alphanumeric characters or '_,:', and must end with an alphanumeric character or '_' (e.g. 'my_name',  or 'MY_NAME',  or 'MyName',  or 'ReasonA,ReasonB',  or 'ReasonA:ReasonB', regex used for validation is '[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?')",
            );
        }
        Is::Bytes(REASON_MAX).check(&reason, errors);
        Is::Bytes(MESSAGE_MAX).check(&message, errors);
    }
}

fn is_condition_reason(reason: &str) -> bool {
    let (first, last) = (reason.bytes().next(), reason.bytes().last());
    first.is_some_and(|b| b.is_ascii_alphabetic())
        && last.is_some_and(|b| b.is_ascii_alphanumeric() || b == b'_')
        && reason.bytes().all(|b| b.is_ascii_alphanumeric() || b"_,:".contains(&b))
}

/// `example.com/path`. As `IsDomainPrefixedPath`.
pub fn domain_prefixed_path(field: &Field<'_, '_>, errors: &mut Errors) {
    if !errors.need(field) {
        return;
    }
    let Some((host, path)) = field.str().split_once('/').filter(|(host, path)| !host.is_empty() && !path.is_empty())
    else {
        errors.invalid(field, "must be a domain-prefixed path (such as \"acme.io/foo\")");
        return;
    };
    for message in is_dns1123_subdomain(host) {
        errors.0.push(FieldError::invalid(field.path(), host, message));
    }
    if !path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/-._~%!$&'()*+,;=:".contains(&b)) {
        let message = "Invalid path (regex used for validation is '[A-Za-z0-9/\\-._~%!$&'()*+,;=:]+')";
        errors.0.push(FieldError::invalid(field.path(), path, message));
    }
}

/// At least three parts. As `IsFullyQualifiedName`.
pub fn fully_qualified_name(field: &Field<'_, '_>, errors: &mut Errors) {
    if !errors.need(field) {
        return;
    }
    let messages = is_dns1123_subdomain(field.str());
    if !messages.is_empty() {
        errors.invalid(field, messages.join(","));
    } else if field.str().split('.').count() < 3 {
        errors.invalid(field, "should be a domain with at least three segments separated by dots");
    }
}

/// As `ValidateCSIDriverName`, which holds for drivers of devices too.
pub fn driver_name(field: &Field<'_, '_>, errors: &mut Errors) {
    const DRIVER_NAME_MAX: usize = 63;
    if errors.need(field) {
        Is::Bytes(DRIVER_NAME_MAX).check(field, errors);
        errors.all(field, is_dns1123_subdomain(&field.str().to_lowercase()));
    }
}

/// A domain, or `*.` and a domain; never an address. As Ingresses name hosts.
pub fn host(field: &Field<'_, '_>, errors: &mut Errors) {
    if field.str().contains('*') {
        let ok = field.str().strip_prefix("*.").is_some_and(|rest| is_dns1123_subdomain(rest).is_empty());
        if !ok {
            errors.invalid(
                field,
                "a wildcard DNS-1123 subdomain must start with '*.', followed by a valid DNS subdomain, which must consist of lower case alphanumeric characters, '-' or '.' and end with an alphanumeric character (e.g. '*.example.com', regex used for validation is '\\*\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')",
            );
        }
    } else {
        errors.all(field, is_dns1123_subdomain(field.str()));
    }
}

/// A name in mixed case that is a DNS label otherwise.
pub fn kind_name(field: &Field<'_, '_>, errors: &mut Errors) {
    let messages = is_dns1035_label(&field.str().to_lowercase());
    if !messages.is_empty() {
        errors.invalid(field, format!("may have mixed case, but should otherwise match: {}", messages.join(",")));
    }
}

/// One error with all messages, as some groups write it.
pub fn joined(field: &Field<'_, '_>, rule: NameRule, errors: &mut Errors) {
    let messages = rule(field.str());
    if !messages.is_empty() {
        errors.invalid(field, messages.join(","));
    }
}

/// A quantity that is not below zero. As `ValidateNonnegativeQuantity`.
pub fn not_negative_quantity(field: &Field<'_, '_>, errors: &mut Errors) {
    if Quantity::parse(field.str()).is_ok_and(|quantity| quantity < Quantity::ZERO) {
        errors.invalid(field, "must be greater than or equal to 0");
    }
}

/// As `netutils.ParseCIDR`: the address and the length of its prefix.
pub fn parse_cidr(text: &str) -> Option<(IpAddr, u8)> {
    let (address, bits) = text.split_once('/')?;
    let (address, bits) = (address.parse::<IpAddr>().ok()?, bits.parse::<u8>().ok()?);
    (bits <= if address.is_ipv4() { 32 } else { 128 }).then_some((address, bits))
}

/// The address with the host's bits cleared.
pub fn network_of(address: IpAddr, bits: u8) -> IpAddr {
    match address {
        IpAddr::V4(ip) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(bits.min(32))).unwrap_or(0);
            IpAddr::V4((u32::from(ip) & mask).into())
        }
        IpAddr::V6(ip) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(bits.min(128))).unwrap_or(0);
            IpAddr::V6((u128::from(ip) & mask).into())
        }
    }
}

/// Any CIDR that has a meaning. As `IsValidCIDRForLegacyField`.
pub fn legacy_cidr(field: &Field<'_, '_>, errors: &mut Errors) {
    if parse_cidr(field.str()).is_none() {
        errors.invalid(field, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)");
    }
}

/// A CIDR that could be written better. As `GetWarningsForCIDR`.
pub fn cidr_warning(field: &Field<'_, '_>) -> Option<String> {
    let (address, bits) = parse_cidr(field.str())?;
    let (network, all) = (network_of(address, bits), if address.is_ipv4() { 32 } else { 128 });
    let (canonical, text, path) = (format!("{network}/{bits}"), field.str(), field.path());
    if address != network {
        let why =
            format!("is ambiguous in this context (should be {canonical:?} or {:?}?)", format!("{address}/{all}"));
        return Some(format!("{path}: CIDR value {text:?} {why}"));
    }
    (address.is_ipv6() && text != canonical)
        .then(|| format!("{path}: IPv6 CIDR value {text:?} should be in RFC 5952 canonical format ({canonical:?})"))
}

/// Only the canonical writing. As `IsValidCIDR`.
pub fn strict_cidr(field: &Field<'_, '_>, errors: &mut Errors) {
    let Some((address, bits)) = parse_cidr(field.str()) else {
        errors.invalid(field, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)");
        return;
    };
    let canonical = format!("{}/{bits}", network_of(address, bits));
    if network_of(address, bits) != address {
        errors.invalid(field, "must not have bits set beyond the prefix length");
    } else if canonical != field.str() {
        errors.invalid(field, format!("must be in canonical form ({canonical:?})"));
    }
}

/// Something without a value to show.
pub fn invalid_without_value(field: &Field<'_, '_>, detail: &str, errors: &mut Errors) {
    errors.0.push(FieldError::new(FieldErrorKind::Invalid, field.path(), "", detail));
}

/// The text of labels that are wrong as names of hosts. As the workloads warn of.
pub fn host_name_warning(name: &str) -> Option<String> {
    let messages = apimachinery::names::is_dns1123_label(name);
    (!messages.is_empty()).then(|| {
        format!(
            "metadata.name: this is used in Pod names and hostnames, which can result in surprising behavior; a DNS label is recommended: [{}]",
            messages.join(" ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_table_walks_lists_maps_and_what_may_be_absent() {
        let object = json!({"a": [{"b": ""}, {"b": "x"}], "m": {"k": {"n": -1}}, "list": ["p", "q", "p"]});
        let mut errors = Errors::default();
        let table: Table = &[
            ("a[].b", Is::Required("why")),
            ("m{}.n", Is::NotNegative),
            ("none?.b", Is::Required("")),
            ("none.b", Is::Required("")),
            ("list", Is::Unique),
            ("list[]", Is::OneOf(&["p"])),
        ];
        check(&Field::root(&object), table, &mut errors);
        let found: Vec<String> = errors.0.iter().map(ToString::to_string).collect();
        assert_eq!(
            found,
            [
                "a[0].b: Required value: why",
                "m[k].n: Invalid value: -1: must be greater than or equal to 0",
                "none.b: Required value",
                "list[2]: Duplicate value: \"p\"",
                "list[1]: Unsupported value: \"q\": supported values: \"p\"",
            ]
        );
    }

    #[test]
    fn networks_are_written_canonically() {
        let cases = [
            ("10.0.0.0/8", true, true),
            ("10.1.0.0/8", true, false),
            ("2001:db8::/32", true, true),
            ("2001:DB8::/32", true, false),
            ("10.0.0.0/33", false, false),
            ("0.0.0.0/0", true, true),
            ("::/0", true, true),
            ("x", false, false),
        ];
        for (text, legacy, strict) in cases {
            let value = json!(text);
            let ok = |check: fn(&Field<'_, '_>, &mut Errors)| {
                let mut errors = Errors::default();
                check(&Field::root(&value), &mut errors);
                errors.0.is_empty()
            };
            assert_eq!((ok(legacy_cidr), ok(strict_cidr)), (legacy, strict), "{text}");
        }
    }
}
