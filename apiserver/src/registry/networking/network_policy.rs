//! NetworkPolicies.

use crate::registry::checks::{Is, check, cidr_warning, legacy_cidr, network_of, parse_cidr};
use crate::registry::core::port_or_name;
use crate::registry::field::{Errors, Field};
use crate::registry::metadata;
use crate::registry::object::{child, default, items_mut, list, set};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::facts::Column;
use apimachinery::status::FieldError;
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
    warnings: |new, _| {
        let (root, mut warnings) = (Field::root(new), Vec::new());
        let spec = root.at("spec");
        for (rules, peers) in [("ingress", "from"), ("egress", "to")] {
            for rule in spec.at(rules).items() {
                for peer in rule.at(peers).items() {
                    let block = peer.at("ipBlock");
                    warnings.extend(cidr_warning(&block.at("cidr")));
                    warnings.extend(block.at("except").items().filter_map(|cidr| cidr_warning(&cidr)));
                }
            }
        }
        warnings
    },
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

/// As `ValidateNetworkPolicySpec`.
fn validate(root: &Field<'_, '_>, errors: &mut Errors) {
    check(
        root,
        &[
            ("spec.podSelector", Is::LabelSelector),
            ("spec.ingress[].ports[]", Is::By(port)),
            ("spec.ingress[].from[]", Is::By(peer)),
            ("spec.egress[].ports[]", Is::By(port)),
            ("spec.egress[].to[]", Is::By(peer)),
        ],
        errors,
    );
    let spec = root.at("spec");
    let types = spec.at("policyTypes");
    if types.len() > 2 {
        errors.invalid(&types, "may not specify more than two policyTypes");
        return;
    }
    types.items().for_each(|kind| errors.one_of(&kind, &["Ingress", "Egress"]));
}

fn port(port: &Field<'_, '_>, errors: &mut Errors) {
    errors.one_of(&port.at("protocol"), &["TCP", "UDP", "SCTP"]);
    let (first, last) = (port.at("port"), port.at("endPort"));
    if first.is_set() {
        port_or_name(&first, errors);
    }
    match (last.int(), first.int()) {
        (None, _) => {}
        (Some(_), None) if first.is_set() => {
            errors.invalid(&last, "may not be specified when `port` is non-numeric");
        }
        (Some(_), None) => errors.invalid(&last, "may not be specified when `port` is not specified"),
        (Some(end), Some(start)) => {
            if end < start {
                errors.0.push(FieldError::invalid(last.path(), start, "must be greater than or equal to `port`"));
            }
            errors.port(&last);
        }
    }
}

fn peer(peer: &Field<'_, '_>, errors: &mut Errors) {
    let (pods, namespaces, block) = (peer.at("podSelector"), peer.at("namespaceSelector"), peer.at("ipBlock"));
    metadata::label_selector(&pods, errors);
    metadata::label_selector(&namespaces, errors);
    ip_block(&block, errors);
    if !pods.is_set() && !namespaces.is_set() && !block.is_set() {
        errors.required(peer, "must specify a peer");
    } else if block.is_set() && (pods.is_set() || namespaces.is_set()) {
        errors.forbidden(peer, "may not specify both ipBlock and another peer");
    }
}

/// As `ValidateIPBlock`: what is excepted lies within, and is less than all of it.
fn ip_block(block: &Field<'_, '_>, errors: &mut Errors) {
    let cidr = block.at("cidr");
    if !block.is_set() || !errors.need(&cidr) {
        return;
    }
    legacy_cidr(&cidr, errors);
    let Some((all, all_bits)) = parse_cidr(cidr.str()) else { return };
    for except in block.at("except").items() {
        legacy_cidr(&except, errors);
        let Some((part, bits)) = parse_cidr(except.str()) else { continue };
        let within = part.is_ipv4() == all.is_ipv4() && network_of(part, all_bits) == network_of(all, all_bits);
        if !within || bits <= all_bits {
            errors.invalid(&except, "must be a strict subset of `cidr`");
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
