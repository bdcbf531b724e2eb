//! ServiceCIDRs: from where cluster IPs are given.

use crate::registry::checks::{fixed, parse_cidr, strict_cidr};
use crate::registry::field::{Errors, Field};
use crate::registry::object::list;
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::status::FieldError;
use serde_json::Value;

pub const RULES: Rules = Rules {
    status_keeps_metadata: true,
    validate,
    validate_update: |new, old, errors| fixed(new, old, &["spec.cidrs"], errors),
    row: Some(|object, clock: &Clock| {
        let cidrs = list(object, "/spec/cidrs").iter().filter_map(Value::as_str).collect::<Vec<_>>().join(",");
        vec![print::name(object), Value::from(cidrs), clock.age(object)]
    }),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let cidrs = spec.at("cidrs");
    let mut wrong = |why: &str| errors.0.push(FieldError::invalid(cidrs.path(), spec.value.clone(), why));
    let families = list(cidrs.value, "").iter().map(|c| c.as_str().and_then(parse_cidr).map(|(ip, _)| ip.is_ipv4()));
    match families.collect::<Vec<_>>().as_slice() {
        [] => errors.required(&cidrs, "at least one CIDR required"),
        [_] | [Some(true), Some(false)] | [Some(false), Some(true)] => {
            cidrs.items().for_each(|cidr| strict_cidr(&cidr, errors));
        }
        [_, _] => {
            wrong("may specify no more than one IP for each IP family, i.e 192.168.0.0/24 and 2001:db8::/64");
        }
        _ => wrong("may only hold up to 2 values"),
    }
}
