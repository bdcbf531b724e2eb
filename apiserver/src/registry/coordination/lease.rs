//! Leases.

use crate::registry::checks::{Is, check};
use crate::registry::object::{drop_disabled, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::names::is_qualified_name;
use serde_json::Value;

/// What coordinated leader election reads, which is off.
const COORDINATED: [&str; 2] = ["strategy", "preferredHolder"];

pub const RULES: Rules = Rules {
    create_on_update: true,
    unconditional_update: false,
    prepare_create: |object| drop_disabled(object, None, "/spec", &COORDINATED),
    prepare_update: |new, old| drop_disabled(new, Some(old), "/spec", &COORDINATED),
    validate: |root, errors| {
        check(root, &[("spec.leaseDurationSeconds", Is::Positive), ("spec.leaseTransitions", Is::NotNegative)], errors);
        let spec = root.at("spec");
        let (strategy, preferred) = (spec.at("strategy"), spec.at("preferredHolder"));
        if strategy.str().contains('/') {
            errors.all(&strategy, is_qualified_name(strategy.str()));
        } else {
            errors.one_of(&strategy, &["OldestEmulationVersion"]);
        }
        if !preferred.is_blank() && strategy.is_blank() {
            errors.forbidden(&preferred, "may only be specified if `strategy` is defined");
        }
    },
    row: Some(|object, clock: &Clock| {
        vec![print::name(object), Value::from(text(object, "/spec/holderIdentity")), clock.age(object)]
    }),
    ..Rules::DEFAULT
};
