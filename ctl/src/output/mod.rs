//! How objects are shown: `-o json|yaml|name|jsonpath=…|custom-columns=…`, tables, ages.

pub(crate) mod jsonpath;
pub(crate) mod table;

use std::time::Duration;

use anyhow::{Result, bail};
use jiff::Timestamp;
use serde_json::{Value, json};

use crate::cluster::Resource;
use crate::objects::{name, strip_managed_fields};

/// A parsed `-o`.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Format {
    Table { wide: bool },
    Json,
    Yaml,
    Name,
    JsonPath(jsonpath::Template),
    CustomColumns(Vec<(String, jsonpath::Path)>),
}

impl Format {
    /// Parses `-o`; nothing means a table.
    pub(crate) fn parse(text: Option<&str>) -> Result<Format> {
        let text = text.unwrap_or_default();
        let (word, argument) = match text.split_once('=') {
            Some((word, argument)) => (word, Some(argument)),
            None => (text, None),
        };
        let file = |path: &str| {
            std::fs::read_to_string(path).map_err(|error| anyhow::anyhow!("error reading {path}: {error}"))
        };
        Ok(match (word, argument) {
            ("", None) => Format::Table { wide: false },
            ("wide", None) => Format::Table { wide: true },
            ("json", None) => Format::Json,
            ("yaml", None) => Format::Yaml,
            ("name", None) => Format::Name,
            ("jsonpath" | "jsonpath-as-json", Some(template)) => Format::JsonPath(jsonpath::Template::parse(template)?),
            ("jsonpath-file", Some(path)) => Format::JsonPath(jsonpath::Template::parse(file(path)?.trim_end())?),
            ("custom-columns", Some(columns)) => Format::CustomColumns(custom_columns(columns)?),
            ("custom-columns-file", Some(path)) => Format::CustomColumns(custom_columns_file(&file(path)?)?),
            ("jsonpath" | "custom-columns", None) => bail!("template format specified but no template given"),
            _ => bail!(
                "unable to match a printer suitable for the output format {text:?}, allowed formats are: custom-columns,custom-columns-file,json,jsonpath,jsonpath-file,name,wide,yaml"
            ),
        })
    }

    pub(crate) fn is_table(&self) -> bool {
        matches!(self, Format::Table { .. })
    }

    /// The text for an object (or a list). `resource` names it for `-o name`.
    pub(crate) fn render(&self, object: &Value, resource: Option<&Resource>, no_headers: bool) -> Result<String> {
        Ok(match self {
            Format::Json => json_text(object)?,
            Format::Yaml => apimachinery::yaml::to_string(object)?,
            Format::Name | Format::Table { .. } => {
                let items = list_items(object);
                items.iter().map(|item| format!("{}\n", reference(item, resource))).collect()
            }
            Format::JsonPath(template) => template.render(object),
            Format::CustomColumns(columns) => {
                let mut rows = Vec::new();
                if !no_headers {
                    rows.push(columns.iter().map(|(heading, _)| heading.clone()).collect());
                }
                for item in list_items(object) {
                    rows.push(columns.iter().map(|(_, path)| column_text(path, item)).collect());
                }
                table::render(&rows)
            }
        })
    }
}

/// The items of a list, or the object alone.
fn list_items(object: &Value) -> Vec<&Value> {
    match object.get("items").and_then(Value::as_array) {
        Some(items) => items.iter().collect(),
        None => vec![object],
    }
}

fn reference(object: &Value, resource: Option<&Resource>) -> String {
    match resource {
        Some(resource) => resource.reference(name(object)),
        None => {
            let (group, _) = apimachinery::meta::split_api_version(crate::objects::api_version(object));
            let kind = crate::objects::kind(object).to_lowercase();
            format!("{}/{}", apimachinery::meta::group_resource(group, &kind), name(object))
        }
    }
}

/// JSON as kubectl prints it: four blanks deep, ending in a line break.
pub(crate) fn json_text(value: &Value) -> Result<String> {
    use serde::Serialize;
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    value.serialize(&mut serde_json::Serializer::with_formatter(&mut bytes, formatter))?;
    bytes.push(b'\n');
    Ok(String::from_utf8(bytes)?)
}

fn custom_columns(text: &str) -> Result<Vec<(String, jsonpath::Path)>> {
    if text.is_empty() {
        bail!("custom-columns format specified but no custom columns given");
    }
    text.split(',')
        .map(|column| match column.split_once(':') {
            Some((heading, path)) => Ok((heading.to_owned(), jsonpath::Path::parse_relaxed(path)?)),
            None => bail!("unexpected custom-columns spec: {column}, expected <header>:<json-path-expr>"),
        })
        .collect()
}

/// Two lines: headings, and below them paths.
fn custom_columns_file(text: &str) -> Result<Vec<(String, jsonpath::Path)>> {
    let mut lines = text.lines().filter(|line| !line.trim().is_empty());
    let (Some(headings), Some(paths)) = (lines.next(), lines.next()) else {
        bail!("expected two lines of columns and paths");
    };
    let (headings, paths): (Vec<_>, Vec<_>) =
        (headings.split_whitespace().collect(), paths.split_whitespace().collect());
    if headings.len() != paths.len() {
        bail!("number of headers ({}) and field specifications ({}) don't match", headings.len(), paths.len());
    }
    headings
        .into_iter()
        .zip(paths)
        .map(|(heading, path)| Ok((heading.to_owned(), jsonpath::Path::parse_relaxed(path)?)))
        .collect()
}

fn column_text(path: &jsonpath::Path, object: &Value) -> String {
    let found = path.find(object);
    if found.is_empty() {
        return "<none>".to_owned();
    }
    found.into_iter().map(jsonpath::plain).collect::<Vec<_>>().join(",")
}

/// Objects as the one list that kubectl prints for several.
pub(crate) fn list_of(mut objects: Vec<Value>) -> Value {
    objects.iter_mut().for_each(strip_managed_fields);
    json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": objects})
}

/// `5d`, `3h12m`, `90s`. As `duration.HumanDuration`.
pub(crate) fn human_duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    let (minutes, hours, days, years) = (seconds / 60, seconds / 3600, seconds / 86400, seconds / 31_536_000);
    let pair = |whole: u64, unit: &str, rest: u64, rest_unit: &str| match rest {
        0 => format!("{whole}{unit}"),
        _ => format!("{whole}{unit}{rest}{rest_unit}"),
    };
    match seconds {
        0..120 => format!("{seconds}s"),
        120..600 => pair(minutes, "m", seconds % 60, "s"),
        600..10_800 => format!("{minutes}m"),
        10_800..28_800 => pair(hours, "h", minutes % 60, "m"),
        28_800..172_800 => format!("{hours}h"),
        172_800..691_200 => pair(days, "d", hours % 24, "h"),
        691_200..63_072_000 => format!("{days}d"),
        63_072_000..252_288_000 => pair(years, "y", days % 365, "d"),
        _ => format!("{years}y"),
    }
}

/// The age since a time in RFC 3339; `<unknown>` without one.
pub(crate) fn age(time: &str) -> String {
    match time.parse::<Timestamp>() {
        Ok(since) => human_duration(Duration::try_from(Timestamp::now().duration_since(since)).unwrap_or_default()),
        Err(_) => "<unknown>".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_as_kubectls() {
        for (seconds, expected) in [
            (1, "1s"),
            (70, "70s"),
            (120, "2m"),
            (190, "3m10s"),
            (1210, "20m"),
            (3600 * 3 + 60, "3h1m"),
            (3600 * 9, "9h"),
            (3600 * 70, "2d22h"),
            (3600 * 24 * 9, "9d"),
            (3600 * 24 * 365 * 2, "2y"),
            (3600 * 24 * (365 * 3 + 5), "3y5d"),
            (3600 * 24 * 365 * 9, "9y"),
        ] {
            assert_eq!(human_duration(Duration::from_secs(seconds)), expected);
        }
    }

    #[test]
    fn objects_are_shown_in_every_format() {
        let pod = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "labels": {"a": "b"}}});
        let list = list_of(vec![pod.clone(), pod.clone()]);
        for (format, object, expected) in [
            ("name", &pod, "pod/p\n"),
            ("name", &list, "pod/p\npod/p\n"),
            ("jsonpath={.metadata.name}", &pod, "p"),
            ("custom-columns=NAME:.metadata.name,X:.spec.x", &list, "NAME   X\np      <none>\np      <none>\n"),
            ("yaml", &json!({"b": 1, "a": ["x"]}), "a:\n- x\nb: 1\n"),
            ("json", &json!({"a": 1}), "{\n    \"a\": 1\n}\n"),
        ] {
            let format = Format::parse(Some(format)).expect(format);
            assert_eq!(format.render(object, None, false).expect("text"), expected);
        }
    }

    #[test]
    fn unknown_formats_are_errors() {
        for format in ["nonsense", "jsonpath", "custom-columns=NAME", "json=x"] {
            assert!(Format::parse(Some(format)).is_err(), "{format}");
        }
    }
}
