//! NetworkPolicies.

use crate::registry::core::port_or_name;
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{child, default, items_mut, list, set};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::facts::Column;
use serde_json::{Value, json};

const COLUMNS: [Column; 3] = [
    Column { name: "Name", kind: "string", format: "name", priority: 0 },
    Column { name: "Pod-Selector", kind: "string", format: "", priority: 0 },
    Column { name: "Age", kind: "string", format: "", priority: 0 },
];

pub const RULES: Rules = Rules {
    generation: true,
    default: defaults,
    validate,
    columns: Some(&COLUMNS),
    row: Some(|object, clock: &Clock| {
        vec![print::name(object), print::selector(object.pointer("/spec/podSelector")), clock.age(object)]
    }),
    ..Rules::DEFAULT
};

/// As `SetDefaults_NetworkPolicy`: egress is only policed where the policy speaks of it.
fn defaults(object: &mut Value) {
    let spec = child(object, "spec");
    child(spec, "podSelector");
    for rules in ["ingress", "egress"] {
        for rule in items_mut(spec, rules) {
            for port in items_mut(rule, "ports") {
                default(port, "protocol", "TCP");
            }
        }
    }
    if list(spec, "/policyTypes").is_empty() {
        let egress = !list(spec, "/egress").is_empty();
        set(spec, "policyTypes", if egress { json!(["Ingress", "Egress"]) } else { json!(["Ingress"]) });
    }
}

fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    let spec = root.at("spec");
    metadata::label_selector(&spec.at("podSelector"), errors);
    for (rules, peers) in [("ingress", "from"), ("egress", "to")] {
        for rule in spec.at(rules).items() {
            for port in rule.at("ports").items() {
                errors.one_of(&port.at("protocol"), &["SCTP", "TCP", "UDP"]);
                let (first, last) = (port.at("port"), port.at("endPort"));
                if first.is_set() {
                    port_or_name(&first, errors);
                }
                if let Some(end) = last.int() {
                    match first.int() {
                        None if first.is_set() => {
                            errors.invalid(&last, "may not be specified when `port` is non-numeric")
                        }
                        None => errors.required(&first, "must be specified when `endPort` is set"),
                        Some(start) if end < start => errors.invalid(&last, "must be greater than or equal to `port`"),
                        Some(_) => errors.port(&last),
                    }
                }
            }
            for peer in rule.at(peers).items() {
                self::peer(&peer, errors);
            }
        }
    }
    let types = spec.at("policyTypes");
    if types.len() > 2 {
        errors.invalid(&types, "may not specify more than two policyTypes");
    }
    for kind in types.items() {
        errors.one_of(&kind, &["Egress", "Ingress"]);
    }
}

fn peer(peer: &Field<'_, '_>, errors: &mut Errors) {
    let (pods, namespaces, block) = (peer.at("podSelector"), peer.at("namespaceSelector"), peer.at("ipBlock"));
    if !pods.is_set() && !namespaces.is_set() && !block.is_set() {
        errors.required(peer, "must specify a peer");
    } else if block.is_set() && (pods.is_set() || namespaces.is_set()) {
        errors.forbidden(peer, "may not specify both ipBlock and another peer");
    }
    metadata::label_selector(&pods, errors);
    metadata::label_selector(&namespaces, errors);
    if block.is_set() {
        let cidr = block.at("cidr");
        let is_cidr = crate::registry::core::node::is_cidr;
        if errors.need(&cidr) && !is_cidr(cidr.str()) {
            errors.invalid(&cidr, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)");
        }
        for except in block.at("except").items() {
            if !is_cidr(except.str()) {
                errors.invalid(&except, "must be a valid CIDR value, (e.g. 10.9.8.0/24 or 2001:db8::/64)");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn egress_is_policed_only_where_it_is_spoken_of() {
        let mut plain = json!({"spec": {"podSelector": {}}});
        defaults(&mut plain);
        assert_eq!(plain["spec"]["policyTypes"], json!(["Ingress"]));
        let mut both = json!({"spec": {"egress": [{"ports": [{"port": 53}]}]}});
        defaults(&mut both);
        assert_eq!(both["spec"]["policyTypes"], json!(["Ingress", "Egress"]));
        assert_eq!(both["spec"]["egress"][0]["ports"][0]["protocol"], "TCP");
        let bad: Value = json!({"spec": {"ingress": [{"from": [{}]}]}});
        let mut errors = Errors::default();
        validate(&Field::root(&bad), &mut errors);
        assert_eq!(errors.0[0].to_string(), "spec.ingress[0].from[0]: Required value: must specify a peer");
    }
}
