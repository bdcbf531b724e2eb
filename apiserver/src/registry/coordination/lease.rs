//! Leases.

use crate::registry::field::{Errors, Field};
use crate::registry::object::text;
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::Value;

pub const RULES: Rules = Rules {
    create_on_update: true,
    unconditional_update: false,
    validate,
    row: Some(|object, clock: &Clock| {
        vec![print::name(object), Value::from(text(object, "/spec/holderIdentity")), clock.age(object)]
    }),
    ..Rules::DEFAULT
};

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    errors.positive(&spec.at("leaseDurationSeconds"));
    errors.not_negative(&spec.at("leaseTransitions"));
    let strategy = spec.at("strategy");
    if strategy.is_set() && strategy.str() != "OldestEmulationVersion" && !strategy.str().contains('/') {
        errors.not_supported(&strategy, &["OldestEmulationVersion"]);
    }
}
