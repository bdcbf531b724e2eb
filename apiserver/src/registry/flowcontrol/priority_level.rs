//! PriorityLevelConfigurations.

use crate::registry::field::{Errors, Field};
use crate::registry::object::{child, default, int, set, text};
use crate::registry::print::{self, Clock, NONE};
use crate::registry::rules::Rules;
use serde_json::Value;

pub const RULES: Rules = Rules {
    generation: true,
    status_keeps_metadata: true,
    unconditional_update: false,
    default: defaults,
    validate,
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

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    let (kind, limited) = (spec.at("type"), spec.at("limited"));
    errors.need_one_of(&kind, &["Exempt", "Limited"]);
    match kind.str() {
        "Exempt" if limited.is_set() => errors.forbidden(&limited, "must be nil if the type is not Limited"),
        "Limited" if !limited.is_set() => errors.required(&limited, "must not be empty when type is Limited"),
        _ => {}
    }
    let response = limited.at("limitResponse");
    errors.one_of(&response.at("type"), &["Queue", "Reject"]);
    errors.in_range(&limited.at("lendablePercent"), 0, 100);
    errors.positive(&limited.at("nominalConcurrencyShares"));
    let queuing = response.at("queuing");
    for field in ["handSize", "queues", "queueLengthLimit"] {
        errors.positive(&queuing.at(field));
    }
}

fn row(object: &Value, clock: &Clock) -> Vec<Value> {
    let number = |pointers: &[&str]| {
        let found = pointers.iter().find_map(|pointer| int(object, pointer));
        Value::from(found.map_or(NONE.to_owned(), |n| n.to_string()))
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
