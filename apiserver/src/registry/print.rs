//! What `kubectl get` shows: ages, selectors, lists, in the words that people know.

use super::object::{list, map, text};
use jiff::Timestamp;
use serde_json::Value;

/// The moment at which a table is made.
#[derive(Clone, Copy)]
pub struct Clock(pub Timestamp);

pub const NONE: &str = "<none>";
pub const UNSET: &str = "<unset>";
pub const UNKNOWN: &str = "<unknown>";

// === impl Clock ===

impl Clock {
    pub fn now() -> Clock {
        Clock(Timestamp::now())
    }

    /// How long ago an RFC 3339 time was. As `translateTimestampSince`.
    pub fn since(&self, time: &str) -> String {
        match time.parse::<Timestamp>() {
            Ok(time) => human_duration(self.0.as_second() - time.as_second()),
            Err(_) => UNKNOWN.to_owned(),
        }
    }

    pub fn age(&self, object: &Value) -> Value {
        Value::from(self.since(text(object, "/metadata/creationTimestamp")))
    }
}

/// As `duration.HumanDuration`: two units at most, the second only where it still says something.
pub fn human_duration(seconds: i64) -> String {
    let pair = |big: i64, big_unit: &str, small: i64, small_unit: &str| {
        if small == 0 { format!("{big}{big_unit}") } else { format!("{big}{big_unit}{small}{small_unit}") }
    };
    let (minutes, hours) = (seconds / 60, seconds / 3600);
    match (seconds, minutes, hours) {
        (..-1, _, _) => "<invalid>".to_owned(),
        (-1, _, _) => "0s".to_owned(),
        (..120, _, _) => format!("{seconds}s"),
        (_, ..10, _) => pair(minutes, "m", seconds % 60, "s"),
        (_, ..180, _) => format!("{minutes}m"),
        (_, _, ..8) => pair(hours, "h", minutes % 60, "m"),
        (_, _, ..48) => format!("{hours}h"),
        (_, _, ..192) => pair(hours / 24, "d", hours % 24, "h"),
        (_, _, ..17_520) => format!("{}d", hours / 24),
        (_, _, ..70_080) => pair(hours / 24 / 365, "y", hours / 24 % 365, "d"),
        _ => format!("{}y", hours / 24 / 365),
    }
}

pub fn name(object: &Value) -> Value {
    Value::from(text(object, "/metadata/name"))
}

/// A text, or `<none>`.
pub fn or_none(text: &str) -> Value {
    Value::from(if text.is_empty() { NONE } else { text })
}

pub fn or(text: &str, otherwise: &str) -> Value {
    Value::from(if text.is_empty() { otherwise } else { text })
}

/// The names and the images of a pod template's containers.
pub fn containers(spec: Option<&Value>) -> [Value; 2] {
    let list = spec.map(|spec| list(spec, "/containers")).unwrap_or_default();
    let field = |field: &str| {
        list.iter().map(|c| c.get(field).and_then(Value::as_str).unwrap_or("")).collect::<Vec<_>>().join(",")
    };
    [Value::from(field("name")), Value::from(field("image"))]
}

/// `a=b,c=d` of a map, `<none>` of an empty one.
pub fn labels(labels: Option<&serde_json::Map<String, Value>>) -> String {
    let pairs: Vec<String> =
        labels.into_iter().flatten().map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or(""))).collect();
    if pairs.is_empty() { NONE.to_owned() } else { pairs.join(",") }
}

/// A label selector as people write it. As `FormatLabelSelector`.
pub fn selector(selector: Option<&Value>) -> Value {
    let Some(selector) = selector else { return Value::from(NONE) };
    let mut parts: Vec<(String, String)> = map(selector, "/matchLabels")
        .into_iter()
        .flatten()
        .map(|(k, v)| (k.clone(), format!("{k}={}", v.as_str().unwrap_or(""))))
        .collect();
    for requirement in list(selector, "/matchExpressions") {
        let key = text(requirement, "/key").to_owned();
        let mut values: Vec<&str> = list(requirement, "/values").iter().filter_map(Value::as_str).collect();
        values.sort_unstable();
        let values = values.join(",");
        let part = match text(requirement, "/operator") {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.clone(),
            _ => format!("!{key}"),
        };
        parts.push((key, part));
    }
    parts.sort();
    let parts: Vec<String> = parts.into_iter().map(|(_, part)| part).collect();
    Value::from(if parts.is_empty() { NONE.to_owned() } else { parts.join(",") })
}

/// The short forms of access modes. As `GetAccessModesAsString`.
pub fn access_modes(modes: &[Value]) -> String {
    [("ReadWriteOnce", "RWO"), ("ReadOnlyMany", "ROX"), ("ReadWriteMany", "RWX"), ("ReadWriteOncePod", "RWOP")]
        .iter()
        .filter(|(long, _)| modes.iter().any(|mode| mode == long))
        .map(|(_, short)| *short)
        .collect::<Vec<_>>()
        .join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ages_are_kubectl_s() {
        for (seconds, text) in [
            (-5, "<invalid>"),
            (-1, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (125, "2m5s"),
            (600, "10m"),
            (10_799, "179m"),
            (10_800, "3h"),
            (11_000, "3h3m"),
            (28_800, "8h"),
            (172_799, "47h"),
            (172_800, "2d"),
            (180_000, "2d2h"),
            (700_000, "8d"),
            (63_072_000, "2y"),
            (63_172_800, "2y1d"),
            (300_000_000, "9y"),
        ] {
            assert_eq!(human_duration(seconds), text, "{seconds}");
        }
    }

    #[test]
    fn selectors_are_written_as_people_write_them() {
        let value = json!({"matchLabels": {"b": "1"}, "matchExpressions": [
            {"key": "a", "operator": "In", "values": ["y", "x"]}, {"key": "c", "operator": "DoesNotExist"}]});
        assert_eq!(selector(Some(&value)), "a in (x,y),b=1,!c");
        assert_eq!(selector(None), NONE);
    }
}
