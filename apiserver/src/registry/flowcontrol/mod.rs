//! flowcontrol.apiserver.k8s.io/v1.

pub mod flow_schema;
pub mod priority_level;

use super::checks::{Is, check};
use super::field::{Errors, Field};

/// Conditions of either kind: named, and each once.
fn conditions(root: &Field<'_, '_>, errors: &mut Errors) {
    check(
        root,
        &[("status.conditions", Is::UniqueBy("type")), ("status.conditions[].type", Is::Required("must not be empty"))],
        errors,
    );
}
