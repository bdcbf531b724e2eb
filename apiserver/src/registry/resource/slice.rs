//! ResourceSlices: the devices of a node.

use crate::registry::object::text;
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::Value;

pub const RULES: Rules = Rules {
    generation: true,
    validate: |root, errors| {
        let spec = root.at("spec");
        errors.need(&spec.at("driver"));
        errors.need(&spec.at("pool").at("name"));
    },
    validate_update: |new, old, errors| {
        let (now, was) = (new.at("spec"), old.at("spec"));
        for fixed in ["driver", "nodeName"] {
            errors.immutable(&now.at(fixed), &was.at(fixed));
        }
    },
    selectable_names: &["spec.nodeName", "spec.driver"],
    selectable: |object| {
        vec![
            ("spec.nodeName", text(object, "/spec/nodeName").to_owned()),
            ("spec.driver", text(object, "/spec/driver").to_owned()),
        ]
    },
    row: Some(|object, clock: &Clock| {
        vec![
            print::name(object),
            print::or(text(object, "/spec/nodeName"), "<unset>"),
            Value::from(text(object, "/spec/driver")),
            Value::from(text(object, "/spec/pool/name")),
            clock.age(object),
        ]
    }),
    ..Rules::DEFAULT
};
