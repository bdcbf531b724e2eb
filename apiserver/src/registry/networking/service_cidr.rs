//! ServiceCIDRs: from where cluster IPs are given.

use crate::registry::core::node::is_cidr;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{list, semantically_equal};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::Value;

pub const RULES: Rules = Rules {
    generation: true,
    validate,
    validate_update: |new, old, errors| {
        let (now, was) = (new.at("spec"), old.at("spec"));
        if !semantically_equal(now.at("cidrs").value, was.at("cidrs").value) {
            errors.invalid(&now.at("cidrs"), "field is immutable");
        }
    },
    row: Some(|object, clock: &Clock| {
        let cidrs = list(object, "/spec/cidrs").iter().filter_map(Value::as_str).collect::<Vec<_>>().join(",");
        vec![print::name(object), Value::from(cidrs), clock.age(object)]
    }),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let cidrs = spec.at("cidrs");
    if cidrs.is_empty() {
        errors.required(&cidrs, "at least one CIDR required");
    }
    if cidrs.len() > 2 {
        errors.invalid(&cidrs, "may only hold up to 2 values");
    }
    for cidr in cidrs.items() {
        if !is_cidr(cidr.str()) {
            errors.invalid(&cidr, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)");
        }
    }
}
