//! `api-resources`, `api-versions` and `explain`: what the server serves, and its documentation.

use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::Args;
use serde_json::Value;

use crate::cluster::{Cluster, Resource};
use crate::flags::GlobalFlags;
use crate::objects::{items, text};
use crate::output::table;

/// Print the supported API resources on the server
#[derive(Debug, Args)]
pub(crate) struct ApiResourcesArgs {
    /// Only of this group
    #[arg(long)]
    api_group: Option<String>,
    /// Only namespaced ones, or only others
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    namespaced: Option<bool>,
    #[arg(long, value_delimiter = ',')]
    verbs: Vec<String>,
    #[arg(long, value_delimiter = ',')]
    categories: Vec<String>,
    /// wide or name
    #[arg(short = 'o', long)]
    output: Option<String>,
    #[arg(long)]
    no_headers: bool,
    /// name or kind
    #[arg(long)]
    sort_by: Option<String>,
}

/// Get documentation for a resource
#[derive(Debug, Args)]
pub(crate) struct ExplainArgs {
    /// TYPE[.FIELD…]
    path: String,
    /// Of all fields below
    #[arg(long)]
    recursive: bool,
    /// GROUP/VERSION
    #[arg(long)]
    api_version: Option<String>,
}

pub(crate) async fn api_resources(args: ApiResourcesArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    let discovery = cluster.discovery().await?;
    let mut shown: Vec<&Resource> = Vec::new();
    for resource in &discovery.resources {
        let preferred = !shown.iter().any(|known| known.group == resource.group && known.name == resource.name);
        let wanted = args.api_group.as_ref().is_none_or(|group| *group == resource.group)
            && args.namespaced.is_none_or(|namespaced| namespaced == resource.namespaced)
            && args.verbs.iter().all(|verb| resource.has_verb(verb))
            && args.categories.iter().all(|category| resource.categories.contains(category));
        if preferred && wanted && !resource.verbs.is_empty() {
            shown.push(resource);
        }
    }
    match args.sort_by.as_deref() {
        None | Some("name") => shown.sort_by(|a, b| (&a.group, &a.name).cmp(&(&b.group, &b.name))),
        Some("kind") => shown.sort_by(|a, b| a.kind.cmp(&b.kind)),
        Some(other) => bail!("--sort-by accepts only name or kind, not {other}"),
    }
    if args.output.as_deref() == Some("name") {
        for resource in shown {
            println!("{}", resource.qualified_name());
        }
        return Ok(ExitCode::SUCCESS);
    }
    let wide = match args.output.as_deref() {
        None => false,
        Some("wide") => true,
        Some(other) => bail!("--output {other} is not available"),
    };
    let mut rows = Vec::new();
    if !args.no_headers {
        let mut head = vec!["NAME", "SHORTNAMES", "APIVERSION", "NAMESPACED", "KIND"];
        if wide {
            head.extend(["VERBS", "CATEGORIES"]);
        }
        rows.push(head.into_iter().map(str::to_owned).collect());
    }
    for resource in shown {
        let mut row = vec![
            resource.name.clone(),
            resource.short_names.join(","),
            resource.api_version(),
            resource.namespaced.to_string(),
            resource.kind.clone(),
        ];
        if wide {
            row.extend([resource.verbs.join(","), resource.categories.join(",")]);
        }
        rows.push(row);
    }
    print!("{}", table::render(&rows));
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn api_versions(flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    let mut versions = cluster.discovery().await?.versions.clone();
    versions.sort();
    for version in versions {
        println!("{version}");
    }
    Ok(ExitCode::SUCCESS)
}

pub(crate) async fn explain(args: ExplainArgs, flags: &GlobalFlags) -> Result<ExitCode> {
    let cluster = Cluster::connect(flags).await?;
    let mut parts = args.path.split('.');
    let word = parts.next().unwrap_or_default();
    let mut resource = cluster.resource(word).await?;
    if let Some(api_version) = &args.api_version {
        resource = cluster.resource_of_kind(api_version, &resource.kind).await?;
    }
    let root = if resource.group.is_empty() { "api" } else { "apis" };
    let document = cluster.get(&format!("/openapi/v3/{root}/{}", resource.api_version())).await?;
    let Some(top) = schema_of(&document, &resource) else {
        bail!("couldn't find resource for {:?}", format!("{}, Kind={}", resource.api_version(), resource.kind));
    };
    let (mut schema, mut field) = (top, None);
    for part in parts {
        let Some(next) = properties(&document, schema).and_then(|properties| properties.get(part)) else {
            bail!("field {part:?} does not exist");
        };
        field = Some((part, next));
        schema = next;
    }
    println!("{}", explanation(&document, &resource, schema, field, args.recursive));
    Ok(ExitCode::SUCCESS)
}

fn schema_of<'a>(document: &'a Value, resource: &Resource) -> Option<&'a Value> {
    let schemas = document.pointer("/components/schemas")?.as_object()?;
    schemas.values().find(|schema| {
        items(schema, "/x-kubernetes-group-version-kind").iter().any(|gvk| {
            text(gvk, "/group") == resource.group
                && text(gvk, "/version") == resource.version
                && text(gvk, "/kind") == resource.kind
        })
    })
}

/// Follows `$ref`, `allOf` and the items of lists and maps to a type.
fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    let mut schema = schema;
    // References in a schema do not go deeper than this.
    for _ in 0..16 {
        if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
            schema = &document["components"]["schemas"][name];
        } else if let Some(first) = items(schema, "/allOf").first() {
            schema = first;
        } else if schema["properties"].is_null() && schema["items"].is_object() {
            schema = &schema["items"];
        } else if schema["properties"].is_null() && schema["additionalProperties"].is_object() {
            schema = &schema["additionalProperties"];
        } else {
            break;
        }
    }
    schema
}

fn properties<'a>(document: &'a Value, schema: &'a Value) -> Option<&'a serde_json::Map<String, Value>> {
    resolve(document, schema)["properties"].as_object()
}

/// `string`, `[]Container`, `map[string]string`.
fn type_name(document: &Value, schema: &Value) -> String {
    if let Some(name) = schema["$ref"].as_str().and_then(|path| path.rsplit('/').next()) {
        let target = &document["components"]["schemas"][name];
        // Quantities, times and their like are strings with a name.
        let short = name.rsplit('.').next().unwrap_or(name);
        return match target["type"].as_str() {
            Some("object") | None => short.to_owned(),
            Some(_) => short.to_owned(),
        };
    }
    if let Some(first) = items(schema, "/allOf").first() {
        return type_name(document, first);
    }
    match text(schema, "/type") {
        "array" => format!("[]{}", type_name(document, &schema["items"])),
        "object" if schema["additionalProperties"].is_object() => {
            format!("map[string]{}", type_name(document, &schema["additionalProperties"]))
        }
        "object" => "Object".to_owned(),
        "" => "<unknown>".to_owned(),
        other => other.to_owned(),
    }
}

fn explanation(
    document: &Value,
    resource: &Resource,
    schema: &Value,
    field: Option<(&str, &Value)>,
    recursive: bool,
) -> String {
    let mut out = String::new();
    if !resource.group.is_empty() {
        out.push_str(&format!("GROUP:      {}\n", resource.group));
    }
    out.push_str(&format!("KIND:       {}\nVERSION:    {}\n\n", resource.kind, resource.version));
    if let Some((name, schema)) = field {
        out.push_str(&format!("FIELD: {name} <{}>\n\n\n", type_name(document, schema)));
    }
    out.push_str("DESCRIPTION:\n");
    let resolved = resolve(document, schema);
    let described = [text(schema, "/description"), text(resolved, "/description")];
    let mut shown: Vec<&str> = described.into_iter().filter(|words| !words.is_empty()).collect();
    shown.dedup();
    let is_described = !shown.is_empty();
    if !is_described {
        shown.push("<empty>");
    }
    for words in shown {
        out.push_str(&wrap(words, 4));
    }
    if is_described {
        out.push('\n');
    }
    if let Some(properties) = resolved["properties"].as_object() {
        out.push_str("FIELDS:\n");
        fields(document, resolved, properties, 2, recursive, &mut out);
    }
    out
}

fn fields(
    document: &Value,
    schema: &Value,
    properties: &serde_json::Map<String, Value>,
    indent: usize,
    recursive: bool,
    out: &mut String,
) {
    // Schemas may contain themselves (JSONSchemaProps).
    const DEPTH_MAX: usize = 24;
    for (name, field) in properties {
        let required = items(schema, "/required").iter().any(|required| required == name);
        let mark = if required { " -required-" } else { "" };
        out.push_str(&format!("{}{name}\t<{}>{mark}\n", " ".repeat(indent), type_name(document, field)));
        let resolved = resolve(document, field);
        if recursive {
            if let Some(inner) = resolved["properties"].as_object().filter(|_| indent < DEPTH_MAX) {
                fields(document, resolved, inner, indent + 2, recursive, out);
            }
        } else {
            let described = text(field, "/description");
            out.push_str(&wrap(if described.is_empty() { "<no description>" } else { described }, indent + 2));
            out.push('\n');
        }
    }
}

/// Breaks a text into lines of 80 at most.
fn wrap(words: &str, indent: usize) -> String {
    let mut out = String::new();
    for paragraph in words.lines() {
        let mut line = " ".repeat(indent);
        for word in paragraph.split_whitespace() {
            if line.len() + word.len() >= 80 && line.trim() != "" {
                out.push_str(line.trim_end());
                out.push('\n');
                line = " ".repeat(indent);
            }
            line.push_str(word);
            line.push(' ');
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn types_are_named_and_fields_found() {
        let document = json!({"components": {"schemas": {
            "io.k8s.api.core.v1.Pod": {"properties": {"spec": {"allOf": [{"$ref": "#/components/schemas/io.k8s.api.core.v1.PodSpec"}]}}},
            "io.k8s.api.core.v1.PodSpec": {"type": "object", "properties": {
                "containers": {"type": "array", "items": {"$ref": "#/components/schemas/io.k8s.api.core.v1.Container"}},
                "nodeSelector": {"type": "object", "additionalProperties": {"type": "string"}}}},
            "io.k8s.api.core.v1.Container": {"type": "object", "properties": {"image": {"type": "string"}}},
        }}});
        let pod = &document["components"]["schemas"]["io.k8s.api.core.v1.Pod"];
        let spec = &properties(&document, pod).expect("pod")["spec"];
        assert_eq!(type_name(&document, spec), "PodSpec");
        let inner = properties(&document, spec).expect("spec");
        assert_eq!(type_name(&document, &inner["containers"]), "[]Container");
        assert_eq!(type_name(&document, &inner["nodeSelector"]), "map[string]string");
        assert!(properties(&document, &inner["containers"]).expect("container").contains_key("image"));
    }

    #[test]
    fn long_texts_are_broken() {
        let wrapped = wrap(&"word ".repeat(40), 4);
        assert!(wrapped.lines().all(|line| line.len() <= 80 && line.starts_with("    ")), "{wrapped}");
    }
}
