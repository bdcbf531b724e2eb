//! Validating- and MutatingAdmissionPolicies and their bindings. Their expressions are checked here, and evaluated where
//! requests are admitted.

use super::matching::{match_conditions, match_defaults, match_resources};
use crate::registry::cel;
use crate::registry::checks::{Is, Table, check, kind_name};
use crate::registry::field::{Errors, Field};
use crate::registry::metadata::{path_segment, subdomain};
use crate::registry::object::{child, default, list, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use apimachinery::cel::{Env, Type, is_identifier};
use apimachinery::facts::Column;
use apimachinery::names::{is_dns1035_label, is_dns1123_subdomain, is_qualified_name};
use apimachinery::status::FieldError;
use serde_json::Value;
use std::collections::HashSet;

const ANNOTATIONS_MAX: usize = 20;
const ANNOTATION_EXPRESSION_MAX_BYTES: usize = 5 * 1024;

pub const POLICY: Rules = Rules {
    generation: true,
    status_keeps_metadata: true,
    unconditional_update: false,
    default: |object| {
        let spec = child(object, "spec");
        default(spec, "failurePolicy", "Fail");
        if let Some(constraints) = spec.get_mut("matchConstraints") {
            match_defaults(constraints);
        }
    },
    validate_create: |root, errors| validate(root, None, errors),
    validate_update: |new, old, errors| validate(new, Some(old), errors),
    validate_status: |new, _, errors| {
        let table: Table = &[
            ("status.typeChecking?.expressionWarnings[].warning", Is::Required("")),
            ("status.typeChecking?.expressionWarnings[].fieldRef", Is::Required("")),
            ("status.conditions", Is::Conditions),
        ];
        check(new, table, errors);
    },
    columns: Some(&POLICY_COLUMNS),
    row: Some(|object, clock: &Clock| policy_row(object, "/spec/validations", clock)),
    ..Rules::DEFAULT
};

/// As [`POLICY`], of mutations.
pub const MUTATING_POLICY: Rules = Rules {
    validate_create: |root, errors| validate_mutating(root, None, errors),
    validate_update: |new, old, errors| validate_mutating(new, Some(old), errors),
    columns: Some(&MUTATING_COLUMNS),
    row: Some(|object, clock: &Clock| policy_row(object, "/spec/mutations", clock)),
    ..POLICY
};

pub const BINDING: Rules = Rules {
    generation: true,
    unconditional_update: false,
    default: |object| {
        if let Some(resources) = object.pointer_mut("/spec/matchResources") {
            match_defaults(resources);
        }
    },
    validate: |root, errors| {
        check(root, BINDING_TABLE, errors);
        check(root, &[("spec.validationActions", Is::By(validation_actions))], errors);
    },
    columns: Some(&BINDING_COLUMNS),
    row: Some(binding_row),
    ..Rules::DEFAULT
};

pub const MUTATING_BINDING: Rules = Rules { validate: |root, errors| check(root, BINDING_TABLE, errors), ..BINDING };

const BINDING_TABLE: Table = &[
    ("spec.policyName", Is::RequiredName(subdomain)),
    ("spec.paramRef", Is::By(param_ref)),
    ("spec.matchResources", Is::By(match_resources)),
];

const fn column(name: &'static str, kind: &'static str) -> Column {
    Column { name, kind, format: "", priority: 0 }
}

const NAME: Column = Column { name: "Name", kind: "string", format: "name", priority: 0 };
const POLICY_COLUMNS: [Column; 4] =
    [NAME, column("Validations", "integer"), column("ParamKind", "string"), column("Age", "string")];
const MUTATING_COLUMNS: [Column; 4] =
    [NAME, column("Mutations", "integer"), column("ParamKind", "string"), column("Age", "string")];
const BINDING_COLUMNS: [Column; 4] =
    [NAME, column("PolicyName", "string"), column("ParamRef", "string"), column("Age", "string")];

/// Expressions that stood somewhere in the old object's list: they are not parsed anew.
fn stood(old: Option<&Field<'_, '_>>, items: &str, field: &str, expression: &Field<'_, '_>) -> bool {
    let pointer = format!("/{field}");
    old.is_some_and(|old| list(old.value, items).iter().any(|item| text(item, &pointer) == expression.str()))
}

/// What both kinds of policies have. Returns what their expressions may speak of.
fn common(root: &Field<'_, '_>, old: Option<&Field<'_, '_>>, patches: bool, errors: &mut Errors) -> Env {
    let spec = root.at("spec");
    errors.need_one_of(&spec.at("failurePolicy"), &["Fail", "Ignore"]);
    let (kind, constraints) = (spec.at("paramKind"), spec.at("matchConstraints"));
    if kind.is_set() {
        param_kind(&kind, errors);
    }
    if constraints.is_set() {
        match_resources(&constraints, errors);
        Is::Required("").check(&constraints.at("resourceRules"), errors);
    } else {
        errors.required(&constraints, "");
    }
    let before = old.and_then(|old| old.value.pointer("/spec/matchConditions"));
    let mut env = Env { patches, ..Env::of_requests(&Type::Dyn) };
    if kind.is_set() {
        env = env.and("params", Type::Dyn);
    }
    match_conditions(&spec.at("matchConditions"), &env, before, errors);
    env = env.and("variables", Type::Variables([].into()));
    for variable in spec.at("variables").items() {
        let (name, expression) = (variable.at("name"), variable.at("expression"));
        if name.str().trim().is_empty() {
            errors.required(&name, "name is not specified");
        } else if !is_identifier(name.str()) {
            errors.invalid(&name, "name is not a valid CEL identifier");
        }
        // One may build on those before it.
        let kind = if expression.str().trim().is_empty() {
            errors.required(&expression, "expression is not specified");
            Type::Dyn
        } else if stood(old, "/spec/variables", "expression", &expression) {
            env.compile(expression.str()).unwrap_or(Type::Dyn)
        } else {
            cel::expression(&expression, &env, &[], errors)
        };
        env.define(name.str(), &kind);
    }
    env
}

/// As `validateValidatingAdmissionPolicySpec`.
fn validate(root: &Field<'_, '_>, old: Option<&Field<'_, '_>>, errors: &mut Errors) {
    let env = common(root, old, false, errors);
    let (meta, spec) = (root.at("metadata"), root.at("spec"));
    let (validations, annotations) = (spec.at("validations"), spec.at("auditAnnotations"));
    if validations.is_empty() && annotations.is_empty() {
        let why = "validations or auditAnnotations must contain at least one item";
        errors.required(&validations, why);
        errors.required(&annotations, why);
    }
    validations.items().for_each(|item| validation(&item, &env, old, errors));
    if annotations.len() > ANNOTATIONS_MAX {
        errors.invalid(&annotations, format!("must not have more than {ANNOTATIONS_MAX} auditAnnotations"));
    }
    let name = meta.at("name").str().to_owned();
    for annotation in annotations.items() {
        let (key, expression) = (annotation.at("key"), annotation.at("valueExpression"));
        let whole = format!("{name}/{}", key.str());
        for message in is_qualified_name(&whole) {
            errors.0.push(FieldError::invalid(key.path(), whole.as_str(), message));
        }
        let trimmed = expression.str().trim();
        if trimmed.is_empty() {
            errors.required(&expression, "valueExpression is not specified");
        } else if trimmed.len() > ANNOTATION_EXPRESSION_MAX_BYTES {
            let why = format!("must not exceed {ANNOTATION_EXPRESSION_MAX_BYTES} bytes in length");
            errors.required(&expression, &why);
        } else if !stood(old, "/spec/auditAnnotations", "valueExpression", &expression) {
            cel::expression(&expression, &env, &["string", "null_type"], errors);
        }
    }
    Is::UniqueBy("key").check(&annotations, errors);
}

/// As `validateValidation`.
fn validation(validation: &Field<'_, '_>, env: &Env, old: Option<&Field<'_, '_>>, errors: &mut Errors) {
    let (expression, message) = (validation.at("expression"), validation.at("message"));
    let (message_expression, reason) = (validation.at("messageExpression"), validation.at("reason"));
    if expression.str().trim().is_empty() {
        errors.required(&expression, "expression is not specified");
    } else if !stood(old, "/spec/validations", "expression", &expression) {
        cel::expression(&expression, env, &["bool"], errors);
    }
    if !message_expression.is_blank() && message_expression.str().trim().is_empty() {
        errors.invalid(&message_expression, "must be non-empty if specified");
    } else if !message_expression.is_blank()
        && !stood(old, "/spec/validations", "messageExpression", &message_expression)
    {
        cel::expression(&message_expression, &env.clone().without(&["authorizer"]), &["string"], errors);
    }
    if !message.is_blank() && message.str().trim().is_empty() {
        errors.invalid(&message, "message must be non-empty if specified");
    } else if message.str().trim().contains(['\n', '\r']) {
        errors.invalid(&message, "message must not contain line breaks");
    }
    errors.one_of(&reason, &["Forbidden", "Invalid", "RequestEntityTooLarge"]);
}

/// As `validateMutatingAdmissionPolicySpec`.
fn validate_mutating(root: &Field<'_, '_>, old: Option<&Field<'_, '_>>, errors: &mut Errors) {
    let env = common(root, old, true, errors);
    let spec = root.at("spec");
    let mutations = spec.at("mutations");
    if mutations.is_empty() {
        errors.required(&mutations, "mutations must contain at least one item");
    }
    for mutation in mutations.items() {
        let kind = mutation.at("patchType");
        let (own, other, result) = match kind.str() {
            "JSONPatch" => ("jsonPatch", "applyConfiguration", "list(JSONPatch)"),
            "ApplyConfiguration" => ("applyConfiguration", "jsonPatch", "Object"),
            "" => {
                errors.required(&kind, "");
                continue;
            }
            _ => {
                errors.not_supported(&kind, &["ApplyConfiguration", "JSONPatch"]);
                continue;
            }
        };
        let (patch, other) = (mutation.at(own), mutation.at(other));
        if other.is_set() {
            errors.invalid(&other, format!("must not be specified when patchType is {}", kind.str()));
        }
        if !patch.is_set() {
            errors.required(&patch, &format!("must be specified when patchType is {}", kind.str()));
            continue;
        }
        let expression = patch.at("expression");
        if expression.str().trim().is_empty() {
            errors.required(&expression, "expression is not specified");
        } else if !old.is_some_and(|old| {
            let before = format!("/{own}/expression");
            list(old.value, "/spec/mutations").iter().any(|m| text(m, &before) == expression.str())
        }) {
            cel::expression(&expression, &env, &[result], errors);
        }
    }
    errors.need_one_of(&spec.at("reinvocationPolicy"), &["IfNeeded", "Never"]);
}

/// As `validateParamKind`.
fn param_kind(kind: &Field<'_, '_>, errors: &mut Errors) {
    let (api_version, name) = (kind.at("apiVersion"), kind.at("kind"));
    if errors.need(&api_version) {
        let (group, version) = match api_version.str().split('/').collect::<Vec<_>>().as_slice() {
            [version] => ("", *version),
            [group, version] => (*group, *version),
            _ => {
                errors.invalid(&api_version, format!("unexpected GroupVersion string: {}", api_version.str()));
                ("", "v1")
            }
        };
        let mut refuse = |value: &str, messages: Vec<String>| {
            if !messages.is_empty() {
                errors.0.push(FieldError::invalid(api_version.path(), value, messages.join(",")));
            }
        };
        if !group.is_empty() {
            refuse(group, is_dns1123_subdomain(group));
        }
        if version.is_empty() {
            refuse(api_version.str(), vec!["version must be specified".to_owned()]);
        } else {
            refuse(version, is_dns1035_label(version));
        }
    }
    if errors.need(&name) {
        kind_name(&name, errors);
    }
}

/// As `validateParamRef`.
fn param_ref(reference: &Field<'_, '_>, errors: &mut Errors) {
    if !reference.is_set() {
        return;
    }
    let (name, selector) = (reference.at("name"), reference.at("selector"));
    Is::Named(path_segment).check(&name, errors);
    Is::LabelSelector.check(&selector, errors);
    match (!name.is_blank(), selector.is_set()) {
        (true, true) => {
            errors.forbidden(&name, "name and selector are mutually exclusive");
            errors.forbidden(&selector, "name and selector are mutually exclusive");
        }
        (false, false) => errors.required(reference, "one of name or selector must be specified"),
        _ => {}
    }
    errors.need_one_of(&reference.at("parameterNotFoundAction"), &["Deny", "Allow"]);
}

/// As `validateValidationActions`.
fn validation_actions(actions: &Field<'_, '_>, errors: &mut Errors) {
    let mut seen = HashSet::new();
    for action in actions.items() {
        errors.one_of(&action, &["Audit", "Deny", "Warn"]);
        if !seen.insert(action.str().to_owned()) {
            errors.duplicate(&action);
        }
    }
    if seen.contains("Deny") && seen.contains("Warn") {
        errors.invalid(
            actions,
            "must not contain both Deny and Warn (repeating the same validation failure information in the API response and headers serves no purpose)",
        );
    }
    if seen.is_empty() {
        errors.required(actions, "at least one validation action is required");
    }
}

fn policy_row(object: &Value, items: &str, clock: &Clock) -> Vec<Value> {
    let kind = object.pointer("/spec/paramKind").map(|p| format!("{}/{}", text(p, "/apiVersion"), text(p, "/kind")));
    vec![
        print::name(object),
        Value::from(list(object, items).len()),
        Value::from(kind.unwrap_or_else(|| print::UNSET.to_owned())),
        clock.age(object),
    ]
}

fn binding_row(object: &Value, clock: &Clock) -> Vec<Value> {
    let reference = object.pointer("/spec/paramRef").map(|p| match (text(p, "/namespace"), text(p, "/name")) {
        ("", name) => name.to_owned(),
        (namespace, name) => format!("{namespace}/{name}"),
    });
    vec![
        print::name(object),
        Value::from(text(object, "/spec/policyName")),
        Value::from(reference.unwrap_or_else(|| print::UNSET.to_owned())),
        clock.age(object),
    ]
}
