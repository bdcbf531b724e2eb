//! PriorityLevelConfigurations.

use super::conditions;
use crate::registry::checks::Is;
use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, int, semantically_equal, set, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use serde_json::{Value, json};

const QUEUES_MAX: i64 = 10_000_000;
const HASH_BITS_MAX: i64 = 60;

pub const RULES: Rules = Rules {
    generation: true,
    status_keeps_metadata: true,
    unconditional_update: false,
    default: defaults,
    validate,
    validate_status: |new, _, errors| conditions(new, errors),
    row: Some(row),
    ..Rules::DEFAULT
};

fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    let set_ints = |target: &mut Value, fields: &[(&str, i64)]| {
        for (field, value) in fields {
            if target.get(*field).is_none() {
                set(target, field, *value);
            }
        }
    };
    match text(spec, "/type") {
        "Exempt" => set_ints(child(spec, "exempt"), &[("nominalConcurrencyShares", 0), ("lendablePercent", 0)]),
        "Limited" => {
            let limited = child(spec, "limited");
            set_ints(limited, &[("nominalConcurrencyShares", 30), ("lendablePercent", 0)]);
            let response = child(limited, "limitResponse");
            default(response, "type", "Reject");
            if response["type"] == "Queue" {
                set_ints(child(response, "queuing"), &[("handSize", 8), ("queues", 64), ("queueLengthLimit", 50)]);
            }
        }
        _ => {}
    }
}

/// As `ValidatePriorityLevelConfigurationSpec`.
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    let (name, kind) = (meta.at("name"), spec.at("type"));
    let (limited, exempt) = (spec.at("limited"), spec.at("exempt"));
    if (name.str() == "exempt") != (kind.str() == "Exempt") {
        errors.invalid(&kind, "type must be 'Exempt' if and only if name is 'exempt'");
    }
    match kind.str() {
        "Exempt" => {
            Is::Required("must not be empty when type is Exempt").check(&exempt, errors);
            Is::Forbidden("must be nil if the type is not Limited").check(&limited, errors);
        }
        "Limited" => {
            Is::Forbidden("must be nil if the type is Limited").check(&exempt, errors);
            Is::Required("must not be empty when type is Limited").check(&limited, errors);
        }
        _ => errors.not_supported(&kind, &["Exempt", "Limited"]),
    }
    for kind in [&limited, &exempt] {
        let shares = kind.at("nominalConcurrencyShares");
        if shares.int().is_some_and(|n| n < 0) {
            errors.invalid(&shares, "must be a non-negative integer");
        }
        errors.in_range(&kind.at("lendablePercent"), 0, 100);
        let borrowing = kind.at("borrowingLimitPercent");
        if borrowing.int().is_some_and(|n| n < 0) {
            errors.invalid(&borrowing, "if specified, must be a non-negative integer");
        }
    }
    if limited.is_set() {
        response(&limited.at("limitResponse"), errors);
    }
    let fixed = json!({"type": "Limited", "limited":
        {"nominalConcurrencyShares": 5, "lendablePercent": 0, "limitResponse": {"type": "Reject"}}});
    if name.str() == "catch-all" && !semantically_equal(&fixed, spec.value) {
        errors.invalid(&spec, "spec of 'catch-all' must equal the fixed value");
    }
}

fn response(response: &Field<'_, '_>, errors: &mut Errors) {
    let (kind, queuing) = (response.at("type"), response.at("queuing"));
    match kind.str() {
        "Reject" => {
            Is::Forbidden("must be nil if limited.limitResponse.type is not Limited").check(&queuing, errors);
        }
        "Queue" if !queuing.is_set() => {
            errors.required(&queuing, "must not be empty if limited.limitResponse.type is Limited");
        }
        "Queue" => self::queuing(&queuing, errors),
        _ => errors.not_supported(&kind, &["Queue", "Reject"]),
    }
}

fn queuing(queuing: &Field<'_, '_>, errors: &mut Errors) {
    let (length, queues, hand) = (queuing.at("queueLengthLimit"), queuing.at("queues"), queuing.at("handSize"));
    for field in [&length, &queues, &hand] {
        if field.int().is_some_and(|n| n <= 0) {
            errors.invalid(field, "must be positive");
        }
    }
    let (deck, cards) = (queues.int().unwrap_or(0), hand.int().unwrap_or(0));
    if deck > QUEUES_MAX {
        errors.invalid(&queues, format!("must not be greater than {QUEUES_MAX}"));
    }
    if cards > deck {
        errors.invalid(&hand, format!("should not be greater than queues ({deck})"));
    } else if cards > 0 && entropy_bits(deck, cards) > HASH_BITS_MAX {
        let what = format!("required entropy bits of deckSize {deck} and handSize {cards}");
        errors.invalid(&hand, format!("{what} should not be greater than {HASH_BITS_MAX}"));
    }
}

/// How many bits of a hash it takes to deal a hand. As `RequiredEntropyBits`.
#[allow(clippy::cast_precision_loss, clippy::cast_possible_truncation)] // Both are small.
fn entropy_bits(deck: i64, cards: i64) -> i64 {
    ((deck as f64).log2() * cards as f64).ceil() as i64
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let number = |pointers: &[&str]| {
        let found = pointers.iter().find_map(|pointer| int(object, pointer));
        found.map_or_else(|| Value::from(NONE), Value::from)
    };
    let queuing = "/spec/limited/limitResponse/queuing";
    vec![
        print::name(object),
        Value::from(text(object, "/spec/type")),
        number(&["/spec/limited/nominalConcurrencyShares", "/spec/exempt/nominalConcurrencyShares"]),
        number(&[&format!("{queuing}/queues")]),
        number(&[&format!("{queuing}/handSize")]),
        number(&[&format!("{queuing}/queueLengthLimit")]),
        clock.age(object),
    ]
}
