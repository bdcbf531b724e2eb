//! ComponentStatuses: nothing of them is stored; what is shown of one.

use crate::registry::object::{list, text};
use crate::registry::print::{self, Clock};
use crate::registry::rules::Rules;
use serde_json::Value;

pub const RULES: Rules = Rules { row: Some(row), ..Rules::DEFAULT };

/// As `printComponentStatus`.
fn row(object: &Value, _clock: &Clock) -> Vec<Value> {
    let condition = list(object, "/conditions").iter().find(|condition| text(condition, "/type") == "Healthy");
    let of = |path: &str| condition.map_or("", |condition| text(condition, path)).into();
    let status = match condition.map(|condition| text(condition, "/status")) {
        None => "Unknown",
        Some("True") => "Healthy",
        Some(_) => "Unhealthy",
    };
    vec![print::name(object), status.into(), of("/message"), of("/error")]
}
