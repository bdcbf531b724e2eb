//! Expressions in objects, checked when they are written.

use super::field::{Errors, Field};
use apimachinery::cel::{Env, Type};

/// Reports an expression that does not compile, or that comes to a type that is none of `results`, if there are such.
/// Returns its type. As `CompileCELExpression`.
pub fn expression(field: &Field<'_, '_>, env: &Env, results: &[&str], errors: &mut Errors) -> Type {
    let kind = match env.compile(field.str()) {
        Ok(kind) => kind,
        Err(why) => {
            errors.invalid(field, format!("compilation failed: {why}"));
            return Type::Error;
        }
    };
    let name = kind.to_string();
    match results {
        [] => {}
        results if results.contains(&name.as_str()) => {}
        [one] => errors.invalid(field, format!("must evaluate to {one} but got {name}")),
        results => {
            errors.invalid(field, format!("must evaluate to one of [{}] but got {name}", results.join(" ")));
        }
    }
    kind
}
